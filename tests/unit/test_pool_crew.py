"""The crew of a pool by simple rules: no batch is at two workers, none is lost whoever dies, and order is kept."""

from __future__ import annotations

import random

import pytest

from ftray.util.multiprocessing.crew import (
    AHEAD_MAX,
    AHEAD_US,
    DEATHS_MAX,
    STARTS_FAILED_MAX,
    Batch,
    Crew,
    Effect,
    Fail,
    Function,
    Hire,
    Kill,
    Leave,
    Run,
)

DEATH = RuntimeError("killed")


def batch(index: int = 0, function: Function | None = None) -> Batch:
    return Batch(None, index, 0, function or Function(None, True), index)


def known(item_us: float) -> Function:
    function = Function(None, True)
    function.item_us = item_us
    return function


def crew_of(size: int, batches_max: int | None = None) -> Crew:
    crew = Crew(size, batches_max)
    hired = [effect.number for effect in crew.take_effects() if isinstance(effect, Hire)]
    assert len(hired) == size
    for number in hired:
        crew.started(number)
    return crew


def runs(crew: Crew) -> list[tuple[int, int]]:
    return [(effect.number, effect.batch.index) for effect in crew.take_effects() if isinstance(effect, Run)]


def test_batches_run_in_order_one_for_each_worker() -> None:
    crew = crew_of(2)
    batches = [batch(index) for index in range(4)]
    for each in batches:
        crew.submit(each)
    assert runs(crew) == [(1, 0), (2, 1)]
    crew.finished(2, batches[1])
    assert runs(crew) == [(2, 2)]
    crew.finished(2, batches[1])  # said again: it has another batch by now
    assert runs(crew) == []
    crew.finished(1, batches[0])
    assert runs(crew) == [(1, 3)]


def test_short_ones_go_ahead_as_far_as_they_are_expected_to_be_short() -> None:
    crew = crew_of(2)
    function = known(AHEAD_US / 4)
    batches = [batch(index, function) for index in range(20)]
    for each in batches:
        crew.submit(each)
    assert runs(crew) == [(1, 0), (2, 1), (1, 2), (2, 3), (1, 4), (2, 5), (1, 6), (2, 7)]
    crew.finished(1, batches[0])
    assert runs(crew) == [(1, 8)]
    unknown = crew_of(1)
    for index in range(3):
        unknown.submit(batch(index))
    assert runs(unknown) == [(1, 0)]
    tiny = crew_of(1)
    for index in range(1000):
        tiny.submit(batch(index, known(1.0)))
    assert len(runs(tiny)) == AHEAD_MAX


def test_what_is_behind_a_long_one_comes_back_in_order() -> None:
    crew = crew_of(2)
    function = known(1.0)
    batches = [batch(index, function) for index in range(8)]
    for each in batches:
        crew.submit(each)
    assert [index for number, index in runs(crew) if number == 1] == [0, 2, 4, 6]
    late = batch(8, known(1e9))
    crew.submit(late)
    for index in (2, 4, 6):
        crew.handed_back(1, batches[index])
    assert function.item_us == AHEAD_US
    assert runs(crew) == []  # it is not thought to be short any more
    crew.handed_back(1, batches[2])  # said again
    for index in (1, 3, 5, 7):
        crew.finished(2, batches[index])
    assert runs(crew) == [(2, 2)]
    assert [each.index for each in crew.pending] == [4, 6, 8]


def test_how_long_calls_take_is_learnt() -> None:
    crew = crew_of(1)
    function = Function(None, True)
    ten = Batch(None, 0, 0, function, None, 10)
    crew.measured(ten, 1_000.0)
    assert function.item_us == 100.0
    crew.measured(ten, 1_080.0)
    assert function.item_us == 101.0
    crew.measured(ten, 50_000.0)
    assert function.item_us == 5_000.0


def test_a_killer_convicts_itself() -> None:
    crew = crew_of(1)
    function = known(1.0)
    batches = [batch(index, function) for index in range(3)]  # the last one kills
    for each in batches:
        crew.submit(each)
    number, rest, alive = 1, set(range(3)), 3
    while alive:
        sent = [index for _, index in runs(crew)]
        if 2 in sent:
            crew.died(number, DEATH)
            effects = crew.take_effects()
            alive -= Fail(batches[2], DEATH) in effects
            rest -= {effect.batch.index for effect in effects if isinstance(effect, Fail)}
            if Hire(number + 1) in effects:
                number += 1
                crew.started(number)
        else:
            assert len(sent) == 1  # alone, after the first death
            crew.finished(number, batches[sent[0]])
            rest.discard(sent[0])
            alive -= 1
    assert not rest
    assert [each.deaths for each in batches] == [1, 0, DEATHS_MAX + 1]


def test_a_batch_waits_for_a_worker_that_has_started() -> None:
    crew = Crew(1)
    crew.submit(batch())
    assert crew.take_effects() == [Hire(1)]
    crew.started(1)
    assert runs(crew) == [(1, 0)]


def test_a_lost_batch_goes_first_on_another_worker_and_fails_in_the_end() -> None:
    crew = crew_of(1)
    killer, other = batch(0), batch(1)
    crew.submit(killer)
    crew.submit(other)
    number = 1
    for _ in range(DEATHS_MAX):
        crew.take_effects()
        crew.died(number, DEATH)
        assert crew.take_effects() == [Hire(number + 1)]
        number += 1
        crew.started(number)
        assert [index for _, index in runs(crew)] == [0]
    crew.died(number, DEATH)
    effects = crew.take_effects()
    assert Fail(killer, DEATH) in effects and Hire(number + 1) in effects
    crew.started(number + 1)
    assert runs(crew) == [(number + 1, 1)]


