"""Why a value can't be pickled: the search for the innermost part that fails, and the error that names it.

Role: called after pickling failed, with a function that tries to pickle a part. It descends into containers,
attributes, closures, globals and constructor arguments, always into a part that fails by itself, until it meets one
whose own parts are all fine. Groups of parts are tried together and halved: a level costs about two pickles of it.

Rules: bounded (depth, number of tries, bytes), safe against cycles, and never raises because of what user code
does: when the search gives up, the path found so far is still right.

Rejected: watching the pickler (the C pickler does not say when an object ends, so the path is unknown); the pure Python
pickler (does, but cloudpickle is not built on it); the first failing attribute by name (blames a parent's back link).
"""

from __future__ import annotations

import copyreg
import dis
import functools
import pickle
import reprlib
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from ftray.exceptions import SerializationError

Part = tuple[str, Any]
"""What to append to the path, and the value there."""
Attempt = Callable[[Any], tuple[Exception | None, int]]
"""Tries to pickle: why it failed or None, and the bytes made."""

DEPTH_MAX = 40
TRIES_MAX = 3_000
TRIED_BYTES_MAX = 1 << 29
ITEMS_MAX = 1_000_000

_REMEDY = "Leave it out, make it inside the task, or give its class a `__reduce__` or `__getstate__`."


def explain(parts: list[Part], error: Exception, attempt: Attempt) -> SerializationError:
    """The error to raise when pickling `parts` (names and values, one or more) together failed with `error`."""
    names = ", ".join(name for name, _ in parts[:3])
    if _is_recursion(error):
        names = next((name for name, value in parts if _is_recursion(attempt(value)[0])), names)
        return SerializationError(
            f"{names}: nests too deeply to be pickled, or a `__reduce__` in it calls itself without end. Flatten it "
            f"(into a list, say), or raise `sys.setrecursionlimit()`, which is {sys.getrecursionlimit()}.",
            names,
        )
    search = _Search(attempt)
    try:
        # (When no part fails by itself, whatever failed is gone: say what it was.)
        path, error = search.among(parts, "", 0) or (names, error)
    except _GaveUp:
        path, error = search.best or (names, error)
    except Exception:  # a search must not replace the error it is to explain
        path = search.best[0] if search.best else names
    return SerializationError(f"{path}: {_text(error)}. {_REMEDY}", path)


def _is_recursion(error: BaseException | None) -> bool:
    return isinstance(error, RecursionError) or (error is not None and isinstance(error.__cause__, RecursionError))


def text_of(error: BaseException) -> str:
    """`str(error)`, or nothing when its `__str__` raises."""
    try:
        return str(error)
    except Exception:
        return ""


def _text(error: BaseException) -> str:
    text = text_of(error).rstrip(".")
    if text and isinstance(error, (TypeError, pickle.PicklingError)):
        return text
    return type(error).__name__ + (f": {text}" if text else "")


class _GaveUp(Exception):
    """The bounds are reached."""


class _Search:
    __slots__ = ("_attempt", "_bytes", "_seen", "_tries", "best")

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._tries = TRIES_MAX
        self._bytes = TRIED_BYTES_MAX
        self._seen: dict[int, Any] = {}  # keeps what it has seen alive: an id must not be used again
        self.best: tuple[str, Exception] | None = None

    def _why(self, value: Any) -> Exception | None:
        if self._tries <= 0 or self._bytes <= 0:
            raise _GaveUp
        error, size = self._attempt(value)
        self._tries -= 1
        self._bytes -= size
        return error

    def _first_failing(self, parts: list[Part], start: int) -> int | None:
        """The index of the first part from `start` on that fails, by halving; None when together they don't."""
        low, high = start, len(parts)
        if low == high or self._why([value for _, value in parts[low:high]]) is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._why([value for _, value in parts[low:middle]]) is not None:
                high = middle
            else:
                low = middle
        return low

    def among(self, parts: list[Part], path: str, depth: int) -> tuple[str, Exception] | None:
        """The innermost culprit in these parts; None when there is none but what was seen before."""
        start = 0
        while (index := self._first_failing(parts, start)) is not None:
            start = index + 1
            name, value = parts[index]
            error = self._why(value)
            if error is None or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if _is_recursion(error):
                return path + name, error
            found = self._inside(value, path + name, error, depth)
            if found is not None:
                return found
        return None

    def _inside(self, value: Any, path: str, error: Exception, depth: int) -> tuple[str, Exception] | None:
        self.best = path, error
        if depth >= DEPTH_MAX:
            return path, error
        parts = list(islice(parts_of(value), ITEMS_MAX))
        found = self.among(parts, path, depth + 1)
        if found is None and self._first_failing(parts, 0) is None:
            return path, error  # all its parts are fine: it is the one
        return found


