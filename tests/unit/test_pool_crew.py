"""The crew of a pool, against simple rules: each batch once at a time, in order, and none is lost whoever dies."""

from __future__ import annotations

import random

import pytest

from ftray.util.multiprocessing.crew import (
    DEATHS_MAX,
    STARTS_FAILED_MAX,
    Batch,
    Crew,
    Effect,
    Fail,
    Hire,
    Kill,
    Leave,
    Run,
)

DEATH = RuntimeError("killed")


def batch(index: int = 0) -> Batch:
    return Batch(None, index, 0, None, index)


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
    running: dict[int, Batch] = {}
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
            assert effect.number not in running and effect.number not in leaving
            running[effect.number] = effect.batch
            if not effect.batch.deaths:
                order.append(effect.batch.index)
        elif isinstance(effect, Leave):
            assert effect.number not in running
            leaving.add(effect.number)
        elif isinstance(effect, Fail):
            end(effect.batch)

    def step() -> None:
        kind = rng.random()
        if kind < 0.4 and hired:
            number = hired.pop()
            crew.started(number)
        elif kind < 0.8 and running:
            number, done = rng.choice(sorted(running.items()))
            del running[number]
            end(done)
            crew.finished(number, done)
        elif kind < 0.85 and running:
            number = rng.choice(sorted(running))
            del running[number]
            crew.died(number, DEATH)
        elif leaving:
            number = leaving.pop()
            crew.gone(number)

    for _ in range(200):
        if submitted < 40 and rng.random() < 0.5:
            crew.submit(batch(submitted))
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
