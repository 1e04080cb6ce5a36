"""The arena: the shared memory of one node, as its processes map it.

Role: shell. A `memfd` has no name, so nothing is ever left in `/dev/shm`; workers inherit its descriptor, a driver
opens it through `/proc`. Writers use one read-write map of the whole arena; each reader of an object gets a read-only
map of that object alone, and the map is alive exactly as long as anything that looks into it (numpy arrays, slices,
memoryviews): the buffer protocol keeps it, and its finaliser tells.

Rejected: `multiprocessing.shared_memory` (named files, a tracker process); one read-only map for all (nothing tells
when the last view of one object is gone); SCM_RIGHTS for drivers (the handshake would have to carry descriptors).
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable


class _ReadMap(mmap.mmap):
    """A map that can be watched by `weakref.finalize`."""


class Arena:
    """See the module. Sizes and offsets are in bytes; offsets are multiples of the page size."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self._write_map: mmap.mmap | None = None
        self._closed = False

    @classmethod
    def create(cls, size_bytes: int) -> Arena:
        """A new arena; memory is used when it is first written to. Raises OSError."""
        fd = os.memfd_create("ftray-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, size_bytes)

    @classmethod
    def open(cls, pid: int, fd: int, size_bytes: int) -> Arena:
        """The arena of the node process `pid`. Raises OSError when it is gone or belongs to another user."""
        return cls(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), size_bytes)

    @classmethod
    def inherited(cls, fd: int, size_bytes: int) -> Arena:
        """The arena behind a descriptor that this process has inherited."""
        return cls(fd, size_bytes)

    def write_view(self, offset: int, size: int) -> memoryview:
        """A writable view, for the creator of an object until it is sealed."""
        if self._write_map is None:
            self._write_map = mmap.mmap(self.fd, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        return memoryview(self._write_map)[offset : offset + size]

    def read_view(self, offset: int, size: int, on_release: Callable[[], None]) -> memoryview:
        """A read-only view. `on_release` is called once when nothing looks into it any more, from wherever that
        happens (the garbage collector too): it must only append to a deque."""
        mapped = _ReadMap(self.fd, max(size, 1), mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)
        weakref.finalize(mapped, on_release).atexit = False
        return memoryview(mapped)[:size]

    def close(self) -> None:
        """Closes the descriptor. Views that are alive stay valid."""
        if not self._closed:
            self._closed = True
            write_map, self._write_map = self._write_map, None
            if write_map is not None:
                try:
                    write_map.close()
                except BufferError:
                    pass  # a view of it is alive; it goes with the view
            os.close(self.fd)
