"""The linearizability checker against its naive twin, on histories of a simulated object; and with bugs planted in it.

Histories are drawn by a seeded generator (`histories`), many for each example, because the twin is to be asked
thousands of times; a failure prints the history.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, count, permutations
from random import Random

import pytest
from histories import mutate, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.checkers import linearizability, search
from chaos.checkers.explanation import Explanation
from chaos.checkers.history import History, Operation
from chaos.checkers.linearizability import Report, Verdict, check
from chaos.checkers.models import MODELS, WHOLE, CasRegister, FifoQueue, Model, Register
from chaos.checkers.naive import is_linearizable

seeds = st.integers(0, 2**32)
each_model = pytest.mark.parametrize("model", [made() for made in MODELS], ids=lambda model: type(model).__name__)
HISTORIES = 25
"""In each example."""


def text(history: History, report: Report | None = None) -> str:
    return "\n".join([*map(str, history), str(report)])


def small(rng: Random, model: Model) -> History:
    """A history for the twin, right or wrong."""
    history = simulate(rng, model, rng.randint(2, 6), clients=rng.randint(2, 4), lose=rng.choice((0, 0.2, 0.5)))
    for _ in range(rng.randrange(3)):
        history = mutate(rng, history)
    return history


def disagreement(seed: int, model: Model) -> History | None:
    """The first history of a seed on which checker and twin differ."""
    rng = Random(seed)
    for _ in range(HISTORIES):
        history = small(rng, model)
        if check(history, model).ok != is_linearizable(history, model):
            return history
    return None


# --- right verdicts --------------------------------------------------------------------------------------------------


@each_model
@given(seed=seeds)
@settings(max_examples=40)
def test_the_verdict_is_that_of_the_naive_twin(model: Model, seed: int) -> None:
    history = disagreement(seed, model)
    assert history is None, text(history, check(history, model))


@each_model
@given(seed=seeds)
@settings(max_examples=20)
def test_what_a_correct_object_shows_is_linearizable(model: Model, seed: int) -> None:
    rng = Random(seed)
    history = simulate(rng, model, rng.randint(0, 60), clients=rng.randint(1, 5), lose=rng.choice((0, 0.02, 0.1)))
    report = check(history, model)
    assert report.ok, text(history, report)
    assert History.from_lines(history.to_lines()) == history


@each_model
def test_what_was_changed_mostly_fails(model: Model) -> None:
    found = dict.fromkeys(Verdict, 0)
    for seed in range(50):
        rng = Random(seed)
        history = simulate(rng, model, 40, clients=3, lose=0.01, eager=0.7)
        for _ in range(4):
            history = mutate(rng, history)
        found[check(history, model).verdict] += 1
    assert found[Verdict.UNDECIDED] == 0
    assert found[Verdict.NOT_LINEARIZABLE] >= 40, found


def in_any_order(history: Sequence[Operation], model: Model) -> bool:
    """The twin's twin: all permutations of all operations that are answered and some that are not."""
    operations = [each for each in history if not each.failed]
    sure = [each for each in operations if not each.unknown]
    perhaps = [each for each in operations if each.unknown]
    for number in range(len(perhaps) + 1):
        for some in combinations(perhaps, number):
            if any(is_order(order, model) for order in permutations([*sure, *some])):
                return True
    return False


def is_order(order: Sequence[Operation], model: Model) -> bool:
    state = model.initial()
    for place, each in enumerate(order):
        if any(one.completed_ms is not None and one.completed_ms < each.invoked_ms for one in order[place + 1 :]):
            return False
        state, result = model.apply(state, each.action, each.arguments)
        if not each.unknown and not model.agrees(each, result):
            return False
    return True


@each_model
def test_the_twin_is_right_about_the_smallest(model: Model) -> None:
    verdicts = set()
    for seed in range(150):
        rng = Random(seed)
        history = mutate(rng, simulate(rng, model, 4, clients=3, lose=0.2))
        verdict = in_any_order(history.operations, model)
        assert is_linearizable(history, model) == verdict, text(history)
        verdicts.add(verdict)
    assert verdicts == {True, False}


# --- explanations ----------------------------------------------------------------------------------------------------


def failures(model: Model, seed: int) -> Iterator[tuple[list[Operation], Explanation]]:
    """Wrong histories, cut down to the part that is wrong, and why they are."""
    rng = Random(seed)
    for _ in range(HISTORIES):
        history = small(rng, model)
        why = check(history, model).explanation
        if why is not None:
            part = [each for each in history if not each.failed and why.key in (WHOLE, model.key(each))]
            yield part, why


