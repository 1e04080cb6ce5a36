"""The page of benchmarks: one run, as Markdown, with a plot beside it.

Role: `page` and `growth_plot` are pure, `write` writes both files. Nothing on the page is written by hand: what fell short is
on it because the run says so, with the profile of that run.
"""

from __future__ import annotations

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


def write(path: Path, about: Mapping[str, str], rows: Sequence[Row], growth: Sequence[GrowthRow], against: str | None) -> None:
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
    parts = [_head(about, against), _main_table(rows, against), _peers(rows), _short(rows, growth, against)]
    if growth:
        parts.append(_growth(growth, plot))
    parts.append(_pipelining(rows))
    parts.append(_at_rest(rows))
    parts.append(_how(against))
    failed = [(row.benchmark.name, row.errors) for row in rows] + [(row.growth.name, row.errors) for row in growth]
    parts.append(_errors([(name, system, text) for name, errors in failed for system, text in errors.items()]))
    return "\n".join(part for part in parts if part)


def _head(about: Mapping[str, str], against: str | None) -> str:
    facts = "\n".join(f"| {NAMES.get(key, key)} | {value} |" for key, value in about.items())
    command = "ftray microbenchmark" + (f" --against {against}" if against else "") + " --write"
    return f"""# Benchmarks

One run of `make bench` (`{command} docs/benchmarks.md`), which has written this page. Absolute figures are this machine's and
drift; what counts are ratios, and those are of figures taken in turn in the same run. The target of each ratio was set before
anything was measured.

| | |
| --- | --- |
{facts}
"""


