"""Which worker serves whom, and how many there should be.

Role: pure. The pool knows every worker process of the node by its state, matches requests with idle workers, and says
how many to fork and which to send home; the shell (`processes.py`) forks and kills. Times are milliseconds of a
steady clock.

    STARTING ──registered──► IDLE ──acquire──► BUSY ──release──► IDLE        any ──gone──► forgotten
                              │ ▲
                       expire ▼ │ kept (it owns something)
                             LEAVING

Rules:
- A worker that has served a job serves that job alone: its modules, globals and objects are the job's. The same goes
  for the runtime environment that it has applied, or for none: it serves those who want exactly that.
- Workers are kept warm: as many as the node has CPUs, and `extra` of them fresh (of no job) whatever else goes on, so
  that a killed one is replaced at once. Requests beyond that fork as many as they need.
- Whoever idles longer than `idle_kill_ms` and is more than is kept is *asked* to leave; one that owns objects may stay.
  Where idle workers crowd (each environment has its own), the oldest are asked sooner.
- Workers that die before they register, more than one in a row, make the pool slow down (doubling pauses, one at a
  time), and after `FAILURES_MAX` it says so, once.

Rejected: a pool for each job (an idle job would keep a node's worth of processes); killing idle workers outright
(what they own would be lost with them).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable

FAILURES_MAX = 5
"""So many workers in a row that died before they registered are an error."""
BACKOFF_FIRST_MS = 50.0
BACKOFF_MAX_MS = 5_000.0
STARTING_MAX = 32
"""No more than this many start at the same time."""
CROWD = 8
"""Idle workers beyond twice what is kept, and this, leave without waiting out their time."""


class State(enum.IntEnum):
    STARTING = 1
    IDLE = 2
    BUSY = 3
    LEAVING = 4


class Worker:
    """A worker process as the pool sees it."""

    __slots__ = ("blocked", "dedicated", "environment", "job_id", "since_ms", "state", "worker_id")

    def __init__(self, worker_id: bytes, now_ms: float) -> None:
        self.worker_id = worker_id
        self.state = State.STARTING
        self.job_id = b""
        """The job that it serves for good; empty while it is fresh."""
        self.environment = ""
        """The name of the runtime environment that it has applied, or is to apply; means nothing while it is fresh."""
        self.since_ms = now_ms
        self.dedicated = False
        """It is an actor, or about to become one."""
        self.blocked = False
        """It waits in `get` and has lent its CPU."""


class Request:
    """Somebody who waits for a worker of a job, with an environment."""

    __slots__ = ("dedicated", "environment", "job_id", "token")

    def __init__(self, token: Hashable, job_id: bytes, dedicated: bool, environment: str) -> None:
        self.token = token
        self.job_id = job_id
        self.dedicated = dedicated
        self.environment = environment


class WorkerPool:
    """See the module. `cpus` is rounded down; a node without CPUs keeps `extra` workers."""

    __slots__ = (
        "_extra", "_fresh", "_idle", "_idle_kill_ms", "_idle_number", "_keep", "_requests", "_retry_at_ms", "_starting",
        "_starting_max", "_task_busy", "_task_requests", "failures", "workers",
    )  # fmt: skip

    def __init__(self, cpus: float, extra: int, idle_kill_ms: float) -> None:
        self.workers: dict[bytes, Worker] = {}
        self.failures = 0
        """Workers in a row that died before they registered."""
        self._keep = int(cpus) + extra
        self._extra = extra
        self._idle_kill_ms = idle_kill_ms
        self._starting_max = min(STARTING_MAX, max(4, 2 * int(cpus)))
        self._requests: dict[Hashable, Request] = {}
        self._fresh: dict[bytes, Worker] = {}
        """Idle workers of no job, and, by job and environment, idle ones of each: the last to have become idle is the
        next to work."""
        self._idle: dict[tuple[bytes, str], dict[bytes, Worker]] = {}
        self._idle_number = 0
        """How many those are."""
        self._starting = 0
        self._task_busy = 0
        self._task_requests = 0
        self._retry_at_ms = 0.0

    # --- what the shell reports --------------------------------------------------------------------------------------

    def started(self, worker_id: bytes, now_ms: float) -> None:
        """A fork was asked for."""
        self.workers[worker_id] = Worker(worker_id, now_ms)
        self._starting += 1

    def registered(self, worker_id: bytes, now_ms: float) -> bool:
        """The worker is ready to serve. False if it is not one that was starting."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.state is not State.STARTING:
            return False
        self._starting -= 1
        self.failures = 0
        self._retry_at_ms = 0.0
        self._make_idle(worker, now_ms)
        return True

    def gone(self, worker_id: bytes, now_ms: float) -> bool:
        """The process is dead or could not be forked. True when it is time to say that workers can't start."""
        worker = self.workers.pop(worker_id, None)
        if worker is None:
            return False
        if worker.state is State.STARTING:
            self._starting -= 1
            self.failures += 1
            if self.failures > 1:  # one may have been killed from outside: it is replaced at once
                pause = min(BACKOFF_FIRST_MS * 2 ** min(self.failures - 2, 16), BACKOFF_MAX_MS)
                self._retry_at_ms = now_ms + pause
            return self.failures == FAILURES_MAX
        if worker.state is State.IDLE:
            self._take_idle(worker)
        self._count_busy(worker, -1)
        return False

    # --- serving -----------------------------------------------------------------------------------------------------

    def acquire(self, job_id: bytes, dedicated: bool = False, environment: str = "") -> Worker | None:
        """An idle worker for the job, which is busy from now on; None if there is none."""
        idle = self._idle.get((job_id, environment))
        source = idle or self._fresh
        if not source:
            return None
        worker = source[next(reversed(source))]
        self._take_idle(worker)
        self._make_busy(worker, job_id, dedicated, environment)
        return worker

    def request(self, token: Hashable, job_id: bytes, dedicated: bool = False, environment: str = "") -> None:
        """Queues for a worker; `match` tells. The same token again changes nothing."""
        if token not in self._requests:
            self._requests[token] = Request(token, job_id, dedicated, environment)
            self._task_requests += not dedicated

    def cancel(self, token: Hashable) -> bool:
        """Leaves the queue. False if the token is not in it."""
        request = self._requests.pop(token, None)
        if request is None:
            return False
        self._task_requests -= not request.dedicated
        return True

    def match(self) -> list[tuple[Hashable, Worker]]:
        """Gives idle workers to those who wait, first come first served as far as jobs allow."""
        found: list[tuple[Hashable, Worker]] = []
        if self._requests and (self._fresh or self._idle):
            for request in list(self._requests.values()):
                worker = self.acquire(request.job_id, request.dedicated, request.environment)
                if worker is not None:
                    self.cancel(request.token)
                    found.append((request.token, worker))
                elif not self._fresh and not self._idle:
                    break
        return found

    def release(self, worker_id: bytes, now_ms: float) -> None:
        """The worker's lease has ended, and it lives."""
        worker = self.workers.get(worker_id)
        if worker is not None and worker.state is State.BUSY:
            self._count_busy(worker, -1)
            worker.blocked = worker.dedicated = False
            self._make_idle(worker, now_ms)

    def retire(self, worker_id: bytes) -> None:
        """The worker is not to be used again, whatever it is doing; `gone` will follow."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.state is State.LEAVING or worker.state is State.STARTING:
            return
        if worker.state is State.IDLE:
            self._take_idle(worker)
        self._count_busy(worker, -1)
        worker.state = State.LEAVING
        worker.since_ms = math.inf  # unlike one that was only asked, it never comes back

    def block(self, worker_id: bytes, blocked: bool) -> None:
        """A busy worker waits in `get`, or goes on."""
        worker = self.workers.get(worker_id)
        if worker is not None and worker.state is State.BUSY and worker.blocked != blocked:
            self._count_busy(worker, -1)
            worker.blocked = blocked
            self._count_busy(worker, 1)

    # --- how many ----------------------------------------------------------------------------------------------------

    def forks(self, now_ms: float) -> int:
        """How many to fork now."""
        if now_ms < self._retry_at_ms:
            return 0
        waiting = len(self._requests)
        working = self._idle_count() + self._task_busy + self._task_requests
        wanted = waiting + max(self._extra - len(self._fresh), self._keep - working, 0)
        return max(0, min(wanted, self._starting_max if not self.failures else 1) - self._starting)

    def expire(self, now_ms: float) -> list[bytes]:
        """Idle workers to be asked to leave; they are LEAVING from now on. Call again within `idle_kill_ms`."""
        for worker in self.workers.values():
            if worker.state is State.LEAVING and worker.since_ms + 2 * self._idle_kill_ms <= now_ms:
                self._make_idle(worker, now_ms)  # it stayed, because it owns something
        surplus = self._idle_count() + self._task_busy - self._keep
        fresh_surplus = len(self._fresh) - self._extra
        found: list[bytes] = []
        if surplus > 0:
            due = now_ms - self._idle_kill_ms
            crowd = self._idle_count() - 2 * self._keep - CROWD
            old = [
                worker
                for worker in self.workers.values()
                if worker.state is State.IDLE and (worker.since_ms <= due or crowd > 0)
            ]
            old.sort(key=lambda worker: worker.since_ms)
            for worker in old:
                if len(found) == surplus or (worker.since_ms > due and len(found) >= crowd):
                    break
                if not worker.job_id:
                    if fresh_surplus <= 0:
                        continue
                    fresh_surplus -= 1
                self.retire(worker.worker_id)
                worker.since_ms = now_ms
                found.append(worker.worker_id)
        return found

    def late(self, now_ms: float, start_timeout_ms: float) -> list[bytes]:
        """Workers that should have registered long ago."""
        return [
            worker.worker_id
            for worker in self.workers.values()
            if worker.state is State.STARTING and worker.since_ms + start_timeout_ms <= now_ms
        ]

    def retry_in_ms(self, now_ms: float) -> float | None:
        """When `forks` should be asked again after failures; None if it is not waiting."""
        return self._retry_at_ms - now_ms if self._retry_at_ms > now_ms else None

    @property
    def requests(self) -> int:
        """How many wait for a worker."""
        return len(self._requests)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _idle_count(self) -> int:
        return len(self._fresh) + self._idle_number

    def _make_idle(self, worker: Worker, now_ms: float) -> None:
        worker.state = State.IDLE
        worker.since_ms = now_ms
        if worker.job_id:
            self._idle.setdefault((worker.job_id, worker.environment), {})[worker.worker_id] = worker
            self._idle_number += 1
        else:
            self._fresh[worker.worker_id] = worker

    def _take_idle(self, worker: Worker) -> None:
        if not worker.job_id:
            del self._fresh[worker.worker_id]
            return
        idle = self._idle[worker.job_id, worker.environment]
        del idle[worker.worker_id]
        self._idle_number -= 1
        if not idle:
            del self._idle[worker.job_id, worker.environment]

    def _make_busy(self, worker: Worker, job_id: bytes, dedicated: bool, environment: str) -> None:
        worker.state = State.BUSY
        worker.job_id = job_id
        worker.environment = environment
        worker.dedicated = dedicated
        worker.blocked = False
        self._count_busy(worker, 1)

    def _count_busy(self, worker: Worker, change: int) -> None:
        """Counts those who use a CPU for tasks."""
        if worker.state is State.BUSY and not worker.dedicated and not worker.blocked:
            self._task_busy += change
