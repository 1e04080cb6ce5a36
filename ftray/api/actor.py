"""Actors: remote classes, handles, methods.

Role: shell. A handle is a counted reference to the actor's handle object (return 0 of its creation) with the names of
the methods; pickling it pickles that reference, so that handles are counted wherever they go.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import msgspec

from ftray.api.arguments import pack
from ftray.api.options import ACTOR_OPTIONS, METHOD_OPTIONS, check_options, exception_names, resource_needs
from ftray.exceptions import ActorDiedError
from ftray.gcs.state.commands import KvPut, RegisterActor
from ftray.gcs.state.tables import ActorRecord, ActorState
from ftray.ids import return_id
from ftray.ownership.calls import ActorCalls
from ftray.ownership.tasks import FunctionInfo, TaskRecord
from ftray.wire.messages import ActorCreation
from ftray.worker.actors import NONE_PICKLED
from ftray.worker.core import Core, core_or_none, current_task, get_core
from ftray.worker.gcs_access import HANDLES
from ftray.worker.objects import Answer
from ftray.worker.refs import ObjectRef, check_current
from ftray.worker.serialization import serialize_function
from ftray.worker.submit import INDEX0
from ftray.worker.waiting import INLINE, block

MethodTable = dict[str, int]
"""Method name -> num_returns."""


def method(**options: Any) -> Callable[[Any], Any]:
    """Options of an actor's method: `@ftray.method(num_returns=2)`. Raises TypeError or ValueError."""
    check_options(options, METHOD_OPTIONS, "an actor method")

    def mark(function: Any) -> Any:
        function.__ftray_method_options__ = options
        return function

    return mark


def method_table(cls: type) -> MethodTable:
    """The methods of a class, inherited ones included."""
    table = {"__ftray_ready__": 1}
    for name, member in inspect.getmembers(cls, callable):
        if not (name.startswith("__") and name.endswith("__")) or name == "__call__":
            table[name] = getattr(member, "__ftray_method_options__", {}).get("num_returns", 1)
    return table


class HandleFacts(msgspec.Struct, array_like=True):
    """What a handle made from an actor's name has to know; kept in the GCS for named actors."""

    owner_endpoint: str
    methods: MethodTable
    max_task_retries: int


class ActorClass:
    """A class whose instances live in workers of their own: `Class.remote(...)` makes one and returns its handle."""

    def __init__(self, cls: type, options: dict[str, Any], shared: dict[Any, Any] | None = None) -> None:
        self._cls = cls
        self._options = options
        self.__doc__ = cls.__doc__
        self.__name__ = cls.__name__
        self.__module__ = cls.__module__
        check_options(options, ACTOR_OPTIONS, f"the remote class {cls.__name__}")
        self._needs = resource_needs(options, 0.0)
        self._methods = method_table(cls)
        self._shared: dict[Any, Any] = {} if shared is None else shared

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        name = self._cls.__name__
        raise TypeError(f"{name} is a remote class: inherit from the plain class, and decorate the subclass")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self._cls.__name__
        raise TypeError(f"actors are not made by calling the class: use {name}.remote(...)")

    def options(self, **options: Any) -> ActorClass:
        """The same class with other options for actors made through what is returned."""
        return ActorClass(self._cls, {**self._options, **options}, self._shared)

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        """Makes an actor; returns at once. A constructor that raises shows at the first `get` on a call.

        Raises ValueError when the name is taken, SerializationError naming the argument, NotInitializedError.
        """
        core = get_core()
        options = self._options
        name = self._cls.__name__
        info: FunctionInfo | None = self._shared.get(core.worker_id)
        if info is None:
            data, class_id = serialize_function(self._cls)
            info = FunctionInfo(class_id, name)
            core.submitter.export(info, data)
            self._shared.clear()
            self._shared[core.worker_id] = info
        context = core.context()
        packed, deps, holds, kept = pack(core, args, kwargs)
        actor_id = context.prefix + context.counter().to_bytes(4, "little")
        asynchronous = _has_coroutines(self._cls)
        concurrency = options.get("max_concurrency")
        detached = options.get("lifetime") == "detached"
        loop = (options.get("event_loop") or "asyncio") if asynchronous else ""
        task_retries = options.get("max_task_retries") or 0
        actor_name = options.get("name") or ""
        namespace = options.get("namespace") or core.namespace
        creation = ActorCreation(
            task_id=actor_id,
            class_id=info.function_id,
            class_name=name,
            args=packed,
            deps=(),
            inline=(),
            max_concurrency=(1000 if asynchronous else 1) if concurrency is None else concurrency,
            max_task_retries=task_retries,
            asynchronous=loop,
            owner=core.worker_id,
            owner_endpoint=core.endpoint,
            max_restarts=options.get("max_restarts") or 0,
            name=actor_name,
        )
        register = RegisterActor(
            actor_id=actor_id,
            job_id=core.job_id,
            owner_worker_id=None if detached else core.worker_id,
            owner_node_id=core.node_id,
            class_name=name,
            name=actor_name,
            namespace=namespace,
            max_restarts=options.get("max_restarts") or 0,
            detached=detached,
            resources=self._needs,
            get_if_exists=bool(options.get("get_if_exists")),
        )
        if actor_name:
            facts = msgspec.msgpack.encode(HandleFacts(core.endpoint, self._methods, task_retries))
            with core.lock:
                core.gcs.command(KvPut(HANDLES, actor_id, facts), lambda result: None)
        made = core.actors.create(creation, register, deps, holds, wait=bool(actor_name))
        if kept:
            kept.clear()
        handle_ref: ObjectRef[Any] = ObjectRef(actor_id + INDEX0, core)
        if made != actor_id:
            with core.lock:
                core.actors.not_made(actor_id)
            return get_actor(actor_name, namespace)
        return ActorHandle(handle_ref, name, self._methods, task_retries)

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorClass, (self._cls, self._options)

    def __repr__(self) -> str:
        return f"<remote class {self._cls.__qualname__}>"


