"""Spill files: what is written comes back or is known to be damaged, a full disk is told, three lanes, a clean end."""

from __future__ import annotations

import errno
import os
import resource
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftray.raylet import session, spill_files
from ftray.raylet.spill_files import Done, SpillFiles
from ftray.store.arena import Arena
from ftray.store.spill_io import (
    CHUNK_BYTES,
    FULL_ERRORS,
    SpillDamagedError,
    SpillStoppedError,
    read_file,
    unlink_file,
    write_file,
)
from ftray.store.table import Job

SIZE = 2 * CHUNK_BYTES + 777
LIMIT_S = 20.0


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def data() -> memoryview:
    return memoryview(os.urandom(SIZE))


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4096, CHUNK_BYTES, SIZE])
def test_what_is_written_comes_back(tmp_path: Path, data: memoryview, size: int) -> None:
    path = str(tmp_path / "new" / "1")
    checksum = write_file(path, data[:size], never)
    back = bytearray(size)
    read_file(path, checksum, memoryview(back))
    assert back == data[:size]
    assert os.stat(path).st_mode & 0o777 == 0o600
    unlink_file(path)
    unlink_file(path)
    assert not os.path.exists(path)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: flip(path, 0), "has the checksum"),
        (lambda path: flip(path, SIZE - 1), "has the checksum"),
        (lambda path: os.truncate(path, SIZE - 1), "instead of"),
        (lambda path: os.truncate(path, SIZE + 1), "instead of"),
        (lambda path: os.truncate(path, 0), "has 0 bytes"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "bytes instead of"),
    ],
)
def test_damage_is_found(tmp_path: Path, data: memoryview, spoil: Any, says: str) -> None:
    path = tmp_path / "1"
    checksum = write_file(str(path), data, never)
    spoil(path)
    with pytest.raises(SpillDamagedError, match=says):
        read_file(str(path), checksum, memoryview(bytearray(SIZE)))


def test_a_file_in_the_place_of_another_is_found(tmp_path: Path, data: memoryview) -> None:
    first = write_file(str(tmp_path / "1"), data, never)
    write_file(str(tmp_path / "2"), memoryview(bytes(SIZE)), never)
    os.replace(tmp_path / "2", tmp_path / "1")
    with pytest.raises(SpillDamagedError):
        read_file(str(tmp_path / "1"), first, memoryview(bytearray(SIZE)))


