"""What workers print: read from their pipes, written to rotated files, forwarded to the job's driver.

Role: shell around `LineSplitter`, which is pure. Each worker writes its stdout and stderr into pipes, and the node
reads them: at most `READ_BYTES` of one stream in each turn of the loop, so that a worker that prints megabytes can
starve nobody; it waits in `write` instead.

In its stream a worker marks what it runs, `\\x01ftray-task:NAME\\n`; the marker is taken out and names the lines
after it. The last lines of stderr are kept for the error about the worker's death.

Rules: whole lines only; a line longer than `LINE_BYTES_MAX` is cut into several; bytes that are not UTF-8 are replaced
in what is forwarded and kept as they are in the file. A full disk costs lines in the files, nothing else. To a driver
that does not read, lines are dropped and counted, never queued without bound.

Rejected: workers that write files themselves (nothing is forwarded, and the last words of a killed process can't be
told from those of others); a thread for each pipe.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable

from ftray.config import Config
from ftray.wire.messages import LogLines
from ftray.wire.reactor import Link, Reactor

READ_BYTES = 65536
LINE_BYTES_MAX = 65536
DRIVER_BACKLOG_BYTES_MAX = 4 << 20
"""Lines are dropped while more than this waits for the driver."""
MARKER = b"\x01ftray-task:"
MARKER_BYTES_MAX = 4096
STDOUT, STDERR = 1, 2

Line = tuple[int, str, int, str]
"""As in `LogLines`: stream, name, pid, text."""


class LineSplitter:
    """Cuts a byte stream into lines and takes markers out. Pure."""

    __slots__ = ("_rest", "name")

    def __init__(self) -> None:
        self._rest = b""
        self.name = ""
        """What the last marker said."""

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """The lines that `data` completes, each with the name it stands under, without its newline."""
        if self._rest:
            data = self._rest + data
        *whole, self._rest = data.split(b"\n")
        lines: list[tuple[str, bytes]] = []
        for line in whole:
            self._add(line, lines)
        if len(self._rest) > LINE_BYTES_MAX:
            start = self._rest.rfind(b"\x01")  # of a marker that has not arrived whole, perhaps
            keep = len(self._rest) - start if start >= 0 else 0
            cut = len(self._rest) - (keep if keep < MARKER_BYTES_MAX else 0)
            line, self._rest = self._rest[:cut], self._rest[cut:]
            self._add(line, lines)
        return lines

    def finish(self) -> list[tuple[str, bytes]]:
        """What is left when the stream ends without a newline."""
        lines: list[tuple[str, bytes]] = []
        if self._rest:
            self._add(self._rest, lines)
            self._rest = b""
        return lines

    def _add(self, line: bytes, lines: list[tuple[str, bytes]]) -> None:
        before, marker, name = line.partition(MARKER)
        if before or not marker:
            for start in range(0, len(before) or 1, LINE_BYTES_MAX):
                lines.append((self.name, before[start : start + LINE_BYTES_MAX]))
        if marker:
            self.name = name.decode("utf-8", "replace")


class RotatedFile:
    """An append-only file that is moved aside (`.1`, `.2`, ...) when it grows too large. Opened by its first line."""

    __slots__ = ("_bytes", "_bytes_max", "_fd", "_files_max", "failed", "path")

    def __init__(self, path: str, bytes_max: int, files_max: int) -> None:
        self.path = path
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._fd = -1
        self._bytes = 0
        self.failed = 0
        """Writes that failed (disk full)."""

    def write(self, data: bytes) -> None:
        """Appends; never raises."""
        try:
            if self._fd < 0:
                self._open()
            elif self._bytes + len(data) > self._bytes_max:
                self._rotate()
            self._bytes += os.write(self._fd, data)
        except OSError:
            self.failed += 1

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._bytes = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        self.close()
        for number in range(self._files_max - 1, 0, -1):
            older = f"{self.path}.{number - 1}" if number > 1 else self.path
            try:
                os.replace(older, f"{self.path}.{number}")
            except FileNotFoundError:
                pass
        if self._files_max <= 1:
            os.unlink(self.path)
        self._open()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Stream:
    """One pipe of a worker."""

    __slots__ = ("fd", "file", "number", "splitter")

    def __init__(self, number: int, fd: int, file: RotatedFile) -> None:
        self.number = number
        self.fd = fd
        self.file = file
        self.splitter = LineSplitter()


class WorkerLogs:
    """Both streams of a worker, and its last words."""

    __slots__ = ("job_id", "pid", "streams", "tail")

    def __init__(self, pid: int, streams: tuple[Stream, Stream], tail_lines: int) -> None:
        self.pid = pid
        self.job_id = b""
        """Where its lines go; empty while it belongs to no job."""
        self.streams = streams
        self.tail: deque[str] = deque(maxlen=max(tail_lines, 0))


class _Outlet:
    """Lines on their way to one driver."""

    __slots__ = ("dropped", "lines", "link")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.lines: list[Line] = []
        self.dropped = 0


class LogHub:
    """All pipes of a node. Everything runs under the reactor's lock."""

    def __init__(self, reactor: Reactor, directory: str, config: Config) -> None:
        self.directory = directory
        self._reactor = reactor
        self._config = config
        self._outlets: dict[bytes, _Outlet] = {}
        self._flush_due = False

    # --- drivers -----------------------------------------------------------------------------------------------------

    def forward(self, job_id: bytes, link: Link) -> None:
        """From now on the lines of the job's workers go to `link`."""
        self._outlets[job_id] = _Outlet(link)

    def stop_forwarding(self, job_id: bytes) -> None:
        self._outlets.pop(job_id, None)

    def tell(self, job_id: bytes, lines: Iterable[str]) -> None:
        """The node's own words for a driver, as if printed to stderr."""
        for text in lines:
            self._put(job_id, (STDERR, "raylet", os.getpid(), text))

    def tell_all(self, lines: Iterable[str]) -> None:
        """The node's own words for all drivers."""
        for job_id in self._outlets:
            self.tell(job_id, lines)

    def _put(self, job_id: bytes, line: Line) -> None:
        outlet = self._outlets.get(job_id)
        if outlet is None:
            return
        outlet.lines.append(line)
        if not self._flush_due:
            self._flush_due = True
            self._reactor.call_later(0, self._flush)  # at the end of this turn, so that its lines share a message

    def _flush(self) -> None:
        self._flush_due = False
        for outlet in self._outlets.values():
            if not outlet.lines:
                continue
            if len(outlet.link.out) > DRIVER_BACKLOG_BYTES_MAX:
                outlet.dropped += len(outlet.lines)
            else:
                outlet.link.send(LogLines(tuple(outlet.lines), outlet.dropped))
                outlet.dropped = 0
            outlet.lines = []

    def goodbye(self, job_id: bytes, workers: Iterable[WorkerLogs]) -> None:
        """The job's driver is about to leave: it gets what its workers have printed so far, lines without an end
        included, and then an empty message."""
        outlet = self._outlets.get(job_id)
        if outlet is None:
            return
        for logs in workers:
            if logs.job_id == job_id:
                for stream in logs.streams:
                    self._read_all(logs, stream)
                    self._lines(logs, stream, stream.splitter.finish())
        self._flush()
        outlet.link.send(LogLines((), 0))

    # --- workers -----------------------------------------------------------------------------------------------------

    def add(self, pid: int, out_fd: int, err_fd: int) -> WorkerLogs:
        """Takes over the read ends of a new worker's pipes."""
        config = self._config
        streams = []
        for number, fd, suffix in ((STDOUT, out_fd, "out"), (STDERR, err_fd, "err")):
            os.set_blocking(fd, False)
            path = os.path.join(self.directory, f"worker-{pid}.{suffix}")
            streams.append(Stream(number, fd, RotatedFile(path, config.log_file_bytes_max, config.log_files_max)))
        logs = WorkerLogs(pid, (streams[0], streams[1]), config.log_tail_lines)
        for stream in streams:
            self._reactor.watch(stream.fd, self._reader(logs, stream))
        return logs

    def _reader(self, logs: WorkerLogs, stream: Stream) -> Callable[[], None]:
        def readable() -> None:
            self._read(logs, stream)

        return readable

    def _read(self, logs: WorkerLogs, stream: Stream) -> bool:
        """Reads once. False when there is nothing more now, or ever."""
        try:
            data = os.read(stream.fd, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._lines(logs, stream, stream.splitter.feed(data) if data else stream.splitter.finish())
        if not data:
            self._end(stream)
        return bool(data)

    def _lines(self, logs: WorkerLogs, stream: Stream, lines: list[tuple[str, bytes]]) -> None:
        if not lines:
            return
        stream.file.write(b"\n".join([line for _, line in lines]) + b"\n")
        forwarded = logs.job_id in self._outlets
        if not forwarded and stream.number != STDERR:
            return
        for name, line in lines:
            text = line.decode("utf-8", "replace")
            if stream.number == STDERR:
                logs.tail.append(text)
            if forwarded:
                self._put(logs.job_id, (stream.number, name, logs.pid, text))

    def _end(self, stream: Stream) -> None:
        if stream.fd >= 0:
            self._reactor.unwatch(stream.fd)
            os.close(stream.fd)
            stream.fd = -1
        stream.file.close()

    def _read_all(self, logs: WorkerLogs, stream: Stream) -> None:
        """Reads what is in a pipe, no more than it can hold: somebody may go on writing."""
        for _ in range(64):
            if stream.fd < 0 or not self._read(logs, stream):
                break

    def finish(self, logs: WorkerLogs) -> None:
        """The process has been reaped: reads what it left in the pipes (no more than they hold), closes them."""
        for stream in logs.streams:
            self._read_all(logs, stream)
            if stream.fd >= 0:
                self._lines(logs, stream, stream.splitter.finish())
                self._end(stream)


# --- for the command line -------------------------------------------------------------------------------------------


def list_logs(directory: str) -> list[dict[str, object]]:
    """Log files with their sizes and times of the last change, by name."""
    rows: list[dict[str, object]] = []
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError:
        return rows
    for entry in entries:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if entry.is_file(follow_symlinks=False):
            rows.append({"file": entry.name, "size_bytes": status.st_size, "changed": status.st_mtime})
    return rows


TAIL_BYTES_MAX = 4 << 20


def tail_log(directory: str, name: str, lines: int) -> list[str]:
    """The last lines of a log file (of at most `TAIL_BYTES_MAX`). Raises ValueError if there is no such file."""
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a log file: ask for the list of them")
    try:
        with open(os.path.join(directory, name), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES_MAX))
            data = file.read()
    except OSError as error:
        raise ValueError(f"cannot read the log file {name!r}: {error.strerror}") from None
    found = data.decode("utf-8", "replace").splitlines()
    return found[-lines:] if lines > 0 else []