def parts_of(value: Any) -> Iterator[Part]:
    """What pickling a value pickles in turn, as far as can be told; ends early when its own code raises."""
    try:
        yield from _parts(value)
    except Exception:  # its own __reduce__ or __iter__: it is the culprit then
        return


def _parts(value: Any) -> Iterator[Part]:
    kind = type(value)
    if kind is dict:
        yield from ((f"[{_short(key)}]", item) for key, item in value.items())
        yield from ((f": key {_short(key)}", key) for key in value)
    elif kind is list or kind is tuple:
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    elif kind is set or kind is frozenset:
        yield from ((f": element {_short(item)}", item) for item in value)
    elif issubclass(kind, tuple) and hasattr(kind, "_fields"):
        yield from ((f".{name}", item) for name, item in zip(kind._fields, value))
    elif kind is FunctionType:
        yield from _function_parts(value)
    elif kind is MethodType:
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif kind is CellType:
        yield "", value.cell_contents
    elif kind is staticmethod or kind is classmethod:
        yield "", value.__func__
    elif kind is property:
        yield from (("", function) for function in (value.fget, value.fset, value.fdel))
    elif kind is functools.partial:
        yield ".func", value.func
        yield from ((f".args[{i}]", item) for i, item in enumerate(value.args))
        yield from ((f".keywords[{name!r}]", item) for name, item in value.keywords.items())
    elif issubclass(kind, type):
        yield from ((f": attribute {name!r}", item) for name, item in vars(value).items() if name not in _OF_CLASSES)
        yield from ((f": base {base.__name__}", base) for base in value.__bases__)
    elif kind is not ModuleType:
        yield from _reduced_parts(value)


_OF_CLASSES = frozenset(("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "_abc_impl"))


def _function_parts(function: FunctionType) -> Iterator[Part]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            yield f": closure variable {name!r}", cell.cell_contents
        except ValueError:
            pass  # not assigned yet
    for name in _global_names(code):
        if name in function.__globals__:
            yield f": global {name!r}", function.__globals__[name]
    defaults = function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    for name, default in [*zip(names, defaults), *(function.__kwdefaults__ or {}).items()]:
        yield f": default of {name!r}", default
    yield from ((f".{name}", item) for name, item in vars(function).items())
    yield from ((f": annotation of {name!r}", item) for name, item in function.__annotations__.items())


def _global_names(code: CodeType) -> dict[str, None]:
    """Globals that a function uses, those of functions inside it too, in order of use."""
    names = {
        str(step.argval): None for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _global_names(constant)
    return names


def _reduced_parts(value: Any) -> Iterator[Part]:
    reducer = copyreg.dispatch_table.get(type(value))
    reduced = reducer(value) if reducer is not None else value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    if not isinstance(reduced, tuple):
        return
    function, args, state, items, pairs = (*reduced[:5], None, None, None)[:5]
    if isinstance(state, dict):
        yield from ((f".{name}", item) for name, item in state.items())
    elif isinstance(state, tuple) and len(state) == 2 and all(isinstance(half, dict | None) for half in state):
        yield from ((f".{name}", item) for half in state if half for name, item in half.items())
    elif state is not None:
        yield ": state", state
    yield from ((f"[{i}]", item) for i, item in enumerate(items or ()))
    for key, item in pairs or ():
        yield f"[{_short(key)}]", item
        yield f": key {_short(key)}", key
    own = args[1:] if getattr(function, "__name__", "") in ("__newobj__", "__newobj_ex__") else args
    yield from ((f": constructor argument {i + 1}", item) for i, item in enumerate(own))
    yield f": class {type(value).__name__}", type(value)
    yield ": the function that rebuilds it", function


def _short(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
