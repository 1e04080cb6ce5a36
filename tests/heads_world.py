"""Several heads and their clients over real sockets in one process, driven by hand, with a clock moved by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gcs_world import Events
from wire_hosts import Clock, make_reactor, settle

from ftray.gcs.client import GcsClient
from ftray.gcs.raft_host import RaftHost
from ftray.gcs.state import commands as c
from ftray.gcs.state.tables import Result
from ftray.wire.reactor import Reactor

STEP_MS = 5.0
LIMIT_MS = 5_000.0


class Head:
    """One head: its folder, and, while it runs, its reactor and host."""

    def __init__(self, world: HeadsWorld, name: str) -> None:
        self.world = world
        self.directory = world.path / name
        self.endpoint = f"unix:{world.path}/{name}.sock"
        self.reactor: Reactor | None = None
        self.host: RaftHost | None = None
        self.failed: list[Exception] = []
        self.frozen = False

    def start(self, heads: list[str], join: bool = False) -> None:
        self.failed.clear()
        self.reactor = make_reactor(name=self.endpoint)
        self.host = RaftHost(
            self.reactor, self.directory, self.endpoint, heads, join=join, fsync=False, on_failed=self.failed.append
        )
        self.reactor.listen(self.endpoint, self.host.accept)

    def kill(self) -> None:
        """As SIGKILL does: links close, nobody is told anything more."""
        assert self.reactor is not None and self.host is not None
        self.reactor.close()
        self.host.replica.close()
        self.host._closed = True
        self.reactor = self.host = None
        os.unlink(self.endpoint.removeprefix("unix:"))

    @property
    def leads(self) -> bool:
        return self.host is not None and not self.frozen and self.host.replica.is_leader


class HeadsWorld:
    """See the module."""

    def __init__(self, path: Path, clock: Clock, count: int = 3) -> None:
        self.path = path
        self.clock = clock
        self.heads = [Head(self, f"h{index}") for index in range(count)]
        self.endpoints = [head.endpoint for head in self.heads]
        self.client_reactors: list[Reactor] = []
        self.clients: list[GcsClient] = []

    def start(self) -> None:
        for head in self.heads:
            head.start(self.endpoints)

    def client(
        self, endpoints: list[str] | None = None, node_id: bytes = b"", events: Events | None = None
    ) -> GcsClient:
        reactor = make_reactor(name="client")
        self.client_reactors.append(reactor)
        on_connected = None if events is None else events.note("connected")
        on_other = None if events is None else events.note("other")
        client = GcsClient(reactor, endpoints or self.endpoints, os.urandom(16), node_id, on_other, on_connected)
        client.several = len(client.endpoints) > 1  # as it would take it from addresses of TCP
        self.clients.append(client)
        return client

    def settle(self, ms: float = 0.0) -> None:
        """Lets all messages arrive, and then time pass in small steps."""
        self._settle()
        while ms > 0:
            self.clock.advance_ms(min(ms, STEP_MS))
            ms -= STEP_MS
            self._settle()

    def _settle(self) -> None:
        reactors = [head.reactor for head in self.heads if head.reactor is not None and not head.frozen]
        reactors += self.client_reactors
        for reactor in reactors:
            reactor.flush_dirty()
        settle(*reactors)

    def until(self, condition: Callable[[], Any], limit_ms: float = LIMIT_MS) -> Any:
        """Lets time pass until that holds; returns it."""
        waited_ms = 0.0
        self.settle()
        while not (found := condition()):
            assert waited_ms < limit_ms, "waited in vain"
            self.settle(STEP_MS)
            waited_ms += STEP_MS
        return found

    def leader(self) -> Head:
        """The head that leads; time passes until there is one."""

        def one() -> list[Head]:
            return [head for head in self.heads if head.leads]

        return self.until(one)[0]  # type: ignore[no-any-return]

    def run(self, client: GcsClient, command: c.AnyCommand, limit_ms: float = LIMIT_MS) -> Result:
        """One command, and its result."""
        results: list[Result] = []
        client.command(command, results.append)
        self.until(lambda: results, limit_ms)
        assert len(results) == 1
        return results[0]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        errors: list[str] = []
        for head in self.heads:
            if head.host is not None and head.reactor is not None:
                errors += head.reactor.handler_errors
                head.host.close()
                head.reactor.close()
        for reactor in self.client_reactors:
            errors += reactor.handler_errors
            reactor.close()
        assert errors == []


