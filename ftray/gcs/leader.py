"""What only the leading replica does: its managers, and carrying out what they decide.

Role: shell around the managers of `gcs/state`. Made when the replica becomes leader, from the tables alone, and thrown
away when it ceases to be. Effects go to raylets over the links that they keep to the server.

Rules
- An effect is carried out only when the decision behind it is committed: managers see to that, since what they submit
  comes back to them as a change.
- A raylet that is not connected gets its effects when it connects: starting and stopping actors are told anew
  (`ActorManager.on_node_report`), and what is asked about bundles (`GroupManager.on_node_connected`); ended jobs are
  kept here until then.
- A new leader of several heads waits for the raylets, which have to find it first: a silence counts from `SETTLING_MS`
  on. But those that have not come by `ABSENT_MS` are probed, so the node of the head that died is found out soon.
- A link that closes is followed by a probe of the raylet's endpoint. Refused means that the process is gone, and
  the node is declared dead at once. A connection that breaks is tried again, because a process that is being
  killed may close its listener after its links.

Rejected: declaring a node dead because a link closed (the network may have cut it).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from ftray.config import Config
from ftray.gcs.replica import Replica, ReplicaClosedError, Request
from ftray.gcs.state import effects as e
from ftray.gcs.state.commands import ActorUnschedulable, AnyCommand, encode_command
from ftray.gcs.state.group_manager import GroupManager
from ftray.gcs.state.health import NodeHealth
from ftray.gcs.state.managers import ActorManager, JobManager
from ftray.gcs.state.tables import ActorState, Change, NodeState, Result, Table
from ftray.wire import group_messages as gm
from ftray.wire import messages as m
from ftray.wire.handshake import ROLE_RAYLET
from ftray.wire.reactor import Link, Reactor

log = logging.getLogger("ftray.gcs")

SETTLING_MS = 2_000.0
ABSENT_MS = 200.0
PROBE_RETRY_MS = 20.0
PROBES_MAX = 25

SendToNode = Callable[[bytes, m.Message, bytes], bool]


class Leader:
    """The managers at work. `send_to_node` returns whether the node is connected; `wake` asks for a turn soon.
    `is_connected` is given if there are several heads."""

    def __init__(
        self,
        reactor: Reactor,
        replica: Replica,
        config: Config,
        send_to_node: SendToNode,
        wake: Callable[[], None],
        is_connected: Callable[[bytes], bool] | None = None,
    ) -> None:
        now_ms = reactor.now_ms()
        self._reactor = reactor
        self._replica = replica
        self._send_to_node = send_to_node
        self._wake = wake
        self.actors = ActorManager(replica.state, infeasible_after_ms=config.infeasible_timeout_ms)
        self.groups = GroupManager(
            replica.state, self.actors.placement, infeasible_after_ms=config.infeasible_timeout_ms
        )
        self.jobs = JobManager(replica.state)
        settled_ms = now_ms if is_connected is None else now_ms + SETTLING_MS
        self.health = NodeHealth(replica.state, settled_ms, config.heartbeat_timeout_ms)
        self._ended_jobs: dict[bytes, set[bytes]] = {}
        """By node, ended jobs of which it has not been told."""
        self._health_due = False
        self._ended = False
        if is_connected is not None:
            reactor.call_later(ABSENT_MS, partial(self._probe_absent, is_connected))

    def end(self) -> None:
        """Another head leads: decides nothing more."""
        self._ended = True

    def _probe_absent(self, is_connected: Callable[[bytes], bool]) -> None:
        if not self._ended:
            for node in list(self._replica.state.store.nodes.values()):
                if node.state is NodeState.ALIVE and not is_connected(node.node_id):
                    self.on_node_closed(node.node_id)

    # --- events -------------------------------------------------------------------------------------------------------

    def on_changes(self, changes: Sequence[Change]) -> None:
        """The state has changed."""
        self.actors.on_changes(changes)
        self.groups.on_changes(changes)
        self.jobs.on_changes(changes)
        self.health.on_changes(changes, self._reactor.now_ms())
        for change in changes:
            if change.table is Table.NODES and not self._replica.state.store.node_alive(change.key):
                self._ended_jobs.pop(change.key, None)

    def on_node_connected(self, node_id: bytes) -> None:
        """A raylet has connected, perhaps anew."""
        state = self._replica.state
        self.health.on_heartbeat(node_id, self._reactor.now_ms())
        hosted = [
            (actor.actor_id, actor.incarnation)
            for actor in state.store.actors_on(node_id)
            if actor.state is ActorState.ALIVE
        ]  # that they are there is taken for granted: had one died, the raylet's report of it would be on its way
        self.actors.on_node_report(state, node_id, hosted)
        self.groups.on_node_connected(state, node_id)
        for job_id in sorted(self._ended_jobs.pop(node_id, ())):
            self._send_to_node(node_id, m.JobEnded(job_id), b"")
        self._wake()

    def on_bundles_held(self, node_id: bytes, message: gm.BundlesHeld) -> None:
        """A raylet that has connected says what it holds of placement groups."""
        self.groups.on_node_report(self._replica.state, node_id, message.held)
        self._wake()

    def on_node_closed(self, node_id: bytes) -> None:
        """The raylet's link has closed."""
        for effect in self.health.on_closed(node_id):
            self._carry_out(effect)

    def on_heartbeat(self, node_id: bytes, available: dict[str, float]) -> bool:
        """False if the node is no live member."""
        if not self.health.on_heartbeat(node_id, self._reactor.now_ms()):
            return False
        self.actors.on_load(node_id, available)
        return True

    # --- deciding and doing -------------------------------------------------------------------------------------------

    def plan(self) -> bool:
        """Carries out what is to be done now. Returns whether commands were proposed, so that a flush is due."""
        now_ms = self._reactor.now_ms()
        state = self._replica.state
        effects = [*self.jobs.plan(), *self.actors.plan(state, now_ms), *self.groups.plan(state, now_ms)]
        if self._health_due or now_ms >= self.health.next_wake_ms():  # it looks at all nodes: not in each turn
            self._health_due = False
            effects += self.health.plan(now_ms)
        proposed = False
        for effect in effects:
            proposed = self._carry_out(effect) or proposed
        return proposed

    def next_wake_ms(self) -> float:
        """When `plan` should be called at the latest."""
        times = (self.actors.next_wake_ms(), self.groups.next_wake_ms(), self.health.next_wake_ms())
        return min(time_ms for time_ms in times if time_ms is not None)

    def _carry_out(self, effect: e.Effect) -> bool:
        match effect:
            case e.Submit(command):
                return self._submit(command)
            case e.StartActor():
                owner = effect.owner_worker_id
                start = m.StartActor(
                    effect.actor_id, effect.incarnation, effect.job_id, effect.resources, effect.class_name, owner,
                    restartable=effect.restartable,
                )  # fmt: skip
                self._send_to_node(effect.node_id, start, effect.creation)
            case e.StopActor():
                stop = m.StopActor(effect.actor_id, effect.incarnation, effect.graceful, effect.reason)
                self._send_to_node(effect.node_id, stop, b"")
            case e.StopJob(node_id, job_id):
                if not self._send_to_node(node_id, m.JobEnded(job_id), b""):
                    self._ended_jobs.setdefault(node_id, set()).add(job_id)
            case e.ReportInfeasible(actor_id, incarnation, missing):
                log.warning("no node can ever run actor %s: %s", actor_id.hex(), missing)
                return self._submit(ActorUnschedulable(actor_id, incarnation, missing))
            case e.PrepareBundles(node_id, group_id, attempt, bundles):
                self._send_to_node(node_id, gm.PrepareBundles(group_id, attempt, bundles), b"")
            case e.CommitBundles(node_id, group_id, attempt):
                self._send_to_node(node_id, gm.CommitBundles(group_id, attempt), b"")
            case e.ReturnBundles(node_id, group_id, attempt, reason):
                self._send_to_node(node_id, gm.ReturnBundles(group_id, attempt, reason), b"")
            case e.Probe():
                _Probe(self._reactor, effect, self._probed)
        return False

    def _submit(self, command: AnyCommand) -> bool:
        try:
            self._replica.propose(Request(b"", 0, encode_command(command)), partial(self._on_result, command))
        except ReplicaClosedError:
            return False  # so this is no leader any more
        return True

    def _on_result(self, command: AnyCommand, result: Result) -> None:
        if not result.ok:
            log.info("%s was refused (%s): %s", type(command).__name__, result.code.value, result.message)
        self.actors.on_result(command, result)
        self.groups.on_result(self._replica.state, command, result)
        self.health.on_result(command, result, self._reactor.now_ms())

    def _probed(self, probe: e.Probe, refused: bool) -> None:
        if self._ended:
            return
        node = self._replica.state.node(probe.node_id)
        if refused and node is not None and node.state is NodeState.ALIVE:
            log.warning("node %s refuses connections: it is gone", probe.node_id.hex())
        self.health.on_probe(probe.node_id, probe.incarnation, refused)
        self._health_due = True
        self._wake()


