"""The store under pressure: who gets room and when, what is spilled for it, and how readers get back what was.

Role: pure. `SpillingStore` puts queues and decisions around the object table: events in, effects out (`take_effects`).
Clients are named by their worker ids, requests by opaque tokens. The shell calls `settle` after each batch of events,
and again every few milliseconds while `waiting`.

Rules:
- Room is made by what costs least: cached copies go first (restored ones too, their files are there), then primaries
  that no client has pinned are written to disk, the least recently used first. Over `threshold_bytes` they are
  written ahead of need, and stay in memory until somebody needs the room.
- Two lanes ask for room, creations and restores, and take turns. Creations queue fairly between clients. The lane whose
  turn it is waits for room that is coming, and the other one with it, so that neither is starved by the other.
- **A restore never waits for what may not come.** Where room can't be made by spilling and evicting alone, the readers
  are told to read the file themselves, into memory of their own. So a reader that holds some objects and waits for
  others can't deadlock, whatever is pinned.
- A creation for which no room is coming is stuck: others that fit may go before it, and after `room_wait_ms` of
  this it is refused. While spilling makes progress nobody is refused. What could never fit is refused at once.
- Processes hold pins on what they may read again. Before anybody is refused (or sent to the file) they are asked to let
  go of those that nothing looks into, and are waited for, for `ASK_PATIENCE_MS` at most.
- A write that fails changes nothing: the object stays in memory. From then on spilling is not counted on until a
  write succeeds; one write at a time is tried again, after pauses that double, and only while somebody needs room.

Rejected: restores before creations, always (readers that come back for ever would starve creators); refusing by the age
of a request (a slow disk is no reason to fail a job); one lane for reads and writes (a restore would wait behind
writes that wait for it).
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import Final, NamedTuple

from ftray.store.fair_queue import FairQueue
from ftray.store.table import (
    ON_DISK,
    UNSEALED,
    Created,
    Exists,
    FilePlace,
    Full,
    Job,
    Lost,
    ObjectTable,
    Place,
    StoreError,
)

WRITES_MAX: Final = 4
"""Jobs given out to a lane at once: enough that the lane never waits, few enough that what is decided is still true."""
READS_MAX: Final = 4
ASK_PATIENCE_MS: Final = 100.0
"""How long holders may take to answer before others go on without them."""
ASK_PAUSE_MS: Final = 50.0
"""Between two questions to holders, the first of which brought nothing."""
ASK_AHEAD_MS: Final = 1_000.0
"""Between two questions to holders when nobody waits for room."""
RETRY_MS: Final = 100.0
RETRY_MS_MAX: Final = 30_000.0


class Limits(NamedTuple):
    """When the store is under pressure, and for how long."""

    threshold_bytes: int
    """With more than this in memory that is not on disk as well, primaries are written ahead of need."""
    file_bytes_max: int
    """All spill files together; 0 is no limit but the disk's."""
    room_wait_ms: float
    """How long a creation may be stuck."""


class Refusal(Enum):
    """Why there is no room."""

    INVALID = "invalid"
    TOO_LARGE = "too large"
    FULL = "full"
    DISK_FULL = "disk full"


class Refused(NamedTuple):
    """A creation is refused; `text` is what the disk said, or the client's mistake."""

    why: Refusal
    full: Full | None
    text: str = ""


Readable = Place | FilePlace | Lost | None
"""Where an object can be read, or why not; None: it is not here."""


class RoomAnswer(NamedTuple):
    """Effect: the answer to a creation."""

    token: Hashable
    outcome: Created | Exists | Refused


class PinAnswer(NamedTuple):
    """Effect: the answer to a pin request, in the order asked for; what has a place is pinned."""

    token: Hashable
    results: tuple[Readable, ...]


class Move(NamedTuple):
    """Effect: write a file (`job.file` is 0), or read one; ended by `written`, `read` and their kin."""

    job: Job


