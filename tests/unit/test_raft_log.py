"""The log, and what of it is on disk.

Each of these tests was seen to fail without what it is about; see docs/raft.md.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from raft_disk import MemoryCompaction
from raft_steps import NO_OP_COMMAND, A, B, C, again, behind, compact, followers, made, raft_log, short_logs, tell
from raft_world import Disk, Host, MemoryJournal, World

from ftray.gcs.journal_format import META, Record
from ftray.gcs.raft import library, membership
from ftray.gcs.raft import log as log_module
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.errors import DivergedError, NewerCommandError
from ftray.gcs.raft.log import MEMBERSHIP, NO_OP, RaftLog, Snapshot
from ftray.gcs.state.errors import JournalVersionError, JournalWriteError

# --- persist before send ----------------------------------------------------------------------------------------------


def test_a_head_with_a_full_disk_acknowledges_nothing() -> None:
    world = made()
    leader, (full, down) = world.leader(), followers(world)
    down.crash()
    full.disk.full = True
    results = world.put(leader, b"k")
    world.run(150)
    assert results == []
    # What comes meanwhile is not kept.
    world.run(2000)
    assert full.replica is not None and len(full.replica._inbound) < 10
    full.disk.full = False
    world.converge()


def test_a_compaction_for_which_there_is_no_room_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    world.compact_bytes = 2000
    world.start()
    tries: list[str] = []

    def full(compaction: MemoryCompaction) -> bool:
        tries.append(compaction.journal.replica_id.hex())
        compaction.abort()
        raise JournalWriteError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryCompaction, "step", full)
        for number in range(40):
            world.write(b"k%d" % number)
    assert len(set(tries)) == 3
    world.converge()
    assert not world.stops


def test_a_snapshot_for_which_there_is_no_room_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    short_logs(monkeypatch)
    world = made()
    late = behind(world)
    real, tries = MemoryJournal.compact, list[int]()

    def full(journal: MemoryJournal, *arguments: Any) -> None:
        if journal.replica_id == late.disk.replica_id:
            tries.append(1)
            raise JournalWriteError("the disk is full")
        real(journal, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryJournal, "compact", full)
        late.start()
        world.run_until(lambda: bool(tries))
    assert late.replica is not None and not world.has(late, b"k1")
    world.converge()
    assert world.has(late, b"k1") and not world.stops


def test_a_snapshot_for_which_there_is_no_room_commits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here may be what another leader did not get through; a restart would apply it."""
    log = raft_log(5)
    log.setRaftCommitIndex(2)
    log.sync()

    def full(journal: MemoryJournal, *arguments: Any) -> None:
        raise JournalWriteError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryJournal, "compact", full)
        with pytest.raises(JournalWriteError):
            log.install(Snapshot((A,), 1, b"state"), b"data", 9, 3)
    log.setCurrentTerm(4, None)
    log.sync()
    assert log.commit == 2 and again(log).commit == 2
    log.install(Snapshot((A,), 1, b"state"), msgspec.msgpack.encode(Snapshot((A,), 1, b"state")), 9, 3)
    assert log.commit == 9 and again(log).commit == 9 and again(log).has(9, 3)


def test_a_snapshot_that_contradicts_what_is_committed_is_refused() -> None:
    log = raft_log(5)
    log.setRaftCommitIndex(4)
    with pytest.raises(DivergedError, match="entry 4 of term 3"):
        log.install(Snapshot((A,), 1, b"state"), b"data", 4, 3)
    assert log.has(5, 1)


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_log_has_no_holes() -> None:
    log = raft_log(5)
    with pytest.raises(DivergedError, match="entry 7"):
        log.add(NO_OP_COMMAND, 7, 1)
    assert not log.has(5, 9) and log.has(5, 1) and not log.has(6, 1) and log.has(0, 9)


def test_a_table_of_heads_that_cannot_be_read_is_not_kept() -> None:
    log = raft_log(5)
    for table in (b"\xc1", b"\x91\x92\xa1x\xa1\xff"):
        with pytest.raises(NewerCommandError, match="entry 6, a table of heads"):
            log.add(bytes([MEMBERSHIP]) + table, 6, 1)
        log._cut_after(5)
    log.sync()
    assert again(log)[-1][1] == 5


