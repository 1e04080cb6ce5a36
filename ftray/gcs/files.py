"""The files under a journal: what it asks of the operating system, so that a simulated disk can stand in for it.

Role: shell. `OsFiles` hands everything on; the simulator has its own.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Protocol

from ftray.gcs.state.errors import JournalLockedError


class Files(Protocol):
    """All raise OSError, as the calls of the same names do."""

    def open(self, path: Path, flags: int) -> int: ...
    def close(self, fd: int) -> None: ...
    def pread(self, fd: int, length: int, offset: int) -> bytes: ...
    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int: ...
    def ftruncate(self, fd: int, size: int) -> None: ...
    def fdatasync(self, fd: int) -> None: ...
    def size(self, fd: int) -> int: ...
    def exists(self, path: Path) -> bool: ...
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


class OsFiles:
    """The real ones."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

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

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def exists(self, path: Path) -> bool:
        return path.exists()

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
