"""Exceptions between processes: as values, and as what a task raised, with traceback and chain, whatever they do."""

from __future__ import annotations

import dataclasses
import pickle
import threading
from typing import Any

import pytest

from ftray.exceptions import ActorDiedError, DeathCause, SerializationError, TaskError, UnserializableException
from ftray.worker.failures import error_payload, load_task_error, remote_traceback, task_error_payload
from ftray.worker.serialization import (
    deserialize,
    load_ref,
    loading_refs,
    note_ref,
    serialize,
    set_default_ref_loader,
)


class Ref:
    """Stands for ObjectRef."""

    def __init__(self, key: int) -> None:
        self.key = key

    def __reduce__(self) -> Any:
        assert not note_ref(self)
        return load_ref, (self.key,)


def through(value: Any) -> Any:
    return deserialize(serialize(value).to_bytes())


class Coded(ValueError):
    def __init__(self, code: int, *, where: str) -> None:
        super().__init__(f"code {code}")
        self.code, self.where = code, where


class CustomReduce(Exception):
    def __reduce__(self) -> Any:
        return CustomReduce, ("custom",)


class NeedsMore(OSError):
    def __init__(self, code: int, path: str, extra: Any) -> None:
        super().__init__(code, "went wrong", path)
        self.extra = extra


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


def test_exceptions_are_rebuilt_without_their_init() -> None:
    again = through(Coded(3, where="here"))
    assert (again.code, again.where, again.args) == (3, "here", ("code 3",))
    again = through([NeedsMore(2, "/x", 5)])[0]
    assert (again.errno, again.strerror, again.filename, again.extra) == (2, "went wrong", "/x", 5)
    assert through(Frozen(4)).code == 4
    assert through(CustomReduce("own")).args == ("custom",)
    assert through(ValueError("plain")).args == ("plain",)


def failed(function: Any, *args: Any) -> bytes:
    try:
        function(*args)
    except BaseException as error:
        return task_error_payload(error, "f", 12, b"\xab" * 16)
    raise AssertionError("it did not fail")


def divide() -> None:
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise Coded(3, where="here") from error


def test_a_task_error_arrives_as_the_users_type_with_its_chain() -> None:
    error: Any = load_task_error(memoryview(failed(divide)))
    assert isinstance(error, TaskError)
    assert isinstance(error, Coded)
    assert (error.code, error.pid, error.node_id, error.function_name) == (3, 12, "ab" * 16, "f")
    assert isinstance(error.cause.__cause__, KeyError)
    assert "in divide" in str(error)
    assert "KeyError: 'inner'" in str(error)
    again = through(error)
    assert type(again) is type(error)
    assert again.code == 3


def test_context_is_kept_and_suppression_respected() -> None:
    def implicit() -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            raise ValueError("outer")  # noqa: B904

    def suppressed() -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            raise ValueError("outer") from None

    error: Any = load_task_error(failed(implicit))
    assert isinstance(error.cause.__context__, KeyError)
    assert error.cause.__cause__ is None
    error = load_task_error(failed(suppressed))
    assert error.cause.__context__ is None


def test_frames_of_ours_are_left_out_unless_there_are_no_others() -> None:
    def user() -> None:
        serialize(threading.Lock())

    text = str(load_task_error(failed(user)))
    assert "in user" in text
    assert "ftray/worker" not in text
    with pytest.raises(SerializationError) as caught:
        serialize(threading.Lock())
    assert caught.value.__traceback__ is not None
    only_ours = caught.value.with_traceback(caught.value.__traceback__.tb_next)
    assert "ftray/worker/serialization.py" in remote_traceback(only_ours)


def test_a_failure_passed_on_shows_both_tracebacks() -> None:
    inner = load_task_error(failed(divide))

    def outer() -> None:
        raise inner

    error: Any = load_task_error(failed(outer))
    assert isinstance(error, Coded)
    assert error.code == 3
    assert "in outer" in str(error)
    assert "in divide" in str(error)
    assert str(error).count("in divide") == str(inner).count("in divide")


