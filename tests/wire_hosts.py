"""Reactors driven by hand, for tests: no threads, no sleeping, and a clock that only moves when told to.

`settle` polls reactors in turn until none has anything to read: between sockets of one machine, what was sent is there
to be read at once, so nothing has to be waited for.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from ftray.config import Config
from ftray.wire import reactor as reactor_module
from ftray.wire.handshake import ROLE_CLIENT, ClientHandshake
from ftray.wire.messages import Message
from ftray.wire.reactor import Link, Reactor

TOKEN = b"token" * 6
CLUSTER = b"c" * 16
ROUNDS_MAX = 10_000


class Clock:
    """Stands in for the `time` module in the reactor."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def advance_ms(self, ms: float) -> None:
        self.now_s += ms / 1000.0


def install_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """From now on all reactors of this test read this clock."""
    clock = Clock()
    monkeypatch.setattr(reactor_module, "time", clock)
    return clock


def settle(*reactors: Reactor) -> None:
    """Polls until nothing happens any more. Timers that are due run too."""
    quiet = 0
    for _ in range(ROUNDS_MAX):
        happened = False
        for one in reactors:
            happened = one.poll(0) or happened
        quiet = 0 if happened else quiet + 1
        if quiet == 3:
            return
    raise AssertionError("the reactors never came to rest")


@dataclass
class Recorder:
    """A handler that notes what it is told; `answer` makes it echo each message."""

    answer: bool = False
    messages: list[Message] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        self.messages.append(message)
        self.payloads.append(bytes(payload))
        if self.answer:
            link.send(message, payload)

    def on_closed(self, link: Link, reason: str) -> None:
        self.closed.append(reason)
        self.errors.append(link.error)

    def accept(self, link: Link) -> Recorder:
        self.links.append(link)
        return self


def make_reactor(token: bytes = TOKEN, cluster: bytes = CLUSTER, name: str = "", **settings: Any) -> Reactor:
    return Reactor(Config(**settings), token, cluster, name=name)


class RawPeer:
    """A peer that sends whatever bytes it is told to, over a unix socket, after a proper handshake if asked for one."""

    def __init__(self, endpoint: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(endpoint.removeprefix("unix:"))
        self.sock.setblocking(False)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> bytes:
        """What has arrived; empty both when nothing has and at end-of-file."""
        try:
            return self.sock.recv(1 << 20)
        except (BlockingIOError, ConnectionResetError):
            return b""

    def is_cut_off(self) -> bool:
        """Whether the other side has closed."""
        try:
            while self.sock.recv(1 << 20):
                pass
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        return True

    def authenticate(self, server: Reactor, token: bytes = TOKEN, role: int = ROLE_CLIENT) -> None:
        handshake = ClientHandshake(token, role, CLUSTER, os.urandom(32))
        self.send(handshake.hello)
        settle(server)
        self.send(handshake.receive(self.receive()))
        settle(server)
        handshake.receive(self.receive())
        assert handshake.done

    def close(self) -> None:
        self.sock.close()
