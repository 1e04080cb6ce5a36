"""`python -m ftray.perf.child SYSTEM BENCHMARK COUNT BUDGET_S`: measures one benchmark on one system.

Role: shell. Prints a line of JSON for each measurement as it comes, so that what a slow system has measured until it
is stopped is not lost: a number, or for `growth-*`, of which COUNT is the size, a list. The last line is an object:
processor time by process. It is started by `runner.py`, for a system such as Ray by another interpreter that has it.

The measurement runs in a fork, and nothing that it starts outlives this process (`processes.py`).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import astuple
from typing import Any

from ftray.perf import sampling
from ftray.perf.definitions import BENCHMARKS, Benchmark
from ftray.perf.growth import GROWTH
from ftray.perf.measures import Samples, init_arguments
from ftray.perf.processes import cpu_ns, descendants, keep, process_name

PREFIX = "measured: "
"""Of the lines that count, since a system may print too."""

def run(system_name: str, name: str, count: int, budget_s: float) -> None:
    """Measures, and prints."""
    from ftray.perf.pools import PEERS

    deadline = time.monotonic() + budget_s
    benchmark = next((each for each in BENCHMARKS if each.name == name), None)
    if benchmark is not None and system_name in PEERS:
        _print_samples(PEERS[system_name][name](), count, deadline)
        return
    system: Any = importlib.import_module(system_name)
    growth = None if benchmark is not None else next(each for each in GROWTH if each.name == name)
    session = benchmark.session if benchmark is not None else growth.session if growth is not None else None
    if session is not None:
        system.init(**init_arguments(system_name, session))
    sampling.start_if_asked()  # anew: what importing `remote` has started did not survive the fork
    started = time.monotonic()
    before = _used()
    try:
        if growth is not None:
            _print(astuple(growth.measure(system, count)))
        elif benchmark is not None:
            _print_samples(benchmark.measure(system), _rounds(benchmark, count), deadline)
        elapsed_s = time.monotonic() - started
        used = {pid: (name, used - before.get(pid, ("", 0))[1]) for pid, (name, used) in _used().items()}
        _print({"elapsed_s": elapsed_s, "cpu": [[pid, name, used / 1e9] for pid, (name, used) in used.items()]})
    finally:
        system.shutdown()


def _rounds(benchmark: Benchmark, count: int) -> int:
    return 1 if benchmark.fresh else count


def _print_samples(measured: Samples, count: int, deadline: float) -> None:
    """Takes so many, but one at least, and none that would probably end after the deadline."""
    with closing(measured) as samples:
        started = time.monotonic()
        for _ in range(count):
            _print(next(samples))
            now = time.monotonic()
            if now + (now - started) > deadline:
                return
            started = now


def _used() -> dict[int, tuple[str, int]]:
    """Name and processor time of this process and all below it."""
    pids: Iterable[int] = (os.getpid(), *descendants(os.getpid()))
    return {pid: (process_name(pid), cpu_ns(pid)) for pid in pids}


def _print(value: object) -> None:
    print(PREFIX + json.dumps(value), flush=True)


def main(arguments: list[str]) -> int:
    system_name, name, count, budget_s = arguments
    return keep(lambda: run(system_name, name, int(count), float(budget_s)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