def test_a_record_of_a_newer_version_is_refused() -> None:
    log = RaftLog(MemoryJournal(Disk(b"i" * 16)))
    assert isinstance(log.journal, MemoryJournal)
    log.journal.disk.records = [Record(99, 1, 1, b"")]
    with pytest.raises(JournalVersionError, match="kind 99"):
        log.replay()


def test_what_the_journal_says_is_committed_must_be_there() -> None:
    log = raft_log(5)
    log.setCurrentTerm(1, None)
    log.setRaftCommitIndex(5)
    log.sync()
    assert isinstance(log.journal, MemoryJournal)
    records = log.journal.disk.records
    log.journal.disk.records = [record for record in records if record.kind == META or record.index <= 3]
    assert again(log).commit == 3


def test_an_entry_that_is_replaced_takes_its_table_along() -> None:
    log = raft_log(3)
    log.set_first_members((A, B), 0, active=True)
    log.add(bytes([MEMBERSHIP]) + membership.encode_table([A, B, C]), 4, 1)
    log.add(NO_OP_COMMAND, 5, 1)
    assert len(log.members) == 3 and log.members_at(3) == ((A, B), 0)
    log.add(NO_OP_COMMAND, 4, 2)
    assert log.members == (A, B) and log[-1][1] == 4
    log.sync()
    assert again(log).members == (A, B)


def test_a_snapshot_has_the_table_of_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "KEEP_ENTRIES", 2)
    log = raft_log(3)
    log.set_first_members((A,), 0, active=True)
    log.add(bytes([MEMBERSHIP]) + membership.encode_table([A, B]), 4, 1)
    for index in range(5, 12):
        log.add(NO_OP_COMMAND, index, 1)
    log.add(bytes([MEMBERSHIP]) + membership.encode_table([A, B, C]), 12, 1)
    log.setRaftCommitIndex(10)
    compact(log, 10)
    for each in (log, again(log)):
        assert each.members == (A, B, C)
        each.add(NO_OP_COMMAND, 12, 2)
        assert each.members == (A, B) and each.members_index == 4
        each.sync()


def test_a_compacted_log_is_short_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "KEEP_BYTES", 500)
    log = raft_log(3)
    for index in range(4, 30):
        log.add(bytes([NO_OP]) + bytes(100), index, 1)
    log.setRaftCommitIndex(29)
    compact(log, 29)
    assert len(log) == 5


def test_a_follower_that_went_another_way_goes_back_in_one_step() -> None:
    log = raft_log(3)
    for index in range(4, 40):
        log.add(NO_OP_COMMAND, index, 3 if index < 20 else 4)
    assert (log.first_of_term(39), log.first_of_term(15)) == (20, 4)
    log.setRaftCommitIndex(10)
    assert log.first_of_term(15) == 11
    # And so the replica says it.
    world = made()
    leader, follower = world.leader(), followers(world)[0]
    world.cut(follower.endpoint)
    assert follower.replica is not None
    first = follower.engine.last_index + 1
    for index in range(first, first + 100):
        follower.replica._log.add(NO_OP_COMMAND, index, leader.engine.term)
    # The leader's next term begins where these do.
    event = m.Append(leader.engine.term + 1, 0, 0, first + 50, leader.engine.term + 1, ())
    said = tell(follower, leader, event)
    assert [message.next_index for message in said if isinstance(message, m.Ack)] == [first]


def test_many_entries_travel_in_messages_of_a_limited_size() -> None:
    world = made()
    late = followers(world)[0]
    late.crash()
    leader = world.leader()
    for _ in range(40):
        leader.engine.append(bytes([NO_OP]) + bytes(50_000))
    leader.turn()
    sizes: list[int] = []
    send = Host.send

    def sized(host: Host, link: Any, data: bytes) -> None:
        sizes.append(len(data))
        send(host, link, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Host, "send", sized)
        late.start()
        world.converge()
    assert 50_000 < max(sizes) < library.BATCH_BYTES + 50_100