def _main_table(rows: Sequence[Row], against: str | None) -> str:
    """Ours and the other system's; `limit` is in the row's own unit."""
    other = NAMES.get(against or "", against or "")
    lines = ["## The table", ""]
    if against:
        lines += [
            f"Median, and the smallest and largest measurement in brackets. \"Ratio\": how many times better than {other}.",
            "",
            f"| | unit | ftray | {other} | ratio | target | limit | |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
    else:
        lines += [
            "Median, and the smallest and largest measurement in brackets.",
            "",
            "| | unit | ftray | limit | |",
            "| --- | --- | ---: | ---: | --- |",
        ]
    for row in rows:
        benchmark, limit = row.benchmark, row.benchmark.limit
        sign = "≥" if benchmark.more_is_better else "≤"
        cells = [benchmark.title, benchmark.unit, _spread(row.figures.get(OURS))]
        if against:
            reached, target = row.ratio_to(against), benchmark.targets.get(against)
            cells += [
                _spread(row.figures.get(against)),
                "" if reached is None else f"{shown(reached)}×",
                "" if target is None else f"≥ {target:g}×",
            ]
        cells += ["" if limit is None else f"{sign} {shown(limit.value)}", _reached(row)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Placement groups come into the table when ftray has them. The durable write to three replicas of the control",
        "service needs more than one node.",
        "",
    ]
    return "\n".join(lines)


def _spread(figures: Figures | None) -> str:
    if figures is None:
        return "–"
    if len(figures.samples) == 1:
        return f"{shown(figures.median)} (once)"
    return f"{shown(figures.median)} ({shown(figures.least)} – {shown(figures.most)})"


def _reached(row: Row) -> str:
    verdicts = {row.limit_verdict(), *(row.target_verdict(system) for system in row.benchmark.targets)}
    return "**short**" if "short" in verdicts else "reached" if "ok" in verdicts else ""


def _peers(rows: Sequence[Row]) -> str:
    """The systems that are always measured: pools, and the limit of the hardware."""
    lines = []
    for row in rows:
        for system in (EXECUTOR, POOL, MEMCPY):
            reached, target = row.ratio_to(system), row.benchmark.targets.get(system)
            if reached is not None and target is not None:
                theirs = f"{_spread(row.figures.get(system))} {row.benchmark.unit}"
                verdict = {"ok": "reached", "short": "**short**"}.get(row.target_verdict(system), "")
                lines.append(f"| {row.benchmark.title} | {system} | {theirs} | {shown(reached)}× | ≥ {target:g}× | {verdict} |")
    if not lines:
        return ""
    return "\n".join(
        [
            "## Against the standard library, and against the hardware",
            "",
            "The pools have two processes, as our session has. `memcpy` is a plain copy into shared memory that was written before.",
            "",
            "| | | theirs | ratio | target | |",
            "| --- | --- | ---: | ---: | ---: | --- |",
            *lines,
            "",
        ]
    )


def _short(rows: Sequence[Row], growth: Sequence[GrowthRow], against: str | None) -> str:
    lines = ["## What fell short", ""]
    short = [row for row in rows if row.shortfalls()]
    grew = [row for row in growth if row.shortfalls()]
    if not short and not grew:
        untested = "" if against else " Targets that are ratios to Ray were not tested in this run."
        return "\n".join([*lines, f"Nothing in this run.{untested}", ""])
    lines += [
        "Each was run once more under a sampling profiler. \"Of a core\" is processor time by process, over the time that the",
        "benchmark took; functions are by their share of the samples of their process, without what they call.",
        "",
    ]
    for row in short:
        lines += [f"### {row.benchmark.title}", "", f"{'; '.join(row.shortfalls())}.", ""]
        if row.profile is not None:
            lines += _profile(row.profile)
    for each in grew:
        lines += [f"### {each.growth.title}", "", f"{'; '.join(each.shortfalls())}.", ""]
    return "\n".join(lines)


def _profile(profile: Profile) -> list[str]:
    used = ", ".join(f"{each.name} {each.share * 100:.0f} %" for each in profile.used)
    lines = [f"Of a core: {used or 'next to nothing'}.", ""]
    names = {each.pid: each.name for each in profile.used}
    sampled = [each for each in profile.sampled if each.samples >= 50][:PROCESSES_SHOWN]
    if not sampled:
        return lines
    lines.append("```text")
    for each in sampled:
        lines.append(f"{names.get(each.pid, 'process')}, {each.samples} samples")
        lines += [f"  {hot.share * 100:5.1f} %  {hot.where}" for hot in each.hottest[:FUNCTIONS_SHOWN]]
    return [*lines, "```", ""]


def _growth(growth: Sequence[GrowthRow], plot: str | None) -> str:
    lines = [
        "## Growth",
        "",
        "The same at three sizes, each in a new session. All of them exist at the same time: tasks wait at a gate that opens",
        "when the last has been submitted, objects are kept until all are read, actors until all have answered. The time is that of",
        "making, using and releasing one; the memory is what one adds to the driver while all are there. One may cost",
        f"{MAY_GROW:g} times as much at the largest size as at the smallest.",
        "",
    ]
    if plot:
        lines += [f"![time of one, by how many there are, both axes logarithmic]({plot})", ""]
    lines += ["| | | how many | time of one | memory of one | |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for row in growth:
        verdict = "**short**" if row.shortfalls() else "reached"
        for system, costs in row.costs.items():
            for cost in costs:
                cells = [
                    row.growth.title,
                    NAMES.get(system, system),
                    f"{cost.count:,}",
                    f"{shown(cost.each_us)} µs",
                    f"{shown(cost.each_bytes)} bytes",
                    verdict if system == OURS and cost is costs[-1] else "",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def growth_plot(growth: Sequence[GrowthRow]) -> str:
    """The plot as SVG; empty if nothing was measured."""
    series = [
        Series(
            f"{NAMES.get(system, system)}: {row.growth.name.removeprefix('growth-')}",
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


def _pipelining(rows: Sequence[Row]) -> str:
    row = next((each for each in rows if each.benchmark.name == "mixed"), None)
    if row is None:
        return ""
    theirs = "".join(
        f" {NAMES.get(system, system)}: {_spread(each)}." for system, each in row.figures.items() if system != OURS
    )
    return f"""## Pipelining

Short tasks are pushed to a worker several at a time, long ones are not, and what waits behind a task that turns out to be
long is called back and given to another worker. {m.LONG_TASKS} tasks of {m.LONG_S:g} s and {m.SHORT_TASKS:,} of {m.SHORT_S * 1e3:g} ms, all of one
function and shuffled, on two workers: the whole takes {_spread(row.figures.get(OURS))} times the ideal, which is that of two workers
that take the next task whenever they have ended one, for the times that the tasks really took.{theirs}
"""


def _at_rest(rows: Sequence[Row]) -> str:
    by_name = {row.benchmark.name: row for row in rows}
    lines = []
    for name, what in (("idle", "of a core, driver, node and workers together, while nothing happens"),
                       ("import", "for `import`, with the names that a program uses")):  # fmt: skip
        row = by_name.get(name)
        if row is None:
            continue
        each = ", ".join(
            f"{NAMES.get(system, system)} {_spread(figures)} {row.benchmark.unit}" for system, figures in row.figures.items()
        )
        lines.append(f"- {each} {what}")
    return "\n".join(["## At rest", "", *lines, ""]) if lines else ""


def _how(against: str | None) -> str:
    other = ""
    if against:
        name = NAMES.get(against, against)
        other = (
            f" {name} runs the very same code with another module, is measured {OTHERS_ROUNDS} times at most, and is cut off"
            f" after {OTHERS_BUDGET_S:g} s; our own measurements are taken half before and half after."
        )
    return f"""## How it is measured

Each benchmark runs in processes of its own, one at a time, on two CPUs, after a warm-up. A rate is that of {m.SLICE_S:g} s.{other}
Numbers and shapes are those of Ray's own microbenchmark where it has the same one: {m.IN_FLIGHT:,} in flight; {m.SUBMITTERS} actors that
submit {m.TASKS_PER_SUBMITTER:,} tasks each; {m.SUBMITTERS} pairs of actors, {m.CALLS_PER_SUBMITTER:,} calls each. The definitions are in
[measures.py](../ftray/perf/measures.py), the bounds in [definitions.py](../ftray/perf/definitions.py).
"""


def _errors(errors: Sequence[tuple[str, str, str]]) -> str:
    if not errors:
        return ""
    lines = [f"- {name}, {NAMES.get(system, system)}: {text.splitlines()[0]}" for name, system, text in errors]
    return "\n".join(["## Not measured", "", *lines, ""])
