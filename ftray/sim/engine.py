"""Virtual time: a heap of events, randomness from one seed, and a log of what happened.

Role: the bottom of the simulator; it knows nothing of networks or processes.

Rules
- Events run one after the other, in the order of their times; at equal times in the order in which they were asked for.
- All randomness comes from named streams of one seed, so that what one part draws does not change what another gets.
- Everything that is noted goes into the trace, a running hash. The same seed and options give the same trace, in each
  process, or something is not deterministic.

Rejected: a real event loop with a fake clock (its order of callbacks is its own business, and it costs five times as
much).
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable

LOG_LINES_MAX = 4000
"""The event log keeps so many lines; the trace is of all of them."""


class Event:
    """What is to happen; `cancel` may be repeated."""

    __slots__ = ("fn",)

    def __init__(self, fn: Callable[[], object]) -> None:
        self.fn: Callable[[], object] | None = fn

    def cancel(self) -> None:
        self.fn = None


class Simulation:
    """See the module. Times are milliseconds."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_ms = 1000.0
        self.steps = 0
        self.log: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self._heap: list[tuple[float, int, Event]] = []
        self._number = 0
        self._trace = hashlib.blake2b(digest_size=16)

    def stream(self, name: str) -> random.Random:
        """A generator of its own. The same name gives the same numbers again."""
        return random.Random(f"{self.seed}/{name}")

    # --- time ---------------------------------------------------------------------------------------------------------

    def at(self, when_ms: float, fn: Callable[[], object]) -> Event:
        event = Event(fn)
        self._number += 1
        heapq.heappush(self._heap, (when_ms, self._number, event))
        return event

    def later(self, delay_ms: float, fn: Callable[[], object]) -> Event:
        return self.at(self.now_ms + delay_ms, fn)

    def run(self, until_ms: float, done: Callable[[], bool] | None = None) -> bool:
        """Lets time pass until then, or until `done`, which is asked after each event. Returns whether it came true."""
        heap = self._heap
        while heap and heap[0][0] <= until_ms:
            when_ms, _, event = heapq.heappop(heap)
            fn = event.fn
            if fn is None:
                continue
            if when_ms > self.now_ms:
                self.now_ms = when_ms
            self.steps += 1
            fn()
            if done is not None and done():
                return True
        self.now_ms = max(self.now_ms, until_ms)
        return False

    # --- what happened ------------------------------------------------------------------------------------------------

    def note(self, what: str) -> None:
        """A line of the event log."""
        line = f"{self.now_ms:12.3f}  {what}"
        self.log.append(line)
        self._trace.update(line.encode())

    def count(self, what: bytes) -> None:
        """Something too frequent for the log, but part of the trace."""
        self._trace.update(b"%.6f" % self.now_ms + what)

    @property
    def trace(self) -> str:
        return self._trace.hexdigest()
