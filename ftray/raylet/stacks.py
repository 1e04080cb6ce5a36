"""The stack of a worker that does not answer, because its interpreter is held by C code: through a signal.

Role: shell, under the reactor's lock. A worker has set up a signal whose handler writes the stacks of its threads to a
memory file of its own, without the interpreter (`worker/introspection.py`). The file is found by its name among the
worker's descriptors.

Rejected: `ptrace` (needs rights, stops the process); asking only (the process that hangs is the one of interest).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from ftray.wire.reactor import Reactor

STACK_SIGNAL = signal.SIGRTMIN + 9
STACK_FILE = "memfd:ftray-stack"
LOOK_MS = 20
LOOKS_MAX = 25
_FRESH_BYTES = 1 << 20


def _stack_fd(pid: int) -> str | None:
    directory = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(directory):
            path = f"{directory}/{name}"
            if STACK_FILE in os.readlink(path):
                return path
    except OSError:
        pass
    return None


def dump_stack(reactor: Reactor, pid: int, done: Callable[[str], None]) -> None:
    """Has the worker write its stacks; `done` gets the text, or an explanation in parentheses."""
    path = _stack_fd(pid)
    if path is None:
        done("(it has no stack file: it is starting, or gone)")
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        done(f"(its stack file cannot be read: {error.strerror})")
        return
    start = os.fstat(fd).st_size
    looks = 0
    last = start

    def finish(text: str) -> None:
        os.close(fd)
        done(text)

    def look() -> None:
        nonlocal looks, last
        looks += 1
        size = os.fstat(fd).st_size
        if size > start and size == last:  # it has not grown since the last look: all is written
            finish(os.pread(fd, min(size - start, _FRESH_BYTES), start).decode("utf-8", "replace"))
        elif looks >= LOOKS_MAX:
            finish(f"(no answer to the signal either: {_state(pid)})")
        else:
            last = size
            reactor.call_later(LOOK_MS, look)

    try:
        os.kill(pid, STACK_SIGNAL)
    except OSError as error:
        finish(f"(it cannot be signalled: {error.strerror})")
        return
    reactor.call_later(LOOK_MS, look)


def _state(pid: int) -> str:
    """The kernel's word on a process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "it is gone"
    return {"T": "it is stopped", "D": "it waits for a device", "Z": "it has ended"}.get(state, f"its state is {state}")