def forgotten(each: Operation) -> Operation:
    return replace(each, completed_ms=None, result=None)


@each_model
@given(seed=seeds)
@settings(max_examples=20)
def test_explanations_are_true(model: Model, seed: int) -> None:
    for part, why in failures(model, seed):
        end_ms = why.culprit.completed_ms
        assert end_ms is not None
        said = text(History(part)) + f"\n{why}"
        # The prefix is an order, and has all that was answered before.
        assert is_order(why.prefix, model), said
        assert why.culprit not in why.prefix
        earlier = [each for each in part if each.completed_ms is not None and each.completed_ms < end_ms]
        assert all(each in why.prefix for each in earlier), said
        # The contradiction is one, and each answer in it is needed. Equal operations can't be told apart here, and the
        # twin can't leave out those that were answered later.
        assert why.culprit in why.contradiction
        late = [each for each in why.contradiction if each.completed_ms is None or each.completed_ms > end_ms]
        tied = [each for each in part if each is not why.culprit and end_ms in (each.invoked_ms, each.completed_ms)]
        if late or tied or len(set(part)) < len(part):
            continue
        assert why.minimal
        over = sorted(
            (each for each in part if each.completed_ms is not None), key=lambda each: each.invoked_ms
        )[: why.quiet]
        seen = [each for each in part if each.invoked_ms <= end_ms]
        known = [each if each in over or each in why.contradiction else forgotten(each) for each in seen]
        assert not is_linearizable(known, model), said
        for one in why.contradiction:
            if one != why.culprit:
                assert is_linearizable([forgotten(each) if each == one else each for each in known], model), said


# --- planted bugs ----------------------------------------------------------------------------------------------------


def _no_real_time(operations: Sequence[Operation]) -> list[tuple[int, bool]]:
    places = range(len(operations))
    return [(place, True) for place in places] + [
        (place, False) for place in places if operations[place].completed_ms is not None
    ]


def _answers_first(operations: Sequence[Operation]) -> list[tuple[int, bool]]:
    """At equal times, but for those of one operation."""
    return _timeline(
        [each if each.completed_ms == each.invoked_ms else replace(each, invoked_ms=each.invoked_ms + 0.5)
         for each in operations]
    )  # fmt: skip


_timeline = search.timeline


class _AnsweredOnly(search.Problem):
    def __init__(self, operations: Sequence[Operation], model: Model) -> None:
        super().__init__([each for each in operations if not each.unknown], model)


class _UnansweredInTurn(search.Problem):
    def __init__(self, operations: Sequence[Operation], model: Model) -> None:
        super().__init__(operations, model)
        self.twin = [bit >> 1 for bit in self.bits]


class _UnansweredAreOver(search.Problem):
    """Takes it that what has no answer took effect before anything that was invoked later."""

    def __init__(self, operations: Sequence[Operation], model: Model) -> None:
        last: dict[Hashable, float] = {}
        for each in operations:
            last[each.process] = each.invoked_ms
        kept = [
            each for each in operations if not (each.unknown and last[each.process] > each.invoked_ms)
        ]
        super().__init__(kept, model)


def _more_is_better(memory: search.Memory, key: search.Configuration, used: int) -> bool:
    masks = memory.setdefault(key, [])
    if any(used & ~each == 0 for each in masks):
        return True
    masks.append(used)
    return False


def _whatever_is_used_up(memory: search.Memory, key: search.Configuration, used: int) -> bool:
    return key in memory or memory.setdefault(key, [used]) != [used]


def _always_by_key(operations: Sequence[Operation], model: Model) -> dict[Hashable, list[Operation]]:
    parts: dict[Hashable, list[Operation]] = {}
    for each in operations:
        parts.setdefault(model.key(each), []).append(each)
    return parts


