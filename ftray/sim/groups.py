"""Placement groups in the simulator: clients that make them, and nodes that fail.

Role: shell. In the end each group that is made is held once, as the table says, nothing else is held anywhere, a group
that waits has no room, and when all groups are removed everything is free (`bundles.py` has the nodes' side).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ftray.config import Config
from ftray.gcs.state import commands as c
from ftray.gcs.state.group_manager import GroupManager
from ftray.gcs.state.group_placement import choose_nodes
from ftray.gcs.state.managers import ActorManager
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Code, GroupRecord, GroupState, Record, Result, Strategy, Table
from ftray.sim.bundles import SLOT
from ftray.sim.clients import JOB, Client
from ftray.sim.process import SimReactor

if TYPE_CHECKING:
    from ftray.sim.raylet import Raylet
    from ftray.sim.world import World

SLOTS = (4.0, 3.0, 2.0)
"""What the nodes have for bundles, in turn."""
GROUPS_MAX = 3
"""A client that has made so many removes one."""
NAMES = ("alpha", "beta")
MAKERS = 2
TROUBLE_MS = 1_500.0
"""Something happens to a node so often, on average."""


class GroupClient(Client):
    """Makes groups, looks them up by name, and removes them."""

    def boot(self, reactor: SimReactor) -> None:
        self._mine: list[bytes] = []
        super().boot(reactor)

    def step(self) -> None:
        if self._mine and (len(self._mine) >= GROUPS_MAX or self.rng.random() < 0.3):
            self._remove(self._mine.pop(self.rng.randrange(len(self._mine))))
        elif self.rng.random() < 0.2:
            name = self.rng.choice(NAMES)
            self.gcs.read_named("sim", name, partial(self._looked_up, name), Table.PLACEMENT_GROUPS)
        else:
            self._create()

    def _create(self) -> None:
        group = self.rng.randbytes(16)
        name = self.rng.choice((*NAMES, "", ""))
        bundles = [{SLOT: self.rng.choice((1.0, 1.0, 2.0))} for _ in range(self.rng.randint(1, 4))]
        strategy = self.rng.choice([each.value for each in Strategy])
        command = c.CreateGroup(group, JOB, None, b"", bundles, strategy, name, "sim", detached=True)

        def told(result: Result) -> None:
            if result.ok:
                self._mine.append(group)
            elif result.code is not Code.UNAVAILABLE and not (name and result.code is Code.EXISTS):
                self.unexpected("to create a placement group", result)
            self._pause()

        self.gcs.command(command, told)

    def _remove(self, group: bytes) -> None:
        def told(result: Result) -> None:
            if not result.ok and result.code is not Code.UNAVAILABLE:
                self.unexpected("to remove a placement group", result)
            self._pause()

        self.gcs.command(c.RemoveGroup(group), told)

    def _looked_up(self, name: str, record: Record | None) -> None:
        if record is not None and (not isinstance(record, GroupRecord) or record.name != name):
            self.histories.problems.append(f"{self.who}: the name {name} leads to {record}")
        self._pause()

    def remove_all(self, groups: Sequence[bytes], done: list[int]) -> None:
        """At the end."""
        for group in groups:
            self.gcs.command(c.RemoveGroup(group), lambda result: done.append(result.ok))


class Groups:
    """The nodes and clients of a world that have to do with groups; none if it has one node only."""

    def __init__(self, world: World, names: Sequence[str], config: Config) -> None:
        self.world = world
        self.raylets = world.raylets
        self.makers = [
            GroupClient(
                world.sim, world.network, f"maker{number}", names, world.histories, config, world.options.pause_ms
            )
            for number in range(MAKERS if len(self.raylets) > 1 else 0)
        ]
        self._rng = world.sim.stream("nodes")

    def run(self) -> None:
        for raylet in self.raylets[1:]:
            raylet.run()
        if self.raylets[1:]:
            self._trouble()

    def _trouble(self) -> None:
        """Nodes but the first, on which actors live, are killed and come back; all lose connections."""
        world, rng = self.world, self._rng
        world.sim.later(rng.expovariate(1 / TROUBLE_MS), self._trouble)
        if world.calm:
            return
        raylet = rng.choice(self.raylets)
        kills = "crash" in world.options.faults and rng.random() < 0.6
        if kills and raylet is not self.raylets[0]:
            raylet.crash(power=rng.random() < 0.3)
            world.sim.later(rng.uniform(10.0, 1000.0), partial(self._back, raylet))
        elif "cut" in world.options.faults:
            world.network.break_between(raylet.name, rng.choice(world.heads).name)

    def _back(self, raylet: Raylet) -> None:
        if not raylet.running:
            raylet.run()

    def calm(self) -> None:
        """Faults have ended."""
        for raylet in self.raylets:
            self._back(raylet)

    def unsettled(self, state: GcsState) -> str:
        """What is not yet as it should be."""
        for raylet in self.raylets:
            if raylet.host is None:
                continue
            raylet.host.calm = self.world.calm
            stuck = raylet.host.unsettled(state)
            if stuck:
                return stuck
        for group in state.store.placement_groups.values():
            who = f"placement group {group.group_id.hex()} ({group.state.name}, {group.cause})"
            if group.leftovers:
                return f"{who} is to be given back by {group.leftovers}"
            if group.state in (GroupState.PENDING, GroupState.RESCHEDULING):
                actors = ActorManager(state)
                GroupManager(state, actors.placement)
                if choose_nodes(actors.placement, group) is not None:
                    return f"{who} waits, and there is room"
            elif group.state not in (GroupState.CREATED, GroupState.REMOVED):
                return f"{who} has not come to an end"
        return ""

    def remove_all(self, state: GcsState, done: list[int]) -> int:
        """At the end: everything must become free. Returns how many answers are to come."""
        groups = [each.group_id for each in state.store.placement_groups.values()]
        if not self.makers or not groups:
            return 0
        maker = self.makers[0]
        maker.handle(lambda: maker.remove_all(groups, done))
        return len(groups)
