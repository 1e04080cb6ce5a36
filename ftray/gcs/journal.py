"""The journal: an append-only file of checksummed records that a replica reads back when it starts.

Role: shell (files only, through `files.py`; their bytes are `journal_format.py`). `append` collects records, `sync`
writes them as one **frame** and makes it durable; when `sync` has returned, `replay` gives them back after any crash.

Rules
- A frame is written only when all frames before it are durable. So a bad frame with a good one after it was
  acknowledged and has been damaged since: the journal is refused. A bad frame with nothing good after it is a write
  that a crash cut short, and was never acknowledged: it is cut off, and `note` says so. (A frame takes effect whole or
  not at all, so it does not matter in which order the disk wrote its parts.)
- `close` writes an empty frame, so that after a clean stop damage to the last real frame is not taken for a crash. What
  was in the file when it got its name (a snapshot) can't have been cut short by a crash either.
- The journal is replaced only by writing a new file, making it durable, renaming it, and making the name durable.
- A write that fails is taken back and can be tried again (the disk was full); after a failed fsync nobody knows what is
  on the disk, so the journal stays closed.

Rejected: a checksum for each record (a batch torn in the middle would look like corruption, or the other way round);
memory-mapped writes (errors arrive as signals, and the order of writing is the kernel's); several segment files (one
rename is easier to make safe than a set of files).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from ftray.gcs.files import OS_FILES, Files
from ftray.gcs.journal_format import (
    CLUSTER_ID_BYTES,
    FRAME_HEAD_BYTES,
    HEADER_BYTES,
    JOURNAL_VERSION,
    MARKER,
    REPLICA_ID_BYTES,
    SALT_BYTES,
    SNAPSHOT,
    FrameHead,
    Record,
    decode_frame_head,
    decode_header,
    decode_records,
    encode_frame_head,
    encode_header,
    encode_record,
    place_crc,
)
from ftray.gcs.state.errors import (
    JournalClosedError,
    JournalClusterError,
    JournalCorruptError,
    JournalFailedError,
    JournalIdentityError,
    JournalVersionError,
    JournalWriteError,
)

_CHUNK_BYTES = 1 << 20


class _File(NamedTuple):
    """An open journal file, and where the next frame goes."""

    fd: int
    salt_crc: int
    born_bytes: int
    size_bytes: int
    sequence: int
    sealed: bool = False
    """The last frame is an empty one."""


class Journal:
    """One replica's journal. Open it with `Journal.open`, exhaust `replay`, then `append` and `sync`."""

    __slots__ = (
        "cluster_id", "replica_id", "note", "path", "_buffer", "_buffer_bytes", "_file", "_files", "_fsync", "_lock_fd",
    )  # fmt: skip

    def __init__(
        self, path: Path, cluster_id: bytes, replica_id: bytes, fsync: bool, lock_fd: int, files: Files
    ) -> None:
        self.path = path
        self.cluster_id = cluster_id
        self.replica_id = replica_id
        self.note = ""
        """What was cut off when the journal was replayed, for the log; empty if nothing."""
        self._files = files
        self._fsync = fsync
        self._lock_fd = lock_fd
        self._file: _File | None = None
        self._buffer: list[bytes] = []
        self._buffer_bytes = 0

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        cluster_id: bytes,
        replica_id: bytes | None = None,
        *,
        fsync: bool = True,
        files: Files = OS_FILES,
    ) -> Journal:
        """Opens the journal at `path`, or makes it, with the directory.

        `replica_id` (16 bytes): the identity that the journal must have; with None any is accepted, and a new journal
        draws one. `fsync=False` is for sessions whose state need not outlive the machine.

        Raises JournalLockedError, JournalCorruptError (the header), JournalVersionError, JournalClusterError,
        JournalIdentityError, ValueError for an id of the wrong size, OSError if the file can't be opened or made.
        """
        if len(cluster_id) != CLUSTER_ID_BYTES or (replica_id is not None and len(replica_id) != REPLICA_ID_BYTES):
            raise ValueError(f"a cluster id has {CLUSTER_ID_BYTES} bytes and a replica id {REPLICA_ID_BYTES}")
        target = Path(path)
        files.make_directory(target.parent, fsync)
        # By a file beside it: the journal itself is replaced by compaction.
        lock_fd = files.lock(target.with_name(target.name + ".lock"))
        journal = cls(target, cluster_id, replica_id or files.urandom(REPLICA_ID_BYTES), fsync, lock_fd, files)
        try:
            # A compaction that a crash cut short leaves this; the old journal still counts.
            files.unlink(_new_name(target))
            if files.exists(target):
                journal._open_file(any_replica=replica_id is None)
            else:
                journal._adopt(journal._write_new([]))
        except BaseException:
            journal._release()
            raise
        return journal

    @property
    def size_bytes(self) -> int:
        """How long the file is, once it has been replayed."""
        return self._file.size_bytes if self._file is not None else 0

    # --- reading -----------------------------------------------------------------------------------------------------

    def replay(self) -> Iterator[Record]:
        """All records, oldest first. To be exhausted once before the first `append`.

        When it is exhausted, all that it gave is durable.

        Raises JournalCorruptError when a frame is bad that was acknowledged; what was given before must not be used.
        Raises JournalClosedError, JournalFailedError.
        """
        file = self._file
        if file is None:
            raise JournalClosedError(f"the journal {self.path} is closed")
        end = self._files.size(file.fd)
        if end < file.born_bytes:
            raise self._corrupt(end, f"it was made with {file.born_bytes} bytes and has fewer")
        offset, sequence, sealed = HEADER_BYTES, 0, False
        while offset < end:
            frame = self._read_frame(file, offset, end)
            if frame is None:
                self._cut(file, offset, end)
                break
            head, body = frame
            if head.sequence != sequence:
                raise self._corrupt(offset, f"frame {head.sequence} where {sequence} was expected")
            try:
                yield from decode_records(body)
            except ValueError as error:
                raise self._corrupt(offset, str(error)) from None
            offset += FRAME_HEAD_BYTES + len(body)
            sequence += 1
            sealed = not body
        # A process that was killed before its sync has left what can be read, and be lost with the machine's power.
        try:
            self._make_durable(file.fd)
            if self._fsync:
                self._files.sync_directory(self.path.parent)
        except OSError as error:
            self._fail(f"made durable ({error})", error)
        self._file = file._replace(size_bytes=offset, sequence=sequence, sealed=sealed)

    def _open_file(self, any_replica: bool) -> None:
        fd = self._files.open(self.path, os.O_RDWR)
        self._file = _File(fd, 0, 0, 0, 0)
        header = decode_header(self._files.pread(fd, HEADER_BYTES, 0))
        if isinstance(header, str):
            raise self._corrupt(0, header)
        if header.version > JOURNAL_VERSION:
            raise JournalVersionError(
                f"the journal {self.path} is in version {header.version} of the format, this ftray reads "
                f"{JOURNAL_VERSION}: run the version that wrote it, or a later one"
            )
        if header.cluster_id != self.cluster_id:
            raise JournalClusterError(
                f"the journal {self.path} belongs to cluster {header.cluster_id.hex()}, not to "
                f"{self.cluster_id.hex()}: start this head with the directory of its own cluster, or with an empty one"
            )
        if header.replica_id != self.replica_id and not any_replica:
            raise JournalIdentityError(
                f"the journal {self.path} belongs to replica {header.replica_id.hex()}, not to {self.replica_id.hex()}:"
                " a head must not come back with another head's disk; replace it (ftray heads replace)"
            )
        self.replica_id = header.replica_id
        self._file = _File(fd, zlib.crc32(header.salt), header.born_bytes, 0, 0)

    def _read_frame(self, file: _File, offset: int, end: int) -> tuple[FrameHead, bytes] | None:
        """The frame at `offset`, or None if there is no good one."""
        place = place_crc(file.salt_crc, offset)
        head = decode_frame_head(self._files.pread(file.fd, FRAME_HEAD_BYTES, offset), place)
        if head is None or head.length > end - offset - FRAME_HEAD_BYTES:
            return None
        body = _pread_all(self._files, file.fd, head.length, offset + FRAME_HEAD_BYTES)
        if len(body) != head.length or zlib.crc32(body, place) != head.body_crc:
            return None
        return head, body

    def _cut(self, file: _File, offset: int, end: int) -> None:
        """Cuts off the bad end of the file, after making sure that none of it was acknowledged."""
        if offset < file.born_bytes:
            raise self._corrupt(offset, "a bad frame that was there when the file was made")
        later = self._find_frame(file, offset + 1, end)
        if later is not None:
            raise self._corrupt(offset, f"a bad frame, though the one at byte {later} is good")
        try:
            self._files.ftruncate(file.fd, offset)
            self._make_durable(file.fd)
        except OSError as error:
            raise JournalWriteError(f"the unfinished end of journal {self.path} can't be cut off: {error}") from error
        self.note = (
            f"the journal {self.path} ended in an unfinished write, which was never acknowledged: "
            f"{end - offset} bytes from byte {offset} on were cut off"
        )

    def _find_frame(self, file: _File, start: int, end: int) -> int | None:
        """Where the first good frame from `start` on begins."""
        base = start
        while base < end:
            chunk = self._files.pread(file.fd, _CHUNK_BYTES + len(MARKER) - 1, base)
            if not chunk:
                return None
            found = chunk.find(MARKER)
            while found >= 0:
                if self._read_frame(file, base + found, end) is not None:
                    return base + found
                found = chunk.find(MARKER, found + 1)
            base += _CHUNK_BYTES
        return None

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, records: Iterable[Record]) -> None:
        """Adds records to the batch that the next `sync` makes durable. Writes nothing yet.

        Raises JournalClosedError, ValueError for a payload of 4 GiB or more.
        """
        self._writable()
        parts: list[bytes] = []
        size = sum(encode_record(record, parts) for record in records)
        self._buffer += parts
        self._buffer_bytes += size

    def sync(self) -> None:
        """Makes all appended records durable with one write and one fsync.

        Raises JournalWriteError if they could not be written: they are dropped, and the journal is as it was.
        Raises JournalFailedError if the disk failed: the journal is closed, and what is on the disk is not known.
        """
        file = self._writable()
        if not self._buffer:
            return
        parts, self._buffer = self._buffer, []
        length, self._buffer_bytes = self._buffer_bytes, 0
        try:
            self._write_frame(file, parts, length)
        except OSError as error:
            self._take_back(file, error)
        try:
            self._make_durable(file.fd)
        except OSError as error:
            self._fail(f"made durable ({error})", error)
        end = file.size_bytes + FRAME_HEAD_BYTES + length
        self._file = file._replace(size_bytes=end, sequence=file.sequence + 1, sealed=False)

    def compact(self, snapshot: bytes, term: int, index: int, keep: Iterable[Record] = ()) -> None:
        """Replaces all records by a snapshot of the state after entry `index` and the records `keep`.

        The old journal counts until the new one has its name. Raises JournalWriteError if that fails (the old journal
        goes on), JournalFailedError, JournalClosedError, and RuntimeError with a batch that is not synced.
        """
        old = self._writable()
        if self._buffer:
            raise RuntimeError("sync the batch before compacting")
        try:
            self._adopt(self._write_new([Record(SNAPSHOT, term, index, snapshot), *keep]))
        except OSError as error:
            self._files.unlink(_new_name(self.path))
            raise JournalWriteError(f"the journal {self.path} could not be compacted: {error}") from error
        except JournalFailedError:
            self._files.close(old.fd)
            raise
        self._files.close(old.fd)

    def close(self) -> None:
        """Closes the files and lets go of the lock. What was appended and not synced is gone. May be repeated."""
        self._buffer.clear()
        self._buffer_bytes = 0
        file = self._file
        if file is not None and file.size_bytes > file.born_bytes and not file.sealed:
            try:
                self._write_frame(file, [], 0)
            except OSError:
                pass  # It guards against later damage only; an unfinished one is cut off.
        self._release()

    def _writable(self) -> _File:
        if self._file is None or not self._file.size_bytes:
            raise JournalClosedError(f"the journal {self.path} is closed, or has not been replayed to its end")
        return self._file

    def _write_frame(self, file: _File, body: list[bytes], length: int) -> None:
        place = place_crc(file.salt_crc, file.size_bytes)
        parts = [encode_frame_head(place, file.sequence, body, length), *body]
        _pwrite_all(self._files, file.fd, parts, file.size_bytes)

    def _write_new(self, records: list[Record]) -> _File:
        """Writes a file with these records under a temporary name, and makes it durable. Raises OSError."""
        salt = self._files.urandom(SALT_BYTES)
        salt_crc = zlib.crc32(salt)
        body: list[bytes] = []
        length = sum(encode_record(record, body) for record in records)
        if records:
            body.insert(0, encode_frame_head(place_crc(salt_crc, HEADER_BYTES), 0, body, length))
            length += FRAME_HEAD_BYTES
        size = HEADER_BYTES + length
        fd = self._files.open(_new_name(self.path), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            _pwrite_all(self._files, fd, [encode_header(self.cluster_id, self.replica_id, salt, size), *body], 0)
            self._make_durable(fd)
        except BaseException:
            self._files.close(fd)
            raise
        return _File(fd, salt_crc, size, size, 1 if records else 0)

    def _adopt(self, new: _File) -> None:
        """Gives a new file the journal's name and goes on with it. Raises OSError, and goes on as before."""
        try:
            self._files.rename(_new_name(self.path), self.path)
        except BaseException:
            self._files.close(new.fd)
            raise
        self._file = new
        try:
            if self._fsync:
                self._files.sync_directory(self.path.parent)
        except OSError as error:
            self._fail(f"given its name ({error})", error)

    def _take_back(self, file: _File, error: OSError) -> NoReturn:
        """After a failed write: the file as it was."""
        try:
            self._files.ftruncate(file.fd, file.size_bytes)
        except OSError:
            self._fail(f"written ({error}) nor cut back to what it was", error)
        raise JournalWriteError(
            f"the journal {self.path} could not be written ({error}): nothing of the batch took effect; "
            "make room on the disk"
        ) from error

    def _fail(self, what: str, error: OSError) -> NoReturn:
        self._release()
        raise JournalFailedError(
            f"the journal {self.path} could not be {what}, so nobody knows what is on the disk: check it, then start "
            "this head again, or replace it (ftray heads replace)"
        ) from error

    def _make_durable(self, fd: int) -> None:
        if self._fsync:
            self._files.fdatasync(fd)

    def _corrupt(self, offset: int, what: str) -> JournalCorruptError:
        return JournalCorruptError(str(self.path), offset, what)

    def _release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            self._files.close(file.fd)
        if self._lock_fd >= 0:
            self._files.close(self._lock_fd)
            self._lock_fd = -1


def _new_name(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _pread_all(files: Files, fd: int, length: int, offset: int) -> bytes:
    data = files.pread(fd, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]  # Linux reads at most 2 GiB at once.
    got = len(data)
    while got < length:
        data = files.pread(fd, length - got, offset + got)
        if not data:
            break
        parts.append(data)
        got += len(data)
    return b"".join(parts)


def _pwrite_all(files: Files, fd: int, parts: list[bytes], offset: int) -> None:
    if len(parts) > 16 or sum(map(len, parts)) <= _CHUNK_BYTES:
        parts = [b"".join(parts)]
    for part in parts:
        view = memoryview(part)
        while view:
            written = files.pwrite(fd, view, offset)
            offset += written
            view = view[written:]
