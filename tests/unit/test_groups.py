"""Placement groups in the GCS state: each transition, what is refused, and what ends them."""

from __future__ import annotations

from typing import Any

import pytest
from gcs_states import CAUSE, CLUSTER, DRIVER, JOB, N1, N2, N3, A, B, Gcs, ident, register_node

from ftray.gcs.state import commands as c
from ftray.gcs.state import groups
from ftray.gcs.state.groups import TRANSITIONS, GroupEvent
from ftray.gcs.state.lifecycle import IllegalTransition
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.store import ENDED_MAX
from ftray.gcs.state.tables import (
    Bundle,
    BundleState,
    Code,
    DeathKind,
    GroupRecord,
    GroupState,
    Reservation,
    Result,
    Strategy,
    Table,
)

G, H = ident("g"), ident("h")
CPU = {"CPU": 1.0}


class Groups(Gcs):
    """With short ways to say things of groups."""

    def create(self, group_id: bytes = G, owner: bytes | None = DRIVER, bundles: int = 2, **more: Any) -> Result:
        more.setdefault("strategy", "SPREAD")
        node = more.pop("node", N1)
        return self.do(
            c.CreateGroup(group_id, JOB, owner, node, [CPU] * bundles, detached=owner is None, **more)
        )

    def group(self, group_id: bytes = G) -> GroupRecord:
        record = self.state.group(group_id)
        assert record is not None
        return record

    def place(self, *nodes: bytes, group_id: bytes = G) -> Result:
        group = self.group(group_id)
        return self.do(c.GroupPlacing(group_id, group.attempt, dict(zip(groups.unplaced(group), nodes))))

    def prepared(self, node: bytes, attempt: int | None = None, group_id: bytes = G) -> Result:
        return self.do(c.BundlesPrepared(group_id, self.at(attempt, group_id), node))

    def committed(self, node: bytes, attempt: int | None = None, group_id: bytes = G) -> Result:
        return self.do(c.BundlesCommitted(group_id, self.at(attempt, group_id), node))

    def returned(self, node: bytes, attempt: int, group_id: bytes = G) -> Result:
        return self.do(c.BundlesReturned(group_id, attempt, node, "gone"))

    def at(self, attempt: int | None, group_id: bytes) -> int:
        return self.group(group_id).attempt if attempt is None else attempt

    def make(self, group_id: bytes = G, owner: bytes | None = DRIVER, **more: Any) -> None:
        """Created, with a bundle on N1 and one on N2."""
        assert self.create(group_id, owner, **more).ok
        assert self.place(N1, N2, group_id=group_id).ok
        for step in (self.prepared, self.committed):
            for node in (N1, N2):
                assert step(node, group_id=group_id).ok
        assert self.group(group_id).state is GroupState.CREATED

    def states(self, group_id: bytes = G) -> list[BundleState]:
        return [bundle.state for bundle in self.group(group_id).bundles]


@pytest.fixture
def gcs() -> Groups:
    return Groups(3)


def record(state: GroupState) -> GroupRecord:
    return GroupRecord(G, JOB, None, b"", "", "", Strategy.PACK, True, [Bundle(CPU)], state)


def test_transitions_are_those_of_the_table_and_no_others() -> None:
    for state in GroupState:
        for event in GroupEvent:
            after = TRANSITIONS.get((state, event))
            if after is not None:
                assert groups.step(record(state), event) is after
            else:
                with pytest.raises(IllegalTransition, match=state.name):
                    groups.step(record(state), event)
    assert not [event for event in GroupEvent if (GroupState.REMOVED, event) in TRANSITIONS]


# --- two phases -------------------------------------------------------------------------------------------------------


def test_all_are_prepared_before_any_is_committed(gcs: Groups) -> None:
    assert gcs.create().value == G
    assert gcs.group().state is GroupState.PENDING
    assert gcs.place(N1, N2).ok
    assert gcs.group().state is GroupState.PREPARING
    assert gcs.prepared(N1).ok
    assert gcs.states() == [BundleState.PREPARED, BundleState.PREPARING]
    assert gcs.committed(N1).code is Code.ILLEGAL
    assert gcs.prepared(N2).ok
    assert gcs.group().state is GroupState.COMMITTING and gcs.group().made
    assert gcs.committed(N2).ok
    assert gcs.states() == [BundleState.COMMITTING, BundleState.COMMITTED]
    assert gcs.committed(N1).ok
    assert gcs.group().state is GroupState.CREATED


