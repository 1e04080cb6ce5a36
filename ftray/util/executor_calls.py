"""What an executor's call is in a worker: its function, loaded once, after the executor's initializer has run there.

Role: runs inside tasks, and names what both sides know. A function travels as the bytes of its pickle, which is cached
by those bytes: its own arguments then are all that is new in a call. What has a state of its own (a bound method, a
closure, a callable object) travels as a value, and comes anew with each call.

Rules: nothing here outlives its use without bound: a worker serves many executors.

Rejected: exporting each function as a remote function of its own (a program that submits closures would fill the GCS
with them, and an initializer would have no place to run).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any

from ftray.worker.core import current_task
from ftray.worker.serialization import deserialize

FUNCTIONS_MAX = 512
"""Functions that a worker keeps loaded."""
EXECUTORS_MAX = 64
"""Executors whose initializer a worker remembers to have run."""

_functions: OrderedDict[tuple[bytes, bytes], Callable[..., Any]] = OrderedDict()
_initialized: OrderedDict[bytes, Callable[..., Any] | BaseException] = OrderedDict()
"""Executor -> its initializer, which has run here, or what it has raised."""


class InitializerFailed(Exception):
    """The initializer of an executor raised in this worker; what it raised is the cause."""


def call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """One call of an executor without initializer."""
    if type(function) is bytes:
        function = _loaded(b"", function)
    _name(function)
    return function(*args, **kwargs)


def call_chunk(function: Any, chunk: list[tuple[Any, ...]], /) -> list[Any]:
    """Several calls of one function in one task: the results, or what the first failing call raised."""
    if type(function) is bytes:
        function = _loaded(b"", function)
    _name(function)
    return [function(*args) for args in chunk]


def call_initialized(key: bytes, initializer: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """One call of an executor with initializer: `initializer` is the pickle of it and its arguments, or a list with a
    reference to that."""
    _initialize(key, initializer)
    if type(function) is bytes:
        function = _loaded(key, function)
    _name(function)
    return function(*args, **kwargs)


def call_chunk_initialized(key: bytes, initializer: Any, function: Any, chunk: list[tuple[Any, ...]], /) -> list[Any]:
    """As `call_chunk`, of an executor with initializer."""
    _initialize(key, initializer)
    if type(function) is bytes:
        function = _loaded(key, function)
    _name(function)
    return [function(*args) for args in chunk]


def _name(function: Any) -> None:
    """Errors and logs name the user's function rather than ours."""
    context = current_task.get()
    if context is not None:
        context.function_name = name_of(function)


def name_of(function: Any) -> str:
    """What to call a callable in errors: always a string that is not empty."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) and name else type(function).__name__


def _loaded(key: bytes, data: bytes) -> Callable[..., Any]:
    function = _functions.get((key, data))
    if function is None:
        made: Callable[..., Any] = deserialize(data)
        initializer = _initialized.get(key)
        if callable(initializer):
            _share_globals(initializer, made)
        function = _functions[key, data] = made
        if len(_functions) > FUNCTIONS_MAX:
            _functions.popitem(last=False)
    return function


def _initialize(key: bytes, initializer: Any) -> None:
    done = _initialized.get(key)
    if done is None:
        if type(initializer) is list:
            import ftray

            initializer = ftray.get(initializer[0])
        function: Any = None
        try:
            function, args = deserialize(initializer)
            _name(function)
            function(*args)
            done = function
        except (Exception, SystemExit) as error:
            done = error
        _initialized[key] = done
        if len(_initialized) > EXECUTORS_MAX:
            _initialized.popitem(last=False)
    if isinstance(done, BaseException):
        raise InitializerFailed("the executor's initializer failed in this worker") from done


def _share_globals(initializer: Callable[..., Any], function: Callable[..., Any]) -> None:
    """What the initializer has set is seen by functions of the same script.

    Functions of a program's main script are pickled by value, each with a copy of the globals that it names; by
    reference, as all others are, they share their module's.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(initializer, FunctionType) or not isinstance(function, FunctionType):
        return
    ours, theirs = initializer.__globals__, function.__globals__
    if ours is not theirs and ours.get("__name__") == theirs.get("__name__"):
        theirs.update({name: value for name, value in ours.items() if name[:2] != "__"})
