"""What drives a reactor when no user thread does, with trio for everything else.

Role: shell. `drive` is a task of a trio run: it sleeps until the reactor's gate is readable or a timer is due. That is
the background thread of drivers and workers. `host` is for the main thread of a node process, which has nothing else
to do and is never quite idle: the thread sleeps in the reactor itself, and the trio run is its guest. Trio waits in a
thread of its own, and has turns here when it has something to do: a signal, the end.

Rules: whoever sets a timer that is earlier than all others wakes the loop, unless that is the loop itself, which asks
how long to sleep before it sleeps.

Rejected: `trio.from_thread` for anything hot (a thread handover for each call); `drive` in node processes (a wake-up
costs 210 us through trio and 65 without, and heads that have nothing to do are woken sixty times a second).
"""

from __future__ import annotations

import math
import os
import select
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ftray.wire.reactor import Reactor

SLEEP_MAX_S = 3600.0
LAST_TURNS_MS = 1_000.0
"""When the reactor has failed, so long each of trio's last turns is waited for."""


async def drive(reactor: Reactor) -> None:
    """Runs until cancelled."""
    token = trio.lowlevel.current_trio_token()
    scope = trio.CancelScope()
    polling = False

    def reschedule() -> None:
        scope.deadline = trio.current_time() + reactor.next_timer_s()

    def on_earlier_timer() -> None:
        if polling:
            return
        try:
            token.run_sync_soon(reschedule, idempotent=True)
        except trio.RunFinishedError:
            pass

    reactor.on_earlier_timer = on_earlier_timer
    reader = reactor.reader
    gate = reactor.fileno()
    while True:
        delay = reactor.next_timer_s()
        deadline = math.inf if delay == math.inf else trio.current_time() + delay
        scope = trio.CancelScope(deadline=deadline)
        with scope:
            await trio.lowlevel.wait_readable(gate)
        if reader.acquire(blocking=False):
            polling = True
            try:
                reactor.poll(0)
            finally:
                polling = False
                reader.release()
        elif reactor.next_timer_s() == 0.0:
            with reactor.lock:
                reactor.run_timers()


def host(reactor: Reactor, main: Callable[..., Awaitable[Any]], *args: Any) -> None:
    """Drives the reactor in this thread until `main`, run by trio in the same thread, has ended. Raises what it raises,
    and, when `main` has been cancelled, what the reactor does. Only where no other thread polls the reactor."""
    turns: deque[Callable[[], object]] = deque()
    """What trio wants to have done in this thread."""
    ended: list[Any] = []
    thread = threading.get_ident()
    scope = trio.CancelScope()
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def soon(turn: Callable[[], object]) -> None:
        turns.append(turn)
        os.eventfd_write(bell, 1)

    def rung() -> None:
        os.eventfd_read(bell)

    def on_earlier_timer() -> None:
        if threading.get_ident() != thread:
            os.eventfd_write(bell, 1)

    async def guest() -> Any:
        with scope:
            return await main(*args)

    def take_turns() -> None:
        while turns:
            turns.popleft()()

    with reactor.lock:
        reactor.watch(bell, rung)
        reactor.on_earlier_timer = on_earlier_timer
    try:
        trio.lowlevel.start_guest_run(guest, run_sync_soon_threadsafe=soon, done_callback=ended.append)
        with reactor.reader:
            while not ended:
                reactor.poll(min(reactor.next_timer_s(), SLEEP_MAX_S))
                take_turns()
    except BaseException:
        scope.cancel()
        rings = select.poll()
        rings.register(bell, select.POLLIN)
        while not ended and (turns or rings.poll(LAST_TURNS_MS)):
            take_turns()
            if rings.poll(0):
                rung()
            take_turns()
        raise
    finally:
        with reactor.lock:
            reactor.on_earlier_timer = None
            reactor.unwatch(bell)
        if ended:  # or trio's thread may ring once more, and the number be that of another file by then
            os.close(bell)
    ended[0].unwrap()
