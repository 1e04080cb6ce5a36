"""`ftray microbenchmark`: chooses benchmarks, measures each in processes of its own, shows the figures.

Role: shell. Each benchmark is measured on each system by a child process, one at a time: nothing but it and what it
starts runs then, a benchmark that fails or hangs costs only itself, and memory is measured in a process that has done
nothing else. What all systems do is measured in the same run, since only ratios of one run can be compared.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ftray import __version__
from ftray.exceptions import FtrayError
from ftray.perf.definitions import BENCHMARKS, Benchmark
from ftray.perf.figures import Figures, figures, ratio, shown, verdict
from ftray.perf.pools import PEERS

OURS = "ftray"
PYTHON_OF = {"ray": "FTRAY_RAY_PYTHON"}
"""Another system -> the variable that names the interpreter that has it."""


class BenchmarkError(FtrayError):
    """The benchmark could not be run. Its output says why."""


@dataclass(slots=True)
class Row:
    """What was measured of one benchmark."""

    benchmark: Benchmark
    figures: dict[str, Figures] = field(default_factory=dict)
    """By system, ours first."""
    errors: dict[str, str] = field(default_factory=dict)


def main(
    names: Sequence[str] = (),
    as_json: bool = False,
    against: str | None = None,
    rounds: int | None = None,
    list_only: bool = False,
) -> int:
    """Measures and prints; returns the exit code: 0 measured, 1 a benchmark failed, 2 there is nothing of that name.

    `names` are benchmarks or beginnings of their names (all by default), `against` another system ("ray"), `rounds`
    how often each is measured instead of as often as its definition says.
    """
    out, err = Console(), Console(stderr=True)
    try:
        chosen = select(names)
        other = {} if against is None else {against: interpreter_of(against)}
    except ValueError as error:
        return _fail(out, err, as_json, str(error), 2)
    except FtrayError as error:
        return _fail(out, err, as_json, str(error), 1)
    if list_only:
        _list(out, chosen, as_json)
        return 0
    rows = []
    for number, benchmark in enumerate(chosen, 1):
        row = Row(benchmark)
        rows.append(row)
        for system, python in systems_for(benchmark, other).items():
            with _working(err, as_json, f"{number}/{len(chosen)} {benchmark.name}: {system}"):
                try:
                    row.figures[system] = measure(benchmark, system, python, rounds or benchmark.rounds)
                except BenchmarkError as error:
                    row.errors[system] = str(error)
    failed = any(row.errors for row in rows)
    if as_json:
        out.print_json(json.dumps(as_object(rows, not failed)))
    else:
        for table in tables(rows):
            out.print(table)
        for row in rows:
            for system, text in row.errors.items():
                err.print(f"{row.benchmark.name} on {system}: {text}", markup=False, style="red")
    return 1 if failed else 0


def _fail(out: Console, err: Console, as_json: bool, text: str, code: int) -> int:
    if as_json:
        out.print_json(json.dumps({"ok": False, "error": text}))
    else:
        err.print(f"Error: {text}", style="red", markup=False)
    return code


@contextmanager
def _working(err: Console, as_json: bool, text: str) -> Iterator[None]:
    if err.is_terminal and not as_json:
        with err.status(text):
            yield
    else:
        yield


# --- choosing -------------------------------------------------------------------------------------------------------


def select(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names or beginnings, in our order; all without names. Raises ValueError."""
    for name in names:
        if not any(each.name.startswith(name) for each in BENCHMARKS):
            raise ValueError(f"no benchmark is named {name!r}; there are {', '.join(each.name for each in BENCHMARKS)}")
    exact = {each.name for each in BENCHMARKS}
    return [
        each
        for each in BENCHMARKS
        if not names or any(each.name == name if name in exact else each.name.startswith(name) for name in names)
    ]


def interpreter_of(system: str) -> str:
    """The interpreter that has another system. Raises ValueError for one we do not know, BenchmarkError without one."""
    if system not in PYTHON_OF:
        raise ValueError(f"cannot compare with {system!r}, only with {', '.join(PYTHON_OF)}")
    python = os.environ.get(PYTHON_OF[system]) or sys.executable
    try:
        done = subprocess.run([python, "-c", f"import {system}"], capture_output=True, check=False)
    except OSError as error:
        raise BenchmarkError(f"cannot run {python}: {error.strerror}") from None
    if done.returncode != 0:
        raise BenchmarkError(
            f"{python} cannot import {system}: install it into an environment of its own, and name that environment's "
            f"interpreter in {PYTHON_OF[system]}"
        )
    return python


