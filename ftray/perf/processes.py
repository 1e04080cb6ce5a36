"""A process that keeps all that a benchmark starts, and ends it; and how much processor time processes use.

Role: shell, standard library only. `keep` forks: the child runs the benchmark, the parent has asked the kernel to be
given every orphan below it (PR_SET_CHILD_SUBREAPER). Whatever the child has started, however it tried to
get away, is therefore a descendant of the keeper, and is ended by it: when the child has ended, and when the keeper's
stdin is closed, which is how its starter stops it, and what happens when the starter dies.

Rejected: the process group, which a system's own processes leave; a mark in their environment, which those that change
their title overwrite.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 3.0
"""How long what is left may take to end by itself, once the program has."""
_NS_PER_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def keep(work: Callable[[], None]) -> int:
    """Runs `work` in a child, ends all that is left of it, and returns the child's exit code (1 if it was stopped)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.close(nowhere)
        work()
        return 0
    stopped = _wait_for(child)
    if stopped:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    end_descendants(os.getpid(), GRACE_S)
    return 1 if stopped else os.waitstatus_to_exitcode(status) & 0xFF


def _wait_for(child: int) -> bool:
    """Waits until the child has ended or stdin was closed; whether it was the latter."""
    watched = os.pidfd_open(child)
    try:
        poller = select.poll()
        poller.register(watched, select.POLLIN)
        poller.register(0, select.POLLIN | select.POLLHUP)
        ready = [fd for fd, _ in poller.poll()]
        return watched not in ready
    finally:
        os.close(watched)


def end_descendants(root: int, grace_s: float) -> None:
    """Waits until no process below `root` is left; those that still run after `grace_s` are killed."""
    deadline = time.monotonic() + grace_s
    pause_s = 0.001
    while left := descendants(root):
        if time.monotonic() >= deadline:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)


def descendants(root: int) -> list[int]:
    """The processes below `root`, zombies among them."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            stat = _stat(int(name))
            if stat:
                children.setdefault(int(stat[1]), []).append(int(name))
    found: list[int] = []
    unseen = [root]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def cpu_ns(pid: int) -> int:
    """Processor time that the threads of a process have used; 0 if it is gone."""
    total = 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_bytes().split()[0])
    except (FileNotFoundError, ProcessLookupError):  # gone, or a kernel that does not count so exactly
        stat = _stat(pid)
        return (int(stat[11]) + int(stat[12])) * _NS_PER_TICK if stat else 0
    return total


def process_name(pid: int) -> str:
    """What the process calls itself; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _stat(pid: int) -> list[bytes]:
    """The fields of `/proc/<pid>/stat` from the state on; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
