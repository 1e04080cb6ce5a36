"""Values to bytes and back: which pickler, which buffers stay out of the pickle, which references are inside.

Role: pickling shell of a process; no sockets, no locks. Packed values come in two forms, told apart by the first byte:

    0x80            a plain pickle (this is pickle's own PROTO opcode)
    0x01            u8 1, u8 0, u16 0, u32 n, u64 pickle_len, n x u64 buffer_len, pickle, then the buffers, each
                    starting at a multiple of 64 bytes from the payload's start (little endian; gaps are zero)

Arguments are one more value: a tuple (positional only), a list `[args, kwargs]`, or no bytes at all for a call without
arguments.

Rules:
- Plain scalars and small containers of them, and numpy arrays of numbers, go to the C pickler: nothing in them can
  be a reference or need pickling by value. All else goes through `Pickler`, which adds to cloudpickle's: buffers
  out of band, exceptions rebuilt without their `__init__`, and the capture of references.
- References are noted by themselves: `ObjectRef.__reduce__` calls `note_ref`, which says whether we are serialising
  (the reference is *contained*, its owner is told by the protocol) or somebody else is (*out of band*, pinned).
- Buffers alias the user's memory until `write_into` or `to_bytes`: write before giving control back to user code.
- Arrays come back read-only, whatever their size, so that code which works in a test works on large data too.
- numpy is never imported here; it is recognised once the user has.

Rejected: trying the C pickler first and cloudpickle on failure (it pickles `__main__` by reference, which succeeds here
and fails there); MessagePack for plain values (no tuples, a second format, and no faster); walking values for
references ahead of pickling (twice the work, and it can't see into `__reduce__`).
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pickle import PickleBuffer, dumps, loads
from struct import Struct
from typing import Any, SupportsIndex

import msgspec

from ftray.exceptions import FtrayError, SerializationError
from ftray.ids import content_hash
from ftray.worker.pickler import (
    PROTOCOL,
    Pickler,
    context,
    is_ndarray,
    load_ref,
    loading_refs,
    note_ref,
    set_default_ref_loader,
)
from ftray.worker.values import explain, text_of

PACKED = 0x01
PLAIN = 0x80
ALIGNMENT_BYTES = 64
HUGE_BYTES = 1 << 20
"""A piece of this size is worth a way of writing of its own."""
LARGE_BYTES = 64 * 1024
"""From here on top-level bytes are written straight to their place, not into the pickle first."""
SMALL_ITEMS_MAX = 16
"""Containers up to this length are looked through for plainness; beyond, the general pickler costs little more."""

_HEAD = Struct("<BBHIQ")
_SCALARS = frozenset((type(None), bool, int, float, str))
_PLAIN = _SCALARS | {bytes}
_BYTES_LIKE = frozenset((bytes, bytearray))
_NUMBER_KINDS = frozenset("biufc")

__all__ = [
    "EMPTY_ARGS", "ArgsPayload", "Serialized", "deserialize", "deserialize_args", "dump_inband", "serialize",
    "serialize_args", "serialize_function",
    "load_ref", "loading_refs", "note_ref", "set_default_ref_loader",
]


class Serialized(msgspec.Struct, eq=False, gc=False):
    """A value ready to be written. `refs` are the references inside, each once, in the order they were met."""

    inband: bytes
    """The pickle."""
    buffers: Sequence[memoryview]
    refs: Sequence[Any]
    size: int
    """Bytes when packed."""

    def write_into(
        self, target: memoryview, write_huge: Callable[[int, bytes | memoryview], None] | None = None
    ) -> None:
        """Write the packed form into the first `size` bytes of a writable memoryview of bytes.

        `write_huge(position, data)` is called instead for pieces of at least `HUGE_BYTES`, if it is given.
        """
        inband = self.inband
        if not self.buffers:
            if write_huge is not None and self.size >= HUGE_BYTES:
                write_huge(0, inband)
            else:
                target[: self.size] = inband
            return
        lengths = [buffer.nbytes for buffer in self.buffers]
        position = _HEAD.size + 8 * len(lengths)
        _HEAD.pack_into(target, 0, PACKED, 0, 0, len(lengths), len(inband))
        Struct(f"<{len(lengths)}Q").pack_into(target, _HEAD.size, *lengths)
        target[position : position + len(inband)] = inband
        position += len(inband)
        for buffer, length in zip(self.buffers, lengths):
            gap = -position % ALIGNMENT_BYTES
            target[position : position + gap] = bytes(gap)
            position += gap
            if write_huge is not None and length >= HUGE_BYTES:
                write_huge(position, buffer)
            else:
                target[position : position + length] = buffer
            position += length

    def to_bytes(self) -> bytes:
        """The packed form; without buffers the pickle itself, not a copy."""
        inband = self.inband
        if not self.buffers:
            return inband
        lengths = [buffer.nbytes for buffer in self.buffers]
        pieces: list[bytes | memoryview] = [_HEAD.pack(PACKED, 0, 0, len(lengths), len(inband))]
        pieces += [Struct(f"<{len(lengths)}Q").pack(*lengths), inband]
        position = _HEAD.size + 8 * len(lengths) + len(inband)
        for buffer, length in zip(self.buffers, lengths):
            gap = -position % ALIGNMENT_BYTES
            pieces += [bytes(gap), buffer]
            position += gap + length
        return b"".join(pieces)


def _with_buffers(inband: bytes, pickle_buffers: list[PickleBuffer], refs: Sequence[Any]) -> Serialized:
    if not pickle_buffers:
        return Serialized(inband, (), refs, len(inband))
    buffers = [buffer.raw() for buffer in pickle_buffers]
    size = _HEAD.size + 8 * len(buffers) + len(inband)
    for buffer in buffers:
        size += -size % ALIGNMENT_BYTES + buffer.nbytes
    return Serialized(inband, buffers, refs, size)


# --- pickling -------------------------------------------------------------------------------------------------------


def dump_inband(value: Any) -> bytes:
    """Pickle a value with all its buffers inside, references in it out of band. Raises whatever pickling raises."""
    outer, context.refs = context.refs, None
    try:
        file = BytesIO()
        Pickler(file).dump(value)
        return file.getvalue()
    finally:
        context.refs = outer


class _Nowhere:
    """A file that only counts, for finding out what can't be pickled."""

    __slots__ = ("written",)

    def __init__(self) -> None:
        self.written = 0

    def write(self, data: Any) -> int:
        self.written += len(data)
        return len(data)


