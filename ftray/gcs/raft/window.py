"""How much of the log is on its way to each peer: a leader sends no more than a peer takes.

Role: logic. Without it a leader would queue all that a peer lacks at once. What waits on a link is bounded, so a peer
that was away while large values were written would be cut off for reading too slowly, come back, and be cut off again.

Rules: up to `WINDOW_BYTES` of entries are on their way, or one message, however large. An acknowledgement makes room;
when a peer says that it lacks something, or its link changes, nothing counts as under way any more. What was counted in
another term doesn't count.

Rejected: a larger bound on the link (a frozen peer would hold as much memory at the leader as there is log).
"""

from __future__ import annotations

from collections import deque

WINDOW_BYTES = 8 << 20


class Window:
    """Peers are named by their ids."""

    def __init__(self) -> None:
        self._term = 0
        self._sent: dict[bytes, deque[tuple[int, int]]] = {}
        """Last entry and size of the messages that are not answered, oldest first."""
        self._bytes: dict[bytes, int] = {}
        self._held: set[bytes] = set()
        """Peers for which more waits."""

    def take(self, peer: bytes, term: int, last_index: int, size_bytes: int) -> bool:
        """Whether entries up to that one may be sent now; they count as under way then."""
        if term != self._term:
            self._term = term
            self._sent.clear()
            self._bytes.clear()
            self._held.clear()
        under_way = self._bytes.get(peer, 0)
        if under_way and under_way + size_bytes > WINDOW_BYTES:
            self._held.add(peer)
            return False
        self._sent.setdefault(peer, deque()).append((last_index, size_bytes))
        self._bytes[peer] = under_way + size_bytes
        return True

    def acknowledged(self, peer: bytes, index: int) -> bool:
        """The peer has all up to that entry. Returns whether more waits for it, for which there is room now."""
        sent = self._sent.get(peer)
        if not sent or sent[0][0] > index:
            return False
        while sent and sent[0][0] <= index:
            self._bytes[peer] -= sent.popleft()[1]
        if peer in self._held and self._bytes[peer] < WINDOW_BYTES:
            self._held.discard(peer)
            return True
        return False

    def forget(self, peer: bytes) -> None:
        """What was under way has arrived or got lost."""
        self._sent.pop(peer, None)
        self._bytes.pop(peer, None)
        self._held.discard(peer)
