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
- Of several heads only the leader serves clients. The others name it; a head that knows none says so and keeps the
  link, and names the leader as soon as there is one. So a client is served where its writes are, and a raylet
  hangs on the head whose managers have something to tell it.
- Reads are fresh: the replica confirms that it still leads before they are answered, once for all reads of a turn.

Rejected: a sync for each command (6,000 a second at most, where a batch takes 50,000); answering reads as they come (a
client would not see its own write); watches and reads at followers (a client would see its own writes late, and the
table of who hangs where would be needed for nothing else).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

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
from ftray.wire.head_messages import GcsHeads, GcsNoLeader, GcsPing
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


class Heads(Protocol):
    """What the server asks about the heads, if there are several (`raft_host.py`)."""

    def endpoints(self) -> tuple[str, ...]:
        """Where all of them are."""
        ...

    def why_no_leader(self) -> str:
        """Who answers and who does not."""
        ...

    def failed(self, error: Exception) -> None:
        """The replica has stopped."""
        ...


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

    def __init__(self, reactor: Reactor, replica: Replica, config: Config, heads: Heads | None = None) -> None:
        self.reactor = reactor
        self.replica = replica
        self.config = config
        self.heads = heads
        self.watchers = WatchHub(reactor, config.output_backlog_bytes_max // 4)
        self.loads: dict[bytes, dict[str, float]] = {}
        """What each live node last said is free there."""
        self._links: dict[Link, None] = {}
        self._nodes: dict[bytes, Link] = {}
        self._reads: list[tuple[Link, GcsRead]] = []
        self._waits: dict[tuple[Table, bytes], list[tuple[Link, int]]] = {}
        self._leader: Leader | None = None
        self._turn_due = self._in_turn = False
        self._tick_timer: Timer | None = None
        self._tick_due_ms = 0.0
        self._closed = False
        self._confirmed: list[tuple[Link, GcsRead]] = []
        """Reads that may be answered at the end of this turn."""
        self._told_leader = ""
        """The leader that the clients here were told of; '' if none is known."""
        self._told_heads: tuple[str, ...] = ()
        self._end_feeds = (replica.on_change(self._on_changes), replica.on_reset(self._on_reset))
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
        for end in self._end_feeds:
            end()
        self._end_leader()
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
        if self.heads is not None and not self.replica.is_leader and not isinstance(message, GcsPing):
            return  # the client has been told that it is to ask elsewhere, and asks all of it there
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
            case GcsPing():
                link.send(message)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not a message to the GCS")

    def _hello(self, link: Link, message: Message) -> None:
        if not isinstance(message, GcsHello) or not message.client_id:
            raise ProtocolError("a link to the GCS must begin with GcsHello and a client id")
        link.peer = _Client(link, message.client_id, message.node_id)
        if self.heads is not None:
            if not self.replica.is_leader:
                self._send_away(link)
                return
            link.send(GcsHeads(self.heads.endpoints()))
        if message.node_id:
            former = self._nodes.get(message.node_id)
            self._nodes[message.node_id] = link
            if former is not None:
                former.close("the node has connected anew")
                self._forget(former)
            if self._leader is not None:
                self._leader.on_node_connected(message.node_id)

    def _send_away(self, link: Link) -> None:
        """This head does not lead: who does?"""
        assert self.heads is not None
        hint = self.replica.leader_hint
        if hint and hint != self._own_hint():
            text = "this head does not lead the cluster"
            link.send(GcsResult(0, self.replica.state.revision, Code.NOT_LEADER.value, text, hint))
        else:
            link.send(GcsNoLeader(self.heads.why_no_leader()))

    def _own_hint(self) -> str:
        """This head's endpoint, as the others know it."""
        return str(getattr(self.replica, "endpoint", ""))

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

    def wake(self) -> None:
        """For the links to other heads: something has arrived for the replica."""
        self._wake()

    def _wake(self) -> None:
        """Asks for a turn at the end of this batch of the reactor."""
        if not self._turn_due and not self._closed:
            self._turn_due = True
            self.reactor.call_later(0, self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self._closed:
            return
        self._in_turn = True
        try:
            self._take_turn()
        finally:
            self._in_turn = False

    def _take_turn(self) -> None:
        self._schedule_tick()
        self._lead_or_not()
        if self._reads:
            self._confirm_reads()
        self._flush()
        self._lead_or_not()
        for _ in range(FLUSHES_MAX):
            if self._leader is None or not self._leader.plan():
                break
            self._flush()
            self._lead_or_not()
        else:
            self._wake()
        reads, self._confirmed = self._confirmed, []
        for link, read in reads:
            self._answer_read(link, read)
        if self.heads is not None:
            self._tell_clients()
        self._schedule_tick()

    def _confirm_reads(self) -> None:
        reads, self._reads = self._reads, []
        try:
            self.replica.confirm(partial(self._reads_confirmed, reads))
        except ReplicaClosedError:
            self._reads_confirmed(reads, False)

    def _reads_confirmed(self, reads: list[tuple[Link, GcsRead]], fresh: bool) -> None:
        if fresh or self.heads is None:  # a single replica whose disk has failed can still be asked
            self._confirmed += reads
            if not self._in_turn:
                self._wake()
            return
        for link in dict.fromkeys(link for link, _ in reads):
            self._send_away(link)

    def _tell_clients(self) -> None:
        """When the leader is another one, or the heads are others, the clients here learn it."""
        heads, replica = self.heads, self.replica
        assert heads is not None
        leads = replica.is_leader
        leader = self._own_hint() if leads else replica.leader_hint
        if not leads and leader == self._own_hint():
            leader = ""
        if leader != self._told_leader:
            self._told_leader = leader
            for link in list(self._links):
                if link.peer is None:
                    continue
                if leads:  # those who have waited here come anew, with all they want
                    text = "this head leads the cluster now"
                    link.send(GcsResult(0, replica.state.revision, Code.NOT_LEADER.value, text, leader))
                else:
                    self._send_away(link)
        if leads and heads.endpoints() != self._told_heads:
            self._told_heads = heads.endpoints()
            for link in self._links:
                if link.peer is not None:
                    link.send(GcsHeads(self._told_heads))

    def _flush(self) -> None:
        try:
            self.replica.flush()
        except GcsError as error:
            if self.heads is not None:  # a full disk does not come to this
                self.heads.failed(error)
                return
            # Who asked has been answered. A full disk may have room again; a disk that failed has closed the replica.
            log.error("commands could not be made durable: %s", error)
        except Exception as error:  # our own fault: who has asked must not wait for ever, and asks again
            log.exception("the GCS replica failed")
            self.reactor.handler_errors.append(repr(error))
            if self.heads is not None:
                self.heads.failed(error)
            for link in list(self._links):
                link.close("the GCS failed")
                self._forget(link)

    def _lead_or_not(self) -> None:
        leads = self.replica.is_leader
        if leads and self._leader is None:
            is_connected = None if self.heads is None else self._nodes.__contains__
            self._leader = Leader(
                self.reactor, self.replica, self.config, self._send_to_node, self._wake, is_connected
            )
            for node_id in self._nodes:
                self._leader.on_node_connected(node_id)
        elif not leads:
            self._end_leader()
            if self.heads is not None:
                self._nodes.clear()  # they are sent to the next leader

    def _end_leader(self) -> None:
        leader, self._leader = self._leader, None
        if leader is not None:
            leader.end()

    def _tick(self) -> None:
        self._tick_timer = None
        if self._closed:
            return
        self.watchers.catch_up(self.replica.state)
        self._wake()

    def _schedule_tick(self) -> None:
        now_ms = self.reactor.now_ms()
        due_ms = now_ms + self.config.heartbeat_timeout_ms / 5.0
        due_ms = min(due_ms, self.replica.next_wake_ms())
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

    def _on_reset(self) -> None:
        """The state is another one, as a follower's may be: what was made from the former is of no use."""
        self._end_leader()

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
