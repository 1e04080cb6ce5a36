"""Linearizability: did all clients see what one object would have shown them, used by one of them at a time?

Role: pure. `check` divides the history by key, searches an order for each part (`search`), the smallest first, and
explains the first failure (`explanation`).

Rules
- The verdict is never a guess. The problem is NP-complete, so each check has a budget of steps (an operation tried in
  a place); when it runs out the verdict is UNDECIDED, unless a part was already refuted.
- Failed operations count for nothing.

Rejected: time as the budget (the same history must get the same verdict on every machine).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from chaos.checkers.explanation import Explanation, explain
from chaos.checkers.history import Operation, counted
from chaos.checkers.models import WHOLE, Model, ModelError
from chaos.checkers.search import Problem, Verdict, search

__all__ = ["STEPS_MAX", "Explanation", "Report", "Verdict", "check"]

STEPS_MAX = 500_000
"""The default budget: some seconds, and some hundred megabytes at the worst."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found out. `str()` gives it in words."""

    verdict: Verdict
    model: str
    operations: int
    parts: int
    """How many parts (keys) the history has."""
    steps: int
    explanation: Explanation | None = None
    """If it is not linearizable: why."""
    undecided: tuple[Hashable, ...] = ()
    """The parts for which the budget was too small."""
    furthest: Operation | None = None
    """In the first of these: the latest operation whose answer the search could not get past so far."""

    @property
    def ok(self) -> bool:
        """Whether it is certain that the history is linearizable."""
        return self.verdict is Verdict.LINEARIZABLE

    def __str__(self) -> str:
        parts = "" if self.parts < 2 else f", {self.parts} keys"
        size = f"{counted(self.operations, 'operation')}{parts}, {counted(self.steps, 'step')}"
        head = f"{self.verdict.value} as a {self.model} ({size})"
        if self.explanation is not None:
            return f"{head}\n{self.explanation}"
        if not self.undecided:
            return head
        keys = [each for each in self.undecided if each != WHOLE]
        lines = [head, "The budget of steps ran out: raise steps_max, or record shorter histories, or more keys."]
        if keys:
            more = "" if len(keys) <= 5 else f" and {len(keys) - 5} more"
            lines.append(f"Undecided: {', '.join(map(repr, keys[:5]))}{more}.")
        if self.furthest is not None:
            lines.append(f"It had not got past\n    {self.furthest}")
        return "\n".join(lines)


def check(history: Iterable[Operation], model: Model, *, steps_max: int = STEPS_MAX) -> Report:
    """Checks a history against a model, in at most `steps_max` steps (and a bounded number more to explain a failure).

    Raises UnknownActionError if the history has actions that the model does not know, ModelError if the model
    contradicts itself.
    """
    start = model.initial()
    try:
        hash(start)
    except TypeError:
        raise ModelError(
            f"{type(model).__name__}.initial returns {start!r}, which can't be hashed: "
            "make states of tuples, frozensets and plain values"
        ) from None
    operations = [each for each in history if not each.failed]
    for each in operations:
        model.check(each)
    parts = divide(operations, model)
    steps = 0
    undecided: list[Hashable] = []
    furthest: Operation | None = None
    for key, part in sorted(parts.items(), key=lambda item: len(item[1])):
        problem = Problem(part, model)
        found = search(problem, start, steps_max - steps)
        steps += found.steps
        if found.verdict is Verdict.NOT_LINEARIZABLE:
            why = explain(problem, found, key)
            return Report(found.verdict, model.name, len(operations), len(parts), steps, why)
        if found.verdict is Verdict.UNDECIDED:
            if not undecided and found.blocked is not None:
                furthest = part[found.blocked]
            undecided.append(key)
    verdict = Verdict.UNDECIDED if undecided else Verdict.LINEARIZABLE
    return Report(
        verdict, model.name, len(operations), len(parts), steps, undecided=tuple(undecided), furthest=furthest
    )


def divide(operations: Sequence[Operation], model: Model) -> dict[Hashable, list[Operation]]:
    """The operations by the part of the object that they touch; all together if one touches all of it."""
    parts: dict[Hashable, list[Operation]] = {}
    for each in operations:
        parts.setdefault(model.key(each), []).append(each)
    if WHOLE in parts and len(parts) > 1:
        return {WHOLE: list(operations)}
    return parts
