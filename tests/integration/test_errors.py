"""Exceptions of user code arrive as what they were, with where they came from."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import ftray
from ftray import exceptions

pytestmark = pytest.mark.usefixtures("session")


def raising(make: Any) -> Any:
    """A task that raises what `make()` returns."""

    @ftray.remote(max_retries=0)
    def fails() -> None:
        raise make()

    return fails


def error_of(ref: Any) -> BaseException:
    with pytest.raises(exceptions.FtrayError) as caught:
        ftray.get(ref, timeout=20)
    return caught.value


def test_a_users_exception_is_caught_as_its_own_type_and_as_task_error() -> None:
    @ftray.remote
    def divide(a: int, b: int) -> float:
        return a / b

    with pytest.raises(ZeroDivisionError):
        ftray.get(divide.remote(1, 0))
    error = error_of(divide.remote(1, 0))
    assert isinstance(error, exceptions.TaskError)
    assert isinstance(error, exceptions.RayTaskError)
    assert "divide" in error.function_name
    assert error.pid > 0
    assert error.node_id == ftray.get_runtime_context().get_node_id()
    assert isinstance(error.cause, ZeroDivisionError)
    assert error.__cause__ is error.cause


def test_the_remote_traceback_is_in_the_text() -> None:
    @ftray.remote
    def outer() -> None:
        def inner_most() -> None:
            raise LookupError("the text of it")

        inner_most()

    text = str(error_of(outer.remote()))
    assert "Traceback" in text
    assert "in inner_most" in text
    assert "in outer" in text
    assert "LookupError: the text of it" in text
    assert "test_errors.py" in text
    assert "execution.py" not in text


def test_attributes_and_the_chain_of_causes_arrive() -> None:
    class Wrapped(Exception):
        def __init__(self, code: int, *, detail: str) -> None:
            super().__init__(f"code {code}")
            self.code = code
            self.detail = detail

    @ftray.remote
    def chain() -> None:
        try:
            try:
                {}["missing"]
            except KeyError as error:
                raise ValueError("second") from error
        except ValueError as error:
            raise Wrapped(7, detail="more") from error

    with pytest.raises(Wrapped) as caught:
        ftray.get(chain.remote())
    error: Any = caught.value
    assert (error.code, error.detail) == (7, "more")
    cause = error.cause
    assert type(cause) is Wrapped
    assert isinstance(cause.__cause__, ValueError)
    assert isinstance(cause.__cause__.__cause__, KeyError)
    assert "KeyError: 'missing'" in str(error)
    assert "direct cause" in str(error)


def test_exceptions_with_odd_constructors() -> None:
    class Two(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__("odd")
            self.a, self.b = a, b

    class Keyword(RuntimeError):
        def __init__(self, *, name: str) -> None:
            super().__init__(name)
            self.name = name

    two: Any = error_of(raising(lambda: Two(1, 2)).remote())
    assert isinstance(two, Two)
    assert (two.a, two.b) == (1, 2)
    keyword: Any = error_of(raising(lambda: Keyword(name="me")).remote())
    assert isinstance(keyword, Keyword)
    assert keyword.name == "me"
    system: Any = error_of(raising(lambda: FileNotFoundError(2, "No such file", "/x/y")).remote())
    assert isinstance(system, FileNotFoundError)
    assert (system.errno, system.filename) == (2, "/x/y")
    unicode: Any = error_of(raising(lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")).remote())
    assert isinstance(unicode, UnicodeDecodeError)


def test_an_exception_that_cannot_be_pickled_is_shown_by_name() -> None:
    class Holds(Exception):
        def __init__(self) -> None:
            super().__init__("holds a lock")
            self.lock = threading.Lock()

    class Breaks(Exception):
        def __reduce__(self) -> Any:
            raise RuntimeError("not today")

    class Unreadable(Exception):
        def __reduce__(self) -> Any:
            return int, ("no number",)

    for kind, text in ((Holds, "holds a lock"), (Breaks, "not today"), (Unreadable, "no number")):
        error = error_of(raising(kind).remote())
        assert isinstance(error, exceptions.TaskError)
        assert kind.__name__ in str(error)
        assert isinstance(error.cause, exceptions.UnserializableException)
        assert text in str(error) + str(error.cause)


def test_an_exception_whose_text_fails_arrives() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    error = error_of(raising(Silent).remote())
    assert "Silent" in str(error)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, BaseException])
def test_base_exceptions_arrive_as_task_errors(kind: type[BaseException]) -> None:
    error = error_of(raising(lambda: kind("mine")).remote())
    assert isinstance(error, exceptions.FtrayError)
    assert kind.__name__ in str(error)
    assert not isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit | StopIteration)

    @ftray.remote
    def fine() -> int:
        return 1

    assert ftray.get(fine.remote(), timeout=20) == 1


def test_an_error_goes_through_tasks_that_depend_on_it() -> None:
    @ftray.remote
    def pass_on(value: Any, other: Any = None) -> Any:
        return value

    first = raising(lambda: ValueError("the first")).remote()
    second = pass_on.remote(first)
    third = pass_on.remote(1, other=pass_on.remote(second))
    for ref in (first, second, third):
        with pytest.raises(ValueError, match="the first") as caught:
            ftray.get(ref, timeout=20)
        assert "fails" in str(caught.value)


def test_an_error_in_a_nested_get_keeps_its_type_all_the_way() -> None:
    @ftray.remote
    def level(n: int) -> Any:
        if n == 0:
            raise KeyError("deep")
        return ftray.get(level.remote(n - 1))

    with pytest.raises(KeyError, match="deep") as caught:
        ftray.get(level.remote(3), timeout=20)
    assert str(caught.value).count("Traceback") >= 1


def test_a_task_can_handle_the_error_of_another() -> None:
    inner = raising(lambda: ValueError("mine"))

    @ftray.remote
    def handle() -> str:
        try:
            ftray.get(inner.remote())
        except ValueError as error:
            return f"handled {type(error).__mro__[1].__name__}"
        return "no error"

    assert ftray.get(handle.remote(), timeout=20) == "handled TaskError"


def test_the_same_error_is_raised_each_time() -> None:
    ref = raising(lambda: ValueError("again")).remote()
    errors = [error_of(ref) for _ in range(3)]
    assert len({id(error) for error in errors}) == 3
    assert len({str(error) for error in errors}) == 1


def test_exception_groups() -> None:
    @ftray.remote
    def fail() -> None:
        raise ExceptionGroup("several", [ValueError("a"), KeyError("b")])

    error = error_of(fail.remote())
    assert "several" in str(error)
    assert "ValueError: a" in str(error)


def test_an_error_of_megabytes_is_cut() -> None:
    error = error_of(raising(lambda: ValueError("x" * 3_000_000)).remote())
    assert isinstance(error, ValueError)
    assert len(str(error)) < 500_000


def test_a_deep_recursion_in_a_task_is_an_error() -> None:
    @ftray.remote
    def down(n: int) -> int:
        def inner(k: int) -> int:
            return 1 + inner(k + 1)

        return inner(n)

    with pytest.raises(RecursionError):
        ftray.get(down.remote(0), timeout=20)
