"""Schedules of faults: drawn from a seed, applied to a world.

Role: shell of nothing; it decides what breaks when. A fault names its target by number or as the leader of the moment,
and lasts for a time of its own, so that each can be left out or changed without changing what the others are. Schedules
may also come from hypothesis (`strategies.py`) or from a file (`schedules.py`).

Rules
- At most one disk at a time is emptied or damaged, and no other before the head is replaced: more would lose data by
  right.
- All faults end by themselves, and at once when the world says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ftray.sim.disk import FSYNC_MS
from ftray.sim.network import Direction

if TYPE_CHECKING:
    from ftray.sim.heads import Head
    from ftray.sim.world import World

KINDS: dict[str, tuple[tuple[str, int], ...]] = {
    "crash": (("kill", 6), ("power", 4), ("power_all", 2), ("stop", 2), ("kill_client", 1)),
    "freeze": (("freeze", 4), ("freeze_client", 1)),
    "cut": (("cut", 3), ("one_way", 3), ("partial", 3), ("split", 3), ("cut_client", 2), ("slow", 3),
            ("slow_pair", 3), ("break", 2)),
    "disk": (
        ("full", 2), ("slow_sync", 2), ("fail_sync", 1), ("crash_in_sync", 4), ("flip", 1), ("lose_disk", 1),
        ("compact", 2),
    ),
    "clock": (("jump", 2), ("rate", 2)),
}  # fmt: skip
"""What may be asked for, and what it stands for, with weights."""

LEADER = -1
KILL_IN_SYNC = 0.4
"""Of the deaths in a sync, how many are those of a process, and not of its machine."""


@dataclass(frozen=True)
class Fault:
    """One fault."""

    number: int
    at_ms: float
    """After the faults begin."""
    kind: str
    target: int
    """Which head, or LEADER; which client for those of clients."""
    other: int
    duration_ms: float
    amount: float
    flag: bool

    def __str__(self) -> str:
        target = "the leader" if self.target == LEADER else f"number {self.target}"
        return f"fault {self.number}: {self.kind} of {target} at {self.at_ms:.0f} ms for {self.duration_ms:.0f} ms"


def schedule(rng: random.Random, kinds: Iterable[str], heads: int, clients: int, length_ms: float) -> list[Fault]:
    """A schedule. Some are busy, some calm."""
    kinds = [kind for kind in KINDS if kind in set(kinds)]
    choices = [each for kind in kinds for each in KINDS[kind]]
    if not choices:
        return []
    names, weights = [name for name, _ in choices], [weight for _, weight in choices]
    pause_ms = rng.choice((100.0, 250.0, 600.0))
    faults: list[Fault] = []
    at_ms = 0.0
    while True:
        at_ms += rng.expovariate(1 / pause_ms)
        if at_ms >= length_ms:
            return faults
        (kind,) = rng.choices(names, weights)
        target = LEADER if rng.random() < 0.35 else rng.randrange(heads)
        if kind.endswith("_client"):
            target = rng.randrange(clients) if clients else 0
        duration_ms = rng.choice((rng.uniform(10, 100), rng.uniform(50, 700), rng.uniform(300, 1500)))
        faults.append(
            Fault(len(faults), at_ms, kind, target, rng.randrange(heads), duration_ms, rng.random(), rng.random() < 0.5)
        )


def apply(world: World, fault: Fault) -> None:
    """Begins a fault, and sees to its end."""
    kind = fault.kind
    if kind.endswith("_client"):
        _of_client(world, fault)
        return
    head = world.leader_or(fault.target)
    world.sim.note(f"{fault} -> {head.name}")
    if kind in ("kill", "power"):
        head.crash(power=kind == "power")
        world.restart_at(head, fault.duration_ms)
    elif kind == "power_all":
        for each in world.heads:
            each.crash(power=True)
            world.restart_at(each, fault.duration_ms * (0.2 + 0.8 * fault.amount))
    elif kind == "stop":
        head.resign()
        world.until(fault.duration_ms + 200.0, partial(_stopped, world, head, head.life))
    elif kind == "freeze":
        head.freeze()
        world.until(fault.duration_ms, head.thaw)
    elif kind in ("cut", "one_way", "partial"):
        _cut(world, fault, head)
    elif kind == "split":
        _split(world, fault, head)
    elif kind in ("slow", "slow_pair"):
        _slow(world, fault, head)
    elif kind == "break":
        others = [each.name for each in (*world.heads, *world.clients) if each is not head]
        for name in others if fault.flag else [world.heads[fault.other].name]:
            world.network.break_between(head.name, name)
    elif kind == "compact":
        head.compact()
    elif kind in ("jump", "rate"):
        if kind == "jump":
            head.set_clock(jump_ms=(fault.amount - 0.4) * 1500.0)
        else:
            head.set_clock(rate=0.6 + 0.9 * fault.amount)
            world.until(fault.duration_ms * 3, partial(head.set_clock, rate=1.0))
    else:
        _of_disk(world, fault, head)


def _stopped(world: World, head: Head, life: int) -> None:
    if head.life == life:
        head.crash(why="it did not stop in time")


def _of_client(world: World, fault: Fault) -> None:
    if not world.clients:
        return
    client = world.clients[fault.target]
    world.sim.note(f"{fault} -> {client.name}")
    if fault.kind == "kill_client":
        client.crash(power=fault.flag)
        world.restart_at(client, fault.duration_ms)
    elif fault.kind == "freeze_client":
        client.freeze()
        world.until(fault.duration_ms, client.thaw)
    else:
        head = world.heads[fault.other].name
        directions = [(client.name, head), (head, client.name)]
        if fault.flag:
            directions = directions[: 1 + (fault.amount < 0.5)]
        _cut_now(world, directions, fault)


def _cut(world: World, fault: Fault, head: Head) -> None:
    others = [each.name for each in world.heads if each is not head]
    if fault.kind == "cut":
        if fault.flag:  # and from all clients, or from some
            others += [each.name for each in world.clients[:: 1 + (fault.amount < 0.7)]]
        directions = [pair for name in others for pair in ((head.name, name), (name, head.name))]
    elif fault.kind == "one_way":
        directions = [(head.name, name) if fault.flag else (name, head.name) for name in others]
    else:
        name = others[fault.other % len(others)] if others else head.name
        directions = [(head.name, name), (name, head.name)]
    _cut_now(world, directions, fault)


def _split(world: World, fault: Fault, head: Head) -> None:
    """Two parts, the head in the smaller one; clients belong to one of them, or to both."""
    others = [each.name for each in world.heads if each is not head]
    first = fault.other % max(1, len(others))
    others = others[first:] + others[:first]
    size = int(fault.amount * 10) % max(1, (len(others) + 1) // 2)
    inside, outside = [head.name, *others[:size]], others[size:]
    if fault.flag:
        clients = [each.name for each in world.clients]
        inside, outside = inside + clients[::2], outside + clients[1::2]
    _cut_now(world, [pair for a in inside for b in outside for pair in ((a, b), (b, a))], fault)


def _cut_now(world: World, directions: list[Direction], fault: Fault) -> None:
    world.network.cut(directions)
    world.until(fault.duration_ms, lambda: world.network.heal(directions, broken=fault.amount < 0.4))


def _slow(world: World, fault: Fault, head: Head) -> None:
    others = [each.name for each in world.heads if each is not head]
    if fault.flag and others:
        others = [others[fault.other % len(others)]]
    slow = world.network.slow
    directions = [(head.name, name) for name in others]
    if fault.kind == "slow_pair" and others:
        name = others[fault.other % len(others)]
        directions = [(head.name, name), (name, head.name)]
    extra_ms = {
        direction: 20.0 + 1500.0 * (fault.amount * (1.6 * number + 1.0) % 1.0) ** 2
        for number, direction in enumerate(directions)
    }
    for direction, ms in extra_ms.items():
        slow.setdefault(direction, []).append(ms)

    def end() -> None:
        for direction, ms in extra_ms.items():
            slow[direction].remove(ms)
            if not slow[direction]:
                del slow[direction]

    world.until(fault.duration_ms * 2, end)


def _of_disk(world: World, fault: Fault, head: Head) -> None:
    disk = head.disk
    if fault.kind == "full":
        disk.full = True
        world.until(fault.duration_ms, partial(setattr, disk, "full", False))
    elif fault.kind == "slow_sync":
        disk.fsync_ms = (2.0, 10.0 + 60.0 * fault.amount)
        world.until(fault.duration_ms, partial(setattr, disk, "fsync_ms", FSYNC_MS))
    elif fault.kind == "fail_sync":
        disk.fail_sync = True
        head.may_fail = True
    elif fault.kind == "crash_in_sync":
        disk.crash_in_sync, disk.kill_in_sync = fault.flag, fault.amount < KILL_IN_SYNC
    elif fault.kind == "flip":
        if world.may_damage(head):
            head.crash(power=fault.flag)
            if disk.flip_bit():
                world.sim.note(f"a bit of {head.name}'s journal flips")
                head.damaged = True
                world.damaged = head
            world.restart_at(head, fault.duration_ms)
    elif fault.kind == "lose_disk" and world.may_damage(head):
        head.crash(power=True)
        head.empty()
        world.damaged = head
        world.restart_at(head, fault.duration_ms)
