"""Snapshots on their way: read from the leader's journal, shared by all who need one, made anew if there is none."""

from __future__ import annotations

import zlib

import pytest
from raft_disk import MemoryJournal
from raft_steps import made, raft_log
from raft_world import Host, World

from ftray.gcs.compaction import Whole
from ftray.gcs.raft import snapshots
from ftray.gcs.raft.messages import SnapshotAck, SnapshotPart
from ftray.gcs.raft.saving import Saving
from ftray.gcs.raft.snapshots import REFUSED_MAX, RESEND_MS, Made, Receiver, Sender, part_of
from ftray.gcs.state.errors import JournalWriteError


class Memory:
    """A snapshot in memory."""

    def __init__(self, index: int, data: bytes) -> None:
        self.index, self.term, self.data = index, 1, data
        self.total_bytes, self.crc = len(data), zlib.crc32(data)
        self.closed = 0

    def read(self, offset: int, length: int) -> bytes:
        assert not self.closed
        return self.data[offset : offset + length]

    def close(self) -> None:
        self.closed += 1


class Leader:
    def __init__(self, made: Memory | None) -> None:
        self.made = made
        self.opened = 0
        self.damaged = 0
        self.sent: list[tuple[bytes, SnapshotPart]] = []
        self.sender = Sender(self.open, self.send, self.spoilt)

    def open(self) -> Memory | None:
        self.opened += 1
        return self.made

    def send(self, peer: bytes, made: Made, offset: int) -> None:
        self.sent.append((peer, part_of(made, offset, 1, 0)))

    def spoilt(self) -> None:
        self.damaged += 1

    def ack(self, peer: bytes, received: int, now_ms: float = 0.0) -> None:
        assert self.made is not None
        self.sender.on_ack(peer, SnapshotAck(1, 0, self.made.index, received), now_ms)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "PART_BYTES", 100)


def test_all_who_need_one_get_the_same_until_the_last_has_it() -> None:
    made = Memory(50, bytes(range(250)))
    leader = Leader(made)
    receivers = {peer: Receiver() for peer in (b"a", b"b")}
    for peer in receivers:
        leader.sender.needed(peer, 0.0, 40)
    assert leader.opened == 1 and leader.sender.busy
    whole = {}
    while leader.sent:
        peer, part = leader.sent.pop(0)
        assert len(part.data) <= 100
        taken = receivers[peer].take(part)
        if isinstance(taken, int):
            leader.ack(peer, taken)
        else:
            whole[peer] = taken
    assert whole == {b"a": made.data, b"b": made.data}
    leader.sender.drop(b"a")
    assert not made.closed and leader.sender.sends_to(b"b")
    leader.sender.drop_all()
    assert made.closed == 1 and not leader.sender.busy


def test_one_that_is_older_than_the_log_is_not_shared() -> None:
    leader = Leader(Memory(50, b"x" * 250))
    leader.sender.needed(b"a", 0.0, 40)
    leader.made = Memory(90, b"y" * 250)
    leader.sender.needed(b"b", 0.0, 80)
    assert [part.index for _, part in leader.sent] == [50, 90]


def test_who_asks_before_there_is_one_asks_again() -> None:
    leader = Leader(None)
    leader.sender.needed(b"a", 0.0, 1)
    assert not leader.sent and not leader.sender.busy
    leader.made = Memory(50, b"x" * 250)
    leader.sender.needed(b"a", 30.0, 1)
    leader.sender.needed(b"a", 60.0, 1)  # it is on its way
    assert len(leader.sent) == 1
    leader.sender.needed(b"a", 40.0 + RESEND_MS, 1)
    assert len(leader.sent) == 2


def test_one_that_nobody_takes_is_given_up() -> None:
    made = Memory(50, b"x" * 250)
    leader = Leader(made)
    leader.sender.needed(b"a", 0.0, 1)
    made.data = b"x" * 249 + b"y"  # the disk gives something else than was written
    receiver = Receiver()
    parts = 0
    while leader.sent:
        parts += 1
        peer, part = leader.sent.pop(0)
        taken = receiver.take(part)
        assert isinstance(taken, int)
        leader.ack(peer, taken)
    assert leader.damaged == 1 and made.closed == 1 and not leader.sender.busy
    assert parts == 3 * REFUSED_MAX


