"""What `ftray sim run` shows while it runs, and what it says at the end.

Role: shell (the terminal, files of schedules).

Rules: failures are shown at once, to standard output; progress goes to standard error, on one line of a terminal, or
now and then on a line of its own elsewhere. With `--json` only the object at the end is printed to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

from ftray.sim import schedules
from ftray.sim.runner import Outcome, replay
from ftray.sim.world import Options

ELSEWHERE_EVERY_S = 30.0
"""How often progress is told where there is no terminal."""
REDRAW_EVERY_S = 0.1


class Show:
    """The listener of a batch. See the module."""

    def __init__(
        self, asked: int, options: Options, schedule_file: str, out: Path, *, as_json: bool, fail_fast: bool,
        show_log: bool,
    ) -> None:  # fmt: skip
        self.failed: dict[int, Outcome] = {}
        """By seed; as first seen, until a smaller one is known."""
        self.seeds = 0
        self.interrupted = False
        self._asked = asked
        self._options = options
        self._schedule_file = schedule_file
        self._out = out
        self._as_json = as_json
        self._fail_fast = fail_fast
        self._show_log = show_log
        self._virtual_ms = self._cpu_s = 0.0
        self._operations = self._undecided = 0
        self._last_trace = ""
        self._running: dict[int, None] = {}
        self._shrinking: dict[int, str] = {}
        self._terminal = sys.stderr.isatty()
        self._began_s = self._drawn_s = time.monotonic()
        self._line = False

    # --- the listener -------------------------------------------------------------------------------------------------

    def begun(self, seed: int) -> None:
        self._running[seed] = None

    def found(self, outcome: Outcome) -> None:
        self.failed[outcome.seed] = outcome
        self._say(f"seed {outcome.seed}: {outcome.kind} failure: {_first_line(outcome.message)}")
        self._say(f"  {replay(outcome.seed, self._options, self._schedule_file)}")

    def shrinking(self, seed: int, text: str) -> None:
        self._shrinking[seed] = f"seed {seed}, {text}"
        self._progress()

    def done(self, outcome: Outcome) -> bool:
        self._shrinking.pop(outcome.seed, None)
        self._running.pop(outcome.seed, None)
        self.seeds += 1
        self._virtual_ms += outcome.virtual_ms
        self._cpu_s += outcome.cpu_s
        self._operations += outcome.operations
        self._undecided += outcome.undecided
        self._last_trace = outcome.trace
        if not outcome.ok:
            self.failed[outcome.seed] = outcome = self._saved(outcome)
            self._say(f"{outcome}\n")
        elif self._show_log:
            self._say("\n".join(outcome.log))
        self._progress()
        return not (self.failed and self._fail_fast)

    # --- the end ------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Prints the answer."""
        self._clear()
        failed = [self.failed[seed] for seed in sorted(self.failed)]
        hours, rate = self._virtual_ms / 3_600_000.0, self._virtual_ms / 1000.0 / self._cpu_s if self._cpu_s else 0.0
        if self._as_json:
            answer: dict[str, Any] = {
                "ok": not failed and not self.interrupted,
                "seeds": self.seeds,
                "seeds_asked": self._asked,
                "interrupted": self.interrupted,
                "running_when_interrupted": list(self._running) if self.interrupted else [],
                "failed": [_failure(each) for each in failed],
                "virtual_hours": hours,
                "virtual_seconds_per_cpu_second": rate,
                "operations": self._operations,
                "undecided_histories": self._undecided,
            }
            if self._asked == 1 and not failed:
                answer["trace"] = self._last_trace
            click.echo(json.dumps(answer))
            return
        stopped = ""
        if self.seeds < self._asked:
            stopped = f"{'interrupted' if self.interrupted else 'stopped'} after "
        unclear = f", {self._undecided} histories undecided" if self._undecided else ""
        click.echo(
            f"{stopped}{self.seeds}{f' of {self._asked}' if stopped else ''} seeds, {len(failed)} failed{unclear}: "
            f"{hours:.2f} virtual hours, {self._operations} operations, {rate:.0f} virtual seconds per CPU second, "
            f"{time.monotonic() - self._began_s:.0f} s"
        )
        if self.interrupted and self._running:
            click.echo(f"  running when interrupted: seeds {', '.join(map(str, self._running))}")
        if self._asked == 1 and not failed and self.seeds:
            click.echo(f"trace {self._last_trace}")
        for each in failed:
            click.echo(f"  {each.kind}: {each.replay}")

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 130 if self.interrupted else 0

    # --- parts --------------------------------------------------------------------------------------------------------

    def _saved(self, outcome: Outcome) -> Outcome:
        """With the name of the file in which its schedule lies, if it is not the seed's."""
        drawn = outcome.options.schedule
        if drawn is None:
            return outcome
        if drawn == self._options.schedule:
            return replace(outcome, schedule_file=self._schedule_file)
        path = self._out / schedules.file_name(outcome.seed, drawn)
        outcome = replace(outcome, schedule_file=str(path))
        data = schedules.encode(drawn, outcome.replay)
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            self._say(f"{path} could not be written ({error.strerror or error}). Write this to it, to replay the run:")
            self._say(data.decode(), err=self._as_json)
        return outcome

    def _say(self, text: str, err: bool = False) -> None:
        if not self._as_json or err:
            self._clear()
            click.echo(text, err=err)

    def _progress(self) -> None:
        if self._as_json or (self._asked == 1 and not self._shrinking):
            return
        now_s = time.monotonic()
        if now_s - self._drawn_s < (REDRAW_EVERY_S if self._terminal else ELSEWHERE_EVERY_S):
            return
        self._drawn_s = now_s
        took_s = now_s - self._began_s
        parts = [f"{self.seeds}/{self._asked} seeds, {len(self.failed)} failed"]
        if 0 < self.seeds < self._asked and not self._shrinking:
            parts.append(f"about {took_s / self.seeds * (self._asked - self.seeds):.0f} s left")
        parts += self._shrinking.values()
        text = "; ".join(parts)
        if self._terminal:
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)
            self._line = True
        else:
            click.echo(text, err=True)

    def _clear(self) -> None:
        """Takes the line of progress away."""
        if self._line:
            click.echo("\r\x1b[K", nl=False, err=True)
            self._line = False


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:200]


def _failure(outcome: Outcome) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "seed": outcome.seed, "kind": outcome.kind, "message": outcome.message, "replay": outcome.replay,
        "faults": [str(fault) for fault in outcome.faults], "log": outcome.log[-80:], "trace": outcome.trace,
        "shrunk": outcome.shrunk,
    }  # fmt: skip
    if outcome.options.schedule is not None:
        answer["schedule_file"] = outcome.schedule_file
        answer["schedule"] = msgspec.to_builtins(outcome.options.schedule)
    return answer
