"""The search for an order: Wing and Gong's, with Lowe's memory of what was tried.

Role: pure. A *configuration* is what an order so far amounts to: the set of operations in it, and the state they lead
to. From each one, the search goes on with any operation that was invoked before the first answer that is still to be
placed. When none fits, it goes back. A history of n operations that overlap little takes about n steps.

What keeps it small, and why it is right
- *Memory*: two orders with equal configurations have equal futures, so a configuration is entered once. The set is
  kept as the count of leading operations that are all in it (by invocation) and a bitmask of those behind: as wide as
  operations overlap, not as the history is long.
- *Operations without an answer* may be left out. They are tried after all others have been, the latest first: most of
  them explain nothing. With the same operations done and the same state, an order that used up fewer of them can do all
  that one that used up more can (dominance). One that changes nothing is never needed, nor one whose effect the next
  unanswered one wipes out. One that itself wipes out the state (a write) is tried only if something that could not come
  without it may come right after it, as the model's hints tell. Of equal ones, the earliest goes first.
- *What only looks goes at once*: an operation that with its result can never change anything (a read, a refused
  compare-and-set) can be moved to here from any later place of any order, if it fits here. No alternative is tried.

Rejected: recursion (histories are longer than the stack is deep); one bitmask over the whole history (10,000
configurations of 10,000 bits); a step limit inside the models (they are the user's).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from chaos.checkers.history import Operation
from chaos.checkers.models import ANY, Model, ModelError, State

DEAD_ENDS_MAX = 4
"""How many states are kept of those in which the furthest answer could not be placed."""


class Verdict(Enum):
    """What a check found out."""

    LINEARIZABLE = "linearizable"
    NOT_LINEARIZABLE = "not linearizable"
    UNDECIDED = "undecided"
    """The budget of steps ran out."""


@dataclass(slots=True)
class Found:
    """What a search came to."""

    verdict: Verdict
    steps: int
    """How often an operation was tried in a place."""
    order: list[int]
    """The operations in the order found; if there is none, empty."""
    blocked: int | None = None
    """The operation whose answer no order could get past, of all such the one that was answered last."""
    states: list[State] = field(default_factory=list)
    """Some of the states in which it could not be placed."""
    memory: Memory = field(default_factory=dict)


Configuration: TypeAlias = tuple[int, int, State]
Memory: TypeAlias = dict[Configuration, list[int]]
"""Configurations that were entered: for each one without its unanswered operations, the bitmasks of those used up."""


def timeline(operations: Sequence[Operation]) -> list[tuple[int, bool]]:
    """The ends of the operations in time: (index, whether it is the invocation). At equal times invocations lead."""
    events = []
    for index, each in enumerate(operations):
        events.append((each.invoked_ms, 0, index))
        if each.completed_ms is not None:
            events.append((each.completed_ms, 1, index))
    events.sort()
    return [(index, not end) for _, end, index in events]


def memory_key(first: int, behind: int, state: State) -> Configuration:
    """A configuration without its unanswered operations: all the first ones are in it, and those in the mask behind."""
    return first, behind, state


def is_known(memory: Memory, key: Configuration, used: int) -> bool:
    """Whether a configuration, or one that can do at least as much, was entered. If not, it is now."""
    masks = memory.get(key)
    if masks is None:
        memory[key] = [used]
        return False
    for each in masks:
        if each & ~used == 0:
            return True
    masks[:] = [each for each in masks if used & ~each]
    masks.append(used)
    return False


def settled(model: Model, operation: Operation, state: State, following: State) -> bool:
    """Whether an operation that fits can go at once, so that nothing else has to be tried in its place.

    That it changes nothing *here* is not enough: a write of the value that is there already may be needed later.
    """
    looks = model.only_looks(operation)
    if looks and state != following:
        raise ModelError(
            f"{type(model).__name__}.only_looks says that {operation} changes nothing, but when {model.show(state)}, "
            "apply changes the state: correct the model"
        )
    return looks


class Problem:
    """Operations that are to be put in an order. None of them has failed.

    Answered operations have ranks, and unanswered ones bits, both by invocation.
    """

    __slots__ = (
        "answered", "bits", "call_of", "invocations", "is_call", "leaves", "leaving", "model", "needs", "of_event",
        "operations", "rank", "return_of", "twin", "unanswered", "wiping",
    )  # fmt: skip

    def __init__(self, operations: Sequence[Operation], model: Model) -> None:
        self.operations = operations
        self.model = model
        # Event 0 is the head of the list of events.
        self.of_event = [-1]
        self.is_call = [True]
        self.call_of = [0] * len(operations)
        self.return_of = [0] * len(operations)
        self.rank = [-1] * len(operations)
        self.answered: list[int] = []
        self.unanswered: list[int] = []
        self.invocations: list[int] = []
        """Events at which the unanswered were invoked, in order."""
        self.bits = [0] * len(operations)
        self.twin = [0] * len(operations)
        """For an unanswered operation, the bit of the latest equal one before it."""
        self.leaves = [model.leaves(each) for each in operations]
        self.leaving: dict[State, list[int]] = {}
        """The places of the unanswered operations that leave a state, whatever it was before."""
        self.wiping = 0
        """The bits of all these."""
        self.needs = [ANY if each.completed_ms is None else model.needs(each) for each in operations]
        equal: dict[Hashable, int] = {}
        for event, (index, call) in enumerate(timeline(operations), 1):
            each = operations[index]
            if call and each.completed_ms is None and model.only_looks(each):
                self.call_of[index] = event
            elif call and each.completed_ms is None:
                self.call_of[index] = event
                self.bits[index] = bit = 1 << len(self.unanswered)
                self.twin[index] = equal.get((each.action, each.arguments), 0)
                equal[each.action, each.arguments] = bit
                if self.leaves[index] is not ANY:
                    self.leaving.setdefault(self.leaves[index], []).append(len(self.unanswered))
                    self.wiping |= bit
                self.unanswered.append(index)
                self.invocations.append(event)
            elif call:
                self.call_of[index] = event
                self.rank[index] = len(self.answered)
                self.answered.append(index)
            else:
                self.return_of[index] = event
            self.of_event.append(index)
            self.is_call.append(call)

    def links(self) -> Iterator[int]:
        """The events that the search walks over: those of answered operations."""
        return (event for event in range(1, len(self.of_event)) if self.rank[self.of_event[event]] >= 0)

    def last_quiet(self, operation: int) -> int:
        """How many answered operations were over at the last moment before this one's when none was open."""
        quiet = began = ended = 0
        for event in range(1, self.call_of[operation] + 1):
            if self.rank[self.of_event[event]] < 0:
                continue
            if self.is_call[event]:
                if began == ended:
                    quiet = ended
                began += 1
            else:
                ended += 1
        return quiet


