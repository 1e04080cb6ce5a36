"""A small world for replicas of the GCS: virtual time, network and disks from one seed, and what must hold in it.

Everything happens in one heap of events. Links are ordered and lossless while they are open; they can be slow, be
stalled in one direction or both (what was sent arrives when the stall ends, or never), and break. A process can crash
(its peers see the links close, or, when the machine lost its power, see nothing), crash within a sync, be frozen and
thawed, and restart, with or without its disk.

After each step of a replica the world checks: one leader in each term; what is applied at an index is the same
everywhere and for ever; a leader has everything that was ever committed; logs with a common entry agree before it. At
the end: every write that was acknowledged is there, once.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from raft_disk import CLUSTER as CLUSTER
from raft_disk import CrashError, Disk, MemoryJournal

from ftray.gcs.raft.replica import RaftReplica, Timing
from ftray.gcs.replica import Request
from ftray.gcs.state.commands import KvPut, encode_command
from ftray.gcs.state.errors import GcsError
from ftray.gcs.state.tables import Code, Result


class Link:
    """One end of a connection."""

    def __init__(self, world: World, owner: Host, peer: Host) -> None:
        self.world = world
        self.owner = owner
        self.peer = peer
        self.other: Link = self
        self.open = True
        self.arrives_ms = 0.0
        """When the last message to this end arrives."""
        self.held: list[bytes | None] = []
        """What is under way to this end while the direction is stalled; None is its end."""


class CheckedReplica(RaftReplica):
    """Tells the world what it applies."""

    world: World

    def on_apply(self, index: int, term: int, command: bytes) -> None:
        self.world.applied(self, index, term, command)
        super().on_apply(index, term, command)


class Host:
    """A head: a process that may run, and a disk."""

    def __init__(self, world: World, endpoint: str, heads: tuple[str, ...], disk: Disk, join: bool = False) -> None:
        self.world = world
        self.endpoint = endpoint
        self.heads = heads
        self.disk = disk
        self.join = join
        self.replica: CheckedReplica | None = None
        self.error: BaseException | None = None
        self.life = 0
        self.frozen: list[Callable[[], None]] | None = None
        self.links: set[Link] = set()
        self.wake_ms = float("inf")
        self.skew_ms = 0.0

    # The transport.
    def send(self, link: Link, data: bytes) -> None:
        if link.open:
            self.world.transmit(link, data)

    def close(self, link: Link, reason: str) -> None:
        if link.open:
            link.open = False
            self.links.discard(link)
            self.world.transmit(link, None)

    def start(self) -> None:
        assert self.replica is None
        world = self.world
        self.life += 1
        self.error = None
        world.note("start", self.endpoint)
        try:
            self.replica = CheckedReplica(
                MemoryJournal(self.disk), endpoint=self.endpoint, heads=self.heads, transport=self,
                now_ms=lambda: world.now_ms + self.skew_ms, rng=random.Random(world.rng.getrandbits(64)),
                join=self.join, timing=world.timing, compact_bytes=world.compact_bytes,
            )  # fmt: skip
        except GcsError as error:
            self.error = error
            return
        self.replica.world = world
        self.dial()
        self.turn()

    def dial(self) -> None:
        if self.replica is None:
            return
        for endpoint in self.replica.wanted():
            other = self.world.hosts.get(endpoint)
            if other is not None and other.replica is not None and other.frozen is None:
                if not any(link.peer is other for link in self.links):
                    self.world.connect(self, other)
        self.world.later(self.world.rng.uniform(20, 30), self._mine(self.dial))

    def _mine(self, what: Callable[[], None]) -> Callable[[], None]:
        """For the process that runs now only."""
        life = self.life

        def run() -> None:
            if self.life != life or self.replica is None:
                return
            if self.frozen is not None:
                self.frozen.append(what)
            else:
                what()

        return run

    def turn(self) -> None:
        """After each batch of events."""
        replica = self.replica
        if replica is None:
            return
        try:
            replica.flush()
        except CrashError:
            self.crash()
            return
        except GcsError as error:
            self.world.note("stopped", self.endpoint, type(error).__name__)
            self.error = error
            self.world.stops.append(error)
            self.crash()
            return
        self.world.check(self)
        wake_ms = max(replica.next_wake_ms() - self.skew_ms, self.world.now_ms + 0.05)
        if wake_ms < float("inf"):
            self.wake_ms = wake_ms
            self.world.at(wake_ms, self._mine(partial(self._wake, wake_ms)))

    def _wake(self, wake_ms: float) -> None:
        if wake_ms == self.wake_ms:  # otherwise a later turn has set another alarm
            self.turn()

    def crash(self, silently: bool = False) -> None:
        """The process ends. Silently: with its machine, so that nobody is told."""
        if self.replica is None:
            return
        self.world.note("crash", self.endpoint)
        self.replica, self.frozen = None, None
        self.life += 1
        self.disk.crash_in_sync = None
        for link in sorted(self.links, key=lambda link: link.peer.endpoint):
            link.open = False
            if not silently:
                self.world.transmit(link, None)
        self.links.clear()

    def freeze(self) -> None:
        if self.replica is not None and self.frozen is None:
            self.frozen = []

    def thaw(self) -> None:
        if self.frozen is not None:
            waiting, self.frozen = self.frozen, None
            for event in waiting:
                event()

    def lose_disk(self) -> None:
        assert self.replica is None
        self.disk = Disk(self.world.new_id())

    # Events.
    def receive(self, link: Link, data: bytes | None) -> None:
        if not link.open or self.replica is None:
            return
        if data is None:
            link.open = False
            self.links.discard(link)
            self.replica.link_closed(link, "closed by the peer")
        else:
            self.replica.link_message(link, data)
        self.turn()

    @property
    def leads(self) -> bool:
        return self.replica is not None and self.replica.is_leader

    @property
    def engine(self) -> Any:
        return None if self.replica is None else self.replica._engine


class Client:
    """Writes unique keys one after the other, each until it has an answer; retries with the same number."""

    def __init__(self, world: World, name: bytes, pause_ms: float) -> None:
        self.world = world
        self.name = name
        self.pause_ms = pause_ms
        self.sequence = 0
        self.acknowledged: list[bytes] = []
        self.refused: list[Result] = []
        self.stopped = False
        self._attempt = 0

    def key(self) -> bytes:
        return self.name + b"-%d" % self.sequence

    def next(self) -> None:
        if not self.stopped:
            self.sequence += 1
            self.ask()

    def ask(self) -> None:
        if self.stopped:
            return
        self._attempt += 1
        attempt = self._attempt
        hosts = [host for host in self.world.hosts.values() if host.replica is not None and host.frozen is None]
        leaders = [host for host in hosts if host.leads]
        host = self.world.rng.choice(leaders or hosts) if hosts else None
        if host is not None and host.replica is not None:
            command = encode_command(KvPut("n", self.key(), b"v", False))
            host.replica.propose(Request(self.name, self.sequence, command), partial(self._answered, attempt))
            host.turn()
        self.world.later(self.world.rng.uniform(60, 90), partial(self._again, attempt))

    def _again(self, attempt: int) -> None:
        if attempt == self._attempt:
            self.ask()

    def _answered(self, attempt: int, result: Result) -> None:
        if result.code in (Code.NOT_LEADER, Code.UNAVAILABLE) or attempt != self._attempt:
            return
        self._attempt += 1
        if result.ok:
            self.world.note("ack", self.key())
            self.acknowledged.append(self.key())
        else:
            self.refused.append(result)
        self.world.later(self.world.rng.uniform(0, self.pause_ms), self.next)


class World:
    """See the module."""

    def __init__(self, seed: int, heads: int = 3, *, latency_ms: tuple[float, float] = (0.2, 2.0)) -> None:
        self.rng = random.Random(seed)
        self.now_ms = 1000.0
        self.latency_ms = latency_ms
        self.slow: dict[tuple[str, str], float] = {}
        """Extra latency of a direction."""
        self.stalled: set[tuple[str, str]] = set()
        self.timing = Timing()
        self.compact_bytes = 1 << 30
        self.trace: list[tuple[Any, ...]] = []
        self.hosts: dict[str, Host] = {}
        self.leaders: dict[int, str] = {}
        self.committed: dict[int, tuple[int, bytes]] = {}
        self.committed_in: dict[int, int] = {}
        """The term in which an entry was first applied."""
        self.steps = 0
        self.stops: list[BaseException] = []
        """What made replicas stop by themselves."""
        self.faults = True
        """Faults may happen still."""
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._number = 0
        names = tuple(f"head{number}:1" for number in range(heads))
        for name in names:
            self.hosts[name] = Host(self, name, names, Disk(self.new_id()))

    def new_id(self) -> bytes:
        return self.rng.randbytes(16)

    def start(self) -> None:
        for host in list(self.hosts.values()):
            host.start()

    def note(self, *what: Any) -> None:
        self.trace.append((round(self.now_ms, 6), *what))

    # --- time ---------------------------------------------------------------------------------------------------------

    def at(self, when_ms: float, what: Callable[[], object]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (when_ms, self._number, what))

    def later(self, delay_ms: float, what: Callable[[], object]) -> None:
        self.at(self.now_ms + delay_ms, what)

    def run(self, duration_ms: float) -> None:
        end_ms = self.now_ms + duration_ms
        while self._heap and self._heap[0][0] <= end_ms:
            when_ms, _, what = heapq.heappop(self._heap)
            self.now_ms = max(self.now_ms, when_ms)
            what()
        self.now_ms = end_ms

    def run_until(self, condition: Callable[[], bool], limit_ms: float = 10_000.0) -> None:
        end_ms = self.now_ms + limit_ms
        while not condition():
            assert self._heap and self._heap[0][0] <= end_ms, f"not reached within {limit_ms} ms: {self.show()}"
            when_ms, _, what = heapq.heappop(self._heap)
            self.now_ms = max(self.now_ms, when_ms)
            what()

    # --- network ------------------------------------------------------------------------------------------------------

    def connect(self, dialler: Host, other: Host) -> None:
        if self.is_stalled(dialler, other) or self.is_stalled(other, dialler):
            return
        a, b = Link(self, dialler, other), Link(self, other, dialler)
        a.other, b.other = b, a
        dialler.links.add(a)
        other.links.add(b)
        for link, dialled in ((a, True), (b, False)):
            assert link.owner.replica is not None
            link.owner.replica.link_opened(link, dialled)
        for link in (a, b):
            link.owner.turn()

    def is_stalled(self, a: Host, b: Host) -> bool:
        return (a.endpoint, b.endpoint) in self.stalled

    def transmit(self, link: Link, data: bytes | None) -> None:
        """From the owner of this end to the other end."""
        target = link.other
        if self.is_stalled(link.owner, link.peer):
            target.held.append(data)
            return
        slow = self.slow.get((link.owner.endpoint, link.peer.endpoint), 0.0)
        target.arrives_ms = max(target.arrives_ms, self.now_ms + slow + self.rng.uniform(*self.latency_ms))
        self.at(target.arrives_ms, partial(self._arrive, target, data))

    def _arrive(self, link: Link, data: bytes | None) -> None:
        host = link.owner
        if host.frozen is not None:
            host.frozen.append(lambda: host.receive(link, data))
        else:
            host.receive(link, data)

    def stall(self, a: str, b: str) -> None:
        """Nothing arrives from a to b until `heal`; then all of it."""
        self.stalled.add((a, b))

    def cut(self, name: str) -> None:
        """Stalls both directions between a head and all others."""
        for other in self.hosts:
            if other != name:
                self.stall(name, other)
                self.stall(other, name)

    def heal(self) -> None:
        self.stalled.clear()
        self.slow.clear()
        for host in self.hosts.values():
            for link in sorted(host.links, key=lambda link: link.peer.endpoint):
                held, link.held = link.held, []
                for data in held:
                    link.arrives_ms = max(link.arrives_ms, self.now_ms + self.rng.uniform(*self.latency_ms))
                    self.at(link.arrives_ms, partial(self._arrive, link, data))

    def break_links(self, a: str, b: str) -> None:
        """Both ends see their connection close."""
        for link in sorted(self.hosts[a].links, key=lambda link: link.peer.endpoint):
            if link.peer.endpoint == b:
                for end in (link, link.other):
                    self.later(0.0, partial(self._arrive, end, None))

    # --- what must hold -----------------------------------------------------------------------------------------------

    def applied(self, replica: RaftReplica, index: int, term: int, command: bytes) -> None:
        assert replica._engine is not None
        self.committed_in.setdefault(index, replica._engine.term)
        known = self.committed.setdefault(index, (term, command))
        assert known == (term, command), f"entry {index} is {term, command} at {replica.endpoint}, and was {known}"

    def check(self, host: Host) -> None:
        self.steps += 1
        engine = host.engine
        if engine is None:
            return
        if engine.leads:
            known = self.leaders.get(engine.term)
            if known is None:
                self.leaders[engine.term] = host.endpoint
                self.note("leads", engine.term, host.endpoint)
                self._check_complete(host)
            assert known in (None, host.endpoint), f"{known} and {host.endpoint} lead in term {engine.term}"

    def _check_complete(self, host: Host) -> None:
        assert host.replica is not None
        entries = {index: (term, command) for command, index, term in host.replica._log[0:]}
        first = host.replica._log[0][1]
        for index, entry in self.committed.items():
            # One who gets its votes late leads in an old term, and does no harm.
            if index > first and self.committed_in[index] < host.engine.term:
                assert entries.get(index) == entry, f"the new leader {host.endpoint} lacks committed entry {index}"

    def check_logs(self) -> None:
        """Log matching, among those that run."""
        logs = [host.replica._log[1:] for host in self.hosts.values() if host.replica is not None and host.engine]
        for number, log in enumerate(logs):
            for other in logs[:number]:
                theirs = {index: (term, command) for command, index, term in other}
                common = False
                for command, index, term in reversed(log):
                    entry = theirs.get(index)
                    if entry is not None and (common or entry[0] == term):
                        common = True
                        assert entry == (term, command), f"logs with a common later entry differ at {index}"

    # --- conveniences -------------------------------------------------------------------------------------------------

    def leader(self) -> Host:
        """Waits for a leader that a majority follows."""
        found: list[Host] = []

        def there() -> bool:
            found[:] = sorted(
                (host for host in self.hosts.values() if host.leads and host.frozen is None),
                key=lambda host: -host.engine.term,
            )
            return bool(found)

        self.run_until(there)
        return found[0]

    def put(self, host: Host, key: bytes, client: bytes = b"", sequence: int = 0) -> list[Result]:
        """Proposes a write; the list gets the result."""
        results: list[Result] = []
        assert host.replica is not None
        host.replica.propose(Request(client, sequence, encode_command(KvPut("n", key, b"v"))), results.append)
        host.turn()
        return results

    def write(self, key: bytes) -> Host:
        """Writes through the leader, until it is acknowledged."""
        while True:
            host = self.leader()
            results = self.put(host, key)
            self.run_until(partial(bool, results))
            if results[0].code is not Code.NOT_LEADER:
                assert results[0].ok, results
                return host

    def has(self, host: Host, key: bytes) -> bool:
        return host.replica is not None and host.replica.state.kv_get("n", key) is not None

    def converge(self) -> None:
        """Ends all faults, and waits until all have applied the same."""
        self.faults = False
        self.heal()
        for host in self.hosts.values():
            host.disk.full = False
            host.disk.crash_in_sync = None
            host.thaw()
            if host.replica is not None and host.replica._resigning:
                host.crash()
            if host.replica is None:
                host.start()

        def same() -> bool:
            engines = [host.engine for host in self.hosts.values()]
            return (
                all(engine is not None for engine in engines)
                and sum(engine.leads and engine.own_term_applied for engine in engines) == 1
                and len({(engine.term, engine.last_applied, engine.last_index) for engine in engines}) == 1
            )

        self.run_until(same, 20_000.0)
        self.check_logs()
        states = {host.replica.state.snapshot() for host in self.hosts.values() if host.replica is not None}
        assert len(states) == 1

    def show(self) -> str:
        parts = []
        for host in self.hosts.values():
            engine = host.engine
            if host.replica is None or engine is None:
                parts.append(f"{host.endpoint}: {'down' if host.replica is None else 'forming'} {host.error or ''}")
            else:
                parts.append(
                    f"{host.endpoint}: term {engine.term} leads {engine.leads} last {engine.last_index} "
                    f"commit {engine.commit_index} applied {engine.last_applied} links {len(host.links)}"
                    f"{' frozen' if host.frozen is not None else ''}"
                )
        return "; ".join(parts)
