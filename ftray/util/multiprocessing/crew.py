"""Who of a pool's workers does what: batches in order of submission, and short ones a little ahead.

Role: pure. Events in, effects out (`take_effects`): the engine carries them out and reports what came of them.

    hired ──started──► idle ◄──────finished────── busy
      │                 │ └──────── Run ───────────►│
      └──died: another is hired    Leave           died: another is hired, the batch goes first again
                        ▼
                     leaving ──gone──►

Rules:
- A batch goes to the worker that is idle longest. When none is, and its function is known to be short, it goes *ahead*:
  behind what a worker has already, up to `AHEAD_US` of expected work. A worker that finds itself with a long one hands
  back what queues behind it (`handed_back`), so that two tasks that wait for each other still meet.
- When a worker dies, the oldest of its batches is taken for the one that it ran: that one has a death more, and fails
  with it after `DEATHS_MAX`. All of its batches go first again, and run alone from then on (`solo`), so that a killer
  convicts itself.
- A worker that never gets to start is hired again, `STARTS_FAILED_MAX` times in a row. After that, or after an error of
  the initializer, the crew is *broken*: all batches fail, and no more are taken.

Rejected: batches dealt to workers in turn (a long one holds up those behind it); one in flight for each worker whatever
it takes (each short call then costs a round trip: a third of the calls per second).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

DEATHS_MAX = 3
STARTS_FAILED_MAX = 3
AHEAD_US = 2_000.0
"""How much expected work a worker may have, in microseconds, for another batch to be sent ahead."""
AHEAD_MAX = 64
"""How many batches it may have."""

HIRED, IDLE, BUSY, LEAVING, DEAD = "hired", "idle", "busy", "leaving", "dead"


class Function:
    """What batches run, as it travels, and how long one call takes as far as is known.

    `data` is a pickle (or a reference to one in the store), and `keep` whether workers keep it unpickled for the next
    batch; or `data` is the function itself, and `keep` None.
    """

    __slots__ = ("__weakref__", "data", "item_us", "keep")

    def __init__(self, data: Any, keep: bool | None) -> None:
        self.data = data
        self.keep = keep
        self.item_us = 0.0
        """Microseconds for one item, decaying; 0 for not known."""


class Batch:
    """Calls that go to a worker together. `job` and `items` are opaque here; `size` is how many items there are."""

    __slots__ = ("deaths", "expected_us", "function", "index", "items", "job", "kind", "number", "size", "solo")

    def __init__(self, job: Any, index: int, kind: int, function: Function, items: Any, size: int = 1) -> None:
        self.job = job
        self.index = index
        self.kind = kind
        self.function = function
        self.items = items
        self.size = size
        self.number = 0
        """In the order of submission."""
        self.deaths = 0
        self.solo = False
        """Nothing may queue behind it, and it behind nothing."""
        self.expected_us = 0.0
        """Said when it was sent."""


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
    __slots__ = ("batches", "load_us", "number", "ran", "roomy", "slow", "state")

    def __init__(self, number: int) -> None:
        self.number = number
        self.state = HIRED
        self.batches: dict[int, Batch] = {}
        """Sent and not answered, by number, oldest first."""
        self.load_us = 0.0
        """What they are expected to take; infinite when that is not known, or nothing may go behind."""
        self.ran = 0
        """Batches that it has done."""
        self.slow = False
        """It has handed back: what it runs is long."""
        self.roomy = False
        """Among those that take batches ahead."""


class Crew:
    """See the module. `batches_max` is how many a worker does before another takes its place; None: without end."""

    def __init__(self, size: int, batches_max: int | None = None) -> None:
        self.size = size
        self.batches_max = batches_max
        self.members: dict[int, Member] = {}
        self.idle: deque[int] = deque()
        self.roomy: deque[Member] = deque()
        """Busy, and not known to be full."""
        self.pending: deque[Batch] = deque()
        self.feeds = 0
        """Sources that will submit more, also after `close`."""
        self.closed = False
        self.broken: BaseException | None = None
        self._effects: list[Effect] = []
        self._hired = 0
        self._starts_failed = 0
        self._submitted = 0
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
        self._submitted += 1
        batch.number = self._submitted
        self.pending.append(batch)
        self._deal()

    def take(self, batch: Batch) -> int | None:
        """Gives a batch to an idle worker at once, without an effect: the caller runs it. None when there is none
        idle."""
        if self.broken is not None or self.pending or not self.idle:
            return None
        member = self.members[self.idle.popleft()]
        self._submitted += 1
        batch.number = self._submitted
        batch.solo = True
        self._give(member, batch)
        return member.number

    def _give(self, member: Member, batch: Batch) -> None:
        expected = batch.function.item_us * batch.size
        batch.expected_us = float("inf") if batch.solo or not expected else expected
        member.state = BUSY
        member.batches[batch.number] = batch
        member.load_us += batch.expected_us
        if not member.roomy and member.load_us < AHEAD_US:
            member.roomy = True
            self.roomy.append(member)

    def _deal(self) -> None:
        pending = self.pending
        while pending and self.idle:
            member = self.members[self.idle.popleft()]
            batch = pending.popleft()
            self._give(member, batch)
            self._effects.append(Run(member.number, batch))
        while pending and self.roomy:
            batch = pending[0]
            expected = batch.function.item_us * batch.size
            if batch.solo or not expected or expected >= AHEAD_US:
                break  # it waits for an idle worker, and those after it for their turn
            member = self.roomy.popleft()
            member.roomy = False
            if self._has_room(member):
                pending.popleft()
                self._give(member, batch)
                self._effects.append(Run(member.number, batch))
        if self.closed and not self.pending and not self.feeds:
            while self.idle:
                self._leave(self.members[self.idle.popleft()])

    def finished(self, number: int, batch: Batch) -> None:
        """A worker has done this batch, whatever came of it. May be said again."""
        member = self._taken_from(number, batch)
        if member is None:
            return
        member.ran += 1
        member.slow = False
        if self.batches_max is not None and member.ran >= self.batches_max:
            self._leave(member)
            self._hire_if_needed()
        else:
            self._rested(member)
        if self.pending or self.closed:
            self._deal()

    def _has_room(self, member: Member) -> bool:
        count = len(member.batches)
        return (
            member.state == BUSY and not member.slow and member.load_us < AHEAD_US and count < AHEAD_MAX
            and (self.batches_max is None or member.ran + count < self.batches_max)
        )  # fmt: skip

    def _taken_from(self, number: int, batch: Batch) -> Member | None:
        """Takes a batch from a member; None when it has it not (any more)."""
        member = self.members.get(number)
        if member is None or member.batches.get(batch.number) is not batch:
            return None
        del member.batches[batch.number]
        if not member.batches:
            member.load_us = 0.0
        elif batch.expected_us == float("inf"):
            member.load_us = sum(each.expected_us for each in member.batches.values())
        else:
            member.load_us -= batch.expected_us
        return member

    def _rested(self, member: Member) -> None:
        """It has one batch less."""
        if not member.batches:
            member.state = IDLE
            self.idle.append(member.number)
        elif not member.roomy and self._has_room(member):
            member.roomy = True
            self.roomy.append(member)

    def measured(self, batch: Batch, took_us: float) -> None:
        """How long a batch has run."""
        function = batch.function
        item_us = max(took_us / max(batch.size, 1), 1.0)
        known = function.item_us
        # What has become longer is believed at once: it is what others would wait for.
        function.item_us = item_us if not known or item_us > 4 * known else known + (item_us - known) / 8

    def handed_back(self, number: int, batch: Batch) -> None:
        """A worker has not begun a batch, since the one before it is long."""
        member = self._taken_from(number, batch)
        if member is None:
            return
        member.slow = True
        for running in member.batches.values():
            running.function.item_us = max(running.function.item_us, AHEAD_US)
            break  # the oldest is the one that runs
        self._again(batch)
        self._rested(member)
        self._deal()

    def _again(self, batch: Batch) -> None:
        """Back to the pending, in the order of submission: nearly always at the front."""
        pending = self.pending
        before: list[Batch] = []
        while pending and pending[0].number < batch.number:
            before.append(pending.popleft())
        pending.appendleft(batch)
        pending.extendleft(reversed(before))

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
        for index, batch in enumerate(member.batches.values()):
            batch.solo = True
            if not index:
                batch.deaths += 1
            if batch.deaths > DEATHS_MAX:
                self._effects.append(Fail(batch, error))
            else:
                self._again(batch)
        member.batches = {}
        if member.state != LEAVING:
            member.state = DEAD  # it may be among the roomy still
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
            self._effects.extend(Fail(batch, error) for batch in member.batches.values())
        self._effects.extend(Fail(batch, error) for batch in self.pending)
        self.members.clear()
        self.idle.clear()
        self.roomy.clear()
        self.pending.clear()
