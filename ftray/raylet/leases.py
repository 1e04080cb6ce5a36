"""From demand to leased workers: the scheduler decides about resources, the pool about processes, and here they meet.

Role: shell, under the reactor's lock. A grant of the scheduler becomes a lease with a worker at once if one is idle,
or else when one has registered; meanwhile its resources are taken. Whatever changes asks for `settle_soon`, and one
`settle` at the end of the turn does everything: dispatch, match, fork, reclaim.

Rejected: settling in each handler (a client that sends ten demands in one batch would cost ten dispatches).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from ftray.exceptions import ProtocolError
from ftray.ids import WORKER_ID_BYTES, short
from ftray.raylet.clients import Client
from ftray.raylet.environments import Environment
from ftray.raylet.pool import FAILURES_MAX, State, Worker, WorkerPool
from ftray.raylet.processes import Process
from ftray.scheduling.bundles import BundleToken
from ftray.scheduling.leases import DedicatedInfeasible, DemandError, Grant, LeaseScheduler
from ftray.wire.messages import (
    ExitWorker,
    LeaseDemand,
    LeaseEnvironmentFailed,
    LeaseGranted,
    LeaseInfeasible,
    LeaseReclaim,
    WorkerAssigned,
)
from ftray.wire.reactor import Timer

if TYPE_CHECKING:
    from ftray.raylet.raylet import Raylet

log = logging.getLogger("ftray.raylet")

UNSERVED_MAX = 64
"""Grants that may wait for a worker at the same time: more would only fork more than the machine can start."""
LOOK_AGAIN_MS = 50
START_TIMEOUT_MS = 60_000.0
IDLE_EXIT = "idle"
"""The reason in `ExitWorker` for a worker that may stay if it owns objects."""


class GivenLease:
    """A lease: of whom, and in which worker (empty while none has been found)."""

    __slots__ = (
        "class_id", "client_id", "environment", "job_id", "lease_id", "num_cpus", "retriable", "worker_id",
    )  # fmt: skip

    def __init__(self, lease_id: int, client_id: bytes, class_id: int, job_id: bytes, retriable: bool = True) -> None:
        self.lease_id = lease_id
        self.client_id = client_id
        self.class_id = class_id
        self.job_id = job_id
        self.worker_id = b""
        self.retriable = retriable
        """What it runs may be repeated, should the memory monitor end the worker."""
        self.num_cpus = 0.0
        self.environment: Environment | None = None


class Leases:
    """See the module."""

    def __init__(self, raylet: Raylet, scheduler: LeaseScheduler, pool: WorkerPool) -> None:
        self.raylet = raylet
        self.scheduler = scheduler
        self.pool = pool
        self.given: dict[int, GivenLease] = {}
        """Leases of tasks; those of actors are in `actors.py`."""
        self.infeasible: dict[tuple[bytes, int], str] = {}
        """For status: what was last said to be impossible."""
        self.failing: list[str] = []
        """Why workers do not start, as long as they do not."""
        self.on_settled: Callable[[], None] = lambda: None
        """Told at the end of each settling: what is free may have changed."""
        self._settle_due = False
        self._timer: Timer | None = None

    # --- from clients ------------------------------------------------------------------------------------------------

    def demand(self, client: Client, message: LeaseDemand) -> None:
        """A client wants so many leases of a class."""
        class_id = message.class_id
        if not client.job_id:
            raise ProtocolError(f"client {short(client.worker_id)} asks for leases before it belongs to a job")
        if message.name:
            client.class_names[class_id] = message.name
        if not message.retriable:
            client.not_retriable.add(class_id)
        if (message.environment or client.environments) and not self.raylet.setups.admit(client, message):
            return
        try:
            self.scheduler.set_demand(client.worker_id, class_id, message.want, message.resources, client.job_id)
        except DemandError as error:
            log.warning("client %s: %s", short(client.worker_id), error)
            client.link.send(LeaseInfeasible(class_id, str(error)))
            return
        if not message.want:
            self.infeasible.pop((client.worker_id, class_id), None)
            if client.environments:
                self.raylet.setups.nobody_waits(client, class_id)
        self.settle_soon()

    def returned(self, client: Client, lease_ids: tuple[int, ...]) -> None:
        """A client needs these leases no more."""
        for lease_id in lease_ids:
            lease = self.given.get(lease_id)
            if lease is None:
                continue  # its worker died, which the owner did not know yet
            if lease.client_id != client.worker_id:
                log.warning("client %s returns lease %d, which is another's", short(client.worker_id), lease_id)
                continue
            self._end(lease)

    def owner_gone(self, client: Client) -> None:
        """The owner of leases is dead: what they run is of no use to anybody."""
        for lease_id in self.scheduler.drop_client(client.worker_id):
            lease = self.given.get(lease_id)
            if lease is not None:
                self.end(lease, "the owner of its task is gone")
        for key in [key for key in self.infeasible if key[0] == client.worker_id]:
            del self.infeasible[key]
        self.raylet.setups.client_gone(client)
        self.settle_soon()

    def end(self, lease: GivenLease, reason: str) -> None:
        """Ends what runs under the lease, and with it the lease."""
        if lease.worker_id:
            self.pool.retire(lease.worker_id)
            self.raylet.processes.kill(lease.worker_id, reason)
        else:
            self._end(lease)

    def block(self, client: Client, blocked: bool) -> None:
        """A worker waits in `get`, or goes on."""
        if not client.lease_id:
            return
        if blocked:
            self.scheduler.block(client.lease_id)
        else:
            self.scheduler.unblock(client.lease_id)
        self.pool.block(client.worker_id, blocked)
        self.settle_soon()

    def holder_of(self, worker: Client) -> bytes:
        """The client that has leased this worker, or b''."""
        lease = self.given.get(worker.lease_id)
        return lease.client_id if lease is not None else b""

    def task_name(self, worker: Client) -> str:
        """What a worker runs, as far as its lease tells."""
        lease = self.given.get(worker.lease_id)
        owner = self.raylet.clients.by_id.get(lease.client_id) if lease is not None else None
        return owner.class_names.get(lease.class_id, "") if owner is not None and lease is not None else ""

    # --- workers -----------------------------------------------------------------------------------------------------

    def worker_ready(self, client: Client) -> bool:
        """A worker has registered. False if it is none that was expected."""
        if not self.pool.registered(client.worker_id, self._now()):
            return False
        self.failing = []
        self.settle_soon()
        return True

    def worker_gone(self, worker_id: bytes, client: Client | None) -> bool:
        """A worker is dead: its lease is free at once. True if it is time to say that workers can't start."""
        failing = self.pool.gone(worker_id, self._now())
        if client is not None and client.lease_id:
            self.given.pop(client.lease_id, None)
            self.scheduler.end_lease(client.lease_id)
            client.lease_id = 0
        if client is not None:
            self.raylet.setups.worker_gone(client)
        self.settle_soon()
        return failing

    def start_failed(self, process: Process | None, error: str) -> None:
        """Worker after worker dies before it registers: drivers are told, who would wait for ever without a word."""
        text = f"workers do not start: {FAILURES_MAX} in a row ended before they had registered ({error})"
        log.error("%s", text)
        self.failing = [text, *(f"    {line}" for line in (process.stderr_tail() if process is not None else ()))]
        self.raylet.logs.tell_all(self.failing)

    def assign(
        self, worker: Worker, client: Client, lease_id: int, num_cpus: float, environment: Environment | None
    ) -> bool:
        """Gives the worker to its job, if it is its first, and to a lease. True if it has an environment to apply now,
        which is to be waited for (`setups.begin`)."""
        client.lease_id = lease_id
        client.since_ms = self._now()
        client.running = ""
        if client.job_id == worker.job_id:
            return False
        client.job_id = worker.job_id
        job = self.raylet.clients.jobs.get(worker.job_id)
        process = self.raylet.processes.by_id.get(worker.worker_id)
        if process is not None and process.logs is not None:
            process.logs.job_id = worker.job_id
        meaning = environment.meaning if environment is not None else ""
        if job is not None:
            client.link.send(WorkerAssigned(job.job_id, job.sys_path, job.cwd, job.namespace, meaning, num_cpus))
        else:
            client.link.send(WorkerAssigned(worker.job_id, environment=meaning, num_cpus=num_cpus))
        return bool(meaning)

    def kill_idle_of(self, job_id: bytes) -> None:
        """The job is over: its idle workers end. Busy ones end with the owners of what they run."""
        for worker in list(self.pool.workers.values()):
            idle = worker.state in (State.IDLE, State.LEAVING) or self.raylet.setups.is_for_nobody(worker)
            if worker.job_id == job_id and idle:
                self.pool.retire(worker.worker_id)
                self.raylet.processes.kill(worker.worker_id, "its job is over")
        self.settle_soon()

    # --- settling ----------------------------------------------------------------------------------------------------

    def settle_soon(self) -> None:
        """Once in this turn, when all that arrived has been handled."""
        if not self._settle_due:
            self._settle_due = True
            self.raylet.reactor.call_later(0, self._settle)

    def _now(self) -> float:
        return self.raylet.reactor.now_ms()

    def _settle(self) -> None:
        self._settle_due = False
        raylet = self.raylet
        if raylet.stopping:
            return
        if raylet.groups.bundles.returning:
            raylet.groups.settled()
        now_ms = self._now()
        pool, scheduler = self.pool, self.scheduler
        for grant in scheduler.dispatch(now_ms, UNSERVED_MAX - pool.requests):
            if isinstance(grant, Grant):
                owner = raylet.clients.by_id.get(grant.client)
                retriable = owner is None or grant.class_id not in owner.not_retriable
                lease = GivenLease(grant.lease_id, grant.client, grant.class_id, grant.job_id, retriable)
                self.given[grant.lease_id] = lease
                lease.num_cpus = grant.resources.get("CPU", 0.0)
                lease.environment = raylet.setups.of_class(grant.client, grant.class_id)
                key = lease.environment.key if lease.environment is not None else ""
                pool.request(grant.lease_id, grant.job_id, environment=key)
            elif type(grant.token) is BundleToken:
                raylet.groups.granted(grant.token, grant.lease_id)
            else:
                raylet.actors.granted(grant.token, grant.lease_id)
        for token, worker in pool.match():
            self._serve(token, worker)
        self._fork(now_ms)
        for found in scheduler.infeasible():
            if isinstance(found, DedicatedInfeasible):
                if type(found.token) is BundleToken:
                    raylet.groups.infeasible(found.token, found.missing)
                else:
                    raylet.actors.infeasible(found.token, found.missing)
                continue
            self.infeasible[found.client, found.class_id] = found.missing
            link = raylet.clients.link_of(found.client)
            if link is not None:
                link.send(LeaseInfeasible(found.class_id, found.missing))
        if scheduler.waiting:
            for reclaim in scheduler.reclaims(now_ms):
                link = raylet.clients.link_of(reclaim.client)
                if link is not None:
                    link.send(LeaseReclaim(reclaim.lease_id or 0))
        self._look_again(now_ms)
        self.on_settled()

    def _look_again(self, now_ms: float) -> None:
        retry_ms = self.pool.retry_in_ms(now_ms)
        if (self.scheduler.waiting or retry_ms is not None) and self._timer is None:
            delay_ms = LOOK_AGAIN_MS if self.scheduler.waiting or retry_ms is None else retry_ms
            self._timer = self.raylet.reactor.call_later(delay_ms, self._again)

    def _again(self) -> None:
        self._timer = None
        self.settle_soon()

    def _serve(self, token: Hashable, worker: Worker) -> None:
        client = self.raylet.clients.by_id.get(worker.worker_id)
        if not isinstance(token, int):
            assert client is not None
            self.raylet.actors.served(token, worker, client)
            return
        lease = self.given[token]
        owner = self.raylet.clients.by_id.get(lease.client_id)
        assert client is not None and owner is not None  # both leave the pool and the table when their links close
        lease.worker_id = worker.worker_id
        environment = lease.environment
        if self.assign(worker, client, lease.lease_id, lease.num_cpus, environment):
            assert environment is not None
            self.raylet.setups.begin(client, environment, lambda error: self._set_up(lease, client, error), lease)
        else:
            self._grant(lease, client, owner)

    def _grant(self, lease: GivenLease, client: Client, owner: Client) -> None:
        owner.link.send(
            LeaseGranted(
                lease.class_id, lease.lease_id, client.worker_id, client.endpoint, self.raylet.node_id, client.pid
            )
        )

    def _set_up(self, lease: GivenLease, client: Client, error: str) -> None:
        """The worker of a lease has applied its environment, or could not."""
        owner = self.raylet.clients.by_id.get(lease.client_id)
        if error:
            self.withdraw(lease)
            if owner is not None:
                owner.link.send(LeaseEnvironmentFailed(lease.class_id, error))
        elif owner is not None and self.given.get(lease.lease_id) is lease:
            self._grant(lease, client, owner)

    def let_go(self, lease: GivenLease, client: Client) -> None:
        """What this lease holds is free, while its worker goes on with its environment, for `set_up_for_nobody`."""
        del self.given[lease.lease_id]
        self.scheduler.end_lease(lease.lease_id)
        client.lease_id = 0

    def set_up_for_nobody(self, worker_id: bytes, error: str) -> None:
        """The worker of such a lease is ready, and idle (or has failed, and is being killed)."""
        if not error:
            self.pool.release(worker_id, self._now())
            self.settle_soon()

    def withdraw(self, failed: GivenLease) -> None:
        """The environment of this lease's class can't be set up: nothing more is granted until it is asked for anew."""
        self.scheduler.set_demand(failed.client_id, failed.class_id, 0)
        for lease in list(self.given.values()):
            if not lease.worker_id and (lease.client_id, lease.class_id) == (failed.client_id, failed.class_id):
                self._end(lease)
        self.settle_soon()

    def _fork(self, now_ms: float) -> None:
        for _ in range(self.pool.forks(now_ms)):
            worker_id = os.urandom(WORKER_ID_BYTES)
            self.pool.started(worker_id, now_ms)
            if not self.raylet.processes.fork(worker_id):
                self.pool.gone(worker_id, now_ms)
                return

    def _end(self, lease: GivenLease) -> None:
        del self.given[lease.lease_id]
        self.scheduler.end_lease(lease.lease_id)
        if lease.worker_id:
            worker = self.raylet.clients.by_id.get(lease.worker_id)
            if worker is not None:
                worker.lease_id = 0
                worker.running = ""
            self.pool.release(lease.worker_id, self._now())
        else:
            self.pool.cancel(lease.lease_id)
        self.settle_soon()

    # --- housekeeping ------------------------------------------------------------------------------------------------

    def tidy(self, now_ms: float) -> None:
        """Now and then: asks workers that idle for long to leave, kills those that do not get ready."""
        for worker_id in self.pool.expire(now_ms):
            link = self.raylet.clients.link_of(worker_id)
            if link is not None:
                link.send(ExitWorker(IDLE_EXIT))
        for worker_id in self.pool.late(now_ms, START_TIMEOUT_MS):
            self.raylet.processes.kill(worker_id, f"it did not register within {START_TIMEOUT_MS / 1000:.0f} s")