class _Probe:
    """Connects to a raylet to see whether anybody listens there."""

    __slots__ = ("_answered", "_done", "_left", "_probe", "_reactor")

    def __init__(self, reactor: Reactor, probe: e.Probe, done: Callable[[e.Probe, bool], None]) -> None:
        self._reactor = reactor
        self._probe = probe
        self._done = done
        self._left = PROBES_MAX
        self._answered = False
        self._try()

    def _try(self) -> None:
        self._left -= 1
        try:
            self._reactor.connect(self._probe.endpoint, ROLE_RAYLET, self, on_open=self._opened)
        except (ConnectionRefusedError, FileNotFoundError):
            self._answer(refused=True)
        except (OSError, ValueError):
            self._again()

    def _again(self) -> None:
        if self._left > 0:
            self._reactor.call_later(PROBE_RETRY_MS, self._try)
        else:
            self._answer(refused=False)

    def _answer(self, refused: bool) -> None:
        if not self._answered:
            self._answered = True
            self._done(self._probe, refused)

    def _opened(self, link: Link) -> None:
        link.close("it was only a probe")
        self._answer(refused=False)

    def on_message(self, link: Link, message: m.Message, payload: bytes | bytearray) -> None:
        """Nothing that is said to a probe matters."""

    def on_closed(self, link: Link, reason: str) -> None:
        if reason.startswith("cannot connect") and "refused" in reason.lower():
            self._answer(refused=True)
        elif reason.startswith("no complete handshake"):
            self._answer(refused=False)  # it is there, and frozen: its silence decides
        elif not self._answered:
            self._again()
