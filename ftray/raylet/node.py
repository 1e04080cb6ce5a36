"""A node: everything that one node process is made of, from its specification to its end.

Role: shell. `Node` makes the parts in the order in which they need each other (session, arena, template, reactor, GCS,
raylet), joins the cluster, and takes all apart again. `main.py` is the process around it.

Rules: the template is forked before anything else has descriptors to inherit; the ready line is given when the node
is a member of the cluster, so that whoever reads it can connect. A stop is complete: workers and template reaped, files
removed.

Rejected: the GCS of a head as a process of its own (one more to start, to watch and to lose; it takes 2 % of a core).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ftray.config import Config, config_from
from ftray.gcs.client import GcsClient
from ftray.gcs.state.commands import DeathCauseRecord, KvPut, MarkNodeDead, RegisterNode
from ftray.gcs.state.tables import Code, KvRecord, Record, Result, Table, kv_key
from ftray.ids import NODE_ID_BYTES
from ftray.raylet import session
from ftray.raylet.forking import TemplateSpec, fork_template
from ftray.raylet.hosting import Hosting
from ftray.raylet.spec import NodeSpec, SpecError, endpoints_of, resources_of, store_bytes_of, token_of
from ftray.store.arena import Arena
from ftray.wire.handshake import ANY_CLUSTER, ROLE_CLIENT, ROLE_GCS, ROLE_RAYLET, ROLE_TOOL, cluster_id_of
from ftray.wire.messages import GcsEndpoints, GcsHeartbeat, Message, NodeFenced
from ftray.wire.reactor import Handler, Link, Reactor, Timer

log = logging.getLogger("ftray.raylet")

JOIN_TIMEOUT_MS = 10_000.0
HEADS_TIMEOUT_MS = 50_000.0
"""The same for one of several heads: the others may be started by hand."""
LEAVE_TIMEOUT_MS = 100.0
GRACE_MS = 300
"""How long workers may take to exit by themselves when the node stops."""
TIDY_PERIOD_MS = 1_000
HEAD_BEAT_SHARE = 0.4
"""A head's own node gives a sign of life so often, as a share of the timeout,"""
HEADS_BEAT_SHARE = 0.2
"""and so often while another head leads: it has the links of Raft beside its own."""
CLUSTER_NAMESPACE = "ftray.cluster"
_HOPELESS = ("cluster token", "protocol version", "another cluster")
"""What the handshake's errors say when it is not a matter of time."""


class _Idle:
    """Handler of links on which nobody has anything to say: the GCS's probes."""

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        link.close("nothing is expected on this link")

    def on_closed(self, link: Link, reason: str) -> None:
        """Nothing was kept."""


