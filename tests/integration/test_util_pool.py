"""`ftray.util.multiprocessing.Pool`: what CPython's own tests do not look at."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from integration.harness import Driver, is_running, meet, wait_for_file, wait_for_none, wait_until

import ftray
from ftray import exceptions
from ftray.util.multiprocessing import Pool
from ftray.util.multiprocessing.pool import BrokenPoolError, PoolTerminatedError

pytestmark = pytest.mark.usefixtures("session")

COUNT = {"calls": 0}


def square(x: int) -> int:
    return x * x


def pid_after(directory: str) -> int:
    meet(directory, 2)
    return os.getpid()


def die_once(path: str) -> str:
    try:
        Path(path).touch(exist_ok=False)
    except FileExistsError:
        return "survived"
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def die(_: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def turn(x: int, directory: str) -> int:
    """The first waits for what all others do."""
    if x:
        Path(directory, str(x)).touch()
    else:
        wait_until(lambda: len(os.listdir(directory)) == 40, what="the others")
    return x


def pids(pool: Pool) -> set[int]:
    return set(pool._engine.pids.values())


def test_tasks_run_at_once_in_processes_of_their_own(tmp_path: Path) -> None:
    with Pool(2) as pool:
        assert len(set(pool.map(pid_after, [str(tmp_path)] * 2, 1))) == 2
        assert list(pool.imap(square, iter(range(50)), 3)) == [i * i for i in range(50)]
        assert sorted(pool.imap_unordered(square, range(5))) == [0, 1, 4, 9, 16]
        assert pool.apply(lambda *, x: x + 1, kwds={"x": 1}) == 2
        assert pool.map(square, (ftray.get(ref) for ref in [ftray.put(3)])) == [9]
        assert pool.apply(ftray.get, (ftray.put(3),)) == 3  # a reference inside of the arguments stays one


def test_what_queues_behind_a_long_task_is_done_by_others(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    with Pool(2) as pool:
        for _ in range(3):  # known to be short, so that batches go ahead
            pool.starmap(turn, [(x + 1, str(before)) for x in range(40)], 1)
        assert 0 < pool._engine.function(turn).item_us < 500
        assert pool.starmap(turn, [(x, str(after)) for x in range(41)], 1) == list(range(41))


def test_a_program_as_one_writes_it_for_the_standard_library() -> None:
    code = """
    from ftray.util.multiprocessing import Pool

    state = None
    calls = 0

    def setup(value):
        global state
        state = value
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # in the main thread

    def helper():
        return state

    def work(x):
        global calls
        calls += 1
        return helper() + x, calls

    if __name__ == "__main__":
        with Pool(1, setup, (10,)) as pool:  # starts a session
            print(pool.map(work, range(3)), pool.apply(work, (5,)))
    """
    with Driver(code) as driver:
        assert driver.finish() == 0, driver.dump()
        assert driver.out == "[(10, 1), (11, 2), (12, 3)] (15, 4)\n", driver.dump()
        driver.check_clean()


def test_a_worker_that_dies_is_replaced_and_its_batch_done_again(tmp_path: Path) -> None:
    with Pool(2) as pool:
        assert pool.map(die_once, [str(tmp_path / "a"), str(tmp_path / "b")], 1) == ["survived"] * 2
        assert pool.apply(die_once, (str(tmp_path / "c"),)) == "survived"
        with pytest.raises(exceptions.ActorDiedError, match="SIGKILL"):
            pool.apply(die)
        assert pool.map(square, range(4)) == [0, 1, 4, 9]
        assert len(pool._pool) == 2


def test_an_idle_worker_that_is_killed_costs_nothing() -> None:
    with Pool(2) as pool:
        pool.map(square, range(4), 1)
        wait_until(lambda: len(pids(pool)) == 2)
        for pid in pids(pool):
            os.kill(pid, signal.SIGKILL)
        assert pool.map(square, range(20), 1) == [i * i for i in range(20)]


def test_maxtasksperchild_renews_the_workers() -> None:
    with Pool(1, maxtasksperchild=2) as pool:
        seen = [pool.apply(os.getpid) for _ in range(5)]
        assert seen[0] == seen[1] and seen[2] == seen[3]
        assert len(set(seen)) == 3
        pool.close()
        pool.join()
    wait_for_none(lambda: [pid for pid in seen if is_running(pid)], what="workers")


def test_callbacks_that_raise_hurt_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def careless(_: Any) -> None:
        raise RuntimeError("in the callback")

    got: list[Any] = []
    with caplog.at_level(logging.ERROR, "ftray.util"), Pool(1) as pool:
        assert pool.apply_async(square, (3,), callback=careless).get() == 9
        with pytest.raises(ValueError):
            pool.apply_async(int, ("x",), error_callback=careless).get()
        assert pool.map_async(square, range(3), callback=got.append).get() == [0, 1, 4]
        pool.apply_async(int, ("x",), callback=got.append, error_callback=lambda error: got.append(type(error))).wait()
    assert got == [[0, 1, 4], ValueError]
    assert caplog.text.count("a callback of a pool raised") == 2


def test_a_callback_may_use_the_pool() -> None:
    with Pool(1) as pool:
        results: list[Any] = []
        done = threading.Event()

        def again(value: int) -> None:
            results.append(pool.apply(square, (value,)))
            done.set()

        pool.apply_async(square, (2,), callback=again)
        assert done.wait(20)
        assert results == [16]


def test_terminate_ends_what_runs_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    pool = Pool(1)
    never = str(tmp_path / "never")
    running = pool.apply_async(wait_for_file, (never,))
    queued = pool.map_async(square, range(3))
    ordered = pool.imap(wait_for_file, [never])
    ended: list[BaseException] = []

    def wait_in_apply() -> None:
        try:
            pool.apply(wait_for_file, (never,))
        except PoolTerminatedError as error:
            ended.append(error)

    waiting = threading.Thread(target=wait_in_apply)
    waiting.start()
    wait_until(lambda: len(pids(pool)) == 1)
    (pid,) = pids(pool)
    pool.terminate()
    pool.terminate()
    pool.join()
    for get in (running.get, queued.get, ordered.next):
        with pytest.raises(PoolTerminatedError, match="terminated"):
            get()
    with pytest.raises(StopIteration):
        ordered.next()
    waiting.join(20)
    assert len(ended) == 1
    wait_for_none(lambda: is_running(pid), what="the worker")
    assert not pool._engine.thread.is_alive()


def test_close_does_what_there_is_also_what_an_iterator_still_brings() -> None:
    pool = Pool(2)
    more = threading.Event()

    def items() -> Any:
        yield 1
        more.wait(20)
        yield from range(100)

    results = pool.imap(square, items())
    assert next(results) == 1
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    pool.close()
    pool.close()
    more.set()
    pool.join()
    assert list(results) == [i * i for i in range(100)]
    assert not pool._engine.thread.is_alive()


def test_after_close_the_pool_takes_nothing() -> None:
    pool = Pool(1)
    pool.close()
    calls: list[Any] = [
        lambda: pool.apply(square, (1,)),
        lambda: pool.apply_async(square, (1,)),
        lambda: pool.map(square, [1]),
        lambda: pool.starmap(square, [(1,)]),
        lambda: pool.imap(square, [1]),
        lambda: pool.imap_unordered(square, [1]),
        lambda: pool.__enter__(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Pool not running"):
            call()
    pool.join()


def test_an_initializer_that_raises_is_told_by_the_results() -> None:
    with Pool(2, int, ("no number",)) as pool:
        with pytest.raises(ValueError, match="no number"):
            pool.map(square, range(3))
        with pytest.raises(BrokenPoolError, match="no number"):
            pool.apply_async(square, (1,))
    with Pool(1, ray_remote_args={"resources": {"unheard of": 1}}) as pool:
        with pytest.raises(exceptions.FtrayError, match="unheard of"):
            pool.apply(square, (1,))


def test_leaving_a_function_otherwise_does_not_end_the_worker_or_the_program() -> None:
    lock = threading.Lock()
    with Pool(1) as pool:
        pid = pool.apply(os.getpid)
        with pytest.raises(RuntimeError, match=r"SystemExit\(3\)"):
            pool.apply(exit, (3,))
        assert pool.apply(os.getpid) == pid
        with pytest.raises(multiprocessing.pool.MaybeEncodingError):
            pool.apply(threading.Lock)
        with pytest.raises(exceptions.SerializationError):
            pool.map(lambda _: lock, [1])
        assert pool.apply(os.getpid) == pid


def test_large_arguments_and_results() -> None:
    import numpy as np

    array = np.arange(100_000)
    with Pool(2) as pool:
        doubled = pool.map(lambda a: a * 2, [array] * 4)
        assert all((each == array * 2).all() for each in doubled)
        assert pool.apply(lambda: int(array.sum())) == int(array.sum())
        big = pool.map(square, range(200_000))
        assert big[-1] == 199_999**2


def test_an_interrupted_wait_leaves_the_pool_whole() -> None:
    code = """
    from ftray.util.multiprocessing import Pool
    def slow(path):
        while not os.path.exists(path):
            time.sleep(0.01)
        return 1
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        pool = Pool(1)
        path = os.path.join(d, "go")
        pool.apply(os.getpid)
        threading.Timer(0.0, lambda: say("waiting")).start()
        try:
            pool.apply(slow, (path,))
        except KeyboardInterrupt:
            say("interrupted")
        open(path, "w").close()
        say("got", pool.map(abs, [-1, -2]))
        pool.close(); pool.join()
    ftray.shutdown()
    """
    with Driver(code) as driver:
        driver.wait_for("waiting")

        def interrupted() -> bool:
            if "interrupted" not in driver.out:
                driver.signal(signal.SIGINT)
            return "interrupted" in driver.out

        wait_until(interrupted)
        driver.wait_for("got [1, 2]")
        assert driver.finish() == 0, driver.dump()
        driver.check_clean()


def test_a_pool_in_a_task() -> None:
    @ftray.remote
    def outer() -> list[int]:
        with Pool(1) as pool:
            return pool.map(square, range(3))

    assert ftray.get(outer.remote(), timeout=30) == [0, 1, 4]


def test_wrong_arguments() -> None:
    for error, make in [
        (ValueError, lambda: Pool(0)),
        (TypeError, lambda: Pool("2")),  # type: ignore[arg-type]
        (TypeError, lambda: Pool(1, initializer=5)),  # type: ignore[arg-type]
        (ValueError, lambda: Pool(1, maxtasksperchild=-1)),
        (TypeError, lambda: Pool(1, ray_remote_args=[1])),  # type: ignore[arg-type]
        (TypeError, lambda: Pool(1, ray_remote_args={"no_such_option": 1})),
        (ValueError, lambda: Pool(1, ray_address="a", ftray_address="b")),
    ]:
        with pytest.raises(error):
            make()
    with Pool(1) as pool:
        for error, call in [
            (ValueError, lambda: pool.map(square, [1], chunksize=-1)),
            (ValueError, lambda: pool.map_async(square, [1], 0)),
            (ValueError, lambda: pool.imap(square, [1], 0)),
            (TypeError, lambda: pool.imap(square, [1], "2")),  # type: ignore[arg-type]
            (TypeError, lambda: pool.map(square, 5)),  # type: ignore[arg-type]
            (TypeError, lambda: pool.apply(5)),  # type: ignore[arg-type]
            (TypeError, lambda: pool.apply(square, (1, 2, 3))),
            (NotImplementedError, lambda: pickle.dumps(pool)),
        ]:
            with pytest.raises(error):
                call()
        assert pool.apply(square, (2,)) == 4
        blocked = pool.apply_async(wait_for_file, ("/nowhere",))
        with pytest.raises(multiprocessing.TimeoutError):
            blocked.get(timeout=0.01)
        with pytest.raises(ValueError, match="not ready"):
            blocked.successful()
