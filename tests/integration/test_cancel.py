"""`ftray.cancel`: whatever a task is doing and wherever it is, it ends in TaskCancelledError; others do not notice."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from integration.cancelling import GET_S, Plain, begun, check_cancelled, hold, holding, pid_of_worker
from integration.harness import is_running, wait_for_file, wait_for_none, wait_until, worker_entries

import ftray
from ftray import exceptions
from ftray.ownership.dispatch import TaskDispatcher
from ftray.worker.core import get_core

SESSION = {"num_cpus": 2, "resources": {"slot": 1}, "_system_config": {"infeasible_timeout_ms": 60_000}}
pytestmark = pytest.mark.usefixtures("session")

def pipelining(function: Any, monkeypatch: pytest.MonkeyPatch) -> TaskDispatcher:
    """From now on many tasks of this function are pushed to one worker at a time, and none is recalled."""
    function._info.mean_us = 10.0
    dispatcher = get_core().submitter.dispatcher
    monkeypatch.setattr(dispatcher, "tick", lambda linger_ticks: True)
    return dispatcher


# --- before it runs ---------------------------------------------------------------------------------------------------


def test_queued_tasks_never_run(tmp_path: Path) -> None:
    @ftray.remote(resources={"slot": 1})
    def leave_trace(number: int, gate: str = "") -> int:
        if gate:
            Path(tmp_path, "first").touch()
            wait_for_file(gate)
        Path(tmp_path, f"ran-{number}").touch()
        return number

    gate = str(tmp_path / "gate")
    first = leave_trace.remote(-1, gate)
    refs = [leave_trace.remote(number) for number in range(6)]
    wait_for_file(tmp_path / "first")
    for index in (4, 0, 1):
        ftray.cancel(refs[index])
        check_cancelled(refs[index], "leave_trace")
    Path(gate).touch()
    assert ftray.get([first, refs[2], refs[3], refs[5]], timeout=GET_S) == [-1, 2, 3, 5]
    assert sorted(os.listdir(tmp_path)) == ["first", "gate", "ran--1", "ran-2", "ran-3", "ran-5"]
    ftray.cancel(refs[2])  # has ended: its value stays
    assert ftray.get(refs[2]) == 2


def test_what_can_never_run_can_be_cancelled() -> None:
    refs = [pid_of_worker.options(resources={"nowhere": 1}).remote() for _ in range(3)]
    for ref in refs:
        ftray.cancel(ref)
        check_cancelled(ref, "pid_of_worker")
    from ftray.api.context import ask_raylet

    wait_for_none(lambda: [row for row in ask_raylet("status")["demands"] if row["want"] > row["held"]], what="demand")


def test_a_task_that_waits_for_arguments_and_what_waits_for_it(tmp_path: Path) -> None:
    @ftray.remote
    def add(a: Any, b: int) -> int:
        return a + b

    slow = holding.remote(str(tmp_path))
    middle = add.remote(slow, 1)
    last = add.remote(middle, 1)
    ftray.cancel(middle)
    check_cancelled(middle, "add")
    with pytest.raises(exceptions.TaskCancelledError) as caught:
        ftray.get(last, timeout=GET_S)
    assert caught.value.task_id == middle.task_id()  # the one that was cancelled, not the one that waited for it
    begun(tmp_path)
    assert ftray.wait([slow], timeout=0)[0] == []  # what it depended on goes on
    ftray.cancel(slow)
    check_cancelled(slow, "holding")


def test_tasks_pushed_behind_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @ftray.remote(resources={"slot": 1})
    def quick(number: int, gate: str = "") -> int:
        if gate:
            Path(tmp_path, "first").touch()
            wait_for_file(gate)
        Path(tmp_path, f"ran-{number}").touch()
        return number

    assert ftray.get(quick.remote(0), timeout=GET_S) == 0
    dispatcher = pipelining(quick, monkeypatch)
    gate = str(tmp_path / "gate")
    first = quick.remote(-1, gate)
    refs = [quick.remote(number) for number in range(100, 106)]
    wait_for_file(tmp_path / "first")
    for index in (0, 3, 5):
        assert dispatcher.find_pushed(refs[index].binary()[:16])
        ftray.cancel(refs[index], force=index == 3)  # the worker runs another task: it is not killed
        check_cancelled(refs[index], "quick")
    Path(gate).touch()
    assert ftray.get([first, refs[1], refs[2], refs[4]], timeout=GET_S) == [-1, 101, 102, 104]
    assert not [number for number in (100, 103, 105) if Path(tmp_path, f"ran-{number}").exists()]
    assert not get_core().canceller.forced


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_it_is_interrupted_wherever_it_waits_and_its_worker_goes_on(tmp_path: Path) -> None:
    @ftray.remote(resources={"slot": 1})
    def busy(kind: str, never: list[Any]) -> None:
        try:
            Path(tmp_path, kind).write_text(str(os.getpid()))
            if kind == "sleeps":
                hold()
            elif kind == "computes":
                while True:
                    pass
            elif kind == "takes a lock":
                lock = threading.Lock()
                lock.acquire()
                lock.acquire()
            elif kind == "gets":
                ftray.get(never[0])
            elif kind == "waits":
                ftray.wait(never)
            elif kind == "reads":
                os.read(os.pipe()[0], 1)
            elif kind == "runs asyncio":
                asyncio.run(asyncio.sleep(60))
            else:
                import trio

                trio.run(trio.sleep, 60)
        except BaseException as error:
            Path(tmp_path, kind).write_text(type(error).__name__)
            raise

    pids = set()
    never = pid_of_worker.options(resources={"nowhere": 1}).remote()
    for kind in ("sleeps", "computes", "takes a lock", "gets", "waits", "reads", "runs asyncio", "runs trio"):
        ref = busy.remote(kind, [never])
        path = tmp_path / kind
        pids.add(wait_until(lambda path=path: path.exists() and path.read_text()))
        ftray.cancel(ref)
        check_cancelled(ref, "busy")
        assert path.read_text() == "KeyboardInterrupt", kind
    assert len(pids) == 1
    assert str(ftray.get(pid_of_worker.options(resources={"slot": 1}).remote(), timeout=GET_S)) in pids
    ftray.cancel(never)


def test_a_builtin_function_is_interrupted_too(tmp_path: Path) -> None:
    sleep = ftray.remote(time.sleep)
    ref = sleep.remote(60)
    wait_until(lambda: get_core().submitter.dispatcher.find_pushed(ref.binary()[:16]))
    ftray.cancel(ref)
    check_cancelled(ref, "sleep")


@pytest.mark.parametrize("how", ["returns", "returns much", "returns references", "raises", "exits"])
def test_whatever_it_does_then_it_was_cancelled(how: str, tmp_path: Path) -> None:
    @ftray.remote(resources={"slot": 1}, max_retries=5, retry_exceptions=True)
    def stubborn() -> Any:
        try:
            Path(tmp_path, f"begun-{len(os.listdir(tmp_path))}").write_text(str(os.getpid()))
            hold()
        except KeyboardInterrupt:
            if how == "raises":
                raise ValueError("in the middle of it") from None
            if how == "exits":
                raise SystemExit(3) from None
        if how == "returns much":
            return bytes(1_000_000)
        if how == "returns references":
            return [ftray.put(b"x"), ftray.put(bytes(1_000_000))]
        return 7

    ref = stubborn.remote()
    begun(tmp_path)
    ftray.cancel(ref)
    check_cancelled(ref, "stubborn")
    assert len(os.listdir(tmp_path)) == 1  # it did not run again
    left = ftray.remote(resources={"slot": 1})(worker_entries)
    wait_for_none(lambda: ftray.get(left.remote(), timeout=GET_S), what="references in the worker")


def test_all_its_returns_and_whoever_waits_for_them(tmp_path: Path) -> None:
    left, right = holding.options(num_returns=2).remote(str(tmp_path))
    begun(tmp_path)
    found: list[Any] = []

    def wait() -> None:
        try:
            ftray.get(right)
        except exceptions.TaskCancelledError as error:
            found.append(error)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    future = left.future()

    async def cancel_and_await() -> None:
        ftray.cancel(left)
        with pytest.raises(exceptions.TaskCancelledError):
            await right

    asyncio.run(cancel_and_await())
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert isinstance(future.exception(GET_S), exceptions.TaskCancelledError)
    assert ftray.wait([left, right], num_returns=2, timeout=GET_S) == ([left, right], [])


def test_never_the_next_one() -> None:
    @ftray.remote
    def short(number: int) -> int:
        total = 0
        for n in range(300):
            total += n
        return number

    for round_ in range(5):
        refs = [short.remote(number) for number in range(120)]
        chosen = refs[round_::3]
        for ref in chosen:
            ftray.cancel(ref)
        for number, ref in enumerate(refs):
            try:
                found = ftray.get(ref, timeout=GET_S)
            except exceptions.TaskCancelledError as error:
                found = error.task_id
            assert found == number or (ref in chosen and found == ref.task_id())


def test_a_task_asks_whether_it_is_cancelled(tmp_path: Path) -> None:
    @ftray.remote
    def ask() -> None:
        context = ftray.get_runtime_context()
        before = context.is_canceled()
        try:
            Path(tmp_path, "begun-0").write_text(str(os.getpid()))
            hold()
        except KeyboardInterrupt:
            Path(tmp_path, "seen").write_text(f"{before} {context.is_canceled()} {context.is_cancelled()}")

    ref = ask.remote()
    begun(tmp_path)
    ftray.cancel(ref)
    check_cancelled(ref, "ask")
    assert Path(tmp_path, "seen").read_text() == "False True True"
    with pytest.raises(RuntimeError, match="a program is not cancelled"):
        ftray.get_runtime_context().is_canceled()


def test_it_is_not_retried_when_its_worker_dies(tmp_path: Path) -> None:
    @ftray.remote(max_retries=-1)
    def deaf() -> None:
        number = len(os.listdir(tmp_path)) // 2
        while True:
            try:
                Path(tmp_path, f"begun-{number}").write_text(str(os.getpid()))
                hold()
            except KeyboardInterrupt:
                Path(tmp_path, f"heard-{number}").touch()

    ref = deaf.remote()
    pid = begun(tmp_path)
    ftray.cancel(ref)
    wait_for_file(tmp_path / "heard-0")
    os.kill(pid, signal.SIGKILL)
    check_cancelled(ref, "deaf")
    assert sorted(os.listdir(tmp_path)) == ["begun-0", "heard-0"]


# --- force ------------------------------------------------------------------------------------------------------------


def test_force_kills_the_worker_and_costs_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @ftray.remote(resources={"slot": 1}, max_retries=1)
    def work(number: int, stay: bool = False) -> tuple[int, int]:
        if stay:
            Path(tmp_path, "begun-0").write_text(str(os.getpid()))
            while True:
                try:
                    hold()
                except KeyboardInterrupt:
                    pass
        return number, os.getpid()

    ftray.get(work.remote(0), timeout=GET_S)
    dispatcher = pipelining(work, monkeypatch)
    ref = work.remote(0, True)
    others = [work.remote(number) for number in range(1, 4)]
    records = [found[1] for x in others if (found := dispatcher.find_pushed(x.binary()[:16]))]
    assert len(records) == 3
    pid = begun(tmp_path)
    ftray.cancel(ref, force=True)
    check_cancelled(ref, "work")
    wait_for_none(lambda: is_running(pid))
    results = ftray.get(others, timeout=GET_S)
    assert [number for number, _ in results] == [1, 2, 3]
    assert pid not in {other for _, other in results}
    assert [(record.retries_left, record.solo) for record in records] == [(1, False)] * 3
    assert not get_core().canceller.forced


def test_a_death_that_was_asked_for_spends_no_retry(tmp_path: Path) -> None:
    """The task that was to be killed may end just before, and the kill then hit the one after it."""

    @ftray.remote(resources={"slot": 1}, max_retries=1)
    def twice() -> int:
        number = len(os.listdir(tmp_path))
        Path(tmp_path, f"begun-{number}").write_text(str(os.getpid()))
        if not number:
            hold()
        return ftray.get_runtime_context().get_attempt_number()

    ref = twice.remote()
    pid = begun(tmp_path)
    core = get_core()
    with core.lock:
        lease, task = core.submitter.dispatcher.find_pushed(ref.binary()[:16]) or pytest.fail("it was pushed")
        core.submitter.dispatcher.end_worker(lease)
    os.kill(pid, signal.SIGKILL)
    assert ftray.get(ref, timeout=GET_S) == 1
    assert task.retries_left == 1


def test_force_ends_native_code_that_holds_the_interpreter(tmp_path: Path) -> None:
    @ftray.remote
    def stuck() -> None:
        import ctypes

        Path(tmp_path, "begun-0").write_text(str(os.getpid()))
        ctypes.PyDLL(None).sleep(60)  # without letting go of the interpreter lock

    ref = stuck.remote()
    pid = begun(tmp_path)
    ftray.cancel(ref)
    ftray.cancel(ref, force=True)
    check_cancelled(ref, "stuck")
    wait_for_none(lambda: is_running(pid))


# --- children ---------------------------------------------------------------------------------------------------------


@ftray.remote(num_cpus=0)
def parent(directory: str, depth: int, number: int) -> None:
    children: list[Any] = [holding.remote(directory, number)]
    if depth:
        children.append(parent.remote(directory, depth - 1, number + 1))
        children.append(pid_of_worker.options(resources={"nowhere": 1}).remote())
    ftray.get(children)


@pytest.mark.parametrize("force", [False, True])
def test_the_whole_tree_below_is_cancelled(tmp_path: Path, force: bool) -> None:
    ref = parent.remote(str(tmp_path), 2, 0)
    pids = [begun(tmp_path, number) for number in range(3)]
    ftray.cancel(ref, force=force)
    check_cancelled(ref, "parent")
    if force:
        wait_for_none(lambda: [pid for pid in pids if is_running(pid)])
    else:
        for number in range(3):
            wait_for_file(tmp_path / f"interrupted-{number}")


def test_not_below_if_so_wanted(tmp_path: Path) -> None:
    @ftray.remote(num_cpus=0)
    def above(gate: str) -> list[Any]:
        child = holding.remote(str(tmp_path))
        try:
            begun(tmp_path)
            Path(tmp_path, "waits").touch()
            hold()
        except KeyboardInterrupt:
            wait_for_file(gate)  # it owns the child, which would end with its worker
        return [child]

    gate = str(tmp_path / "gate")
    ref = above.remote(gate)
    wait_for_file(tmp_path / "waits")
    ftray.cancel(ref, recursive=False)
    assert not Path(tmp_path, "interrupted-0").exists()
    pid = begun(tmp_path)
    assert is_running(pid)
    ftray.cancel(ref)  # again: all below
    wait_for_file(tmp_path / "interrupted-0")
    Path(gate).touch()
    check_cancelled(ref, "above")


# --- by others --------------------------------------------------------------------------------------------------------


def test_by_a_borrower(tmp_path: Path) -> None:
    @ftray.remote(num_cpus=0)
    def cancel(refs: list[Any], force: bool) -> None:
        for ref in refs:
            ftray.cancel(ref, force=force)

    refs = [holding.remote(str(tmp_path), number) for number in range(2)]
    queued = pid_of_worker.options(resources={"nowhere": 1}).remote()
    actor = ftray.remote(Plain).remote()
    (tmp_path / "call").mkdir()
    call = actor.stay.remote(str(tmp_path / "call"))
    pids = [begun(tmp_path, number) for number in range(2)]
    ftray.get(cancel.remote([refs[0], queued], False), timeout=GET_S)
    check_cancelled(refs[0], "holding")
    check_cancelled(queued, "pid_of_worker")
    assert Path(tmp_path, "interrupted-0").exists()
    ended = ftray.put(3), pid_of_worker.remote()
    ftray.get(ended[1], timeout=GET_S)
    ftray.get(cancel.remote([refs[1], call, ended[1]], True), timeout=GET_S)
    check_cancelled(refs[1], "holding")
    check_cancelled(call, "Plain.stay")  # force is not for actors: it lives
    assert ftray.get(actor.note.remote(1), timeout=GET_S) == 1
    wait_for_none(lambda: is_running(pids[1]))
    assert isinstance(ftray.get(ended[1]), int)
    with pytest.raises(ValueError, match=r"ftray\.put"):
        ftray.get(cancel.remote([ended[0]], False), timeout=GET_S)


def test_a_task_that_cancels_itself(tmp_path: Path) -> None:
    @ftray.remote(num_cpus=0)
    def suicidal(path: str) -> None:
        wait_for_file(path)
        with open(path, "rb") as file:
            import pickle

            ref = pickle.load(file)[0]
        ftray.cancel(ref)
        hold()

    ref = suicidal.remote(str(tmp_path / "ref"))
    import pickle

    (tmp_path / "new").write_bytes(pickle.dumps([ref]))
    (tmp_path / "new").rename(tmp_path / "ref")
    check_cancelled(ref, "suicidal")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_cancelled() -> None:
    actor = ftray.remote(Plain).remote()
    with pytest.raises(TypeError, match=r"ftray\.kill"):
        ftray.cancel(actor)
    with pytest.raises(TypeError, match=r"ftray\.kill"):
        ftray.cancel(actor._ftray_ref)
    with pytest.raises(ValueError, match=r"ftray\.put"):
        ftray.cancel(ftray.put(1))
    for wrong in (None, "ref", [actor.read.remote()], b"x" * 20):
        with pytest.raises(TypeError, match="takes an ObjectRef"):
            ftray.cancel(wrong)  # type: ignore[arg-type]
    slow = ftray.remote(Plain).options(resources={"nowhere": 1}).remote().note.remote(1)
    with pytest.raises(ValueError, match=r"force=True is not for calls of actors \(Plain\.note\)"):
        ftray.cancel(slow, force=True)
    assert ftray.wait([slow], timeout=0)[0] == []  # nothing has happened to it
    for name in ("force", "recursive"):
        with pytest.raises(TypeError, match=f"{name} must be a bool"):
            ftray.cancel(slow, **{name: 1})
    ftray.cancel(slow)
    check_cancelled(slow, "Plain.note")


def test_a_reference_of_an_earlier_session_is_refused() -> None:
    from integration.harness import run_driver

    driver = run_driver(
        """
        ftray.init(num_cpus=1)
        ref = ftray.remote(lambda: 1).remote()
        ftray.get(ref)
        ftray.shutdown()
        for init in (False, True):
            try:
                if init:
                    ftray.init(num_cpus=1)
                ftray.cancel(ref)
            except ftray.exceptions.FtrayError as error:
                say(type(error).__name__)
        ftray.shutdown()
        """
    )
    assert driver.out.split() == ["NotInitializedError", "ForeignRefError"]
    driver.close()
