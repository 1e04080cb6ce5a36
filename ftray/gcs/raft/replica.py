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
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ftray.gcs.compaction import Source
from ftray.gcs.raft import membership
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.desk import Confirmed, Desk, register
from ftray.gcs.raft.elections import NEVER_MS, Elections
from ftray.gcs.raft.errors import NewerCommandError, ReplicaRemovedError
from ftray.gcs.raft.idle import Idle
from ftray.gcs.raft.leading import Leading, decode_entry
from ftray.gcs.raft.library import Engine
from ftray.gcs.raft.log import MEMBERSHIP, NO_OP, REGULAR, JournalLike, RaftLog
from ftray.gcs.raft.peers import Link, Peers, check_heads
from ftray.gcs.raft.saving import Saving, restore, sent
from ftray.gcs.raft.shell import Closed, Opened, PeerTransport, Timing
from ftray.gcs.raft.snapshots import Made, Receiver, part_of
from ftray.gcs.replica import COMPACT_BYTES, ChangeCallback, ReplicaClosedError, ReplyCallback, Request
from ftray.gcs.state.errors import CommandError, JournalWriteError
from ftray.gcs.state.state import VALUE_BYTES_MAX, GcsState
from ftray.gcs.state.tables import Code, Result

log = logging.getLogger("ftray.gcs")