def _has_coroutines(cls: type) -> bool:
    return any(inspect.iscoroutinefunction(member) for _, member in inspect.getmembers(cls, callable))


class ActorHandle:
    """A way to an actor: `handle.method.remote(...)`. May be passed to tasks and other actors."""

    def __init__(self, ref: ObjectRef[Any], class_name: str, methods: MethodTable, max_task_retries: int) -> None:
        self._ftray_ref = ref
        self._ftray_class_name = class_name
        self._ftray_methods = methods
        self._ftray_retries = max_task_retries
        core = ref._core
        self._ftray_core = core
        self._ftray_infos: dict[str, FunctionInfo] = {}
        with core.lock:
            self._ftray_calls: ActorCalls = core.actors.watch(ref._id[:16], class_name)
            core.settle()

    @property
    def _actor_id(self) -> str:
        return self._ftray_ref._id[:16].hex()

    def __getattr__(self, name: str) -> ActorMethod:
        if name.startswith("_ftray"):
            raise AttributeError(name)
        num_returns = self._ftray_methods.get(name)
        if num_returns is None:
            raise AttributeError(f"actor {self._ftray_class_name} has no method {name!r}")
        return ActorMethod(self, name, num_returns, self._ftray_retries, False)

    def __ftray_ready__(self) -> ObjectRef[Any]:
        """A reference that is ready once the actor is alive, or failed when it cannot be."""
        ref: ObjectRef[Any] = ActorMethod(self, "__ftray_ready__", 1, self._ftray_retries, False).remote()
        return ref

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorHandle, (self._ftray_ref, self._ftray_class_name, self._ftray_methods, self._ftray_retries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other._ftray_ref._id[:16] == self._ftray_ref._id[:16]

    def __hash__(self) -> int:
        return hash(self._ftray_ref._id[:16])

    def __repr__(self) -> str:
        return f"Actor({self._ftray_class_name}, {self._actor_id})"


class ActorMethod:
    """One method of one actor."""

    __slots__ = ("_handle", "_name", "_num_returns", "_retries", "_retry_exceptions")

    def __init__(self, handle: ActorHandle, name: str, num_returns: int, retries: int, retry_exceptions: Any) -> None:
        self._handle = handle
        self._name = name
        self._num_returns = num_returns
        self._retries = retries
        self._retry_exceptions = retry_exceptions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"actor methods are not called directly: use {self._name}.remote(...)")

    def options(self, **options: Any) -> ActorMethod:
        """The same method with other options. Raises TypeError or ValueError."""
        check_options(options, METHOD_OPTIONS, f"the method {self._name}")
        return ActorMethod(
            self._handle,
            self._name,
            options.get("num_returns", self._num_returns),
            options.get("max_task_retries", self._retries),
            exception_names(options["retry_exceptions"]) if "retry_exceptions" in options else self._retry_exceptions,
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method; returns its ObjectRef (a list for `num_returns` over 1).

        Raises NotInitializedError, ForeignRefError, SerializationError naming the argument.
        """
        handle = self._handle
        core: Core = handle._ftray_core
        if core is not core_or_none():
            check_current(handle._ftray_ref)
        name = self._name
        info = handle._ftray_infos.get(name)
        if info is None:
            info = handle._ftray_infos[name] = FunctionInfo(b"", f"{handle._ftray_class_name}.{name}")
        context = current_task.get() or core.root_context
        data, deps, holds, kept = pack(core, args, kwargs)
        count = self._num_returns
        task_id = context.prefix + context.counter().to_bytes(4, "little")
        task = TaskRecord(
            task_id, info, count, self._retries, self._retry_exceptions, (*holds, handle._ftray_ref._id), b"", deps
        )
        task.method = name
        core.actors.submit(handle._ftray_calls, task, data)
        if kept:
            kept.clear()
        if count == 1:
            return ObjectRef(task_id + INDEX0, core)
        if count == 0:
            return None
        return [ObjectRef(return_id(task_id, index), core) for index in range(count)]


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """The handle of a named actor. Raises ValueError when no live actor has the name."""
    core = get_core()
    if not isinstance(name, str) or not name:
        raise ValueError("get_actor takes the name of an actor")
    wanted = core.namespace if namespace is None else namespace
    for record in _actor_records(core):
        if record.name == name and record.namespace == wanted and record.state != ActorState.DEAD:
            return _handle_of(core, record)
    raise ValueError(f"no live actor is named {name!r} in namespace {wanted!r}")


def _handle_of(core: Core, record: ActorRecord) -> ActorHandle:
    answer = Answer()
    with core.lock:
        core.gcs.read_kv(HANDLES, record.actor_id, answer.give)
        core.settle()
    block(core.reactor, answer.waiter, None)
    if answer.message is None:
        raise ValueError(f"actor {record.name!r} has just ended")
    facts = msgspec.msgpack.decode(answer.message, type=HandleFacts)
    object_id = record.actor_id + INDEX0
    with core.lock:
        if record.owner_worker_id is None or record.owner_worker_id == core.worker_id:
            entry = core.table.add_owned(object_id)
            entry.state = INLINE
            entry.value = NONE_PICKLED
        else:
            core.table.add_borrowed(object_id, record.owner_worker_id, facts.owner_endpoint).local += 1
            core.table.register(object_id)
        core.settle()
    return ActorHandle(ObjectRef(object_id, core), record.class_name, facts.methods, facts.max_task_retries)


def list_named_actors(all_namespaces: bool = False) -> list[Any]:
    """Names of live named actors in this namespace; dicts with `name` and `namespace` for all namespaces."""
    core = get_core()
    live = [r for r in _actor_records(core) if r.name and r.state != ActorState.DEAD]
    if all_namespaces:
        return [{"name": r.name, "namespace": r.namespace} for r in live]
    return [r.name for r in live if r.namespace == core.namespace]


def _actor_records(core: Core) -> list[ActorRecord]:
    answer = Answer()
    with core.lock:
        core.gcs.actors(answer.give)
        core.settle()
    block(core.reactor, answer.waiter, None)
    core.check_open()
    if answer.message is None:
        raise ActorDiedError("no GCS answers")
    return list(answer.message)


def kill(actor: ActorHandle, *, no_restart: bool = True) -> None:
    """Ends an actor at once, without letting it finish its calls; with `no_restart=False` it restarts if it may.

    Raises TypeError for what is no handle.
    """
    if not isinstance(actor, ActorHandle):
        raise TypeError(f"ftray.kill takes an actor handle, not {type(actor).__name__}")
    check_current(actor._ftray_ref)
    get_core().actors.kill(actor._ftray_ref._id[:16], no_restart)


def exit_actor() -> None:
    """Ends the actor that calls this, after the present call. It is not restarted. Raises RuntimeError elsewhere."""
    from ftray.exceptions import ActorExit

    core = get_core()
    if core.executor is None or core.executor.actor is None:
        raise RuntimeError("exit_actor is for methods of actors")
    raise ActorExit
