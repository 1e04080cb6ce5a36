"""The GCS as its clients see it: commands, reads, watches and heartbeats over links.

Role: shell. One object on the reactor of a head node. It hands commands to the replica, has reads and watches served
from its state (`serving.py`), and runs the managers while its replica leads (`leader.py`).

Rules
- All that arrives in one batch of the reactor is one **turn**: commands are proposed as they come, and carried out with
  one sync; then the managers plan, until they have nothing more to commit; then reads are answered. So a reply never
  leaves before its command is durable, and a client that reads after it wrote finds what it wrote.
- Whatever a client sends wrong costs its own link.
- A node that was declared dead is told so (`NodeFenced`) on the link that it has, and when it is heard of again.
- Nothing waits for a slow client: watchers are bounded, an answer that is too large is refused.
- Of several heads the leader serves everything, and clients go to it: their writes are seen there at once, and a raylet
  hangs on the head whose managers have something to tell it. A follower says that it is one, names the leader (or says
  why there is none), and says so anew when that changes. It serves watches and cached reads, and drops all else.
- Reads are fresh unless they are marked as cached: the replica confirms that it still leads before they are answered,
  once for all reads of a turn.

Rejected: a sync for each command (6,000 a second at most, where a batch takes 50,000); answering fresh reads as they
come (a client would not see its own write); sending clients away from followers (without a leader nobody was served,
though any head knows enough); clients spread over all heads (each would see its own writes a hop later).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from ftray.config import Config
from ftray.exceptions import ProtocolError
from ftray.gcs.codec import encode_result
from ftray.gcs.leader import Leader
from ftray.gcs.replica import Replica, ReplicaClosedError, Request
from ftray.gcs.serving import Client, Serving
from ftray.gcs.state.commands import MarkNodeDead, decode_command
from ftray.gcs.state.errors import CommandError, GcsError
from ftray.gcs.state.sessions import CLIENT_ID_BYTES_MAX
from ftray.gcs.state.tables import Change, Code, NodeRecord, NodeState, Result
from ftray.gcs.watchers import CATCH_UP_MS
from ftray.wire.group_messages import BundlesHeld
from ftray.wire.handshake import ROLE_GCS
from ftray.wire.head_messages import GcsFollower, GcsHeads, GcsPing
from ftray.wire.messages import (
    GcsCommand,
    GcsHeartbeat,
    GcsHello,
    GcsRead,
    GcsUnwatch,
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

    def beat(self) -> bool:
        """Lets the other heads hear this one, if it leads and has nothing else to do. False: a turn is due instead."""
        ...

    def failed(self, error: Exception) -> None:
        """The replica has stopped."""
        ...


class GcsServer:
    """See the module. Everything runs under `reactor.lock`."""

    def __init__(self, reactor: Reactor, replica: Replica, config: Config, heads: Heads | None = None) -> None:
        self.reactor = reactor
        self.replica = replica
        self.config = config
        self.heads = heads
        limit = lambda: self.config.output_backlog_bytes_max  # noqa: E731  (the cluster's settings may come later)
        self.serving = Serving(reactor, replica, limit, heads is not None, self._when_sure)
        self.watchers = self.serving.watchers
        self.loads: dict[bytes, dict[str, float]] = {}
        """What each live node last said is free there."""
        self._links: dict[Link, None] = {}
        self._nodes: dict[bytes, Link] = {}
        self._reads: list[tuple[Link, GcsRead | None]] = []
        """To be confirmed; None: what the link's watcher is not to be told before this head is sure."""
        self._leader: Leader | None = None
        self._turn_due = self._in_turn = False
        self._tick_timer: Timer | None = None
        self._tick_due_ms = 0.0
        self._closed = False
        self._confirmed: list[tuple[Link, GcsRead | None]] = []
        """Reads that may be answered at the end of this turn."""
        self._told_leader: str | None = ""
        """The leader that the clients here were told of, or why there is none; None if all are to be told anew."""
        self._told_heads: tuple[str, ...] = ()
        self._end_feeds = (replica.on_change(self._on_changes), replica.on_reset(self._on_reset))
        self._wake()

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
            self.serving.forget(link, link.peer)
        self._links.clear()
        self._nodes.clear()

    def status(self) -> dict[str, Any]:
        """For tools: who leads, how many clients there are, what each pending actor waits for, how many questions wait
        for this head to get as far as who asks, and how often it has told or answered somebody without leading."""
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
            "pending_placement_groups": {} if leader is None else {
                group_id.hex(): reason
                for group_id in state.store.placement_groups
                if (reason := leader.groups.pending_reason(group_id))
            },
            **self.serving.status(),
        }

    # --- messages -----------------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        client = link.peer
        if client is None:
            self._hello(link, message)
            return
        match message:
            case GcsWatch():
                self.serving.watch(link, client, message)
            case GcsUnwatch():
                self.serving.unwatch(link, client, message)
            case GcsRead() if message.cached and message.named is None and self.heads is not None:
                self.serving.read_cached(link, client, message)
            case GcsCommand() | GcsRead() | GcsHeartbeat() | BundlesHeld() if not self._serves_everything:
                pass  # the client has been told that it is to ask elsewhere, and asks all of it there
            case GcsCommand():
                self._command(link, client, message, payload)
            case GcsRead():
                self._when_sure(link, message)
            case GcsHeartbeat():
                self._heartbeat(link, client, message)
            case GcsPing():
                link.send(message)
            case BundlesHeld():
                self._lead_or_not()  # the managers may not have been made yet
                if self._leader is not None and client.node_id:
                    self._leader.on_bundles_held(client.node_id, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not a message to the GCS")

    def _hello(self, link: Link, message: Message) -> None:
        if not isinstance(message, GcsHello) or not message.client_id:
            raise ProtocolError("a link to the GCS must begin with GcsHello and a client id")
        if len(message.client_id) > CLIENT_ID_BYTES_MAX:
            raise ProtocolError(f"a client id of {len(message.client_id)} bytes, more than {CLIENT_ID_BYTES_MAX}")
        link.peer = Client(link, message.client_id, message.node_id)
        if self.heads is not None:
            link.send(self._role())
            if not self.replica.is_leader:
                return
        if message.node_id:
            former = self._nodes.get(message.node_id)
            self._nodes[message.node_id] = link
            if former is not None:
                former.close("the node has connected anew")
                self._forget(former)
            if self._leader is not None:
                self._leader.on_node_connected(message.node_id)

    @property
    def _serves_everything(self) -> bool:
        return self.heads is None or self.replica.is_leader

    def _role(self) -> GcsHeads | GcsFollower:
        """For clients: whether this head leads; if not, who does."""
        heads, state = self.heads, self.replica.state
        assert heads is not None
        if self.replica.is_leader:
            return GcsHeads(heads.endpoints())
        leader = self._known_leader()
        reason = "this head does not lead the cluster" if leader else heads.why_no_leader()
        return GcsFollower(leader, reason, state.revision if self.serving.is_as_far(0) else -1, heads.endpoints())

    def _known_leader(self) -> str:
        """The head that leads; '' if none is known."""
        own, hint = self._own_hint(), self.replica.leader_hint
        if self.replica.is_leader:
            return own
        return "" if hint == own else hint

    def _own_hint(self) -> str:
        """This head's endpoint, as the others know it."""
        return str(getattr(self.replica, "endpoint", ""))

    def _command(self, link: Link, client: Client, message: GcsCommand, payload: bytes | bytearray) -> None:
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

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _heartbeat(self, link: Link, client: Client, message: GcsHeartbeat) -> None:
        if message.node_id != client.node_id:
            raise ProtocolError("a heartbeat for another node than the one that this link is of")
        leader = self._leader
        if leader is None or leader.on_heartbeat(client.node_id, message.available):
            if self.loads.get(client.node_id) != message.available:
                self.loads[client.node_id] = message.available
                self._wake()  # what waits for room may be planned
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
        self.serving.forget(link, client)
        if client is None:
            return
        if client.node_id and self._nodes.get(client.node_id) is link:
            del self._nodes[client.node_id]
            if self._leader is not None and not self._closed:
                self._leader.on_node_closed(client.node_id)

    # --- turns --------------------------------------------------------------------------------------------------------

    def _when_sure(self, link: Link, read: GcsRead | None) -> None:
        self._reads.append((link, read))
        self._wake()

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
            self._schedule_tick()  # not before: what has arrived is due at once, and is done when the turn ends

    def _take_turn(self) -> None:
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
        self.serving.take_held()
        reads, self._confirmed = self._confirmed, []
        for link, read in reads:
            if read is not None:
                self.serving.answer(link, read)
            elif not link.closed:
                self.watchers.tell_absent(self.replica.state, link.peer.watcher)
        if self.heads is not None:
            self._tell_clients()

    def _confirm_reads(self) -> None:
        reads, self._reads = self._reads, []
        try:
            self.replica.confirm(partial(self._reads_confirmed, reads))
        except ReplicaClosedError:
            self._reads_confirmed(reads, False)

    def _reads_confirmed(self, reads: list[tuple[Link, GcsRead | None]], fresh: bool) -> None:
        if fresh or self.heads is None:  # a single replica whose disk has failed can still be asked
            self._confirmed += reads
            if not self._in_turn:
                self._wake()
            return
        role = self._role()
        for link in dict.fromkeys(link for link, _ in reads):
            link.send(role)
        for link, read in reads:
            if read is not None and read.cached and not link.closed:  # what it waits for may come here, too
                self.serving.read_cached(link, link.peer, read)
        self._told_leader = None  # should it lead after all, they hear of that, and ask again

    def _tell_clients(self) -> None:
        """When the leader is another one, the heads are others, or there is another reason for having no leader, the
        clients here learn it."""
        heads, leads, leader = self.heads, self.replica.is_leader, self._known_leader()
        assert heads is not None
        known = leader or heads.why_no_leader()  # clients stay, so they are told when that changes, too
        changed = known != self._told_leader
        if not changed and not (leads and heads.endpoints() != self._told_heads):
            return
        self._told_leader, self._told_heads = known, heads.endpoints()
        if changed and leads:
            self.serving.forget_waits()  # the clients ask anew: what this head did not know it can say now
        role = self._role()
        for link in self._links:
            if link.peer is not None:
                link.send(role)
                if leads and link.peer.watcher.unsure:
                    self._when_sure(link, None)

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
        self.watchers.follows = not leads
        if leads and self._leader is None:
            if self.heads is not None:  # raylets that hang on this head already
                self._nodes |= {link.peer.node_id: link for link in self._links if link.peer and link.peer.node_id}
            is_connected = None if self.heads is None else self._nodes.__contains__
            self._leader = Leader(
                self.reactor, self.replica, self.config, self._send_to_node, self._wake, is_connected
            )
            for node_id in self._nodes:
                self._leader.on_node_connected(node_id)
            if self.heads is not None:
                self._tell_clients()  # before the managers ask anything: what comes from a follower, a raylet drops
        elif not leads:
            self._end_leader()
            if self.heads is not None:
                self._nodes.clear()  # they go to the next leader
                self.loads.clear()

    def _end_leader(self) -> None:
        leader, self._leader = self._leader, None
        if leader is not None:
            leader.end()

    def _tick(self) -> None:
        self._tick_timer = None
        if self._closed:
            return
        if self.serving.is_as_far(0):
            self.watchers.catch_up(self.replica.state)
        if self._turn_due:
            return
        if self._leader is not None and self._is_idle(self._leader) and self.heads is not None and self.heads.beat():
            self._schedule_tick()
        else:
            self._turn()  # timers come last in a batch, so this is its end

    def _is_idle(self, leader: Leader) -> bool:
        """Whether nothing is to be done here that takes a turn."""
        return not self._reads and not self.watchers.any_behind and self.reactor.now_ms() < leader.next_wake_ms()

    def _schedule_tick(self) -> None:
        if self._closed:
            return
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
        self.serving.publish(changes)
        if self._leader is not None:
            self._leader.on_changes(changes)
        for change in changes:
            if isinstance(change.record, NodeRecord) and change.record.state is NodeState.DEAD:
                self.loads.pop(change.key, None)
                link_of_node = self._nodes.pop(change.key, None)
                if link_of_node is not None and not link_of_node.peer.leaves:
                    self._fence(link_of_node, change.record)

    def _on_reset(self) -> None:
        """The state is another one, as a follower's may be: what was made from the former is of no use."""
        self._end_leader()
        self.serving.reset()

def _says_goodbye(payload: bytes | bytearray, node_id: bytes) -> bool:
    """Whether a raylet's command is that its own node is dead."""
    if node_id not in payload:
        return False
    try:
        command = decode_command(bytes(payload))
    except CommandError:
        return False
    return isinstance(command, MarkNodeDead) and command.node_id == node_id