class Unpicklable(ValueError):
    def __init__(self) -> None:
        super().__init__("has a lock")
        self.lock = threading.Lock()


class BadEverything(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__

    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


class LoadsBadly(Exception):
    def __reduce__(self) -> Any:
        return LoadsBadly._refuse, ()

    @staticmethod
    def _refuse() -> Any:
        raise SystemExit("not here")


class BecomesInt(Exception):
    def __reduce__(self) -> Any:
        return int, ()


@pytest.mark.parametrize("kind", [Unpicklable, BadEverything, LoadsBadly, BecomesInt])
def test_what_can_not_be_carried_is_replaced(kind: type[Exception]) -> None:
    def raises() -> None:
        raise kind

    error = load_task_error(failed(raises))
    assert type(error) is TaskError
    assert isinstance(error.cause, UnserializableException)
    assert kind.__name__ in error.cause.type_name
    assert error.cause.why
    if kind is Unpicklable:
        assert error.cause.message == "has a lock"
        assert "in raises" in str(error)


@pytest.mark.parametrize("cause", [SystemExit(3), KeyboardInterrupt("x"), GeneratorExit()])
def test_exceptions_that_are_no_exception(cause: BaseException) -> None:
    error = load_task_error(task_error_payload(cause, "f", 1, ""))
    assert type(error) is TaskError
    assert type(error.cause) is type(cause)


def test_odd_chains_end() -> None:
    first, second = ValueError(1), ValueError(2)
    first.__cause__, second.__cause__ = second, first
    error: Any = load_task_error(task_error_payload(first, "f", 1, ""))
    assert error.cause.__cause__.args == (2,)
    last: BaseException = ValueError(0)
    for i in range(1, 2000):
        above = ValueError(i)
        above.__cause__ = last
        last = above
    assert isinstance(load_task_error(task_error_payload(last, "f", 1, "")), ValueError)


def test_groups_and_recursion() -> None:
    def endless(n: int = 0) -> None:
        endless(n + 1)

    assert isinstance(load_task_error(failed(endless)), RecursionError)
    group = ExceptionGroup("g", [Coded(1, where="a"), Unpicklable()])
    assert type(load_task_error(task_error_payload(group, "f", 1, ""))) is TaskError
    group = ExceptionGroup("g", [Coded(1, where="a"), ValueError(2)])
    error: Any = load_task_error(task_error_payload(group, "f", 1, ""))
    assert isinstance(error, ExceptionGroup)
    assert error.exceptions[0].code == 1  # type: ignore[attr-defined]


def test_huge_errors_are_cut() -> None:
    error = load_task_error(task_error_payload(ValueError("x" * 1_000_000), "f", 1, ""))
    assert isinstance(error, ValueError)
    assert len(str(error)) < 200_000
    big = load_task_error(task_error_payload(ValueError(bytearray(17 << 20)), "f", 1, ""))
    assert type(big) is TaskError


def test_errors_of_the_runtime_arrive_as_they_are() -> None:
    error = load_task_error(error_payload(ActorDiedError(DeathCause(signal=9), actor_id="ab")))
    assert type(error) is ActorDiedError
    assert error.death is not None
    assert error.death.signal_name() == "SIGKILL"
    passed_on = load_task_error(failed(divide))
    again = load_task_error(error_payload(passed_on))
    assert isinstance(again, Coded)
    assert isinstance(again, TaskError)
    assert str(again) == str(passed_on)


def test_loading_damaged_errors_does_not_raise() -> None:
    for payload in (b"", b"junk", pickle.dumps(3), pickle.dumps(("task", 1)), failed(divide)[:-20]):
        assert isinstance(load_task_error(payload), UnserializableException)


def test_references_in_errors_are_out_of_band() -> None:
    set_default_ref_loader(lambda key: ("default", key))
    try:
        payload = task_error_payload(ValueError(Ref(4)), "f", 1, "")
        with loading_refs(lambda key: ("other", key)):
            error: Any = load_task_error(payload)
        assert error.args == (("default", 4),)
    finally:
        set_default_ref_loader(None)