def test_what_may_pass_is_not_called_damage(tmp_path: Path, data: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    checksum = write_file(str(tmp_path / "1"), data, never)

    def no_descriptors(*args: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", no_descriptors)
    with pytest.raises(OSError, match="Too many"):
        read_file(str(tmp_path / "1"), checksum, memoryview(bytearray(SIZE)))


def test_a_file_that_cannot_be_whole_is_not_there(tmp_path: Path, data: memoryview) -> None:
    with pytest.raises(SpillStoppedError):
        write_file(str(tmp_path / "1"), data, lambda: True)
    # A limit on the size of files is met where a full disk would be.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_file(str(tmp_path / "1"), data, never)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in FULL_ERRORS
    assert not list(tmp_path.iterdir())


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(8 * CHUNK_BYTES)
    yield made
    made.close()


@pytest.fixture
def files(tmp_path: Path, arena: Arena) -> Iterator[SpillFiles]:
    made = SpillFiles(str(tmp_path / "spill"), arena)
    yield made
    made.close()


def done(files: SpillFiles, count: int = 1) -> list[Done]:
    found: list[Done] = []
    while len(found) < count:
        assert select.select([files.fileno()], [], [], LIMIT_S)[0], "nothing comes"
        found += files.take_done()
    return found


def test_bytes_go_to_the_disk_and_back(files: SpillFiles, arena: Arena, data: memoryview) -> None:
    arena.write_view(4096, SIZE)[:] = data
    files.submit(Job(7, 4096, SIZE))
    (written,) = done(files)
    assert (written.job.number, written.error) == (7, "")
    arena.write_view(0, 8 * CHUNK_BYTES)[:] = bytes(8 * CHUNK_BYTES)
    files.submit(Job(8, 8192, SIZE, 7, written.checksum))
    assert done(files) == [Done(Job(8, 8192, SIZE, 7, written.checksum))]
    assert arena.write_view(8192, SIZE) == data
    flip(Path(files.path(7)), 5)
    files.submit(Job(9, 0, SIZE, 7, written.checksum))
    (damaged,) = done(files)
    assert damaged.damaged
    assert "has the checksum" in damaged.error


def test_a_full_disk_and_other_failures_are_told(
    files: SpillFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "no"), ValueError("odd")]

    def fail(*args: Any) -> int:
        raise errors.pop(0)

    monkeypatch.setattr(spill_files, "write_file", fail)
    for number in (1, 2, 3):
        files.submit(Job(number, 0, 10))
    told = done(files, 3)
    assert [(each.error, each.disk_full) for each in told] == [
        ("No space left on device", True), ("no", False), ("ValueError('odd')", False)
    ]  # fmt: skip


def test_a_write_that_hangs_delays_neither_reads_nor_removals(
    files: SpillFiles, arena: Arena, data: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena.write_view(0, SIZE)[:] = data
    files.submit(Job(1, 0, SIZE))
    files.submit(Job(2, 0, SIZE))
    checksum = done(files, 2)[0].checksum
    go_on, real = threading.Event(), write_file

    def hang(*args: Any) -> int:
        assert go_on.wait(LIMIT_S)
        return real(*args)

    monkeypatch.setattr(spill_files, "write_file", hang)
    removed = threading.Event()
    monkeypatch.setattr(spill_files, "unlink_file", lambda path: (unlink_file(path), removed.set()))
    files.submit(Job(3, 0, SIZE))
    files.submit(Job(4, 0, SIZE, 1, checksum))
    assert [each.job.number for each in done(files)] == [4]
    files.unlink((2,))
    assert removed.wait(LIMIT_S)
    assert sorted(os.listdir(os.path.dirname(files.path(1)))) == ["1"]
    go_on.set()
    assert [each.job.number for each in done(files)] == [3]


def test_the_end_comes_in_the_middle_of_a_write(tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SpillFiles(str(tmp_path / "spill"), arena)
    writing, real = threading.Event(), write_file

    def write(path: str, view: memoryview, is_stopped: Any) -> int:
        def look() -> bool:
            writing.set()
            while not is_stopped():
                pass
            return True

        return real(path, view, look)

    monkeypatch.setattr(spill_files, "write_file", write)
    files.submit(Job(1, 0, SIZE))
    files.submit(Job(2, 0, SIZE))
    assert writing.wait(LIMIT_S)
    files.close()
    assert not os.listdir(tmp_path / "spill")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ftray-spill")]


# --- where they lie ---------------------------------------------------------------------------------------------------


def test_files_elsewhere_go_with_the_session(tmp_path: Path, data: memoryview) -> None:
    disk, folder = tmp_path / "disk", str(tmp_path / "session")
    disk.mkdir()
    os.mkdir(folder)
    session.spill_elsewhere(folder, str(disk))
    checksum = write_file(os.path.join(folder, "spill", "1"), data, never)
    (target,) = disk.iterdir()
    assert os.listdir(target) == ["1"]
    read_file(os.path.join(folder, "spill", "1"), checksum, memoryview(bytearray(SIZE)))
    session.clean_session(folder)
    assert not list(disk.iterdir())
    assert not os.path.lexists(os.path.join(folder, "spill"))
    # A link that is not of our making loses nothing but itself.
    (disk / "mine").mkdir()
    os.symlink(disk / "mine", os.path.join(folder, "spill"))
    session.clean_session(folder)
    assert (disk / "mine").is_dir()
    with pytest.raises(session.SessionError, match="cannot spill objects to .*FTRAY_SPILL_DIRECTORY"):
        session.spill_elsewhere(folder, str(tmp_path / "nowhere"))
