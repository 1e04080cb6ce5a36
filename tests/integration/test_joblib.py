"""`ftray.util.joblib`: joblib's `Parallel` on ftray."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.harness import meet, wait_for_file, wait_until

import ftray
from ftray.exceptions import TaskError, WorkerCrashedError

joblib = pytest.importorskip("joblib")
from joblib import Parallel, delayed, parallel_config  # noqa: E402

from ftray.util.joblib import register_ftray, register_ray  # noqa: E402

SESSION = {"num_cpus": 3, "resources": {"widget": 1}, "_system_config": {"infeasible_timeout_ms": 100}}
pytestmark = pytest.mark.usefixtures("session")


@pytest.fixture(autouse=True)
def registered() -> None:
    register_ftray()


def meet_and_tell(directory: Path, count: int) -> int:
    meet(directory, count)
    return os.getpid()


def fail(i: int) -> int:
    if i == 7:
        raise LookupError(f"number {i}")
    return i


def inner(_: int) -> tuple[str, int, set[int]]:
    pids = Parallel(n_jobs=2)(delayed(os.getpid)() for _ in range(4))
    backend, _ = joblib.parallel.get_active_backend()
    return type(backend).__name__, os.getpid(), set(pids)


def test_it_is_like_parallel_anywhere_else() -> None:
    with parallel_config(backend="ftray"):
        assert Parallel()(delayed(pow)(i, 2) for i in range(100)) == [i * i for i in range(100)]
        assert Parallel(n_jobs=2)(delayed(lambda a, *, b: a + b)(i, b=1) for i in range(5)) == [1, 2, 3, 4, 5]
        assert Parallel()([]) == []
    with joblib.parallel_backend("ftray", n_jobs=2):
        assert Parallel()(delayed(abs)(-i) for i in range(5)) == [0, 1, 2, 3, 4]
    assert Parallel(n_jobs=-1, backend="ftray", batch_size=3)(delayed(abs)(-i) for i in range(10)) == list(range(10))


def test_all_cpus_of_the_cluster_by_default(tmp_path: Path) -> None:
    with parallel_config(backend="ftray"):
        assert [joblib.effective_n_jobs(n) for n in (-1, -2, -9, 2)] == [3, 2, 1, 2]
        pids = Parallel()(delayed(meet_and_tell)(tmp_path, 3) for _ in range(3))
    assert len(set(pids)) == 3
    assert os.getpid() not in pids
    with parallel_config(backend="ftray", remote_args={"num_cpus": 2}):
        assert joblib.effective_n_jobs(-1) == 1
    with pytest.raises(ValueError, match="n_jobs == 0"), parallel_config(backend="ftray"):
        Parallel(n_jobs=0)(delayed(abs)(i) for i in range(3))


def test_one_job_runs_here() -> None:
    assert Parallel(n_jobs=1, backend="ftray")([delayed(os.getpid)()]) == [os.getpid()]


def test_tasks_may_need_something(tmp_path: Path) -> None:
    with parallel_config(backend="ftray", n_jobs=2, remote_args={"resources": {"widget": 1}}):
        results = Parallel(batch_size=1, return_as="generator")(
            delayed(meet_and_tell)(tmp_path, 1) for _ in range(4)
        )
        assert len(list(results)) == 4
    with parallel_config(backend="ftray", n_jobs=2, remote_args={"resources": {"widget": 2}}):
        with pytest.raises(ftray.exceptions.TaskUnschedulableError):
            Parallel()(delayed(abs)(i) for i in range(2))


def test_generators_of_results() -> None:
    with parallel_config(backend="ftray", n_jobs=2):
        in_order = Parallel(return_as="generator")(delayed(abs)(-i) for i in range(20))
        assert list(in_order) == list(range(20))
        as_done = Parallel(return_as="generator_unordered")(delayed(abs)(-i) for i in range(20))
        assert sorted(as_done) == list(range(20))


def test_an_exception_is_raised_as_it_was() -> None:
    with parallel_config(backend="ftray", n_jobs=2), pytest.raises(LookupError, match="number 7") as caught:
        Parallel()(delayed(fail)(i) for i in range(50))
    assert type(caught.value) is LookupError
    assert isinstance(caught.value.__cause__, TaskError)
    assert "in fail" in caught.value.__cause__.traceback_str


def test_the_death_of_a_worker(tmp_path: Path) -> None:
    def die(mark: Path) -> int:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        return 1

    with parallel_config(backend="ftray", n_jobs=2):
        assert Parallel()(delayed(die)(tmp_path / str(i)) for i in range(2)) == [1, 1]
    with parallel_config(backend="ftray", n_jobs=2, remote_args={"max_retries": 0}), pytest.raises(WorkerCrashedError):
        Parallel()(delayed(die)(tmp_path / f"other-{i}") for i in range(2))


@pytest.mark.skipif(not hasattr(ftray, "cancel"), reason="needs ftray.cancel")
def test_an_error_ends_what_was_dispatched(tmp_path: Path) -> None:
    def run_on(mark: Path) -> None:
        mark.touch()
        wait_for_file(mark.parent / "never", 30)

    def fail_then(mark: Path) -> None:
        wait_for_file(mark)
        raise LookupError

    with parallel_config(backend="ftray", n_jobs=2):
        with pytest.raises(LookupError):
            Parallel(batch_size=1)(
                [delayed(run_on)(tmp_path / "mark"), delayed(fail_then)(tmp_path / "mark")]
                + [delayed(run_on)(tmp_path / f"not-{i}") for i in range(5)]
            )
        # The CPU of `run_on` is free again, long before it would have ended: all three are.
        (tmp_path / "met").mkdir()
        assert len(Parallel(n_jobs=3)(delayed(meet_and_tell)(tmp_path / "met", 3) for _ in range(3))) == 3
    # One may have begun in the place of the failed one, before joblib knew of that.
    assert len([path for path in os.listdir(tmp_path) if path.startswith("not-")]) <= 1


def test_a_timeout(tmp_path: Path) -> None:
    with parallel_config(backend="ftray", n_jobs=2), pytest.raises(joblib.parallel.TimeoutError):
        Parallel(timeout=0.05)(delayed(wait_for_file)(tmp_path / "go") for _ in range(2))
    (tmp_path / "go").touch()


def test_an_abandoned_generator_ends_its_tasks() -> None:
    with parallel_config(backend="ftray", n_jobs=2):
        results = Parallel(return_as="generator")(delayed(abs)(-i) for i in range(1000))
        assert next(results) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib says that some results were not taken
            del results
        assert Parallel()(delayed(abs)(-i) for i in range(3)) == [0, 1, 2]


def test_a_block_keeps_its_backend() -> None:
    with Parallel(n_jobs=2, backend="ftray") as parallel:
        assert parallel(delayed(abs)(-i) for i in range(5)) == [0, 1, 2, 3, 4]
        with pytest.raises(LookupError):
            parallel([delayed(fail)(7)])  # one: joblib itself would hand what is left of several to the next call
        assert parallel(delayed(abs)(-i) for i in range(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="over"):
        parallel._backend.submit(None)


def test_nested_calls_use_threads() -> None:
    with parallel_config(backend="ftray", n_jobs=2):
        for name, pid, pids in Parallel()(delayed(inner)(i) for i in range(3)):
            assert name == "ThreadingBackend"
            assert pid != os.getpid()
            assert pids == {pid}


def test_large_arrays_are_stored_once() -> None:
    from ftray.api.context import ask_raylet

    array = np.arange(400_000, dtype=np.float64)

    def look(i: int, a: Any, *, b: Any, small: Any) -> tuple[float, bool, int]:
        return float(a[i] + b[i]), a.flags.writeable, small.nbytes

    objects: list[int] = []

    def calls() -> Iterator[Any]:
        for i in range(40):
            if i == 30:
                objects.append(len(ask_raylet("memory")["objects"]))
            yield delayed(look)(i, array, b=array, small=array[:10])

    with parallel_config(backend="ftray", n_jobs=2):
        found = Parallel(batch_size=1, pre_dispatch=4)(calls())
    assert found == [(2.0 * i, False, 80) for i in range(40)]
    assert objects == [1]


def test_arrays_that_come_and_go_are_let_go() -> None:
    from ftray.api.context import ask_raylet

    def calls() -> Iterator[Any]:
        for i in range(12):
            yield delayed(np.sum)(np.full(200_000, float(i)))

    with parallel_config(backend="ftray", n_jobs=2):
        assert Parallel(batch_size=1, pre_dispatch=2)(calls()) == [200_000.0 * i for i in range(12)]
    wait_until(lambda: not ask_raylet("memory")["objects"], 5, "the arrays are gone")


def test_from_several_threads() -> None:
    results: dict[int, Any] = {}

    def use(n: int) -> None:
        with parallel_config(backend="ftray", n_jobs=2):
            results[n] = Parallel()(delayed(pow)(i, n) for i in range(50))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [i**n for i in range(50)] for n in range(3)}


def test_wrong_options_are_told() -> None:
    with parallel_config(backend="ftray", n_jobs=2, remote_args={"num_cpu": 1}):
        with pytest.raises(TypeError, match="did you mean 'num_cpus'"):
            Parallel()(delayed(abs)(i) for i in range(3))


def test_rays_names() -> None:
    register_ray()
    with joblib.parallel_backend("ray", n_jobs=2, ray_remote_args={"max_retries": 1}):
        assert Parallel()(delayed(abs)(-i) for i in range(3)) == [0, 1, 2]