def _attempt(value: Any) -> tuple[Exception | None, int]:
    """Why a value can't be pickled, or None; and how many bytes were made in finding out."""
    outer, context.refs = context.refs, {}
    file = _Nowhere()
    try:
        Pickler(file, buffer_callback=lambda buffer: None).dump(value)
        return None, file.written
    except Exception as error:
        return error, file.written
    finally:
        context.refs = outer


# --- values ---------------------------------------------------------------------------------------------------------

_ndarray: type | None = None
_numpy_scalars: set[type] = set()


def _learn_numpy(kind: type) -> None:
    """Called for a type whose module is numpy's: remember what arrays and numbers look like."""
    global _ndarray
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return
    if is_ndarray(kind):
        _ndarray = kind
    elif issubclass(kind, numpy.number) or kind is numpy.bool_:
        _numpy_scalars.add(kind)


def _is_plain(value: Any, kind: type, depth: int = 2) -> bool:
    """Whether the C pickler does the same as ours for this value; looks at a bounded part of it."""
    if kind in _PLAIN:
        return True
    if kind is tuple or kind is list:
        items: Any = value
    elif kind is dict:
        if len(value) > SMALL_ITEMS_MAX or not _PLAIN.issuperset(map(type, value)):
            return False
        items = value.values()
    elif kind in _numpy_scalars:
        return True
    elif kind is _ndarray:
        flags = value.flags
        return value.dtype.kind in _NUMBER_KINDS and (flags.c_contiguous or flags.f_contiguous)
    elif kind.__module__ == "numpy" and _ndarray is not kind:
        _learn_numpy(kind)
        return (kind is _ndarray or kind in _numpy_scalars) and _is_plain(value, kind)
    else:
        return False
    if len(items) > SMALL_ITEMS_MAX:
        return False
    if _PLAIN.issuperset(map(type, items)):
        return True
    return depth > 1 and all(_is_plain(item, type(item), depth - 1) for item in items)


class _OutOfBand:
    """Wraps large bytes at the top of a value: they go to the buffers, and come back as what they were."""

    __slots__ = ("value",)

    def __init__(self, value: bytes | bytearray) -> None:
        self.value = value

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return type(self.value), (PickleBuffer(self.value),)


def _serialize_plain(value: Any) -> Serialized:
    buffers: list[PickleBuffer] = []
    inband = dumps(value, PROTOCOL, buffer_callback=buffers.append)
    return _with_buffers(inband, buffers, ())


def _serialize_general(value: Any) -> Serialized:
    buffers: list[PickleBuffer] = []
    file = BytesIO()
    refs: dict[Any, None] = {}
    outer, context.refs = context.refs, refs
    try:
        Pickler(file, buffers.append).dump(value)
    finally:
        context.refs = outer
    return _with_buffers(file.getvalue(), buffers, list(refs) if refs else ())


def serialize(value: Any, what: str = "value") -> Serialized:
    """Pickle a value. `what` names it in errors ("return value", "actor state").

    Raises SerializationError, with the path to the part that can't be pickled.
    """
    kind = type(value)
    try:
        if kind in _SCALARS:
            inband = dumps(value, PROTOCOL)
            return Serialized(inband, (), (), len(inband))
        if kind in _BYTES_LIKE and len(value) >= LARGE_BYTES:
            return _serialize_plain(_OutOfBand(value))
        if _is_plain(value, kind):
            return _serialize_plain(value)
        return _serialize_general(value)
    except (FtrayError, MemoryError):
        raise
    except Exception as error:
        raise explain([(what, value)], error, _attempt) from error


