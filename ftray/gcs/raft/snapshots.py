"""Snapshots on their way from the leader to a replica that needs more than the log still has.

Role: logic; what it sends and installs goes through functions that it is given.

What is sent is the snapshot with which the leader's journal begins, read from its file part by part: it costs no
memory, and is there already, since entries are only missing in the log because a snapshot has taken their place. (A
leader that has not written its snapshot in this life makes a new one first, of which it knows the checksum.)

Rules
- All receivers get the same snapshot while one is being sent. Its file stays open until the last has it, so it does
  not matter when the journal is compacted meanwhile.
- One part is under way to each receiver; its acknowledgement asks for the next, so a slow receiver holds nobody up, and
  heartbeats find their way between the parts.
- The receiver checks the whole by its checksum, and takes it into use only after it is durable under the journal's name
  (a new file, renamed). Whatever fails before leaves it as it was.
- A receiver that has the snapshot's last entry keeps its log: what follows that entry has been acknowledged, perhaps.

Rejected: the library's way (pickles, in the order of appends, without acknowledgements or checksum); making a snapshot
for each follower that needs one (a second of the loop for 500 MB, and as much memory).
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable
from typing import Protocol

from ftray.gcs.raft.messages import SnapshotAck, SnapshotPart

PART_BYTES = 256 << 10
RESEND_MS = 1_000.0
"""A part that was not acknowledged for so long is sent again."""
REFUSED_MAX = 3
"""A snapshot that was sent whole so many times, and not taken, is taken to be damaged: another one is made."""


class Made(Protocol):
    """A snapshot to read. See `ftray.gcs.compaction.SnapshotFile`."""

    index: int
    term: int
    total_bytes: int
    crc: int

    def read(self, offset: int, length: int) -> bytes:
        """Raises OSError."""
        ...

    def close(self) -> None: ...


class _Sending:
    __slots__ = ("made", "offset", "refused", "sent_ms")

    def __init__(self, made: Made) -> None:
        self.made = made
        self.offset = 0
        self.refused = 0
        self.sent_ms = 0.0


class Sender:
    """At the leader: the snapshots under way."""

    def __init__(
        self,
        open: Callable[[], Made | None],
        send: Callable[[bytes, Made, int], object],
        damaged: Callable[[], object] = lambda: None,
    ) -> None:
        """`open` gives the snapshot, or None: it is to be asked for again. `send` sends the part at an offset; it
        raises OSError if that can't be read. `damaged`: what `open` has given is not what was written."""
        self._open = open
        self._send = send
        self._damaged = damaged
        self._sending: dict[bytes, _Sending] = {}

    @property
    def busy(self) -> bool:
        """Whether any is under way."""
        return bool(self._sending)

    def sends_to(self, peer: bytes) -> bool:
        """Whether one is under way to that peer."""
        return peer in self._sending

    def needed(self, peer: bytes, now_ms: float, first_index: int) -> None:
        """The peer needs a snapshot; `first_index` is the oldest entry in the log."""
        sending = self._sending.get(peer)
        if sending is None:
            made = next((each.made for each in self._sending.values() if each.made.index >= first_index), None)
            made = made or self._open()
            if made is None:
                return
            sending = self._sending[peer] = _Sending(made)
        elif now_ms - sending.sent_ms < RESEND_MS:
            return
        self._send_part(peer, sending, now_ms)

    def on_ack(self, peer: bytes, ack: SnapshotAck, now_ms: float) -> None:
        sending = self._sending.get(peer)
        if sending is None or ack.index != sending.made.index:
            return
        total_bytes = sending.made.total_bytes
        if not ack.received_bytes and sending.offset + PART_BYTES >= total_bytes:
            sending.refused += 1  # it had all of it: the checksum was wrong, or there was no room
            if sending.refused >= REFUSED_MAX:
                self._spoilt(sending.made)
                return
        sending.offset = ack.received_bytes
        if ack.received_bytes < total_bytes:
            self._send_part(peer, sending, now_ms)

    def drop(self, peer: bytes) -> None:
        """The peer is gone, or has what it needed."""
        sending = self._sending.pop(peer, None)
        if sending is not None and all(each.made is not sending.made for each in self._sending.values()):
            sending.made.close()

    def drop_all(self) -> None:
        for peer in list(self._sending):
            self.drop(peer)

    def _send_part(self, peer: bytes, sending: _Sending, now_ms: float) -> None:
        sending.sent_ms = now_ms
        try:
            self._send(peer, sending.made, sending.offset)
        except OSError:
            self._spoilt(sending.made)

    def _spoilt(self, made: Made) -> None:
        for peer in [peer for peer, each in self._sending.items() if each.made is made]:
            self.drop(peer)
        self._damaged()


def part_of(made: Made, offset: int, term: int, round: int) -> SnapshotPart:
    """Raises OSError."""
    data = made.read(offset, PART_BYTES)
    if len(data) < min(PART_BYTES, made.total_bytes - offset):
        raise OSError(errno.EIO, "the snapshot is cut short")
    return SnapshotPart(term, round, made.index, made.term, made.total_bytes, made.crc, offset, data)


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
