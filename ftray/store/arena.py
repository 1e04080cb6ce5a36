"""The arena: the shared memory of one node, as its processes map it.

Role: shell. A `memfd` has no name, so nothing is ever left in `/dev/shm`. Workers inherit its descriptor, a driver
opens it through `/proc`. Its size is sealed: nobody can truncate it under the others, which would kill them.

Writers share one read-write map of the whole arena in each process. Each reader of an object gets a read-only map of
that object alone, an instance of a subclass of `mmap`: whatever looks into it (memoryviews, slices, numpy arrays) keeps
it alive through the buffer protocol, so its finaliser tells exactly when the last of them is gone.

A map costs 6 us, an entry in the kernel's table (65,530 for each process by default) and, before Python 3.13, a
descriptor, for `mmap` duplicates the one it is given. Past a number of maps, or when the system refuses one, the
reader gets a copy of the bytes instead: values are immutable, so all that is lost is the saving.

Rejected: `multiprocessing.shared_memory` (files with names, a tracker process); one read-only map for all objects
(nothing tells when the last view of one of them is gone); `weakref.finalize` (a registry entry and a closure for each
view, where `__del__` is the same finaliser for nothing); SCM_RIGHTS for drivers (the handshake would have to carry
descriptors).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import sys
from collections.abc import Callable
from typing import Final

MADV_POPULATE_WRITE: Final = 23
POPULATE_BYTES: Final = 1 << 20

MAPS_MAX: Final = 16_384
"""Live maps of objects in one process: a quarter of what the kernel allows by default."""


class _ReadMap(mmap.mmap):
    """The map of one object; alive as long as anything looks into it."""

    __slots__ = ("live", "on_release")

    live: dict[int, None]
    on_release: Callable[[], None]

    def __del__(self) -> None:
        # Anywhere: in any thread, within the garbage collector, while locks are held. One atomic step each.
        try:
            on_release = self.on_release
        except AttributeError:
            return  # the constructor failed
        self.live.pop(id(self), None)
        on_release()


class Arena:
    """One process's access to a node's shared memory. Sizes and offsets are in bytes."""

    __slots__ = ("fd", "size_bytes", "maps_max", "_live", "_mapped_bytes", "_write_map")

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Takes over the descriptor. Raises ValueError if what is behind it is smaller, OSError if nothing is."""
        actual = os.fstat(fd).st_size
        if size_bytes <= 0 or actual < size_bytes:
            raise ValueError(f"an arena of {size_bytes} bytes was announced, descriptor {fd} has {actual}")
        self.fd = fd
        """The descriptor; -1 when closed."""
        self.size_bytes = size_bytes
        self.maps_max = MAPS_MAX
        if sys.version_info < (3, 13):
            # Half of the descriptors that the process may have; the others are for sockets and the user's files.
            descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if descriptors != resource.RLIM_INFINITY:
                self.maps_max = min(MAPS_MAX, descriptors // 2)
        self._live: dict[int, None] = {}
        self._write_map: mmap.mmap | None = None
        self._mapped_bytes = 0
        """Up to here this process has written through its map."""

    @classmethod
    def create(cls, size_bytes: int) -> Arena:
        """A new arena, rounded up to whole pages; memory is used when it is first written to.

        Raises ValueError for a size that is not positive, OSError when the system has no more descriptors.
        """
        if size_bytes <= 0:
            raise ValueError(f"an arena can't have {size_bytes} bytes")
        size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("ftray-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, pid: int, fd: int, size_bytes: int) -> Arena:
        """The arena of the node process `pid`, whose descriptor there is `fd`.

        Raises OSError when that process is gone or is another user's, ValueError when it is not the arena announced.
        """
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(own, size_bytes)
        except BaseException:
            os.close(own)
            raise

    @classmethod
    def inherited(cls, fd: int, size_bytes: int) -> Arena:
        """The arena behind a descriptor that this process has inherited, and that `close` closes here.

        Raises OSError or ValueError when it is not the arena announced.
        """
        return cls(fd, size_bytes)

    @property
    def live_maps(self) -> int:
        """Maps of objects that something looks into now."""
        return len(self._live)

    def write_view(self, offset: int, size: int, fresh: bool = False) -> memoryview:
        """A writable view, for the creator of an object until it is sealed. Raises ValueError outside of the arena.

        `fresh`: nobody has written there yet; most of it is to be written by `write_at`.
        """
        self._check(offset, size)
        if self._write_map is None:
            self._write_map = mmap.mmap(self.fd, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        if not fresh and size >= POPULATE_BYTES and offset + size > self._mapped_bytes:
            self._populate(offset, size)
        return memoryview(self._write_map)[offset : offset + size]

    def _populate(self, offset: int, size: int) -> None:
        """Maps pages that exist, many at once: a third less than a fault for each when they are written."""
        begin = max(offset, self._mapped_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapped_bytes = offset + size
        assert self._write_map is not None
        try:
            self._write_map.madvise(MADV_POPULATE_WRITE, begin, offset + size - begin)
        except (OSError, ValueError):
            pass  # before Linux 5.14: then each page is mapped when it is written

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Writes through the file instead of a map: half the time for memory that nobody has touched, many times as
        long for memory that somebody has. Raises ValueError outside of the arena, OSError."""
        left = memoryview(data).cast("B")
        self._check(offset, left.nbytes)
        while left.nbytes:
            written = os.pwrite(self.fd, left, offset)
            offset += written
            left = left[written:]

    def read_view(self, offset: int, size: int, on_release: Callable[[], None]) -> memoryview:
        """A read-only view of an object.

        `on_release` is called once, when nothing looks into it any more, from wherever that happens, the garbage
        collector included: it may append to a deque and do nothing else. For an empty object, and where a copy is given
        instead of a map, it is called before this returns. Raises ValueError outside of the arena.
        """
        self._check(offset, size)
        if size and len(self._live) < self.maps_max:
            before = offset % mmap.ALLOCATIONGRANULARITY
            try:
                if sys.version_info >= (3, 13):
                    mapped = _ReadMap(
                        self.fd, before + size, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset - before, trackfd=False
                    )
                else:
                    mapped = _ReadMap(self.fd, before + size, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset - before)
            except OSError:
                pass  # no descriptors or no maps left: a copy
            else:
                self._live[id(mapped)] = None
                mapped.live = self._live
                mapped.on_release = on_release
                view = memoryview(mapped)
                return view[before:] if before else view
        copied = memoryview(bytes(self.write_view(offset, size)) if size else b"")
        on_release()
        return copied

    def close(self) -> None:
        """Closes the descriptor; twice is once. Views that are alive stay valid, and tell when they are gone."""
        if self.fd >= 0:
            write_map, self._write_map = self._write_map, None
            if write_map is not None:
                try:
                    write_map.close()
                except BufferError:
                    pass  # somebody is writing through it: it goes with that view
            os.close(self.fd)
            self.fd = -1

    def _check(self, offset: int, size: int) -> None:
        if self.fd < 0:
            raise ValueError("the arena is closed")
        if offset < 0 or size < 0 or offset + size > self.size_bytes:
            raise ValueError(f"{size} bytes at {offset} are outside of an arena of {self.size_bytes} bytes")
