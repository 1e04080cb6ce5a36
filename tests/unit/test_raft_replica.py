"""The replica of several: what the library leaves open, one by one, each with its mending taken away for a moment."""

from __future__ import annotations

import random
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from raft_world import CLUSTER, Host, MemoryJournal, World

from ftray.gcs.journal import Journal
from ftray.gcs.journal_format import ENTRY, META, Record
from ftray.gcs.raft import library
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.errors import DivergedError, LibraryMovedError, NewerCommandError
from ftray.gcs.raft.log import NO_OP, REGULAR, RaftLog
from ftray.gcs.raft.replica import RaftReplica
from ftray.gcs.replica import ReplicaClosedError, Request
from ftray.gcs.state.commands import KvPut, encode_command
from ftray.gcs.state.errors import JournalCorruptError, JournalFailedError
from ftray.gcs.state.tables import Code, Result

NO_OP_COMMAND = bytes([NO_OP])


def made(seed: int = 1, heads: int = 3) -> World:
    world = World(seed, heads)
    world.start()
    world.leader()
    return world


def followers(world: World) -> list[Host]:
    return [host for host in world.hosts.values() if not host.leads]


# --- the library ------------------------------------------------------------------------------------------------------


def test_the_private_names_are_where_they_were() -> None:
    library.check_module(library._load(), ".".join(map(str, library.VERSION_TESTED)))
    host = made(heads=1).leader()
    library.check_names(host.engine._raft)


@pytest.mark.parametrize("version", ["0.3.15", "0.4.0"])
def test_a_version_out_of_range_is_refused(version: str) -> None:
    with pytest.raises(LibraryMovedError, match=version):
        library.check_module(library._lib, version)


def test_a_name_that_has_moved_is_named() -> None:
    names = {name: object() for name in library.MODULE_NAMES if name != "createJournal"}
    with pytest.raises(LibraryMovedError, match="createJournal"):
        library.check_module(SimpleNamespace(**names), "0.3.17")  # type: ignore[arg-type]
    fields = {"_SyncObj__" + name: None for name in library.FIELDS if name != "raftMatchIndex"}
    with pytest.raises(LibraryMovedError, match="__raftMatchIndex"):
        library.check_names(SimpleNamespace(**fields))


def test_other_users_of_the_library_keep_their_clock() -> None:
    import pysyncobj.syncobj

    made(heads=1)
    assert pysyncobj.syncobj.monotonicTime() > 1.0 and pysyncobj.syncobj is not library._lib


# --- one head ---------------------------------------------------------------------------------------------------------


def test_one_head_answers_within_a_flush() -> None:
    world = made(heads=1)
    host = world.leader()
    assert host.replica is not None
    seen: list[str] = []
    host.replica.on_change(lambda changes: seen.append(f"change {len(changes)}"))
    host.replica.propose(
        Request(b"c", 1, encode_command(KvPut("n", b"k", b"v"))), lambda result: seen.append(f"result {result.code}")
    )
    host.replica.flush()
    assert seen == ["change 1", "result "]
    host.crash()
    host.start()
    world.leader()
    assert world.has(host, b"k")


def test_on_a_real_journal(tmp_path: Path) -> None:
    clock = [1000.0]
    link = SimpleNamespace(send=None, close=None)

    def opened() -> RaftReplica:
        journal = Journal.open(tmp_path / "gcs.journal", CLUSTER)
        replica = RaftReplica(
            journal, endpoint="h:1", heads=["h:1"], transport=link, now_ms=lambda: clock[0], rng=random.Random(1)
        )  # fmt: skip
        for _ in range(2):
            clock[0] += 500.0
            replica.flush()
        return replica

    replica = opened()
    assert replica.is_leader and replica.leader_hint == "h:1"
    results: list[Result] = []
    for number in range(20):
        replica.propose(Request(b"c", number, encode_command(KvPut("n", b"%d" % number, b"v"))), results.append)
        replica.flush()
        if number == 10:
            replica.compact()
    assert len(results) == 20 and all(result.ok for result in results)
    identity, state = replica.replica_id, replica.state.snapshot()
    replica.close()
    replica.close()
    with pytest.raises(ReplicaClosedError):
        replica.propose(Request(b"c", 99, b""), results.append)
    replica = opened()
    assert replica.replica_id == identity and replica.state.snapshot() == state
    replica.close()
    # Damage to what was acknowledged is refused, and names the file and the remedy.
    path = tmp_path / "gcs.journal"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(JournalCorruptError, match=r"gcs\.journal is damaged.*ftray heads replace"):
        opened()


