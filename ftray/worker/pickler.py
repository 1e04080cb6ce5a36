"""The pickler: cloudpickle's, made faster, with exceptions and views that come back as they were; and references.

Role: what happens inside one pickling or unpickling. `serialization.py` decides what to pickle and how it is packed.

References are not found by looking for them: an `ObjectRef` that is pickled calls `note_ref`, one that is unpickled
calls `load_ref`, and both look at what this thread is doing: fields of a thread-local, set for the duration.

Rejected: persistent ids (the C pickler then calls Python for each object, and the pickle is readable by ours alone);
a context variable (each thread starts with an empty one anyway, and reading it costs twice as much).
"""

from __future__ import annotations

import copyreg
import sys
import threading
from collections.abc import Callable
from pickle import PickleBuffer
from types import CodeType, FunctionType
from typing import Any

import cloudpickle

from ftray.exceptions import NotInitializedError, solid_base

PROTOCOL = 5

# --- references inside values ----------------------------------------------------------------------------------------


class _Context(threading.local):
    refs: dict[Any, None] | None = None
    """References met by the serialisation this thread is in; None when it is in none."""
    loader: Callable[..., Any] | None = None
    """Makes the references of the value this thread is deserialising."""


context = _Context()


def _no_loader(*_: Any) -> Any:
    raise NotInitializedError("a reference can be unpickled only after ftray.init()")


_default_loader: Callable[..., Any] = _no_loader


def note_ref(ref: Any) -> bool:
    """Called by a reference that is being pickled. True: it is inside a value of ours, and in its `Serialized.refs`.

    False: somebody else pickles it, so nobody will tell its owner who holds it. References are kept apart by `==`.
    """
    refs = context.refs
    if refs is None:
        return False
    refs[ref] = None
    return True


def load_ref(*args: Any) -> Any:
    """What a pickled reference calls with its fields: asks the loader of the value we are loading, or the default one.

    Raises NotInitializedError when there is neither.
    """
    return (context.loader or _default_loader)(*args)


class loading_refs:
    """`with loading_refs(loader):` references unpickled by this thread are made by `loader`; None: the default one."""

    __slots__ = ("_loader", "_outer")

    def __init__(self, loader: Callable[..., Any] | None) -> None:
        self._loader = loader

    def __enter__(self) -> None:
        self._outer, context.loader = context.loader, self._loader

    def __exit__(self, *exc_info: object) -> None:
        context.loader = self._outer


def set_default_ref_loader(loader: Callable[..., Any] | None) -> None:
    """Who makes references that were pickled out of band, or in a value read without `on_ref`; None: nobody."""
    global _default_loader
    _default_loader = loader or _no_loader


# --- the pickler ----------------------------------------------------------------------------------------------------


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, protocol 5, with exceptions and memoryviews that come back as they were."""

    def __init__(self, file: Any, buffer_callback: Callable[[PickleBuffer], Any] | None = None) -> None:
        # A plain dict: the C pickler looks into it for each object, and a ChainMap answers in Python, ten times slower.
        self.dispatch_table = {**copyreg.dispatch_table, **_CLOUDPICKLE_TABLE}
        super().__init__(file, protocol=PROTOCOL, buffer_callback=buffer_callback)

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is FunctionType or issubclass(kind, type):
            return super().reducer_override(obj)
        if kind is memoryview:
            return _reduce_memoryview(obj) if obj.format in _VIEW_FORMATS else NotImplemented
        if issubclass(kind, BaseException):
            return _reduce_exception(obj, kind)
        if kind.__name__ == "ndarray" and is_ndarray(kind) and not obj.flags.forc:
            # numpy would put a copy into the pickle itself, to come back writable.
            return obj.copy().__reduce_ex__(PROTOCOL)
        return NotImplemented


def is_ndarray(kind: type) -> bool:
    """Whether a type is numpy's array, without importing numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and kind is numpy.ndarray


_VIEW_FORMATS = frozenset("cbBhHiIlLqQfd?")
"""Memoryviews of these can be made anew by `cast`; others come back as bytes."""

_CLOUDPICKLE_TABLE: dict[type, Any] = dict(cloudpickle.Pickler.dispatch_table.maps[0])
_reduce_code_nameless = _CLOUDPICKLE_TABLE[CodeType]


def _reduce_code(code: CodeType) -> Any:
    """With its file's name, which cloudpickle leaves out: tracebacks of tasks show it, and the lines in it."""
    rebuild, args = _reduce_code_nameless(code)
    return rebuild, tuple(code.co_filename if arg == "<dynamic-code>" else arg for arg in args)


_CLOUDPICKLE_TABLE[CodeType] = _reduce_code


def _reduce_memoryview(view: memoryview) -> Any:
    # (A view that is not contiguous, or of several dimensions in Fortran's order, has to be copied.)
    buffer = PickleBuffer(view if view.c_contiguous else view.tobytes())
    return _load_memoryview, (buffer, view.format, view.shape)


def _load_memoryview(buffer: Any, format: str, shape: tuple[int, ...]) -> memoryview:
    view: Any = memoryview(buffer).toreadonly().cast("B")
    if format != "B" or len(shape) != 1:
        # (An empty view can't be cast to several dimensions.)
        view = view.cast(format) if 0 in shape else view.cast(format, shape)
    loaded: memoryview = view
    return loaded


def _reduce_exception(error: BaseException, kind: type[BaseException]) -> Any:
    """Exceptions whose `__init__` takes other arguments than it passes on are rebuilt without it, like other objects.

    Pickle's default calls `type(*args)`, which for such a class fails in whoever reads it. A class with a `__reduce__`
    of its own, or a registered one, is left alone.
    """
    base: Any = solid_base(kind)
    if (kind.__init__ is base.__init__ and kind.__new__ is base.__new__) or kind in copyreg.dispatch_table:
        return NotImplemented
    untouched: Any = kind
    for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"):
        if getattr(untouched, name, None) is not getattr(base, name, None):
            return NotImplemented
    _, args, *state = base.__reduce__(error)
    return _load_exception, (kind, base, args), (state[0] if state else None), None, None, _set_exception_state


def _load_exception(kind: type[BaseException], base: Any, args: tuple[Any, ...]) -> BaseException:
    error: BaseException = base.__new__(kind, *args)
    base.__init__(error, *args)
    return error


def _set_exception_state(error: BaseException, state: dict[str, Any] | None) -> None:
    if state:
        for name, value in state.items():
            BaseException.__setattr__(error, name, value)  # past a frozen dataclass's own
