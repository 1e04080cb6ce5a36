"""The error hierarchy: round trips of every class, what messages say, and task errors that are the user's type too."""

from __future__ import annotations

import gc
import inspect
import pickle
import weakref
from dataclasses import dataclass
from typing import Any

import pytest

from ftray import exceptions
from ftray.exceptions import (
    ActorDiedError,
    ActorExit,
    ActorUnavailableError,
    AuthenticationError,
    ClusterNotFoundError,
    DeathCause,
    FtrayError,
    GetTimeoutError,
    NotInitializedError,
    ObjectLostError,
    OwnerDiedError,
    SerializationError,
    TaskCancelledError,
    TaskError,
    UnserializableException,
    WorkerCrashedError,
)

CLASSES = sorted(
    (
        cls
        for cls in vars(exceptions).values()
        if inspect.isclass(cls) and issubclass(cls, BaseException) and cls.__module__ == exceptions.__name__
    ),
    key=lambda cls: cls.__name__,
)
DEATH = DeathCause(
    node_id="ab" * 16,
    pid=4321,
    worker_id="cd" * 16,
    signal=9,
    what="f",
    stderr_tail=["one", "two"],
    reason="it happens",
)


class Coded(ValueError):
    """Takes other arguments than it passes on."""

    def __init__(self, code: int, *, where: str) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.where = where

    def twice(self) -> int:
        return self.code * 2


class Slotted(Exception):
    __slots__ = ("code",)


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


