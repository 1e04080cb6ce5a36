"""What lies in a node's arena: objects, who holds them there, and what may go when room is needed.

Role: pure; the raylet is its shell. Clients are processes of this node, named by their worker ids.

Rules:
- An object is **created** (room is taken, its creator writes), then **sealed** (immutable, others may pin it), then
  **freed** by its owner. Creating pins it for the creator, until the creator releases it.
- A *client pin* says that a process may look into the bytes. They are counted for each client, and a client's death
  ends its own and nobody else's. The *primary pin* is the owner's: this copy is the one that must not be lost.
- Memory is reused when no pin is left: never while anything may still look into it. A freed object can't be pinned
  any more, but those who look into it already go on.
- What has neither pin is a cached copy: it may be evicted, the least recently released first, and only when an
  object that needs the room will fit for it.
- A primary that no client has pinned may be **spilled**: `begin_spill` gives out the least recently released one, the
  shell writes its file, and from `spilled` on it is like a cached copy: its memory goes when it is needed, and the
  object is then on disk alone. `begin_restore` takes room for it again, the shell reads the file, and after
  `restored` it is a copy whose file is still there: it is dropped without being written again. While bytes are on
  their way the disk has a pin on them, as any client has.
- A file goes with its generation (`take_unlinks`). One that turns out to be damaged leaves an object that is *lost*:
  who asks for it is told why, until its owner frees it or it is made again.
- Ids come back, for a task that runs again makes the same ones. A sealed object stays as it is. One that another
  process is still writing is superseded: the newer attempt is the one that the owner waits for, and the older writer
  keeps its bytes to itself until it lets go of them. So there may be several *generations* of one id, of which only
  the newest, if it was not freed, can be found. Releases name the id alone; with pins on several generations, all are
  held until as many were released as were taken.

Rejected: refusing an id while an old generation is still looked into (a reader that keeps an array would block the
task's retry for ever); handing out pin numbers (readers would carry them, for a case that hardly ever happens);
writing and dropping in one step (what is written ahead of need can stay in memory until somebody needs the room).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator

from ftray.store.allocator import PAGE_BYTES, Allocator
from ftray.store.records import (
    DISK,
    IDLE,
    NOWHERE,
    ON_DISK,
    RESTORING,
    SPILLING,
    UNSEALED,
    Created,
    Dropped,
    Exists,
    FilePlace,
    Full,
    Job,
    Lost,
    ObjectRow,
    OnDisk,
    Place,
    StoredObject,
    StoreError,
    StoreStats,
    Unsealed,
)
from ftray.store.table_audit import check_table

__all__ = [
    "ON_DISK", "UNSEALED", "Created", "Dropped", "Exists", "FilePlace", "Full", "Job", "Lost", "ObjectRow",
    "ObjectTable", "OnDisk", "Place", "StoreError", "StoreStats", "Unsealed",
]  # fmt: skip


class ObjectTable:
    """The objects of one node's store.

    All operations take constant time, but those that name a client or an owner, which take time in proportion to
    what they answer. Raises AllocatorError for a capacity without room for one page.
    """

    __slots__ = (
        "_allocator", "_cached", "_clients", "_doomed", "_evictable_bytes", "_evicted_total", "_file_bytes", "_files",
        "_freed_count", "_jobs", "_jobs_total", "_objects", "_owned", "_released", "_restored_total", "_spillable",
        "_spillable_bytes", "_spilled_bytes", "_spilled_count", "_spilled_total", "_spilling_bytes", "_unlinks",
        "_waiters",
    )  # fmt: skip

    def __init__(self, capacity_bytes: int) -> None:
        self._allocator = Allocator(capacity_bytes, PAGE_BYTES)
        self._objects: dict[bytes, StoredObject] = {}
        """The generation that can be found, by id."""
        self._doomed: dict[bytes, list[StoredObject]] = {}
        """Generations that can't, and are pinned."""
        self._freed_count = 0
        self._clients: dict[bytes, dict[StoredObject, None]] = {}
        """What each client has pinned."""
        self._owned: dict[bytes, dict[bytes, None]] = {}
        """Ids of the findable objects of each owner."""
        self._cached: OrderedDict[bytes, StoredObject] = OrderedDict()
        """What may leave memory at once: sealed and without any pin, or primary with a file and without a client's
        pin. Least recently released first. (A plain dict is slow to pop from the front.)"""
        self._evictable_bytes = 0
        self._evicted_total = 0
        self._released: dict[tuple[bytes, bytes], int] = {}
        """Releases counted by (client, id) where the client has pins on several generations."""
        self._waiters: dict[bytes, dict[Hashable, None]] = {}
        self._spillable: OrderedDict[bytes, StoredObject] = OrderedDict()
        """Sealed primaries that are in memory alone and that no client has pinned, least recently released first."""
        self._spillable_bytes = 0
        self._jobs: dict[int, StoredObject] = {}
        """What is on its way to or from the disk."""
        self._jobs_total = 0
        self._spilling_bytes = 0
        self._spilled_count = self._spilled_bytes = self._spilled_total = self._restored_total = 0
        self._files = self._file_bytes = 0
        self._unlinks: list[int] = []

    # --- writing -----------------------------------------------------------------------------------------------------

    def create(
        self, object_id: bytes, size: int, client: bytes, owner: bytes, primary: bool = True
    ) -> Created | Exists | Full:
        """Takes room for an object of `size` bytes, which `client` will write and then seal or abort.

        `primary`: this is the copy that must not be lost (as opposed to a cached one); asked of an object that exists,
        it makes that one primary. What the client was writing under this id before is undone. Raises StoreError
        for a size that is negative or not a whole number.
        """
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise StoreError(f"an object can't have a size of {size!r} bytes")
        found = self._objects.get(object_id)
        if found is not None and found.sealed and not found.lost:
            if primary and not found.primary:
                self._uncache(found)
                found.primary = True
                self._settle(found)
            return Exists(found.offset, found.size)
        mine = self._writing(object_id, client)
        if mine is not None:
            self._undo(mine)
            found = self._objects.get(object_id)
        room = self._allocator.rounded(size)
        evicted: list[bytes] = []
        offset = self._take(room, evicted)
        if offset is None:
            return self._full(room, evicted)
        if found is not None:
            self._doom(found)
        entry = StoredObject(object_id, offset, size, room, owner, client, primary)
        self._objects[object_id] = entry
        self._owned.setdefault(owner, {})[object_id] = None
        self._add_pin(entry, client)
        return Created(entry.offset, tuple(evicted))

    def seal(self, object_id: bytes, client: bytes) -> list[Hashable]:
        """The creator has written it all. Returns the tokens that waited for it, in the order of their coming.

        It keeps the creator's pin. Of an object that was freed or superseded meanwhile, nobody hears. Raises
        StoreError if the client is not writing this object.
        """
        entry = self._writing(object_id, client)
        if entry is None:
            raise StoreError(f"object {object_id.hex()} can't be sealed: this client is not writing it")
        entry.sealed = True
        return [] if entry.doomed else list(self._waiters.pop(object_id, ()))

    def abort(self, object_id: bytes, client: bytes) -> None:
        """The creator gives up. Who waits for the object goes on waiting: it may be created again.

        Raises StoreError if the client is not writing this object.
        """
        entry = self._writing(object_id, client)
        if entry is None:
            raise StoreError(f"object {object_id.hex()} can't be aborted: this client is not writing it")
        self._undo(entry)

    def free(self, object_id: bytes, owner: bytes | None = None) -> list[Hashable]:
        """The owner needs the value no more: it can't be found from now on, and goes with its last pin.

        Returns tokens that waited for it to be sealed: it won't be. An object that is not here is no error. Raises
        StoreError if `owner` is given and is not the object's.
        """
        entry = self._objects.get(object_id)
        if entry is None:
            return list(self._waiters.pop(object_id, ()))
        if owner is not None and owner != entry.owner:
            raise StoreError(f"object {object_id.hex()} can only be freed by its owner, {entry.owner.hex()}")
        self._doom(entry)
        return list(self._waiters.pop(object_id, ()))

    # --- reading -----------------------------------------------------------------------------------------------------

    def pin(self, object_id: bytes, client: bytes) -> Place | Unsealed | OnDisk | Lost | None:
        """Pins a sealed object that is in memory, once more each time. None: it is not here. Else nothing is pinned."""
        entry = self._objects.get(object_id)
        if entry is None:
            return None
        if not entry.sealed:
            return UNSEALED
        if entry.lost:
            return Lost(entry.lost)
        if entry.offset == NOWHERE or entry.busy == RESTORING:
            return ON_DISK
        self._add_pin(entry, client)
        return Place(entry.offset, entry.size)

    def pin_file(self, object_id: bytes, client: bytes) -> FilePlace | None:
        """Pins an object that has a file, so that the client may read that. None: it has none."""
        entry = self._objects.get(object_id)
        if entry is None or not entry.file:
            return None
        self._add_pin(entry, client)
        return FilePlace(entry.file, entry.size, entry.checksum)

    def release(self, object_id: bytes, client: bytes, n: int = 1) -> bool:
        """Drops `n` of the client's pins. Returns whether room was made (or could be now, by eviction).

        Raises StoreError if the client has not that many, or is still writing the object.
        """
        if n < 1:
            raise StoreError(f"can't release {n} pins")
        if object_id in self._doomed:
            return self._release_of_several(object_id, client, n)
        entry = self._objects.get(object_id)
        held = entry.pins.get(client, 0) if entry is not None else 0
        if entry is None or not entry.sealed or held < n:
            raise self._not_released(object_id, client, held, n)
        if held > n:
            entry.pins[client] = held - n
            return False
        return self._drop_pins(entry, client)

    def wait_for(self, object_id: bytes, token: Hashable) -> bool:
        """Registers a token that `seal` (or `free`) will return. False, and nothing happens, if it is sealed
        already."""
        entry = self._objects.get(object_id)
        if entry is not None and entry.sealed:
            return False
        self._waiters.setdefault(object_id, {})[token] = None
        return True

    def cancel_wait(self, object_id: bytes, token: Hashable) -> None:
        """Forgets a token; one that is not known is no error."""
        tokens = self._waiters.get(object_id)
        if tokens is not None:
            tokens.pop(token, None)
            if not tokens:
                del self._waiters[object_id]

    # --- to the disk and back ----------------------------------------------------------------------------------------

    def next_spill_bytes(self) -> int:
        """The size of what `begin_spill` would give out, 0 if nothing."""
        for entry in self._spillable.values():
            return entry.size
        return 0

    def postpone_spill(self) -> None:
        """What `begin_spill` would give out goes behind all others."""
        self._spillable.move_to_end(next(iter(self._spillable)))

    def begin_spill(self) -> Job | None:
        """The least recently released primary without a file is to be written; ended by `spilled` or `not_spilled`."""
        if not self._spillable:
            return None
        entry = next(iter(self._spillable.values()))
        self._spilling_bytes += entry.room
        return self._begin(entry, SPILLING)

    def spilled(self, number: int, checksum: int) -> None:
        """The bytes are in the file of this number. Raises StoreError for a job that there is not."""
        entry = self._end(number, SPILLING)
        self._spilling_bytes -= entry.room
        entry.file, entry.checksum = number, checksum
        self._files += 1
        self._file_bytes += entry.size
        self._spilled_total += entry.size
        self._drop_pins(entry, DISK)

    def not_spilled(self, number: int) -> None:
        """They could not be written: all is as before, but other objects are tried first. Raises StoreError."""
        entry = self._end(number, SPILLING)
        self._spilling_bytes -= entry.room
        self._drop_pins(entry, DISK)

    def begin_restore(self, object_id: bytes) -> Job | Full | None:
        """Takes room for an object that is on disk alone; ended by `restored` or `not_restored`. None: it is not."""
        entry = self._objects.get(object_id)
        if entry is None or not entry.is_spilled:
            return None
        evicted: list[bytes] = []
        offset = self._take(entry.room, evicted)
        if offset is None:
            return self._full(entry.room, evicted)
        self._spilled_count -= 1
        self._spilled_bytes -= entry.size
        entry.offset = offset
        return self._begin(entry, RESTORING)

    def restored(self, number: int) -> None:
        """The bytes are in memory again. Raises StoreError for a job that there is not."""
        entry = self._end(number, RESTORING)
        self._restored_total += entry.size
        self._drop_pins(entry, DISK)

    def not_restored(self, number: int, lost: str = "") -> None:
        """They are not; `lost` says why, if the file is damaged and the object is lost by that. Raises StoreError."""
        entry = self._end(number, RESTORING)
        self._leave_memory(entry)
        if lost:
            entry.lost = lost
            self._remove_file(entry)
        self._drop_pins(entry, DISK)

    def take_unlinks(self) -> list[int]:
        """Numbers of files that are not needed any more."""
        unlinks, self._unlinks = self._unlinks, []
        return unlinks

    # --- deaths ------------------------------------------------------------------------------------------------------

    def drop_client(self, client: bytes) -> Dropped:
        """The client is gone: its pins are, and what it was writing is undone."""
        dropped = Dropped([], [])
        for entry in list(self._clients.get(client, ())):
            self._released.pop((client, entry.object_id), None)
            if entry.sealed:
                dropped.released.append(entry.object_id)
                self._drop_pins(entry, client)
            else:
                dropped.aborted.append(entry.object_id)
                self._undo(entry)
        return dropped

    def owned_by(self, owner: bytes) -> list[bytes]:
        """Ids of the objects here that are this owner's, to free them when it is dead."""
        return list(self._owned.get(owner, ()))

    # --- what there is -----------------------------------------------------------------------------------------------

    def __contains__(self, object_id: object) -> bool:
        """Whether the object is here (in memory or on disk), sealed and not freed."""
        entry = self._objects.get(object_id) if isinstance(object_id, bytes) else None
        return entry is not None and entry.sealed and not entry.lost

    def holders(self) -> list[bytes]:
        """Clients that have pinned anything."""
        return [client for client in self._clients if client != DISK]

    def size_of(self, object_id: bytes) -> int:
        """The size of an object that can be found. Raises KeyError for others."""
        return self._objects[object_id].size

    def rounded(self, size: int) -> int:
        """What so many bytes take up in memory."""
        return self._allocator.rounded(size)

    @property
    def capacity_bytes(self) -> int:
        return self._allocator.capacity_bytes

    @property
    def solid_bytes(self) -> int:
        """What does not leave memory without a further decision: not evictable, and not being written to disk."""
        return self._allocator.used_bytes - self._evictable_bytes - self._spilling_bytes

    @property
    def spillable_bytes(self) -> int:
        return self._spillable_bytes

    @property
    def spilling_bytes(self) -> int:
        return self._spilling_bytes

    @property
    def file_bytes(self) -> int:
        """The sizes of all files that are or are being written."""
        return self._file_bytes + self._spilling_bytes

    def stats(self) -> StoreStats:
        """Sums, without a scan."""
        used = self._allocator.used_bytes
        return StoreStats(
            capacity_bytes=self._allocator.capacity_bytes,
            used_bytes=used,
            pinned_bytes=used - self._evictable_bytes,
            evictable_bytes=self._evictable_bytes,
            biggest_free_bytes=self._allocator.biggest_free_bytes,
            objects=len(self._objects),
            freed_objects=self._freed_count,
            evicted_total=self._evicted_total,
            spillable_bytes=self._spillable_bytes,
            spilled_objects=self._spilled_count,
            spilled_bytes=self._spilled_bytes,
            spill_files=self._files,
            spill_file_bytes=self._file_bytes,
            spilled_bytes_total=self._spilled_total,
            restored_bytes_total=self._restored_total,
        )

    def rows(self) -> Iterator[ObjectRow]:
        """Every object here, with all that keeps it."""
        for entry in self._all():
            yield entry.row()

    def check(self) -> None:
        """Raises AssertionError if the books are not consistent. Linear; for tests and simulation."""
        check_table(self)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[StoredObject]:
        yield from self._objects.values()
        for generations in self._doomed.values():
            yield from generations

    def _generations(self, object_id: bytes) -> list[StoredObject]:
        found = self._objects.get(object_id)
        doomed = self._doomed.get(object_id, [])
        return doomed if found is None else [found, *doomed]

    def _writing(self, object_id: bytes, client: bytes) -> StoredObject | None:
        """The generation that the client is writing; there is one at most."""
        for entry in self._generations(object_id):
            if not entry.sealed and entry.creator == client:
                return entry
        return None

    def _full(self, room: int, evicted: list[bytes]) -> Full:
        a = self._allocator
        evictable = self._evictable_bytes
        return Full(room, a.free_bytes, a.biggest_free_bytes, evictable, a.capacity_bytes, tuple(evicted))

    def _not_released(self, object_id: bytes, client: bytes, held: int, n: int) -> StoreError:
        if held and self._writing(object_id, client) is not None:
            return StoreError(f"object {object_id.hex()} is not sealed: seal or abort it, then release it")
        return StoreError(f"object {object_id.hex()}: released {n} pins, this client has {held}")

    def _release_of_several(self, object_id: bytes, client: bytes, n: int) -> bool:
        pinned = [entry for entry in self._generations(object_id) if entry.sealed and client in entry.pins]
        counted = self._released.get((client, object_id), 0) + n
        held = sum(entry.pins[client] for entry in pinned)
        if counted > held:
            writing = self._writing(object_id, client) is not None
            raise self._not_released(object_id, client, int(writing) if not held else held - counted + n, n)
        if counted < held:
            if len(pinned) == 1:
                pinned[0].pins[client] -= n
            else:
                self._released[client, object_id] = counted
            return False
        self._released.pop((client, object_id), None)
        made_room = False
        for entry in pinned:
            made_room |= self._drop_pins(entry, client)
        return made_room

    def _add_pin(self, entry: StoredObject, client: bytes) -> None:
        if not entry.pins:
            self._uncache(entry)
        count = entry.pins.get(client, 0)
        entry.pins[client] = count + 1
        if not count:
            self._clients.setdefault(client, {})[entry] = None

    def _drop_pins(self, entry: StoredObject, client: bytes) -> bool:
        """All of the client's pins on a sealed generation. Returns whether room was made or could be."""
        del entry.pins[client]
        held = self._clients[client]
        del held[entry]
        if not held:
            del self._clients[client]
        if entry.pins:
            return False
        if entry.doomed:
            self._dispose(entry)
            return True
        return self._settle(entry)

    def _settle(self, entry: StoredObject) -> bool:
        """Without pins, what is in memory may be evicted or spilled. Returns whether it may be."""
        if entry.pins or entry.offset == NOWHERE:
            return False
        if not entry.primary or entry.file:
            self._cached[entry.object_id] = entry
            self._evictable_bytes += entry.room
            return True
        if entry.room:
            self._spillable[entry.object_id] = entry
            self._spillable_bytes += entry.room
        return False

    def _undo(self, entry: StoredObject) -> None:
        """Ends a creation: the only pin is its creator's."""
        if not entry.doomed:
            self._doom(entry)
        self._drop_pins(entry, entry.creator)

    def _doom(self, entry: StoredObject) -> None:
        """It can't be found any more, and goes with its last pin."""
        self._uncache(entry)
        del self._objects[entry.object_id]
        ids = self._owned[entry.owner]
        del ids[entry.object_id]
        if not ids:
            del self._owned[entry.owner]
        entry.doomed = True
        entry.primary = False
        self._doomed.setdefault(entry.object_id, []).append(entry)
        self._freed_count += 1
        if not entry.pins:
            self._dispose(entry)

    def _dispose(self, entry: StoredObject) -> None:
        generations = self._doomed[entry.object_id]
        generations.remove(entry)
        if not generations:
            del self._doomed[entry.object_id]
        self._freed_count -= 1
        if entry.file:
            self._remove_file(entry)
        if entry.room and entry.offset != NOWHERE:
            self._allocator.free(entry.offset)

    def _uncache(self, entry: StoredObject) -> None:
        """It is pinned or goes."""
        if self._cached.get(entry.object_id) is entry:
            del self._cached[entry.object_id]
            self._evictable_bytes -= entry.room
        elif self._spillable.get(entry.object_id) is entry:
            del self._spillable[entry.object_id]
            self._spillable_bytes -= entry.room

    def _take(self, room: int, evicted: list[bytes]) -> int | None:
        """The offset of so much room, made by evicting if need be; None, and nothing evicted, if that can't help."""
        if not room:
            return 0
        if room > self._allocator.free_bytes + self._evictable_bytes:
            return None
        offset = self._allocator.allocate(room)
        while offset is None and self._cached:
            evicted.append(self._evict())
            offset = self._allocator.allocate(room)
        return offset

    def _evict(self) -> bytes:
        """The least recently released cached copy leaves memory; a primary's file stays."""
        object_id, entry = next(iter(self._cached.items()))
        if entry.primary:
            self._uncache(entry)
            self._leave_memory(entry)
        else:
            self._doom(entry)
        self._evicted_total += 1
        return object_id

    # --- files -------------------------------------------------------------------------------------------------------

    def _begin(self, entry: StoredObject, busy: int) -> Job:
        self._jobs_total += 1
        number = self._jobs_total
        self._jobs[number] = entry
        self._add_pin(entry, DISK)
        entry.busy = busy
        return Job(number, entry.offset, entry.size, entry.file, entry.checksum)

    def _end(self, number: int, busy: int) -> StoredObject:
        entry = self._jobs.get(number)
        if entry is None or entry.busy != busy:
            raise StoreError(f"there is no such job {number}")
        del self._jobs[number]
        entry.busy = IDLE
        return entry

    def _leave_memory(self, entry: StoredObject) -> None:
        self._allocator.free(entry.offset)
        entry.offset = NOWHERE
        self._spilled_count += 1
        self._spilled_bytes += entry.size

    def _remove_file(self, entry: StoredObject) -> None:
        if entry.is_spilled:
            self._spilled_count -= 1
            self._spilled_bytes -= entry.size
        self._unlinks.append(entry.file)
        entry.file = 0
        self._files -= 1
        self._file_bytes -= entry.size