def deserialize(payload: bytes | bytearray | memoryview, on_ref: Callable[..., Any] | None = None) -> Any:
    """The value of a packed payload. Buffers in it are read-only views of the payload, not copies.

    `on_ref` is called with the fields of each reference inside, and returns the reference; without it the loader of the
    surrounding `loading_refs` is, or the default one. Raises SerializationError when the value can't be rebuilt (a
    module is missing here, a constructor raises, the payload is damaged); errors of ours, such as from the reference
    loader, come through.
    """
    if on_ref is not None:
        with loading_refs(on_ref):
            return deserialize(payload)
    try:
        if payload[0] == PLAIN:
            return loads(payload)
        return _load_packed(payload)
    except (FtrayError, MemoryError):
        raise
    except Exception as error:
        raise SerializationError(
            f"a value of {len(payload)} bytes can't be read back: {type(error).__name__}: {text_of(error)}. "
            "If a module is missing, install it on this node, or send it with `runtime_env`."
        ) from error


def _load_packed(payload: bytes | bytearray | memoryview) -> Any:
    view = memoryview(payload).toreadonly()
    tag, _, _, count, length = _HEAD.unpack_from(view)
    if tag != PACKED:
        raise pickle.UnpicklingError(f"unknown format {tag:#x}")
    position = _HEAD.size + 8 * count
    if position + length > len(view):
        raise pickle.UnpicklingError("truncated")
    lengths = Struct(f"<{count}Q").unpack_from(view, _HEAD.size)
    inband = view[position : position + length]
    position += length
    buffers = []
    for length in lengths:
        position += -position % ALIGNMENT_BYTES
        if position + length > len(view):
            raise pickle.UnpicklingError("truncated")
        buffers.append(view[position : position + length])
        position += length
    return loads(inband, buffers=buffers)


# --- arguments ------------------------------------------------------------------------------------------------------


class ArgsPayload(msgspec.Struct, eq=False, gc=False):
    """The arguments of a call. `deps` are the references among them, by position (from 0) or keyword."""

    deps: Sequence[tuple[int | str, Any]]
    payload: Serialized


EMPTY_ARGS = ArgsPayload((), Serialized(b"", (), (), 0))
"""A call without arguments: no bytes."""


def serialize_args(args: tuple[Any, ...], kwargs: dict[str, Any], ref_type: type) -> ArgsPayload:
    """Pickle the arguments of a call, with None in place of those that are instances of `ref_type`.

    Raises SerializationError, whose path begins with the argument ("argument 1" is the first, "argument 'name'").
    """
    if not kwargs:
        if not args:
            return EMPTY_ARGS
        if _SCALARS.issuperset(map(type, args)):
            inband = dumps(args, PROTOCOL)
            return ArgsPayload((), Serialized(inband, (), (), len(inband)))
    deps: list[tuple[int | str, Any]] = []
    plain = True
    positional = list(args)
    for i, value in enumerate(args):
        kind = type(value)
        if issubclass(kind, ref_type):
            deps.append((i, value))
            positional[i] = None
        elif kind in _BYTES_LIKE and len(value) >= LARGE_BYTES:
            positional[i] = _OutOfBand(value)
        elif plain and kind not in _SCALARS:
            plain = _is_plain(value, kind)
    named = kwargs.copy()
    for name, value in kwargs.items():
        kind = type(value)
        if issubclass(kind, ref_type):
            deps.append((name, value))
            named[name] = None
        elif kind in _BYTES_LIKE and len(value) >= LARGE_BYTES:
            named[name] = _OutOfBand(value)
        elif plain and kind not in _SCALARS:
            plain = _is_plain(value, kind)
    whole: Any = [positional, named] if named else tuple(positional)
    try:
        return ArgsPayload(deps, _serialize_plain(whole) if plain else _serialize_general(whole))
    except (FtrayError, MemoryError):
        raise
    except Exception as error:
        parts = [(f"argument {i + 1}", value) for i, value in enumerate(positional)]
        parts += [(f"argument {name!r}", value) for name, value in named.items()]
        raise explain(parts, error, _attempt) from error


def deserialize_args(
    payload: bytes | bytearray | memoryview, on_ref: Callable[..., Any] | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments, with None where the dependencies go. Raises as `deserialize`."""
    if not payload:
        return [], {}
    whole = deserialize(payload, on_ref)
    if type(whole) is tuple:
        return list(whole), {}
    positional, named = whole
    return positional, named


# --- functions and classes ------------------------------------------------------------------------------------------


def serialize_function(function: Any) -> tuple[bytes, bytes]:
    """Pickle a function or class: (bytes, 16-byte hash of them). By reference if importable, by value in `__main__`.

    References in its closure are pickled out of band. Raises SerializationError naming the closure variable, global or
    default that can't be pickled.
    """
    try:
        data = dump_inband(function)
    except (FtrayError, MemoryError):
        raise
    except Exception as error:
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        what = f"{'class' if isinstance(function, type) else 'function'} {name}"
        raise explain([(what, function)], error, _attempt) from error
    return data, content_hash(data)
