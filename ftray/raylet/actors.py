"""The actors that this node hosts: started and stopped as the GCS says, reported as they become ready and die.

Role: shell, under the reactor's lock.

    StartActor ──► QUEUED ──granted──► WAITING ──served──► CREATING ──ready──► ALIVE
                     │ resources        │ a worker           │ constructor       │
                     └───────── stop, or the worker's death, in any state ───────┴──► reported (ActorDied), forgotten

One with a runtime environment is QUEUED while its packages are fetched, and CREATING while its worker applies it.

Rules: everything is told apart by actor and incarnation, so what the GCS repeats does no harm; what is said of an
earlier incarnation is answered `ActorDied` (nothing runs of it). Resources are free as soon as the worker is gone;
the report waits up to `CAUSE_WAIT_MS` for the exit status, longer where no restart waits for it. A worker that has been
an actor is never used again.

Rejected: asking an actor's worker whether it is still well (its link tells).
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import msgspec

from ftray.gcs.state.commands import ActorAlive, ActorDied, ActorUnplaced, DeathCauseRecord
from ftray.gcs.state.tables import Result
from ftray.ids import short
from ftray.raylet.clients import Client
from ftray.raylet.deaths import with_what
from ftray.raylet.environments import Environment
from ftray.raylet.pool import Worker
from ftray.runtime_env import SETUP
from ftray.scheduling.leases import DemandError
from ftray.wire.messages import ActorCreation, ActorReady, CreateActor, ExitWorker, StartActor, StopActor

if TYPE_CHECKING:
    from ftray.raylet.raylet import Raylet

log = logging.getLogger("ftray.raylet")

CAUSE_WAIT_MS = 100
"""The death of an actor that is restarted is reported without its exit status after this time."""
GONE_WAIT_MS = 2_000
"""The same for one that is not, whose callers are told the cause, or that was to be stopped, where the GCS waits for
certainty, not for speed."""


class Stage(enum.IntEnum):
    QUEUED = 1
    WAITING = 2
    CREATING = 3
    ALIVE = 4


class Hosted:
    """One life of an actor on this node."""

    __slots__ = (
        "actor_id", "class_name", "creation", "environment", "incarnation", "job_id", "lease_id", "num_cpus", "owner",
        "restartable", "stage", "stopping", "token", "worker_id",
    )  # fmt: skip

    def __init__(self, message: StartActor, creation: bytes) -> None:
        self.actor_id = message.actor_id
        self.incarnation = message.incarnation
        self.job_id = message.job_id
        self.class_name = message.class_name
        self.owner = message.owner
        self.restartable = message.restartable
        self.creation = creation
        self.token = (message.actor_id, message.incarnation)
        self.stage = Stage.QUEUED
        self.lease_id = 0
        self.worker_id = b""
        self.num_cpus = message.resources.get("CPU", 0.0)
        self.environment: Environment | None = None
        self.stopping = ""
        """Why it is being stopped, if it is."""


class Actors:
    """See the module."""

    def __init__(self, raylet: Raylet) -> None:
        self.raylet = raylet
        self.hosted: dict[tuple[bytes, int], Hosted] = {}
        self._lives: dict[bytes, dict[int, Hosted]] = {}
        """The same by actor and incarnation."""
        self._in_worker: dict[bytes, Hosted] = {}

    def in_worker(self, worker_id: bytes) -> Hosted | None:
        """The actor that this worker is or is becoming."""
        return self._in_worker.get(worker_id)

    # --- from the GCS ------------------------------------------------------------------------------------------------

    def start(self, message: StartActor, creation: bytes) -> None:
        """The GCS has placed an actor here."""
        token = (message.actor_id, message.incarnation)
        known = self.hosted.get(token)
        if known is not None:
            if known.stage is Stage.ALIVE:
                self._report_alive(known)  # the GCS asks again because it has not heard
            return
        for other in list(self._lives.get(message.actor_id, {}).values()):
            if other.incarnation > message.incarnation:
                return  # an old request that was under way for long
            self._kill(other, "a later life of the actor begins")
        actor = Hosted(message, creation)
        environment = environment_in(creation)
        if not environment:
            self._allocate(actor, message.resources)
            return
        try:
            actor.environment = self.raylet.environments.hold(environment)
        except ValueError as error:
            self._environment_failed(actor, str(error))
            return
        self._host(actor)  # the GCS may repeat itself, or stop it, meanwhile

        def prepared(error: str) -> None:
            if self.hosted.get(token) is not actor:
                return
            if error:
                self._environment_failed(actor, error)
                self._forget(actor)
            else:
                self._allocate(actor, message.resources)

        self.raylet.environments.prepare(actor.environment, prepared)

    def _allocate(self, actor: Hosted, resources: dict[str, float]) -> None:
        scheduler = self.raylet.leases.scheduler
        try:
            scheduler.allocate_dedicated(actor.token, resources, self.raylet.reactor.now_ms())
        except DemandError as error:
            self._forget(actor)
            self._unplaced(actor, str(error))
            return
        self._host(actor)
        self.raylet.leases.settle_soon()

    def stop(self, message: StopActor) -> None:
        """The GCS wants this incarnation gone; it is told when it is, also if it never was here."""
        actor = self.hosted.get((message.actor_id, message.incarnation))
        if actor is None:
            cause = DeathCauseRecord(self.raylet.node_id.hex(), reason=message.reason)
            self._report_died(message.actor_id, message.incarnation, cause)
            return
        client = self.raylet.clients.by_id.get(actor.worker_id) if actor.worker_id else None
        if actor.stage is Stage.ALIVE and message.graceful and client is not None:
            if not actor.stopping:
                actor.stopping = message.reason or "it is not needed any more"
                client.link.send(ExitWorker(actor.stopping))
            return
        self._kill(actor, message.reason or "it was stopped")

    def _kill(self, actor: Hosted, reason: str) -> None:
        actor.stopping = reason
        if actor.worker_id:
            self.raylet.leases.pool.retire(actor.worker_id)
            if self.raylet.processes.kill(actor.worker_id, reason):
                return  # its end is reported when it has come
        self.raylet.leases.pool.cancel(actor.token)
        cause = DeathCauseRecord(self.raylet.node_id.hex(), what=actor.class_name, reason=reason)
        self._report_died(actor.actor_id, actor.incarnation, cause)
        self._forget(actor)

    # --- resources, worker, constructor ------------------------------------------------------------------------------

    def granted(self, token: Hashable, lease_id: int) -> None:
        """The scheduler has taken the actor's resources."""
        actor = self._of_token(token)
        if actor is None:
            self.raylet.leases.scheduler.end_lease(lease_id)
            return
        actor.lease_id = lease_id
        actor.stage = Stage.WAITING
        key = actor.environment.key if actor.environment is not None else ""
        self.raylet.leases.pool.request(token, actor.job_id, dedicated=True, environment=key)

    def end_lease(self, lease_id: int, reason: str) -> None:
        """What the actor holds under this lease is no more: it ends, and is started anew where its options allow."""
        for actor in list(self.hosted.values()):
            if actor.lease_id == lease_id:
                self._kill(actor, reason)

    def infeasible(self, token: Hashable, missing: str) -> None:
        """This node can't ever hold the actor: the GCS must choose another."""
        actor = self._of_token(token)
        if actor is not None:
            self._forget(actor)
            self._unplaced(actor, missing)

    def served(self, token: Hashable, worker: Worker, client: Client) -> None:
        """A worker has been found for it."""
        actor = self._of_token(token)
        if actor is None:
            self.raylet.leases.pool.release(worker.worker_id, self.raylet.reactor.now_ms())
            return
        actor.worker_id = worker.worker_id
        actor.stage = Stage.CREATING
        self._in_worker[worker.worker_id] = actor
        environment = actor.environment
        if self.raylet.leases.assign(worker, client, actor.lease_id, actor.num_cpus, environment):
            assert environment is not None
            self.raylet.setups.begin(client, environment, lambda error: self._set_up(actor, client, error))
        else:
            self._create(actor, client)

    def _create(self, actor: Hosted, client: Client) -> None:
        client.link.send(CreateActor(actor.actor_id, actor.incarnation, actor.job_id, actor.owner), actor.creation)

    def _set_up(self, actor: Hosted, client: Client, error: str) -> None:
        """Its worker has applied its environment, or could not (and is killed for that)."""
        if self.hosted.get(actor.token) is not actor:
            return
        if error:
            self._environment_failed(actor, error, client)
            self._forget(actor, with_lease=False)
        else:
            self._create(actor, client)

    def _environment_failed(self, actor: Hosted, error: str, client: Client | None = None) -> None:
        pid, worker_id = (client.pid, client.worker_id.hex()) if client is not None else (0, "")
        cause = DeathCauseRecord(self.raylet.node_id.hex(), pid, worker_id, what=SETUP, reason=error)
        self._report_died(actor.actor_id, actor.incarnation, cause, may_restart=False)

    def ready(self, client: Client, message: ActorReady, payload: bytes | bytearray) -> None:
        """The constructor has returned or raised."""
        actor = self._in_worker.get(client.worker_id)
        if actor is None or actor.token != (message.actor_id, message.incarnation):
            log.warning("worker %s says it is an actor that it is not", short(client.worker_id))
            return
        if actor.stage is not Stage.CREATING:
            return
        actor.creation = b""
        if message.ok:
            actor.stage = Stage.ALIVE
            self._report_alive(actor)
            return
        cause = DeathCauseRecord(
            self.raylet.node_id.hex(), client.pid, client.worker_id.hex(), what=actor.class_name,
            reason=bytes(payload).decode("utf-8", "replace"),
        )  # fmt: skip
        self._report_died(actor.actor_id, actor.incarnation, cause, may_restart=False)
        self.raylet.leases.pool.retire(client.worker_id)  # it leaves by itself, and its lease ends with it
        self._forget(actor, with_lease=False)

    def worker_gone(self, client: Client) -> int:
        """The link of a worker has closed: if it was an actor, that is over. Returns how many ms its exit status is
        waited for at most."""
        actor = self._in_worker.pop(client.worker_id, None)
        if actor is None:
            return CAUSE_WAIT_MS
        self._forget(actor)
        code = client.exit_code
        left = client.goodbye is not None and not actor.stopping and not code
        wait_ms = CAUSE_WAIT_MS if actor.restartable and not actor.stopping else GONE_WAIT_MS

        def known(record: DeathCauseRecord | None) -> None:
            cause = with_what(record or DeathCauseRecord(self.raylet.node_id.hex(), client.pid), actor.class_name)
            if code and cause.exit_code is None and cause.signal is None:
                cause = msgspec.structs.replace(cause, exit_code=code)
            self._report_died(actor.actor_id, actor.incarnation, cause, may_restart=not left)

        self.raylet.deaths.ask(client.worker_id, wait_ms, known)
        return wait_ms

    def _of_token(self, token: Hashable) -> Hosted | None:
        return self.hosted.get(token) if isinstance(token, tuple) else None

    def _host(self, actor: Hosted) -> None:
        self.hosted[actor.token] = actor
        self._lives.setdefault(actor.actor_id, {})[actor.incarnation] = actor

    def _forget(self, actor: Hosted, with_lease: bool = True) -> None:
        if self.hosted.pop(actor.token, None) is not None:
            lives = self._lives[actor.actor_id]
            del lives[actor.incarnation]
            if not lives:
                del self._lives[actor.actor_id]
        if actor.environment is not None:
            self.raylet.environments.drop(actor.environment)
            actor.environment = None
        if self._in_worker.get(actor.worker_id) is actor:
            del self._in_worker[actor.worker_id]
        if with_lease:
            scheduler = self.raylet.leases.scheduler
            lease_id = scheduler.cancel_dedicated(actor.token)
            if lease_id is not None:
                scheduler.end_lease(lease_id)
        self.raylet.leases.settle_soon()

    # --- to the GCS --------------------------------------------------------------------------------------------------

    def _report_alive(self, actor: Hosted) -> None:
        client = self.raylet.clients.by_id.get(actor.worker_id)
        if client is None:
            return  # dead already, and about to be reported so

        def told(result: Result) -> None:
            if not result.ok and actor.token in self.hosted and not self.raylet.stopping:
                self._kill(actor, f"this life of the actor is not wanted ({result.message or result.code})")

        self.raylet.gcs.command(
            ActorAlive(
                actor.actor_id, actor.incarnation, client.worker_id, client.endpoint, self.raylet.node_id, client.pid
            ),
            told,
        )

    def _report_died(
        self, actor_id: bytes, incarnation: int, cause: DeathCauseRecord, may_restart: bool = True
    ) -> None:
        self.raylet.gcs.command(ActorDied(actor_id, incarnation, cause, may_restart), _ignored)

    def _unplaced(self, actor: Hosted, reason: str) -> None:
        self.raylet.gcs.command(
            ActorUnplaced(actor.actor_id, actor.incarnation, self.raylet.node_id, reason), _ignored
        )


def environment_in(creation: bytes) -> str:
    """The runtime environment that a creation spec names; nobody but the worker understands the rest of it."""
    try:
        return msgspec.msgpack.decode(creation, type=ActorCreation).environment
    except msgspec.MsgspecError:
        return ""  # the worker will say what is wrong with it


def _ignored(result: Any) -> None:
    """Refusals mean that the GCS knows better by now."""
