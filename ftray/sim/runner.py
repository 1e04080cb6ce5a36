"""Runs of the simulator: one seed, its verdict, the command that runs it again.

Role: shell around `World`.

A run has failed when
- *safety*: something that must never be was seen;
- *liveness*: something that must come about after the faults did not;
- *crash*: code raised what nobody expected;
- *nondeterminism*: the same seed and options gave another trace.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field, replace

from ftray.sim.faults import Fault
from ftray.sim.heads import Hooks
from ftray.sim.world import Options, World

SAFETY, LIVENESS, CRASH, NONDETERMINISM = "safety", "liveness", "crash", "nondeterminism"
LOG_LINES = 80
"""Of the event log, in a report."""


@dataclass
class Outcome:
    """What became of one run."""

    seed: int
    options: Options
    kind: str
    """"" if all is well."""
    message: str
    trace: str
    virtual_ms: float
    cpu_s: float
    operations: int
    undecided: int
    """Histories for which the checker's budget was too small."""
    faults: list[Fault]
    """Those that were to happen."""
    log: list[str] = field(repr=False, default_factory=list)
    schedule_file: str = ""
    """Where the schedule lies, if it is not the seed's."""
    shrunk: str = ""
    """How a smaller schedule was found; "" if none was looked for."""

    @property
    def ok(self) -> bool:
        return not self.kind

    @property
    def replay(self) -> str:
        """The command that runs it again. A schedule that is not the seed's lies in `schedule_file`."""
        return replay(self.seed, self.options, self.schedule_file)

    def __str__(self) -> str:
        if self.ok:
            return f"seed {self.seed}: ok ({self.operations} operations, {self.virtual_ms / 1000:.1f} virtual seconds)"
        faults = "\n".join(f"    {each}" for each in self.faults) or "    none"
        shrunk = f" ({self.shrunk})" if self.shrunk else ""
        log = "\n".join(self.log[-LOG_LINES:])
        return (
            f"seed {self.seed}: {self.kind} failure\n{self.message}\n\nReplay: {self.replay}\nTrace: {self.trace}\n"
            f"Faults{shrunk}:\n{faults}\nThe end of the event log:\n{log}"
        )


def replay(seed: int, options: Options, schedule_file: str = "") -> str:
    """The command that runs a seed with these options."""
    usual = Options()
    words = ["ftray sim run", f"--seed {seed}"]
    for name in ("heads", "clients", "nodes", "seconds", "pause_ms"):
        value = getattr(options, name)
        if value != getattr(usual, name):
            words.append(f"--{name.replace('_', '-')} {value!r}")
    if options.small:
        words.append("--small")
    if options.schedule is not None:
        words.append(f"--schedule {shlex.quote(schedule_file or 'SCHEDULE.json')}")
    elif options.faults != usual.faults:
        words.append(f"--faults {','.join(options.faults) or 'none'}")
    if options.only is not None:
        words.append(f"--only {','.join(map(str, options.only)) or 'none'}")
    return " ".join(words)


def run_seed(seed: int, options: Options, hooks_kind: type[Hooks] = Hooks) -> Outcome:
    """One run."""
    began_s = time.process_time()
    world = World(seed, options, hooks_kind)
    kind = message = ""
    try:
        stuck = world.run()
    except Exception as error:
        stuck = ""
        kind, message = CRASH, f"{type(error).__name__}: {error}"
    if world.problems:
        kind, message = SAFETY, "\n".join(world.problems[:5])
    elif world.errors:
        kind, message = CRASH, "\n".join(world.errors[:5])
    elif stuck:
        kind, message = LIVENESS, stuck
    return Outcome(
        seed, options, kind, message, world.sim.trace, world.sim.now_ms, time.process_time() - began_s,
        world.histories.operations, world.checks.undecided, _wanted(world.schedule, options), list(world.sim.log),
    )  # fmt: skip


def faults_of(seed: int, options: Options) -> list[Fault]:
    """The schedule of such a run, `only` or not."""
    return World(seed, options).schedule


def _wanted(faults: list[Fault], options: Options) -> list[Fault]:
    return [each for each in faults if options.only is None or each.number in options.only]


def run_twice(seed: int, options: Options, hooks_kind: type[Hooks] = Hooks) -> Outcome:
    """One run, and the same again in this process: their traces must be the same."""
    first = run_seed(seed, options, hooks_kind)
    return compared(first, run_seed(seed, options, hooks_kind)) if first.ok else first


def compared(first: Outcome, second: Outcome) -> Outcome:
    """The outcome of two runs of a seed, the first of which was right. Their logs say where they begin to differ."""
    both = replace(
        first, cpu_s=first.cpu_s + second.cpu_s, virtual_ms=first.virtual_ms + second.virtual_ms,
        operations=first.operations + second.operations,
    )  # fmt: skip
    if first.trace == second.trace:
        return both
    return replace(both, kind=NONDETERMINISM, message=f"two runs differ: {_first_difference(first, second)}")


def _first_difference(first: Outcome, second: Outcome) -> str:
    for one, other in zip(first.log, second.log):
        if one != other:
            return f"{one.strip()!r} and {other.strip()!r}"
    return f"traces {first.trace} and {second.trace}, the event logs are the same"
