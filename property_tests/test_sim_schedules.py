"""Clusters under schedules that hypothesis draws, and what the strategies promise.

The number of runs follows the profile: `HYPOTHESIS_PROFILE=thorough` runs thousands. A failure is shrunk by
hypothesis, and its file for `ftray sim run --schedule` is printed.
"""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import find, given, note, settings
from hypothesis import strategies as st
from planted import vote_lost_on_restart

from ftray.sim import schedules, strategies
from ftray.sim.faults import KINDS
from ftray.sim.runner import replay, run_seed
from ftray.sim.world import Options

PROFILE = settings.default
RUNS = max(15, PROFILE.max_examples // 3)


@settings(max_examples=RUNS)
@given(st.integers(0, 2**20), strategies.options())
def test_a_cluster_stands_any_schedule(seed: int, options: Options) -> None:
    note(f"{replay(seed, options)}\nSCHEDULE.json:\n{schedules.encode(options.schedule or ()).decode()}")
    outcome = run_seed(seed, options)
    assert outcome.ok, outcome


@given(strategies.options(heads=(1, 2, 3, 9), seconds=(0.1, 6.0), clients_max=3))
def test_drawn_schedules_are_right_and_survive_a_file(options: Options) -> None:
    drawn = options.schedule or ()
    schedules.check(drawn, options.heads, options.clients, options.seconds * 1000.0)
    assert [each.number for each in drawn] == list(range(len(drawn)))
    assert [each.at_ms for each in drawn] == sorted(each.at_ms for each in drawn)
    assert json.loads(schedules.encode(drawn))["version"] == schedules.VERSION


@given(st.data(), strategies.options(heads=(3,), faults_max=6))
def test_what_is_tried_in_place_of_a_failure_is_simpler_and_right(data: st.DataObject, failed: Options) -> None:
    tried = data.draw(strategies.simpler(failed))
    before = {each.number: each for each in failed.schedule or ()}
    after = tried.schedule or ()
    schedules.check(after, tried.heads, tried.clients, tried.seconds * 1000.0)
    assert (tried.clients <= failed.clients, tried.seconds <= failed.seconds, tried.only) == (True, True, None)
    for fault in after:
        was = before.pop(fault.number)
        assert fault.kind == was.kind and fault.at_ms <= was.at_ms and fault.duration_ms <= was.duration_ms
        assert fault.flag <= was.flag and abs(fault.target) <= abs(was.target) and fault.other <= was.other


def test_kinds_that_were_not_asked_for_are_not_drawn() -> None:
    @settings(max_examples=20, database=None)
    @given(strategies.options(kinds=("clock",)), strategies.options(kinds=()))
    def drawn(clocks: Options, none: Options) -> None:
        assert {each.kind for each in clocks.schedule or ()} <= {name for name, _ in KINDS["clock"]}
        assert none.schedule == ()

    drawn()


def test_what_hypothesis_draws_finds_a_planted_defect_and_shrinks_to_one_fault() -> None:
    ran: list[Options] = []

    def fails(options: Options) -> bool:
        ran.append(options)
        return not run_seed(1, options).ok

    drawn = strategies.options(heads=(3,), clients_max=2, seconds=(1.0,), kinds=("crash",), faults_max=6)
    with pytest.MonkeyPatch.context() as patch:
        vote_lost_on_restart(patch)
        found = find(drawn, fails, settings=settings(max_examples=200, database=None), random=Random(1))
        outcome = run_seed(1, found)
    assert "has restarted with term" in outcome.message
    (fault,) = found.schedule or ()
    assert (fault.kind in ("kill", "power", "stop"), fault.at_ms, fault.duration_ms, found.clients) == (True, 0, 10, 0)
    assert len(ran) < 150
