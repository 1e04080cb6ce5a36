"""Actors: remote classes, handles, methods.

Role: shell. A handle is a counted reference to the actor's handle object (return 0 of its creation) with what has to be
known of the actor (`actor_facts.py`); pickling it pickles that reference, so that handles are counted wherever they go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ftray.api.actor_facts import (
    HandleFacts,
    MethodFacts,
    NamedFacts,
    check_groups,
    has_coroutines,
    method_table,
    out_of_order,
    unknown_group,
)
from ftray.api.arguments import pack
from ftray.api.generators import returned
from ftray.api.options import (
    ACTOR_OPTIONS,
    METHOD_OPTIONS,
    check_options,
    exception_names,
    items_ahead,
    resource_needs,
    return_count,
)
from ftray.api.signatures import Arity
from ftray.exceptions import ActorDiedError, ActorExit, GetTimeoutError
from ftray.gcs.state.commands import JobKvPut, RegisterActor
from ftray.gcs.state.tables import ActorRecord, ActorState
from ftray.ids import return_id
from ftray.ownership.calls import ActorCalls
from ftray.ownership.tasks import FunctionInfo, TaskRecord
from ftray.wire.messages import ActorCreation
from ftray.worker.actor_creation import NONE_PICKLED
from ftray.worker.core import Core, core_or_none, current_task, get_core
from ftray.worker.gcs_access import HANDLES, wait_for_gcs
from ftray.worker.objects import Answer
from ftray.worker.refs import ObjectRef, check_current
from ftray.worker.serialization import serialize_function
from ftray.worker.submit import INDEX0
from ftray.worker.waiting import FAILED, INLINE

HELD_WAIT_S = 1.0


def method(**options: Any) -> Callable[[Any], Any]:
    """Options of an actor's method: `@ftray.method(num_returns=2)`. Raises TypeError or ValueError."""
    check_options(options, METHOD_OPTIONS, "an actor method")

    def mark(function: Any) -> Any:
        function.__ftray_method_options__ = options
        return function

    return mark