BUGS: dict[str, tuple[object, str, object]] = {
    "ignores real time": (search, "timeline", _no_real_time),
    "takes equal times for an order": (search, "timeline", _answers_first),
    "forgets operations without an answer": (linearizability, "Problem", _AnsweredOnly),
    "lets operations without an answer end with the client's next": (linearizability, "Problem", _UnansweredAreOver),
    "uses operations without an answer only in their order": (linearizability, "Problem", _UnansweredInTurn),
    "remembers configurations without the state": (search, "memory_key", lambda first, behind, _: (first, behind, 0)),
    "remembers configurations without the set": (search, "memory_key", lambda first, behind, state: (0, 0, state)),
    "remembers only how many leading operations are done": (
        search, "memory_key", lambda first, behind, state: (first, 0, state),
    ),
    "never reconsiders": (search, "settled", lambda *_: True),
    "takes what changes nothing here for a look": (search, "settled", lambda _, __, before, after: before == after),
    "divides what touches everything": (linearizability, "divide", _always_by_key),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_planted_in_the_checker_is_caught_by_the_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, broken = BUGS[name]
    monkeypatch.setattr(where, what, broken)
    monkeypatch.setattr(linearizability, "explain", lambda *_: None)
    assert any(disagreement(seed, made()) for seed in range(40) for made in MODELS)


# Random histories seldom show what is wrong with these two; this one does.
SCARCE = History(
    [
        Operation("a", 0, None, "get"),
        Operation("b", 1, None, "put", (2,)),
        Operation("b", 2, None, "put", (0,)),
        Operation("a", 3, 4, "get", (), 2),
        Operation("c", 5, None, "get"),
        Operation("b", 6, 7, "get", (), 0),
    ]
)


@pytest.mark.parametrize("broken", [_more_is_better, _whatever_is_used_up])
def test_it_matters_which_operations_without_an_answer_are_used_up(
    broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FifoQueue()
    assert is_linearizable(SCARCE, model)
    assert check(SCARCE, model).ok
    monkeypatch.setattr(search, "is_known", broken)
    monkeypatch.setattr(linearizability, "explain", lambda *_: None)
    assert not check(SCARCE, model).ok


# --- cost, counted ---------------------------------------------------------------------------------------------------


def test_ten_thousand_operations_of_ten_clients_take_few_steps() -> None:
    model = CasRegister()
    history = simulate(Random(1), model, 10_000, clients=10, lose=0, eager=0.4)
    assert len({each.process for each in history}) == 10
    report = check(history, model)
    assert report.ok
    assert report.steps <= 3 * len(history)
    # One impossible answer near the end is found as fast.
    operations = list(history)
    place = next(place for place in range(9_900, 10_000) if operations[place].action == "read")
    operations[place] = replace(operations[place], result=7)
    report = check(History(operations), model)
    assert report.verdict is Verdict.NOT_LINEARIZABLE
    assert report.steps <= 6 * len(history)
    assert report.explanation is not None
    assert report.explanation.culprit == operations[place]
    assert report.explanation.contradiction == (operations[place],)
    assert len(report.explanation.prefix) >= 9_900


def test_lost_answers_do_not_multiply() -> None:
    model = Register()
    values = count()
    history = simulate(
        Random(2), model, 2_000, clients=5, lose=0.1, eager=0.6,
        choose=lambda rng, _: rng.choice([("read", ()), ("write", (next(values),))]),
    )  # fmt: skip
    assert sum(each.unknown for each in history if each.action == "write") > 100
    report = check(history, model)
    assert report.ok
    assert report.steps <= 200 * len(history)
    never = Operation("late", 1e6, 1e6 + 1, "read", (), "never written")
    report = check([*history, never], model)
    assert report.verdict is Verdict.NOT_LINEARIZABLE
    assert report.steps <= 400 * len(history)
    assert report.explanation is not None
    assert report.explanation.culprit == never


def hard(number: int) -> list[Operation]:
    """Many puts at once, and two gets of a value that was put once."""
    puts = [Operation(f"p{place}", 0, 10, "put", (place,)) for place in range(number)]
    return [*puts, Operation("g", 11, 12, "get", (), 0), Operation("g", 13, 14, "get", (), 0)]


def test_the_budget_ends_a_search() -> None:
    report = check(hard(30), FifoQueue(), steps_max=1_000)
    assert (report.verdict, report.steps, report.ok) == (Verdict.UNDECIDED, 1_000, False)
    assert check(hard(4), FifoQueue()).verdict is Verdict.NOT_LINEARIZABLE


def test_deep_histories_need_no_deep_stack() -> None:
    model = Register()
    history = [Operation(number, 0, 10, "write", (number,)) for number in range(3_000)]
    assert check([*history, Operation("r", 11, 12, "read", (), 2_999)], model, steps_max=10_000).ok


