"""`ActorPool`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from integration.harness import wait_for_file

import ftray
from ftray import exceptions
from ftray.util import ActorPool

pytestmark = pytest.mark.usefixtures("session")


@ftray.remote
class Worker:
    def double(self, value: Any) -> Any:
        return 2 * value

    def after(self, path: Path, value: Any) -> Any:
        wait_for_file(path)
        return value

    def fail(self, value: Any) -> Any:
        raise ValueError(value)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @ftray.method(num_returns=2)
    def two(self, value: Any) -> tuple[Any, Any]:
        return value, value + 1


def double(actor: Any, value: Any) -> Any:
    return actor.double.remote(value)


def pool_of(count: int) -> ActorPool[Any]:
    return ActorPool([Worker.remote() for _ in range(count)])


def test_maps() -> None:
    pool = pool_of(2)
    assert list(pool.map(double, range(7))) == [2 * i for i in range(7)]
    assert sorted(pool.map_unordered(double, range(7))) == [2 * i for i in range(7)]
    assert list(pool.map(lambda a, v: a.two.remote(v), [1, 5])) == [[1, 2], [5, 6]]
    assert list(pool.map(double, [])) == []


def test_order_and_no_order(tmp_path: Path) -> None:
    pool = pool_of(2)

    def work(actor: Any, value: int) -> Any:
        return actor.after.remote(tmp_path / str(value), value)

    for value in range(3):
        pool.submit(work, value)
    for value in (1, 2):
        (tmp_path / str(value)).touch()
        assert pool.get_next_unordered() == value
    with pytest.raises(ValueError, match="get_next_unordered"):
        pool.get_next()
    (tmp_path / "0").touch()
    assert pool.get_next_unordered() == 0
    assert not pool.has_next()


def test_other_actors_work_on_behind_a_slow_call(tmp_path: Path) -> None:
    pool = pool_of(2)
    pool.submit(lambda a, v: a.after.remote(tmp_path / "3", v), 0)
    def touch(actor: Any, value: int) -> Any:
        (tmp_path / str(value)).touch()
        return actor.double.remote(value)

    for value in (1, 2, 3):
        pool.submit(touch, value)
    # The first result needs what the fourth submission does, on the other actor.
    assert [pool.get_next(timeout=20) for _ in range(4)] == [0, 2, 4, 6]


def test_one_actor() -> None:
    pool = pool_of(1)
    with pytest.raises(StopIteration):
        pool.get_next()
    with pytest.raises(StopIteration):
        pool.get_next_unordered()
    pool.submit(double, 1)
    assert pool.pop_idle() is None and not pool.has_free() and pool.has_next()
    assert pool.get_next() == 2
    assert pool.has_free()
    actor = pool.pop_idle()
    assert actor is not None and pool.pop_idle() is None
    pool.submit(double, 4)
    with pytest.raises(ValueError, match="no actors"):
        pool.get_next()
    pool.push(actor)
    with pytest.raises(ValueError, match="belongs to the pool"):
        pool.push(actor)
    assert pool.get_next() == 8


def test_timeouts(tmp_path: Path) -> None:
    pool = pool_of(1)

    def work(actor: Any, name: str) -> Any:
        return actor.after.remote(tmp_path / name, name)

    pool.submit(work, "a")
    pool.submit(work, "b")
    with pytest.raises(TimeoutError):
        pool.get_next(timeout=0)
    with pytest.raises(exceptions.GetTimeoutError, match="given up"):
        pool.get_next(timeout=0.01, ignore_if_timedout=True)
    assert pool.has_next()
    with pytest.raises(TimeoutError):
        pool.get_next_unordered(timeout=0)
    for name in "ab":
        (tmp_path / name).touch()
    assert pool.get_next_unordered() == "b"
    assert not pool.has_next()


def test_errors_come_in_their_place() -> None:
    pool = pool_of(2)
    results = pool.map(lambda a, v: a.fail.remote(v) if v == 1 else a.double.remote(v), range(4))
    assert next(results) == 0
    with pytest.raises(ValueError):
        next(results)
    assert list(results) == [4, 6]

    def careless(actor: Any, value: int) -> Any:
        if value == 5:
            raise KeyError(value)
        return actor.double.remote(value)

    for value in (1, 2, 5, 3):  # two wait for an actor
        pool.submit(careless, value)
    assert [pool.get_next(), pool.get_next()] == [2, 4]
    with pytest.raises(KeyError):
        pool.get_next()
    assert pool.get_next() == 6
    with pytest.raises(KeyError):
        pool.submit(careless, 5)
    with pytest.raises(TypeError, match=r"return actor\.method\.remote"):
        pool.submit(lambda a, v: v, 1)
    assert sorted(pool.map_unordered(double, range(3))) == [0, 2, 4]  # no actor got lost


def test_an_actor_that_dies_raises_and_leaves_the_pool() -> None:
    pool = pool_of(2)

    def work(actor: Any, value: int) -> Any:
        return actor.die.remote() if value == 1 else actor.double.remote(value)

    results = pool.map(work, range(8))
    got = []
    while True:
        try:
            got.append(next(results))
        except StopIteration:
            break
        except exceptions.ActorDiedError as error:
            got.append(error)
    assert [x for x in got if not isinstance(x, Exception)] == [0, 4, 6, 8, 10, 12, 14]
    pool.submit(work, 1)
    pool.submit(work, 3)
    for _ in range(2):
        with pytest.raises(exceptions.ActorDiedError):
            pool.get_next()
    assert not pool.has_next()
    pool.push(Worker.remote())
    pool.submit(work, 3)
    assert pool.get_next() == 6


def test_map_gives_up_what_was_not_fetched(tmp_path: Path) -> None:
    pool = pool_of(1)
    pool.submit(lambda a, v: a.after.remote(tmp_path / "x", v), "old")
    pool.submit(double, "older")
    results = pool.map(double, [1, 2])
    (tmp_path / "x").touch()
    assert list(results) == [2, 4]


def test_wrong_arguments() -> None:
    for wrong in (None, 5, Worker.remote(), "actors", [None], [Worker], [1, 2]):
        with pytest.raises(TypeError):
            ActorPool(wrong)  # type: ignore[arg-type]
    empty: ActorPool[Any] = ActorPool([])
    assert not empty.has_next() and not empty.has_free() and empty.pop_idle() is None
    empty.submit(double, 1)
    for get in (empty.get_next, empty.get_next_unordered):
        with pytest.raises(ValueError, match="push"):
            get()
    with pytest.raises(TypeError):
        empty.push("actor")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        empty.submit(None, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        empty.get_next(timeout=-1)
    empty.push(Worker.remote())
    assert empty.get_next() == 2