def systems_for(benchmark: Benchmark, others: dict[str, str]) -> dict[str, str]:
    """System -> interpreter, for all that do what the benchmark measures."""
    pools = {name: sys.executable for name, offers in PEERS.items() if benchmark.name in offers}
    return {OURS: sys.executable, **pools, **others}


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(benchmark: Benchmark, system: str, python: str, rounds: int) -> Figures:
    """Measures in child processes. Raises BenchmarkError."""
    if benchmark.fresh:
        return figures([_child(benchmark, system, python, 1)[0] for _ in range(rounds)])
    return figures(_child(benchmark, system, python, rounds))


def _child(benchmark: Benchmark, system: str, python: str, rounds: int) -> list[float]:
    source = str(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [python, "-m", "ftray.perf.child", system, benchmark.name, str(rounds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=benchmark.timeout_s)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"it did not end within {benchmark.timeout_s:g} s") from None
    finally:
        if process.poll() is None:  # also on Ctrl-C; what it has started ends with it or is in its process group
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        raise BenchmarkError(f"it failed with exit code {process.returncode}\n{err.strip()[-2_000:]}")
    lines = out.strip().splitlines()
    samples: list[float] = json.loads(lines[-1])
    return samples


# --- showing --------------------------------------------------------------------------------------------------------


def _list(out: Console, chosen: Iterable[Benchmark], as_json: bool) -> None:
    if as_json:
        rows = [{"name": each.name, "title": each.title, "unit": each.unit} for each in chosen]
        out.print_json(json.dumps({"ok": True, "benchmarks": rows}))
        return
    listed = Table(box=None, show_header=False)
    for each in chosen:
        listed.add_row(each.name, each.title, each.unit)
    out.print(listed)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Our figures, and, if others were measured, theirs with how many times better ours are."""
    made = Table(title=f"ftray {__version__}, {machine()}")
    theirs = Table(title="Others in the same run")
    for heading in ("benchmark", "median", "min – max", "limit", ""):
        made.add_column(heading, justify="right" if heading in ("median", "min – max", "limit") else "left")
    for heading in ("benchmark", "system", "median", "ours is better by"):
        theirs.add_column(heading, justify="left" if heading in ("benchmark", "system") else "right")
    for row in rows:
        benchmark, ours = row.benchmark, row.figures.get(OURS)
        if ours is None:
            made.add_row(benchmark.title, "failed")
        else:
            limit, sign = benchmark.limit, "≥" if benchmark.more_is_better else "≤"
            made.add_row(
                benchmark.title,
                f"{shown(ours.median)} {benchmark.unit}",
                f"{shown(ours.least)} – {shown(ours.most)}",
                "" if limit is None else f"{sign} {shown(limit.value)}",
                {"ok": "[green]ok[/]", "short": "[red]short[/]"}.get(verdict(ours, limit), ""),
            )
        for system, each in row.figures.items():
            if system != OURS:
                better = "" if ours is None else f"{ratio(ours, each, benchmark.more_is_better):.1f}×"
                theirs.add_row(benchmark.title, system, f"{shown(each.median)} {benchmark.unit}", better)
    return [made, theirs] if theirs.row_count else [made]


def machine() -> str:
    """What the figures were measured on."""
    return f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} CPUs"


def as_object(rows: Sequence[Row], ok: bool) -> dict[str, Any]:
    """The figures as JSON has them."""
    return {
        "ok": ok,
        "ftray": __version__,
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "benchmarks": [_row_object(row) for row in rows],
    }


def _row_object(row: Row) -> dict[str, Any]:
    benchmark, ours = row.benchmark, row.figures.get(OURS)
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "unit": benchmark.unit,
        "more_is_better": benchmark.more_is_better,
        "limit": benchmark.limit_value,
        "verdict": "" if ours is None else verdict(ours, benchmark.limit),
        "systems": {
            system: {
                "median": each.median,
                "min": each.least,
                "max": each.most,
                "samples": list(each.samples),
                **({} if system == OURS or ours is None else {"ratio": ratio(ours, each, benchmark.more_is_better)}),
            }
            for system, each in row.figures.items()
        },
        "errors": row.errors,
    }
