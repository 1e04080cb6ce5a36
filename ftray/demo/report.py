"""What the demo shows: progress while it runs, then tables; or one JSON object.

Role: shell. On a terminal a progress bar that kills and recoveries scroll above; elsewhere (a pipe, a file) lines.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ftray.demo.counting import Counts, top
from ftray.demo.killer import GATHERER, LEADER, WORKER, Kill

PLAIN_STEP = 0.1
"""Without a terminal, progress is a line for each such part of the whole."""


class Display:
    """Progress, and lines beside it. `quiet` shows nothing."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._progress: Progress | None = None
        self._title = ""
        self._total = 0
        self._shown = 0

    def say(self, text: str) -> None:
        """A line."""
        if not self._quiet:
            console = self._console if self._progress is None else self._progress.console
            console.print(text, highlight=False, soft_wrap=True)

    def start(self, title: str, total: int) -> None:
        """A new bar; the one before it is ended."""
        self.stop()
        self._title, self._total, self._shown = title, total, 0
        if not self._quiet and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self._console)
            self._progress.add_task(title, total=total)
            self._progress.start()

    def update(self, done: int) -> None:
        """How many of the total are done."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done)
        elif self._total and done // max(1, round(self._total * PLAIN_STEP)) > self._shown:
            self._shown = done // max(1, round(self._total * PLAIN_STEP))
            self.say(f"{self._title}: {done} of {self._total}")

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def killed_line(kill: Kill, number: int) -> str:
    """What is said at a kill."""
    who = {WORKER: "a worker", LEADER: "the leading head"}.get(kill.victim, "the gatherer")
    doing = f" in the middle of {kill.task}" if kill.victim == WORKER and kill.task else ""
    return f"[red]SIGKILL[/] {number} to {who} (pid {kill.pid}){doing}"


def recovery_line(kill: Kill) -> str:
    """What is said when the victim's work goes on."""
    what = "the gatherer was restarted"
    if kill.victim == WORKER:
        what = f"{kill.task} began again"
    elif kill.victim == LEADER:
        what = "the next head answered a write"
    return f"[green]  recovered[/] from pid {kill.pid}: {what} after {kill.recovery_ms:.1f} ms"


@dataclass(slots=True)
class Outcome:
    """All that a run has shown."""

    cpus: float
    seed: int
    files: int
    size_bytes: int
    tasks: int
    start_s: float
    job_s: float = 0.0
    check_s: float = 0.0
    attempts: int = 0
    run_again: int = 0
    sent_again: int = 0
    kills: list[Kill] = field(default_factory=list)
    result: Counts = field(default_factory=Counts)
    differences: list[str] = field(default_factory=list)

    def recoveries_ms(self) -> list[float]:
        return sorted(kill.recovery_ms for kill in self.kills if kill.recovery_ms is not None)

    def as_json(self, rows: int) -> dict[str, Any]:
        recoveries = self.recoveries_ms()
        return {
            "ok": not self.differences,
            "differences": self.differences,
            "cpus": self.cpus,
            "seed": self.seed,
            "files": self.files,
            "size_bytes": self.size_bytes,
            "tasks": self.tasks,
            "attempts": self.attempts,
            "run_again": self.run_again,
            "sent_again": self.sent_again,
            "start_s": round(self.start_s, 3),
            "job_s": round(self.job_s, 3),
            "check_s": round(self.check_s, 3),
            "kills": [
                {"victim": kill.victim, "pid": kill.pid, "task": kill.task, "recovery_ms": _rounded(kill.recovery_ms)}
                for kill in self.kills
            ],
            "recovery_ms_median": _rounded(statistics.median(recoveries) if recoveries else None),
            "recovery_ms_max": _rounded(recoveries[-1] if recoveries else None),
            "top_words": top(self.result.words, rows),
            "top_identifiers": top(self.result.identifiers, rows),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def tables(outcome: Outcome, rows: int) -> list[Table]:
    """The most frequent words and identifiers side by side, and the figures of the run."""
    found = Table(title="Most frequent in the standard library")
    for heading in ("word", "times", "identifier", "times"):
        found.add_column(heading, justify="right" if heading == "times" else "left")
    for (word, word_count), (name, name_count) in zip(
        top(outcome.result.words, rows), top(outcome.result.identifiers, rows)
    ):
        found.add_row(word, f"{word_count:,}", name, f"{name_count:,}")
    figures = Table(title="The run", show_header=False)
    for name, value in run_rows(outcome):
        figures.add_row(name, value)
    return [found, figures]


def run_rows(outcome: Outcome) -> list[tuple[str, str]]:
    """(name, value) for each figure of the run."""
    recoveries = outcome.recoveries_ms()
    victims = [kill.victim for kill in outcome.kills]
    rows = [
        ("files, bytes", f"{outcome.files:,}, {outcome.size_bytes / 1e6:.1f} MB"),
        ("tasks and calls", f"{outcome.tasks:,}"),
        ("tasks run again", f"{outcome.run_again:,}"),
        ("parts sent to the gatherer again", f"{outcome.sent_again:,}"),
        ("SIGKILLs", _by_victim(victims) if victims else "none"),
    ]
    if recoveries:
        rows += [
            ("interrupted and recovered", f"{len(recoveries)}"),
            ("recovery, median", f"{statistics.median(recoveries):.1f} ms"),
            ("recovery, longest", f"{recoveries[-1]:.1f} ms"),
        ]
    rows += [
        ("start of the session", f"{outcome.start_s:.2f} s"),
        (f"job on {outcome.cpus:g} CPUs", f"{outcome.job_s:.2f} s"),
        ("the same in one plain process", f"{outcome.check_s:.2f} s"),
    ]
    return rows


def _by_victim(victims: Sequence[str]) -> str:
    workers, gatherer, leaders = (victims.count(each) for each in (WORKER, GATHERER, LEADER))
    return f"{len(victims)}: {workers} to busy workers, {gatherer} to the gatherer, {leaders} to the leading head"
