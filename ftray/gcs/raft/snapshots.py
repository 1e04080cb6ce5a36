"""Snapshots on their way from the leader to a replica that needs more than the log still has.

Role: logic; what it sends and installs goes through functions that it is given.

Rules
- One part is under way to each receiver; its acknowledgement asks for the next, so a slow receiver holds nobody up, and
  heartbeats find their way between the parts.
- The receiver checks the whole by its checksum, and takes it into use only after it is durable under the journal's name
  (a new file, renamed). Whatever fails before leaves it as it was.
- A receiver that has the snapshot's last entry keeps its log: what follows that entry has been acknowledged, perhaps.

Rejected: the library's way (pickles, in the order of appends, without acknowledgements or checksum).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from ftray.gcs.raft.messages import SnapshotAck, SnapshotPart

PART_BYTES = 256 << 10
RESEND_MS = 1_000.0
"""A part that was not acknowledged for so long is sent again."""


class Made:
    """A snapshot."""

    __slots__ = ("crc", "data", "index", "term")

    def __init__(self, index: int, term: int, data: bytes) -> None:
        self.index = index
        self.term = term
        self.data = data
        self.crc = zlib.crc32(data)


class _Sending:
    __slots__ = ("made", "offset", "sent_ms")

    def __init__(self, made: Made) -> None:
        self.made = made
        self.offset = 0
        self.sent_ms = 0.0


class Sender:
    """At the leader: the snapshots under way."""

    def __init__(
        self, make: Callable[[], tuple[int, int, bytes]], send: Callable[[bytes, Made, int], object]
    ) -> None:
        """`make` returns index, term and bytes; `send` sends the part at an offset."""
        self._make = make
        self._send = send
        self._sending: dict[bytes, _Sending] = {}

    def needed(self, peer: bytes, now_ms: float, first_index: int) -> None:
        """The peer needs a snapshot; `first_index` is the oldest entry in the log."""
        sending = self._sending.get(peer)
        if sending is None:
            made = next((each.made for each in self._sending.values() if each.made.index >= first_index), None)
            sending = self._sending[peer] = _Sending(made or Made(*self._make()))
        elif now_ms - sending.sent_ms < RESEND_MS:
            return
        self._send_part(peer, sending, now_ms)

    def on_ack(self, peer: bytes, ack: SnapshotAck, now_ms: float) -> None:
        sending = self._sending.get(peer)
        if sending is None or ack.index != sending.made.index:
            return
        sending.offset = ack.received_bytes
        if ack.received_bytes < len(sending.made.data):
            self._send_part(peer, sending, now_ms)

    def drop(self, peer: bytes) -> None:
        """The peer is gone, or has what it needed."""
        self._sending.pop(peer, None)

    def drop_all(self) -> None:
        self._sending.clear()

    def _send_part(self, peer: bytes, sending: _Sending, now_ms: float) -> None:
        sending.sent_ms = now_ms
        self._send(peer, sending.made, sending.offset)


def part_of(made: Made, offset: int, term: int, round: int) -> SnapshotPart:
    data = made.data[offset : offset + PART_BYTES]
    return SnapshotPart(term, round, made.index, made.term, len(made.data), made.crc, offset, data)


class Receiver:
    """At a follower: the snapshot that is arriving."""

    def __init__(self) -> None:
        self._index = -1
        self._crc = 0
        self._parts: list[bytes] = []
        self._received = 0

    def take(self, part: SnapshotPart) -> bytes | int:
        """The whole snapshot if this was the last part, or how many bytes are here. Damage begins it anew."""
        if part.index != self._index or part.crc != self._crc:
            self.reset()
            self._index, self._crc = part.index, part.crc
        if part.offset == self._received and part.data:
            self._parts.append(part.data)
            self._received += len(part.data)
        if self._received < part.total_bytes:
            return self._received
        data = b"".join(self._parts)
        self.reset()
        if len(data) != part.total_bytes or zlib.crc32(data) != part.crc:
            return 0
        return data

    def reset(self) -> None:
        self._index, self._crc, self._received = -1, 0, 0
        self._parts.clear()
