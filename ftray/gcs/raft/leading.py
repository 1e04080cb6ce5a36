"""What a replica does while it leads: takes commands, confirms reads, changes the table of members, hands over.

Role: logic around an engine; a part of `RaftReplica`, made when the replica begins to take part.

Rules
- Commands are taken once the entry that began the term is applied: then the state has all that was ever acknowledged.
- One change of the members is under way at a time. What remains to be done of one (a learner that has caught up votes,
  the head that it replaces goes) follows from the table, so the next leader carries on.
- A leader does not remove itself: it hands over, and the next one does it.
- No command is taken that a member can't read, because its ftray is older: it would stop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from ftray.gcs.raft import membership
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.desk import UNKNOWN, Desk
from ftray.gcs.raft.hand_over import RETRY_MS, HandOver
from ftray.gcs.raft.library import Engine
from ftray.gcs.raft.log import MEMBERSHIP, REGULAR, RaftLog
from ftray.gcs.raft.snapshots import Sender
from ftray.gcs.replica import Request
from ftray.gcs.state.commands import AnyCommand, decode_command, edition_of
from ftray.gcs.state.errors import CommandError
from ftray.gcs.state.sessions import checksum_of
from ftray.gcs.state.state import GcsState, admit
from ftray.gcs.state.tables import Code, Result

log = logging.getLogger("ftray.gcs")

_REGULAR = bytes([REGULAR])
_MEMBERSHIP = bytes([MEMBERSHIP])


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a regular entry holds, as in the journal of a single replica."""

    client_id: bytes
    sequence: int
    command: bytes


_encode_entry = msgspec.msgpack.Encoder().encode
_decode_entry = msgspec.msgpack.Decoder(Entry).decode


def decode_entry(command: bytes) -> tuple[Entry, AnyCommand, int]:
    """What a regular entry of the log says, with the command's checksum. Raises CommandError, msgspec.DecodeError."""
    entry = _decode_entry(memoryview(command)[1:])
    return entry, decode_command(entry.command), checksum_of(entry.command)


