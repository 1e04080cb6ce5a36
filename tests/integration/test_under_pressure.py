"""What programs under pressure have met: timeouts while the store is busy, owners that are dead."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest
from integration.harness import wait_until

import ftray
from ftray.api.context import ask_raylet
from ftray.exceptions import GetTimeoutError, OwnerDiedError
from ftray.worker import introspection, raylet_client, waiting
from ftray.worker.core import get_core

SESSION = {"num_cpus": 2, "object_store_memory": 32 << 20}


@ftray.remote
def make(n: int) -> Any:
    return np.zeros(n, dtype=np.uint8)


@ftray.remote
class Owner:
    def put(self, n: int) -> list[Any]:
        return [ftray.put(i) for i in range(n)]

    def pid(self) -> int:
        return os.getpid()


@ftray.remote
class LargeOwner:
    def put(self, n: int) -> list[Any]:
        return [ftray.put(np.zeros(n, dtype=np.uint8))]

    def pid(self) -> int:
        return os.getpid()


@ftray.remote
class Reader:
    def read(self, refs: list[Any]) -> Any:
        return ftray.get(refs)


def test_what_is_ready_in_the_store_is_read_without_a_timeout(session: Any) -> None:
    """`wait` calls it ready, so a `get` that does not want to wait has it, in memory or on disk."""
    refs = [make.remote(6 << 20) for _ in range(10)]
    ftray.wait(refs, num_returns=10)
    for ref in refs:
        assert ftray.get(ref, timeout=0).nbytes == 6 << 20


def test_get_of_what_an_owner_known_to_be_dead_owned_fails_at_once(session: Any) -> None:
    """The answer comes while the objects are still being asked for."""
    owner, reader = Owner.remote(), Reader.remote()
    refs = ftray.get(owner.put.remote(6))
    os.kill(ftray.get(owner.pid.remote()), signal.SIGKILL)
    for some in (refs[:1], refs[1:2], refs[2:]):  # the first time it finds out, then it knows
        with pytest.raises(OwnerDiedError):
            ftray.get(reader.read.remote(some), timeout=20)


def test_a_large_object_whose_owner_died_says_so(session: Any) -> None:
    """Ready or not, in the store or not: the reason is the owner's death."""
    owner = LargeOwner.remote()
    (ref,) = ftray.get(owner.put.remote(3 << 20))
    ftray.wait([ref])
    os.kill(ftray.get(owner.pid.remote()), signal.SIGKILL)
    wait_until(lambda: not ask_raylet("memory")["objects"], what="the object is gone")
    with pytest.raises(OwnerDiedError):
        ftray.get(ref, timeout=20)


def test_what_is_granted_in_the_last_moment_is_given_back(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer arrives just when the time is up: nobody looks, so the pin goes. Until then it is accounted for."""
    core = get_core()
    accounted: list[str] = []

    def too_late(reactor: Any, waiter: Any, timeout_s: float | None) -> bool:
        waiting.block(reactor, waiter, None)
        with core.lock:
            accounted.extend(introspection.answer(core, "references", {})["pinned"])
        return False

    ref = make.remote(300_000)
    ftray.wait([ref])
    monkeypatch.setattr(raylet_client, "block", too_late)
    with pytest.raises(GetTimeoutError, match="are ready, but could not be read"):
        ftray.get(ref, timeout=0)
    monkeypatch.undo()
    assert accounted == [ref.hex()]
    wait_until(lambda: [row["pins"] for row in ask_raylet("memory")["objects"]] == [{}], what="the pin is gone")
