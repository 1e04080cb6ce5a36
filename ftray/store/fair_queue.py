"""A queue that is fair between clients: one of each in turn, and first come first served within one.

Role: pure. Items are opaque; each has a size, of which the sum is kept.

Rules: whoever was served goes behind all others; a client that comes anew goes behind them too. So one that asks for a
thousand things delays the others by one at a time.

Rejected: one queue for all (a client that asks for a lot at once makes the others wait for all of it).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """See the module. All operations take constant time, but `drop`, which takes time for each item dropped."""

    __slots__ = ("_bytes", "_by_client", "_length")

    def __init__(self) -> None:
        self._by_client: dict[bytes, deque[tuple[T, int]]] = {}
        """In the order in which they are served next."""
        self._length = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._length

    @property
    def waiting_bytes(self) -> int:
        """The sizes of all that waits."""
        return self._bytes

    def push(self, client: bytes, item: T, size: int) -> None:
        """Puts an item behind the client's others."""
        self._by_client.setdefault(client, deque()).append((item, size))
        self._length += 1
        self._bytes += size

    def heads(self) -> Iterator[tuple[bytes, T]]:
        """The first item of each client, whose turn is next first. The queue must not change meanwhile."""
        for client, items in self._by_client.items():
            yield client, items[0][0]

    def pop(self, client: bytes) -> T:
        """Takes the client's first item, and puts the client behind the others. Raises KeyError if it has none."""
        items = self._by_client.pop(client)
        item, size = items.popleft()
        if items:
            self._by_client[client] = items
        self._length -= 1
        self._bytes -= size
        return item

    def drop(self, client: bytes) -> list[T]:
        """Takes out all that a client waits for."""
        items = self._by_client.pop(client, ())
        self._length -= len(items)
        self._bytes -= sum(size for _, size in items)
        return [item for item, _ in items]
