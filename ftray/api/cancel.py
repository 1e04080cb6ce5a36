"""`cancel`.

Role: argument checks around `worker/cancelling.py`.
"""

from __future__ import annotations

from typing import Any

from ftray.api.actor import ActorHandle
from ftray.api.generators import ObjectRefGenerator
from ftray.worker.core import get_core
from ftray.worker.refs import ObjectRef, check_current


def cancel(ref: ObjectRef[Any] | ObjectRefGenerator[Any], *, force: bool = False, recursive: bool = True) -> None:
    """Cancels the task or actor call that makes the object, or yields to the generator. Returns at once.

    One that has ended keeps its value. Any other ends in TaskCancelledError for whoever waits for it or gets it, and is
    not retried, whatever its options say. One that has not begun never does. A running task gets KeyboardInterrupt
    (asyncio and trio runs in it are cancelled), with `force` its process is killed. A running call of an async actor is
    cancelled as a coroutine; one of another actor goes on, and may ask `get_runtime_context().is_canceled()`. What the
    task has submitted is cancelled too, unless `recursive` is False.

    Raises TypeError for what is no reference and for an actor's handle, ValueError for an object made by `put` and for
    `force` on an actor call (of another process's call it is ignored), ForeignRefError, NotInitializedError.
    """
    core = get_core()
    if isinstance(ref, ActorHandle):
        raise TypeError("ftray.cancel takes the reference of a call; end the actor itself with ftray.kill")
    if not isinstance(ref, ObjectRef | ObjectRefGenerator):
        raise TypeError(f"ftray.cancel takes an ObjectRef or ObjectRefGenerator, not {type(ref).__name__}")
    for name, value in (("force", force), ("recursive", recursive)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, not {value!r}")
    checked: Any = ref._generator_ref if isinstance(ref, ObjectRefGenerator) else ref
    check_current(checked)
    core.check_entry()
    with core.lock:
        core.drain()
        try:
            core.canceller.cancel_object(checked._id, force, recursive)
        finally:
            core.settle()
