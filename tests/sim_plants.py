"""What tests plant into the simulator's runs beside the defects of `planted`: for the tests of determinism, and for the
workers of `ftray.sim.batch`.

Each is a context: `with a_set_decides(): ...`. Worker processes enter one by `work_with("a_set_decides")`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ftray.gcs.raft.replica import RaftReplica
from ftray.gcs.state.commands import KvDelete
from ftray.gcs.state.handlers import HANDLERS
from ftray.sim import batch
from ftray.sim.heads import Head
from ftray.sim.runner import run_seed


@contextmanager
def a_set_decides() -> Iterator[None]:
    """An order that comes from a set of bytes: the same within a process, another one in the next."""
    real = Head.after_batch
    with pytest.MonkeyPatch.context() as patch:

        def after_batch(head: Head) -> None:
            real(head)
            head.sim.count(b"".join({b"head %d" % number for number in range(6)}))

        patch.setattr(Head, "after_batch", after_batch)
        yield


@contextmanager
def the_real_clock_decides() -> Iterator[None]:
    """An alarm of the replica follows the machine's clock."""
    real = RaftReplica.next_wake_ms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RaftReplica, "next_wake_ms", lambda replica: real(replica) + time.perf_counter_ns() % 1000 / 1000.0
        )
        yield


@contextmanager
def seed_two_kills_its_process() -> Iterator[None]:
    def run(seed: int, *rest: Any) -> Any:
        if seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_seed(seed, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "run_seed", run)
        yield


@contextmanager
def deletes_do_nothing() -> Iterator[None]:
    """Every run with some clients fails; and something prints."""

    def run(*arguments: Any) -> Any:
        print("this must not get between the answers", flush=True)
        return run_seed(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HANDLERS, KvDelete, lambda store, command: 1)
        patch.setattr(batch, "run_seed", run)
        yield


def program(plant: str) -> str:
    """What a worker runs in place of its usual program."""
    return f"import sim_plants; sim_plants.work_with({plant!r})"


def work_with(plant: str) -> None:
    with globals()[plant]():
        batch.work()
