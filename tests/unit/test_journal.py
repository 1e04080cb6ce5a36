"""The journal: what is synced comes back, what was cut short is cut off, what is damaged is refused."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ftray.gcs import journal_format
from ftray.gcs.files import OsFiles
from ftray.gcs.journal import Journal
from ftray.gcs.journal_format import ENTRY, FRAME_HEAD_BYTES, HEADER_BYTES, META, SNAPSHOT, Record
from ftray.gcs.state.errors import (
    ClusterMismatchError,
    JournalClosedError,
    JournalClusterError,
    JournalCorruptError,
    JournalFailedError,
    JournalIdentityError,
    JournalLockedError,
    JournalVersionError,
    JournalWriteError,
)
from ftray.sim.disk import Disk, SimFiles

CLUSTER = b"C" * 16


def entry(index: int, payload: bytes = b"payload") -> Record:
    return Record(ENTRY, 1, index, payload)


def write(path: Path, *batches: list[Record]) -> None:
    """Appends each batch with a sync, and leaves the file as a crash would."""
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    for batch in batches:
        journal.append(batch)
        journal.sync()
    crash(journal)


def crash(journal: Journal) -> None:
    """Lets go of the files without the goodbye of `close`."""
    journal._release()


def read(path: Path) -> tuple[list[Record], str]:
    journal = Journal.open(path, CLUSTER)
    try:
        return list(journal.replay()), journal.note
    finally:
        crash(journal)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gcs" / "journal"


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_what_is_synced_comes_back(path: Path) -> None:
    first, second = [entry(1), entry(2, b""), Record(META, 3, 0, b"vote")], [entry(3, bytes(3 << 20))]
    write(path, first, second)
    assert read(path) == (first + second, "")
    write(path, [entry(4)])
    assert read(path)[0] == first + second + [entry(4)]


def test_what_is_not_synced_is_not_there(path: Path) -> None:
    journal = Journal.open(path, CLUSTER)
    assert list(journal.replay()) == []
    journal.sync()
    journal.append([entry(1)])
    journal.close()
    journal.close()
    assert read(path) == ([], "")


def test_one_fsync_for_a_batch_and_none_when_not_wanted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        calls.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    before = len(calls)
    journal.append([entry(1), entry(2)])
    journal.append([entry(3)])
    journal.sync()
    assert len(calls) == before + 1
    journal.close()
    calls.clear()
    loose = Journal.open(path.with_name("loose"), CLUSTER, fsync=False)
    list(loose.replay())
    loose.append([entry(1)])
    loose.sync()
    loose.compact(b"state", 1, 1)
    loose.close()
    assert calls == []


def test_use_out_of_order_is_an_error(path: Path) -> None:
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    journal.append([entry(1)])
    with pytest.raises(RuntimeError, match="sync"):
        journal.compact(b"state", 1, 1)
    journal.sync()
    journal.close()
    for use in (lambda: journal.append([]), journal.sync, lambda: list(journal.replay())):
        with pytest.raises(JournalClosedError):
            use()
    journal = Journal.open(path, CLUSTER)
    with pytest.raises(JournalClosedError, match="replayed"):
        journal.append([entry(2)])
    journal.close()
    with pytest.raises(ValueError):
        Journal.open(path, b"short")


def test_a_record_that_is_too_long_spoils_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_format, "RECORD_BYTES_MAX", 10)
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    journal.append([entry(1)])
    with pytest.raises(ValueError, match="11 bytes"):
        journal.append([entry(2), entry(3, bytes(11))])
    journal.sync()
    crash(journal)
    assert read(path)[0] == [entry(1)]


# --- whose journal ----------------------------------------------------------------------------------------------------


def test_foreign_journals_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(path, CLUSTER)
    identity = journal.replica_id
    journal.close()
    with pytest.raises(JournalClusterError, match=CLUSTER.hex()) as caught:
        Journal.open(path, b"another cluster!")
    assert isinstance(caught.value, ClusterMismatchError)
    with pytest.raises(JournalIdentityError, match=identity.hex()):
        Journal.open(path, CLUSTER, b"another replica!")
    again = Journal.open(path, CLUSTER, identity)
    assert again.replica_id == identity
    again.close()
    monkeypatch.setattr(journal_format, "JOURNAL_VERSION", 2)
    newer = path.with_name("newer")
    Journal.open(newer, CLUSTER).close()
    monkeypatch.undo()
    with pytest.raises(JournalVersionError, match="version 2"):
        Journal.open(newer, CLUSTER)


def test_a_file_that_is_no_journal_is_refused(path: Path) -> None:
    path.parent.mkdir()
    for content in (b"", b"x" * 10, b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(JournalCorruptError, match="at byte 0"):
            Journal.open(path, CLUSTER)
        assert path.read_bytes() == content


def test_one_process_at_a_time(path: Path) -> None:
    journal = Journal.open(path, CLUSTER)
    with pytest.raises(JournalLockedError, match="running already"):
        Journal.open(path, CLUSTER)
    journal.close()
    Journal.open(path, CLUSTER).close()


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_torn_tail_is_cut_off_with_a_note(path: Path) -> None:
    write(path, [entry(1)], [entry(2), entry(3)])
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    records, note = read(path)
    assert records == [entry(1)]
    assert str(path) in note and "cut off" in note
    assert read(path) == ([entry(1)], "")
    write(path, [entry(2)])
    assert read(path) == ([entry(1), entry(2)], "")


def test_a_tail_of_zeros_is_cut_off(path: Path) -> None:
    write(path, [entry(1)])
    with path.open("ab") as file:
        file.write(bytes(5000))
    records, note = read(path)
    assert records == [entry(1)] and "5000 bytes" in note


def test_a_batch_that_was_written_out_of_order_is_cut_off_whole(path: Path) -> None:
    write(path, [entry(1)], [entry(2, b"a" * 100), entry(3, b"b" * 100)])
    data = bytearray(path.read_bytes())
    start = data.index(b"a" * 100)
    data[start : start + 100] = bytes(100)
    path.write_bytes(data)
    assert read(path)[0] == [entry(1)]


def test_a_bad_frame_before_a_good_one_is_corruption(path: Path) -> None:
    write(path, [entry(1)], [entry(2, b"acknowledged")], [entry(3)])
    data = bytearray(path.read_bytes())
    position = data.index(b"acknowledged")
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalCorruptError, match="ftray heads replace") as caught:
        read(path)
    assert caught.value.path == str(path)
    assert HEADER_BYTES < caught.value.offset < position
    assert path.read_bytes() == data  # Nothing is cut off of a file that is refused.


def test_after_a_clean_stop_damage_to_the_last_frame_is_seen(path: Path) -> None:
    write(path, [entry(1)])
    for _ in range(3):
        journal = Journal.open(path, CLUSTER)
        list(journal.replay())
        journal.close()
    data = bytearray(path.read_bytes())
    assert data.count(journal_format.MARKER) == 2  # One empty frame is enough.
    data[-FRAME_HEAD_BYTES - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalCorruptError):
        read(path)


def test_also_after_a_write_that_was_taken_back_the_last_frame_is_sealed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    journal.append([entry(1)])
    journal.sync()
    journal.seal()
    journal.append([entry(2)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(JournalWriteError):
            journal.sync()
    journal.seal()
    crash(journal)
    data = bytearray(path.read_bytes())
    data[-FRAME_HEAD_BYTES - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalCorruptError):
        read(path)


def test_a_frame_inside_a_payload_is_not_taken_for_one(path: Path) -> None:
    write(path, [entry(1)], [entry(2)])
    stolen = path.read_bytes()[HEADER_BYTES:]
    write(path, [entry(3, b"x" * 100 + stolen + journal_format.MARKER * 1000)])
    data = bytearray(path.read_bytes())
    data[data.index(b"x" * 100)] ^= 1
    path.write_bytes(data)
    records, note = read(path)
    assert records == [entry(1), entry(2)] and note


def test_a_frame_that_is_missing_is_noticed(path: Path) -> None:
    write(path, [entry(1, b"aaaa")], [entry(2, b"bbbb")], [entry(3, b"cccc")])
    data = path.read_bytes()
    frame_bytes = (len(data) - HEADER_BYTES) // 3
    path.write_bytes(data[:HEADER_BYTES] + data[HEADER_BYTES + frame_bytes :])
    # Moved frames are bad where they are, and nothing good follows: all that is left of this file is its header.
    assert read(path)[0] == []


# --- compaction -------------------------------------------------------------------------------------------------------


def test_compaction_replaces_the_records(path: Path) -> None:
    write(path, [entry(1), entry(2)], [entry(3)])
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    identity = journal.replica_id
    journal.compact(b"the state", 1, 2, keep=[entry(3)])
    journal.append([entry(4)])
    journal.sync()
    crash(journal)
    assert read(path)[0] == [Record(SNAPSHOT, 1, 2, b"the state"), entry(3), entry(4)]
    journal = Journal.open(path, CLUSTER, identity)
    assert not path.with_name("journal.new").exists()
    journal.close()


def test_a_damaged_snapshot_is_not_taken_for_a_torn_tail(path: Path) -> None:
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    journal.compact(b"the state", 1, 2)
    crash(journal)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:HEADER_BYTES], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(JournalCorruptError):
            read(path)


def test_a_compaction_that_was_cut_short_leaves_the_old_journal(path: Path) -> None:
    write(path, [entry(1)])
    path.with_name("journal.new").write_bytes(b"half a jour")
    assert read(path)[0] == [entry(1)]
    assert not path.with_name("journal.new").exists()


# --- a disk that fails ------------------------------------------------------------------------------------------------


def failing(code: int, after: int = 0) -> Callable[..., int]:
    """A replacement of `os.pwrite` that writes a part, then fails."""
    real = os.pwrite
    calls = 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            if calls == after + 1:
                return real(fd, data[: len(data) // 2], offset)
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    return pwrite


def broken(fd: int) -> None:
    raise OSError(errno.EIO, "I/O error")


def test_a_full_disk_refuses_the_batch_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    journal.append([entry(1)])
    journal.sync()
    size = path.stat().st_size
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    journal.append([entry(2)])
    with pytest.raises(JournalWriteError, match="make room"):
        journal.sync()
    assert path.stat().st_size == size
    with pytest.raises(JournalWriteError, match="compacted"):
        journal.compact(b"state", 1, 1)
    monkeypatch.undo()
    journal.append([entry(2, b"second try")])
    journal.sync()
    crash(journal)
    assert read(path) == ([entry(1), entry(2, b"second try")], "")


def test_after_a_failed_fsync_the_journal_stays_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    journal.append([entry(1)])
    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(JournalFailedError, match="nobody knows"):
        journal.sync()
    with pytest.raises(JournalClosedError):
        journal.append([entry(2)])


@pytest.mark.parametrize("seed", range(12))
def test_after_a_failed_fsync_the_next_start_believes_the_disk_and_not_the_cache(seed: int) -> None:
    """The system shows what the disk never took, and the next sync succeeds: so it would be told, and be lost."""
    disk = Disk(random.Random(seed))

    def started() -> tuple[Journal, list[int]]:
        journal = Journal.open("/d/journal", CLUSTER, files=SimFiles(disk, lambda ms: None))
        return journal, [record.index for record in journal.replay()]

    journal, _ = started()
    journal.append([entry(1)])
    journal.sync()
    journal.append([entry(2)])
    disk.fail_sync = True
    with pytest.raises(JournalFailedError):
        journal.sync()
    journal, found = started()
    assert found in ([1], [1, 2])
    disk.lose_power()
    assert started()[1] == found


def test_a_journal_is_read_from_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal.open(path, CLUSTER).close()
    calls: list[tuple[str, int]] = []
    real = os.pread
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: calls.append(("drop", advice)))
    monkeypatch.setattr(os, "pread", lambda fd, *where: (calls.append(("read", fd)), real(fd, *where))[1])
    Journal.open(path, CLUSTER).close()
    assert calls[0] == ("drop", os.POSIX_FADV_DONTNEED) and calls[1][0] == "read"


def test_a_write_that_can_not_be_taken_back_closes_the_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    journal.append([entry(1)])
    monkeypatch.setattr(os, "pwrite", failing(errno.EIO))
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: broken(fd))
    with pytest.raises(JournalFailedError):
        journal.sync()


def test_a_new_name_that_may_not_last_closes_the_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(path, CLUSTER)
    list(journal.replay())
    open_files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(OsFiles, "sync_directory", lambda files, directory: broken(-1))
    with pytest.raises(JournalFailedError):
        journal.compact(b"state", 1, 1)
    assert len(os.listdir("/proc/self/fd")) == open_files - 2
    monkeypatch.undo()
    assert read(path)[0] == [Record(SNAPSHOT, 1, 1, b"state")]
