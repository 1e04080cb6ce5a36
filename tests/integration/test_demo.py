"""The demo with real processes: exact while they are killed, honest when something differs, and ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from integration.harness import MARK, ROOT, marked, wait_for_none, wait_until

from ftray.demo import command
from ftray.demo.counting import Counts
from ftray.demo.killer import WORKER


class Demo:
    """`python -m ftray.demo` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self.out = tempfile.TemporaryFile()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FTRAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-W", "error", "-m", "ftray.demo", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=subprocess.STDOUT,
            env={**environ, MARK: self.mark, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )

    def text(self) -> str:
        return os.pread(self.out.fileno(), 1 << 20, 0).decode()

    def finish(self) -> int:
        code = self.process.wait(50)
        wait_for_none(lambda: marked(self.mark), 5.0, "processes of the demo")
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)
        self.out.close()


@pytest.fixture
def demo() -> Iterator[Any]:
    started: list[Demo] = []

    def start(*arguments: str) -> Demo:
        started.append(Demo(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_the_result_is_exact_while_workers_and_the_gatherer_are_killed(demo: Any) -> None:
    run = demo("--json", "--files", "500", "--seed", "1", "--cpus", "2")
    assert run.finish() == 0, run.text()
    answer = json.loads(run.text())
    assert answer["ok"] is True and answer["differences"] == []
    assert answer["files"] == 500
    assert answer["top_identifiers"][0][0] == "self"
    kills = answer["kills"]
    assert kills, "the job was over before the first kill"
    assert kills[0]["victim"] == WORKER
    # The first one is always in the middle of a task, or just behind its end.
    recovered = [kill for kill in kills if kill["recovery_ms"] is not None]
    assert answer["run_again"] >= len([kill for kill in recovered if kill["victim"] == WORKER])
    assert all(kill["recovery_ms"] > 0 for kill in recovered)


def test_undisturbed_nothing_is_repeated_and_plain_text_is_shown(demo: Any) -> None:
    run = demo("--no-chaos", "--files", "30", "--cpus", "2")
    assert run.finish() == 0, run.text()
    text = run.text()
    assert "in 30 files" in text and "undisturbed" in text
    assert "tasks: " in text and "\x1b" not in text
    assert "The results are the same" in text
    assert "SIGKILL " not in text


def test_ctrl_c_ends_it_with_130_and_leaves_nothing(demo: Any) -> None:
    run = demo("--files", "1000", "--cpus", "2")
    wait_until(lambda: "tasks: " in run.text() or run.process.poll() is not None, 20.0, "the job runs")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130, run.text()
    assert run.text().endswith("interrupted\n")
    assert "Traceback" not in run.text()


def test_a_difference_is_shown_and_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = command.count_plainly

    def count_one_too_many(*arguments: Any) -> Counts:
        counts = plain(*arguments)
        counts.words["self"] += 1
        return counts

    monkeypatch.setattr(command, "count_plainly", count_one_too_many)
    result = CliRunner().invoke(command.main, ["--no-chaos", "--files", "10", "--cpus", "2", "--seed", "5"])
    assert result.exit_code == 1, result.output
    assert "The results differ" in result.output
    assert "word 'self': " in result.output
    assert "with the seed 5" in result.output
