"""The same seed and options give the same run: within a process, and in processes that hash differently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sim_plants import a_set_decides, program, the_real_clock_decides

from ftray.sim import batch
from ftray.sim.batch import run_batch
from ftray.sim.runner import NONDETERMINISM, Outcome, run_seed, run_twice
from ftray.sim.world import Options

ROOT = Path(__file__).resolve().parents[2]


class Kept:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def begun(self, seed: int) -> None: ...

    def found(self, outcome: Outcome) -> None: ...

    def shrinking(self, seed: int, text: str) -> None: ...

    def done(self, outcome: Outcome) -> bool:
        self.outcomes.append(outcome)
        return True


@pytest.mark.parametrize(
    ("heads", "small", "seeds"), [(3, False, range(5, 9)), (3, True, range(2)), (5, False, range(2)), (5, True, [4])]
)
def test_a_seed_runs_twice_in_the_same_way(heads: int, small: bool, seeds: list[int]) -> None:
    for seed in seeds:
        outcome = run_twice(seed, Options(heads=heads, seconds=3.0, small=small))
        assert outcome.ok, outcome


def test_another_seed_is_another_run() -> None:
    assert run_seed(5, Options(seconds=1.0)).trace != run_seed(6, Options(seconds=1.0)).trace


@pytest.mark.parametrize("heads", [3, 5])
def test_the_command_prints_the_same_trace_whatever_the_hashes(heads: int) -> None:
    words = ["sim", "run", "--seed", "7", "--heads", str(heads), "--seconds", "2", "--json"]
    answers = [
        json.loads(
            subprocess.run(
                [sys.executable, "-m", "ftray.cli", *words], env={**os.environ, "PYTHONHASHSEED": hash_seed}, cwd=ROOT,
                check=True, capture_output=True, text=True,
            ).stdout
        )
        for hash_seed in ("0", "4711")
    ]  # fmt: skip
    assert answers[0]["ok"] and answers[0]["trace"] == answers[1]["trace"]


def test_seeds_that_run_twice_run_in_processes_that_hash_differently() -> None:
    kept = Kept()
    run_batch(range(3), Options(seconds=1.0), kept, twice=True)
    assert sorted(each.seed for each in kept.outcomes) == [0, 1, 2] and all(each.ok for each in kept.outcomes)
    assert kept.outcomes[0].operations == 2 * run_seed(kept.outcomes[0].seed, Options(seconds=1.0)).operations


# --- planted ----------------------------------------------------------------------------------------------------------


def test_an_order_that_comes_from_a_set_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(seconds=0.5, faults=(), clients=2)
    monkeypatch.setattr(batch._Worker, "program", program("a_set_decides"))
    kept = Kept()
    run_batch([1, 2], options, kept, jobs=2, twice=True)
    assert [each.kind for each in kept.outcomes] == [NONDETERMINISM] * 2
    assert "two runs differ" in kept.outcomes[0].message
    with a_set_decides():  # which nobody can see within one process
        assert run_twice(1, options).ok


def test_the_use_of_a_real_clock_is_noticed() -> None:
    with the_real_clock_decides():
        outcome = run_twice(1, Options(seconds=0.5, faults=(), clients=2))
    assert outcome.kind == NONDETERMINISM
    assert "two runs differ" in outcome.message
