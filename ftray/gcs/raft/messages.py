"""What replicas say to each other.

Role: pure. Every message names the sender's **term**: what belongs to another term than the receiver's is dropped,
because it was said of a log that may have changed since.

Rules
- Four bytes of CRC-32 come first: what a faulty network or memory has changed on the way is no message, and never a
  different command. (TCP's own checksum misses one damaged packet in 65,536.)
- Numbers have a range, so that what is computed from them fits into the journal.

Rejected: the library's dictionaries as they are (nothing checks their fields, and its acknowledgements and votes can't
be told from those of an earlier election).
"""

from __future__ import annotations

import zlib
from typing import Annotated

import msgspec

from ftray.gcs.raft.membership import Member

PEER_VERSION = 1
NUMBER_MAX = (1 << 62) - 1

Number = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
Filled = Annotated[bytes, msgspec.Meta(min_length=1)]


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="kind"):
    """Base: arrays on the wire, a number for the type."""


class Hello(_Message, frozen=True, tag=0):
    """First on every link, and again when the table has changed."""

    version: int
    cluster_id: bytes
    replica_id: bytes
    endpoint: str
    boot: Number
    """Drawn when the sender's process started."""
    heads: tuple[str, ...]
    """The heads that the sender was started with, sorted."""
    members: tuple[Member, ...]
    """The table of members as the sender knows it; empty if it knows none yet."""
    members_index: Number
    """The log entry that the table stands in; 0 for the first table."""
    active: bool
    """The sender takes part with this table. Otherwise it has only written it down."""
    joining: bool
    """The sender waits to be added by a command."""
    term: Number = 0
    last_index: Number = 0
    """The last entry of the sender's log."""
    edition: Number = 1
    """Of the commands that the sender can read (`gcs/state/commands.py`)."""


class Refused(_Message, frozen=True, tag=1):
    """The receiver is no member of the cluster; the link is closed after it."""

    reason: str
    members_index: Number
    removed: bool
    """The receiver's id is not in the table. False: the two can't be of one cluster."""
    forgot: bool = False
    """The receiver is not what it was: it must stop."""


class Append(_Message, frozen=True, tag=2):
    term: Number
    round: Number
    commit: Number
    previous_index: Number
    previous_term: Number
    entries: tuple[tuple[Filled, Number, Number], ...]
    """Command, index, term of each."""


class Ping(_Message, frozen=True, tag=3):
    """The leader is there, but what the receiver needs is a snapshot."""

    term: Number
    round: Number


class Ack(_Message, frozen=True, tag=4):
    term: Number
    round: Number
    """Of the message that it answers."""
    next_index: Number
    """The next entry that the sender needs; what comes before it has arrived if `success`."""
    reset: bool
    success: bool


class VoteRequest(_Message, frozen=True, tag=5):
    term: Number
    last_index: Number
    last_term: Number


class Vote(_Message, frozen=True, tag=6):
    term: Number


class PreVoteRequest(_Message, frozen=True, tag=7):
    """Would you vote for me? Changes nothing at the receiver."""

    term: Number
    last_index: Number
    last_term: Number
    attempt: Number


class PreVote(_Message, frozen=True, tag=8):
    term: Number
    attempt: Number
    granted: bool


class TimeoutNow(_Message, frozen=True, tag=9):
    """The leader hands over."""

    term: Number


class SnapshotPart(_Message, frozen=True, tag=10):
    term: Number
    round: Number
    index: Number
    index_term: Number
    total_bytes: Number
    crc: Number
    """CRC-32 of the whole snapshot."""
    offset: Number
    data: bytes


class SnapshotAck(_Message, frozen=True, tag=11):
    term: Number
    round: Number
    index: Number
    received_bytes: Number


TermMessage = (
    Append | Ping | Ack | VoteRequest | Vote | PreVoteRequest | PreVote | TimeoutNow | SnapshotPart | SnapshotAck
)
PeerMessage = Hello | Refused | TermMessage

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PeerMessage).decode


def encode(message: PeerMessage) -> bytes:
    """The message as bytes, with its checksum."""
    body = _encode(message)
    return zlib.crc32(body).to_bytes(4, "little") + body


def decode(data: bytes | bytearray | memoryview) -> PeerMessage:
    """The message in `data`. Raises msgspec.DecodeError for anything that is none."""
    body = memoryview(data)[4:]
    if zlib.crc32(body) != int.from_bytes(data[:4], "little") or not body:
        raise msgspec.DecodeError("its checksum is wrong: it was damaged on the way, or is no message of a head")
    try:
        message: PeerMessage = _decode(body)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None
    return message
