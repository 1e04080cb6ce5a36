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
- Ids come back, for a task that runs again makes the same ones. A sealed object stays as it is. One that another
  process is still writing is superseded: the newer attempt is the one that the owner waits for, and the older writer
  keeps its bytes to itself until it lets go of them. So there may be several *generations* of one id, of which only
  the newest, if it was not freed, can be found. Releases name the id alone; with pins on several generations, all are
  held until as many were released as were taken.

Rejected: refusing an id while an old generation is still looked into (a reader that keeps an array would block the
task's retry for ever); handing out pin numbers (readers would carry them, for a case that hardly ever happens).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from enum import Enum
from typing import Final, NamedTuple

from ftray.store.allocator import PAGE_BYTES, Allocator


class StoreError(Exception):
    """A client asked for something that makes no sense; nothing was changed. The text is for its reply."""


class Created(NamedTuple):
    """Room at `offset`, and the cached copies that had to go for it."""

    offset: int
    evicted: tuple[bytes, ...] = ()


class Exists(NamedTuple):
    """The object is here and sealed already. It was not pinned for the client."""

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


class Unsealed(Enum):
    """The object is being written: wait for it."""

    UNSEALED = "unsealed"


UNSEALED: Final = Unsealed.UNSEALED


class Dropped(NamedTuple):
    """What a dead client left: creations that were undone, and objects that it had pinned."""

    aborted: list[bytes]
    released: list[bytes]


class StoreStats(NamedTuple):
    """Bytes, in whole pages: `used` is `pinned` (by clients or as primaries) and `evictable`."""

    capacity_bytes: int
    used_bytes: int
    pinned_bytes: int
    evictable_bytes: int
    biggest_free_bytes: int
    objects: int
    freed_objects: int
    """Freed, but still looked into."""
    evicted_total: int
    """Since the start."""


class ObjectRow(NamedTuple):
    """For `ftray memory`: one generation of an object, and every reason why it is there."""

    object_id: bytes
    offset: int
    size: int
    state: str
    """'creating', 'sealed', 'freed' (or superseded) and still looked into."""
    owner: bytes
    creator: bytes
    primary: bool
    pins: dict[bytes, int]
    """Pins by client."""


class _Object:
    """One generation. Compared by identity."""

    __slots__ = ("object_id", "offset", "size", "room", "owner", "creator", "primary", "sealed", "doomed", "pins")

    def __init__(
        self, object_id: bytes, offset: int, size: int, room: int, owner: bytes, creator: bytes, primary: bool
    ) -> None:
        self.object_id = object_id
        self.offset = offset
        self.size = size
        self.room = room
        """Bytes taken up, in whole pages; 0 for an empty object, which has no place."""
        self.owner = owner
        self.creator = creator
        self.primary = primary
        self.sealed = False
        self.doomed = False
        """Freed or superseded: it goes with its last pin."""
        self.pins: dict[bytes, int] = {}


class ObjectTable:
    """The objects of one node's store.

    All operations take constant time, but those that name a client or an owner, which take time in proportion to
    what they answer. Raises AllocatorError for a capacity without room for one page.
    """

    __slots__ = (
        "_allocator", "_cached", "_clients", "_doomed", "_evictable_bytes", "_evicted_total", "_freed_count",
        "_objects", "_owned", "_released", "_waiters",
    )  # fmt: skip

    def __init__(self, capacity_bytes: int) -> None:
        self._allocator = Allocator(capacity_bytes, PAGE_BYTES)
        self._objects: dict[bytes, _Object] = {}
        """The generation that can be found, by id."""
        self._doomed: dict[bytes, list[_Object]] = {}
        """Generations that can't, and are pinned."""
        self._freed_count = 0
        self._clients: dict[bytes, dict[_Object, None]] = {}
        """What each client has pinned."""
        self._owned: dict[bytes, dict[bytes, None]] = {}
        """Ids of the findable objects of each owner."""
        self._cached: OrderedDict[bytes, _Object] = OrderedDict()
        """Sealed objects without any pin, least recently released first. (A plain dict is slow to pop from the
        front.)"""
        self._evictable_bytes = 0
        self._evicted_total = 0
        self._released: dict[tuple[bytes, bytes], int] = {}
        """Releases counted by (client, id) where the client has pins on several generations."""
        self._waiters: dict[bytes, dict[Hashable, None]] = {}

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
        if found is not None and found.sealed:
            if primary and not found.primary:
                found.primary = True
                self._uncache(found)
            return Exists(found.offset, found.size)
        mine = self._writing(object_id, client)
        if mine is not None:
            self._undo(mine)
            found = self._objects.get(object_id)
        room = self._allocator.rounded(size)
        offset: int | None = 0
        evicted: list[bytes] = []
        if room:
            if room > self._allocator.free_bytes + self._evictable_bytes:
                return self._full(room, evicted)
            offset = self._allocator.allocate(room)
            while offset is None and self._cached:
                evicted.append(self._evict())
                offset = self._allocator.allocate(room)
            if offset is None:
                return self._full(room, evicted)
        if found is not None:
            self._doom(found)
        entry = _Object(object_id, offset or 0, size, room, owner, client, primary)
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

    def pin(self, object_id: bytes, client: bytes) -> Place | Unsealed | None:
        """Pins a sealed object for the client, once more each time. None: it is not here."""
        entry = self._objects.get(object_id)
        if entry is None:
            return None
        if not entry.sealed:
            return UNSEALED
        self._add_pin(entry, client)
        return Place(entry.offset, entry.size)

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
        """Whether the object is here, sealed and not freed."""
        entry = self._objects.get(object_id) if isinstance(object_id, bytes) else None
        return entry is not None and entry.sealed

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
        )

    def rows(self) -> Iterator[ObjectRow]:
        """Every object here, with all that keeps it."""
        for entry in self._all():
            yield ObjectRow(
                entry.object_id, entry.offset, entry.size,
                "freed" if entry.doomed else "sealed" if entry.sealed else "creating",
                entry.owner, entry.creator, entry.primary, dict(entry.pins),
            )  # fmt: skip

    def check(self) -> None:
        """Raises AssertionError if the books are not consistent. Linear; for tests and simulation."""
        self._allocator.check()
        entries = list(self._all())
        places = {entry.offset: entry.room for entry in entries if entry.room}
        assert dict(self._allocator.blocks()) == places
        assert len(places) == sum(bool(entry.room) for entry in entries), "two objects in one place"
        pinned: dict[bytes, set[_Object]] = {}
        for entry in entries:
            assert entry.room >= entry.size >= 0
            assert all(count > 0 for count in entry.pins.values())
            assert entry.pins or not entry.doomed, "a doomed object without pins"
            assert entry.sealed or entry.pins == {entry.creator: 1}, "a creation is its creator's alone"
            cached = entry.sealed and not entry.pins and not entry.primary
            assert (self._cached.get(entry.object_id) is entry) == cached
            for client in entry.pins:
                pinned.setdefault(client, set()).add(entry)
        assert {client: set(held) for client, held in self._clients.items()} == pinned
        assert self._evictable_bytes == sum(entry.room for entry in self._cached.values())
        assert self._freed_count == sum(entry.doomed for entry in entries)
        owned: dict[bytes, set[bytes]] = {}
        for entry in self._objects.values():
            owned.setdefault(entry.owner, set()).add(entry.object_id)
        assert {owner: set(ids) for owner, ids in self._owned.items()} == owned
        assert not any(object_id in self for object_id in self._waiters)
        for client, object_id in self._released:
            assert sum(client in entry.pins for entry in self._doomed.get(object_id, ())) >= 1

    # --- inside ------------------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[_Object]:
        yield from self._objects.values()
        for generations in self._doomed.values():
            yield from generations

    def _generations(self, object_id: bytes) -> list[_Object]:
        found = self._objects.get(object_id)
        doomed = self._doomed.get(object_id, [])
        return doomed if found is None else [found, *doomed]

    def _writing(self, object_id: bytes, client: bytes) -> _Object | None:
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

    def _add_pin(self, entry: _Object, client: bytes) -> None:
        if not entry.pins:
            self._uncache(entry)
        count = entry.pins.get(client, 0)
        entry.pins[client] = count + 1
        if not count:
            self._clients.setdefault(client, {})[entry] = None

    def _drop_pins(self, entry: _Object, client: bytes) -> bool:
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
        if entry.primary:
            return False
        self._cached[entry.object_id] = entry
        self._evictable_bytes += entry.room
        return True

    def _undo(self, entry: _Object) -> None:
        """Ends a creation: the only pin is its creator's."""
        if not entry.doomed:
            self._doom(entry)
        self._drop_pins(entry, entry.creator)

    def _doom(self, entry: _Object) -> None:
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

    def _dispose(self, entry: _Object) -> None:
        generations = self._doomed[entry.object_id]
        generations.remove(entry)
        if not generations:
            del self._doomed[entry.object_id]
        self._freed_count -= 1
        if entry.room:
            self._allocator.free(entry.offset)

    def _uncache(self, entry: _Object) -> None:
        if self._cached.get(entry.object_id) is entry:
            del self._cached[entry.object_id]
            self._evictable_bytes -= entry.room

    def _evict(self) -> bytes:
        """The least recently released cached copy goes."""
        object_id = next(iter(self._cached))
        self._doom(self._cached[object_id])
        self._evicted_total += 1
        return object_id
