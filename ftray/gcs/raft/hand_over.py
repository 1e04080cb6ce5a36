"""Leadership on its way from this head to another one.

Role: logic around an engine; a part of `Leading`.

Rules
- While it goes on no commands are taken, so that a follower soon has the whole log. Only then it is asked for an
  election: the library's `timeout_now`, which it answers by campaigning.
- Nobody is waited for for ever. When no head was named, another one is asked after a while. After GIVE_UP_MS this head
  takes commands again, unless it is about to stop: a follower that is frozen would stop the cluster otherwise.
- Who asked is answered when another head leads.

Rejected: going on to take commands meanwhile (under load the follower never has the last one).
"""

from __future__ import annotations

from ftray.gcs.raft.desk import Desk
from ftray.gcs.raft.elections import NEVER_MS
from ftray.gcs.raft.library import Engine
from ftray.gcs.raft.log import RaftLog
from ftray.gcs.raft.membership import find, show
from ftray.gcs.replica import ReplyCallback
from ftray.gcs.state.tables import Code

RETRY_MS = 10.0
NEXT_MS = 100.0
"""So long one head is asked before another one is."""
GIVE_UP_MS = 1_000.0
SILENT_MS = 300.0
"""A head that has not answered for so long is not chosen; a leader with nothing to say is answered every 30 ms."""
BEHIND_MAX = 1_000
"""Entries that a head may lack that is to lead: it gets them in a moment."""


class HandOver:
    """See the module."""

    def __init__(self, engine: Engine, raft_log: RaftLog, me: bytes, desk: Desk) -> None:
        self.on = False
        """Another head is to lead."""
        self._engine = engine
        self._log = raft_log
        self._me = me
        self._desk = desk
        self._to = b""
        """Who is to lead; empty: any."""
        self._until_ms = NEVER_MS
        self._asked = b""
        self._next_ms = -NEVER_MS
        """When another one is to be asked."""
        self._asked_ms = -NEVER_MS

    def why_not(self, to: bytes, now_ms: float) -> str:
        """At the leader: why that head can't lead, or none can if `to` is empty; empty if it can."""
        members, engine = self._log.members, self._engine
        if self.on:
            return "another head is being given the lead already: ask again"
        if not to:
            if not any(each.voter and engine.is_linked(each.replica_id) for each in members):
                return "there is no other head that could lead"
            return ""
        member = find(members, to)
        if member is None:
            return f"there is no replica {to.hex()}: the heads are {show(members)}"
        if to == self._me:
            return f"{member.endpoint} leads already"
        if not member.voter:
            return f"{member.endpoint} does not vote yet, so it can't lead: it is still being given the state"
        if not engine.is_linked(to):
            return f"{member.endpoint} is not connected to the leader: start it first"
        silent_ms = now_ms - engine.heard_ms(to)
        if silent_ms > SILENT_MS:
            return f"{member.endpoint} has not answered for {silent_ms:.0f} ms, so it can't lead"
        behind = engine.last_index - engine.match_index(to)
        if behind > BEHIND_MAX:
            return f"{member.endpoint} is {behind} entries behind: ask again when it has caught up"
        return ""

    def begin(self, now_ms: float, to: bytes = b"", reply: ReplyCallback | None = None) -> None:
        """At the leader: lets that head lead, or any; `reply` gets the result when another one does."""
        if not self.on:
            self.on, self._to = True, to
            self._until_ms = now_ms + GIVE_UP_MS
            if reply is not None:
                self._desk.wait_for_leader(reply)

    def next_wake_ms(self) -> float:
        return self._until_ms if self._desk.handing_over else NEVER_MS

    def go_on(self, now_ms: float, stopping: bool) -> None:
        """At the leader, after each tick while it is to give the lead away."""
        engine = self._engine
        if self.on and now_ms >= self._until_ms:
            member = find(self._log.members, self._to or self._asked)
            who = "no other head" if member is None else member.endpoint
            self._end(Code.UNAVAILABLE, f"{who} did not take over within {GIVE_UP_MS / 1000:g} s: this head leads on")
            if not stopping:
                return
        if now_ms >= self._asked_ms + RETRY_MS:
            self._asked_ms = now_ms
            peer = self._to or self._choose(now_ms)
            if peer:
                engine.hand_over(peer)

    def _choose(self, now_ms: float) -> bytes:
        others = self._engine.successors()
        if self._asked not in others or now_ms >= self._next_ms:
            if self._asked in others and len(others) > 1:
                others.remove(self._asked)
            self._asked = others[0] if others else b""
            self._next_ms = now_ms + NEXT_MS
        return self._asked

    def follow(self, now_ms: float) -> None:
        """While another one leads, or nobody does: tells who asked, if anybody did."""
        self.on = False
        leader = self._engine.leader
        if not self._desk.handing_over:
            return
        if leader is not None and leader != self._me:
            member = find(self._log.members, leader)
            if not self._to or leader == self._to:
                self._end(Code.OK, "")
            else:
                where = leader.hex() if member is None else member.endpoint
                self._end(Code.UNAVAILABLE, f"{where} leads now: another election was faster")
        elif now_ms >= self._until_ms:
            self._end(Code.UNAVAILABLE, "this head gave the lead away, and no other one leads yet: elections go on")

    def _end(self, code: Code, message: str) -> None:
        self.on, self._until_ms = False, NEVER_MS
        self._desk.handed_over(code, message)
