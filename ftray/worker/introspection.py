"""What a driver or worker says of itself when a tool asks: references, threads, what it waits for, what it ran.

Role: shell, under the core's lock, in whichever thread reads the link to the raylet: so a process answers while its
main thread runs user code. One that holds the interpreter lock in C code cannot answer; of such a worker the raylet has
the stack through the signal that `install_stack_signal` sets up, whose handler needs no interpreter.

Rules: an answer is bounded (`limit`), largest or oldest first, with totals over all; nothing of a value is shown.

Rejected: each process pushing its state once in a while (an idle cluster would not be idle).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from ftray.ids import return_id, short_object
from ftray.ownership.reference_audit import reasons
from ftray.ownership.tasks import TaskRecord
from ftray.worker import waiting
from ftray.worker.explaining import describe

if TYPE_CHECKING:
    from ftray.worker.core import Core

LIMIT = 1_000
STACK_SIGNAL = signal.SIGRTMIN + 9
STACK_FILE = "ftray-stack"
"""The name of the memory file that the signal writes to, as `/proc/<pid>/fd` shows it."""
_STATES = {waiting.PENDING: "pending", waiting.INLINE: "inline", waiting.IN_STORE: "store", waiting.FAILED: "error"}

_stack_file = -1


def install_stack_signal() -> None:
    """Has `STACK_SIGNAL` write the stacks of all threads to a memory file of this process, also while C code runs."""
    global _stack_file
    _stack_file = os.memfd_create(STACK_FILE, os.MFD_CLOEXEC)
    faulthandler.register(STACK_SIGNAL, file=_stack_file, all_threads=True, chain=False)


def answer(core: Core, what: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The answer to a tool's question. Raises ValueError for one that is not known."""
    question = _QUESTIONS.get(what)
    if question is None:
        raise ValueError(f"{what!r} is no question that a process answers: {', '.join(sorted(_QUESTIONS))}")
    limit = arguments.get("limit", LIMIT)
    if not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit must be a whole number from 0, not {limit!r}")
    core.drain()
    said = question(core, limit)
    executor = core.executor
    if executor is not None and executor.running is not None:
        said["running"] = executor.running_name()
    return said


# --- references -------------------------------------------------------------------------------------------------------


def _references(core: Core, limit: int) -> dict[str, Any]:
    """Every object known here: largest first, with what keeps each; and sums over all."""
    sizes: list[tuple[int, bytes]] = []
    totals = {"objects": 0, "owned": 0, "inline_bytes": 0, "store_bytes_owned": 0, "pending": 0}
    stored: list[str] = []
    for object_id, entry in core.entries.items():
        state = entry.state
        value: Any = entry.value
        size = 0
        totals["objects"] += 1
        totals["owned"] += entry.owner is None
        if state == waiting.INLINE:
            size = len(value)
            totals["inline_bytes"] += size
        elif state == waiting.IN_STORE:
            size = value[1]
            if entry.owner is None:
                totals["store_bytes_owned"] += size
                stored.append(object_id.hex())
        elif state == waiting.PENDING:
            totals["pending"] += 1
        sizes.append((size, object_id))
    if len(sizes) > limit:
        import heapq

        sizes = heapq.nlargest(limit, sizes)
    else:
        sizes.sort(reverse=True)
    rows = []
    for size, object_id in sizes:
        entry = core.entries[object_id]
        rows.append(
            {
                "object_id": object_id.hex(),
                "owner": (entry.owner or core.worker_id).hex(),
                "owned": entry.owner is None,
                "state": _STATES.get(entry.state, str(entry.state)),
                "size_bytes": size,
                "reasons": list(reasons(entry)),
                "site": core.sites.get(object_id, "") if core.sites is not None else "",
            }
        )
    pinned = [object_id.hex() for object_id in core.objects.pins]
    pinned += [object_id.hex() for asked in list(core.objects.asked.values()) for object_id in asked]
    # A task that runs again may have stored its results before: they are known here, but not yet as ready.
    expected = [
        return_id(task.task_id, index).hex()
        for task, _ in _pending_tasks(core)
        if task.attempt
        for index in range(max(1, task.num_returns))
    ]
    return {"totals": totals, "rows": rows, "stored": stored, "pinned": pinned, "expected": expected}


