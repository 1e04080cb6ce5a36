"""A client's way to the heads: the link that serves it, and the search for the leader.

Role: shell, a part of `GcsClient`, under the reactor's lock. It connects when it is first needed, to whichever endpoint
answers, and moves on when that one is gone.

Rules
- A client prefers the leader for everything. A head that does not lead says so; the link to it stays, since it serves
  what any head can, until the leader answers on another one, the *scout*. Then that takes its place, in one step.
- Whom a follower names is scouted at once, unless that head was silent a moment ago and has not been elected since (a
  frozen leader is named until the others have noticed). Without a name, or after a scout in vain, the other heads are
  looked at in turn, after a pause: a follower says by itself when it knows a leader, so that only helps where the
  follower is cut off.
- A scout whose head does not lead stays until then, for who is elected is known to its followers some milliseconds
  before it may lead itself (its first entry must be on disks): it says when it does.
- A head that is behind what this client has seen keeps what it is asked. It is left after `BEHIND_MS`.
- A head that is silent for `SILENCE_MS` is left: a frozen process keeps its connections.

Rejected: closing the link to a follower before the leader answers (a watch would have gaps for as long as there is no
leader); a link to the leader and one to any other head (twice the links; and a follower is a hop behind).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ftray.wire.handshake import ROLE_GCS
from ftray.wire.head_messages import GcsFollower, GcsHeads, GcsHello, GcsPing
from ftray.wire.messages import Message
from ftray.wire.reactor import Link, Reactor, Timer

RECONNECT_FIRST_MS = 5.0
RECONNECT_MAX_MS = 500.0
RECONNECT_OF_SEVERAL_MAX_MS = 50.0
RECONNECT_OF_SEVERAL_LATER_MS = 200.0
"""The same after `ROUNDS_SOON` rounds, two seconds and more: many clients of heads that are gone should cost little."""
ROUNDS_SOON = 40
NO_LEADER_MS = 200.0
"""So long a client waits at a head that knows no leader, before it looks whether another one does; later longer."""
NO_LEADER_MAX_MS = 800.0
BEHIND_MS = 200.0
"""So long a client waits for a head to get as far as it has seen the state."""
SILENCE_MS = 150.0
"""Of several heads: who has not answered a ping, or a handshake, after this time is given up."""
SILENCE_MAX_MS = 2_400.0
IDLE_PINGS = 4
"""A client that waits for nothing pings so many times less often."""


class Owner(Protocol):
    """The client, as its links see it."""

    seen: int

    def on_served(self, link: Link, anew: bool) -> None:
        """From now on this head serves everything. `anew`: on this link it did not, and has been asked already."""

    def on_unserved(self) -> None:
        """No head serves everything any more."""

    def on_opened(self, link: Link) -> None:
        """There is a new link, on which nothing has been said; the former one is gone."""

    def on_answer(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        """A message that is not about the heads."""

    def on_all_heads(self, endpoints: Sequence[str]) -> None:
        """Where all heads are, the leader first."""

    def needs_link(self) -> bool:
        """Whether to connect anew when the link is lost."""

    def waits(self) -> bool:
        """Whether an answer is waited for, so that a silence is to be noticed soon."""


class HeadLinks:
    """See the module."""

    __slots__ = (
        "_alive", "_attempts", "_behind", "_client_id", "_failed_ms", "_idle", "_looks", "_next", "_node_id", "_owner",
        "_patience", "_reactor", "_scout", "_scout_at", "_scout_next", "_scout_timer", "_silences", "_timer", "closed",
        "endpoints", "failures", "leads", "link", "open", "own_endpoint", "several",
    )  # fmt: skip

    def __init__(
        self, reactor: Reactor, endpoints: Sequence[str], client_id: bytes, node_id: bytes, owner: Owner
    ) -> None:
        self._reactor = reactor
        self._client_id = client_id
        self._node_id = node_id
        self._owner = owner
        self.endpoints = list(endpoints)
        self.failures: dict[str, str] = {}
        """Why each endpoint that was tried in vain did not answer, or does not lead, since a leader has answered."""
        self.several = False
        """There are several heads, as one of them has said."""
        self.own_endpoint = ""
        """The head in this process: it is as frozen as the client, so it is not asked whether it is there."""
        self.link: Link | None = None
        self.open = False
        self.leads = False
        """The head at the other end serves everything, as far as is known. One that has said nothing is asked as if."""
        self.closed = False
        self._alive = False
        """Something has come over the link since the last ping."""
        self._patience: Timer | None = None
        """When to ask whether this head is still there, or to try another one."""
        self._idle = False
        """Nothing waits for an answer, so pings are rare."""
        self._silences = 0
        """Heads that were given up since one has said something: a silence is borne longer when all were tried, in case
        that it is this process that is slow."""
        self._failed_ms: dict[str, float] = {}
        """When each endpoint was found silent last."""
        self._next = 0
        """Index of the endpoint to try next."""
        self._attempts = 0
        self._timer: Timer | None = None
        self._behind: Timer | None = None
        """When to leave a head that is behind."""
        self._scout: Link | None = None
        self._scout_at = ""
        self._scout_next = 0
        """Index of the endpoint to look at next."""
        self._scout_timer: Timer | None = None
        """When to look at one, or to give the scout up."""
        self._looks = 0
        """Scouts since a leader was last known."""

    def ready(self) -> bool:
        """Whether a head is there. If not, this begins to connect, and `on_opened` follows."""
        if not self.open and self.link is None and self._timer is None:
            self._connect()
        return self.open

    def close(self) -> None:
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._be_patient(0.0, None)
        self._not_behind()
        self._end_scout()
        link, self.link, self.open = self.link, None, False
        if link is not None:
            link.close("the client is closed")

    def answered(self, revision: int) -> None:
        """The head has answered something, when it was as far as that."""
        self._attempts = 0
        if revision >= self._owner.seen:
            self._not_behind()
        if self.failures and self.leads:
            self.failures.clear()

    def rename(self, client_id: bytes) -> None:
        """The client has another id now, under which it begins anew."""
        self._client_id = client_id
        if self.link is not None:
            self._reactor.drop(self.link, "this client has taken a new id")

    def redirect(self, link: Link, hint: str) -> None:
        """The head has refused a command: it does not lead. Goes to the one that it names, or to the next."""
        link.close("it does not lead")
        self._learn((hint,))
        self._lost(link.peer, f"it does not lead (it names {hint or 'nobody'})", hint)

    # --- the link -----------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._timer = None
        endpoint = self.endpoints[self._next % len(self.endpoints)]
        try:
            self.link = self._reactor.connect(endpoint, ROLE_GCS, self, on_open=self._opened)
        except (OSError, ValueError) as error:
            self._lost(endpoint, str(error))
            return
        self.link.peer = endpoint
        self.several = self.several or sum(each.startswith("tcp:") for each in self.endpoints) > 1
        if self.several:
            self._be_patient(self._silence_ms, self._give_up)

    def _opened(self, link: Link) -> None:
        self.open = self._alive = self.leads = True
        link.send(GcsHello(self._client_id, self._node_id))
        if self.several:
            self._ping()
        self._owner.on_opened(link)
        self._owner.on_served(link, False)

    def _lost(self, endpoint: str, reason: str, hint: str = "") -> None:
        self.failures[endpoint] = reason
        self._idle = False
        self._be_patient(0.0, None)
        self._not_behind()
        hint = hint or self._scout_at
        self._end_scout()
        served, self.open, self.leads, self.link = self.open and self.leads, False, False, None
        if served:
            self._owner.on_unserved()
        if self.closed or self.link is not None or self._timer is not None:
            return  # the callback may have asked for something already
        self._next += 1
        rounds, position = divmod(self._attempts, len(self.endpoints))
        self._attempts += 1
        several_ms = RECONNECT_OF_SEVERAL_MAX_MS if rounds <= ROUNDS_SOON else RECONNECT_OF_SEVERAL_LATER_MS
        longest_ms = several_ms if self.several else RECONNECT_MAX_MS
        delay_ms = 0.0 if position else min(RECONNECT_FIRST_MS * 2 ** min(rounds, 20), longest_ms)
        if hint in self.endpoints and not self._was_silent(hint):
            self._next = self.endpoints.index(hint)
        elif hint:
            delay_ms = RECONNECT_FIRST_MS
        if self._node_id or self._owner.needs_link():
            self._timer = self._reactor.call_later(delay_ms, self._connect)

    def on_closed(self, link: Link, reason: str) -> None:
        """For the reactor."""
        if link is self.link:
            self._lost(link.peer, reason)
        elif link is self._scout:
            self._scouted_in_vain(reason)

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        """For the reactor."""
        if link is self._scout:
            self._scout_says(link, message)
            return
        if link is not self.link:
            return
        self._alive = True
        self._silences = 0
        if type(message) is GcsHeads:
            self._on_heads(link, message.endpoints)
        elif type(message) is GcsFollower:
            self._on_follower(link, message)
        elif type(message) is not GcsPing:
            self._owner.on_answer(link, message, payload)

    @property
    def at_home(self) -> bool:
        """Whether the link is to the head in this process."""
        return self.link is not None and self.link.peer == self.own_endpoint

    # --- silence ------------------------------------------------------------------------------------------------------

    def _be_patient(self, delay_ms: float, then: Callable[[], None] | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self._reactor.call_later(delay_ms, then) if then is not None else None

    def _give_up(self) -> None:
        """The head at the other end of the link says nothing."""
        link, silence_ms = self.link, self._silence_ms
        if link is not None:
            self._failed_ms = {at: ms for at, ms in self._failed_ms.items() if at in self.endpoints}
            self._failed_ms[link.peer] = self._reactor.now_ms()
            self._silences += 1
            self._reactor.drop(link, f"it has said nothing for {silence_ms:.0f} ms")

    @property
    def _silence_ms(self) -> float:
        return min(SILENCE_MS * 2.0 ** min(self._silences // len(self.endpoints), 9), SILENCE_MAX_MS)

    def _was_silent(self, endpoint: str) -> bool:
        return self._reactor.now_ms() - self._failed_ms.get(endpoint, -1e9) < 4 * SILENCE_MS

    def _ping(self) -> None:
        link = self.link
        if not self._alive or link is None:
            self._give_up()
            return
        if self.at_home:
            self._idle = False
            self._be_patient(0.0, None)
            return
        self._alive = False
        link.send(GcsPing())
        self._idle = not (self._node_id or self._owner.waits())
        self._be_patient(self._silence_ms * (IDLE_PINGS if self._idle else 1), self._ping)

    def wait_for_answer(self) -> None:
        """Something was asked: a silence is noticed sooner from now on."""
        if self._idle:
            self._idle = False
            self._be_patient(self._silence_ms, self._ping)

    def _now_several(self) -> None:
        if not self.several:
            self.several = True
            self._ping()

    # --- who leads ----------------------------------------------------------------------------------------------------

    def _learn(self, endpoints: Sequence[str]) -> None:
        self.endpoints += [each for each in endpoints if each and each not in self.endpoints]

    def _on_heads(self, link: Link, endpoints: Sequence[str], anew: bool = True) -> None:
        """This one leads, and these are all heads."""
        self._end_scout()
        self._looks = 0
        self._failed_ms.clear()  # who was silent then may lead next
        if endpoints:
            at = link.peer
            self.endpoints[:] = [at, *(each for each in endpoints if each != at)] if at in endpoints else [*endpoints]
            self._next = 0
            self._owner.on_all_heads(self.endpoints)
        led, self.leads = self.leads, True
        self.answered(self._owner.seen)
        self._now_several()
        if not led:
            self._owner.on_served(link, anew)

    def _on_follower(self, link: Link, message: GcsFollower) -> None:
        """This one serves what it can. Is there a leader?"""
        self._now_several()
        self._learn(message.endpoints)
        self._learn((message.leader,))
        self.failures[link.peer] = f"{message.reason}; {message.leader} does" if message.leader else message.reason
        if message.revision >= max(self._owner.seen, 0):
            self._not_behind()
        elif self._behind is None:
            self._behind = self._reactor.call_later(BEHIND_MS, lambda: self._leave(link))
        led, self.leads = self.leads, False
        if led:
            self._owner.on_unserved()
        if link is not self.link:
            return  # the callback has closed it
        leader = message.leader
        if link.tag == "names nobody":
            self._failed_ms.pop(leader, None)  # it was elected just now
        link.tag = "" if leader else "names nobody"
        if leader and leader not in (link.peer, self._scout_at) and not self._was_silent(leader):
            self._send_scout(leader)
        elif self._scout is None and self._scout_timer is None:
            self._look_later()

    def _leave(self, link: Link) -> None:
        """It is behind, and does not get on."""
        self._behind = None
        if link is self.link:
            link.close("it is behind what this client has seen")
            self._lost(link.peer, "it answers, but is behind what this client has seen")

    def _not_behind(self) -> None:
        if self._behind is not None:
            self._behind.cancel()
            self._behind = None

    # --- the scout ----------------------------------------------------------------------------------------------------

    def _look_later(self) -> None:
        self._set_scout_timer(min(NO_LEADER_MS * 2.0 ** min(self._looks, 9), NO_LEADER_MAX_MS), self._look)

    def _set_scout_timer(self, delay_ms: float, then: Callable[[], None]) -> None:
        if self._scout_timer is not None:
            self._scout_timer.cancel()
        self._scout_timer = self._reactor.call_later(delay_ms, then)

    def _end_scout(self) -> None:
        if self._scout_timer is not None:
            self._scout_timer.cancel()
            self._scout_timer = None
        scout, self._scout, self._scout_at = self._scout, None, ""
        if scout is not None:
            scout.close("it is not needed any more")

    def _look(self) -> None:
        """Does another head lead, or know who does?"""
        self._scout_timer = None
        link = self.link
        others = [each for each in self.endpoints if link is None or each != link.peer]
        if others and link is not None and not self.leads:
            others = [each for each in others if not self._was_silent(each)] or others
            self._scout_next += 1
            self._send_scout(others[self._scout_next % len(others)])

    def _send_scout(self, endpoint: str) -> None:
        self._end_scout()
        self._scout_at = endpoint
        self._looks += 1
        try:
            scout = self._reactor.connect(endpoint, ROLE_GCS, self, on_open=self._scout_opened)
        except (OSError, ValueError) as error:
            self._scouted_in_vain(str(error))
            return
        scout.peer = endpoint
        self._scout = scout
        self._set_scout_timer(self._silence_ms, self._scout_is_silent)

    def _scout_opened(self, scout: Link) -> None:
        scout.send(GcsHello(self._client_id, self._node_id))

    def _scout_is_silent(self) -> None:
        scout = self._scout
        if scout is not None:
            self._failed_ms[scout.peer] = self._reactor.now_ms()
            self._reactor.drop(scout, f"it has said nothing for {self._silence_ms:.0f} ms")

    def _scouted_in_vain(self, reason: str) -> None:
        endpoint = self._scout_at
        self._end_scout()
        self.failures[endpoint] = reason
        if self.link is not None and not self.leads:
            self._look_later()

    def _scout_says(self, scout: Link, message: Message) -> None:
        if type(message) is GcsHeads:
            former, self.link = self.link, scout
            self._scout = None
            self._be_patient(0.0, None)
            if former is not None:
                former.close("another head leads")
            self.open = self._alive = True
            self._owner.on_opened(scout)
            self._on_heads(scout, message.endpoints, False)
            if self.link is scout:
                self._ping()
        elif type(message) is GcsFollower:
            self._learn((*message.endpoints, message.leader))
            self.failures[scout.peer] = message.reason
            leader, link = message.leader, self.link
            elsewhere = bool(leader) and link is not None and leader not in (scout.peer, link.peer)
            if elsewhere and self._looks <= len(self.endpoints) and not self._was_silent(leader):
                self._send_scout(leader)  # not for ever: they may name each other for a while
            elif not scout.tag:
                scout.tag = "follows"  # it stays until another one is looked at: should that head lead, it says so
                self._look_later()
