"""From the arguments of a call to what travels: shared by tasks, actor calls and constructors.

Role: shell. Top-level references become dependencies; a single argument over the inline limit is put into the store
first, so that it is written once and not once for each attempt or worker.
"""

from __future__ import annotations

from typing import Any

from ftray.worker.core import Core
from ftray.worker.refs import ObjectRef, check_current
from ftray.worker.serialization import EMPTY_ARGS, serialize, serialize_args

Packed = tuple[bytes, tuple[tuple[int | str, bytes], ...], tuple[bytes, ...], list[Any]]
NOTHING: Packed = (b"", (), (), [])


def pack(core: Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
    """(packed arguments, dependencies as (position, object id), ids of all references held by the call, references that
    the caller keeps alive until the call is submitted).

    Raises SerializationError naming the argument, ForeignRefError, ObjectStoreFullError.
    """
    packed = serialize_args(args, kwargs, ObjectRef)
    if packed is EMPTY_ARGS:
        return NOTHING
    payload = packed.payload
    kept: list[Any] = []
    if payload.size > core.config.inline_bytes_max:
        limit = core.config.inline_bytes_max
        replaced = [_stored(core, value, limit, kept, f"argument {i + 1}") for i, value in enumerate(args)]
        named = {name: _stored(core, value, limit, kept, f"argument {name!r}") for name, value in kwargs.items()}
        if kept:
            packed = serialize_args(tuple(replaced), named, ObjectRef)
            payload = packed.payload
    data = payload.to_bytes()
    if not packed.deps and not payload.refs:
        return data, (), (), kept
    ids: dict[bytes, None] = {}
    deps = []
    for position, ref in packed.deps:
        check_current(ref)
        deps.append((position, ref._id))
        ids[ref._id] = None
    for ref in payload.refs:
        ids[ref._id] = None
    return data, tuple(deps), tuple(ids), kept


def _stored(core: Core, value: Any, limit: int, kept: list[Any], what: str) -> Any:
    if isinstance(value, ObjectRef):
        return value
    serialized = serialize(value, what)
    if serialized.size <= limit:
        return value
    ref: ObjectRef[Any] = ObjectRef(core.objects.put(serialized), core)
    kept.append(ref)
    return ref
