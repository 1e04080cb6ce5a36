"""Which attempt of which task ran in which process, and when: a file that every process appends a line to.

Role: shell (the writer and the file's reader) around `History`, which is pure. The job writes it to be watched; the
progress, the number of repeated tasks and the recovery times are read from it.

Rules: a line is one `write` to a file opened for appending, so lines of several processes never mix, and what a
process has written stays when it is killed. Times are the machine's monotonic clock, one for all its processes.

Rejected: results that tell where they ran (attempts that were killed would be missing, and they are the point).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


def clock_ms() -> float:
    """The machine's monotonic clock."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) / 1e6


@contextmanager
def traced(path: str, task: str) -> Iterator[None]:
    """Writes when the task begins and, if it does, ends here. `task` has no blanks."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"begin {task} {os.getpid()} {clock_ms():.3f}\n".encode())
        yield
        os.write(fd, f"end {task} {os.getpid()} {clock_ms():.3f}\n".encode())
    finally:
        os.close(fd)


class TraceReader:
    """Reads what has been added to the file since it was last asked."""

    def __init__(self, path: str, history: History) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self.history = history

    def read(self) -> None:
        """Takes new lines into the history."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            kind, task, pid, at_ms = line.decode().split()
            self.history.add(kind, task, int(pid), float(at_ms))


class History:
    """What the lines say. `add` takes them in the order of the file."""

    def __init__(self) -> None:
        self.begins: dict[str, list[tuple[int, float]]] = {}
        """Task -> (pid, time) of each attempt, in order."""
        self.ended: set[str] = set()
        self._last: dict[int, str] = {}
        self._running: dict[int, str] = {}

    def add(self, kind: str, task: str, pid: int, at_ms: float) -> None:
        if kind == "begin":
            self.begins.setdefault(task, []).append((pid, at_ms))
            self._last[pid] = self._running[pid] = task
        else:
            self.ended.add(task)
            if self._running.get(pid) == task:
                del self._running[pid]

    def running(self) -> dict[int, str]:
        """Pid -> the task it is in. A killed process stays in its last one."""
        return dict(self._running)

    def attempts(self) -> int:
        """Executions begun."""
        return sum(len(each) for each in self.begins.values())

    def repeated(self, prefix: str = "") -> int:
        """Executions beyond the first of each task whose name begins so."""
        return sum(len(each) - 1 for task, each in self.begins.items() if task.startswith(prefix))

    def interrupted(self, pid: int) -> str:
        """The task that a killed process was in, or was the last to begin; empty if it never began one."""
        return self._running.get(pid) or self._last.get(pid, "")

    def began_again(self, task: str, after_ms: float, killed_pid: int) -> float | None:
        """When another process than the killed one first began the task after that time."""
        for pid, at_ms in self.begins.get(task, ()):
            if at_ms > after_ms and pid != killed_pid:
                return at_ms
        return None
