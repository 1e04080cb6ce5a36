"""`max_calls`: a worker ends after so many runs of a function, and nothing is lost with it."""

from __future__ import annotations

import os
from typing import Any

import pytest

import ftray


def pid() -> int:
    return os.getpid()


@pytest.mark.usefixtures("session")
class TestMaxCalls:
    def test_each_worker_runs_it_so_often(self) -> None:
        limited = ftray.remote(max_calls=3)(pid)
        pids = ftray.get([limited.remote() for _ in range(12)])
        assert all(pids.count(each) <= 3 for each in pids)
        assert len(set(pids)) >= 4

    def test_large_and_several_results_arrive(self) -> None:
        @ftray.remote(max_calls=1, num_returns=2)
        def both() -> Any:
            return bytes(300_000), os.getpid()

        pairs = [ftray.get(both.remote()) for _ in range(2)]
        assert [len(large) for large, _ in pairs] == [300_000, 300_000]
        assert pairs[0][1] != pairs[1][1]

    def test_a_worker_with_objects_stays_until_they_are_gone(self) -> None:
        @ftray.remote(max_calls=1)
        def owns() -> Any:
            return [ftray.put(os.getpid())]

        inner = ftray.get(owns.remote())[0]
        assert os.path.exists(f"/proc/{ftray.get(inner)}")

    def test_exceptions_count_and_are_retried(self) -> None:
        @ftray.remote(max_calls=1, max_retries=2, retry_exceptions=True)
        def fails(pids: Any) -> None:
            ftray.get(pids.add.remote(os.getpid()))
            raise ValueError("again")

        @ftray.remote
        class Pids:
            def __init__(self) -> None:
                self.pids: list[int] = []

            def add(self, each: int) -> None:
                self.pids.append(each)

            def all(self) -> list[int]:
                return self.pids

        pids = Pids.remote()
        with pytest.raises(ValueError, match="again"):
            ftray.get(fails.remote(pids))
        seen = ftray.get(pids.all.remote())
        assert len(seen) == 3 and len(set(seen)) == 3

    @pytest.mark.parametrize("value", [-1, 1.5, "2", True])
    def test_wrong_values(self, value: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="max_calls"):
            ftray.remote(max_calls=value)(pid)
