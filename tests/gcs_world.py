"""A head and its clients over real sockets, driven by hand: no threads, no waiting, a clock that moves when told to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from wire_hosts import CLUSTER, Clock, RawPeer, install_clock, make_reactor, settle

from ftray.gcs.client import GcsClient
from ftray.gcs.replica import SingleReplica
from ftray.gcs.server import GcsServer
from ftray.gcs.state import commands as c
from ftray.gcs.state.tables import Result
from ftray.wire import messages as m
from ftray.wire.frames import FrameDecoder, encode_frame
from ftray.wire.handshake import ROLE_GCS
from ftray.wire.reactor import Reactor

NODE, WORKER, ACTOR, JOB = b"n" * 16, b"w" * 16, b"a" * 16, b"job1"
CLIENT = b"c" * 16


class Events(list[tuple[str, Any]]):
    """What happened, in order."""

    def note(self, what: str) -> Any:
        return lambda *values: self.append((what, values[0] if len(values) == 1 else values))

    def of(self, what: str) -> list[Any]:
        return [value for name, value in self if name == what]


class World:
    """A head with one replica on disk, and any number of clients, each in a reactor of its own."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self.clock = clock
        self.endpoint = f"unix:{path}/gcs"
        self.reactors: list[Reactor] = []
        self.clients: list[GcsClient] = []
        self.start()

    def start(self, **settings: Any) -> None:
        self.reactor = make_reactor(name="gcs", **settings)
        self.reactors.append(self.reactor)
        self.replica = SingleReplica(self.path / "gcs-dir", CLUSTER, fsync=False)
        self.server = GcsServer(self.reactor, self.replica, self.reactor.config)
        self.reactor.listen(self.endpoint, self.server.accept)

    def stop(self) -> None:
        """The head dies: links break, what is in memory is gone."""
        self.reactors.remove(self.reactor)
        self.reactor.close()
        self.server.close()
        self.replica.close()
        os.unlink(f"{self.path}/gcs")

    def restart(self, **settings: Any) -> None:
        self.stop()
        self.start(**settings)

    def client(self, client_id: bytes = CLIENT, node_id: bytes = b"", events: Events | None = None) -> GcsClient:
        reactor = make_reactor(name="client")
        self.reactors.append(reactor)
        on_other = None if events is None else (lambda message, payload: events.append(("other", message)))
        client = GcsClient(reactor, [self.endpoint], client_id, node_id, on_other)
        self.clients.append(client)
        return client

    def settle(self, ms: float = 0.0) -> None:
        """Lets all messages arrive, and then time pass in small steps."""
        self._settle()
        while ms > 0:
            self.clock.advance_ms(min(ms, 10.0))
            ms -= 10.0
            self._settle()

    def _settle(self) -> None:
        for reactor in self.reactors:
            reactor.flush_dirty()
        settle(*self.reactors)

    def run(self, client: GcsClient, command: c.AnyCommand) -> Result:
        """One command, and its result."""
        results: list[Result] = []
        client.command(command, results.append)
        self.settle()
        assert len(results) == 1
        return results[0]

    def add_node(self, client: GcsClient, node_id: bytes = NODE, incarnation: int = 1, endpoint: str = "") -> Result:
        command = c.RegisterNode(
            node_id, endpoint or f"unix:{self.path}/nobody", {"CPU": 2.0}, {}, incarnation, "host", 1
        )
        return self.run(client, command)

    def add_job(self, client: GcsClient) -> Result:
        return self.run(client, c.AddJob(JOB, WORKER, 2, NODE, "main.py", ""))

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()
        self.replica.close()
        for reactor in self.reactors:
            errors = reactor.handler_errors
            reactor.close()
            assert errors == []


@contextmanager
def gcs_world(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world that is taken down at the end, when no handler may have failed."""
    world = World(path, install_clock(monkeypatch))
    try:
        yield world
    finally:
        world.close()


def put(key: bytes, value: bytes = b"v", overwrite: bool = True) -> c.KvPut:
    return c.KvPut("ns", key, value, overwrite)


def register_actor(name: str = "", creation: bytes = b"spec") -> c.RegisterActor:
    return c.RegisterActor(ACTOR, JOB, WORKER, NODE, "Counter", name=name, resources={"CPU": 1.0}, creation=creation)


class RawClient:
    """Sends single GCS messages, and reads what comes back."""

    def __init__(self, world: World, client_id: bytes = CLIENT) -> None:
        self.world = world
        self.peer = RawPeer(world.endpoint)
        self.peer.authenticate(world.reactor, role=ROLE_GCS)
        self.decoder = FrameDecoder(1 << 30)
        self.send(m.GcsHello(client_id))

    def send(self, message: m.Message, payload: bytes = b"") -> None:
        header = m.encode(message)
        self.peer.send(encode_frame(header, len(payload)) + payload)

    def received(self) -> list[tuple[Any, bytes]]:
        self.world.settle()
        return [(m.decode(header), bytes(payload)) for header, payload in self.decoder.feed(self.peer.receive())]

    def close(self) -> None:
        self.peer.close()


def raylet(world: World, events: Events, node_id: bytes = NODE) -> GcsClient:
    """A node that is there: what connects to its endpoint is not refused."""
    client = world.client(node_id, node_id, events)
    endpoint = client.reactor.listen(f"unix:{world.path}/{node_id.hex()}", lambda link: None)
    assert world.add_node(client, node_id, endpoint=endpoint).ok
    return client