def test_repeats_change_nothing(gcs: Groups) -> None:
    gcs.make()
    revision = gcs.state.revision
    assert gcs.create().value == G
    for node in (N1, N2):
        assert gcs.prepared(node).ok and gcs.committed(node).ok
    assert gcs.state.revision == revision


def test_a_placing_may_be_repeated_but_not_changed(gcs: Groups) -> None:
    gcs.create()
    assert gcs.place(N1, N2).ok
    assert gcs.do(c.GroupPlacing(G, 0, {0: N1, 1: N2})).ok
    assert gcs.do(c.GroupPlacing(G, 0, {0: N2, 1: N1})).code is Code.ILLEGAL
    assert gcs.do(c.GroupPlacing(G, 0, {7: N2})).code is Code.ILLEGAL


@pytest.mark.parametrize(
    ("strategy", "nodes", "code"),
    [
        ("SPREAD", {0: N1, 1: N1}, Code.OK),
        ("PACK", {0: N1, 1: N2}, Code.OK),
        ("STRICT_PACK", {0: N1, 1: N2}, Code.INVALID),
        ("STRICT_PACK", {0: N1, 1: N1}, Code.OK),
        ("STRICT_SPREAD", {0: N1, 1: N1}, Code.INVALID),
        ("STRICT_SPREAD", {0: N1, 1: N2}, Code.OK),
        ("SPREAD", {0: N1}, Code.INVALID),
        ("SPREAD", {0: N1, 1: N2, 2: N2}, Code.INVALID),
        ("SPREAD", {0: N1, 1: ident("nobody")}, Code.NOT_FOUND),
    ],
)
def test_a_placing_keeps_to_the_strategy(gcs: Groups, strategy: str, nodes: dict[int, bytes], code: Code) -> None:
    gcs.create(strategy=strategy)
    assert gcs.do(c.GroupPlacing(G, 0, nodes)).code is code


def test_a_refusal_gives_up_the_whole_attempt(gcs: Groups) -> None:
    gcs.create()
    gcs.place(N1, N2)
    gcs.prepared(N1)
    assert gcs.do(c.BundlesRefused(G, 0, N2, "tasks hold it")).ok
    group = gcs.group()
    assert (group.state, group.attempt, group.made) == (GroupState.PENDING, 1, False)
    assert group.cause is not None and group.cause.reason == "tasks hold it"
    assert group.leftovers == [Reservation(N1, 0, [0])]
    # Nothing of the former attempt counts, and none is placed before it is given back.
    assert gcs.prepared(N1, 0).code is Code.STALE_INCARNATION
    assert gcs.do(c.BundlesRefused(G, 0, N2, "again")).code is Code.STALE_INCARNATION
    assert gcs.place(N1, N3).code is Code.ILLEGAL
    assert gcs.returned(N1, 0).ok
    assert gcs.returned(N1, 0).code is Code.STALE_INCARNATION
    assert gcs.place(N1, N3).ok


def test_late_and_foolish_words_are_refused(gcs: Groups) -> None:
    gcs.create()
    gcs.place(N1, N2)
    assert gcs.prepared(N3).code is Code.STALE_INCARNATION
    assert gcs.prepared(N1, 5).code is Code.STALE_INCARNATION
    assert gcs.do(c.BundlesPrepared(H, 0, N1)).code is Code.NOT_FOUND
    assert gcs.do(c.BundlesCommitted(H, 0, N1)).code is Code.NOT_FOUND
    assert gcs.do(c.BundlesReturned(H, 0, N1, "")).code is Code.NOT_FOUND
    assert gcs.do(c.RemoveGroup(H)).code is Code.NOT_FOUND
    assert gcs.do(c.GroupInfeasible(G, 0, "x")).code is Code.STALE_INCARNATION
    assert gcs.do(c.GroupPlacing(G, 9, {0: N1})).code is Code.STALE_INCARNATION
    gcs.do(c.MarkNodeDead(N2, 1, CAUSE))
    assert gcs.prepared(N2, 0).code is Code.FENCED
    assert gcs.committed(N2, 0).code is Code.FENCED


# --- losses -----------------------------------------------------------------------------------------------------------


