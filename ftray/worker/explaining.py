"""What a pending object waits for, in words: for `GetTimeoutError`, for the warning of a long `get`, for tools.

Role: shell, under the core's lock. Looks through the submitter's and the actors' tables; takes time in proportion to
the queues, so it is for people, not for the runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftray.worker.core import Core


def describe(core: Core, object_id: bytes) -> str:
    """Why the object is not there yet, as far as this process knows."""
    task_id = object_id[:16]
    submitter = core.submitter
    task = submitter.unfinished.get(task_id)
    if task is not None:
        return f"{task.function.name}, which waits for {task.deps_left} arguments"
    for lease in submitter.dispatcher.leases.values():
        task = lease.inflight.get(task_id)
        if task is not None:
            first = next(iter(lease.inflight)) == task_id
            return f"{task.function.name}, {'running on' if first else 'queued at'} worker pid {lease.pid}"
    for cls in submitter.dispatcher.by_id.values():
        for task in cls.queue:
            if task.task_id == task_id:
                why = submitter.infeasible_classes.get(cls.class_id)
                needs = ", ".join(f"{v:g} {k}" for k, v in cls.resources.items()) or "nothing"
                return f"{task.function.name}, queued for a lease of {needs}" + (f" ({why})" if why else "")
    task = submitter.oom.resting.get(task_id)
    if task is not None:
        return f"{task.function.name}, which rests after its worker was ended for want of memory"
    told = core.actors.describe(task_id)
    if told:
        return told
    entry = core.entries.get(object_id)
    if entry is not None and entry.owner is not None:
        return f"an object of process {entry.owner.hex()[:12]}"
    return "unknown"
