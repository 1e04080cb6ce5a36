"""The page of benchmarks: one run, as Markdown, with a plot beside it.

Role: `page` and `growth_plot` are pure, `write` writes both files. Nothing on the page is written by hand: what fell
short is on it because the run says so, with the profile of that run.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from ftray.perf import measures as m
from ftray.perf.definitions import EXECUTOR, MEMCPY, POOL
from ftray.perf.figures import Figures, shown
from ftray.perf.growth import MAY_GROW
from ftray.perf.plot import Series, log_log
from ftray.perf.results import OURS, GrowthRow, Profile, Row
from ftray.perf.runner import OTHERS_BUDGET_S, OTHERS_ROUNDS

NAMES = {"ray": "Ray"}
PROCESSES_SHOWN, FUNCTIONS_SHOWN = 3, 6
"""Of a profile."""
FEWEST_SAMPLES = 20
VERDICTS = {"ok": "reached", "short": "**short**", "": ""}


def write(
    path: Path, about: Mapping[str, str], rows: Sequence[Row], growth: Sequence[GrowthRow], against: str | None
) -> None:
    """Writes the page, and the plot as `<name>-growth.svg` beside it. Raises OSError."""
    plot = path.with_name(f"{path.stem}-growth.svg")
    drawn = growth_plot(growth)
    path.write_text(page(about, rows, growth, against, plot.name if drawn else None), encoding="utf-8")
    if drawn:
        plot.write_text(drawn, encoding="utf-8")


def page(
    about: Mapping[str, str], rows: Sequence[Row], growth: Sequence[GrowthRow], against: str | None, plot: str | None
) -> str:
    """The whole page."""
    parts = [
        _head(about, against),
        _main_table(rows, against),
        _peers(rows),
        _short(rows, growth, against),
        _growth(growth, plot),
        _pipelining(rows),
        _at_rest(rows),
        _how(against),
        _errors(rows, growth),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _prose(text: str) -> str:
    """A paragraph, in lines of the width of the other pages."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _name(system: str) -> str:
    return NAMES.get(system, system)


def _spread(figures: Figures | None) -> str:
    if figures is None:
        return "–"
    if len(figures.samples) == 1:
        return f"{shown(figures.median)} (once)"
    return f"{shown(figures.median)} ({shown(figures.least)} – {shown(figures.most)})"


# --- the tables -----------------------------------------------------------------------------------------------------


def _head(about: Mapping[str, str], against: str | None) -> list[str]:
    command = "ftray microbenchmark" + (f" --against {against}" if against else "") + " --write docs/benchmarks.md"
    intro = (
        f"One run of `{command}`, which is what `make bench` does, and which has written this page. Absolute figures "
        "are this machine's, and drift; what counts are ratios, of figures that were taken in turn in the same run. "
        "The targets were set before anything was measured."
    )
    return [
        "# Benchmarks",
        _prose(intro),
        "",
        "| | |",
        "| --- | --- |",
        *(_cells(_name(key), value) for key, value in about.items()),
    ]


def _main_table(rows: Sequence[Row], against: str | None) -> list[str]:
    """Ours and the other system's; a limit is in the row's own unit."""
    text = "Median, with the smallest and the largest measurement in brackets."
    if against:
        text += f' "Ratio" is how many times better than {_name(against)} ours is.'
        head = ["", "unit", "ftray", _name(against), "ratio", "target", "limit", ""]
    else:
        head = ["", "unit", "ftray", "limit", ""]
    lines = ["## The table", _prose(text), "", _cells(*head)]
    lines.append(_cells("---", "---", *["---:"] * (len(head) - 3), "---"))
    for row in rows:
        benchmark, limit = row.benchmark, row.benchmark.limit
        cells = [benchmark.title, benchmark.unit, _spread(row.figures.get(OURS))]
        if against:
            reached, target = row.ratio_to(against), benchmark.targets.get(against)
            cells += [
                _spread(row.figures.get(against)),
                "" if reached is None else f"{shown(reached)}×",
                "" if target is None else f"≥ {target:g}×",
            ]
        sign = "≥" if benchmark.more_is_better else "≤"
        verdicts = {row.limit_verdict(), *(row.target_verdict(system) for system in benchmark.targets)}
        cells.append("" if limit is None else f"{sign} {shown(limit.value)}")
        cells.append(VERDICTS[next((each for each in ("short", "ok") if each in verdicts), "")])
        lines.append(_cells(*cells))
    rest = (
        "Placement groups come into the table when ftray has them. The durable write to three replicas of the control "
        "service needs more than one node."
    )
    return [*lines, "", _prose(rest)]


