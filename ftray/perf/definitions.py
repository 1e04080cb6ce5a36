"""What is measured: the table of all benchmarks, with what each should reach.

Role: definitions. How they measure is in `measures.py`. Two kinds of bounds: a limit in the benchmark's own unit, which
depends on the machine, and targets, which are ratios to another system that was measured in the same run.

Rejected: the same session for all benchmarks (what one leaves behind would be measured by the next).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftray.perf import gcs
from ftray.perf import measures as m
from ftray.perf.figures import Limit

EXECUTOR, POOL, MEMCPY = "ProcessPoolExecutor", "multiprocessing.Pool", "memcpy"
"""Systems that need no installation, see `pools.py`."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark. `session` has the arguments of `init`; None if the benchmark starts its own."""

    name: str
    title: str
    unit: str
    measure: m.Measure
    more_is_better: bool = True
    limit_value: float | None = None
    targets: Mapping[str, float] = field(default_factory=dict)
    """System -> how many times better than it we should be."""
    rounds: int = 5
    session: Mapping[str, Any] | None = field(default_factory=lambda: {"num_cpus": 2})
    fresh: bool = False
    """Each measurement in a process of its own."""
    timeout_s: float = 120.0

    @property
    def limit(self) -> Limit | None:
        return None if self.limit_value is None else Limit(self.limit_value, self.more_is_better)


def ray(least: float, **others: float) -> dict[str, float]:
    """Targets: so many times better than Ray."""
    return {"ray": least, **others}


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("import", "import", "ms", m.import_time, False, 150, session=None),
    Benchmark("init", "init() to the first result", "ms", m.start, False, 400, ray(10), session=None),
    Benchmark("shutdown", "shutdown()", "ms", m.stop, False, None, ray(10), session=None),
    Benchmark("idle", "idle session, of a core", "%", m.idle, False, 1.0, rounds=3),
    Benchmark("tasks-sync", "tasks, one by one", "/s", m.tasks_sync, True, 4_000, ray(8, **{EXECUTOR: 1, POOL: 1})),
    Benchmark(
        "tasks-1000", "tasks, 1,000 in flight", "/s", m.tasks_in_flight, True, 20_000,
        ray(20, **{EXECUTOR: 1, POOL: 1}),
    ),
    Benchmark("tasks-actors", "tasks of four submitting actors", "/s", m.tasks_of_actors, True, None, ray(10)),
    Benchmark("mixed", "1 s and 1 ms tasks mixed, of the ideal", "×", m.mixed, False, 1.1, rounds=3),
    Benchmark("calls-sync", "actor calls, one by one", "/s", m.calls_sync, True, 4_000, ray(4)),
    Benchmark("calls-1000", "actor calls, 1,000 in flight", "/s", m.calls_in_flight, True, 20_000, ray(8)),
    Benchmark("calls-put", "n:n actor calls with a put argument", "/s", m.calls_with_put, True, None, ray(8)),
    Benchmark("async-calls-sync", "async calls, one by one", "/s", m.async_calls_sync, True, None, ray(4)),
    Benchmark("async-calls-1000", "async calls, 1,000 in flight", "/s", m.async_calls_in_flight, True, None, ray(10)),
    Benchmark("put-small", "put of a small value", "/s", m.put_small, True, None, ray(50)),
    Benchmark("get-small", "get of a small value", "/s", m.get_small, True, None, ray(20)),
    Benchmark(
        "put-100mb-first", "put of 100 MB, fresh store", "GB/s", m.put_first, True, None, ray(1), rounds=3, fresh=True
    ),
    Benchmark("put-100mb", "put of 100 MB, warm", "GB/s", m.put_large, True, None, {MEMCPY: 0.6}),
    Benchmark("get-80mb", "get of 80 MB", "ms", m.get_large, False, None, ray(1)),
    Benchmark("wait-1000", "wait for 1,000 refs, one by one", "/s", m.wait_one_by_one, True, None, ray(20)),
    Benchmark("refs-inside", "get of an object with 10,000 refs", "/s", m.get_refs_inside, True, None, ray(4)),
    Benchmark("args-10000", "task with 10,000 object arguments", "ms", m.many_arguments, False, None, ray(20)),
    Benchmark("returns-3000", "task with 3,000 returns", "ms", m.many_returns, False, None, ray(5)),
    Benchmark("get-10000", "get of 10,000 objects", "ms", m.get_many, False, None, ray(10)),
    Benchmark("retry", "task's retry after SIGKILL", "ms", m.retry, False, 30, rounds=30),
    Benchmark("restart", "actor's restart after SIGKILL", "ms", m.restart, False, 50, rounds=30),
    Benchmark("actors-20", "20 actors made and called", "ms", m.actors_made, False, None, ray(20)),
    Benchmark(
        "bytes-per-ref", "memory per waiting task", "bytes", m.bytes_per_ref, False, 1_024, rounds=2,
        session={"num_cpus": 2, "resources": {"gate": 1}}, fresh=True,
    ),
    Benchmark("gcs-write", "write to three heads, one by one", "ms", gcs.write_latency, False, 1.5, session=None),
    Benchmark(
        "gcs-writes", "writes to three heads, 64 in flight", "/s", gcs.writes_in_flight, True, 5_000, session=None,
    ),
    Benchmark("gcs-reads", "fresh reads from three heads", "/s", gcs.reads_in_flight, True, 10_000, session=None),
    Benchmark(
        "gcs-failover", "write after the leader's SIGKILL", "ms", gcs.leader_killed, False, 50, rounds=20, session=None,
    ),
    Benchmark(
        "gcs-frozen", "write after the leader's SIGSTOP", "ms", gcs.leader_frozen, False, 600, rounds=5, session=None,
    ),
    Benchmark(
        "gcs-restart", "restart of a head with 100,000 entries", "ms", gcs.head_restarted, False, 2_000,
        session=None,
    ),
    Benchmark("gcs-idle-leader", "idle head that leads, of a core", "%", gcs.idle_leader, False, 2.5, session=None),
    Benchmark("gcs-idle", "idle head that follows, of a core", "%", gcs.idle_follower, False, 1.5, session=None),
)  # fmt: skip
"""In the order in which they are run and shown."""
