"""Measures in child processes, one at a time, and reads what they print.

Role: shell. Nothing but one benchmark on one system and what it starts runs at a time; a benchmark that fails or hangs
costs only itself, and memory is measured in a process that has done nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftray.exceptions import FtrayError
from ftray.perf import measures, sampling
from ftray.perf.child import PREFIX
from ftray.perf.definitions import Benchmark
from ftray.perf.figures import Figures, figures
from ftray.perf.growth import Cost, Growth
from ftray.perf.pools import PEERS
from ftray.perf.results import OURS, Profile, Used

OTHERS_BUDGET_S = 60.0
"""What another system gets for one benchmark; what it has measured by then counts."""
OTHERS_ROUNDS = 3
"""Another system is measured so often at most: enough for a median with its noise, and Ray needs seconds to start."""
START_AND_STOP_S = 20.0
SOURCE = Path(__file__).resolve().parents[2]
TOP = 10
"""So many functions of a profile are shown."""

ADDRESSES = ("FTRAY_ADDRESS", "RAY_ADDRESS")
"""With these, `init` would join a cluster instead of starting a node."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}
"""For other systems: nothing is reported to their makers, and no warnings about settings."""


class BenchmarkError(FtrayError):
    """The benchmark could not be run. Its output says why."""


def measure(benchmark: Benchmark, system: str, python: str, rounds: int) -> Figures:
    """Measures in child processes. Raises BenchmarkError."""
    budget_s = benchmark.timeout_s if system == OURS else min(benchmark.timeout_s, OTHERS_BUDGET_S)
    asked = rounds if system == OURS or system in PEERS else min(rounds, OTHERS_ROUNDS)
    if not benchmark.fresh:
        return figures(child(system, python, benchmark.name, asked, budget_s)[0])
    samples: list[float] = []
    for _ in range(asked):
        samples += child(system, python, benchmark.name, 1, budget_s)[0]
    return figures(samples)


def measure_growth(growth: Growth, system: str, python: str, size: int) -> Cost:
    """Measures one size. Raises BenchmarkError."""
    budget_s = growth.timeout_s if system == OURS else OTHERS_BUDGET_S
    ((count, each_us, each_bytes),) = child(system, python, growth.name, size, budget_s)[0]
    return Cost(count, each_us, each_bytes)


def profiled(benchmark: Benchmark) -> Profile:
    """Measures ours once more, and watches where the time goes. Raises BenchmarkError."""
    with tempfile.TemporaryDirectory(prefix="ftray-perf-") as folder:
        more = {sampling.VARIABLE: folder}
        _, rest = child(OURS, sys.executable, benchmark.name, benchmark.rounds, benchmark.timeout_s, more)
        sampled = sampling.collected(Path(folder), TOP)
    elapsed_s = rest.get("elapsed_s") or 1.0
    used = [Used(pid, name, used_s / elapsed_s) for pid, name, used_s in rest.get("cpu", [])]
    busy = sorted((each for each in used if each.share >= 0.01), key=lambda each: -each.share)
    return Profile(tuple(busy), tuple(sampled))


def child(
    system: str, python: str, name: str, count: int, budget_s: float, more: Mapping[str, str] | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """What a child prints: its measurements, and processor time by process. Raises BenchmarkError without any."""
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="ftray-perf-", ignore_cleanup_errors=True) as folder:
        environ = {
            **{key: value for key, value in os.environ.items() if key not in ADDRESSES},
            **(QUIET if system != OURS else {}),
            **(more or {}),
            "PYTHONPATH": os.pathsep.join(paths),
            measures.TEMP_VARIABLE: folder,
        }
        limit_s = budget_s if system == OURS else budget_s + START_AND_STOP_S
        stdin, lifeline = os.pipe()
        process = subprocess.Popen(
            [python, "-m", "ftray.perf.child", system, name, str(count), str(budget_s)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,
        )
        os.close(stdin)
        stopped = False
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            # The child ends, with all that it has started, when the other end of its stdin is closed: also when we die.
            os.close(lifeline)
            if process.returncode is None:
                out, err = process.communicate()
    lines = [json.loads(line.removeprefix(PREFIX)) for line in out.splitlines() if line.startswith(PREFIX)]
    samples = [line for line in lines if not isinstance(line, dict)]
    rest = next((line for line in lines if isinstance(line, dict)), {})
    if process.returncode != 0 and not stopped:
        raise BenchmarkError(f"it failed with exit code {process.returncode}\n{err.strip()[-2_000:]}")
    if not samples:
        raise BenchmarkError(f"it did not end within {limit_s:g} s")
    return samples, rest
