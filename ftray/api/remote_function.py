"""`@ftray.remote` on a function: what calls it elsewhere.

Role: the fast path of submission. A function is serialised and exported once a session; options are resolved once; a
call then costs its arguments, an id, and one locked entry.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from ftray.api.arguments import pack
from ftray.api.generators import ObjectRefGenerator, returned
from ftray.api.options import TASK_OPTIONS, check_options, exception_names, items_ahead, resource_needs, return_count
from ftray.api.signatures import Arity
from ftray.ids import return_id
from ftray.ownership.dispatch import ClassQueue
from ftray.ownership.tasks import FunctionInfo, TaskRecord
from ftray.wire.messages import STREAMING
from ftray.worker.core import Core, core_or_none, current_task, get_core
from ftray.worker.refs import ObjectRef
from ftray.worker.serialization import serialize_function
from ftray.worker.submit import INDEX0

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class RemoteFunction(Generic[P, R]):
    """A function that runs on the cluster: `f.remote(...)` returns an ObjectRef at once (several with
    `num_returns`)."""

    def __init__(self, function: Callable[P, R], options: dict[str, Any], shared: dict[Any, Any] | None = None) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._options = options
        self._what = f"the remote function {getattr(function, '__qualname__', function)}"
        check_options(options, TASK_OPTIONS, self._what)
        self._needs = resource_needs(options, 1.0)
        # A process that has used an accelerator keeps memory there until it ends.
        self._max_calls: int = options.get("max_calls", 1 if self._needs.get("GPU") else 0)
        self._num_returns = return_count(options, function)
        self._ahead_max = 0
        self._arity = Arity(function, getattr(function, "__qualname__", str(function)))
        self._retry_exceptions = exception_names(options.get("retry_exceptions"))
        self._shared: dict[Any, Any] = {} if shared is None else shared
        """Session -> FunctionInfo; the same for all option sets of one function."""
        self._core: Core | None = None
        self._info: FunctionInfo
        self._class: ClassQueue
        self._max_retries = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        name = self._function.__name__
        raise TypeError(
            f"the remote function {name!r} cannot be called directly: use {name}.remote(...) to run it on the cluster, "
            f"or {name}.__wrapped__(...) to run it here"
        )

    def options(self, **options: Any) -> RemoteFunction[P, R]:
        """The same function with other options for the calls made through what is returned. Raises as `remote` does."""
        return RemoteFunction(self._function, {**self._options, **options}, self._shared)

    def _bind(self, core: Core) -> None:
        """First call in a session: serialises and exports the function. Raises SerializationError, ValueError."""
        info: FunctionInfo | None = self._shared.get(core.worker_id)
        if info is None:
            data, function_id = serialize_function(self._function)
            info = FunctionInfo(function_id, self._function.__qualname__)
            core.submitter.export(info, data)
            self._shared.clear()
            self._shared[core.worker_id] = info
        name = self._options.get("name")
        if self._max_calls or name:
            # What the others with this function do not share: the name in errors, and the bound.
            info = FunctionInfo(info.function_id, name or info.name)
            info.exported = True
            info.max_calls = self._max_calls
        self._info = info
        retries = self._options.get("max_retries")
        self._max_retries = core.config.task_max_retries if retries is None else retries
        if self._num_returns == STREAMING:
            self._ahead_max = items_ahead(self._options, core.config.generator_ahead_max)
        retriable = self._max_retries != 0
        environment = core.environment
        if self._options.get("runtime_env"):
            from ftray.api.packaging import environment_of

            environment = environment_of(core, self._options["runtime_env"])
        key: tuple[Any, ...] = (retriable, *sorted(self._needs.items()))
        if environment:
            key = (*key, environment)
        with core.lock:
            self._class = core.submitter.dispatcher.class_for(key, self._needs, info.name, retriable)
            self._class.environment = environment
        self._core = core

    def remote(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Runs the function on the cluster: returns its ObjectRef, a list of them for `num_returns` over 1, None for 0,
        and an ObjectRefGenerator for a generator function.

        Raises NotInitializedError, SerializationError (naming the argument), ForeignRefError, and TypeError when the
        arguments do not fit the function.
        """
        core = core_or_none()
        if core is not self._core or core is None:
            core = get_core()
            self._bind(core)
        context = current_task.get() or core.root_context
        arity = self._arity
        if kwargs or not arity.low <= len(args) <= arity.high:
            arity.check(args, kwargs)
        data, deps, holds, kept = pack(core, args, kwargs)
        count = self._num_returns
        task_id = context.prefix + context.counter().to_bytes(4, "little")
        task = TaskRecord(
            task_id, self._info, count, self._max_retries, self._retry_exceptions, holds, b"", deps, self._class,
            not self._max_retries,
        )  # fmt: skip
        if count < 0:
            task.ahead_max = self._ahead_max
        core.submitter.submit(task, data)
        if kept:
            kept.clear()
        if count == 1:
            return ObjectRef(task_id + INDEX0, core)
        if count == 0:
            return None
        if count < 0:
            return returned(core, task_id, count)
        return [ObjectRef(return_id(task_id, index), core) for index in range(count)]

    def __reduce__(self) -> tuple[Any, ...]:
        options = self._options
        if options.get("runtime_env"):
            from ftray.api.packaging import portable

            options = portable(options, core_or_none())
        return RemoteFunction, (self._function, options)

    def __repr__(self) -> str:
        return f"<remote function {self._function.__qualname__}>"


if TYPE_CHECKING:

    class RemoteGenerator(RemoteFunction[P, Iterator[T]], Generic[P, T]):
        """What a type checker makes of a remote function that is annotated as a generator."""

        def remote(self, /, *args: P.args, **kwargs: P.kwargs) -> ObjectRefGenerator[T]: ...


@overload
def remote(function: Callable[P, Iterator[T]], /) -> RemoteGenerator[P, T]: ...
@overload
def remote(function: Callable[P, R], /) -> RemoteFunction[P, R]: ...
@overload
def remote(cls: type, /) -> Any: ...
@overload
def remote(**options: Any) -> Callable[[Any], Any]: ...
def remote(*args: Any, **options: Any) -> Any:
    """Makes a function or class remote: `@ftray.remote`, or with options `@ftray.remote(num_cpus=2)`.

    Raises TypeError for what is neither, or for an unknown option; ValueError for a value out of range.
    """
    if len(args) == 1 and not options:
        return _make(args[0], {})
    if args:
        raise TypeError("use @ftray.remote, or @ftray.remote(option=value, ...): options are keywords")
    return lambda target: _make(target, options)


def _make(target: Any, options: dict[str, Any]) -> Any:
    from ftray.api.actor import ActorClass

    if isinstance(target, type):
        return ActorClass(target, options)
    if isinstance(target, RemoteFunction | ActorClass):
        raise TypeError(f"{target!r} is remote already; use .options(...) to change its options")
    if inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target):
        raise TypeError(
            f"{target.__name__} is a coroutine function, which cannot be a task: call asyncio.run() inside a plain "
            "function, or make it a method of an actor"
        )
    if not callable(target) or not hasattr(target, "__name__"):
        raise TypeError(f"@ftray.remote goes on a function or a class, not on {type(target).__name__}")
    return RemoteFunction(target, options)
