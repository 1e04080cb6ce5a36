"""Encodings changed at random: what takes them never sees anything but what it knows how to refuse.

A command reaches every head by way of the log, so an exception that one of them brings about in one head it would bring
about in all. What a peer says may stop the head that hears it, with a typed error, and nobody else.
"""

from __future__ import annotations

import logging
import random
import tempfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raft_world import World

from ftray.gcs.raft import messages as m
from ftray.gcs.replica import Request, SingleReplica
from ftray.gcs.state import commands as c
from ftray.gcs.state.checks import MESSAGE_CHARS_MAX
from ftray.gcs.state.errors import CommandError, GcsError
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Code, Result

CLUSTER = b"c" * 16
N, W, A, J, G = b"n" * 16, b"w" * 16, b"a" * 16, b"job1", b"g" * 16
CAUSE = c.DeathCauseRecord("ab", 3, "cd", 1, 9, "x", ["line"], "r")
COMMANDS: tuple[c.AnyCommand, ...] = (
    c.RegisterNode(N, "unix:/x", {"CPU": 2.0}, {"zone": "b"}, 1, "h", 1), c.AddJob(J, W, 2, N, "main.py", ""),
    c.KvPut("ns", b"k", b"v"), c.KvDelete("ns", b"k"),
    c.RegisterActor(A, J, W, N, "C", "name", "", 1, False, {"CPU": 1.0}, b"spec"), c.ActorPlacing(A, 1, N),
    c.ActorAlive(A, 1, b"x" * 16, "unix:/w", N, 5), c.ActorDied(A, 1, CAUSE), c.ActorOutOfScope(A, W),
    c.KillActor(A, True, "r"), c.ActorUnplaced(A, 1, N, "r"), c.ActorUnschedulable(A, 1, "gpu"),
    c.WorkerDied(W, N, CAUSE), c.ForgetClients([b"a"]), c.MarkNodeDead(N, 1, CAUSE), c.FinishJob(J, CAUSE),
    c.CreateGroup(G, J, W, N, [{"CPU": 1.0}, {"CPU": 0.5, "disk": 1.0}], "SPREAD", "pair", "ns"),
    c.CreateGroup(G, J, None, b"", [{"CPU": 1.0}], "STRICT_PACK", detached=True), c.GroupPlacing(G, 0, {0: N, 1: N}),
    c.GroupPlacing(G, 0, {0: N}), c.BundlesPrepared(G, 0, N), c.BundlesCommitted(G, 0, N),
    c.BundlesRefused(G, 0, N, "tasks hold it"), c.BundlesReturned(G, 0, N, "gone"), c.RemoveGroup(G, "enough"),
    c.GroupInfeasible(G, 0, "4 GPU"),
)  # fmt: skip
ODD: tuple[Any, ...] = (
    0, 1, -1, 2**63, 2**64 - 1, -(2**63), float("nan"), float("inf"), b"", b"x" * 17, b"\0" * 16, "", "\0", "x" * 1001,
    None, [], {}, [[[]]], {"\0": -1.0}, N, W, A, J, True,
)  # fmt: skip


def changed(rng: random.Random, value: Any) -> Any:
    """The value with something in it replaced, taken away or added."""
    if isinstance(value, list) and value and rng.random() < 0.9:
        value = list(value)
        kind, place = rng.random(), rng.randrange(len(value))
        if kind < 0.1:
            value.append(rng.choice(ODD))
        elif kind < 0.15:
            value.pop()
        else:
            value[place] = changed(rng, value[place])
        return value
    if isinstance(value, dict) and value:
        return {**value, rng.choice(["", "CPU\0", "x" * 3000, *value]): rng.choice(ODD)}
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.7:
        return rng.choice([value + 1, max(0, value - 1), value + 1000, rng.randrange(20)])
    return rng.choice(ODD)


