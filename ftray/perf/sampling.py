"""Where a process spends its processor time: a sampling profiler for the page of benchmarks.

Role: shell, standard library only. The kernel's profiling timer sends SIGPROF for every `INTERVAL_S` of processor
time that the process uses; the handler notes what the main thread is doing. Counts are written to `<folder>/<pid>.json`
as they come in, because a worker ends without notice. Timers do not survive a fork: each process starts its own.

Rejected: cProfile, which makes short functions look several times as expensive as they are; and a thread that looks at
`sys._current_frames()`, which sees only where the interpreter lock is given up.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

VARIABLE = "FTRAY_PERF_SAMPLES"
"""Names the folder; unset, nothing is sampled."""
INTERVAL_S = 0.004
WRITE_EVERY = 10

_counts: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class Hot:
    """A function, and its share of the samples of its process, without what it calls."""

    where: str
    share: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """The samples of one process."""

    pid: int
    samples: int
    hottest: tuple[Hot, ...]


def start_if_asked() -> None:
    """Starts sampling in this process, if the environment names a folder and this is the main thread."""
    folder = os.environ.get(VARIABLE)
    if not folder or threading.current_thread() is not threading.main_thread():
        return
    path = Path(folder) / f"{os.getpid()}.json"

    def sample(signum: int, frame: FrameType | None) -> None:
        if frame is not None:
            code = frame.f_code
            _counts[f"{code.co_filename}:{code.co_qualname}:{frame.f_lineno}"] += 1
            if _counts.total() % WRITE_EVERY == 0:
                path.write_text(json.dumps(_counts), encoding="utf-8")

    def stop() -> None:
        # An interpreter that ends gives signals their default meaning, and that of SIGPROF is death.
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)

    signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)
    atexit.register(stop)


def collected(folder: Path, top: int) -> list[Sampled]:
    """What the processes of a run have written, the busiest first; of each the `top` hottest functions."""
    found = []
    for path in folder.glob("*.json"):
        try:
            lines: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # killed while it wrote
            continue
        found.append(Sampled(int(path.stem), sum(lines.values()), hottest(lines.items(), top)))
    return sorted(found, key=lambda each: -each.samples)


def hottest(lines: Iterable[tuple[str, int]], top: int) -> tuple[Hot, ...]:
    """The functions with most samples, given samples by `file:function:line`."""
    functions: Counter[str] = Counter()
    for where, count in lines:
        functions[_short(where.rpartition(":")[0])] += count
    total = functions.total()
    return tuple(Hot(where, count / total) for where, count in functions.most_common(top))


def _short(where: str) -> str:
    """`package/module.py function` without what comes before the package."""
    path, _, function = where.rpartition(":")
    for mark in ("/site-packages/", "/ftray/", "/lib/python"):
        _, found, after = path.rpartition(mark)
        if found:
            kept = after.partition("/")[2] if mark == "/lib/python" else after
            path = f"ftray/{kept}" if mark == "/ftray/" else kept
            break
    return f"{path} {function}"
