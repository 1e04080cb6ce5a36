"""The GCS as its clients see it: commands, reads, watches and heartbeats over links.

Role: shell. One object on the reactor of a head node. It hands commands to the replica, answers from its state, feeds
watchers (`watchers.py`), and runs the managers while its replica leads (`leader.py`).

Rules
- All that arrives in one batch of the reactor is one **turn**: commands are proposed as they come, and carried out with
  one sync; then the managers plan, until they have nothing more to commit; then reads are answered. So a reply never
  leaves before its command is durable, and a client that reads after it wrote finds what it wrote.
- Whatever a client sends wrong costs its own link.
- A node that was declared dead is told so (`NodeFenced`) on the link that it has, and when it is heard of again.
- Nothing waits for a slow client: watchers are bounded, an answer that is too large is refused.

Rejected: a sync for each command (6,000 a second at most, where a batch takes 50,000); answering reads as they come (a
client would not see its own write).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from ftray.config import Config
from ftray.exceptions import ProtocolError
from ftray.gcs.codec import encode_changes, encode_result
from ftray.gcs.leader import Leader
from ftray.gcs.replica import Replica, ReplicaClosedError, Request
from ftray.gcs.state.commands import MarkNodeDead, decode_command
from ftray.gcs.state.errors import CommandError, GcsError
from ftray.gcs.state.tables import Change, Code, NodeRecord, NodeState, Result, Table
from ftray.gcs.watchers import CATCH_UP_MS, Watcher, WatchHub
from ftray.wire.handshake import ROLE_GCS
from ftray.wire.messages import (
    GcsCommand,
    GcsHeartbeat,
    GcsHello,
    GcsRead,
    GcsResult,
    GcsWatch,
    Message,
    NodeFenced,
)
from ftray.wire.reactor import Handler, Link, Reactor, Timer

log = logging.getLogger("ftray.gcs")

FLUSHES_MAX = 20
"""Rounds of managers' commands in one turn; what is left then has its turn after other work."""


class _Client:
    """What is known of one link; kept in `link.peer`."""

    __slots__ = ("client_id", "leaves", "node_id", "waits", "watcher")

    def __init__(self, link: Link, client_id: bytes, node_id: bytes) -> None:
        self.client_id = client_id
        self.node_id = node_id
        self.leaves = False
        """The node has declared itself dead: it stops, and need not be told."""
        self.watcher = Watcher(link)
        self.waits: set[tuple[Table, bytes]] = set()
        """Keys that reads of this link wait for."""


