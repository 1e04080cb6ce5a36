"""Why there is no order: the shortest account of a failed search that can be given in words.

Role: pure. An explanation has four parts:

- the *culprit*: all that was answered before it has an order, and with its answer none is left (given what others,
  still open then, were answered later);
- the longest prefix that has an order, and one such order;
- the *contradiction*: a set of operations that cannot be ordered even if nothing is known about the answers of all
  others since the last quiet moment before the culprit (when nothing was open). It is made smaller by forgetting one
  answer after the other, as long as no order appears;
- for each state in which the search got stuck, what the culprit would have returned there.

Rejected: removing operations from the history instead of forgetting their answers (a read of a value whose write was
removed is a contradiction of our own making).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from chaos.checkers.history import Operation, clock, counted
from chaos.checkers.models import WHOLE, Model, State
from chaos.checkers.search import Found, Problem, Verdict, search

FORGET_MAX = 60
"""Most operations since the quiet moment for which it is tried which ones matter."""
FORGET_STEPS_MAX = 5_000
"""Budget of each such attempt."""
STARTS_MAX = 16
"""Most different ways in which the quiet moment may have been reached, for the same."""
SHOWN_MAX = 8
"""Most operations of a list that are shown."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a history is not linearizable. `str()` gives the words."""

    key: Hashable
    """The part of the object it is about, or `models.WHOLE`."""
    culprit: Operation
    prefix: tuple[Operation, ...]
    """All that was answered before the culprit, and what they need of others, in an order that is possible."""
    quiet: int
    """How many operations were over at the last quiet moment before the culprit."""
    quiet_states: tuple[str, ...]
    """The states, in words, that they may have left behind."""
    contradiction: tuple[Operation, ...]
    """What cannot be ordered, by invocation; the culprit is among them."""
    minimal: bool
    """Whether each operation of the contradiction is known to be needed for it."""
    reasons: tuple[str, ...]
    """Why the culprit fits nowhere."""

    def __str__(self) -> str:
        end_ms = clock(self.culprit.completed_ms or 0.0)
        part = "" if self.key == WHOLE else f" on {self.key!r}"
        lines = [
            f"All that was answered{part} before {end_ms} ms has an order, and with this answer there is none:",
            f"    {self.culprit}",
            *self.reasons,
        ]
        either = _either(self.quiet_states)
        if self.quiet:
            so_far = counted(self.quiet, "operation")
            lines.append(f"When nothing was open for the last time before it, after {so_far}, {either}.")
        else:
            lines.append(f"At the beginning {either}.")
        others = [each for each in self.contradiction if each is not self.culprit]
        if others and self.minimal:
            lines.append("From there these cannot be ordered, and each one's answer is needed for that:")
        elif others:
            lines.append("From there these cannot be ordered:")
        if others:
            lines += _listed(self.contradiction)
        elif self.minimal:
            lines.append("From there its answer alone is impossible, whatever the others did.")
        if self.prefix:
            lines.append("One order of those before it:")
            lines += _listed(self.prefix)
        return "\n".join(lines)


def explain(problem: Problem, found: Found, key: Hashable) -> Explanation:
    """The explanation of a search that found nothing."""
    assert found.blocked is not None
    operations, model = problem.operations, problem.model
    culprit = operations[found.blocked]
    limit = problem.return_of[found.blocked]
    start = model.initial()
    order = search(problem, start, found.steps + 1, limit=limit - 1).order
    quiet = problem.last_quiet(found.blocked)
    starts = _configurations(found, quiet, start)
    contradiction, minimal = _contradiction(problem, found.blocked, quiet, starts)
    return Explanation(
        key=key,
        culprit=culprit,
        prefix=tuple(operations[index] for index in order),
        quiet=quiet,
        quiet_states=tuple(dict.fromkeys(model.show(state) for state, _ in starts)),
        contradiction=contradiction,
        minimal=minimal,
        reasons=tuple(_reason(model, state, culprit) for state in found.states),
    )


def _reason(model: Model, state: State, culprit: Operation) -> str:
    _, result = model.apply(state, culprit.action, culprit.arguments)
    return f"When {model.show(state)}, {culprit.call} returns {result!r}, not {culprit.result!r}."


def _configurations(found: Found, quiet: int, start: State) -> list[tuple[State, int]]:
    """The states that the first `quiet` answered operations may lead to, each with the unanswered ones used up."""
    if not quiet:
        return [(start, 0)]
    return [
        (state, used)
        for (first, behind, state), masks in found.memory.items()
        if first == quiet and not behind
        for used in masks
    ]


def _contradiction(
    problem: Problem, blocked: int, quiet: int, starts: Sequence[tuple[State, int]]
) -> tuple[tuple[Operation, ...], bool]:
    """What cannot be ordered, and whether each answer in it is known to be needed."""
    limit = problem.return_of[blocked]
    since = [index for index, event in enumerate(problem.call_of) if event < limit and problem.rank[index] >= quiet]
    since.sort(key=problem.call_of.__getitem__)
    if len(since) > FORGET_MAX or len(starts) > STARTS_MAX:
        return tuple(problem.operations[index] for index in since), False
    forgotten: set[int] = set()
    minimal = True
    for index in since:
        if index == blocked:
            continue
        verdict = _without(problem, blocked, quiet, starts, forgotten | {index})
        if verdict is Verdict.NOT_LINEARIZABLE:
            forgotten.add(index)
        elif verdict is Verdict.UNDECIDED:
            minimal = False
    return tuple(problem.operations[index] for index in since if index not in forgotten), minimal


def _without(
    problem: Problem, blocked: int, quiet: int, starts: Sequence[tuple[State, int]], forgotten: set[int]
) -> Verdict:
    """Whether the culprit can be placed if nothing is known about what became of the forgotten operations."""
    limit = problem.return_of[blocked]
    for state, used in starts:
        operations: list[Operation] = []
        for index, each in enumerate(problem.operations):
            if problem.call_of[index] > limit or problem.bits[index] & used or 0 <= problem.rank[index] < quiet:
                continue
            if index == blocked:
                new_blocked = len(operations)
            if index in forgotten:
                each = Operation(each.process, each.invoked_ms, None, each.action, each.arguments)
            operations.append(each)
        smaller = Problem(operations, problem.model)
        found = search(smaller, state, FORGET_STEPS_MAX, limit=smaller.return_of[new_blocked])
        if found.verdict is not Verdict.NOT_LINEARIZABLE:
            return found.verdict
    return Verdict.NOT_LINEARIZABLE


def _either(texts: Sequence[str]) -> str:
    more = f" (or {len(texts) - 3} more)" if len(texts) > 3 else ""
    return ", or ".join(texts[:3]) + more


def _listed(operations: Sequence[Operation]) -> list[str]:
    """Operations, one a line; of many the latest."""
    lines = [f"    {each}" for each in operations[-SHOWN_MAX:]]
    return lines if len(operations) <= SHOWN_MAX else [f"    ({len(operations) - SHOWN_MAX} before these)", *lines]
