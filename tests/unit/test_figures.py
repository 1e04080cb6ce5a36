"""Figures of benchmarks, and choosing and showing them (ftray/perf)."""

from __future__ import annotations

import io
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from ftray.perf import microbenchmark
from ftray.perf.definitions import BENCHMARKS, Benchmark
from ftray.perf.figures import Figures, Limit, figures, ratio, shown, verdict
from ftray.perf.growth import GROWTH, Cost, Growth, holds
from ftray.perf.measures import ideal_s, rates
from ftray.perf.microbenchmark import measured, measured_growth, select, systems_for, tables
from ftray.perf.page import page, write
from ftray.perf.plot import Series, log_log
from ftray.perf.pools import PEERS
from ftray.perf.results import GrowthRow, Profile, Row, Used, as_object
from ftray.perf.runner import BenchmarkError
from ftray.perf.sampling import Hot, Sampled, hottest

ABOUT = {"date": "2026-01-01 10:00 UTC", "processor": "a processor", "python": "CPython 3.11.0", "ftray": "0.1.0"}


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


def test_benchmarks_have_names_of_their_own_and_peers_and_targets_name_existing_ones() -> None:
    names = [each.name for each in [*BENCHMARKS, *GROWTH]]  # type: ignore[list-item]
    assert len(set(names)) == len(names)
    for offers in PEERS.values():
        assert offers.keys() <= {each.name for each in BENCHMARKS}
    for each in BENCHMARKS:
        assert all(system == "ray" or each.name in PEERS[system] for system in each.targets)
    assert all(list(each.sizes) == [each.sizes[0] * 10**step for step in range(3)] for each in GROWTH)


def test_benchmarks_are_chosen_by_name_or_beginning_in_our_order() -> None:
    assert select(()) == (list(BENCHMARKS), list(GROWTH))
    chosen, grown = select(["restart", "tasks", "growth-objects"])
    assert [each.name for each in chosen] == ["tasks-sync", "tasks-1000", "tasks-actors", "restart"]
    assert [each.name for each in grown] == ["growth-objects"]
    assert [each.name for each in select(["calls-sync"])[0]] == ["calls-sync"]
    with pytest.raises(ValueError, match="no benchmark is named 'nope'; there are import, init"):
        select(["init", "nope"])


def test_pools_are_measured_where_they_do_the_same() -> None:
    by_name = {each.name: each for each in BENCHMARKS}
    pools = ["ProcessPoolExecutor", "multiprocessing.Pool"]
    assert list(systems_for(by_name["tasks-sync"], {"ray": "python"})) == ["ftray", *pools, "ray"]
    assert list(systems_for(by_name["put-100mb"], {})) == ["ftray", "memcpy"]
    assert list(systems_for(by_name["restart"], {})) == ["ftray"]


def test_the_ideal_is_that_of_workers_that_take_the_next_task_when_they_are_free() -> None:
    assert ideal_s([3, 1, 1, 1], 2) == 3
    assert ideal_s([1, 1, 1, 3], 2) == 4
    assert ideal_s([2, 2], 1) == 4


def test_growth_holds_if_one_of_many_costs_about_what_one_of_few_does() -> None:
    assert holds([Cost(10, 100.0, 0.0), Cost(100, 900.0, 0.0), Cost(1_000, 149.0, 0.0)])
    assert not holds([Cost(10, 100.0, 0.0), Cost(100, 100.0, 0.0), Cost(1_000, 151.0, 0.0)])


def test_samples_are_summed_by_function_and_named_within_their_package() -> None:
    lines = {
        "/home/me/tree/ftray/worker/submit.py:Submitter.submit:10": 2,
        "/home/me/tree/ftray/worker/submit.py:Submitter.submit:12": 4,
        "/env/lib/python3.11/site-packages/trio/_core.py:run:1": 1,
        "/usr/lib/python3.11/socket.py:send:5": 1,
    }
    assert hottest(lines.items(), 3) == (
        Hot("ftray/worker/submit.py Submitter.submit", 0.75),
        Hot("trio/_core.py run", 0.125),
        Hot("socket.py send", 0.125),
    )


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


