"""The object store as the clients of this node see it: requests in, answers out, over the pure `SpillingStore`.

Role: shell, under the reactor's lock. The bytes themselves never pass through here: clients write and read the arena,
and threads of `spill_files` move what does not fit to the disk and back.

Rules:
- A pin request is answered once, when each of its objects can be read, or is known not to be here: what is still being
  written is waited for, and is missing when its writer dies or gives up.
- A creation for which there is no room waits for some, as `store/spilling.py` says; what a refusal says to the user is
  said here.
- What a dead process had pinned is let go, and what it owned is freed.
- A client's mistakes (a release too many, another's object) are logged and have no effect.

Rejected: refusing at once when the store is full (a reader may let go a moment later); waiting without end (a program
that holds all of it would hang without a word).
"""

from __future__ import annotations

import logging
from typing import Any

from ftray.config import Config
from ftray.ids import short
from ftray.raylet.clients import Client
from ftray.raylet.spill_files import SpillFiles
from ftray.store.arena import Arena
from ftray.store.spilling import (
    AskHolders,
    Limits,
    Move,
    PinAnswer,
    Refusal,
    Refused,
    RoomAnswer,
    SpillingStore,
    Unlink,
)
from ftray.store.table import Created, Exists, FilePlace, Lost, Place, StoreError
from ftray.wire import messages as m
from ftray.wire.reactor import Reactor

log = logging.getLogger("ftray.raylet")

TICK_MS = 20
"""How often is looked at what waits for room, even if nothing happens."""
DISK_FULL, EXISTS, REFUSED = -3, -2, -1
_NOWHERE = (-1, 0)
IN_FILE = -2


