"""Placement groups between a GCS and raylets over real sockets: what is asked, answered, reported, and looked up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs_world import JOB, NODE, Events, World, gcs_world, raylet

from ftray.gcs.client import GcsClient
from ftray.gcs.state import commands as c
from ftray.gcs.state.tables import GroupState, Table
from ftray.wire.group_messages import BundlesHeld, CommitBundles, PrepareBundles, ReturnBundles

GROUP, STRANGER = b"g" * 16, b"s" * 16


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with gcs_world(tmp_path, monkeypatch) as made:
        yield made


def create(world: World, client: GcsClient) -> None:
    command = c.CreateGroup(GROUP, JOB, None, b"", [{"CPU": 1.0}, {"CPU": 1.0}], "PACK", "pair", "ns", True)
    assert world.run(client, command).value == GROUP


def state(world: World) -> GroupState:
    group = world.replica.state.group(GROUP)
    assert group is not None
    return group.state


def started(world: World) -> tuple[GcsClient, Events]:
    events = Events()
    client = raylet(world, events)
    assert world.add_job(client).ok
    create(world, client)
    return client, events


def test_the_raylet_is_asked_in_two_phases(world: World) -> None:
    client, events = started(world)
    asked: list[Any] = events.of("other")
    assert asked == [PrepareBundles(GROUP, 0, {0: {"CPU": 1.0}, 1: {"CPU": 1.0}})]
    assert world.run(client, c.BundlesPrepared(GROUP, 0, NODE)).ok
    assert events.of("other")[1:] == [CommitBundles(GROUP, 0)]
    assert world.run(client, c.BundlesCommitted(GROUP, 0, NODE)).ok
    assert state(world) is GroupState.CREATED
    assert world.run(client, c.RemoveGroup(GROUP, "enough")).ok
    assert events.of("other")[2:] == [ReturnBundles(GROUP, 0, "enough")]
    assert world.run(client, c.BundlesReturned(GROUP, 0, NODE, "")).ok


def test_a_name_leads_to_the_group_and_not_to_an_actor(world: World) -> None:
    client, _ = started(world)
    found: list[Any] = []
    client.read_named("ns", "pair", found.append, Table.PLACEMENT_GROUPS)
    client.read_named("ns", "pair", found.append)
    client.read_named("ns", "other", found.append, Table.PLACEMENT_GROUPS)
    world.settle()
    assert [record and record.group_id for record in found] == [GROUP, None, None]


def test_a_head_that_starts_again_asks_again_and_hears_what_is_held(world: World) -> None:
    client, events = started(world)
    assert world.run(client, c.BundlesPrepared(GROUP, 0, NODE)).ok
    events.clear()
    world.restart()
    world.settle(200)
    assert client.connected and events.of("other") == [CommitBundles(GROUP, 0)]
    client.send(BundlesHeld(((GROUP, 0), (STRANGER, 3))))
    world.settle()
    told = events.of("other")[1:]  # and is asked again, since it may have dropped what it was asked when it connected
    assert told == [ReturnBundles(STRANGER, 3, "it is not wanted any more"), CommitBundles(GROUP, 0)]
    client.send(BundlesHeld(()))  # it has lost what it said it holds, and says so when it is asked
    world.settle()
    assert events.of("other")[-1] == CommitBundles(GROUP, 0)
    assert world.run(client, c.BundlesReturned(GROUP, 0, NODE, "the node does not hold it")).ok
    assert events.of("other")[-1:] == [PrepareBundles(GROUP, 1, {0: {"CPU": 1.0}, 1: {"CPU": 1.0}})]
    assert world.server.status()["pending_placement_groups"][GROUP.hex()].startswith("waits until nodes hold")


def test_who_is_no_raylet_holds_nothing(world: World) -> None:
    started(world)
    other = world.client(b"o" * 16)
    assert world.run(other, c.KvPut("ns", b"k", b"v")).ok
    assert other.send(BundlesHeld(((GROUP, 0),)))
    world.settle()
    assert other.connected and state(world) is GroupState.PREPARING
