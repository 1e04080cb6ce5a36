"""The naive twin of the linearizability checker: tries all orders, one after another.

Role: pure, for tests. It is written to be seen to be right: no memory of what was tried, no parts, no bitmasks. It
takes time that grows with the factorial of the operations that overlap, so it is for a dozen of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from chaos.checkers.history import Operation
from chaos.checkers.models import Model, State


def is_linearizable(history: Iterable[Operation], model: Model) -> bool:
    """Whether there is an order of the operations that one correct object, used by one client, would have shown.

    Raises UnknownActionError.
    """
    operations = [each for each in history if not each.failed]
    for each in operations:
        model.check(each)
    return _can_go_on(operations, model, model.initial())


def _can_go_on(left: list[Operation], model: Model, state: State) -> bool:
    """Whether those that are left have an order, from this state on. Those without an answer may be left out."""
    if all(each.unknown for each in left):
        return True
    for next_one in left:
        if any(_before(each, next_one) for each in left):
            continue
        following, result = model.apply(state, next_one.action, next_one.arguments)
        if next_one.unknown or model.agrees(next_one, result):
            if _can_go_on([each for each in left if each is not next_one], model, following):
                return True
    return False


def _before(one: Operation, other: Operation) -> bool:
    return one.completed_ms is not None and one.completed_ms < other.invoked_ms
