"""Simulated disks: what `ftray.gcs.files.Files` promises, and what disks do beside it.

Role: shell without I/O. A `Disk` outlives the process; `SimFiles` is one process's view of it, and is dead after it.

What may go wrong
- A crash of the machine loses what was not synced: writes (each of them wholly, partly, in sectors, or not at all),
  names (a rename without a sync of the directory may be undone). A crash of the process alone loses nothing that was
  written.
- A full disk takes a part of a write and refuses the rest. A sync can be slow, can fail (nobody knows then what is
  on the disk: what was written is shown until the cache is dropped, and later syncs succeed). The machine can die in
  one, before or after the data was durable.
- A sync in the background ends when it has been asked for often enough, and may end in the same ways. What was written
  after it began is not made durable by it.
- A bit of what was written long ago can flip.

Rejected: keeping the durable image of each file (a copy for each sync); what was overwritten since is enough.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

SECTOR_BYTES = 512
FSYNC_MS = (0.1, 0.4)
POLL_MS = 2.0
"""How often a process asks whether a sync in the background is done, about."""


class CrashError(BaseException):
    """The machine dies here; without `power` only the process does."""

    def __init__(self, power: bool = True) -> None:
        super().__init__()
        self.power = power


class _File:
    """An inode."""

    __slots__ = ("data", "failed", "last_write", "undo", "written")

    def __init__(self) -> None:
        self.data = bytearray()
        self.undo: list[tuple[int, bytes, int, bytes]] = []
        """Writes since the last sync: offset, what was there, the former size, what was written."""
        self.last_write = 0
        """Where the last write began; 0 if that is not known. What is before it is old."""
        self.written = 0
        """How many writes there were."""
        self.failed = False
        """A sync has failed: what was written is shown, and reaches the disk no more."""

    def write(self, data: bytes, offset: int) -> None:
        size = len(self.data)
        self.written += 1
        self.undo.append((offset, bytes(self.data[offset : offset + len(data)]), size, data))
        if offset > size:
            self.data.extend(bytes(offset - size))
        self.data[offset : offset + len(data)] = data
        self.last_write = offset

    def truncate(self, size: int) -> None:
        self.written += 1
        self.undo.append((size, bytes(self.data[size:]), len(self.data), b""))
        del self.data[size:]
        self.last_write = 0

    def sync(self, writes: int) -> None:
        """The oldest so many writes since the last sync are durable."""
        if not self.failed:
            del self.undo[:writes]

    def forget_unsynced(self, rng: random.Random) -> None:
        """What the machine's end leaves of it."""
        undo, self.undo = self.undo, []
        self.failed = False
        if undo:
            self.last_write = 0
        for offset, before, size, _ in reversed(undo):
            self.data[offset : offset + len(before)] = before
            if len(self.data) < size:
                self.data.extend(bytes(size - len(self.data)))
            del self.data[size:]
        fate = rng.random()
        if fate < 0.4:
            return  # nothing of it has reached the disk
        for offset, _, _, after in undo:
            if not after:
                if fate > 0.9:
                    del self.data[offset:]
                continue
            if fate < 0.7:
                kept = after[: rng.randrange(len(after) + 1)]
            elif fate < 0.9:
                parts = [after[at : at + SECTOR_BYTES] for at in range(0, len(after), SECTOR_BYTES)]
                kept = b"".join(part if rng.random() < 0.5 else bytes(len(part)) for part in parts)
            else:
                kept = after
            if offset > len(self.data):
                self.data.extend(bytes(offset - len(self.data)))
            self.data[offset : offset + len(kept)] = kept
            if fate < 0.7 and len(kept) < len(after):
                return  # what comes after it is lost too


class Disk:
    """What a machine keeps."""

    def __init__(self, rng: random.Random, fsync_ms: tuple[float, float] = FSYNC_MS) -> None:
        self.rng = rng
        self.fsync_ms = fsync_ms
        self.names: dict[str, _File] = {}
        self.durable_names: dict[str, _File] = {}
        self.full = False
        self.fail_sync = False
        """The next sync fails."""
        self.crash_in_sync: bool | None = None
        """The machine dies in the next sync; True: after the data was durable."""
        self.kill_in_sync = False
        """Then only the process dies, and what it wrote may be shown to the next one without being durable."""
        self.syncs = 0

    def lose_power(self) -> None:
        """The machine has died."""
        self.crash_in_sync = None
        self.fail_sync = False
        files = {id(file): file for names in (self.durable_names, self.names) for file in names.values()}
        for file in files.values():
            file.forget_unsynced(self.rng)
        if self.durable_names != self.names and self.rng.random() < 0.5:
            self.names = dict(self.durable_names)
        self.durable_names = dict(self.names)

    def flip_bit(self) -> bool:
        """Damages something old. Returns whether there was anything."""
        for name in sorted(self.names):
            file = self.names[name]
            if not name.endswith(".new") and file.last_write > SECTOR_BYTES and not file.undo:
                at = self.rng.randrange(file.last_write)
                file.data[at] ^= 1 << self.rng.randrange(8)
                return True
        return False


