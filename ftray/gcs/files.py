"""The files under a journal: what it asks of the operating system, so that a simulated disk can stand in for it.

Role: shell. `OsFiles` hands everything on; the simulator has its own.

Two things take long with a large file, and the loop must not wait for them: to sync it, and to close it when it has no
name any more. Both are done by a thread that touches nothing but a descriptor, and lets go of the interpreter's lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import Protocol

from ftray.gcs.state.errors import JournalLockedError


class Syncing(Protocol):
    """A sync under way."""

    def done(self) -> bool:
        """Whether what was written before it began is durable. To be asked again until it is. Raises OSError."""
        ...


class Files(Protocol):
    """All raise OSError, as the calls of the same names do."""

    def open(self, path: Path, flags: int) -> int: ...
    def close(self, fd: int) -> None: ...
    def pread(self, fd: int, length: int, offset: int) -> bytes: ...
    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int: ...
    def ftruncate(self, fd: int, size: int) -> None: ...
    def fdatasync(self, fd: int) -> None: ...

    def begin_sync(self, fd: int) -> Syncing:
        """As `fdatasync`, without waiting. The descriptor may be closed meanwhile."""
        ...

    def close_later(self, fd: int) -> None:
        """Closes it without waiting: for a large file that has no name any more. Raises nothing."""
        ...

    def drop_cached(self, fd: int) -> None:
        """What is read next of the file comes from the disk, unless it still waits to be written. After a sync that
        failed, the system may go on showing what the disk never took, and have the next sync succeed."""
        ...

    def size(self, fd: int) -> int: ...
    def exists(self, path: Path) -> bool:
        """Also of a link that leads nowhere."""
        ...

    def rename(self, source: Path, target: Path) -> None: ...

    def unlink(self, path: Path) -> None:
        """A file that is not there is no error."""
        ...

    def make_directory(self, path: Path, fsync: bool) -> None:
        """With its parents."""
        ...

    def sync_directory(self, path: Path) -> None: ...

    def lock(self, path: Path) -> int:
        """Locks by a file of that name, until the descriptor is closed. Raises JournalLockedError."""
        ...

    def urandom(self, count: int) -> bytes: ...


class _OsSyncing:
    """See `Syncing`. It has a descriptor of its own."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="ftray-journal", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            os.close(self._fd)
            raise

    def _run(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._error = error
        finally:
            os.close(self._fd)

    def done(self) -> bool:
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True


class OsFiles:
    """The real ones."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def begin_sync(self, fd: int) -> Syncing:
        try:
            return _OsSyncing(fd)
        except RuntimeError as error:  # no more threads
            raise OSError(errno.EAGAIN, str(error)) from error

    def close_later(self, fd: int) -> None:
        try:
            threading.Thread(target=os.close, args=(fd,), name="ftray-journal", daemon=True).start()
        except RuntimeError:
            os.close(fd)

    def drop_cached(self, fd: int) -> None:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def make_directory(self, path: Path, fsync: bool) -> None:
        if path.is_dir():
            return
        self.make_directory(path.parent, fsync)
        path.mkdir(mode=0o700, exist_ok=True)
        if fsync:
            self.sync_directory(path.parent)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            journal = path.with_name(path.name.removesuffix(".lock"))
            raise JournalLockedError(
                f"the journal {journal} is open in another process ({error}): is this head running already?"
            ) from None
        return fd

    def urandom(self, count: int) -> bytes:
        return os.urandom(count)


OS_FILES = OsFiles()
