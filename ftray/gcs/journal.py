"""The journal: an append-only file of checksummed records that a replica reads back when it starts.

Role: shell (files only, through `files.py`; their bytes are `journal_format.py`). `append` collects records, `sync`
writes them as one **frame** and makes it durable; when `sync` has returned, `replay` gives them back after any crash.

Rules
- A frame is written only when all frames before it are durable. So a bad frame with a good one after it was
  acknowledged and has been damaged since: the journal is refused. A bad frame with nothing good after it is a write
  that a crash cut short, and was never acknowledged: it is cut off, and `note` says so. (A frame takes effect whole or
  not at all, so it does not matter in which order the disk wrote its parts.)
- An empty frame (`seal`, and `close`) after the last real one says that that one was complete: so damage to it is not
  taken for a crash. Whoever has nothing to write seals; the next frame takes the seal's place, so a seal needs no sync.
  What was in the file when it got its name (a snapshot) can't have been cut short by a crash either.
- The journal is replaced only by writing a new file, making it durable, renaming it, and making the name durable
  (`compaction.py`, which does it piece by piece).
- A write that fails is taken back and can be tried again (the disk was full); after a failed fsync nobody knows what is
  on the disk, so the journal stays closed. When it is opened again, it is read from the disk, not from memory.

Rejected: a checksum for each record (a batch torn in the middle would look like corruption, or the other way round);
memory-mapped writes (errors arrive as signals, and the order of writing is the kernel's); several segment files (one
rename is easier to make safe than a set of files).
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from ftray.gcs.compaction import Compaction, SnapshotFile, SnapshotPlace, Source, Whole, write_all
from ftray.gcs.files import OS_FILES, Files
from ftray.gcs.journal_format import (
    CLUSTER_ID_BYTES,
    FRAME_HEAD_BYTES,
    HEADER_BYTES,
    JOURNAL_VERSION,
    MARKER,
    REPLICA_ID_BYTES,
    SALT_BYTES,
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
    JournalOpenError,
    JournalVersionError,
    JournalWriteError,
)

_CHUNK_BYTES = 1 << 20

_OPEN_REMEDIES = {
    errno.EACCES: "let it belong to the user that runs this head",
    errno.EPERM: "let it belong to the user that runs this head",
    errno.EROFS: "mount that disk for writing, or start this head with another directory",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room on the disk, or have the quota raised",
    errno.ENOTDIR: "a part of that path is a file: start this head with a directory",
    errno.EEXIST: "a part of that path is a file, or a link to what is not there: start this head with a directory",
    errno.EISDIR: "a directory lies where the file should be: move it away, or start this head with another directory",
    errno.ELOOP: "it is a symbolic link, which the first compaction would replace: link the directory instead",
    errno.ESPIPE: "something that is no file lies there: move it away",
    errno.ENXIO: "something that is no file lies there: move it away",
}
"""What to do about what the operating system says."""


class _File(NamedTuple):
    """An open journal file, and where the next frame goes."""

    fd: int
    salt_crc: int
    born_bytes: int
    size_bytes: int
    sequence: int
    sealed: bool = False
    """An empty frame is the last one, or follows at `size_bytes`."""


class Journal:
    """One replica's journal. Open it with `Journal.open`, exhaust `replay`, then `append` and `sync`."""

    __slots__ = (
        "cluster_id", "replica_id", "note", "path", "_buffer", "_buffer_bytes", "_compaction", "_file", "_files",
        "_fsync", "_lock_fd", "_snapshot",
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
        self._compaction: Compaction | None = None
        """The one under way."""
        self._snapshot: SnapshotPlace | None = None
        """The snapshot in the file, if this process has written it."""

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
        JournalIdentityError, JournalOpenError if the file can't be opened or made, ValueError for an id of the wrong
        size.
        """
        if len(cluster_id) != CLUSTER_ID_BYTES or (replica_id is not None and len(replica_id) != REPLICA_ID_BYTES):
            raise ValueError(f"a cluster id has {CLUSTER_ID_BYTES} bytes and a replica id {REPLICA_ID_BYTES}")
        target = Path(path)
        try:
            return cls._open(target, cluster_id, replica_id, fsync, files)
        except OSError as error:
            raise JournalOpenError(
                f"the journal {target} can't be opened or made: {error.strerror or error}"
                f"{f' ({error.filename})' if error.filename not in (None, str(target)) else ''}; "
                f"{_OPEN_REMEDIES.get(error.errno or 0, 'check the directory and its disk')}"
            ) from error

    @classmethod
    def _open(
        cls, target: Path, cluster_id: bytes, replica_id: bytes | None, fsync: bool, files: Files
    ) -> Journal:
        """Raises OSError, too."""
        files.make_directory(target.parent, fsync)
        # By a file beside it: the journal itself is replaced by compaction.
        lock_fd = files.lock(target.with_name(target.name + ".lock"))
        journal = cls(target, cluster_id, replica_id or files.urandom(REPLICA_ID_BYTES), fsync, lock_fd, files)
        try:
            # A compaction that a crash cut short leaves this; the old journal still counts.
            files.unlink(journal.new_path)
            if files.exists(target):
                journal._open_file(any_replica=replica_id is None)
            else:
                journal._make()
        except BaseException:
            journal._release()
            raise
        return journal

    @property
    def new_path(self) -> Path:
        """Where a new file is written before it gets the journal's name."""
        return self.path.with_name(self.path.name + ".new")

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
        self._files.drop_cached(fd)
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
                f"{self.cluster_id.hex()}: start this head with the directory and the token of its own cluster, or "
                "with an empty directory"
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

    def seal(self) -> None:
        """Says that the last frame was complete, if nothing says so yet. Costs a small write, no sync; a disk that does
        not take it is no error. The next frame takes the seal's place."""
        file = self._file
        if file is None or file.sealed or self._buffer or file.size_bytes <= file.born_bytes:
            return
        try:
            self._write_frame(file, [], 0)
        except OSError:
            return  # the next frame, or the next seal, is written over it
        self._file = file._replace(sealed=True)

    def begin_compaction(
        self, source: Source, term: int, index: int, keep: Iterable[Record] = (), *, wait: bool = False
    ) -> Compaction:
        """Begins to replace all records by a snapshot of the state after entry `index` and the records `keep`.

        What is synced from now on is kept too. The caller takes the steps of what is returned; with `wait`, all of them
        before it does anything else here. One that was under way is given up.

        Raises JournalWriteError (the file can't be made), JournalFailedError, JournalClosedError, and RuntimeError with
        a batch that is not synced.
        """
        self._writable()
        if self._buffer:
            raise RuntimeError("sync the batch before compacting")
        if self._compaction is not None:
            self._compaction.abort()
        try:
            self._compaction = Compaction(self, source, term, index, keep, wait)
        except OSError as error:
            raise JournalWriteError(f"the journal {self.path} could not be compacted: {error}") from error
        return self._compaction

    def compact(self, snapshot: bytes, term: int, index: int, keep: Iterable[Record] = ()) -> None:
        """The same at once, with a snapshot that is in memory.

        The old journal counts until the new one has its name. Raises JournalWriteError if that fails (the old journal
        goes on), and what `begin_compaction` raises.
        """
        self.begin_compaction(Whole(snapshot), term, index, keep, wait=True).finish()

    def open_snapshot(self) -> SnapshotFile | None:
        """The snapshot in the journal, to read and close; None if there is none that this process has written.

        Raises OSError.
        """
        return None if self._snapshot is None else SnapshotFile(self._files, self.path, self._snapshot)

    def forget_snapshot(self) -> None:
        """Lets nobody read the snapshot any more: what is read is not what was written."""
        self._snapshot = None

    def close(self) -> None:
        """Closes the files and lets go of the lock. What was appended and not synced is gone, and so is a compaction
        under way. May be repeated."""
        if self._compaction is not None:
            self._compaction.abort()
        self._buffer.clear()
        self._buffer_bytes = 0
        self.seal()
        self._release()

    def _writable(self) -> _File:
        if self._file is None or not self._file.size_bytes:
            raise JournalClosedError(f"the journal {self.path} is closed, or has not been replayed to its end")
        return self._file

    def _write_frame(self, file: _File, body: list[bytes], length: int) -> None:
        place = place_crc(file.salt_crc, file.size_bytes)
        parts = [encode_frame_head(place, file.sequence, body, length), *body]
        write_all(self._files, file.fd, parts, file.size_bytes)

    def _make(self) -> None:
        """A journal without records. Raises OSError, JournalFailedError."""
        salt = self._files.urandom(SALT_BYTES)
        fd = self._files.open(self.new_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            write_all(self._files, fd, [encode_header(self.cluster_id, self.replica_id, salt, HEADER_BYTES)], 0)
            self._make_durable(fd)
        except BaseException:
            self._files.close(fd)
            raise
        self._take_new(fd, zlib.crc32(salt), HEADER_BYTES, 0, None, self._files.close)

    def _take_new(
        self,
        fd: int,
        salt_crc: int,
        size_bytes: int,
        sequence: int,
        snapshot: SnapshotPlace | None,
        close: Callable[[int], object],
    ) -> None:
        """Gives a new file that is durable the journal's name, and goes on with it; `close` closes the old one.

        Raises OSError, and goes on as before. Raises JournalFailedError.
        """
        try:
            self._files.rename(self.new_path, self.path)
        except BaseException:
            self._files.close(fd)
            raise
        old, self._file = self._file, _File(fd, salt_crc, size_bytes, size_bytes, sequence)
        self._compaction, self._snapshot = None, snapshot
        try:
            if self._fsync:
                self._files.sync_directory(self.path.parent)
        except OSError as error:
            self._fail(f"given its name ({error})", error)
        finally:
            if old is not None:
                close(old.fd)

    def _take_back(self, file: _File, error: OSError) -> NoReturn:
        """After a failed write: the file as it was."""
        try:
            self._files.ftruncate(file.fd, file.size_bytes)
        except OSError:
            self._fail(f"written ({error}) nor cut back to what it was", error)
        self._file = file._replace(sealed=False)
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
        if self._compaction is not None:
            self._compaction.abandon()
        self._snapshot = None
        file, self._file = self._file, None
        if file is not None:
            self._files.close(file.fd)
        if self._lock_fd >= 0:
            self._files.close(self._lock_fd)
            self._lock_fd = -1


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