class Unlink(NamedTuple):
    """Effect: these files are not needed any more."""

    numbers: tuple[int, ...]


class AskHolders(NamedTuple):
    """Effect: these clients shall let go of what they don't look into; each is answered by `holder_answered`."""

    request: int
    clients: tuple[bytes, ...]


Effect = RoomAnswer | PinAnswer | Move | Unlink | AskHolders


class _Creation:
    __slots__ = ("asked_ms", "client", "object_id", "owner", "primary", "size", "stuck_ms", "token")

    def __init__(
        self, token: Hashable, object_id: bytes, size: int, client: bytes, owner: bytes, primary: bool, now_ms: float
    ) -> None:
        self.token, self.object_id, self.size = token, object_id, size
        self.client, self.owner, self.primary = client, owner, primary
        self.asked_ms = now_ms
        self.stuck_ms: float | None = None
        """Since when no room is coming."""


class _PinRequest:
    __slots__ = ("client", "dead", "left", "results", "token")

    def __init__(self, token: Hashable, client: bytes, count: int) -> None:
        self.token, self.client = token, client
        self.results: list[Readable] = [None] * count
        self.left = 0
        """How many are still being written or restored."""
        self.dead = False


class _Lane(Enum):
    SERVED = "served"
    BLOCKED = "blocked"
    IDLE = "idle"


