"""Who keeps an object alive: the reference counts and the borrowing protocol of one process.

Every process has one `ReferenceTable`. An object's *owner* (whoever submitted its task, or put it) frees it once
nothing holds it: no local reference, no unfinished task, no live outer object, no reply on its way, no *borrower*. A
borrower is another process that holds a reference and has registered with the owner.

The rule is **hand on before letting go**: at every moment a process that holds a reference is the owner, is registered
with the owner, or is covered by somebody who is one of these and will not let go before hearing back. The covers are:

- *a task*: its submitter holds the arguments until the reply. What is still held when the task ends is registered
  before the reply leaves; what was dropped by then costs no message at all (`begin_task`, `note_task_ref`, `end_task`).
  A reference that several running tasks cover is registered when the first of them ends: the others may be covers in a
  circle, since their submitters may have the reference from this very process.
- *a reply*: its sender keeps the references in it until the receiver has registered them (`hand_off`, `handed_off`
  there, `receive_contained` and `AckReturns` here).
- *an outer object*: whoever owns it holds what is in it, so holding the outer covers the inner (`note_from_outer`).
  When the outer is itself covered by a running task, so is the inner, and registering can wait for the task's end.

A covered entry registers with `AddBorrower`, keeps its covers until the acknowledgement (`registered`), and leaves with
`RemoveBorrower`. Only a registered entry sends the latter, and one that loses its last hold while registering stays
until the acknowledgement is there: so at most one registration of an object is ever under way, no acknowledgement can
be taken for another, and on a first-in first-out link a removal followed by a new registration arrives in that order.

If a cover dies before the covered process has registered, the object may be gone: the owner answers "missing" and the
entry is `LOST` from then on, until its last hold goes. `LOST` entries send nothing.

Counting cannot free a cycle. Values are immutable, so there is none, except where a task that was given a reference to
its own result (by way of an actor, say) returns it: such an object stays until its owner ends.

Effects are queued on `effects`, in order. Take the list away before acting on it (`take_effects`), for successive
messages to one owner are joined while they wait there. Messages to one owner must be sent in the order given.

Rejected: registering each reference on arrival (two messages for every argument of every task); forwarding chains,
where a borrower reports its own borrowers to whoever lent to it (a death in the middle loses the whole branch, and a
release must travel back along it); weighted counts (a holder that dies takes its weight along, and the owner cannot
tell).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ftray.ownership.reference_audit import audit, rows
from ftray.ownership.reference_types import (
    COVERED,
    LOST,
    REGISTERED,
    REGISTERING,
    AckReturns,
    AddBorrower,
    BorrowLost,
    Effect,
    Entry,
    Forgot,
    Freed,
    PinAtOwner,
    RemoveBorrower,
    Row,
    TaskMayReply,
    Token,
    ToOwner,
    Wait,
    is_held,
)

__all__ = [
    "AckReturns", "AddBorrower", "BorrowLost", "COVERED", "Effect", "Entry", "Forgot", "Freed", "LOST", "PinAtOwner",
    "REGISTERED", "REGISTERING", "ReferenceTable", "RemoveBorrower", "Row", "TaskMayReply", "Token", "is_held",
]


class ReferenceTable:
    """The references of one process; all methods run under one lock and cost O(1) for each reference concerned.

    `entries` is open to the submit path, which may inline `add_owned` for an id that was never used before:
    `entries[object_id] = entry = Entry(None, "", 1)`; and `add_local` for an entry at hand: `entry.local += 1`.
    Letting go always takes the method.
    """

    __slots__ = (
        *("worker_id", "entries", "effects"),
        *("_open_at", "_tasks", "_handoffs", "_handoffs_to", "_borrowed_by", "_borrowed_from"),
    )

    def __init__(self, worker_id: bytes) -> None:
        self.worker_id = worker_id
        self.entries: dict[bytes, Entry] = {}
        self.effects: list[Effect] = []
        self._open_at = 0  # index in `effects` of the newest message to an owner, if that is still there
        self._tasks: dict[Token, dict[bytes, Entry] | None] = {}  # running tasks, and the borrowed entries they cover
        self._handoffs: dict[Token, tuple[bytes, tuple[bytes, ...]]] = {}  # replies not acknowledged: receiver, objects
        self._handoffs_to: dict[bytes, set[Token]] = {}
        self._borrowed_by: dict[bytes, set[bytes]] = {}  # borrower -> objects owned here
        self._borrowed_from: dict[bytes, set[bytes]] = {}  # owner -> objects borrowed here

    def take_effects(self) -> list[Effect]:
        """The effects queued since the last call, in order; the caller must act on all of them."""
        effects = self.effects
        self.effects = []
        return effects

    # Counts of this process

    def add_owned(self, object_id: bytes) -> Entry:
        """Enter a new object with one local reference. An id known already (a re-execution made it) gets one more."""
        entry = self.entries.get(object_id)
        if entry is None:
            self.entries[object_id] = entry = Entry(None, "", 1)
        else:
            entry.local += 1
        return entry

    def add_borrowed(self, object_id: bytes, owner: bytes, owner_endpoint: str) -> Entry:
        """The entry of an object of another owner, made if need be, without a hold: the caller adds one at once.

        A new entry counts as covered by somebody. Where nobody is known to cover it, call `register` as well.
        """
        entry = self.entries.get(object_id)
        if entry is None:
            self.entries[object_id] = entry = Entry(owner, owner_endpoint)
            ids = self._borrowed_from.get(owner)
            if ids is None:
                self._borrowed_from[owner] = {object_id}
            else:
                ids.add(object_id)
            if owner == self.worker_id:
                # Our own object came back after we freed it (a cover died). It is of no use to ask ourselves.
                entry.registration = LOST
                self.effects.append(BorrowLost(object_id, entry))
        return entry

    def add_local(self, object_id: bytes) -> None:
        """Count one more ObjectRef. Raises KeyError for an unknown object."""
        self.entries[object_id].local += 1

    def remove_local(self, object_id: bytes) -> None:
        """Count one ObjectRef less; nothing happens for an unknown object."""
        entry = self.entries.get(object_id)
        if entry is not None:
            entry.local -= 1
            if not entry.local:
                self.release(object_id, entry)

    def add_submitted(self, object_ids: Iterable[bytes]) -> None:
        """A task with these arguments (top-level or nested) was submitted. Raises KeyError for an unknown object."""
        entries = self.entries
        for object_id in object_ids:
            entries[object_id].submitted += 1

    def remove_submitted(self, object_ids: Iterable[bytes]) -> None:
        """That task is finished, and `receive_contained` was called for what its reply contained."""
        entries = self.entries
        for object_id in object_ids:
            entry = entries.get(object_id)
            if entry is not None:
                entry.submitted -= 1
                if not entry.submitted:
                    self.release(object_id, entry)

    def set_contains(self, outer_id: bytes, inner_ids: Sequence[bytes]) -> None:
        """Hold the inner objects for as long as the outer entry lives; replaces what was said of the outer before.

        Nothing happens when the outer is gone. Raises KeyError, and changes nothing, for an unknown inner object.
        """
        outer = self.entries.get(outer_id)
        if outer is not None:
            for entry in [self.entries[object_id] for object_id in inner_ids]:
                entry.contained += 1
            self._replace_contains(outer, inner_ids)

    def pin_forever(self, object_id: bytes) -> bool:
        """Never let the object go. Returns False for an unknown one. A borrower has its owner do the same."""
        entry = self.entries.get(object_id)
        if entry is None:
            return False
        if not entry.pinned:
            entry.pinned = True
            if entry.owner is not None and entry.registration != LOST:
                self._say(PinAtOwner, entry, object_id)
        return True

    # Borrowing: running tasks

    def begin_task(self, token: Token) -> None:
        """A task starts here. Raises ValueError if one of this name runs already."""
        if token in self._tasks:
            raise ValueError(f"task {token!r} is running already; end it before it begins again")
        self._tasks[token] = None

    def note_task_ref(self, token: Token, object_id: bytes, owner: bytes, owner_endpoint: str) -> Entry:
        """A reference came with the arguments of the task: its submitter covers it until the reply.

        For a task that is not running (its submitter died, and `end_task` was called early) it is registered at once.
        """
        entry = self.add_borrowed(object_id, owner, owner_endpoint)
        if entry.owner is not None:
            if token in self._tasks:
                self._guard(token, object_id, entry)
            elif entry.registration == COVERED:
                self._register(object_id, entry)
        return entry

    def end_task(self, token: Token) -> bool:
        """The task is over and its return values have been handed off: may the reply leave?

        If False, `TaskMayReply` follows when all that is still held has been registered. To be called at once, even
        while the task runs on, when its submitter has died, for then nobody covers its arguments any more.
        """
        notes = self._tasks.pop(token, None)
        if not notes:
            return True
        wait: Wait | None = None
        for object_id, entry in notes.items():
            guards = entry.guards
            if guards is not None:
                guards.discard(token)
                if not guards:
                    entry.guards = None
            if not is_held(entry):
                self.release(object_id, entry)
            elif entry.registration < REGISTERED:
                # Also if another running task covers it: the submitter of that one may have the reference from us.
                if wait is None:
                    wait = Wait(TaskMayReply(token))
                self._register(object_id, entry, wait)
        return wait is None

    # Borrowing: replies and values that contain references

    def hand_off(self, token: Token, object_ids: Sequence[bytes], receiver: bytes) -> None:
        """Hold the references in a reply until the worker `receiver` has taken them over. Call it before `end_task`.

        Not for a receiver whose death `process_died` has told already: nobody would let go of them.
        Raises ValueError if a reply of this name is on its way already, KeyError for an unknown object.
        """
        if token in self._handoffs:
            raise ValueError(f"reply {token!r} is handed off already; each attempt needs a token of its own")
        if not object_ids:
            return
        for entry in [self.entries[object_id] for object_id in object_ids]:
            entry.handoffs += 1
        self._handoffs[token] = (receiver, tuple(object_ids))
        self._handoffs_to.setdefault(receiver, set()).add(token)

    def handed_off(self, token: Token) -> None:
        """The receiver has taken over the references of the reply (or will never get it)."""
        handoff = self._handoffs.pop(token, None)
        if handoff is None:
            return
        receiver, object_ids = handoff
        tokens = self._handoffs_to[receiver]
        tokens.discard(token)
        if not tokens:
            del self._handoffs_to[receiver]
        for object_id in object_ids:
            entry = self.entries[object_id]
            entry.handoffs -= 1
            if not entry.handoffs:
                self.release(object_id, entry)

    def receive_contained(
        self, outer_id: bytes, inner: Sequence[tuple[bytes, bytes, str]], token: Token | None
    ) -> None:
        """The value of `outer_id` is here and contains the references `inner` (object id, owner, owner's endpoint).

        They are held while the outer entry lives, and replace what was said of it before. With a token, the sender of
        the reply keeps them until `AckReturns`; without one they are covered by the outer, as in `note_from_outer`.
        """
        outer = self.entries.get(outer_id)
        wait = None if token is None else Wait(AckReturns(token))
        if outer is not None:
            for object_id, owner, owner_endpoint in inner:
                if wait is None:
                    entry = self.note_from_outer(outer_id, object_id, owner, owner_endpoint)
                else:
                    entry = self.add_borrowed(object_id, owner, owner_endpoint)
                    if entry.owner is not None and entry.registration < REGISTERED:
                        self._register(object_id, entry, wait)
                entry.contained += 1
            self._replace_contains(outer, [item[0] for item in inner])
        if wait is not None and not wait.remaining:
            self.effects.append(wait.effect)

    def note_from_outer(self, outer_id: bytes, inner_id: bytes, owner: bytes, owner_endpoint: str) -> Entry:
        """A reference came out of the value of `outer_id`, which is held here and covers it. The caller adds a hold."""
        entry = self.add_borrowed(inner_id, owner, owner_endpoint)
        if entry.owner is None or entry.registration >= REGISTERED or (entry.registration == COVERED and entry.guards):
            return entry
        outer = self.entries.get(outer_id)
        if outer is None or outer is entry:
            self._register(inner_id, entry)
        elif outer.guards:
            self._guard(next(iter(outer.guards)), inner_id, entry)
        else:
            outer.covering += 1
            self._register(inner_id, entry, outer_id)
        return entry

    def register(self, object_id: bytes) -> None:
        """Register a borrowed reference that nobody is known to cover, such as one that came out of band."""
        entry = self.entries.get(object_id)
        if entry is not None and entry.owner is not None and entry.registration == COVERED:
            self._register(object_id, entry)

    def registered(self, owner: bytes, object_ids: Iterable[bytes], missing_ids: Iterable[bytes] = ()) -> None:
        """The owner's answer to `AddBorrower`; it does not have those of `missing_ids`."""
        missing = set(missing_ids)
        settled: list[tuple[bytes, Entry]] = []
        for object_id in (*object_ids, *missing):
            entry = self.entries.get(object_id)
            if entry is None or entry.owner != owner or entry.registration != REGISTERING:
                continue
            if object_id not in missing:
                entry.registration = REGISTERED
            else:
                entry.registration = LOST
                if is_held(entry):
                    self.effects.append(BorrowLost(object_id, entry))
            settled.append((object_id, entry))
        for object_id, entry in settled:
            self._uncover(entry)
            self.release(object_id, entry)

    # The owner's side, and deaths

    def borrower_added(self, object_id: bytes, borrower: bytes) -> bool:
        """Another worker registers. False: the object is not there (any more), which the answer has to say."""
        entry = self.entries.get(object_id)
        if entry is None or entry.owner is not None:
            return False
        if entry.borrowers is None:
            entry.borrowers = {borrower}
        else:
            entry.borrowers.add(borrower)
        self._borrowed_by.setdefault(borrower, set()).add(object_id)
        return True

    def borrower_removed(self, object_id: bytes, borrower: bytes) -> None:
        """A borrower has let go; nothing happens if it never registered."""
        ids = self._borrowed_by.get(borrower)
        if ids is not None and object_id in ids:
            ids.discard(object_id)
            if not ids:
                del self._borrowed_by[borrower]
            self._drop_borrower(object_id, borrower)

    def process_died(self, worker_id: bytes) -> None:
        """A worker is gone: neither a borrower nor a receiver any more.

        Close its links first: nothing of it may be entered afterwards, it would stay for good.
        """
        for object_id in self._borrowed_by.pop(worker_id, ()):
            self._drop_borrower(object_id, worker_id)
        for token in tuple(self._handoffs_to.get(worker_id, ())):
            self.handed_off(token)

    def owner_died(self, owner: bytes) -> list[bytes]:
        """An owner is gone. Returns its objects that are still held here; they are `LOST` from now on.

        Registrations under way count as answered: what they kept waiting goes on.
        """
        lost: list[tuple[bytes, Entry]] = []
        for object_id in self._borrowed_from.get(owner, ()):
            entry = self.entries[object_id]
            if entry.registration != LOST:
                entry.registration = LOST
                lost.append((object_id, entry))
        for object_id, entry in lost:
            self._uncover(entry)
            self.release(object_id, entry)
        return [object_id for object_id, entry in lost if is_held(entry) and self.entries.get(object_id) is entry]

    # Looking at it

    def check(self) -> None:
        """Raises AssertionError, with the reason, if the table contradicts itself. Takes time in proportion to it."""
        audit(self.entries, self._tasks, self._handoffs, self._handoffs_to, self._borrowed_by, self._borrowed_from)

    def snapshot(self) -> list[Row]:
        """A line for each object, for `ftray memory`."""
        return rows(self.entries)

    # Inside

    def _guard(self, token: Token, object_id: bytes, entry: Entry) -> None:
        notes = self._tasks[token]
        if notes is None:
            self._tasks[token] = notes = {}
        if object_id not in notes:
            notes[object_id] = entry
            if entry.guards is None:
                entry.guards = {token}
            else:
                entry.guards.add(token)

    def _register(self, object_id: bytes, entry: Entry, cover: Wait | bytes | None = None) -> None:
        """Start a registration, or join the one under way; `cover` is released when it is answered."""
        if entry.registration == COVERED:
            entry.registration = REGISTERING
            self._say(AddBorrower, entry, object_id)
        if cover is not None:
            if isinstance(cover, Wait):
                cover.remaining += 1
            if entry.covers is None:
                entry.covers = [cover]
            else:
                entry.covers.append(cover)

    def _uncover(self, entry: Entry) -> None:
        covers = entry.covers
        if covers is None:
            return
        entry.covers = None
        for cover in covers:
            if isinstance(cover, Wait):
                cover.remaining -= 1
                if not cover.remaining:
                    self.effects.append(cover.effect)
            else:
                outer = self.entries[cover]
                outer.covering -= 1
                self.release(cover, outer)

    def _say(self, kind: type[AddBorrower | RemoveBorrower | PinAtOwner], entry: Entry, object_id: bytes) -> None:
        """Queue a message to the owner, within the newest one if that has the same kind and owner."""
        owner = entry.owner
        assert owner is not None
        effects = self.effects
        if self._open_at < len(effects):
            newest = effects[self._open_at]
            if type(newest) is kind and isinstance(newest, ToOwner) and newest.owner == owner:
                newest.object_ids.append(object_id)
                return
        self._open_at = len(effects)
        effects.append(kind(owner, entry.owner_endpoint, [object_id]))

    def _drop_borrower(self, object_id: bytes, borrower: bytes) -> None:
        entry = self.entries[object_id]
        borrowers = entry.borrowers
        assert borrowers is not None
        borrowers.discard(borrower)
        if not borrowers:
            entry.borrowers = None
            self.release(object_id, entry)

    def _replace_contains(self, outer: Entry, inner_ids: Sequence[bytes]) -> None:
        before = outer.contains
        outer.contains = tuple(inner_ids) or None  # a copy: the caller may change its list
        if before is not None:
            self._release_contained(before)

    def release(self, object_id: bytes, entry: Entry) -> None:
        """A hold went: if it was the last one, let the object go, and what it contains."""
        if self._let_go(object_id, entry) and entry.contains is not None:
            self._release_contained(entry.contains)

    def _release_contained(self, object_ids: tuple[bytes, ...]) -> None:
        # A loop, since objects may contain each other in chains longer than the interpreter's stack.
        batches = [object_ids]
        while batches:
            for object_id in batches.pop():
                entry = self.entries[object_id]
                entry.contained -= 1
                if not entry.contained and self._let_go(object_id, entry) and entry.contains is not None:
                    batches.append(entry.contains)

    def _let_go(self, object_id: bytes, entry: Entry) -> bool:
        if (
            entry.local
            or entry.submitted
            or entry.contained
            or entry.handoffs
            or entry.covering
            or entry.borrowers
            or entry.pinned
        ):
            return False
        owner = entry.owner
        if owner is None:
            del self.entries[object_id]
            self.effects.append(Freed(object_id, entry))
            return True
        if entry.guards or entry.registration == REGISTERING or self.entries.get(object_id) is not entry:
            return False
        del self.entries[object_id]
        ids = self._borrowed_from[owner]
        ids.discard(object_id)
        if not ids:
            del self._borrowed_from[owner]
        if entry.registration == REGISTERED:
            self._say(RemoveBorrower, entry, object_id)
        self.effects.append(Forgot(object_id, entry))
        return True
