"""Placement groups on real nodes, made through a client of the GCS: reserved, used, given back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from raylet_node import Driver, GcsPeer, NodeProcess, Tool, wait_gone

from ftray.gcs.state import commands as c
from ftray.gcs.state.tables import Change, Code, GroupRecord, GroupState, Table
from ftray.ids import group_resource
from ftray.wire import messages as m


class Cluster:
    """A head with two CPUs, another node with two and a disk, and what the GCS says of one group."""

    def __init__(self) -> None:
        self.head = NodeProcess(port=0, fsync=False, config={"heartbeat_period_ms": 50, "infeasible_timeout_ms": 100})
        assert self.head.ready["ok"], self.head.ready
        address = self.head.ready["gcs_endpoints"][1].removeprefix("tcp:")
        self.other = NodeProcess(head=False, address=address, token=self.head.ready["token"], resources={"disk": 2})
        assert self.other.ready["ok"], self.other.ready
        self.gcs = GcsPeer(self.head)
        self.driver = Driver(self.head)
        self.tools = [Tool(self.head), Tool(self.other)]
        self.seen: dict[bytes, GroupRecord] = {}
        with self.gcs.reactor.lock:
            self.gcs.gcs.watch((Table.PLACEMENT_GROUPS,), None, self._changed)
            self.gcs.reactor.flush_dirty()

    def _changed(self, change: Change) -> None:
        assert isinstance(change.record, GroupRecord)
        self.seen[change.key] = change.record

    def create(self, *bundles: dict[str, float], strategy: str = "PACK", name: str = "") -> bytes:
        group_id = os.urandom(16)
        registered = self.driver.registered
        result = self.gcs.command(
            c.CreateGroup(
                group_id, registered.job_id, self.driver.worker_id, registered.node_id, list(bundles), strategy, name
            )
        )
        assert result.ok, result
        return group_id

    def until(self, group_id: bytes, condition: Callable[[GroupRecord], Any]) -> GroupRecord:
        self.gcs.until(lambda: group_id in self.seen and condition(self.seen[group_id]))
        return self.seen[group_id]

    def until_state(self, group_id: bytes, state: GroupState) -> GroupRecord:
        return self.until(group_id, lambda group: group.state is state)

    def available(self, name: str = "CPU") -> list[float]:
        """What is free on both nodes."""
        return [tool.ask("status")["resources"]["available"].get(name, 0.0) for tool in self.tools]

    def close(self) -> None:
        for peer in (self.driver, *self.tools, self.gcs):
            peer.close()
        self.other.close()
        self.head.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


def test_a_group_is_reserved_used_and_given_back(cluster: Cluster) -> None:
    group_id = cluster.create({"CPU": 1.0}, {"CPU": 1.0}, strategy="STRICT_SPREAD", name="pair")
    group = cluster.until_state(group_id, GroupState.CREATED)
    assert {each.node_id.hex() for each in group.bundles} == {
        cluster.head.ready["node_id"],
        cluster.other.ready["node_id"],
    }
    assert cluster.available() == [1.0, 1.0]
    status = cluster.tools[0].ask("status")
    assert [(row["stage"], row["group_id"]) for row in status["bundles"]] == [("COMMITTED", group_id.hex())]
    (row,) = status["gcs"]["placement_groups"]
    assert (row["name"], row["state"], row["nodes"]) == ("pair", "CREATED", 2)

    refused = cluster.gcs.command(
        c.CreateGroup(os.urandom(16), group.job_id, None, b"", [{"CPU": 1.0}], name="pair", detached=True)
    )
    assert refused.code is Code.EXISTS and "pair" in refused.message

    # A task runs in the bundle of the head's node, and is ended with it.
    index = next(at for at, each in enumerate(group.bundles) if each.node_id.hex() == cluster.head.ready["node_id"])
    name = group_resource("CPU", group_id, index)
    (grant,) = cluster.driver.lease(1, class_id=1, **{name: 1.0})
    assert cluster.driver.run(grant, b"echo", b"hello") == b"hello"
    assert cluster.available() == [1.0, 1.0]
    cluster.driver.say(m.LeaseDemand(1, 0))
    assert cluster.gcs.command(c.RemoveGroup(group_id)).ok
    wait_gone(grant.pid)
    cause = cluster.driver.cause(grant.worker_id)
    assert cause is not None and "the placement group in which it ran is gone" in cause["reason"]
    cluster.until(group_id, lambda each: each.state is GroupState.REMOVED and not each.leftovers)
    assert cluster.available() == [2.0, 2.0]
    assert cluster.tools[0].ask("status")["bundles"] == []
    cluster.driver.say(m.LeaseDemand(2, 1, {name: 1.0}))
    assert "asked, the node has none" in cluster.driver.take(m.LeaseInfeasible)[0].missing


def test_what_no_node_could_hold_waits_and_says_why(cluster: Cluster) -> None:
    group_id = cluster.create({"CPU": 1.0}, {"GPU": 1.0}, strategy="STRICT_PACK")
    group = cluster.until(group_id, lambda each: each.missing)
    assert group.state is GroupState.PENDING
    assert "bundle 1 needs 1 GPU on one node" in group.missing
    assert cluster.available() == [2.0, 2.0]
    rows = cluster.tools[0].ask("status")["gcs"]["placement_groups"]
    assert [row["reason"] for row in rows if row["group_id"] == group_id.hex()] == [group.missing]
    assert cluster.gcs.command(c.RemoveGroup(group_id)).ok


def test_bundles_of_a_dead_node_move_and_the_others_stay(cluster: Cluster) -> None:
    group_id = cluster.create({"CPU": 1.0}, {"CPU": 1.0}, strategy="SPREAD")
    before = cluster.until_state(group_id, GroupState.CREATED)
    head, other = cluster.head.ready["node_id"], cluster.other.ready["node_id"]
    assert sorted(each.node_id.hex() for each in before.bundles) == sorted((head, other))
    os.kill(cluster.other.pid, signal.SIGKILL)
    after = cluster.until(group_id, lambda each: each.state is GroupState.CREATED and each.attempt > before.attempt)
    assert [each.node_id.hex() for each in after.bundles] == [head, head]
    assert [each for each in after.bundles if each.attempt == before.attempt] == [
        each for each in before.bundles if each.node_id.hex() == head
    ]
    assert after.cause is not None and "died" in after.cause.reason
    assert cluster.tools[0].ask("status")["resources"]["available"]["CPU"] == 0.0
    # With its driver the group ends.
    cluster.driver.close()
    ended = cluster.until(group_id, lambda each: each.state is GroupState.REMOVED and not each.leftovers)
    assert ended.kind == "job_finished"
    assert cluster.tools[0].ask("status")["resources"]["available"]["CPU"] == 2.0
