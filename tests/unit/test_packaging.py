"""From a folder to a package and back: what goes in, what stays out, what is refused; and that nothing can be written
outside the folder that a package is unpacked into.

Packing is tested without a cluster: `pack` calls what `pack_environment` calls, but for the upload.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import stat
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest

from ftray.api import packaging
from ftray.api.ignoring import Rules, left_out
from ftray.exceptions import RuntimeEnvSetupError
from ftray.ids import content_hash
from ftray.raylet.packages import DEPTH_MAX, Manifest, PackageError, package_uri, unpack
from ftray.runtime_env import PACKAGE_URI, RuntimeEnv

LIMIT = 1 << 20


def pack(folder: Path, *excludes: str, prefix: str = "", bytes_max: int = LIMIT, gitignore: bool = True) -> bytes:
    walk = packaging._Walk("working_dir", str(folder), bytes_max, excludes, gitignore)
    if walk.unreadable:
        raise packaging._unreadable("working_dir", str(folder), walk.unreadable)
    return packaging._zip("working_dir", str(folder), prefix, tuple(walk.members), bytes_max)


def names(data: bytes) -> list[str]:
    return [name for name in zipfile.ZipFile(io.BytesIO(data)).namelist() if not name.endswith("/")]


def tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def put(root: Path, *paths: str) -> Path:
    for name in paths:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


# --- what goes in ---------------------------------------------------------------------------------------------------


def test_the_same_content_is_the_same_package(tmp_path: Path) -> None:
    one = put(tmp_path / "one", "b.py", "a/c.txt", "d/e/f")
    two = put(tmp_path / "two", "d/e/f", "a/c.txt", "b.py")
    os.utime(two / "b.py", (1, 1))
    assert pack(one) == pack(two)
    (two / "b.py").chmod(0o755)
    assert pack(one) != pack(two)
    (one / "b.py").chmod(0o755)
    assert pack(one) == pack(two)
    (two / "b.py").write_text("other")
    assert pack(one) != pack(two)


def test_a_package_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = put(tmp_path / "folder", "a.py", "sub/b.txt", "sub/ä ö.txt")
    (folder / "empty").mkdir()
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o700)
    data = pack(folder, prefix="pkg/")
    target = tmp_path / "out"
    unpack(data, content_hash(data), str(target), LIMIT, lambda: False)
    assert (target / "pkg/sub/ä ö.txt").read_text() == "sub/ä ö.txt"
    assert (target / "pkg/empty").is_dir()
    assert os.access(target / "pkg/run.sh", os.X_OK) and not os.access(target / "pkg/a.py", os.X_OK)
    assert not Path(f"{target}.part").exists()


def test_links_are_followed_but_not_in_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outside = put(tmp_path / "outside", "x/data.txt")
    folder = put(tmp_path / "folder", "sub/a.py")
    (folder / "file").symlink_to(outside / "x/data.txt")
    (folder / "linked").symlink_to(outside / "x")
    (folder / "sub/up").symlink_to(folder)
    (folder / "sub/self").symlink_to(folder / "sub/self")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    walk = packaging._Walk("working_dir", str(folder), LIMIT, (), True)
    assert names(pack(folder)) == ["file", "linked/data.txt", "sub/a.py"]
    assert not walk.unreadable
    assert sorted(walk.odd) == [
        "gone (a link to nothing)", "sub/self (a link to nothing)", "sub/up (a link to a folder above it)",
    ]  # fmt: skip


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    folder = put(tmp_path / "folder", "a.py")
    os.mkfifo(folder / "pipe")
    (folder / "null").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "sock"))
        walk = packaging._Walk("working_dir", str(folder), LIMIT, (), True)
        assert names(pack(folder)) == ["a.py"]
    assert walk.odd == ["null (a device)", "pipe (a pipe)", "sock (a socket)"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "folder", "a.py")
    (folder / "memory").symlink_to("/proc/self/mem")  # a file that nobody can read from its beginning
    with pytest.raises(RuntimeEnvSetupError, match=r"can't all be read: memory \(.+\)\. Make it readable"):
        pack(folder)
    assert names(pack(folder, "memory")) == ["a.py"]
    (folder / "memory").unlink()
    with open(os.fsencode(folder) + b"/\xff.txt", "w"):
        pass
    with pytest.raises(RuntimeEnvSetupError, match="its name is not UTF-8"):
        pack(folder)


def test_folders_in_folders_have_an_end(tmp_path: Path) -> None:
    """Removing them would fail where they are unpacked, and leave them there."""
    deepest = tmp_path / "folder" / "/".join("d" * DEPTH_MAX)
    put(deepest, "file")
    data = pack(tmp_path / "folder", prefix="pkg/")
    assert names(data) == ["pkg/" + "d/" * DEPTH_MAX + "file"]
    unpack(data, content_hash(data), str(tmp_path / "out"), LIMIT, lambda: False)
    put(deepest, "one/more")
    with pytest.raises(RuntimeEnvSetupError, match="nested more deeply than 256, such as d/d/.*excludes"):
        pack(tmp_path / "folder")
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("d/" * 3000 + "file", "")
    data = sink.getvalue()
    with pytest.raises(PackageError, match="nested more deeply than 256 folders"):
        unpack(data, content_hash(data), str(tmp_path / "bad"), LIMIT, lambda: False)


def test_what_vanishes_while_it_is_packed_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(tmp_path / "folder", "a.py", "gone/x", "gone/y", "late.tmp", "sub/.gitignore", "sub/b.py")
    real = packaging.left_out

    def look(rules: Iterable[Rules], path: str, is_dir: bool) -> bool:
        # Between being listed and being looked at, or read.
        if path == "gone":
            shutil.rmtree(folder / "gone")
        elif path == "sub/b.py":
            (folder / "late.tmp").unlink()
        return real(rules, path, is_dir)

    monkeypatch.setattr(packaging, "left_out", look)
    assert names(pack(folder)) == ["a.py", "sub/.gitignore", "sub/b.py"]


def test_a_folder_that_is_too_large_says_what_is_large(tmp_path: Path) -> None:
    folder = put(tmp_path / "folder", "a.py")
    with open(folder / "model.bin", "wb") as file:
        file.truncate(LIMIT + 1)  # not read for that
    with pytest.raises(RuntimeEnvSetupError, match=r"more than 1,048,576 bytes.*model\.bin \(1,048,577.*excludes"):
        pack(folder)
    assert names(pack(folder, "*.bin")) == ["a.py"]


# --- what stays out -------------------------------------------------------------------------------------------------


def test_patterns_leave_out(tmp_path: Path) -> None:
    folder = put(
        tmp_path, "a.py", "a.log", "sub/b.log", "sub/keep.log", "build/x", "sub/build/x", "data/raw/1", "data/2",
        ".git/config", "__pycache__/a.pyc", "venv/x", ".hidden",
    )  # fmt: skip
    assert names(pack(folder, "*.log", "/build/", "data/raw")) == [
        ".hidden", "a.py", "data/2", "sub/build/x",
    ]  # fmt: skip
    (folder / ".gitignore").write_text("*.log\n!keep.log\n# comment\n/build\n")
    (folder / "sub/.gitignore").write_text("/build\n")
    assert names(pack(folder, "data")) == [".gitignore", ".hidden", "a.py", "sub/.gitignore", "sub/keep.log"]
    # `excludes` has the last word, also to take back.
    assert "a.log" in names(pack(folder, "!a.log", "!venv/")) and "venv/x" in names(pack(folder, "!venv/"))
    assert "build/x" in names(pack(folder, gitignore=False))


def test_ignore_files_of_our_own_and_of_ray(tmp_path: Path) -> None:
    folder = put(tmp_path, "a.py", "b.log", "c.bin", "sub/d.bin", "sub/e.tmp")
    (folder / ".gitignore").write_text("*.log\n")
    (folder / ".rayignore").write_text("*.bin\n!b.log\n")
    (folder / "sub/.ftrayignore").write_text("e.tmp\n!d.bin\n")
    found = [".gitignore", ".rayignore", "a.py", "b.log", "sub/.ftrayignore", "sub/d.bin"]
    assert names(pack(folder)) == names(pack(folder, gitignore=False)) == found


@pytest.mark.skipif(shutil.which("git") is None, reason="git is the judge")
def test_patterns_mean_what_they_mean_to_git(tmp_path: Path) -> None:
    draw = Random(20)
    parts = ["a", "b", "ab", "a.py", "[x]", "b-c", " d", "!e", "#f", "c]"]
    pieces = [
        "*", "?", "**", "a", "b", "/", "[ab]", "[!a]", "[a-c]", ".py", "\\*", "\\!", "[[:alpha:]]", "#", " ", "!",
        "[]]", "[^b]", "c]", "***", "/**/", "**/",
    ]  # fmt: skip
    for number in range(25):
        folder = tmp_path / str(number)
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        paths = {"/".join(draw.choice(parts) for _ in range(draw.randint(1, 3))) for _ in range(25)}
        files = sorted(path for path in paths if not any(other.startswith(path + "/") for other in paths))
        put(folder, *files)
        lines = [
            draw.choice(["", "", "", "!"])
            + "".join(draw.choice(pieces) for _ in range(draw.randint(1, 5)))
            + draw.choice(["", "", "", "/"])
            for _ in range(draw.randint(1, 4))
        ]
        (folder / ".gitignore").write_text("\n".join(lines) + "\n")
        judge = subprocess.run(
            ["git", "-C", str(folder), "-c", "core.excludesFile=/dev/null", "check-ignore", "--stdin", "-z"],
            input="\0".join(files), capture_output=True, text=True,
        )  # fmt: skip
        rules = [Rules("", lines)]

        def ignored(path: str, rules: list[Rules] = rules) -> bool:
            names = path.split("/")
            return any(left_out(rules, "/".join(names[: n + 1]), n + 1 < len(names)) for n in range(len(names)))

        assert {path for path in files if ignored(path)} == set(judge.stdout.split("\0")) - {""}, lines


# --- paths ----------------------------------------------------------------------------------------------------------


def test_paths_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "file.txt", "sub/x")
    monkeypatch.chdir(tmp_path)
    cases = [
        (RuntimeEnv(working_dir="missing"), r"working_dir: 'missing' \(that is /.*/missing\) can't be used: No such"),
        (RuntimeEnv(working_dir="file.txt"), "is not the right kind of file: it must be a folder, or end with .zip"),
        (RuntimeEnv(working_dir="file.txt/x"), "can't be used: Not a directory"),
        (RuntimeEnv(working_dir="/dev/null"), "is neither a folder nor a file"),
        (RuntimeEnv(py_modules=["sub", "gone"]), "py_modules: 'gone'"),
        (RuntimeEnv(py_modules=["file.txt"]), "end with .py or .zip or .whl"),
        (RuntimeEnv(py_modules=[sys]), "module sys has no folder or file"),
        (RuntimeEnv(py_modules=[types.ModuleType("made_up")]), "made_up has no folder"),
        (RuntimeEnv(py_modules=[sys.modules["__main__"]]), "the program itself is no module"),
    ]
    for env, words in cases:
        with pytest.raises(ValueError, match=words):
            packaging.check_paths(env)
    packaging.check_paths(RuntimeEnv(working_dir="sub", py_modules=["./sub", Path("sub"), pytest]))


def test_modules_are_found_where_they_are() -> None:
    import email.mime

    import ftray.ids

    assert packaging._path_of_module(email.mime) == os.path.dirname(email.__file__)
    assert packaging._path_of_module(ftray.ids) == os.path.dirname(os.path.abspath(ftray.__file__))
    assert packaging._path_of_module(stat) == os.path.abspath(stat.__file__)


# --- unpacking ------------------------------------------------------------------------------------------------------


def archive(*members: tuple[str, bytes, int]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as made:
        for name, data, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            made.writestr(info, data)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (archive(("../evil", b"x", 0o644)), "would lie outside"),
        (archive(("a/../../evil", b"x", 0o644)), "would lie outside"),
        (archive(("/evil", b"x", 0o644)), "would lie outside"),
        (archive(("link", b"/etc", stat.S_IFLNK | 0o777), ("link/evil", b"x", 0o644)), "is a symbolic link"),
        (archive(("fifo", b"", stat.S_IFIFO | 0o644)), "is no file"),
        (archive(("big", bytes(LIMIT + 1), 0o644)), "over the limit"),
        (b"PK\x03\x04 not really", "no usable zip"),
        (b"", "no usable zip"),
        (archive(("a", b"x", 0o644))[:-10], "no usable zip"),
        (archive(("a", b"hello", 0o644)).replace(b"hello", b"jello"), "no usable zip"),
    ],
)
def test_a_bad_package_leaves_nothing(tmp_path: Path, data: bytes, words: str) -> None:
    target = tmp_path / "in" / "target"
    with pytest.raises(PackageError, match=words):
        unpack(data, content_hash(data), str(target), LIMIT, lambda: False)
    assert [str(path) for path in tmp_path.rglob("*") if path.name != "in"] == []


def test_a_file_that_is_a_folder_too_is_an_error(tmp_path: Path) -> None:
    data = archive(("a", b"x", 0o644), ("a/b", b"x", 0o644))
    with pytest.raises(OSError):
        unpack(data, content_hash(data), str(tmp_path / "target"), LIMIT, lambda: False)
    assert os.listdir(tmp_path) == []


def test_damage_and_a_stop_are_seen(tmp_path: Path) -> None:
    data = archive(("a", b"x", 0o644))
    with pytest.raises(PackageError, match="damaged: its content does not match"):
        unpack(data + b"\0", content_hash(data), str(tmp_path / "target"), LIMIT, lambda: False)
    with pytest.raises(PackageError, match="the node is stopping"):
        unpack(data, content_hash(data), str(tmp_path / "target"), LIMIT, lambda: True)
    assert os.listdir(tmp_path) == []


def test_manifests_count_chunks() -> None:
    assert [Manifest(size, 4).chunks for size in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    match = PACKAGE_URI.fullmatch(package_uri(b"x", "whl"))
    assert match is not None and match[1] == content_hash(b"x").hex()
