"""Which process to end when the node runs short of memory.

Role: pure. The monitor (`raylet/memory_monitor.py`) measures and kills; here is decided when, and whom.

Rules:
- An idle worker that holds a good deal of memory goes first: nothing is lost with it.
- Then the process whose work may be repeated and that was started last: it has the least to lose, and what ran before
  it fitted. Among equals the larger one.
- Only if nothing may be repeated, the one started last of the others. Drivers and the node itself are never chosen.
- One at a time: the next is chosen when the last one is gone, since its memory comes back only then.

Rejected: the largest process first (it is often the one that has worked longest, and a small leak elsewhere would keep
killing it).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MIB, GIB = 1 << 20, 1 << 30
IDLE_BYTES_MIN = 128 << 20
"""Less than this in an idle worker is not worth its end."""
LISTED_MAX = 5


class Candidate(NamedTuple):
    """A worker process, as far as it matters here."""

    worker_id: bytes
    pid: int
    what: str
    """The task or actor class that it runs; empty when idle."""
    since_ms: float
    """When it got its present work."""
    retriable: bool
    idle: bool
    used_bytes: int


class Usage(NamedTuple):
    """Memory in use and its limit, in bytes; `where` names what the limit is of."""

    used_bytes: int
    limit_bytes: int
    where: str


def is_short(usage: Usage, threshold_percent: float) -> bool:
    """Whether memory in use has passed the threshold."""
    return usage.used_bytes * 100.0 > usage.limit_bytes * threshold_percent


def choose(candidates: Iterable[Candidate]) -> Candidate | None:
    """The process whose end costs least; None if there is none."""
    best: Candidate | None = None
    best_key: tuple[int, float, int] | None = None
    for one in candidates:
        if one.idle:
            if one.used_bytes < IDLE_BYTES_MIN:
                continue
            key = (2, float(one.used_bytes), 0)
        else:
            key = (1 if one.retriable else 0, one.since_ms, one.used_bytes)
        if best_key is None or key > best_key:
            best, best_key = one, key
    return best


def explain(usage: Usage, threshold_percent: float, victim: Candidate, candidates: Iterable[Candidate]) -> str:
    """Why this process is ended, for logs and for the exception of its work."""
    largest = sorted(candidates, key=lambda one: one.used_bytes, reverse=True)[:LISTED_MAX]
    listed = ", ".join(f"pid {one.pid} {_size(one.used_bytes)} ({one.what or 'idle'})" for one in largest)
    if victim.idle:
        chosen = "it was idle"
    elif victim.retriable:
        chosen = "of those whose work may be repeated it was started last"
    else:
        chosen = "no process has work that may be repeated, and it was started last"
    return (
        f"killed by the memory monitor: {_size(usage.used_bytes)} of {_size(usage.limit_bytes)} of {usage.where} "
        f"were in use, over the threshold of {threshold_percent:g} %; this process used {_size(victim.used_bytes)}, "
        f"and {chosen}. The largest: {listed}"
    )


def _size(size_bytes: int) -> str:
    """Exact enough that what is over a threshold of a few percent looks so."""
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= 10 * GIB else f"{size_bytes / MIB:,.0f} MiB"
