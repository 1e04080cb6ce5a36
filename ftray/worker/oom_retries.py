"""Tasks whose worker the memory monitor has ended: repeated later, on a counter of their own.

Role: shell, under the core's lock. The node says before it kills (`WorkerDoomed`). The task that ran rests for a while,
longer each time, since memory that was short a moment ago is short still; then it is queued again, alone on its worker.

Rejected: the counter in the task's record (eight bytes in each of a million records for what hardly ever happens).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ftray.exceptions import OutOfMemoryError
from ftray.ownership.dispatch import Lease
from ftray.ownership.tasks import TaskRecord
from ftray.wire.messages import DoomedSeen, WorkerDoomed

if TYPE_CHECKING:
    from ftray.worker.core import Core

log = logging.getLogger("ftray.worker")

PAUSE_MAX_MS = 30_000


class OomRetries:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.spent: dict[bytes, int] = {}
        """Task -> how often its worker has been ended for want of memory."""
        self.resting: dict[bytes, TaskRecord] = {}
        """Tasks that will be queued again."""

    def doomed(self, message: WorkerDoomed) -> None:
        """A worker that is leased here is about to be ended."""
        core = self.core
        for lease in core.submitter.dispatcher.leases.values():
            if lease.worker_id == message.worker_id:
                lease.doomed = message.reason
        core.raylet.send(DoomedSeen(message.worker_id))
        core.reactor.flush_dirty()

    def take(self, lease: Lease, task: TaskRecord) -> None:
        """The worker that ran this task was ended: sees to its repetition, or fails it."""
        core = self.core
        config = core.config
        spent = self.spent.get(task.task_id, 0)
        allowed = config.task_oom_retries
        if task.cancelled or task.retries_left == 0 or 0 <= allowed <= spent:
            self.spent.pop(task.task_id, None)
            times = f" {spent + 1} times" if spent else ""
            core.submitter.fail(task, OutOfMemoryError(f"{task.function.name} was ended{times}: {lease.doomed}"))
            return
        pause_ms = min(config.task_oom_pause_ms * 2**spent, PAUSE_MAX_MS)
        log.warning(
            "%s was ended for want of memory, and runs again in %.1f s (repetition %d of %s): %s",
            task.function.name, pause_ms / 1000.0, spent + 1, allowed if allowed >= 0 else "any number", lease.doomed,
        )  # fmt: skip
        self.spent[task.task_id] = spent + 1
        task.attempt += 1
        self.resting[task.task_id] = task
        core.reactor.call_later(pause_ms, lambda: self._again(task))

    def _again(self, task: TaskRecord) -> None:
        if self.resting.pop(task.task_id, None) is None or self.core.closed:
            return
        submitter = self.core.submitter
        submitter.dispatcher.requeue([task])
        submitter.after()
        self.core.settle()

    def ended(self, task_id: bytes) -> None:
        """A task that was repeated has ended."""
        self.spent.pop(task_id, None)
