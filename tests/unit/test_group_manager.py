"""The leader's manager of placement groups: two phases, retries, changes of leader, room shared with actors."""

from __future__ import annotations

from typing import Any

import pytest
from gcs_states import CAUSE, JOB, N1, N2, N3, A, ident

from ftray.gcs.state import commands as c
from ftray.gcs.state import group_manager
from ftray.gcs.state.effects import (
    CommitBundles,
    Effect,
    PrepareBundles,
    ReportInfeasible,
    ReturnBundles,
    StartActor,
    Submit,
)
from ftray.gcs.state.group_manager import LOOK_AGAIN_MS, RETRY_DELAY_MS, GroupManager
from ftray.gcs.state.managers import ActorManager
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Code, GroupRecord, GroupState, Result
from ftray.ids import group_resource

G, H = ident("g"), ident("h")


class Leader:
    """A state with both managers on it."""

    def __init__(self, *cpus: float) -> None:
        self.state = GcsState(b"C" * 16)
        self.now_ms = 1_000.0
        self.lead()
        for node_id, cpu in zip((N1, N2, N3), cpus):
            self.node(node_id, cpu)
        self.do(c.AddJob(JOB, b"D" * 16, 7, N1, "main.py", "ns"))

    def lead(self) -> None:
        self.actors = ActorManager(self.state)
        self.groups = GroupManager(self.state, self.actors.placement)

    def node(self, node_id: bytes, cpu: float, life: int = 1) -> None:
        self.do(c.RegisterNode(node_id, "unix:/n", {"CPU": cpu}, {}, life, "host", 1))

    def do(self, command: Any) -> Result:
        result = self.state.apply(b"", 0, command)
        assert self.state.check() == []
        changes = self.state.take_changes()
        self.actors.on_changes(changes)
        self.groups.on_changes(changes)
        return result

    def create(self, group_id: bytes, *cpus: float, strategy: str = "SPREAD") -> None:
        bundles = [{"CPU": each} for each in cpus]
        assert self.do(c.CreateGroup(group_id, JOB, None, b"", bundles, strategy, detached=True)).ok

    def plan(self) -> list[Effect]:
        """Effects, with what is submitted carried out, until nothing is left to do."""
        found: list[Effect] = []
        while effects := [
            *self.actors.plan(self.state, self.now_ms), *self.groups.plan(self.state, self.now_ms)
        ]:  # fmt: skip
            for effect in effects:
                if isinstance(effect, Submit):
                    result = self.do(effect.command)
                    self.actors.on_result(effect.command, result)
                    self.groups.on_result(self.state, effect.command, result)
                else:
                    found.append(effect)
        return found

    def answer(self, effects: list[Effect]) -> list[Effect]:
        """Nodes do as they are told, as often as there is something to do. Returns all that they were told."""
        told = list(effects)
        while effects:
            for effect in effects:
                match effect:
                    case PrepareBundles(node, group, attempt, _):
                        assert self.do(c.BundlesPrepared(group, attempt, node)).ok
                    case CommitBundles(node, group, attempt):
                        assert self.do(c.BundlesCommitted(group, attempt, node)).ok
                    case ReturnBundles(node, group, attempt, _):
                        self.do(c.BundlesReturned(group, attempt, node, ""))
            effects = self.plan()
            told += effects
        return told

    def group(self, group_id: bytes = G) -> GroupRecord:
        record = self.state.group(group_id)
        assert record is not None
        return record

    def wait_ms(self) -> None:
        wake_ms = self.groups.next_wake_ms()
        assert wake_ms is not None
        self.now_ms = max(self.now_ms, wake_ms)


def kinds(effects: list[Effect]) -> list[tuple[str, bytes]]:
    return [(type(effect).__name__, effect.node_id) for effect in effects]  # type: ignore[union-attr]


