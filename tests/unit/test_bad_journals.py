"""What is wrong with a head's directory is named and refused; what a crash cut short, and nothing else, is cut off."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from heads_world import HeadsWorld
from wire_hosts import install_clock

from ftray.gcs.files import OsFiles
from ftray.gcs.journal import Journal
from ftray.gcs.journal_format import FRAME_HEAD_BYTES, HEADER_BYTES
from ftray.gcs.raft.errors import MembershipMismatchError
from ftray.gcs.raft.replica import RaftReplica
from ftray.gcs.raft_host import HEADS_JOURNAL_NAME
from ftray.gcs.replica import JOURNAL_NAME, Request, SingleReplica
from ftray.gcs.state.commands import KvPut, encode_command
from ftray.gcs.state.errors import GcsError, JournalCorruptError, JournalOpenError
from ftray.raylet.hosting import Hosting
from ftray.raylet.spec import NodeSpec

CLUSTER = b"c" * 16


class Silent:
    """A transport without anybody at the other end."""

    def send(self, link: object, data: bytes) -> None: ...
    def close(self, link: object, reason: str) -> None: ...


def write(key: bytes) -> bytes:
    return encode_command(KvPut("ns", key, b"v"))


class Single:
    """A head that is alone."""

    name = JOURNAL_NAME
    step = 1
    """Each so many bytes are damaged."""

    def __init__(self, directory: Path) -> None:
        self.replica = SingleReplica(directory, CLUSTER, fsync=False)
        self.note = self.replica.note

    def put(self, key: bytes) -> None:
        assert self.replica.submit(b"", 0, write(key)).ok

    def idle(self) -> None:
        self.replica.flush()

    def keys(self) -> list[bytes]:
        return self.replica.state.kv_keys("ns")

    def compact(self) -> None:
        self.replica.compact()

    def kill(self) -> None:
        journal = self.replica._journal
        assert journal is not None
        journal._release()
        self.replica._journal = None


class OneOfSeveral(Single):
    """A head that could have others, and has none yet."""

    name = HEADS_JOURNAL_NAME
    step = 11

    def __init__(self, directory: Path) -> None:
        journal = Journal.open(directory / self.name, CLUSTER, fsync=False)
        self.now_ms = 0.0
        try:
            self.raft = RaftReplica(
                journal, endpoint="h:1", heads=["h:1"], transport=Silent(), now_ms=lambda: self.now_ms,
                rng=random.Random(1),
            )  # fmt: skip
        except BaseException:
            journal._release()
            raise
        self.note = journal.note
        while not self.raft.is_leader:
            self.idle()

    def put(self, key: bytes) -> None:
        results: list[bool] = []
        self.raft.propose(Request(b"", 0, write(key)), lambda result: results.append(result.ok))
        while not results:
            self.idle()
        assert results == [True]

    def idle(self) -> None:
        self.now_ms += 10.0
        self.raft.flush()

    def keys(self) -> list[bytes]:
        return self.raft.state.kv_keys("ns")

    def compact(self) -> None:
        self.raft.compact()

    def kill(self) -> None:
        journal = self.raft._journal
        assert isinstance(journal, Journal)
        journal._release()
        self.raft._journal = None


KINDS = [Single, OneOfSeveral]
KEYS = [b"a", b"b", b"c"]


def made(kind: type[Single], directory: Path, idle: bool = True) -> bytes:
    """The journal of a head that was killed after three writes; `idle`: it had nothing to do before that."""
    head = kind(directory)
    for key in KEYS:
        head.put(key)
    if idle:
        head.idle()
        head.idle()
    head.kill()
    return (directory / kind.name).read_bytes()


def opened(kind: type[Single], directory: Path, data: bytes) -> tuple[list[bytes], str] | GcsError:
    """What a head makes of such a journal: its keys and its note, or why it does not start."""
    (directory / kind.name).write_bytes(data)
    try:
        head = kind(directory)
    except GcsError as error:
        return error
    found = head.keys(), head.note
    head.kill()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_byte_flipped_is_noticed_and_nothing_is_lost(kind: type[Single], tmp_path: Path) -> None:
    data = made(kind, tmp_path)
    seal = len(data) - FRAME_HEAD_BYTES
    for position in range(0, len(data), kind.step):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        found = opened(kind, tmp_path, bytes(damaged))
        if position >= seal:  # that all before it is complete is not known then, and it is
            assert not isinstance(found, GcsError) and found[0] == KEYS and "unfinished write" in found[1]
        else:
            assert isinstance(found, JournalCorruptError), (position, found)
            assert str(tmp_path / kind.name) in str(found) and "ftray heads replace" in str(found)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_at_each_byte_it_ends_before_a_batch(kind: type[Single], tmp_path: Path) -> None:
    """A file that is shorter than it was can't be told from one that a crash kept from growing."""
    data = made(kind, tmp_path)
    seen = set()
    for length in range(0, len(data), kind.step):
        found = opened(kind, tmp_path, data[:length])
        if length < HEADER_BYTES:
            assert isinstance(found, JournalCorruptError) and "cut short" in str(found)
        else:
            assert not isinstance(found, GcsError), (length, found)
            assert found[0] == KEYS[: len(found[0])]
            seen.add(len(found[0]))
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zeros", [1, 512, 8192])
def test_zeros_after_a_loss_of_power_are_cut_off(kind: type[Single], zeros: int, tmp_path: Path) -> None:
    for idle in (False, True):
        for path in tmp_path.glob("*"):
            path.unlink()
        data = made(kind, tmp_path, idle)
        found = opened(kind, tmp_path, data + bytes(zeros))
        assert not isinstance(found, GcsError) and found[0] == KEYS
        assert f"{zeros} bytes from byte {len(data)} on were cut off" in found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_snapshot_is_noticed_at_each_byte(kind: type[Single], tmp_path: Path) -> None:
    head = kind(tmp_path)
    for key in KEYS:
        head.put(key)
    head.compact()
    head.kill()
    data = (tmp_path / kind.name).read_bytes()
    for position in range(0, len(data), 3 * kind.step):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        assert isinstance(opened(kind, tmp_path, bytes(damaged)), JournalCorruptError), position
    found = opened(kind, tmp_path, data[:-1])
    assert isinstance(found, JournalCorruptError) and "fewer" in str(found)


