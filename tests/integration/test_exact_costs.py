"""What a task costs in the steady state, counted: messages, system calls, wake-ups, Python calls, bytes.

No clock is read: a profile function counts the calls of C functions that are system calls, and the calls of Python
functions. The same count at many times the load shows that no event costs more because more is outstanding.
"""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import ftray
from ftray.worker.core import get_core

SESSION = {"num_cpus": 1, "_system_config": {"memory_monitor_period_ms": 0}}
SYSCALLS = frozenset(
    ("send", "sendmsg", "recv", "recv_into", "recvmsg", "poll", "modify", "register", "eventfd_write", "eventfd_read")
)
"""Methods of sockets and epoll objects, and functions of `os`, that are one system call each."""

pytestmark = pytest.mark.usefixtures("session")


class Counts:
    """What happened in this thread while it was watched."""

    def __init__(self) -> None:
        self.syscalls: Counter[str] = Counter()
        self.python_calls = 0

    def profile(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            self.python_calls += 1
        elif event == "c_call" and arg.__name__ in SYSCALLS:
            self.syscalls[arg.__name__] += 1

    @contextmanager
    def watching(self) -> Iterator[Counts]:
        sys.setprofile(self.profile)
        try:
            yield self
        finally:
            sys.setprofile(None)


@contextmanager
def wire() -> Iterator[Counter[str]]:
    """Counts the messages that this driver gets, and those that other threads than this one handle."""
    seen: Counter[str] = Counter()
    core = get_core()
    me = threading.get_ident()
    links = [*core.submitter.channels.values(), *(c.link for c in core.actors.calls.values() if c.link is not None)]
    links.append(core.raylet.link)
    handlers = {}
    for link in links:
        handlers[link] = link.handler

        class Watch:
            def __init__(self, inner: Any) -> None:
                self.inner = inner

            def on_message(self, link: Any, message: Any, payload: Any) -> None:
                seen[type(message).__name__] += 1
                seen["by the loop"] += threading.get_ident() != me
                self.inner.on_message(link, message, payload)

            def on_closed(self, link: Any, reason: str) -> None:
                self.inner.on_closed(link, reason)

        link.handler = Watch(link.handler)
    try:
        yield seen
    finally:
        for link, handler in handlers.items():
            link.handler = handler


@ftray.remote
def nothing() -> None:
    return None


@ftray.remote
class Actor:
    def nothing(self) -> None:
        return None

    def start_counting(self) -> None:
        self.counts = Counts()
        sys.setprofile(self.counts.profile)

    def counted(self) -> dict[str, int]:
        sys.setprofile(None)
        return dict(self.counts.syscalls)


def steady(call: Callable[[], Any]) -> None:
    """Leases are there, the function is exported and measured."""
    for _ in range(300):
        ftray.get(call())
    ftray.get([call() for _ in range(1_000)])


@pytest.mark.parametrize("kind", ["task", "actor call"])
def test_one_by_one_a_call_is_two_messages_and_five_system_calls(kind: str) -> None:
    actor = Actor.remote()
    call = nothing.remote if kind == "task" else actor.nothing.remote
    steady(call)
    n = 200
    with wire() as messages, Counts().watching() as counts:
        for _ in range(n):
            ftray.get(call())
    # Sent: the call. Received: the reply. A wait closes the gate, polls, reads, and opens the gate.
    assert messages["TaskDone"] == n
    assert sum(messages.values()) - messages["TaskDone"] - messages["by the loop"] <= 3, messages
    # A reply that comes before this thread has begun to wait is the loop's: that happens when the machine is busy.
    assert messages["by the loop"] < n, "replies are read by the thread that waits"
    total = sum(counts.syscalls.values())
    assert counts.syscalls["send"] <= n + n // 10, counts.syscalls
    assert total <= 5 * n + n // 5, counts.syscalls


def test_in_flight_many_calls_share_a_system_call() -> None:
    steady(nothing.remote)
    n = 5_000
    with wire() as messages, Counts().watching() as counts:
        ftray.get([nothing.remote() for _ in range(n)])
    assert messages["TaskDone"] == n
    total = sum(counts.syscalls.values())
    assert total <= n / 4, f"{total / n:.2f} system calls a task: {counts.syscalls}"


def test_a_worker_polls_reads_and_writes_once_a_call() -> None:
    actor = Actor.remote()
    steady(actor.nothing.remote)
    ftray.get(actor.start_counting.remote())
    n = 200
    for _ in range(n):
        ftray.get(actor.nothing.remote())
    counts = ftray.get(actor.counted.remote())
    assert counts["send"] <= n + n // 10, counts
    assert sum(counts.values()) <= 3 * n + n // 5, counts


def test_an_idle_session_with_a_reference_reads_nothing() -> None:
    """Nobody sends anything to a driver that does nothing."""
    ref = ftray.put(1)
    done = threading.Event()
    with wire() as messages:
        get_core().reactor.call_later(300, done.set)
        done.wait()
    assert sum(messages.values()) == 0, messages
    del ref


def python_calls_per_task(outstanding: int) -> float:
    """Python calls for a submission and for its `get`, while so many other references are held."""
    held = [nothing.remote() for _ in range(outstanding)]
    ftray.get(held)
    n = 500
    with Counts().watching() as counts:
        refs = [nothing.remote() for _ in range(n)]
        for ref in refs:
            ftray.get(ref)
        ftray.wait(refs, num_returns=1)
    return counts.python_calls / n


def test_a_task_costs_the_same_however_many_are_outstanding() -> None:
    steady(nothing.remote)
    few, many = python_calls_per_task(100), python_calls_per_task(20_000)
    assert many <= few * 1.15 + 1, f"{few:.1f} Python calls a task with 100 outstanding, {many:.1f} with 20,000"


def test_a_queued_task_costs_the_same_behind_many_others() -> None:
    """Submission while nothing is done: each task only joins a queue."""
    steady(nothing.remote)

    def calls(queued: int) -> float:
        busy = blocked.remote([])
        refs = [nothing.remote() for _ in range(queued)]
        with Counts().watching() as counts:
            refs += [nothing.remote() for _ in range(500)]
        ftray.get([busy, *refs])
        return counts.python_calls / 500

    @ftray.remote
    def blocked(_: Any) -> None:
        sum(range(3_000_000))

    few, many = calls(100), calls(20_000)
    assert many <= few * 1.15 + 1, f"{few:.1f} Python calls a submission behind 100 tasks, {many:.1f} behind 20,000"


def test_an_outstanding_reference_takes_less_than_a_kilobyte() -> None:
    steady(nothing.remote)
    n = 20_000
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        refs = [nothing.remote() for _ in range(n)]
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    ftray.get(refs)
    assert (after - before) / n <= 1_024


def test_a_planted_scan_is_caught() -> None:
    """The count can fail: a scan over all entries for each submission shows."""
    steady(nothing.remote)
    core = get_core()
    original = core.submitter.submit

    def scanning(task: Any, payload: bytes) -> None:
        for entry in list(core.entries.values())[:2_000]:
            _look(entry)
        original(task, payload)

    core.submitter.submit = scanning  # type: ignore[method-assign]
    try:
        few, many = python_calls_per_task(10), python_calls_per_task(2_000)
    finally:
        core.submitter.submit = original  # type: ignore[method-assign]
    assert many > few * 1.15 + 1


def _look(entry: Any) -> Any:
    return entry.state