def test_a_group_is_made_in_two_phases() -> None:
    leader = Leader(2, 2)
    leader.create(G, 1, 1)
    prepares = leader.plan()
    assert sorted(kinds(prepares)) == [("PrepareBundles", N1), ("PrepareBundles", N2)]
    assert leader.plan() == []
    assert "waits until nodes hold its resources" in leader.groups.pending_reason(G)
    assert leader.do(c.BundlesPrepared(G, 0, N1)).ok
    assert leader.plan() == []
    assert leader.do(c.BundlesPrepared(G, 0, N2)).ok
    assert sorted(kinds(leader.plan())) == [("CommitBundles", N1), ("CommitBundles", N2)]
    assert "is being committed on 2 nodes" in leader.groups.pending_reason(G)
    for node in (N1, N2):
        leader.do(c.BundlesCommitted(G, 0, node))
    assert leader.plan() == [] and leader.group().state is GroupState.CREATED
    assert leader.groups.pending_reason(G) == "" and leader.groups.next_wake_ms() is None


def test_all_bundles_of_a_node_are_asked_for_at_once() -> None:
    leader = Leader(4)
    leader.create(G, 1, 2)
    assert leader.plan() == [PrepareBundles(N1, G, 0, {0: {"CPU": 1.0}, 1: {"CPU": 2.0}})]


def test_a_new_leader_goes_on_where_the_last_one_was() -> None:
    leader = Leader(2, 2)
    leader.create(G, 1, 1)
    leader.plan()
    leader.do(c.BundlesPrepared(G, 0, N1))
    leader.lead()
    assert kinds(leader.plan()) == [("PrepareBundles", N2)]
    leader.do(c.BundlesPrepared(G, 0, N2))
    leader.lead()
    assert sorted(kinds(leader.plan())) == [("CommitBundles", N1), ("CommitBundles", N2)]
    leader.do(c.BundlesCommitted(G, 0, N1))
    leader.do(c.RemoveGroup(G))
    leader.lead()
    assert sorted(kinds(leader.plan())) == [("ReturnBundles", N1), ("ReturnBundles", N2)]
    assert leader.actors.placement.used(N1) == {"CPU": 1.0}  # until it is given back
    leader.do(c.BundlesReturned(G, 0, N1, ""))
    leader.do(c.BundlesReturned(G, 0, N2, ""))
    assert leader.plan() == [] and leader.actors.placement.used(N1) == {}


def test_a_node_that_connects_is_told_again() -> None:
    leader = Leader(2, 2)
    leader.create(G, 1, 1)
    leader.plan()
    leader.groups.on_node_connected(leader.state, N2)
    assert kinds(leader.plan()) == [("PrepareBundles", N2)]
    assert leader.plan() == []


def test_what_a_node_holds_and_should_not_is_given_back_and_what_it_lacks_it_says_itself() -> None:
    leader = Leader(2, 2)
    leader.create(G, 1, 1)
    leader.answer(leader.plan())
    leader.groups.on_node_report(leader.state, N1, [(G, 0), (G, 7), (H, 0)])
    reason = "it is not wanted any more"
    assert leader.plan() == [ReturnBundles(N1, G, 7, reason), ReturnBundles(N1, H, 0, reason)]
    leader.groups.on_node_report(leader.state, N2, [])
    assert leader.plan() == [CommitBundles(N2, G, 0)]
    leader.do(c.BundlesCommitted(G, 0, N2))  # the report was old
    assert leader.group().state is GroupState.CREATED and leader.plan() == []
    leader.do(c.BundlesReturned(G, 0, N2, "the node does not hold it"))
    told = leader.answer(leader.plan())
    assert kinds(told) == [("PrepareBundles", N2), ("CommitBundles", N2)]
    assert leader.group().bundles[1].attempt + leader.group().bundles[0].attempt == 1
    leader.do(c.RemoveGroup(G))
    leader.groups.on_node_report(leader.state, N1, [(G, 0)])  # a leftover is known, and told as such
    assert sorted(kinds(leader.plan())) == [("ReturnBundles", N1), ("ReturnBundles", N2)]


