"""What a reference table is made of: the entry of an object, the effects, and the line that `ftray memory` prints.

Rules and reasons are in `ftray.ownership.references`, which gives all these names on; import them from there.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

Token: TypeAlias = Hashable
"""Names a running task or a reply. Unique in this process while it is in use, a retry included."""

COVERED: Final = 0
REGISTERING: Final = 1
REGISTERED: Final = 2
LOST: Final = 3
REGISTRATION_NAMES: Final = ("covered", "registering", "registered", "lost")


class Entry(msgspec.Struct, gc=False, eq=False):
    """An object that this process owns or borrows: the holds on it, and what the rest of the worker keeps about it.

    `state`, `value`, `waiters` and `task` belong to others; the table never looks at them.
    Not tracked by the garbage collector: a million entries would make each of its full passes take a second.
    """

    owner: bytes | None = None
    """None: owned here."""
    owner_endpoint: str = ""
    local: int = 0
    """Live ObjectRef instances in this process."""
    submitted: int = 0
    """Unfinished tasks submitted here that have it as an argument."""
    contained: int = 0
    """Live outer objects here whose value contains it."""
    handoffs: int = 0
    """Replies sent with it and not yet acknowledged."""
    covering: int = 0
    """Registrations under way that rely on this object being held here."""
    registration: int = COVERED
    """Of a borrowed entry."""
    pinned: bool = False
    """Serialised out of band: never let go."""
    borrowers: set[bytes] | None = None
    """Of an owned entry: ids of registered workers."""
    contains: tuple[bytes, ...] | None = None
    """Inner objects held while this entry lives."""
    covers: list[Any] | None = None
    """While registering: what to release afterwards, `Wait`s and ids of outer objects."""
    guards: set[Any] | None = None
    """Of a borrowed entry: tokens of running tasks whose submitter covers it."""
    state: int = 0
    value: Any = None
    waiters: Any = None
    task: Any = None


class ToOwner(msgspec.Struct, frozen=True):
    """A message about objects to the owner of all of them."""

    owner: bytes
    owner_endpoint: str
    object_ids: list[bytes]


class AddBorrower(ToOwner, frozen=True):
    """Tell `owner` that this process borrows the objects; its answer goes to `ReferenceTable.registered`."""


class RemoveBorrower(ToOwner, frozen=True):
    """Tell `owner` that this process does not borrow the objects any more. There is no answer."""


class PinAtOwner(ToOwner, frozen=True):
    """Tell `owner` to `pin_forever` the objects, which were serialised out of band here. There is no answer."""


class Freed(msgspec.Struct, frozen=True):
    """An object owned here is not held by anybody: delete its value everywhere."""

    object_id: bytes
    entry: Entry


class Forgot(msgspec.Struct, frozen=True):
    """A borrowed object is not held in this process any more: drop what is cached of it."""

    object_id: bytes
    entry: Entry


class BorrowLost(msgspec.Struct, frozen=True):
    """The owner of a borrowed object that is still held here does not have it any more."""

    object_id: bytes
    entry: Entry


class AckReturns(msgspec.Struct, frozen=True):
    """Tell the sender of the reply `token` that this process has taken over the references in it."""

    token: Token


class TaskMayReply(msgspec.Struct, frozen=True):
    """The reply of the task `token`, for which `end_task` returned False, may leave now."""

    token: Token


Effect: TypeAlias = (
    AddBorrower | RemoveBorrower | PinAtOwner | Freed | Forgot | BorrowLost | AckReturns | TaskMayReply
)


class Wait:
    """An effect that is due when `remaining` registrations have been answered."""

    __slots__ = ("effect", "remaining")

    def __init__(self, effect: TaskMayReply | AckReturns) -> None:
        self.remaining = 0
        self.effect = effect


class Row(NamedTuple):
    """One line of `ftray memory`. `owner` is None for an object owned here; `registration` is "" for such."""

    object_id: bytes
    owner: bytes | None
    local: int
    submitted: int
    contained: int
    handoffs: int
    borrowers: int
    registration: str
    reasons: tuple[str, ...]


def is_held(entry: Entry) -> bool:
    """Whether anything in this process, or a borrower, keeps the object alive."""
    return bool(
        entry.local
        or entry.submitted
        or entry.contained
        or entry.handoffs
        or entry.covering
        or entry.borrowers
        or entry.pinned
    )
