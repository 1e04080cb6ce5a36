"""The simulated network: connections that keep their order, and everything that happens to connections.

Role: shell without sockets. A `SimLink` is one end of a connection, and offers what `ftray.wire.reactor.Link` does.

What is simulated
- Each message takes a time of its own; on one connection none overtakes another, between connections they do.
- A *cut* stops one direction between two machines, or both. What is sent meanwhile waits, as TCP would repeat it, and
  arrives when the cut ends; or the connection breaks then, and it never does.
- A *slow* direction adds a time to each message.
- A connection breaks: both ends are told. A machine that loses its power tells nobody; the other ends are told when it
  is there again, or when `DEAD_PEER_MS` have passed (keep-alives).
- A frozen process takes part as far as its kernel does: what comes waits, and nothing is answered.
- What a peer doesn't read waits at the sender (`len(link.out)`), beyond what socket buffers hold.

Rejected: lost and doubled messages within a connection (TCP does not do that); simulated packets (nobody looks).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ftray.exceptions import ProtocolError
from ftray.sim.engine import Simulation
from ftray.wire.messages import decode, encode

if TYPE_CHECKING:
    from ftray.sim.process import Process, SimReactor

Direction = tuple[str, str]
"""Names of machines."""

DEAD_PEER_MS = 3_000.0
SOCKET_BYTES = 256 << 10
CONNECT_TIMEOUT_MS = 1_500.0


class _Out:
    """How many bytes wait at the sender."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0

    def __len__(self) -> int:
        return max(0, self.bytes - SOCKET_BYTES)


class SimLink:
    """One end of a connection. `peer` and `tag` are the handler's to use."""

    __slots__ = (
        "arrives_ms", "closed", "error", "handler", "held", "incoming", "number", "on_drained", "on_open", "other",
        "out", "peer", "process", "reactor", "remote", "role", "tag",
    )  # fmt: skip

    def __init__(self, process: Process, remote: str, role: int, number: int) -> None:
        assert process.reactor is not None
        self.process = process
        self.reactor: SimReactor = process.reactor
        self.remote = remote
        """The machine at the other end."""
        self.role = role
        self.number = number
        self.handler: Any = None
        self.on_open: Callable[[Any], None] | None = None
        self.on_drained: Callable[[Any], None] | None = None
        self.peer: Any = None
        self.tag: Any = None
        self.incoming = False
        self.error: Exception | None = None
        self.closed = False
        self.out = _Out()
        self.other: SimLink | None = None
        self.arrives_ms = 0.0
        """When the last message to this end arrives."""
        self.held: list[Callable[[], None]] = []
        """What is under way to this end while the direction is cut."""

    def __hash__(self) -> int:
        return self.number

    def send(self, message: Any, payload: bytes | bytearray | memoryview = b"") -> None:
        """Queues a message for the end of the batch. `message` None is for bytes that are no message of ftray's."""
        if not self.closed:
            header = b"" if message is None else encode(message)
            data = bytes(payload)
            self.out.bytes += len(header) + len(data)
            self.reactor.outbox.append((self, header, data))

    def close(self, reason: str) -> None:
        """After what was sent. The handler is not told."""
        if not self.closed:
            self.handler = None
            self.closed = True
            self.reactor.links.pop(self.number, None)
            self.reactor.outbox.append((self, None, b""))

    def drop(self, reason: str) -> None:
        """It is gone; the handler is told."""
        if self.closed:
            return
        self.closed = True
        self.reactor.links.pop(self.number, None)
        handler, self.handler = self.handler, None
        if handler is not None:
            handler.on_closed(self, reason)


