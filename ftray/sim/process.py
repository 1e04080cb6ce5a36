"""Simulated machines, each with one process of ftray's: crash, freeze, slow disks, clocks.

Role: shell. `SimReactor` offers what shells use of `ftray.wire.reactor.Reactor`, so that they run on it unchanged.

Rules
- All that is waiting is one batch: its events are handled, then timers without delay, then the process's `after_batch`,
  and only then what was sent leaves. A process that dies in the middle has sent nothing of it.
- A disk blocks its process: while it syncs, what arrives waits for the next batch.
- A frozen process does nothing; what arrives and which timers were due waits until it is thawed.
- An exception that a handler lets out costs its link, as in the real reactor, and is a finding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ftray.config import Config
from ftray.sim.disk import CrashError
from ftray.sim.engine import Simulation
from ftray.sim.network import Network, SimLink


class SimTimer:
    """As `ftray.wire.reactor.Timer`."""

    __slots__ = ("cancelled", "fn")

    def __init__(self, fn: Callable[[], None]) -> None:
        self.fn: Callable[[], None] | None = fn
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self.fn = None


class SimReactor:
    """The links and timers of one life of a process."""

    def __init__(self, process: Process, config: Config) -> None:
        self.process = process
        self.config = config
        self.name = process.name
        self.lock = threading.RLock()
        self.links: dict[int, SimLink] = {}
        self.handler_errors: list[str] = []
        self.accept: Callable[[Any], Any] | None = None
        self.outbox: list[tuple[SimLink, bytes | None, bytes]] = []
        self.soon: list[SimTimer] = []
        self.closed = False

    def now_ms(self) -> float:
        return self.process.clock_ms()

    def call_later(self, delay_ms: float, fn: Callable[[], None]) -> SimTimer:
        timer = SimTimer(fn)
        if delay_ms <= 0 and self.process.in_batch:
            self.soon.append(timer)
        else:
            self.process.timer(delay_ms, timer)
        return timer

    def listen(self, endpoint: str, accept_handler: Callable[[Any], Any], backlog: int = 1024) -> str:
        self.accept = accept_handler
        return endpoint

    def connect(
        self, endpoint: str, role: int, handler: Any, on_open: Callable[[Any], None] | None = None
    ) -> SimLink:
        network = self.process.network
        link = network.new_link(self.process, endpoint, role)
        link.handler = handler
        link.on_open = on_open
        network.dial(self.process, endpoint, link)
        return link

    def drop(self, link: SimLink, reason: str) -> None:
        if not link.closed:
            link.drop(reason)
            self.process.network.transmit(link, None, b"", 0.0)

    def run_soon(self) -> None:
        while self.soon:
            timers, self.soon = self.soon, []
            for timer in timers:
                fn = timer.fn
                if fn is not None:
                    timer.cancel()
                    self.call(fn)

    def call(self, fn: Callable[[], None]) -> None:
        """A timer's function. What it lets out hurts nobody else, and is a finding."""
        try:
            fn()
        except Exception as error:
            self.handler_errors.append(repr(error))