def test_what_was_prepared_and_is_not_reported_is_asked_for_in_the_same_attempt() -> None:
    leader = Leader(2, 2)
    leader.create(G, 1, 1)
    leader.plan()
    leader.do(c.BundlesPrepared(G, 0, N1))
    leader.groups.on_node_report(leader.state, N1, [])
    assert leader.plan() == [PrepareBundles(N1, G, 0, {0: {"CPU": 1.0}})]
    leader.do(c.BundlesPrepared(G, 0, N1))
    assert leader.plan() == []


def test_what_is_being_prepared_may_not_be_there_yet() -> None:
    leader = Leader(2)
    leader.create(G, 1)
    leader.plan()
    leader.groups.on_node_report(leader.state, N1, [])
    assert kinds(leader.plan()) == [("PrepareBundles", N1)]  # it may have dropped what it was asked before
    assert leader.group().state is GroupState.PREPARING and leader.plan() == []


def test_a_node_that_has_dropped_what_it_was_asked_is_asked_again_when_it_reports() -> None:
    leader = Leader(2, 2)
    leader.create(G, 1, 1)
    leader.answer(leader.plan())
    leader.do(c.RemoveGroup(G))
    leader.groups.on_node_connected(leader.state, N1)
    assert ("ReturnBundles", N1) in kinds(leader.plan())  # it does not know yet that it is a member
    leader.groups.on_node_report(leader.state, N1, [])
    assert kinds(leader.plan()) == [("ReturnBundles", N1)]


def test_nothing_is_placed_before_the_last_attempt_is_given_back() -> None:
    leader = Leader(2, 2)
    leader.create(G, 1, 1)
    leader.plan()
    leader.do(c.BundlesRefused(G, 0, N2, "tasks hold it"))
    assert kinds(leader.plan()) == [("ReturnBundles", N1)]
    assert "have given back" in leader.groups.pending_reason(G)
    leader.do(c.BundlesReturned(G, 0, N1, ""))
    assert len(leader.answer(leader.plan())) == 4
    assert leader.group().state is GroupState.CREATED


def test_nodes_that_keep_refusing_are_asked_more_and_more_rarely() -> None:
    leader = Leader(2)
    leader.create(G, 1)
    waits = []
    for attempt in range(6):
        effects = leader.plan()
        if not effects:
            assert "tasks hold it" in leader.groups.pending_reason(G)
            before_ms = leader.now_ms
            leader.wait_ms()
            waits.append(leader.now_ms - before_ms)
            effects = leader.plan()
        assert kinds(effects) == [("PrepareBundles", N1)]
        leader.do(c.BundlesRefused(G, attempt, N1, "tasks hold it"))
    assert waits == [RETRY_DELAY_MS * factor for factor in (1, 2, 4, 8)]


def test_actors_and_bundles_share_the_nodes() -> None:
    leader = Leader(2)
    leader.create(G, 2)
    leader.answer(leader.plan())
    leader.do(c.RegisterActor(A, JOB, None, b"", "X", detached=True, resources={"CPU": 1.0}))
    assert leader.plan() == []
    assert "placement groups give back" in leader.actors.pending_reason(A)
    leader.do(c.RemoveGroup(G))
    leader.create(H, 2)
    told = leader.answer(leader.plan())
    assert [type(each) for each in told] == [ReturnBundles, StartActor]
    assert "give back resources" in leader.groups.pending_reason(H)
    leader.do(c.KillActor(A, True, ""))
    leader.do(c.ActorDied(A, 0, CAUSE))
    assert kinds(leader.answer(leader.plan()))[-1] == ("CommitBundles", N1)


