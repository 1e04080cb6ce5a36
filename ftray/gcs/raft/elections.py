"""When a replica may campaign: not before a majority would vote for it.

Role: logic around an engine; time is asked of the replica, randomness of its generator.

Rules
- When the election timeout has passed, or the link to the leader has closed, the replica asks its peers first
  (pre-vote). That changes nothing at them. Only with a majority of promises it begins a real election with a new term:
  so a replica that was cut off comes back without unseating a leader that the others are content with.
- A promise is given to whoever has all that this replica has, unless this replica hears a leader itself.
- A link to the leader that closes most likely means that its process died. All followers see that at about the same
  time; each waits a small random delay, and asks again a few times, in case others have not seen it yet.
- An election that the leader asked for (it is stopping) needs no question.

Rejected: the library's `timeout_now`, injected when a link closes (a follower whose own link broke would unseat a good
leader); ignoring votes while a leader is heard (then a hand-over needs an exception to it, on the wire).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

from ftray.gcs.raft.library import Engine
from ftray.gcs.raft.messages import PreVote, PreVoteRequest

LOSS_DELAY_MS = 8.0
"""The longest delay after a link to the leader has closed."""
LOSS_RETRIES = 8
LOSS_RETRY_MS = (4.0, 20.0)
ELECTION_MS = (8.0, 25.0)
"""How long an election after such a loss may take before the next attempt; also how long one who has promised waits."""
NEVER_MS = float("inf")


class Elections:
    """One replica's way to campaigns."""

    def __init__(
        self,
        engine: Engine,
        rng: random.Random,
        election_min_ms: float,
        send: Callable[[bytes, PreVoteRequest | PreVote], object],
    ) -> None:
        self._engine = engine
        self._rng = rng
        self._election_min_ms = election_min_ms
        self._send = send
        self._heard_ms = -NEVER_MS
        self._attempt = 0
        self._asked_term = 0
        """The term in which this attempt was begun; in a later one its promises are void."""
        self._promises: set[bytes] | None = None
        """Who has promised in this attempt; None while none is under way."""
        self._granted = False
        """A majority has promised: the next tick is to campaign."""
        self._lost_at_ms = NEVER_MS
        """When to ask because the leader's link has closed."""
        self._retries = 0
        self._voters: frozenset[bytes] = frozenset()
        """The others that vote."""
        self._votes = False
        """Whether this replica does."""
        self._term_of_votes = -1
        self._votes_seen: set[bytes] = set()

    def set_voters(self, others: Collection[bytes], votes: bool) -> None:
        self._voters, self._votes = frozenset(others), votes

    @property
    def votes(self) -> bool:
        """Whether this replica has a vote."""
        return self._votes

    def next_wake_ms(self) -> float:
        return self._lost_at_ms

    # --- events -------------------------------------------------------------------------------------------------------

    def heard_leader(self, now_ms: float) -> None:
        """The leader of this term has said something."""
        self._heard_ms = now_ms
        self._promises = None
        self._granted = False
        self._lost_at_ms = NEVER_MS
        self._retries = 0

    def lost_leader(self, now_ms: float) -> None:
        """The link to the leader has closed."""
        self._heard_ms = -NEVER_MS
        self._retries = LOSS_RETRIES
        self._lost_at_ms = now_ms + self._rng.uniform(0.0, LOSS_DELAY_MS)

    def hears_leader(self, now_ms: float) -> bool:
        """Something was heard of a leader not so long ago that there is none, or none that reaches this replica."""
        return now_ms - self._heard_ms < 2 * self._election_min_ms

    def first_vote(self, peer: bytes) -> bool:
        """Whether this is the first vote of a voter in this term. The library counts votes, not voters."""
        if self._term_of_votes != self._engine.term:
            self._term_of_votes = self._engine.term
            self._votes_seen.clear()
        if peer not in self._voters or peer in self._votes_seen:
            return False
        self._votes_seen.add(peer)
        return True

    def plan(self, now_ms: float) -> None:
        """Before each tick: keeps the library from campaigning on its own, and asks if it is time."""
        engine = self._engine
        if engine.leads:
            self._promises, self._lost_at_ms, self._granted = None, NEVER_MS, False
            return
        if not self._votes:
            if engine.election_due():
                engine.postpone()
            self._lost_at_ms = NEVER_MS
            return
        if self._granted:
            self._granted = False
            self._again(now_ms, ELECTION_MS)
            return
        if engine.handing_over or not (engine.election_due() or now_ms >= self._lost_at_ms):
            return
        self._lost_at_ms = NEVER_MS
        engine.postpone()
        self._attempt += 1
        self._asked_term = engine.term
        self._promises = set()
        request = PreVoteRequest(engine.term, engine.last_index, engine.last_term, self._attempt)
        for peer in sorted(self._voters):
            self._send(peer, request)
        self._count()

    def on_request(self, peer: bytes, request: PreVoteRequest, now_ms: float) -> None:
        engine = self._engine
        hears_leader = engine.leads or (
            engine.leader is not None and now_ms - self._heard_ms < self._election_min_ms
        )
        complete = (request.last_term, request.last_index) >= (engine.last_term, engine.last_index)
        granted = request.term >= engine.term and complete and not hears_leader
        if granted and self._lost_at_ms < NEVER_MS:
            # Two who campaign at once may both fail.
            self._lost_at_ms = max(self._lost_at_ms, now_ms + self._rng.uniform(*ELECTION_MS))
        self._send(peer, PreVote(engine.term, request.attempt, granted))

    def on_answer(self, peer: bytes, answer: PreVote, now_ms: float) -> None:
        engine = self._engine
        if answer.term > engine.term:
            # Without a leader this replica would never learn of that term, and never be promised anything.
            if not engine.leads and now_ms - self._heard_ms >= self._election_min_ms:
                engine.observe(answer.term)
                self._promises = None
            return
        if self._promises is None or answer.attempt != self._attempt or self._asked_term != engine.term:
            return
        if answer.granted:
            if peer in self._voters:
                self._promises.add(peer)
                self._count()
        else:
            self._again(now_ms, LOSS_RETRY_MS)

    def _again(self, now_ms: float, delay_ms: tuple[float, float]) -> None:
        """After the loss of a leader: asks again before the election timeout, a few times."""
        if self._retries > 0 and self._lost_at_ms == NEVER_MS:
            self._retries -= 1
            self._lost_at_ms = now_ms + self._rng.uniform(*delay_ms)

    def _count(self) -> None:
        if self._promises is not None and len(self._promises) + 1 > (len(self._voters) + 1) / 2:
            self._promises = None
            self._lost_at_ms = NEVER_MS
            self._granted = True
            self._engine.campaign()
