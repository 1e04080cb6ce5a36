"""The object store as the clients of this node see it: requests in, answers out, over the pure `ObjectTable`.

Role: shell, under the reactor's lock. The bytes themselves never pass through here: clients write and read the arena.

Rules:
- A pin request is answered once, when each of its objects is sealed, or known not to be here: what is still being
  written is waited for, and is missing when its writer dies or gives up.
- A creation for which there is no room waits for some, first come first served, for `ROOM_WAIT_MS`; then it is refused.
- What a dead process had pinned is let go, and what it owned is freed.
- A client's mistakes (a release too many, another's object) are logged and have no effect.

Rejected: refusing at once when the store is full (a reader may let go a moment later); waiting without end (a program
that holds all of it would hang without a word).
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from ftray.ids import short
from ftray.raylet.clients import Client
from ftray.store.arena import Arena
from ftray.store.table import Created, Exists, Full, ObjectTable, Place, StoreError
from ftray.wire import messages as m
from ftray.wire.reactor import Reactor

log = logging.getLogger("ftray.raylet")

ROOM_WAIT_MS = 2_000
EXISTS, REFUSED = -2, -1
_NOWHERE = (-1, 0)


class _PinRequest:
    """Objects that a client wants pinned, and where those lie that are."""

    __slots__ = ("client", "left", "object_ids", "places", "request")

    def __init__(self, client: Client, message: m.PinObjects) -> None:
        self.client = client
        self.request = message.request
        self.object_ids = message.object_ids
        self.places: list[tuple[int, int]] = [_NOWHERE] * len(message.object_ids)
        self.left = 0
        """How many are still being written."""


class _Creation:
    """A request that waits for room."""

    __slots__ = ("client", "message")

    def __init__(self, client: Client, message: m.CreateObject) -> None:
        self.client = client
        self.message = message


class StoreService:
    """See the module."""

    def __init__(self, reactor: Reactor, arena: Arena, node_id: bytes) -> None:
        self.table = ObjectTable(arena.size_bytes)
        self._reactor = reactor
        self._node_id = node_id
        self._waiting: dict[bytes, list[tuple[_PinRequest, int]]] = {}
        """By object that is being written, requests that wait for it, with the position in each."""
        self._creations: deque[_Creation] = deque()

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, client: Client, message: m.CreateObject) -> None:
        """Room for a new object; answered at once, or when there is some."""
        if not self._creations and self._create(client, message, refuse=False):
            return
        creation = _Creation(client, message)
        self._creations.append(creation)
        self._reactor.call_later(ROOM_WAIT_MS, lambda: self._room_wait_over(creation))

    def _create(self, client: Client, message: m.CreateObject, refuse: bool) -> bool:
        """Tries; answers, and returns True, unless only room is lacking."""
        try:
            made = self.table.create(message.object_id, message.size, client.worker_id, message.owner)
        except StoreError as error:
            client.link.send(m.ObjectCreated(message.request, REFUSED, str(error)))
            return True
        if isinstance(made, Created):
            client.link.send(m.ObjectCreated(message.request, made.offset))
        elif isinstance(made, Exists):
            client.link.send(m.ObjectCreated(message.request, EXISTS))
        elif refuse or made.needed > made.capacity:
            client.link.send(m.ObjectCreated(message.request, REFUSED, self._explain(made)))
        else:
            return False
        return True

    def _explain(self, full: Full) -> str:
        needs = f"the object store of node {short(self._node_id)} is full: the object needs {full.needed:,} bytes"
        if full.needed > full.capacity:
            return f"{needs}, the whole store has {full.capacity:,}; start the node with a larger object_store_memory"
        return (
            f"{needs}; of {full.capacity:,} bytes {full.free:,} are free, the largest piece {full.biggest:,}, and what "
            f"is there is in use. Drop references to large objects, or start the node with a larger object_store_memory"
        )

    def _room_wait_over(self, creation: _Creation) -> None:
        if creation in self._creations:
            self._creations.remove(creation)
            if not creation.client.gone:
                self._create(creation.client, creation.message, refuse=True)
            self._room_made()

    def _room_made(self) -> None:
        while self._creations:
            first = self._creations[0]
            if not first.client.gone and not self._create(first.client, first.message, refuse=False):
                return
            self._creations.popleft()

    def seal(self, client: Client, message: m.SealObject) -> None:
        """The bytes are there: who waits for them may look."""
        try:
            self.table.seal(message.object_id, client.worker_id)
        except StoreError as error:
            _complain(client, error)
            return
        self._wake(message.object_id)

    def abort(self, client: Client, message: m.AbortObject) -> None:
        """The writer gives up."""
        try:
            self.table.abort(message.object_id, client.worker_id)
        except StoreError as error:
            _complain(client, error)
            return
        self._wake(message.object_id)
        self._room_made()

    def free(self, client: Client, message: m.FreeObjects) -> None:
        """The owner needs these no more."""
        for object_id in message.object_ids:
            try:
                self.table.free(object_id, client.worker_id)
            except StoreError as error:
                _complain(client, error)
                continue
            self._wake(object_id)
        self._room_made()

    # --- reading ------------------------------------------------------------------------------------------------------

    def pin(self, client: Client, message: m.PinObjects) -> None:
        """A client wants to look into these."""
        request = _PinRequest(client, message)
        for position in range(len(request.object_ids)):
            if not self._try_pin(request, position):
                request.left += 1
        if not request.left:
            self._answer_pins(request)

    def _try_pin(self, request: _PinRequest, position: int) -> bool:
        """Pins one, or finds it missing; False if it is being written, and then waits for it."""
        object_id = request.object_ids[position]
        place = self.table.pin(object_id, request.client.worker_id)
        if isinstance(place, Place):
            request.places[position] = (place.offset, place.size)
        elif place is not None:
            self._waiting.setdefault(object_id, []).append((request, position))
            return False
        return True

    def _answer_pins(self, request: _PinRequest) -> None:
        request.client.link.send(m.ObjectsPinned(request.request, tuple(request.places)))

    def _wake(self, object_id: bytes) -> None:
        for request, position in self._waiting.pop(object_id, ()):
            if not request.client.gone and self._try_pin(request, position):
                request.left -= 1
                if not request.left:
                    self._answer_pins(request)

    def release(self, client: Client, message: m.ReleaseObjects) -> None:
        """A client looks into these no more."""
        room = False
        for object_id in message.object_ids:
            try:
                room |= self.table.release(object_id, client.worker_id)
            except StoreError as error:
                _complain(client, error)
        if room:
            self._room_made()

    # --- deaths -------------------------------------------------------------------------------------------------------

    def client_gone(self, client: Client) -> None:
        """A process is dead: its pins go, what it was writing, and what it owned."""
        dropped = self.table.drop_client(client.worker_id)
        owned = self.table.owned_by(client.worker_id)
        for object_id in owned:
            self.table.free(object_id)
        for object_id in (*dropped.aborted, *owned):
            self._wake(object_id)
        self._room_made()

    # --- for tools ----------------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, int]:
        """Bytes used, pinned, evictable, and numbers of objects."""
        return {**self.table.stats()._asdict(), "waiting_creations": len(self._creations)}

    def rows(self) -> list[dict[str, Any]]:
        """Every object here, with all that keeps it."""
        return [
            {
                **row._asdict(),
                "object_id": row.object_id.hex(),
                "owner": row.owner.hex(),
                "creator": row.creator.hex(),
                "pins": {client_id.hex(): count for client_id, count in row.pins.items()},
            }
            for row in self.table.rows()
        ]


def _complain(client: Client, error: StoreError) -> None:
    log.warning("client %s (pid %d): %s", short(client.worker_id), client.pid, error)