class _Walk:
    """The answered operations that are not in the order yet, as a linked list of their ends in time."""

    __slots__ = ("after", "before", "problem")

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.after, self.before = [0] * len(problem.of_event), [0] * len(problem.of_event)
        last = 0
        for event in problem.links():
            self.after[last], self.before[event] = event, last
            last = event
        self.before[0] = last

    def take(self, index: int) -> None:
        after, before = self.after, self.before
        for event in (self.problem.call_of[index], self.problem.return_of[index]):
            ahead, back = after[event], before[event]
            after[back], before[ahead] = ahead, back

    def give_back(self, index: int) -> None:
        """Undoes the latest `take`."""
        after, before = self.after, self.before
        for event in (self.problem.return_of[index], self.problem.call_of[index]):
            after[before[event]] = before[after[event]] = event

    def first_return(self) -> int:
        event = self.after[0]
        while self.problem.is_call[event]:
            event = self.after[event]
        return event

    def choices(self, state: State, used: int, after_unanswered: bool) -> Iterator[int]:
        """What may come next: everything invoked before the first answer, the unanswered after all others.

        It may be left and resumed, when the list is as it was. The arguments say where the search stands, and whether
        the last operation of the order has no answer.
        """
        problem, after = self.problem, self.after
        event = after[0]
        while problem.is_call[event]:
            yield problem.of_event[event]
            event = after[event]
        count = bisect_left(problem.invocations, event)
        fresh = ((1 << count) - 1) & ~used
        if not fresh:
            return
        # One that wipes out the state is of use if the next one is unanswered too and does not, or if it is
        # an answered one that does not come to the same without it.
        places: Iterable[int] = range(count)
        if fresh & problem.wiping == fresh:
            if after_unanswered:
                return
            needed = self._needed(state)
            if needed is not None:
                places = sorted(place for each in needed for place in problem.leaving.get(each, ()) if place < count)
        for place in reversed([place for place in places if fresh >> place & 1]):
            if not (after_unanswered and problem.wiping >> place & 1):
                yield problem.unanswered[place]

    def _needed(self, state: State) -> set[State] | None:
        """The states that an unanswered operation would have to leave, so that an answered one fits; None: any."""
        problem, event = self.problem, self.after[0]
        needed = set()
        while problem.is_call[event]:
            index = problem.of_event[event]
            if problem.needs[index] is not ANY:
                needed.add(problem.needs[index])
            elif problem.leaves[index] is ANY:
                return None
            else:
                operation = problem.operations[index]
                _, result = problem.model.apply(state, operation.action, operation.arguments)
                if not problem.model.agrees(operation, result):
                    return None
            event = self.after[event]
        return needed