def test_a_dead_node_before_the_decision_gives_up_the_attempt(gcs: Groups) -> None:
    gcs.create()
    gcs.place(N2, N3)
    gcs.prepared(N2)
    gcs.do(c.MarkNodeDead(N3, 1, CAUSE))
    assert gcs.group().state is GroupState.PENDING
    assert gcs.group().leftovers == [Reservation(N2, 0, [0])]
    gcs.do(c.MarkNodeDead(N2, 1, CAUSE))
    assert gcs.group().leftovers == []


def test_a_dead_node_after_the_decision_costs_its_bundles_alone(gcs: Groups) -> None:
    gcs.create()
    gcs.place(N1, N2)
    gcs.prepared(N1)
    gcs.prepared(N2)
    gcs.do(c.MarkNodeDead(N2, 1, CAUSE))
    assert gcs.group().state is GroupState.RESCHEDULING
    assert gcs.states() == [BundleState.COMMITTING, BundleState.UNPLACED]
    assert gcs.place(N3).ok
    assert gcs.committed(N1, 0).ok  # of the first attempt, in the middle of the second
    assert gcs.group().state is GroupState.PREPARING
    assert gcs.prepared(N3).ok and gcs.committed(N3).ok
    assert gcs.group().state is GroupState.CREATED
    assert [bundle.attempt for bundle in gcs.group().bundles] == [0, 1]


def test_bundles_of_a_dead_node_are_placed_again_and_the_others_stay(gcs: Groups) -> None:
    gcs.make()
    gcs.do(c.MarkNodeDead(N2, 1, CAUSE))
    group = gcs.group()
    assert (group.state, group.attempt) == (GroupState.RESCHEDULING, 1)
    assert group.bundles[0] == Bundle(CPU, BundleState.COMMITTED, N1, 0)
    assert group.cause is not None and "killed by signal 9" in group.cause.reason
    gcs.place(N3)
    gcs.do(c.BundlesRefused(G, 1, N3, "no"))
    assert (gcs.group().state, gcs.group().attempt) == (GroupState.RESCHEDULING, 2)


def test_a_loss_in_the_middle_of_an_attempt_gives_that_up(gcs: Groups) -> None:
    gcs.make()
    gcs.do(c.MarkNodeDead(N2, 1, CAUSE))
    gcs.place(N3)
    gcs.prepared(N1, 0)
    assert gcs.returned(N1, 0).ok  # N1 lost what it had committed
    group = gcs.group()
    assert group.state is GroupState.RESCHEDULING
    assert group.leftovers == [Reservation(N3, 1, [1])]
    assert gcs.states() == [BundleState.UNPLACED] * 2


def test_a_node_that_is_started_again_has_lost_its_bundles(gcs: Groups) -> None:
    gcs.make()
    assert gcs.do(register_node(N2, 2)).ok
    assert gcs.group().state is GroupState.RESCHEDULING
    gcs.do(c.RemoveGroup(G))
    assert gcs.group().leftovers == [Reservation(N1, 0, [0])]
    assert gcs.do(register_node(N1, 2)).ok
    assert gcs.group().leftovers == []


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_removed_group_is_given_back_and_its_name_is_free(gcs: Groups) -> None:
    gcs.make(name="train", namespace="ns")
    named = gcs.state.named_group("ns", "train")
    assert named is not None and named.group_id == G
    assert gcs.create(H, name="train", namespace="ns").code is Code.EXISTS
    assert gcs.create(H, name="train", namespace="other").ok
    assert gcs.do(c.RemoveGroup(G, "enough")).ok
    group = gcs.group()
    assert (group.state, group.kind) == (GroupState.REMOVED, DeathKind.REMOVED)
    assert group.cause is not None and group.cause.reason == "enough"
    assert gcs.state.named_group("ns", "train") is None
    assert gcs.do(c.RemoveGroup(G)).ok
    again = gcs.create(name="train", namespace="ns")
    assert again.code is Code.ENDED and "enough" in again.message
    assert gcs.committed(N1, 0).code is Code.STALE_INCARNATION
    for node in (N1, N2):
        assert gcs.returned(node, 0).ok
    assert gcs.group().leftovers == []


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (c.FinishJob(JOB), DeathKind.JOB_FINISHED),
        (c.WorkerDied(DRIVER, N1, CAUSE), DeathKind.JOB_FINISHED),
        (c.MarkNodeDead(N1, 1, CAUSE), DeathKind.JOB_FINISHED),
    ],
)
def test_a_group_ends_with_its_driver_but_a_detached_one_stays(gcs: Groups, command: Any, kind: DeathKind) -> None:
    gcs.make()
    gcs.make(H, None)
    gcs.do(command)
    assert (gcs.group().state, gcs.group().kind) == (GroupState.REMOVED, kind)
    assert gcs.group(H).state in (GroupState.CREATED, GroupState.RESCHEDULING)


