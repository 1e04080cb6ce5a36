"""Peers that need no installation, measured as we are.

Role: the standard library's process pools, with two processes, the same function, one by one and 1,000 in flight; and a
plain copy into shared memory, which no store can beat.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor

from ftray.perf.definitions import EXECUTOR, MEMCPY, POOL
from ftray.perf.measures import IN_FLIGHT, PUT_BYTES, SETTLE_S, Samples, rates
from ftray.perf.remote import make_block, nothing

PROCESSES = 2


def executor_sync() -> Samples:
    with ProcessPoolExecutor(PROCESSES) as pool:
        yield from rates(lambda: pool.submit(nothing).result())


def executor_in_flight() -> Samples:
    with ProcessPoolExecutor(PROCESSES) as pool:

        def batch() -> None:
            for future in [pool.submit(nothing) for _ in range(IN_FLIGHT)]:
                future.result()

        yield from rates(batch, IN_FLIGHT)


def pool_sync() -> Samples:
    with multiprocessing.Pool(PROCESSES) as pool:
        yield from rates(lambda: pool.apply(nothing))


def pool_in_flight() -> Samples:
    with multiprocessing.Pool(PROCESSES) as pool:

        def batch() -> None:
            for result in [pool.apply_async(nothing) for _ in range(IN_FLIGHT)]:
                result.get()

        yield from rates(batch, IN_FLIGHT)


def copy_warm() -> Samples:
    """Gigabytes per second of a copy into shared memory that was written before."""
    block = make_block(PUT_BYTES)
    fd = os.memfd_create("ftray-perf")
    os.ftruncate(fd, PUT_BYTES)
    with mmap.mmap(fd, PUT_BYTES) as mapped:
        os.close(fd)
        mapped[:] = block.data
        while True:
            time.sleep(SETTLE_S)
            started = time.perf_counter()
            mapped[:] = block.data
            yield PUT_BYTES / 1e9 / (time.perf_counter() - started)


PEERS: Mapping[str, Mapping[str, Callable[[], Samples]]] = {
    EXECUTOR: {"tasks-sync": executor_sync, "tasks-1000": executor_in_flight},
    POOL: {"tasks-sync": pool_sync, "tasks-1000": pool_in_flight},
    MEMCPY: {"put-100mb": copy_warm},
}
"""Name -> name of the benchmark -> what measures the same."""
