"""A task is interrupted where it is, and nothing else ever is: with real signals, in this process's main thread."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ftray.worker.interrupts import CANCEL_SIGNAL, TaskInterrupts, interruptible


class MainThread:
    """What `TaskInterrupts` sees of an executor: which task runs, and the frame that calls its code."""

    def __init__(self) -> None:
        self.main_thread = threading.get_ident()
        self.running: Any = None
        self.interrupts = TaskInterrupts(self)  # type: ignore[arg-type]

    def execute(self, task_id: bytes, function: Callable[[], Any]) -> Any:
        self.running = SimpleNamespace(task_id=task_id)
        try:
            return function()
        except KeyboardInterrupt:
            return "interrupted"
        finally:
            self.running = None


@pytest.fixture
def main() -> Iterator[MainThread]:
    main = MainThread()
    before = signal.getsignal(CANCEL_SIGNAL)
    main.interrupts.install()
    yield main
    signal.signal(CANCEL_SIGNAL, before)


def wait_while(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while condition():
        if time.monotonic() > deadline:
            raise AssertionError("still so")


def in_runtime(code: str, **names: Any) -> Any:
    """A function of a module of the runtime."""
    namespace = {"__name__": "ftray.worker.something", **names}
    exec(code, namespace)
    return namespace["function"]


def test_the_task_that_runs(main: MainThread) -> None:
    def task() -> str:
        main.interrupts.interrupt(b"one")
        time.sleep(10)
        return "finished"

    assert main.execute(b"one", task) == "interrupted"
    assert not main.interrupts.wanted


def test_never_another_one(main: MainThread) -> None:
    """The signal is on its way, and the task that it was for has ended."""

    def task() -> str:
        main.interrupts.wanted = b"one"
        signal.raise_signal(CANCEL_SIGNAL)
        signal.raise_signal(CANCEL_SIGNAL)
        return "finished"

    assert main.execute(b"two", task) == "finished"
    signal.raise_signal(CANCEL_SIGNAL)  # between tasks


def test_a_late_signal_does_not_undo_the_next_interrupt(main: MainThread) -> None:
    """While it finds that the first task has ended, the loop's thread asks for the second one to be interrupted."""

    class Crossing(MainThread):
        @property  # type: ignore[override]
        def running(self) -> Any:
            self.interrupts.wanted = b"two"
            return SimpleNamespace(task_id=b"two")

        @running.setter
        def running(self, value: Any) -> None: ...

    crossing = Crossing()
    crossing.interrupts.wanted = b"one"
    crossing.interrupts._on_signal(CANCEL_SIGNAL, None)
    assert crossing.interrupts.wanted == b"two"


def test_it_is_interrupted_once(main: MainThread) -> None:
    seen = []

    def task() -> str:
        main.interrupts.interrupt(b"one")
        try:
            time.sleep(10)
        except KeyboardInterrupt:
            seen.append(1)
        signal.raise_signal(CANCEL_SIGNAL)  # one that was sent at the same time, and comes late
        return "finished"

    assert main.execute(b"one", task) == "finished"
    assert seen == [1]


def test_not_inside_the_runtime_but_when_it_is_left(main: MainThread) -> None:
    state: list[str] = []
    update = in_runtime(
        """
def function(interrupts):
    state.append("begun")
    interrupts.interrupt(b"one")
    for _ in range(20):
        raise_signal(number)
    state.append("whole")
""",
        state=state, raise_signal=signal.raise_signal, number=CANCEL_SIGNAL,
    )  # fmt: skip

    def task() -> str:
        update(main.interrupts)
        time.sleep(10)
        return "finished"

    assert main.execute(b"one", task) == "interrupted"
    assert state == ["begun", "whole"]


def test_not_in_a_finaliser_where_it_would_be_lost(main: MainThread) -> None:
    class Final:
        def __del__(self) -> None:
            main.interrupts.wanted = b"one"
            signal.raise_signal(CANCEL_SIGNAL)

    def task() -> str:
        Final()
        assert main.interrupts.wanted == b"one"  # still to come
        main.interrupts.interrupt(b"one")
        time.sleep(10)
        return "finished"

    assert main.execute(b"one", task) == "interrupted"


def test_not_before_and_after_the_tasks_own_code(main: MainThread) -> None:
    main.interrupts.wanted = b"one"
    frame = SimpleNamespace(f_code=MainThread.execute.__code__, f_globals=globals(), f_back=None)
    main.running = SimpleNamespace(task_id=b"one")
    main.interrupts._on_signal(CANCEL_SIGNAL, frame)  # type: ignore[arg-type]
    assert main.interrupts.wanted == b"one"
    main.running = None


def test_a_function_in_c_has_a_frame_to_be_interrupted_in(main: MainThread) -> None:
    sleep = interruptible(time.sleep)
    assert sleep.__name__ == "sleep"
    main.running = SimpleNamespace(task_id=b"one")
    main.interrupts.interrupt(b"one")
    assert main.execute(b"one", functools.partial(sleep, 10)) == "interrupted"
    assert interruptible(wait_while) is wait_while
    assert interruptible(int) is int


def test_the_programs_own_handler_is_called_as_for_ctrl_c(main: MainThread) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: calls.append(signum))
    try:

        def task() -> str:
            main.interrupts.interrupt(b"one")
            wait_while(lambda: not calls)
            return "finished"

        assert main.execute(b"one", task) == "finished"
        assert calls == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        def other() -> str:
            main.interrupts.interrupt(b"two")
            time.sleep(10)
            return "finished"

        assert main.execute(b"two", other) == "interrupted"
    finally:
        signal.signal(signal.SIGINT, before)
