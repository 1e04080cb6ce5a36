"""`ftray sim`: the cluster in virtual time, under faults.

Role: shell around `ftray/sim`.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import click

from ftray.cli.options import json_option


def _seeds(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", value.strip())
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise click.BadParameter(f"{value!r} is no range of seeds: write 0..99 (both included), or one number")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _kinds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    from ftray.sim.faults import KINDS

    if value is None or value == "all":
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


@command.command("run")
@click.option("--seeds", callback=_seeds, metavar="A..B", help="Which seeds to run, both ends included. [0..19]")
@click.option("--seed", type=click.IntRange(min=0), help="One seed: what failed, once more. Shows the event log.")
@click.option("--faults", callback=_kinds, metavar="KINDS", help="Kinds of faults: crash,freeze,cut,disk,clock. [all]")
@click.option("--only", callback=_numbers, metavar="NUMBERS", help="Of the seed's schedule, only these faults.")
@click.option("--heads", type=click.IntRange(1, 9), default=3, show_default=True, help="How many heads.")
@click.option("--clients", type=click.IntRange(0, 100), default=10, show_default=True, help="How many clients.")
@click.option("--seconds", type=click.FloatRange(0.1), default=6.0, show_default=True, help="How long faults happen.")
@click.option("--small", is_flag=True, help="Small limits, so that there are many snapshots and messages.")
@click.option("--twice", is_flag=True, help="Run each seed twice and compare the traces.")
@click.option("--no-shrink", is_flag=True, help="Don't look for a smaller schedule that fails.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@json_option
def run(
    seeds: range | None,
    seed: int | None,
    faults: tuple[str, ...],
    only: tuple[int, ...] | None,
    heads: int,
    clients: int,
    seconds: float,
    small: bool,
    twice: bool,
    no_shrink: bool,
    fail_fast: bool,
    as_json: bool,
) -> None:
    """Run seeds and check what must hold: Raft's invariants after each step, histories of clients at the end, and that
    the cluster recovers when the faults end.

    \b
    Examples:
      ftray sim run --seeds 0..999
      ftray sim run --seeds 0..99 --faults crash,disk --heads 5
      ftray sim run --seed 17

    \b
    Exit codes:
      0  all is well
      1  a run has failed
      2  the command line is wrong
    """
    from ftray.sim.runner import run_seed, run_twice, shrink
    from ftray.sim.world import Options

    if seed is not None and seeds is not None:
        raise click.UsageError("--seed and --seeds exclude each other")
    chosen = range(seed, seed + 1) if seed is not None else seeds if seeds is not None else range(20)
    options = Options(heads=heads, clients=clients, faults=faults, seconds=seconds, small=small, only=only)
    progress = not as_json and sys.stderr.isatty()
    failed: list[Any] = []
    virtual_ms = cpu_s = 0.0
    done = operations = undecided = 0
    for number in chosen:
        outcome = (run_twice if twice else run_seed)(number, options)
        done += 1
        virtual_ms += outcome.virtual_ms * (2 if twice and outcome.ok else 1)
        cpu_s += outcome.cpu_s
        operations += outcome.operations
        undecided += outcome.undecided
        if not outcome.ok:
            if not no_shrink and outcome.kind != "nondeterminism":
                outcome = shrink(outcome)
            failed.append(outcome)
            if not as_json:
                click.echo(str(outcome) + "\n")
        elif seed is not None and not as_json:
            click.echo("\n".join(outcome.log))
        if progress:
            click.echo(f"\r{done}/{len(chosen)} seeds, {len(failed)} failed ", nl=False, err=True)
        if failed and fail_fast:
            break
    if progress:
        click.echo("", err=True)
    rate = virtual_ms / 1000.0 / cpu_s if cpu_s else 0.0
    if as_json:
        answer = {
            "ok": not failed,
            "seeds": done,
            "failed": [
                {
                    "seed": each.seed, "kind": each.kind, "message": each.message, "replay": each.replay,
                    "faults": [str(fault) for fault in each.faults], "log": each.log[-80:], "trace": each.trace,
                }
                for each in failed
            ],
            "virtual_hours": virtual_ms / 3_600_000.0,
            "virtual_seconds_per_cpu_second": rate,
            "operations": operations,
            "undecided_histories": undecided,
        }  # fmt: skip
        if seed is not None and not failed:
            answer["trace"] = outcome.trace
        click.echo(json.dumps(answer))
    else:
        unclear = f", {undecided} histories undecided" if undecided else ""
        click.echo(
            f"{done} seeds, {len(failed)} failed{unclear}: {virtual_ms / 3_600_000.0:.2f} virtual hours, {operations} "
            f"operations, {rate:.0f} virtual seconds per CPU second"
        )
        for each in failed:
            click.echo(f"  {each.kind}: {each.replay}")
    sys.exit(1 if failed else 0)
