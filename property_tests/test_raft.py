"""Replicas of the GCS under random faults, and what Raft promises (checked by `raft_world`, after each step).

Each seed is one schedule: crashes, crashes within a sync, power cuts, freezes, stalled and slow links, broken links,
full disks, compactions, hand-overs, while clients write. Then the faults end, and all must converge with every
acknowledged write there.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from planted import sessions_ignored, votes_for_any_log
from raft_world import Client, Host, World

from ftray.gcs.raft.log import RaftLog
from ftray.gcs.state.errors import GcsError

SEEDS = int(os.environ.get("FTRAY_RAFT_SEEDS", "40"))
"""In each of the groups below."""
FAULTS_MS = 2500.0
PLANTED_SEEDS = 40


def disturb(world: World) -> None:
    """One random fault."""
    rng = world.rng
    names = sorted(world.hosts)
    host = world.hosts[rng.choice(names)]
    other = rng.choice([name for name in names if name != host.endpoint])
    kind = rng.choice(
        ("crash", "crash", "crash_in_sync", "crash_in_sync", "power", "freeze", "stall", "stall", "cut", "slow", "slow",
         "break", "full", "compact", "resign", "heal", "heal", "heal", "heal", "restart", "restart", "restart",
         "restart", "restart", "crash_leader", "cut_leader", "slow_leader", "slow_leader")
    )  # fmt: skip
    if kind.endswith("_leader"):
        leaders = [each for each in world.hosts.values() if each.leads]
        host = rng.choice(leaders) if leaders else host
        kind = kind.removesuffix("_leader")
    world.note("fault", kind, host.endpoint)
    if kind == "crash":
        host.crash()
    elif kind == "crash_in_sync":
        host.disk.crash_in_sync = rng.random() < 0.5
    elif kind == "power":
        host.crash(silently=True)
    elif kind == "freeze":
        host.freeze()
        world.later(rng.uniform(50, 700), host.thaw)
    elif kind == "stall":
        world.stall(host.endpoint, other)
    elif kind == "cut":
        world.cut(host.endpoint)
    elif kind == "slow":
        for each in names if host.leads else [other]:
            world.slow[(host.endpoint, each)] = rng.uniform(20, 500)
    elif kind == "break":
        world.break_links(host.endpoint, other)
    elif kind == "full":
        host.disk.full = True
        world.later(rng.uniform(20, 500), lambda: setattr(host.disk, "full", False))
    elif kind == "compact" and host.replica is not None and host.frozen is None and not host.disk.full:
        host.replica.begin_compaction()
        host.turn()
    elif kind == "resign" and host.replica is not None and host.frozen is None:
        host.replica.resign()
        host.turn()
        world.later(60, lambda: world.faults and host.crash())
    elif kind == "heal":
        world.heal()
    elif kind == "restart":
        for each in world.hosts.values():
            if each.replica is None and rng.random() < 0.7:
                each.start()


def run(seed: int, heads: int) -> World:
    world = World(seed, heads, latency_ms=(0.2, world_latency(seed)))
    if seed % 3 == 0:
        world.compact_bytes = 3000
    world.start()
    world.leader()
    clients = [Client(world, b"c%d" % number, 15.0) for number in range(2)]
    for client in clients:
        client.next()
    pause_ms = world.rng.choice((40.0, 100.0, 200.0))
    end_ms = world.now_ms + FAULTS_MS
    while world.now_ms < end_ms:
        world.run(world.rng.expovariate(1 / pause_ms))
        disturb(world)
        if world.rng.random() < 0.2:
            world.check_logs()
    for client in clients:
        client.stopped = True
    world.converge()
    for host in world.hosts.values():
        check_writes(world, host, clients)
    world.write(b"at the end")
    assert not world.stops, world.stops
    return world


def world_latency(seed: int) -> float:
    return (1.0, 5.0, 40.0)[seed % 3]


def check_writes(world: World, host: Host, clients: list[Client]) -> None:
    for client in clients:
        assert not client.refused, "a command took effect twice"
        for key in client.acknowledged:
            assert world.has(host, key), f"the acknowledged write {key!r} is lost at {host.endpoint}"


@pytest.mark.parametrize("heads", [3, 5, 2])
def test_random_schedules(heads: int) -> None:
    acknowledged = 0
    for seed in range(SEEDS if heads == 3 else SEEDS // 2):
        try:
            world = run(seed * 10 + heads, heads)
        except BaseException as error:
            error.add_note(f"seed {seed * 10 + heads}, {heads} heads")
            raise
        acknowledged += sum(what[1] == "ack" for what in world.trace)
    assert acknowledged > SEEDS


def test_the_same_seed_gives_the_same_trace() -> None:
    assert run(7, 3).trace == run(7, 3).trace


def sync_later(patch: pytest.MonkeyPatch) -> None:
    """As the bare library does it: what is written reaches the disk some time."""

    def sync(log: RaftLog) -> None:
        if len(log._pending) >= 3:
            real(log)

    real = RaftLog.sync
    patch.setattr(RaftLog, "sync", sync)


@pytest.mark.parametrize("plant", [sync_later, votes_for_any_log, sessions_ignored])
def test_a_planted_fault_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(PLANTED_SEEDS):
        for heads in (3, 5):
            try:
                run(seed * 10 + heads, heads)
            except (AssertionError, GcsError):
                return
    pytest.fail(f"{plant.__name__} was not noticed in {PLANTED_SEEDS} seeds")