class ActorClass:
    """A class whose instances live in workers of their own: `Class.remote(...)` makes one and returns its handle."""

    def __init__(self, cls: type, options: dict[str, Any], shared: dict[Any, Any] | None = None) -> None:
        self._cls = cls
        self._options = options
        self.__doc__ = cls.__doc__
        self.__name__ = cls.__name__
        self.__module__ = cls.__module__
        check_options(options, ACTOR_OPTIONS, f"the remote class {cls.__name__}")
        if options.get("get_if_exists") and not options.get("name"):
            raise ValueError(f"get_if_exists=True of the remote class {cls.__name__} needs a name by which to look")
        self._needs = resource_needs(options, 0.0)
        self._asynchronous = has_coroutines(cls)
        self._groups: dict[str, int] = dict(options.get("concurrency_groups") or {})
        pending_max = options.get("max_pending_calls")
        self._facts = HandleFacts(
            class_name=cls.__name__,
            methods=method_table(cls),
            max_task_retries=options.get("max_task_retries") or 0,
            max_pending_calls=-1 if pending_max is None else pending_max,
            groups=tuple(self._groups),
            out_of_order=out_of_order(options, self._asynchronous, cls.__name__),
        )
        if self._groups:
            check_groups(cls.__name__, self._facts.methods, self._groups)
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

        Raises ValueError when the name is taken or a method names a concurrency group that there is not,
        SerializationError naming the argument, NotInitializedError, TypeError when the arguments do not fit.
        """
        core = get_core()
        options = self._options
        facts = self._facts
        check_groups(facts.class_name, facts.methods, self._groups)
        Arity(self._cls, facts.class_name).check(args, kwargs)
        info = self._exported(core)
        packed, deps, holds, kept = pack(core, args, kwargs)
        context = core.context()
        name = options.get("name") or ""
        namespace = options.get("namespace") or core.namespace
        while True:
            actor_id = context.prefix + context.counter().to_bytes(4, "little")
            creation, register = self._specs(core, actor_id, info, packed)
            if name:
                named = msgspec.msgpack.encode(NamedFacts(core.endpoint, facts))
                with core.lock:
                    core.gcs.command(JobKvPut(core.job_id, HANDLES, actor_id, named), lambda result: None)
            made = core.actors.creation.create(creation, register, deps, holds, wait=bool(name))
            handle_ref: ObjectRef[Any] = ObjectRef(actor_id + INDEX0, core)
            if made == actor_id:
                break
            with core.lock:
                core.actors.creation.not_made(actor_id)
                core.settle()
            found = _find(core, name, namespace)
            if found is not None:
                return found
            # The actor that had the name has ended in between: once more, and this time it may be made here.
        if kept:
            kept.clear()
        return ActorHandle(handle_ref, facts)

    def _exported(self, core: Core) -> FunctionInfo:
        info: FunctionInfo | None = self._shared.get(core.worker_id)
        if info is None:
            data, class_id = serialize_function(self._cls)
            info = FunctionInfo(class_id, self._cls.__name__)
            core.submitter.export(info, data)
            self._shared.clear()
            self._shared[core.worker_id] = info
        return info

    def _specs(
        self, core: Core, actor_id: bytes, info: FunctionInfo, packed: bytes
    ) -> tuple[ActorCreation, RegisterActor]:
        options = self._options
        facts = self._facts
        concurrency = options.get("max_concurrency")
        detached = options.get("lifetime") == "detached"
        max_restarts = options.get("max_restarts") or 0
        name = options.get("name") or ""
        environment = core.environment
        if options.get("runtime_env"):
            from ftray.api.packaging import environment_of

            environment = environment_of(core, options["runtime_env"])
        creation = ActorCreation(
            task_id=actor_id,
            class_id=info.function_id,
            class_name=facts.class_name,
            args=packed,
            deps=(),
            inline=(),
            max_concurrency=(1000 if self._asynchronous else 1) if concurrency is None else concurrency,
            max_task_retries=facts.max_task_retries,
            asynchronous=(options.get("event_loop") or "asyncio") if self._asynchronous else "",
            owner=core.worker_id,
            owner_endpoint=core.endpoint,
            max_restarts=max_restarts,
            name=name,
            concurrency_groups=self._groups,
            out_of_order=facts.out_of_order,
            environment=environment,
        )
        register = RegisterActor(
            actor_id=actor_id,
            job_id=core.job_id,
            owner_worker_id=None if detached else core.worker_id,
            owner_node_id=core.node_id,
            class_name=facts.class_name,
            name=name,
            namespace=options.get("namespace") or core.namespace,
            max_restarts=max_restarts,
            detached=detached,
            resources=self._needs,
            get_if_exists=bool(options.get("get_if_exists")),
        )
        return creation, register

    def __reduce__(self) -> tuple[Any, ...]:
        options = self._options
        if options.get("runtime_env"):
            from ftray.api.packaging import portable

            options = portable(options, core_or_none())
        return ActorClass, (self._cls, options)

    def __repr__(self) -> str:
        return f"<remote class {self._cls.__qualname__}>"


class _Method:
    """One method of one actor with the options of its calls: what `ActorMethod` objects share."""

    __slots__ = ("ahead_max", "group", "info", "name", "num_returns", "retries", "retry_exceptions")

    def __init__(self, name: str, facts: MethodFacts, of: HandleFacts, core: Core) -> None:
        self.name = name
        self.info = FunctionInfo(b"", facts.name or f"{of.class_name}.{name}")
        self.num_returns = facts.num_returns
        self.retries = of.max_task_retries if facts.max_task_retries is None else facts.max_task_retries
        self.retry_exceptions: Any = facts.retry_exceptions
        self.group = facts.group
        self.ahead_max = core.config.generator_ahead_max if facts.ahead_max is None else facts.ahead_max

    def with_options(self, options: dict[str, Any]) -> _Method:
        """The same with some options replaced."""
        new = _Method.__new__(_Method)
        new.name = self.name
        new.info = FunctionInfo(b"", options["name"]) if options.get("name") else self.info
        count = options.get("num_returns")
        new.num_returns = self.num_returns if count is None else return_count(options, None)
        retries = options.get("max_task_retries")
        new.retries = self.retries if retries is None else retries
        new.retry_exceptions = self.retry_exceptions
        if "retry_exceptions" in options:
            new.retry_exceptions = exception_names(options["retry_exceptions"])
        new.group = options.get("concurrency_group") or self.group
        new.ahead_max = items_ahead(options, self.ahead_max)
        return new


class ActorHandle:
    """A way to an actor: `handle.method.remote(...)`. May be passed to tasks and other actors."""

    _ftray_methods: dict[str, _Method] = {}
    """Methods that have been called; of the class only for a handle that was made without `__init__`."""

    def __init__(self, ref: ObjectRef[Any], facts: HandleFacts) -> None:
        self._ftray_ref = ref
        self._ftray_facts = facts
        core = ref._core
        self._ftray_core = core
        self._ftray_methods = {}
        with core.lock:
            self._ftray_calls: ActorCalls = core.actors.watch(ref._id[:16], facts.class_name)
            self._ftray_calls.out_of_order = facts.out_of_order
            self._ftray_calls.pending_max = facts.max_pending_calls
            core.settle()

    @property
    def _actor_id(self) -> str:
        return self._ftray_ref._id[:16].hex()

    def __getattr__(self, name: str) -> ActorMethod:
        found = self._ftray_methods.get(name)
        if found is not None:
            return ActorMethod(self, found)
        if name.startswith("_ftray"):
            raise AttributeError(name)
        facts = self._ftray_facts.methods.get(name)
        if facts is None:
            raise AttributeError(f"actor {self._ftray_facts.class_name} has no method {name!r}")
        found = self._ftray_methods[name] = _Method(name, facts, self._ftray_facts, self._ftray_core)
        return ActorMethod(self, found)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._ftray_facts.methods})

    def __ftray_ready__(self) -> ObjectRef[Any]:
        """A reference that is ready once the actor is alive, or failed when it cannot be."""
        found = _Method("__ftray_ready__", MethodFacts(), self._ftray_facts, self._ftray_core)
        ref: ObjectRef[Any] = ActorMethod(self, found).remote()
        return ref

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_handle, (self._ftray_ref, msgspec.msgpack.encode(self._ftray_facts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other._ftray_ref._id[:16] == self._ftray_ref._id[:16]

    def __hash__(self) -> int:
        return hash(self._ftray_ref._id[:16])

    def __repr__(self) -> str:
        return f"Actor({self._ftray_facts.class_name}, {self._actor_id})"


def _load_handle(ref: ObjectRef[Any], facts: bytes) -> ActorHandle:
    return ActorHandle(ref, msgspec.msgpack.decode(facts, type=HandleFacts))


class ActorMethod:
    """One method of one actor."""

    __slots__ = ("_handle", "_method")

    def __init__(self, handle: ActorHandle, method: _Method) -> None:
        self._handle = handle
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"actor methods are not called directly: use {self._method.name}.remote(...)")

    def options(self, **options: Any) -> ActorMethod:
        """The same method with other options. Raises TypeError, or ValueError (also for an unknown group)."""
        check_options(options, METHOD_OPTIONS, f"the method {self._method.name}")
        facts = self._handle._ftray_facts
        group = options.get("concurrency_group")
        if group is not None and group not in facts.groups:
            raise unknown_group(group, f"{facts.class_name}.{self._method.name}", facts.groups)
        return ActorMethod(self._handle, self._method.with_options(options))

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method; returns its ObjectRef (a list for `num_returns` over 1, an ObjectRefGenerator for a
        generator).

        Raises NotInitializedError, ForeignRefError, PendingCallsLimitExceeded, SerializationError naming the argument.
        """
        handle = self._handle
        core: Core = handle._ftray_core
        if core is not core_or_none():
            check_current(handle._ftray_ref)
        method = self._method
        context = current_task.get() or core.root_context
        data, deps, holds, kept = pack(core, args, kwargs)
        count = method.num_returns
        task_id = context.prefix + context.counter().to_bytes(4, "little")
        task = TaskRecord(
            task_id, method.info, count, method.retries, method.retry_exceptions, (*holds, handle._ftray_ref._id),
            b"", deps,
        )  # fmt: skip
        task.method = method.name
        if method.group:
            task.group = method.group
        if count < 0:
            task.ahead_max = method.ahead_max
        core.actors.submit(handle._ftray_calls, task, data)
        if kept:
            kept.clear()
        if count == 1:
            return ObjectRef(task_id + INDEX0, core)
        if count == 0:
            return None
        if count < 0:
            return returned(core, task_id, count)
        return [ObjectRef(return_id(task_id, index), core) for index in range(count)]


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """The handle of a named actor. Raises ValueError when no live actor has the name."""
    core = get_core()
    if not isinstance(name, str) or not name:
        raise ValueError("get_actor takes the name of an actor")
    wanted = core.namespace if namespace is None else namespace
    found = _find(core, name, wanted)
    if found is None:
        raise ValueError(f"no live actor is named {name!r} in namespace {wanted!r}")
    return found


