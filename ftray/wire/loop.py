"""The trio task that drives a reactor when no user thread does.

Role: shell. Sleeps until the reactor's gate is readable or a timer is due. Runs in the main thread of the node process
and in the background thread of drivers and workers.

Rejected: `trio.from_thread` for anything hot (a thread handover for each call); a wake-up for each timer (only one that
is earlier than all others wakes the loop).
"""

from __future__ import annotations

import math

import trio

from ftray.wire.reactor import Reactor


async def drive(reactor: Reactor) -> None:
    """Runs until cancelled."""
    token = trio.lowlevel.current_trio_token()
    scope = trio.CancelScope()

    def reschedule() -> None:
        scope.deadline = trio.current_time() + reactor.next_timer_s()

    def on_earlier_timer() -> None:
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
            try:
                reactor.poll(0)
            finally:
                reader.release()
        elif reactor.next_timer_s() == 0.0:
            with reactor.lock:
                reactor.run_timers()
