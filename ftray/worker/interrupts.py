"""Ctrl-C never tears the runtime's tables.

Role: shell. A user thread runs the runtime's own logic (it submits, and it reads while it waits), so Python's default
handler could raise KeyboardInterrupt in the middle of a table update. Our handler looks at where the main thread is: in
user code, or in one of the two functions that only wait, it raises at once; inside the runtime it sends the signal
again a moment later, by when the main thread has left or waits.

Rejected: a flag set around each entry (60 ns on each call of the fast path, and a check after each); blocking signals
around entries (two system calls).
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ftray.worker.waiting import wait_events, wait_lock

_INTERRUPTIBLE = {wait_events.__code__, wait_lock.__code__}
_RETRY_S = 0.001
_installed = False


def _inside_runtime(frame: FrameType | None) -> bool:
    """Whether raising here could leave the runtime's tables half updated."""
    while frame is not None:
        if frame.f_code in _INTERRUPTIBLE:
            return False
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("ftray.worker.", "ftray.wire.", "ftray.ownership.", "ftray.gcs.")):
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
