"""`as_completed` and `map_unordered`."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.harness import wait_for_file, wait_for_none

import ftray
from ftray import exceptions
from ftray.util import as_completed, map_unordered
from ftray.util.arrivals import Arrivals
from ftray.worker.core import get_core

pytestmark = pytest.mark.usefixtures("session")


@ftray.remote
def after(path: Path, value: Any) -> Any:
    wait_for_file(path)
    return value


@ftray.remote
def same(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(value)
    return value


def hanging() -> int:
    """Waiters of ours that hang on entries."""
    core = get_core()
    with core.lock:
        return sum(isinstance(w, Arrivals) for entry in core.entries.values() for w in entry.waiters or ())


def test_results_come_as_they_are_done(tmp_path: Path) -> None:
    refs = [after.remote(tmp_path / "a", "late"), after.remote(tmp_path / "b", "early")]
    results = as_completed(refs)
    (tmp_path / "b").touch()
    assert next(results) == "early"
    (tmp_path / "a").touch()
    assert list(results) == ["late"]
    assert list(as_completed(refs, yield_obj_refs=True)) == refs
    assert list(as_completed(ref for ref in refs)) == ["late", "early"]  # both are there: in the order given
    assert list(as_completed([])) == []


def test_an_error_comes_in_its_place_and_the_rest_after_it() -> None:
    results = as_completed([same.remote("broken"), same.remote(2)])
    got: list[Any] = []
    while True:
        try:
            got.append(next(results))
        except StopIteration:
            break
        except ValueError as error:
            got.append(error)
    assert 2 in got and len(got) == 2
    assert any(isinstance(each, exceptions.TaskError) for each in got)


def test_large_values_are_read_together() -> None:
    refs = [ftray.put(np.full(50_000, i)) for i in range(5)]
    assert [int(array[0]) for array in as_completed(refs, chunk_size=3)] == [0, 1, 2, 3, 4]


def test_a_consumer_that_raises_or_leaves_early_leaves_nothing_hanging(tmp_path: Path) -> None:
    refs = [after.remote(tmp_path / "never", 1), same.remote(2)]

    def consume() -> None:
        for value in as_completed(refs):
            raise KeyError(value)

    with pytest.raises(KeyError):
        consume()
    gc.collect()
    assert list(as_completed([])) == []
    wait_for_none(hanging, what="waiters")
    results = as_completed(refs)
    assert next(results) == 2
    assert hanging() == 1
    with results:
        pass
    wait_for_none(hanging, what="waiters")
    assert list(results) == []
    (tmp_path / "never").touch()
    assert ftray.get(refs) == [1, 2]


def test_close_under_the_lock_waits_for_the_next_entry(tmp_path: Path) -> None:
    """As a finaliser that runs while its own thread holds the lock."""
    ref = after.remote(tmp_path / "x", 1)
    results = as_completed([ref])
    with get_core().lock:
        results.close()
    assert hanging() == 1
    assert list(as_completed([])) == []
    assert hanging() == 0
    (tmp_path / "x").touch()
    assert ftray.get(ref) == 1


def test_time_is_up_and_the_iteration_goes_on(tmp_path: Path) -> None:
    results = as_completed([after.remote(tmp_path / "x", 1)], timeout=0.01)
    for _ in range(2):
        with pytest.raises(exceptions.GetTimeoutError, match=r"after.*"):
            next(results)
    (tmp_path / "x").touch()
    ftray.wait(list(results._held.values()))
    assert list(results) == [1]


def test_nothing_of_it_is_loaded_before_it_is_used() -> None:
    code = "import sys, ftray, ftray.util; print([name for name in sys.modules if name.startswith('ftray')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "['ftray', 'ftray.util']\n"


def test_in_a_task() -> None:
    @ftray.remote
    def outer() -> list[int]:
        return sorted(as_completed([same.remote(i) for i in range(5)]))

    assert ftray.get(outer.remote()) == [0, 1, 2, 3, 4]


def test_map_unordered_takes_items_as_results_are_consumed() -> None:
    taken = itertools.count()
    results = map_unordered(same, taken, backpressure_size=4)
    assert sorted(next(results) for _ in range(10)) != []
    assert next(taken) <= 14
    results.close()
    assert list(results) == []
    assert sorted(map_unordered(same, range(30), backpressure_size=None)) == list(range(30))
    assert len(list(map_unordered(same, range(3), yield_obj_refs=True))) == 3


def test_map_unordered_survives_errors_of_tasks_and_of_items() -> None:
    def items() -> Any:
        yield from (1, "broken", 2)
        raise OSError("no more")

    results = map_unordered(same, items())
    got: list[Any] = []
    while True:
        try:
            got.append(next(results))
        except StopIteration:
            break
        except (ValueError, OSError) as error:
            got.append(type(error).__mro__[-4 if isinstance(error, ValueError) else 0])
    assert sorted(x for x in got if isinstance(x, int)) == [1, 2]
    assert len(got) == 4 and OSError in got


def test_wrong_arguments() -> None:
    ref = ftray.put(1)
    calls: list[tuple[type[Exception], Any]] = [
        (TypeError, lambda: as_completed(ref)),  # type: ignore[arg-type]
        (TypeError, lambda: as_completed([1])),  # type: ignore[list-item]
        (TypeError, lambda: as_completed("refs")),  # type: ignore[arg-type]
        (ValueError, lambda: as_completed([ref, ref])),
        (ValueError, lambda: as_completed([ref], chunk_size=0)),
        (TypeError, lambda: as_completed([ref], chunk_size="2")),  # type: ignore[arg-type]
        (ValueError, lambda: as_completed([ref], timeout=-1)),
        (TypeError, lambda: map_unordered(len, [1])),
        (TypeError, lambda: map_unordered(same, 5)),  # type: ignore[arg-type]
        (ValueError, lambda: map_unordered(same, [1], backpressure_size=0)),
        (ValueError, lambda: map_unordered(same, [1], chunk_size=-1)),
        (TypeError, lambda: next(map_unordered(same.options(num_returns=2), [1]))),
    ]
    for error, call in calls:
        with pytest.raises(error):
            call()
