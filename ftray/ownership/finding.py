"""Finding one task in a long queue by its id.

Role: pure. A queue of tasks has no index, since most tasks are never asked for and an index would cost each of them.
The first question reads the queue once; later ones read only what has been queued since.

Rules: between two calls of `clear` the queue grows at its right end and shrinks at its left end, or by taking out tasks
that are not asked for again. Whoever puts tasks back at the left end calls `clear`; where that is not done, a task may
be missed, and one that has left be found.

Rejected: a scan for each question (cancelling a queue of ten thousand would take a minute); an index of all tasks that
is kept up to date (50 ns and 100 bytes for each task submitted).
"""

from __future__ import annotations

from collections import deque

from ftray.ownership.tasks import TaskRecord


class QueueIndex:
    """See the module. Belongs to one queue."""

    __slots__ = ("_count", "_known")

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[int, TaskRecord]] = {}
        self._count = 0

    def find(self, queue: deque[TaskRecord], task_id: bytes) -> TaskRecord | None:
        """The task with this id, if it is in the queue."""
        if not queue:
            return None
        known = self._known
        if queue[0].task_id not in known:
            known.clear()
        fresh: list[TaskRecord] = []
        for task in reversed(queue):
            if task.task_id in known:
                break
            fresh.append(task)
        for task in reversed(fresh):
            self._count += 1
            known[task.task_id] = (self._count, task)
        found = known.get(task_id)
        # What has left at the front is older than what is at the front now.
        if found is None or found[0] < known[queue[0].task_id][0]:
            return None
        return found[1]

    def clear(self) -> None:
        """Forgets everything: the queue has changed in another way, or nobody asks any more."""
        self._known.clear()
