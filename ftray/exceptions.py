"""The errors a program can meet, each with when it is raised and what to do.

Role: leaf. One hierarchy under `FtrayError`; where the language has a type for the same thing (`TimeoutError`,
`ConnectionError`, `RuntimeError`, `TypeError`) the error is an instance of that too. Errors that stem from a death
carry a `DeathCause`, so that nobody has to search logs for who died where of what. Ray's names are aliases at the end.

Rules: every class can be made without arguments and survives pickling with all its attributes, because rebuilding does
not run `__init__` (`_rebuild`). The docstring of a class is its message, so that the two can't differ. Identifiers in
errors are hex strings: errors are for people.

Rejected: error codes (types say it already); one `__reduce__` per class (forgotten in the next class that is added).
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from signal import Signals
from typing import Any, ClassVar, cast
from weakref import WeakValueDictionary

_HEAP_TYPE = 1 << 9  # in `type.__flags__` of classes made by a class statement, as opposed to those written in C


def _short(identifier: str) -> str:
    return identifier[:12]


def _sentence(text: str) -> str:
    text = text.strip()
    return text if not text or text[-1] in ".!?:" else text + "."


def _rebuild(
    cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any], cause: BaseException | None = None
) -> BaseException:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    if cause is not None:
        error.__cause__ = cause
    return error


class FtrayError(Exception):
    """Base of all errors of ftray. Catch it to tell the runtime's failures from your own code's."""

    says: ClassVar[str] = "ftray failed"
    """When it is raised and what to do: the first paragraph of the class's docstring, shown in the message."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        doc = cls.__dict__.get("__doc__") or cls.__name__  # no docstrings under `python -OO`
        cls.says = " ".join(doc.partition("\n\n")[0].split())

    def __init__(self, message: str = "") -> None:
        super().__init__(message or self.says)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


# --- how something died ---------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class DeathCause:
    """How a process died. `exit_code` and `signal` are None when unknown; `what` is the task or actor method it ran."""

    node_id: str = ""
    """Hex."""
    pid: int = 0
    worker_id: str = ""
    """Hex."""
    exit_code: int | None = None
    signal: int | None = None
    what: str = ""
    stderr_tail: Sequence[str] = ()
    """The last lines it wrote to stderr, oldest first; kept as a tuple."""
    reason: str = ""
    """What the runtime knows beyond the process's status, such as "killed by the memory monitor"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stderr_tail", tuple(self.stderr_tail))

    def signal_name(self) -> str:
        """`SIGKILL` for 9; `signal 99` for a number without a name; empty when no signal is known."""
        if self.signal is None:
            return ""
        try:
            return Signals(self.signal).name
        except ValueError:
            return f"signal {self.signal}"

    def describe(self, who: str = "worker") -> str:
        """Who, where, how, doing what, and its last words; one sentence, then the lines of stderr."""
        who += f" {_short(self.worker_id)}" if self.worker_id else ""
        who += f" (pid {self.pid})" if self.pid else ""
        who += f" on node {_short(self.node_id)}" if self.node_id else ""
        if self.signal is not None:
            how = f"was killed by {self.signal_name()}"
        elif self.exit_code is not None:
            how = f"exited with code {self.exit_code}"
        else:
            how = "died"
        doing = f" while running {self.what}" if self.what else ""
        text = _sentence(f"{who} {how}{doing}" + (f": {self.reason}" if self.reason else ""))
        if self.stderr_tail:
            text += "\n  Last lines of its stderr:\n" + "\n".join(f"    {line}" for line in self.stderr_tail)
        return text

    def advice(self) -> str:
        """What to do about such a death; empty when its kind says nothing."""
        name = self.signal_name()
        if name == "SIGKILL" and not self.reason:
            return "SIGKILL comes from outside, often from the kernel's out-of-memory killer: see `dmesg`."
        if name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE"):
            return f"{name} is a crash in native code: `faulthandler` shows the place."
        if self.exit_code is not None and self.signal is None:
            return "The process ended by itself: look for `sys.exit`, `os._exit` or a fatal error in what it ran."
        return ""


class _DeathError(FtrayError):
    """Base of errors that stem from a process's death."""

    who: ClassVar[str] = "worker"

    def __init__(self, cause: DeathCause | str | None = None) -> None:
        self.death = cause if isinstance(cause, DeathCause) else None
        self.reason = cause if isinstance(cause, str) else ""
        lines = [_sentence(self.reason), self.says]
        if self.death is not None:
            lines = [f"The {self.death.describe(self.who)}", self.death.advice(), self.says]
        super().__init__("\n".join(line for line in lines if line))


class WorkerCrashedError(_DeathError):
    """The worker died while it ran the task. If the cause may pass, allow the task more `max_retries`.

    Attributes, as of all errors of death: `death` is the cause when known, `reason` a text when it is not.
    """


