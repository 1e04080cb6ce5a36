"""The GCS client: connecting, moving on, and what it says when nobody answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from gcs_world import CLIENT, NODE, Events, World, gcs_world, put
from wire_hosts import CLUSTER, make_reactor

from ftray.gcs.client import RECONNECT_MAX_MS, GcsClient
from ftray.gcs.replica import Request
from ftray.gcs.server import GcsServer
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Change, Code, Result, Table


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with gcs_world(tmp_path, monkeypatch) as world:
        yield world


def test_a_client_connects_when_it_is_first_used(world: World) -> None:
    client = world.client()
    world.settle(100)
    assert not client.connected and not world.server._links
    assert world.run(client, put(b"k")).ok
    assert client.connected


def test_a_client_tries_all_endpoints_and_says_what_is_wrong_with_each(world: World) -> None:
    reactor = make_reactor()
    world.reactors.append(reactor)
    client = GcsClient(reactor, [f"unix:{world.path}/x", "nonsense", f"unix:{world.path}/y"], CLIENT)
    world.clients.append(client)
    results: list[Result] = []
    client.command(put(b"k"), results.append)
    world.settle(RECONNECT_MAX_MS)
    assert results == []
    text = str(client.unavailable())
    assert "/x" in text and "not an endpoint" in text and "/y" in text
    client.endpoints.append(world.endpoint)
    world.settle(4 * RECONNECT_MAX_MS)
    assert [result.code for result in results] == [Code.OK]
    assert client.failures == {}


def test_closing_a_client_answers_what_still_waits(world: World) -> None:
    world.stop()
    client = world.client()
    events = Events()
    client.command(put(b"k"), events.note("command"))
    client.read(Table.KV, b"k", events.note("read"), on_error=events.note("error"))
    client.close()
    client.close()
    assert events.of("command")[0].code is Code.SESSION_EXPIRED
    assert events.of("error")[0][0] is Code.SESSION_EXPIRED
    client.command(put(b"k"), events.note("late"))
    assert events.of("late")[0].code is Code.SESSION_EXPIRED
    world.settle(100)
    world.start()


def test_a_client_learns_of_connections_and_losses(world: World) -> None:
    reactor = make_reactor()
    world.reactors.append(reactor)
    told: list[bool] = []
    client = GcsClient(reactor, [world.endpoint], CLIENT, NODE, on_connected=told.append)
    world.clients.append(client)
    assert world.run(client, put(b"k")).ok
    world.stop()
    world.settle()
    assert told == [True, False]
    world.start()
    world.settle(RECONNECT_MAX_MS)  # a raylet comes back by itself
    assert told == [True, False, True]


def test_a_wrong_token_is_named(world: World) -> None:
    reactor = make_reactor(token=b"wrong")
    world.reactors.append(reactor)
    client = GcsClient(reactor, [world.endpoint], CLIENT)
    world.clients.append(client)
    client.command(put(b"k"), lambda result: None)
    world.settle(20)
    assert "FTRAY_TOKEN" in str(client.unavailable())


class Follower:
    """A replica that does not lead."""

    is_leader = False

    def __init__(self, leader_hint: str) -> None:
        self.state = GcsState(CLUSTER)
        self.leader_hint = leader_hint

    def propose(self, request: Request, reply: Callable[[Result], None]) -> None:
        raise AssertionError("commands are the leader's")

    def flush(self) -> None:
        pass

    def next_wake_ms(self) -> float:
        return float("inf")

    def confirm(self, confirmed: Callable[[bool], None]) -> None:
        raise AssertionError("there are no reads in this test")

    def on_change(self, callback: Callable[[Sequence[Change]], None]) -> Callable[[], None]:
        return lambda: None

    def on_reset(self, callback: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None:
        pass


@pytest.mark.parametrize("named", [True, False], ids=["the follower names the leader", "nobody is named"])
def test_commands_find_the_leader(world: World, named: bool) -> None:
    head = make_reactor()
    world.reactors.append(head)
    follower = GcsServer(head, Follower(world.endpoint if named else ""), head.config)
    endpoint = head.listen(f"unix:{world.path}/follower", follower.accept)
    client = world.client()
    client.endpoints = [endpoint] if named else [endpoint, world.endpoint]
    results: list[Result] = []
    client.command(put(b"k"), results.append)
    world.settle(100)
    assert [result.code for result in results] == [Code.OK]
    follower.close()
