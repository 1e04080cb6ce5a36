"""Snapshots, members, and who asks.

Each of these tests was seen to fail without what it is about; see docs/raft.md.
"""

from __future__ import annotations

import logging
import zlib
from typing import Any

import msgspec
import pytest
from raft_disk import MemorySnapshot
from raft_steps import behind, followers, link_to, made, short_logs, tell
from raft_world import Disk, Host, World

from ftray.gcs.journal_format import SNAPSHOT, Record
from ftray.gcs.raft import membership
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.errors import NewerCommandError, ReplicaRemovedError, UnreadableSnapshotError
from ftray.gcs.raft.log import MEMBERSHIP, Snapshot
from ftray.gcs.raft.membership import Member
from ftray.gcs.raft.snapshots import Receiver, Sender
from ftray.gcs.state.errors import JournalCorruptError, JournalVersionError
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Code, Result

# --- snapshots --------------------------------------------------------------------------------------------------------


def test_a_snapshot_that_cannot_be_loaded_stops_the_start() -> None:
    world = made(heads=1)
    host = world.leader()
    assert host.replica is not None
    host.replica.compact()
    whole = host.replica.state.snapshot()
    host.crash()
    for state in (b"rubbish", b"", whole[:-1], whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]):
        body = Snapshot((Member(host.disk.replica_id, host.endpoint),), 0, state)
        host.disk.records[0] = Record(SNAPSHOT, 1, 5, msgspec.msgpack.encode(body))
        host.start()
        assert isinstance(host.error, JournalCorruptError) and "its snapshot" in str(host.error)
        assert host.replica is None


def test_a_snapshot_of_a_newer_version_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftray.gcs.state import snapshot as snapshot_module

    world = made(heads=1)
    host = world.leader()
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module, "SNAPSHOT_VERSION", snapshot_module.SNAPSHOT_VERSION + 1)
        assert host.replica is not None
        host.replica.compact()
    host.crash()
    host.start()
    assert isinstance(host.error, JournalVersionError) and "newer" in str(host.error)


def test_a_snapshot_of_the_leader_that_cannot_be_read_stops_the_head_and_says_why() -> None:
    """Its checksum is right: it is of another version, and the leader will send no other one."""
    world = made()
    world.write(b"a")
    leader, follower = world.leader(), followers(world)[0]
    replica = follower.replica
    assert replica is not None
    kept = list(follower.disk.records)
    whole = Snapshot((), 0, replica.state.snapshot())
    foreign = Snapshot((Member(b"x" * 16, "x:1"),), 0, GcsState(b"D" * 16).snapshot())
    newer = Snapshot((), 0, whole.state[:8] + bytes([99]) + whole.state[9:])
    for body in (b"\xc1", b"\x93\x91\x92\xa1x\xa1\xff", *map(msgspec.msgpack.encode, (newer, foreign))):
        part = m.SnapshotPart(leader.engine.term, 0, 500, leader.engine.term, len(body), zlib.crc32(body), 0, body)
        tell(follower, leader, part)
        assert isinstance(follower.error, UnreadableSnapshotError), follower.error
        assert "that the leader has sent can't be read here" in str(follower.error)
        assert "start it with the version of ftray that the leader runs" in str(follower.error)
        assert follower.disk.records[: len(kept)] == kept
        follower.start()
        world.run(300)
    assert follower.error is None
    world.converge()


def test_an_entry_of_a_kind_that_is_not_known_stops_the_head() -> None:
    """To skip it would be to hold another state than those who know it."""
    world = made()
    leader = world.leader()
    leader.engine.append(b"\x07new")
    leader.turn()
    world.run(100)
    stopped = [host for host in world.hosts.values() if host.replica is None]
    assert stopped and all(isinstance(host.error, NewerCommandError) for host in stopped)
    assert "of kind 7" in str(stopped[0].error)


