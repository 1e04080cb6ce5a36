"""What a worker has run lately: the raw material of `ftray timeline`.

Role: a ring of tuples in each worker, appended to with every reply (0.2 us), rendered only when somebody asks. What a
worker that leaves in good order has kept goes to its raylet; of one that is killed the ring is lost.

Rejected: sending events as they happen (a message for each task, for something that is hardly ever looked at).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any

from ftray.wire.messages import PushTask

TASK, WAIT = "task", "wait"


class TaskEvents:
    """The last `kept_max` things that ran here; 0 keeps none."""

    __slots__ = ("_append", "_clock", "_name_of", "_ring", "kept_max")

    def __init__(self, kept_max: int, name_of: Callable[[bytes], str], clock: Callable[[], float] = time.time) -> None:
        self.kept_max = kept_max
        self._ring: deque[tuple[Any, ...]] = deque(maxlen=kept_max)
        self._append = self._ring.append
        self._clock = clock
        self._name_of = name_of

    def ran(self, message: Any, work_us: int, failed: bool) -> None:
        """A task or actor call has ended, just now."""
        what = message.function_id if type(message) is PushTask else message.method
        self._append((message.task_id, what, message.attempt, self._clock(), work_us, failed, get_ident()))

    def waited(self, task_id: bytes, started_s: float) -> None:
        """The process has waited in `get` or `wait` since then."""
        now = self._clock()
        self._append((task_id, WAIT, 0, now, int((now - started_s) * 1e6), False, get_ident()))

    def rows(self, limit: int) -> list[dict[str, Any]]:
        """The newest `limit`, oldest first, with times in microseconds since the epoch."""
        newest = list(self._ring)[-limit:] if limit else []
        rows = []
        for task_id, what, attempt, ended_s, work_us, failed, thread in newest:
            rows.append(
                {
                    "kind": WAIT if what is WAIT else TASK,
                    "name": "wait" if what is WAIT else what if isinstance(what, str) else self._name_of(what),
                    "task_id": task_id.hex(),
                    "attempt": attempt,
                    "start_us": int(ended_s * 1e6) - work_us,
                    "duration_us": work_us,
                    "failed": failed,
                    "thread": thread,
                }
            )
        return rows
