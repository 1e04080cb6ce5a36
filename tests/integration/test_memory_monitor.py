"""The memory monitor: ends what may be repeated, which is repeated, and says why."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import ftray
from ftray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

LIMIT_MB = 400
SESSION = {
    "num_cpus": 2,
    "_system_config": {
        "memory_limit_bytes": LIMIT_MB << 20,
        "memory_monitor_period_ms": 20,
        "task_oom_retries": 2,
        "task_oom_pause_ms": 1,
    },
}


def counted(folder: str) -> int:
    return len(os.listdir(folder))


@ftray.remote
def hog(folder: str, megabytes: int, attempts: int) -> int:
    """Takes so much memory in its first attempts, and stays until it is ended."""
    attempt = counted(folder) + 1
    Path(folder, str(attempt)).touch()
    if attempt > attempts:
        return attempt
    page = os.sysconf("SC_PAGE_SIZE")
    held = bytearray(megabytes << 20)
    held[::page] = b"\1" * len(held[::page])
    signal.pause()
    return -1


@pytest.mark.usefixtures("session")
class TestMonitor:
    def test_a_task_that_was_ended_runs_again(self, tmp_path: Path) -> None:
        assert ftray.get(hog.options(max_retries=1).remote(str(tmp_path), LIMIT_MB + 40, 2), timeout=30) == 3
        assert counted(str(tmp_path)) == 3

    def test_its_own_counter_ends_and_the_error_explains(self, tmp_path: Path) -> None:
        with pytest.raises(OutOfMemoryError, match="memory monitor") as caught:
            ftray.get(hog.remote(str(tmp_path), LIMIT_MB + 40, 99), timeout=30)
        assert counted(str(tmp_path)) == 3  # once, and two repetitions
        text = str(caught.value)
        assert "hog was ended 3 times" in text and "400 MiB" in text and "threshold of 95 %" in text

    def test_what_may_not_be_repeated_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(OutOfMemoryError):
            ftray.get(hog.options(max_retries=0).remote(str(tmp_path), LIMIT_MB + 40, 99), timeout=30)
        assert counted(str(tmp_path)) == 1

    def test_an_actor_that_comes_back_tells_the_reason(self, tmp_path: Path) -> None:
        class Hog:
            def take(self, folder: str) -> int:
                return hog.__wrapped__(folder, LIMIT_MB + 40, 99)

        actor = ftray.remote(Hog).options(max_restarts=1).remote()
        with pytest.raises(ActorUnavailableError, match="killed by the memory monitor"):
            ftray.get(actor.take.remote(str(tmp_path)), timeout=30)

    def test_an_actor_dies_with_the_reason(self, tmp_path: Path) -> None:
        class Hog:
            def take(self, folder: str) -> int:
                return hog.__wrapped__(folder, LIMIT_MB + 40, 99)

        actor = ftray.remote(Hog).remote()
        with pytest.raises(ActorDiedError, match="killed by the memory monitor"):
            ftray.get(actor.take.remote(str(tmp_path)), timeout=30)