class OutOfMemoryError(_DeathError):
    """The node ran short of memory, and the worker was killed to save it. Ask for `memory=`, or run fewer at a time."""


class NodeDiedError(_DeathError):
    """The node is dead. `ftray status` shows those that live; tasks are retried there while `max_retries` allow it."""

    who = "node process"


class LocalRayletDiedError(NodeDiedError):
    """The node process of this machine is dead; its log says why. Call `ftray.shutdown()`, then `ftray.init()` anew."""


# --- tasks ----------------------------------------------------------------------------------------------------------


class TaskError(FtrayError):
    """A task or actor method raised. Fix what the remote traceback shows, or allow retries with `retry_exceptions=`.

    Attributes: `function_name`; `traceback_str`, the traceback in the worker; `cause`, the exception that was raised
    (chained as `__cause__` too), None when unknown; `pid`; `node_id` (hex). What `get` raises is an instance of the
    user's exception type too, see `as_instance_of_cause`.
    """

    def __init__(
        self, function_name: str = "", traceback_str: str = "", cause: BaseException | None = None,
        pid: int = 0, node_id: str = "",
    ) -> None:
        super().__init__(f"{function_name or 'a task'} failed")
        self.function_name, self.traceback_str, self.cause = function_name, traceback_str, cause
        self.pid, self.node_id = pid, node_id
        self.__cause__ = cause

    def __str__(self) -> str:
        own = TaskError._fields(self)
        name, text = own.get("function_name"), own.get("traceback_str", "")
        places = [f"pid {own['pid']}"] if own.get("pid") else []
        places += [f"node {_short(own['node_id'])}"] if own.get("node_id") else []
        head = f"{name or 'a task'} failed" + (f" ({', '.join(places)})" if places else "")
        return head + (f", remote traceback:\n{text.rstrip()}" if text else "")

    @staticmethod
    def _fields(error: BaseException) -> dict[str, Any]:
        # Read past whatever attribute access the user's type, mixed into a subclass, has defined.
        fields: dict[str, Any] = BaseException.__getattribute__(error, "__dict__")
        return fields

    def as_instance_of_cause(self) -> TaskError:
        """The same error as an instance of the cause's type too, so that `except ValueError` catches it; or `self`.

        It is `self` when there is no cause, or its type can't be mixed in: types that can't be subclassed, and those
        whose raising steers the interpreter (`SystemExit`, `KeyboardInterrupt`, `StopIteration`, cancellation), which
        would end the caller silently. It has the cause's `args`, and its other attributes are read from the cause.
        """
        cause = self.cause
        if cause is None or type(self) is not TaskError:
            return self
        try:
            return _make_dual(self, cause)
        except Exception:  # whatever the user's class does at subclassing: the plain error is always right
            return self

    def __reduce__(self) -> tuple[Any, ...]:
        state = TaskError._fields(self)
        if _DUAL_MARK in type(self).__dict__:
            return _rebuild_dual, (self.args, state)
        return _rebuild, (type(self), self.args, state, self.cause)


_DUAL_MARK = "_ftray_dual"
_duals: WeakValueDictionary[type, type[TaskError]] = WeakValueDictionary()
"""Cause type -> class of both. Weak, since a by-value class of a user's `__main__` must be able to go."""


def _rebuild_dual(args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error: Any = _rebuild(TaskError, args, state, state["cause"])
    return cast(BaseException, error.as_instance_of_cause())


def solid_base(cls: type) -> type:
    """The nearest base of `cls` that is written in C: it decides the memory layout, and how an instance is made."""
    return next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)


