"""The node's end of the template: starts it, sends it requests, hears its reports, replaces it when it dies.

Role: shell. The first template is forked from the node while that is still a plain program; a template that dies later
(its workers die with it) is replaced by an executed one, which costs the interpreter's start once.

Rejected: letting the node end with its template (a stray `kill` would cost all objects and jobs).
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ftray.raylet import template
from ftray.raylet.template import MESSAGE_BYTES_MAX, Report, Request, decode_report, run_template
from ftray.wire.reactor import Reactor

log = logging.getLogger("ftray.raylet")

WORKER_ENTRY = "ftray.worker.main:worker_main"
WORKER_START = "ftray.worker.start:WorkerStart"
RESEND_MS = 2.0
RESTART_FIRST_MS = 100.0
RESTART_MAX_MS = 10_000.0
CLOSE_MS = 2_000


class TemplateSpec(NamedTuple):
    """How to make a template."""

    arena_fd: int
    log_path: str
    entry: str = WORKER_ENTRY
    start_type: str = WORKER_START


class TemplateProcess:
    """A running template: its process, and our end of the socketpair."""

    __slots__ = ("pid", "sock")

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock


def fork_template(spec: TemplateSpec) -> TemplateProcess:
    """Forks a template. Only before trio and threads. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent_pid = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        kept = (spec.arena_fd,) if spec.arena_fd >= 0 else ()
        run_template(theirs, parent_pid, spec.entry, spec.start_type, kept, spec.log_path)
    theirs.close()
    return TemplateProcess(pid, ours)


def spawn_template(spec: TemplateSpec) -> TemplateProcess:
    """Executes a template, from a process that can't fork safely. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    top = max(theirs.fileno(), spec.arena_fd, 2) + 1
    inherited = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), top)]
    if spec.arena_fd >= 0:
        # Onto itself: that takes off close-on-exec, and workers find the arena under the same number as ever.
        inherited.append((os.POSIX_SPAWN_DUP2, spec.arena_fd, spec.arena_fd))
    # With this process's path, whatever has become of it: the starter may have had it from anywhere.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {template.__name__} import main; main(sys.argv[1:])"
    command = [
        sys.executable, "-P", "-c", code, str(top), str(os.getpid()),
        spec.entry, spec.start_type, str(spec.arena_fd), spec.log_path,
    ]  # fmt: skip
    try:
        pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=inherited)
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return TemplateProcess(pid, ours)


class Forker:
    """Talks to the template on the reactor.

    `on_report` gets its reports. `on_lost(how)` is told that it died, and all workers with it; `on_restarted` that
    there is one again.
    """

    def __init__(
        self,
        reactor: Reactor,
        spec: TemplateSpec,
        process: TemplateProcess,
        on_report: Callable[[Report], None],
        on_lost: Callable[[str], None],
        on_restarted: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.running = True
        self._reactor = reactor
        self._process = process
        self._on_report = on_report
        self._on_lost = on_lost
        self._on_restarted = on_restarted
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._resend_due = False
        self._closed = False
        self._restarts = 0
        self._watch()

    @property
    def pid(self) -> int:
        """The template's process id."""
        return self._process.pid

    def _watch(self) -> None:
        sock = self._process.sock
        sock.setblocking(False)
        self._reactor.watch(sock.fileno(), self._readable)

    def send(self, request: Request, fds: tuple[int, ...] = ()) -> None:
        """Sends a request; `fds` are closed here once they are sent."""
        self._queue.append((template.encode(request), fds))
        if not self._resend_due:
            self._flush()

    def _flush(self) -> None:
        self._resend_due = False
        while self._queue:
            data, fds = self._queue[0]
            try:
                if fds:
                    socket.send_fds(self._process.sock, [data], list(fds))
                else:
                    self._process.sock.send(data)
            except BlockingIOError:  # it is busy forking; nothing tells when a queue of packets has room
                self._resend_due = True
                self._reactor.call_later(RESEND_MS, self._flush)
                return
            except OSError:
                return  # end-of-file follows
            self._queue.popleft()
            _close(fds)

    def _readable(self) -> None:
        for _ in range(32):
            try:
                data = self._process.sock.recv(MESSAGE_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lost()
                return
            self._restarts = 0
            self._on_report(decode_report(data))

    def _lost(self) -> None:
        self.running = False
        self._reactor.unwatch(self._process.sock.fileno())
        self._process.sock.close()
        while self._queue:
            _close(self._queue.popleft()[1])
        how = self._wait()
        if self._closed:
            return
        log.error("the template process %d %s; all workers died with it", self.pid, how)
        pause_ms = min(RESTART_FIRST_MS * 2 ** min(self._restarts, 10), RESTART_MAX_MS) if self._restarts else 0
        self._restarts += 1
        self._reactor.call_later(pause_ms, self._restart)
        self._on_lost(how)

    def _restart(self) -> None:
        if self._closed:
            return
        try:
            self._process = spawn_template(self.spec)
        except OSError as error:
            log.error("cannot start a template process: %s", error)
            self._restarts += 1
            self._reactor.call_later(RESTART_MAX_MS, self._restart)
            return
        self.running = True
        self._watch()
        self._on_restarted()

    def _wait(self) -> str:
        try:
            os.kill(self.pid, signal.SIGKILL)  # it has closed its socket: it is dead or of no use
            _, status = os.waitpid(self.pid, 0)
        except (ChildProcessError, ProcessLookupError):
            return "is gone"
        code = os.waitstatus_to_exitcode(status)
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    def close(self) -> None:
        """Ends the template, which ends all workers and reaps them; waits for that. Not on the reactor any more."""
        self._closed = True
        while self._queue:
            _close(self._queue.popleft()[1])
        if not self.running:
            return
        self.running = False
        self._process.sock.close()
        try:
            pidfd = os.pidfd_open(self.pid)
            try:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if not poll.poll(CLOSE_MS):
                    log.error("the template process %d does not end: killing it", self.pid)
                    os.kill(self.pid, signal.SIGKILL)
            finally:
                os.close(pidfd)
            os.waitpid(self.pid, 0)
        except (ChildProcessError, ProcessLookupError):
            pass


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)
