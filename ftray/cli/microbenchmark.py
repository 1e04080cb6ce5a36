"""`ftray microbenchmark`: how fast tasks, actors and objects are here.

Role: shell around `ftray/perf`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ftray.cli.options import json_option


@click.command("microbenchmark")
@click.argument("names", nargs=-1)
@click.option("--against", metavar="SYSTEM", help="Run the same on another system too ('ray'), and show the ratios.")
@click.option("--rounds", type=click.IntRange(min=1), help="Measure each benchmark so often; the median is shown.")
@click.option("--quick", is_flag=True, help="Measure each twice, and leave the largest numbers of things out.")
@click.option(
    "--write",
    "page",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the results to a Markdown page too, with a plot beside it, and with profiles of what fell short.",
)
@click.option("--list", "list_only", is_flag=True, help="List the benchmarks, and run none.")
@json_option
def command(
    names: tuple[str, ...],
    against: str | None,
    rounds: int | None,
    quick: bool,
    page: Path | None,
    list_only: bool,
    as_json: bool,
) -> None:
    """Measure tasks, actors and objects on this machine.

    NAMES are benchmarks, or beginnings of their names; all are run by default. Each is warmed up, then measured
    several times; the median is shown with the smallest and largest figure. Let the machine be idle.

    Ray is installed into an environment of its own in the user's cache when it is first asked for, unless
    FTRAY_RAY_PYTHON names an interpreter that has it.

    \b
    Examples:
      ftray microbenchmark
      ftray microbenchmark --list
      ftray microbenchmark tasks --rounds 3
      ftray microbenchmark --json > figures.json
      ftray microbenchmark --against ray --write benchmarks.md

    \b
    Exit codes:
      0  measured
      1  a benchmark failed, or the other system cannot be had
      2  the command line is wrong
    """
    from ftray.perf.microbenchmark import main as run

    sys.exit(
        run(
            names=names,
            as_json=as_json,
            against=against,
            rounds=rounds,
            list_only=list_only,
            quick=quick,
            page=page,
        )
    )
