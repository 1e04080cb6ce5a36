"""This node's store as a client sees it.

Role: shell. An object is created and sealed through the raylet, written straight into shared memory, and read through a
read-only map for each reader.

Pins: this process holds one pin at the raylet for each object that it created or mapped. It is released when the
entry is gone *and* the last zero-copy view of it is (`arena.read_view` tells), and when the raylet needs room and
nothing looks into it (`let_go`). The owner's primary pin is the raylet's, dropped by `FreeObjects`. What has no room in
memory is read from its file, into memory of this process alone.

Rejected: a pin for each view (two messages a `get`); copying on `get` (an 80 MB array would cost 20 ms); no pin without
a view (a message for each `put`, and a request for each `get` of what was put here).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftray.exceptions import GetTimeoutError, ObjectLostError, ObjectStoreFullError, OutOfDiskError, OwnerDiedError
from ftray.store.spill_io import SpillDamagedError, read_file
from ftray.wire.messages import (
    AbortObject,
    CreateObject,
    FreeObjects,
    ObjectCreated,
    ObjectsPinned,
    PinObjects,
    ReleaseObjects,
    SealObject,
)
from ftray.worker.serialization import Serialized, deserialize, loading_refs

if TYPE_CHECKING:
    from ftray.store.arena import Arena
    from ftray.worker.core import Core


class Pin:
    """An object of the arena that this process may read."""

    __slots__ = ("held", "offset", "size", "views")

    def __init__(self, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size
        self.views = 0
        self.held = True
        """The entry keeps it, views or not."""


class StoreClient:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.arena: Arena | None = None
        self.pins: dict[bytes, Pin] = {}
        self.freeing: list[bytes] = []
        self.asked: dict[int, tuple[bytes, ...]] = {}
        """What threads have asked to pin and have no answer for: some of it may be pinned already, for tools."""

    def free_in_store(self, object_id: bytes) -> None:
        if not self.freeing:
            self.core.reactor.call_later(0, self._send_frees)
        self.freeing.append(object_id)

    def _send_frees(self) -> None:
        if self.freeing:
            self.core.raylet.send(FreeObjects(tuple(self.freeing)))
            self.freeing.clear()

    # --- pins --------------------------------------------------------------------------------------------------------

    def unhold(self, object_id: bytes) -> None:
        pin = self.pins.get(object_id)
        if pin is not None:
            pin.held = False
            if pin.views == 0:
                self._release(object_id)

    def _release(self, object_id: bytes) -> None:
        del self.pins[object_id]
        self.core.raylet.send(ReleaseObjects((object_id,)))

    def drop_views(self) -> None:
        """Views have died (finalisers queued them), under the lock."""
        unviewed = self.core.unviewed
        while unviewed:
            try:
                object_id = unviewed.popleft()
            except IndexError:
                break
            pin = self.pins.get(object_id)
            if pin is not None:
                pin.views -= 1
                if pin.views == 0 and not pin.held:
                    self._release(object_id)

    def let_go(self, request: int) -> None:
        """The store needs room: releases all that nothing looks into, under the lock. A later `get` pins it again."""
        self.core.drain()
        idle = [object_id for object_id, pin in self.pins.items() if not pin.views]
        for object_id in idle:
            del self.pins[object_id]
        self.core.raylet.send(ReleaseObjects(tuple(idle), request))

    def open_view(self, object_id: bytes, pin: Pin) -> memoryview:
        """A read-only view of a pinned object, which keeps it pinned while anything of it lives. Not under the lock."""
        arena = self.arena
        assert arena is not None
        unviewed = self.core.unviewed
        view: memoryview = arena.read_view(pin.offset, pin.size, lambda: unviewed.append(object_id))
        return view

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, object_id: bytes, serialized: Serialized, owner: bytes, keep: bool) -> None:
        """Creates, writes and seals an object in this node's store. `keep`: this process keeps its pin."""
        core = self.core
        size = serialized.size
        with core.lock:
            core.drain()
            self._send_frees()  # first: the room of what has just been let go is warm, and may be all that there is
        created: ObjectCreated = core.raylet.ask(lambda request: CreateObject(request, object_id, size, owner))
        if created.offset == -2:
            return  # the same attempt made it before; its owner's pin keeps it
        if created.offset < 0:
            raise (OutOfDiskError if created.offset == -3 else ObjectStoreFullError)(created.error)
        arena = self.arena
        assert arena is not None
        try:
            if created.fresh:
                # A page that is written whole by the kernel need not be cleared first, and costs no page fault.
                serialized.write_into(
                    arena.write_view(created.offset, size, fresh=True),
                    lambda position, data: arena.write_at(created.offset + position, data),
                )
            else:
                serialized.write_into(arena.write_view(created.offset, size))
        except BaseException:
            with core.lock:
                core.raylet.send(AbortObject(object_id))
                core.raylet.send(ReleaseObjects((object_id,)))
                core.settle()
            raise
        with core.lock:
            core.raylet.send(SealObject(object_id))
            if keep:
                self.pins[object_id] = Pin(created.offset, size)
            else:
                core.raylet.send(ReleaseObjects((object_id,)))
            core.reactor.flush_dirty()

    # --- reading -----------------------------------------------------------------------------------------------------

    def load_stored(self, object_ids: list[bytes], timeout_s: float | None = None) -> list[Any]:
        """Maps (or reads from files) and deserialises objects of this node's store. Raises ObjectLostError."""
        # All views are opened first: each pin counts one, and an error in the first value must not leave the others.
        views = self.views_of(object_ids, timeout_s)
        views.reverse()
        values = []
        for object_id in object_ids:
            with loading_refs(self.core.peers.ref_loader(object_id)):
                values.append(deserialize(views.pop()))
        return values

    def views_of(self, object_ids: list[bytes], timeout_s: float | None = None) -> list[memoryview]:
        """Read-only views of objects of this node's store. Not under the lock. Raises ObjectLostError."""
        pins, files = self.pin_now(object_ids, timeout_s)
        copies: dict[bytes, memoryview] = {}
        if files:
            core = self.core
            try:
                for object_id, (path, checksum, size) in files.items():
                    copies[object_id] = _read_copy(object_id, path, checksum, size, core.node_id)
            except BaseException:
                with core.lock:
                    self._unview(object_ids, pins)
                    core.reactor.flush_dirty()
                raise
            finally:
                with core.lock:
                    core.raylet.send(ReleaseObjects(tuple(files)))
                    core.reactor.flush_dirty()
        return [
            self.open_view(object_id, pin) if pin is not None else copies[object_id]
            for object_id, pin in zip(object_ids, pins, strict=True)
        ]

    def pin_now(
        self, object_ids: list[bytes], timeout_s: float | None = None
    ) -> tuple[list[Pin | None], dict[bytes, tuple[str, int, int]]]:
        """Pins objects for reading; each pin has one view counted that the caller must open.

        An object without a pin is in a file: path, checksum and size. These are pinned as well, until the caller
        releases them. Raises ObjectLostError.
        """
        core = self.core
        files: dict[bytes, tuple[str, int, int]] = {}
        with core.lock:
            found = [self._view(object_id) for object_id in object_ids]
        wanted = tuple(dict.fromkeys(x for x, pin in zip(object_ids, found, strict=True) if pin is None))
        if not wanted:
            return found, files
        self.asked[id(wanted)] = wanted
        try:
            answer: ObjectsPinned = core.raylet.ask(lambda request: PinObjects(request, wanted), timeout_s)
        except BaseException as error:
            with core.lock:
                self._unview(object_ids, found)
            if isinstance(error, GetTimeoutError):
                raise GetTimeoutError(
                    f"{len(wanted)} of the objects are ready, but could not be read within {timeout_s:.3g} s: they "
                    "have to come back from disk, or this node is overloaded. `ftray memory` shows what its store does"
                ) from None
            raise
        finally:
            del self.asked[id(wanted)]
        with core.lock:
            lost: ObjectLostError | None = None
            for index, (object_id, (offset, size)) in enumerate(zip(wanted, answer.places, strict=True)):
                if offset >= 0 and object_id not in self.pins:
                    self.pins[object_id] = Pin(offset, size)
                elif offset >= 0:
                    core.raylet.send(ReleaseObjects((object_id,)))  # another thread was faster
                elif offset == -2:
                    files[object_id] = *answer.files[index], size
                else:
                    lost = lost or self._lost(object_id, answer.lost.get(index, ""))
            for index, pin in enumerate(found):
                found[index] = pin or self._view(object_ids[index])
            if lost is not None:
                self._unview(object_ids, found)
                if files:
                    core.raylet.send(ReleaseObjects(tuple(files)))
            core.reactor.flush_dirty()
        if lost is not None:
            raise lost
        return found, files

    def _lost(self, object_id: bytes, why: str) -> ObjectLostError:
        """Why an object that is ready is not in the store, under the lock."""
        entry = self.core.entries.get(object_id)
        if not why and entry is not None and entry.owner is not None:  # held here, so only its owner's death frees it
            owner = entry.owner.hex()
            return OwnerDiedError(object_id.hex(), f"at {entry.owner_endpoint}: it is gone", owner=owner)
        why = why or "it is not in this node's store any more"
        return ObjectLostError(object_id.hex(), why, node_id=self.core.node_id.hex())

    def _view(self, object_id: bytes) -> Pin | None:
        """Counts a view of what is pinned already, under the lock."""
        pin = self.pins.get(object_id)
        if pin is not None:
            pin.views += 1
            pin.held = object_id in self.core.entries
        return pin

    def _unview(self, object_ids: list[bytes], pins: list[Pin | None]) -> None:
        """Takes back views that were counted and will not be opened, under the lock."""
        for object_id, pin in zip(object_ids, pins, strict=True):
            if pin is not None:
                pin.views -= 1
                if pin.views == 0 and not pin.held:
                    self._release(object_id)


def _read_copy(object_id: bytes, path: str, checksum: int, size: int, node_id: bytes) -> memoryview:
    """The bytes of a spilled object, in this process's own memory. Raises ObjectLostError."""
    data = bytearray(size)
    try:
        read_file(path, checksum, memoryview(data))
    except SpillDamagedError as error:
        raise ObjectLostError(
            object_id.hex(), f"its spilled copy was damaged: {error}", node_id=node_id.hex()
        ) from None
    except OSError as error:
        raise ObjectLostError(
            object_id.hex(), f"its spilled copy could not be read: {error}", node_id=node_id.hex()
        ) from None
    return memoryview(data).toreadonly()
