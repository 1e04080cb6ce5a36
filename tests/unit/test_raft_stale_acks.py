"""An acknowledgement from an earlier term must not count for entries that came later.

pysyncobj 0.3.17 (and 0.3.16) tells a leader only "the next entry that I need is number n" (`next_node_idx`), without
saying in which term that was said. Here that costs three acknowledged writes, with five replicas A to E, links that
are slow now and then but deliver everything in order, no restarts, and two replicas that crash at the end: what a
cluster of five must survive.

1. A leads. It writes six entries, x0 to x5, which reach E only. E acknowledges them; the link from E to A is slow, so
   the acknowledgements are under way for a long time.
2. B, C and D hear nothing of A, and elect B. B's log is shorter; A and E follow it, and throw x0 to x5 away.
3. A is elected again, by C and D. It writes y0, y1, y2, at the places in the log where some of those were. They reach
   D only: to B, C and E the links from A are slow now. Two of five have them, which is no majority.
4. Now E's acknowledgements from step 1 arrive at A. They say that E has everything up to x5's place. The library counts
   E, which has none of the three: a majority. **The writes are acknowledged to the client.**
5. A and D crash. B, C and E elect a leader, and none of them has y0, y1 or y2.

Every message of the replica names its term, and acknowledgements of another term count for nothing: the same history,
message for message, acknowledges nothing at step 4. When the slow links have delivered, it acknowledges the writes, and
the same crash loses none. Both are driven by one script.

If the first of these tests fails, the library has mended this: the stamp (`Leading.on_ack`) may then be redundant.
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
        self.sent = 0
        self.delivered = 0

    def send(self, a: str, b: str, message: Any) -> None:
        self.sent += 1
        self.queues[(a, b)].append(message)

    @property
    def lossless(self) -> bool:
        """All that was sent has arrived, or is under way still. (The order is that of the queues.)"""
        return self.sent == self.delivered + sum(map(len, self.queues.values()))

    def deliver(self, a: str, b: str) -> bool:
        """All that is under way from a to b arrives. Returns whether there was anything."""
        queue = self.queues[(a, b)]
        found = bool(queue)
        for _ in range(len(queue)):
            self.delivered += 1
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
        self.wires.send(self.name, node.id, message)
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
        self.wires.send(self.name, link, data)

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
    """Runs it up to the crash; the steps are those of the module's text. Returns the writes that node A has
    acknowledged in its second term."""
    nodes, lost, acknowledged = wires.nodes, list[bytes](), list[bytes]()
    wires.elect("A", NAMES)
    wires.beat("A")
    wires.pump(NAMES)
    # 1. A's entries reach E only, and E's answers are slow.
    for number in range(6):
        nodes["A"].write(b"x%d" % number, lost)
    wires.beat("A")
    wires.beat("A")
    wires.deliver("A", "E")
    # 2. B leads, and takes them back everywhere.
    wires.elect("B", "BCD")
    wires.beat("B")
    wires.pump("ABCDE", but=("EA",))
    # 3. A leads again, and writes three entries in their place. To B, C and E its links are slow now.
    wires.elect("A", "ACD")
    for number in range(3):
        nodes["A"].write(b"y%d" % number, acknowledged)
    wires.beat("A")
    wires.beat("A")
    wires.pump("AD")
    assert not acknowledged and not lost, "two of five are no majority"
    # 4. What E has said long ago arrives.
    wires.deliver("E", "A")
    wires.beat("A")
    wires.pump("AD")
    assert wires.lossless
    return acknowledged


def after_the_crash(wires: Wires) -> BareNode | OurNode:
    """5. A and D are gone, and what they had sent and nobody has received with them. Returns the next leader."""
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
    assert all(not wires.nodes[name].has(b"y0") for name in NAMES), "not committed, so not applied anywhere"
    # When the slow links deliver, the writes are acknowledged, and survive the same crash.
    wires.beat("A")
    wires.pump(NAMES)
    assert acknowledged == [b"y0", b"y1", b"y2"]
    leader = after_the_crash(wires)
    assert leader.leads and all(leader.has(value) for value in acknowledged)


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
