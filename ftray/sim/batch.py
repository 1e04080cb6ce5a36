"""Many seeds: in this process, or spread over several.

Role: shell (processes, pipes). Who asks for a batch is told of each thing as it happens, through a `Listener`.

Rules
- A worker is a process of its own that gets one seed at a time, over its standard input, and answers over its standard
  output. It is killed when the one who asked has died, however that was and whatever it is at.
- A seed whose process dies is a failure like any other; the rest of the batch goes on in a new process.
- Ctrl-C reaches the asking process only; it ends the workers.
- Run twice, a seed runs in two processes in which bytes and texts have different hashes: an order that comes from a set
  would be the same twice within one process.

Rejected: `multiprocessing` (it has threads of its own, starts from the main module, and a worker that dies breaks the
pool); a thread for each worker (one selector does it).
"""

from __future__ import annotations

import ctypes
import os
import pickle
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from io import RawIOBase
from typing import IO, Any, Protocol

from ftray.sim.runner import CRASH, Outcome, compared, run_seed
from ftray.sim.shrinking import Shrinker
from ftray.sim.world import Options

_LENGTH_BYTES = 8
_PR_SET_PDEATHSIG = 1
_Pipe = IO[bytes] | RawIOBase


class Listener(Protocol):
    """Who asked for a batch."""

    def begun(self, seed: int) -> None:
        """It runs now; a second time if each seed runs twice."""
        ...

    def found(self, outcome: Outcome) -> None:
        """A run has failed, and is made smaller now; `done` comes later."""
        ...

    def shrinking(self, seed: int, text: str) -> None:
        """How far it is."""
        ...

    def done(self, outcome: Outcome) -> bool:
        """A seed is finished. Returns whether to go on."""
        ...


def usual_jobs() -> int:
    """As many processes as this one may use processors."""
    return len(os.sched_getaffinity(0))


def run_batch(
    seeds: Iterable[int], options: Options, listener: Listener, *, jobs: int = 1, twice: bool = False,
    shrink: bool = True, keep_log: bool = False,
) -> None:  # fmt: skip
    """Runs the seeds, `jobs` of them at a time (two at least if each runs twice). `keep_log`: also of runs without a
    failure. An interrupt ends the workers and is passed on."""
    if jobs > 1 or twice:
        _Pool(deque(seeds), options, listener, max(jobs, 2 if twice else 1), twice, shrink, keep_log).run()
        return
    for seed in seeds:
        listener.begun(seed)
        outcome = run_seed(seed, options)
        if shrink and not outcome.ok:
            listener.found(outcome)
            outcome = _shrunk(outcome, listener)
        if outcome.ok and not keep_log:
            outcome.log.clear()
        if not listener.done(outcome):
            return


def _shrunk(outcome: Outcome, listener: Listener) -> Outcome:
    shrinker = Shrinker(outcome, told=lambda text: listener.shrinking(outcome.seed, text))
    try:
        return shrinker.run()
    except KeyboardInterrupt:
        listener.done(shrinker.result())
        raise


# --- the asking side --------------------------------------------------------------------------------------------------