def test_the_next_batch_takes_the_place_of_a_seal(tmp_path: Path) -> None:
    """So a seal that was not synced can't be a gap in front of a batch that was."""
    head = Single(tmp_path)
    path = tmp_path / JOURNAL_NAME
    head.put(b"a")
    size = path.stat().st_size
    head.idle()
    head.idle()
    assert path.stat().st_size == size + FRAME_HEAD_BYTES
    head.put(b"b")
    assert path.stat().st_size == 2 * size - HEADER_BYTES
    head.kill()
    again = Single(tmp_path)
    assert again.keys() == [b"a", b"b"] and not again.note
    again.kill()


# --- what can't be opened --------------------------------------------------------------------------------------------


def a_directory(path: Path) -> None:
    path.mkdir()


def a_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere" / path.name)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def nothing(path: Path) -> None:
    path.touch()


def a_text(path: Path) -> None:
    path.write_text("a letter to the editor\n" * 20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lies_there", "error", "said"),
    [
        (a_directory, JournalOpenError, "a directory lies where the file should be"),
        (a_link, JournalOpenError, "symbolic link.*link the directory instead"),
        (a_pipe, JournalOpenError, "something that is no file"),
        (nothing, JournalCorruptError, "the header is cut short"),
        (a_text, JournalCorruptError, "begins with b'a letter' instead of"),
    ],
)
def test_what_is_no_journal_is_named_and_left_alone(
    kind: type[Single], lies_there: Callable[[Path], None], error: type[GcsError], said: str, tmp_path: Path
) -> None:
    path = tmp_path / kind.name
    lies_there(path)
    before = path.lstat()
    for _ in range(2):  # and the lock is let go of
        with pytest.raises(error, match=said) as caught:
            kind(tmp_path)
        assert str(path) in str(caught.value)
    assert (path.lstat().st_ino, path.lstat().st_size) == (before.st_ino, before.st_size)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EACCES, "Permission denied.*belong to the user"),
        (errno.EROFS, "Read-only file system.*mount"),
        (errno.ENOSPC, "No space left.*make room"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "Input/output error.*check the directory and its disk"),
    ],
)
def test_what_the_system_refuses_is_said_with_a_remedy(code: int, said: str, tmp_path: Path) -> None:
    class Refusing(OsFiles):
        def __init__(self, what: str) -> None:
            self.what = what

        def open(self, path: Path, flags: int) -> int:
            return self._refuse("open", str(path)) or super().open(path, flags)

        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            return self._refuse("pwrite", None) or super().pwrite(fd, data, offset)

        def lock(self, path: Path) -> int:
            return self._refuse("lock", str(path)) or super().lock(path)

        def make_directory(self, path: Path, fsync: bool) -> None:
            self._refuse("make_directory", str(path))
            super().make_directory(path, fsync)

        def _refuse(self, what: str, name: str | None) -> int:
            if what == self.what:
                raise OSError(code, os.strerror(code), name)
            return 0

    path = tmp_path / "new" / "gcs.journal"
    for what in ("make_directory", "lock", "open", "pwrite"):
        with pytest.raises(JournalOpenError) as caught:
            Journal.open(path, CLUSTER, fsync=False, files=Refusing(what))
        assert re.search(said, str(caught.value)) and str(path) in str(caught.value)
    Journal.open(path, CLUSTER, fsync=False).close()


def test_a_path_through_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalOpenError, match="a part of that path is a file"):
        Single(tmp_path / "file" / "gcs")


def test_a_directory_that_is_deleted_meanwhile_loses_nothing_that_runs(tmp_path: Path) -> None:
    head = Single(tmp_path / "gcs")
    head.put(b"a")
    shutil.rmtree(tmp_path / "gcs")
    head.put(b"b")
    with pytest.raises(GcsError, match="could not be compacted.*No such file"):
        head.compact()
    head.put(b"c")
    assert head.keys() == KEYS
    head.kill()


# --- directories of another kind -------------------------------------------------------------------------------------


def test_the_directory_of_one_of_several_heads_is_not_begun_anew_by_one_alone(tmp_path: Path) -> None:
    """Beside the journal of the many, an empty one would be made."""
    made(OneOfSeveral, tmp_path)
    hosting = Hosting.__new__(Hosting)
    with pytest.raises(GcsError, match="one of several heads.*--heads"):
        hosting._host_alone(NodeSpec(), None, str(tmp_path), str(tmp_path), False, [])  # type: ignore[arg-type]
    assert not (tmp_path / JOURNAL_NAME).exists()


def test_the_directory_of_one_alone_is_not_taken_for_one_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = HeadsWorld(tmp_path, install_clock(monkeypatch))
    made(Single, world.heads[0].directory)
    with pytest.raises(MembershipMismatchError, match="alone in its cluster"):
        world.heads[0].start(world.endpoints)
    world.close()