def test_actors_are_placed_in_committed_bundles() -> None:
    leader = Leader(2, 2)
    leader.create(G, 1, strategy="STRICT_PACK")
    name = group_resource("CPU", G, 0)
    leader.do(c.RegisterActor(A, JOB, None, b"", "X", detached=True, resources={name: 1.0}))
    told = leader.answer(leader.plan())
    (start,) = [each for each in told if isinstance(each, StartActor)]
    assert start.node_id == leader.group().bundles[0].node_id


def test_what_no_nodes_could_hold_is_written_down_after_a_while_and_goes_on_waiting() -> None:
    leader = Leader(2)
    leader.create(G, 4)
    assert leader.plan() == [] and leader.group().missing == ""
    leader.wait_ms()
    leader.plan()
    assert leader.group().missing.startswith("bundle 0 needs 4 CPU on one node")
    assert leader.groups.pending_reason(G) == leader.group().missing
    assert leader.groups.next_wake_ms() is None
    leader.node(N2, 8)
    assert kinds(leader.answer(leader.plan()))[-1] == ("CommitBundles", N2)
    assert leader.group().missing == ""


def test_what_fits_again_but_is_full_does_not_say_that_it_can_not_be() -> None:
    leader = Leader(2)
    leader.create(G, 4)
    leader.plan()
    leader.wait_ms()
    leader.plan()
    leader.create(H, 3)
    leader.node(N2, 4)
    leader.do(c.RemoveGroup(G))  # the only one that N2 could hold is H
    leader.answer(leader.plan())
    leader.create(ident("i"), 4)
    leader.plan()
    assert leader.group(ident("i")).missing == ""
    assert "give back resources" in leader.groups.pending_reason(ident("i"))


def test_a_refused_placing_is_thought_over() -> None:
    leader = Leader(2, 2)
    leader.create(G, 2)
    (submit,) = leader.groups.plan(leader.state, leader.now_ms)
    assert isinstance(submit, Submit) and isinstance(submit.command, c.GroupPlacing)
    (node_id,) = submit.command.nodes.values()
    assert leader.actors.placement.used(node_id) == {"CPU": 2.0}
    leader.do(c.MarkNodeDead(node_id, 1, CAUSE))
    result = leader.do(submit.command)
    assert result.code is Code.NOT_FOUND
    leader.groups.on_result(leader.state, submit.command, result)
    other = N2 if node_id == N1 else N1
    assert kinds(leader.plan()) == [("PrepareBundles", other)]


def test_what_is_proposed_stays_held_whatever_else_is_written_meanwhile() -> None:
    leader = Leader(2)
    leader.create(G, 2)
    (submit,) = leader.groups.plan(leader.state, leader.now_ms)
    assert isinstance(submit, Submit)
    leader.do(c.GroupInfeasible(G, 0, "said before there was room"))
    assert leader.actors.placement.used(N1) == {"CPU": 2.0}
    leader.create(H, 1)
    assert leader.groups.plan(leader.state, leader.now_ms) == []
    assert leader.do(submit.command).ok and leader.group().missing == ""


