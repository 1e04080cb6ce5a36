"""`ftray microbenchmark`: how fast tasks, actors and objects are here.

Role: shell around `ftray/perf`.
"""

from __future__ import annotations

import sys

import click

from ftray.cli.options import json_option


@click.command("microbenchmark")
@click.argument("names", nargs=-1)
@click.option("--against", metavar="SYSTEM", help="Run the same on another system too ('ray'), and show the ratios.")
@click.option("--rounds", type=click.IntRange(min=1), help="Measure each benchmark so often; the median is shown.")
@click.option("--list", "list_only", is_flag=True, help="List the benchmarks, and run none.")
@json_option
def command(names: tuple[str, ...], against: str | None, rounds: int | None, list_only: bool, as_json: bool) -> None:
    """Measure tasks, actors and objects on this machine.

    NAMES are benchmarks, or beginnings of their names; all are run by default. Each is warmed up, then measured
    several times; the median is shown with the smallest and largest figure. Let the machine be idle.

    \b
    Examples:
      ftray microbenchmark
      ftray microbenchmark --list
      ftray microbenchmark tasks --rounds 3
      ftray microbenchmark --json > figures.json

    \b
    Exit codes:
      0  measured
      1  a benchmark failed
      2  the command line is wrong
    """
    from ftray.perf.microbenchmark import main as run

    sys.exit(run(names=names, as_json=as_json, against=against, rounds=rounds, list_only=list_only) or 0)