def _find(core: Core, name: str, namespace: str) -> ActorHandle | None:
    """The live actor of that name; None also when it has just ended, or is about to for want of handles."""
    answer = Answer()
    with core.lock:
        core.gcs.named_actor(namespace, name, answer.give)
        core.settle()
    wait_for_gcs(core, answer, f"looking for actor {name!r}")
    core.check_open()
    return None if answer.message is None else _handle_of(core, answer.message)


def _handle_of(core: Core, record: ActorRecord) -> ActorHandle | None:
    answer = Answer()
    with core.lock:
        core.gcs.read_kv(HANDLES, record.actor_id, answer.give)
        core.settle()
    wait_for_gcs(core, answer, f"looking for actor {record.name!r}")
    core.check_open()
    if answer.message is None:
        return None
    named = msgspec.msgpack.decode(answer.message, type=NamedFacts)
    handle = _new_handle(core, record, named.owner_endpoint, named.facts)
    return handle if _is_held(core, handle._ftray_ref) else None


def _is_held(core: Core, ref: ObjectRef[Any]) -> bool:
    """Whether a new handle keeps its actor alive: the owner has counted it before the last other one went. Where the
    owner is too busy to say so soon, the GCS's word is enough."""
    try:
        core.objects.wait_ready((ref,), HELD_WAIT_S)
    except GetTimeoutError:
        return True
    entry = core.entries.get(ref._id)
    return entry is not None and entry.state != FAILED


