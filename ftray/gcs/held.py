"""What a head is asked that it is not far enough to answer yet.

Role: logic. A client says how far it has seen the state; a head that is behind that keeps the question until it has
got there, rather than show the client the past.

Rules: questions of one link keep their order, since what it has seen only grows. What a link may leave here is bounded,
and goes with it. A revision that is reached costs those who waited for it.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

L = TypeVar("L")
M = TypeVar("M")

HELD_MAX = 10_000
"""So many questions of one link may wait."""


class Held(Generic[L, M]):
    """See the module."""

    __slots__ = ("_counts", "_heap", "_number")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, L, M]] = []
        self._counts: dict[L, int] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, seen: int, link: L, message: M) -> bool:
        """Keeps a question until the state is at `seen`. False if too many of that link wait already."""
        count = self._counts.get(link, 0)
        if count >= HELD_MAX:
            return False
        self._counts[link] = count + 1
        self._number += 1
        heapq.heappush(self._heap, (seen, self._number, link, message))
        return True

    def take(self, revision: int) -> list[tuple[L, M]]:
        """What can be answered at this revision."""
        taken: list[tuple[L, M]] = []
        while self._heap and self._heap[0][0] <= revision:
            _, _, link, message = heapq.heappop(self._heap)
            self._counts[link] -= 1
            if not self._counts[link]:
                del self._counts[link]
            taken.append((link, message))
        return taken

    def forget(self, link: L) -> None:
        """The link has closed."""
        if self._counts.pop(link, 0):
            self._heap = [each for each in self._heap if each[2] is not link]
            heapq.heapify(self._heap)
