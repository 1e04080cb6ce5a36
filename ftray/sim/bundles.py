"""The bundles of placement groups on a simulated node, and tasks that hold resources.

Role: shell. What the node holds is decided by the production class (`scheduling/bundles.py`) on the production ledger;
what is around it in a raylet is repeated here on the simulated reactor. Tasks run in bundles and next to them, so that
resources are not always there at once.

What must hold: nothing is committed that its node has not prepared, nor prepared while the same bundle is there from an
earlier attempt; no task runs in a bundle that was given back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ftray.gcs.state import commands as c
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import BundleState, Code, Result
from ftray.ids import group_resource
from ftray.scheduling.bundles import (
    BundleEffect,
    BundleToken,
    Committed,
    EndLeases,
    NodeBundles,
    Prepared,
    Refused,
    Returned,
)
from ftray.scheduling.leases import DedicatedGrant, DedicatedInfeasible, LeaseScheduler
from ftray.wire.group_messages import BundlesHeld, CommitBundles, GroupMessage, PrepareBundles, ReturnBundles

if TYPE_CHECKING:
    from ftray.sim.raylet import Raylet

SLOT = "slot"
"""What bundles are made of. Nothing else asks for it, so that actors don't go where nodes fail."""
TASKS = b"tasks"
TASK_EVERY_MS = (50.0, 600.0)
TASK_MS = (5.0, 300.0)
KILL_MS = (1.0, 30.0)
REPEAT_MS = 500.0


