"""Does the cost of one grow with how many there are? The same at 1x, 10x and 100x outstanding tasks, objects, actors.

Role: the definitions, and whether the costs hold. Standard library only, as in `measures.py`, and the same code for all
systems.

Rules: all of them exist at the same time: tasks wait at a gate that opens when the last is submitted, objects are kept
until all are read, actors until all have answered. The time is that of making, using and releasing all of them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftray.perf import remote
from ftray.perf.measures import resident_bytes

MAY_GROW = 1.5
"""How much more one may cost at the largest size than at the smallest: room for caches that no longer suffice."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one of `count` has cost: time, and resident memory of the driver while all were there."""

    count: int
    each_us: float
    each_bytes: float


@dataclass(frozen=True, slots=True)
class Growth:
    """One thing to have many of."""

    name: str
    title: str
    sizes: tuple[int, int, int]
    measure: Callable[[Any, int], Cost]
    session: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 2, "resources": {"gate": 2}})
    timeout_s: float = 120.0


def holds(costs: Sequence[Cost]) -> bool:
    """Whether one costs about as much at the largest size as at the smallest."""
    return costs[-1].each_us <= MAY_GROW * costs[0].each_us


def tasks(system: Any, count: int) -> Cost:
    """Submits them while an actor holds what they need, ends the actor, and gets all results."""
    gate = system.remote(num_cpus=0, resources={"gate": 2})(remote.Counter).remote()
    system.get(gate.nothing.remote())
    task = system.remote(num_cpus=0, resources={"gate": 1})(remote.nothing)
    before = _settled_bytes()
    started = time.perf_counter()
    refs = [task.remote() for _ in range(count)]
    submitted_s = time.perf_counter() - started
    grown = _settled_bytes() - before
    started = time.perf_counter()
    system.kill(gate)
    values = system.get(refs)
    del refs
    rest_s = time.perf_counter() - started
    assert len(values) == count and all(value == b"ok" for value in values)
    return Cost(count, (submitted_s + rest_s) / count * 1e6, grown / count)


def objects(system: Any, count: int) -> Cost:
    put = system.put
    before = _settled_bytes()
    started = time.perf_counter()
    refs = [put(number) for number in range(count)]
    made_s = time.perf_counter() - started
    grown = _settled_bytes() - before
    started = time.perf_counter()
    values = system.get(refs)
    del refs
    rest_s = time.perf_counter() - started
    assert values == list(range(count))
    return Cost(count, (made_s + rest_s) / count * 1e6, grown / count)


def actors(system: Any, count: int) -> Cost:
    cls = system.remote(num_cpus=0)(remote.Counter)
    before = _settled_bytes()
    started = time.perf_counter()
    made = [cls.remote() for _ in range(count)]
    pids = system.get([actor.pid.remote() for actor in made])
    made_s = time.perf_counter() - started
    grown = _settled_bytes() - before
    assert len(set(pids)) == count
    del made
    return Cost(count, made_s / count * 1e6, grown / count)


def _settled_bytes() -> int:
    gc.collect()
    return resident_bytes()


GROWTH: tuple[Growth, ...] = (
    Growth("growth-tasks", "tasks that wait, then run", (10_000, 100_000, 1_000_000), tasks),
    Growth("growth-objects", "small objects put, read, released", (10_000, 100_000, 1_000_000), objects),
    Growth("growth-actors", "actors made and called", (10, 100, 1_000), actors),
)