def _read_from_cause(self: TaskError, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(TaskError._fields(self)["cause"], name)


def _dual_class(cause_type: type[BaseException]) -> type[TaskError]:
    dual = _duals.get(cause_type)
    if dual is None:
        name = f"TaskError({cause_type.__name__})"
        namespace = {_DUAL_MARK: True, "__getattr__": _read_from_cause, "__module__": __name__, "__qualname__": name}
        namespace["__doc__"] = f"A task raised {cause_type.__name__}: see TaskError."
        made = types.new_class(name, (TaskError, cause_type), {}, lambda body: body.update(namespace))
        dual = _duals[cause_type] = made
    return dual


def _make_dual(error: TaskError, cause: BaseException) -> TaskError:
    cause_type: type[BaseException] = type(cause)
    if _DUAL_MARK in cause_type.__dict__:  # a task failed because one it waited for did: keep the user's innermost type
        cause_type = cause_type.__bases__[1]
    never = (TaskError, UnserializableException, StopIteration, StopAsyncIteration)
    if not issubclass(cause_type, Exception) or issubclass(cause_type, never):
        return error
    dual_type = _dual_class(cause_type)
    base: Any = solid_base(cause_type)
    args = base.__reduce__(cause)[1]
    dual: TaskError = base.__new__(dual_type, *args)
    base.__init__(dual, *args)
    dual.args = cause.args
    for klass in cause_type.__mro__:  # fields of C types (`errno`, `filename`) and `__slots__` are not in `__dict__`
        for name, descriptor in vars(klass).items():
            if name[:2] != "__" and isinstance(descriptor, types.MemberDescriptorType | types.GetSetDescriptorType):
                try:
                    descriptor.__set__(dual, descriptor.__get__(cause))
                except (AttributeError, TypeError):
                    pass  # unset in the cause, or read-only and set by the constructor already
    fields = TaskError._fields(dual)
    fields.update(TaskError._fields(error))
    if hasattr(cause, "__notes__"):
        fields["__notes__"] = cause.__notes__
    BaseException.__setattr__(dual, "__cause__", cause)
    return dual


class UnserializableException(FtrayError):
    """Stands in for an exception that could not be carried between processes. Make its type importable and picklable.

    Attributes: `type_name`, `message` (its `str`), `traceback_str`, `why` it could not be carried.
    """

    def __init__(self, type_name: str = "Exception", message: str = "", traceback_str: str = "", why: str = "") -> None:
        self.type_name, self.message, self.traceback_str, self.why = type_name, message, traceback_str, why
        text = type_name + (f": {message}" if message else "")
        super().__init__(text + (f" (shown by name, since it could not be carried over: {why})" if why else ""))


class TaskCancelledError(FtrayError):
    """The task was cancelled by `ftray.cancel`, or its parent was, recursively. Submit it again if it is still wanted.

    Attributes: `task_id` (hex), `name` of the function.
    """

    def __init__(self, task_id: str = "", name: str = "") -> None:
        self.task_id, self.name = task_id, name
        what = f"task {name} " if name else "the task "
        super().__init__(what + (f"({_short(task_id)}) " if task_id else "") + "was cancelled")


class TaskUnschedulableError(FtrayError):
    """No node of the cluster can run the task. Correct its resources or strategy, or add nodes that fit."""


class TaskPlacementGroupRemoved(FtrayError):
    """The placement group of the task was removed. Keep the group until its tasks are done."""


class RuntimeEnvSetupError(FtrayError):
    """The `runtime_env` could not be set up on the node. Correct the step that the message names."""


class PendingCallsLimitExceeded(FtrayError):
    """The actor has `max_pending_calls` calls waiting. Get some of the results before calling on."""


# --- actors ---------------------------------------------------------------------------------------------------------


class ActorError(FtrayError):
    """The actor failed. Read the reason in the message.

    Attributes, as of all actor errors: `actor_id` (hex), `class_name`, `reason`.
    """

    def __init__(self, reason: str = "", *, actor_id: str = "", class_name: str = "") -> None:
        self.reason, self.actor_id, self.class_name = reason, actor_id, class_name
        text = ": ".join(part for part in (self.who() if actor_id or class_name else "", reason) if part)
        super().__init__(f"{_sentence(text)} {self.says}" if text else "")

    def who(self) -> str:
        """The actor by class and id."""
        name = f"actor {self.class_name}" if self.class_name else "actor"
        return name + (f" ({_short(self.actor_id)})" if self.actor_id else "")


class ActorDiedError(ActorError):
    """The actor is dead. With `max_restarts` an actor comes back; with `max_task_retries` its calls are repeated.

    Attributes: `death` (DeathCause) when its process died, `init_error` (TaskError) when its constructor raised.
    """

    def __init__(
        self, cause: DeathCause | TaskError | str | None = None, *, actor_id: str = "", class_name: str = ""
    ) -> None:
        super().__init__(cause if isinstance(cause, str) else "", actor_id=actor_id, class_name=class_name)
        self.death = cause if isinstance(cause, DeathCause) else None
        self.init_error = cause if isinstance(cause, TaskError) else None
        if self.death is not None:
            lines = [f"The {self.who()} is dead. Its {self.death.describe()}", self.death.advice(), self.says]
            self.args = ("\n".join(line for line in lines if line),)
        elif self.init_error is not None:
            self.__cause__ = self.init_error
            self.args = (f"The {self.who()} is dead: its constructor raised.\n{self.init_error}",)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__, self.init_error)


class ActorUnavailableError(ActorError):
    """The actor can't be reached for now; the call may have run. Repeat it, or allow the actor `max_task_retries`."""


class ActorUnschedulableError(ActorError):
    """No node of the cluster can host the actor. Correct its resources or strategy, or add nodes that fit."""


class ActorPlacementGroupRemoved(ActorError):
    """The placement group of the actor was removed. Keep the group for as long as the actor."""


class ActorExit(BaseException):
    """Raised by `exit_actor` to leave the method and end the actor. No error: let it pass.

    Not an Exception, so that `except Exception` in a method does not keep the actor alive by accident.
    """