class Network:
    """See the module."""

    def __init__(self, sim: Simulation, latency_ms: tuple[float, float]) -> None:
        self.sim = sim
        self.rng: random.Random = sim.stream("network")
        self.latency_ms = latency_ms
        self.machines: dict[str, Process] = {}
        self.cuts: dict[Direction, int] = {}
        """How many cuts lie on a direction."""
        self.slow: dict[Direction, list[float]] = {}
        self.messages = 0
        self.bytes = 0
        self._links = 0

    # --- connections --------------------------------------------------------------------------------------------------

    def dial(self, process: Process, endpoint: str, link: SimLink) -> None:
        """Makes a connection: asks, is answered, and the handler of the other end is chosen in between."""
        target = self.machines.get(endpoint)
        self.sim.later(CONNECT_TIMEOUT_MS, lambda: self._late(process, link))
        if target is None:
            self._deliver_to(link, lambda: link.drop("cannot connect: no such host"), self._latency(endpoint, process))
            return
        self._cross(process.name, endpoint, None, lambda: self._asked(process, target, link), process)

    def _late(self, process: Process, link: SimLink) -> None:
        def late() -> None:
            if not link.closed and link.on_open is not None:
                link.drop("no complete handshake in time")
                self.transmit(link, None, b"", 0.0)

        if not link.closed and process.reactor is link.reactor:
            process.handle(late)

    def _asked(self, process: Process, target: Process, link: SimLink) -> None:
        if target.power_lost:
            return
        if link.closed:
            return
        if target.reactor is None or target.reactor.accept is None:
            refused = "cannot connect: Connection refused"
            self._cross(target.name, process.name, None, lambda: self._run(link, lambda: link.drop(refused)), process)
            return
        reactor = target.reactor
        target.handle(lambda: self._accept(process, target, reactor, link))

    def _accept(self, process: Process, target: Process, reactor: SimReactor, link: SimLink) -> None:
        if link.closed or reactor.accept is None:
            return
        other = self.new_link(target, process.name, link.role)
        other.incoming = True
        other.other, link.other = link, other
        handler = reactor.accept(other)
        if handler is None:
            other.close("nothing here serves that role")
            return
        other.handler = handler
        self._cross(target.name, process.name, link, lambda: self._run(link, lambda: self._opened(link)), process)

    def _opened(self, link: SimLink) -> None:
        on_open, link.on_open = link.on_open, None
        if on_open is not None and not link.closed:
            on_open(link)

    def new_link(self, process: Process, remote: str, role: int) -> SimLink:
        self._links += 1
        link = SimLink(process, remote, role, self._links)
        link.reactor.links[link.number] = link
        return link

    # --- messages -----------------------------------------------------------------------------------------------------

    def transmit(self, link: SimLink, header: bytes | None, payload: bytes, delay_ms: float) -> None:
        """Sends from this end; without a header it is the end of the connection."""
        other = link.other
        if other is None:
            return
        size = len(payload) + (0 if header is None else len(header))
        self.messages += 1
        self.bytes += size
        source, target = link.process.name, link.remote
        self.sim.count(b"%d>%d %d" % (link.number, other.number, -1 if header is None else size))
        if header is None:
            arrive = lambda: self._run(other, lambda: other.drop("the peer closed the connection"))  # noqa: E731
        else:
            arrive = lambda: self._run(other, lambda: self._receive(link, other, header, payload, size))  # noqa: E731
        self._cross(source, target, other, arrive, other.process, delay_ms)

    def _receive(self, link: SimLink, other: SimLink, header: bytes, payload: bytes, size: int) -> None:
        link.out.bytes -= size
        handler = other.handler
        if handler is None or other.closed:
            return
        try:
            handler.on_message(other, decode(header) if header else None, payload)
        except Exception as error:
            if not isinstance(error, ProtocolError):
                other.reactor.handler_errors.append(repr(error))
            other.drop(f"internal error: {error!r}")
            self.transmit(other, None, b"", 0.0)

    def _run(self, link: SimLink, fn: Callable[[], None]) -> None:
        """An event of a link at its process, if that still is the one that has it."""
        process = link.process
        if process.reactor is link.reactor and not link.closed:
            process.handle(fn)

    def _cross(
        self,
        source: str,
        target: str,
        end: SimLink | None,
        arrive: Callable[[], None],
        process: Process,
        delay_ms: float = 0.0,
    ) -> None:
        """Brings something from a machine to another; in order with what went to the same end before."""
        if (source, target) in self.cuts:
            if end is not None:
                end.held.append(arrive)
            return  # who asks for a connection asks again
        when_ms = self.sim.now_ms + delay_ms + self._latency(source, process, target)
        if end is not None:
            when_ms = end.arrives_ms = max(when_ms, end.arrives_ms)
            self.sim.at(when_ms, lambda: self._unless_cut(source, target, end, arrive))
        else:
            self.sim.at(when_ms, arrive)

    def _unless_cut(self, source: str, target: str, end: SimLink, arrive: Callable[[], None]) -> None:
        if (source, target) in self.cuts or end.held:
            end.held.append(arrive)
        else:
            arrive()

    def _latency(self, source: str, process: Process, target: str = "") -> float:
        low, high = self.latency_ms
        latency_ms = self.rng.uniform(low, high)
        if self.rng.random() < 0.01:
            latency_ms += self.rng.expovariate(1 / (5 * high))
        if self.slow:
            latency_ms += sum(self.slow.get((source, target or process.name), ()))
        return latency_ms

    def _deliver_to(self, link: SimLink, fn: Callable[[], None], delay_ms: float) -> None:
        self.sim.later(delay_ms, lambda: self._run(link, fn))

    # --- faults -------------------------------------------------------------------------------------------------------

    def cut(self, directions: list[Direction]) -> None:
        for direction in directions:
            self.cuts[direction] = self.cuts.get(direction, 0) + 1

    def heal(self, directions: list[Direction], broken: bool) -> None:
        """Ends a cut. What waited arrives now; or, `broken`, the connections that had something waiting break."""
        for direction in directions:
            left = self.cuts.get(direction, 0) - 1
            if left > 0:
                self.cuts[direction] = left
                continue
            self.cuts.pop(direction, None)
            source, target = direction
            for link in self._ends(target, source):
                held, link.held = link.held, []
                if held and broken:
                    self._break(link)
                    continue
                for arrive in held:
                    when_ms = self.sim.now_ms + self._latency(source, link.process, target)
                    when_ms = link.arrives_ms = max(when_ms, link.arrives_ms)
                    self.sim.at(when_ms, partial(self._unless_cut, source, target, link, arrive))

    def break_between(self, a: str, b: str) -> None:
        """All connections between two machines break."""
        for link in self._ends(a, b):
            self._break(link)

    def _break(self, link: SimLink) -> None:
        for end in (link, link.other):
            if end is not None:
                end.held.clear()
                self._deliver_to(end, lambda end=end: end.drop("connection reset"), 0.0)  # type: ignore[misc]

    def _ends(self, machine: str, remote: str) -> list[SimLink]:
        """Ends at a machine of connections to another."""
        process = self.machines.get(machine)
        if process is None or process.reactor is None:
            return []
        return [link for link in process.reactor.links.values() if link.remote == remote]

    def gone(self, links: list[SimLink], silently: bool) -> None:
        """The process that had these ends is gone."""
        for link in links:
            other = link.other
            if other is None or other.closed:
                continue
            if silently:
                other.held.clear()
                self.sim.later(DEAD_PEER_MS, lambda other=other: self._reset(other))  # type: ignore[misc]
                link.process.half_open.append(other)
            else:
                self.transmit(link, None, b"", 0.0)

    def _reset(self, link: SimLink) -> None:
        self._run(link, lambda: link.drop("the peer does not answer any more"))

    def back(self, process: Process) -> None:
        """The machine is there again: who still holds a connection to its former life is told that there is none."""
        half_open, process.half_open = process.half_open, []
        for link in half_open:
            self._deliver_to(link, lambda link=link: link.drop("connection reset"), self._latency(  # type: ignore[misc]
                process.name, link.process
            ))  # fmt: skip