def _new_handle(core: Core, record: ActorRecord, owner_endpoint: str, facts: HandleFacts) -> ActorHandle:
    object_id = record.actor_id + INDEX0
    with core.lock:
        if record.owner_worker_id is None or record.owner_worker_id == core.worker_id:
            entry = core.table.add_owned(object_id)
            entry.state = INLINE
            entry.value = NONE_PICKLED
        else:
            core.table.add_borrowed(object_id, record.owner_worker_id, owner_endpoint).local += 1
            core.table.register(object_id)
        core.settle()
    return ActorHandle(ObjectRef(object_id, core), facts)


def current_actor(core: Core) -> ActorHandle:
    """A handle of the actor that runs in this process. Raises RuntimeError when there is none."""
    executor = core.executor
    creation = executor.creation if executor is not None else None
    if executor is None or creation is None:
        raise RuntimeError("current_actor is for methods of actors")
    facts = HandleFacts(
        creation.class_name, method_table(executor.function(creation.class_id)), creation.max_task_retries,
        groups=tuple(creation.concurrency_groups), out_of_order=creation.out_of_order,
    )  # fmt: skip
    answer = Answer()
    with core.lock:
        core.gcs.actor(executor.actor_id, answer.give)
        core.settle()
    wait_for_gcs(core, answer, "current_actor")
    core.check_open()
    if answer.message is None:
        raise RuntimeError("the GCS does not know this actor any more")
    return _new_handle(core, answer.message, creation.owner_endpoint, facts)


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
    wait_for_gcs(core, answer, "list_named_actors()")
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
    """Ends the actor that calls this, now: what it has not answered fails with ActorDiedError. It is not restarted.

    In an async actor any coroutine may call it, also one that no call waits for. Raises RuntimeError outside of actors.
    """
    executor = get_core().executor
    if executor is None or executor.actor is None:
        raise RuntimeError("exit_actor is for methods of actors")
    executor.exiting = executor.exiting or "exit_actor was called"
    executor.wake()
    raise ActorExit
