"""What is measured, and how.

Role: the definitions of all benchmarks, as generators that set up, warm up, and then yield one measurement each time.
They get the system as an argument: a module with `init`, `remote`, `get`, `put`, `wait`, so that another system with
the same interface is measured by the very same code.

Rules: only the standard library is imported here, so that an interpreter without ftray's dependencies can run this for
another system. Remote functions and classes are at the top of the module and are pickled by name. Rates are of a time
slice, not of a fixed count, so that slow and fast machines give as much data.

Rejected: the same session for all benchmarks (what one leaves behind would be measured by the next).
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftray.perf.figures import Limit

SLICE_S = 0.4
"""The length of one measurement of a rate."""
WARM_UP_S = 0.3
IN_FLIGHT = 1_000
LARGE_BYTES = 100_000_000
REFS = 100_000
ACTORS = 20
SETTLE_S = 0.1
"""Between two kills, so that each one meets a system that is at rest."""

Samples = Generator[float, None, None]
Measure = Callable[[Any], Samples]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark. `session` has the arguments of `init`; None if the benchmark starts its own."""

    name: str
    title: str
    unit: str
    measure: Measure
    more_is_better: bool = True
    limit_value: float | None = None
    rounds: int = 5
    session: Mapping[str, Any] | None = field(default_factory=lambda: {"num_cpus": 2})
    fresh: bool = False
    """Each measurement in a process of its own."""
    timeout_s: float = 120.0

    @property
    def limit(self) -> Limit | None:
        return None if self.limit_value is None else Limit(self.limit_value, self.more_is_better)


# --- what runs remotely ---------------------------------------------------------------------------------------------


def nothing() -> bytes:
    return b"ok"


class Counter:
    """An actor."""

    def nothing(self) -> bytes:
        return b"ok"

    def pid(self) -> int:
        return os.getpid()


class AsyncCounter:
    """An actor whose methods are coroutines."""

    async def nothing(self) -> bytes:
        return b"ok"


class Block:
    """Bytes that are pickled out of band, as arrays are: stored by one copy, and read without."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Block, (pickle.PickleBuffer(self.data),)


def make_block() -> Block:
    # Not zeros: pages of zeros that were never written are one page in the processor's cache.
    return Block(bytearray(os.urandom(1_000_000) * (LARGE_BYTES // 1_000_000)))


def hold() -> None:
    """Keeps its resources until it is killed with the session."""
    time.sleep(3_600)


def first_attempt_waits(path: str) -> None:
    """Writes its pid to a new file and waits to be killed; where the file exists already it returns at once."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return
    os.write(fd, b"%d\n" % os.getpid())
    os.close(fd)
    time.sleep(3_600)


# --- measuring ------------------------------------------------------------------------------------------------------


def rates(operation: Callable[[], object], count: int = 1) -> Samples:
    """Operations per second, after a warm-up. `operation` does `count` of them."""
    for slice_s in _forever(WARM_UP_S, SLICE_S):
        done = 0
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < slice_s:
            operation()
            done += count
        if slice_s == SLICE_S:
            yield done / elapsed


def _forever(first: float, then: float) -> Iterator[float]:
    yield first
    while True:
        yield then


def resident_bytes() -> int:
    """The resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- start and stop -------------------------------------------------------------------------------------------------

_START = """
import sys, time
started = time.perf_counter()
import {system} as system
from ftray.perf.definitions import nothing
system.init(num_cpus=2)
system.get(system.remote(nothing).remote())
first = time.perf_counter()
system.shutdown()
print((first - started) * 1e3, (time.perf_counter() - first) * 1e3)
"""


def _start_and_stop(system: Any) -> tuple[float, float]:
    code = _START.format(system=system.__name__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the program failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    start_ms, stop_ms = done.stdout.split()[-2:]
    return float(start_ms), float(stop_ms)


def start(system: Any) -> Samples:
    """Milliseconds from before `import ftray` to the first task's result, in a new interpreter."""
    _start_and_stop(system)
    while True:
        yield _start_and_stop(system)[0]


def stop(system: Any) -> Samples:
    """Milliseconds of `shutdown()` of such a program."""
    _start_and_stop(system)
    while True:
        yield _start_and_stop(system)[1]


# --- tasks and calls ------------------------------------------------------------------------------------------------


def tasks_sync(system: Any) -> Samples:
    task, get = system.remote(nothing), system.get
    yield from rates(lambda: get(task.remote()))


def tasks_in_flight(system: Any) -> Samples:
    task, get = system.remote(nothing), system.get
    yield from rates(lambda: get([task.remote() for _ in range(IN_FLIGHT)]), IN_FLIGHT)


def calls_sync(system: Any) -> Samples:
    actor, get = system.remote(Counter).remote(), system.get
    yield from rates(lambda: get(actor.nothing.remote()))


def calls_in_flight(system: Any) -> Samples:
    actor, get = system.remote(Counter).remote(), system.get
    yield from rates(lambda: get([actor.nothing.remote() for _ in range(IN_FLIGHT)]), IN_FLIGHT)


def async_calls_sync(system: Any) -> Samples:
    actor, get = system.remote(AsyncCounter).remote(), system.get
    yield from rates(lambda: get(actor.nothing.remote()))


def async_calls_in_flight(system: Any) -> Samples:
    actor, get = system.remote(AsyncCounter).remote(), system.get
    yield from rates(lambda: get([actor.nothing.remote() for _ in range(IN_FLIGHT)]), IN_FLIGHT)


