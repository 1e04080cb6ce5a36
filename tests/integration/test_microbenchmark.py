"""The microbenchmark with real child processes: it measures, and what fails or hangs is reported and leaves nothing."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest
from integration.harness import MARK, marked, wait_for_none

from ftray.perf.definitions import BENCHMARKS
from ftray.perf.microbenchmark import BenchmarkError, main, measure

BY_NAME = {each.name: each for each in BENCHMARKS}


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield
    wait_for_none(lambda: marked(mark), 5.0, "processes of a benchmark")


def test_a_benchmark_is_measured(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(("put-small",), as_json=True, rounds=2) == 0
    (row,) = json.loads(capfd.readouterr().out)["benchmarks"]
    assert len(row["systems"]["ftray"]["samples"]) == 2
    assert row["systems"]["ftray"]["min"] > 0


def test_recovery_is_measured_by_real_kills() -> None:
    assert len(measure(BY_NAME["retry"], "ftray", sys.executable, 1).samples) == 1
    assert len(measure(BY_NAME["restart"], "ftray", sys.executable, 1).samples) == 1


def test_a_benchmark_that_fails_says_why() -> None:
    broken = replace(BY_NAME["put-small"], name="no-such-benchmark")
    with pytest.raises(BenchmarkError, match=r"(?s)it failed with exit code 1\n.*StopIteration"):
        measure(broken, "ftray", sys.executable, 1)


def test_a_benchmark_that_hangs_is_ended() -> None:
    slow = replace(BY_NAME["tasks-sync"], timeout_s=1.0)
    with pytest.raises(BenchmarkError, match="did not end within 1 s"):
        measure(slow, "ftray", sys.executable, 1_000_000)
