"""The template: a warm, single-threaded process that becomes workers by forking.

Role: shell. The node forks it before it starts trio or a thread, so that a fork here is safe and takes a few
milliseconds. It imports what workers need, then does three things only: fork on request, kill on request, reap.

    node -> template   Fork (with the write ends of the worker's stdout and stderr as SCM_RIGHTS), Kill
    template -> node   Forked | ForkFailed, Reaped

Rules:
- It holds no descriptor of the node but its end of the socketpair, the arena and the log.
- Kills go through here, because only the parent can be sure that a process id still means the child it knows. A
  worker leads a process group; what it started goes with it, whether it is killed or ends by itself.
- It ends with the node: at end-of-file, and by SIGTERM as its parent-death signal; all workers are killed first.
  Should it be killed itself, the workers' parent-death signal ends them.

Rejected: `multiprocessing.forkserver` (a second protocol, no descriptors of ours, no process groups); forking from
the node (threads, sockets and a running loop would be inherited); signalfd (not in the standard library; the wake-up
descriptor does the same).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
import types
from array import array
from collections import deque
from typing import Any, NoReturn

import msgspec

MESSAGE_BYTES_MAX = 1 << 16
LATER_MS = 500
LATER = ("asyncio", "concurrent.futures")
"""Imported when nothing has been asked for `LATER_MS`: what many workers want, but not the first ones."""
_FDS = array("i")
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36


class Fork(msgspec.Struct, array_like=True, tag=1):
    """`start` is the `WorkerStart` of the worker, encoded. Two descriptors come with it."""

    worker_id: bytes
    start: bytes


class Kill(msgspec.Struct, array_like=True, tag=2):
    worker_id: bytes


class Forked(msgspec.Struct, array_like=True, tag=3):
    worker_id: bytes
    pid: int


class ForkFailed(msgspec.Struct, array_like=True, tag=4):
    worker_id: bytes
    error: str


class Reaped(msgspec.Struct, array_like=True, tag=5):
    """`status` is an exit code, or the negative number of a signal."""

    worker_id: bytes
    pid: int
    status: int


Request = Fork | Kill
Report = Forked | ForkFailed | Reaped
encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(Request).decode
decode_report = msgspec.msgpack.Decoder(Report).decode

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent(parent_pid: int, signum: int) -> None:
    """Asks for `signum` when the parent dies; ends this process at once if it has died already."""
    _prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)


def name_process(name: str) -> None:
    """The name in `ps` and `top` (15 characters)."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)


