"""`ftray sim`: the cluster in virtual time, under faults.

Role: shell around `ftray/sim`.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftray.cli.options import json_option
from ftray.cli.sim_week import week

if TYPE_CHECKING:
    from ftray.sim.faults import Fault
    from ftray.sim.world import Options


def _seeds(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", value.strip())
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise click.BadParameter(f"{value!r} is no range of seeds: write 0..99 (both included), or one number")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _kinds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    from ftray.sim.faults import KINDS

    if value is None:
        return None
    if value == "all":
        return tuple(KINDS)
    if value == "none":
        return ()
    asked = [each.strip() for each in value.split(",")]
    unknown = [each for each in asked if each not in KINDS]
    if unknown:
        raise click.BadParameter(f"there is no kind {unknown[0]!r}: there are {', '.join(KINDS)}, all and none")
    return tuple(kind for kind in KINDS if kind in asked)


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if value == "none":
        return ()
    try:
        return tuple(int(each) for each in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers of faults, as 3,7,12") from None


class _Finite(click.FloatRange):
    """A number in a range, and not what is no number: every comparison with that is false."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return float(number)


@click.group("sim")
def command() -> None:
    """Run a cluster's heads and clients in virtual time, under faults drawn from a seed, and check them.

    \b
    Examples:
      ftray sim run --seeds 0..999
      ftray sim run --seed 17

    \b
    Exit codes:
      0  all is well
      1  a run has failed
      2  the command line is wrong
    """


command.add_command(week)


@command.command("run")
@click.option("--seeds", callback=_seeds, metavar="A..B", help="Which seeds to run, both ends included. [0..19]")
@click.option("--seed", type=click.IntRange(min=0), help="One seed: what failed, once more. Shows the event log.")
@click.option("--faults", callback=_kinds, metavar="KINDS", help="Kinds of faults: crash,freeze,cut,disk,clock. [all]")
@click.option(
    "--schedule", "schedule_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="These faults, in place of what the seed would draw.",
)  # fmt: skip
@click.option("--only", callback=_numbers, metavar="NUMBERS", help="Of the schedule, only these faults; or none.")
@click.option("--heads", type=click.IntRange(1, 9), default=3, show_default=True, help="How many heads.")
@click.option("--clients", type=click.IntRange(0, 100), default=12, show_default=True, help="How many clients.")
@click.option(
    "--nodes", type=click.IntRange(1, 20), default=3, show_default=True,
    help="How many nodes; more than one for placement groups.",
)  # fmt: skip
@click.option(
    "--seconds", type=_Finite(0.1, 1_000_000.0), default=6.0, show_default=True, help="How long faults happen."
)
@click.option(
    "--pause-ms", type=_Finite(1.0, 1_000_000.0), default=180.0, show_default=True,
    help="How long clients think between operations, on average.",
)  # fmt: skip
@click.option("--small", is_flag=True, help="Small limits, so that there are many snapshots and messages.")
@click.option("--twice", is_flag=True, help="Run each seed twice, with other hashes, and compare the traces.")
@click.option("--jobs", type=click.IntRange(1, 256), help="How many seeds at a time. [as there are processors]")
@click.option("--no-shrink", is_flag=True, help="Don't look for a smaller schedule that fails.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=".", show_default=True, metavar="DIR",
    help="Where schedules of failures are written.",
)  # fmt: skip
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@json_option
def run(
    seeds: range | None,
    seed: int | None,
    faults: tuple[str, ...] | None,
    schedule_file: Path | None,
    only: tuple[int, ...] | None,
    heads: int,
    clients: int,
    nodes: int,
    seconds: float,
    pause_ms: float,
    small: bool,
    twice: bool,
    jobs: int | None,
    no_shrink: bool,
    out: Path,
    fail_fast: bool,
    as_json: bool,
) -> None:
    """Run seeds and check what must hold: Raft's invariants after each step, histories of clients at the end, and that
    the cluster recovers when the faults end.

    A seed and the options decide all of a run: who fails when, how long each message takes, what clients ask. So a
    seed that fails will fail again, here and on any other machine with this version. It takes about 0.1 s.

    What fails is shown at once, then made smaller: faults are left out, and hypothesis (pip install 'ftray[sim]') makes
    those that are left earlier, shorter and rounder, as long as the run fails alike. The report has the command that
    replays it: with --only, or with --schedule and a file in --out. Ctrl-C stops, and says what was found until then.

    \b
    Examples:
      ftray sim run --seeds 0..999                               a search, on all processors
      ftray sim run --seeds 0..99 --faults crash,disk --heads 5
      ftray sim run --seeds 0..99 --twice                        is all of it deterministic?
      ftray sim run --seed 17                                    one seed, with its event log
      ftray sim run --seed 17 --only 3,7                         without all faults but two
      ftray sim run --seed 17 --schedule ftray-sim-17-0a1b2c3d.json

    \b
    Exit codes:
      0    all is well
      1    a run has failed
      2    the command line, or the file of a schedule, is wrong
      130  interrupted before a run had failed
    """
    from ftray.cli.sim_batch import Show
    from ftray.sim.batch import keep_hypothesis_out_of_the_way, run_batch, usual_jobs
    from ftray.sim.faults import KINDS
    from ftray.sim.world import Options

    if seed is not None and seeds is not None:
        raise click.UsageError("--seed and --seeds exclude each other")
    if schedule_file is not None and faults is not None:
        raise click.UsageError("--faults says what is drawn, and --schedule has what is not: they exclude each other")
    chosen = range(seed, seed + 1) if seed is not None else seeds if seeds is not None else range(20)
    options = Options(
        heads=heads, clients=clients, nodes=nodes, faults=tuple(KINDS) if faults is None else faults, seconds=seconds,
        pause_ms=pause_ms, small=small, schedule=_read(schedule_file, heads, clients, seconds), only=only,
    )  # fmt: skip
    _check_numbers(options, chosen)
    keep_hypothesis_out_of_the_way()
    show = Show(
        len(chosen), options, str(schedule_file or ""), out, as_json=as_json, fail_fast=fail_fast,
        show_log=seed is not None,
    )  # fmt: skip
    try:
        run_batch(
            chosen, options, show, jobs=min(jobs or usual_jobs(), len(chosen)), twice=twice, shrink=not no_shrink,
            keep_log=seed is not None,
        )  # fmt: skip
    except KeyboardInterrupt:
        show.interrupted = True
    show.end()
    sys.exit(show.exit_code)


def _read(path: Path | None, heads: int, clients: int, seconds: float) -> tuple[Fault, ...] | None:
    """The schedule of a file, if one is named."""
    from ftray.sim import schedules

    if path is None:
        return None
    try:
        faults = schedules.read(path)
    except schedules.ScheduleError as error:
        raise click.UsageError(str(error)) from None
    try:
        schedules.check(faults, heads, clients, seconds * 1000.0)
    except schedules.ScheduleError as error:
        raise click.UsageError(f"{path}: {error}") from None
    return faults


def _check_numbers(options: Options, seeds: range) -> None:
    """A number that no fault has is a mistake; of several seeds, one that none of them has."""
    from ftray.sim.runner import faults_of

    if not options.only:
        return
    numbers = {fault.number for seed in seeds for fault in faults_of(seed, options)}
    unknown = [number for number in options.only if number not in numbers]
    if unknown:
        known = f"from 0 to {max(numbers)}" if numbers else "none at all"
        raise click.UsageError(f"--only: there is no fault number {unknown[0]}: there are {known}")