# --- what is pending --------------------------------------------------------------------------------------------------


def _is_pending(core: Core, object_id: bytes) -> bool:
    entry = core.entries.get(object_id)
    return entry is not None and entry.state == waiting.PENDING


def _waits_for(missing: list[bytes]) -> str:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    plural = "" if len(missing) == 1 else "s"
    return f"waits for {len(missing)} argument{plural}: {', '.join(map(short_object, missing[:3]))}{more}"


def _pending_tasks(core: Core) -> Iterator[tuple[TaskRecord, str]]:
    submitter = core.submitter
    for lease in submitter.dispatcher.leases.values():
        for index, task in enumerate(lease.inflight.values()):
            yield task, f"{'running on' if not index else 'queued at'} worker pid {lease.pid}"
    for task in submitter.unfinished.values():
        missing = [x for _, x in task.deps if _is_pending(core, x)]
        yield task, _waits_for(missing)
    for task in submitter.oom.resting.values():
        yield task, "rests after its worker was ended for want of memory"
    for cls in submitter.dispatcher.by_id.values():
        why = submitter.infeasible_classes.get(cls.class_id)
        needs = ", ".join(f"{amount:g} {name}" for name, amount in cls.resources.items()) or "nothing"
        for task in cls.queue:
            if not task.cancelled:
                yield task, f"queued for a lease of {needs}" + (f" ({why})" if why else "")
    for calls in core.actors.calls.values():
        for task in calls.inflight.values():
            yield task, "running or queued in the actor"
        for task in calls.queued():
            if not task.deps_left:  # else it was among the unfinished
                yield task, f"waits for the actor ({calls.state.lower()})"


def _pending(core: Core, limit: int) -> dict[str, Any]:
    """Tasks and actor calls submitted here that have not ended, and what each waits for."""
    rows = []
    for task, why in islice(_pending_tasks(core), limit):
        name = f"{task.actor.name}.{task.method}" if task.actor is not None else task.function.name
        rows.append({"task_id": task.task_id.hex(), "name": name, "attempt": task.attempt, "waits": why})
    submitter = core.submitter
    total = submitter.dispatcher.waiting() + len(submitter.oom.resting)
    total += sum(task.actor is None for task in submitter.unfinished.values())
    total += sum(calls.unfinished for calls in core.actors.calls.values())
    blocked = []
    for waits, hung in list(core.objects.waits.values()):
        missing = [x for x in hung if _is_pending(core, x)]
        blocked.append(
            {
                "call": waits,
                "objects": len(missing),
                "waits": [f"{short_object(x)}: {describe(core, x)}" for x in missing[:5]],
            }
        )
    return {"rows": rows, "total": max(total, len(rows)), "blocked": blocked}


# --- stacks -----------------------------------------------------------------------------------------------------------


def _stack(core: Core, limit: int) -> dict[str, Any]:
    """The stacks of all threads, as Python sees them."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    me = threading.get_ident()
    threads = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, f"thread {ident}")
        if ident == me and name == "ftray-loop":
            continue  # the one that answers
        frames = traceback.extract_stack(frame)
        if ident == me:  # it answers while it waits: what it waits in is of interest
            while frames and "/ftray/w" in frames[-1].filename:
                frames.pop()
        threads.append({"thread": name, "frames": [f"{f.filename}:{f.lineno} {f.name}" for f in reversed(frames)]})
    threads.sort(key=lambda row: (row["thread"] != "MainThread", row["thread"]))
    return {"threads": threads[:limit] if limit else threads}


def _events(core: Core, limit: int) -> dict[str, Any]:
    """What ran here lately."""
    executor = core.executor
    return {"events": executor.events.rows(limit) if executor is not None else []}


def _running(core: Core, limit: int) -> dict[str, Any]:
    """What the main thread runs: `answer` adds it to everything."""
    return {}


_QUESTIONS: dict[str, Callable[[Core, int], dict[str, Any]]] = {
    "references": _references,
    "pending": _pending,
    "stack": _stack,
    "events": _events,
    "running": _running,
}
