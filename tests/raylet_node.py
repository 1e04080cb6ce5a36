"""A real node process for tests, and a driver that speaks to it in messages. Workers are the fake ones of
`raylet_worker.py`.

Rules: nothing sleeps to wait for something; each wait is for a message or for an end-of-file, with a limit that only a
hanging program meets.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ftray.config import Config
from ftray.gcs.client import GcsClient
from ftray.gcs.state.commands import AnyCommand
from ftray.gcs.state.tables import ActorRecord, Change, Result, Table
from ftray.wire import messages as m
from ftray.wire.handshake import ROLE_CLIENT, ROLE_TASK, ROLE_TOOL
from ftray.wire.reactor import Link, Reactor

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 20.0
T = TypeVar("T", bound=m.Message)


def wait_gone(pid: int) -> None:
    """Waits until a process has ended. Raises if that takes long."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = poll.poll(LIMIT_S * 1000)
    os.close(pidfd)
    assert ended, f"process {pid} lives"


class NodeProcess:
    """A started node."""

    def __init__(self, **spec: Any) -> None:
        self.root = tempfile.mkdtemp(prefix="ft-", dir="/tmp")  # short, because paths of sockets must be
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ftray.raylet.main"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, start_new_session=True,
        )  # fmt: skip
        complete = {
            "num_cpus": 2, "memory": 1 << 30, "object_store_bytes": 16 << 20, "session_root": self.root,
            "worker_entry": "raylet_worker:work", "worker_start": "raylet_worker:Start", **spec,
        }  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(complete).encode() + b"\n")
        self.process.stdin.flush()
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        return Path(self.ready["session_dir"], "logs", "raylet.log").read_text()

    def children(self) -> list[int]:
        """The template, its workers, and what these have started."""
        found: list[int] = []
        todo = [self.pid]
        while todo:
            pid = todo.pop()
            try:
                text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            except OSError:
                continue
            children = [int(each) for each in text.split()]
            found += children
            todo += children
        return found

    def close(self) -> None:
        """Ends it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(LIMIT_S)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        shutil.rmtree(self.root, ignore_errors=True)


class Peer:
    """One end of links to a node: a driver, a tool, or something that behaves badly."""

    def __init__(self, node: NodeProcess) -> None:
        self.node = node
        ready = node.ready
        self.reactor = Reactor(Config(), bytes.fromhex(ready["token"]), bytes.fromhex(ready["cluster_id"]), name="test")
        self.received: list[tuple[Link, m.Message, bytes]] = []
        self.closed: dict[Link, str] = {}

    def on_message(self, link: Link, message: m.Message, payload: bytes | bytearray) -> None:
        self.received.append((link, message, bytes(payload)))

    def on_closed(self, link: Link, reason: str) -> None:
        self.closed[link] = reason

    def connect(self, endpoint: str, role: int) -> Link:
        with self.reactor.lock:
            return self.reactor.connect(endpoint, role, self)

    def send(self, link: Link, message: m.Message, payload: bytes = b"") -> None:
        with self.reactor.lock:
            link.send(message, payload)
            self.reactor.flush_dirty()

    def until(self, condition: Callable[[], Any]) -> Any:
        """Reads until the condition gives something true; returns that."""
        deadline = time.monotonic() + LIMIT_S
        with self.reactor.reader:
            while not (found := condition()):
                assert time.monotonic() < deadline, f"waited in vain; log:\n{self.node.log}"
                self.reactor.poll(min(1.0, self.reactor.next_timer_s()))
        return found

    def take(self, kind: type[T], link: Link | None = None) -> tuple[T, bytes]:
        """Waits for a message of this kind, and takes it out."""

        def find() -> tuple[T, bytes] | None:
            for index, (source, message, payload) in enumerate(self.received):
                if isinstance(message, kind) and link in (None, source):
                    del self.received[index]
                    return message, payload
            return None

        found: tuple[T, bytes] = self.until(find)
        return found

    def until_closed(self, link: Link) -> str:
        """Waits until the other side has closed the link."""
        reason: str = self.until(lambda: self.closed.get(link))
        return reason

    def close(self) -> None:
        self.reactor.close()


class Driver(Peer):
    """A registered driver."""

    def __init__(self, node: NodeProcess, **hello: Any) -> None:
        super().__init__(node)
        self.worker_id = os.urandom(16)
        self.link = self.connect(node.ready["raylet_endpoint"], ROLE_CLIENT)
        self.channels: dict[bytes, Link] = {}
        self.tasks = 0
        self.send(self.link, m.RegisterClient(self.worker_id, os.getpid(), "unix:/nowhere", True, **hello))
        self.registered, self.config = self.take(m.Registered)

    def say(self, message: m.Message) -> None:
        self.send(self.link, message)

    def lease(self, want: int = 1, class_id: int = 1, **resources: float) -> list[m.LeaseGranted]:
        """Wants so many leases, and waits for them."""
        self.say(m.LeaseDemand(class_id, want, resources or {"CPU": 1.0}, f"class{class_id}"))
        return [self.take(m.LeaseGranted)[0] for _ in range(want)]

    def push(self, grant: m.LeaseGranted, what: bytes, payload: bytes = b"", name: str = "task") -> Link:
        link = self.channels.get(grant.worker_id)
        if link is None:
            link = self.channels[grant.worker_id] = self.connect(grant.endpoint, ROLE_TASK)
        self.tasks += 1
        self.send(link, m.PushTask(self.tasks.to_bytes(16, "big"), what, 1, name=name), payload)
        return link

    def run(self, grant: m.LeaseGranted, what: bytes, payload: bytes = b"", name: str = "task") -> bytes:
        """Runs a fake task and returns its answer."""
        link = self.push(grant, what, payload, name)
        return self.take(m.TaskDone, link)[1]

    def cause(self, worker_id: bytes) -> dict[str, Any] | None:
        self.say(m.AskDeathCause(1, worker_id))
        return self.take(m.DeathCauseKnown)[0].cause


class Tool(Peer):
    """Asks a node questions."""

    def __init__(self, node: NodeProcess) -> None:
        super().__init__(node)
        self.link = self.connect(node.ready["raylet_endpoint"], ROLE_TOOL)

    def ask(self, what: str, **arguments: Any) -> Any:
        self.send(self.link, m.ToolQuery(1, what, arguments))
        reply, payload = self.take(m.ToolReply)
        assert not reply.error, reply.error
        return json.loads(payload)

    def ask_until(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Asks for the status again and again until the condition holds."""
        deadline = time.monotonic() + LIMIT_S
        while not condition(status := self.ask("status")):
            assert time.monotonic() < deadline, status
        return status


class GcsPeer(Peer):
    """A client of the node's GCS."""

    def __init__(self, node: NodeProcess) -> None:
        super().__init__(node)
        self.gcs = GcsClient(self.reactor, node.ready["gcs_endpoints"], os.urandom(16))

    def command(self, command: AnyCommand) -> Result:
        """Has a command carried out, and returns its result."""
        results: list[Result] = []
        with self.reactor.lock:
            self.gcs.command(command, results.append)
            self.reactor.flush_dirty()
        result: Result = self.until(lambda: results and results[0])
        return result

    def watch_actor(self, actor_id: bytes) -> list[ActorRecord]:
        """From now on, collects the states that the actor goes through."""
        seen: list[ActorRecord] = []

        def changed(change: Change) -> None:
            if isinstance(change.record, ActorRecord):
                seen.append(change.record)

        with self.reactor.lock:
            self.gcs.watch((Table.ACTORS,), (actor_id,), changed)
            self.reactor.flush_dirty()
        return seen

    def close(self) -> None:
        self.gcs.close()
        super().close()
