"""Without a leader, and on the way to one, any head serves watches and cached reads, and nobody is shown the past."""

from __future__ import annotations

import pytest

from ftray.sim.faults import Fault
from ftray.sim.runner import run_seed
from ftray.sim.world import Options, World

LENGTH_MS = 6_000.0


def fault(number: int, kind: str, target: int) -> Fault:
    """From shortly after the beginning to the end."""
    return Fault(number, 500.0, kind, target, 0, 2 * LENGTH_MS, 0.0, False)


class _Watched(World):
    """Notes what clients were told by heads that did not lead: in the middle of the faults, and when they end."""

    def _fault(self, fault: Fault) -> None:
        super()._fault(fault)
        self.sim.later(LENGTH_MS / 2, self._look)

    def _converge(self) -> str:
        self._look()
        self.waiting = [client.busy for client in self.clients]
        return super()._converge()

    def _look(self) -> None:
        self.counts = [*getattr(self, "counts", []), self.histories.reads_following]
        self.tellings = [*getattr(self, "tellings", []), self.histories.tellings_following]


@pytest.mark.parametrize("kind", ["kill", "power", "freeze"])
@pytest.mark.parametrize("seed", range(2))
def test_the_last_head_serves_for_as_long_as_there_is_no_leader(kind: str, seed: int) -> None:
    schedule = (fault(0, kind, 0), fault(1, kind, 1))
    world = _Watched(seed, Options(schedule=schedule, seconds=LENGTH_MS / 1000.0))
    assert world.run() == "" and not world.problems and not world.errors
    middle, end = world.counts[0], world.counts[-1]
    # A client does something every 180 ms on average, and half of that is a cached read; there are two of them.
    assert end - middle >= 5, world.counts
    assert world.tellings[-1] > world.tellings[0], world.tellings
    assert any(world.waiting)  # commands and fresh reads wait for a leader


def test_followers_serve_in_ordinary_runs_too() -> None:
    tellings = reads = 0
    for seed in range(4):
        world = World(seed, Options(faults=("crash", "cut", "freeze")))
        assert world.run() == "" and not world.problems and not world.errors
        tellings += world.histories.tellings_following
        reads += world.histories.reads_following
    assert tellings > 10 and reads > 10


def test_five_heads_and_small_limits() -> None:
    for seed in range(2):
        outcome = run_seed(seed, Options(heads=5, small=True))
        assert outcome.ok, outcome