class BundleHost:
    """The bundles of one life of a node. `prepared` is of all its lives."""

    def __init__(self, raylet: Raylet, slots: float, prepared: set[tuple[bytes, int]]) -> None:
        self.raylet = raylet
        self.slots = slots
        self.scheduler = LeaseScheduler({SLOT: slots})
        self.bundles = NodeBundles(self.scheduler)
        self.calm = False
        """No new tasks."""
        self._prepared = prepared
        self._classes: dict[str, int] = {}
        self._rng: random.Random = raylet.rng
        self._later(TASK_EVERY_MS, self._run_task)

    def _later(self, ms: tuple[float, float], fn: Callable[[], None]) -> None:
        reactor = self.raylet.reactor
        if reactor is not None:
            reactor.call_later(self._rng.uniform(*ms), fn)

    # --- as in a raylet -----------------------------------------------------------------------------------------------

    def connected(self, connected: bool) -> None:
        if connected and self.raylet.registered:
            self.raylet.gcs.send(BundlesHeld(tuple((each.group_id, each.attempt) for each in self.bundles.held())))

    def asked(self, message: GroupMessage) -> None:
        rows = {(row.group_id, row.attempt): row for row in self.bundles.rows()}
        problems, name = self.raylet.problems, self.raylet.name
        match message:
            case PrepareBundles(group, attempt, bundles):
                for row in rows.values():
                    if row.group_id == group and row.attempt != attempt and not bundles.keys().isdisjoint(row.bundles):
                        problems.append(
                            f"{name}: a bundle of {group.hex()} is to be prepared in attempt {attempt} while that of "
                            f"attempt {row.attempt} is there"
                        )
                self._carry_out(self.bundles.prepare(group, attempt, bundles, self._now_ms()))
            case CommitBundles(group, attempt):
                if (group, attempt) not in self._prepared:
                    problems.append(f"{name}: attempt {attempt} of {group.hex()} is to be committed, never prepared")
                self._carry_out(self.bundles.commit(group, attempt))
            case ReturnBundles(group, attempt, reason):
                self._carry_out(self.bundles.give_back(group, attempt, reason))
        self.settle()

    def settle(self) -> None:
        if self.bundles.returning:
            self._carry_out(self.bundles.leases_ended())
        for grant in self.scheduler.dispatch(self._now_ms(), 64):
            if isinstance(grant, DedicatedGrant):
                assert isinstance(grant.token, BundleToken)
                self._prepared.add((grant.token.group_id, grant.token.attempt))
                self._carry_out(self.bundles.granted(grant.token, grant.lease_id))
            else:
                self.scheduler.set_demand(TASKS, grant.class_id, 0)
                self._later(TASK_MS, partial(self._end_lease, grant.lease_id))
        for found in self.scheduler.infeasible():
            if isinstance(found, DedicatedInfeasible):
                assert isinstance(found.token, BundleToken)
                self._carry_out(self.bundles.infeasible(found.token, found.missing))
            else:
                self.scheduler.set_demand(TASKS, found.class_id, 0)
        held = {row.group_id.hex() for row in self.bundles.rows()}
        for lease in self.scheduler.leases():
            for resource in lease.resources:
                if "_group_" in resource and resource.rpartition("_")[2] not in held:
                    self.raylet.problems.append(f"{self.raylet.name}: a task runs on {resource}, which was given back")

    def tidy(self) -> None:
        self._carry_out(self.bundles.expire(self._now_ms()))

    def _now_ms(self) -> float:
        assert self.raylet.reactor is not None
        return self.raylet.reactor.now_ms()

    def _end_lease(self, lease_id: int) -> None:
        self.scheduler.end_lease(lease_id)
        self.settle()

    def _carry_out(self, effects: Sequence[BundleEffect]) -> None:
        for effect in effects:
            if isinstance(effect, EndLeases):
                for lease_id in effect.lease_ids:
                    self._later(KILL_MS, partial(self._end_lease, lease_id))
            else:
                self._tell(effect)

    def _tell(self, effect: Prepared | Refused | Committed | Returned) -> None:
        node = self.raylet.node_id
        command: c.AnyCommand
        match effect:
            case Prepared(group, attempt):
                command = c.BundlesPrepared(group, attempt, node)
            case Refused(group, attempt, reason):
                command = c.BundlesRefused(group, attempt, node, reason)
            case Committed(group, attempt):
                command = c.BundlesCommitted(group, attempt, node)
            case Returned(group, attempt, reason):
                command = c.BundlesReturned(group, attempt, node, reason)
        self.raylet.gcs.command(command, partial(self._told, effect))

    def _told(self, effect: Prepared | Refused | Committed | Returned, result: Result) -> None:
        if result.code is Code.UNAVAILABLE:
            self._later((REPEAT_MS, REPEAT_MS), partial(self._tell, effect))
        elif not result.ok and isinstance(effect, Prepared | Committed):
            self._carry_out(self.bundles.not_wanted(effect.group_id, effect.attempt, result.message))
            self.settle()

    def _run_task(self) -> None:
        """In a bundle, in any bundle of a group, or beside them."""
        self._later(TASK_EVERY_MS, self._run_task)
        self.tidy()
        if self.calm:
            return
        names = [SLOT]
        for row in self.bundles.rows():
            names += [group_resource(SLOT, row.group_id), group_resource(SLOT, row.group_id, min(row.bundles))]
        name = self._rng.choice(names)
        class_id = self._classes.setdefault(name, len(self._classes) + 1)
        self.scheduler.set_demand(TASKS, class_id, 1, {name: 1.0})
        self.settle()

    # --- what must hold -----------------------------------------------------------------------------------------------

    def unsettled(self, state: GcsState) -> str:
        """What is not yet as the tables say."""
        node_id, who = self.raylet.node_id, self.raylet.name
        wanted: dict[tuple[bytes, int], dict[int, dict[str, float]]] = {}
        for group in state.store.groups_on(node_id):
            for index, bundle in enumerate(group.bundles):
                if bundle.node_id == node_id and bundle.state is BundleState.COMMITTED:
                    wanted.setdefault((group.group_id, bundle.attempt), {})[index] = bundle.resources
        held = {(row.group_id, row.attempt): row.bundles for row in self.bundles.rows()}
        if held != wanted or any(row.stage != "COMMITTED" for row in self.bundles.rows()):
            return f"{who} holds {self.bundles.rows()}, and the table says {wanted}"
        if len(self.scheduler.leases()) > len(held):
            return f"{who} runs tasks still"
        used = sum(each[SLOT] for bundles in held.values() for each in bundles.values())
        if self.scheduler.available[SLOT] != self.slots - used:
            return f"{who} has {self.scheduler.available} free of {self.slots}, while {used} are held"
        return ""
