"""The bundles that a node holds: prepared, committed, used by leases, given back."""

from __future__ import annotations

import pytest

from ftray.ids import BUNDLE, group_resource
from ftray.scheduling.bundles import (
    PREPARE_WAIT_MS,
    BundleEffect,
    BundleToken,
    Committed,
    EndLeases,
    NodeBundles,
    Prepared,
    Refused,
    Returned,
)
from ftray.scheduling.leases import DedicatedGrant, DedicatedInfeasible, Grant, Infeasible, LeaseScheduler

G, H = b"g" * 16, b"h" * 16
OWNER = b"owner"
ONE = {0: {"CPU": 1.0}}


class Node:
    """A ledger of four CPUs and a disk, with the bundles on it."""

    def __init__(self) -> None:
        self.scheduler = LeaseScheduler({"CPU": 4.0, "disk": 2.0})
        self.bundles = NodeBundles(self.scheduler)
        self.now_ms = 0.0
        self.classes: dict[tuple[tuple[str, float], ...], int] = {}
        self.refused: list[str] = []

    def settle(self) -> tuple[list[BundleEffect], list[int]]:
        """What the shell does in a turn. Returns what bundles say, and new leases."""
        effects: list[BundleEffect] = list(self.bundles.leases_ended()) if self.bundles.returning else []
        leases = []
        for grant in self.scheduler.dispatch(self.now_ms, 64):
            if isinstance(grant, DedicatedGrant):
                assert isinstance(grant.token, BundleToken)
                effects += self.bundles.granted(grant.token, grant.lease_id)
            else:
                assert isinstance(grant, Grant)
                leases.append(grant.lease_id)
        for found in self.scheduler.infeasible():
            if isinstance(found, DedicatedInfeasible):
                assert isinstance(found.token, BundleToken)
                effects += self.bundles.infeasible(found.token, found.missing)
            else:
                assert isinstance(found, Infeasible)
                self.refused.append(found.missing)
        return effects, leases

    def prepare(
        self, group: bytes = G, attempt: int = 0, bundles: dict[int, dict[str, float]] = ONE
    ) -> list[BundleEffect]:
        return [*self.bundles.prepare(group, attempt, bundles, self.now_ms), *self.settle()[0]]

    def make(self, group: bytes = G, attempt: int = 0, bundles: dict[int, dict[str, float]] = ONE) -> None:
        assert self.prepare(group, attempt, bundles) == [Prepared(group, attempt)]
        assert self.bundles.commit(group, attempt) == [Committed(group, attempt)]

    def lease(self, want: int = 1, **resources: float) -> list[int]:
        shape = tuple(sorted(resources.items()))
        class_id = self.classes.setdefault(shape, len(self.classes) + 1)
        self.scheduler.set_demand(OWNER, class_id, want, resources)
        return self.settle()[1]

    @property
    def free(self) -> float:
        return self.scheduler.available["CPU"]


@pytest.fixture
def node() -> Node:
    return Node()


def test_resources_are_held_and_offered_and_given_back(node: Node) -> None:
    bundles = {0: {"CPU": 1.0}, 2: {"CPU": 2.0, "disk": 1.0}}
    assert node.prepare(bundles=bundles) == [Prepared(G, 0)]
    assert node.free == 1.0 and node.scheduler.total == {"CPU": 4.0, "disk": 2.0}
    assert node.bundles.commit(G, 0) == [Committed(G, 0)]
    offered = node.scheduler.available
    assert offered[group_resource("CPU", G, 0)] == 1.0 and offered[group_resource("CPU", G, 2)] == 2.0
    assert offered[group_resource("CPU", G)] == 3.0 and offered[group_resource("disk", G)] == 1.0
    assert offered[group_resource(BUNDLE, G, 2)] == 1000.0 and offered[group_resource(BUNDLE, G)] == 2000.0
    assert node.bundles.held() == (BundleToken(G, 0),)
    assert node.bundles.give_back(G, 0, "removed") == [Returned(G, 0, "removed")]
    assert node.scheduler.available == node.scheduler.total == {"CPU": 4.0, "disk": 2.0}
    assert node.bundles.held() == ()