def test_entries_that_do_not_follow_are_refused() -> None:
    for records in (
        [Record(ENTRY, 1, 5, b"\1")],
        [Record(ENTRY, 0, 1, b"\1"), Record(ENTRY, 1, 3, b"\1")],
        [Record(ENTRY, 0, 1, b"")],
        [Record(META, 0, 1, b"\xc1")],
    ):
        world = World(1, 1)
        host = world.hosts["head0:1"]
        host.disk.records = records
        host.start()
        assert isinstance(host.error, JournalCorruptError)


def test_a_single_head_shows_nothing_that_is_not_durable() -> None:
    world = made(heads=1)
    host = world.leader()
    host.disk.full = True
    assert world.put(host, b"k") == [] and not world.has(host, b"k")
    host.disk.full = False
    host.turn()
    world.run(100)
    assert world.has(host, b"k")


# --- persist before send ----------------------------------------------------------------------------------------------


def test_nothing_is_told_before_it_is_durable() -> None:
    """Every message and every answer leaves when the journal has nothing left to write."""
    world = made()
    told = 0
    send = Host.send

    def checked(host: Host, link: Any, data: bytes) -> None:
        nonlocal told
        assert host.replica is not None and not host.replica._log.dirty
        told += 1
        send(host, link, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Host, "send", checked)
        for number in range(10):
            world.write(b"k%d" % number)
        world.leader().crash()
        world.write(b"after")
    assert told > 50


@pytest.mark.parametrize("durable", [False, True])
def test_a_crash_within_the_sync_keeps_what_was_told(durable: bool) -> None:
    world = made()
    leader = world.leader()
    leader.disk.crash_in_sync = durable
    results = world.put(leader, b"k")
    assert leader.replica is None and not any(result.ok for result in results)
    world.write(b"later")
    world.converge()


def test_a_vote_survives_a_restart() -> None:
    world = made()
    follower = followers(world)[0]
    assert follower.replica is not None
    term, candidates = follower.engine.term + 5, list(follower.links)
    votes = []
    for link in candidates:
        world.stall(follower.endpoint, link.peer.endpoint)
    for link in candidates:
        if follower.replica is None:
            follower.start()
            follower.replica.link_opened(link, True)
            hello = link.peer.replica._peers._hello()  # type: ignore[union-attr]
            follower.replica.link_message(link, m.encode(hello))
        sent: list[m.PeerMessage] = []
        follower.replica.link_message(link, m.encode(m.VoteRequest(term, 1000, term - 1)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Host, "send", lambda host, link, data, sent=sent: sent.append(m.decode(data)))
            follower.turn()
        votes += [message for message in sent if isinstance(message, m.Vote)]
        follower.crash()
    assert votes == [m.Vote(term)]


def test_a_full_disk_silences_a_leader_until_there_is_room() -> None:
    world = made()
    leader = world.leader()
    leader.disk.full = True
    results = world.put(leader, b"k")
    assert results == [] and not leader.leads
    refused = world.put(leader, b"l")
    assert [result.code for result in refused] == [Code.UNAVAILABLE]
    world.run(1000)
    assert [result.code for result in results] == [Code.NOT_LEADER]
    assert world.write(b"m") is not leader
    leader.disk.full = False
    world.converge()


def test_a_failed_disk_stops_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    world = made()
    leader = world.leader()
    replica = leader.replica
    assert replica is not None

    def failed(journal: MemoryJournal) -> None:
        raise JournalFailedError("the disk failed")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryJournal, "sync", failed)
        results = world.put(leader, b"k")
    assert isinstance(leader.error, JournalFailedError) and replica.stopped is leader.error
    assert [result.code for result in results] == [Code.NOT_LEADER]
    world.converge()