# --- objects --------------------------------------------------------------------------------------------------------


class ObjectLostError(FtrayError):
    """All copies of the object are gone. Results are made again while `max_retries` allow it; `put` other objects anew.

    Attributes, as of all object errors: `object_id`, `owner` (a worker id), `node_id` (all hex), `reason`, and `death`
    (DeathCause) of the process that held or owned it, when known.
    """

    def __init__(
        self, object_id: str = "", reason: str = "", *, owner: str = "", node_id: str = "",
        death: DeathCause | None = None,
    ) -> None:
        self.object_id, self.reason, self.owner, self.node_id, self.death = object_id, reason, owner, node_id, death
        places = [f"owner {_short(owner)}"] if owner else []
        places += [f"node {_short(node_id)}"] if node_id else []
        what = f"object {object_id}".strip() + (f" ({', '.join(places)})" if places else "")
        lines = [_sentence(": ".join(part for part in (what if what != "object" else "", reason) if part))]
        lines += [f"The {death.describe()}" if death is not None else "", self.says]
        super().__init__("\n".join(line for line in lines if line))


class ObjectFreedError(ObjectLostError):
    """The object was freed. Keep an ObjectRef of it for as long as the value is needed."""


class OwnerDiedError(ObjectLostError):
    """The process that made the object died, and the object with it. Make it in the driver or a longer-lived actor."""


class ObjectFetchTimedOutError(ObjectLostError):
    """No copy of the object could be fetched in time, though one exists. Check network and load, then try again."""


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The object was deleted though a reference exists. Unless that was unpickled by hand, please report this bug."""


class ObjectReconstructionFailedError(ObjectLostError):
    """The object is lost and could not be made again. Call its task again if the value is still needed."""


class ObjectReconstructionFailedMaxAttemptsExceededError(ObjectReconstructionFailedError):
    """The object is lost and its task's retries are spent. Allow the task more `max_retries`."""


class ObjectReconstructionFailedLineageEvictedError(ObjectReconstructionFailedError):
    """The object is lost and how it was made is forgotten. Raise `lineage_bytes_max`, or drop references sooner."""


class ObjectStoreFullError(FtrayError):
    """The object store is full. Drop references, or start with a larger `object_store_memory`."""


class OutOfDiskError(FtrayError):
    """The disk for spilled objects is full; nothing stored was lost. Free space on it, or drop references."""


class GetTimeoutError(FtrayError, TimeoutError):
    """The objects were not there within the timeout; their tasks go on. Wait longer."""


class SerializationError(FtrayError, TypeError):
    """The value can't be pickled, or its bytes can't be read back. Leave out or replace the part that is named.

    Attribute: `path`, the part at fault, such as `argument 1['model'].lock`.
    """

    def __init__(self, message: str = "", path: str = "") -> None:
        super().__init__(message)
        self.path = path


# --- life cycle and connections -------------------------------------------------------------------------------------


class ReentrantCallError(FtrayError, RuntimeError):
    """A finaliser (`__del__`) or signal handler called ftray while it had interrupted ftray itself. Hand the call to a
    thread, or set a flag and call later.
    """


class InternalError(FtrayError):
    """Something happened that must not: a bug in ftray. Please report it with this message."""


class NotInitializedError(FtrayError, RuntimeError):
    """ftray is not running in this process. Call `ftray.init()` first."""


class AlreadyInitializedError(FtrayError, RuntimeError):
    """`ftray.init()` was called already. Call `ftray.shutdown()` first, or pass `ignore_reinit_error=True`."""


class ForeignRefError(FtrayError, ValueError):
    """The reference belongs to another cluster or an earlier `ftray.init()`. Make the object anew in this one."""


class ProtocolError(FtrayError, ConnectionError):
    """The other side does not speak ftray's protocol. Check the address, and the versions on both sides."""


class ConnectionRefused(FtrayError, ConnectionError):
    """The other side refused the connection. Check that the address is of the cluster you mean."""


class AuthenticationError(ConnectionRefused):
    """The cluster token was refused. Set FTRAY_TOKEN to the token of the cluster you mean."""


class ProtocolVersionError(ConnectionRefused):
    """The other side speaks another version of the protocol. Install the same ftray on both."""


class ClusterNotFoundError(FtrayError, ConnectionError):
    """No cluster was found. Start one with `ftray start --head`, or call `ftray.init()` without an address."""


class GcsUnavailableError(FtrayError, ConnectionError):
    """No head of the cluster answered in time; tasks that run go on. Check `ftray status`, then try again."""


# --- the names Ray's users know -------------------------------------------------------------------------------------

RayError = FtrayError
RayTaskError = TaskError
RayActorError = ActorError
RaySystemError = InternalError
AsyncioActorExit = ActorExit
