"""Spill files and the threads that write, read and remove them.

Role: shell. The raylet's loop hands jobs over and never touches the disk; what is done comes back through a queue and
an eventfd that its reactor watches. `store/spilling.py` decides what is to be done.

Rules: three lanes, each a thread of its own that starts with its first job: a slow write delays no restore, and
neither delays removals, which make room on the disk. Files are numbered, never written twice, and lie in the session's
`spill/` folder, which goes with the session however the node ends.

Rejected: a pool of threads (writes would take them all); trio's worker threads (a thread per call, without order, and
the parts of a raylet know nothing of trio); several writers (one fills a disk).
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from ftray.store.arena import Arena
from ftray.store.spill_io import (
    FULL_ERRORS,
    SpillDamagedError,
    SpillStoppedError,
    read_file,
    unlink_file,
    write_file,
)
from ftray.store.table import Job

log = logging.getLogger("ftray.raylet")

JOIN_S = 2.0
"""How long `close` waits for a thread; a disk that hangs must not keep the node from ending."""


class Done(NamedTuple):
    """A job has ended."""

    job: Job
    checksum: int = 0
    error: str = ""
    """What went wrong, if anything did."""
    disk_full: bool = False
    """A write found no room on the disk."""
    damaged: bool = False
    """A read found that the file is of no use."""


class _Lane:
    """A thread that does one thing after another, from its first job on."""

    def __init__(self, name: str, work: Callable[[Job], None]) -> None:
        self._name = name
        self._work = work
        self._todo: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        self._todo.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (job := self._todo.get()) is not None:
            self._work(job)

    def close(self) -> bool:
        """Ends the thread. Returns whether it has ended."""
        if self._thread is None:
            return True
        self._todo.put(None)
        self._thread.join(JOIN_S)
        return not self._thread.is_alive()


class SpillFiles:
    """See the module. All methods are the raylet's, under the reactor's lock."""

    def __init__(self, directory: str, arena: Arena) -> None:
        self._directory = directory
        self._arena = arena
        self._stopped = False
        self._done: deque[Done] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._writer = _Lane("ftray-spill", self._write)
        self._reader = _Lane("ftray-restore", self._read)
        self._remover = _Lane("ftray-unlink", self._remove)

    def path(self, number: int) -> str:
        return os.path.join(self._directory, str(number))

    def submit(self, job: Job) -> None:
        """Writes (`job.file` is 0) or reads; a Done comes."""
        (self._reader if job.file else self._writer).submit(job)

    def unlink(self, numbers: tuple[int, ...]) -> None:
        """Removes files; nothing comes back."""
        for number in numbers:
            self._remover.submit(Job(0, 0, 0, number))

    def fileno(self) -> int:
        """Readable when `take_done` has something."""
        return self._wake_fd

    def take_done(self) -> list[Done]:
        """What has ended since the last time."""
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
        done = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def close(self) -> None:
        """Ends the threads, in the middle of what they do. The files are the session's to remove."""
        self._stopped = True
        ended = [lane.close() for lane in (self._writer, self._reader, self._remover)]
        if all(ended):
            os.close(self._wake_fd)
        else:
            log.warning("the disk of %s does not answer: its threads are left to themselves", self._directory)

    # --- in threads ---------------------------------------------------------------------------------------------------

    def _finish(self, done: Done) -> None:
        self._done.append(done)
        os.eventfd_write(self._wake_fd, 1)

    def _write(self, job: Job) -> None:
        try:
            view = self._arena.write_view(job.offset, job.size)
            self._finish(Done(job, write_file(self.path(job.number), view, lambda: self._stopped)))
        except SpillStoppedError:
            return
        except OSError as error:
            self._finish(Done(job, error=error.strerror or str(error), disk_full=error.errno in FULL_ERRORS))
        except Exception as error:  # whatever it is, somebody waits for an answer
            log.exception("spilling failed")
            self._finish(Done(job, error=repr(error)))

    def _read(self, job: Job) -> None:
        try:
            if self._stopped:
                return
            read_file(self.path(job.file), job.checksum, self._arena.write_view(job.offset, job.size))
            self._finish(Done(job))
        except SpillDamagedError as error:
            self._finish(Done(job, error=str(error), damaged=True))
        except Exception as error:
            if not isinstance(error, OSError):
                log.exception("restoring failed")
            self._finish(Done(job, error=str(error)))

    def _remove(self, job: Job) -> None:
        if not self._stopped:
            unlink_file(self.path(job.file))