def search(problem: Problem, start: State, steps_max: int, used: int = 0, limit: int | None = None) -> Found:
    """Looks for an order from a state on, with some unanswered operations used up already.

    With `limit`, an order is enough that has all that was answered until that event.
    """
    operations, model, walk = problem.operations, problem.model, _Walk(problem)
    rank, bits, twin, return_of = problem.rank, problem.bits, problem.twin, problem.return_of
    if limit is None:
        limit = len(problem.of_event)
    left = sum(return_of[index] <= limit for index in problem.answered)

    memory: Memory = {}
    is_known(memory, memory_key(0, 0, start), used)
    # Where the search stands: operations of ranks below `first` are all in the order, and of those from `first` on
    # the ones in `behind`.
    state, first, behind = start, 0, 0
    path: list[tuple[int, State, int, int, int, bool, Iterator[int]]] = []
    steps = furthest = 0
    states: list[State] = []
    choices = walk.choices(state, used, False)

    while left:
        entered = in_vain = False
        for index in choices:
            bit = bits[index]
            if twin[index] & ~used:
                continue
            if steps >= steps_max:
                return Found(Verdict.UNDECIDED, steps, [], problem.of_event[furthest] if furthest else None, states)
            steps += 1
            operation = operations[index]
            following, result = model.apply(state, operation.action, operation.arguments)
            # Without an answer, only what it does to the state counts.
            if state == following if bit else not model.agrees(operation, result):
                continue
            if bit and path and bits[path[-1][0]]:
                if model.apply(path[-1][1], operation.action, operation.arguments)[0] == following:
                    continue  # the unanswered one before it would have been for nothing
            first_then, behind_then = first, behind
            if not bit:
                behind_then |= 1 << (rank[index] - first)
                while behind_then & 1:
                    behind_then >>= 1
                    first_then += 1
            forced = not bit and settled(model, operation, state, following)
            if is_known(memory, memory_key(first_then, behind_then, following), used | bit):
                if forced:
                    in_vain = True  # all that could be done from here was tried from there
                    break
                continue
            path.append((index, state, first, behind, used, forced, choices))
            state, first, behind, used = following, first_then, behind_then, used | bit
            if not bit:
                left -= return_of[index] <= limit
                walk.take(index)
            choices = walk.choices(state, used, bit > 0)
            entered = True
            break
        if entered:
            continue
        if not in_vain:
            event = walk.first_return()
            if event > furthest:
                furthest, states = event, []
            if event == furthest and len(states) < DEAD_ENDS_MAX and state not in states:
                states.append(state)
        forced = True
        while forced:
            if not path:
                return Found(Verdict.NOT_LINEARIZABLE, steps, [], problem.of_event[furthest], states, memory)
            index, state, first, behind, used, forced, choices = path.pop()
            if not bits[index]:
                left += return_of[index] <= limit
                walk.give_back(index)
    return Found(Verdict.LINEARIZABLE, steps, [step[0] for step in path], memory=memory)
