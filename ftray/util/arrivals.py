"""Objects in the order in which they become ready, for one consumer or several.

Role: shell, shared by `completion`, `actor_pool` and `multiprocessing`. An `Arrivals` hangs on the entries of pending
objects as a waiter does, and gathers their ids as they become ready: what it costs does not depend on how many are
pending. A consumer that finds nothing waits by reading, like any thread that waits in `get`.

Rules: `ready` runs under the core's lock, and only hands over. `close` may run in a finaliser, which may not wait for
that lock since its own thread may hold it: when the lock is not free at once, what is left hanging is let go by the
next entry.

Rejected: `wait` over all that is pending, again for each result (quadratic); a thread that waits for each object.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ftray.worker.waiting import PENDING, Waiter

if TYPE_CHECKING:
    from ftray.worker.core import Core

_closed: deque[Arrivals] = deque()
"""Closed ones that hang on entries still."""


class Arrivals:
    """See the module. `arrived` holds the ids that became ready and were not taken yet."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.arrived: deque[bytes] = deque()
        self.pending: set[bytes] = set()
        self.waiters: list[Waiter] = []

    def ready(self, object_id: bytes, entry: Any) -> None:
        """An object is ready, under the lock."""
        if object_id in self.pending:
            self.pending.discard(object_id)
            self.arrived.append(object_id)
            if self.waiters:
                self.wake()

    def wake(self) -> None:
        """Lets all who wait look again, under the lock."""
        for waiter in self.waiters:
            if waiter.remaining > 0:
                waiter.ready(b"", None)  # type: ignore[arg-type]

    def add(self, object_ids: Iterable[bytes]) -> None:
        """Those that are ready arrive at once, in this order; the others when they become so. Each id is added once."""
        core = self.core
        with core.lock:
            core.drain()
            if _closed:
                _let_go(core)
            entries, hang = core.entries, core.objects.hang
            for object_id in object_ids:
                self.pending.add(object_id)
                entry = entries.get(object_id)
                if entry is None or entry.state != PENDING:
                    self.ready(object_id, entry)
                else:
                    hang(object_id, entry, self)
            core.settle()

    def wait(self, timeout_s: float | None, unless: Callable[[], bool] | None = None) -> bool:
        """Waits until something has arrived (True), or somebody woke the waiters, or time is up.

        Does not wait when `unless()`: it is asked under the lock, so that a `wake` after a change is not missed.
        """
        if self.arrived:
            return True
        core = self.core
        waiter = Waiter(1)
        with core.lock:
            core.drain()
            if self.arrived or (unless is not None and unless()):
                return bool(self.arrived)
            self.waiters.append(waiter)
            core.settle()
        try:
            core.objects.block(waiter, timeout_s)
        finally:
            with core.lock:
                self.waiters.remove(waiter)
        return bool(self.arrived)

    def close(self) -> None:
        """Lets go of everything. Any thread, also a finaliser, may call it."""
        if self.pending:
            _closed.append(self)
            core = self.core
            if not core.inside() and core.lock.acquire(blocking=False):
                try:
                    _let_go(core)
                finally:
                    core.lock.release()
        self.arrived.clear()


def _let_go(core: Core) -> None:
    """Unhooks what was closed, under the lock."""
    while _closed:
        try:
            arrivals = _closed.popleft()
        except IndexError:
            break
        pending, arrivals.pending = arrivals.pending, set()
        for object_id in pending:
            entry = arrivals.core.entries.get(object_id)
            waiters: Any = entry.waiters if entry is not None else None
            if waiters is not None and arrivals in waiters:
                waiters.remove(arrivals)
