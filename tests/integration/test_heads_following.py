"""Two of three heads are gone: what the last one serves, what waits, and what is said about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from integration.harness import ROOT, wait_until

import ftray
from ftray.cluster_utils import Cluster
from ftray.exceptions import GetTimeoutError
from ftray.gcs.state.commands import KvPut
from ftray.gcs.state.tables import Change, KvRecord, Record, Result, Table, kv_key
from ftray.worker import gcs_access
from ftray.worker.core import get_core


@ftray.remote(num_cpus=0.1, max_concurrency=2)
class Gate:
    def __init__(self) -> None:
        self.event = threading.Event()

    def hold(self) -> int:
        self.event.wait(30.0)
        return 7

    def open(self) -> bool:
        self.event.set()
        return True

    def is_open(self) -> bool:
        return self.event.is_set()


def tool(cluster: Cluster, *arguments: str) -> dict[str, Any]:
    """A command, on the cluster of this program."""
    done = subprocess.run(
        [sys.executable, "-m", "ftray.cli", *arguments, "--json"],
        env={**os.environ, **cluster.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=40,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_last_head_serves_what_any_head_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Change] = []
    found: list[Record | None] = []
    results: list[Result] = []
    with Cluster(heads=3, nodes=1, num_cpus=2, config={"job_wait_ms": 300}) as cluster:
        cluster.connect()
        leader = cluster.leader()
        other, last = (index for index in range(3) if index != leader)

        @ftray.remote
        def triple(number: int) -> int:
            return 3 * number

        gate = Gate.remote()
        assert not ftray.get(gate.is_open.remote())  # the actor is there: to start one takes a leader
        tripled = triple.remote(gate.hold.remote())  # exported now; no worker needs it before the gate is open
        core = get_core()
        client = core.gcs.client
        with core.lock:
            client.command(KvPut("test", b"before", b"v", False), results.append)
            core.settle()
        wait_until(lambda: results, what="an acknowledged write, and so the function")
        commit = cluster.ask_head(leader)["commit_index"]
        wait_until(lambda: cluster.ask_head(last)["applied_index"] >= commit, what="the last head has it all")
        cluster.kill_head(leader)
        cluster.kill_head(other)
        assert ftray.get(gate.open.remote())
        assert ftray.get(tripled, timeout=20) == 21  # a worker got the function from the last head

        key = kv_key("test", b"before")
        with core.lock:
            client.watch([Table.KV], [key], told.append)
            client.read(Table.KV, key, found.append, cached=True)
            client.command(KvPut("test", b"without a quorum", b"v", False), results.append)
            core.settle()
        wait_until(lambda: told and found, what="the last head answers")
        assert isinstance(found[0], KvRecord) and found[0].value == b"v" and told[0].record == found[0]
        assert client.served_by == cluster.endpoints[last]

        status = tool(cluster, "status")["gcs"]
        assert status["head"] == cluster.endpoints[last] and not status["leads"]
        assert f"as the head {cluster.endpoints[last].removeprefix('tcp:')} knows it" in status["note"]
        listed = tool(cluster, "list", "nodes")
        assert len(listed["rows"]) == 4 and "as the head" in listed["note"]

        with pytest.raises(GetTimeoutError, match="the GCS does not answer .* that takes 2 heads of 3"):
            ftray.get(Gate.remote().is_open.remote(), timeout=0.1)
        monkeypatch.setattr(gcs_access, "WARNING_S", 0.05)
        searching = ThreadPoolExecutor(1).submit(ftray.get_actor, "nobody", "somewhere")
        wait_until(lambda: "still waits for the GCS" in caplog.text, what="the warning")
        assert "looking for actor 'nobody' still waits for the GCS: the GCS does not answer" in caplog.text
        program = "import ftray, os; ftray.init(address=os.environ['FTRAY_ADDRESS'])"
        joining = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **cluster.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=40, check=False,
        )  # fmt: skip
        assert "GcsUnavailableError: the node refused this driver: the job could not be entered" in joining.stderr
        assert "that takes 2 heads of 3" in joining.stderr

        text = wait_until(
            lambda: "that takes 2 heads of 3" in str(client.unavailable()) and str(client.unavailable()),
            what="the reason",
        )
        assert f"only {cluster.endpoints[last]} answers" in text
        assert all(f"{cluster.endpoints[index]} (" in text for index in (leader, other))
        assert len(results) == 1
        cluster.restart_heads([leader, other])
        wait_until(lambda: len(results) == 2, 20.0, "the command is carried out")
        assert results[1].ok
        with pytest.raises(ValueError, match="no live actor is named 'nobody'"):
            searching.result(20.0)
