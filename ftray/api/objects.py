"""`put`, `get`, `wait`.

Role: argument checks around `worker/objects.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

from ftray.api.actor import ActorHandle
from ftray.api.generators import ObjectRefGenerator, wait_mixed
from ftray.worker.core import get_core
from ftray.worker.refs import ObjectRef, check_current
from ftray.worker.serialization import serialize

R = TypeVar("R")


def put(value: Any) -> ObjectRef[Any]:
    """Stores a value in the cluster; returns its reference. The value cannot be changed afterwards.

    Raises SerializationError naming the part that cannot be pickled, ObjectStoreFullError, TypeError for a reference.
    """
    core = get_core()
    if isinstance(value, ObjectRef):
        raise TypeError("ftray.put of an ObjectRef: pass the reference itself, or put a list that contains it")
    return ObjectRef(core.objects.put(serialize(value)), core)


@overload
def get(refs: ObjectRef[R], *, timeout: float | None = None) -> R: ...
@overload
def get(refs: Sequence[ObjectRef[R]], *, timeout: float | None = None) -> list[R]: ...
def get(refs: Any, *, timeout: float | None = None) -> Any:
    """The value of a reference, or the list of values of a list of them; waits until they are there.

    `timeout` is in seconds; 0 asks without waiting. An exception of the task is raised here, as an instance of its own
    type and of TaskError. Raises GetTimeoutError, which says what is being waited for, WorkerCrashedError,
    ActorDiedError, ObjectLostError and its kinds, ForeignRefError, and TypeError for what is no reference.
    """
    core = get_core()
    check_timeout(timeout)
    if isinstance(refs, ObjectRef):
        if refs._core is not core:
            check_current(refs)
        return core.objects.get((refs,), timeout)[0]
    checked = check_refs(refs, "get")
    return core.objects.get(checked, timeout)


@overload
def wait(
    refs: Sequence[ObjectRef[Any]], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]: ...
@overload
def wait(
    refs: Sequence[ObjectRef[Any] | ObjectRefGenerator[Any]],
    *,
    num_returns: int = 1,
    timeout: float | None = None,
    fetch_local: bool = True,
) -> tuple[list[Any], list[Any]]: ...
def wait(
    refs: Sequence[Any], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[Any], list[Any]]:
    """Waits until `num_returns` of the references are ready, or `timeout` seconds have passed.

    Returns (ready, not ready), both in the order given; `ready` has at most `num_returns`. An error counts as ready. A
    generator among the references is ready when its next one is there, or its end.
    Raises TypeError for what is not a list of references, ValueError for duplicates or a `num_returns` out of range.
    """
    core = get_core()
    check_timeout(timeout)
    if isinstance(refs, ObjectRef):
        raise TypeError("ftray.wait takes a list of references: use ftray.wait([ref])")
    generators: list[Any] = []
    # Programs wait for one of many, again and again: a look at each type and session would be most of the cost. What is
    # no reference has no id, and one of another session is not known.
    try:
        ids = {ref._id for ref in refs} if type(refs) is list else set()
        checked = list(refs) if ids else []
    except AttributeError:
        ids = set()
    if not ids:
        checked = check_refs(refs, "wait", generators)
        ids = {ref._handle_id if isinstance(ref, ObjectRefGenerator) else ref._id for ref in checked}
    if not checked:
        return [], []
    if isinstance(num_returns, bool) or not isinstance(num_returns, int):
        raise TypeError(f"num_returns must be a whole number, not {num_returns!r}")
    if not 1 <= num_returns <= len(checked):
        raise ValueError(f"num_returns must be from 1 to the number of references ({len(checked)}), not {num_returns}")
    if len(ids) != len(checked):
        raise ValueError("ftray.wait takes each reference once; the list has duplicates")
    if generators:
        return wait_mixed(core, checked, num_returns, timeout)
    return core.objects.wait(checked, num_returns, timeout)


def check_timeout(timeout: float | None) -> None:
    """Raises TypeError or ValueError."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    if not timeout >= 0:
        raise ValueError(f"timeout must not be negative, but is {timeout}")


def check_refs(refs: Any, call: str, generators: list[Any] | None = None) -> list[Any]:
    """The references as a list. Raises TypeError naming what is none.

    With `generators` those among them are allowed, and added to it.
    """
    if isinstance(refs, ObjectRefGenerator):
        raise TypeError(_no_generator(call))
    if isinstance(refs, ActorHandle):
        raise TypeError(f"ftray.{call} takes references; an actor handle has none: {call} what a method call returned")
    if isinstance(refs, str | bytes) or not isinstance(refs, list | tuple):
        raise TypeError(f"ftray.{call} takes an ObjectRef or a list of them, not {type(refs).__name__}")
    core = get_core()
    for index, ref in enumerate(refs):
        if type(ref) is ObjectRef and ref._core is core:
            continue
        if not isinstance(ref, ObjectRef):
            if isinstance(ref, ObjectRefGenerator):
                if generators is None:
                    raise TypeError(_no_generator(call))
                check_current(ref._generator_ref)
                generators.append(ref)
                continue
            raise TypeError(f"ftray.{call} takes ObjectRefs, but item {index} is {type(ref).__name__}: {ref!r:.80}")
        if ref._core is not core:
            check_current(ref)
    return list(refs)


def _no_generator(call: str) -> str:
    if call == "wait":
        return "ftray.wait takes a list: use ftray.wait([generator])"
    return (
        f"ftray.{call} takes references, not an ObjectRefGenerator: iterate over it and {call} each reference that it "
        "gives, or get completed() to wait for its end"
    )
