"""`ftray.util.FtrayExecutor`: what `concurrent.futures` promises, and where calls run.

How executors end is in `test_executor_ends.py`; the standard library's own tests of executors run against it in
`test_executor_cpython.py`.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import random
import signal
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, Future, as_completed, wait
from pathlib import Path
from typing import Any

import pytest
from integration.harness import meet, overlap_max, wait_for_file

import ftray
from ftray.exceptions import SerializationError, TaskError, WorkerCrashedError
from ftray.util import FtrayExecutor
from ftray.util.executor import BrokenFtrayExecutor, CallCrashedError, Executor

SESSION = {"num_cpus": 4}
pytestmark = pytest.mark.usefixtures("session")


def touch_and_wait(here: Path, there: Path) -> str:
    """Says that it runs, and runs until it is told to end."""
    here.touch()
    wait_for_file(there)
    return here.name


def span(length_s: float) -> tuple[float, float]:
    started = time.monotonic()
    time.sleep(length_s)
    return started, time.monotonic()


def kill_own_worker(mark: Path, until: int) -> int:
    """Kills its worker in the first `until` runs."""
    with mark.open("a") as file:
        file.write("x")
    if mark.stat().st_size <= until:
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.stat().st_size


def raise_deep() -> None:
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError("not there") from error


class Custom(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")
        self.a, self.b = a, b


def raise_custom() -> None:
    raise Custom(1, 2)


# --- calls ----------------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def add(self, n: int) -> int:
        self.value += n
        return self.value


def test_callables_of_all_kinds() -> None:
    two = 2
    counter = Counter()
    with FtrayExecutor(2) as executor:
        futures = [
            executor.submit(pow, 2, 8),
            executor.submit(math.sqrt, 9.0),
            executor.submit(lambda x: x * two, 4),
            executor.submit(functools.partial(pow, 3), 2),
            executor.submit("a-b".split, "-"),
            executor.submit(counter.add, 5),
            executor.submit(counter.add, 6),  # a copy of its own
            executor.submit(dict, a=1),
            executor.submit(int, "12", base=3),
            executor.submit(lambda *args, **kwargs: (args, kwargs), 1, self=2, fn=3, function=4),
        ]
        assert [each.result() for each in futures] == [
            256, 3.0, 8, 9, ["a", "b"], 5, 6, {"a": 1}, 5, ((1,), {"self": 2, "fn": 3, "function": 4}),
        ]  # fmt: skip
    assert Executor is FtrayExecutor


def test_a_closure_is_taken_as_it_is_at_each_submission() -> None:
    def plus(x: int) -> int:
        return x + step

    with FtrayExecutor(1) as executor:
        step = 1
        first = executor.submit(plus, 10)
        assert first.result() == 11
        step = 2
        assert executor.submit(plus, 10).result() == 12


def test_references_among_the_arguments_stand_for_their_values() -> None:
    with FtrayExecutor(2) as executor:
        ref = ftray.put(bytes(200_000))
        assert executor.submit(len, ref).result() == 200_000
        assert executor.submit(lambda a, *, b: len(a) + len(b), b"xx", b=ref).result() == 200_002


def test_large_values_both_ways_and_a_large_function() -> None:
    data = os.urandom(300_000)
    table = list(range(30_000))
    with FtrayExecutor(2) as executor:
        assert executor.submit(lambda x: x + x, data).result() == data + data
        assert list(executor.map(lambda i: table[i], [0, 10_000, 29_999])) == [0, 10_000, 29_999]


def test_map_is_like_map() -> None:
    with FtrayExecutor(3) as executor:
        assert list(executor.map(pow, range(50), range(50))) == list(map(pow, range(50), range(50)))
        assert list(executor.map(pow, range(50), range(7), chunksize=3)) == list(map(pow, range(50), range(7)))
        assert list(executor.map(abs, [])) == []
        assert list(executor.map(abs, range(2000))) == list(range(2000))
        results = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
        assert [next(results), next(results)] == [(0, 1), (0, 1)]
        with pytest.raises(ZeroDivisionError):
            next(results)
        with pytest.raises(ZeroDivisionError):
            list(executor.map(divmod, [1, 1], [1, 0], chunksize=2))


def test_map_reads_ahead_no_further_than_its_buffer() -> None:
    taken: list[int] = []

    def endless() -> Any:
        while True:
            taken.append(len(taken))
            yield taken[-1]

    results = FtrayExecutor(2).map(abs, endless(), buffersize=4)  # keeps the executor
    assert [next(results) for _ in range(20)] == list(range(20))
    assert len(taken) == 24
    results.close()  # type: ignore[attr-defined]

    with FtrayExecutor(2) as executor:
        taken.clear()
        chunks = executor.map(abs, endless(), buffersize=4, chunksize=2)
        assert [next(chunks) for _ in range(6)] == list(range(6))
        assert len(taken) <= 12


def test_map_gives_up_after_its_timeout(tmp_path: Path) -> None:
    with FtrayExecutor(1) as executor:
        results = executor.map(touch_and_wait, [tmp_path / "a", tmp_path / "b"], [tmp_path / "go"] * 2, timeout=0.05)
        queued = executor.submit(abs, -1)
        with pytest.raises(TimeoutError):
            next(results)
        (tmp_path / "go").touch()
        assert queued.result() == 1
        assert not (tmp_path / "b").exists()  # it was cancelled before it began


# --- futures --------------------------------------------------------------------------------------------------------


def test_what_is_queued_can_be_cancelled_and_what_runs_cannot(tmp_path: Path) -> None:
    told: list[Future[Any]] = []
    with FtrayExecutor(1) as executor:
        first = executor.submit(touch_and_wait, tmp_path / "first", tmp_path / "go")
        second = executor.submit(touch_and_wait, tmp_path / "second", tmp_path / "go")
        third = executor.submit(touch_and_wait, tmp_path / "third", tmp_path / "go")
        second.add_done_callback(told.append)
        wait_for_file(tmp_path / "first")
        assert first.running()
        assert not first.cancel()
        assert not second.running()
        assert second.cancel()
        assert told == [second]
        (tmp_path / "go").touch()
        assert first.result() == "first"
        assert third.result() == "third"
    assert second.cancelled()
    assert not (tmp_path / "second").exists()
    assert wait([second], 5).done == {second}


def test_no_more_run_at_once_than_there_are_workers(tmp_path: Path) -> None:
    with FtrayExecutor(2) as executor:
        # Short ones are handed out far ahead; among them some take unexpectedly long, and are recalled.
        lengths_s = [0.0] * 200 + [0.1] * 6
        assert overlap_max(list(executor.map(span, lengths_s))) <= 2
        # And as many as there are workers.
        list(executor.map(meet, [tmp_path] * 2, [2] * 2))


def test_one_worker_runs_calls_in_their_order() -> None:
    ran: list[int] = []

    def note(i: int, ran: list[int] = ran) -> list[int]:
        ran.append(i)  # the worker's own list: it keeps the function
        return ran if i == 999 else []

    with FtrayExecutor(1) as executor:
        # This thread and the executor's hand out by turns.
        futures = [executor.submit(note, i) for i in range(1000)]
        assert futures[-1].result() == list(range(1000))


def test_two_executors_have_workers_of_their_own(tmp_path: Path) -> None:
    with FtrayExecutor(1) as one, FtrayExecutor(1) as other:
        held = one.submit(touch_and_wait, tmp_path / "held", tmp_path / "go")
        assert other.submit(abs, -2).result() == 2
        (tmp_path / "go").touch()
        assert held.result() == "held"


def test_wait_and_as_completed(tmp_path: Path) -> None:
    with FtrayExecutor(2) as executor:
        slow = executor.submit(touch_and_wait, tmp_path / "slow", tmp_path / "go")
        bad = executor.submit(divmod, 1, 0)
        done, not_done = wait([slow, bad], return_when=FIRST_EXCEPTION)
        assert (done, not_done) == ({bad}, {slow})
        (tmp_path / "go").touch()
        assert set(as_completed([slow, bad])) == {slow, bad}


def test_callbacks_may_submit_and_may_raise(caplog: pytest.LogCaptureFixture) -> None:
    chained: list[int] = []
    over = threading.Event()
    with FtrayExecutor(1) as executor:

        def again(future: Future[int]) -> None:
            chained.append(future.result())
            if len(chained) < 20:
                executor.submit(abs, -len(chained)).add_done_callback(again)
            else:
                over.set()
                raise RuntimeError("from a callback")

        executor.submit(abs, 0).add_done_callback(again)
        assert over.wait(10)
        assert executor.submit(abs, -3).result() == 3
    assert chained == list(range(20))
    assert "exception calling callback" in caplog.text


def test_under_asyncio() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        with FtrayExecutor(2) as executor:
            return await asyncio.gather(*(loop.run_in_executor(executor, abs, -i) for i in range(5)))

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


def test_many_threads_submit_and_cancel() -> None:
    seeds = random.Random(1)
    outcomes: list[list[tuple[int, Future[int]]]] = [[] for _ in range(4)]
    executor = FtrayExecutor(3)

    def use(mine: list[tuple[int, Future[int]]], random_: random.Random) -> None:
        for i in range(300):
            mine.append((i, executor.submit(abs, -i)))
            if random_.random() < 0.3:
                random_.choice(mine)[1].cancel()
            if random_.random() < 0.05:
                mine[-1][1].exception() if not mine[-1][1].cancelled() else None

    threads = [threading.Thread(target=use, args=(mine, random.Random(seeds.random()))) for mine in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    executor.shutdown()
    for mine in outcomes:
        assert all(future.cancelled() or future.result(0) == i for i, future in mine)
    engine = executor._engine
    assert (engine.running, engine.load_us, len(engine.out), len(engine.queue)) == (0, 0, 0, 0)


def test_a_runtime_environment_for_the_calls(tmp_path: Path) -> None:
    (tmp_path / "text").touch()
    env = {"env_vars": {"FOR_CALLS": "yes"}, "working_dir": tmp_path}
    for _ in range(2):  # the second executor uses what the first has left
        with FtrayExecutor(1, runtime_env=env) as executor, FtrayExecutor(1) as other:
            assert executor.submit(os.getenv, "FOR_CALLS").result() == "yes"
            assert other.submit(os.getenv, "FOR_CALLS").result() is None
            (tmp_path / "late").touch()
            assert executor.submit(os.listdir).result() == ["text"]  # the folder as the executor has found it
        (tmp_path / "late").unlink()
    with pytest.raises(ValueError, match="nowhere"):
        FtrayExecutor(1, runtime_env={"working_dir": tmp_path / "nowhere"})


# --- errors ---------------------------------------------------------------------------------------------------------


def test_an_exception_has_its_own_type_and_the_remote_traceback() -> None:
    with FtrayExecutor(1) as executor:
        error = executor.submit(raise_deep).exception()
        assert type(error) is ValueError
        assert error.args == ("not there",)
        remote = error.__cause__
        assert isinstance(remote, TaskError)
        assert remote.function_name == "raise_deep"
        assert 'raise ValueError("not there") from error' in remote.traceback_str
        assert type(remote.__cause__) is KeyError
        custom = executor.submit(raise_custom).exception()
        assert type(custom) is Custom
        assert (custom.a, custom.b, str(custom)) == (1, 2, "1 and 2")
        ending = executor.submit(exit, 3).exception()  # would end this program if it were raised as it is
        assert type(ending) is TaskError
        assert isinstance(ending.cause, SystemExit)


def test_what_cannot_be_pickled_fails_its_future_alone() -> None:
    with FtrayExecutor(1) as executor:
        lock = threading.Lock()
        assert isinstance(executor.submit(abs, lock).exception(), SerializationError)
        assert isinstance(executor.submit(lambda: lock).exception(), SerializationError)
        assert isinstance(executor.submit(threading.Lock).exception(), SerializationError)  # its result
        assert list(executor.map(abs, [-1, -2])) == [1, 2]


@pytest.mark.parametrize("bad", [None, 3, "print", [abs]])
def test_only_what_can_be_called_is_taken(bad: Any) -> None:
    with FtrayExecutor(1) as executor:
        with pytest.raises(TypeError, match="cannot be called"):
            executor.submit(bad)
        with pytest.raises(TypeError, match="cannot be called"):
            executor.map(bad, [1])


def test_a_remote_function_is_no_callable() -> None:
    remote = ftray.remote(raise_deep)
    with FtrayExecutor(1) as executor, pytest.raises(TypeError, match="__wrapped__"):
        executor.submit(remote)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": -1}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": 1.5}, TypeError, "whole number"),
        ({"max_workers": True}, TypeError, "whole number"),
        ({"initializer": 3}, TypeError, "initializer must be a callable"),
        ({"max_retries": -2}, ValueError, "max_retries"),
        ({"num_returns": 2}, TypeError, "num_returns is not an option"),
        ({"mp_context": None}, TypeError, "unknown option 'mp_context'"),
        ({"num_cpus": -1}, ValueError, "num_cpus"),
    ],
)
def test_wrong_arguments_of_an_executor(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        FtrayExecutor(**arguments)


def test_wrong_arguments_of_map() -> None:
    with FtrayExecutor(1) as executor:
        with pytest.raises(ValueError, match="chunksize must be >= 1"):
            executor.map(abs, [1], chunksize=0)
        with pytest.raises(ValueError, match="buffersize"):
            executor.map(abs, [1], buffersize=0)
        with pytest.raises(TypeError, match="buffersize"):
            executor.map(abs, [1], buffersize=1.5)  # type: ignore[arg-type]


def test_the_default_is_as_many_as_fit() -> None:
    with FtrayExecutor() as all_cpus, FtrayExecutor(num_cpus=2) as pairs, FtrayExecutor(num_cpus=3) as one:
        assert [each._max_workers for each in (all_cpus, pairs, one)] == [4, 2, 1]


# --- deaths of workers ----------------------------------------------------------------------------------------------


def test_the_death_of_a_worker_repeats_the_call(tmp_path: Path) -> None:
    with FtrayExecutor(2) as executor:
        assert executor.submit(kill_own_worker, tmp_path / "mark", 1).result() == 2
    with FtrayExecutor(2, max_retries=0) as executor:
        error = executor.submit(kill_own_worker, tmp_path / "other", 1).exception()
        assert isinstance(error, CallCrashedError)
        assert isinstance(error, WorkerCrashedError)
        assert isinstance(error, BrokenExecutor)
        assert error.death is not None
        assert "SIGKILL" in str(error)
        assert "kill_own_worker" in str(error)
        assert executor.submit(abs, -1).result() == 1  # it goes on


# --- initializers ---------------------------------------------------------------------------------------------------


def note_pid(directory: Path, what: str) -> None:
    with (directory / f"{what}-{os.getpid()}").open("a") as file:
        file.write("x")


def pid_after_meeting(directory: Path) -> int:
    meet(directory, 2)
    return os.getpid()


def test_an_initializer_runs_once_in_each_worker_of_each_executor(tmp_path: Path) -> None:
    (tmp_path / "met").mkdir()
    with FtrayExecutor(2, initializer=note_pid, initargs=(tmp_path, "one")) as executor:
        pids = set(executor.map(pid_after_meeting, [tmp_path / "met"] * 2))
        list(executor.map(abs, range(50)))
        executor.submit(lambda: None).result()
    assert len(pids) == 2
    ran = {int(path.name.split("-")[1]) for path in tmp_path.glob("one-*")}
    assert pids <= ran
    assert {path.read_text() for path in tmp_path.glob("one-*")} == {"x"}
    with FtrayExecutor(1, initializer=note_pid, initargs=(tmp_path, "two")) as executor:
        pid = executor.submit(os.getpid).result()
    assert (tmp_path / f"two-{pid}").read_text() == "x"


def test_a_large_initializer() -> None:
    kept: dict[str, bytes] = {}
    data = os.urandom(200_000)
    with FtrayExecutor(1, initializer=lambda x: kept.update(data=x), initargs=(data,)) as executor:
        assert executor.submit(abs, -1).result() == 1


def fail_when_told(go: Path) -> None:
    wait_for_file(go)
    raise ValueError("error in initializer")


def test_a_failing_initializer_breaks_the_executor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    executor = FtrayExecutor(1, initializer=fail_when_told, initargs=(tmp_path / "go",))
    futures = [executor.submit(abs, -i) for i in range(4)]
    (tmp_path / "go").touch()
    for future in futures:
        error = future.exception()
        assert isinstance(error, BrokenFtrayExecutor)
        assert "ValueError: error in initializer" in str(error)
        assert type(error.__cause__) is ValueError
    with pytest.raises(BrokenExecutor, match="error in initializer"):
        executor.submit(abs, 1)
    with pytest.raises(BrokenExecutor, match="error in initializer"):
        executor.map(abs, [1])
    executor.shutdown()
    assert "Exception in initializer" in caplog.text
