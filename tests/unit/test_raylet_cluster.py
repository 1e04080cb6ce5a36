"""Nodes that join a cluster: members, their settings, and how they leave it. Real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from raylet_node import Driver, GcsPeer, NodeProcess, Tool

from ftray.gcs.state.commands import DeathCauseRecord, MarkNodeDead
from ftray.gcs.state.tables import Change, NodeRecord, NodeState, Table


class Cluster:
    """A head and one other node, and what the head's GCS says of the nodes."""

    def __init__(self) -> None:
        self.head = NodeProcess(port=0, fsync=False, config={"heartbeat_period_ms": 50, "lease_linger_ms": 77})
        assert self.head.ready["ok"], self.head.ready
        address = self.head.ready["gcs_endpoints"][1].removeprefix("tcp:")
        self.other = NodeProcess(head=False, address=address, token=self.head.ready["token"], resources={"disk": 2})
        assert self.other.ready["ok"], self.other.ready
        self.gcs = GcsPeer(self.head)
        self.nodes: dict[str, NodeRecord] = {}
        with self.gcs.reactor.lock:
            self.gcs.gcs.watch((Table.NODES,), None, self._changed)
            self.gcs.reactor.flush_dirty()

    def _changed(self, change: Change) -> None:
        if isinstance(change.record, NodeRecord):
            self.nodes[change.key.hex()] = change.record

    def until_state(self, node: NodeProcess, state: NodeState) -> NodeRecord:
        node_id = node.ready["node_id"]
        self.gcs.until(lambda: node_id in self.nodes and self.nodes[node_id].state is state)
        return self.nodes[node_id]

    def close(self) -> None:
        self.gcs.close()
        self.other.close()
        self.head.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


def test_a_node_joins_and_shares_the_settings(cluster: Cluster) -> None:
    record = cluster.until_state(cluster.other, NodeState.ALIVE)
    assert record.resources["disk"] == 2
    assert record.pid == cluster.other.pid
    assert cluster.until_state(cluster.head, NodeState.ALIVE).pid == cluster.head.pid
    assert cluster.other.ready["cluster_id"] == cluster.head.ready["cluster_id"]
    driver = Driver(cluster.other)
    assert driver.registered.cluster_id.hex() == cluster.head.ready["cluster_id"]
    assert b"lease_linger_ms\x4d" in driver.config  # 77, as the head was told
    (grant,) = driver.lease(1)
    assert driver.run(grant, b"echo", b"x") == b"x"
    driver.close()


def test_a_node_that_is_stopped_says_so(cluster: Cluster) -> None:
    cluster.until_state(cluster.other, NodeState.ALIVE)
    tool = Tool(cluster.other)
    tool.ask("stop")
    assert cluster.other.process.wait(20) == 0
    cause = cluster.until_state(cluster.other, NodeState.DEAD).cause
    assert cause is not None
    assert "asked this node to stop" in cause.reason
    tool.close()


def test_a_node_that_is_killed_is_missed(cluster: Cluster) -> None:
    cluster.until_state(cluster.other, NodeState.ALIVE)
    os.kill(cluster.other.pid, signal.SIGKILL)
    cluster.until_state(cluster.other, NodeState.DEAD)


def test_a_node_that_was_declared_dead_ends(cluster: Cluster) -> None:
    record = cluster.until_state(cluster.other, NodeState.ALIVE)
    cause = DeathCauseRecord(reason="an operator said so")
    assert cluster.gcs.command(MarkNodeDead(record.node_id, record.incarnation, cause)).ok
    assert cluster.other.process.wait(20) == 1
    assert "an operator said so" in cluster.other.log


def test_a_node_outlives_its_head(cluster: Cluster) -> None:
    driver = Driver(cluster.other)
    (grant,) = driver.lease(1)
    os.kill(cluster.head.pid, signal.SIGKILL)
    cluster.head.process.wait(20)
    assert driver.run(grant, b"echo", b"still here") == b"still here"
    assert len(driver.lease(1, class_id=2)) == 1
    tool = Tool(cluster.other)
    status = tool.ask_until(lambda status: not status["node"]["gcs_connected"])
    assert status["gcs"] is None
    tool.close()
    driver.close()


def test_a_wrong_token_is_refused(cluster: Cluster) -> None:
    address = cluster.head.ready["gcs_endpoints"][1].removeprefix("tcp:")
    stranger = NodeProcess(head=False, address=address, token="00" * 32)
    assert not stranger.ready["ok"]
    assert "token" in stranger.ready["error"]
    stranger.close()
