"""The memory monitor: ends a process before the kernel ends one of its own choice.

Role: shell, under the reactor's lock. Every `memory_monitor_period_ms` it reads how much memory is in use: four times
as often when little is left, a quarter as often when much is. `scheduling/memory.py` says whether that is too much, and
who has to go.

Rules: the owner of what the process runs hears of it first (`WorkerDoomed`) and answers, so that it does not take the
end for a crash: such work is repeated on a counter of its own (`task_oom_retries`). An owner that does not answer in
`DOOM_WAIT_MS` is not waited for. While one is being killed no other is chosen.

Rejected: leaving it to the kernel (it kills the largest process of the machine, a driver or the node as likely as a
worker, and nobody is told why).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ftray.ids import short
from ftray.raylet.clients import Client
from ftray.raylet.memory_usage import MemoryGauge, process_bytes
from ftray.raylet.pool import State
from ftray.scheduling.memory import Candidate, Usage, choose, explain, is_short
from ftray.wire.messages import DoomedSeen, WorkerDoomed

if TYPE_CHECKING:
    from ftray.raylet.raylet import Raylet

log = logging.getLogger("ftray.raylet")

DOOM_WAIT_MS = 100
NEAR_PERCENT = 10.0
"""Within so much of the threshold it looks four times as often."""
FAR_PERCENT = 30.0
"""Further than this from the threshold it looks a quarter as often: an idle node should be idle."""


class MemoryMonitor:
    """See the module."""

    def __init__(self, raylet: Raylet) -> None:
        config = raylet.config
        self._raylet = raylet
        self._gauge = MemoryGauge(config.memory_limit_bytes)
        self._victim = b""
        self._reason = ""
        self._nothing_to_kill = False
        self.kills = 0
        """How many processes it has ended, for status."""
        self.last: Usage | None = None
        if config.memory_monitor_period_ms:
            raylet.reactor.call_later(config.memory_monitor_period_ms, self._tick)

    def _tick(self) -> None:
        raylet = self._raylet
        if raylet.stopping:
            return
        config = raylet.config
        usage = self.last = self._gauge.read(process.pid for process in raylet.processes.by_id.values() if process.pid)
        threshold = config.memory_threshold_percent
        period_ms = float(config.memory_monitor_period_ms)
        if is_short(usage, threshold - NEAR_PERCENT):
            period_ms /= 4
        elif not is_short(usage, threshold - FAR_PERCENT):
            period_ms *= 4
        if self._victim and self._victim not in raylet.processes.by_id:
            self._victim = b""
        if not self._victim and is_short(usage, threshold):
            self._act(usage, threshold)
        raylet.reactor.call_later(period_ms, self._tick)

    def _candidates(self) -> list[Candidate]:
        raylet = self._raylet
        found = []
        for worker in raylet.leases.pool.workers.values():
            client = raylet.clients.by_id.get(worker.worker_id)
            if client is None:
                continue
            actor = raylet.actors.in_worker(worker.worker_id)
            lease = raylet.leases.given.get(client.lease_id)
            idle = worker.state is not State.BUSY
            if actor is not None:
                retriable = actor.restartable
            else:
                retriable = lease is not None and lease.retriable
            found.append(
                Candidate(
                    worker.worker_id, client.pid, "" if idle else raylet.what_it_runs(client), client.since_ms,
                    retriable, idle, process_bytes(client.pid),
                )
            )  # fmt: skip
        return found

    def _act(self, usage: Usage, threshold: float) -> None:
        candidates = self._candidates()
        victim = choose(candidates)
        if victim is None:
            if not self._nothing_to_kill:
                log.error("memory is short, and no worker is there to be ended: drivers or other programs use it")
            self._nothing_to_kill = True
            return
        self._nothing_to_kill = False
        raylet = self._raylet
        reason = explain(usage, threshold, victim, candidates)
        self._victim, self._reason = victim.worker_id, reason
        self.kills += 1
        log.warning("worker pid %d (%s): %s", victim.pid, victim.what or "idle", reason)
        client = raylet.clients.by_id[victim.worker_id]
        owner = raylet.clients.by_id.get(raylet.leases.holder_of(client))
        if owner is None:
            self._kill(victim.worker_id)
            return
        owner.link.send(WorkerDoomed(victim.worker_id, reason))
        raylet.reactor.call_later(DOOM_WAIT_MS, lambda: self._kill(victim.worker_id))

    def seen(self, client: Client, message: DoomedSeen) -> None:
        """The owner knows."""
        worker = self._raylet.clients.by_id.get(message.worker_id)
        if worker is not None and self._raylet.leases.holder_of(worker) != client.worker_id:
            log.warning("client %s answers for a worker that it has not leased", short(client.worker_id))
            return
        self._kill(message.worker_id)

    def _kill(self, worker_id: bytes) -> None:
        if worker_id == self._victim:
            self._raylet.leases.pool.retire(worker_id)
            self._raylet.processes.kill(worker_id, self._reason)