def _peers(rows: Sequence[Row]) -> list[str]:
    """The systems that are always measured: pools, and the limit of the hardware."""
    lines = []
    for row in rows:
        for system in (EXECUTOR, POOL, MEMCPY):
            reached, target = row.ratio_to(system), row.benchmark.targets.get(system)
            if reached is None or target is None:
                continue
            theirs, verdict = _spread(row.figures.get(system)), VERDICTS[row.target_verdict(system)]
            title = f"{row.benchmark.title} ({row.benchmark.unit})"
            lines.append(_cells(title, system, theirs, f"{shown(reached)}×", f"≥ {target:g}×", verdict))
    if not lines:
        return []
    text = (
        "The pools have two processes, as our session has. `memcpy` is a plain copy into shared memory that was "
        "written before."
    )
    return [
        "## Against the standard library, and the hardware",
        _prose(text),
        "",
        _cells("", "", "theirs", "ratio", "target", ""),
        _cells("---", "---", "---:", "---:", "---:", "---"),
        *lines,
    ]


# --- what fell short ------------------------------------------------------------------------------------------------


def _short(rows: Sequence[Row], growth: Sequence[GrowthRow], against: str | None) -> list[str]:
    lines = ["## What fell short"]
    short = [(row.benchmark.title, row.shortfalls(), row.profile) for row in rows]
    short += [(row.growth.title, row.shortfalls(), None) for row in growth]
    short = [each for each in short if each[1]]
    if not short:
        return [*lines, "Nothing in this run." + ("" if against else " Ratios to Ray were not tested in it.")]
    text = (
        'Each of these benchmarks was run once more under a sampling profiler. "Of a core" is processor time by '
        "process, over the time that the benchmark took; functions are given with their share of the samples of their "
        "process, without what they call."
    )
    lines.append(_prose(text))
    for title, found, profile in short:
        lines += ["", f"### {title}", _prose("; ".join(found) + ".")]
        if profile is not None:
            lines += _profile(profile)
    return lines


def _profile(profile: Profile) -> list[str]:
    used = ", ".join(f"{each.name} {each.share * 100:.0f} %" for each in profile.used)
    lines = ["", _prose(f"Of a core: {used}.")] if used else []
    names = {each.pid: each.name for each in profile.used}
    sampled = [each for each in profile.sampled if each.samples >= FEWEST_SAMPLES][:PROCESSES_SHOWN]
    if not sampled:
        return lines
    lines += ["", "```text"]
    for each in sampled:
        lines.append(f"{names.get(each.pid, 'process')}, {each.samples} samples")
        lines += [f"  {hot.share * 100:5.1f} %  {hot.where}" for hot in each.hottest[:FUNCTIONS_SHOWN]]
    return [*lines, "```"]


# --- sections -------------------------------------------------------------------------------------------------------


def _growth(growth: Sequence[GrowthRow], plot: str | None) -> list[str]:
    if not growth:
        return []
    text = (
        "The same at several sizes, each in a new session. All of them exist at the same time: tasks wait at a gate "
        "that opens when the last has been submitted, objects are kept until all are read, actors until all have "
        "answered. The time is that of making, using and releasing one; the memory is what one adds to the driver "
        f"while all are there. One may cost {MAY_GROW:g} times as much at the largest size as at the smallest."
    )
    lines = ["## Growth", _prose(text), ""]
    if plot:
        lines += [f"![Time of one, by how many there are; both axes are logarithmic]({plot})", ""]
    lines.append(_cells("", "", "how many", "time of one", "memory of one", ""))
    lines.append(_cells("---", "---", "---:", "---:", "---:", "---"))
    for row in growth:
        verdict = VERDICTS["short" if row.shortfalls() else "ok"]
        for system, costs in row.costs.items():
            for cost in costs:
                time, memory = f"{shown(cost.each_us)} µs", f"{shown(cost.each_bytes)} bytes"
                last = system == OURS and cost is costs[-1]
                lines.append(
                    _cells(row.growth.title, _name(system), f"{cost.count:,}", time, memory, verdict if last else "")
                )
    return lines


