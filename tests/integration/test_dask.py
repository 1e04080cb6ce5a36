"""`ftray.util.dask`: Dask's graphs on ftray, in both of Dask's representations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.harness import meet, run_driver, wait_for_file, wait_until

import ftray
from ftray.exceptions import TaskError, TaskUnschedulableError, WorkerCrashedError

pytest.importorskip("dask")
import dask
import dask.bag
from dask.callbacks import Callback

from ftray.util.dask import (
    disable_dask_on_ftray,
    enable_dask_on_ftray,
    enable_dask_on_ray,
    ftray_dask_get,
    persist,
    ray_dask_get,
)

SESSION = {"num_cpus": 3, "resources": {"widget": 1}, "_system_config": {"infeasible_timeout_ms": 100}}
pytestmark = pytest.mark.usefixtures("session")


def inc(x: int) -> int:
    return x + 1


def pid_of(*_: Any) -> int:
    return os.getpid()


def big(i: int) -> bytes:
    return bytes([i % 256]) * 200_000


def head(data: bytes) -> int:
    return data[0]


def fail(x: Any) -> Any:
    raise LookupError(f"no {x}")


# --- graphs written by hand -----------------------------------------------------------------------------------------


def test_a_graph_of_tuples() -> None:
    graph = {
        "x": 1,
        "y": (inc, "x"),
        "z": (add, "y", (inc, "y")),  # a task inside a task
        ("w", 0): (sum, ["x", "y", "z"]),
        "list": ["x", (inc, "z")],
        "same": "z",
        "same again": "same",
        "text": "not a key",
        "unused": (fail, "x"),
    }
    get = ftray_dask_get
    assert get(graph, "z") == 5
    assert get(graph, ["x", "y", ["z", ("w", 0)], []]) == (1, 2, (5, 8), ())
    assert list(get(graph, "list")) == [1, 6]
    assert get(graph, ["same again", "same", "text"]) == (5, 5, "not a key")
    assert get(graph, []) == ()
    assert ray_dask_get is ftray_dask_get


def test_a_graph_of_nodes() -> None:
    spec = pytest.importorskip("dask._task_spec", reason="this Dask has graphs of tuples only")
    x = spec.DataNode("x", 1)
    y = spec.Task("y", inc, x.ref())
    graph = {
        "x": x,
        "y": y,
        "alias": spec.Alias("alias", "y"),
        "sum": spec.Task("sum", sum, spec.List(x.ref(), y.ref(), 10)),
        "named": spec.Task("named", dict, a=y.ref(), b=spec.Task("inner", inc, 5)),
        "plain": (inc, "alias"),
    }
    assert ftray_dask_get(graph, list(graph)) == (1, 2, 2, 13, {"a": 2, "b": 6}, 3)


def test_references_among_the_arguments_stand_for_their_values() -> None:
    ref = ftray.put(41)
    assert ftray_dask_get({"a": (inc, ref), "b": (add, "a", ref), "c": ref}, ["a", "b", "c"]) == (42, 83, 41)
    assert dask.delayed(inc)(ref).compute(scheduler=ftray_dask_get) == 42


def test_what_is_wrong_with_a_graph() -> None:
    with pytest.raises(KeyError, match="no key 'nowhere', which was asked for"):
        ftray_dask_get({"x": 1}, ["x", "nowhere"])
    with pytest.raises(RuntimeError, match="[Cc]ycle"):
        ftray_dask_get({"a": (inc, "b"), "b": (inc, "a")}, "a")
    with pytest.raises(TypeError, match="did you mean 'num_cpus'"):
        ftray_dask_get({"a": (inc, 1)}, "a", remote_args={"num_cpu": 2})


# --- collections ----------------------------------------------------------------------------------------------------


def test_delayed_runs_in_parallel_elsewhere(tmp_path: Path) -> None:
    meeting = [dask.delayed(meet)(tmp_path, 3) for _ in range(3)]
    pids = dask.compute(*[dask.delayed(pid_of)(each) for each in meeting], scheduler=ftray_dask_get)
    assert os.getpid() not in pids
    chain: Any = dask.delayed(0)
    for _ in range(30):
        chain = dask.delayed(inc)(chain)
    assert chain.compute(scheduler=ftray_dask_get) == 30
    assert dask.delayed(lambda x, *, y: x + y)(1, y=chain).compute(scheduler=ftray_dask_get) == 31
    assert dask.delayed({"a": [chain, 1], "b": (chain,)}).compute(scheduler=ftray_dask_get) == {
        "a": [30, 1], "b": (30,),
    }  # fmt: skip


def test_a_bag() -> None:
    bag = dask.bag.from_sequence(range(100), npartitions=7)
    with enable_dask_on_ftray():
        assert bag.map(inc).filter(lambda x: x % 2 == 0).sum().compute() == sum(range(2, 101, 2))
        assert dict(bag.map(lambda x: x % 3).frequencies().compute()) == {0: 34, 1: 33, 2: 33}
        assert bag.fold(add).compute() == sum(range(100))


def test_an_array_stays_in_the_store() -> None:
    array = pytest.importorskip("dask.array")
    x = array.ones((600, 600), chunks=(200, 200))
    with enable_dask_on_ftray():
        assert float((x @ x.T).sum().compute()) == 600.0**3
        assert np.array_equal((x + 1)[:3, 300:303].compute(), np.full((3, 3), 2.0))


def test_intermediate_results_do_not_come_here() -> None:
    from ftray.worker.core import get_core

    pinned: set[bytes] = set()

    class Look(Callback):  # type: ignore[misc]
        def _posttask(self, key: Any, result: Any, dsk: Any, state: Any, worker: Any) -> None:
            assert isinstance(result, ftray.ObjectRef)
            pinned.update(get_core().objects.pins)

    parts = [dask.delayed(head)(dask.delayed(big)(i)) for i in range(20)]
    with Look():
        assert dask.delayed(sum)(parts).compute(scheduler=ftray_dask_get, optimize_graph=False) == sum(range(20))
    assert pinned == set()


def test_intermediate_results_are_freed_on_the_way(tmp_path: Path) -> None:
    from ftray.api.context import ask_raylet

    def all_freed(last: Any) -> int:
        """In a task: what was used up is gone while the computation still runs."""
        (tmp_path / "here").touch()
        wait_for_file(tmp_path / "looked")
        return int(last)

    freed: list[bool] = []

    class Look(Callback):  # type: ignore[misc]
        def _posttask(self, key: Any, result: Any, dsk: Any, state: Any, worker: Any) -> None:
            if str(key).startswith("sum"):
                wait_until(lambda: not ask_raylet("memory")["objects"], 5, "intermediate results are freed")
                freed.append(True)
                (tmp_path / "looked").touch()

    parts = [dask.delayed(head)(dask.delayed(big)(i)) for i in range(10)]
    last = dask.delayed(all_freed)(dask.delayed(sum)(parts))
    with Look():
        assert last.compute(scheduler=ftray_dask_get, optimize_graph=False) == sum(range(10))
    assert freed == [True]


def test_persisted_results_stay_in_the_cluster() -> None:
    bag = dask.bag.from_sequence(range(10), npartitions=2).map(inc)
    (kept,) = persist(bag)
    parts = [value for value in dict(kept.dask).values() if isinstance(getattr(value, "value", value), ftray.ObjectRef)]
    assert len(parts) == 2
    with enable_dask_on_ftray():
        assert kept.sum().compute() == 55
        assert kept.map(inc).compute() == list(range(2, 12))
        assert kept.compute() == list(range(1, 11))
    number = dask.delayed(inc)(1)
    (kept_number,) = persist(number)
    assert dask.delayed(inc)(kept_number).compute(scheduler=ftray_dask_get) == 3
    assert number.persist(scheduler=ftray_dask_get).compute(scheduler=ftray_dask_get) == 2
    refs = ftray_dask_get({"x": (inc, 1), "y": 5}, ["x", "y"], ray_persist=True)
    assert ftray.get(list(refs)) == [2, 5]


# --- errors ---------------------------------------------------------------------------------------------------------


def test_an_error_is_raised_as_it_was_and_names_its_key() -> None:
    graph = {"a": (inc, 1), "bad": (fail, "a"), "b": (inc, "bad"), "c": (add, "b", "a")}
    with pytest.raises(LookupError, match="no 2") as caught:
        ftray_dask_get(graph, ["a", "c"])
    assert type(caught.value) is LookupError
    assert caught.value.__notes__ == ["in the Dask task 'bad'"]
    assert isinstance(caught.value.__cause__, TaskError)
    assert "in fail" in caught.value.__cause__.traceback_str
    assert ftray_dask_get(graph, "a") == 2


def test_a_death_names_its_key_too(tmp_path: Path) -> None:
    def die(mark: str, x: int) -> int:
        if not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), 9)
        return x

    assert ftray_dask_get({"a": (die, str(tmp_path / "one"), 1), "b": (inc, "a")}, "b") == 2
    with pytest.raises(WorkerCrashedError, match="SIGKILL") as caught:
        ftray_dask_get(
            {("die", 3): (die, str(tmp_path / "two"), 1), "b": (inc, ("die", 3))}, "b", remote_args={"max_retries": 0}
        )
    assert caught.value.__notes__ == ["in the Dask task ('die', 3)"]
    with pytest.raises(TaskUnschedulableError) as refused:
        ftray_dask_get({"a": (inc, 1)}, "a", ray_remote_args={"resources": {"widget": 2}})
    assert refused.value.__notes__ == ["in the Dask task 'a'"]


def test_what_cannot_be_pickled_names_its_key() -> None:
    import threading

    with pytest.raises(ftray.exceptions.SerializationError) as caught:
        ftray_dask_get({"a": (inc, 1), "lock": (inc, threading.Lock())}, ["a", "lock"])
    assert caught.value.__notes__ == ["in the Dask task 'lock'"]
    with pytest.raises(ftray.exceptions.SerializationError):
        ftray_dask_get({"lock": threading.Lock(), "b": (id, "lock")}, "b")


@pytest.mark.skipif(not hasattr(ftray, "cancel"), reason="needs ftray.cancel")
def test_an_error_is_told_at_once_and_ends_the_rest(tmp_path: Path) -> None:
    def run_on(mark: str) -> None:
        Path(mark).touch()
        wait_for_file(tmp_path / "never", 30)

    def fail_then(mark: str) -> None:
        wait_for_file(mark)
        raise LookupError

    mark = str(tmp_path / "mark")
    graph = {"long": (run_on, mark), "bad": (fail_then, mark), "all": (lambda *_: None, "long", "bad")}
    with pytest.raises(LookupError):
        ftray_dask_get(graph, "all")
    # All three CPUs are free, long before `run_on` would have ended.
    (tmp_path / "met").mkdir()
    ftray_dask_get({i: (meet, str(tmp_path / "met"), 3) for i in range(3)}, [0, 1, 2])


# --- Dask's settings and callbacks ----------------------------------------------------------------------------------


def test_callbacks_see_all_tasks() -> None:
    seen: list[Any] = []

    class Tell(Callback):  # type: ignore[misc]
        def _start(self, dsk: Any) -> None:
            seen.append("start")

        def _start_state(self, dsk: Any, state: Any) -> None:
            seen.append(len(state["waiting"]))

        def _pretask(self, key: Any, dsk: Any, state: Any) -> None:
            assert key in state["running"]
            seen.append(("before", key))

        def _posttask(self, key: Any, result: Any, dsk: Any, state: Any, worker: Any) -> None:
            assert key in state["finished"]
            seen.append(("after", key))

        def _finish(self, dsk: Any, state: Any, failed: bool) -> None:
            seen.append(failed)

    with Tell():
        assert ftray_dask_get({"x": 1, "a": (inc, "x"), "b": (inc, "a")}, "b") == 3
    assert seen == ["start", 2, ("before", "a"), ("before", "b"), ("after", "a"), ("after", "b"), False]
    seen.clear()
    with Tell(), pytest.raises(LookupError):
        ftray_dask_get({"a": (fail, 1)}, "a")
    assert seen == ["start", 1, ("before", "a"), True]


def test_a_progress_bar() -> None:
    import io

    from dask.diagnostics import ProgressBar

    out = io.StringIO()
    with ProgressBar(out=out, dt=0.001):
        assert ftray_dask_get({"n0": 0} | {f"n{i}": (inc, f"n{i - 1}") for i in range(1, 30)}, "n29") == 29
    assert "100% Completed" in out.getvalue()


def test_profilers_get_a_graph_that_is_a_mapping() -> None:
    from dask.diagnostics import CacheProfiler, Profiler

    with Profiler() as tasks, CacheProfiler() as cache:
        assert dask.bag.from_sequence(range(10), npartitions=2).sum().compute(scheduler=ftray_dask_get) == 45
    assert len(tasks.results) == len(cache.results) >= 3


@pytest.fixture
def settings() -> Iterator[None]:
    yield
    for _ in range(5):
        disable_dask_on_ftray()
    assert dask.config.get("scheduler", None) is None


@pytest.mark.usefixtures("settings")
def test_enabling_and_disabling() -> None:
    number = dask.delayed(pid_of)(1)
    assert number.compute(scheduler="sync") == os.getpid()
    enable_dask_on_ftray()
    assert number.compute() != os.getpid()
    disable_dask_on_ftray()
    disable_dask_on_ftray()
    with enable_dask_on_ray() as enabled:
        assert dask.config.get("dataframe.shuffle.method") == "tasks"
        with dask.config.set(scheduler="sync"):
            assert number.compute() == os.getpid()
        assert number.compute() != os.getpid()
        enabled.end()
        assert number.compute(scheduler="sync") == os.getpid()
    assert dask.config.get("scheduler", None) is None


def test_nested_computations() -> None:
    def inner(n: int) -> int:
        return int(dask.delayed(sum)([dask.delayed(inc)(i) for i in range(n)]).compute(scheduler=ftray_dask_get))

    outer = dask.delayed(sum)([dask.delayed(inner)(n) for n in range(3)])
    assert outer.compute(scheduler=ftray_dask_get) == sum(sum(range(1, n + 1)) for n in range(3))


def test_many_tasks_leave_nothing_behind() -> None:
    graph: dict[Any, Any] = {("x", 0, i): (inc, i) for i in range(300)}
    for layer in range(1, 4):
        graph |= {("x", layer, i): (add, ("x", layer - 1, i), ("x", layer - 1, (i * 7) % 300)) for i in range(300)}
    expected = {key[2]: inc(key[2]) for key in graph if key[1] == 0}
    for _ in range(3):
        expected = {i: expected[i] + expected[(i * 7) % 300] for i in range(300)}
    found = ftray_dask_get(graph, [("x", 3, i) for i in range(300)])
    assert found == tuple(expected[i] for i in range(300))


def test_the_failed_task_is_blamed_and_not_those_that_need_it(tmp_path: Path) -> None:
    """They fail with it, and are seen first: each waited for it before this process did."""

    def fail_when_told(_: Any) -> None:
        wait_for_file(tmp_path / "go")
        raise LookupError

    class Tell(Callback):  # type: ignore[misc]
        def _posttask(self, key: Any, result: Any, dsk: Any, state: Any, worker: Any) -> None:
            (tmp_path / "go").touch()

    graph = {"first": (inc, 1), "bad": (fail_when_told, 1)} | {f"after-{i}": (inc, "bad") for i in range(5)}
    with Tell(), pytest.raises(LookupError) as caught:
        ftray_dask_get(graph, ["first", *(f"after-{i}" for i in range(5))])
    assert caught.value.__notes__ == ["in the Dask task 'bad'"]


def test_a_program_that_never_calls_init() -> None:
    pytest.importorskip("joblib")
    run_driver("""
    import dask, joblib
    from ftray.util.dask import enable_dask_on_ftray
    from ftray.util.joblib import register_ftray

    enable_dask_on_ftray()
    register_ftray()
    assert dask.delayed(abs)(-2).compute() == 2
    ftray.shutdown()
    assert joblib.parallel.BACKENDS["ftray"]().effective_n_jobs(-1) == ftray.cluster_resources()["CPU"]
    """).close()