def test_a_snapshot_is_sent_part_by_part_and_begun_anew_with_a_new_link(monkeypatch: pytest.MonkeyPatch) -> None:
    short_logs(monkeypatch)
    world = made()
    late = behind(world)
    late.start()
    sent = 0
    send = Host.send

    def counted(host: Host, link: Any, data: bytes) -> None:
        nonlocal sent
        sent += isinstance(m.decode(data), m.SnapshotPart)
        send(host, link, data)

    with monkeypatch.context() as patch:
        patch.setattr(Host, "send", counted)
        world.run_until(lambda: late.replica is not None and late.replica._receiver._received > 200)
        world.break_links(late.endpoint, world.leader().endpoint)
        began_ms = world.now_ms
        world.run_until(lambda: world.has(late, b"k29"), 900)
    parts = -(-len(world.leader().disk.records[0].payload) // 100)
    assert world.now_ms - began_ms < 900 and parts <= sent < 2 * parts + 10
    assert late.engine.commit_index >= late.replica._log.snapshot_index  # type: ignore[union-attr]
    world.converge()
    world.run(3000)
    assert not world.leader().replica._sender._sending  # type: ignore[union-attr]


def test_a_slow_receiver_is_sent_each_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    short_logs(monkeypatch)
    world = made()
    late = behind(world)
    leader = world.leader()
    late.start()
    world.slow[late.endpoint, leader.endpoint] = 150.0
    offsets: list[tuple[int, int]] = []
    send = Host.send

    def counted(host: Host, link: Any, data: bytes) -> None:
        part = m.decode(data)
        if isinstance(part, m.SnapshotPart) and host is leader:
            offsets.append((part.index, part.offset))
        # Entries would be of no use, since it lacks what comes before them.
        assert not offsets or not isinstance(part, m.Append) or host is not leader or link.peer is not late
        send(host, link, data)

    with monkeypatch.context() as patch:
        patch.setattr(Host, "send", counted)
        world.run_until(lambda: late.replica is not None and late.replica._receiver._received > 400)
    assert len(offsets) == len(set(offsets)) > 3


def test_a_snapshot_under_way_is_shared_if_it_is_new_enough() -> None:
    sent: list[tuple[bytes, int, int]] = []
    snapshots = [MemorySnapshot(Record(SNAPSHOT, 1, index, bytes(600_000))) for index in (30, 10)]
    sender = Sender(snapshots.pop, lambda peer, one, offset: sent.append((peer, one.index, offset)))
    sender.needed(b"a", 0.0, 5)
    sender.needed(b"b", 0.0, 10)
    sender.needed(b"c", 0.0, 20)
    assert sent == [(b"a", 10, 0), (b"b", 10, 0), (b"c", 30, 0)]
    sender.on_ack(b"a", m.SnapshotAck(1, 0, 30, 262_144), 1.0)
    assert len(sent) == 3, "of another snapshot"
    sender.on_ack(b"a", m.SnapshotAck(1, 0, 10, 262_144), 1.0)
    assert sent[3:] == [(b"a", 10, 262_144)]


def test_a_part_that_was_lost_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    short_logs(monkeypatch)
    world = made()
    late = behind(world)
    late.start()
    send, lost = Host.send, list[bytes]()

    def loses_one(host: Host, link: Any, data: bytes) -> None:
        if isinstance(m.decode(data), m.SnapshotPart) and not lost:
            lost.append(data)
        else:
            send(host, link, data)

    with monkeypatch.context() as patch:
        patch.setattr(Host, "send", loses_one)
        world.run_until(lambda: world.has(late, b"k29"))
    assert lost


def test_parts_of_two_snapshots_are_not_mixed() -> None:
    def part(index: int, data: bytes, offset: int) -> m.SnapshotPart:
        return m.SnapshotPart(1, 0, index, 1, len(data), zlib.crc32(data), offset, data[offset : offset + 100])

    receiver, old, new = Receiver(), bytes(250), bytes(range(250))
    assert receiver.take(part(10, old, 0)) == 100
    assert receiver.take(part(20, new, 100)) == 0
    assert receiver.take(part(20, new, 0)) == 100
    assert receiver.take(part(20, new, 0)) == 100
    assert receiver.take(part(20, new, 100)) == 200
    assert receiver.take(part(20, new, 200)) == new
    damaged = m.SnapshotPart(1, 0, 30, 1, 4, zlib.crc32(b"abcd") ^ 1, 0, b"abcd")
    assert receiver.take(damaged) == 0


# --- members ----------------------------------------------------------------------------------------------------------


def without(world: World, host: Host) -> bytes:
    assert host.replica is not None
    rest = [member for member in host.replica.members if member.replica_id != host.disk.replica_id]
    return bytes([MEMBERSHIP]) + membership.encode_table(rest)


def test_a_head_that_sees_its_removal_committed_stops() -> None:
    """Also if nobody tells it: it had the entry, was away, and finds it committed on its disk."""
    world = made()
    host = followers(world)[0]
    assert host.replica is not None
    index, term = host.engine.last_index + 1, host.engine.term
    command = without(world, host)
    host.replica._log.add(command, index, term)
    host.replica._log.setRaftCommitIndex(index)
    host.replica._log.sync()
    host.crash()
    for other in world.hosts.values():
        other.crash()
    host.heads = ()
    host.start()
    world.run(500)
    assert isinstance(host.error, ReplicaRemovedError) and "ftray heads add" in str(host.error)


def test_a_head_that_was_added_later_does_not_stop_at_an_earlier_table() -> None:
    world = made()
    for name in ("new1:1", "new2:1"):
        host = Host(world, name, tuple(world.hosts), Disk(world.new_id()), join=True)
        world.hosts[name] = host
        host.start()
        world.run(100)
        leader, results = world.leader(), list[Result]()
        assert leader.replica is not None
        leader.replica.add_head(host.disk.replica_id, host.endpoint, results.append)
        leader.turn()
        world.run_until(lambda host=host: host.replica is not None and host.replica._elections is not None  # type: ignore[misc]
                        and host.replica._elections.votes)  # fmt: skip
        world.run(100)
    assert not world.stops
    for host in world.hosts.values():
        host.heads = ()
    world.converge()


def test_a_head_that_its_peers_refuse_stops() -> None:
    world = made(heads=4)
    host, other = followers(world)[:2]
    peers = host.replica._peers  # type: ignore[union-attr]
    index = peers._log.members_index
    link = link_to(host, other)
    peers.on_refused(link, m.Refused("an old story", index, True))
    peers.on_refused(link, m.Refused("of another cluster", index + 9, False))
    assert peers.refusals[other.endpoint] == "of another cluster"
    with pytest.raises(ReplicaRemovedError, match=f"removed from the cluster, says {other.endpoint}"):
        peers.on_refused(link, m.Refused("gone", index + 1, True))


def test_a_new_heads_table_is_not_believed_before_it_is_agreed_upon() -> None:
    """Only what is committed makes a head refuse another one."""
    world = made()
    host, other = followers(world)
    assert host.replica is not None
    replica = host.replica
    rest = [member for member in replica.members if member.replica_id != other.disk.replica_id]
    command = bytes([MEMBERSHIP]) + membership.encode_table(rest)
    replica._log.add(command, host.engine.last_index + 1, host.engine.term)
    replica._follow_table()
    world.run(300)
    assert not world.stops and other.replica is not None


def test_a_learner_counts_for_nothing() -> None:
    world = made(heads=2)
    leader, follower = world.leader(), followers(world)[0]
    new = Host(world, "new:1", tuple(world.hosts), Disk(world.new_id()), join=True)
    world.hosts["new:1"] = new
    new.start()
    world.run(100)
    follower.crash(silently=True)
    assert leader.replica is not None
    results: list[Result] = []
    leader.replica.add_head(new.disk.replica_id, new.endpoint, results.append)
    leader.turn()
    world.run(250)
    assert leader.engine.leads and new.engine is not None and new.engine.last_index == leader.engine.last_index
    assert results == []


def test_what_was_known_of_a_removed_head_is_forgotten() -> None:
    world = made(heads=4)
    gone = followers(world)[0]
    leader = world.leader()
    results: list[Result] = []
    assert leader.replica is not None
    leader.replica.remove_head(gone.disk.replica_id, results.append)
    leader.turn()
    world.run_until(lambda: bool(results))
    raft, node = leader.engine._raft, leader.engine.node(gone.disk.replica_id)
    assert all(
        node not in each
        for each in (raft._SyncObj__raftNextIndex, raft._SyncObj__raftMatchIndex, raft._SyncObj__lastResponseTime)
    )


# --- who asks ---------------------------------------------------------------------------------------------------------


def test_a_callback_that_fails_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    world = made(heads=1)
    host = world.leader()
    replica = host.replica
    assert replica is not None
    refused: list[str] = []

    def flushes(changes: object) -> None:
        with pytest.raises(RuntimeError, match="inside a callback"):
            replica.flush()
        refused.append("flush")
        raise ValueError("of the callback")

    replica.on_change(flushes)
    with caplog.at_level(logging.ERROR):
        results = world.put(host, b"k")
    assert results[0].ok and refused == ["flush"] and "of the callback" in caplog.text


def desk() -> Any:
    from ftray.gcs.raft.desk import Desk

    return Desk(lambda: 7)


def test_an_entry_that_took_anothers_place_is_not_its_success() -> None:
    box, results = desk(), list[Result]()
    box.wait(5, 2, results.append)
    box.wait(6, 2, results.append)
    box.applied(5, 3, Result(Code.OK, "", 7))
    box.applied(6, 2, Result(Code.OK, "", 7))
    box.release()
    assert [result.code for result in results] == [Code.NOT_LEADER, Code.OK]


def test_who_was_not_answered_when_the_replica_ends_hears_that_the_outcome_is_not_known() -> None:
    box, results, reads = desk(), list[Result](), list[bool]()
    box.give(results.append, Result(Code.OK, "", 7))
    box.wait(5, 2, results.append)
    box.wait_for_leader(results.append)
    box.reads.append(reads.append)
    assert box.begin_reads()
    box.end_reads(1)
    box.reads.append(reads.append)
    assert box.begin_reads()
    box.end_reads(1)
    box.close("this head is stopping")
    assert [result.code for result in results] == [Code.NOT_LEADER] * 3 and reads == [False, False]
    box.reads.append(reads.append)
    box.begin_reads()
    box.end_reads(2)
    box.release()
    assert reads == [False, False], "a later round"
