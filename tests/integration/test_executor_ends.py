"""How executors of `ftray.util.FtrayExecutor` end: by `shutdown`, dropped, with their session, and with the program."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import textwrap
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
from integration.harness import run_driver, wait_for_file, wait_until

import ftray
from ftray.exceptions import WorkerCrashedError
from ftray.util import FtrayExecutor

SESSION = {"num_cpus": 4}
pytestmark = pytest.mark.usefixtures("session")


def touch_and_wait(here: Path, there: Path) -> str:
    """Says that it runs, and runs until it is told to end."""
    here.touch()
    wait_for_file(there)
    return here.name


def test_nothing_is_taken_after_shutdown() -> None:
    executor = FtrayExecutor(2)
    future = executor.submit(abs, -1)
    executor.shutdown()
    assert future.done()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(abs, -1)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.map(abs, [1])
    executor.shutdown()
    with pytest.raises(RuntimeError), FtrayExecutor(1) as executor:
        executor.shutdown(wait=False)
        executor.submit(abs, 1)


def test_shutdown_waits_or_cancels(tmp_path: Path) -> None:
    executor = FtrayExecutor(1)
    running = executor.submit(touch_and_wait, tmp_path / "running", tmp_path / "go")
    queued = [executor.submit(abs, -i) for i in range(5)]
    wait_for_file(tmp_path / "running")
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(each.cancelled() for each in queued)
    assert wait(queued, 5).not_done == set()
    assert not running.done()
    (tmp_path / "go").touch()
    assert running.result() == "running"

    with FtrayExecutor(1) as executor:
        futures = [executor.submit(abs, -i) for i in range(100)]
    assert all(each.done() for each in futures)
    executor = FtrayExecutor(1)
    futures = [executor.submit(abs, -i) for i in range(100)]
    executor.shutdown(wait=False)
    assert [each.result() for each in futures] == list(range(100))


def test_a_dropped_executor_does_what_was_submitted() -> None:
    executor = FtrayExecutor(2)
    futures = [executor.submit(abs, -i) for i in range(50)]
    thread = executor._engine.thread
    del executor
    assert [each.result() for each in futures] == list(range(50))
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()


def test_scheduling_classes_are_used_again() -> None:
    from ftray.worker.core import get_core

    classes = get_core().submitter.dispatcher.classes
    for _ in range(3):
        with FtrayExecutor(3) as executor:
            executor.submit(abs, 1).result()
    known = len(classes)
    for _ in range(3):
        with FtrayExecutor(3) as executor:
            executor.submit(abs, 1).result()
    assert len(classes) == known


@pytest.mark.skipif(not hasattr(ftray, "cancel"), reason="needs ftray.cancel")
def test_workers_can_be_told_to_stop(tmp_path: Path) -> None:
    for stop in ("terminate_workers", "kill_workers"):
        executor = FtrayExecutor(1)
        running = executor.submit(touch_and_wait, tmp_path / stop, tmp_path / "never")
        queued = executor.submit(abs, -1)
        wait_for_file(tmp_path / stop)
        getattr(executor, stop)()
        assert queued.cancelled()
        assert isinstance(running.exception(10), ftray.exceptions.TaskCancelledError | WorkerCrashedError)
        executor.shutdown()


def test_an_import_is_not_cut_short(tmp_path: Path) -> None:
    """A worker whose numpy was half imported when its call was cancelled would fail all later calls that need it."""
    (tmp_path / "slow_module.py").write_text(
        textwrap.dedent(f"""
        import gc, time
        from pathlib import Path

        with open({str(tmp_path / "runs")!r}, "a") as file:
            file.write("x")
        (interrupts,) = [each for each in gc.get_objects() if type(each).__name__ == "TaskInterrupts"]
        Path({str(tmp_path / "begun")!r}).touch()
        deadline = time.monotonic() + 20
        while not interrupts.wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        for _ in range(50):  # the task is interrupted again and again meanwhile
            time.sleep(0.001)
        VALUE = 7
        """)
    )

    def use() -> int:
        if str(tmp_path) not in sys.path:
            sys.path.insert(0, str(tmp_path))
        return int(importlib.import_module("slow_module").VALUE)

    with FtrayExecutor(1) as executor:
        pid = executor.submit(os.getpid).result()
        future = executor.submit(use)
        wait_for_file(tmp_path / "begun")
        (ref,) = executor._engine.refs_out()
        ftray.cancel(ref)
        assert isinstance(future.exception(20), ftray.exceptions.TaskCancelledError)
        assert executor.submit(lambda: (use(), os.getpid())).result() == (7, pid)
    assert (tmp_path / "runs").read_text() == "x"


def test_in_a_task() -> None:
    @ftray.remote
    def outer() -> int:
        with FtrayExecutor(2) as executor:
            return sum(executor.map(abs, range(-20, 0)))

    assert ftray.get([outer.remote() for _ in range(6)], timeout=30) == [210] * 6  # more than there are CPUs


def test_a_session_that_ends_breaks_its_executors_and_a_forked_child_waits_for_nothing() -> None:
    run_driver("""
    from concurrent.futures import BrokenExecutor
    from ftray.util import FtrayExecutor

    ftray.init(num_cpus=1)
    executor = FtrayExecutor()
    running, queued = executor.submit(time.sleep, 60), executor.submit(abs, 1)
    pid = os.fork()
    if not pid:
        executor.shutdown()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    ftray.shutdown()
    assert "shutdown() was called" in str(running.exception(10)), running.exception()
    assert isinstance(queued.exception(10), BrokenExecutor), queued.exception()

    def is_refused():
        try:
            executor.submit(abs, 1)
        except BrokenExecutor as error:
            return "session has ended" in str(error)

    assert is_refused()
    with FtrayExecutor(1) as other:  # starts a new session, which is none of the old one's
        assert other.submit(abs, -1).result() == 1
        assert is_refused()
    executor.shutdown()
    """).close()


def test_a_program_ends_when_all_is_done() -> None:
    """Without `init`, without `shutdown`: the session is started, and what was submitted is done before it ends."""
    driver = run_driver("""
    import atexit
    from ftray.util import FtrayExecutor

    @atexit.register
    def last():
        try:
            left.submit(abs, 1)
        except RuntimeError as error:
            say("refused:", error)

    value = 0

    def set_value(x):
        global value
        value = x

    def get_value(x):
        return value + x

    def late(name):
        time.sleep(0.1)
        return name

    left, closed = FtrayExecutor(2), FtrayExecutor(1)
    with FtrayExecutor(2, initializer=set_value, initargs=(40,)) as executor:
        say("main:", *executor.map(get_value, range(4)), *executor.map(get_value, range(4), chunksize=2))
    for each in (left, closed):
        for name in ("apple", "pear"):
            each.submit(late, name).add_done_callback(lambda done: say("done:", done.result()))
    closed.shutdown(wait=False)
    say("end")
    """)
    lines = driver.out.splitlines()
    assert lines[:2] == ["main: 40 41 42 43 40 41 42 43", "end"]
    assert sorted(lines[2:-1]) == ["done: apple", "done: apple", "done: pear", "done: pear"]
    assert lines[-1].startswith("refused: cannot schedule new futures after")
    driver.close()


def test_an_interrupted_wait_leaves_the_executor_whole(tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_for_file(tmp_path / "runs")
        wait_until(lambda: future._condition._waiters, what="the main thread waits")  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGINT)

    with FtrayExecutor(1) as executor:
        future = executor.submit(touch_and_wait, tmp_path / "runs", tmp_path / "go")
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            future.result(20)
        interrupter.join()
        (tmp_path / "go").touch()
        assert executor.submit(abs, -4).result() == 4
        assert future.result() == "runs"


def test_threads_end_with_their_executors() -> None:
    before = threading.active_count()
    for _ in range(5):
        with FtrayExecutor(1) as executor:
            executor.submit(abs, 1).result()
    wait_until(lambda: threading.active_count() <= before, what="threads of executors end")
