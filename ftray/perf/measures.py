"""How each benchmark measures: generators that set up, warm up, and then yield one measurement each time.

Role: the same code for all systems. They get the system as an argument: a module with `init`, `remote`, `get`, `put`,
`wait`. Only the standard library is imported, so that an interpreter without ftray's dependencies can run this.

Rules: rates are of a time slice, not of a fixed count, so that slow and fast machines give as much data. What is not
to be measured (making arguments, letting things settle) is outside of the clock. Numbers and shapes are those of Ray's
own microbenchmark where it has the same one.
"""

from __future__ import annotations

import gc
import heapq
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

from ftray.perf import remote
from ftray.perf.processes import cpu_ns, descendants

SLICE_S = 0.4
"""The length of one measurement of a rate."""
WARM_UP_S = 0.3
IN_FLIGHT = 1_000
SUBMITTERS = 4
TASKS_PER_SUBMITTER = 10_000
CALLS_PER_SUBMITTER = 1_000
PUT_BYTES = 100_000_000
GET_BYTES = 80_000_000
WAITED = 1_000
REFS_INSIDE = 10_000
ARGUMENTS = 10_000
RETURNS = 3_000
OBJECTS = 10_000
REFS = 100_000
ACTORS = 20
LONG_TASKS, SHORT_TASKS = 6, 2_000
LONG_S, SHORT_S = 1.0, 0.001
SETTLE_S = 0.1
"""Between two kills, so that each one meets a system that is at rest."""
IDLE_AFTER_S, IDLE_S = 2.0, 3.0

Samples = Generator[float, None, None]
Measure = Callable[[Any], Samples]

TEMP_VARIABLE = "FTRAY_PERF_TEMP"
"""Names a folder for what another system writes."""


