"""Whom the memory monitor ends, and what it says."""

from __future__ import annotations

from typing import Any

import pytest

from ftray.config import config_from
from ftray.raylet.memory_usage import MemoryGauge, cgroup_usage, machine_usage, process_bytes
from ftray.scheduling.memory import GIB, Candidate, Usage, choose, explain, is_short


def candidate(name: str, since_ms: float, *, retriable: bool = True, idle: bool = False, gib: float = 1.0) -> Candidate:
    return Candidate(name.encode(), 100, name, since_ms, retriable, idle, int(gib * GIB))


def test_the_retriable_process_started_last_goes_first() -> None:
    chosen = choose(
        [
            candidate("old", 1.0, gib=9),
            candidate("young", 3.0, gib=0.5),
            candidate("middle", 2.0),
            candidate("youngest", 4.0, retriable=False),
        ]
    )
    assert chosen is not None and chosen.what == "young"


def test_an_idle_process_that_holds_much_goes_before_all() -> None:
    chosen = choose([candidate("work", 9.0), candidate("idle", 1.0, idle=True, gib=0.5)])
    assert chosen is not None and chosen.what == "idle"


def test_a_small_idle_process_is_left_alone() -> None:
    assert choose([candidate("idle", 1.0, idle=True, gib=0.01)]) is None


def test_without_a_retriable_one_the_last_of_the_others_goes() -> None:
    chosen = choose([candidate("a", 1.0, retriable=False), candidate("b", 2.0, retriable=False)])
    assert chosen is not None and chosen.what == "b"


def test_nobody_can_go_when_nobody_is_there() -> None:
    assert choose([]) is None


@pytest.mark.parametrize(("used", "short"), [(94, False), (95, False), (96, True)])
def test_the_threshold(used: int, short: bool) -> None:
    assert is_short(Usage(used, 100, "this machine"), 95.0) is short


def test_the_explanation_names_the_figures_and_the_largest() -> None:
    victim = candidate("train", 5.0, gib=3.25)
    text = explain(Usage(15 * GIB, 16 * GIB, "this machine"), 90.0, victim, [victim, candidate("other", 1.0, gib=8)])
    assert "15.00 GiB of 16.00 GiB of this machine" in text and "90 %" in text and "3,328 MiB" in text
    assert text.index("8,192 MiB (other)") < text.index("3,328 MiB (train)")


def test_readings_of_this_machine_are_sensible(tmp_path: Any) -> None:
    usage = machine_usage()
    assert 0 < usage.used_bytes < usage.limit_bytes
    assert process_bytes(1 << 30) == 0
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert cgroup_usage(str(tmp_path)) == Usage(700, 4000, "this node's control group")
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_usage(str(tmp_path)) is None


def test_control_groups_of_version_1_are_read_too(tmp_path: Any) -> None:
    (tmp_path / "memory.usage_in_bytes").write_text("1000\n")
    (tmp_path / "memory.limit_in_bytes").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("inactive_file 1\ntotal_cache 9\ntotal_inactive_file 300\ntotal_rss 2\n")
    assert cgroup_usage(str(tmp_path)) == Usage(700, 4000, "this node's control group")


def test_the_limit_with_the_least_room_counts() -> None:
    import os

    usage = MemoryGauge(1 << 20).read([os.getpid()])
    assert usage.where == "this session's memory limit" and usage.used_bytes > usage.limit_bytes


@pytest.mark.parametrize(
    "overrides",
    [{"memory_limit_bytes": 1 << 20}, {"memory_threshold_percent": 0.0}, {"memory_threshold_percent": 101.0}],
)
def test_limits_that_make_no_sense_are_refused(overrides: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="memory_"):
        config_from({}, overrides)


@pytest.mark.parametrize("name", ["memory_monitor_period_ms", "store_room_wait_ms", "task_oom_retries"])
def test_a_setting_below_its_range_is_refused_by_name(name: str) -> None:
    """A period below zero would be a loop without a pause."""
    with pytest.raises(ValueError, match=f"{name} must be at least -?[01], not -2"):
        config_from({f"FTRAY_{name.upper()}": "-2"})
    assert config_from({}, {"task_oom_retries": -1, "task_max_retries": -1}).task_oom_retries == -1
    with pytest.raises(ValueError, match="spill_threshold_percent must be from 0 to 100, not 101"):
        config_from({}, {"spill_threshold_percent": 101.0})