class Template:
    """The template's own side. `entry` is `module:function`, called with the decoded start in each forked worker."""

    def __init__(self, sock: socket.socket, entry: str, start_type: str, kept_fds: tuple[int, ...]) -> None:
        self._sock = sock
        self._entry = entry
        self._start_type = start_type
        self._kept_fds = kept_fds
        """What workers inherit (the arena)."""
        self._workers: dict[int, bytes] = {}
        self._pids: dict[bytes, int] = {}
        self._queue: deque[tuple[Fork, tuple[int, ...]]] = deque()
        self._over = False
        self._pid = os.getpid()

    def run(self) -> NoReturn:
        """Serves until the node is gone."""
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        signal.signal(signal.SIGTERM, self._terminate)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        function, start_type = self._warm_up()
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(wake_r, select.POLLIN)
        later: tuple[str, ...] = LATER
        while not self._over:
            ready = poll.poll(0 if self._queue else LATER_MS if later else None)
            if not ready and not self._queue and later:
                self._import_later(later)
                later = ()
                continue
            self._read_requests()
            try:
                os.read(wake_r, 4096)
            except BlockingIOError:
                pass
            self._reap()
            if self._queue and not self._over:
                self._fork(*self._queue.popleft(), function, start_type)
        self._end()

    def _terminate(self, signum: int, frame: object) -> None:
        self._over = True

    def _warm_up(self) -> tuple[Any, Any]:
        loaded = [getattr(importlib.import_module(path), name) for path, _, name in self._names()]
        sys.modules["__main__"] = types.ModuleType("__main__")  # a worker's main program is not the node's
        sys.argv = [""]
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection here would unshare pages for nothing
        return loaded[0], loaded[1]

    def _names(self) -> list[tuple[str, str, str]]:
        return [self._entry.partition(":"), self._start_type.partition(":")]

    @staticmethod
    def _import_later(names: tuple[str, ...]) -> None:
        for name in names:
            importlib.import_module(name)
        gc.freeze()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _read_requests(self) -> None:
        while not self._over:
            try:
                data, fds = receive(self._sock)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", ()
            if not data:
                self._over = True
                return
            request = _decode_request(data)
            if isinstance(request, Fork):
                self._queue.append((request, fds))
            else:
                self._kill(request.worker_id)

    def _kill(self, worker_id: bytes) -> None:
        pid = self._pids.get(worker_id)
        if pid is not None:
            _kill_group(pid)
            return
        for waiting in self._queue:
            if waiting[0].worker_id == worker_id:
                self._queue.remove(waiting)
                for fd in waiting[1]:
                    os.close(fd)
                self._report(ForkFailed(worker_id, "not wanted any more"))
                return

    def _fork(self, request: Fork, fds: tuple[int, ...], function: Any, start_type: Any) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # out of processes or memory
            self._report(ForkFailed(request.worker_id, f"cannot fork: {error.strerror}"))
        else:
            if pid == 0:
                self._become_worker(request, fds, function, start_type)
            try:
                os.setpgid(pid, pid)  # both sides do it, so that neither has to wait for the other
            except OSError:
                pass
            self._workers[pid] = request.worker_id
            self._pids[request.worker_id] = pid
            self._report(Forked(request.worker_id, pid))
        for fd in fds:
            os.close(fd)

    def _become_worker(self, request: Fork, fds: tuple[int, ...], function: Any, start_type: Any) -> NoReturn:
        code = 70
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            die_with_parent(self._pid, signal.SIGKILL)
            os.setpgid(0, 0)
            name_process("ftray:worker")
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(fds[0], 1)
            os.dup2(fds[1], 2)
            close_all_but(self._kept_fds)
            gc.enable()
            function(msgspec.msgpack.decode(request.start, type=start_type))
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    # --- the end of workers ------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            worker_id = self._workers.pop(pid, None)
            if worker_id is not None:
                _kill_group(pid)  # as long as it has not been reaped, its id means this group
            _, status = os.waitpid(pid, 0)
            if worker_id is not None:  # otherwise it was a grandchild that was left to us
                del self._pids[worker_id]
                self._report(Reaped(worker_id, pid, os.waitstatus_to_exitcode(status)))

    def _report(self, report: Report) -> None:
        try:
            self._sock.send(encode(report))
        except OSError:
            self._over = True

    def _end(self) -> NoReturn:
        for pid in self._workers:
            _kill_group(pid)
        for pid in self._workers:
            os.waitpid(pid, 0)
        os._exit(0)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:  # a member has become another user's: the leader is still ours
        os.kill(pid, signal.SIGKILL)


def receive(sock: socket.socket) -> tuple[bytes, tuple[int, ...]]:
    """One message and the descriptors that came with it, without waiting. Raises OSError.

    Not `socket.recv_fds`: it ignores its flags.
    """
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, ancillary, _, _ = sock.recvmsg(MESSAGE_BYTES_MAX, socket.CMSG_SPACE(2 * _FDS.itemsize), flags)
    fds = array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, tuple(fds)


def close_all_but(fds: tuple[int, ...]) -> None:
    """Closes every descriptor above 2 that is not one of these."""
    start = 3
    for fd in sorted(fds):
        os.closerange(start, fd)
        start = max(start, fd + 1)
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


def run_template(
    sock: socket.socket, parent_pid: int, entry: str, start_type: str, kept_fds: tuple[int, ...], log_path: str
) -> NoReturn:
    """Turns this process, a fresh child of the node, into the template. Never returns."""
    try:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what workers leave behind is reaped here
        die_with_parent(parent_pid, signal.SIGTERM)
        name_process("ftray:template")
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        close_all_but((sock.fileno(), *kept_fds))
        Template(sock, entry, start_type, kept_fds).run()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(70)


def main(arguments: list[str]) -> NoReturn:
    """A template that replaces one which died: executed, because the node can't fork safely any more."""
    fd, parent_pid, entry, start_type, arena_fd, log_path = arguments
    kept = (int(arena_fd),) if int(arena_fd) >= 0 else ()
    run_template(socket.socket(fileno=int(fd)), int(parent_pid), entry, start_type, kept, log_path)

