"""What a node does with bundles when the GCS refuses what it says, is away, or takes them back while in use."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ftray.gcs.state.commands import BundlesPrepared, BundlesRefused
from ftray.gcs.state.tables import Code, Result
from ftray.ids import group_resource
from ftray.raylet.placement_groups import REPEAT_MS, PlacementGroups
from ftray.scheduling.bundles import PREPARE_WAIT_MS, BundleToken
from ftray.scheduling.leases import DedicatedGrant, LeaseScheduler
from ftray.wire.group_messages import CommitBundles, PrepareBundles, ReturnBundles

GROUP, NODE = b"g" * 16, b"n" * 16
OK = Result(Code.OK, "", 0)


class Node:
    """A node with two CPUs: its ledger, what it says to the GCS, what it ends, and its timers."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.said: list[Any] = []
        self.answers: list[Callable[[Result], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.ended: list[tuple[str, int, str]] = []
        self.scheduler = LeaseScheduler({"CPU": 2.0})
        leases = SimpleNamespace(
            scheduler=self.scheduler, settle_soon=lambda: None, given={},
            end=lambda lease, reason: self.ended.append(("task", lease, reason)),
        )  # fmt: skip
        reactor = SimpleNamespace(
            now_ms=lambda: self.now_ms, call_later=lambda ms, fn: self.timers.append((ms, fn)),
        )  # fmt: skip
        raylet: Any = SimpleNamespace(
            leases=leases, gcs=SimpleNamespace(command=self._command), reactor=reactor, node_id=NODE, stopping="",
            actors=SimpleNamespace(end_lease=lambda lease, reason: self.ended.append(("actor", lease, reason))),
        )  # fmt: skip
        self.raylet = raylet
        self.groups = PlacementGroups(raylet)

    def _command(self, command: Any, told: Callable[[Result], None]) -> None:
        self.said.append(command)
        self.answers.append(told)

    def settle(self) -> list[int]:
        """As at the end of a turn. Returns new leases of tasks and actors."""
        self.groups.settled()
        given = []
        for grant in self.scheduler.dispatch(self.now_ms, 10):
            if isinstance(grant, DedicatedGrant) and isinstance(grant.token, BundleToken):
                self.groups.granted(grant.token, grant.lease_id)
            else:
                given.append(grant.lease_id)
        return given

    def prepare(self) -> None:
        self.groups.from_gcs(PrepareBundles(GROUP, 0, {0: {"CPU": 1.0}}))
        self.settle()

    def make(self) -> None:
        self.prepare()
        self.groups.from_gcs(CommitBundles(GROUP, 0))
        self.settle()
        for answer in self.answers:
            answer(OK)


def test_what_the_gcs_refuses_is_given_back() -> None:
    for commits in (False, True):
        node = Node()
        node.prepare()
        if commits:
            node.groups.from_gcs(CommitBundles(GROUP, 0))
        assert node.scheduler.available["CPU"] == 1.0
        node.answers[-1](Result(Code.STALE_INCARNATION, "it is to be given back", 0))
        assert node.scheduler.available == node.scheduler.total == {"CPU": 2.0}
        assert node.groups.bundles.rows() == []


def test_what_could_not_be_made_durable_is_said_again() -> None:
    node = Node()
    node.prepare()
    node.answers[-1](Result(Code.UNAVAILABLE, "the disk is full", 0))
    ((ms, again),) = node.timers
    assert ms == REPEAT_MS and node.said == [BundlesPrepared(GROUP, 0, NODE)]
    again()
    assert node.said == [BundlesPrepared(GROUP, 0, NODE)] * 2
    assert node.scheduler.available["CPU"] == 1.0


def test_what_waits_for_too_long_is_refused() -> None:
    node = Node()
    node.scheduler.set_demand(b"owner", 1, 2, {"CPU": 1.0})
    node.settle()
    node.prepare()
    node.now_ms = PREPARE_WAIT_MS - 1.0
    node.groups.tidy(node.now_ms)
    assert node.said == []
    node.now_ms = PREPARE_WAIT_MS
    node.groups.tidy(node.now_ms)
    (said,) = node.said
    assert isinstance(said, BundlesRefused) and "tasks have held its resources" in said.reason


def test_tasks_and_actors_in_it_are_ended_before_a_bundle_is_returned() -> None:
    node = Node()
    node.make()
    name = group_resource("CPU", GROUP)
    node.scheduler.set_demand(b"owner", 1, 1, {name: 0.5})
    (task,) = node.settle()
    node.raylet.leases.given[task] = task
    node.scheduler.allocate_dedicated(("actor", 0), {name: 0.5}, 0.0)
    (actor,) = node.settle()
    said = len(node.said)
    node.groups.from_gcs(ReturnBundles(GROUP, 0, "enough"))
    reason = "the placement group in which it ran is gone: enough"
    assert node.ended == [("task", task, reason), ("actor", actor, reason)]
    node.scheduler.set_demand(b"owner", 1, 0)
    for lease_id in (task, actor):
        assert len(node.said) == said and node.scheduler.available["CPU"] == 1.0
        node.scheduler.end_lease(lease_id)
        node.settle()
    assert [type(each).__name__ for each in node.said[said:]] == ["BundlesReturned"]
    assert node.scheduler.available == {"CPU": 2.0}