class SpillingStore:
    """See the module."""

    def __init__(self, capacity_bytes: int, limits: Limits) -> None:
        self.table = ObjectTable(capacity_bytes)
        self.limits = limits
        self.read_direct_bytes_total = 0
        """What readers were told to read from files themselves."""
        self._effects: list[Effect] = []
        self._creations: FairQueue[_Creation] = FairQueue()
        self._restores: dict[bytes, int] = {}
        """Objects to restore for which no room was taken yet, and their sizes, in the order of their coming."""
        self._restore_bytes = 0
        self._restores_turn = True
        self._short = False
        """Somebody was found to have no room."""
        self._stalled_ms: float | None = None
        """Since when the creation was stuck that was refused last, if none was served since."""
        self._waiters: dict[bytes, list[tuple[_PinRequest, int]]] = {}
        """By object that is being written or restored, requests that wait for it, with the position in each."""
        self._pending: dict[bytes, dict[_PinRequest, None]] = {}
        """Unanswered pin requests by client."""
        self._writes = 0
        self._reading: dict[int, bytes] = {}
        self._failures = 0
        """Failed writes since the last that succeeded."""
        self._retry_ms = 0.0
        self._disk_full = False
        self._disk_text = ""
        self._asked: set[bytes] = set()
        self._ask_number = 0
        self._asked_until_ms = 0.0
        self._next_ask_ms = 0.0
        self._next_ask_ahead_ms = 0.0
        self._loose_when_asked = 0
        """How much was free or could be made so when holders were asked."""
        self._in_vain = False
        """They were asked, and nothing has come of it (yet)."""

    # --- events of clients -------------------------------------------------------------------------------------------

    def create(
        self, token: Hashable, object_id: bytes, size: int, client: bytes, owner: bytes, now_ms: float,
        primary: bool = True,
    ) -> None:  # fmt: skip
        """Room for a new object: a RoomAnswer comes, now or later."""
        creation = _Creation(token, object_id, size, client, owner, primary, now_ms)
        if not self.waiting or object_id in self.table or not 0 <= size <= self.table.capacity_bytes:
            outcome = self._try_create(creation)
            if outcome is not None:
                self._answer_creation(creation, outcome)
                return
        self._creations.push(client, creation, size)

    def seal(self, object_id: bytes, client: bytes) -> None:
        """The bytes are there. Raises StoreError if the client is not writing the object."""
        self.table.seal(object_id, client)
        self._wake(object_id)

    def abort(self, object_id: bytes, client: bytes) -> None:
        """The writer gives up: who waits for the object hears that it is not here. Raises StoreError."""
        self.table.abort(object_id, client)
        self._wake(object_id)

    def free(self, object_id: bytes, owner: bytes | None = None) -> None:
        """The owner needs it no more. Raises StoreError if `owner` is not its owner."""
        self.table.free(object_id, owner)
        self._wake(object_id)

    def pin(self, token: Hashable, object_ids: tuple[bytes, ...], client: bytes) -> None:
        """A client wants to look into these: a PinAnswer comes when each is readable, or known not to be here."""
        request = _PinRequest(token, client, len(object_ids))
        for position, object_id in enumerate(object_ids):
            if not self._try_pin(request, position, object_id):
                request.left += 1
        if request.left:
            self._pending.setdefault(client, {})[request] = None
        else:
            self._effects.append(PinAnswer(token, tuple(request.results)))

    def release(self, object_id: bytes, client: bytes) -> None:
        """A client looks into it no more. Raises StoreError for a pin that it has not."""
        self.table.release(object_id, client)

    def holder_answered(self, client: bytes, request: int) -> None:
        """A client that was asked has let go of what it could."""
        if request == self._ask_number:
            self._answered(client)

    def drop_client(self, client: bytes) -> None:
        """A process is dead: its pins and requests go, what it was writing, and what it owned."""
        given_up = [creation.object_id for creation in self._creations.drop(client)]
        for request in self._pending.pop(client, ()):
            request.dead = True
        dropped = self.table.drop_client(client)
        self._answered(client)
        owned = self.table.owned_by(client)
        for object_id in owned:
            self.table.free(object_id)
        for object_id in (*dropped.aborted, *owned, *given_up):
            self._wake(object_id)

    # --- events of the disk ------------------------------------------------------------------------------------------

    def written(self, number: int, checksum: int) -> None:
        """A file is complete."""
        self._writes -= 1
        self._failures = 0
        self.table.spilled(number, checksum)

    def write_failed(self, number: int, disk_full: bool, text: str, now_ms: float) -> None:
        """A file could not be written, and is not there."""
        self._writes -= 1
        self.table.not_spilled(number)
        self._failed(disk_full, text, now_ms)

    def read(self, number: int) -> None:
        """The bytes are in memory again."""
        object_id = self._reading.pop(number)
        self.table.restored(number)
        self._wake(object_id)

    def read_failed(self, number: int, lost: str) -> None:
        """They are not. `lost` says why the file is of no use; if it is empty, readers may have more luck with it."""
        object_id = self._reading.pop(number)
        self.table.not_restored(number, lost)
        if lost:
            self._wake(object_id)
        else:
            self._send_to_file(object_id)

    # --- deciding ----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for room: then `settle` is to be called again, even if nothing happens."""
        return bool(self._creations or self._restores)

    @property
    def waiting_creations(self) -> int:
        return len(self._creations)

    def settle(self, now_ms: float) -> None:
        """Decides what comes of the events since the last time, and of the time that has passed."""
        self._short = False
        if self.waiting:
            self._serve(now_ms)
        table = self.table
        crowded = table.solid_bytes > self.limits.threshold_bytes
        if self._short or crowded:
            self._spill(now_ms)
        if crowded and not self.waiting and not table.spillable_bytes and not self._writes:
            # Nobody waits yet, and what there is is held by processes that may not need it any more.
            if now_ms >= self._next_ask_ahead_ms and self._may_ask(now_ms):
                self._next_ask_ahead_ms = now_ms + ASK_AHEAD_MS

    def take_effects(self) -> list[Effect]:
        """What is to be done, in order."""
        effects, self._effects = self._effects, []
        unlinks = self.table.take_unlinks()
        if unlinks:
            effects.append(Unlink(tuple(unlinks)))
        return effects

    # --- room --------------------------------------------------------------------------------------------------------

    def _try_create(self, creation: _Creation) -> Created | Exists | Refused | None:
        """The answer, or None if only room is lacking."""
        c = creation
        try:
            made = self.table.create(c.object_id, c.size, c.client, c.owner, c.primary)
        except StoreError as error:
            return Refused(Refusal.INVALID, None, str(error))
        if not isinstance(made, Full):
            return made
        return Refused(Refusal.TOO_LARGE, made) if made.needed > made.capacity else None

    def _serve(self, now_ms: float) -> None:
        """Gives out what room there is, to the two lanes in turns."""
        while True:
            lanes = [self._serve_creation, self._serve_restore]
            if self._restores_turn:
                lanes.reverse()
            result = lanes[0](now_ms)
            if result is _Lane.IDLE:
                if lanes[1](now_ms) is not _Lane.SERVED:
                    return
            elif result is _Lane.BLOCKED:
                return
            else:
                self._restores_turn = not self._restores_turn

    def _serve_creation(self, now_ms: float) -> _Lane:
        for client, creation in self._creations.heads():
            outcome = self._try_create(creation)
            if outcome is None:
                self._short = True
                full = self._full_for(creation.size)
                if self._is_coming(full):
                    creation.stuck_ms = self._stalled_ms = None
                    return _Lane.BLOCKED
                if creation.stuck_ms is None:
                    # Behind one that was refused, it has waited as well: a queue is not refused one wait each.
                    since = now_ms if self._stalled_ms is None else self._stalled_ms
                    creation.stuck_ms = max(creation.asked_ms, since)
                if now_ms - creation.stuck_ms < self.limits.room_wait_ms:
                    if self._may_ask(now_ms):
                        return _Lane.BLOCKED
                    continue
                outcome = self._refuse(full)
                self._stalled_ms = creation.stuck_ms
            else:
                self._stalled_ms = None
            self._creations.pop(client)
            self._answer_creation(creation, outcome)
            return _Lane.SERVED
        return _Lane.IDLE

    def _answer_creation(self, creation: _Creation, outcome: Created | Exists | Refused) -> None:
        self._effects.append(RoomAnswer(creation.token, outcome))
        if isinstance(outcome, Refused):
            self._wake(creation.object_id)  # an earlier attempt of this client may have been waited for

    def _refuse(self, full: Full) -> Refused:
        loose = full.free + full.evictable + self.table.spillable_bytes + self.table.spilling_bytes
        if self._failures and full.needed <= loose:
            return Refused(Refusal.DISK_FULL if self._disk_full else Refusal.FULL, full, self._disk_text)
        return Refused(Refusal.FULL, full)

    def _serve_restore(self, now_ms: float) -> _Lane:
        for object_id in self._restores:
            if len(self._reading) >= READS_MAX:
                return _Lane.IDLE
            job = None
            if any(not request.dead for request, _ in self._waiters.get(object_id, ())):
                job = self.table.begin_restore(object_id)
                if isinstance(job, Full):
                    self._short = True
                    if self._is_coming(job) or self._may_ask(now_ms):
                        return _Lane.BLOCKED
            self._restore_bytes -= self._restores.pop(object_id)
            if isinstance(job, Job):
                self._reading[job.number] = object_id
                self._effects.append(Move(job))
            elif job is not None:
                self._send_to_file(object_id)
            else:  # it was freed, or nobody wants it any more
                self._wake(object_id)
            return _Lane.SERVED
        return _Lane.IDLE

    def _full_for(self, size: int) -> Full:
        stats = self.table.stats()
        room = self.table.rounded(size)
        free = stats.capacity_bytes - stats.used_bytes
        return Full(room, free, stats.biggest_free_bytes, stats.evictable_bytes, stats.capacity_bytes)

    def _is_coming(self, full: Full) -> bool:
        """Whether writes will make the room, without anybody's help."""
        moving = self.table.spillable_bytes + self.table.spilling_bytes
        return moving > 0 and not self._failures and full.needed <= full.free + full.evictable + moving

    # --- spilling ----------------------------------------------------------------------------------------------------

    def _spill(self, now_ms: float) -> None:
        table = self.table
        if self._failures and (self._writes or now_ms < self._retry_ms):
            return
        wanted = min(self._creations.waiting_bytes + self._restore_bytes, table.capacity_bytes) if self._short else 0
        limit = 1 if self._failures else WRITES_MAX
        while self._writes < limit:
            size = table.next_spill_bytes()
            if not size:
                return
            # What is free may be in pieces: then one at a time, until it fits.
            short = self._short and (table.capacity_bytes - table.solid_bytes < wanted or not self._writes)
            if not short and table.solid_bytes <= self.limits.threshold_bytes:
                return
            most = self.limits.file_bytes_max
            if most and table.file_bytes + size > most:
                table.postpone_spill()
                self._failed(True, f"spilled objects may have {most:,} bytes in all (spill_bytes_max)", now_ms)
                return
            job = table.begin_spill()
            assert job is not None
            self._writes += 1
            self._effects.append(Move(job))

    def _failed(self, disk_full: bool, text: str, now_ms: float) -> None:
        self._retry_ms = now_ms + min(RETRY_MS * 2.0 ** min(self._failures, 20), RETRY_MS_MAX)
        self._failures += 1
        self._disk_full, self._disk_text = disk_full, text

    # --- holders -----------------------------------------------------------------------------------------------------

    def _may_ask(self, now_ms: float) -> bool:
        """Asks holders for what they don't look into; False if they were asked, and there is nothing to wait for."""
        if self._asked:
            if now_ms < self._asked_until_ms:
                return True
            self._asked.clear()
        if self._in_vain:
            self._in_vain = False
            self._next_ask_ms = now_ms + ASK_PAUSE_MS
        holders = self.table.holders() if now_ms >= self._next_ask_ms else ()
        if not holders:
            return False
        self._in_vain = True
        self._loose_when_asked = self._loose()
        self._asked.update(holders)
        self._ask_number += 1
        self._asked_until_ms = now_ms + ASK_PATIENCE_MS
        self._effects.append(AskHolders(self._ask_number, tuple(holders)))
        return True

    def _answered(self, client: bytes) -> None:
        self._asked.discard(client)
        if not self._asked and self._loose() > self._loose_when_asked:
            self._in_vain = False

    def _loose(self) -> int:
        """What is free, or can be made so."""
        return self.table.capacity_bytes - self.table.solid_bytes + self.table.spillable_bytes

    # --- readers -----------------------------------------------------------------------------------------------------

    def _try_pin(self, request: _PinRequest, position: int, object_id: bytes) -> bool:
        """Pins one, or finds it missing; False if it is not readable yet, and then waits for it."""
        found = self.table.pin(object_id, request.client)
        if found is not ON_DISK and found is not UNSEALED:
            request.results[position] = found
            return True
        self._waiters.setdefault(object_id, []).append((request, position))
        if found is ON_DISK and object_id not in self._restores and object_id not in self._reading.values():
            size = self.table.size_of(object_id)
            self._restores[object_id] = size
            self._restore_bytes += size
        return False

    def _got(self, request: _PinRequest) -> None:
        request.left -= 1
        if not request.left:
            pending = self._pending[request.client]
            del pending[request]
            if not pending:
                del self._pending[request.client]
            self._effects.append(PinAnswer(request.token, tuple(request.results)))

    def _wake(self, object_id: bytes) -> None:
        """The object is not what it was: who waits for it looks again."""
        for request, position in self._waiters.pop(object_id, ()):
            if not request.dead and self._try_pin(request, position, object_id):
                self._got(request)

    def _send_to_file(self, object_id: bytes) -> None:
        """There is no room for it: who waits for it reads its file."""
        for request, position in self._waiters.pop(object_id, ()):
            if request.dead:
                continue
            place = self.table.pin_file(object_id, request.client)
            if place is not None:
                self.read_direct_bytes_total += place.size
                request.results[position] = place
                self._got(request)
            elif self._try_pin(request, position, object_id):
                self._got(request)
