"""What the leading head does by itself: dead nodes, actors' starts and stops, ended jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs_world import ACTOR, JOB, NODE, WORKER, Events, World, gcs_world, raylet, register_actor

from ftray.gcs import journal as journal_module
from ftray.gcs.client import RECONNECT_MAX_MS
from ftray.gcs.state import commands as c
from ftray.gcs.state.commands import encode_command
from ftray.gcs.state.tables import ActorState, Change, Code, NodeState, Table
from ftray.wire import messages as m
from ftray.wire.reactor import Link


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with gcs_world(tmp_path, monkeypatch) as world:
        yield world


def test_an_actors_way_from_registration_to_its_end(world: World) -> None:
    events = Events()
    node, driver = raylet(world, events), world.client(WORKER)
    assert world.add_job(driver).ok
    actors: list[Change] = []
    driver.watch([Table.ACTORS], [ACTOR], actors.append)
    assert world.run(driver, register_actor("name")).value == ACTOR
    [start] = events.of("other")
    assert isinstance(start, m.StartActor)
    assert (start.actor_id, start.incarnation, start.job_id, start.owner) == (ACTOR, 0, JOB, WORKER)
    placed = world.replica.state.actor(ACTOR)
    assert placed is not None and placed.state is ActorState.PLACING
    alive = c.ActorAlive(ACTOR, 0, b"x" * 16, "unix:/x", NODE, 77)
    assert world.run(node, alive).ok
    assert actors[-1].record is not None and actors[-1].record.state is ActorState.ALIVE  # type: ignore[union-attr]
    assert world.run(driver, c.ActorOutOfScope(ACTOR, WORKER)).ok
    stop = events.of("other")[-1]
    assert isinstance(stop, m.StopActor)
    assert (stop.actor_id, stop.incarnation, stop.graceful) == (ACTOR, 0, True)
    assert world.run(node, c.ActorDied(ACTOR, 0, c.DeathCauseRecord())).ok
    ended = world.replica.state.actor(ACTOR)
    assert ended is not None and ended.state is ActorState.DEAD and ended.leftover is None


def test_the_node_is_asked_only_when_the_placement_is_durable(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    raylet(world, events)
    driver = world.client(WORKER)
    world.add_job(driver)
    order: list[str] = []
    sync, send = journal_module.Journal.sync, Link.send

    def noted_sync(journal: Any) -> None:
        sync(journal)
        order.append("sync")

    def noted_send(link: Link, message: m.Message, payload: Any = b"") -> None:
        if isinstance(message, m.StartActor | m.GcsResult):
            order.append(type(message).__name__)
        send(link, message, payload)

    monkeypatch.setattr(journal_module.Journal, "sync", noted_sync)
    monkeypatch.setattr(Link, "send", noted_send)
    world.run(driver, register_actor())
    assert order == ["sync", "GcsResult", "sync", "StartActor"]


def test_effects_wait_for_a_raylet_that_is_not_connected(world: World) -> None:
    events = Events()
    node = raylet(world, events)
    driver = world.client(WORKER)
    world.add_job(driver)
    [link] = [link for link in world.server._links if link.peer.node_id]
    reactor = node.reactor
    world.reactors.remove(reactor)  # the raylet is busy: it neither reads nor connects
    world.reactor.drop(link, "a cut")
    world.run(driver, register_actor())
    assert events == []
    world.run(driver, c.FinishJob(JOB))
    world.reactors.append(reactor)
    world.settle(RECONNECT_MAX_MS)
    kinds = {type(message) for message in events.of("other")}
    assert kinds == {m.StopActor, m.JobEnded}


def test_a_start_that_was_lost_with_the_link_is_told_again(world: World) -> None:
    events = Events()
    raylet(world, events)
    driver = world.client(WORKER)
    world.add_job(driver)
    world.run(driver, register_actor())
    assert len(events.of("other")) == 1
    [link] = [link for link in world.server._links if link.peer.node_id]
    world.reactor.drop(link, "a cut")
    world.settle(RECONNECT_MAX_MS)
    assert [(type(message), message.incarnation) for message in events.of("other")] == [(m.StartActor, 0)] * 2


def test_a_new_leader_carries_on_with_what_was_begun(world: World) -> None:
    events = Events()
    driver = world.client(WORKER)
    node = world.client(NODE, NODE, events)
    assert world.add_node(node).ok
    world.add_job(driver)
    world.replica.submit(WORKER, 100, encode_command(register_actor()))  # committed, and the head dies
    world.restart()
    world.settle(RECONNECT_MAX_MS)
    assert [type(message) for message in events.of("other")] == [m.StartActor]


def test_a_silent_node_is_declared_dead_and_fenced(world: World) -> None:
    events = Events()
    node = raylet(world, events)
    driver = world.client(WORKER)
    nodes: list[Change] = []
    driver.watch([Table.NODES], None, nodes.append)
    for _ in range(30):
        node.send(m.GcsHeartbeat(NODE, {"CPU": 2.0}))
        world.settle(100)
    assert world.server.loads == {NODE: {"CPU": 2.0}}
    record = world.replica.state.node(NODE)
    assert record is not None and record.state is NodeState.ALIVE
    world.settle(1_500)  # not a word
    record = world.replica.state.node(NODE)
    assert record is not None and record.state is NodeState.DEAD
    assert record.cause is not None and "heartbeat" in record.cause.reason
    assert nodes[-1].record is not None and nodes[-1].record.state is NodeState.DEAD  # type: ignore[union-attr]
    [fenced] = events.of("other")
    assert isinstance(fenced, m.NodeFenced) and "heartbeat" in fenced.reason
    assert world.server.loads == {}


def test_a_node_that_was_declared_dead_is_fenced_when_it_comes_back(world: World) -> None:
    events = Events()
    node = raylet(world, events)
    driver = world.client(WORKER)
    assert world.run(driver, c.MarkNodeDead(NODE, 1, c.DeathCauseRecord(reason="drained"))).ok
    world.settle(RECONNECT_MAX_MS)  # it has been told once, and connects anew
    assert node.connected
    node.send(m.GcsHeartbeat(NODE, {}))
    world.settle()
    fenced = events.of("other")
    assert [type(message) for message in fenced] == [m.NodeFenced, m.NodeFenced]
    assert "drained" in fenced[-1].reason
    world.settle(RECONNECT_MAX_MS)
    assert world.add_node(node).code is Code.FENCED
    world.settle(RECONNECT_MAX_MS)
    assert world.add_node(node, incarnation=2).ok
    node.send(m.GcsHeartbeat(NODE, {}))
    world.settle()
    assert len(events.of("other")) == 2
    assert node.connected


def test_a_node_whose_process_is_gone_is_dead_at_once(world: World) -> None:
    events = Events()
    node = raylet(world, events)
    world.clients.remove(node)
    world.reactors.remove(node.reactor)
    node.reactor.close()
    world.settle()
    record = world.replica.state.node(NODE)
    assert record is not None and record.state is NodeState.DEAD
    assert record.cause is not None and "refused" in record.cause.reason


def test_a_node_whose_link_breaks_but_who_is_there_lives(world: World) -> None:
    events = Events()
    node = raylet(world, events)
    [link] = [link for link in world.server._links if link.peer.node_id]
    world.reactor.drop(link, "a cut")
    world.settle(300)
    record = world.replica.state.node(NODE)
    assert record is not None and record.state is NodeState.ALIVE
    assert node.connected


def test_the_actor_of_a_dead_node_starts_on_another(world: World) -> None:
    events, later = Events(), Events()
    driver = world.client(WORKER)
    owner_node, other_node = b"o" * 16, b"p" * 16
    assert world.run(driver, c.RegisterNode(owner_node, "unix:/o", {}, {}, 1, "host", 1)).ok
    assert world.run(driver, c.AddJob(JOB, WORKER, 2, owner_node, "main.py", "")).ok
    node = raylet(world, events)
    command = c.RegisterActor(
        ACTOR, JOB, WORKER, owner_node, "Counter", max_restarts=1, resources={"CPU": 1.0}, creation=b"spec"
    )
    assert world.run(driver, command).ok
    assert world.run(node, c.ActorAlive(ACTOR, 0, b"x" * 16, "unix:/x", NODE, 77)).ok
    assert world.run(driver, c.MarkNodeDead(NODE, 1, c.DeathCauseRecord(reason="killed"))).ok
    waiting = world.replica.state.actor(ACTOR)
    assert waiting is not None and waiting.state is ActorState.RESTARTING
    raylet(world, later, other_node)
    starts = [message for message in later.of("other") if isinstance(message, m.StartActor)]
    assert [(start.actor_id, start.incarnation) for start in starts] == [(ACTOR, 1)]


def test_the_end_of_a_job_is_told_to_raylets(world: World) -> None:
    events = Events()
    raylet(world, events)
    driver = world.client(WORKER)
    world.add_job(driver)
    assert world.run(driver, c.FinishJob(JOB)).ok
    assert events.of("other") == [m.JobEnded(JOB)]


def test_status_names_what_an_actor_waits_for(world: World) -> None:
    events = Events()
    raylet(world, events)
    driver = world.client(WORKER)
    world.add_job(driver)
    command = c.RegisterActor(ACTOR, JOB, WORKER, NODE, "Big", resources={"CPU": 64.0}, creation=b"spec")
    assert world.run(driver, command).ok
    status = world.server.status()
    assert status["leads"] and status["connected_nodes"] == [NODE.hex()]
    assert "64 CPU" in status["pending_actors"][ACTOR.hex()]


def test_a_node_that_leaves_is_not_fenced(world: World) -> None:
    events = Events()
    node = raylet(world, events)
    assert world.run(node, c.MarkNodeDead(NODE, 1, c.DeathCauseRecord(reason="it stops"))).ok
    world.settle(100)
    assert events == []
    assert node.connected
