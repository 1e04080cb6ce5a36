"""Journals in memory for the small world of `raft_world`: what the real one promises, as simply as it can be said.

A compaction takes many steps, each with a small piece of the state, and takes over what was synced meanwhile.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from ftray.gcs.compaction import Source, Whole
from ftray.gcs.journal_format import SNAPSHOT, Record
from ftray.gcs.state.errors import JournalClosedError, JournalWriteError

CLUSTER = b"C" * 16
PIECE_BYTES = 150
"""Of a snapshot, in one step of a compaction."""


class CrashError(BaseException):
    """The process dies here."""


class Disk:
    """What survives a crash."""

    def __init__(self, replica_id: bytes) -> None:
        self.replica_id = replica_id
        self.records: list[Record] = []
        self.size = 0
        self.full = False
        self.crash_in_sync: bool | None = None
        """The next sync crashes; True: after it was made durable."""


class MemoryJournal:
    """A journal on a `Disk`."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.cluster_id = CLUSTER
        self.replica_id = disk.replica_id
        self.syncs = 0
        self.compaction: MemoryCompaction | None = None
        self.servable = False
        """The snapshot was written in this life."""
        self._buffer: list[Record] = []
        self._open = True

    @property
    def size_bytes(self) -> int:
        return self.disk.size

    def replay(self) -> Iterator[Record]:
        yield from list(self.disk.records)

    def append(self, records: Iterable[Record]) -> None:
        self._check()
        self._buffer += records

    def sync(self) -> None:
        self._check()
        batch, self._buffer = self._buffer, []
        if self.disk.full:
            raise JournalWriteError("the disk is full")
        crash, self.disk.crash_in_sync = self.disk.crash_in_sync, None
        if crash is False:
            raise CrashError
        self.syncs += 1
        self.disk.records += batch
        self.disk.size += sum(60 + len(record.payload) for record in batch)
        if crash:
            raise CrashError

    def seal(self) -> None:
        """Nothing: what is on this disk is never damaged."""

    def compact(self, snapshot: bytes, term: int, index: int, keep: Iterable[Record] = ()) -> None:
        self.begin_compaction(Whole(snapshot), term, index, keep).finish()

    def begin_compaction(
        self, source: Source, term: int, index: int, keep: Iterable[Record] = (), *, wait: bool = False
    ) -> MemoryCompaction:
        self._check()
        assert not self._buffer
        self.compaction = MemoryCompaction(self, source, term, index, keep)
        return self.compaction

    def replace(self, snapshot: bytes, term: int, index: int, keep: Iterable[Record]) -> None:
        self.compaction = None
        self.disk.records = [Record(SNAPSHOT, term, index, snapshot), *keep]
        self.disk.size = sum(60 + len(record.payload) for record in self.disk.records)
        self.servable = True

    def open_snapshot(self) -> MemorySnapshot | None:
        return MemorySnapshot(self.disk.records[0]) if self.servable else None

    def forget_snapshot(self) -> None:
        self.servable = False

    def close(self) -> None:
        self._open = False

    def _check(self) -> None:
        if not self._open:
            raise JournalClosedError("closed")


class MemoryCompaction:
    """A compaction of a `MemoryJournal`, a small piece with each step."""

    def __init__(self, journal: MemoryJournal, source: Source, term: int, index: int, keep: Iterable[Record]) -> None:
        self.journal = journal
        self.snapshot_bytes = 0
        self._source = source
        self._place = (term, index)
        self._keep = list(keep)
        self._parts: list[bytes] = []
        self._since = len(journal.disk.records)

    def step(self) -> bool:
        self.journal._check()
        assert not self.journal._buffer and self.journal.compaction is self
        if self.journal.disk.full:
            self.abort()
            raise JournalWriteError("the disk is full")
        part = self._source.read(PIECE_BYTES)
        if part:
            self._parts.append(part)
            return False
        body = b"".join(self._parts)
        snapshot = self._source.head(len(body), zlib.crc32(body)) + body
        self.snapshot_bytes = len(snapshot)
        self.journal.replace(snapshot, *self._place, [*self._keep, *self.journal.disk.records[self._since :]])
        return True

    def finish(self) -> None:
        while not self.step():
            pass

    def abort(self) -> None:
        self.journal.compaction = None


class MemorySnapshot:
    """The snapshot in a `MemoryJournal`."""

    def __init__(self, record: Record) -> None:
        self.index, self.term, self.data = record.index, record.term, record.payload
        self.total_bytes = len(self.data)
        self.crc = zlib.crc32(self.data)
        self.closed = False

    def read(self, offset: int, length: int) -> bytes:
        assert not self.closed
        return self.data[offset : offset + length]

    def close(self) -> None:
        self.closed = True
