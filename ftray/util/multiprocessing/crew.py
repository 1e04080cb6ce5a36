"""Who of a pool's workers does what: batches in order of submission, one at a time for each worker.

Role: pure. Events in, effects out (`take_effects`): the engine carries them out and reports what came of them.

    hired ──started──► idle ◄──────finished────── busy
      │                 │ └──────── Run ───────────►│
      └──died: another is hired    Leave           died: another is hired, the batch goes first again
                        ▼
                     leaving ──gone──►

Rules:
- A batch goes to the worker that is idle longest, and only then: one in flight for each worker. What queues behind a
  running call could wait for it while another worker idles, and two tasks that wait for each other would never meet.
- A batch whose worker died goes first again, `deaths_max` times; then it fails with the death.
- A worker that never gets to start is hired again, `starts_failed_max` times in a row. After that, or after an error of
  the initializer, the crew is *broken*: all batches fail, and no more are taken.

Rejected: batches dealt to workers in turn (a long one holds up those behind it).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

DEATHS_MAX = 3
STARTS_FAILED_MAX = 3

HIRED, IDLE, BUSY, LEAVING = "hired", "idle", "busy", "leaving"


class Batch:
    """Calls that go to a worker together. `job` and what it runs are opaque here."""

    __slots__ = ("deaths", "function", "index", "items", "job", "kind")

    def __init__(self, job: Any, index: int, kind: int, function: Any, items: Any) -> None:
        self.job = job
        self.index = index
        self.kind = kind
        self.function = function
        self.items = items
        self.deaths = 0


@dataclass(frozen=True, slots=True)
class Hire:
    """Start a worker; `started`, `died` or `broke` follows."""

    number: int


@dataclass(frozen=True, slots=True)
class Run:
    """Give a batch to a worker; `finished` or `died` follows."""

    number: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class Leave:
    """Have a worker exit; `gone` follows."""

    number: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End a worker now. Nothing follows."""

    number: int


@dataclass(frozen=True, slots=True)
class Fail:
    """A batch will not be done."""

    batch: Batch
    error: BaseException


Effect = Hire | Run | Leave | Kill | Fail


class Member:
    __slots__ = ("batch", "number", "ran", "state")

    def __init__(self, number: int) -> None:
        self.number = number
        self.state = HIRED
        self.batch: Batch | None = None
        self.ran = 0
        """Batches that it has done."""


class Crew:
    """See the module. `batches_max` is how many a worker does before another takes its place; None: without end."""

    def __init__(self, size: int, batches_max: int | None = None) -> None:
        self.size = size
        self.batches_max = batches_max
        self.members: dict[int, Member] = {}
        self.idle: deque[int] = deque()
        self.pending: deque[Batch] = deque()
        self.feeds = 0
        """Sources that will submit more, also after `close`."""
        self.closed = False
        self.broken: BaseException | None = None
        self._effects: list[Effect] = []
        self._hired = 0
        self._starts_failed = 0
        for _ in range(size):
            self._hire()

    def take_effects(self) -> list[Effect]:
        """What is to be done now, in order; each once."""
        effects, self._effects = self._effects, []
        return effects

    def give_back(self, effects: list[Effect]) -> None:
        """Effects that could not be carried out: they come first again."""
        self._effects[:0] = effects

    @property
    def has_effects(self) -> bool:
        return bool(self._effects)

    @property
    def over(self) -> bool:
        """Nothing runs, and nothing will."""
        return self.closed and not self.members and not self.pending and not self.feeds

    # --- work --------------------------------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        """One more batch, also while closed (from a feed that was there before)."""
        if self.broken is not None:
            self._effects.append(Fail(batch, self.broken))
            return
        self.pending.append(batch)
        self._deal()

    def take(self, batch: Batch) -> int | None:
        """Gives a batch to an idle worker at once, without an effect: the caller runs it. None when there is none
        idle."""
        if self.broken is not None or self.pending or not self.idle:
            return None
        member = self.members[self.idle.popleft()]
        member.state = BUSY
        member.batch = batch
        return member.number

    def _deal(self) -> None:
        while self.pending and self.idle:
            member = self.members[self.idle.popleft()]
            member.state = BUSY
            member.batch = self.pending.popleft()
            self._effects.append(Run(member.number, member.batch))
        if self.closed and not self.pending and not self.feeds:
            while self.idle:
                self._leave(self.members[self.idle.popleft()])

    def finished(self, number: int, batch: Batch) -> None:
        """A worker has done this batch, whatever came of it. May be said again."""
        member = self.members.get(number)
        if member is None or member.batch is not batch:
            return
        member.batch = None
        member.ran += 1
        if self.batches_max is not None and member.ran >= self.batches_max:
            self._leave(member)
            self._hire_if_needed()
        else:
            member.state = IDLE
            self.idle.append(number)
        if self.pending or self.closed:
            self._deal()

    # --- workers -----------------------------------------------------------------------------------------------------

    def _hire(self) -> None:
        self._hired += 1
        self.members[self._hired] = Member(self._hired)
        self._effects.append(Hire(self._hired))

    def _hire_if_needed(self) -> None:
        if self.closed and not self.pending and not self.feeds:
            return
        there = sum(member.state != LEAVING for member in self.members.values())
        if there < self.size:
            self._hire()

    def _leave(self, member: Member) -> None:
        member.state = LEAVING
        self._effects.append(Leave(member.number))

    def started(self, number: int) -> None:
        """A hired worker is ready."""
        member = self.members.get(number)
        if member is None or member.state != HIRED:
            return
        self._starts_failed = 0
        member.state = IDLE
        self.idle.append(number)
        self._deal()

    def died(self, number: int, error: BaseException) -> None:
        """A worker is dead."""
        member = self.members.pop(number, None)
        if member is None:
            return
        if member.state == IDLE:
            self.idle.remove(number)
        if member.state == HIRED:
            self._starts_failed += 1
            if self._starts_failed > STARTS_FAILED_MAX:
                self.broke(error)
                return
        if member.batch is not None:
            batch = member.batch
            batch.deaths += 1
            if batch.deaths > DEATHS_MAX:
                self._effects.append(Fail(batch, error))
            else:
                self.pending.appendleft(batch)
        if member.state != LEAVING:
            self._hire_if_needed()
        self._deal()

    def gone(self, number: int) -> None:
        """A worker that was to leave has left."""
        self.members.pop(number, None)

    # --- the end -----------------------------------------------------------------------------------------------------

    def feed_ended(self) -> None:
        """One of the `feeds` has submitted all that it had."""
        self.feeds -= 1
        self._deal()

    def close(self) -> None:
        """No more batches but those of feeds; workers leave when there is nothing left to do."""
        self.closed = True
        self._deal()

    def broke(self, error: BaseException) -> None:
        """No worker can start: everything fails with `error`."""
        if self.broken is None:
            self.broken = error
            self._drop_all(error)

    def terminate(self, error: BaseException) -> None:
        """Ends all workers now; what they did and what is pending fails with `error`."""
        self.closed = True
        self.broken = self.broken or error
        self._drop_all(error)

    def _drop_all(self, error: BaseException) -> None:
        hires = {effect.number for effect in self._effects if isinstance(effect, Hire)}
        failed = [effect for effect in self._effects if isinstance(effect, Fail)]
        self._effects.clear()
        self._effects.extend(failed)
        for member in self.members.values():
            if member.number not in hires:
                self._effects.append(Kill(member.number))
            if member.batch is not None:
                self._effects.append(Fail(member.batch, error))
        self._effects.extend(Fail(batch, error) for batch in self.pending)
        self.members.clear()
        self.idle.clear()
        self.pending.clear()