class NoSubclasses(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("final")


def test_every_class_says_when_it_is_raised_and_what_to_do() -> None:
    assert len(CLASSES) > 40
    for cls in CLASSES:
        assert cls.__doc__ and len(cls.__doc__.partition("\n\n")[0]) > 30, cls


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_round_trip_of_every_class(cls: type[BaseException]) -> None:
    error = cls()
    error.extra = [1, "x"]  # type: ignore[attr-defined]
    error.add_note("seen")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    assert cls is ActorExit or str(error)


@pytest.mark.parametrize(
    "error",
    [
        WorkerCrashedError(DEATH),
        WorkerCrashedError("nobody knows"),
        ActorDiedError(DEATH, actor_id="12" * 16, class_name="Counter"),
        ActorUnavailableError("restarting", actor_id="12" * 16, class_name="Counter"),
        ObjectLostError("ef" * 20, "its node died", owner="cd" * 16, node_id="ab" * 16, death=DEATH),
        TaskCancelledError("12" * 16, "f"),
        SerializationError("argument 1: cannot", "argument 1"),
        UnserializableException("a.B", "text", "tb", "why"),
        GetTimeoutError("3 of 4 objects are pending"),
        AuthenticationError("wrong"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_attributes_survive_pickling(error: FtrayError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_builtin_types_catch_their_kind() -> None:
    assert issubclass(GetTimeoutError, TimeoutError)
    assert issubclass(NotInitializedError, RuntimeError)
    assert issubclass(SerializationError, TypeError)
    assert issubclass(ClusterNotFoundError, ConnectionError)
    assert issubclass(OwnerDiedError, ObjectLostError)
    assert not issubclass(ActorExit, Exception)
    assert exceptions.RayTaskError is TaskError


def test_a_crash_says_who_where_how_and_the_last_words() -> None:
    text = str(WorkerCrashedError(DEATH))
    places = ("cdcdcdcdcdcd", "pid 4321", "node abababababab")
    for part in (*places, "SIGKILL", "running f", "it happens", "one", "max_retries"):
        assert part in text
    assert text.index("    one") < text.index("    two")
    assert "exited with code 3" in str(WorkerCrashedError(DeathCause(exit_code=3)))
    assert "signal 99" in str(WorkerCrashedError(DeathCause(signal=99)))
    assert "faulthandler" in str(WorkerCrashedError(DeathCause(signal=11)))
    assert "worker died" in str(WorkerCrashedError(DeathCause()))


def test_a_death_cause_is_a_value() -> None:
    assert hash(DEATH) == hash(pickle.loads(pickle.dumps(DEATH)))
    assert DEATH.stderr_tail == ("one", "two")


def test_actor_errors_name_the_actor() -> None:
    text = str(ActorDiedError(DEATH, actor_id="12" * 16, class_name="Counter"))
    assert "actor Counter (121212121212) is dead" in text
    assert "SIGKILL" in text
    raised = TaskError("Counter.__init__", "Traceback\nValueError: no", ValueError("no"))
    error = ActorDiedError(raised, class_name="Counter")
    assert "constructor raised" in str(error)
    assert "ValueError: no" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again.__cause__, TaskError)
    assert isinstance(again.init_error.cause, ValueError)
    assert "restarting" in str(ActorUnavailableError("restarting"))
    assert "killed by ftray.kill" in str(ActorDiedError("killed by ftray.kill"))


def test_object_errors_name_object_and_reason() -> None:
    assert str(ObjectLostError(reason="it is gone")).startswith("it is gone.\nAll copies")
    assert str(ObjectLostError("ef")).startswith("object ef.\nAll copies")
    text = str(ObjectLostError("ef" * 20, "its node died", owner="cd" * 16, death=DEATH))
    assert text.startswith(f"object {'ef' * 20} (owner cdcdcdcdcdcd): its node died.\nThe worker")
    assert str(ObjectLostError()).startswith("All copies")


# --- task errors ------------------------------------------------------------------------------------------------------


def dual(cause: BaseException) -> Any:
    return TaskError("f", "Traceback ...\nBoom\n", cause, 12, "ab" * 16).as_instance_of_cause()


def test_a_task_error_shows_the_remote_traceback() -> None:
    error = dual(KeyError("k"))
    assert str(error) == "f failed (pid 12, node abababababab), remote traceback:\nTraceback ...\nBoom"


@pytest.mark.parametrize(
    "cause",
    [
        ValueError("a", 1),
        KeyError("k"),
        FileNotFoundError(2, "no such file", "/x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        ImportError("no", name="mod", path="/p"),
        ZeroDivisionError(),
        GetTimeoutError("late"),
        AttributeError("no"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_it_is_an_instance_of_the_users_type(cause: Exception) -> None:
    for error in (dual(cause), pickle.loads(pickle.dumps(dual(cause)))):
        assert isinstance(error, TaskError)
        assert isinstance(error, type(cause))
        assert error.args == cause.args
        assert type(error.cause) is type(cause)
        assert error.__cause__ is error.cause
        assert "remote traceback" in str(error)
        for name in ("errno", "filename", "strerror", "reason", "start", "object", "name", "path"):
            assert getattr(error, name, None) == getattr(cause, name, None)


def test_the_users_attributes_and_methods_work() -> None:
    cause = Coded(7, where="here")
    cause.add_note("noted")
    error = dual(cause)
    assert (error.code, error.where, error.twice()) == (7, "here", 14)
    assert error.__notes__ == ["noted"]
    with pytest.raises(AttributeError):
        _ = error.nothing
    slotted = Slotted("x")
    slotted.code = 3
    assert dual(slotted).code == 3
    assert dual(Frozen(5)).code == 5


def test_exception_groups() -> None:
    error = dual(ExceptionGroup("several", [ValueError(1), KeyError(2)]))
    assert isinstance(error, ExceptionGroup)
    assert [type(inner) for inner in error.exceptions] == [ValueError, KeyError]
    assert isinstance(pickle.loads(pickle.dumps(error)), ExceptionGroup)


@pytest.mark.parametrize(
    "cause",
    [SystemExit(3), KeyboardInterrupt(), StopIteration(1), StopAsyncIteration(), GeneratorExit(), NoSubclasses()],
)
def test_what_can_not_be_mixed_in_stays_a_plain_task_error(cause: BaseException) -> None:
    error = dual(cause)
    assert type(error) is TaskError
    assert error.cause is cause
    assert type(TaskError("f").as_instance_of_cause()) is TaskError


def test_a_failure_passed_on_keeps_the_innermost_type() -> None:
    outer = dual(dual(ValueError("boom")))
    assert isinstance(outer, ValueError)
    assert outer.args == ("boom",)
    assert isinstance(outer.cause, TaskError)
    assert type(outer) is type(outer.cause)


def test_classes_are_made_once_and_can_go() -> None:
    assert type(dual(ValueError(1))) is type(dual(ValueError(2)))
    assert type(dual(ValueError())).__name__ == "TaskError(ValueError)"

    class Passing(Exception):
        pass

    alive = weakref.ref(Passing)
    assert isinstance(dual(Passing()), Passing)
    del Passing
    gc.collect()  # the class of both, and with it the entry that names the user's
    gc.collect()
    assert alive() is None