def init_arguments(system_name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a system's `init`: those of the benchmark, and what makes it quiet."""
    made = {"log_to_driver": False, **arguments}
    if system_name == "ray":
        made |= {"include_dashboard": False, "logging_level": "ERROR"}
        if folder := os.environ.get(TEMP_VARIABLE):
            made["_temp_dir"] = folder
    return made


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


def durations_ms(operation: Callable[[], object]) -> Samples:
    """Milliseconds of each call, after one that is not counted."""
    operation()
    while True:
        started = time.perf_counter()
        operation()
        yield (time.perf_counter() - started) * 1e3


def _forever(first: float, then: float) -> Iterator[float]:
    yield first
    while True:
        yield then


def resident_bytes() -> int:
    """The resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- start, stop and rest -------------------------------------------------------------------------------------------

_IMPORT = """
import time
started = time.perf_counter()
import {system} as system
system.init, system.remote, system.get, system.put, system.wait
print((time.perf_counter() - started) * 1e3)
"""

_START = """
import json, sys, time
started = time.perf_counter()
import {system} as system
from ftray.perf.remote import nothing
system.init(**json.loads(sys.argv[1]))
system.get(system.remote(nothing).remote())
first = time.perf_counter()
system.shutdown()
print((first - started) * 1e3, (time.perf_counter() - first) * 1e3)
"""


def _program(code: str, *arguments: str) -> list[float]:
    """The numbers that a new interpreter prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the program failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return [float(each) for each in done.stdout.splitlines()[-1].split()]


def import_time(system: Any) -> Samples:
    """Milliseconds of `import`, with the names that a program uses, in a new interpreter."""
    code = _IMPORT.format(system=system.__name__)
    _program(code)
    while True:
        yield _program(code)[0]


def _start_and_stop(system: Any) -> list[float]:
    arguments = init_arguments(system.__name__, {"num_cpus": 2})
    return _program(_START.format(system=system.__name__), json.dumps(arguments))


def start(system: Any) -> Samples:
    """Milliseconds from before `import` to the first task's result, in a new interpreter."""
    _start_and_stop(system)
    while True:
        yield _start_and_stop(system)[0]


def stop(system: Any) -> Samples:
    """Milliseconds of `shutdown()` of such a program."""
    _start_and_stop(system)
    while True:
        yield _start_and_stop(system)[1]


def idle(system: Any) -> Samples:
    """Percent of a core that the driver and all it has started use while nothing happens, after some work."""
    task = system.remote(remote.nothing)
    system.get([task.remote() for _ in range(IN_FLIGHT)])
    time.sleep(IDLE_AFTER_S)
    while True:
        everything = [os.getpid(), *descendants(os.getpid())]
        before = {pid: cpu_ns(pid) for pid in everything}
        started = time.perf_counter()
        time.sleep(IDLE_S)
        elapsed_s = time.perf_counter() - started
        used_ns = sum(max(0, cpu_ns(pid) - used) for pid, used in before.items())
        yield used_ns / 1e9 / elapsed_s * 100


# --- tasks and calls ------------------------------------------------------------------------------------------------


def tasks_sync(system: Any) -> Samples:
    task, get = system.remote(remote.nothing), system.get
    yield from rates(lambda: get(task.remote()))


def tasks_in_flight(system: Any) -> Samples:
    task, get = system.remote(remote.nothing), system.get
    yield from rates(lambda: get([task.remote() for _ in range(IN_FLIGHT)]), IN_FLIGHT)


def tasks_of_actors(system: Any) -> Samples:
    cls = system.remote(num_cpus=0)(remote.Submitter)
    actors = [cls.remote(system.__name__) for _ in range(SUBMITTERS)]
    yield from rates(
        lambda: system.get([actor.tasks.remote(TASKS_PER_SUBMITTER) for actor in actors]),
        SUBMITTERS * TASKS_PER_SUBMITTER,
    )


def calls_sync(system: Any) -> Samples:
    actor, get = system.remote(num_cpus=0)(remote.Counter).remote(), system.get
    yield from rates(lambda: get(actor.nothing.remote()))


def calls_in_flight(system: Any) -> Samples:
    actor, get = system.remote(num_cpus=0)(remote.Counter).remote(), system.get
    yield from rates(lambda: get([actor.nothing.remote() for _ in range(IN_FLIGHT)]), IN_FLIGHT)


def calls_with_put(system: Any) -> Samples:
    """Pairs of a client and a server, all in actors; each client puts one object and sends it with every call."""
    server, client = (system.remote(num_cpus=0)(cls) for cls in (remote.Counter, remote.Submitter))
    clients = [client.remote(system.__name__, server.remote()) for _ in range(SUBMITTERS)]
    yield from rates(
        lambda: system.get([each.calls_with_put.remote(CALLS_PER_SUBMITTER) for each in clients]),
        SUBMITTERS * CALLS_PER_SUBMITTER,
    )


def async_calls_sync(system: Any) -> Samples:
    actor, get = system.remote(num_cpus=0)(remote.AsyncCounter).remote(), system.get
    yield from rates(lambda: get(actor.nothing.remote()))


def async_calls_in_flight(system: Any) -> Samples:
    actor, get = system.remote(num_cpus=0)(remote.AsyncCounter).remote(), system.get
    yield from rates(lambda: get([actor.nothing.remote() for _ in range(IN_FLIGHT)]), IN_FLIGHT)


def actors_made(system: Any) -> Samples:
    """Milliseconds until `ACTORS` new actors have answered a first call."""
    cls, get = system.remote(num_cpus=0)(remote.Counter), system.get
    while True:
        started = time.perf_counter()
        actors = [cls.remote() for _ in range(ACTORS)]
        pids = get([actor.pid.remote() for actor in actors])
        elapsed_ms = (time.perf_counter() - started) * 1e3
        assert len(set(pids)) == ACTORS
        del actors
        time.sleep(SETTLE_S)
        yield elapsed_ms


def mixed(system: Any) -> Samples:
    """Long and short tasks, shuffled: the time for all, as a multiple of the ideal for the times that they took."""
    task, get = system.remote(remote.sleep_for), system.get
    chance = random.Random(1)
    get([task.remote(SHORT_S) for _ in range(100)])
    while True:
        sleeps = [LONG_S] * LONG_TASKS + [SHORT_S] * SHORT_TASKS
        chance.shuffle(sleeps)
        started = time.perf_counter()
        took = get([task.remote(each) for each in sleeps])
        elapsed_s = time.perf_counter() - started
        yield elapsed_s / ideal_s(took, 2)


def ideal_s(durations: Iterable[float], workers: int) -> float:
    """When the last of these tasks ends, if each worker takes the next one as soon as it has ended its last."""
    free_at = [0.0] * workers
    for duration_s in durations:
        heapq.heapreplace(free_at, free_at[0] + duration_s)
    return max(free_at)


# --- objects --------------------------------------------------------------------------------------------------------


def put_small(system: Any) -> Samples:
    put = system.put
    yield from rates(lambda: put(0))


def get_small(system: Any) -> Samples:
    get, ref = system.get, system.put(0)
    yield from rates(lambda: get(ref))


def put_first(system: Any) -> Samples:
    """Gigabytes per second into memory that nobody has used before: the first put of a session."""
    block = remote.make_block(PUT_BYTES)
    started = time.perf_counter()
    ref = system.put(block)
    yield PUT_BYTES / 1e9 / (time.perf_counter() - started)
    del ref


def put_large(system: Any) -> Samples:
    """Gigabytes per second into memory that the store has used before."""
    block = remote.make_block(PUT_BYTES)
    for number in range(sys.maxsize):
        started = time.perf_counter()
        ref = system.put(block)
        elapsed_s = time.perf_counter() - started
        del ref
        time.sleep(SETTLE_S)
        if number:
            yield PUT_BYTES / 1e9 / elapsed_s


def get_large(system: Any) -> Samples:
    """Milliseconds of `get` on a finished task's large result."""
    task = system.remote(remote.make_block)
    for number in range(sys.maxsize):
        ref = task.remote(GET_BYTES)
        system.wait([ref])
        started = time.perf_counter()
        block = system.get(ref)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        assert len(memoryview(block.data)) == GET_BYTES
        del ref, block
        time.sleep(SETTLE_S)
        if number:
            yield elapsed_ms


def wait_one_by_one(system: Any) -> Samples:
    """Rounds per second of: submit `WAITED` tasks, then wait for one of them until none is left."""
    task, wait = system.remote(remote.nothing), system.wait

    def operation() -> None:
        waiting = [task.remote() for _ in range(WAITED)]
        fetch_local = True  # only the first time: that is enough, and spares Ray work
        while waiting:
            _, waiting = wait(waiting, fetch_local=fetch_local)
            fetch_local = False

    yield from rates(operation)


def get_refs_inside(system: Any) -> Samples:
    get = system.get
    ref = system.remote(remote.refs_inside).remote(system.__name__, REFS_INSIDE)
    assert len(get(ref)) == REFS_INSIDE
    yield from rates(lambda: get(ref))


def many_arguments(system: Any) -> Samples:
    task = system.remote(remote.count_arguments)
    refs = [system.put(number) for number in range(ARGUMENTS)]

    def operation() -> None:
        assert system.get(task.remote(*refs)) == ARGUMENTS

    yield from durations_ms(operation)


def many_returns(system: Any) -> Samples:
    task = system.remote(num_returns=RETURNS)(remote.many_returns)
    yield from durations_ms(lambda: system.get(task.remote(RETURNS)))


def get_many(system: Any) -> Samples:
    refs = [system.put(number) for number in range(OBJECTS)]
    yield from durations_ms(lambda: system.get(refs))


def bytes_per_ref(system: Any) -> Samples:
    """Growth of the driver's resident memory by tasks that wait for a resource, each with its reference."""
    holder = system.remote(num_cpus=0, resources={"gate": 1})(remote.hold).remote()
    waiting = system.remote(num_cpus=0, resources={"gate": 1})(remote.nothing)
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
    task = system.remote(max_retries=1)(remote.first_attempt_waits)
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
    actor = system.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(remote.Counter).remote()
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