class Leading:
    """See the module."""

    def __init__(
        self,
        endpoint: str,
        me: bytes,
        engine: Engine,
        raft_log: RaftLog,
        desk: Desk,
        sender: Sender,
        state: Callable[[], GcsState],
        follow_table: Callable[[], None],
        value_bytes_max: int,
        older_than: Callable[[int], list[str]],
    ) -> None:
        """`older_than` tells which heads can't read commands of an edition."""
        self.stopping = False
        """The replica is about to stop."""
        self._endpoint = endpoint
        self._me = me
        self._engine = engine
        self._log = raft_log
        self._desk = desk
        self._sender = sender
        self._state = state
        self._follow_table = follow_table
        self._value_bytes_max = value_bytes_max
        self._older_than = older_than
        self._rounds: dict[bytes, int] = {}
        """The latest round that each peer has answered in this term."""
        self._led_term = -1
        self._hand_over = HandOver(engine, raft_log, me, desk)

    @property
    def resigning(self) -> bool:
        """Takes no commands, and hands over."""
        return self.stopping or self._hand_over.on

    @property
    def ready(self) -> bool:
        """Whether commands are taken."""
        return self._engine.leads and self._engine.own_term_applied and not self.resigning

    def others(self) -> list[bytes]:
        """The voters beside this one."""
        return [each.replica_id for each in self._log.members if each.voter and each.replica_id != self._me]

    def next_wake_ms(self, now_ms: float) -> float:
        """When to try again to hand over."""
        if self.resigning and self._engine.leads:
            return now_ms + RETRY_MS
        return self._hand_over.next_wake_ms()

    # --- before the tick ----------------------------------------------------------------------------------------------

    def take_requests(self, ready: bool, now_ms: float) -> None:
        """Puts what was asked into the log, or refuses it."""
        desk, engine = self._desk, self._engine
        if engine.leads and desk.begin_reads():
            engine.hurry()
        if not ready:
            for _, reply in [*desk.take_requests(), *desk.take_table_requests(), *desk.take_hand_overs()]:
                desk.answer(reply, Code.NOT_LEADER, "this head does not lead the cluster")
            return
        for request, reply in desk.take_requests():
            checked = self._check(request)
            if isinstance(checked, Result):
                desk.give(reply, checked)
                continue
            payload = _encode_entry(Entry(request.client_id, request.sequence, request.command))
            desk.wait(*engine.append(_REGULAR + payload), reply)
        for change, reply in desk.take_table_requests():
            if self._log.members_index > engine.commit_index:
                desk.answer(reply, Code.UNAVAILABLE, "another change of the heads is under way: ask again")
                continue
            changed = change(self._log.members)
            if isinstance(changed, str):
                desk.answer(reply, Code.INVALID, changed)
            elif membership.find(changed, self._me) is None:
                self._hand_over.begin(now_ms)
                desk.answer(reply, Code.NOT_LEADER, "this head hands over first, and the next leader removes it")
            else:
                desk.wait(*self._append_table(changed), reply)
        for to, reply in desk.take_hand_overs():
            why_not = self._hand_over.why_not(to, now_ms)
            if why_not:
                desk.answer(reply, Code.INVALID, why_not)
            else:
                self._hand_over.begin(now_ms, to, reply)

    def _append_table(self, members: membership.Table) -> tuple[int, int]:
        placed = self._engine.append(_MEMBERSHIP + membership.encode_table(members))
        self._follow_table()
        return placed

    def _check(self, request: Request) -> AnyCommand | Result:
        """The command, or the answer to one that is not to be written."""
        state = self._state()
        known = state.recall(request.client_id, request.sequence, checksum_of(request.command))
        if known is not None:
            return known
        try:
            command = decode_command(request.command)
        except CommandError as error:
            return Result(Code.INVALID, str(error), state.revision)
        edition = edition_of(command)
        if edition > 1 and (older := self._older_than(edition)):
            return Result(
                Code.UNAVAILABLE,
                f"{type(command).__name__} takes a newer ftray than {', '.join(older)} may run. It was not carried "
                "out: those heads would stop. Start them with this version, or remove those that are gone",
                state.revision,
            )
        refused = admit(command, self._value_bytes_max, len(request.command))
        return command if refused is None else Result(Code.TOO_LARGE, refused, state.revision)

    def on_ack(self, peer: bytes, ack: m.Ack | m.SnapshotAck, now_ms: float) -> None:
        """A member has answered. What it said in another term counts for nothing."""
        engine = self._engine
        if ack.term > engine.term:
            engine.observe(ack.term)
        if ack.term != engine.term or not engine.leads or membership.find(self._log.members, peer) is None:
            return
        self._rounds[peer] = max(ack.round, self._rounds.get(peer, 0))
        engine.heard_from(peer)
        if isinstance(ack, m.SnapshotAck):
            self._sender.on_ack(peer, ack, now_ms)
            return
        if ack.success:
            self._sender.drop(peer)
        if ack.success or ack.reset:
            engine.on_ack(peer, ack)

    def is_no_news(self, peer: bytes, ack: m.Ack) -> bool:
        """Whether an acknowledgement is the same as the one before. That its sender has been heard is noted then."""
        engine = self._engine
        if (
            not ack.success or ack.reset or not engine.leads or ack.term != engine.term
            or ack.round > self._rounds.get(peer, 0) or ack.next_index != engine.match_index(peer) + 1
            or self._sender.sends_to(peer)
        ):  # fmt: skip
            return False
        engine.heard_from(peer)
        return True

    # --- after the tick -----------------------------------------------------------------------------------------------

    def after_tick(self, now_ms: float) -> None:
        engine = self._engine
        if not engine.leads:
            if self._led_term >= 0:
                self._led_term = -1
                self._rounds.clear()
                self._sender.drop_all()
                self._desk.fail_waiting(UNKNOWN)
            self._desk.refuse_reads()
            self._hand_over.follow(now_ms)
            return
        if self._led_term != engine.term:
            self._led_term = engine.term
            self._rounds.clear()
            log.info("head %s leads in term %d", self._endpoint, engine.term)
        if engine.own_term_applied:
            self._end_reads()
        if self.resigning:
            self._hand_over.go_on(now_ms, self.stopping)
        elif engine.own_term_applied and self._log.members_index <= engine.commit_index:
            self._go_on_with_table(now_ms)

    def _end_reads(self) -> None:
        others = self.others()
        rounds = sorted((self._rounds.get(peer, 0) for peer in others), reverse=True)
        needed = (len(others) + 1) // 2  # with this one, a majority
        self._desk.end_reads(rounds[needed - 1] if needed else self._desk.round)

    def _go_on_with_table(self, now_ms: float) -> None:
        members, engine = self._log.members, self._engine
        caught_up = [
            member.replica_id
            for member in members
            if not member.voter and engine.match_index(member.replica_id) >= engine.commit_index
        ]
        step = membership.next_step(members, caught_up)
        if step is not None and membership.find(step, self._me) is not None:
            self._append_table(step)
        elif step is not None:
            self._hand_over.begin(now_ms)
