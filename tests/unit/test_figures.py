"""Figures of benchmarks, and choosing and showing them (ftray/perf)."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from ftray.perf import microbenchmark
from ftray.perf.definitions import BENCHMARKS, Benchmark, rates
from ftray.perf.figures import Figures, Limit, figures, ratio, shown, verdict
from ftray.perf.microbenchmark import BenchmarkError, Row, as_object, select, systems_for, tables
from ftray.perf.pools import PEERS


def test_the_median_counts_and_the_extremes_are_shown() -> None:
    measured = figures([3.0, 1.0, 2.0, 10.0])
    assert (measured.median, measured.least, measured.most) == (2.5, 1.0, 10.0)
    with pytest.raises(ValueError):
        figures([])


def test_a_limit_is_from_below_or_from_above() -> None:
    assert verdict(figures([4.0]), Limit(4.0, more_is_better=True)) == "ok"
    assert verdict(figures([3.9]), Limit(4.0, more_is_better=True)) == "short"
    assert verdict(figures([4.1]), Limit(4.0, more_is_better=False)) == "short"
    assert verdict(figures([4.0]), Limit(4.0, more_is_better=False)) == "ok"
    assert verdict(figures([1.0]), None) == ""


def test_a_ratio_over_one_means_that_ours_is_better() -> None:
    fast, slow = Figures((100.0,)), Figures((25.0,))
    assert ratio(fast, slow, more_is_better=True) == 4.0
    assert ratio(fast, slow, more_is_better=False) == 0.25
    assert math.isinf(ratio(fast, Figures((0.0,)), more_is_better=True))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.456, "0.46"), (4.567, "4.57"), (12.34, "12.3"), (123.4, "123"), (20_000, "20,000")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert shown(value) == text


def test_benchmarks_have_names_of_their_own_and_peers_name_existing_ones() -> None:
    names = [each.name for each in BENCHMARKS]
    assert len(set(names)) == len(names)
    for offers in PEERS.values():
        assert offers.keys() <= set(names)


def test_benchmarks_are_chosen_by_name_or_beginning_in_our_order() -> None:
    assert select(()) == list(BENCHMARKS)
    assert [each.name for each in select(["restart", "tasks"])] == ["tasks-sync", "tasks-1000", "restart"]
    assert [each.name for each in select(["calls-sync"])] == ["calls-sync"]
    with pytest.raises(ValueError, match="no benchmark is named 'nope'; there are init"):
        select(["init", "nope"])


def test_pools_are_measured_where_they_do_the_same() -> None:
    by_name = {each.name: each for each in BENCHMARKS}
    assert list(systems_for(by_name["tasks-sync"], {"ray": "python"})) == ["ftray", *PEERS, "ray"]
    assert list(systems_for(by_name["restart"], {})) == ["ftray"]


def test_rates_count_operations_and_leave_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    calls = 0

    def operation() -> None:
        nonlocal calls
        calls += 1
        now[0] += 0.002 if calls > 4 else 0.1  # slow at first

    samples = rates(operation, count=10)
    next(samples)
    assert next(samples) == pytest.approx(10 / 0.002, rel=0.05)


# --- the command ----------------------------------------------------------------------------------------------------


def fake(name: str, **options: Any) -> Benchmark:
    def measure(system: Any) -> Any:
        yield 1.0

    return Benchmark(name, f"title of {name}", "ms", measure, more_is_better=False, **options)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Two benchmarks of which one fails, without child processes; what was asked for."""
    asked: list[tuple[str, str, int]] = []

    def measure(benchmark: Benchmark, system: str, python: str, rounds: int) -> Figures:
        asked.append((benchmark.name, system, rounds))
        if benchmark.name == "bad":
            raise BenchmarkError("it broke")
        return Figures((1.0, 2.0, 6.0) if system == "ftray" else (8.0,))

    monkeypatch.setattr(microbenchmark, "measure", measure)
    monkeypatch.setattr(microbenchmark, "BENCHMARKS", (fake("good", limit_value=3.0), fake("bad")))
    monkeypatch.setattr(microbenchmark, "PEERS", {"pool": {"good": None}})
    return asked


def test_figures_are_printed_as_one_json_object(
    measured: list[tuple[str, str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert microbenchmark.main(("good",), as_json=True, rounds=7) == 0
    answer = json.loads(capsys.readouterr().out)
    assert measured == [("good", "ftray", 7), ("good", "pool", 7)]
    (row,) = answer["benchmarks"]
    assert answer["ok"] is True
    assert (row["verdict"], row["limit"]) == ("ok", 3.0)
    assert row["systems"]["ftray"] == {"median": 2.0, "min": 1.0, "max": 6.0, "samples": [1.0, 2.0, 6.0]}
    assert row["systems"]["pool"]["ratio"] == 4.0


def test_a_benchmark_that_fails_costs_only_itself(
    measured: list[tuple[str, str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert microbenchmark.main() == 1
    printed = capsys.readouterr()
    assert "title of good" in printed.out and "2.00 ms" in printed.out
    assert "bad on ftray: it broke" in printed.err


def test_unknown_names_and_systems_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert microbenchmark.main(("nope",)) == 2
    assert "no benchmark is named 'nope'" in capsys.readouterr().err
    assert microbenchmark.main((), as_json=True, against="abacus") == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False and "abacus" in answer["error"]


def test_a_system_that_is_not_installed_says_how_to_name_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FTRAY_RAY_PYTHON", "/nonexistent/python")
    assert microbenchmark.main((), against="ray") == 1
    assert "cannot run /nonexistent/python" in capsys.readouterr().err


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert microbenchmark.main(list_only=True) == 0
    printed = capsys.readouterr().out
    assert all(each.name in printed for each in BENCHMARKS)


def test_the_table_shows_verdicts_and_fits_a_terminal() -> None:
    rows = [
        Row(fake("good", limit_value=3.0), {"ftray": Figures((2.0,)), "pool": Figures((8.0,))}),
        Row(fake("slow", limit_value=1.0), {"ftray": Figures((2.0,))}),
        Row(fake("bad"), errors={"ftray": "it broke"}),
    ]
    console = Console(file=io.StringIO(), width=80)
    for table in tables(rows):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "≤ 3.00" in text and "ok" in text and "short" in text and "failed" in text and "4.0×" in text


def test_a_row_without_our_figures_has_no_verdict_or_ratio() -> None:
    row = Row(fake("bad", limit_value=1.0), {"pool": Figures((8.0,))}, {"ftray": "it broke"})
    (found,) = as_object([row], ok=False)["benchmarks"]
    assert found["verdict"] == ""
    assert "ratio" not in found["systems"]["pool"]
    assert found["errors"] == {"ftray": "it broke"}
