"""Interrupts never tear the runtime's tables: Ctrl-C in a driver, a cancelled task in a worker.

Role: shell. A user thread runs the runtime's own logic (it submits, and it reads while it waits), so Python's default
handler could raise KeyboardInterrupt in the middle of a table update. Our handler looks at where the main thread is: in
user code, or in one of the two functions that only wait, it raises at once; inside the runtime it sends the signal
again a moment later, by when the main thread has left or waits.

In a worker `TaskInterrupts` interrupts the task that is to be cancelled and nothing else. A signal of our own makes the
main thread leave `time.sleep`, a lock or a system call; its handler looks whether that task runs still and whether the
main thread is in the task's code, and then does what Ctrl-C would: it calls the program's handler of SIGINT (asyncio's
and trio's end their runs in good order) or raises KeyboardInterrupt. A thread sends the signal until one of both has
happened. Since the signal is nobody else's, one that comes too late is known for what it is, and does nothing. An
import is let finish: modules written in C (numpy's) that are cut short can't be imported again in that process.

Rejected: a flag set around each entry (60 ns on each call of the fast path, and a check after each); blocking signals
around entries (two system calls); an asynchronous exception (`PyThreadState_SetAsyncExc` wakes nothing that blocks, and
may hit the next task); SIGINT for tasks (a late one cannot be told from one that the task sends to itself).
"""

from __future__ import annotations

import functools
import signal
import threading
import time
from types import CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING, Any

from ftray.worker.generators import Generators
from ftray.worker.waiting import wait_events, wait_lock

if TYPE_CHECKING:
    from ftray.worker.execution import Executor

_INTERRUPTIBLE = {wait_events.__code__, wait_lock.__code__}
_RETRY_S = 0.001
_RETRY_MAX_S = 0.02
CANCEL_SIGNAL = signal.SIGRTMIN + 8
_installed = False
_RUNTIME = (
    "ftray.worker.", "ftray.wire.", "ftray.ownership.", "ftray.gcs.", "ftray.util.arrivals",
    "ftray.util.multiprocessing.engine",
)  # fmt: skip
"""Where the main thread may be in the middle of a change of tables."""


def _inside_runtime(frame: FrameType | None) -> bool:
    """Whether raising here could leave the runtime's tables half updated."""
    while frame is not None:
        if frame.f_code in _INTERRUPTIBLE:
            return False
        name = frame.f_globals.get("__name__", "")
        if name.startswith(_RUNTIME):
            return not name.endswith((".execution", ".serialization"))
        frame = frame.f_back
    return False


def _on_interrupt(signum: int, frame: FrameType | None) -> Any:
    if _inside_runtime(frame):
        timer = threading.Timer(_RETRY_S, signal.pthread_kill, (threading.main_thread().ident, signum))
        timer.daemon = True
        timer.start()
        return
    signal.default_int_handler(signum, frame)


def install() -> None:
    """Takes the place of Python's default SIGINT handler; leaves a program's own handler alone."""
    global _installed
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _on_interrupt)
            _installed = True


def uninstall() -> None:
    """Puts the default handler back, if ours is still there."""
    global _installed
    if _installed and threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is _on_interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _installed = False


# --- workers ----------------------------------------------------------------------------------------------------------


def interruptible(function: Any) -> Any:
    """A function for `Executor.execute` to call, such that the main thread has a frame of its own inside it."""
    if isinstance(function, FunctionType | type):
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    try:
        functools.update_wrapper(call, function)
    except (AttributeError, TypeError):
        pass  # an object that is callable, without a function's attributes
    return call


_CALL_CODE: CodeType = interruptible(len).__code__
_OURS = (*_RUNTIME, "ftray.store.", "ftray.scheduling.", "ftray.api.")


class TaskInterrupts:
    """See the module."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.wanted = b""
        """The task to interrupt; empty once it has been."""
        self.callers = frozenset((type(executor).execute.__code__, Generators.run.__code__))
        """Frames that call the code of tasks: inside of those, but not in them, it is interrupted."""

    def install(self) -> None:
        """In the worker's main thread, at its start."""
        signal.signal(CANCEL_SIGNAL, self._on_signal)

    def interrupt(self, task_id: bytes) -> None:
        """Interrupts the main thread if it runs this task, in a moment. From any thread."""
        self.wanted = task_id
        threading.Thread(target=self._insist, args=(task_id,), name="ftray-interrupt", daemon=True).start()

    def _insist(self, task_id: bytes) -> None:
        executor = self.executor
        pause_s = _RETRY_S
        while self.wanted == task_id and (running := executor.running) is not None and running.task_id == task_id:
            signal.pthread_kill(executor.main_thread, CANCEL_SIGNAL)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _RETRY_MAX_S)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        wanted, running = self.wanted, self.executor.running
        # A late signal changes nothing: what is wanted may have become the next task since it was read here.
        if not wanted or running is None or running.task_id != wanted or not self._in_task(frame):
            return
        if self._imports(frame):
            return
        self.wanted = b""
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:
            raise KeyboardInterrupt

    def _imports(self, frame: FrameType | None) -> bool:
        """Whether the task is importing a module."""
        while frame is not None and frame.f_code not in self.callers:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back
        return False

    def _in_task(self, frame: FrameType | None) -> bool:
        """Whether the main thread is in the code of the task (or waits for it), where an exception does no harm."""
        innermost = frame
        while frame is not None:
            code = frame.f_code
            if code in _INTERRUPTIBLE or code is _CALL_CODE:
                return True
            if code in self.callers:
                return frame is not innermost
            if code.co_name == "__del__":
                return False  # what is raised there goes nowhere
            name = frame.f_globals.get("__name__", "")
            if name.startswith(_OURS):
                return bool(name.endswith(".serialization"))
            frame = frame.f_back
        return False