def test_repeats_are_answered_and_do_nothing(node: Node) -> None:
    node.make()
    assert node.prepare() == [Prepared(G, 0)]
    assert node.bundles.commit(G, 0) == [Committed(G, 0)]
    assert node.free == 3.0
    node.bundles.give_back(G, 0, "")
    assert node.bundles.give_back(G, 0, "again") == [Returned(G, 0, "again")]
    assert node.bundles.commit(G, 0) == [Returned(G, 0, "the node does not hold it")]
    assert node.bundles.not_wanted(G, 0, "") == []


def test_what_tasks_hold_is_waited_for_like_an_actor_does(node: Node) -> None:
    leases = node.lease(4, CPU=1.0)
    assert node.prepare(bundles={0: {"CPU": 2.0}}) == []
    assert node.prepare(bundles={0: {"CPU": 2.0}}) == []
    assert [row.stage for row in node.bundles.rows()] == ["QUEUED"]
    node.scheduler.set_demand(OWNER, 1, 0)
    node.scheduler.end_lease(leases[0])
    assert node.settle()[0] == []
    node.scheduler.end_lease(leases[1])
    assert node.settle()[0] == [Prepared(G, 0)]


def test_what_waits_for_long_is_refused(node: Node) -> None:
    node.lease(4, CPU=1.0)
    node.prepare()
    node.now_ms = PREPARE_WAIT_MS - 1
    assert node.bundles.expire(node.now_ms) == []
    node.now_ms = PREPARE_WAIT_MS
    (refused,) = node.bundles.expire(node.now_ms)
    assert isinstance(refused, Refused) and "tasks have held its resources for 5 s" in refused.reason
    assert node.bundles.held() == ()
    node.scheduler.set_demand(OWNER, 1, 0)
    for row in node.scheduler.leases():
        node.scheduler.end_lease(row.lease_id)
    assert node.settle() == ([], [])
    assert node.free == 4.0


def test_what_the_node_has_not_is_refused(node: Node) -> None:
    (refused,) = node.prepare(bundles={0: {"GPU": 1.0}})
    assert refused == Refused(G, 0, "1 GPU asked, the node has none")
    (refused,) = node.prepare(bundles={0: {"CPU": -1.0}})
    assert isinstance(refused, Refused) and "negative" in refused.reason
    assert node.bundles.held() == ()


def test_nothing_is_committed_that_was_not_prepared(node: Node) -> None:
    node.lease(4, CPU=1.0)
    node.prepare()
    assert node.bundles.commit(G, 0) == [Returned(G, 0, "it was to be committed before it was prepared")]
    assert node.bundles.held() == ()


def test_leases_run_in_bundles_beside_the_nodes_own(node: Node) -> None:
    node.make(bundles={0: {"CPU": 2.0}})
    inside = {group_resource("CPU", G, 0): 1.0, group_resource("CPU", G): 1.0}
    assert len(node.lease(3, **inside)) == 2
    assert len(node.lease(4, CPU=1.0)) == 2
    assert node.free == 0.0


def test_a_blocked_lease_lends_the_cpu_of_its_bundle(node: Node) -> None:
    node.make()
    inside = {group_resource("CPU", G, 0): 1.0}
    (first,) = node.lease(2, **inside)
    node.scheduler.block(first)
    assert len(node.settle()[1]) == 1
    assert node.free == 3.0


