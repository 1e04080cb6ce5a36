"""Arguments that do not fit are found where the call is made."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from ftray.api.signatures import Arity


def plain(a: Any, b: Any = 1) -> None: ...
def any_number(*a: Any, **k: Any) -> None: ...
def named(a: Any, *, b: Any) -> None: ...
def positional(a: Any, /, b: Any) -> None: ...


CALLS = [
    (plain, (1,), {}, True),
    (plain, (1, 2), {}, True),
    (plain, (), {}, False),
    (plain, (1, 2, 3), {}, False),
    (plain, (1,), {"b": 2}, True),
    (plain, (1,), {"c": 2}, False),
    (plain, (1, 2), {"b": 2}, False),
    (any_number, (1, 2, 3), {"x": 1}, True),
    (named, (1,), {}, False),
    (named, (1,), {"b": 1}, True),
    (positional, (1, 2), {}, True),
    (positional, (), {"a": 1, "b": 2}, False),
    (max, (1, 2, 3), {}, True),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "fits"), CALLS)
def test_it_judges_as_python_does(function: Any, args: Any, kwargs: Any, fits: bool) -> None:
    arity = Arity(function, "f")
    surely = not kwargs and arity.low <= len(args) <= arity.high
    if fits:
        arity.check(args, kwargs)
    else:
        assert not surely
        with pytest.raises(TypeError, match=r"^f\("):
            arity.check(args, kwargs)


def test_a_decorator_may_add_arguments() -> None:
    def with_session(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function("session", *args)

        return wrapper

    arity = Arity(with_session(positional), "f")
    assert arity.low <= 1 <= arity.high
    arity.check((1,), {})
    with pytest.raises(TypeError, match=r"^f\(\*args"):
        arity.check((1,), {"c": 1})


def test_of_a_class_the_constructor_counts() -> None:
    class Counter:
        def __init__(self, start: int) -> None: ...

    arity = Arity(Counter, "Counter")
    assert (arity.low, arity.high) == (1, 1)
    with pytest.raises(TypeError, match=r"Counter\(start: 'int'\)"):
        arity.check((), {})
