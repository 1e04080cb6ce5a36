"""Both ends of a stream of items: what the owner of a generator task knows of it, and how far ahead its worker may go.

Role: pure. The worker numbers what the generator yields and sends it at once; the owner counts what has arrived and
what has been read, and tells the worker from time to time (`StreamRead`). A `Window` at the worker decides whether the
generator may go on, a `Stream` at the owner what becomes of an item and what the worker has to hear.

Rules:
- Items of one attempt arrive in order, without gaps. An attempt that repeats the task begins anew at item 0: what has
  arrived already is skipped, so that no item is read twice and the values that were read stay true.
- Unread are the items that the worker has sent and not heard to be read. At most `items_max` of them, and less than
  `bytes_max` bytes before the last one.
- Where nobody is going to read (everybody waits for the end, or the list of all items is wanted), arrival counts as
  reading: the window then only keeps the worker from running away from the socket.
- Reads are told when they are an eighth of the window, or when the reader has to wait. The worker that repeats a task
  hears of them at its first item.

Rejected: a message for each read (as dear as the item); a credit that the owner hands out (a repeated attempt would
have to be told how much of it was spent by the one before).
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Final

from ftray.ids import return_id
from ftray.wire.messages import DYNAMIC

DROPPED: Final = -1
"""In `StreamRead`: nobody reads it any more."""
FREE: Final = -2
"""In `StreamRead`: items count as read when they arrive; the bound of the settings holds instead of the task's own."""
TELL_SHARE: Final = 8
"""Reads are told when they are this part of the window."""


def item_id(task_id: bytes, num_returns: int, index: int) -> bytes:
    """The object of item `index` of a generator task."""
    return return_id(task_id, index + 1 if num_returns == DYNAMIC else index)


class Verdict(Enum):
    """What becomes of an item."""

    TAKE = 0
    SKIP = 1
    """It is here already, or belongs to an attempt that is over: its value is let go, and nothing else changes."""
    DISCARD = 2
    """It counts, but nobody will read it."""
    GAP = 3
    """One before it is missing, which no correct worker lets happen."""


TAKE, SKIP, DISCARD, GAP = Verdict.TAKE, Verdict.SKIP, Verdict.DISCARD, Verdict.GAP


class Window:
    """The worker's end, for one attempt. `told` may be called by any thread, the rest by the one that runs the
    generator: each field has one writer."""

    __slots__ = ("_bytes", "_free_max", "_read", "_sizes", "_told", "bytes_max", "closed", "items_max", "sent")

    def __init__(self, items_max: int, free_max: int, bytes_max: int) -> None:
        self.items_max = items_max
        self.bytes_max = bytes_max
        self.sent = 0
        self.closed = False
        """Nobody reads it: the generator is to be closed."""
        self._free_max = free_max
        self._told = 0
        self._read = 0
        self._sizes: deque[int] = deque()
        self._bytes = 0

    def told(self, read: int) -> None:
        """The owner says so many have been read, or DROPPED, or FREE."""
        if read >= 0:
            self._told = max(read, self._told)
        elif read == FREE:
            self.items_max = max(self.items_max, self._free_max)
        else:
            self.closed = True

    def yielded(self, size: int) -> None:
        """One more item was sent."""
        if self.sent >= self._read:
            self._sizes.append(size)
            self._bytes += size
        self.sent += 1

    def has_room(self) -> bool:
        """Whether the generator may be resumed."""
        told = self._told
        if told != self._read:
            for _ in range(min(told, self.sent) - self._read):
                self._bytes -= self._sizes.popleft()
            self._read = told
        return self.sent - told < self.items_max and self._bytes < self.bytes_max


class Stream:
    """The owner's end, over all attempts."""

    __slots__ = (
        "_bytes_max", "_due", "_free_max", "_items_max", "_sizes", "_special", "_told", "_untold_bytes",
        "arrived", "attempt", "bounded", "dropped", "failed", "free", "left", "over", "read",
    )  # fmt: skip

    def __init__(self, items_max: int, free_max: int, bytes_max: int) -> None:
        """`items_max` 0 is a stream that counts arrival as reading from the start."""
        self.bounded = items_max > 0
        self.free = not self.bounded
        self.arrived = 0
        self.read = 0
        self.over = False
        self.failed = False
        """The last item is an error that came instead of an item."""
        self.left = False
        """The reader is gone: items are discarded."""
        self.dropped = False
        """Nobody wants the end of it either: the generator is to be closed."""
        self.attempt = -1
        """Of the newest item; -1 before the first."""
        self._items_max = items_max or free_max
        self._free_max = free_max
        self._bytes_max = bytes_max
        self._sizes: deque[int] = deque()
        self._told = 0
        self._untold_bytes = 0
        self._special = 0
        self._due = False

    # --- from the worker ---------------------------------------------------------------------------------------------

    def item(self, attempt: int, index: int, size: int) -> Verdict:
        """An item has come."""
        if attempt != self.attempt:
            if attempt < self.attempt or self.over:
                return SKIP
            self.attempt = attempt
            self._told = 0
            self._special = 0
            self._due = attempt > 0
        if index < self.arrived or self.over:
            return SKIP
        if index > self.arrived:
            return GAP
        self.arrived += 1
        if self.left:
            self.read = self.arrived
            self._untold_bytes += size
            return DISCARD
        self._sizes.append(size)
        if self.free:
            self._untold_bytes += size
        return TAKE

    def end(self, yielded: int) -> bool:
        """The task has ended after so many items, fewer perhaps than an attempt before. False when some are missing."""
        self.over = True
        return yielded <= self.arrived

    def fail(self) -> None:
        """The task has failed for good: one more item stands for the error."""
        if not self.over:
            self.over = self.failed = True
            self.arrived += 1
            if self.left:
                self.read = self.arrived

    # --- from the reader ---------------------------------------------------------------------------------------------

    def take(self) -> int:
        """The index of the next item, which counts as read; -1 when it has not arrived."""
        index = self.read
        if index == self.arrived:
            return -1
        self.read = index + 1
        if self._sizes:  # an error has no size
            size = self._sizes.popleft()
            if not self.free:
                self._untold_bytes += size
        return index

    def lift(self) -> None:
        """Somebody waits for the end: from now on arrival counts as reading."""
        if not self.free:
            self.free = True
            self._untold_bytes += sum(self._sizes)
            self._items_max = max(self._items_max, self._free_max)

    def leave(self) -> range:
        """The reader is gone: returns the items that nobody will read."""
        self.lift()
        self.left = True
        unread = range(self.read, self.arrived)
        self.read = self.arrived
        self._sizes.clear()
        return unread

    def drop(self) -> None:
        """Nobody waits for the end either."""
        self.dropped = True

    # --- to the worker -----------------------------------------------------------------------------------------------

    def say(self, hungry: bool) -> int | None:
        """What the worker of the present attempt has to hear next; None for nothing. `hungry`: the reader waits."""
        if self.over or self.attempt < 0:
            return None
        if self.dropped:
            if self._special == DROPPED:
                return None
            self._special = DROPPED
            return DROPPED
        count = self.read
        if self.free:
            if self.bounded and self._special != FREE:
                self._special = FREE
                return FREE
            count = self.arrived
        untold = count - self._told
        if untold > 0 and (
            hungry
            or self._due
            or untold * TELL_SHARE >= self._items_max
            or self._untold_bytes * TELL_SHARE >= self._bytes_max
        ):
            self._due = False
            self._told = count
            self._untold_bytes = 0
            return count
        return None
