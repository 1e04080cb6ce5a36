"""Placement groups in a small cluster: tables, managers and the bundles of nodes, with everything lost that can be.

The managers of a leader plan, its commands are committed or lost with it, and a new leader is made from the tables
alone; nodes hold bundles with the class that raylets use, lose their links with what was under way, die, and come back.
Tasks hold resources of nodes, and run in bundles. When all have settled, what the nodes hold is what the tables say.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ftray.gcs.state import commands as c
from ftray.gcs.state.effects import CommitBundles, Effect, PrepareBundles, ReturnBundles, Submit
from ftray.gcs.state.group_manager import GroupManager
from ftray.gcs.state.managers import ActorManager
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import BundleState, GroupState, Result, Strategy
from ftray.ids import group_resource
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
from ftray.scheduling.leases import DedicatedGrant, DedicatedInfeasible, Grant, LeaseScheduler

CLUSTER, JOB, DRIVER = b"C" * 16, b"job1", b"D" * 16
CAUSE = c.DeathCauseRecord(reason="crashed")
CPUS = (4.0, 4.0, 2.0, 1.0)
TASKS = b"tasks"


def pool(letter: str, count: int) -> list[bytes]:
    return [f"{letter}{i}".encode().ljust(16, b".") for i in range(count)]


NODES = pool("n", 4)


class Node:
    """One life of a node: its ledger, its bundles, and what it still has to tell the GCS."""

    def __init__(self, node_id: bytes, life: int, cpu: float) -> None:
        self.node_id = node_id
        self.life = life
        self.cpu = cpu
        self.scheduler = LeaseScheduler({"CPU": cpu})
        self.bundles = NodeBundles(self.scheduler)
        self.connected = False
        self.inbox: deque[Any] = deque()
        self.outbox: deque[tuple[Any, BundleEffect | None]] = deque()
        self.sequence = 1
        self.tasks: list[int] = []
        self.ending: list[int] = []
        """Leases whose workers are being killed."""
        self.classes: dict[str, int] = {}
        self.send(c.RegisterNode(node_id, "e", {"CPU": cpu}, {}, life, "h", 1), None)

    def send(self, command: Any, effect: BundleEffect | None) -> None:
        self.outbox.append((command, effect))

    def carry_out(self, effects: list[BundleEffect]) -> None:
        for effect in effects:
            match effect:
                case Prepared(group, attempt):
                    self.send(c.BundlesPrepared(group, attempt, self.node_id), effect)
                case Refused(group, attempt, reason):
                    self.send(c.BundlesRefused(group, attempt, self.node_id, reason), effect)
                case Committed(group, attempt):
                    self.send(c.BundlesCommitted(group, attempt, self.node_id), effect)
                case Returned(group, attempt, reason):
                    self.send(c.BundlesReturned(group, attempt, self.node_id, reason), effect)
                case EndLeases(leases, _):
                    self.ending += leases

    def told(self, effect: BundleEffect | None, result: Result) -> None:
        if not result.ok and isinstance(effect, Prepared | Committed):
            self.carry_out(self.bundles.not_wanted(effect.group_id, effect.attempt, result.message))

    def ask(self, message: Any, now_ms: float) -> None:
        match message:
            case PrepareBundles(_, group, attempt, bundles):
                self.carry_out(self.bundles.prepare(group, attempt, bundles, now_ms))
            case CommitBundles(_, group, attempt):
                known = BundleToken(group, attempt)
                stages = {BundleToken(row.group_id, row.attempt): row.stage for row in self.bundles.rows()}
                assert stages.get(known) != "QUEUED", "told to commit what it has not prepared"
                self.carry_out(self.bundles.commit(group, attempt))
            case ReturnBundles(_, group, attempt, reason):
                self.carry_out(self.bundles.give_back(group, attempt, reason))

    def settle(self, now_ms: float) -> None:
        """As the raylet does at the end of each turn."""
        if self.bundles.returning:
            self.carry_out(self.bundles.leases_ended())
        for grant in self.scheduler.dispatch(now_ms, 64):
            if isinstance(grant, DedicatedGrant):
                assert isinstance(grant.token, BundleToken)
                self.carry_out(self.bundles.granted(grant.token, grant.lease_id))
            else:
                assert isinstance(grant, Grant)
                self.tasks.append(grant.lease_id)
                self.scheduler.set_demand(TASKS, grant.class_id, 0)
        for found in self.scheduler.infeasible():
            if isinstance(found, DedicatedInfeasible):
                assert isinstance(found.token, BundleToken)
                self.carry_out(self.bundles.infeasible(found.token, found.missing))
            else:
                self.scheduler.set_demand(TASKS, found.class_id, 0)

    def run_task(self, name: str) -> None:
        class_id = self.classes.setdefault(name, len(self.classes) + 1)
        self.scheduler.set_demand(TASKS, class_id, 1, {name: 1.0})

    def end_tasks(self, count: int) -> None:
        for lease_id in [*self.ending, *self.tasks][:count]:
            self.scheduler.end_lease(lease_id)
            for where in (self.tasks, self.ending):
                if lease_id in where:
                    where.remove(lease_id)


class Cluster(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.state = GcsState(CLUSTER)
        self.now_ms = 1_000.0
        self.proposed: deque[Any] = deque()
        self.nodes: dict[bytes, Node] = {}
        self.lives = 0
        self.ids = pool("g", 4)
        """Of the groups; one that is removed is followed by another."""
        self.sent: list[PrepareBundles | CommitBundles] = []
        """What nodes were asked so far."""
        self.lead()

    def lead(self) -> None:
        """A new leader: managers from the tables alone. What was proposed to the old one, and all links, are lost."""
        self.proposed.clear()
        self.actors = ActorManager(self.state)
        self.groups = GroupManager(self.state, self.actors.placement, infeasible_after_ms=500.0)
        for node in self.nodes.values():
            node.connected = False
            node.inbox.clear()

    def apply(self, client: bytes, sequence: int, command: Any) -> Result:
        result = self.state.apply(client, sequence, command)
        changes = self.state.take_changes()
        self.actors.on_changes(changes)
        self.groups.on_changes(changes)
        return result

    def do(self, command: Any) -> Result:
        return self.apply(b"", 0, command)

    @initialize(
        strategies=st.lists(st.sampled_from([*Strategy]), min_size=3, max_size=3),
        sizes=st.lists(st.integers(1, 2), min_size=2, max_size=3),
    )
    def begin(self, strategies: list[str], sizes: list[int]) -> None:
        for number, node_id in enumerate(NODES):
            self.start_node(number)
            self.link(self.nodes[node_id])
            self.tell_gcs(self.nodes[node_id], 1, False)
        assert self.do(c.AddJob(JOB, DRIVER, 1, NODES[0], "m", "")).ok
        for number, strategy in enumerate(strategies):
            self.create(number, strategy, sizes)

    def start_node(self, number: int) -> None:
        self.lives += 1
        node_id = NODES[number]
        self.nodes[node_id] = Node(node_id, self.lives, CPUS[number])

    # --- what happens by itself ---------------------------------------------------------------------------------------

    def link(self, node: Node) -> bool:
        """Connects it. Returns whether it was not."""
        was = node.connected
        if not was:
            node.connected = True
            node.inbox.clear()
            self.groups.on_node_connected(self.state, node.node_id)
            held = [(each.group_id, each.attempt) for each in node.bundles.held()]
            self.groups.on_node_report(self.state, node.node_id, held)
        return not was

    def plan(self) -> bool:
        effects: list[Effect] = self.groups.plan(self.state, self.now_ms)
        for effect in effects:
            if isinstance(effect, Submit):
                self.proposed.append(effect.command)
            else:
                node = self.nodes.get(effect.node_id)  # type: ignore[union-attr]
                if node is not None and node.connected:
                    node.inbox.append(effect)
                if isinstance(effect, PrepareBundles | CommitBundles):
                    self.sent.append(effect)
        return bool(effects)

    def commit(self) -> bool:
        if not self.proposed:
            return False
        command = self.proposed.popleft()
        self.groups.on_result(self.state, command, self.do(command))
        return True

    def tell_gcs(self, node: Node, count: int, reply_lost: bool) -> bool:
        did = False
        while node.connected and node.outbox and count:
            count, did = count - 1, True
            command, effect = node.outbox[0]
            result = self.apply(b"%d" % node.life, node.sequence, command)
            if reply_lost:
                node.connected = False
                break
            node.outbox.popleft()
            node.sequence += 1
            node.told(effect, result)
            if isinstance(command, c.RegisterNode) and not result.ok:
                node.outbox.clear()
                break
        return did

    def hear(self, node: Node, count: int) -> bool:
        did = False
        while node.inbox and count:
            count, did = count - 1, True
            node.ask(node.inbox.popleft(), self.now_ms)
        before = len(node.outbox)
        node.settle(self.now_ms)
        return did or len(node.outbox) > before

    # --- rules --------------------------------------------------------------------------------------------------------

    node_ids, numbers = st.sampled_from(NODES), st.integers(0, 3)
    few = st.integers(1, 4)

    @rule(
        number=numbers, strategy=st.sampled_from([*Strategy]), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4)
    )
    def create(self, number: int, strategy: str, sizes: list[int]) -> None:
        known = self.state.group(self.ids[number])
        if known is None or known.state is GroupState.REMOVED:
            self.ids[number] = (b"g%d-%d" % (number, self.state.revision)).ljust(16, b".")
            bundles = [{"CPU": float(size)} for size in sizes]
            assert self.do(c.CreateGroup(self.ids[number], JOB, None, b"", bundles, strategy, detached=True)).ok

    @rule(number=numbers)
    def remove(self, number: int) -> None:
        self.do(c.RemoveGroup(self.ids[number]))

    @rule(rounds=few)
    def some_turns(self, rounds: int) -> None:
        """Time passes in which all goes well."""
        for _ in range(rounds):
            self.plan()
            self.commit()
            for each in self.nodes.values():
                self.link(each)
                self.hear(each, 4)
                self.tell_gcs(each, 4, False)

    @rule(what=st.sampled_from(["plan", "commit", "hear", "tell", "lose reply"]), node=node_ids, count=few)
    def one_step(self, what: str, node: bytes, count: int) -> None:
        """A part of a turn."""
        here = self.nodes.get(node)
        if what == "plan":
            self.plan()
        elif what == "commit":
            self.commit()
        elif here is not None and what == "hear":
            self.hear(here, count)
        elif here is not None:
            self.tell_gcs(here, count, what == "lose reply")

    @rule(steps=st.lists(st.sampled_from(["plan", "commit", "hear", "tell"]), max_size=8), node=node_ids)
    def some_steps(self, steps: list[str], node: bytes) -> None:
        for step in steps:
            self.one_step(step, node, 1)

    @rule(node=node_ids, again=st.booleans())
    def link_breaks(self, node: bytes, again: bool) -> None:
        if node in self.nodes:
            self.nodes[node].connected = False
            self.nodes[node].inbox.clear()
            if again:
                self.link(self.nodes[node])

    @rule(turns=st.booleans())
    def new_leader(self, turns: bool) -> None:
        self.lead()
        if turns:
            self.some_turns(1)

    @rule(number=st.integers(1, 3), how=st.sampled_from(["dies", "dies unseen", "is fenced", "starts anew"]))
    def node_ends(self, number: int, how: str) -> None:
        """Fenced: declared dead while it lives: it ends, sooner or later, and starts anew."""
        node = self.nodes.pop(NODES[number], None)
        if node is None:
            self.start_node(number)
            return
        if how in ("dies", "is fenced"):
            self.do(c.MarkNodeDead(node.node_id, node.life, CAUSE))
        if how in ("is fenced", "starts anew"):
            node.bundles.drop_all("fenced")
            self.start_node(number)

    @precondition(lambda self: self.sent)
    @rule(last=st.integers(0, 12), count=st.integers(1, 2), rounds=st.integers(0, 1))
    def what_a_former_leader_asked_is_heard_late(self, last: int, count: int, rounds: int) -> None:
        """When it has been answered and taken back long ago, perhaps."""
        start = max(0, len(self.sent) - 1 - last)
        for effect in self.sent[start : start + count]:
            node = self.nodes.get(effect.node_id)
            if node is None:
                continue
            if isinstance(effect, PrepareBundles):
                bundles = node.bundles.prepare(effect.group_id, effect.attempt, effect.bundles, self.now_ms)
                node.carry_out(bundles)
            else:
                node.carry_out(node.bundles.commit(effect.group_id, effect.attempt))
            self.hear(node, 0)
        self.some_turns(rounds)

    @rule(node=node_ids, which=st.integers(0, 3), any_bundle=st.booleans())
    def run_task(self, node: bytes, which: int, any_bundle: bool) -> None:
        """In a bundle, in any bundle of its group, or beside them."""
        here = self.nodes.get(node)
        if here is None:
            return
        rows = here.bundles.rows()
        if not which or not rows:
            here.run_task("CPU")
            return
        row = rows[which % len(rows)]
        index = None if any_bundle else sorted(row.bundles)[which % len(row.bundles)]
        here.run_task(group_resource("CPU", row.group_id, index))
        self.hear(here, 0)

    @rule(number=numbers, which=st.integers(1, 3), any_bundle=st.booleans(), turns=st.integers(0, 2))
    def remove_under_tasks(self, number: int, which: int, any_bundle: bool, turns: int) -> None:
        """A group is removed while tasks run in it."""
        for node_id in NODES:
            self.run_task(node_id, which, any_bundle)
        self.remove(number)
        self.some_turns(turns)

    @rule(node=node_ids, count=few)
    def tasks_end(self, node: bytes, count: int) -> None:
        if node in self.nodes:
            self.nodes[node].end_tasks(count)

    @rule(ms=st.sampled_from([5.0, 100.0, 3_000.0, 6_000.0]))
    def time_passes(self, ms: float) -> None:
        self.now_ms += ms
        for node in self.nodes.values():
            node.carry_out(node.bundles.expire(self.now_ms))

    # --- always -------------------------------------------------------------------------------------------------------

    @invariant()
    def sound(self) -> None:
        assert self.state.check() == []

    @invariant()
    def no_bundle_is_held_twice(self) -> None:
        held: dict[tuple[bytes, int], bytes] = {}
        for node in self.nodes.values():
            for row in node.bundles.rows():
                if row.stage != "QUEUED" and self.is_known(node.node_id, row.group_id, row.attempt):
                    for index in row.bundles:
                        other = held.setdefault((row.group_id, index), node.node_id)
                        assert other == node.node_id

    @invariant()
    def tasks_run_in_bundles_that_are_held(self) -> None:
        for node in self.nodes.values():
            held = {group_resource("CPU", row.group_id) for row in node.bundles.rows()}
            held |= {group_resource("CPU", row.group_id, at) for row in node.bundles.rows() for at in row.bundles}
            for lease in node.scheduler.leases():
                assert all(name in held for name in lease.resources if "_group_" in name)

    def is_known(self, node_id: bytes, group_id: bytes, attempt: int) -> bool:
        group = self.state.group(group_id)
        return group is not None and (
            any((each.node_id, each.attempt) == (node_id, attempt) for each in group.bundles)
            or any((each.node_id, each.attempt) == (node_id, attempt) for each in group.leftovers)
        )

    # --- in the end ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.nodes)
    @rule()
    def all_settles(self) -> None:
        self.settle()
        self.as_the_tables_say()

    def teardown(self) -> None:
        if not self.nodes:
            return
        for number in range(1, 4):
            if NODES[number] not in self.nodes:
                self.start_node(number)
        self.settle()
        self.as_the_tables_say()
        for group in self.ids:
            self.do(c.RemoveGroup(group))
        self.settle()
        for node in self.nodes.values():
            assert node.bundles.rows() == []
            assert node.scheduler.available == node.scheduler.total == {"CPU": node.cpu}
            assert self.actors.placement.used(node.node_id) == {}

    def settle(self) -> None:
        """Links are whole, tasks end, the dead are noticed: until nothing happens any more."""
        for node_id, record in list(self.state.store.nodes.items()):
            if node_id not in self.nodes:
                self.do(c.MarkNodeDead(node_id, record.incarnation, CAUSE))
        for _ in range(400):
            busy = self.plan()
            busy = self.commit() or busy
            for node in self.nodes.values():
                busy = self.link(node) or busy
                node.end_tasks(100)
                busy = self.hear(node, 100) or busy
                busy = self.tell_gcs(node, 100, False) or bool(node.tasks) or bool(node.ending) or busy
            if not busy:
                if any(row.stage == "QUEUED" for node in self.nodes.values() for row in node.bundles.rows()):
                    self.time_passes(PREPARE_WAIT_MS)  # what was asked too late, and never fits
                    continue
                wake_ms = self.groups.next_wake_ms()
                if wake_ms is None:
                    return
                self.now_ms = max(self.now_ms + 1.0, wake_ms)
        raise AssertionError("it does not settle")

    def as_the_tables_say(self) -> None:
        wanted: dict[bytes, dict[BundleToken, dict[int, dict[str, float]]]] = {node_id: {} for node_id in self.nodes}
        for group in self.state.store.placement_groups.values():
            assert not group.leftovers
            waits = group.state in (GroupState.PENDING, GroupState.RESCHEDULING)
            assert waits or group.state in (GroupState.CREATED, GroupState.REMOVED), group
            assert bool(self.groups.pending_reason(group.group_id)) == waits
            for index, bundle in enumerate(group.bundles):
                assert bundle.state in (BundleState.UNPLACED, BundleState.COMMITTED)
                if bundle.node_id:
                    token = BundleToken(group.group_id, bundle.attempt)
                    wanted[bundle.node_id].setdefault(token, {})[index] = bundle.resources
        for node in self.nodes.values():
            rows = node.bundles.rows()
            assert all(row.stage == "COMMITTED" for row in rows)
            held = {BundleToken(row.group_id, row.attempt): row.bundles for row in rows}
            assert held == wanted[node.node_id]
            used = sum(each["CPU"] for bundles in held.values() for each in bundles.values())
            assert node.scheduler.available["CPU"] == node.cpu - used
            assert self.actors.placement.used(node.node_id).get("CPU", 0.0) == used


Cluster.TestCase.settings = settings(stateful_step_count=40)
TestGroupCluster = Cluster.TestCase
