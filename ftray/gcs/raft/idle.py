"""What heads say to each other while nothing happens, without a turn of the replica.

Role: logic around an engine; a part of `RaftReplica`.

A leader that has nothing to say is heard every 30 ms, and each follower answers that it lacks nothing. So this is most
of what an idle head does. A turn, with a tick of the library, would take three times as long, and find nothing to do.

Rules
- Only what changes nothing goes this way, but for the times at which the other was heard. Whatever names another term,
  another leader, an entry, or anything that is to be applied or written takes a turn.
- Of answers that say the same, one in `ANSWER_EACH` is given: the leader wants to hear of a majority within 400 ms, and
  each of these answers wakes it. One that names a new round is given at once.
- What is noted here is what the library would note, and an election timeout is drawn in the same place.
- Nothing else waits for a turn (the replica looks): what is said here overtakes nothing.

Rejected: a longer pause between the leader's messages (the time in which its death is noticed hangs on it).
"""

from __future__ import annotations

from collections.abc import Callable

from ftray.gcs.raft import messages as m
from ftray.gcs.raft.desk import Desk
from ftray.gcs.raft.elections import Elections
from ftray.gcs.raft.leading import Leading
from ftray.gcs.raft.library import Engine
from ftray.gcs.raft.log import RaftLog

ANSWER_EACH = 3


class Idle:
    """See the module."""

    def __init__(
        self, engine: Engine, elections: Elections, leading: Leading, desk: Desk, raft_log: RaftLog,
        now_ms: Callable[[], float],
    ) -> None:  # fmt: skip
        self._engine = engine
        self._elections = elections
        self._leading = leading
        self._desk = desk
        self._log = raft_log
        self._now_ms = now_ms
        self._answered = m.Ack(0, 0, 0, False, False)
        """The last answer to a leader that was given here,"""
        self._unanswered = 0
        """and how often it was not repeated."""

    def beat(self, send: Callable[[bytes, m.Append], object]) -> bool:
        """At a leader that has nothing to say: says so to all, if it is time for that. False: it takes a turn."""
        engine, desk = self._engine, self._desk
        if not self._leading.ready or desk.waited_for or self._log.dirty:
            return False
        peers = engine.beat()
        if peers is None:
            return False
        last_index = engine.last_index
        message = m.Append(engine.term, desk.round, last_index, last_index, engine.last_term, ())
        for peer in peers:
            send(peer, message)
        return True

    def answer(self, peer: m.Hello | None, event: m.PeerMessage) -> m.Ack | bool | None:
        """What to answer a member that has nothing new to say; True: nothing. None: it takes a turn."""
        if peer is None:
            return None
        if type(event) is m.Append:
            return self._answer_leader(peer.replica_id, event)
        return True if type(event) is m.Ack and self._leading.is_no_news(peer.replica_id, event) else None

    def _answer_leader(self, peer: bytes, event: m.Append) -> m.Ack | bool | None:
        engine = self._engine
        if (
            event.entries or event.commit > engine.commit_index or event.previous_index != engine.last_index
            or event.previous_term != engine.last_term or event.term != engine.term or self._log.dirty
            or not engine.rests_under(peer)
        ):  # fmt: skip
            return None
        self._elections.heard_leader(self._now_ms())
        engine.postpone()
        ack = m.Ack(event.term, event.round, event.previous_index + 1, False, True)
        self._unanswered += 1
        if ack == self._answered and self._unanswered < ANSWER_EACH:
            return True
        self._answered, self._unanswered = ack, 0
        return ack
