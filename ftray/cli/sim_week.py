"""`ftray sim week`: does anything in the heads grow for ever?

Role: shell around `ftray/sim/week.py`.

Rules: progress goes to standard error, a line for each day; with `--json` one object is printed, and nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from ftray.cli.options import json_option

if TYPE_CHECKING:
    from ftray.sim.week import Column, Report


@click.command("week")
@click.option("--days", type=click.IntRange(3, 1000), default=7, show_default=True, help="How many days.")
@click.option(
    "--writes-per-second", type=click.FloatRange(0.01, 1000.0), default=1.0, show_default=True,
    help="Entries that are committed, on average, in a second of virtual time.",
)  # fmt: skip
@click.option("--heads", type=click.IntRange(1, 9), default=3, show_default=True, help="How many heads.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="What chance is drawn from.")
@click.option(
    "--day-seconds", type=click.FloatRange(60.0, 86_400.0), default=86_400.0, show_default=True,
    help="How long a day is; shorter ones are for a first look.",
)  # fmt: skip
@click.option("--small", is_flag=True, help="Small limits, which a short day reaches.")
@json_option
def week(
    days: int, writes_per_second: float, heads: int, seed: int, day_seconds: float, small: bool, as_json: bool
) -> None:
    """Run a cluster for a week in virtual time, and check that nothing in its heads grows for ever.

    A day of 86,400 writes takes about one and a half minutes. The second day is compared with the later ones.

    \b
    Examples:
      ftray sim week
      ftray sim week --days 4 --day-seconds 600 --small

    \b
    Exit codes:
      0  nothing grows
      1  something does, or something else went wrong
      2  the command line is wrong
    """
    from ftray.sim.week import Limits, Options, Week

    limits = Limits.small() if small else Limits()
    options = Options(days, writes_per_second, heads, seed, day_seconds, limits)
    began_s = time.monotonic()

    def progress(number: int, day: Mapping[str, float]) -> None:
        spent_s = time.monotonic() - began_s
        click.echo(f"day {number} of {days}: {day.get('writes', 0):,.0f} writes, {spent_s:.0f} s", err=True)

    report = Week(options, None if as_json else progress).run()
    if as_json:
        click.echo(
            json.dumps(
                {
                    "ok": report.ok,
                    "problems": report.problems,
                    "seconds": time.monotonic() - began_s,
                    "days": report.days,
                    "caps": {column.name: column.cap for column in report.columns if column.cap is not None},
                    "restarts": report.restarts,
                    "transfers": report.transfers,
                    "lives": report.lives,
                }
            )
        )
    else:
        click.echo(table(report))
        lives = ", ".join(f"{count:,} {kind}" for kind, count in report.lives.items())
        click.echo(f"\n{lives}; {report.restarts} restarts of heads, {report.transfers} changes of the leader.")
        for problem in report.problems:
            click.echo(f"  {problem}")
        click.echo("Nothing grows for ever." if report.ok else "Something is wrong.")
    sys.exit(0 if report.ok else 1)


def table(report: Report) -> str:
    """The largest value of each day, a row for each thing that is measured."""
    days = [f"day {number}" for number in range(1, len(report.days) + 1)]
    lines = [f"{'largest value of the day':<28}" + "".join(f"{day:>12}" for day in days) + f"{'at most':>12}"]
    lines.append(f"{'writes':<28}" + "".join(f"{day.get('writes', 0):>12,.0f}" for day in report.days))
    for column in report.columns:
        values = "".join(f"{_shown(day.get(column.name, 0.0), column):>12}" for day in report.days)
        cap = "" if column.cap is None else f"{column.cap:,.0f}"
        lines.append(f"{column.name:<28}{values}{cap:>12}".rstrip())
    return "\n".join(lines)


def _shown(value: float, column: Column) -> str:
    return f"{value / (1 << 20):,.1f} MiB" if column.bytes else f"{value:,.0f}"