class _Worker:
    """A process, and what it is at."""

    program = "from ftray.sim.batch import work; work()"

    def __init__(self, hash_seed: int | None) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
        if hash_seed is not None:
            environment["PYTHONHASHSEED"] = str(hash_seed)
        self.hash_seed = hash_seed
        self.seed: int | None = None
        self.first: Outcome | None = None
        """What the seed's first run has given, if this is its second one."""
        # In a process group of its own, which a terminal's Ctrl-C does not reach.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", self.program], bufsize=0, env=environment, process_group=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, seed: int, options: Options, shrink: bool, keep_log: bool, first: Outcome | None = None) -> None:
        self.seed, self.first = seed, first
        assert self.process.stdin is not None
        try:
            _write(self.process.stdin, (seed, options, shrink, keep_log))
        except BrokenPipeError:
            pass  # its output is at an end, too, and that is looked at

    def answer(self) -> tuple[str, Any] | None:
        """Waits for the rest of what has begun to arrive. None: it is dead."""
        assert self.process.stdout is not None
        answer: tuple[str, Any] | None = _read(self.process.stdout)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class _Pool:
    def __init__(
        self, seeds: deque[int], options: Options, listener: Listener, jobs: int, twice: bool, shrink: bool,
        keep_log: bool,
    ) -> None:  # fmt: skip
        self._seeds = seeds
        self._options = options
        self._listener = listener
        self._twice = twice
        self._shrink = shrink
        self._keep_log = keep_log or twice
        self._jobs = min(jobs, max(2 if twice else 1, len(seeds)))
        self._again: list[tuple[Outcome, int | None]] = []
        """First runs, and the hash seeds under which they ran."""
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []

    def run(self) -> None:
        try:
            for number in range(self._jobs):
                self._start(number + 1 if self._twice else None)
            while any(worker.seed is not None for worker in self._workers):
                for key, _ in self._selector.select():
                    if not self._heard(key.data):
                        return
        finally:
            for worker in self._workers:
                worker.end()
            self._selector.close()

    def _start(self, hash_seed: int | None) -> None:
        worker = _Worker(hash_seed)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        self._next(worker)

    def _next(self, worker: _Worker) -> None:
        """Gives an idle worker something to do, if it can do something."""
        for place, (first, hash_seed) in enumerate(self._again):
            if hash_seed != worker.hash_seed:
                del self._again[place]
                worker.ask(first.seed, self._options, False, True, first)
                self._listener.begun(first.seed)
                return
        if self._seeds:
            seed = self._seeds.popleft()
            worker.ask(seed, self._options, self._shrink, self._keep_log)
            self._listener.begun(seed)

    def _heard(self, worker: _Worker) -> bool:
        """Something has arrived. Returns whether to go on."""
        answer = worker.answer()
        if answer is None:
            return self._died(worker)
        what, value = answer
        assert worker.seed is not None
        if what == "found":
            self._listener.found(value)
            return True
        if what == "shrinking":
            self._listener.shrinking(worker.seed, value)
            return True
        return self._finished(worker, value)

    def _finished(self, worker: _Worker, outcome: Outcome) -> bool:
        first, worker.seed, worker.first = worker.first, None, None
        go_on = True
        if self._twice and first is None and outcome.ok:
            self._again.append((outcome, worker.hash_seed))
        else:
            if first is not None:
                outcome = compared(first, outcome)
            go_on = self._listener.done(outcome)
        if go_on:
            for each in self._workers:
                if each.seed is None:
                    self._next(each)
        return go_on

    def _died(self, worker: _Worker) -> bool:
        self._selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        self._workers.remove(worker)
        code = worker.process.wait()
        worker.end()
        seed = worker.seed
        if seed is None:
            return True
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        outcome = Outcome(
            seed, self._options, CRASH, f"the process that ran the seed has ended with {how}", "", 0.0, 0.0, 0, 0,
            list(self._options.schedule or ()),
        )  # fmt: skip
        go_on = self._listener.done(outcome)
        if go_on and (self._seeds or self._again):
            self._start(worker.hash_seed)
        return go_on


# --- the worker's side ------------------------------------------------------------------------------------------------


class _Answers:
    """A worker's listener: hands everything on."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe

    def begun(self, seed: int) -> None:
        """Who asked knows."""

    def found(self, outcome: Outcome) -> None:
        _write(self._pipe, ("found", outcome))

    def shrinking(self, seed: int, text: str) -> None:
        _write(self._pipe, ("shrinking", text))

    def done(self, outcome: Outcome) -> bool:
        _write(self._pipe, ("done", outcome))
        return True


def work() -> None:
    """What a worker runs, until its input ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    # What anything prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    questions = os.fdopen(os.dup(0), "rb", buffering=0)
    keep_hypothesis_out_of_the_way()
    listener = _Answers(answers)
    try:
        while True:
            question = _read(questions)
            if question is None:
                return
            seed, options, shrink, keep_log = question
            run_batch([seed], options, listener, shrink=shrink, keep_log=keep_log)
    except BrokenPipeError:
        return  # nobody wants to know any more


def keep_hypothesis_out_of_the_way() -> None:
    """hypothesis writes a cache; not where somebody happens to run a command. For processes of our own only."""
    if "hypothesis" not in sys.modules:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(cache, "ftray", "hypothesis"))


def _write(pipe: _Pipe, value: object) -> None:
    data = pickle.dumps(value)
    view = memoryview(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
    while view:
        view = view[pipe.write(view) :]


def _read(pipe: _Pipe) -> Any:
    """The next value; None at the end, also if it comes in the middle of one."""
    head = _read_exactly(pipe, _LENGTH_BYTES)
    data = None if head is None else _read_exactly(pipe, int.from_bytes(head, "little"))
    return None if data is None else pickle.loads(data)


def _read_exactly(pipe: _Pipe, size: int) -> bytes | None:
    parts = []
    while size:
        part = pipe.read(size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
