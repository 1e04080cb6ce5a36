"""The results of a run: what was measured of each benchmark, what fell short, and the same as JSON has it.

Role: pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftray.perf.definitions import Benchmark
from ftray.perf.figures import Figures, ratio, shown, verdict
from ftray.perf.growth import MAY_GROW, Cost, Growth, holds
from ftray.perf.sampling import Sampled

OURS = "ftray"


@dataclass(frozen=True, slots=True)
class Used:
    """Processor time of one process during a benchmark, as a share of the time that the benchmark took."""

    pid: int
    name: str
    share: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of a benchmark went."""

    used: tuple[Used, ...]
    """Busiest first, without those that did next to nothing."""
    sampled: tuple[Sampled, ...]


@dataclass(slots=True)
class Row:
    """What was measured of one benchmark."""

    benchmark: Benchmark
    figures: dict[str, Figures] = field(default_factory=dict)
    """By system, ours first."""
    errors: dict[str, str] = field(default_factory=dict)
    profile: Profile | None = None

    def ratio_to(self, system: str) -> float | None:
        """How many times better ours is; None if one of the two was not measured."""
        ours, theirs = self.figures.get(OURS), self.figures.get(system)
        if ours is None or theirs is None or system == OURS:
            return None
        return ratio(ours, theirs, self.benchmark.more_is_better)

    def target_verdict(self, system: str) -> str:
        """`ok` if the target ratio to a system is reached, `short` if not, empty without one."""
        target, reached = self.benchmark.targets.get(system), self.ratio_to(system)
        if target is None or reached is None:
            return ""
        return "ok" if reached >= target else "short"

    def limit_verdict(self) -> str:
        ours = self.figures.get(OURS)
        return "" if ours is None else verdict(ours, self.benchmark.limit)

    def shortfalls(self) -> list[str]:
        """What ours should have reached and did not, in words."""
        ours, limit = self.figures.get(OURS), self.benchmark.limit
        if ours is None:
            return ["not measured"]
        found = []
        if limit is not None and self.limit_verdict() == "short":
            sign = "≥" if limit.more_is_better else "≤"
            unit = self.benchmark.unit
            found.append(f"{shown(ours.median)} {unit} instead of {sign} {shown(limit.value)} {unit}")
        for system, target in self.benchmark.targets.items():
            reached = self.ratio_to(system)
            if reached is not None and reached < target:
                found.append(f"{shown(reached)}× {system} instead of ≥ {target:g}×")
        return found


@dataclass(slots=True)
class GrowthRow:
    """What was measured of one kind of growth, by system and size."""

    growth: Growth
    costs: dict[str, list[Cost]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def shortfalls(self) -> list[str]:
        costs = self.costs.get(OURS, [])
        if len(costs) < 2:
            return ["not measured"] if not costs else []
        if holds(costs):
            return []
        grown = costs[-1].each_us / costs[0].each_us
        return [f"one costs {grown:.1f} times as much at {costs[-1].count:,} as at {costs[0].count:,} (≤ {MAY_GROW:g})"]


def as_object(
    rows: Sequence[Row], growth: Sequence[GrowthRow], facts: Mapping[str, str], ok: bool
) -> dict[str, Any]:
    """The results as JSON has them."""
    return {
        "ok": ok,
        **facts,
        "benchmarks": [_row_object(row) for row in rows],
        "growth": [_growth_object(row) for row in growth],
    }


def _row_object(row: Row) -> dict[str, Any]:
    benchmark = row.benchmark
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "unit": benchmark.unit,
        "more_is_better": benchmark.more_is_better,
        "limit": benchmark.limit_value,
        "targets": dict(benchmark.targets),
        "verdict": row.limit_verdict(),
        "systems": {system: _figures_object(row, system, each) for system, each in row.figures.items()},
        "errors": row.errors,
    }


def _figures_object(row: Row, system: str, each: Figures) -> dict[str, Any]:
    made: dict[str, Any] = {
        "median": each.median,
        "min": each.least,
        "max": each.most,
        "samples": list(each.samples),
    }
    reached = row.ratio_to(system)
    if reached is not None:
        made |= {"ratio": reached, "verdict": row.target_verdict(system)}
    return made


def _growth_object(row: GrowthRow) -> dict[str, Any]:
    return {
        "name": row.growth.name,
        "title": row.growth.title,
        "verdict": "short" if row.shortfalls() else "ok",
        "systems": {
            system: [{"count": each.count, "us": each.each_us, "bytes": each.each_bytes} for each in costs]
            for system, costs in row.costs.items()
        },
        "errors": row.errors,
    }
