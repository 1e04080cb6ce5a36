"""One head's replica of the GCS state, which agrees with the others through Raft.

Role: shell without I/O of its own: links, clock and randomness are handed in, the journal is the only file, and there
is no thread. It stands behind the interface of `ftray.gcs.replica.Replica`.

How it is driven
- `link_opened`, `link_message`, `link_closed` and `propose` only queue. `flush` does the work: everything that has
  arrived, then Raft's tick, then **one sync of the journal, and only then** what was said to peers and clients leaves.
  So nothing that is told anybody can be lost by a crash.
- `flush` must be called after each batch of events, and by `next_wake_ms` at the latest.

Rules
- Whatever makes the state here untrustworthy stops the replica for good: `flush` raises, and `stopped` says why.
- A full disk only makes it silent: it takes no part until what it has to write is written.
- A result is given once. `not_leader` says that the outcome is not known: the client repeats its command with the same
  sequence number at the leader, where it takes effect once.

Rejected: applying what is committed only after the sync (the entry was durable on a majority before, and with one head
the sync comes before the tick).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from ftray.gcs.raft import membership
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.elections import NEVER_MS, Elections
from ftray.gcs.raft.errors import MembershipMismatchError, NewerCommandError, ReplicaRemovedError
from ftray.gcs.raft.library import Engine
from ftray.gcs.raft.log import MEMBERSHIP, REGULAR, JournalLike, RaftLog, decode_snapshot_body, encode_snapshot_body
from ftray.gcs.raft.peers import Link, Peers
from ftray.gcs.raft.snapshots import Receiver, Sender, part_of
from ftray.gcs.replica import COMPACT_BYTES, ChangeCallback, ReplicaClosedError, ReplyCallback, Request
from ftray.gcs.state.commands import AnyCommand, decode_command
from ftray.gcs.state.errors import (
    CommandError,
    JournalCorruptError,
    JournalVersionError,
    JournalWriteError,
    SnapshotError,
    SnapshotVersionError,
)
from ftray.gcs.state.state import VALUE_BYTES_MAX, GcsState, admit
from ftray.gcs.state.tables import Code, Result

log = logging.getLogger("ftray.gcs")

STALL_RETRY_MS = 50.0
HAND_OVER_RETRY_MS = 10.0
_REGULAR = bytes([REGULAR])
_MEMBERSHIP = bytes([MEMBERSHIP])

T = TypeVar("T")
Confirmed = Callable[[bool], None]


class Timing(NamedTuple):
    """Times of Raft, in milliseconds."""

    election_min_ms: float = 200.0
    election_max_ms: float = 400.0
    append_ms: float = 30.0
    """How often a leader that has nothing to say is heard."""
    fallback_ms: float = 400.0
    """A leader that hears no majority for so long steps down."""


class PeerTransport(Protocol):
    """Links to other heads: ordered, and without loss while they are open. A link is any hashable of the shell's."""

    def send(self, link: Link, data: bytes) -> None:
        """Sends a message. One to a link that has closed is dropped."""
        ...

    def close(self, link: Link, reason: str) -> None:
        """Closes the link when all that was sent has left. `link_closed` need not follow."""
        ...


