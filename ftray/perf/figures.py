"""Figures of a benchmark: the median of several measurements, and how it compares.

Role: pure. The median is what counts; the smallest and largest measurement show the noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limit:
    """What a benchmark should reach: at least `value` if more is better, else at most."""

    value: float
    more_is_better: bool

    def holds(self, measured: float) -> bool:
        return measured >= self.value if self.more_is_better else measured <= self.value


@dataclass(frozen=True, slots=True)
class Figures:
    """The measurements of one benchmark on one system, in the benchmark's unit."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)

    @property
    def most(self) -> float:
        return max(self.samples)


def figures(samples: Sequence[float]) -> Figures:
    """Raises ValueError when there is no measurement."""
    if not samples:
        raise ValueError("a benchmark needs at least one measurement")
    return Figures(tuple(samples))


def verdict(measured: Figures, limit: Limit | None) -> str:
    """`ok` if the median keeps the limit, `short` if not, empty without one."""
    if limit is None:
        return ""
    return "ok" if limit.holds(measured.median) else "short"


def ratio(ours: Figures, theirs: Figures, more_is_better: bool) -> float:
    """How many times better our median is; below 1 it is worse."""
    better, worse = (ours.median, theirs.median) if more_is_better else (theirs.median, ours.median)
    return better / worse if worse else float("inf")


def shown(value: float) -> str:
    """A figure with three significant digits, thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 10 or value == 0 else f"{value:.2f}"
