"""`ftray start`, `status`, `logs` and `stop` with real nodes, each test under a session root of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftray.raylet.session import find_sessions, start_ticks

TIMEOUT_S = 40


class Shell:
    """Runs the command line with one session root."""

    def __init__(self, root: str) -> None:
        self.root = root
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FTRAY_")}
        self.environ = {**kept, "FTRAY_SESSION_ROOT": root, "COLUMNS": "150"}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ftray.cli", *arguments]

    def run(self, *arguments: str, code: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments),
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def ask(self, *arguments: str, code: int = 0, **environ: str) -> dict[str, Any]:
        done = self.run(*arguments, "--json", code=code, **environ)
        assert done.stderr == ""
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict) and answer["ok"] is (code == 0)
        return answer

    def start_head(self, *arguments: str) -> dict[str, Any]:
        return self.ask("start", "--head", "--port", "0", "--num-cpus", "1", *arguments)


def wait_for_end(processes: list[psutil.Process]) -> None:
    """Until all of them are gone, or dead and waiting for whoever adopted them to look."""
    deadline = time.monotonic() + TIMEOUT_S
    for process in processes:
        while start_ticks(process.pid):
            assert time.monotonic() < deadline, f"{process} still runs"
            time.sleep(0.005)


@pytest.fixture
def shell() -> Iterator[Shell]:
    with tempfile.TemporaryDirectory(prefix="ft-") as root:
        shell = Shell(root)
        yield shell
        pids = [session["pid"] for session in find_sessions(root)]
        families = [
            process for pid in pids for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
        ]
        for process in families:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        wait_for_end(families)


def test_start_status_logs_and_stop_for_people(shell: Shell) -> None:
    started = shell.run("start", "--head", "--port", "0", "--num-cpus", "1").stdout
    [session] = find_sessions(shell.root)
    for part in ('ftray.init(address="auto")', "ftray start --address 127.0.0.1:", "token", "ftray stop"):
        assert part in started
    shown = shell.run("status").stdout
    assert session["node_id"][:12] in shown and "CPU" in shown
    assert "raylet.log" in shell.run("logs").stdout
    shell.run("logs", "raylet.log")
    process = psutil.Process(session["pid"])
    children = process.children(recursive=True)
    stopped = shell.run("stop").stdout
    assert f"process {session['pid']}" in stopped
    wait_for_end([process, *children])
    assert not (Path(session["session_dir"]) / "token").exists()
    assert "SIGTERM" in shell.run("logs", "raylet.log").stdout  # the logs stay
    shell.run("stop", code=3)
    shell.run("status", code=3)


def test_start_status_and_stop_for_scripts(shell: Shell) -> None:
    head = shell.start_head("--resources", '{"disk": 2}', "--labels", '{"zone": "b"}', "--object-store-memory", "64MiB")
    assert head["head"] and head["address"].startswith("127.0.0.1:")
    token_file = Path(head["token_file"])
    assert token_file.stat().st_mode & 0o777 == 0o600
    status = shell.ask("status")
    assert status["node"]["node_id"] == head["node_id"]
    assert status["node"]["labels"] == {"zone": "b"}
    assert status["resources"]["total"]["CPU"] == 1 and status["resources"]["total"]["disk"] == 2
    assert status["store"]["capacity_bytes"] == 64 << 20
    assert status == {**shell.ask("status", "--address", head["address"]), "workers": status["workers"]}
    shell.ask("status", "--address", "127.0.0.1:1", code=3)
    assert [row["pid"] for row in shell.ask("stop")["stopped"]] == [head["pid"]]


def test_a_second_node_joins_with_the_token_at_hand(shell: Shell) -> None:
    head = shell.start_head()
    node = shell.ask("start", "--address", head["address"], "--num-cpus", "1")
    assert node["cluster_id"] == head["cluster_id"] and not node["head"]
    nodes = shell.ask("status")["gcs"]["nodes"]
    assert {each["node_id"] for each in nodes} == {head["node_id"], node["node_id"]}
    assert {each["state"] for each in nodes} == {"ALIVE"}
    stopped = shell.ask("stop")["stopped"]
    assert [row["head"] for row in stopped] == [False, True]


def test_a_node_that_is_killed_is_known_to_be_dead(shell: Shell) -> None:
    head = shell.start_head()
    node = shell.ask("start", "--address", head["address"], "--num-cpus", "1")
    os.kill(node["pid"], signal.SIGKILL)
    for _ in range(100):
        nodes = shell.ask("status", "--address", head["address"])["gcs"]["nodes"]
        states = {each["node_id"]: each["state"] for each in nodes}
        if states[node["node_id"]] == "DEAD":
            break
    assert states == {head["node_id"]: "ALIVE", node["node_id"]: "DEAD"}


def test_the_wrong_token_is_refused_with_a_remedy(shell: Shell) -> None:
    head = shell.start_head()
    refused = shell.ask("start", "--address", head["address"], code=1, FTRAY_TOKEN="ab" * 32)
    assert "token" in refused["error"] and "FTRAY_TOKEN" in refused["remedy"]
    assert len(find_sessions(shell.root)) == 1


def test_a_second_head_on_the_same_port_is_refused(shell: Shell) -> None:
    head = shell.start_head()
    port = head["address"].rpartition(":")[2]
    refused = shell.ask("start", "--head", "--port", port, code=1)
    assert refused["holder_pid"] == head["pid"] and "ftray stop" in refused["remedy"]


def test_a_given_token_is_used(shell: Shell) -> None:
    done = shell.ask("start", "--head", "--port", "0", "--num-cpus", "1", FTRAY_TOKEN="cd" * 32)
    assert Path(done["token_file"]).read_text() == "cd" * 32


def test_block_stays_until_interrupted(shell: Shell) -> None:
    arguments = shell.command("start", "--head", "--port", "0", "--num-cpus", "1", "--block", "--json")
    blocking = subprocess.Popen(arguments, env=shell.environ, stdout=subprocess.PIPE, text=True)
    try:
        assert blocking.stdout is not None
        ready = json.loads(blocking.stdout.readline())
        assert psutil.pid_exists(ready["pid"]) and blocking.poll() is None
        blocking.send_signal(signal.SIGINT)
        assert blocking.wait(20) == 0
        assert not psutil.pid_exists(ready["pid"])
        assert blocking.stdout.read() == ""
    finally:
        blocking.kill()
        blocking.wait()
        blocking.stdout.close()


def test_stop_by_force(shell: Shell) -> None:
    head = shell.start_head()
    os.kill(head["pid"], signal.SIGSTOP)  # it can't even be asked
    assert [row["pid"] for row in shell.ask("stop", "--force")["stopped"]] == [head["pid"]]
    assert not Path(head["token_file"]).exists()
    shell.ask("status", code=3)