class _Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a regular entry holds, as in the journal of a single replica."""

    client_id: bytes
    sequence: int
    command: bytes


class _Opened(NamedTuple):
    dialled: bool


class _Closed(NamedTuple):
    reason: str


_encode_entry = msgspec.msgpack.Encoder().encode
_decode_entry = msgspec.msgpack.Decoder(_Entry).decode


class RaftReplica:
    """See the module. Not thread-safe."""

    def __init__(
        self,
        journal: JournalLike,
        *,
        endpoint: str,
        heads: Iterable[str],
        transport: PeerTransport,
        now_ms: Callable[[], float],
        rng: random.Random,
        join: bool = False,
        timing: Timing = Timing(),  # noqa: B008
        value_bytes_max: int = VALUE_BYTES_MAX,
        compact_bytes: int = COMPACT_BYTES,
    ) -> None:
        """Opens the replica on an opened journal, with every write that was acknowledged there.

        `endpoint` is where peers reach this head; `heads` the endpoints of all heads, with this one. It may be empty
        for a head that has been a member before. With `join`, `heads` are some of a cluster that this head is to be
        added to.

        Raises MembershipMismatchError, and the errors of `Journal.replay`; the journal is then the caller's to close.
        """
        self.endpoint = endpoint
        self.value_bytes_max = value_bytes_max
        self.stopped: BaseException | None = None
        """Why the replica has stopped by itself."""
        self._journal: JournalLike | None = journal
        self._transport = transport
        self._now_ms = now_ms
        self._rng = rng
        self._timing = timing
        self._compact_bytes = compact_bytes
        self._log = RaftLog(journal)
        self.state = GcsState(journal.cluster_id)
        snapshot = self._log.replay()
        if snapshot is not None:
            self.state = self._restore(snapshot)
        self._compact_at_bytes = max(compact_bytes, 2 * len(snapshot or b""))
        heads = tuple(heads) or tuple(member.endpoint for member in self._log.first_members)
        self._check_heads(heads, join)
        self._peers = Peers(
            self, self._log, journal.cluster_id, endpoint, heads, rng.getrandbits(62), join and not self._log.active
        )
        self._engine: Engine | None = None
        self._elections: Elections | None = None
        self._table: membership.Table = ()
        self._sender = Sender(self._make_snapshot, self._send_part)
        self._receiver = Receiver()

        self._inbound: list[tuple[Link, m.PeerMessage | _Opened | _Closed]] = []
        self._outbox: list[tuple[Link, bytes | None, str]] = []
        """What leaves after the next sync; None closes the link."""
        self._queue: list[tuple[Request, ReplyCallback]] = []
        self._table_requests: list[tuple[Callable[[membership.Table], membership.Table | str], ReplyCallback]] = []
        self._waiting: dict[int, tuple[int, ReplyCallback]] = {}
        """By entry, its term and who waits for it."""
        self._results: list[tuple[ReplyCallback, Result]] = []
        self._confirms: list[Confirmed] = []
        """Fresh reads that came since the last turn."""
        self._confirming: list[tuple[int, Confirmed]] = []
        """Fresh reads, with the round that confirms them."""
        self._round = 0
        self._round_seen = 0
        """As a follower: the round of the leader's message that is being answered."""
        self._rounds: dict[bytes, int] = {}
        """At the leader: the latest round that each peer has answered in this term."""
        self._led_term = -1
        self._callbacks: list[ChangeCallback] = []
        self._reset_callbacks: list[Callable[[], None]] = []
        self._busy = False
        self._stalled_ms: float | None = None
        """Since when the disk takes nothing."""
        self._resigning = False
        self._hand_over_ms = -NEVER_MS
        if self._log.active:
            self.on_active()
        self._peers.start()

    def _check_heads(self, heads: Sequence[str], join: bool) -> None:
        members = self._log.members
        if not members:
            if not heads or (not join and self.endpoint not in heads):
                raise MembershipMismatchError(
                    f"this head, {self.endpoint}, is not in the list of heads ({', '.join(heads) or 'empty'}) that it "
                    "was started with: give all heads the same list, with each of them"
                )
            return
        known = sorted(member.endpoint for member in members)
        if not join and sorted(set(heads)) != known:
            raise MembershipMismatchError(
                f"this head was started with the heads {', '.join(sorted(set(heads)))}, but the cluster, as its disk "
                f"knows it, has {', '.join(known)}. Start it without a list to go on with what the disk says; to "
                "change the cluster use ftray heads add, remove or replace"
            )
        mine = membership.find(members, self.replica_id)
        if mine is not None and mine.endpoint != self.endpoint:
            raise MembershipMismatchError(
                f"this head's disk belongs to {mine.endpoint}, and it was started as {self.endpoint}: start it under "
                "its own address, or empty its directory and replace it (ftray heads replace)"
            )

    # --- the replica's interface --------------------------------------------------------------------------------------

    @property
    def replica_id(self) -> bytes:
        """Made with the disk, 16 bytes."""
        return self._log.journal.replica_id

    @property
    def is_leader(self) -> bool:
        """Whether commands are taken here. False while the disk is full, or the replica is about to hand over."""
        engine = self._engine
        return (
            engine is not None and engine.leads and engine.own_term_applied and not self._resigning
            and self._journal is not None and self._stalled_ms is None
        )  # fmt: skip

    @property
    def leader_hint(self) -> str:
        leader = self._engine.leader if self._engine is not None else None
        member = membership.find(self._log.members, leader) if leader is not None else None
        return "" if member is None else member.endpoint

    def propose(self, request: Request, reply: ReplyCallback) -> None:
        """Queues a command; `reply` gets its result from a `flush`. Raises ReplicaClosedError."""
        self._require_open()
        self._queue.append((request, reply))

    def confirm(self, confirmed: Confirmed) -> None:
        """For a fresh read: calls back from a `flush` with True once `state` has everything that was acknowledged
        anywhere before this call, or with False if this replica does not lead. Raises ReplicaClosedError."""
        self._require_open()
        self._confirms.append(confirmed)

    def on_change(self, callback: ChangeCallback) -> Callable[[], None]:
        """Calls back with each batch of changes, from now on. Returns a function that ends it."""
        return _register(self._callbacks, callback)

    def on_reset(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back when `state` was replaced by a snapshot: there are no changes that lead to it. Returns a function
        that ends it."""
        return _register(self._reset_callbacks, callback)

    def close(self) -> None:
        """Stops the replica. What has been asked and not answered is answered `not_leader`. May be repeated."""
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()
            self._outbox.clear()
            self._inbound.clear()
            self._results.clear()
            self._fail_all("this head is stopping")

    # --- members ------------------------------------------------------------------------------------------------------

    @property
    def members(self) -> membership.Table:
        """The table of members in force here."""
        return self._log.members

    @property
    def guests(self) -> list[tuple[bytes, str]]:
        """Heads with a link to this one that wait to be added: id and endpoint."""
        return self._peers.guests()

    def wanted(self) -> list[str]:
        """Endpoints of heads to which there should be a link, and is none. The shell dials them, and again."""
        return self._peers.wanted() if self._journal is not None else []

    def add_head(self, replica_id: bytes, endpoint: str, reply: ReplyCallback, replaces: bytes = b"") -> None:
        """Adds a head, in place of `replaces` if that is given: it votes once it has caught up, and then the other one
        goes. `reply` gets the result when the first step is committed."""
        self._require_open()
        self._table_requests.append((lambda table: membership.add(table, replica_id, endpoint, replaces), reply))

    def remove_head(self, replica_id: bytes, reply: ReplyCallback) -> None:
        """Removes a head. The leader itself hands over first, and answers `not_leader`: repeat it at the next one."""
        self._require_open()

        def change(table: membership.Table) -> membership.Table | str:
            return membership.remove(table, replica_id)

        if replica_id == self.replica_id:
            self._resigning = True
            self._answer(reply, Code.NOT_LEADER, "this head hands over, so that another one removes it: ask again")
        else:
            self._table_requests.append((change, reply))

    def resign(self) -> None:
        """Begins a clean stop: takes no more commands, and hands over. Close when `resigned`, or after a while."""
        self._resigning = True

    @property
    def resigned(self) -> bool:
        """Whether there is nothing left to hand over."""
        engine = self._engine
        return engine is None or not engine.leads or not self._peers.connected

    def status(self) -> dict[str, Any]:
        """For tools."""
        engine = self._engine
        return {
            "replica": self.replica_id.hex(),
            "endpoint": self.endpoint,
            "role": "forming" if engine is None else "leader" if engine.leads else "follower",
            "voter": self._elections is not None and self._elections.votes,
            "term": self._log.term,
            "leader": self.leader_hint,
            "last_index": 0 if engine is None else engine.last_index,
            "commit_index": 0 if engine is None else engine.commit_index,
            "applied_index": 0 if engine is None else engine.last_applied,
            "members": [
                {"replica": each.replica_id.hex(), "endpoint": each.endpoint, "voter": each.voter}
                for each in self._log.members
            ],
            "connected": [peer.hex() for peer in self._peers.connected],
            "refusals": dict(self._peers.refusals),
            "disk_full": self._stalled_ms is not None,
            "stopped": "" if self.stopped is None else str(self.stopped),
        }

    # --- links --------------------------------------------------------------------------------------------------------

    def link_opened(self, link: Link, dialled: bool) -> None:
        """A link to another head is open; `dialled`: this side has made it."""
        self._inbound.append((link, _Opened(dialled)))

    def link_message(self, link: Link, data: bytes | bytearray | memoryview) -> None:
        """A message has come. What can't be decoded closes the link."""
        try:
            self._inbound.append((link, m.decode(data)))
        except msgspec.DecodeError as error:
            self._transport.close(link, f"a message that is none: {error}")
            self.link_closed(link, "it sent a message that is none")

    def link_closed(self, link: Link, reason: str) -> None:
        """The link is closed."""
        self._inbound.append((link, _Closed(reason)))

    # --- turns --------------------------------------------------------------------------------------------------------

    def next_wake_ms(self) -> float:
        """When `flush` is to be called at the latest, on the clock that was given; infinity if nothing is due."""
        if self._journal is None:
            return NEVER_MS
        if self._stalled_ms is not None:
            return self._now_ms() + STALL_RETRY_MS
        if self._inbound or self._queue or self._confirms or self._table_requests:
            return self._now_ms()
        if self._engine is None or self._elections is None:
            return NEVER_MS
        wake_ms = min(self._engine.next_wake_ms(), self._elections.next_wake_ms())
        if self._resigning and not self.resigned:
            wake_ms = min(wake_ms, max(self._hand_over_ms + HAND_OVER_RETRY_MS, self._now_ms() + 1.0))
        return wake_ms

    def flush(self) -> None:
        """Does what is due. See the module.

        Raises what stops the replica (JournalFailedError, DivergedError, ReplicaRemovedError, ...): it is closed then.
        """
        if self._busy:
            raise RuntimeError("flush inside a callback of the replica: propose is enough, its turn comes")
        again = True
        while again and self._journal is not None:
            try:
                again = self._turn()
            except BaseException as error:
                self.stopped = error
                self._outbox.clear()  # nothing of this turn is durable, perhaps
                self._results.clear()
                journal, self._journal = self._journal, None
                if journal is not None:
                    journal.close()
                self._fail_all(f"this head has stopped: {error}")
                raise

    def _turn(self) -> bool:
        """Returns whether there is more to do at once."""
        now_ms = self._now_ms()
        if self._stalled_ms is not None and not self._write(now_ms):
            self._refuse_while_stalled(now_ms)
            return False
        inbound, self._inbound = self._inbound, []
        for link, event in inbound:
            self._deliver(link, event, now_ms)
            self._follow_table()
        engine, elections = self._engine, self._elections
        if engine is not None and elections is not None:
            self._take_confirms(engine)
            self._take_requests(engine)
            if not self._others():
                if not self._write(now_ms):  # alone, an entry counts as soon as it is in the log
                    return False
            elections.plan(now_ms)
            engine.tick()
            self._follow_leadership(engine, now_ms)
        else:
            self._fail_all("this head has no part in the cluster yet")
        self._give_confirmations()
        if self._write(now_ms):
            self._release()
            self._try_compact()
        return bool(self._queue or self._confirms or self._table_requests)

    def _write(self, now_ms: float) -> bool:
        """Makes everything durable. False if the disk is full: nothing may leave then."""
        try:
            self._log.sync()
        except JournalWriteError as error:
            if self._stalled_ms is None:
                self._stalled_ms = now_ms
                log.error("%s; this head is silent until it can write", error)
            return False
        if self._stalled_ms is not None:
            self._stalled_ms = None
            log.warning("the disk takes what this head writes again")
        return True

    def _refuse_while_stalled(self, now_ms: float) -> None:
        self._inbound = [
            each for each in self._inbound if isinstance(each[1], (_Opened, _Closed, m.Hello, m.Refused))
        ]  # Raft's messages may get lost
        queue, self._queue = self._queue, []
        requests, self._table_requests = self._table_requests, []
        confirms, self._confirms = self._confirms, []
        for _, reply in [*queue, *requests]:
            self._answer(reply, Code.UNAVAILABLE, "the command was not carried out: the disk of this head is full")
        for confirmed in confirms:
            self._call(confirmed, False)
        if self._stalled_ms is not None and now_ms - self._stalled_ms > self._timing.fallback_ms:
            self._fail_waiting("the disk of this head is full")

    def _release(self) -> None:
        """What has become durable is told."""
        outbox, self._outbox = self._outbox, []
        for link, data, reason in outbox:
            if data is None:
                self._transport.close(link, reason)
            else:
                self._transport.send(link, data)
        changes = self.state.take_changes()
        if changes:
            for callback in tuple(self._callbacks):
                self._call(callback, changes)
        results, self._results = self._results, []
        for reply, result in results:
            self._call(reply, result)

    # --- what peers say -----------------------------------------------------------------------------------------------

    def _deliver(self, link: Link, event: m.PeerMessage | _Opened | _Closed, now_ms: float) -> None:
        match event:
            case _Opened(dialled):
                self._peers.opened(link, dialled)
                return
            case _Closed():
                self._peers.closed(link)
                return
            case m.Hello():
                self._peers.on_hello(link, event)
                return
            case m.Refused():
                self._peers.on_refused(link, event)
                return
            case _:
                pass
        sender = self._peers.sender(link)
        engine, elections = self._engine, self._elections
        if sender is None or engine is None or elections is None:
            return
        peer = sender.replica_id
        match event:
            case m.Append() | m.Ping() | m.SnapshotPart():
                self._follow(engine, elections, peer, event, now_ms)
            case m.Ack() | m.SnapshotAck():
                self._on_ack(engine, peer, event, now_ms)
            case m.VoteRequest():
                if elections.votes:
                    engine.receive(peer, {
                        "type": "request_vote", "term": event.term, "last_log_index": event.last_index,
                        "last_log_term": event.last_term,
                    })  # fmt: skip
            case m.Vote():
                if event.term == engine.term and elections.first_vote(peer):
                    engine.receive(peer, {"type": "response_vote", "term": event.term})
            case m.PreVoteRequest():
                if elections.votes:
                    elections.on_request(peer, event, now_ms)
            case m.PreVote():
                elections.on_answer(peer, event, now_ms)
            case m.TimeoutNow():
                if elections.votes:
                    engine.receive(peer, {"type": "timeout_now", "term": event.term})

    def _follow(
        self, engine: Engine, elections: Elections, peer: bytes, event: m.Append | m.Ping | m.SnapshotPart, now_ms: float
    ) -> None:
        """The leader of some term speaks."""
        if event.term < engine.term:
            # It would not learn otherwise that its term is over, and this replica could never follow it.
            self._send(peer, m.Ack(engine.term, 0, 0, False, False))
            return
        self._round_seen = event.round
        if isinstance(event, m.Append):
            verified = event.previous_index + len(event.entries)
            engine.receive(peer, {
                "type": "append_entries", "term": event.term, "commit_index": min(event.commit, verified),
                "entries": event.entries, "prevLogIdx": event.previous_index, "prevLogTerm": event.previous_term,
            })  # fmt: skip
            elections.heard_leader(now_ms)
            return
        # Nothing is known of the log here, so nothing may be taken for committed.
        engine.receive(peer, {"type": "append_entries", "term": event.term, "commit_index": 0, "serialized": None})
        elections.heard_leader(now_ms)
        if isinstance(event, m.Ping):
            self._send(peer, m.Ack(engine.term, event.round, 0, False, False))
        elif self._log.has(event.index, event.index_term):
            self._send(peer, m.Ack(engine.term, event.round, event.index + 1, True, True))
        else:
            taken = self._receiver.take(event)
            if isinstance(taken, bytes):
                self._install(engine, taken, event)
                self._send(peer, m.Ack(engine.term, event.round, event.index + 1, True, True))
            else:
                self._send(peer, m.SnapshotAck(engine.term, event.round, event.index, taken))

    def _on_ack(self, engine: Engine, peer: bytes, ack: m.Ack | m.SnapshotAck, now_ms: float) -> None:
        if ack.term > engine.term:
            engine.observe(ack.term)
        if ack.term != engine.term or not engine.leads or membership.find(self._table, peer) is None:
            return
        self._rounds[peer] = max(ack.round, self._rounds.get(peer, 0))
        engine.heard_from(peer)
        if isinstance(ack, m.SnapshotAck):
            self._sender.on_ack(peer, ack, now_ms)
            return
        if ack.success:
            self._sender.drop(peer)
        if ack.success or ack.reset:
            engine.receive(peer, {
                "type": "next_node_idx", "reset": ack.reset, "success": ack.success,
                "next_node_idx": max(1, min(ack.next_index, engine.last_index + 1)),
            })  # fmt: skip

    # --- what the library says ----------------------------------------------------------------------------------------

    def on_send(self, peer: bytes, message: dict[str, Any]) -> bool:
        """For the engine: a message with this replica's term on it."""
        engine = self._engine
        assert engine is not None
        term = engine.term
        match message["type"]:
            case "append_entries" if "prevLogIdx" in message:
                return self._send(peer, m.Append(
                    term, self._round, message["commit_index"], message["prevLogIdx"], message["prevLogTerm"],
                    tuple(message["entries"]),
                ))  # fmt: skip
            case "append_entries":
                self._sender.needed(peer, self._now_ms(), self._log[0][1])
                return self._send(peer, m.Ping(term, self._round))
            case "next_node_idx":
                next_index = message["next_node_idx"]
                if message["reset"] and self._log[0][1] <= next_index <= engine.last_index:
                    next_index = self._log.first_of_term(next_index)  # not one entry with each message
                return self._send(
                    peer, m.Ack(term, self._round_seen, next_index, message["reset"], message["success"])
                )
            case "request_vote":
                return self._send(peer, m.VoteRequest(term, message["last_log_index"], message["last_log_term"]))
            case "response_vote":
                return self._send(peer, m.Vote(message["term"]))
            case "timeout_now":
                return self._send(peer, m.TimeoutNow(term))
        return False  # its own forwarding of commands is not used

    def on_apply(self, index: int, term: int, command: bytes) -> None:
        """For the engine: an entry is committed. Raises what must stop the replica."""
        waiting_term, reply = self._waiting.pop(index, (term, None))
        result = Result(Code.OK, "", self.state.revision)
        if command[:1] == _REGULAR:
            try:
                entry = _decode_entry(memoryview(command)[1:])
                result = self.state.apply(entry.client_id, entry.sequence, decode_command(entry.command))
            except (CommandError, msgspec.DecodeError) as error:
                raise NewerCommandError(
                    f"entry {index} can't be read ({error}): it was written by a head with a newer ftray. Start this "
                    "head with the same version"
                ) from error
        elif command[:1] == _MEMBERSHIP:
            self._on_table_committed(membership.decode_table(memoryview(command)[1:]))
        if reply is not None:
            if waiting_term == term:
                self._results.append((reply, result))
            else:
                self._answer(reply, Code.NOT_LEADER, "another head leads now: the outcome is not known here")

    def _on_table_committed(self, members: membership.Table) -> None:
        log.info("the heads are now: %s", membership.show(members))
        ours = self._log.members_at(self._log.commit)[0]
        if membership.find(members, self.replica_id) is None and membership.find(ours, self.replica_id) is None:
            raise ReplicaRemovedError(
                f"this head (replica {self.replica_id.hex()}) was removed from the cluster; the heads are "
                f"{membership.show(members)}. To add it again, empty its directory and let it join (ftray heads add)"
            )

    # --- what clients ask ---------------------------------------------------------------------------------------------

    def _take_requests(self, engine: Engine) -> None:
        queue, self._queue = self._queue, []
        leads = self.is_leader
        for request, reply in queue:
            if not leads:
                self._answer(reply, Code.NOT_LEADER, "this head does not lead the cluster")
                continue
            checked = self._check(request)
            if isinstance(checked, Result):
                self._results.append((reply, checked))
                continue
            payload = _encode_entry(_Entry(request.client_id, request.sequence, request.command))
            index, term = engine.append(_REGULAR + payload)
            self._waiting[index] = (term, reply)
        requests, self._table_requests = self._table_requests, []
        for change, reply in requests:
            if not leads:
                self._answer(reply, Code.NOT_LEADER, "this head does not lead the cluster")
            elif self._log.members_index > engine.commit_index:
                self._answer(reply, Code.UNAVAILABLE, "another change of the heads is under way: ask again")
            else:
                changed = change(self._log.members)
                if isinstance(changed, str):
                    self._answer(reply, Code.INVALID, changed)
                else:
                    self._waiting[self._append_table(engine, changed)] = (engine.term, reply)

    def _append_table(self, engine: Engine, members: membership.Table) -> int:
        index, _ = engine.append(_MEMBERSHIP + membership.encode_table(members))
        self._follow_table()
        return index

    def _check(self, request: Request) -> AnyCommand | Result:
        """The command, or the answer to one that is not to be written."""
        state = self.state
        known = state.recall(request.client_id, request.sequence)
        if known is not None:
            return known
        try:
            command = decode_command(request.command)
        except CommandError as error:
            return Result(Code.INVALID, str(error), state.revision)
        refused = admit(command, self.value_bytes_max)
        return command if refused is None else Result(Code.TOO_LARGE, refused, state.revision)

    def _take_confirms(self, engine: Engine) -> None:
        if self._confirms and engine.leads:
            self._round += 1
            engine.hurry()
            self._confirming += [(self._round, each) for each in self._confirms]
            self._confirms = []

    def _give_confirmations(self) -> None:
        """Fresh reads whose round a majority has answered; all, with False, if this replica does not lead."""
        engine = self._engine
        lost = [] if engine is not None and engine.leads else [*self._confirms, *(each for _, each in self._confirming)]
        if lost:
            self._confirms, self._confirming = [], []
            for confirmed in lost:
                self._results.append((lambda _, confirmed=confirmed: confirmed(False), _UNUSED))
        elif self._confirming and engine is not None and engine.own_term_applied:
            others = self._others()
            seen = sorted((self._rounds.get(peer, 0) for peer in others), reverse=True)
            needed = (len(others) + 1) // 2  # with this one, a majority
            reached = self._round if needed == 0 else seen[needed - 1]
            for round, confirmed in self._confirming:
                if round <= reached:
                    self._results.append((lambda _, confirmed=confirmed: confirmed(True), _UNUSED))
            self._confirming = [each for each in self._confirming if each[0] > reached]

    # --- leadership and members ---------------------------------------------------------------------------------------

    def _others(self) -> list[bytes]:
        """The voters beside this one."""
        return [each.replica_id for each in self._table if each.voter and each.replica_id != self.replica_id]

    def _follow_leadership(self, engine: Engine, now_ms: float) -> None:
        """After a tick."""
        if not engine.leads:
            if self._led_term >= 0:
                self._led_term = -1
                self._sender.drop_all()
                self._fail_waiting("another head leads now: the outcome is not known here")
            return
        if self._led_term != engine.term:
            self._led_term = engine.term
            self._rounds.clear()
            self._receiver.reset()
            log.info("head %s leads in term %d", self.endpoint, engine.term)
        if self._resigning:
            if not self.resigned and now_ms >= self._hand_over_ms + HAND_OVER_RETRY_MS:
                self._hand_over_ms = now_ms
                engine.hand_over()
        elif engine.own_term_applied and self._log.members_index <= engine.commit_index:
            caught_up = [
                member.replica_id
                for member in self._table
                if not member.voter and engine.match_index(member.replica_id) >= engine.commit_index
            ]
            step = membership.next_step(self._table, caught_up)
            if step is not None and membership.find(step, self.replica_id) is not None:
                self._append_table(engine, step)
            elif step is not None:
                self._resigning = True  # this head is to be replaced: the next leader does that

    def _follow_table(self) -> None:
        """Brings the engine up to the table of members in the log."""
        members = self._log.members
        engine, elections = self._engine, self._elections
        if members is self._table or engine is None or elections is None:
            return
        self._table = members
        me = membership.find(members, self.replica_id)
        others = self._others()
        learners = [each.replica_id for each in members if not each.voter and each.replica_id != self.replica_id]
        engine.set_peers(others, learners)
        elections.set_voters(others, me is not None and me.voter)
        self._peers.table_changed()

    def on_active(self) -> None:
        """For the links: this replica takes part from now on."""
        if self._engine is None:
            timing = self._timing
            self._engine = Engine(
                self, self._log, self.replica_id, self._now_ms, self._rng, election_min_ms=timing.election_min_ms,
                election_max_ms=timing.election_max_ms, append_ms=timing.append_ms, fallback_ms=timing.fallback_ms,
            )  # fmt: skip
            self._elections = Elections(self._engine, self._rng, timing.election_min_ms, self._send)
        self._follow_table()

    def on_peer(self, peer: bytes) -> None:
        """For the links: there is one to that member."""
        if self._engine is not None:
            self._engine.connected(peer)

    def on_peer_lost(self, peer: bytes) -> None:
        """For the links: there is none to that member any more."""
        engine, elections = self._engine, self._elections
        self._sender.drop(peer)
        if engine is not None and elections is not None:
            engine.disconnected(peer)
            if engine.leader == peer:
                elections.lost_leader(self._now_ms())

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Replaces the journal by a snapshot of the state. Raises JournalWriteError (the old one goes on)."""
        engine = self._engine
        if engine is not None and engine.last_applied > self._log.snapshot_index:
            snapshot = self.state.snapshot()
            self._compact_at_bytes = max(self._compact_bytes, 2 * len(snapshot))
            self._log.compact(engine.last_applied, snapshot)

    def _try_compact(self) -> None:
        if self._log.journal.size_bytes < self._compact_at_bytes:
            return
        try:
            self.compact()
        except JournalWriteError as error:
            log.warning("%s; the old journal is kept and grows", error)
            self._compact_at_bytes = self._log.journal.size_bytes + self._compact_bytes

    def _make_snapshot(self) -> tuple[int, int, bytes]:
        engine = self._engine
        assert engine is not None
        index = engine.last_applied
        members, members_index = self._log.members_at(index)
        term = self._log[index - self._log[0][1]][2]
        return index, term, encode_snapshot_body(members, members_index, self.state.snapshot())

    def _send_part(self, peer: bytes, made: Any, offset: int) -> None:
        assert self._engine is not None
        self._send(peer, part_of(made, offset, self._engine.term, self._round))

    def _install(self, engine: Engine, data: bytes, part: m.SnapshotPart) -> None:
        """Goes on from a snapshot that the leader has sent. A bad one is refused, and this head stops as it was."""
        body = decode_snapshot_body(data)
        state = self._restore(body.state)
        self._log.install(body, data, part.index, part.index_term)
        self.state = state
        engine.installed(part.index)
        self._compact_at_bytes = max(self._compact_bytes, 2 * len(data))
        for callback in tuple(self._reset_callbacks):
            self._call(lambda _, callback=callback: callback(), None)

    def _restore(self, data: bytes) -> GcsState:
        where = str(getattr(self._log.journal, "path", "the journal"))
        try:
            return GcsState.restore(data, self._log.journal.cluster_id)
        except SnapshotVersionError as error:
            raise JournalVersionError(f"journal {where} was written by a newer ftray: {error}") from error
        except SnapshotError as error:
            raise JournalCorruptError(where, 0, f"its snapshot: {error}") from error

    # --- answers ------------------------------------------------------------------------------------------------------

    def queue(self, link: Link, message: m.PeerMessage) -> None:
        """For the links: sends after the next sync."""
        self._outbox.append((link, m.encode(message), ""))

    def queue_close(self, link: Link, reason: str) -> None:
        """For the links: closes after what was queued."""
        self._outbox.append((link, None, reason))

    def _send(self, peer: bytes, message: m.PeerMessage) -> bool:
        link = self._peers.link_to(peer)
        if link is None:
            return False
        self._outbox.append((link, m.encode(message), ""))
        return True

    def _answer(self, reply: ReplyCallback, code: Code, message: str) -> None:
        self._results.append((reply, Result(code, message, self.state.revision)))

    def _fail_waiting(self, message: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for _, reply in waiting.values():
            self._call(reply, Result(Code.NOT_LEADER, message, self.state.revision))

    def _fail_all(self, message: str) -> None:
        """Answers everybody who waits that this head can't."""
        self._fail_waiting(message)
        replies = [reply for _, reply in self._queue] + [reply for _, reply in self._table_requests]
        confirms = [*self._confirms, *(each for _, each in self._confirming)]
        self._queue, self._table_requests, self._confirms, self._confirming = [], [], [], []
        for reply in replies:
            self._call(reply, Result(Code.NOT_LEADER, message, self.state.revision))
        for confirmed in confirms:
            self._call(confirmed, False)

    def _call(self, callback: Callable[[T], object], argument: T) -> None:
        self._busy = True
        try:
            callback(argument)
        except Exception:
            log.exception("a callback of the GCS replica failed")
        finally:
            self._busy = False

    def _require_open(self) -> None:
        if self._journal is None:
            raise ReplicaClosedError(
                "the GCS replica is closed: its node is stopping, or it has stopped by itself (see the log)"
            )


_UNUSED = Result(Code.OK, "", 0)


def _register(callbacks: list[T], callback: T) -> Callable[[], None]:
    callbacks.append(callback)

    def end() -> None:
        if callback in callbacks:
            callbacks.remove(callback)

    return end
