"""What a worker has run lately: the raw material of `ftray timeline`.

Role: a ring of tuples in each worker, appended to with every reply (0.1 us), rendered only when somebody asks. What a
worker that leaves in good order has kept goes to its raylet; of one that is killed the ring is lost.

Rejected: sending events as they happen (a message for each task, for something that is hardly ever looked at).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any

import msgspec

from ftray.wire.messages import PushTask

TASK, WAIT = "task", "wait"


class TaskEvents:
    """The last `kept_max` things that ran here; 0 keeps none.

    A reply appends `(message, work_us, failed, ended, thread)` through `append`, with `ended` by `time.perf_counter`:
    names and wall-clock times are worked out when somebody asks.
    """

    __slots__ = ("_name_of", "_ring", "append", "kept_max")

    def __init__(self, kept_max: int, name_of: Callable[[bytes], str]) -> None:
        self.kept_max = kept_max
        self._ring: deque[tuple[Any, ...]] = deque(maxlen=kept_max)
        self.append = self._ring.append
        self._name_of = name_of

    def waited(self, task_id: bytes, started_s: float) -> None:
        """The process has waited in `get` or `wait` since then, by `time.perf_counter`."""
        now = time.perf_counter()
        self.append((task_id, int((now - started_s) * 1e6), False, now, get_ident()))

    def rows(self, limit: int) -> list[dict[str, Any]]:
        """The newest `limit`, oldest first, with times in microseconds since the epoch."""
        newest = list(self._ring)[-limit:] if limit else []
        began_s = time.time() - time.perf_counter()
        rows = []
        for what, work_us, failed, ended_s, thread in newest:
            if isinstance(what, bytes):
                kind, name, task_id, attempt = WAIT, WAIT, what, 0
            else:
                kind, task_id, attempt = TASK, what.task_id, what.attempt
                name = self._name_of(what.function_id) if type(what) is PushTask else what.method
            rows.append(
                {
                    "kind": kind,
                    "name": name,
                    "task_id": task_id.hex(),
                    "attempt": attempt,
                    "start_us": int((began_s + ended_s) * 1e6) - work_us,
                    "duration_us": work_us,
                    "failed": failed,
                    "thread": thread,
                }
            )
        return rows


def bare(message: Any) -> Any:
    """A push without its dependencies, of which there may be ten thousand."""
    return msgspec.structs.replace(message, deps=())