# --- votes and acknowledgements ---------------------------------------------------------------------------------------


def test_a_voter_counts_once() -> None:
    world = World(1, 5)
    world.start()
    world.leader()
    host = followers(world)[0]
    for other in world.hosts:
        if other != host.endpoint:
            world.stall(host.endpoint, other)
            world.stall(other, host.endpoint)
    host.engine.observe(host.engine.term + 10)
    assert host.replica is not None
    host.replica._elections._granted = True  # type: ignore[union-attr]
    host.engine.campaign()
    host.turn()
    link = sorted(host.links, key=lambda link: link.peer.endpoint)[0]
    for _ in range(4):
        host.replica.link_message(link, m.encode(m.Vote(host.engine.term)))
    host.turn()
    assert not host.engine.leads
    # Without the rule one voter is a majority.
    host.replica._elections.first_vote = lambda peer: True  # type: ignore[union-attr,method-assign]
    for _ in range(4):
        host.replica.link_message(link, m.encode(m.Vote(host.engine.term)))
    host.replica.flush()
    assert host.engine.leads


# --- elections --------------------------------------------------------------------------------------------------------


def test_a_leader_that_dies_is_replaced_within_a_few_round_trips() -> None:
    slowest = 0.0
    for seed in range(15):
        world = made(seed)
        world.write(b"before")
        world.leader().crash()
        died_ms = world.now_ms
        world.write(b"after")
        slowest = max(slowest, world.now_ms - died_ms)
    assert slowest < 60.0  # virtual time, with links of up to 2 ms


def test_a_head_that_was_cut_off_unseats_nobody() -> None:
    world = made()
    world.write(b"a")
    leader, follower = world.leader(), followers(world)[0]
    term = leader.engine.term
    world.cut(follower.endpoint)
    world.run(5000)
    assert follower.engine.term == term
    world.heal()
    world.run(1000)
    assert world.leader() is leader and leader.engine.term == term


def test_a_broken_link_to_the_leader_unseats_nobody() -> None:
    world = made()
    leader, follower = world.leader(), followers(world)[0]
    term = leader.engine.term
    for _ in range(5):
        world.break_links(follower.endpoint, leader.endpoint)
        world.run(300)
    assert world.leader() is leader and leader.engine.term == term and follower.engine.leader is not None


def test_a_head_in_a_later_term_is_taken_in_again() -> None:
    """A candidate that could not finish its election must not stay alone in its term for ever."""
    world = made()
    follower = followers(world)[0]
    follower.engine.observe(follower.engine.term + 3)
    world.run(2000)
    world.converge()


def test_silence_falls_back_to_the_election_timeout() -> None:
    world = made()
    leader = world.leader()
    leader.freeze()
    frozen_ms = world.now_ms
    assert world.write(b"after") is not leader
    assert world.now_ms - frozen_ms < 1000
    # The former leader wakes and must not answer a fresh read from its old state.
    reads: list[bool] = []
    assert leader.replica is not None
    leader.replica.confirm(reads.append)
    leader.thaw()
    leader.turn()
    world.run(500)
    assert reads == [False]


def test_a_clean_stop_hands_over() -> None:
    world = made()
    leader = world.write(b"a")
    world.run(100)
    assert leader.replica is not None
    leader.replica.resign()
    leader.turn()
    assert not leader.replica.is_leader
    began_ms = world.now_ms
    world.run_until(lambda: leader.replica is not None and leader.replica.resigned)
    assert world.write(b"b") is not leader
    assert world.now_ms - began_ms < 60


