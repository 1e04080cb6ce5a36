"""The simulator is tested: each planted defect is found within a bounded number of seeds."""

from __future__ import annotations

import pytest
from planted import PLANTED, Planted

from ftray.sim.runner import CRASH, LIVENESS, SAFETY, Outcome, run_seed


def search(planted: Planted, patch: pytest.MonkeyPatch) -> Outcome | None:
    """The first seed that shows the defect."""
    planted.plant(patch)
    for seed in range(planted.seeds_max):
        outcome = run_seed(seed, planted.options, planted.hooks)
        if not outcome.ok:
            return outcome
    return None


@pytest.mark.parametrize(
    "planted",
    [pytest.param(each, id=each.name, marks=[pytest.mark.slow] if each.slow else []) for each in PLANTED],
)
def test_a_planted_defect_is_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = search(planted, monkeypatch)
    assert outcome is not None, f"{planted.name} was not noticed in {planted.seeds_max} seeds"
    assert outcome.kind in (SAFETY, LIVENESS, CRASH)
    monkeypatch.undo()
    right = run_seed(outcome.seed, planted.options)
    assert right.ok, right