class Looks:
    """Notes for which groups room is looked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[bytes] = []
        real = group_manager.choose_nodes

        def choose_nodes(placement: Any, group: GroupRecord) -> dict[int, bytes] | None:
            self.groups.append(group.group_id)
            return real(placement, group)

        monkeypatch.setattr(group_manager, "choose_nodes", choose_nodes)


@pytest.mark.parametrize("cpu", [1.0, 1_000.0])
def test_few_of_many_different_groups_are_looked_at_in_one_plan(monkeypatch: pytest.MonkeyPatch, cpu: float) -> None:
    """Whether there is room for them or not, and however often something happens."""
    monkeypatch.setattr(group_manager, "LOOK_COST_MAX", 10)
    looks = Looks(monkeypatch)
    leader = Leader(cpu)
    names = [ident(f"g{number}") for number in range(20)]
    for number, name in enumerate(names):
        leader.create(name, 2.0 + number)
    leader.plan()
    most = len(looks.groups)
    assert 1 <= most <= 5
    for _ in range(20):
        assert leader.groups.next_wake_ms() == leader.now_ms + LOOK_AGAIN_MS
        leader.node(N2, 0.5, life=len(looks.groups) + 1)  # something happens, and it is not yet time
        leader.plan()
        before = len(looks.groups)
        leader.wait_ms()
        leader.plan()
        assert 1 <= len(looks.groups) - before <= most
        if set(looks.groups) == set(names):
            break
    assert looks.groups[:20] == names  # in turn, though there was something new each time


def test_a_large_group_holds_nobody_else_up() -> None:
    leader = Leader(2, 2)
    leader.create(G, 2, 2, 2)
    leader.create(H, 1, 1)
    leader.do(c.RegisterActor(A, JOB, None, b"", "X", detached=True, resources={"CPU": 1.0}))
    leader.answer(leader.plan())
    assert leader.group(H).state is GroupState.CREATED
    actor = leader.state.store.actors[A]
    assert actor.node_id and "no way was found" in leader.groups.pending_reason(G)


def test_nothing_is_looked_at_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    leader = Leader(1)
    for number in range(50):
        leader.create(ident(f"g{number}"), 2.0 + number)
    for _ in range(4):
        leader.plan()
        leader.now_ms += 10_000.0
    found = len(looks.groups)
    assert found == 100  # and once more each, to say what is missing
    assert leader.groups.next_wake_ms() is None

    class Unread(dict[bytes, None]):
        def __iter__(self) -> Any:
            raise AssertionError("all who wait are looked at")

    monkeypatch.setattr(leader.groups, "_waiting", Unread(leader.groups._waiting))
    for number in range(5):
        leader.do(c.KvPut("ns", b"k", b"%d" % number))
        leader.do(c.RegisterActor(ident(f"a{number}"), JOB, None, b"", "X", detached=True))
        leader.plan()
        assert leader.groups.next_wake_ms() is None
    assert len(looks.groups) == found


def test_an_actor_waits_for_the_group_in_which_it_is_to_run() -> None:
    leader = Leader(2)
    leader.create(G, 4)
    name = group_resource("CPU", G)
    leader.do(c.RegisterActor(A, JOB, None, b"", "X", detached=True, resources={name: 1.0}))
    for _ in range(3):
        assert leader.plan() == []
        leader.now_ms += 10_000.0
    assert f"waits until its placement group {G.hex()} is there" in leader.actors.pending_reason(A)
    leader.node(N2, 4)
    told = leader.answer(leader.plan())
    assert [each.node_id for each in told if isinstance(each, StartActor)] == [N2]


def test_an_actor_does_not_wait_for_a_group_that_is_gone_or_too_small() -> None:
    leader = Leader(2)
    leader.create(G, 4)
    leader.create(H, 1)
    for actor, group in ((A, G), (ident("b"), H)):
        asked = {group_resource("CPU", group): 2.0}
        leader.do(c.RegisterActor(actor, JOB, None, b"", "X", detached=True, resources=asked))
    leader.answer(leader.plan())
    leader.do(c.RemoveGroup(G))
    said = {}
    for _ in range(2):
        for effect in leader.answer(leader.plan()):
            if isinstance(effect, ReportInfeasible):
                said[effect.actor_id] = effect.missing
        leader.now_ms += 10_000.0
    assert said[A] == f"its placement group {G.hex()} has been removed"
    assert "the most that any of 1 live nodes has is 1" in said[ident("b")]


def test_equal_groups_are_looked_at_once() -> None:
    leader = Leader(1)
    for number in range(100):
        leader.create(ident(f"g{number}"), 2.0)
    leader.groups.plan(leader.state, leader.now_ms)
    assert all(leader.groups.pending_reason(ident(f"g{number}")) for number in range(100))