def growth_plot(growth: Sequence[GrowthRow]) -> str:
    """The plot as SVG; empty if nothing was measured."""
    series = [
        Series(
            f"{_name(system)}: {row.growth.name.removeprefix('growth-')}",
            [(cost.count, cost.each_us) for cost in costs],
            number,
            dashed=system != OURS,
        )
        for number, row in enumerate(growth)
        for system, costs in row.costs.items()
    ]
    if not series:
        return ""
    return log_log("Time of one, by how many there are", "how many exist at the same time", "µs each", series)


def _pipelining(rows: Sequence[Row]) -> list[str]:
    row = next((each for each in rows if each.benchmark.name == "mixed"), None)
    if row is None:
        return []
    theirs = [f" {_name(system)}: {_spread(each)}." for system, each in row.figures.items() if system != OURS]
    text = (
        "Short tasks are pushed to a worker several at a time, long ones are not; what waits behind a task that turns "
        f"out to be long is called back and given to another worker. {m.LONG_TASKS} tasks of {m.LONG_S:g} s and "
        f"{m.SHORT_TASKS:,} of {m.SHORT_S * 1e3:g} ms, all of one function and shuffled, on two workers: the whole "
        f"takes {_spread(row.figures.get(OURS))} times the ideal, which is that of two workers that take the next task "
        f"as soon as they have ended one, for the times that the tasks really took.{''.join(theirs)}"
    )
    return ["## Pipelining", _prose(text)]


def _at_rest(rows: Sequence[Row]) -> list[str]:
    by_name = {row.benchmark.name: row for row in rows}
    lines = []
    for name, what in (
        ("idle", "Driver, node and workers together, while nothing happens, of a core"),
        ("import", "`import`, with the names that a program uses"),
    ):
        if name in by_name:
            row = by_name[name]
            each = [f"{_name(system)} {_spread(it)} {row.benchmark.unit}" for system, it in row.figures.items()]
            lines.append(f"- {what}: {', '.join(each)}")
    return ["## At rest", *lines] if lines else []


def _how(against: str | None) -> list[str]:
    other = ""
    if against:
        other = (
            f"{_name(against)} runs the very same code with another module, is measured {OTHERS_ROUNDS} times at most, "
            f"and is cut off after {OTHERS_BUDGET_S:g} s; ours is measured half before and half after it. "
        )
    text = (
        "Each benchmark runs in processes of its own, one at a time, on two CPUs, after a warm-up. A rate is that of "
        f"{m.SLICE_S:g} s. {other}Numbers and shapes are those of Ray's own microbenchmark where it has the same one: "
        f"{m.IN_FLIGHT:,} in flight; {m.SUBMITTERS} actors that submit {m.TASKS_PER_SUBMITTER:,} tasks each; "
        f"{m.SUBMITTERS} pairs of actors with {m.CALLS_PER_SUBMITTER:,} calls each. How each measures is in "
        "[measures.py](../ftray/perf/measures.py), what it should reach in "
        "[definitions.py](../ftray/perf/definitions.py)."
    )
    return ["## How it is measured", _prose(text)]


def _first_and_last(text: str) -> list[str]:
    """What went wrong, and the last line of a traceback if there is one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [lines[0], lines[-1]] if lines else []


def _errors(rows: Sequence[Row], growth: Sequence[GrowthRow]) -> list[str]:
    errors = [(row.benchmark.name, row.errors) for row in rows] + [(row.growth.name, row.errors) for row in growth]
    lines = [
        _prose(f"- {name}, {_name(system)}: {': '.join(dict.fromkeys(_first_and_last(text)))}")
        for name, each in errors
        for system, text in each.items()
    ]
    return ["## Not measured", *lines] if lines else []
