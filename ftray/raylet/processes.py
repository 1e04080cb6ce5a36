"""Worker processes: made through the template, listened to, killed, mourned.

Role: shell around `pool.py`. Knows each process from the request to fork it until the template has reaped it, with its
pipes and its exit status. What a worker serves is not known here.

Rules: `on_exit` is called once for each process, when it is reaped or the template is lost, after all its output has
been read; `on_failed` once for each that could not be forked.

Rejected: process ids as keys (they are drawn by the kernel, after the request, and come again).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

from ftray.raylet.forking import Forker, TemplateProcess, TemplateSpec
from ftray.raylet.logs import LogHub, WorkerLogs
from ftray.raylet.template import Fork, Forked, ForkFailed, Kill, Report
from ftray.wire.reactor import Reactor

log = logging.getLogger("ftray.raylet")


class Process:
    """A worker process."""

    __slots__ = ("err_r", "kill_reason", "logs", "out_r", "pid", "status", "worker_id")

    def __init__(self, worker_id: bytes, out_r: int, err_r: int) -> None:
        self.worker_id = worker_id
        self.pid = 0
        """0 until the template has forked it."""
        self.out_r = out_r
        self.err_r = err_r
        self.logs: WorkerLogs | None = None
        self.status: int | None = None
        """Exit code, or the negative number of a signal."""
        self.kill_reason = ""
        """Why this node killed it, if it did."""

    def stderr_tail(self) -> list[str]:
        """The last lines that it wrote to stderr."""
        return list(self.logs.tail) if self.logs is not None else []

    def running(self) -> str:
        """What it ran last, by its own markers."""
        if self.logs is None:
            return ""
        out, err = self.logs.streams
        return err.splitter.name or out.splitter.name


class Processes:
    """All worker processes of the node, under the reactor's lock."""

    def __init__(
        self,
        reactor: Reactor,
        template: TemplateProcess,
        spec: TemplateSpec,
        logs: LogHub,
        make_start: Callable[[bytes], bytes],
        on_exit: Callable[[Process], None],
        on_failed: Callable[[bytes, str], None],
        on_restarted: Callable[[], None],
    ) -> None:
        self.by_id: dict[bytes, Process] = {}
        self.forker = Forker(reactor, spec, template, self._on_report, self._on_lost, on_restarted)
        self._logs = logs
        self._make_start = make_start
        self._on_exit = on_exit
        self._on_failed = on_failed

    def fork(self, worker_id: bytes) -> bool:
        """Asks for a worker. False if that is not possible now (no template, no descriptors): try again later."""
        if not self.forker.running:
            return False
        fds: list[int] = []
        try:
            for _ in range(2):
                fds += os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            log.error("cannot start a worker: this process has no descriptors left (raise `ulimit -n`)")
            return False
        out_r, out_w, err_r, err_w = fds
        self.by_id[worker_id] = Process(worker_id, out_r, err_r)
        self.forker.send(Fork(worker_id, self._make_start(worker_id)), (out_w, err_w))
        return True

    def kill(self, worker_id: bytes, reason: str) -> bool:
        """SIGKILL for the worker and all that it started. False if there is no such process any more."""
        process = self.by_id.get(worker_id)
        if process is None or process.status is not None:
            return False
        if not process.kill_reason:
            process.kill_reason = reason
            self.forker.send(Kill(worker_id))
        return True

    def _on_report(self, report: Report) -> None:
        process = self.by_id.get(report.worker_id)
        if process is None:
            return
        if isinstance(report, Forked):
            process.pid = report.pid
            process.logs = self._logs.add(report.pid, process.out_r, process.err_r)
        elif isinstance(report, ForkFailed):
            self._forget_unborn(process)
            self._on_failed(process.worker_id, report.error)
        else:
            self._reaped(process, report.status)

    def _reaped(self, process: Process, status: int) -> None:
        process.status = status
        if process.logs is not None:
            self._logs.finish(process.logs)
        del self.by_id[process.worker_id]
        self._on_exit(process)

    def _forget_unborn(self, process: Process) -> None:
        del self.by_id[process.worker_id]
        os.close(process.out_r)
        os.close(process.err_r)

    def _on_lost(self, how: str) -> None:
        for process in list(self.by_id.values()):
            if process.pid:
                process.kill_reason = process.kill_reason or f"its template process {how}"
                self._reaped(process, -9)
            else:
                self._forget_unborn(process)
                self._on_failed(process.worker_id, f"the template process {how}")
