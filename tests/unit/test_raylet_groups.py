"""Placement groups on a node that begins anew: what it drops, and how it comes to be asked again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ftray.raylet.placement_groups import PlacementGroups
from ftray.scheduling.leases import LeaseScheduler
from ftray.wire.group_messages import BundlesHeld, PrepareBundles, ReturnBundles

GROUP = b"g" * 16


class Node:
    """The reservations of a node with one CPU, and what it says."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        leases = SimpleNamespace(scheduler=LeaseScheduler({"CPU": 1.0}), settle_soon=lambda: None)
        gcs = SimpleNamespace(send=self.said.append, command=lambda command, told: self.said.append(command))
        reactor = SimpleNamespace(now_ms=lambda: 0.0)
        raylet: Any = SimpleNamespace(leases=leases, gcs=gcs, reactor=reactor, node_id=b"n" * 16, stopping="")
        self.groups = PlacementGroups(raylet)


def test_a_node_that_is_a_member_again_reports_what_it_holds_because_it_has_dropped_what_it_was_asked() -> None:
    node = Node()
    node.groups.from_gcs(PrepareBundles(GROUP, 0, {0: {"CPU": 1.0}}))
    node.groups.registered()
    assert node.said == []  # it was a member all the time
    node.groups.fenced("it was frozen")
    node.groups.from_gcs(ReturnBundles(GROUP, 1, "removed by request"))  # registered, and does not know it yet
    assert node.said == []
    node.groups.registered()
    assert node.said == [BundlesHeld(())]
    node.groups.from_gcs(ReturnBundles(GROUP, 1, "removed by request"))
    assert [type(each).__name__ for each in node.said[1:]] == ["BundlesReturned"]
