"""The demo's command line: runs the job with and against the killer, then checks it.

Role: shell. The cluster is one of its own, three heads and a node, whatever FTRAY_ADDRESS says: the demo kills nothing
that it did not start.
The check is a plain loop over the same files after the session has ended, so that neither disturbs the other.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.console import Console

import ftray
from ftray.api.context import ask_raylet
from ftray.cluster_utils import Cluster
from ftray.demo import job
from ftray.demo.counting import Counts, chunks, differences
from ftray.demo.heads import LeaderKiller
from ftray.demo.killer import Killer, schedule
from ftray.demo.report import Display, Outcome, killed_line, recovery_line, tables
from ftray.demo.trace import History, TraceReader

KILL_PERIOD_MS = 600.0
CHUNK_BYTES = 300_000
WATCH_PERIOD_S = 0.005
TOP_ROWS = 12
HEADS = 3
STORE_BYTES = 256 << 20
INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kills", type=click.IntRange(0), help="Kill so many.  [default: go on until the end]")
@click.option("--no-chaos", is_flag=True, help="Kill nothing: the same as --kills 0.")
@click.option("--seed", type=int, help="Of the times and victims of the kills.  [default: another one each time]")
@click.option("--cpus", type=click.IntRange(1), help="Tasks at the same time.  [default: the CPUs of this process]")
@click.option("--files", "file_count", type=click.IntRange(1), help="Only so many of the files.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(
    kills: int | None, no_chaos: bool, seed: int | None, cpus: int | None, file_count: int | None, as_json: bool
) -> None:
    """Count words and identifiers in Python's standard library, on processes that are killed meanwhile.

    Then the same is computed in one plain process, and compared.

    \b
    Exit codes:
      0    the results are the same
      1    they differ; what differs is shown
      2    the command line is wrong
      130  interrupted by Ctrl-C
    """
    console = Console()
    display = Display(console, quiet=as_json)
    try:
        outcome = run(
            display,
            kills=0 if no_chaos else kills,
            seed=random.SystemRandom().randrange(1 << 32) if seed is None else seed,
            cpus=cpus or len(os.sched_getaffinity(0)),
            file_count=file_count,
        )
    except KeyboardInterrupt:
        display.stop()
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    finally:
        display.stop()
    if as_json:
        click.echo(json.dumps(outcome.as_json(TOP_ROWS)))
    else:
        for table in tables(outcome, TOP_ROWS):
            console.print(table)
        show_verdict(console, outcome)
    sys.exit(1 if outcome.differences else 0)


def show_verdict(console: Console, outcome: Outcome) -> None:
    """Whether the results are the same, and else what differs."""
    if not outcome.differences:
        console.print("[bold green]The results are the same[/], word for word.")
        return
    console.print("[bold red]The results differ:[/]")
    for line in outcome.differences:
        console.print(f"  {line}", markup=False)
    console.print(f"Please report this, with the seed {outcome.seed}.")


def run(display: Display, kills: int | None, seed: int, cpus: int, file_count: int | None) -> Outcome:
    """The whole demo but for its last words. Raises FtrayError, KeyboardInterrupt."""
    files = library_files(file_count)
    size_bytes = sum(size for _, size in files)
    groups = chunks(files, max(1, min(CHUNK_BYTES, size_bytes // 20)))
    display.say(
        f"Words and identifiers in {len(files):,} files ({size_bytes / 1e6:.1f} MB) of the standard library of Python "
        f"{platform.python_version()}, on {cpus} CPUs, " + kills_text(kills) + f" (seed {seed})."
    )
    started = time.perf_counter()
    with (
        Cluster(heads=HEADS, nodes=1, num_cpus=cpus, object_store_bytes=STORE_BYTES) as cluster,
        tempfile.TemporaryDirectory(prefix="ftray-demo-") as folder,
    ):
        cluster.connect()
        outcome = Outcome(
            cpus=cpus,
            seed=seed,
            files=len(files),
            size_bytes=size_bytes,
            tasks=job.tasks_in(len(groups)),
            start_s=time.perf_counter() - started,
        )
        run_job(display, outcome, kills, groups, os.path.join(folder, "trace"), cluster)
    started = time.perf_counter()
    expected = count_plainly(display, [path for path, _ in files])
    outcome.check_s = time.perf_counter() - started
    outcome.differences = differences(outcome.result, expected)
    return outcome


def kills_text(kills: int | None) -> str:
    """What is said about the kills beforehand."""
    if kills is None:
        return f"while a process is killed every {KILL_PERIOD_MS / 1e3:g} s"
    return f"while {kills} processes are killed" if kills else "undisturbed"


def run_job(
    display: Display,
    outcome: Outcome,
    kills: int | None,
    groups: Sequence[Sequence[str]],
    trace: str,
    cluster: Cluster,
) -> None:
    """Runs the job under watch; fills in the outcome."""
    history = History()
    reader = TraceReader(trace, history)
    rng = random.Random(outcome.seed)
    leaders = LeaderKiller(cluster, lambda kill: display.say(recovery_line(kill)))
    killer = Killer(
        plan=schedule(rng, kills, KILL_PERIOD_MS),
        rng=rng,
        history=history,
        status=lambda: ask_raylet("status"),
        on_kill=lambda kill: display.say(killed_line(kill, len(killer.kills))),
        on_recovery=lambda kill: display.say(recovery_line(kill)),
        kill_leader=leaders,
    )
    outcome.kills = killer.kills

    def watch() -> None:
        reader.read()
        killer.step()
        display.update(len(history.ended - {job.GATHERER}))

    display.start("tasks", outcome.tasks)
    started = time.perf_counter()
    with Watcher(watch):
        outcome.result = job.run(groups, trace)
    outcome.job_s = time.perf_counter() - started
    reader.read()
    killer.look()
    display.update(len(history.ended - {job.GATHERER}))
    display.stop()
    leaders.wait()
    for why in leaders.failed:
        display.say(f"a killed head did not come back: {why}")
    outcome.attempts = history.attempts()
    outcome.run_again = history.repeated() - history.repeated(job.GATHER_PREFIX) - history.repeated(job.GATHERER)
    outcome.sent_again = history.repeated(job.GATHER_PREFIX)


class Watcher:
    """Calls `step` every `WATCH_PERIOD_S` in a thread of its own, from enter to exit; exit raises what it raised."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="demo-watcher", daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.wait(WATCH_PERIOD_S):
                self._step()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error


def library_files(count: int | None) -> list[tuple[str, int]]:
    """(path, size) of the source files of the standard library that runs this, by path; `count` of them, spread evenly.

    Raises FtrayError when the interpreter came without them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages"}
    paths = [path for path in sorted(root.rglob("*.py")) if others.isdisjoint(path.relative_to(root).parts)]
    files = [(str(path), path.stat().st_size) for path in paths if path.is_file() and os.access(path, os.R_OK)]
    if not files:
        raise ftray.exceptions.FtrayError(f"this Python has no source of its standard library in {root}")
    if count is not None and count < len(files):
        files = [files[index * len(files) // count] for index in range(count)]
    return files


def count_plainly(display: Display, paths: Sequence[str]) -> Counts:
    """The same computation in this process, file by file."""
    display.start("check", len(paths))
    counts = Counts()
    for number, path in enumerate(paths, 1):
        with open(path, "rb") as file:
            counts.add_source(file.read())
        display.update(number)
    display.stop()
    return counts
