"""`python -m ftray.perf.child SYSTEM BENCHMARK ROUNDS`: measures one benchmark on one system, in this process.

Role: shell. Prints one line of JSON: the list of measurements. It is started by `microbenchmark`, for a system such as
Ray by another interpreter that has it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from contextlib import closing
from typing import Any

from ftray.perf.definitions import BENCHMARKS, Benchmark

OTHER_ARGUMENTS = {"ray": {"include_dashboard": False, "logging_level": "ERROR"}}
"""What else `init` of another system is given."""


def measure(system_name: str, benchmark: Benchmark, rounds: int) -> list[float]:
    """So many measurements of a benchmark."""
    from ftray.perf.pools import PEERS

    if system_name in PEERS:
        with closing(PEERS[system_name][benchmark.name]()) as samples:
            return list(itertools.islice(samples, rounds))
    system: Any = importlib.import_module(system_name)
    if benchmark.session is not None:
        more = OTHER_ARGUMENTS.get(system_name, {})
        system.init(**{"log_to_driver": False, **benchmark.session, **more})
    try:
        with closing(benchmark.measure(system)) as samples:
            return list(itertools.islice(samples, rounds))
    finally:
        system.shutdown()


def main(arguments: list[str]) -> None:
    system_name, name, rounds = arguments
    benchmark = next(each for each in BENCHMARKS if each.name == name)
    samples = measure(system_name, benchmark, int(rounds))
    print(json.dumps(samples), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
