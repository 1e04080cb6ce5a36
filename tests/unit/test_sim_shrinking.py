"""A failing run is made smaller, and what is left can be run again."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from planted import PLANTED, Planted

from ftray.cli.sim import command
from ftray.sim import schedules, shrinking
from ftray.sim.faults import LEADER, Fault
from ftray.sim.runner import CRASH, SAFETY, Outcome, faults_of, replay, run_seed
from ftray.sim.shrinking import NOT_INSTALLED, Shrinker, alike, head_of
from ftray.sim.world import Options

SEED = 3


DRAWN = faults_of(SEED, Options())
CLIENTS = Options().clients


def outcome_of(seed: int, options: Options, message: str, kind: str = SAFETY) -> Outcome:
    scheduled = DRAWN if options.schedule is None else options.schedule
    faults = [each for each in scheduled if options.only is None or each.number in options.only]
    return Outcome(seed, options, kind if message else "", message, "", 0.0, 0.01, 0, 0, faults)


Rule = Callable[[Options, list[Fault]], str]


def shrinker(monkeypatch: pytest.MonkeyPatch, rule: Rule, **limits: Any) -> tuple[Shrinker, list[str]]:
    """With runs that are not run: `rule` has the message of the failure, if it is one. And the progress it tells."""

    def run(seed: int, options: Options, *rest: Any) -> Outcome:
        outcome = outcome_of(seed, options, "", SAFETY)
        message = rule(options, outcome.faults)
        return replace(outcome, kind=SAFETY if message else "", message=message)

    monkeypatch.setattr(shrinking, "run_seed", run)
    failed = run(SEED, Options())
    assert failed.kind and len(failed.faults) > 8
    told: list[str] = []
    return Shrinker(failed, told=told.append, **limits), told


def both(first: int, second: int) -> Rule:
    return lambda options, faults: "wrong" if {first, second} <= {each.number for each in faults} else ""


def test_only_what_is_needed_is_left_at_its_simplest(monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = shrinker(monkeypatch, both(2, 5))
    found = made.run()
    assert [(each.number, each.at_ms, each.target, each.other, each.flag) for each in found.faults] == [
        (2, 0.0, 0, 0, False), (5, 0.0, 0, 0, False),
    ]  # fmt: skip
    assert {each.duration_ms for each in found.faults} == {10.0} and found.options.clients == 0
    assert found.options.seconds < Options().seconds
    assert told[-1] == f"shrinking: {len(DRAWN)} faults -> 2, {made.runs} runs"
    assert found.shrunk.endswith(f"to 2 in {made.runs} runs")


def test_times_are_made_as_round_as_the_failure_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = DRAWN[4]

    def rule(options: Options, faults: list[Fault]) -> str:
        here = [each for each in faults if each.number == 4]
        # Not before the tenth of a second in which it was, and hardly shorter.
        right = here and here[0].at_ms >= drawn.at_ms // 100 * 100 and here[0].duration_ms > 0.9 * drawn.duration_ms
        return "wrong" if right and options.clients == CLIENTS else ""

    found = shrinker(monkeypatch, rule)[0].run()
    assert [each.at_ms for each in found.faults] == [drawn.at_ms // 100 * 100]
    assert 0.9 * drawn.duration_ms < found.faults[0].duration_ms <= drawn.duration_ms
    assert (found.faults[0].kind, found.options.clients) == (drawn.kind, CLIENTS)


def test_a_schedule_that_allows_no_change_is_named_by_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(options: Options, faults: list[Fault]) -> str:
        right = {DRAWN[2], DRAWN[5]} <= set(faults) and (options.clients, options.seconds) == (CLIENTS, 6.0)
        return "wrong" if right else ""

    assert shrinker(monkeypatch, rule)[0].run().replay == "ftray sim run --seed 3 --only 2,5"


def test_one_failure_is_not_shrunk_into_another(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shrinker(
        monkeypatch, lambda options, faults: "head 1 is wrong" if len(faults) > 3 else "another defect"
    )[0].run()  # fmt: skip
    assert len(found.faults) == 4 and found.message == "head 1 is wrong"


def test_failures_are_alike_whatever_their_numbers() -> None:
    first = outcome_of(1, Options(), "tcp:head1:1 applies entry 12 of term 3, but b'key-1' was there")
    other = outcome_of(2, Options(), "tcp:head0:1 applies entry 7 of term 31, but b'k' was there\nand more")
    assert alike(first, other)
    assert not alike(first, outcome_of(1, Options(), "tcp:head1:1 lacks entry 12"))
    assert not alike(first, outcome_of(1, Options(), first.message, CRASH))
    assert head_of("AttributeError: 'X' object can't do 'y'") != head_of("AttributeError: 'X' object can't do 'z'")


def test_runs_and_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = shrinker(monkeypatch, both(2, 5), runs_max=5)
    found = made.run()
    assert made.runs == 5 and both(2, 5)(found.options, found.faults)
    assert "the search ended after 5 runs" in found.shrunk
    made, _ = shrinker(monkeypatch, both(2, 5), cpu_s_max=0.3)
    found = made.run()
    assert made.runs == 30 and {each.number for each in found.faults} == {2, 5}
    assert "the search ended after 30 runs" in found.shrunk


def test_whoever_interrupts_has_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    for last in (6, 28):  # in both parts
        made, told = shrinker(monkeypatch, both(2, 5))
        real = shrinking.run_seed

        def run(*arguments: Any, last: int = last, made: Shrinker = made, real: Any = real) -> Outcome:
            if made.runs == last:
                raise KeyboardInterrupt
            outcome: Outcome = real(*arguments)
            return outcome

        monkeypatch.setattr(shrinking, "run_seed", run)
        with pytest.raises(KeyboardInterrupt):
            made.run()
        assert len(made.result().faults) < len(DRAWN) and len(told) == last - 1
        assert both(2, 5)(made.best.options, made.best.faults)


def test_without_hypothesis_faults_are_left_out_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = shrinker(monkeypatch, both(2, 5))
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    found = made.run()
    assert found.replay == "ftray sim run --seed 3 --only 2,5"
    assert NOT_INSTALLED in str(found) and "pip install 'ftray[sim]'" in NOT_INSTALLED


# --- the command that replays a run -----------------------------------------------------------------------------------


def planted(name: str) -> Planted:
    return next(each for each in PLANTED if each.name == name)


@pytest.mark.parametrize("name", ["vote_lost_on_restart"])
def test_a_planted_defect_is_shrunk_and_replayed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = planted(name)
    each.plant(monkeypatch)
    monkeypatch.setattr(shrinking, "RUNS_MAX", 60)
    outcomes = (run_seed(seed, each.options, each.hooks) for seed in range(each.first, each.first + each.seeds_max))
    failed = next(outcome for outcome in outcomes if not outcome.ok)
    monkeypatch.chdir(tmp_path)
    words = ["run", *failed.replay.split()[3:], "--json"]
    answer = json.loads(CliRunner().invoke(command, words).output)
    (small,) = answer["failed"]
    assert small["kind"] == failed.kind and head_of(small["message"]) == head_of(failed.message)
    assert len(small["faults"]) <= 3 < len(failed.faults)
    assert Path(small["schedule_file"]).is_file()
    # As it was printed, from a shell in the same directory.
    result = CliRunner().invoke(command, ["run", *small["replay"].split()[3:], "--json", "--no-shrink"])
    (again,) = json.loads(result.output)["failed"]
    assert (again["trace"], again["message"], again["log"]) == (small["trace"], small["message"], small["log"])
    assert again["replay"] == small["replay"] and result.exit_code == 1


FAULT = Fault(7, 1234.5678901234567, "kill", LEADER, 1, 1 / 3, 0.1, True)
SETTINGS: dict[str, object] = {
    "heads": 5, "clients": 3, "nodes": 5, "faults": ("crash", "disk"), "seconds": 1.23456789012, "pause_ms": 61.5,
    "small": True, "schedule": (FAULT,), "only": (1, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", [each.name for each in fields(Options)])
def test_each_option_is_in_the_command_that_replays_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a schedule.json"
    path.write_bytes(schedules.encode((FAULT,)))
    asked: list[tuple[Any, Options]] = []
    monkeypatch.setattr("ftray.sim.batch.run_batch", lambda seeds, options, *_, **more: asked.append((seeds, options)))
    options = replace(Options(), **{name: SETTINGS[name]})  # type: ignore[arg-type]
    words = shlex.split(replay(12, options, str(path)))
    assert words[:3] == ["ftray", "sim", "run"]
    result = CliRunner().invoke(command, ["run", *words[3:]])
    assert result.exit_code == 0, result.output
    assert asked == [(range(12, 13), options)]