def test_a_group_that_outlives_its_job_ends_with_the_actor_that_made_it(gcs: Groups) -> None:
    gcs.register(A, None)
    host = gcs.alive(A, N2)
    gcs.register(B, host, N2)
    inner = gcs.alive(B, N3)
    gcs.make(G, host, node=N2)
    gcs.make(H, inner, node=N3)
    gcs.do(c.FinishJob(JOB))  # the detached actor lives on, and what it owns
    assert {gcs.group(each).state for each in (G, H)} == {GroupState.CREATED}
    assert gcs.create(ident("late"), host, node=N2).ok
    assert gcs.create(ident("later"), DRIVER).code is Code.ENDED
    gcs.do(c.WorkerDied(host, N2, CAUSE))
    assert {gcs.group(each).kind for each in (G, H)} == {DeathKind.OWNER_DIED}


def test_a_group_outlives_restarts_of_the_actor_that_made_it(gcs: Groups) -> None:
    gcs.register(A, None, max_restarts=1)
    host = gcs.alive(A, N1)
    gcs.make(G, host)
    gcs.do(c.FinishJob(JOB))
    gcs.do(c.WorkerDied(host, N1, CAUSE))
    assert gcs.group().state is GroupState.CREATED
    gcs.do(c.ActorPlacing(A, 1, N2))
    again = ident("again")
    gcs.do(c.ActorAlive(A, 1, again, "e", N2, 1))
    assert gcs.group().state is GroupState.CREATED
    gcs.do(c.WorkerDied(again, N2, CAUSE))
    group = gcs.group()
    assert group.kind is DeathKind.OWNER_DIED
    assert group.cause is not None and "which made it, died" in group.cause.reason


def test_a_group_outlives_what_made_it_while_its_job_runs(gcs: Groups) -> None:
    """The worker of a task, which may be ended when it has nothing to do, its node, and an actor."""
    gcs.make(G, ident("worker"), node=N3)
    gcs.register(A, DRIVER)
    gcs.make(H, gcs.alive(A, N3), node=N3)
    gcs.do(c.WorkerDied(ident("worker"), N3, CAUSE))
    assert gcs.create(ident("late"), ident("worker"), node=N3).code is Code.OWNER_DIED
    gcs.do(c.MarkNodeDead(N3, 1, CAUSE))
    assert gcs.create(ident("later"), ident("other"), node=N3).code is Code.OWNER_DIED
    assert [gcs.group(each).state for each in (G, H)] == [GroupState.CREATED] * 2
    gcs.do(c.FinishJob(JOB))
    assert [gcs.group(each).kind for each in (G, H)] == [DeathKind.JOB_FINISHED] * 2


def test_a_group_of_an_actor_belongs_to_its_job(gcs: Groups) -> None:
    gcs.register(A, None)
    host = gcs.alive(A, N2)
    gcs.do(c.AddJob(b"job2", ident("d2"), 1, N1, "m", ""))
    result = gcs.do(c.CreateGroup(G, b"job2", host, N2, [CPU]))
    assert result.code is Code.INVALID and "is not of job" in result.message


# --- what can't be created --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"strategy": "SCATTER"}, "there is no strategy 'SCATTER'"),
        ({"bundles": 0}, "0 bundles"),
        ({"bundles": 100_000}, "100000 bundles"),
        ({"name": "x" * 2000}, "more than"),
    ],
)
def test_what_makes_no_sense_is_refused(gcs: Groups, more: dict[str, Any], text: str) -> None:
    result = gcs.create(**more)
    assert result.code is Code.INVALID and text in result.message


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        ({}, "asks for nothing"),
        ({"CPU": 0.0}, "asks for nothing"),
        ({"CPU": -1.0}, "finite number"),
        ({"CPU": float("nan")}, "finite number"),
        ({"CPU": 0.00001}, "steps of"),
        ({"CPU": 2.0**61}, "less than"),
        ({"CPU_group_0_aa": 1.0}, "groups inside of groups"),
        ({"": 1.0}, "has a name of 1 to"),
        ({"a\0b": 1.0}, "without NUL"),
        ({"x" * 2000: 1.0}, "has a name of 1 to"),
        ({"bundle": 1.0}, "other than 'bundle'"),
    ],
)
def test_bundles_that_make_no_sense_are_refused(gcs: Groups, resources: dict[str, float], text: str) -> None:
    result = gcs.do(c.CreateGroup(G, JOB, DRIVER, N1, [CPU, resources]))
    assert result.code is Code.INVALID and text in result.message
    assert len(result.message) < 500