def test_a_new_leader_takes_commands_when_it_has_all_that_was_acknowledged() -> None:
    world = made()
    world.write(b"a")
    world.leader().crash()
    world.run_until(lambda: any(host.engine is not None and host.engine.leads for host in world.hosts.values()))
    leader = next(host for host in world.hosts.values() if host.engine is not None and host.engine.leads)
    assert not leader.leads
    world.run_until(lambda: leader.leads)
    assert world.has(leader, b"a")


# --- reads ------------------------------------------------------------------------------------------------------------


def test_a_fresh_read_needs_a_majority() -> None:
    world = made()
    world.write(b"a")
    leader = world.leader()
    assert leader.replica is not None
    reads: list[bool] = []
    leader.replica.confirm(reads.append)
    leader.turn()
    assert reads == []
    world.run_until(lambda: bool(reads), 50)
    assert reads == [True]
    # Cut off, it believes in itself for a while, and confirms nothing.
    world.cut(leader.endpoint)
    leader.replica.confirm(reads.append)
    leader.turn()
    world.run(100)
    assert leader.leads and reads == [True]
    world.run(1000)
    assert not leader.leads and reads == [True, False]
    follower = followers(world)[0]
    assert follower.replica is not None
    follower.replica.confirm(reads.append)
    follower.turn()
    assert reads == [True, False, False]


def test_a_read_sees_what_was_acknowledged_elsewhere() -> None:
    """A new leader confirms only when what its predecessors acknowledged is in its state."""
    for seed in range(20):
        check_reads_after_a_loss(made(seed))


def check_reads_after_a_loss(world: World) -> None:
    world.write(b"a")
    world.leader().crash()
    seen: list[bool] = []

    def confirmed(host: Host, fresh: bool) -> None:
        if fresh:
            seen.append(world.has(host, b"a"))

    while not seen:
        world.run(0.3)
        for host in world.hosts.values():
            if host.engine is not None and host.engine.leads and host.replica is not None:
                host.replica.confirm(partial(confirmed, host))
                host.turn()
    assert all(seen)


# --- the log ----------------------------------------------------------------------------------------------------------


def raft_log(entries: int) -> RaftLog:
    log = RaftLog(MemoryJournal(World(1, 1).hosts["head0:1"].disk))
    log.replay()
    for index in range(1, entries + 1):
        log.add(NO_OP_COMMAND, index, 1 if index > 1 else 0)
    return log


def test_a_repeated_message_takes_nothing_back() -> None:
    log = raft_log(10)
    log.add(NO_OP_COMMAND, 4, 1)
    assert len(log) == 10
    log.add(NO_OP_COMMAND, 8, 2)
    assert len(log) == 8 and log[-1] == (NO_OP_COMMAND, 8, 2)
    log.sync()
    again = RaftLog(log.journal)
    again.replay()
    assert again[:] == log[:]


def test_a_committed_entry_is_never_replaced() -> None:
    log = raft_log(10)
    log.setRaftCommitIndex(5)
    log.add(NO_OP_COMMAND, 6, 2)
    with pytest.raises(DivergedError, match="ftray heads replace"):
        log.add(NO_OP_COMMAND, 5, 2)


def test_a_replica_that_has_diverged_stops() -> None:
    world = made()
    world.write(b"a")
    world.run(100)
    follower, leader = followers(world)[0], world.leader()
    link = next(link for link in follower.links if link.peer is leader)
    assert follower.replica is not None
    follower.replica.link_message(link, m.encode(m.Append(99, 0, 0, 1, 0, ((NO_OP_COMMAND, 2, 99),))))
    follower.turn()
    assert isinstance(follower.error, DivergedError) and follower.replica is None


def test_commit_follows_only_what_agrees() -> None:
    """A message may say that more is committed than it shows to agree; what else is here may be another leader's."""
    world = made()
    leader, follower = world.leader(), followers(world)[0]
    world.run(100)
    replica = follower.replica
    assert replica is not None
    replica._log.add(NO_OP_COMMAND, follower.engine.last_index + 1, 1)
    applied, last = follower.engine.last_applied, follower.engine.last_index
    link = next(link for link in follower.links if link.peer is leader)
    event = m.Append(leader.engine.term, 0, last, last - 1, replica._log[-2][2], ())
    replica.link_message(link, m.encode(event))
    replica.flush()
    assert follower.engine.last_applied == applied
    replica.link_message(link, m.encode(m.Ping(leader.engine.term, 0)))
    replica.flush()
    assert follower.engine.last_applied == applied