def test_an_idle_worker_that_dies_is_replaced_and_gets_nothing() -> None:
    crew = crew_of(2)
    crew.died(1, DEATH)
    assert crew.take_effects() == [Hire(3)]
    crew.submit(batch(0))
    crew.submit(batch(1))
    assert runs(crew) == [(2, 0)]
    crew.started(3)
    assert runs(crew) == [(3, 1)]


def test_a_worker_leaves_after_its_last_batch() -> None:
    crew = crew_of(1, batches_max=1)
    first = batch(0)
    crew.submit(first)
    crew.submit(batch(1))
    crew.take_effects()
    crew.finished(1, first)
    assert crew.take_effects() == [Leave(1), Hire(2)]
    crew.started(2)
    assert runs(crew) == [(2, 1)]


def test_close_finishes_the_work_and_lets_everybody_leave() -> None:
    crew = crew_of(2)
    one, two, three = batch(0), batch(1), batch(2)
    crew.feeds = 1
    for each in (one, two):
        crew.submit(each)
    crew.take_effects()
    crew.close()
    crew.finished(1, one)
    assert crew.take_effects() == []  # a feed may have more
    crew.submit(three)
    crew.feed_ended()
    assert runs(crew) == [(1, 2)]
    crew.finished(2, two)
    crew.finished(1, three)
    assert sorted(effect.number for effect in crew.take_effects() if isinstance(effect, Leave)) == [1, 2]
    crew.gone(1)
    assert not crew.over
    crew.died(2, DEATH)  # also a way to leave
    assert crew.over and crew.take_effects() == []


def test_without_a_worker_that_starts_everything_fails() -> None:
    crew = Crew(1)
    waiting = batch()
    crew.submit(waiting)
    for number in range(1, STARTS_FAILED_MAX + 1):
        crew.take_effects()
        crew.died(number, DEATH)
    assert crew.take_effects() == [Hire(STARTS_FAILED_MAX + 1)]
    crew.died(STARTS_FAILED_MAX + 1, DEATH)
    assert crew.take_effects() == [Fail(waiting, DEATH)]
    late = batch()
    crew.submit(late)
    assert crew.take_effects() == [Fail(late, DEATH)]


def test_terminate_drops_what_runs_and_what_waits() -> None:
    crew = crew_of(1)
    running, waiting = batch(0), batch(1)
    crew.submit(running)
    crew.submit(waiting)
    crew.take_effects()
    crew.terminate(DEATH)
    assert set(crew.take_effects()) == {Kill(1), Fail(running, DEATH), Fail(waiting, DEATH)}
    assert crew.over
    crew.finished(1, running)
    crew.died(1, DEATH)
    assert crew.take_effects() == []


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_each_batch_has_one_end(seed: int) -> None:
    rng = random.Random(seed)
    crew = Crew(rng.randint(1, 4), rng.choice([None, 1, 3]))
    hired: set[int] = set()
    functions = [Function(None, True), known(1.0), known(AHEAD_US / 3)]
    running: dict[int, list[Batch]] = {}
    leaving: set[int] = set()
    ends: dict[int, int] = {}
    order: list[int] = []
    submitted = 0

    def end(done: Batch) -> None:
        ends[done.index] = ends.get(done.index, 0) + 1

    def carry_out(effect: Effect) -> None:
        if isinstance(effect, Hire):
            hired.add(effect.number)
        elif isinstance(effect, Run):
            queue = running.setdefault(effect.number, [])
            assert effect.number not in leaving
            assert not any(effect.batch in other for other in running.values())
            assert not queue or not (effect.batch.solo or any(each.solo for each in queue))
            queue.append(effect.batch)
            if effect.batch.index not in order:
                order.append(effect.batch.index)
        elif isinstance(effect, Leave):
            assert not running.get(effect.number)
            leaving.add(effect.number)
        elif isinstance(effect, Fail):
            end(effect.batch)

    def step() -> None:
        kind = rng.random()
        busy = sorted(number for number, queue in running.items() if queue)
        if kind < 0.4 and hired:
            number = hired.pop()
            crew.started(number)
        elif kind < 0.7 and busy:
            number = rng.choice(busy)
            done = running[number].pop(0)
            end(done)
            crew.finished(number, done)
            crew.measured(done, rng.choice([0.5, 10.0, 3 * AHEAD_US]))
        elif kind < 0.8 and busy:
            number = rng.choice(busy)
            queued, running[number] = running[number][1:], running[number][:1]
            for each in queued:
                crew.handed_back(number, each)
        elif kind < 0.85 and busy:
            number = rng.choice(busy)
            del running[number]
            crew.died(number, DEATH)
        elif leaving:
            number = leaving.pop()
            crew.gone(number)

    for _ in range(200):
        if submitted < 40 and rng.random() < 0.5:
            crew.submit(batch(submitted, rng.choice(functions)))
            submitted += 1
        step()
        for effect in crew.take_effects():
            carry_out(effect)
    crew.close()
    for _ in range(5000):
        for effect in crew.take_effects():
            carry_out(effect)
        if crew.over:
            break
        step()
    assert crew.over
    assert ends == dict.fromkeys(range(submitted), 1)
    assert order == sorted(order)
