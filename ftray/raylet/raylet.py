"""The raylet: what the drivers, workers and the GCS say to this node, and what comes of it.

Role: shell, the hub of the room. It knows who is at the other end of each link and hands each message to the part that
deals with it: `leases`, `actors`, `store_service`, `deaths`. Everything runs under the reactor's lock.

Rules: a process is dead when its link closes or when the template has reaped it, whichever comes first; both end in
`_client_gone`, once. A client that says what its role may not say loses its link, and with it all that it held;
nothing that a client sends raises beyond its link.

Rejected: a handler object for each client (the parts need tables over all of them anyway).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import msgspec

from ftray.config import Config
from ftray.exceptions import ProtocolError
from ftray.gcs.client import GcsClient
from ftray.gcs.state.commands import AddJob, DeathCauseRecord, FinishJob, WorkerDied
from ftray.gcs.state.tables import Code, JobRecord, Record, Result, Table
from ftray.ids import JOB_ID_BYTES, WORKER_ID_BYTES, short
from ftray.raylet.actors import Actors
from ftray.raylet.asking import Asking
from ftray.raylet.clients import Client, Clients, Job
from ftray.raylet.deaths import Deaths, how
from ftray.raylet.environments import Environments
from ftray.raylet.forking import TemplateProcess, TemplateSpec
from ftray.raylet.leases import Leases
from ftray.raylet.logs import LogHub
from ftray.raylet.memory_monitor import MemoryMonitor
from ftray.raylet.placement_groups import PlacementGroups
from ftray.raylet.pool import WorkerPool
from ftray.raylet.processes import Process, Processes
from ftray.raylet.setups import Setups
from ftray.raylet.store_service import StoreService
from ftray.scheduling.leases import LeaseScheduler
from ftray.wire import messages as m
from ftray.wire.group_messages import GroupMessage
from ftray.wire.messages import Message
from ftray.wire.reactor import Link, Reactor

log = logging.getLogger("ftray.raylet")

ASK_CAUSE_MS = 500
"""The longest that `AskDeathCause` waits for an answer."""
LINGER_MS = 50
"""A process whose link has closed, but which is still there after this time, is killed."""
DRAIN_READS = 16


class NodeInfo(msgspec.Struct, kw_only=True):
    """What this node is."""

    node_id: bytes
    cluster_id: bytes
    head: bool
    resources: dict[str, float]
    labels: dict[str, str]
    session_dir: str
    raylet_endpoint: str
    gcs_endpoints: tuple[str, ...]
    arena_fd: int
    arena_bytes: int
    token: bytes


class Raylet:
    """See the module."""

    def __init__(
        self,
        reactor: Reactor,
        info: NodeInfo,
        gcs: GcsClient,
        store: StoreService,
        template: TemplateProcess,
        template_spec: TemplateSpec,
    ) -> None:
        config = reactor.config
        self.reactor = reactor
        self.config: Config = config
        self.info = info
        self.node_id = info.node_id
        self.gcs = gcs
        self.store = store
        self.stopping = False
        self.clients = Clients()
        self.logs = LogHub(reactor, os.path.join(info.session_dir, "logs"), config)
        self.deaths = Deaths(reactor, info.node_id)
        scheduler = LeaseScheduler(info.resources)
        pool = WorkerPool(info.resources.get("CPU", 0.0), config.idle_workers_extra, config.idle_worker_kill_ms)
        self.leases = Leases(self, scheduler, pool)
        self.actors = Actors(self)
        self.groups = PlacementGroups(self)
        self.environments = Environments(self)
        self.setups = Setups(self)
        self.processes = Processes(
            reactor, template, template_spec, self.logs, self._worker_start, self._process_exited, self._fork_failed,
            self.leases.settle_soon,
        )  # fmt: skip
        self._registered_payload = msgspec.msgpack.encode(config)
        self._handlers: dict[type[Message], Callable[[Client, Any], None]] = {
            m.LeaseDemand: self.leases.demand,
            m.ReturnLeases: lambda client, message: self.leases.returned(client, message.lease_ids),
            m.WorkerBlocked: lambda client, message: self.leases.block(client, True),
            m.WorkerUnblocked: lambda client, message: self.leases.block(client, False),
            m.CreateObject: store.create,
            m.SealObject: store.seal,
            m.AbortObject: store.abort,
            m.PinObjects: store.pin,
            m.ReleaseObjects: store.release,
            m.FreeObjects: store.free,
            m.AskDeathCause: self._ask_death_cause,
            m.TaskNames: self._task_names,
            m.EnvironmentReady: self.setups.ready,
            m.KillWorker: self._kill_worker,
            m.Unregister: self._unregister,
        }
        self.asking = Asking(reactor)
        self.memory = MemoryMonitor(self)
        self._handlers[m.DoomedSeen] = self.memory.seen

    def adopt_config(self, config: Config) -> None:
        """The settings of the cluster that this node joins, before it has any client."""
        self.config = config
        self._registered_payload = msgspec.msgpack.encode(config)

    # --- links --------------------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        client: Client | None = link.peer
        if client is None:
            if type(message) is not m.RegisterClient:
                raise ProtocolError(f"the first message must be RegisterClient, not {type(message).__name__}")
            self._register(link, message)
            return
        handler = self._handlers.get(type(message))
        if handler is not None:
            handler(client, message)
        elif type(message) is m.ActorReady:
            self.actors.ready(client, message, payload)
        elif type(message) is m.ClientAnswer:
            self.asking.answered(client, message, payload)
        else:
            raise ProtocolError(f"a raylet takes no {type(message).__name__} from a client")

    def on_closed(self, link: Link, reason: str) -> None:
        client: Client | None = link.peer
        if isinstance(client, Client) and not self.stopping:
            self._client_gone(client, reason)
            self._remove_socket(client)

    def _remove_socket(self, client: Client) -> None:
        """Nobody listens there any more; a process that was killed could not remove it itself."""
        path = client.endpoint.removeprefix("unix:")
        if os.path.dirname(path) == os.path.join(self.info.session_dir, "sockets"):
            try:
                os.unlink(path)
            except OSError:
                pass

    def _register(self, link: Link, hello: m.RegisterClient) -> None:
        if len(hello.worker_id) != WORKER_ID_BYTES or hello.worker_id in self.clients.by_id:
            raise ProtocolError(f"a client registers as {hello.worker_id.hex() or 'nobody'}, which is not possible")
        client = Client(link, hello)
        if hello.driver:
            link.peer = client
            self.clients.by_id[client.worker_id] = client
            self._add_job(client, hello)
            return
        process = self.processes.by_id.get(client.worker_id)
        if process is None or process.pid not in (0, client.pid):
            raise ProtocolError(f"pid {client.pid} registers as a worker that this node has not started")
        link.peer = client
        self.clients.by_id[client.worker_id] = client
        if not self.leases.worker_ready(client):
            raise ProtocolError(f"worker {short(client.worker_id)} registers again")
        self._answer(client, "")

    def _add_job(self, client: Client, hello: m.RegisterClient) -> None:
        job_id = os.urandom(JOB_ID_BYTES)
        # Without a name, a namespace of its own: what one program names is not met by another by chance.
        namespace = hello.namespace or os.urandom(16).hex()

        def late() -> None:
            if not client.gone:
                self._answer(client, f"the job could not be entered: {self.gcs.unavailable()}", gcs_away=True)
                client.link.close("the GCS does not answer")
                self._client_gone(client, "the GCS does not answer")

        def committed(result: Result) -> None:
            timer.cancel()
            if result.code == Code.EXISTS and not client.gone:
                self._add_job(client, hello)
            elif not result.ok:
                self._answer(client, f"the job was refused: {result.message}")
                client.link.close("the job was refused")
                self._client_gone(client, "the job was refused")
            else:
                client.job_id = job_id
                job = Job(job_id, client.worker_id, namespace, hello.sys_path, hello.cwd)
                self.clients.add_job(job)
                if client.gone:  # while the job was being written
                    self._finish_job(client, job, None)
                    return
                if client.log_to_driver:
                    self.logs.forward(job_id, client.link)
                    self.logs.tell(job_id, self.leases.failing)
                self._answer(client, "", namespace)

        entrypoint = hello.entrypoint
        command = AddJob(job_id, client.worker_id, client.pid, self.node_id, entrypoint, namespace)
        timer = self.reactor.call_later(self.config.job_wait_ms, late)
        self.gcs.command(command, committed)

    def _answer(self, client: Client, error: str, namespace: str = "", gcs_away: bool = False) -> None:
        info = self.info
        client.link.send(
            m.Registered(
                info.node_id, client.job_id, info.cluster_id, os.getpid(), info.arena_fd, info.arena_bytes,
                info.gcs_endpoints, info.session_dir, info.resources, namespace, error, gcs_away,
            ),
            self._registered_payload,
        )  # fmt: skip

    # --- small messages -----------------------------------------------------------------------------------------------

    def _ask_death_cause(self, client: Client, message: m.AskDeathCause) -> None:
        def known(record: DeathCauseRecord | None) -> None:
            cause = msgspec.structs.asdict(record) if record is not None else None
            client.link.send(m.DeathCauseKnown(message.request, cause))

        self.deaths.ask(message.worker_id, ASK_CAUSE_MS, known)

    def _task_names(self, client: Client, message: m.TaskNames) -> None:
        client.running = message.name

    def _kill_worker(self, client: Client, message: m.KillWorker) -> None:
        worker = self.clients.by_id.get(message.worker_id)
        if worker is None:
            return
        if worker is not client and self.leases.holder_of(worker) != client.worker_id:
            log.warning("client %s wants a worker killed that it has not leased", short(client.worker_id))
            return
        self.processes.kill(message.worker_id, message.reason or "its owner wanted it killed")

    def _unregister(self, client: Client, message: m.Unregister) -> None:
        client.exit_code = message.code
        client.goodbye = message.reason or ("its program ended" if client.driver else "it left")
        if not client.driver:
            self.leases.pool.retire(client.worker_id)
        elif client.log_to_driver:
            self.logs.goodbye(client.job_id, [p.logs for p in self.processes.by_id.values() if p.logs is not None])

    # --- deaths -------------------------------------------------------------------------------------------------------

    def what_it_runs(self, client: Client) -> str:
        """For errors and status: the actor's class, or the task's name as far as it is known."""
        if client.driver:
            return "driver"
        actor = self.actors.in_worker(client.worker_id)
        if actor is not None:
            return actor.class_name
        process = self.processes.by_id.get(client.worker_id)
        return (
            client.running
            or (process.running() if process is not None and client.lease_id else "")
            or self.leases.task_name(client)
        )

    def _client_gone(self, client: Client, reason: str) -> None:
        if client.gone:
            return
        client.gone = True
        worker_id = client.worker_id
        if self.clients.by_id.get(worker_id) is client:
            del self.clients.by_id[worker_id]
        what = self.what_it_runs(client)
        self.asking.gone(client, what)
        self.deaths.link_closed(client, what, reason)
        if client.driver:
            job = self.clients.jobs.get(client.job_id)
            if job is not None:
                self._finish_job(client, job, self.deaths.known(worker_id) if client.goodbye is None else None)
        else:
            wait_ms = self.actors.worker_gone(client)
            self.leases.worker_gone(worker_id, client)
            self._report_worker(client, what, wait_ms)
            self.reactor.call_later(LINGER_MS, lambda: self._linger(worker_id))
        self.leases.owner_gone(client)
        self.store.client_gone(client)

    def _linger(self, worker_id: bytes) -> None:
        if not self.stopping:
            self.processes.kill(worker_id, "its connection to the node was closed")

    def _finish_job(self, client: Client, job: Job, cause: DeathCauseRecord | None) -> None:
        job.ended = True
        self.logs.stop_forwarding(job.job_id)
        self.gcs.command(FinishJob(job.job_id, cause), _ignored)
        if cause is not None:
            self.gcs.command(WorkerDied(client.worker_id, self.node_id, cause), _ignored)
        self.leases.kill_idle_of(job.job_id)

    def _report_worker(self, client: Client, what: str, wait_ms: int) -> None:
        """Tells the GCS, if it has run code of a job: it may own actors, and objects that others want. If it was an
        actor, `Actors` reports that first."""
        if not client.job_id:
            return

        def known(record: DeathCauseRecord | None) -> None:
            cause = record or DeathCauseRecord(self.node_id.hex(), client.pid, client.worker_id.hex(), what=what)
            self.gcs.command(WorkerDied(client.worker_id, self.node_id, cause), _ignored)

        self.deaths.ask(client.worker_id, wait_ms, known)

    def _process_exited(self, process: Process) -> None:
        """The template has reaped a worker. Its link may have closed already, or be about to."""
        client = self.clients.by_id.get(process.worker_id)
        what = ""
        if client is not None:
            self._read_rest(client.link)
            what = self.what_it_runs(client)
            if not process.kill_reason and process.status == 0:
                process.kill_reason = client.goodbye or ""
        self.deaths.reaped(process, what)
        record = self.deaths.known(process.worker_id)
        if record is not None:
            doing = f" while running {record.what}" if record.what else ""
            why = f": {record.reason}" if record.reason else ""
            log.info("worker pid %d %s%s%s", process.pid, how(record), doing, why)
        if client is not None:
            self.reactor.drop(client.link, "its process has ended")
        elif self.leases.worker_gone(process.worker_id, None):
            self.leases.start_failed(process, how(record) if record is not None else "it died")

    def _read_rest(self, link: Link) -> None:
        """What a dead process has sent before it died counts; a child that it left behind may hold the link open."""
        for _ in range(DRAIN_READS):
            if link.closed:
                return
            self.reactor._receive(link)

    def _fork_failed(self, worker_id: bytes, error: str) -> None:
        log.error("cannot start a worker: %s", error)
        if self.leases.worker_gone(worker_id, None):
            self.leases.start_failed(None, error)

    # --- from the GCS -------------------------------------------------------------------------------------------------

    def from_gcs(self, message: Message, payload: bytes | bytearray) -> None:
        """Handles what the GCS sends of its own accord."""
        if self.stopping:
            return
        if isinstance(message, m.StartActor):
            self._start_actor(message, bytes(payload))
        elif isinstance(message, m.StopActor):
            self.actors.stop(message)
        elif isinstance(message, m.JobEnded):
            job = self.clients.jobs.get(message.job_id)
            if job is not None:
                job.ended = True
            self.leases.kill_idle_of(message.job_id)
        elif isinstance(message, GroupMessage):
            self.groups.from_gcs(message)
        else:
            log.warning("the GCS sent an unexpected %s", type(message).__name__)

    def _start_actor(self, message: m.StartActor, creation: bytes) -> None:
        if message.job_id in self.clients.jobs:
            self.actors.start(message, creation)
            return

        def read(record: Record | None) -> None:
            if isinstance(record, JobRecord):  # of a driver on another node
                self.clients.add_job(Job(message.job_id, b"", record.namespace))
            self.actors.start(message, creation)

        self.gcs.read(Table.JOBS, message.job_id, read, immutable=True)  # as far as it is looked at here

    # --- workers ------------------------------------------------------------------------------------------------------

    def _worker_start(self, worker_id: bytes) -> bytes:
        info = self.info
        return msgspec.msgpack.encode(
            {
                "worker_id": worker_id,
                "raylet_endpoint": info.raylet_endpoint,
                "token": info.token,
                "cluster_id": info.cluster_id,
                "node_id": info.node_id,
                "arena_fd": info.arena_fd,
                "arena_bytes": info.arena_bytes,
                "session_dir": info.session_dir,
                "config": self.config,
            }
        )

    def tell_workers_to_exit(self, reason: str) -> None:
        """The node stops: workers may finish what they run, for a moment."""
        for client in self.clients.by_id.values():
            if not client.driver:
                client.link.send(m.ExitWorker(reason))


def _ignored(result: Result) -> None:
    """A refusal means that the GCS knows it already."""