def test_one_that_can_not_be_read_is_given_up() -> None:
    made = Memory(50, b"x" * 250)
    leader = Leader(made)
    leader.sender.needed(b"a", 0.0, 1)
    made.data = made.data[:150]
    leader.ack(b"a", 100)
    assert leader.damaged == 1 and made.closed == 1 and not leader.sender.busy


# --- in a cluster -----------------------------------------------------------------------------------------------------


def started() -> World:
    world = World(3)
    world.start()
    world.leader()
    return world


def late(world: World, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A head that is down, and needs what the others have no entries of any more."""
    monkeypatch.setattr("ftray.gcs.raft.log.KEEP_ENTRIES", 2)
    host = next(host for host in world.hosts.values() if not host.leads)
    host.crash()
    for number in range(30):
        world.write(b"k%d" % number)
    for each in world.hosts.values():
        if each.replica is not None:
            each.replica.compact()
            assert each.replica._log[0][1] > 20
    return host


def test_the_state_is_not_encoded_for_each_who_lags(monkeypatch: pytest.MonkeyPatch) -> None:
    world = started()
    host = late(world, monkeypatch)
    leader = world.leader().replica
    assert leader is not None
    monkeypatch.setattr(type(leader.state), "picture", lambda state: 1 / 0)
    host.start()
    world.run_until(lambda: world.has(host, b"k0"))
    world.converge()


def test_a_leader_that_was_restarted_makes_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its snapshot is as old as its last entry: there is nothing to gain, but for the one who waits."""
    world = started()
    host = late(world, monkeypatch)
    others = [each for each in world.hosts.values() if each is not host]
    for each in others:
        each.crash()
    for each in others:
        each.start()
    world.leader()
    assert all(each.replica is not None and each.replica._log.journal.open_snapshot() is None for each in others)
    host.start()
    world.run_until(lambda: world.has(host, b"k0"))
    world.converge()


def test_with_it_the_one_who_lags_makes_a_majority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be committed before it has caught up, so the snapshot is of an index that was saved already."""
    world = started()
    host = late(world, monkeypatch)
    first, second = [each for each in world.hosts.values() if each is not host]
    first.crash()
    second.crash()
    second.start()
    host.start()
    world.run_until(lambda: world.has(host, b"k0"))
    world.write(b"after")
    world.converge()


def test_a_compaction_while_one_is_sent_waits_until_the_journal_is_twice_as_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = started()
    world.compact_bytes = 3_000
    host = late(world, monkeypatch)
    for each in list(world.hosts.values()):
        each.crash()
    for each in world.hosts.values():
        if each is not host:
            each.start()
    leader = world.leader()
    replica = leader.replica
    assert replica is not None
    replica._saving.compactor.at_once()
    due = replica._saving.compactor._due_bytes
    host.start()
    world.slow[(leader.endpoint, host.endpoint)] = 300.0
    world.run_until(lambda: replica._sender.busy)
    number = 0
    while leader.disk.size < due + 300:
        number += 1
        world.write(b"more%d" % number)
    assert replica._sender.busy and not replica._saving.compactor.running
    while not replica._saving.compactor.running:
        number += 1
        world.write(b"more%d" % number)
        assert leader.disk.size < 2 * due + 1_000
    assert leader.disk.size >= 2 * due
    world.converge()


# --- compactions that fail --------------------------------------------------------------------------------------------


def test_one_that_somebody_waits_for_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[float] = []

    def full(journal: MemoryJournal, *arguments: object, **more: object) -> None:
        tries.append(now_ms)
        raise JournalWriteError("the disk is full")

    monkeypatch.setattr(MemoryJournal, "begin_compaction", full)
    saving = Saving(raft_log(5), 1 << 30, 0, lambda: (5, Whole(b"state")), lambda *part: None)
    saving.sender.needed(b"peer", 0.0, 1)
    for now_ms in (0.0, 10.0, 500.0, 999.0, 1000.0, 1001.0):
        saving.turn(now_ms)
    assert tries == [0.0, 1000.0]


def test_a_full_disk_ends_the_one_of_a_head_among_several() -> None:
    """The room that it takes may be what is missing."""
    world = made()
    leader = world.leader()
    assert leader.replica is not None
    leader.replica.begin_compaction()
    assert leader.replica._saving.busy
    leader.disk.full = True
    world.put(leader, b"k")
    leader.turn()
    assert not leader.replica._saving.busy
    leader.disk.full = False
    world.converge()
