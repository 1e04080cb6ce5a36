"""Exactly once, cheaply: does a counter add up?

Role: pure. For histories of `models.ExactlyOnceCounter` that are too long or have too many unknown outcomes for an
exact check: n log n, whatever happened. It is weaker than linearizability and sound: what it reports is wrong, and what
it lets pass may still be.

Rules
- An increment is a pair (client, sequence number); all its attempts together count once.
- It counts for certain from its first acknowledgement on; it may count from its first attempt on. So each total that
  somebody saw lies between two sums.
- Attempts that failed, or were answered STALE, had no effect.
- Amounts should be integers: sums of floats depend on the order, and would be blamed for it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from chaos.checkers.history import HistoryError, Operation, Value, counted
from chaos.checkers.models import STALE, ExactlyOnceCounter, check_increment

SHOWN_MAX = 10


class ConflictingIncrementError(HistoryError):
    """Two attempts of the same increment have different amounts, so it is not known what it would add."""


@dataclass(frozen=True, slots=True)
class CounterReport:
    """What was found out about a counter. `str()` gives it in words."""

    acknowledged: int
    """Increments with an answer: each counts once."""
    uncertain: int
    """Increments of which nobody knows: each counts once or not at all."""
    total_min: int | float
    """What the counter must hold at the end, at least."""
    total_max: int | float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        head = f"{counted(self.acknowledged, 'increment')} acknowledged, {self.uncertain} uncertain"
        if self.ok:
            return f"exactly once: {head}"
        return "\n".join([f"not exactly once: {head}", *shown(self.problems)])


def shown(problems: Sequence[str]) -> list[str]:
    """The first problems, one a line."""
    lines = [f"    {each}" for each in problems[:SHOWN_MAX]]
    return lines if len(problems) <= SHOWN_MAX else [*lines, f"    (and {len(problems) - SHOWN_MAX} more)"]


@dataclass(slots=True)
class _Increment:
    """All attempts of one increment that may have had an effect."""

    amount: int | float
    invoked_ms: float
    acknowledged_ms: float = math.inf
    attempts: int = 0
    answers: list[Operation] = field(default_factory=list)


class _Sums:
    """Sums of the amounts before a time."""

    __slots__ = ("_highest", "_lowest", "_plain", "_times")

    def __init__(self, amounts: Iterable[tuple[float, int | float]]) -> None:
        ordered = sorted(amounts)
        self._times = [time_ms for time_ms, _ in ordered]
        self._plain = [0, *accumulate(amount for _, amount in ordered)]
        self._lowest = [0, *accumulate(min(0, amount) for _, amount in ordered)]
        self._highest = [0, *accumulate(max(0, amount) for _, amount in ordered)]

    def before(self, time_ms: float) -> tuple[int | float, int | float, int | float]:
        """The sum of what came before, of its negative and of its positive amounts."""
        return self._at(bisect_left(self._times, time_ms))

    def until(self, time_ms: float) -> tuple[int | float, int | float, int | float]:
        """The same with what came at that time."""
        return self._at(bisect_right(self._times, time_ms))

    def _at(self, count: int) -> tuple[int | float, int | float, int | float]:
        return self._plain[count], self._lowest[count], self._highest[count]


def check_counter(history: Iterable[Operation], *, final: int | float | None = None) -> CounterReport:
    """Checks the increments and reads of a counter that began with 0; `final` is what it holds after all has ended.

    Raises UnknownActionError, ConflictingIncrementError.
    """
    model = ExactlyOnceCounter()
    operations = [each for each in history if not each.failed]
    for each in operations:
        model.check(each)
    increments = _increments(operations)
    certain = _Sums((each.acknowledged_ms, each.amount) for each in increments.values() if each.answers)
    possible = _Sums((each.invoked_ms, each.amount) for each in increments.values())

    def bounds(begin_ms: float, end_ms: float) -> tuple[int | float, int | float]:
        plain, lowest, highest = certain.before(begin_ms)
        _, lowest_ever, highest_ever = possible.until(end_ms)
        return plain + lowest_ever - lowest, plain + highest_ever - highest

    problems: list[str] = []
    seen: list[Operation] = []
    """What shows the total at a moment of its own; a repeated increment shows an old one."""
    for each in operations:
        if each.action == "read" and each.completed_ms is not None:
            if not _is_number(each.result):
                problems.append(f"{each}: a total should be a number")
                continue
            seen.append(each)
            low, high = bounds(each.invoked_ms, each.completed_ms)
            problems += _outside(each, low, high)
    for (client, sequence), increment in increments.items():
        first = increment.answers[0] if increment.answers else None
        if first is None or first.completed_ms is None:
            continue
        if not all(_is_number(each.result) for each in increment.answers):
            problems.append(f"{first}: a total should be a number")
            continue
        if increment.attempts == 1:
            seen.append(first)
        low, high = bounds(increment.invoked_ms, first.completed_ms)
        # Its own amount is in the total.
        problems += _outside(first, low + max(0, increment.amount), high + min(0, increment.amount))
        for again in increment.answers[1:]:
            if again.result != first.result:
                problems.append(
                    f"request {sequence} of {client!r} was answered {first.result!r}, and when it was repeated "
                    f"{again.result!r}: it took effect twice, or its answer was not kept"
                )
    if all(each.amount > 0 for each in increments.values()):
        problems += _same_totals(increments)
    if all(each.amount >= 0 for each in increments.values()):
        problems += _steps_back(seen)
    low, high = bounds(math.inf, math.inf)
    if final is not None and not low <= final <= high:
        problems.append(_final(final, low, high))
    acknowledged = sum(bool(each.answers) for each in increments.values())
    return CounterReport(acknowledged, len(increments) - acknowledged, low, high, tuple(problems))


def _increments(operations: Iterable[Operation]) -> dict[tuple[Value, int], _Increment]:
    increments: dict[tuple[Value, int], _Increment] = {}
    for each in operations:
        if each.action != "increment" or each.result == STALE:
            continue
        client, sequence, amount = check_increment(each)
        known = increments.setdefault((client, sequence), _Increment(amount, each.invoked_ms))
        if known.amount != amount:
            raise ConflictingIncrementError(
                f"request {sequence} of {client!r} adds {known.amount} in one attempt and {amount} in another: "
                "a repeated request must be the same, and a new one needs a new sequence number"
            )
        known.attempts += 1
        known.invoked_ms = min(known.invoked_ms, each.invoked_ms)
        if each.completed_ms is not None:
            known.acknowledged_ms = min(known.acknowledged_ms, each.completed_ms)
            known.answers.append(each)
    for increment in increments.values():
        increment.answers.sort(key=lambda each: each.completed_ms or 0.0)
    return increments


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _outside(operation: Operation, low: int | float, high: int | float) -> list[str]:
    total = operation.result
    assert isinstance(total, (int, float))
    if low <= total <= high:
        return []
    lack = f"lost {low - total}" if total < low else f"counted {total - high} too much"
    return [f"{operation}: the total lies between {low} and {high} then, so the counter has {lack}"]


def _final(final: int | float, low: int | float, high: int | float) -> str:
    what = f"{low - final} of what was acknowledged is lost" if final < low else f"{final - high} was counted too much"
    expected = str(low) if low == high else f"between {low} and {high}"
    return f"at the end the counter holds {final}, and should hold {expected}: {what}"


def _same_totals(increments: dict[tuple[Value, int], _Increment]) -> list[str]:
    """Increments that left the same total: one of them overwrote the other."""
    problems = []
    totals: dict[Value, Operation] = {}
    for increment in increments.values():
        for each in increment.answers[:1]:
            other = totals.setdefault(each.result, each)
            if other is not each:
                problems.append(f"{each}: the same total as after {other}, so one of them is lost")
    return problems


def _steps_back(seen: Iterable[Operation]) -> list[str]:
    """Totals lower than one that was seen before: with amounts that are not negative, a counter never goes back."""
    ends = sorted(seen, key=lambda each: each.completed_ms or 0.0)
    problems = []
    highest: Operation | None = None
    position = 0
    for each in sorted(ends, key=lambda each: each.invoked_ms):
        while position < len(ends) and (ends[position].completed_ms or 0.0) < each.invoked_ms:
            if highest is None or _total(ends[position]) > _total(highest):
                highest = ends[position]
            position += 1
        if highest is not None and _total(each) < _total(highest):
            problems.append(f"{each}: less than was seen before, by {highest}")
    return problems


def _total(operation: Operation) -> int | float:
    assert isinstance(operation.result, (int, float))
    return operation.result