def mutated(rng: random.Random, encoded: bytes) -> bytes:
    """An encoding of nearly the same, or nearly an encoding."""
    kind = rng.random()
    if kind < 0.6:
        return msgspec.msgpack.encode(changed(rng, msgspec.msgpack.decode(encoded)))
    if kind < 0.9:
        flipped = bytearray(encoded)
        for _ in range(rng.randint(1, 3)):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    return encoded[: rng.randrange(len(encoded))]


def some_command(rng: random.Random) -> bytes:
    encoded = c.encode_command(rng.choice(COMMANDS))
    if rng.random() < 0.4:
        return encoded
    return encoded[:1] + mutated(rng, encoded[1:]) if rng.random() < 0.95 else rng.randbytes(rng.randrange(40))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Each refusal is a line in the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@given(st.integers(0, 2**32))
def test_a_command_is_one_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        data = some_command(rng)
        said = ""
        try:
            command = c.decode_command(data)
        except CommandError as error:
            said = str(error)
        else:
            assert c.decode_command(c.encode_command(command)) is not None
        assert len(said) < 500


@settings(max_examples=15)
@given(st.integers(0, 2**32))
def test_a_head_answers_whatever_it_is_sent_and_comes_back_with_the_same_state(seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        replica = SingleReplica(directory, CLUSTER, fsync=False)
        results: list[Result] = []
        for _ in range(60):
            client = rng.choice([b"", b"one", b"two", W, b"x" * 65])
            replica.propose(Request(client, rng.randrange(-1, 50), some_command(rng)), results.append)
            replica.flush()
        assert len(results) == 60 and not [result for result in results if result.code is Code.INTERNAL]
        assert max(len(result.message) for result in results) < 5_000
        assert replica.state.check() == []
        before = replica.state.snapshot()
        assert GcsState.restore(before, CLUSTER).snapshot() == before
        replica.close()
        replica = SingleReplica(directory, CLUSTER, fsync=False)
        assert replica.state.snapshot() == before
        replica.close()


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_the_leader_of_three_lets_nothing_into_the_log_that_the_others_cannot_read(seed: int) -> None:
    rng = random.Random(seed)
    world = World(1)
    world.start()
    leader = world.leader()
    assert leader.replica is not None
    results: list[Result] = []
    for _ in range(60):
        client = rng.choice([b"", b"one", b"two", W])
        leader.replica.propose(Request(client, rng.randrange(-1, 50), some_command(rng)), results.append)
        leader.turn()
    world.run(100)
    assert len(results) == 60 and world.stops == []
    states = {host.replica.state.snapshot() for host in world.hosts.values() if host.replica is not None}
    assert len(states) == 1 and all(host.replica is not None for host in world.hosts.values())


NAN, INF = float("nan"), float("inf")
AMOUNTS = (0.0, -0.0, -1.0, NAN, INF, -INF, 1e308, 2.0**60, 2.0**59, 1e-9, 0.3, 1.0, 1e15 + 0.3)
TEXTS = ("", "\0", "a\0b", "x" * 100_000, "CPU", "bundle", "CPU_group_0_" + "ab" * 16, "\ud7ff\U0010ffff", "PACK")
IDS = (b"", b"g", b"g" * 15, b"g" * 17, G, N, J, b"\0" * 16, b"g" * 10_000)
NUMBERS = (-(2**63), -1, 0, 1, 5, 2**63 - 1)


def odd_group_command(rng: random.Random) -> c.AnyCommand:
    """What a client could make of the types alone."""
    text, number, some_id = (lambda: rng.choice(TEXTS)), (lambda: rng.choice(NUMBERS)), (lambda: rng.choice(IDS))
    which = rng.random()
    if which < 0.6:
        count = rng.choice((0, 1, 2, 3, 1_000, 1_001, 20_000))
        resources = {text() or "CPU": rng.choice(AMOUNTS) for _ in range(rng.randrange(3))}
        bundles = [{"CPU": 1.0}] * (count - 1) + [resources] * (count > 0)
        owner = rng.choice((None, W, some_id()))
        return c.CreateGroup(
            some_id(), rng.choice((J, some_id())), owner, rng.choice((N, some_id())), bundles,
            rng.choice(("PACK", "STRICT_SPREAD", "pack", text())), text(), text(), rng.random() < 0.4,
        )  # fmt: skip
    if which < 0.7:
        return c.GroupPlacing(some_id(), number(), {number(): some_id() for _ in range(rng.choice((0, 1, 4)))})
    if which < 0.75:
        return c.RemoveGroup(some_id(), text())
    if which < 0.8:
        return c.GroupInfeasible(some_id(), number(), text())
    if which < 0.9:
        return rng.choice((c.BundlesPrepared, c.BundlesCommitted))(some_id(), number(), some_id())
    return rng.choice((c.BundlesRefused, c.BundlesReturned))(some_id(), number(), some_id(), text())


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_foolish_commands_about_placement_groups_are_refused_in_a_few_words(seed: int) -> None:
    rng = random.Random(seed)
    state = GcsState(CLUSTER)
    for command in COMMANDS[:2]:
        assert state.apply(b"", 0, command).ok
    for _ in range(60):
        command = c.decode_command(c.encode_command(odd_group_command(rng)))
        result = state.apply(b"", 0, command)
        assert result.code is not Code.INTERNAL, (command, result)
        assert result.ok or 10 < len(result.message) <= MESSAGE_CHARS_MAX
        assert state.check() == []
        if result.ok and isinstance(command, c.CreateGroup):
            assert all(len(group.bundles) <= 1_000 for group in state.store.placement_groups.values())
            if rng.random() < 0.5:  # an id that is taken would hide what else there is to refuse
                state.apply(b"", 0, c.RemoveGroup(command.group_id))
    assert GcsState.restore(state.snapshot(), CLUSTER).snapshot() == state.snapshot()


# --- peers -----------------------------------------------------------------------------------------------------------


@lru_cache(1)
def _real_messages() -> list[bytes]:
    """What three heads have said to each other, without the checksums."""
    said: list[bytes] = []
    world = World(3)
    transmit = world.transmit

    def noted(link: Any, data: bytes | None) -> None:
        if data is not None:
            said.append(data[4:])
        transmit(link, data)

    world.transmit = noted  # type: ignore[method-assign]
    world.start()
    for number in range(4):
        world.write(b"k%d" % number)
    world.run(100)
    world.leader().crash()
    world.run(200)
    return said


@given(st.integers(0, 2**32))
def test_what_a_peer_says_is_a_message_or_none(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        body = mutated(rng, rng.choice(_real_messages()))
        right = zlib.crc32(body).to_bytes(4, "little")
        for data in (right + body, rng.randbytes(4) + body, body):
            try:
                m.decode(data)
            except msgspec.DecodeError:
                pass


@settings(max_examples=12)
@given(st.integers(0, 2**32))
def test_a_peer_that_says_nonsense_stops_at_worst_the_head_that_hears_it(seed: int) -> None:
    """With right checksums, so that it is taken for what the peer means: entries and votes that no head has ever given
    can't be told from true ones then, so what the victim makes of them stays with it."""
    rng = random.Random(seed)
    world = World(2)
    world.start()
    world.leader()
    for number in range(4):
        world.write(b"k%d" % number)
    world.run(100)
    victim = next(host for host in world.hosts.values() if not host.leads)
    assert victim.replica is not None
    victim.replica.world = World(3)
    victim.send = lambda link, data: None  # type: ignore[method-assign]
    for _ in range(8):
        links = sorted((link for link in victim.links if link.open), key=lambda link: link.peer.endpoint)
        if victim.replica is None or not links:
            break
        body = mutated(rng, rng.choice(_real_messages()))
        victim.replica.link_message(rng.choice(links), zlib.crc32(body).to_bytes(4, "little") + body)
        try:
            victim.replica.flush()
        except GcsError:
            break
    if victim.replica is not None:
        victim.crash()
    world.run(1000)
    others = [host for host in world.hosts.values() if host is not victim]
    assert all(host.replica is not None and host.error is None for host in others)
    world.write(b"on")
    assert all(world.has(world.leader(), b"k%d" % number) for number in range(4))
