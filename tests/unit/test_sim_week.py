"""A week of writes in small: nothing grows for ever, and what does is found."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from ftray.cli.sim_week import table, week
from ftray.gcs.compaction import Compactor
from ftray.gcs.state import job_keys
from ftray.gcs.state.sessions import Sessions
from ftray.gcs.state.store import Store
from ftray.sim.week import Column, Limits, Options, Report, Week, judge

SHORT = Options(days=5, day_s=180.0, limits=Limits.small())
Plant = Callable[[pytest.MonkeyPatch], None]


def test_nothing_grows() -> None:
    report = Week(SHORT).run()
    assert report.ok, report.problems
    last = report.days[-1]
    assert last["writes"] > 850
    for name in ("ended actors", "worker failures", "forgotten clients", "changes kept"):
        cap = next(column.cap for column in report.columns if column.name == name)
        assert last[name] == cap, f"{name} is too small a test"
    assert report.restarts > 3 and report.transfers > 3
    assert min(report.lives[kind] for kind in ("nodes", "drivers", "workers", "actors", "watchers")) >= 2


def ended_records_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Store, "evict", lambda store: None)


def sessions_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sessions, "forget", lambda sessions, client_ids: 0)


def keys_of_ended_jobs_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(job_keys, "clean_up", lambda store: None)


def the_journal_is_not_compacted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Compactor, "turn", lambda compactor, patience=1: None)


@pytest.mark.parametrize(
    "planted",
    [  # two at a time, which have nothing to do with each other
        {"worker failures: ": ended_records_stay, "journal grows": the_journal_is_not_compacted},
        {"sessions: ": sessions_stay, "keys grows": keys_of_ended_jobs_stay},
    ],
)
def test_a_planted_leak_is_found(planted: dict[str, Plant], monkeypatch: pytest.MonkeyPatch) -> None:
    for plant in planted.values():
        plant(monkeypatch)
    report = Week(SHORT).run()
    for found in planted:
        assert any(problem.startswith(found) for problem in report.problems), report.problems


def test_the_verdict() -> None:
    capped, free = Column("capped", 10.0), Column("free", None, 5.0)
    days = [{"capped": value, "free": value * 10} for value in (1.0, 2.0, 3.0)]
    assert judge(days, [capped, free]) == [
        "free grows: 30 on day 3, and it was 20 on day 2 (at most 29 are allowed)"
    ]
    assert judge([*days[:2], {"capped": 11.0, "free": 29.0}], [capped, free]) == ["capped: 11, and 10 are allowed"]
    assert judge([{"free": 900.0}, *days[1:2], {"free": 28.0}], [capped, free]) == []  # the first day does not count


def test_the_table() -> None:
    report = Report(SHORT, [Column("rows", 5.0), Column("journal", bytes=True)], [{"rows": 3, "journal": 1 << 19}], [])
    lines = table(report).splitlines()
    assert lines[2].split() == ["rows", "3", "5"]
    assert lines[3].split() == ["journal", "0.5", "MiB"]


def test_the_command() -> None:
    arguments = ["--days", "3", "--day-seconds", "60", "--small", "--json"]
    result = CliRunner().invoke(week, arguments)
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["ok"] and len(answer["days"]) == 3, answer["problems"]
    assert answer == {**json.loads(CliRunner().invoke(week, arguments).stdout), "seconds": answer["seconds"],
                      "days": answer["days"]}  # fmt: skip
