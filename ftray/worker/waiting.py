"""How a thread, a task or a peer waits for objects, and how a user thread waits by reading.

Role: shell. A waiter hangs on reference entries and is told when each is ready; which kind it is decides what happens
then. `block` is the waiter-reads rule of ARCHITECTURE.md: the thread drives the reactor itself unless another one does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftray.ownership.references import Entry
    from ftray.wire.reactor import Reactor

PENDING = 0
INLINE = 1
IN_STORE = 2
FAILED = 3
"""States of an object's value: `Entry.state`. INLINE holds its bytes, IN_STORE `(node_id, size)`, FAILED a packed
error or an exception."""


class Waiter:
    """A thread that waits until `remaining` objects have become ready."""

    __slots__ = ("lock", "remaining")

    def __init__(self, remaining: int) -> None:
        self.remaining = remaining
        self.lock = threading.Lock()
        self.lock.acquire()

    def ready(self, object_id: bytes, entry: Entry) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            self.lock.release()


class Callback:
    """Calls `fn(object_id, entry)` under the core's lock, once."""

    __slots__ = ("ready",)

    def __init__(self, fn: Callable[[bytes, Any], None]) -> None:
        self.ready = fn


def wait_events(reactor: Reactor, timeout_s: float) -> list[tuple[int, int]]:
    """The one place where a waiting user thread can be interrupted (`interrupts.py` knows it by its code object)."""
    return reactor.poll_events(timeout_s, 64)


def wait_lock(lock: threading.Lock, timeout_s: float) -> bool:
    """As `wait_events`, for a thread that lets another one read."""
    return lock.acquire(timeout=timeout_s)


def block(reactor: Reactor, waiter: Waiter, timeout_s: float | None) -> bool:
    """Waits until the waiter has what it wants; False when `timeout_s` passes first.

    The caller has flushed its output and does not hold the lock.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    reader = reactor.reader
    while waiter.remaining > 0:
        if not reader.acquire(blocking=False):
            left = 0.05 if deadline is None else min(0.05, deadline - time.monotonic())
            # Bounded, so that this thread takes over reading when the one that reads now leaves.
            if left <= 0 or (wait_lock(waiter.lock, left) and waiter.remaining <= 0):
                break
            continue
        try:
            reactor.close_gate()
            while waiter.remaining > 0:
                left = -1.0 if deadline is None else deadline - time.monotonic()
                if deadline is not None and left <= 0:
                    break
                timer = reactor.next_timer_s()
                if timer < left or left < 0:
                    left = timer if timer != float("inf") else left
                events = wait_events(reactor, left)
                if reactor.closed:
                    break
                with reactor.lock:
                    reactor.handle(events)
        except (OSError, ValueError):  # its descriptors were closed under this thread
            if not reactor.closed:
                raise
        finally:
            reactor.open_gate()
            reader.release()
        break
    return waiter.remaining <= 0