class Process:
    """A machine. A subclass starts what runs on it (`boot`) and is asked after each batch (`after_batch`)."""

    def __init__(self, sim: Simulation, network: Network, name: str) -> None:
        self.sim = sim
        self.network = network
        self.name = name
        self.reactor: SimReactor | None = None
        """None: nothing runs."""
        self.life = 0
        self.in_batch = False
        self.frozen = False
        self.power_lost = False
        """The machine is off, so that nobody refuses connections."""
        self.half_open: list[SimLink] = []
        """Ends elsewhere of connections that a loss of power has ended."""
        self.spent_ms = 0.0
        """What the present batch has waited for the disk."""
        self.waiting: list[Callable[[], None]] = []
        self.errors: list[str] = []
        """Exceptions that nobody expected."""
        self._busy_until_ms = 0.0
        self._clock_base = (0.0, 0.0)
        self.clock_rate = 1.0
        network.machines[name] = self

    # --- for subclasses -----------------------------------------------------------------------------------------------

    def boot(self, reactor: SimReactor) -> None:
        """Starts the process. May raise what `on_failure` understands."""
        raise NotImplementedError

    def after_batch(self) -> None:
        """Events have been handled; what was sent leaves next."""

    def on_failure(self, error: BaseException) -> None:
        """Something has raised; by default a finding."""
        self.errors.append(f"{self.name}: {type(error).__name__}: {error}")

    # --- life ---------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self.reactor is not None

    def start(self, config: Config) -> None:
        assert self.reactor is None
        self.life += 1
        self.power_lost = False
        self.frozen = False
        self.waiting = []
        self._busy_until_ms = 0.0
        self.reactor = SimReactor(self, config)
        self.network.back(self)
        self.sim.note(f"{self.name} starts")
        reactor = self.reactor
        self._batch([lambda: self.boot(reactor)])

    def crash(self, power: bool = False, why: str = "killed") -> None:
        """The process ends, or with `power` the machine."""
        reactor = self.reactor
        if power:
            self.power_lost = True
        if reactor is None:
            return
        self.sim.note(f"{self.name} ends: {'power lost' if power else why}")
        self.reactor = None
        reactor.closed = True
        self.errors += [f"{self.name}: {error}" for error in reactor.handler_errors]
        self.life += 1
        self.frozen = False
        self.waiting = []
        links = list(reactor.links.values())
        for link in links:
            link.closed = True
        reactor.links.clear()
        reactor.outbox.clear()
        self.network.gone(links, silently=power)

    def freeze(self) -> None:
        if self.reactor is not None and not self.frozen:
            self.sim.note(f"{self.name} freezes")
            self.frozen = True

    def thaw(self) -> None:
        if self.frozen:
            self.sim.note(f"{self.name} thaws")
            self.frozen = False
            self._drain()

    # --- time ---------------------------------------------------------------------------------------------------------

    def clock_ms(self) -> float:
        """What the process takes for the time."""
        sim_ms, local_ms = self._clock_base
        return local_ms + (self.sim.now_ms + self.spent_ms - sim_ms) * self.clock_rate

    def set_clock(self, jump_ms: float = 0.0, rate: float | None = None) -> None:
        self._clock_base = (self.sim.now_ms, self.clock_ms() + jump_ms)
        if rate is not None:
            self.clock_rate = rate

    def spend(self, ms: float) -> None:
        self.spent_ms += ms

    def timer(self, delay_ms: float, timer: SimTimer) -> None:
        """Runs it in a batch of this life."""
        life = self.life

        def due() -> None:
            if self.life == life and timer.fn is not None:
                self.handle(lambda: self._fire(timer))

        self.sim.later(max(0.0, delay_ms) / self.clock_rate, due)

    def _fire(self, timer: SimTimer) -> None:
        fn = timer.fn
        if fn is not None:
            timer.cancel()
            if self.reactor is not None:
                self.reactor.call(fn)

    # --- batches ------------------------------------------------------------------------------------------------------

    def handle(self, fn: Callable[[], None]) -> None:
        """Something happens to this process: now, or when it has time."""
        if self.frozen or self.in_batch or self.sim.now_ms < self._busy_until_ms:
            self.waiting.append(fn)
        elif self.reactor is not None:
            self._batch([fn])

    def _drain(self) -> None:
        if self.waiting and not self.frozen and self.reactor is not None:
            if self.sim.now_ms < self._busy_until_ms:
                return
            waiting, self.waiting = self.waiting, []
            self._batch(waiting)

    def _batch(self, events: list[Callable[[], None]]) -> None:
        reactor = self.reactor
        if reactor is None:
            return
        self.in_batch = True
        self.spent_ms = 0.0
        try:
            for event in events:
                event()
            reactor.run_soon()
            self.after_batch()
            reactor.run_soon()
        except CrashError as error:
            self.in_batch = False
            self.spent_ms = 0.0
            self.crash(power=error.power)
            return
        except Exception as error:
            self.in_batch = False
            self.spent_ms = 0.0
            self.on_failure(error)
            self.crash(why=f"{type(error).__name__}: {error}")
            return
        finally:
            self.in_batch = False
        spent_ms, self.spent_ms = self.spent_ms, 0.0
        outbox, reactor.outbox = reactor.outbox, []
        if self.reactor is not reactor:
            return
        for link, header, payload in outbox:
            self.network.transmit(link, header, payload, spent_ms)
        if spent_ms:
            self._busy_until_ms = self.sim.now_ms + spent_ms
        if spent_ms or self.waiting:
            life = self.life
            self.sim.later(spent_ms, lambda: self._drain() if self.life == life else None)
