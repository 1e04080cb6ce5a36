"""SIGKILLs to processes of the demo's session, on a schedule from a seed, and how long each one was felt.

Role: shell around a pure schedule. Victims are worker processes that the node's own status lists, so nothing else can
be hit: one that is in a task according to the trace, or the one that hosts the gatherer.

A recovery time is honest if it says from what to what: it is the time from just before the `kill` system call to the
moment another process begins the task that was interrupted (for the gatherer: its constructor). Detection, choosing or
forking a process and sending it the task are all in it; running the task is not. A kill that hits between two tasks
interrupts nothing, and has no recovery time.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ftray.demo.job import GATHERER as CONSTRUCTOR
from ftray.demo.trace import History, clock_ms
from ftray.exceptions import FtrayError

WORKER = "worker"
GATHERER = "gatherer"
LEADER = "leader"


@dataclass(slots=True)
class Kill:
    """One SIGKILL that was sent."""

    victim: str
    """WORKER, GATHERER or LEADER (of the heads)."""
    pid: int
    at_ms: float
    """On the clock of the trace."""
    task: str = ""
    """What was interrupted; empty if it was nothing."""
    recovery_ms: float | None = None


def schedule(rng: random.Random, kills: int | None, period_ms: float) -> Iterator[tuple[float, str]]:
    """When to kill (since the start) and whom: one in each period, `kills` in all, without end for None.

    The second and every fifth after it go to the leading head, the third and the sixth to the gatherer, all others to
    workers.
    """
    for number in itertools.count() if kills is None else range(kills):
        victim = LEADER if number % 5 == 1 else GATHERER if number in (2, 5) else WORKER
        yield (number + rng.uniform(0.2, 0.8)) * period_ms, victim


class Killer:
    """`step` is called every few milliseconds while the job runs, after the trace has been read.

    `status` asks the node for its status; `on_kill` and `on_recovery` are told what happens. `kill_leader` kills the
    leading head, and sees to its recovery itself.
    """

    def __init__(
        self,
        plan: Iterator[tuple[float, str]],
        rng: random.Random,
        history: History,
        status: Callable[[], Any],
        on_kill: Callable[[Kill], None],
        on_recovery: Callable[[Kill], None],
        kill_leader: Callable[[], Kill | None] = lambda: None,
    ) -> None:
        self._kill_leader = kill_leader
        self.kills: list[Kill] = []
        self._plan = plan
        self._next = next(plan, None)
        self._rng = rng
        self._history = history
        self._status = status
        self._on_kill = on_kill
        self._on_recovery = on_recovery
        self._started_ms = clock_ms()

    def step(self) -> None:
        """Does what is due."""
        self.look()
        if self._next is not None:
            due_ms, victim = self._next
            if clock_ms() - self._started_ms >= due_ms and not self._waiting(victim) and self._kill(victim):
                self._next = next(self._plan, None)

    def look(self) -> None:
        """Looks which of the interrupted tasks have begun again."""
        for kill in self.kills:
            if kill.recovery_ms is None and kill.victim != LEADER:
                task = CONSTRUCTOR
                if kill.victim == WORKER:
                    kill.task = self._history.running().get(kill.pid, "")  # it may have ended just before
                    task = self._history.interrupted(kill.pid)
                again_ms = self._history.began_again(task, kill.at_ms, kill.pid)
                if again_ms is not None:
                    kill.task = task
                    kill.recovery_ms = again_ms - kill.at_ms
                    self._on_recovery(kill)

    def _waiting(self, victim: str) -> bool:
        """Whether the last victim of this kind has not been replaced yet: one fault at a time, to tell them apart."""
        last = next((kill for kill in reversed(self.kills) if kill.victim == victim), None)
        return last is not None and last.recovery_ms is None and last.task != ""

    def _kill(self, victim: str) -> bool:
        """False if there is no fitting victim at the moment."""
        if victim == LEADER:
            killed = self._kill_leader()
            if killed is not None:
                self.kills.append(killed)
                self._on_kill(killed)
            return killed is not None
        running = self._history.running()
        if victim == WORKER and not running:
            return False
        try:
            workers = self._status()["workers"]
        except FtrayError:  # the session is about to end
            return False
        actors = [row["pid"] for row in workers if row["pid"] and row["actor_id"]]
        if victim == GATHERER:
            alive = {pid for pid, _ in self._history.begins.get(CONSTRUCTOR, ())}
            candidates = [pid for pid in actors if pid in alive and running.get(pid) != CONSTRUCTOR]
        else:
            candidates = [row["pid"] for row in workers if row["pid"] in running and row["pid"] not in actors]
        before = {kill.pid for kill in self.kills}
        candidates = [pid for pid in candidates if pid not in before]
        if not candidates:
            return False
        pid = self._rng.choice(sorted(candidates))
        at_ms = clock_ms()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        kill = Kill(victim, pid, at_ms, CONSTRUCTOR if victim == GATHERER else running.get(pid, ""))
        self.kills.append(kill)
        self._on_kill(kill)
        return True
