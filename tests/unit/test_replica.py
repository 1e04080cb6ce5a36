"""The single replica: durable before it answers, exactly once over restarts, and calm when the disk is not."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ftray.gcs.journal import Journal
from ftray.gcs.journal_format import ENTRY, SNAPSHOT, Record
from ftray.gcs.replica import JOURNAL_NAME, Replica, ReplicaClosedError, Request, SingleReplica
from ftray.gcs.state import commands as c
from ftray.gcs.state.errors import (
    JournalClusterError,
    JournalCorruptError,
    JournalFailedError,
    JournalLockedError,
    JournalVersionError,
    JournalWriteError,
)
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Change, Code, Result

CLUSTER = b"C" * 16
ME, YOU = b"me", b"you"


def put(key: str, value: str = "v") -> bytes:
    return c.encode_command(c.KvPut("ns", key.encode(), value.encode()))


def opened(directory: Path, **more: Any) -> SingleReplica:
    return SingleReplica(directory, CLUSTER, **more)


def crash(replica: SingleReplica) -> None:
    """Lets go of the files as a kill would."""
    journal = replica._journal
    assert journal is not None
    journal._release()


def no_space(fd: int, data: memoryview, offset: int) -> int:
    raise OSError(errno.ENOSPC, "no space left on device")


def broken(fd: int) -> None:
    raise OSError(errno.EIO, "I/O error")


def test_it_is_a_replica(tmp_path: Path) -> None:
    replica: Replica = opened(tmp_path, endpoint="tcp:head:1")
    assert replica.is_leader and replica.leader_hint == "tcp:head:1"
    replica.close()
    assert not replica.is_leader
    replica.close()


def test_every_acknowledged_write_is_there_after_a_crash(tmp_path: Path) -> None:
    replica = opened(tmp_path)
    identity = replica.replica_id
    results = replica.submit_many([Request(ME, 1, put("a")), Request(YOU, 1, put("b")), Request(b"", 0, put("c"))])
    assert [each.revision for each in results] == [1, 2, 3]
    assert replica.submit(ME, 2, put("a", "w")).ok
    before = replica.state.snapshot()
    crash(replica)
    again = opened(tmp_path)
    assert again.state.snapshot() == before and again.replica_id == identity and again.note == ""
    # A retry of what was acknowledged, and of what was not, after the restart.
    assert again.submit(ME, 2, put("a", "w")) == Result(Code.OK, "", 4, 0)
    assert again.submit(YOU, 1, put("b")) == results[1]
    assert again.state.snapshot() == before
    again.close()


def test_one_sync_for_a_batch_and_none_for_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = opened(tmp_path)
    syncs: list[int] = []
    monkeypatch.setattr(Journal, "sync", lambda self: syncs.append(1))
    replica.submit_many([Request(ME, n, put(str(n))) for n in range(10)] + [Request(ME, 9, put("again"))])
    assert len(syncs) == 1
    replica.submit(ME, 9, put("9"))
    assert replica.submit(ME, 8, put("8")).code is Code.STALE
    assert replica.submit_many([]) == []
    assert len(syncs) == 1
    monkeypatch.undo()
    replica.close()


def test_the_disk_comes_before_the_state_and_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = opened(tmp_path)
    order: list[str] = []
    real = Journal.sync

    def sync(journal: Journal) -> None:
        assert replica.state.revision == 0
        real(journal)
        order.append("disk")

    monkeypatch.setattr(Journal, "sync", sync)
    replica.on_change(lambda changes: order.append("changes"))
    replica.propose(Request(ME, 1, put("a")), lambda result: order.append("reply"))
    assert order == []
    replica.flush()
    assert order == ["disk", "changes", "reply"]
    monkeypatch.undo()
    replica.close()


def test_bad_and_oversized_commands_are_answered_and_not_written(tmp_path: Path) -> None:
    replica = opened(tmp_path, value_bytes_max=5)
    size = (tmp_path / JOURNAL_NAME).stat().st_size
    assert replica.submit(ME, 1, b"\xffrubbish").code is Code.INVALID
    refused = replica.submit(ME, 1, put("k", "123456"))
    assert refused.code is Code.TOO_LARGE and "limit of 5" in refused.message and "b'k'" in refused.message
    assert replica.submit(b"x" * 100, 1, put("k")).code is Code.INVALID
    assert (tmp_path / JOURNAL_NAME).stat().st_size == size
    results = replica.submit_many([Request(ME, 1, b""), Request(ME, 1, put("k", "12345")), Request(YOU, 1, b"")])
    assert [each.code for each in results] == [Code.INVALID, Code.OK, Code.INVALID]
    replica.close()


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_callbacks_may_propose_and_must_not_submit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    replica = opened(tmp_path)
    results: list[Result] = []
    seen: list[Sequence[Change]] = []
    wrong: list[str] = []

    def on_change(changes: Sequence[Change]) -> None:
        seen.append(changes)
        if len(seen) == 1:
            replica.propose(Request(b"", 0, put("more")), results.append)
            for use in (replica.flush, lambda: replica.submit(ME, 2, put("x"))):
                with pytest.raises(RuntimeError, match="propose") as caught:
                    use()
                wrong.append(str(caught.value))
        raise ValueError("a broken watcher")

    end = replica.on_change(on_change)
    replica.propose(Request(ME, 1, put("first")), results.append)
    replica.flush()
    assert [each.revision for each in results] == [1, 2]
    assert [change.key for changes in seen for change in changes] == [b"ns\0first", b"ns\0more"]
    assert len(wrong) == 2 and "a broken watcher" in caplog.text
    end()
    end()
    replica.submit(ME, 2, put("last"))
    assert len(seen) == 2
    replica.close()


def test_what_is_queued_when_it_closes_is_answered(tmp_path: Path) -> None:
    replica = opened(tmp_path)
    results: list[Result] = []
    replica.propose(Request(ME, 1, put("a")), results.append)
    replica.close()
    assert [each.code for each in results] == [Code.NOT_LEADER]
    with pytest.raises(ReplicaClosedError):
        replica.propose(Request(ME, 2, put("a")), results.append)
    with pytest.raises(ReplicaClosedError):
        replica.submit(ME, 2, put("a"))


# --- trouble with the disk --------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_and_the_replica_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replica = opened(tmp_path)
    replica.submit(ME, 1, put("a"))
    monkeypatch.setattr(os, "pwrite", no_space)
    with pytest.raises(JournalWriteError):
        replica.submit(ME, 2, put("b"))
    results: list[Result] = []
    replica.propose(Request(ME, 2, put("b")), results.append)
    replica.flush()
    assert results[0].code is Code.UNAVAILABLE and "make room" in results[0].message
    assert replica.state.revision == 1 and "make room" in caplog.text
    monkeypatch.undo()
    assert replica.submit(ME, 2, put("b")) == Result(Code.OK, "", 2, 1)
    crash(replica)
    again = opened(tmp_path)
    assert again.state.kv_keys("ns") == [b"a", b"b"]
    again.close()


def test_a_failed_disk_stops_the_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = opened(tmp_path)
    results: list[Result] = []
    replica.propose(Request(ME, 1, put("a")), results.append)
    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(JournalFailedError):
        replica.flush()
    assert [each.code for each in results] == [Code.NOT_LEADER]
    assert not replica.is_leader
    with pytest.raises(ReplicaClosedError, match="disk failed"):
        replica.submit(ME, 2, put("b"))


def test_a_fault_between_disk_and_state_stops_the_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: object) -> Result:
        raise MemoryError

    replica = opened(tmp_path)
    monkeypatch.setattr(GcsState, "apply", out_of_memory)
    with pytest.raises(MemoryError):
        replica.submit(ME, 1, put("a"))
    assert not replica.is_leader
    monkeypatch.undo()
    again = opened(tmp_path)
    assert again.state.kv_get("ns", b"a") == b"v"
    again.close()


# --- compaction and starts --------------------------------------------------------------------------------------------


def test_the_journal_is_compacted_as_it_grows(tmp_path: Path) -> None:
    replica = opened(tmp_path, compact_bytes=20_000)
    for n in range(100):
        assert replica.submit(ME, n, put("key", "x" * 1_000 + str(n))).ok
    assert (tmp_path / JOURNAL_NAME).stat().st_size < 25_000
    before = replica.state.snapshot()
    crash(replica)
    again = opened(tmp_path)
    assert again.state.snapshot() == before
    assert again.submit(ME, 99, put("key", "other")).revision == 100
    again.compact()
    assert again.submit(ME, 100, put("key", "last")).revision == 101
    crash(again)
    third = opened(tmp_path)
    assert third.state.kv_get("ns", b"key") == b"last"
    third.close()


def test_a_compaction_that_fails_is_put_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise JournalWriteError("no room")

    replica = opened(tmp_path, compact_bytes=5_000)
    monkeypatch.setattr(Journal, "begin_compaction", refuse)
    for n in range(20):
        assert replica.submit(ME, n, put("key", "x" * 1_000 + str(n))).ok
    assert 1 <= caplog.text.count("the old journal is kept") <= 5
    replica.close()


def test_a_torn_end_is_noted(tmp_path: Path) -> None:
    replica = opened(tmp_path)
    replica.submit(ME, 1, put("a"))
    crash(replica)
    with (tmp_path / JOURNAL_NAME).open("ab") as file:
        file.write(b"half a fra")
    again = opened(tmp_path)
    assert "10 bytes" in again.note and again.state.kv_get("ns", b"a") == b"v"
    again.close()


def test_starts_that_are_refused(tmp_path: Path) -> None:
    replica = opened(tmp_path)
    with pytest.raises(JournalLockedError):
        opened(tmp_path)
    replica.close()
    with pytest.raises(JournalClusterError):
        SingleReplica(tmp_path, b"another cluster!")


def test_a_journal_with_content_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    def entry(index: int, command: bytes) -> Record:
        return Record(ENTRY, 0, index, msgspec.msgpack.encode([ME, index, command]))

    newer = c.encode_command(c.KvPut("ns", b"k", b"v"))[1:]
    cases: list[tuple[Record, type[Exception]]] = [
        (entry(1, b"\x63" + newer), JournalVersionError),
        (entry(1, bytes([c.COMMAND_VERSION]) + msgspec.msgpack.encode([88])), JournalVersionError),
        (entry(1, b""), JournalCorruptError),
        (entry(2, put("k")), JournalCorruptError),
        (Record(ENTRY, 0, 1, b"?"), JournalCorruptError),
        (Record(SNAPSHOT, 0, 1, b"?"), JournalCorruptError),
    ]
    for number, (record, error) in enumerate(cases):
        directory = tmp_path / str(number)
        journal = Journal.open(directory / JOURNAL_NAME, CLUSTER)
        list(journal.replay())
        journal.append([record])
        journal.sync()
        journal.close()
        for _ in range(2):  # The lock is let go of each time.
            with pytest.raises(error):
                opened(directory)
