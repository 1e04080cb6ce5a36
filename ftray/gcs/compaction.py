"""Compaction of a journal without a stop: a snapshot is written beside it, piece by piece, while it goes on.

Role: shell, through `files.py`. `Compaction` writes one new journal file, a bounded piece with each `step`;
`Compactor` says when that is due, and takes one step in each turn of a replica.

How
1. The state's picture is taken (`state/snapshot.py`), and the place is noted where the old journal ends. All that is
   synced from then on (entries, also those that take the place of others, terms and votes) goes to the old journal,
   after that place.
2. Each step encodes and writes at most `SLICE_BYTES` of the snapshot: counted in bytes and records, not in time, so
   that the same seed gives the same steps. After each `SYNC_BYTES` the file is synced in the background, and the steps
   wait for that: so the last sync is short, and so is what a sync of the old journal may have to wait for.
3. What the log had after the snapshot's entry, with term and vote, is written behind it; then what the old journal has
   got since, in the order in which it was synced there. Read back, the two files say the same.
4. When only a little is missing, one step copies it, writes the heads (lengths and checksums, which stand in front and
   are known last), syncs that little, renames, syncs the directory. From then on the new file is the journal.

What a crash leaves: before the rename the old journal, which is whole, and a file that the next start removes; after it
the new one, which was durable before it got its name.

Rules
- A compaction that fails (a full disk, say) takes its file away, and the old journal goes on. So does one that is given
  up: by `close`, by a snapshot from the leader that takes the place of everything, by a disk that is full.
- One is under way at a time. It holds the picture and one piece, never the snapshot.
- The copying catches up with any writing: each step copies up to twice what was added since the last one, and what "a
  little" means doubles each time that it has caught up.

Rejected: to write entries to both files from the beginning (each sync would be two); segments (a directory of files is
harder to keep right than one rename); to keep new entries in memory (they are in the old file).
"""

from __future__ import annotations

import errno
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ftray.gcs.files import Files, Syncing
from ftray.gcs.journal_format import (
    FRAME_HEAD_BYTES,
    HEADER_BYTES,
    RECORD_BYTES_MAX,
    RECORD_HEAD_BYTES,
    SALT_BYTES,
    SNAPSHOT,
    Record,
    encode_frame_head,
    encode_header,
    encode_record,
    encode_record_head,
    encode_summed_frame_head,
    place_crc,
)
from ftray.gcs.state.checksums import joined_crc
from ftray.gcs.state.errors import JournalFailedError, JournalWriteError

if TYPE_CHECKING:
    from ftray.gcs.journal import Journal

log = logging.getLogger("ftray.gcs")

SLICE_BYTES = 256 << 10
"""Written in one step: a millisecond at most."""
SYNC_BYTES = 4 << 20
"""Written between two syncs in the background."""
FINISH_BYTES = 256 << 10
"""What is missing or not durable when the last step begins."""


class Source(Protocol):
    """What a snapshot is read from."""

    @property
    def head_bytes(self) -> int:
        """How long its head is."""
        ...

    def read(self, limit_bytes: int) -> bytes:
        """The next bytes of the body, at most so many; empty at the end."""
        ...

    def head(self, body_bytes: int, body_crc: int) -> bytes:
        """What stands before the body, when that has been read; `body_crc` is its CRC-32."""
        ...


class Whole:
    """A snapshot that is in memory, as a source."""

    head_bytes = 0

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def read(self, limit_bytes: int) -> bytes:
        part, self._rest = self._rest[:limit_bytes], self._rest[limit_bytes:]
        return bytes(part)

    def head(self, body_bytes: int, body_crc: int) -> bytes:
        return b""


class SnapshotPlace(NamedTuple):
    """Where the snapshot is in a journal file."""

    entry: int
    term: int
    offset: int
    length: int
    crc: int


