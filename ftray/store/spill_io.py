"""The bytes of one spilled object, to a file and back.

Role: shell; runs in threads of the raylet, and in readers that read a file themselves. A file has nothing but the
object's bytes. Its length and checksum are the raylet's to know, so that a file in the wrong place is found out too.

Rules: CRC-32, in pieces that stay in the processor's cache. It finds every torn, swapped or flipped piece but one in
four billion, at 7 GB/s, and gives the interpreter lock away meanwhile. The room is reserved before the first byte is
written: a full disk is then known at once, and not when a late write-back can tell nobody. Nothing is synced: the
files end with their node.

Rejected: BLAKE2 and SHA-256 (1.4 and 2 GB/s, slower than the disk's cache, against forgers that could change the
memory as well); Adler-32 (4 GB/s here, and weak); a header in the file (one more thing to be damaged);
mapping files instead of reading them (a disk error would be a signal that ends the reader, and the checksum would be of
bytes that may be read again later); several objects in one file (a file costs 50 us, the smallest object as much to
copy).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final
from zlib import crc32

CHUNK_BYTES: Final = 1 << 20
FULL_ERRORS: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What the system says of a full disk, a used-up quota, a file beyond the limit."""
_LOST_ERRORS: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ESTALE))
"""Reading it again won't help."""


class SpillDamagedError(Exception):
    """The file is not what was written; the text says how."""


class SpillStoppedError(Exception):
    """The node stops."""


def write_file(path: str, data: memoryview, is_stopped: Callable[[], bool]) -> int:
    """Writes a new file; returns the checksum. Makes the directory if it is not there.

    Raises OSError, or SpillStoppedError when `is_stopped` says so; the file is then gone again.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        os.makedirs(os.path.realpath(os.path.dirname(path)), 0o700, exist_ok=True)
        fd = os.open(path, flags, 0o600)
    try:
        checksum = _write(fd, data, is_stopped)
    except BaseException:
        unlink_file(path)
        raise
    return checksum


def _write(fd: int, data: memoryview, is_stopped: Callable[[], bool]) -> int:
    checksum = 0
    try:
        os.posix_fallocate(fd, 0, data.nbytes)
        for start in range(0, data.nbytes, CHUNK_BYTES):
            if is_stopped():
                raise SpillStoppedError
            chunk = data[start : start + CHUNK_BYTES]
            checksum = crc32(chunk, checksum)
            while chunk:
                chunk = chunk[os.write(fd, chunk) :]
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)  # network file systems say only here that there was no room
    return checksum


def read_file(path: str, checksum: int, target: memoryview) -> None:
    """Fills `target` from a file, which must have exactly those bytes.

    Raises SpillDamagedError if it has not, or can't be read now or later; other OSErrors may pass.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = _read(fd, checksum, target)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _LOST_ERRORS:
            raise SpillDamagedError(f"its file {path} can't be read: {error.strerror}") from None
        raise
    if found:
        raise SpillDamagedError(f"its file {path} {found}")


def _read(fd: int, checksum: int, target: memoryview) -> str:
    """What is wrong with the file, or nothing."""
    size = target.nbytes
    there = os.fstat(fd).st_size
    if there != size:
        return f"has {there:,} bytes instead of {size:,}"
    found = 0
    for start in range(0, size, CHUNK_BYTES):
        chunk = target[start : start + CHUNK_BYTES]
        done = 0
        while done < chunk.nbytes:
            count = os.preadv(fd, [chunk[done:]], start + done)
            if not count:
                return f"ends after {start + done:,} bytes instead of {size:,}"
            done += count
        found = crc32(chunk, found)
    return "" if found == checksum else f"has the checksum {found:08x} instead of {checksum:08x}"


def unlink_file(path: str) -> None:
    """Removes a file; one that is gone is no error."""
    try:
        os.unlink(path)
    except OSError:
        pass