class StoreService:
    """See the module. `spill_directory` is made when it is first needed."""

    def __init__(self, reactor: Reactor, arena: Arena, node_id: bytes, spill_directory: str) -> None:
        self._reactor = reactor
        self._node_id = node_id
        self._config = reactor.config
        self._store = SpillingStore(arena.size_bytes, limits_of(reactor.config, arena.size_bytes))
        self._files = SpillFiles(spill_directory, arena)
        self._spill_directory = spill_directory
        self._ticking = False
        self._touched_bytes = 0
        """Up to here the arena has been given to writers before."""
        self._clients: dict[bytes, Client] = {}
        """Who has asked for anything, by worker id."""
        reactor.watch(self._files.fileno(), self._disk_done)

    def close(self) -> None:
        """Ends the threads. The reactor is not driven any more."""
        self._reactor.unwatch(self._files.fileno())
        self._files.close()

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, client: Client, message: m.CreateObject) -> None:
        """Room for a new object; answered at once, or when there is some."""
        self._clients[client.worker_id] = client
        self._store.create(
            (client, message.request, message.size), message.object_id, message.size, client.worker_id, message.owner,
            self._reactor.now_ms(),
        )  # fmt: skip
        self._settle()

    def seal(self, client: Client, message: m.SealObject) -> None:
        """The bytes are there: who waits for them may look."""
        try:
            self._store.seal(message.object_id, client.worker_id)
        except StoreError as error:
            _complain(client, error)
        self._settle()

    def abort(self, client: Client, message: m.AbortObject) -> None:
        """The writer gives up."""
        try:
            self._store.abort(message.object_id, client.worker_id)
        except StoreError as error:
            _complain(client, error)
        self._settle()

    def free(self, client: Client, message: m.FreeObjects) -> None:
        """The owner needs these no more."""
        for object_id in message.object_ids:
            try:
                self._store.free(object_id, client.worker_id)
            except StoreError as error:
                _complain(client, error)
        self._settle()

    # --- reading ------------------------------------------------------------------------------------------------------

    def pin(self, client: Client, message: m.PinObjects) -> None:
        """A client wants to look into these."""
        self._clients[client.worker_id] = client
        self._store.pin((client, message.request), message.object_ids, client.worker_id)
        self._settle()

    def release(self, client: Client, message: m.ReleaseObjects) -> None:
        """A client looks into these no more."""
        for object_id in message.object_ids:
            try:
                self._store.release(object_id, client.worker_id)
            except StoreError as error:
                _complain(client, error)
        if message.pressure:
            self._store.holder_answered(client.worker_id, message.pressure)
        self._settle()

    # --- deaths -------------------------------------------------------------------------------------------------------

    def client_gone(self, client: Client) -> None:
        """A process is dead: its pins go, what it was writing, and what it owned."""
        self._clients.pop(client.worker_id, None)
        self._store.drop_client(client.worker_id)
        self._settle()

    # --- the disk -----------------------------------------------------------------------------------------------------

    def _disk_done(self) -> None:
        store = self._store
        for done in self._files.take_done():
            job = done.job
            if not job.file:
                if done.error:
                    log.warning("cannot spill %d bytes to %s: %s", job.size, self._spill_directory, done.error)
                    store.write_failed(job.number, done.disk_full, done.error, self._reactor.now_ms())
                else:
                    store.written(job.number, done.checksum)
            elif done.error:
                log.error("cannot restore an object of %d bytes: %s", job.size, done.error)
                text = f"its spilled copy was damaged: {done.error}" if done.damaged else ""
                store.read_failed(job.number, text)
            else:
                store.read(job.number)
        self._settle()

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        store = self._store
        if self._reactor.config is not self._config:  # this node has joined a cluster
            self._config = self._reactor.config
            store.limits = limits_of(self._config, store.table.capacity_bytes)
        store.settle(self._reactor.now_ms())
        for effect in store.take_effects():
            if isinstance(effect, RoomAnswer):
                self._answer_creation(*effect)
            elif isinstance(effect, PinAnswer):
                self._answer_pins(effect)
            elif isinstance(effect, Move):
                self._files.submit(effect.job)
            elif isinstance(effect, Unlink):
                self._files.unlink(effect.numbers)
            else:
                self._ask(effect)
        if store.waiting and not self._ticking:
            self._ticking = True
            self._reactor.call_later(TICK_MS, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self._settle()

    def _answer_creation(self, token: Any, outcome: Created | Exists | Refused) -> None:
        client, request, size = token
        if isinstance(outcome, Created):
            # The allocator takes the lowest place that fits: what lies beyond all that was ever given is untouched.
            fresh = outcome.offset >= self._touched_bytes
            if fresh:
                self._touched_bytes = outcome.offset + size
            answer = m.ObjectCreated(request, outcome.offset, fresh=fresh)
        elif isinstance(outcome, Exists):
            answer = m.ObjectCreated(request, EXISTS)
        else:
            code = DISK_FULL if outcome.why is Refusal.DISK_FULL else REFUSED
            answer = m.ObjectCreated(request, code, self._explain(outcome))
        client.link.send(answer)

    def _explain(self, refused: Refused) -> str:
        full = refused.full
        if full is None:
            return refused.text
        needs = f"the object store of node {short(self._node_id)} is full: the object needs {full.needed:,} bytes"
        if refused.why is Refusal.TOO_LARGE:
            return f"{needs}, the whole store has {full.capacity:,}; start the node with a larger object_store_memory"
        if refused.why is Refusal.DISK_FULL:
            return (
                f"{needs}, and the disk is full to which others would be spilled ({self._spill_directory}): "
                f"{refused.text}. Nothing that is stored is lost. Free space there, or drop references to large objects"
            )
        why = f" (spilling to {self._spill_directory} failed: {refused.text})" if refused.text else ""
        return (
            f"{needs}; of {full.capacity:,} bytes {full.free:,} are free, the largest piece {full.biggest:,}, and what "
            f"is there is in use{why}. Drop values that were read from large objects, or start the node with a larger "
            f"object_store_memory"
        )

    def _answer_pins(self, answer: PinAnswer) -> None:
        token: Any = answer.token
        client, request = token
        places: list[tuple[int, int]] = []
        files: dict[int, tuple[str, int]] = {}
        lost: dict[int, str] = {}
        for position, found in enumerate(answer.results):
            if isinstance(found, Place):
                places.append((found.offset, found.size))
            elif isinstance(found, FilePlace):
                places.append((IN_FILE, found.size))
                files[position] = self._files.path(found.number), found.checksum
            else:
                places.append(_NOWHERE)
                if isinstance(found, Lost):
                    lost[position] = found.why
        client.link.send(m.ObjectsPinned(request, tuple(places), files, lost))

    def _ask(self, effect: AskHolders) -> None:
        for client_id in effect.clients:
            client = self._clients.get(client_id)
            if client is not None:
                client.link.send(m.StorePressure(effect.request))

    # --- for tools ----------------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, int]:
        """Bytes used, pinned, evictable and on disk, and numbers of objects."""
        store = self._store
        return {
            **store.table.stats()._asdict(),
            "read_direct_bytes_total": store.read_direct_bytes_total,
            "waiting_creations": store.waiting_creations,
        }

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
            for row in self._store.table.rows()
        ]


def limits_of(config: Config, capacity_bytes: int) -> Limits:
    """When a store of this size is under pressure, by the settings."""
    percent = config.spill_threshold_percent
    threshold = int(capacity_bytes * percent / 100) if 0 <= percent <= 100 else capacity_bytes
    return Limits(threshold, config.spill_bytes_max, config.store_room_wait_ms)


def _complain(client: Client, error: StoreError) -> None:
    log.warning("client %s (pid %d): %s", short(client.worker_id), client.pid, error)
