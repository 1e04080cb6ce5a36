"""What tools see of a session: who holds what, what is waited for, where each process is, what has run."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from integration.harness import wait_until

import ftray
from ftray.api.context import ask_raylet
from ftray.cli import main
from ftray.cli.memory_report import build, confirmed
from ftray.raylet.session import find_sessions

SESSION = {"num_cpus": 2, "_system_config": {"record_call_sites": 1}}


@ftray.remote
def wait_on(path: str) -> int:
    """Runs until the pipe is closed at the other end."""
    with open(path) as pipe:
        pipe.read()
    return os.getpid()


@ftray.remote
class Keeper:
    def __init__(self) -> None:
        self.kept: Any = None

    def keep(self, kept: Any) -> None:
        self.kept = kept

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[str]:
    """A named pipe; what reads it ends when the test does."""
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR)
    yield path
    os.close(end)


def cli(monkeypatch: pytest.MonkeyPatch, session: Any, *arguments: str) -> Any:
    """Runs a command on this session; returns its JSON."""
    assert cli_text(monkeypatch, session, *arguments).strip()
    return json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)


def cli_text(monkeypatch: pytest.MonkeyPatch, session: Any, *arguments: str) -> str:
    """Runs a command on this session; returns what it prints."""
    mine = next(
        each
        for each in find_sessions(os.path.dirname(session.session_dir))
        if each["session_dir"] == session.session_dir
    )
    monkeypatch.setattr("ftray.cli.find.local_session", lambda root, address=None: mine)
    shown = CliRunner().invoke(main, list(arguments))
    assert shown.exit_code == 0, shown.output
    assert "Error" not in shown.output
    return shown.output


def look() -> dict[str, Any]:
    return build(ask_raylet("memory"))


class TestMemory:
    def test_every_byte_has_its_reason(self, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        keeper = Keeper.remote()
        large = ftray.put(bytes(2_000_000))
        ftray.get(keeper.keep.remote([large]))
        report = cli(monkeypatch, session, "memory")
        row = report["objects"][0]
        assert row["size_bytes"] > 2_000_000 and row["where"] == "store"
        held = {holder["process"].split()[0]: holder["reasons"] for holder in row["holders"]}
        assert held["driver"][:2] == ["local reference", "borrowed by a process"]
        assert "local reference" in held["actor"]
        assert any("test_inspection.py" in holder["site"] for holder in row["holders"])
        assert report["pinned_bytes"] == report["reachable_bytes"] > 2_000_000
        assert report["problems"] == []

    def test_an_idle_cluster_holds_nothing(self, session: Any) -> None:
        held = [ftray.put(bytes(500_000)) for _ in range(3)]
        assert look()["pinned_bytes"] >= 1_500_000
        del held
        report = wait_until(lambda: (r := look())["objects"] == [] and r)
        assert report["store"]["used_bytes"] == 0
        assert all(not row.get("objects") for row in report["processes"])

    def test_a_leak_is_found(self, session: Any) -> None:
        """The checker can fail: an owner that forgets to free is caught."""
        from ftray.worker.core import get_core

        core = get_core()
        freed = core.objects.free_in_store
        ref = ftray.put(bytes(300_000))
        core.objects.free_in_store = lambda object_id: None  # type: ignore[method-assign]
        try:
            del ref
            report = wait_until(lambda: (r := look())["problems"] and r)
        finally:
            core.objects.free_in_store = freed  # type: ignore[method-assign]
        report = confirmed(report, look())
        assert [each["kind"] for each in report["problems"]] == ["unreachable"]
        assert report["pinned_bytes"] - report["reachable_bytes"] >= 300_000
        with core.lock:
            freed(bytes.fromhex(report["problems"][0]["object_id"]))
        wait_until(lambda: not look()["problems"])


class TestPending:
    def test_what_is_waited_for(self, session: Any, pipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
        first = wait_on.remote(pipe)
        second = Keeper.remote().keep.remote(first)
        waiter = threading.Thread(target=lambda: ftray.wait([second]))
        waiter.start()
        answer = wait_until(lambda: (a := cli(monkeypatch, session, "list", "pending"))["blocked"] and a)
        names = {row["name"]: row["waits"] for row in answer["rows"]}
        assert "running on worker" in names["wait_on"] and "waits for 1 argument: " in names["Keeper.keep"]
        assert answer["blocked"][0]["call"] == "wait"
        assert "Keeper.keep" in answer["blocked"][0]["waits"][0]
        ftray.cancel(first, force=True)
        waiter.join()


class TestStack:
    def test_a_task_and_a_worker_stuck_in_c(self, session: Any, pipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
        @ftray.remote
        def stuck(signal: Any) -> None:
            import re

            ftray.get(signal.keep.remote("about to hang"))
            re.match(r"(a|aa)+$", "a" * 60 + "b")  # for years, without letting go of the interpreter

        running = wait_on.remote(pipe)
        signal = Keeper.remote()
        hangs = stuck.remote(signal)

        def both() -> Any:
            text = json.dumps(answer := cli(monkeypatch, session, "stack"))
            return answer if " wait_on" in text and "in stuck" in text else None

        answer = wait_until(both)
        silent = [row for row in answer["processes"] if row["answer"] is None]
        assert len(silent) == 1 and "in stuck" in silent[0]["dump"]
        talking = [row for row in answer["processes"] if (row["answer"] or {}).get("running") == "wait_on"]
        assert any("wait_on" in frame for frame in talking[0]["answer"]["threads"][0]["frames"])
        ftray.cancel(hangs, force=True)
        ftray.cancel(running, force=True)

    def test_no_such_process(self, session: Any) -> None:
        with pytest.raises(ftray.exceptions.FtrayError, match="process id 1"):
            ask_raylet("stack", pid=1)


class TestTimeline:
    def test_tasks_calls_and_ends_are_in(self, session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        @ftray.remote(max_calls=1)
        def once() -> int:
            return os.getpid()

        @ftray.remote(max_retries=0)
        def fails() -> None:
            raise ValueError("on purpose")

        ended = ftray.get(once.remote())
        with pytest.raises(ValueError, match="on purpose"):
            ftray.get(fails.remote())
        keeper = Keeper.remote()
        ftray.get(keeper.pid.remote())

        def trace() -> Any:
            events = ftray.timeline()
            assert events is not None
            return events if any(e["ph"] == "i" and e["tid"] == ended for e in events) else None

        events = wait_until(trace)
        bars = {event["name"].split(".")[-1]: event for event in events if event["ph"] == "X"}
        assert bars["once"]["tid"] == ended
        assert bars["fails"]["args"]["failed"] and not bars["pid"]["args"]["failed"]
        assert bars["pid"]["dur"] >= 1
        # What happened stays; names of processes (M) come and go with spare workers.
        happened = {event["name"] for event in events if event["ph"] != "M"}
        file, other = tmp_path / "trace.json", tmp_path / "other.json"
        assert ftray.timeline(file) is None
        told = cli(monkeypatch, session, "timeline", "-o", str(other))["events"]
        for path in (file, other):
            assert {event["name"] for event in json.loads(path.read_text())} >= happened
        assert told == len(json.loads(other.read_text()))


def test_list_shows_each_kind(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper.remote()
    pid = ftray.get(keeper.pid.remote())
    assert pid in [row["pid"] for row in cli(monkeypatch, session, "list", "workers")["rows"]]
    assert cli(monkeypatch, session, "list", "actors")["rows"][0]["class_name"] == "Keeper"
    assert cli(monkeypatch, session, "list", "nodes")["rows"][0]["state"] == "ALIVE"
    assert cli(monkeypatch, session, "list", "drivers")["rows"][0]["pid"] == os.getpid()
    for kind in ("leases", "objects"):
        assert "rows" in cli(monkeypatch, session, "list", kind)


def test_status_shows_what_each_worker_runs(session: Any, pipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first function that needed the same resources."""

    @ftray.remote
    def another(path: str) -> None:
        with open(path) as end:
            end.read()

    ftray.get(ftray.remote(os.getpid).remote())
    running = another.remote(pipe)

    def shown() -> Any:
        rows = cli(monkeypatch, session, "list", "workers")["rows"]
        return [row for row in rows if row["running"].endswith("another")]

    assert len(wait_until(shown)) == 1
    ftray.cancel(running, force=True)


@pytest.mark.parametrize("columns", ["80", "160"])
def test_tables_tell_objects_apart_and_count_all(session: Any, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = [ftray.put(bytes(200_000 + i)) for i in range(3)] + [ftray.put(i) for i in range(2_000)]
    monkeypatch.setenv("COLUMNS", columns)
    text = cli_text(monkeypatch, session, "memory", "-n", "3")
    listed = cli_text(monkeypatch, session, "list", "objects")
    for ref in refs[:3]:
        assert f"..{ref.hex()[24:]}" in text and f"..{ref.hex()[24:]}" in listed
    assert "and 2,000 more" in text
    assert "2,003 objects (-n" in cli_text(monkeypatch, session, "memory", "-n", "0")
