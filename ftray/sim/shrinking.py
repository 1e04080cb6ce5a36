"""A smaller run that fails as one did: fewer faults first, then simpler ones.

Role: shell around `runner`.

1. Faults are left out, half of them at a time, then less: that is quick, and what is left has its numbers still.
2. hypothesis makes the rest simpler (`strategies.simpler`): fewer, earlier, at round times, shorter, fewer clients,
   less time. Without hypothesis this is left out, and the result says so.

Rules
- A run fails *alike* if it fails in the same way (safety, liveness, crash) and the message begins alike, numbers
  apart. Otherwise one defect would be shrunk into another.
- There is an end, after so many runs or so much CPU time, and each moment has a best so far: whoever interrupts a
  shrinker loses nothing.
- A schedule is run once; what hypothesis asks again is answered from memory.

Rejected: shrinking all failures of a batch at once (each is a matter of its own); hypothesis alone (it leaves out one
fault at a time where halves do).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from ftray.sim.faults import Fault
from ftray.sim.heads import Hooks
from ftray.sim.runner import Outcome, run_seed
from ftray.sim.world import Options

RUNS_MAX = 300
CPU_S_MAX = 60.0
NOT_INSTALLED = "times and durations were not made simpler, for want of hypothesis: pip install 'ftray[sim]'"
_VARIES = re.compile(r"\bb'[^']*'|\b[0-9a-f]{8,}\b|\d+(\.\d+)?")
"""Keys, identifiers and numbers."""
_HEAD_WORDS = 8


def head_of(message: str) -> str:
    """How a message begins, without what differs from run to run."""
    first = message.partition("\n")[0]
    return " ".join(_VARIES.sub("#", first).split()[:_HEAD_WORDS])


def alike(one: Outcome, other: Outcome) -> bool:
    return one.kind == other.kind and head_of(one.message) == head_of(other.message)


class _SpentError(Exception):
    """No more runs."""


class Shrinker:
    """Makes one failed run smaller. `best` is the smallest that was found up to now."""

    def __init__(
        self,
        failed: Outcome,
        hooks_kind: type[Hooks] = Hooks,
        told: Callable[[str], object] = lambda text: None,
        *,
        runs_max: int | None = None,
        cpu_s_max: float = CPU_S_MAX,
    ) -> None:
        """`told` is called with a line of progress after each run. `runs_max` is RUNS_MAX unless it is given."""
        self.best = failed
        self.runs = 0
        self.cpu_s = 0.0
        self.note = ""
        """What could not be done, and why."""
        self._failed = failed
        self._hooks_kind = hooks_kind
        self._told = told
        self._runs_max = RUNS_MAX if runs_max is None else runs_max
        self._cpu_s_max = cpu_s_max
        self._known: dict[tuple[object, ...], Outcome | None] = {}
        """By what is run, how it failed; None: not, or otherwise."""
        self._known[self._key(failed.options, failed.faults)] = failed

    def run(self) -> Outcome:
        """Shrinks to the end, or until runs or time are spent. Returns `best`."""
        try:
            self._leave_out()
            self._simplify()
        except _SpentError:
            self.note = f"the search ended after {self.runs} runs and {self.cpu_s:.0f} s of CPU time"
        return self.result()

    def result(self) -> Outcome:
        """`best`, with a word on how it was found."""
        before, after = len(self._failed.faults), len(self.best.faults)
        text = f"shrunk from {before} faults to {after} in {self.runs} runs"
        return replace(self.best, shrunk=f"{text}; {self.note}" if self.note else text)

    # --- leaving out --------------------------------------------------------------------------------------------------

    def _leave_out(self) -> None:
        kept = list(self._failed.faults)
        size = max(1, len(kept) // 2)
        while kept:
            shrunk, at = False, 0
            while at < len(kept):
                fewer = kept[:at] + kept[at + size :]
                numbers = tuple(each.number for each in fewer)
                if self._fails(replace(self._failed.options, only=numbers), fewer):
                    kept, shrunk = fewer, True
                else:
                    at += size
            if size > 1:
                size = max(1, size // 2)
            elif not shrunk:
                return

    # --- hypothesis ---------------------------------------------------------------------------------------------------

    def _simplify(self) -> None:
        try:
            import hypothesis
        except ImportError:
            self.note = NOT_INSTALLED
            return
        from ftray.sim.strategies import simpler

        before = self.best
        start = replace(before.options, schedule=tuple(before.faults), only=None)
        spent = False

        def fails(options: Options) -> bool:
            # When nothing may be run any more all else counts as right, and hypothesis comes to its end.
            nonlocal spent
            try:
                return self._fails(options, options.schedule or ())
            except _SpentError:
                spent = True
                return False

        settings = hypothesis.settings(
            max_examples=200, deadline=None, database=None,
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        )  # fmt: skip
        try:
            found = hypothesis.find(simpler(start), fails, settings=settings, random=random.Random(before.seed))
        except hypothesis.errors.NoSuchExample:
            found = start
        known = self._known[self._key(found, found.schedule or ())]
        assert known is not None
        self.best = self._by_number(known)
        if spent:
            raise _SpentError

    def _by_number(self, found: Outcome) -> Outcome:
        """The same, said in numbers of the first schedule if nothing but their number has changed."""
        first = self._failed
        same = (found.options.clients, found.options.seconds) == (first.options.clients, first.options.seconds)
        if not same or not all(fault in first.faults for fault in found.faults):
            return found
        return replace(found, options=replace(first.options, only=tuple(each.number for each in found.faults)))

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _key(self, options: Options, faults: Sequence[Fault]) -> tuple[object, ...]:
        return (options.clients, options.seconds, tuple(faults))

    def _fails(self, options: Options, faults: Sequence[Fault]) -> bool:
        """Whether that fails as the first run did. Raises _SpentError."""
        key = self._key(options, faults)
        if key not in self._known:
            if self.runs >= self._runs_max or self.cpu_s >= self._cpu_s_max:
                raise _SpentError
            self.runs += 1
            outcome = run_seed(self._failed.seed, options, self._hooks_kind)
            self.cpu_s += outcome.cpu_s
            self._known[key] = outcome if alike(outcome, self._failed) else None
            if self._known[key] is not None:
                self.best = outcome
            self._told(f"shrinking: {len(self._failed.faults)} faults -> {len(self.best.faults)}, {self.runs} runs")
        return self._known[key] is not None
