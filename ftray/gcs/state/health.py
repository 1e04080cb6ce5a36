"""Which nodes are dead: heartbeats, closed connections, and the leader's own lateness.

Role: pure. Two ways lead to death. Silence: no heartbeat for `timeout_ms`. A closed connection and a refused probe: the
process is gone, which is known within milliseconds. A closed connection alone proves nothing: the network may have cut
it.

Rules: a leader that was late itself (frozen, starved of CPU) has not listened, so it must not call others silent: if
`plan` comes later than expected, everyone's deadline moves by as much. A new leader gives each node a full timeout.

Call `plan` at least every `timeout_ms / 10`, after reading what has arrived.

Rejected: suspicion levels computed from past intervals (phi accrual): on a loaded machine the intervals say more about
the machine than about the node, and nobody can say in advance when it will fire.
"""

from __future__ import annotations

from collections.abc import Iterable

from ftray.gcs.state.commands import AnyCommand, DeathCauseRecord, MarkNodeDead
from ftray.gcs.state.effects import Effect, Probe, Submit
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Change, NodeRecord, NodeState, Result, Table

HEARTBEAT_TIMEOUT_MS = 1_000


class _Watched:
    __slots__ = ("cause", "connected", "declared", "heard_ms", "record")

    def __init__(self, record: NodeRecord, now_ms: float) -> None:
        self.record = record
        self.heard_ms = now_ms
        self.connected = True
        self.declared = False
        self.cause = ""
        """Set once it is certain that the node is dead."""


class NodeHealth:
    """Watches the live nodes of the table."""

    __slots__ = ("_nodes", "_planned_ms", "timeout_ms")

    def __init__(self, state: GcsState, now_ms: float, timeout_ms: float = HEARTBEAT_TIMEOUT_MS) -> None:
        self.timeout_ms = timeout_ms
        self._planned_ms = now_ms
        self._nodes: dict[bytes, _Watched] = {}
        for node in state.store.nodes.values():
            self._see(node.node_id, node, now_ms)

    def on_changes(self, changes: Iterable[Change], now_ms: float) -> None:
        """The tables have changed."""
        for change in changes:
            if change.table is Table.NODES:
                assert change.record is None or isinstance(change.record, NodeRecord)
                self._see(change.key, change.record, now_ms)

    def on_heartbeat(self, node_id: bytes, now_ms: float) -> bool:
        """The node has been heard. Returns False if it is no live member: tell it that it is fenced."""
        watched = self._nodes.get(node_id)
        if watched is None:
            return False
        watched.heard_ms = now_ms
        watched.connected = True
        return True

    def on_closed(self, node_id: bytes) -> list[Effect]:
        """The node's connection closed: probe it, unless it is no live member."""
        watched = self._nodes.get(node_id)
        if watched is None or watched.declared:
            return []
        watched.connected = False
        return [Probe(node_id, watched.record.incarnation, watched.record.endpoint)]

    def on_probe(self, node_id: bytes, incarnation: int, refused: bool) -> None:
        """How a probe ended. Refused: nothing listens there. Otherwise (connected, or no answer) silence decides."""
        watched = self._nodes.get(node_id)
        if watched is not None and refused and not watched.connected and watched.record.incarnation == incarnation:
            watched.cause = "its connection closed and a new one was refused: the node process is gone"

    def on_result(self, command: AnyCommand, result: Result, now_ms: float) -> None:
        """A submitted MarkNodeDead was refused: look again later."""
        if isinstance(command, MarkNodeDead) and not result.ok:
            watched = self._nodes.get(command.node_id)
            if watched is not None and watched.record.incarnation == command.incarnation:
                watched.declared = False
                watched.heard_ms = max(watched.heard_ms, now_ms - self.timeout_ms * 0.9)

    def plan(self, now_ms: float) -> list[Effect]:
        """Nodes to be declared dead now."""
        late_ms = now_ms - self._planned_ms - self.timeout_ms / 4
        self._planned_ms = now_ms
        effects: list[Effect] = []
        for watched in self._nodes.values():
            if late_ms > 0:
                watched.heard_ms = min(now_ms, watched.heard_ms + late_ms)
            if watched.declared:
                continue
            silent_ms = now_ms - watched.heard_ms
            if not watched.cause and silent_ms < self.timeout_ms:
                continue
            watched.declared = True
            record = watched.record
            cause = DeathCauseRecord(
                node_id=record.node_id.hex(),
                pid=record.pid,
                what="node",
                reason=watched.cause or f"no heartbeat for {silent_ms:.0f} ms (the limit is {self.timeout_ms:g} ms)",
            )
            effects.append(Submit(MarkNodeDead(record.node_id, record.incarnation, cause)))
        return effects

    def next_wake_ms(self) -> float:
        """When `plan` should be called at the latest."""
        return self._planned_ms + self.timeout_ms / 5

    def _see(self, node_id: bytes, node: NodeRecord | None, now_ms: float) -> None:
        if node is None or node.state is NodeState.DEAD:
            self._nodes.pop(node_id, None)
            return
        watched = self._nodes.get(node_id)
        if watched is None or watched.record.incarnation != node.incarnation:
            self._nodes[node_id] = _Watched(node, now_ms)
        else:
            watched.record = node
            watched.heard_ms = now_ms
            watched.connected = True
            watched.cause = ""