STALL_RETRY_MS = 50.0
_REGULAR = bytes([REGULAR])
_MEMBERSHIP = bytes([MEMBERSHIP])
_NO_OP = bytes([NO_OP])


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
        self._log = RaftLog(journal)
        self.state = GcsState(journal.cluster_id)
        snapshot = self._log.replay()
        if snapshot is not None:
            self.state = restore(journal, snapshot)
        heads = tuple(heads)
        check_heads(self._log, endpoint, heads, join)
        if not heads:
            heads = tuple(member.endpoint for member in self._log.members)
        self._peers = Peers(
            self, self._log, journal.cluster_id, endpoint, heads, rng.getrandbits(62), join and not self._log.active
        )
        self._engine: Engine | None = None
        self._elections: Elections | None = None
        self._table: membership.Table = ()
        self._saving = Saving(self._log, compact_bytes, len(snapshot or b""), self._picture, self._send_part)
        self._sender = self._saving.sender
        self._receiver = Receiver()

        self._inbound: list[tuple[Link, m.PeerMessage | Opened | Closed]] = []
        self._outbox: list[tuple[Link, bytes | None, str]] = []
        """What leaves after the next sync; None closes the link."""
        self._desk = Desk(lambda: self.state.revision)
        self.round_seen = 0
        """As a follower: the round of the leader's message that is being answered."""
        self._resigning = False
        self._leading: Leading | None = None
        self._idle: Idle | None = None
        self._stalled_ms: float | None = None
        """Since when the disk takes nothing."""
        self._replaced = False
        """The state came in a snapshot: watchers are to be told."""
        if self._log.active:
            self.on_active()
        self._peers.start()

    # --- the replica's interface --------------------------------------------------------------------------------------

    @property
    def replica_id(self) -> bytes:
        """Made with the disk, 16 bytes."""
        return self._log.journal.replica_id

    @property
    def is_leader(self) -> bool:
        """Whether commands are taken here. False while the disk is full, or the replica is about to hand over."""
        leading = self._leading
        return leading is not None and leading.ready and self._journal is not None and self._stalled_ms is None

    @property
    def leader_hint(self) -> str:
        engine, elections = self._engine, self._elections
        if engine is None or elections is None or not (engine.leads or elections.hears_leader(self._now_ms())):
            return ""  # the library goes on naming the last one, and there may never be another
        member = membership.find(self._log.members, engine.leader) if engine.leader is not None else None
        return "" if member is None else member.endpoint

    def propose(self, request: Request, reply: ReplyCallback) -> None:
        """Queues a command; `reply` gets its result from a `flush`. Raises ReplicaClosedError."""
        self._require_open()
        self._desk.requests.append((request, reply))

    def confirm(self, confirmed: Confirmed) -> None:
        """For a fresh read: calls back from a `flush` with True once `state` has everything that was acknowledged
        anywhere before this call, or with False if this replica does not lead. Raises ReplicaClosedError."""
        self._require_open()
        self._desk.reads.append(confirmed)

    def on_change(self, callback: ChangeCallback) -> Callable[[], None]:
        """Calls back with each batch of changes, from now on. Returns a function that ends it."""
        return register(self._desk.on_change, callback)

    def on_reset(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back when `state` was replaced by a snapshot: there are no changes that lead to it. Returns a function
        that ends it."""
        return register(self._desk.on_reset, callback)

    def close(self) -> None:
        """Stops the replica. What has been asked and not answered is answered `not_leader`. May be repeated."""
        self._end("this head is stopping")

    def _end(self, message: str) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            self._saving.end()
            journal.close()
            self._outbox.clear()
            self._inbound.clear()
            self._desk.close(message)

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
        goes. `reply` gets the result when the first step is committed. Raises ReplicaClosedError."""
        self._require_open()
        self._desk.table_requests.append((lambda table: membership.add(table, replica_id, endpoint, replaces), reply))

    def remove_head(self, replica_id: bytes, reply: ReplyCallback) -> None:
        """Removes a head. The leader itself hands over first, and answers `not_leader`: repeat it at the next one.
        Raises ReplicaClosedError."""
        self._require_open()
        self._desk.table_requests.append((lambda table: membership.remove(table, replica_id), reply))

    def hand_over(self, to: bytes = b"", reply: ReplyCallback = lambda result: None) -> None:
        """Lets another head lead: `to`, or any. `reply` gets the result from a `flush`. Raises ReplicaClosedError."""
        self._require_open()
        self._desk.hand_overs.append((to, reply))

    def resign(self) -> None:
        """Begins a clean stop: takes no more commands, and hands over. Close when `resigned`, or after a while."""
        self._resigning = True
        if self._leading is not None:
            self._leading.stopping = True

    @property
    def resigned(self) -> bool:
        """Whether there is nothing left to hand over, or nobody to hand it to."""
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
            "snapshot_index": self._log.snapshot_index,
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
        self._inbound.append((link, Opened(dialled)))

    def link_message(self, link: Link, data: bytes | bytearray | memoryview) -> bool:
        """A message has come. Returns whether a `flush` is due. What can't be decoded closes the link."""
        try:
            event = m.decode(data)
        except msgspec.DecodeError as error:
            log.warning("a head sent a message that is none: %s", error)
            self._transport.close(link, f"a message that is none: {error}")
            self.link_closed(link, "it sent a message that is none")
            return True
        if self._idle is not None and self._rests:
            answer = self._idle.answer(self._peers.sender(link), event)
            if isinstance(answer, m.Ack):
                self.round_seen = answer.round
                self._transport.send(link, m.encode(answer))
            if answer is not None:
                return False
        self._inbound.append((link, event))
        return True

    @property
    def _rests(self) -> bool:
        return not (self._inbound or self._outbox) and self._stalled_ms is None and self._journal is not None

    def beat(self) -> bool:
        """At a leader that has nothing else to do: shows the others that it is there. False: `flush` is due instead."""
        told = self._rests and self._idle is not None and not self._saving.busy and self._idle.beat(self.on_send)
        if told:
            self._release()
        return told

    def link_closed(self, link: Link, reason: str) -> None:
        """The link is closed."""
        self._inbound.append((link, Closed(reason)))

    # --- turns --------------------------------------------------------------------------------------------------------

    def next_wake_ms(self) -> float:
        """When `flush` is to be called at the latest, on the clock that was given; infinity if nothing is due."""
        if self._journal is None:
            return NEVER_MS
        if self._stalled_ms is not None:
            return self._now_ms() + STALL_RETRY_MS
        if self._inbound or self._desk.pending:
            return self._now_ms()
        if self._engine is None or self._elections is None or self._leading is None:
            return NEVER_MS
        return min(
            self._engine.next_wake_ms(), self._elections.next_wake_ms(), self._leading.next_wake_ms(self._now_ms()),
            self._saving.next_wake_ms,
        )  # fmt: skip

    def flush(self) -> None:
        """Does what is due. See the module.

        Raises what stops the replica (JournalFailedError, DivergedError, ReplicaRemovedError, ...): it is closed then.
        """
        if self._desk.busy:
            raise RuntimeError("flush inside a callback of the replica: propose is enough, its turn comes")
        again = True
        while again and self._journal is not None:
            try:
                again = self._turn()
            except BaseException as error:
                self.stopped = error
                self._end(f"this head has stopped: {error}")
                raise

    def _turn(self) -> bool:
        """Returns whether there is more to do at once."""
        now_ms = self._now_ms()
        if self._stalled_ms is not None and not self._write(now_ms):
            self._wait_for_disk(now_ms)
            return False
        inbound, self._inbound = self._inbound, []
        for link, event in inbound:
            self._deliver(link, event, now_ms)
            self._follow_table()
        engine, elections, leading = self._engine, self._elections, self._leading
        if engine is not None and elections is not None and leading is not None:
            leading.take_requests(self.is_leader, now_ms)
            if not leading.others() and not self._write(now_ms):
                return False  # alone, an entry counts as soon as it is in the log, so that is made durable first
            elections.plan(now_ms)
            engine.tick()
            leading.after_tick(now_ms)
        else:
            self._desk.refuse(Code.NOT_LEADER, "this head has no part in the cluster yet")
        if self._write(now_ms):
            self._release()
            self._saving.turn(now_ms)
        return self._desk.pending

    def _write(self, now_ms: float) -> bool:
        """Makes everything durable. False if the disk is full: nothing may leave then."""
        try:
            self._log.sync()
        except JournalWriteError as error:
            if self._stalled_ms is None:
                self._stalled_ms = now_ms
                self._saving.put_off()  # the room that it takes is what is missing, perhaps
                log.error("%s; this head is silent until it can write", error)
            return False
        if self._stalled_ms is not None:
            self._stalled_ms = None
            log.warning("the disk takes what this head writes again")
        return True

    def _wait_for_disk(self, now_ms: float) -> None:
        self._inbound = [
            each for each in self._inbound if isinstance(each[1], (Opened, Closed, m.Hello, m.Refused))
        ]  # Raft's own messages may get lost
        self._desk.refuse(Code.UNAVAILABLE, "the command was not carried out: the disk of this head is full")
        if self._stalled_ms is not None and now_ms - self._stalled_ms > self._timing.fallback_ms:
            self._desk.fail_waiting("the disk of this head is full: the outcome is not known")

    def _release(self) -> None:
        """What has become durable is told."""
        outbox, self._outbox = self._outbox, []
        for link, data, reason in outbox:
            if data is None:
                self._transport.close(link, reason)
            else:
                self._transport.send(link, data)
        if self._replaced:
            self._replaced = False
            self._desk.reset()
        self._desk.release(self.state.take_changes())

    # --- what peers say -----------------------------------------------------------------------------------------------

    def _deliver(self, link: Link, event: m.PeerMessage | Opened | Closed, now_ms: float) -> None:
        match event:
            case Opened(dialled):
                self._peers.opened(link, dialled)
            case Closed():
                self._peers.closed(link)
            case m.Hello():
                self._peers.on_hello(link, event)
            case m.Refused():
                self._peers.on_refused(link, event)
            case _:
                sender, engine, elections = self._peers.sender(link, event), self._engine, self._elections
                leading = self._leading
                if sender is not None and engine is not None and elections is not None and leading is not None:
                    if isinstance(event, (m.Ack, m.SnapshotAck)):
                        leading.on_ack(sender.replica_id, event, now_ms)
                    else:
                        self._hear(engine, elections, sender.replica_id, event, now_ms)

    def _hear(
        self, engine: Engine, elections: Elections, peer: bytes, event: m.PeerMessage, now_ms: float
    ) -> None:
        """A member says something."""
        match event:
            case m.Append() | m.Ping() | m.SnapshotPart():
                self._follow(engine, elections, peer, event, now_ms)
            case m.VoteRequest():  # also without a vote: the sender may know of one that is not in the log here yet
                engine.on_vote_request(peer, event)
            case m.Vote() if event.term == engine.term and elections.first_vote(peer):
                engine.on_vote(peer, event.term)
            case m.PreVoteRequest():
                elections.on_request(peer, event, now_ms)
            case m.PreVote():
                elections.on_answer(peer, event, now_ms)
            case m.TimeoutNow() if elections.votes:
                engine.on_timeout_now(peer, event.term)
            case _:
                pass

    def _follow(
        self, engine: Engine, elections: Elections, peer: bytes, event: m.Append | m.Ping | m.SnapshotPart,
        now_ms: float,
    ) -> None:  # fmt: skip
        """The leader of some term speaks."""
        if event.term < engine.term:
            # It would not learn otherwise that its term is over, and this replica could never follow it.
            self.on_send(peer, m.Ack(engine.term, 0, 0, False, False))
            return
        self.round_seen = event.round
        elections.heard_leader(now_ms)
        if isinstance(event, m.Append):
            engine.on_append(peer, event)
            return
        engine.on_leader(peer, event.term)
        if isinstance(event, m.Ping):
            self.on_send(peer, m.Ack(engine.term, event.round, 0, False, False))
        elif self._log.has(event.index, event.index_term):
            self.on_send(peer, m.Ack(engine.term, event.round, event.index + 1, True, True))
        else:
            taken = self._receiver.take(event)
            if isinstance(taken, int):
                self.on_send(peer, m.SnapshotAck(engine.term, event.round, event.index, taken))
            elif self._install(engine, taken, event):
                self.on_send(peer, m.Ack(engine.term, event.round, event.index + 1, True, True))

    # --- what the library says ----------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """For the engine."""
        return self._desk.round

    def on_send(self, peer: bytes, message: m.PeerMessage) -> None:
        """For the engine: a message to a member, after the next sync. Without a link to it, it is dropped."""
        link = self._peers.link_to(peer)
        if link is not None:
            self._outbox.append((link, m.encode(message), ""))

    def on_snapshot_needed(self, peer: bytes) -> None:
        """For the engine: the log does not go back to what that peer needs."""
        self._sender.needed(peer, self._now_ms(), self._log[0][1])

    def on_apply(self, index: int, term: int, command: bytes) -> None:
        """For the engine: an entry is committed. Raises what must stop the replica."""
        result = Result(Code.OK, "", self.state.revision)
        if command[:1] == _REGULAR:
            try:
                entry, decoded, checksum = decode_entry(command)
            except (CommandError, msgspec.DecodeError) as error:
                raise NewerCommandError(
                    f"entry {index} can't be read ({error}): it was written by a head with a newer ftray. Start this "
                    "head with the same version"
                ) from error
            result = self.state.apply(entry.client_id, entry.sequence, decoded, checksum)
        elif command[:1] == _MEMBERSHIP:
            self._on_table_committed(membership.decode_table(memoryview(command)[1:]))
        elif command[:1] != _NO_OP:
            raise NewerCommandError(f"entry {index} is of kind {command[0]}: only a newer ftray knows it, install that")
        self._desk.applied(index, term, result)

    def _on_table_committed(self, members: membership.Table) -> None:
        log.info("the heads are now: %s", membership.show(members))
        self._peers.table_changed()
        # A head that was added (again) later in the log is a member.
        if all(membership.find(each, self.replica_id) is None for each in (members, self._log.members)):
            raise ReplicaRemovedError(
                f"this head (replica {self.replica_id.hex()}) was removed from the cluster; the heads are "
                f"{membership.show(members)}. To add it again, empty its directory and let it join (ftray heads add)"
            )

    # --- leadership and members ---------------------------------------------------------------------------------------

    def _follow_table(self) -> None:
        """Brings the engine up to the table of members in the log."""
        members = self._log.members
        engine, elections = self._engine, self._elections
        if members is self._table or engine is None or elections is None:
            return
        self._table = members
        me = membership.find(members, self.replica_id)
        others = [each.replica_id for each in members if each.voter and each.replica_id != self.replica_id]
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
            self._elections = Elections(self._engine, self._rng, timing.election_min_ms, self.on_send)
            self._leading = Leading(
                self.endpoint, self.replica_id, self._engine, self._log, self._desk, self._sender, lambda: self.state,
                self._follow_table, self.value_bytes_max, self._peers.older_than,
            )  # fmt: skip
            self._leading.stopping = self._resigning
            self._idle = Idle(self._engine, self._elections, self._leading, self._desk, self._log, self._now_ms)
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

    def queue(self, link: Link, message: m.PeerMessage) -> None:
        """For the links: sends after the next sync."""
        self._outbox.append((link, m.encode(message), ""))

    def queue_close(self, link: Link, reason: str) -> None:
        """For the links: closes after what was queued."""
        self._outbox.append((link, None, reason))

    def tell(self, link: Link, message: m.Refused) -> None:
        """For the links: sends at once."""
        self._transport.send(link, m.encode(message))

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Replaces the journal by a snapshot of the state before it returns, and does nothing else meanwhile. Raises
        JournalWriteError (the old one goes on), JournalFailedError, ReplicaClosedError."""
        self._require_open()
        self._saving.compactor.at_once()

    def begin_compaction(self) -> None:
        """The same piece by piece, in the turns that follow. Raises the same."""
        self._require_open()
        self._saving.compactor.begin()

    def _picture(self) -> tuple[int, Source] | None:
        return None if self._engine is None else (self._engine.last_applied, self.state.picture())

    def _send_part(self, peer: bytes, made: Made, offset: int) -> None:
        self.on_send(peer, part_of(made, offset, self._log.term, self.round))

    def _install(self, engine: Engine, data: bytes, part: m.SnapshotPart) -> bool:
        """Goes on from a snapshot that the leader has sent. False if there is no room for it: it will be sent again.

        Raises UnreadableSnapshotError: this head can't follow, and what it has is left as it was. Raises DivergedError.
        """
        self._saving.give_up()
        body, state = sent(data, self._log.journal.cluster_id)
        try:
            self._log.install(body, data, part.index, part.index_term)
        except JournalWriteError as error:
            log.error("%s; the leader's snapshot can't be kept", error)
            return False
        self.state = state
        self._replaced = True
        engine.installed(part.index)
        engine.postpone()  # that may have taken longer than an election timeout, in which the leader was not heard
        self._saving.compactor.replaced(len(data))
        return True

    def _require_open(self) -> None:
        if self._journal is None:
            raise ReplicaClosedError(
                "the GCS replica is closed: its node is stopping, or it has stopped by itself (see the log)"
            )
