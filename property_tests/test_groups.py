"""The table of placement groups against a naive twin, under any sequence of commands, late, foolish and repeated ones.

The twin keeps lists of bundles and derives the state of a group from them; the state machine has a table of
transitions. Beside it runs a second state that gets the same commands through their encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from ftray.gcs.state import commands as c
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import BundleState, GroupState, Strategy

CLUSTER = b"C" * 16
CAUSE = c.DeathCauseRecord(reason="crashed")


def pool(letter: str, count: int) -> list[bytes]:
    return [f"{letter}{i}".encode().ljust(16, b".") for i in range(count)]


NODES, WORKERS, JOBS = pool("n", 4), pool("w", 4), [b"job1", b"job2"]
ACTOR, HOST = b"a" * 16, b"h" * 16
"""A detached actor, and the worker that it lives in."""
NONE, PREPARING, PREPARED, COMMITTING, COMMITTED = BundleState


@dataclass
class TwinBundle:
    state: BundleState = NONE
    node: bytes = b""
    attempt: int = 0


@dataclass
class TwinGroup:
    job: bytes
    owner: bytes | None
    name: str
    strategy: str
    bundles: list[TwinBundle]
    attempt: int = 0
    made: bool = False
    removed: bool = False
    left: set[tuple[bytes, int]] = field(default_factory=set)

    def state(self) -> GroupState:
        states = {bundle.state for bundle in self.bundles}
        if self.removed:
            return GroupState.REMOVED
        if NONE in states:
            return GroupState.RESCHEDULING if self.made else GroupState.PENDING
        if states & {PREPARING, PREPARED}:
            return GroupState.PREPARING
        return GroupState.COMMITTING if COMMITTING in states else GroupState.CREATED

    def at(self, node: bytes, attempt: int) -> list[TwinBundle]:
        return [each for each in self.bundles if each.node == node and each.attempt == attempt and each.state != NONE]


@dataclass
class Twin:
    nodes: dict[bytes, tuple[int, bool]] = field(default_factory=dict)
    jobs: dict[bytes, tuple[bytes, bytes, bool]] = field(default_factory=dict)
    groups: dict[bytes, TwinGroup] = field(default_factory=dict)
    dead: set[bytes] = field(default_factory=set)
    actor_lives: bool = True

    def alive(self, node: bytes) -> bool:
        return self.nodes.get(node, (0, False))[1]

    def give_up(self, group: TwinGroup, lost: list[TwinBundle]) -> None:
        """These are gone; what is not decided goes with them, and is to be given back."""
        for bundle in group.bundles:
            undecided = bundle.state in (PREPARING, PREPARED)
            if bundle in lost or undecided:
                if not any(bundle is each for each in lost) and self.alive(bundle.node):
                    group.left.add((bundle.node, bundle.attempt))
                bundle.state, bundle.node, bundle.attempt = NONE, b"", 0
        group.attempt += 1

    def end(self, group: TwinGroup) -> None:
        if group.removed:
            return
        for bundle in group.bundles:
            if bundle.state != NONE and self.alive(bundle.node):
                group.left.add((bundle.node, bundle.attempt))
            bundle.state, bundle.node, bundle.attempt = NONE, b"", 0
        group.removed = True
        group.attempt += 1

    def consequences(self) -> None:
        """Whatever follows from dead nodes, owners and finished jobs."""
        self.actor_lives = self.actor_lives and self.alive(NODES[0])
        for job_id, (driver, node, running) in self.jobs.items():
            if running and (driver in self.dead or not self.alive(node)):
                self.jobs[job_id] = (driver, node, False)
        for group in self.groups.values():
            group.left = {each for each in group.left if self.alive(each[0])}
            by_actor = group.owner == HOST and self.actor_lives
            if group.owner is not None and not group.removed and not self.jobs[group.job][2] and not by_actor:
                self.end(group)
            lost = [each for each in group.bundles if each.node and not self.alive(each.node)]
            if lost:
                self.give_up(group, lost)

    # --- commands -----------------------------------------------------------------------------------------------------

    def RegisterNode(self, m: c.RegisterNode) -> bool:
        incarnation, alive = self.nodes.get(m.node_id, (-1, False))
        if m.incarnation < incarnation or (m.incarnation == incarnation and not alive):
            return False
        if alive and m.incarnation > incarnation:
            self.nodes[m.node_id] = (incarnation, False)
            self.consequences()
        self.nodes[m.node_id] = (m.incarnation, True)
        return True

    def MarkNodeDead(self, m: c.MarkNodeDead) -> bool:
        incarnation = self.nodes[m.node_id][0]
        if m.incarnation == incarnation:
            self.nodes[m.node_id] = (incarnation, False)
        return m.incarnation == incarnation

    def AddJob(self, m: c.AddJob) -> bool:
        known = self.jobs.get(m.job_id)
        if known:
            return known[0] == m.driver_worker_id and known[2]
        if m.driver_worker_id in self.dead or not self.alive(m.node_id):
            return False
        self.jobs[m.job_id] = (m.driver_worker_id, m.node_id, True)
        return True

    def FinishJob(self, m: c.FinishJob) -> bool:
        if m.job_id in self.jobs:
            self.jobs[m.job_id] = (*self.jobs[m.job_id][:2], False)
        return m.job_id in self.jobs

    def WorkerDied(self, m: c.WorkerDied) -> bool:
        self.dead.add(m.worker_id)
        self.actor_lives = self.actor_lives and m.worker_id != HOST
        return True

    def CreateGroup(self, m: c.CreateGroup) -> bool:
        known = self.groups.get(m.group_id)
        if known:
            return (known.job, known.owner) == (m.job_id, m.owner_worker_id) and not known.removed
        if m.name and any(each.name == m.name and not each.removed for each in self.groups.values()):
            return False
        if m.owner_worker_id is not None and (m.owner_worker_id in self.dead or not self.alive(m.owner_node_id)):
            return False
        if m.job_id not in self.jobs:
            return False
        if not self.jobs[m.job_id][2] and not (m.owner_worker_id == HOST and self.actor_lives):
            return False
        bundles = [TwinBundle() for _ in m.bundles]
        self.groups[m.group_id] = TwinGroup(
            m.job_id, m.owner_worker_id, m.name, m.strategy, bundles
        )
        return True

    def GroupPlacing(self, m: c.GroupPlacing) -> bool:
        group = self.groups.get(m.group_id)
        if group is None or group.removed or group.attempt != m.attempt:
            return False
        state = group.state()
        if state is GroupState.PREPARING:
            return all(group.bundles[i].node == n and group.bundles[i].attempt == m.attempt for i, n in m.nodes.items())
        if state not in (GroupState.PENDING, GroupState.RESCHEDULING) or group.left:
            return False
        if set(m.nodes) != {index for index, each in enumerate(group.bundles) if each.state == NONE}:
            return False
        if not all(self.alive(node) for node in m.nodes.values()):
            return False
        nodes = [m.nodes.get(index, each.node) for index, each in enumerate(group.bundles)]
        if group.strategy == "STRICT_PACK" and len(set(nodes)) != 1:
            return False
        if group.strategy == "STRICT_SPREAD" and len(set(nodes)) != len(nodes):
            return False
        for index, node in m.nodes.items():
            group.bundles[index] = TwinBundle(PREPARING, node, m.attempt)
        return True

    def BundlesPrepared(self, m: c.BundlesPrepared) -> bool:
        group = self.groups.get(m.group_id)
        mine = group.at(m.node_id, m.attempt) if group else []
        if group is None or not mine or not self.alive(m.node_id):
            return False
        for bundle in mine:
            if bundle.state == PREPARING:
                bundle.state = PREPARED
        if not any(each.state in (NONE, PREPARING) for each in group.bundles):
            for bundle in group.bundles:
                if bundle.state == PREPARED:
                    bundle.state = COMMITTING
                    group.made = True
        return True

    def BundlesCommitted(self, m: c.BundlesCommitted) -> bool:
        group = self.groups.get(m.group_id)
        mine = group.at(m.node_id, m.attempt) if group else []
        if not mine or not self.alive(m.node_id) or any(each.state in (PREPARING, PREPARED) for each in mine):
            return False
        for bundle in mine:
            bundle.state = COMMITTED
        return True

    def BundlesReturned(self, m: c.BundlesReturned | c.BundlesRefused) -> bool:
        group = self.groups.get(m.group_id)
        if group is None:
            return False
        if (m.node_id, m.attempt) in group.left:
            group.left.discard((m.node_id, m.attempt))
            return True
        mine = group.at(m.node_id, m.attempt)
        if mine:
            self.give_up(group, mine)
        return bool(mine)

    BundlesRefused = BundlesReturned

    def RemoveGroup(self, m: c.RemoveGroup) -> bool:
        group = self.groups.get(m.group_id)
        if group:
            self.end(group)
        return bool(group)

    def GroupInfeasible(self, m: c.GroupInfeasible) -> bool:
        group = self.groups.get(m.group_id)
        return (
            group is not None
            and group.attempt == m.attempt
            and group.state() in (GroupState.PENDING, GroupState.RESCHEDULING)
        )


node_ids, numbers, job_ids = st.sampled_from(NODES), st.integers(0, 3), st.sampled_from(JOBS)
near = st.sampled_from([0, 0, 0, 0, 0, -1, 1])


class GroupMachine(RuleBasedStateMachine):
    """Draws commands that are often right."""

    def __init__(self) -> None:
        super().__init__()
        self.state = GcsState(CLUSTER)
        self.other = GcsState(CLUSTER)
        self.twin = Twin()
        self.ids = pool("g", 4)
        """Of the groups; one that was removed is followed by another, most of the time."""

    @initialize(strategies=st.lists(st.sampled_from([*Strategy]), min_size=3, max_size=3))
    def begin(self, strategies: list[str]) -> None:
        """Nodes, two jobs, a detached actor of the first, and a group of each kind of owner."""
        for node_id in NODES:
            self.send(c.RegisterNode(node_id, "e", {}, {}, 1, "h", 1))
        for job, worker, node in zip(JOBS, WORKERS, (NODES[1], NODES[2])):
            self.send(c.AddJob(job, worker, 1, node, "m", "ns"))
        for command in (
            c.RegisterActor(ACTOR, JOBS[0], None, NODES[0], "X", detached=True),
            c.ActorPlacing(ACTOR, 0, NODES[0]),
            c.ActorAlive(ACTOR, 0, HOST, "e", NODES[0], 1),
        ):
            assert self.state.apply(b"", 0, command).ok and self.other.apply(b"", 0, command).ok
        owners = [(WORKERS[0], NODES[1]), (None, b""), (HOST, NODES[0])]
        for number, (strategy, (owner, node)) in enumerate(zip(strategies, owners)):
            bundles = [{"CPU": 1.0}] * 3
            self.send(
                c.CreateGroup(self.ids[number], JOBS[0], owner, node, bundles, strategy, detached=owner is None)
            )
            self.place(number, 1, 0)
            self.answer(number, 4)

    def send(self, command: Any) -> None:
        before = self.state.revision
        result = self.state.apply(b"", 0, command)
        assert self.other.apply(b"", 0, c.decode_command(c.encode_command(command))) == result
        step: Callable[[Any], bool] = getattr(self.twin, type(command).__name__)
        assert step(command) == result.ok, result
        self.twin.consequences()
        assert result.ok or self.state.revision == before
        self.sound()
        self.as_the_twin_has_it()

    def attempt(self, number: int, off: int) -> int:
        group = self.twin.groups.get(self.ids[number])
        return max(0, (group.attempt if group else 0) + off)

    # --- what managers and raylets would do next ----------------------------------------------------------------------

    @rule(number=numbers, seed=st.integers(0, 40), off=near)
    def place(self, number: int, seed: int, off: int) -> None:
        known = self.twin.groups.get(self.ids[number])
        nodes = [node for node in NODES if self.twin.alive(node)]
        if known is None or not nodes:
            return
        free = [node for node in nodes if known.strategy != "STRICT_SPREAD" or node not in
                {each.node for each in known.bundles}]  # fmt: skip
        if known.strategy == "STRICT_PACK":
            free = [each.node for each in known.bundles if each.node][:1] or [nodes[seed % len(nodes)]]
        wanted = [index for index, each in enumerate(known.bundles) if each.state == NONE]
        chosen = {index: (free or nodes)[(seed + at) % len(free or nodes)] for at, index in enumerate(wanted)}
        self.send(c.GroupPlacing(self.ids[number], self.attempt(number, off), chosen))

    @rule(number=numbers, seed=st.integers(0, 40), answers=st.integers(0, 6))
    def forward(self, number: int, seed: int, answers: int) -> None:
        """All that is to be done, more or less."""
        self.answer(number, 3)
        self.place(number, seed, 0)
        self.answer(number, answers)

    @rule(number=numbers, seed=st.integers(0, 40), answers=st.integers(0, 6))
    def forward_again(self, number: int, seed: int, answers: int) -> None:
        self.forward(number, seed, answers)

    @rule(number=numbers, answers=st.integers(1, 6))
    def answer(self, number: int, answers: int) -> None:
        """Nodes do as they are asked."""
        for _ in range(answers):
            known = self.twin.groups.get(self.ids[number])
            if known is None:
                return
            left = min(known.left, default=None)
            if left is not None:
                self.send(c.BundlesReturned(self.ids[number], left[1], left[0], "asked to"))
                continue
            for bundle in known.bundles:
                if bundle.state == PREPARING:
                    self.send(c.BundlesPrepared(self.ids[number], bundle.attempt, bundle.node))
                    break
                if bundle.state == COMMITTING:
                    self.send(c.BundlesCommitted(self.ids[number], bundle.attempt, bundle.node))
                    break

    @rule(number=numbers, index=st.integers(0, 2), what=st.integers(0, 3), off=near, node=st.none() | node_ids)
    def said(self, number: int, index: int, what: int, off: int, node: bytes | None) -> None:
        """A node says something, perhaps late, perhaps another one."""
        known = self.twin.groups.get(self.ids[number])
        bundle = known.bundles[index % len(known.bundles)] if known else TwinBundle()
        attempt = max(0, (bundle.attempt or self.attempt(number, 0)) + off)
        node = node or bundle.node or NODES[0]
        if what == 0:
            self.send(c.BundlesPrepared(self.ids[number], attempt, node))
        elif what == 1:
            self.send(c.BundlesCommitted(self.ids[number], attempt, node))
        elif what == 2:
            self.send(c.BundlesRefused(self.ids[number], attempt, node, "no"))
        else:
            self.send(c.BundlesReturned(self.ids[number], attempt, node, "gone"))

    # --- others -------------------------------------------------------------------------------------------------------

    @rule(
        number=numbers, job=job_ids, owner=st.sampled_from([None, HOST, *WORKERS]), node=node_ids,
        name=st.sampled_from(["", "", "p"]), fresh=st.sampled_from([True, True, False]),
        strategy=st.sampled_from([*Strategy]), size=st.integers(1, 3),
    )  # fmt: skip
    def create(
        self, number: int, job: bytes, owner: bytes | None, node: bytes, name: str, fresh: bool, strategy: str,
        size: int,
    ) -> None:  # fmt: skip
        known = self.twin.groups.get(self.ids[number])
        if fresh and known is not None and known.removed:
            self.ids[number] = (b"g%d-%d" % (number, self.state.revision)).ljust(16, b".")
        if owner == HOST:  # what an actor makes belongs to its job
            node, job = NODES[0], JOBS[0]
        detached = owner is None
        bundles = [{"CPU": 1.0}] * size
        self.send(c.CreateGroup(self.ids[number], job, owner, node, bundles, strategy, name, "", detached))

    @rule(number=numbers)
    def remove(self, number: int) -> None:
        self.send(c.RemoveGroup(self.ids[number]))

    @rule(number=numbers, off=near, text=st.sampled_from(["", "4 GPU are needed"]))
    def infeasible(self, number: int, off: int, text: str) -> None:
        self.send(c.GroupInfeasible(self.ids[number], self.attempt(number, off), text))

    @rule(node=st.sampled_from([*NODES[3:] * 8, *NODES[:3]]), dies=st.booleans(), off=near)
    def node_ends_or_begins(self, node: bytes, dies: bool, off: int) -> None:
        incarnation, alive = self.twin.nodes[node]
        if dies:
            self.send(c.MarkNodeDead(node, max(0, incarnation + off), CAUSE))
        else:
            self.send(c.RegisterNode(node, "e", {}, {}, max(0, incarnation + (not alive) + off), "h", 1))

    @rule(which=st.integers(0, 11))
    def owner_ends(self, which: int) -> None:
        """Rarely: a worker, the actor's worker, or a job."""
        if which < 2:
            self.send(c.FinishJob(JOBS[which]))
        elif which < 5:
            self.send(c.WorkerDied((*WORKERS[2:], HOST)[which - 2], NODES[0], CAUSE))

    @rule()
    def restart(self) -> None:
        data = self.state.snapshot()
        self.state = GcsState.restore(data, CLUSTER)
        assert self.state.snapshot() == data == self.other.snapshot()

    # --- always -------------------------------------------------------------------------------------------------------

    def sound(self) -> None:
        assert self.state.check() == []

    def as_the_twin_has_it(self) -> None:
        records = self.state.store.placement_groups
        assert records.keys() == self.twin.groups.keys()
        for group_id in self.ids:
            if group_id not in records:
                continue
            record, twin = records[group_id], self.twin.groups[group_id]
            assert record.state is twin.state(), (record, twin)
            assert (record.attempt, record.made) == (twin.attempt, twin.made)
            found = [TwinBundle(each.state, each.node_id, each.attempt) for each in record.bundles]
            assert found == twin.bundles
            assert {(each.node_id, each.attempt) for each in record.leftovers} == twin.left


GroupMachine.TestCase.settings = settings(stateful_step_count=40)
TestGroups = GroupMachine.TestCase
