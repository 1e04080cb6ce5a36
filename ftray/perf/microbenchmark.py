"""`ftray microbenchmark`: chooses benchmarks, has them measured, shows the figures, and writes the page.

Role: shell. What all systems do is measured in the same run, since only ratios of one run can be compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ftray.exceptions import FtrayError
from ftray.perf.definitions import BENCHMARKS, Benchmark
from ftray.perf.environment import facts, interpreter_of
from ftray.perf.figures import Figures, shown
from ftray.perf.growth import GROWTH, Growth
from ftray.perf.page import write
from ftray.perf.pools import PEERS
from ftray.perf.results import OURS, GrowthRow, Row, as_object
from ftray.perf.runner import BenchmarkError, measure, measure_growth, profiled

QUICK_ROUNDS, QUICK_SIZES = 2, 2
"""Of `--quick`: measurements of each benchmark, and sizes of each growth."""
SMALL_ROUNDS = 3
"""So often the smaller sizes are measured, which are over soon; the median counts."""
OTHERS_SIZES = 2
"""Another system is measured at so many sizes: the largest would take Ray many minutes."""

Say = Callable[[str], None]


def main(
    names: Sequence[str] = (),
    as_json: bool = False,
    against: str | None = None,
    rounds: int | None = None,
    list_only: bool = False,
    quick: bool = False,
    page: Path | None = None,
) -> int:
    """Measures and prints; returns the exit code: 0 measured, 1 one of ours failed, 2 there is nothing of that name.

    `names` are benchmarks or beginnings of their names (all by default), `against` another system ("ray"), `rounds`
    how often each is measured instead of as often as its definition says, `quick` leaves the largest sizes out and
    measures twice, `page` is a Markdown file to write, with its plot beside it.
    """
    out, err = Console(), Console(stderr=True)

    def say(text: str) -> None:
        if not as_json:
            err.print(text, markup=False, highlight=False)

    try:
        chosen, grown = select(names)
        if list_only:
            _list(out, chosen, grown, as_json)
            return 0
        other = {} if against is None else {against: interpreter_of(against, say)}
        about = facts(other)
    except ValueError as error:
        return _fail(out, err, as_json, str(error), 2)
    except FtrayError as error:
        return _fail(out, err, as_json, str(error), 1)
    with _working(err, as_json) as step:
        rows = [
            measured(benchmark, other, rounds or (QUICK_ROUNDS if quick else benchmark.rounds), step)
            for benchmark in chosen
        ]
        growth = [measured_growth(each, other, QUICK_SIZES if quick else len(each.sizes), step) for each in grown]
        if page is not None:
            _profile_what_fell_short(rows, step)
    errors = [(row.benchmark.name, row.errors) for row in rows] + [(row.growth.name, row.errors) for row in growth]
    failed = any(OURS in each for _, each in errors)
    if page is not None:
        try:
            write(page, about, rows, growth, against)
        except OSError as error:
            return _fail(out, err, as_json, f"cannot write {error.filename}: {error.strerror}", 1)
    if as_json:
        out.print_json(json.dumps(as_object(rows, growth, about, not failed)))
    else:
        for table in tables(rows, growth, about):
            out.print(table)
        for name, each in errors:
            for system, text in each.items():
                err.print(f"{name} on {system}: {text}", markup=False, style="red")
    return 1 if failed else 0


def _fail(out: Console, err: Console, as_json: bool, text: str, code: int) -> int:
    if as_json:
        out.print_json(json.dumps({"ok": False, "error": text}))
    else:
        err.print(f"Error: {text}", style="red", markup=False)
    return code


@contextmanager
def _working(err: Console, as_json: bool) -> Iterator[Say]:
    """Says what is being measured: in place on a terminal, else not at all."""
    if err.is_terminal and not as_json:
        with err.status("") as status:
            yield status.update
    else:
        yield lambda text: None


# --- choosing -------------------------------------------------------------------------------------------------------


def select(names: Sequence[str]) -> tuple[list[Benchmark], list[Growth]]:
    """Benchmarks of these names or beginnings, in our order; all without names. Raises ValueError."""
    everything = [*(each.name for each in BENCHMARKS), *(each.name for each in GROWTH)]
    for name in names:
        if not any(each.startswith(name) for each in everything):
            raise ValueError(f"no benchmark is named {name!r}; there are {', '.join(everything)}")

    def wanted(each: str) -> bool:
        return not names or any(each == name if name in everything else each.startswith(name) for name in names)

    return [each for each in BENCHMARKS if wanted(each.name)], [each for each in GROWTH if wanted(each.name)]


def systems_for(benchmark: Benchmark, others: dict[str, str]) -> dict[str, str]:
    """System -> interpreter, for all that do what the benchmark measures, ours first."""
    peers = {name: sys.executable for name, offers in PEERS.items() if benchmark.name in offers}
    return {OURS: sys.executable, **peers, **others}


# --- measuring ------------------------------------------------------------------------------------------------------


def measured(benchmark: Benchmark, others: dict[str, str], rounds: int, step: Say) -> Row:
    """Measures a benchmark on all systems: ours half before and half after the others."""
    row = Row(benchmark)
    systems = systems_for(benchmark, others)
    turns = [(system, python, rounds) for system, python in systems.items()]
    if len(systems) > 1 and rounds > 1:
        turns[0] = (OURS, systems[OURS], rounds - rounds // 2)
        turns.append((OURS, systems[OURS], rounds // 2))
    for system, python, count in turns:
        step(f"{benchmark.name}: {system}")
        try:
            each = measure(benchmark, system, python, count)
        except BenchmarkError as error:
            row.errors[system] = str(error)
        else:
            before = row.figures.get(system)
            row.figures[system] = Figures(before.samples + each.samples) if before else each
    return row


def measured_growth(growth: Growth, others: dict[str, str], sizes: int, step: Say) -> GrowthRow:
    """Measures each size, from the smallest on, until one fails; ours several times, but for the largest."""
    row = GrowthRow(growth)
    for system, python in {OURS: sys.executable, **others}.items():
        for size in growth.sizes[: sizes if system == OURS else min(sizes, OTHERS_SIZES)]:
            step(f"{growth.name}: {system}, {size:,}")
            repeat = SMALL_ROUNDS if system == OURS and size != growth.sizes[-1] else 1
            try:
                costs = [measure_growth(growth, system, python, size) for _ in range(repeat)]
                row.costs.setdefault(system, []).append(sorted(costs, key=lambda each: each.each_us)[repeat // 2])
            except BenchmarkError as error:
                row.errors[system] = f"{size:,}: {error}"
                break
    return row


def _profile_what_fell_short(rows: Iterable[Row], step: Say) -> None:
    for row in rows:
        if OURS in row.figures and row.shortfalls():
            step(f"{row.benchmark.name}: where the time goes")
            try:
                row.profile = profiled(row.benchmark)
            except BenchmarkError as error:
                row.errors[OURS] = f"its profile: {error}"


# --- showing --------------------------------------------------------------------------------------------------------


def _list(out: Console, chosen: Iterable[Benchmark], grown: Iterable[Growth], as_json: bool) -> None:
    rows = [{"name": each.name, "title": each.title, "unit": each.unit} for each in chosen]
    rows += [{"name": each.name, "title": each.title, "unit": "us each"} for each in grown]
    if as_json:
        out.print_json(json.dumps({"ok": True, "benchmarks": rows}))
        return
    listed = Table(box=None, show_header=False)
    for each in rows:
        listed.add_row(*each.values())
    out.print(listed)


VERDICTS = {"ok": "[green]ok[/]", "short": "[red]short[/]", "": ""}


def tables(rows: Sequence[Row], growth: Sequence[GrowthRow], about: dict[str, str]) -> list[Table]:
    """Our figures; if others were measured, theirs with how many times better ours are; what growth costs."""
    made = [_ours(rows, about), _theirs(rows), _growth(growth)]
    return [table for table in made if table.row_count]


def _table(title: str, left: Sequence[str], right: Sequence[str], *, last: str) -> Table:
    table = Table(title=title)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    table.add_column(last)
    return table


def _ours(rows: Sequence[Row], about: dict[str, str]) -> Table:
    title = f"ftray {about['ftray']}, {about['python']}, {about['processor']}"
    table = _table(title, ["benchmark"], ["median", "min – max", "limit"], last="")
    for row in rows:
        benchmark, ours = row.benchmark, row.figures.get(OURS)
        if ours is None:
            table.add_row(benchmark.title, "failed")
            continue
        limit, sign = benchmark.limit, "≥" if benchmark.more_is_better else "≤"
        table.add_row(
            benchmark.title,
            f"{shown(ours.median)} {benchmark.unit}",
            f"{shown(ours.least)} – {shown(ours.most)}",
            "" if limit is None else f"{sign} {shown(limit.value)}",
            VERDICTS[row.limit_verdict()],
        )
    return table


def _theirs(rows: Sequence[Row]) -> Table:
    table = _table("Others in the same run", ["benchmark", "system"], ["median", "ours is", "target"], last="")
    for row in rows:
        for system, each in row.figures.items():
            if system != OURS:
                reached, target = row.ratio_to(system), row.benchmark.targets.get(system)
                table.add_row(
                    row.benchmark.title,
                    system,
                    f"{shown(each.median)} {row.benchmark.unit}",
                    "" if reached is None else f"{shown(reached)}×",
                    "" if target is None else f"≥ {target:g}×",
                    VERDICTS[row.target_verdict(system)],
                )
    return table


def _growth(growth: Sequence[GrowthRow]) -> Table:
    table = _table("One of many", ["of", "system"], ["how many", "each", "memory of each"], last="")
    for row in growth:
        for system, costs in row.costs.items():
            for cost in costs:
                last = system == OURS and cost is costs[-1]
                table.add_row(
                    row.growth.title,
                    system,
                    f"{cost.count:,}",
                    f"{shown(cost.each_us)} us",
                    f"{shown(cost.each_bytes)} bytes",
                    VERDICTS["short" if row.shortfalls() else "ok"] if last else "",
                )
    return table
