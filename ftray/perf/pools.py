"""The standard library's process pools, measured as our tasks are.

Role: the peers that anybody has at hand. Two processes each, the same function, one by one and 1,000 in flight.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from ftray.perf.definitions import IN_FLIGHT, Samples, nothing, rates

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


PEERS = {
    "ProcessPoolExecutor": {"tasks-sync": executor_sync, "tasks-1000": executor_in_flight},
    "multiprocessing.Pool": {"tasks-sync": pool_sync, "tasks-1000": pool_in_flight},
}
"""Name -> name of the benchmark -> what measures the same."""
