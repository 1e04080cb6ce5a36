"""Tasks: arguments, returns, nesting, resources, retries, the deaths of workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from integration.harness import meet, overlap_max, wait_for_file, wait_until

import ftray
from ftray import exceptions

SESSION = {"num_cpus": 2, "resources": {"widget": 2}, "_system_config": {"infeasible_timeout_ms": 200}}
pytestmark = pytest.mark.usefixtures("session")


# --- arguments and returns ------------------------------------------------------------------------------------------


def test_arguments_of_all_kinds() -> None:
    @ftray.remote
    def show(a: Any, b: Any = 2, *rest: Any, c: Any, d: Any = 4, **more: Any) -> Any:
        return a, b, rest, c, d, more

    assert ftray.get(show.remote(1, c=3)) == (1, 2, (), 3, 4, {})
    assert ftray.get(show.remote(1, 5, 6, 7, c=8, d=9, e=10)) == (1, 5, (6, 7), 8, 9, {"e": 10})
    assert ftray.get(show.remote(ftray.put(1), c=ftray.put([3]))) == (1, 2, (), [3], 4, {})
    assert ftray.get(show.remote(None, "ä", b"x", 1.5, c={1: (2,)}, d={3}, e=True)) == (
        None, "ä", (b"x", 1.5), {1: (2,)}, {3}, {"e": True},
    )  # fmt: skip


def test_missing_arguments_are_a_type_error_of_the_call() -> None:
    @ftray.remote
    def two(a: int, b: int) -> int:
        return a + b

    with pytest.raises(TypeError, match="two.*missing a required argument: 'b'"):
        two.remote(1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'c'"):
        two.remote(1, 2, c=2)


def test_a_large_argument_arrives_whole() -> None:
    @ftray.remote
    def size(data: bytes, again: bytes) -> tuple[int, int, bool]:
        return len(data), len(again), data[:10] == again[:10]

    data = os.urandom(3_000_000)
    assert ftray.get(size.remote(data, again=data)) == (3_000_000, 3_000_000, True)
    ref = ftray.put(data)
    assert ftray.get([size.remote(ref, ref) for _ in range(5)]) == [(3_000_000, 3_000_000, True)] * 5


def test_many_small_tasks() -> None:
    @ftray.remote
    def double(x: int) -> int:
        return 2 * x

    assert ftray.get([double.remote(i) for i in range(2000)]) == [2 * i for i in range(2000)]


def test_several_returns() -> None:
    @ftray.remote(num_returns=3)
    def three() -> Any:
        return 1, "two", bytes(200_000)

    a, b, c = three.remote()
    assert ftray.get([a, b]) == [1, "two"]
    assert len(ftray.get(c)) == 200_000

    @ftray.remote
    def some(n: int) -> Any:
        return list(range(n))

    assert ftray.get(some.options(num_returns=2).remote(2)) == [0, 1]
    assert ftray.get(some.remote(2)) == [0, 1]

    @ftray.remote(num_returns=2)
    def generate() -> Any:
        yield "x"
        yield "y"

    assert ftray.get(generate.remote()) == ["x", "y"]


def test_no_returns(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    @ftray.remote(num_returns=0)
    def run() -> None:
        marker.touch()

    assert run.remote() is None
    wait_for_file(marker)


@pytest.mark.parametrize(
    ("value", "text"),
    [((1, 2, 3), "num_returns is 2, but the task returned 3 values"), (5, "returned one int"), ("ab", "one str")],
)
def test_returns_that_do_not_match_are_a_value_error(value: Any, text: str) -> None:
    @ftray.remote(num_returns=2)
    def wrong() -> Any:
        return value

    for ref in wrong.remote():
        with pytest.raises(ValueError, match=text):
            ftray.get(ref)


def test_options_override_and_leave_the_original_alone() -> None:
    @ftray.remote(num_cpus=1, max_retries=0)
    def name() -> Any:
        return ftray.get_runtime_context().get_task_name()

    other = name.options(num_cpus=0.5, num_returns=1, name="other")
    assert ftray.get(other.remote()) == ftray.get(name.remote()) == "name"
    assert name._needs == {"CPU": 1.0}
    assert other._needs == {"CPU": 0.5}


def test_calling_a_remote_function_directly_says_what_to_do() -> None:
    @ftray.remote
    def add(a: int, b: int) -> int:
        "Adds."
        return a + b

    with pytest.raises(TypeError, match=r"'add' cannot be called directly: use add\.remote\(\.\.\.\)"):
        add(1, 2)
    assert add.__wrapped__(1, 2) == 3
    assert add.__doc__ == "Adds."
    assert add.__name__ == "add"


def test_closures_lambdas_and_remote_functions_inside_others() -> None:
    factor = 3
    triple = ftray.remote(lambda x: factor * x)

    @ftray.remote
    def twice(function: Any, x: int) -> Any:
        return ftray.get(function.remote(ftray.get(triple.remote(x))))

    assert ftray.get(triple.remote(5)) == 15
    assert ftray.get(twice.remote(triple, 2)) == 18
    functions = [ftray.remote(lambda x, n=n: x + n) for n in range(5)]
    assert ftray.get([function.remote(10) for function in functions]) == [10, 11, 12, 13, 14]


def test_a_function_defined_anew_is_the_new_one() -> None:
    def version(n: int) -> Any:
        @ftray.remote
        def which() -> int:
            return n

        return which

    assert [ftray.get(version(n).remote()) for n in range(4)] == [0, 1, 2, 3]


def test_results_of_tasks_as_arguments() -> None:
    @ftray.remote
    def add(a: int, b: int) -> int:
        return a + b

    total = ftray.put(0)
    for i in range(50):
        total = add.remote(total, i)
    assert ftray.get(total) == sum(range(50))
    refs: list[Any] = [add.remote(i, 0) for i in range(16)]
    while len(refs) > 1:
        refs = [add.remote(a, b) for a, b in zip(refs[::2], refs[1::2], strict=True)]
    assert ftray.get(refs[0]) == sum(range(16))


def test_the_runtime_context_of_a_task() -> None:
    @ftray.remote
    def context() -> tuple[Any, ...]:
        c = ftray.get_runtime_context()
        return c.get_job_id(), c.get_node_id(), c.get_task_id(), c.get_task_name(), c.get_actor_id(), c.get_worker_id()

    here = ftray.get_runtime_context()
    ref = context.remote()
    job, node, task, name, actor, worker = ftray.get(ref)
    assert (job, node) == (here.get_job_id(), here.get_node_id())
    assert task == ref.task_id()
    assert name == "context"
    assert actor is None
    assert worker != here.get_worker_id()
    assert here.get_task_id() is None


# --- nesting --------------------------------------------------------------------------------------------------------


def test_nesting_deeper_than_there_are_cpus() -> None:
    @ftray.remote
    def down(n: int) -> int:
        return 0 if n == 0 else 1 + ftray.get(down.remote(n - 1))

    assert ftray.get(down.remote(8), timeout=30) == 8


def test_recursion_with_two_children_each() -> None:
    @ftray.remote
    def fib(n: int) -> int:
        return n if n < 2 else sum(ftray.get([fib.remote(n - 1), fib.remote(n - 2)]))

    assert ftray.get(fib.remote(7), timeout=30) == 13


def test_a_parent_that_waits_lends_its_cpu() -> None:
    @ftray.remote(num_cpus=2)
    def inner() -> str:
        return "inner"

    @ftray.remote(num_cpus=2)
    def outer() -> str:
        ready, _ = ftray.wait([inner.remote()], timeout=20)
        return "outer " + ftray.get(ready[0])

    assert ftray.get(outer.remote(), timeout=20) == "outer inner"
    wait_until(lambda: ftray.available_resources().get("CPU") == 2, what="all CPUs back")


def test_parents_of_many_children() -> None:
    @ftray.remote
    def child(i: int) -> int:
        return i

    @ftray.remote
    def parent(n: int) -> int:
        return sum(ftray.get([child.remote(i) for i in range(n)]))

    assert ftray.get([parent.remote(30) for _ in range(10)], timeout=30) == [sum(range(30))] * 10


# --- resources ------------------------------------------------------------------------------------------------------


def test_two_cpus_run_two_tasks_at_once_and_no_more(tmp_path: Path) -> None:
    directory = str(tmp_path)

    @ftray.remote
    def together() -> None:
        meet(directory, 2)

    @ftray.remote
    def span() -> tuple[float, float]:
        start = time.monotonic()
        time.sleep(0.02)
        return start, time.monotonic()

    ftray.get([together.remote() for _ in range(2)])
    assert overlap_max(ftray.get([span.remote() for _ in range(8)])) <= 2
    assert overlap_max(ftray.get([span.options(num_cpus=2).remote() for _ in range(4)])) == 1


def test_fractions_of_a_cpu(tmp_path: Path) -> None:
    directory = str(tmp_path)

    @ftray.remote(num_cpus=0.5)
    def together() -> None:
        meet(directory, 4)

    @ftray.remote(num_cpus=0.75)
    def span() -> tuple[float, float]:
        start = time.monotonic()
        time.sleep(0.02)
        return start, time.monotonic()

    ftray.get([together.remote() for _ in range(4)], timeout=20)
    assert overlap_max(ftray.get([span.remote() for _ in range(6)])) <= 2


def test_tasks_without_cpus_do_not_wait_for_one(tmp_path: Path) -> None:
    directory = str(tmp_path)

    @ftray.remote(num_cpus=0)
    def together() -> None:
        meet(directory, 5)

    ftray.get([together.remote() for _ in range(5)], timeout=20)


def test_custom_resources(tmp_path: Path) -> None:
    directory = str(tmp_path)

    @ftray.remote(num_cpus=0, resources={"widget": 1})
    def together() -> None:
        meet(directory, 2)

    @ftray.remote(num_cpus=0, resources={"widget": 1})
    def span() -> tuple[float, float]:
        start = time.monotonic()
        time.sleep(0.02)
        return start, time.monotonic()

    ftray.get([together.remote() for _ in range(2)], timeout=20)
    assert overlap_max(ftray.get([span.remote() for _ in range(6)])) <= 2
    assert ftray.cluster_resources()["widget"] == 2


@pytest.mark.parametrize(
    ("options", "what"),
    [({"num_cpus": 100}, "CPU"), ({"num_gpus": 1}, "GPU"), ({"resources": {"gadget": 1}}, "gadget")],
)
def test_what_no_node_can_run_fails_with_what_is_missing(options: dict[str, Any], what: str) -> None:
    @ftray.remote
    def never() -> None: ...

    ref = never.options(**options).remote()
    with pytest.raises(exceptions.TaskUnschedulableError, match=what) as caught:
        ftray.get(ref, timeout=10)
    assert "never" in str(caught.value)

    @ftray.remote
    def fine() -> int:
        return 1

    assert ftray.get(fine.remote(), timeout=10) == 1


# --- retries and deaths ---------------------------------------------------------------------------------------------


def test_a_task_whose_worker_is_killed_runs_again(tmp_path: Path) -> None:
    marker = tmp_path / "died"

    @ftray.remote
    def once() -> tuple[str, int]:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "survived", ftray.get_runtime_context().get_attempt_number()

    assert ftray.get(once.remote(), timeout=20) == ("survived", 1)


def test_retries_are_counted(tmp_path: Path) -> None:
    count = tmp_path / "count"

    @ftray.remote(max_retries=2)
    def dies() -> None:
        with count.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(exceptions.WorkerCrashedError, match="SIGKILL"):
        ftray.get(dies.remote(), timeout=20)
    assert count.read_text() == "xxx"


def test_a_death_without_retries_says_who_how_and_what() -> None:
    @ftray.remote(max_retries=0)
    def speaks_and_dies() -> None:
        print("last words of the worker", file=sys.stderr)
        print("pid is", os.getpid(), file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(exceptions.WorkerCrashedError) as caught:
        ftray.get(speaks_and_dies.remote(), timeout=20)
    death = caught.value.death
    assert death is not None, caught.value
    assert death.signal == signal.SIGKILL
    assert death.node_id == ftray.get_runtime_context().get_node_id()
    assert "speaks_and_dies" in death.what
    assert "last words of the worker" in death.stderr_tail
    assert f"pid is {death.pid}" in death.stderr_tail
    text = str(caught.value)
    for part in ("SIGKILL", str(death.pid), death.node_id[:12], "speaks_and_dies", "last words of the worker"):
        assert part in text


def test_an_exit_code_is_reported() -> None:
    @ftray.remote(max_retries=0)
    def exits() -> None:
        os._exit(3)

    with pytest.raises(exceptions.WorkerCrashedError, match="exited with code 3") as caught:
        ftray.get(exits.remote(), timeout=20)
    assert caught.value.death is not None
    assert caught.value.death.exit_code == 3


def test_a_crash_in_native_code_is_reported() -> None:
    @ftray.remote(max_retries=0)
    def crashes() -> None:
        import ctypes

        ctypes.string_at(0)

    with pytest.raises(exceptions.WorkerCrashedError, match="SIGSEGV"):
        ftray.get(crashes.remote(), timeout=20)


def failing(path: Path, error: type[BaseException], times: int, **options: Any) -> Any:
    """A task that raises `error` the first `times` times and notes each run in `path`."""

    @ftray.remote(**options)
    def run() -> int:
        with path.open("a") as file:
            file.write("x")
        runs = path.stat().st_size
        if runs <= times:
            raise error(f"run {runs}")
        return int(runs)

    return run


def test_exceptions_are_not_retried_by_default(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    with pytest.raises(ValueError, match="run 1"):
        ftray.get(failing(path, ValueError, 1).remote(), timeout=20)
    assert path.read_text() == "x"


def test_retry_exceptions_true_retries_all(tmp_path: Path) -> None:
    assert ftray.get(failing(tmp_path / "a", ValueError, 2, retry_exceptions=True).remote(), timeout=20) == 3
    spent = failing(tmp_path / "b", ValueError, 9, retry_exceptions=True, max_retries=1)
    with pytest.raises(ValueError, match="run 2"):
        ftray.get(spent.remote(), timeout=20)


def test_retry_exceptions_list_retries_those_and_their_subclasses(tmp_path: Path) -> None:
    kinds = [LookupError, ZeroDivisionError]
    assert ftray.get(failing(tmp_path / "a", KeyError, 2, retry_exceptions=kinds).remote(), timeout=20) == 3
    assert ftray.get(failing(tmp_path / "b", ZeroDivisionError, 1, retry_exceptions=kinds).remote(), timeout=20) == 2
    with pytest.raises(ValueError, match="run 1"):
        ftray.get(failing(tmp_path / "c", ValueError, 1, retry_exceptions=kinds).remote(), timeout=20)


def test_a_death_amid_many_pipelined_tasks_loses_none(tmp_path: Path) -> None:
    @ftray.remote
    def square(i: int) -> int:
        marker = tmp_path / str(i)
        if i in (50, 170, 420) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return i * i

    ftray.get([square.remote(1) for _ in range(100)])  # their time is known: many go to each worker at once
    assert ftray.get([square.remote(i) for i in range(500)], timeout=30) == [i * i for i in range(500)]


def test_a_death_takes_no_retry_from_tasks_that_had_not_begun(tmp_path: Path) -> None:
    @ftray.remote(max_retries=0)
    def square(i: int) -> int:
        if i == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return i * i

    refs = [square.remote(i) for i in range(100)]
    for i, ref in enumerate(refs):
        if i == 40:
            with pytest.raises(exceptions.WorkerCrashedError):
                ftray.get(ref, timeout=20)
        else:
            assert ftray.get(ref, timeout=20) == i * i


def test_workers_killed_from_outside_while_tasks_run(tmp_path: Path) -> None:
    @ftray.remote(max_retries=-1)
    def work(i: int) -> tuple[int, int]:
        time.sleep(0.002)
        return i, os.getpid()

    refs = [work.remote(i) for i in range(150)]
    killed: set[int] = set()
    for ref in refs[::30]:
        _, pid = ftray.get(ref, timeout=20)
        if pid not in killed:
            killed.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    assert [i for i, _ in ftray.get(refs, timeout=30)] == list(range(150))
    assert killed


def test_a_task_that_calls_sys_exit_fails_and_others_go_on() -> None:
    @ftray.remote(max_retries=0)
    def leaves() -> None:
        sys.exit("that is enough")

    @ftray.remote
    def fine(i: int) -> int:
        return i

    ref = leaves.remote()
    others = [fine.remote(i) for i in range(50)]
    with pytest.raises(exceptions.FtrayError, match="SystemExit") as caught:
        ftray.get(ref, timeout=20)
    assert not isinstance(caught.value, SystemExit)
    assert ftray.get(others, timeout=20) == list(range(50))


def test_a_short_task_does_not_wait_behind_a_long_one(tmp_path: Path) -> None:
    release = tmp_path / "release"

    @ftray.remote
    def task(kind: str) -> str:
        if kind == "long":
            wait_for_file(release)
        return kind

    ftray.get([task.remote("short") for _ in range(200)])  # known as short: many go to each worker
    long = task.remote("long")
    short = [task.remote("short") for _ in range(200)]
    try:
        assert ftray.get(short, timeout=10) == ["short"] * 200
        assert ftray.wait([long], timeout=0) == ([], [long])
    finally:
        release.touch()
    assert ftray.get(long, timeout=10) == "long"


def test_submitting_from_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    @ftray.remote
    def double(x: int) -> int:
        return 2 * x

    def many(start: int) -> list[int]:
        return list(ftray.get([double.remote(i) for i in range(start, start + 100)], timeout=20))

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(many, range(0, 1200, 100)))
    assert [x for part in results for x in part] == [2 * i for i in range(1200)]


def test_a_task_that_exits_takes_no_other_along() -> None:
    @ftray.remote(max_retries=0)
    def leave() -> None:
        sys.exit(3)

    @ftray.remote(max_retries=0)
    def stay() -> int:
        return 1

    for _ in range(5):
        refs = [stay.remote(), leave.remote(), stay.remote(), stay.remote()]
        with pytest.raises(exceptions.TaskError):
            ftray.get(refs.pop(1), timeout=20)
        assert ftray.get(refs, timeout=20) == [1, 1, 1]


def test_init_inside_a_task_joins_the_session_that_runs_it() -> None:
    @ftray.remote
    def again() -> tuple[str, str]:
        try:
            ftray.init()
        except exceptions.AlreadyInitializedError as error:
            return ftray.init(ignore_reinit_error=True).node_id, str(error)
        return "", ""

    node_id, error = ftray.get(again.remote(), timeout=20)
    assert node_id == ftray.get_runtime_context().get_node_id()
    assert "belongs to the session" in error


def test_a_coroutine_function_is_no_task() -> None:
    async def coroutine() -> None: ...

    with pytest.raises(TypeError, match="coroutine"):
        ftray.remote(coroutine)
