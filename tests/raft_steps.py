"""Steps that tests of the replica share, in the small world of `raft_world`."""

from __future__ import annotations

import pytest
from raft_world import Disk, Host, Link, MemoryJournal, World

from ftray.gcs.compaction import Whole
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.log import NO_OP, RaftLog
from ftray.gcs.raft.membership import Member
from ftray.gcs.state.tables import Result

NO_OP_COMMAND = bytes([NO_OP])
A, B, C = (Member(name.encode() * 16, f"{name}:1") for name in "abc")


def raft_log(entries: int = 0) -> RaftLog:
    log = RaftLog(MemoryJournal(Disk(b"i" * 16)))
    log.replay()
    for index in range(1, entries + 1):
        log.add(NO_OP_COMMAND, index, 1 if index > 1 else 0)
    return log


def again(log: RaftLog) -> RaftLog:
    """The log after a restart."""
    assert isinstance(log.journal, MemoryJournal)
    log = RaftLog(MemoryJournal(log.journal.disk))
    log.replay()
    return log


def compact(log: RaftLog, index: int) -> None:
    log.begin_compaction(index, Whole(b"state"), wait=True).finish()
    log.compacted(index)


def made(seed: int = 1, heads: int = 3) -> World:
    world = World(seed, heads)
    world.start()
    world.leader()
    world.run(100)
    return world


def followers(world: World) -> list[Host]:
    return [host for host in world.hosts.values() if not host.leads]


def link_to(host: Host, peer: Host) -> Link:
    return next(link for link in host.links if link.peer is peer)


def tell(host: Host, peer: Host, *messages: m.PeerMessage) -> list[m.PeerMessage]:
    """That host gets these messages from the other one. Returns what it says in that turn, to anybody."""
    said: list[m.PeerMessage] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Host, "send", lambda host, link, data: said.append(m.decode(data)))
        assert host.replica is not None
        for message in messages:
            host.replica.link_message(link_to(host, peer), m.encode(message))
        host.turn()
    return said


def learner_of(world: World) -> Host:
    """A head that was added, and can't be seen to have caught up."""
    host = Host(world, "new:1", tuple(world.hosts), Disk(world.new_id()), join=True)
    world.hosts["new:1"] = host
    host.start()
    world.run(100)
    leader = world.leader()
    world.stall("new:1", leader.endpoint)
    assert leader.replica is not None
    results: list[Result] = []
    leader.replica.add_head(host.disk.replica_id, host.endpoint, results.append)
    leader.turn()
    world.run(100)
    assert results[0].ok and host.engine is not None and not host.replica._elections.votes  # type: ignore[union-attr]
    return host


def short_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftray.gcs.raft.log.KEEP_ENTRIES", 0)
    monkeypatch.setattr("ftray.gcs.raft.log.KEEP_BYTES", 0)
    monkeypatch.setattr("ftray.gcs.raft.snapshots.PART_BYTES", 100)


def behind(world: World) -> Host:
    """A head that needs a snapshot of many parts, and is not running."""
    late = followers(world)[0]
    late.crash()
    for number in range(30):
        world.write(b"k%d" % number)
    for host in world.hosts.values():
        if host.replica is not None:
            host.replica.compact()
    return late
