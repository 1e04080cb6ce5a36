"""Runs of the simulator: one seed, its verdict, a smaller schedule that fails as it does.

Role: shell around `World`.

A run has failed when
- *safety*: something that must never be was seen;
- *liveness*: something that must come about after the faults did not;
- *crash*: code raised what nobody expected;
- *nondeterminism*: the same seed and options gave another trace.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from ftray.sim.faults import Fault
from ftray.sim.heads import Hooks
from ftray.sim.world import Options, World

SAFETY, LIVENESS, CRASH, NONDETERMINISM = "safety", "liveness", "crash", "nondeterminism"
LOG_LINES = 80
"""Of the event log, in a report."""
SHRINK_RUNS_MAX = 60


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

    @property
    def ok(self) -> bool:
        return not self.kind

    @property
    def replay(self) -> str:
        """The command that runs it again."""
        options, usual = self.options, Options()
        words = ["ftray sim run", f"--seed {self.seed}"]
        if options.heads != usual.heads:
            words.append(f"--heads {options.heads}")
        if options.clients != usual.clients:
            words.append(f"--clients {options.clients}")
        if options.seconds != usual.seconds:
            words.append(f"--seconds {options.seconds:g}")
        if options.faults != usual.faults:
            words.append(f"--faults {','.join(options.faults)}")
        if options.small:
            words.append("--small")
        if options.only is not None:
            words.append(f"--only {','.join(map(str, options.only)) or 'none'}")
        return " ".join(words)

    def __str__(self) -> str:
        if self.ok:
            return f"seed {self.seed}: ok ({self.operations} operations, {self.virtual_ms / 1000:.1f} virtual seconds)"
        faults = "\n".join(f"    {each}" for each in self.faults) or "    none"
        log = "\n".join(self.log[-LOG_LINES:])
        return (
            f"seed {self.seed}: {self.kind} failure\n{self.message}\n\nReplay: {self.replay}\n"
            f"Faults:\n{faults}\nThe end of the event log:\n{log}"
        )


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
    faults = [each for each in world.schedule if options.only is None or each.number in options.only]
    return Outcome(
        seed, options, kind, message, world.sim.trace, world.sim.now_ms, time.process_time() - began_s,
        world.histories.operations, world.checks.undecided, faults, list(world.sim.log),
    )  # fmt: skip


def run_twice(seed: int, options: Options) -> Outcome:
    """One run, and the same again: their traces must be the same."""
    first = run_seed(seed, options)
    if not first.ok:
        return first
    second = run_seed(seed, options)
    first.cpu_s += second.cpu_s
    if first.trace != second.trace:
        return replace(first, kind=NONDETERMINISM, message=f"two runs differ: {_first_difference(first, second)}")
    return first


def _first_difference(first: Outcome, second: Outcome) -> str:
    for one, other in zip(first.log, second.log):
        if one != other:
            return f"{one.strip()!r} and {other.strip()!r}"
    return f"traces {first.trace} and {second.trace}, the event logs are the same"


def shrink(failed: Outcome, hooks_kind: type[Hooks] = Hooks) -> Outcome:
    """Leaves out faults while the run still fails in the same way. Returns the smallest failing run that was found.

    First large parts, then single ones; at most `SHRINK_RUNS_MAX` runs.
    """
    best, kept, runs = failed, [each.number for each in failed.faults], 0
    size = max(1, len(kept) // 2)
    while kept and runs < SHRINK_RUNS_MAX:
        shrunk = False
        at = 0
        while at < len(kept) and runs < SHRINK_RUNS_MAX:
            fewer = kept[:at] + kept[at + size :]
            runs += 1
            outcome = run_seed(failed.seed, replace(failed.options, only=tuple(fewer)), hooks_kind)
            if outcome.kind == failed.kind:
                best, kept, shrunk = outcome, fewer, True
            else:
                at += size
        if size > 1:
            size = max(1, size // 2)
        elif not shrunk:
            break
    return best