class Node:
    """See the module. Made before trio and threads; raises FtrayError or OSError if it can't be."""

    def __init__(self, spec: NodeSpec, environ: Mapping[str, str]) -> None:
        self.spec = spec
        self.exit_code = 0
        self.stopping = ""
        """Why the node stops, once it does."""
        self.on_stop: Callable[[], None] = lambda: None
        self._parts: list[Callable[[], None]] = []
        """What is to be undone, in reverse order."""
        token = token_of(spec, environ)
        try:
            config = config_from(environ, spec.config)
        except ValueError as error:
            raise SpecError(str(error)) from None
        resources = resources_of(spec)
        store_bytes = store_bytes_of(spec)
        root = spec.session_root or environ.get("FTRAY_SESSION_ROOT") or session.default_root()
        session.clean_dead_sessions(root)
        self.session_dir = session.create_session(root)
        self._parts.append(lambda: session.clean_session(self.session_dir))
        try:
            spill_directory = environ.get("FTRAY_SPILL_DIRECTORY", "")
            if spill_directory:
                session.spill_elsewhere(self.session_dir, spill_directory)
            self._make(token, config, resources, store_bytes)
        except BaseException:
            self._undo()
            raise

    def _make(self, token: bytes, config: Config, resources: dict[str, float], store_bytes: int) -> None:
        session_dir = self.session_dir
        session.write_token(session_dir, token)
        arena = Arena.create(store_bytes)
        self._parts.append(arena.close)
        self.log_path = os.path.join(session_dir, "logs", "raylet.log")
        template_spec = TemplateSpec(arena.fd, self.log_path, self.spec.worker_entry, self.spec.worker_start)
        template = fork_template(template_spec)
        # Not before the fork: what the template does not need, it does not have.
        from ftray.raylet.raylet import NodeInfo, Raylet
        from ftray.raylet.store_service import StoreService

        node_id = os.urandom(NODE_ID_BYTES)
        cluster_id = ANY_CLUSTER
        if self.spec.head:
            # What a journal outlives, or several heads have in common, follows from what they have in common.
            shared = self.spec.head_endpoint is not None or self.spec.gcs_dir is not None
            cluster_id = cluster_id_of(token) if shared else os.urandom(len(ANY_CLUSTER))
        self.reactor = Reactor(config, token, cluster_id, name="node")
        self._parts.append(self.reactor.close)
        self.hosting: Hosting | None = None
        self._started = time.time()
        self._incarnation = 1
        """A node draws its id when it starts, so each id lives once; but for `_begin_anew`."""
        self._registered = self._registering = self._lost_gcs = False
        self._failure = ""
        if self.spec.head:
            self.hosting = Hosting(self.spec, self.reactor, session_dir, self._parts, self._head_failed)
        endpoints = endpoints_of(self.spec.address or "") if self.hosting is None else self.hosting.endpoints
        self.several = self.hosting is not None and self.hosting.host is not None
        """This is one of several heads."""
        self.gcs = GcsClient(
            self.reactor, endpoints, node_id, node_id, on_other=self._from_gcs, on_connected=self._gcs_connected
        )
        self.gcs.on_heads = self._gcs_heads
        self.gcs.own_endpoint = self.spec.head_endpoint or ""
        self._parts.append(self.gcs.close)
        self.info = NodeInfo(
            node_id=node_id, cluster_id=cluster_id, head=self.spec.head, resources=resources,
            labels=self.spec.labels or {}, session_dir=session_dir,
            raylet_endpoint=f"unix:{session_dir}/sockets/raylet.sock", gcs_endpoints=tuple(endpoints),
            arena_fd=arena.fd, arena_bytes=arena.size_bytes, token=token,
        )  # fmt: skip
        store = StoreService(self.reactor, arena, node_id, os.path.join(session_dir, "spill"))
        self._parts.append(store.close)
        self.raylet = Raylet(self.reactor, self.info, self.gcs, store, template, template_spec)
        self._parts.append(self.raylet.environments.close)
        self._parts.append(self.raylet.processes.forker.close)
        self.reactor.listen(self.info.raylet_endpoint, self._accept)
        self._registered_endpoint = self.info.raylet_endpoint
        if not self.spec.head or self.spec.port is not None:
            # Heads on other machines look here whether this process is alive.
            self._registered_endpoint = self.reactor.listen(f"tcp:{self.spec.host}:0", self._accept)
        self._said_available: dict[str, float] = {}
        self._beat: Timer | None = None
        self._beat_due_ms = 0.0
        self.raylet.leases.on_settled = self._load_changed

    def _accept(self, link: Link) -> Handler | None:
        from ftray.raylet.tools import ToolHandler

        if self.stopping:
            return None
        if link.role == ROLE_CLIENT:
            return self.raylet
        if link.role == ROLE_TOOL:
            return ToolHandler(self.raylet, self.stop)
        return _Idle() if link.role in (ROLE_RAYLET, ROLE_GCS) else None

    # --- joining ------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Becomes a member of the cluster. Drives the reactor until then. Raises SpecError if that fails."""
        with self.reactor.lock:
            if self.spec.head:
                value = msgspec.msgpack.encode((self.info.cluster_id, msgspec.structs.asdict(self.reactor.config)))
                # Of several heads the first one's settings count.
                self.gcs.command(KvPut(CLUSTER_NAMESPACE, b"id", value, not self.several), lambda result: None)
            if self.spec.head and not self.several:
                self._register()
                self.raylet.leases.settle_soon()
            else:
                self.gcs.read(Table.KV, kv_key(CLUSTER_NAMESPACE, b"id"), self._cluster_known, wait=True)
            self.reactor.flush_dirty()
        limit_ms = self.spec.join_timeout_ms or (HEADS_TIMEOUT_MS if self.several else JOIN_TIMEOUT_MS)
        self._pump(limit_ms, lambda: self._registered or bool(self._failure) or self._hopeless())
        if not self._registered:
            raise SpecError(self._failure or str(self.gcs.unavailable()))
        with self.reactor.lock:
            self.reactor.call_later(0, self._heartbeat)
            self.reactor.call_later(TIDY_PERIOD_MS, self._tidy)
        self._announce()

    def _announce(self) -> None:
        """Others find this node by what is in its session's folder."""
        known = {"started": self._started, "cpus": self.info.resources.get("CPU", 0.0)}
        session.write_node_json(self.session_dir, {**self.ready(), **known})

    def _announce_again(self) -> None:
        try:
            self._announce()
        except OSError as error:
            log.error("node.json could not be written, so that it is not up to date: %s", error)

    def _hopeless(self) -> bool:
        """Whether every head has refused this node for what trying again does not change."""
        failures = self.gcs.failures
        return len(failures) >= len(self.gcs.endpoints) and all(
            any(words in text for words in _HOPELESS) for text in failures.values()
        )

    def ready(self) -> dict[str, Any]:
        """What the starter is told, and the session's `node.json`; the token is not in it."""
        info = self.info
        return {
            "pid": os.getpid(),
            "node_id": info.node_id.hex(),
            "cluster_id": info.cluster_id.hex(),
            "raylet_endpoint": info.raylet_endpoint,
            "gcs_endpoints": list(info.gcs_endpoints),
            "session_dir": info.session_dir,
            "head": info.head,
        }

    def _cluster_known(self, record: Record | None) -> None:
        """A node that joins learns the cluster's id and settings, so that all agree."""
        if not isinstance(record, KvRecord):
            self._failure = "the head does not say which cluster it is: is it another version of ftray?"
            return
        cluster_id, settings = msgspec.msgpack.decode(record.value, type=tuple[bytes, dict[str, Any]])
        self.info.cluster_id = self.reactor.cluster_id = cluster_id
        own = {**settings, **self.spec.config}
        config = config_from({}, own)
        self.reactor.config = config
        if self.hosting is not None:
            self.hosting.adopt_config(config)
        self.raylet.adopt_config(config)
        self._register()
        self.raylet.leases.settle_soon()

    def _register(self) -> None:
        info = self.info
        if self._registering:
            return
        self._registering = True
        command = RegisterNode(
            info.node_id, self._registered_endpoint, info.resources, info.labels, self._incarnation,
            os.uname().nodename, os.getpid(),
        )  # fmt: skip
        self.gcs.command(command, self._register_answered)

    def _register_answered(self, result: Result) -> None:
        self._registering = False
        if result.ok:
            if self._lost_gcs:
                self._lost_gcs = False
                log.info("connected to the GCS again")
            self._registered = True
            self.raylet.groups.registered()
        elif result.code == Code.FENCED:
            self._fenced(result.message)
        elif not self.stopping:
            self._failure = f"the GCS refuses this node: {result.message or result.code}"
            log.error("%s", self._failure)

    def _pump(self, timeout_ms: float, until: Callable[[], bool]) -> bool:
        """Drives the reactor from here."""
        deadline_ms = self.reactor.now_ms() + timeout_ms
        with self.reactor.reader:
            while not until():
                left_ms = deadline_ms - self.reactor.now_ms()
                if left_ms <= 0:
                    return False
                self.reactor.poll(min(left_ms / 1000.0, self.reactor.next_timer_s(), 1.0))
        return True

    # --- the GCS ------------------------------------------------------------------------------------------------------

    def _from_gcs(self, message: Message, payload: bytes | bytearray) -> None:
        if isinstance(message, NodeFenced):
            self._fenced(message.reason)
        else:
            self.raylet.from_gcs(message, payload)

    def _gcs_connected(self, connected: bool) -> None:
        if connected and self._registered and not self.stopping:
            self._register()  # a head that has lost its memory learns of this node again
            self.raylet.groups.gcs_connected()
        if not connected and self._registered and not self.stopping and not self._lost_gcs:
            self._lost_gcs = True
            log.warning("the connection to the GCS is lost; what runs here goes on")

    def _gcs_heads(self, endpoints: Sequence[str]) -> None:
        known, self.info.gcs_endpoints = self.info.gcs_endpoints, tuple(endpoints)  # who comes later gets these
        if self._registered and set(known) != set(endpoints):
            self._announce_again()
            for client in self.raylet.clients.by_id.values():
                client.link.send(GcsEndpoints(tuple(endpoints)))

    def _head_failed(self, error: Exception) -> None:
        """This head has no part in the GCS any more."""
        from ftray.gcs.raft.errors import ReplicaRemovedError

        if isinstance(error, ReplicaRemovedError) and self._registered and self.hosting is not None:
            log.warning("%s; the node goes on", error)
            self.info.head = self.several = False
            self._announce_again()
            self.reactor.call_later(0, self._retire_head)
            return
        self._failure = str(error)
        self.exit_code = 1
        if self._registered:
            self.stop(f"its head has stopped: {error}")

    def _retire_head(self) -> None:
        gcs = self.gcs
        gcs.own_endpoint = ""  # should another head be there one day, it is asked whether it is
        if self.hosting is not None:
            self.hosting.retire(lambda: (gcs.served_by if gcs.connected else "", self.info.gcs_endpoints))

    def _begin_anew(self, reason: str) -> None:
        """One of several heads must not go with its node, which was frozen for a while, say: that would cost the
        cluster a vote. Whoever was served here is cut off, and the node joins as one that has just been started."""
        log.warning("this node is fenced: %s; it begins anew, because it is a head", reason)
        self._incarnation += 1
        for client in list(self.raylet.clients.by_id.values()):
            self.reactor.drop(client.link, f"the node was fenced: {reason}")
        self.raylet.groups.fenced("the node was declared dead")
        self._register()

    def _fenced(self, reason: str) -> None:
        if self.several and self._registered and not self.stopping:
            self._begin_anew(reason)
            return
        self._failure = f"this node is fenced: {reason}"
        self.exit_code = 1
        self.stop(self._failure)

    def _heartbeat(self) -> None:
        """A sign of life, with what is free here. A head's own node is alive if the head is: it speaks less often, and
        soon after what is free has changed."""
        config = self.reactor.config
        period_ms = float(config.heartbeat_period_ms)
        if self.info.head:
            share = HEADS_BEAT_SHARE if self.several and not self.gcs.at_home else HEAD_BEAT_SHARE
            period_ms = max(period_ms, config.heartbeat_timeout_ms * share)
        self._said_available = self.raylet.leases.scheduler.available
        if not self._registering:
            self.gcs.send(GcsHeartbeat(self.info.node_id, self._said_available))
        self._beat_due_ms = self.reactor.now_ms() + period_ms
        self._beat = self.reactor.call_later(period_ms, self._heartbeat)

    def _load_changed(self) -> None:
        soon_ms = self.reactor.config.heartbeat_period_ms
        if self._beat is None or self._beat_due_ms <= self.reactor.now_ms() + soon_ms:
            return
        if self.raylet.leases.scheduler.available != self._said_available:
            self._beat.cancel()
            self._beat_due_ms = self.reactor.now_ms() + soon_ms
            self._beat = self.reactor.call_later(soon_ms, self._heartbeat)

    def _tidy(self) -> None:
        self.raylet.leases.tidy(self.reactor.now_ms())
        self.raylet.groups.tidy(self.reactor.now_ms())
        self.reactor.call_later(TIDY_PERIOD_MS, self._tidy)

    # --- the end ------------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Asks the node to stop; the process around it then calls `close`. May be repeated."""
        if not self.stopping:
            self.stopping = reason
            log.info("stopping: %s", reason)
            self.on_stop()

    def close(self) -> None:
        """Ends everything. Nothing drives the reactor any more but this."""
        raylet = self.raylet
        if not self.spec.lifeline and self.exit_code == 0:
            self._let_workers_go()
        raylet.stopping = True
        if self.hosting is not None and self.exit_code == 0:
            self.hosting.resign(self.reactor, self._pump)
        if (self.several or not self.info.head) and self._registered and self.exit_code == 0:
            self._leave()
        raylet.processes.forker.close()
        with self.reactor.lock:
            for process in raylet.processes.by_id.values():
                if process.logs is not None:
                    raylet.logs.finish(process.logs)
        self._undo()

    def _let_workers_go(self) -> None:
        with self.reactor.lock:
            self.raylet.tell_workers_to_exit("the node stops")
            self.reactor.flush_dirty()
        self._pump(GRACE_MS, lambda: not self.raylet.processes.by_id)

    def _leave(self) -> None:
        """Tells the cluster, which would find out by itself, later."""
        info = self.info
        cause = DeathCauseRecord(info.node_id.hex(), os.getpid(), what="node", reason=self.stopping)
        left: list[Result] = []
        with self.reactor.lock:
            self.gcs.command(MarkNodeDead(info.node_id, self._incarnation, cause), left.append)
            self.reactor.flush_dirty()
        self._pump(LEAVE_TIMEOUT_MS, lambda: bool(left))

    def _undo(self) -> None:
        while self._parts:
            part = self._parts.pop()
            try:
                part()
            except Exception:
                log.exception("a part of the node could not be ended")
