"""An acknowledgement from an earlier term must not count for entries that came later.

The history: five replicas, links in order and without loss, some of them slow. A leader's entries reach one follower
only, whose acknowledgements are slow; the next leader takes those entries back; the first one leads again, writes three
entries in their place, and now the old acknowledgements arrive. Then two replicas crash, of five.

The bare library acknowledges the three writes and loses them. Both are driven by the same script.
"""

from __future__ import annotations

import _socket
import random
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

import pysyncobj
import pysyncobj.syncobj
import pytest
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from raft_world import Disk, MemoryJournal

from ftray.gcs.raft import library
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.replica import RaftReplica
from ftray.gcs.raft.shell import Timing
from ftray.gcs.replica import Request
from ftray.gcs.state.commands import KvPut, encode_command
from ftray.gcs.state.tables import Result

# The library puts a function for Windows here, which works nowhere else.
socket.inet_ntop = _socket.inet_ntop

NAMES = "ABCDE"


class Wires:
    """A queue for each direction between two nodes; the script says when what is in it arrives."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.queues: dict[tuple[str, str], deque[Any]] = {(a, b): deque() for a in NAMES for b in NAMES if a != b}
        self.nodes: dict[str, BareNode | OurNode] = {}

    def deliver(self, a: str, b: str) -> bool:
        """All that is under way from a to b arrives. Returns whether there was anything."""
        queue = self.queues[(a, b)]
        found = bool(queue)
        for _ in range(len(queue)):
            self.nodes[b].receive(a, queue.popleft())
            self.nodes[b].tick()
        return found

    def pump(self, names: str, but: tuple[str, ...] = ()) -> None:
        """Delivers among these nodes until nothing is left, except in the directions `but` ("AB": from A to B)."""
        for _ in range(50):
            moved = [self.deliver(a, b) for a in names for b in names if a != b and a + b not in but]
            if not any(moved):
                return

    def elect(self, name: str, names: str, but: tuple[str, ...] = ()) -> None:
        """The election timeout of a node passes, and these nodes hear each other."""
        self.now_s += 0.3  # nobody has heard a leader lately
        self.nodes[name].time_out()
        self.nodes[name].tick()
        self.pump(names, but)
        assert self.nodes[name].leads

    def beat(self, name: str) -> None:
        """The next round of appends of a leader."""
        self.now_s += 0.12
        self.nodes[name].tick()


class _Wire(Transport):  # type: ignore[misc]
    def __init__(self, wires: Wires, name: str) -> None:
        super().__init__(None, None, [])
        self.wires = wires
        self.name = name

    def send(self, node: Node, message: Any) -> bool:
        self.wires.queues[(self.name, node.id)].append(message)
        return True


class _Bare(pysyncobj.SyncObj):  # type: ignore[misc]
    def __init__(self, wires: Wires, name: str) -> None:
        self.kept: list[bytes] = []
        conf = pysyncobj.SyncObjConf(autoTick=False, raftMinTimeout=1e6, raftMaxTimeout=2e6, connectionTimeout=1e7)
        others = [Node(other) for other in NAMES if other != name]
        super().__init__(Node(name), others, conf, transport=_Wire(wires, name))
        for other in others:
            self._SyncObj__onNodeConnected(other)

    @pysyncobj.replicated  # type: ignore[untyped-decorator]
    def keep(self, value: bytes) -> None:
        self.kept.append(value)


class BareNode:
    """A node with the library as it is."""

    def __init__(self, wires: Wires, name: str) -> None:
        self.raft = _Bare(wires, name)

    def tick(self) -> None:
        self.raft.doTick()

    def receive(self, sender: str, message: Any) -> None:
        self.raft._SyncObj__onMessageReceived(Node(sender), message)

    def time_out(self) -> None:
        self.raft._SyncObj__raftElectionDeadline = 0

    @property
    def leads(self) -> bool:
        return bool(self.raft._isLeader())

    def write(self, value: bytes, acknowledged: list[bytes]) -> None:
        def done(result: object, error: int) -> None:
            if error == pysyncobj.FAIL_REASON.SUCCESS:
                acknowledged.append(value)

        self.raft.keep(value, callback=done)

    def has(self, value: bytes) -> bool:
        return value in self.raft.kept


class OurNode:
    """A node with the replica."""

    def __init__(self, wires: Wires, name: str) -> None:
        self.wires = wires
        self.name = name
        ids = {each: each.encode() * 16 for each in NAMES}
        journal = MemoryJournal(Disk(ids[name]))
        self.replica = RaftReplica(
            journal, endpoint=name, heads=tuple(NAMES), transport=self, now_ms=lambda: wires.now_s * 1000.0,
            rng=random.Random(name), timing=Timing(election_max_ms=1e7, fallback_ms=500.0),
        )  # fmt: skip
        for other in NAMES:
            if other != name:
                self.replica.link_opened(other, name < other)
        self.replica.flush()

    def send(self, link: str, data: bytes) -> None:
        self.wires.queues[(self.name, link)].append(data)

    def close(self, link: str, reason: str) -> None:
        raise AssertionError(reason)

    def tick(self) -> None:
        self.replica.flush()

    def receive(self, sender: str, message: bytes) -> None:
        self.replica.link_message(sender, message)
        self.replica.flush()

    def time_out(self) -> None:
        assert self.replica._engine is not None
        self.replica._engine.campaign()

    @property
    def leads(self) -> bool:
        return self.replica._engine is not None and self.replica._engine.leads

    def write(self, value: bytes, acknowledged: list[bytes]) -> None:
        def done(result: Result) -> None:
            if result.ok:
                acknowledged.append(value)

        self.replica.propose(Request(b"", 0, encode_command(KvPut("n", value, b""))), done)

    def has(self, value: bytes) -> bool:
        return self.replica.state.kv_get("n", value) is not None


def history(wires: Wires) -> list[bytes]:
    """Runs it up to the crash. Returns the writes that node A has acknowledged in its second term."""
    nodes, lost, acknowledged = wires.nodes, list[bytes](), list[bytes]()
    wires.elect("A", NAMES)
    wires.beat("A")
    wires.pump(NAMES)
    # A's entries reach E only, and E's answers are slow.
    for number in range(6):
        nodes["A"].write(b"x%d" % number, lost)
    wires.beat("A")
    wires.beat("A")
    wires.deliver("A", "E")
    # B leads, and takes them back everywhere.
    wires.elect("B", "BCD")
    wires.beat("B")
    wires.pump("ABCDE", but=("EA",))
    # A leads again, and writes three entries in their place. To B, C and E its links are slow now.
    wires.elect("A", "ACD")
    for number in range(3):
        nodes["A"].write(b"y%d" % number, acknowledged)
    wires.beat("A")
    wires.beat("A")
    wires.pump("AD")
    assert not acknowledged and not lost, "two of five are no majority"
    wires.deliver("E", "A")
    wires.beat("A")
    wires.pump("AD")
    return acknowledged


def after_the_crash(wires: Wires) -> BareNode | OurNode:
    """A and D are gone, and what they had sent with them. Returns the next leader."""
    for a in "AD":
        for b in NAMES:
            if a != b:
                wires.queues[(a, b)].clear()
    wires.now_s += 0.5
    wires.beat("B")  # which may lead still in its old term, and has heard nobody
    wires.elect("C", "BCE")
    for _ in range(3):
        wires.beat("C")
        wires.pump("BCE")
    return wires.nodes["C"]


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> Wires:
    wires = Wires()
    monkeypatch.setattr(pysyncobj.syncobj, "monotonicTime", lambda: wires.now_s)
    return wires


def fill(wires: Wires, make: Callable[[Wires, str], BareNode | OurNode]) -> None:
    for name in NAMES:
        wires.nodes[name] = make(wires, name)


def test_the_bare_library_loses_three_acknowledged_writes(wires: Wires) -> None:
    fill(wires, BareNode)
    acknowledged = history(wires)
    assert acknowledged == [b"y0", b"y1", b"y2"]
    leader = after_the_crash(wires)
    assert leader.leads and not any(leader.has(value) for value in acknowledged)


def test_the_replica_does_not_count_them(wires: Wires) -> None:
    fill(wires, OurNode)
    wires.pump(NAMES)
    acknowledged = history(wires)
    assert acknowledged == []
    # When the slow links deliver, the writes are acknowledged, and survive the same crash.
    wires.beat("A")
    wires.pump(NAMES)
    nodes = wires.nodes
    again: list[bytes] = []
    for number in range(3):
        nodes["A"].write(b"y%d" % number, again)
    wires.beat("A")
    wires.pump(NAMES)
    assert acknowledged + again
    leader = after_the_crash(wires)
    assert all(leader.has(value) for value in acknowledged + again)


def test_without_the_stamp_the_replica_would_lose_them_too(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker sees the fault that the stamp is there for."""
    real = library.Engine.on_ack
    fill(wires, OurNode)
    wires.pump(NAMES)

    def unstamped(leading: Any, peer: bytes, ack: Any, now_ms: float) -> None:
        if leading._engine.leads and isinstance(ack, m.Ack) and (ack.success or ack.reset):
            real(leading._engine, peer, ack)

    monkeypatch.setattr("ftray.gcs.raft.leading.Leading.on_ack", unstamped)
    assert history(wires) == [b"y0", b"y1", b"y2"]
    leader = after_the_crash(wires)
    assert leader.leads and not any(leader.has(b"y%d" % number) for number in range(3))
