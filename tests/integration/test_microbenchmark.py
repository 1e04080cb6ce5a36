"""The microbenchmark with real child processes: it measures, and what fails or hangs is reported and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from integration.harness import MARK, marked, wait_for_none, wait_until

from ftray.perf.definitions import BENCHMARKS
from ftray.perf.growth import GROWTH, Growth
from ftray.perf.microbenchmark import main
from ftray.perf.runner import BenchmarkError, measure, measure_growth, profiled

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
    slow = replace(BY_NAME["mixed"], timeout_s=1.0)
    with pytest.raises(BenchmarkError, match="did not end within 1 s"):
        measure(slow, "ftray", sys.executable, 1_000_000)


@pytest.mark.parametrize("growth", GROWTH, ids=lambda each: each.name)
def test_growth_is_measured(growth: Growth) -> None:
    cost = measure_growth(growth, "ftray", sys.executable, 10)
    assert cost.count == 10 and cost.each_us > 0


def test_a_profile_shows_processes_and_functions() -> None:
    profile = profiled(replace(BY_NAME["tasks-1000"], rounds=2))
    assert any(each.name.startswith("ftray") for each in profile.used)
    assert any("ftray/" in hot.where for each in profile.sampled for hot in each.hottest)


def test_all_processes_end_when_the_command_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # it cannot remove its temporary folder
    command = [sys.executable, "-m", "ftray.cli", "microbenchmark", "tasks-sync", "--rounds", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: len(marked(os.environ[MARK])) > 4, 20.0, "the benchmark's workers")
        process.send_signal(signal.SIGKILL)