class SnapshotFile:
    """The snapshot in a journal, to read: also when the journal has been replaced meanwhile."""

    def __init__(self, files: Files, path: Path, place: SnapshotPlace) -> None:
        """Raises OSError."""
        self.index, self.term, self._offset, self.total_bytes, self.crc = place
        self._files = files
        self._fd = files.open(path, os.O_RDONLY)

    def read(self, offset: int, length: int) -> bytes:
        """Raises OSError."""
        length = min(length, self.total_bytes - offset)
        return self._files.pread(self._fd, length, self._offset + offset) if length > 0 else b""

    def close(self) -> None:
        """May be repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._files.close_later(fd)


class Compaction:
    """One new journal file on its way. Made by `Journal.begin_compaction`."""

    def __init__(
        self, journal: Journal, source: Source, term: int, index: int, keep: Iterable[Record], wait: bool
    ) -> None:
        """`wait`: all is to be done at once, and syncs are waited for. Raises OSError."""
        file = journal._file
        assert file is not None
        self.index = index
        self.snapshot_bytes = source.head_bytes
        """How long the snapshot is, as far as it is written."""
        self._journal = journal
        self._files = journal._files
        self._source: Source | None = source
        self._head_of = source.head
        self._term = term
        self._keep = list(keep)
        self._keep.reverse()
        self._wait = wait
        self._carried = file.size_bytes
        """Up to where the old journal is in the new one."""
        self._seen = -1
        """How long it was when some of it was copied last; -1 before the first time."""
        self._late_syncs = 0
        """Syncs since then."""
        self._salt = self._files.urandom(SALT_BYTES)
        self._salt_crc = zlib.crc32(self._salt)
        self._body_offset = HEADER_BYTES + FRAME_HEAD_BYTES + RECORD_HEAD_BYTES + source.head_bytes
        self._size = self._body_offset
        self._body_bytes = self._body_crc = 0
        self._sequence = 1
        self._unsynced_bytes = 0
        self._syncing: Syncing | None = None
        self._rounds = 0
        self._over = False
        self._fd = self._files.open(journal.new_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def step(self) -> bool:
        """Goes on by one piece. Returns whether the new file is the journal now.

        Raises JournalWriteError: it has been given up, and the old journal goes on. Raises JournalFailedError: nobody
        knows which of the two a restart would find; the journal is closed.
        """
        try:
            return self._step()
        except OSError as error:
            self.abort()
            raise JournalWriteError(f"the journal {self._journal.path} could not be compacted: {error}") from error
        except Exception:
            self.abort()
            raise

    def finish(self) -> None:
        """Takes all steps. Only for one that was made to wait."""
        while not self.step():
            pass

    def abort(self) -> None:
        """Gives up: the old journal goes on. May be repeated, and does nothing when the new one is in use."""
        if not self._over:
            self.abandon()
            self._files.unlink(self._journal.new_path)

    def abandon(self) -> None:
        """Closes the file as it is."""
        fd, self._fd = self._fd, -1
        self._over = True
        self._source = None
        self._keep.clear()
        if self._journal._compaction is self:
            self._journal._compaction = None
        if fd >= 0:
            self._close(fd)

    def _step(self) -> bool:
        budget = SLICE_BYTES
        while budget > 0:
            if self._syncing is not None:
                if not self._syncing.done():
                    return False
                self._syncing = None
            if self._unsynced_bytes >= self._burst_bytes:
                self._begin_sync()
            elif self._source is not None:
                budget -= max(self._write_snapshot(self._source, budget), SLICE_BYTES // 4)
            elif self._keep:
                budget -= self._write_keep(budget)
            else:
                copied = self._carry(budget)
                if copied is None:
                    return True
                budget -= copied
        return False

    @property
    def _burst_bytes(self) -> int:
        """What is written between two syncs. More when that is not enough to catch up, which takes an odd disk."""
        return SYNC_BYTES << self._late_syncs // 8

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _write_snapshot(self, source: Source, limit_bytes: int) -> int:
        data = source.read(limit_bytes)
        if not data:
            self._source = None  # and with it the picture
            return 0
        self._write([data])
        self._body_crc = zlib.crc32(data, self._body_crc)
        self._body_bytes += len(data)
        self.snapshot_bytes += len(data)
        if self.snapshot_bytes > RECORD_BYTES_MAX:
            raise OSError(errno.EFBIG, f"a snapshot has at most {RECORD_BYTES_MAX} bytes")
        return len(data)

    def _write_keep(self, limit_bytes: int) -> int:
        """A frame of the records that the log had when this began."""
        body: list[bytes] = []
        size = 0
        while self._keep and size < limit_bytes:
            size += encode_record(self._keep.pop(), body)
        self._write_frame(body, size)
        return size

    def _carry(self, limit_bytes: int) -> int | None:
        """Copies what the old journal has got since. Returns how much that was, or None: that was all."""
        end = self._journal.size_bytes
        missing = end - self._carried
        little = FINISH_BYTES << self._rounds
        if missing + self._unsynced_bytes <= little:
            self._copy(missing)
            self._take_over()
            return None
        if not missing or self._unsynced_bytes > little // 2:
            self._begin_sync()
            return 0
        grown, self._seen = (end - self._seen if self._seen >= 0 else 0), end
        copied = self._copy(min(missing, limit_bytes + min(2 * grown, self._burst_bytes)))
        self._rounds += self._carried == end
        return copied

    def _copy(self, at_least_bytes: int) -> int:
        """Copies frames from the old journal. What can't be read back is not made good by a new checksum."""
        file = self._journal._file
        assert file is not None
        bodies: list[bytes] = []
        size, start = 0, self._carried
        while self._carried - start < at_least_bytes:
            frame = self._journal._read_frame(file, self._carried, file.size_bytes)
            if frame is None:
                raise OSError(errno.EIO, f"what is at byte {self._carried} can't be read back")
            body = frame[1]
            bodies.append(body)
            size += len(body)
            self._carried += FRAME_HEAD_BYTES + len(body)
        if size:
            self._write_frame(bodies, size)
        return self._carried - start

    def _write_frame(self, body: list[bytes], length: int) -> None:
        head = encode_frame_head(place_crc(self._salt_crc, self._size), self._sequence, body, length)
        self._sequence += 1
        self._write([head, *body])

    def _write(self, parts: list[bytes]) -> None:
        before = self._size
        self._size = write_all(self._files, self._fd, parts, before)
        if self._journal._fsync:
            self._unsynced_bytes += self._size - before

    def _begin_sync(self) -> None:
        self._unsynced_bytes = 0
        if self._seen >= 0:
            self._late_syncs += 1
        if self._wait:
            self._files.fdatasync(self._fd)
        else:
            self._syncing = self._files.begin_sync(self._fd)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """The heads, a short sync, the name."""
        journal = self._journal
        body_bytes = self._body_bytes
        head = self._head_of(body_bytes, self._body_crc)
        payload_bytes = len(head) + body_bytes
        record = encode_record_head(SNAPSHOT, self._term, self.index, payload_bytes)
        place = place_crc(self._salt_crc, HEADER_BYTES)
        crc = joined_crc(zlib.crc32(head, zlib.crc32(record, place)), self._body_crc, body_bytes)
        frame = encode_summed_frame_head(place, 0, len(record) + payload_bytes, crc)
        header = encode_header(journal.cluster_id, journal.replica_id, self._salt, self._size)
        write_all(self._files, self._fd, [header, frame, record, head], 0)
        self._make_durable()
        snapshot = SnapshotPlace(
            self.index, self._term, self._body_offset - len(head), payload_bytes,
            joined_crc(zlib.crc32(head), self._body_crc, body_bytes),
        )  # fmt: skip
        fd, self._fd = self._fd, -1
        try:
            journal._take_new(fd, self._salt_crc, self._size, self._sequence, snapshot, self._close)
        except JournalFailedError:
            self._over = True
            raise
        self._over = True

    def _make_durable(self) -> None:
        """Before it gets its name."""
        if self._journal._fsync:
            self._files.fdatasync(self._fd)

    def _close(self, fd: int) -> None:
        if self._wait:
            self._files.close(fd)
        else:
            self._files.close_later(fd)


