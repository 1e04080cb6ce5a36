"""Worker programs for tests of the raylet and its template: what a template forks instead of the real one.

They speak real messages, so that the raylet is tested without the rooms above it. A task is named by its function id:
see `FakeWorker.push`.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import msgspec

from ftray.config import Config
from ftray.wire import messages as m
from ftray.wire.handshake import ROLE_CLIENT, ROLE_TASK
from ftray.wire.reactor import Handler, Link, Reactor


class Start(msgspec.Struct, frozen=True):
    """Like the real one: what a worker is told at birth."""

    worker_id: bytes
    raylet_endpoint: str
    token: bytes
    cluster_id: bytes
    node_id: bytes
    arena_fd: int
    arena_bytes: int
    session_dir: str
    config: Config


class Order(msgspec.Struct, frozen=True):
    """For tests of the template alone: what the child is to do."""

    what: str
    argument: int = 0


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def obey(order: Order) -> None:
    """Entry for tests of the template."""
    if order.what == "exit":
        print("to stdout", flush=True)
        print("to stderr", file=sys.stderr, flush=True)
        os._exit(order.argument)
    elif order.what == "raise":
        raise RuntimeError("the entry raised")
    elif order.what == "signal":
        os.kill(os.getpid(), order.argument)
    elif order.what == "family":  # a child of its own, whose process id it prints
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        print(child, flush=True)
        if order.argument < 0:
            time.sleep(600)
        os._exit(order.argument)
    elif order.what == "report":
        signals = [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGTERM)]
        print(
            [fd for fd in range(4096) if is_open(fd)],
            os.getpgid(0) == os.getpid(),
            [each is signal.SIG_DFL for each in signals],
            signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            os.read(0, 1) == b"",
            vars(sys.modules["__main__"]).get("__file__"),
            flush=True,
        )
    else:
        time.sleep(600)


class FakeWorker:
    """A worker that does as the task's function id says, and exits when it is told to."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.endpoint = f"unix:{start.session_dir}/sockets/w-{start.worker_id.hex()[:12]}.sock"
        self.reactor = Reactor(start.config, start.token, start.cluster_id, name="fake worker")
        self.raylet: Link | None = None
        self.assigned: m.WorkerAssigned | None = None
        self.early: list[tuple[Link, m.PushTask, bytes]] = []
        """Tasks that came before `WorkerAssigned`, which takes another way."""

    def run(self) -> None:
        reactor = self.reactor
        reactor.listen(self.endpoint, lambda link: self if link.role == ROLE_TASK else None)
        with reactor.lock:
            self.raylet = reactor.connect(self.start.raylet_endpoint, ROLE_CLIENT, self)
            self.raylet.send(m.RegisterClient(self.start.worker_id, os.getpid(), self.endpoint, driver=False))
        with reactor.reader:
            while True:
                reactor.poll(min(reactor.next_timer_s(), 60.0))

    def accept(self, link: Link) -> Handler | None:
        return self if link.role == ROLE_TASK else None

    def on_message(self, link: Link, message: m.Message, payload: bytes | bytearray) -> None:
        raylet = self.raylet
        assert raylet is not None
        if isinstance(message, m.PushTask):
            if self.assigned is None:
                self.early.append((link, message, bytes(payload)))
            else:
                self.push(link, message, bytes(payload))
        elif isinstance(message, m.WorkerAssigned):
            self.assigned = message
            if message.environment and "NEVER READY" not in message.environment:
                raylet.send(m.EnvironmentReady("as the test wants it" if "FAKE" in message.environment else ""))
            for task in self.early:
                self.push(*task)
            self.early.clear()
        elif isinstance(message, m.CreateActor):
            what = bytes(payload).decode(errors="replace")
            if what == "raise":
                raylet.send(m.ActorReady(message.actor_id, message.incarnation, False), b"Traceback: it raised")
                raylet.send(m.Unregister("the actor's constructor raised"))
                raylet.flush()
                os._exit(0)
            elif what == "die":
                os.write(2, b"about to die\n")
                os.kill(os.getpid(), signal.SIGKILL)
            elif what != "hang":
                raylet.send(m.ActorReady(message.actor_id, message.incarnation, True))
        elif isinstance(message, m.ExitWorker):
            raylet.send(m.Unregister(message.reason))
            raylet.flush()
            os._exit(0)

    def push(self, link: Link, message: m.PushTask, payload: bytes) -> None:
        raylet = self.raylet
        assert raylet is not None
        what = message.function_id
        if what == b"echo":
            link.send(m.TaskDone(message.task_id, 1), payload)
        elif what == b"job":
            assert self.assigned is not None
            link.send(m.TaskDone(message.task_id, 1), self.assigned.job_id + self.assigned.cwd.encode())
        elif what == b"environment":
            assert self.assigned is not None
            link.send(m.TaskDone(message.task_id, 1), self.assigned.environment.encode())
        elif what == b"cpus":
            assert self.assigned is not None
            link.send(m.TaskDone(message.task_id, 1), str(self.assigned.num_cpus).encode())
        elif what == b"ready again":
            raylet.send(m.EnvironmentReady())
        elif what == b"print":
            os.write(1, b"\x01ftray-task:" + message.name.encode() + b"\n" + payload)
            link.send(m.TaskDone(message.task_id, 1))
        elif what == b"flood":
            os.write(1, (b"y" * 99 + b"\n") * int(payload))
            link.send(m.TaskDone(message.task_id, 1))
        elif what == b"die":
            os.write(2, b"these are my\nlast words\n")
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == b"exit":
            os._exit(int(payload))
        elif what == b"child":
            child = os.fork()
            if child == 0:
                time.sleep(600)
            link.send(m.TaskDone(message.task_id, 1), str(child).encode())
        elif what == b"block":
            raylet.send(m.WorkerBlocked())
            raylet.send(m.WorkerBlocked())
            link.send(m.TaskDone(message.task_id, 1))
        elif what == b"unblock":
            raylet.send(m.WorkerUnblocked())
            link.send(m.TaskDone(message.task_id, 1))
        elif what == b"name":
            raylet.send(m.TaskNames(payload.decode()))
            link.send(m.TaskDone(message.task_id, 1))
        elif what == b"demand":  # be an owner oneself
            raylet.send(m.LeaseDemand(1, int(payload), {"CPU": 1.0}, "nested"))
            link.send(m.TaskDone(message.task_id, 1))

    def on_closed(self, link: Link, reason: str) -> None:
        if link is self.raylet:
            os._exit(1)


def work(start: Start) -> None:
    """Entry of the fake worker."""
    FakeWorker(start).run()


def fail_to_start(start: Start) -> None:
    """Entry of a worker that is broken."""
    print("this worker is broken", file=sys.stderr, flush=True)
    os._exit(3)