def test_an_entry_that_cannot_be_read_stops_the_replica_instead_of_being_retried() -> None:
    world = made()
    leader = world.leader()
    leader.engine.append(bytes([REGULAR]) + b"\xc1")
    leader.turn()
    world.run(100)
    stopped = [host for host in world.hosts.values() if host.replica is None]
    assert stopped and all(isinstance(host.error, NewerCommandError) for host in stopped)
    assert "newer ftray" in str(stopped[0].error)


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_a_head_far_behind_gets_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftray.gcs.raft.log.KEEP_ENTRIES", 2)
    monkeypatch.setattr("ftray.gcs.raft.snapshots.PART_BYTES", 100)
    world = made()
    late = followers(world)[0]
    late.crash()
    for number in range(30):
        world.write(b"k%d" % number)
    for host in world.hosts.values():
        if host.replica is not None:
            host.replica.compact()
            assert len(host.replica._log) < 8
    late.start()
    resets: list[bool] = []
    assert late.replica is not None
    late.replica.on_reset(lambda: resets.append(True))
    for number in range(30, 35):
        world.write(b"k%d" % number)
    world.converge()
    assert resets == [True] and world.has(late, b"k0")
    # What it was sent is durable.
    late.crash()
    late.start()
    assert world.has(late, b"k0")
    world.converge()


def test_a_damaged_snapshot_is_not_taken() -> None:
    world = made()
    world.write(b"a")
    follower, leader = followers(world)[0], world.leader()
    replica = follower.replica
    assert replica is not None
    link = next(link for link in follower.links if link.peer is leader)
    before = replica.state.snapshot()
    part = m.SnapshotPart(leader.engine.term, 0, 50, leader.engine.term, 4, 12345, 0, b"abcd")
    replica.link_message(link, m.encode(part))
    replica.flush()
    assert replica.state.snapshot() == before and replica.stopped is None
    world.converge()


def test_a_snapshot_that_is_older_than_the_log_takes_nothing_back() -> None:
    world = made()
    world.write(b"a")
    leader = world.leader()
    assert leader.replica is not None
    leader.replica.compact()
    kept = leader.replica._log.journal.open_snapshot()
    assert kept is not None
    index, term, data = kept.index, kept.term, kept.read(0, kept.total_bytes)
    for number in range(5):
        world.write(b"k%d" % number)
    world.run(100)
    follower = followers(world)[0]
    replica = follower.replica
    assert replica is not None
    last = follower.engine.last_index
    assert last > index
    link = next(link for link in follower.links if link.peer is leader)
    part = m.SnapshotPart(leader.engine.term, 0, index, term, len(data), zlib.crc32(data), 0, data)
    replica.link_message(link, m.encode(part))
    replica.flush()
    assert follower.engine.last_index == last and world.has(follower, b"k4")


def test_a_large_command_travels_whole() -> None:
    """The library cuts large entries into pieces, and loses the end of some."""
    world = made()
    leader = world.leader()
    assert leader.replica is not None
    results: list[Result] = []
    for size in (131_072 - 40, 262_144, 262_144 + 1, 1_000_000):
        command = encode_command(KvPut("n", b"%d" % size, bytes(size)))
        leader.replica.propose(Request(b"", 0, command), results.append)
    leader.turn()
    world.run_until(lambda: len(results) == 4)
    assert all(result.ok for result in results)
    world.converge()


def test_bytes_that_are_no_message_close_the_link() -> None:
    world = made()
    follower = followers(world)[0]
    link = sorted(follower.links, key=lambda link: link.peer.endpoint)[0]
    assert follower.replica is not None
    follower.replica.link_message(link, b"\xc1rubbish")
    follower.turn()
    assert not link.open
    world.converge()