class Compacting(Protocol):
    """What `Compactor` drives: a `Compaction`, or a test's twin."""

    @property
    def snapshot_bytes(self) -> int: ...
    def step(self) -> bool: ...
    def finish(self) -> None: ...
    def abort(self) -> None: ...


class Compactor:
    """When a replica's journal is compacted."""

    def __init__(
        self,
        size_bytes: Callable[[], int],
        compact_bytes: int,
        snapshot_bytes: int,
        begin: Callable[[bool], Compacting | None],
        done: Callable[[], object] = lambda: None,
    ) -> None:
        """`size_bytes` is how long the journal is; `snapshot_bytes` how long the snapshot in it.

        `begin` begins one (that waits for its syncs, if so told), or returns None if nothing would come of it; `done`
        is called when the new journal is in use.
        """
        self._size_bytes = size_bytes
        self._compact_bytes = compact_bytes
        self._begin = begin
        self._done = done
        self._due_bytes = 0
        self._running: Compacting | None = None
        self.replaced(snapshot_bytes)

    @property
    def running(self) -> bool:
        return self._running is not None

    def replaced(self, snapshot_bytes: int) -> None:
        """The journal begins with a snapshot of this length now."""
        self.abort()
        self._due_bytes = max(self._compact_bytes, 2 * snapshot_bytes)

    def turn(self, patience: int = 1) -> None:
        """The next step, if one is due. With `patience` the journal may first grow to so many times its limit.

        Raises JournalFailedError.
        """
        if self._running is None and self._size_bytes() < self._due_bytes * patience:
            return
        try:
            if self._running is None:
                self._running = self._begin(False)
            if self._running is not None and self._running.step():
                self._ended(self._running)
        except JournalWriteError as error:
            self.put_off()
            log.warning("%s; the old journal is kept and grows", error)
        except BaseException:
            self._running = None
            raise

    def begin(self) -> None:
        """Begins one now, unless one is under way. Raises JournalWriteError."""
        if self._running is None:
            self._running = self._begin(False)

    def at_once(self) -> None:
        """All of it now, however long it takes. Raises JournalWriteError, JournalFailedError."""
        self.abort()
        compaction = self._begin(True)
        if compaction is not None:
            compaction.finish()
            self._ended(compaction)

    def hurry(self) -> None:
        """One is due, however short the journal is."""
        self._due_bytes = 0

    def put_off(self) -> None:
        """Gives up what is under way, until the journal has grown."""
        self.abort()
        self._due_bytes = self._size_bytes() + self._compact_bytes

    def abort(self) -> None:
        """Gives up what is under way. May be repeated."""
        running, self._running = self._running, None
        if running is not None:
            running.abort()

    def _ended(self, compaction: Compacting) -> None:
        self._running = None
        self.replaced(compaction.snapshot_bytes)
        self._done()


def write_all(files: Files, fd: int, parts: list[bytes], offset: int) -> int:
    """Writes all of it. Returns where it ends. Raises OSError."""
    if len(parts) > 16 or sum(map(len, parts)) <= 1 << 20:
        parts = [b"".join(parts)]
    for part in parts:
        view = memoryview(part)
        while view:
            written = files.pwrite(fd, view, offset)
            offset += written
            view = view[written:]
    return offset