def test_an_id_belongs_to_one_group(gcs: Groups) -> None:
    gcs.make()
    assert gcs.create(G, None).code is Code.EXISTS
    assert gcs.do(c.CreateGroup(H, b"none", DRIVER, N1, [CPU])).code is Code.NOT_FOUND
    assert gcs.do(c.CreateGroup(H, JOB, None, N1, [CPU])).code is Code.INVALID
    assert gcs.do(c.CreateGroup(b"short", JOB, DRIVER, N1, [CPU])).code is Code.INVALID


# --- the table --------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_kept_until_it_is_placed(gcs: Groups) -> None:
    gcs.create()
    assert gcs.do(c.GroupInfeasible(G, 0, "4 GPU")).ok
    assert gcs.group().missing == "4 GPU"
    revision = gcs.state.revision
    assert gcs.do(c.GroupInfeasible(G, 0, "4 GPU")).ok and gcs.state.revision == revision
    gcs.place(N1, N2)
    assert gcs.group().missing == ""


def test_removed_groups_are_kept_up_to_a_limit(gcs: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENDED_MAX, Table.PLACEMENT_GROUPS, 2)
    gcs.make()
    for group_id in (G, *(ident(f"x{number}") for number in range(3))):
        if group_id != G:
            gcs.create(group_id)
        gcs.do(c.RemoveGroup(group_id))
    # The first one counts when its nodes have given it back.
    assert list(gcs.state.store.placement_groups) == [G, ident("x1"), ident("x2")]
    gcs.returned(N1, 0)
    gcs.returned(N2, 0)
    assert list(gcs.state.store.placement_groups) == [G, ident("x2")]


def test_what_is_kept_of_removed_groups_is_small(gcs: Groups) -> None:
    gcs.create(G, bundles=groups.REMOVED_BUNDLES_MAX + 1)
    gcs.create(H, bundles=groups.REMOVED_BUNDLES_MAX)
    gcs.do(c.GroupPlacing(G, 0, dict.fromkeys(range(groups.REMOVED_BUNDLES_MAX + 1), N1)))
    for group_id in (G, H):
        gcs.do(c.RemoveGroup(group_id, "x" * 100_000))
        cause = gcs.group(group_id).cause
        assert cause is not None and len(cause.reason) <= 2_000
    assert len(gcs.group(H).bundles) == groups.REMOVED_BUNDLES_MAX
    assert len(gcs.group(G).bundles) == groups.REMOVED_BUNDLES_MAX + 1  # they say what is to be given back
    gcs.returned(N1, 0)
    assert gcs.group(G).bundles == []
    assert gcs.returned(N1, 0).code is Code.STALE_INCARNATION
    assert GcsState.restore(gcs.state.snapshot(), CLUSTER).group(G) == gcs.group(G)


def test_groups_are_in_snapshots(gcs: Groups) -> None:
    gcs.make(name="n")
    gcs.create(H)
    data = gcs.state.snapshot()
    again = GcsState.restore(data, CLUSTER)
    assert again.snapshot() == data and again.check() == []
    assert again.store.placement_groups == gcs.state.store.placement_groups
    assert again.named_group("", "n") == gcs.group()


def test_broken_tables_are_noticed(gcs: Groups) -> None:
    gcs.make(strategy="STRICT_SPREAD")
    store, group = gcs.state.store, gcs.group()
    for broken in (
        groups.replace(group, bundles=[group.bundles[0], group.bundles[0]]),
        groups.replace(group, state=GroupState.COMMITTING),
        groups.replace(group, leftovers=[Reservation(ident("nobody"), 0, [0])]),
        groups.replace(group, leftovers=[Reservation(N1, 9, [0])]),
        groups.replace(group, bundles=[Bundle(CPU, BundleState.COMMITTED, ident("nobody")), group.bundles[1]]),
        groups.replace(group, missing="x"),
        groups.replace(group, detached=True),
        groups.replace(group, state=GroupState.REMOVED),
    ):
        store.put(broken)
        assert gcs.state.check(), broken
        store.roll_back()
    assert gcs.state.check() == []
