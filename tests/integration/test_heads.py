"""Three heads as processes: the leader dies, all die, one stops, one loses its disk; and programs go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import ge
from typing import Any

import pytest
from integration.harness import ROOT, wait_until

import ftray
from ftray.cluster_utils import Cluster, ClusterError, NodeProcess, free_ports
from ftray.gcs.state.commands import KvPut
from ftray.gcs.state.tables import Code, Result, Table, kv_key
from ftray.raylet.session import read_session
from ftray.worker.core import get_core


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(heads=3, nodes=1, num_cpus=2) as cluster:
        cluster.connect()
        yield cluster


def put(key: str) -> Result:
    """A write to the GCS of the program's own cluster; waits until it is acknowledged."""
    core, results = get_core(), []
    with core.lock:
        core.gcs.command(KvPut("test", key.encode(), b"v", False), results.append)
        core.settle()
    wait_until(lambda: results, what=f"the write of {key}")
    result: Result = results[0]
    return result


def read(key: str) -> bytes | None:
    core, found = get_core(), []
    with core.lock:
        core.gcs.read_kv("test", key.encode(), found.append)
        core.settle()
    wait_until(lambda: found, what=f"the value of {key}")
    value: bytes | None = found[0]
    return value


def heads(cluster: Cluster, *arguments: str, code: int = 0) -> dict[str, Any]:
    """`ftray heads`."""
    done = subprocess.run(
        [sys.executable, "-m", "ftray.cli", "heads", *arguments, "--address", cluster.address, "--json"],
        env={**os.environ, **cluster.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=40,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@ftray.remote
def double(number: int) -> int:
    return 2 * number


@ftray.remote(num_cpus=0.1)  # so that it is on the node, and not with a head
class Counter:
    def __init__(self) -> None:
        self.value = 0

    def add(self) -> int:
        self.value += 1
        return self.value


class Writer:
    """Writes keys one after the other until it is stopped."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.acknowledged: list[str] = []
        self.refused: list[Result] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        number = 0
        while not self._stop.is_set():
            key = f"{self.name}-{number}"
            result = put(key)
            (self.acknowledged.append(key) if result.code is Code.OK else self.refused.append(result))
            number += 1

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def more(self, count: int = 5) -> None:
        """Waits for so many writes from now on."""
        wanted = len(self.acknowledged) + count
        wait_until(lambda: len(self.acknowledged) >= wanted or self.refused, 20.0, "acknowledged writes")

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(20.0)
        assert not self._thread.is_alive() and not self.refused


def test_the_leader_is_killed_in_the_middle_of_a_program(cluster: Cluster) -> None:
    counter = Counter.options(name="counter").remote()
    assert ftray.get(counter.add.remote()) == 1
    refs = [double.remote(number) for number in range(500)]
    leader = cluster.leader()
    cluster.kill_head(leader)
    assert [ftray.get(counter.add.remote()) for _ in range(100)] == list(range(2, 102))  # no head is needed for that
    refs += [double.remote(number) for number in range(500, 1000)]
    assert ftray.get(refs) == [2 * number for number in range(1000)]
    another = Counter.options(name="another").remote()
    assert ftray.get(another.add.remote()) == 1
    assert ftray.get(ftray.get_actor("counter").add.remote()) == 102
    with pytest.raises(ValueError, match="counter"):
        ftray.get(Counter.options(name="counter").remote().add.remote())
    cluster.restart_head(leader)
    assert cluster.ask_head(leader)["role"] == "follower"


def test_all_heads_are_killed_and_every_acknowledged_write_is_there(cluster: Cluster) -> None:
    survivor = Counter.options(name="survivor").remote()
    assert ftray.get(survivor.add.remote()) == 1
    ftray.get([double.remote(number) for number in range(50)])  # so that workers have the function
    with Writer("all") as writer:
        writer.more(20)
        for index in range(3):
            cluster.kill_head(index)
        assert ftray.get([double.remote(number) for number in range(50)]) == [2 * number for number in range(50)]
        cluster.restart_heads(range(3))
        writer.more()
    assert [key for key in writer.acknowledged if read(key) != b"v"] == []
    assert ftray.get(ftray.get_actor("survivor").add.remote()) == 2


@ftray.remote(num_cpus=0.1)
class Client:
    """Writes and reads on its own, by the GCS client of its own process, until it is told to stop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests = 0
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _ask(self, begin: Any) -> Any:
        core, found, there = get_core(), [], threading.Event()
        with core.lock:
            begin(core.gcs, lambda answer: (found.append(answer), there.set()))
            core.settle()
        return found[0] if there.wait(20.0) else "no answer within 20 s"

    def _work(self) -> None:
        while not self._stop.is_set():
            key = b"%s-%d" % (self.name.encode(), self.requests)
            result = self._ask(lambda gcs, answer, key=key: gcs.command(KvPut("roll", key, key, False), answer))
            if result != "no answer within 20 s" and result.code is Code.OK:
                found = self._ask(lambda gcs, answer, key=key: gcs.read_kv("roll", key, answer))
                if found != key:
                    self.failures.append(f"{key!r} reads as {found!r}")
            else:  # also one that took effect twice: it would exist already
                self.failures.append(f"{key!r}: {result}")
            self.requests += 1

    def count(self) -> int:
        return self.requests

    def stop(self) -> tuple[int, list[str]]:
        self._stop.set()
        self._thread.join(20.0)
        return self.requests, self.failures


def test_a_rolling_restart_costs_no_request(cluster: Cluster) -> None:
    """Each head twice, the leader whenever it has not had its turn; writes, reads and lookups go on, none fails."""
    clients = [Client.remote(f"client{number}") for number in range(3)]
    named = Counter.options(name="rolling").remote()
    lookups, stop = [0], threading.Event()

    def look_up() -> None:
        while not stop.is_set():
            assert ftray.get(ftray.get_actor("rolling").add.remote()) == lookups[0] + 1
            lookups[0] += 1

    def go_on() -> None:
        """All of them get further."""
        wanted = [count + 5 for count in ftray.get([client.count.remote() for client in clients])]
        looked_up = lookups[0] + 5
        wait_until(
            lambda: all(map(ge, ftray.get([client.count.remote() for client in clients]), wanted))
            and lookups[0] >= looked_up,
            20.0, "requests go on",
        )  # fmt: skip

    assert ftray.get(named.add.remote()) == 1
    lookups[0] = 1
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look_up)
        try:
            led = 0
            for _ in range(2):
                left = {0, 1, 2}
                while left:
                    leader = cluster.leader()
                    index = leader if leader in left else min(left)
                    led += index == leader
                    left.remove(index)
                    cluster.stop_head(index)
                    go_on()
                    cluster.restart_head(index)
                    go_on()
            assert led >= 2
        finally:
            stop.set()
            answers = ftray.get([client.stop.remote() for client in clients])
        looking.result(20.0)
    assert [failures for _, failures in answers] == [[], [], []]
    written = {
        kv_key("roll", b"client%d-%d" % (number, each)) for number, (count, _) in enumerate(answers)
        for each in range(count)
    }  # fmt: skip
    core, listed = get_core(), list[dict[bytes, Any]]()
    with core.lock:
        core.gcs.client.read_all(Table.KV, listed.append)
        core.settle()
    wait_until(lambda: listed, what="the table")
    assert {key for key in listed[0] if key.startswith(kv_key("roll", b""))} == written
    assert all(count > 60 for count, _ in answers) and lookups[0] > 60
    for actor in (*clients, named):
        ftray.kill(actor)


def test_a_frozen_leader_is_left_by_its_clients(cluster: Cluster) -> None:
    leader = cluster.heads[cluster.leader()]
    assert leader is not None
    with Writer("frozen") as writer:
        writer.more()
        os.kill(leader.pid, signal.SIGSTOP)
        try:
            writer.more()
        finally:
            os.kill(leader.pid, signal.SIGCONT)
        writer.more()


def test_a_head_that_was_frozen_for_long_stays_a_head(cluster: Cluster) -> None:
    """Its node was declared dead meanwhile, and begins anew: a head that ended with it would cost a vote."""
    index = (cluster.leader() + 1) % 3
    head = cluster.heads[index]
    assert head is not None

    def node_is(alive: bool) -> bool:
        return any(node["NodeID"] == head.node_id and node["Alive"] is alive for node in ftray.nodes())

    os.kill(head.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: node_is(False), what="the frozen head's node is declared dead")
    finally:
        os.kill(head.pid, signal.SIGCONT)
    wait_until(lambda: node_is(True), what="it joins again")
    leader = cluster.leader()
    cluster.kill_head(leader)
    assert put("with the head that was frozen").ok
    assert head.process.poll() is None
    cluster.restart_head(leader)


def test_a_head_that_lost_its_disk_is_refused_and_replaced(cluster: Cluster) -> None:
    index = next(each for each in range(3) if each != cluster.leader())
    replica = cluster.ask_head(index)["replica"]
    cluster.kill_head(index)
    shutil.rmtree(cluster.gcs_dir(index))
    with pytest.raises(ClusterError, match="another disk"):
        cluster.restart_head(index)
    cluster.stop_head(index)
    shutil.rmtree(cluster.gcs_dir(index))
    cluster.restart_head(index, join=True)
    listed = heads(cluster, "list")
    row = next(row for row in listed["heads"] if row["endpoint"] == cluster.endpoints[index])
    assert (row["replica"], row["role"]) == (replica, "away")
    (guest,) = listed["waiting"]
    assert guest["endpoint"] == cluster.endpoints[index]
    answer = heads(cluster, "replace", replica[:8], cluster.endpoints[index].removeprefix("tcp:"))
    row = next(row for row in answer["heads"] if row["endpoint"] == cluster.endpoints[index])
    assert row["replica"] == guest["replica"] and row["voter"]
    assert len(answer["heads"]) == 3 and not answer["waiting"]


def test_a_head_is_added_leads_and_is_removed(cluster: Cluster) -> None:
    (port,) = free_ports(1)
    endpoint = f"tcp:127.0.0.1:{port}"
    head = NodeProcess(
        {
            **cluster._common, "head": True, "heads": cluster.endpoints, "head_endpoint": endpoint, "join": True,
            "port": port, "gcs_dir": f"{cluster.session_root}/new", "num_cpus": 0,
        }
    )  # fmt: skip
    cluster.nodes.append(head)
    head.wait_ready()
    assert "no head at" in heads(cluster, "add", "127.0.0.1:1", code=1)["error"]
    answer = heads(cluster, "add", f"127.0.0.1:{port}")
    assert len(answer["heads"]) == 4 and all(row["voter"] for row in answer["heads"])
    answer = heads(cluster, "transfer", f"127.0.0.1:{port}")
    assert next(row["endpoint"] for row in answer["heads"] if row["role"] == "leader") == endpoint == answer["leader"]
    assert "leads already" in heads(cluster, "transfer", f"127.0.0.1:{port}", code=1)["error"]
    assert put("through the new head").ok
    answer = heads(cluster, "transfer")
    assert next(row["endpoint"] for row in answer["heads"] if row["role"] == "leader") != endpoint == answer["former"]
    assert put("after the transfer").ok
    answer = heads(cluster, "remove", f"127.0.0.1:{port}")
    assert len(answer["heads"]) == 3 and all(row["lag"] == 0 for row in answer["heads"])
    assert put("after the removal").ok
    assert head.process.poll() is None  # it goes on as a plain node
    wait_until(lambda: not read_session(head.session_dir)["head"], what="the node is announced as none of the heads")
    assert endpoint not in wait_until(lambda: read_session(cluster.nodes[0].session_dir))["gcs_endpoints"]
    cluster.remove_node(cluster.add_node(address=f"127.0.0.1:{port}"))  # it tells those with an old list who leads
    cluster.remove_node(head)


def test_without_a_quorum_the_error_names_who_answers(cluster: Cluster) -> None:
    leader = cluster.leader()
    others = [index for index in range(3) if index != leader]
    for index in others:
        cluster.kill_head(index)
    alone = cluster.start_head(others[0], heads=[*cluster.endpoints], join_timeout_ms=1)
    with pytest.raises(ClusterError, match="GCS"):
        alone.wait_ready()
    cluster.stop_head(others[0])
    problem = wait_until(lambda: heads(cluster, "list")["problem"], what="the leader steps down")
    assert cluster.endpoints[leader] in problem and all(cluster.endpoints[each] in problem for each in others)
    assert ftray.get(double.remote(4)) == 8
    text = wait_until(
        lambda: "no leader" in str(get_core().gcs.client.unavailable()) and str(get_core().gcs.client.unavailable())
    )
    assert f"only {cluster.endpoints[leader]} answers" in text
    cluster.restart_heads(others)
    assert put("with a quorum again").ok


def test_heads_are_started_and_stopped_by_command() -> None:
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as root:
        ports = free_ports(3)
        listed = ",".join(f"127.0.0.1:{port}" for port in ports)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FTRAY_")}
        environ = {**kept, "FTRAY_SESSION_ROOT": root, "FTRAY_TOKEN": "ab" * 32, "PYTHONPATH": str(ROOT)}

        def begin(*arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "ftray.cli", *arguments, "--json"]
            return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        def end(process: subprocess.Popen[str]) -> dict[str, Any]:
            out, err = process.communicate(timeout=40)
            assert process.returncode == 0, out + err
            answer: dict[str, Any] = json.loads(out)
            return answer

        def start(port: int) -> subprocess.Popen[str]:
            return begin("start", "--head", "--heads", listed, "--port", str(port), "--num-cpus", "0")

        try:
            started = [end(each) for each in [start(port) for port in ports]]
            assert [sorted(each["address"].split(",")) for each in started] == [sorted(listed.split(","))] * 3
            rows = end(begin("heads", "list"))["heads"]
            assert sorted(row["role"] for row in rows) == ["follower", "follower", "leader"]
            os.kill(started[0]["pid"], signal.SIGKILL)
            again = end(start(ports[0]))
            assert again["cluster_id"] == started[0]["cluster_id"]
            replicas = {row["replica"] for row in rows}
            assert {row["replica"] for row in end(begin("heads", "list"))["heads"]} == replicas
        finally:
            stopped = end(begin("stop"))
        assert len(stopped["stopped"]) == 3