def fake_growth(name: str = "growth-things") -> Growth:
    return Growth(name, "things", (10, 100, 1_000), lambda system, count: Cost(count, 1.0, 1.0))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Two benchmarks of which one fails and one growth, without child processes; what was asked for."""
    asked: list[tuple[str, str, int]] = []

    def measure(benchmark: Benchmark, system: str, python: str, rounds: int) -> Figures:
        asked.append((benchmark.name, system, rounds))
        if benchmark.name == "bad":
            raise BenchmarkError("it broke")
        return Figures((1.0, 2.0, 6.0) if system == "ftray" else (8.0,))

    def measure_growth(growth: Growth, system: str, python: str, size: int) -> Cost:
        asked.append((growth.name, system, size))
        if size == 1_000:
            raise BenchmarkError("it did not end")
        return Cost(size, float(len(asked)), 1.0)

    monkeypatch.setattr(microbenchmark, "measure", measure)
    monkeypatch.setattr(microbenchmark, "measure_growth", measure_growth)
    monkeypatch.setattr(microbenchmark, "profiled", lambda benchmark: Profile((), ()))
    monkeypatch.setattr(microbenchmark, "BENCHMARKS", (fake("good", limit_value=3.0), fake("bad")))
    monkeypatch.setattr(microbenchmark, "GROWTH", (fake_growth(),))
    monkeypatch.setattr(microbenchmark, "PEERS", {"pool": {"good": None}})
    return asked


def test_figures_are_printed_as_one_json_object(
    asked: list[tuple[str, str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert microbenchmark.main(("good",), as_json=True, rounds=7) == 0
    answer = json.loads(capsys.readouterr().out)
    # Half of ours before the others, half after them.
    assert asked == [("good", "ftray", 4), ("good", "pool", 7), ("good", "ftray", 3)]
    (row,) = answer["benchmarks"]
    assert answer["ok"] is True and answer["growth"] == []
    assert (row["verdict"], row["limit"]) == ("ok", 3.0)
    ours = row["systems"]["ftray"]
    assert ours == {"median": 2.0, "min": 1.0, "max": 6.0, "samples": [1.0, 2.0, 6.0, 1.0, 2.0, 6.0]}
    assert row["systems"]["pool"]["ratio"] == 4.0


def test_a_benchmark_that_fails_costs_only_itself(
    asked: list[tuple[str, str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert microbenchmark.main(("good", "bad")) == 1
    printed = capsys.readouterr()
    assert "title of good" in printed.out and "2.00 ms" in printed.out
    assert "bad on ftray: it broke" in printed.err


def test_growth_is_measured_at_each_size_until_one_fails(asked: list[tuple[str, str, int]]) -> None:
    row = measured_growth(fake_growth(), {"ray": "python"}, 3, lambda text: None)
    assert [cost.count for cost in row.costs["ftray"]] == [10, 100]
    assert row.errors == {"ftray": "1,000: it did not end"}
    assert row.costs["ftray"][0].each_us == 2.0  # the median of three
    assert [size for _, system, size in asked if system == "ray"] == [10, 100]  # the largest would take it too long


def test_what_another_system_cannot_do_is_not_our_failure(
    asked: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = microbenchmark.measure

    def measure(benchmark: Benchmark, system: str, python: str, rounds: int) -> Figures:
        if system == "pool":
            raise BenchmarkError("it did not end within 60 s")
        return inner(benchmark, system, python, rounds)

    monkeypatch.setattr(microbenchmark, "measure", measure)
    assert microbenchmark.main(("good",)) == 0
    assert "good on pool: it did not end within 60 s" in capsys.readouterr().err
    row = measured(fake("good"), {}, 5, lambda text: None)
    assert len(row.figures["ftray"].samples) == 6 and row.errors.keys() == {"pool"}


def test_quick_measures_twice_and_leaves_the_largest_out(asked: list[tuple[str, str, int]]) -> None:
    microbenchmark.main(("bad", "growth-things"), quick=True)
    assert {(name, rounds) for name, _, rounds in asked} == {("bad", 2), ("growth-things", 10), ("growth-things", 100)}


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
    assert all(each.name in printed for each in GROWTH)


# --- results, tables and the page -----------------------------------------------------------------------------------


def some_rows() -> tuple[list[Row], list[GrowthRow]]:
    profile = Profile((Used(7, "ftray:worker", 0.91),), (Sampled(7, 500, (Hot("ftray/worker/a.py f", 0.4),)),))
    rows = [
        Row(fake("good", limit_value=3.0), {"ftray": Figures((2.0,)), "memcpy": Figures((8.0,))}),
        Row(fake("slow", limit_value=1.0), {"ftray": Figures((2.0,))}, profile=profile),
        Row(fake("far", targets={"ray": 5.0}), {"ftray": Figures((2.0, 3.0, 4.0)), "ray": Figures((9.0,))}),
        Row(fake("bad"), errors={"ftray": "it broke\nTraceback\nValueError: no"}),
    ]
    growth = [
        GrowthRow(fake_growth(), {"ftray": [Cost(10, 2.0, 500), Cost(100, 2.5, 510)], "ray": [Cost(10, 90.0, 7_000)]}),
        GrowthRow(fake_growth("growth-others"), {"ftray": [Cost(10, 2.0, 0.0), Cost(100, 8.0, 0.0)]}),
    ]
    return rows, growth


def test_what_fell_short_is_said_in_words() -> None:
    rows, growth = some_rows()
    assert [row.shortfalls() for row in rows] == [
        [],
        ["2.00 ms instead of ≤ 1.00 ms"],
        ["3.00× ray instead of ≥ 5×"],
        ["not measured"],
    ]
    assert [row.shortfalls() for row in growth] == [
        [],
        ["one costs 4.0 times as much at 100 as at 10 (≤ 1.5)"],
    ]
    assert rows[2].target_verdict("ray") == "short" and rows[2].target_verdict("pool") == ""


def test_the_tables_show_verdicts_and_fit_a_terminal() -> None:
    rows, growth = some_rows()
    console = Console(file=io.StringIO(), width=80)
    for table in tables(rows, growth, ABOUT):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("≤ 3.00", "ok", "short", "failed", "4.00×", "≥ 5×", "2.50 us", "510 bytes"):
        assert part in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_row_without_our_figures_has_no_verdict_or_ratio() -> None:
    row = Row(fake("bad", limit_value=1.0), {"pool": Figures((8.0,))}, {"ftray": "it broke"})
    (found,) = as_object([row], [], ABOUT, ok=False)["benchmarks"]
    assert found["verdict"] == ""
    assert "ratio" not in found["systems"]["pool"]
    assert found["errors"] == {"ftray": "it broke"}


def test_the_page_is_honest_about_what_fell_short(tmp_path: Path) -> None:
    rows, growth = some_rows()
    path = tmp_path / "benchmarks.md"
    write(path, ABOUT, rows, growth, "ray")
    text = path.read_text(encoding="utf-8")
    assert "| title of good | ms | 2.00 (once) | – |  |  | ≤ 3.00 | reached |" in text
    assert "| title of far | ms | 3.00 (2.00 – 4.00) | 9.00 (once) | 3.00× | ≥ 5× |  | **short** |" in text
    assert "### title of slow\n2.00 ms instead of ≤ 1.00 ms.\n\nOf a core: ftray:worker 91 %." in text
    assert "ftray:worker, 500 samples\n   40.0 %  ftray/worker/a.py f" in text
    assert "## Not measured\n- bad, ftray: it broke: ValueError: no\n" in text
    assert "| things | ftray | 100 | 2.50 µs | 510 bytes | reached |" in text
    assert "(benchmarks-growth.svg)" in text
    assert "Ray: things" in (tmp_path / "benchmarks-growth.svg").read_text(encoding="utf-8")
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))


def test_a_page_without_another_system_says_that_ratios_were_not_tested() -> None:
    (row, *_), _ = some_rows()
    text = page(ABOUT, [row], [], None, None)
    assert "Nothing in this run. Ratios to Ray were not tested in it." in text
    assert "| title of good | ms | 2.00 (once) | ≤ 3.00 | reached |" in text
    assert "## Growth" not in text


def test_the_plot_places_points_by_their_logarithms() -> None:
    drawn = log_log("t", "x", "y", [Series("a & b", [(10, 1.0), (100, 10.0), (1_000, 100.0)], 0)])
    root = ElementTree.fromstring(drawn)
    marks = [each for each in root.iter() if each.tag.endswith("circle")]
    xs, ys = ([float(each.attrib[name]) for each in marks] for name in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2) and ys[0] > ys[2]
    assert "a &amp; b" in drawn
    with pytest.raises(ValueError):
        log_log("t", "x", "y", [])
    with pytest.raises(ValueError):
        log_log("t", "x", "y", [Series("a", [(1, 0.0)], 0)])


def test_labels_of_the_plot_do_not_lie_on_each_other() -> None:
    series = [Series(str(number), [(1, 1.0), (10, 1.0 + number / 100)], number) for number in range(4)]
    drawn = log_log("t", "x", "y", series)
    heights = sorted(float(y) for y in re.findall(r'class="label" x="[\d.]+" y="([\d.]+)"', drawn))
    assert all(below - above >= 14.9 for above, below in pairwise(heights))