def test_a_bundle_is_returned_when_the_last_lease_in_it_has_ended(node: Node) -> None:
    node.make(bundles={0: {"CPU": 2.0}})
    inside = {group_resource("CPU", G, 0): 1.0}
    first, second = node.lease(2, **inside)
    (outside,) = node.lease(1, CPU=1.0)
    (end,) = node.bundles.give_back(G, 0, "removed")
    assert end == EndLeases((first, second), "the placement group in which it ran is gone: removed")
    assert node.bundles.give_back(G, 0, "again") == [] and node.bundles.commit(G, 0) == []
    assert node.prepare() == []
    assert node.bundles.not_wanted(G, 0, "") == []
    node.scheduler.end_lease(first)
    assert node.settle() == ([], []) and node.free == 1.0
    node.scheduler.block(second)
    node.scheduler.end_lease(second)
    assert node.settle()[0] == [Returned(G, 0, "removed")]
    assert node.scheduler.total == {"CPU": 4.0, "disk": 2.0} and node.free == 3.0
    assert node.refused == [f"1 {group_resource('CPU', G, 0)} asked, the node has none"]
    node.scheduler.end_lease(outside)


def test_what_runs_in_any_bundle_ends_with_the_last_one_here(node: Node) -> None:
    node.make(attempt=0, bundles={0: {"CPU": 1.0}})
    node.make(attempt=1, bundles={1: {"CPU": 1.0}})
    (anywhere,) = node.lease(1, **{group_resource("CPU", G): 1.0})
    assert node.bundles.give_back(G, 0, "lost") == [Returned(G, 0, "lost")]
    (end,) = node.bundles.give_back(G, 1, "removed")
    assert isinstance(end, EndLeases) and end.lease_ids == (anywhere,)


def test_a_bundle_that_is_placed_anew_replaces_the_old_one(node: Node) -> None:
    node.make(attempt=1, bundles={0: {"CPU": 1.0}, 1: {"CPU": 1.0}})
    assert node.bundles.prepare(G, 0, ONE, 0.0) == []  # under way for long
    effects = node.prepare(attempt=2, bundles={1: {"CPU": 3.0}})
    assert effects == [Returned(G, 1, "its bundles are placed anew"), Prepared(G, 2)]
    assert node.free == 1.0
    node.make(attempt=3, bundles={5: {"CPU": 1.0}})  # another bundle of the group is no matter
    assert node.free == 0.0


def test_an_old_request_takes_nothing_back() -> None:
    """Not even what is older still."""
    node = Node()
    node.bundles.prepare(G, 3, {0: {"CPU": 1.0}, 1: {"CPU": 1.0}}, 0.0)
    node.bundles.prepare(G, 5, {2: {"CPU": 1.0}}, 0.0)
    node.settle()
    assert node.bundles.prepare(G, 4, {1: {"CPU": 1.0}, 2: {"CPU": 1.0}}, 0.0) == []
    assert sorted(each.attempt for each in node.bundles.held()) == [3, 5]


def test_what_the_gcs_does_not_want_is_freed(node: Node) -> None:
    node.prepare()
    assert node.bundles.not_wanted(G, 0, "the group is gone") == [Returned(G, 0, "the group is gone")]
    assert node.free == 4.0


def test_a_grant_that_comes_too_late_is_given_back(node: Node) -> None:
    node.bundles.prepare(G, 0, ONE, 0.0)
    (grant,) = node.scheduler.dispatch(0.0, 1)
    assert isinstance(grant, DedicatedGrant)
    node.bundles.give_back(G, 0, "")
    assert node.bundles.granted(BundleToken(G, 0), grant.lease_id) == []
    assert node.free == 4.0


def test_a_fenced_node_drops_all_and_answers_nobody(node: Node) -> None:
    node.make()
    node.prepare(H)
    (lease,) = node.lease(1, **{group_resource("CPU", G, 0): 1.0})
    assert node.bundles.drop_all("fenced") == [
        EndLeases((lease,), "the placement group in which it ran is gone: fenced")
    ]
    node.scheduler.end_lease(lease)
    node.settle()
    assert node.bundles.held() == () and node.free == 4.0
