"""What benchmarks run remotely.

Role: functions and classes at the top of a module, which are pickled by name on all systems alike. Only the standard
library is imported: the workers of another system import this too. Whoever submits from a worker gets the name of the
system, since the same code runs on all of them.

A process that imports this is sampled if the run asks for it (`sampling.py`): that reaches every worker that runs a
benchmark's code, and needs nothing of the system.
"""

from __future__ import annotations

import importlib
import os
import pickle
import time
from typing import Any

from ftray.perf import sampling

sampling.start_if_asked()


def nothing() -> bytes:
    return b"ok"


class Counter:
    """An actor."""

    def nothing(self) -> bytes:
        return b"ok"

    def with_argument(self, value: object) -> bytes:
        return b"ok"

    def pid(self) -> int:
        return os.getpid()


class AsyncCounter:
    """An actor whose methods are coroutines."""

    async def nothing(self) -> bytes:
        return b"ok"


class Submitter:
    """An actor that submits tasks, and calls to another actor."""

    def __init__(self, system_name: str, server: Any = None) -> None:
        self.system: Any = importlib.import_module(system_name)
        self.server = server
        self.task = self.system.remote(nothing)

    def tasks(self, count: int) -> None:
        task = self.task
        self.system.get([task.remote() for _ in range(count)])

    def calls_with_put(self, count: int) -> None:
        value = self.system.put(0)
        call = self.server.with_argument
        self.system.get([call.remote(value) for _ in range(count)])


class Block:
    """Bytes that are pickled out of band, as arrays are: stored by one copy, and read without."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Block, (pickle.PickleBuffer(self.data),)


def make_block(size_bytes: int) -> Block:
    # Not zeros: pages of zeros that were never written are one page in the processor's cache.
    return Block(bytearray(os.urandom(1_000_000) * (size_bytes // 1_000_000)))


def refs_inside(system_name: str, count: int) -> list[Any]:
    system: Any = importlib.import_module(system_name)
    return [system.put(1) for _ in range(count)]


def count_arguments(*values: object) -> int:
    return len(values)


def many_returns(count: int) -> list[int]:
    return list(range(count))


def sleep_for(duration_s: float) -> float:
    """Seconds that it really took."""
    started = time.perf_counter()
    time.sleep(duration_s)
    return time.perf_counter() - started


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