def actors_made(system: Any) -> Samples:
    """Milliseconds until `ACTORS` new actors have answered a first call."""
    cls, get = system.remote(num_cpus=0)(Counter), system.get
    while True:
        started = time.perf_counter()
        actors = [cls.remote() for _ in range(ACTORS)]
        pids = get([actor.pid.remote() for actor in actors])
        elapsed_ms = (time.perf_counter() - started) * 1e3
        assert len(set(pids)) == ACTORS
        del actors
        time.sleep(SETTLE_S)
        yield elapsed_ms


# --- objects --------------------------------------------------------------------------------------------------------


def put_small(system: Any) -> Samples:
    put = system.put
    yield from rates(lambda: put(b"small"))


def get_small(system: Any) -> Samples:
    get, ref = system.get, system.put(b"small")
    yield from rates(lambda: get(ref))


def put_large(system: Any) -> Samples:
    """Gigabytes per second into memory that the store has used before."""
    block = make_block()
    for number in range(sys.maxsize):
        started = time.perf_counter()
        ref = system.put(block)
        elapsed_s = time.perf_counter() - started
        del ref
        time.sleep(SETTLE_S)
        if number:
            yield LARGE_BYTES / 1e9 / elapsed_s


def get_large(system: Any) -> Samples:
    """Milliseconds of `get` on a finished task's large result."""
    task = system.remote(make_block)
    while True:
        ref = task.remote()
        system.wait([ref])
        started = time.perf_counter()
        block = system.get(ref)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        assert len(memoryview(block.data)) == LARGE_BYTES
        del ref, block
        time.sleep(SETTLE_S)
        yield elapsed_ms


def bytes_per_ref(system: Any) -> Samples:
    """Growth of the driver's resident memory by tasks that wait for a resource, each with its reference."""
    holder = system.remote(num_cpus=0, resources={"gate": 1})(hold).remote()
    waiting = system.remote(num_cpus=0, resources={"gate": 1})(nothing)
    refs = [waiting.remote() for _ in range(100)]
    gc.collect()
    before = resident_bytes()
    refs += [waiting.remote() for _ in range(REFS)]
    time.sleep(SETTLE_S)
    gc.collect()
    yield (resident_bytes() - before) / REFS
    del refs, holder


# --- recovery -------------------------------------------------------------------------------------------------------


def retry(system: Any) -> Samples:
    """Milliseconds from the SIGKILL of the worker that runs a task to the result of the task's second attempt."""
    task = system.remote(max_retries=1)(first_attempt_waits)
    with tempfile.TemporaryDirectory(prefix="ftray-perf-") as folder:
        for number in range(sys.maxsize):
            path = os.path.join(folder, str(number))
            ref = task.remote(path)
            pid = _pid_in(path)
            time.sleep(SETTLE_S)
            started = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            system.get(ref)
            elapsed_ms = (time.perf_counter() - started) * 1e3
            if number:
                yield elapsed_ms


def _pid_in(path: str) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with open(path, encoding="ascii") as file:
                text = file.read()
            if text.endswith("\n"):
                return int(text)
        except FileNotFoundError:
            pass
        time.sleep(0.001)
    raise TimeoutError("the task did not start within 30 s")


def restart(system: Any) -> Samples:
    """Milliseconds from the SIGKILL of an actor's process to the answer of the first call after it."""
    actor = system.remote(max_restarts=-1, max_task_retries=-1)(Counter).remote()
    pid = system.get(actor.pid.remote())
    for number in range(sys.maxsize):
        time.sleep(SETTLE_S)
        started = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        successor = system.get(actor.pid.remote())
        elapsed_ms = (time.perf_counter() - started) * 1e3
        assert successor != pid
        pid = successor
        if number:
            yield elapsed_ms


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("init", "init() to the first result", "ms", start, False, 600, session=None),
    Benchmark("shutdown", "shutdown()", "ms", stop, False, session=None),
    Benchmark("tasks-sync", "tasks, one by one", "/s", tasks_sync, limit_value=4_000),
    Benchmark("tasks-1000", "tasks, 1,000 in flight", "/s", tasks_in_flight, limit_value=20_000),
    Benchmark("calls-sync", "actor calls, one by one", "/s", calls_sync, limit_value=4_000),
    Benchmark("calls-1000", "actor calls, 1,000 in flight", "/s", calls_in_flight, limit_value=20_000),
    Benchmark("async-calls-sync", "async calls, one by one", "/s", async_calls_sync),
    Benchmark("async-calls-1000", "async calls, 1,000 in flight", "/s", async_calls_in_flight),
    Benchmark("put-small", "put of a small value", "/s", put_small),
    Benchmark("get-small", "get of a small value", "/s", get_small),
    Benchmark("put-100mb", "put of 100 MB", "GB/s", put_large),
    Benchmark("get-100mb", "get of 100 MB", "ms", get_large, False),
    Benchmark("retry", "task's retry after SIGKILL", "ms", retry, False, 30, rounds=30),
    Benchmark("restart", "actor's restart after SIGKILL", "ms", restart, False, 50, rounds=30),
    Benchmark(
        "bytes-per-ref", "memory per waiting task", "bytes", bytes_per_ref, False, 1_500, rounds=3,
        session={"num_cpus": 2, "resources": {"gate": 1}}, fresh=True,
    ),
    Benchmark("actors-20", "20 actors made and called", "ms", actors_made, False),
)  # fmt: skip
"""In the order in which they are run and shown."""
