"""What the object table answers, and what it keeps of each object.

Role: pure data. `table.py` has the rules, and gives these names on.

Rejected: one class for a place in memory, on disk and nowhere (each caller would have to look at flags that mean
nothing in two cases of three).
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

DISK: Final = b""
"""The client whose pins are those of the disk: what is being written or read is not moved."""
NOWHERE: Final = -1
"""The offset of an object that is not in memory."""
IDLE, SPILLING, RESTORING = 0, 1, 2


class StoreError(Exception):
    """A client asked for something that makes no sense; nothing was changed. The text is for its reply."""


class Created(NamedTuple):
    """Room at `offset`, and the cached copies that had to go for it."""

    offset: int
    evicted: tuple[bytes, ...] = ()


class Exists(NamedTuple):
    """The object is here and sealed already (at NOWHERE, if it is on disk). It was not pinned for the client."""

    offset: int
    size: int


class Full(NamedTuple):
    """No room, in bytes: what is needed, what is free in all and at a piece, and what could be evicted.

    With `needed` above `capacity`, it will never fit. `evicted` went in vain, as what is free is in pieces.
    """

    needed: int
    free: int
    biggest: int
    evictable: int
    capacity: int
    evicted: tuple[bytes, ...] = ()


class Place(NamedTuple):
    """Where a pinned object lies."""

    offset: int
    size: int


class FilePlace(NamedTuple):
    """In which file a pinned object lies, of how many bytes, and their checksum."""

    number: int
    size: int
    checksum: int


class Lost(NamedTuple):
    """The object was here, and its only copy is damaged."""

    why: str


class Job(NamedTuple):
    """Bytes to move between memory and a file. A write makes the file with the job's own number."""

    number: int
    offset: int
    size: int
    file: int = 0
    """What to read; 0 for a write."""
    checksum: int = 0


class Unsealed(Enum):
    """The object is being written: wait for it."""

    UNSEALED = "unsealed"


UNSEALED: Final = Unsealed.UNSEALED


class OnDisk(Enum):
    """The object is not in memory (yet): restore it, or read its file."""

    ON_DISK = "on disk"


ON_DISK: Final = OnDisk.ON_DISK


class Dropped(NamedTuple):
    """What a dead client left: creations that were undone, and objects that it had pinned."""

    aborted: list[bytes]
    released: list[bytes]


class StoreStats(NamedTuple):
    """Bytes in memory, in whole pages: `used` is `pinned` (by clients or as primaries) and `evictable`."""

    capacity_bytes: int
    used_bytes: int
    pinned_bytes: int
    evictable_bytes: int
    biggest_free_bytes: int
    objects: int
    freed_objects: int
    """Freed, but still looked into."""
    evicted_total: int
    """Since the start: copies that left memory because room was needed."""
    spillable_bytes: int = 0
    """Primary copies that nobody looks into and that have no file yet: a part of `pinned`."""
    spilled_objects: int = 0
    """Those that are on disk alone, not in memory, and their sizes."""
    spilled_bytes: int = 0
    spill_files: int = 0
    """All files, those of objects that are in memory too included, and their sizes."""
    spill_file_bytes: int = 0
    spilled_bytes_total: int = 0
    """Since the start: written to disk, and read back into memory."""
    restored_bytes_total: int = 0


class ObjectRow(NamedTuple):
    """For `ftray memory`: one generation of an object, and every reason why it is there."""

    object_id: bytes
    offset: int
    """NOWHERE if it is not in memory."""
    size: int
    state: str
    """'creating', 'sealed', 'spilling', 'spilled', 'restoring', 'lost', or 'freed' (or superseded) and still looked
    into."""
    owner: bytes
    creator: bytes
    primary: bool
    pins: dict[bytes, int]
    """Pins by client."""
    on_disk: bool = False
    """It has a file."""


class StoredObject:
    """One generation of an object. Compared by identity."""

    __slots__ = (
        "busy", "checksum", "creator", "doomed", "file", "lost", "object_id", "offset", "owner", "pins", "primary",
        "room", "sealed", "size",
    )  # fmt: skip

    def __init__(
        self, object_id: bytes, offset: int, size: int, room: int, owner: bytes, creator: bytes, primary: bool
    ) -> None:
        self.object_id = object_id
        self.offset = offset
        """NOWHERE if it is not in memory."""
        self.size = size
        self.room = room
        """Bytes that it takes up in memory, in whole pages; 0 for an empty object, which has no place."""
        self.owner = owner
        self.creator = creator
        self.primary = primary
        self.sealed = False
        self.doomed = False
        """Freed or superseded: it goes with its last pin."""
        self.pins: dict[bytes, int] = {}
        self.busy = IDLE
        self.file = 0
        """The number of its file, and the checksum of what is in it; 0 if it has none."""
        self.checksum = 0
        self.lost = ""
        """Why there is no copy any more."""

    @property
    def is_spilled(self) -> bool:
        """Whether it is on disk alone."""
        return self.file != 0 and self.offset == NOWHERE

    def row(self) -> ObjectRow:
        if self.doomed:
            state = "freed"
        elif self.lost:
            state = "lost"
        elif not self.sealed:
            state = "creating"
        elif self.busy:
            state = "spilling" if self.busy == SPILLING else "restoring"
        else:
            state = "spilled" if self.offset == NOWHERE else "sealed"
        pins = {client: count for client, count in self.pins.items() if client != DISK}
        return ObjectRow(
            self.object_id, self.offset, self.size, state, self.owner, self.creator, self.primary, pins, self.file != 0
        )