class GcsServer:
    """See the module. Everything runs under `reactor.lock`."""

    def __init__(self, reactor: Reactor, replica: Replica, config: Config) -> None:
        self.reactor = reactor
        self.replica = replica
        self.config = config
        self.watchers = WatchHub(reactor, config.output_backlog_bytes_max // 4)
        self.loads: dict[bytes, dict[str, float]] = {}
        """What each live node last said is free there."""
        self._links: dict[Link, None] = {}
        self._nodes: dict[bytes, Link] = {}
        self._reads: list[tuple[Link, GcsRead]] = []
        self._waits: dict[tuple[Table, bytes], list[tuple[Link, int]]] = {}
        self._leader: Leader | None = None
        self._turn_due = False
        self._tick_timer: Timer | None = None
        self._tick_due_ms = 0.0
        self._closed = False
        self._end_feed = replica.on_change(self._on_changes)
        self._tick()

    def accept(self, link: Link) -> Handler | None:
        """For `Reactor.listen`: serves links with the role of a GCS client."""
        if link.role != ROLE_GCS or self._closed:
            return None
        self._links[link] = None
        return self

    def close(self) -> None:
        """Ends the service and closes its links; the replica is the caller's. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._end_feed()
        self._leader = None
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        for link in list(self._links):
            link.close("the GCS is stopping")
        self._links.clear()
        self._nodes.clear()

    def status(self) -> dict[str, Any]:
        """For tools: who leads, how many clients there are, and what each pending actor waits for."""
        state, leader = self.replica.state, self._leader
        reasons = {} if leader is None else {
            actor.actor_id.hex(): reason
            for actor in state.store.actors.values()
            if (reason := leader.actors.pending_reason(actor.actor_id))
        }  # fmt: skip
        return {
            "leads": self.replica.is_leader,
            "leader": self.replica.leader_hint,
            "revision": state.revision,
            "clients": len(self._links),
            "connected_nodes": sorted(node_id.hex() for node_id in self._nodes),
            "available": {node_id.hex(): dict(load) for node_id, load in self.loads.items()},
            "pending_actors": reasons,
        }

    # --- messages -----------------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        client = link.peer
        if client is None:
            self._hello(link, message)
            return
        match message:
            case GcsCommand():
                self._command(link, client, message, payload)
            case GcsRead():
                self._reads.append((link, message))
                self._wake()
            case GcsWatch():
                tables = [self._table(name) for name in message.tables]
                self.watchers.add(self.replica.state, client.watcher, tables, message.keys, message.since_revision)
            case GcsHeartbeat():
                self._heartbeat(link, client, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not a message to the GCS")

    def _hello(self, link: Link, message: Message) -> None:
        if not isinstance(message, GcsHello) or not message.client_id:
            raise ProtocolError("a link to the GCS must begin with GcsHello and a client id")
        link.peer = _Client(link, message.client_id, message.node_id)
        if message.node_id:
            former = self._nodes.get(message.node_id)
            self._nodes[message.node_id] = link
            if former is not None:
                former.close("the node has connected anew")
                self._forget(former)
            if self._leader is not None:
                self._leader.on_node_connected(message.node_id)

    def _table(self, name: str) -> Table:
        try:
            return Table(name)
        except ValueError:
            raise ProtocolError(f"there is no table {name!r}: there are {', '.join(Table)}") from None

    def _command(self, link: Link, client: _Client, message: GcsCommand, payload: bytes | bytearray) -> None:
        reply = partial(self._reply, link, message.request)
        if client.node_id and not client.leaves:
            client.leaves = _says_goodbye(payload, client.node_id)
        if self.replica.is_leader:
            try:
                self.replica.propose(Request(client.client_id, message.sequence, bytes(payload)), reply)
                self._wake()
                return
            except ReplicaClosedError:
                pass
        reply(Result(Code.NOT_LEADER, "this head does not lead the cluster", self.replica.state.revision))

    def _reply(self, link: Link, request: int, result: Result) -> None:
        hint = self.replica.leader_hint if result.code is Code.NOT_LEADER else ""
        link.send(*encode_result(request, result, hint))

    def _heartbeat(self, link: Link, client: _Client, message: GcsHeartbeat) -> None:
        if message.node_id != client.node_id:
            raise ProtocolError("a heartbeat for another node than the one that this link is of")
        leader = self._leader
        if leader is None or leader.on_heartbeat(client.node_id, message.available):
            self.loads[client.node_id] = message.available
            return
        node = self.replica.state.node(client.node_id)
        if node is not None and node.state is NodeState.DEAD:
            self._fence(link, node)

    def _fence(self, link: Link, node: NodeRecord) -> None:
        cause = node.cause.reason if node.cause is not None else ""
        link.send(NodeFenced(f"node {node.node_id.hex()} was declared dead: {cause or 'no reason is known'}"))
        link.close("its node was declared dead")
        self._forget(link)

    def on_closed(self, link: Link, reason: str) -> None:
        self._forget(link)

    def _forget(self, link: Link) -> None:
        """The link is closed."""
        self._links.pop(link, None)
        client = link.peer
        if client is None:
            return
        self.watchers.remove(client.watcher)
        for item in client.waits:
            waiting = [each for each in self._waits.get(item, ()) if each[0] is not link]
            if waiting:
                self._waits[item] = waiting
            else:
                self._waits.pop(item, None)
        client.waits.clear()
        if client.node_id and self._nodes.get(client.node_id) is link:
            del self._nodes[client.node_id]
            if self._leader is not None and not self._closed:
                self._leader.on_node_closed(client.node_id)

    # --- turns --------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Asks for a turn at the end of this batch of the reactor."""
        if not self._turn_due and not self._closed:
            self._turn_due = True
            self.reactor.call_later(0, self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self._closed:
            return
        self._schedule_tick()
        self._lead_or_not()
        self._flush()
        for _ in range(FLUSHES_MAX):
            if self._leader is None or not self._leader.plan():
                break
            self._flush()
            self._lead_or_not()
        else:
            self._wake()
        reads, self._reads = self._reads, []
        for link, read in reads:
            self._answer_read(link, read)
        self._schedule_tick()

    def _flush(self) -> None:
        try:
            self.replica.flush()
        except GcsError as error:
            # Who asked has been answered. A full disk may have room again; a disk that failed has closed the replica.
            log.error("commands could not be made durable: %s", error)
        except Exception as error:  # our own fault: who has asked must not wait for ever, and asks again
            log.exception("the GCS replica failed")
            self.reactor.handler_errors.append(repr(error))
            for link in list(self._links):
                link.close("the GCS failed")
                self._forget(link)

    def _lead_or_not(self) -> None:
        leads = self.replica.is_leader
        if leads and self._leader is None:
            self._leader = Leader(self.reactor, self.replica, self.config, self._send_to_node, self._wake)
            for node_id in self._nodes:
                self._leader.on_node_connected(node_id)
        elif not leads:
            self._leader = None

    def _tick(self) -> None:
        self._tick_timer = None
        if self._closed:
            return
        self.watchers.catch_up(self.replica.state)
        self._wake()

    def _schedule_tick(self) -> None:
        now_ms = self.reactor.now_ms()
        due_ms = now_ms + self.config.heartbeat_timeout_ms / 5.0
        if self._leader is not None:
            due_ms = min(due_ms, self._leader.next_wake_ms())
        if self.watchers.any_behind:
            due_ms = min(due_ms, now_ms + CATCH_UP_MS)
        if self._tick_timer is not None:
            if self._tick_due_ms <= due_ms:
                return  # an early tick costs less than a new timer in each turn
            self._tick_timer.cancel()
        self._tick_due_ms = due_ms
        self._tick_timer = self.reactor.call_later(max(1.0, due_ms - now_ms), self._tick)

    def _send_to_node(self, node_id: bytes, message: Message, payload: bytes) -> bool:
        link = self._nodes.get(node_id)
        if link is None:
            return False
        link.send(message, payload)
        return True

    # --- the state ----------------------------------------------------------------------------------------------------

    def _on_changes(self, changes: Sequence[Change]) -> None:
        self.watchers.publish(changes, self.replica.state.revision)
        if self._leader is not None:
            self._leader.on_changes(changes)
        for change in changes:
            if self._waits and change.record is not None:
                for link, request in self._waits.pop((change.table, change.key), ()):
                    link.peer.waits.discard((change.table, change.key))
                    self._send_rows(link, request, [change])
            if isinstance(change.record, NodeRecord) and change.record.state is NodeState.DEAD:
                self.loads.pop(change.key, None)
                link_of_node = self._nodes.pop(change.key, None)
                if link_of_node is not None and not link_of_node.peer.leaves:
                    self._fence(link_of_node, change.record)

    def _answer_read(self, link: Link, read: GcsRead) -> None:
        state = self.replica.state
        try:
            table = self._table(read.table)
        except ProtocolError as error:
            link.send(GcsResult(read.request, state.revision, Code.INVALID.value, str(error)))
            return
        if read.all:
            self._send_rows(link, read.request, state.rows_as_changes([table]), (table,))
            return
        if read.named is not None:
            actor = state.store.named_actor(*read.named)
            found = [] if actor is None else [Change(state.revision, Table.ACTORS, actor.actor_id, actor)]
            self._send_rows(link, read.request, found)
            return
        record = state.store.rows(table).get(read.key)
        if record is None and read.wait:
            if not link.closed:
                self._waits.setdefault((table, read.key), []).append((link, read.request))
                link.peer.waits.add((table, read.key))
            return
        self._send_rows(link, read.request, [Change(state.revision, table, read.key, record)])

    def _send_rows(self, link: Link, request: int, rows: Sequence[Change], whole: Sequence[Table] = ()) -> None:
        payload = encode_changes(rows, whole)
        revision, limit = self.replica.state.revision, self.config.output_backlog_bytes_max
        if len(payload) > limit + 65536:  # a value of the largest size, and what is around it, fits
            text = f"the answer takes {len(payload)} bytes, more than the limit of {limit}: read single keys"
            link.send(GcsResult(request, revision, Code.TOO_LARGE.value, text))
            return
        link.send(GcsResult(request, revision), payload)


def _says_goodbye(payload: bytes | bytearray, node_id: bytes) -> bool:
    """Whether a raylet's command is that its own node is dead."""
    if node_id not in payload:
        return False
    try:
        command = decode_command(bytes(payload))
    except CommandError:
        return False
    return isinstance(command, MarkNodeDead) and command.node_id == node_id