class SimSyncing:
    """See `ftray.gcs.files.Syncing`."""

    def __init__(self, files: SimFiles, file: _File) -> None:
        disk = files.disk
        self._files = files
        self._file = file
        self._writes = file.written
        self._polls = 1 + int(disk.rng.uniform(*disk.fsync_ms) / POLL_MS)

    def done(self) -> bool:
        self._polls -= 1
        if self._polls > 0:
            return False
        if not self._polls:
            file = self._file
            self._files._synced(file, max(0, len(file.undo) - (file.written - self._writes)))
        return True


class SimFiles:
    """One process's view of a disk; see `ftray.gcs.files.Files`. `spend_ms` is told how long things take."""

    def __init__(self, disk: Disk, spend_ms: Callable[[float], object]) -> None:
        self.disk = disk
        self.dead = False
        self._spend_ms = spend_ms
        self._open: dict[int, _File] = {}
        self._next_fd = 3

    def open(self, path: Path, flags: int) -> int:
        name = str(path)
        file = self.disk.names.get(name)
        if file is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file", name)
            file = self.disk.names[name] = _File()
        elif flags & os.O_TRUNC:
            file.truncate(0)
        return self._descriptor(file)

    def _descriptor(self, file: _File) -> int:
        self._next_fd += 1
        self._open[self._next_fd] = file
        return self._next_fd

    def lock(self, path: Path) -> int:
        return self._descriptor(_File())

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return bytes(self._open[fd].data[offset : offset + length])

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._alive()
        data = bytes(data)
        if self.disk.full:
            if len(data) < 2:
                raise OSError(errno.ENOSPC, "no space left on the simulated disk")
            part = data[: self.disk.rng.randrange(len(data))]
            if not part:
                raise OSError(errno.ENOSPC, "no space left on the simulated disk")
            data = part if self.disk.rng.random() < 0.5 else part[:1]
        self._open[fd].write(data, offset)
        return len(data)

    def ftruncate(self, fd: int, size: int) -> None:
        self._alive()
        self._open[fd].truncate(size)

    def fdatasync(self, fd: int) -> None:
        self._alive()
        self._spend_ms(self.disk.rng.uniform(*self.disk.fsync_ms))
        file = self._open[fd]
        self._synced(file, len(file.undo))

    def begin_sync(self, fd: int) -> SimSyncing:
        self._alive()
        return SimSyncing(self, self._open[fd])

    def close_later(self, fd: int) -> None:
        self.close(fd)

    def _synced(self, file: _File, writes: int) -> None:
        """The end of a sync of the first so many writes."""
        self._alive()
        disk = self.disk
        disk.syncs += 1
        if disk.fail_sync:
            disk.fail_sync = False
            file.failed = True
            raise OSError(errno.EIO, "the simulated disk has failed")
        crash, disk.crash_in_sync = disk.crash_in_sync, None
        if crash is not False:
            file.sync(writes)
        if crash is not None:
            self.dead = True  # what its end would still write is not written
            raise CrashError(power=not disk.kill_in_sync)

    def drop_cached(self, fd: int) -> None:
        file = self._open[fd]
        if file.failed:
            file.forget_unsynced(self.disk.rng)

    def size(self, fd: int) -> int:
        return len(self._open[fd].data)

    def exists(self, path: Path) -> bool:
        return str(path) in self.disk.names

    def rename(self, source: Path, target: Path) -> None:
        self._alive()
        self.disk.names[str(target)] = self.disk.names.pop(str(source))

    def unlink(self, path: Path) -> None:
        self.disk.names.pop(str(path), None)

    def make_directory(self, path: Path, fsync: bool) -> None:
        """There is only one, and it is there."""

    def sync_directory(self, path: Path) -> None:
        self._alive()
        self._spend_ms(self.disk.rng.uniform(*self.disk.fsync_ms))
        if self.disk.fail_sync:
            self.disk.fail_sync = False
            raise OSError(errno.EIO, "the simulated disk has failed")
        self.disk.durable_names = dict(self.disk.names)

    def urandom(self, count: int) -> bytes:
        return self.disk.rng.randbytes(count)

    def _alive(self) -> None:
        if self.dead:
            raise OSError(errno.EIO, "the process is dead")
