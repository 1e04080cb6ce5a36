"""What replicas say to each other.

Role: pure. Every message names the sender's **term**: what belongs to another term than the receiver's is dropped,
because it was said of a log that may have changed since.

Rejected: the library's dictionaries as they are (nothing checks their fields, and its acknowledgements and votes can't
be told from those of an earlier election).
"""

from __future__ import annotations

import msgspec

from ftray.gcs.raft.membership import Member

PEER_VERSION = 1


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="kind"):
    """Base: arrays on the wire, a number for the type."""


class Hello(_Message, frozen=True, tag=0):
    """First on every link, and again when the table has changed."""

    version: int
    cluster_id: bytes
    replica_id: bytes
    endpoint: str
    boot: int
    """Drawn when the sender's process started."""
    heads: tuple[str, ...]
    """The heads that the sender was started with, sorted."""
    members: tuple[Member, ...]
    """The table of members as the sender knows it; empty if it knows none yet."""
    members_index: int
    """The log entry that the table stands in; 0 for the first table."""
    active: bool
    """The sender takes part with this table. Otherwise it has only written it down."""
    joining: bool
    """The sender waits to be added by a command."""


class Refused(_Message, frozen=True, tag=1):
    """The receiver is no member of the cluster; the link is closed after it."""

    reason: str
    members_index: int
    removed: bool
    """The receiver's id is not in the table. False: the two can't be of one cluster."""


class Append(_Message, frozen=True, tag=2):
    term: int
    round: int
    commit: int
    previous_index: int
    previous_term: int
    entries: tuple[tuple[bytes, int, int], ...]
    """Command, index, term of each."""


class Ping(_Message, frozen=True, tag=3):
    """The leader is there, but what the receiver needs is a snapshot."""

    term: int
    round: int


class Ack(_Message, frozen=True, tag=4):
    term: int
    round: int
    """Of the message that it answers."""
    next_index: int
    """The next entry that the sender needs; what comes before it has arrived if `success`."""
    reset: bool
    success: bool


class VoteRequest(_Message, frozen=True, tag=5):
    term: int
    last_index: int
    last_term: int


class Vote(_Message, frozen=True, tag=6):
    term: int


class PreVoteRequest(_Message, frozen=True, tag=7):
    """Would you vote for me? Changes nothing at the receiver."""

    term: int
    last_index: int
    last_term: int
    attempt: int


class PreVote(_Message, frozen=True, tag=8):
    term: int
    attempt: int
    granted: bool


class TimeoutNow(_Message, frozen=True, tag=9):
    """The leader hands over."""

    term: int


class SnapshotPart(_Message, frozen=True, tag=10):
    term: int
    round: int
    index: int
    index_term: int
    total_bytes: int
    crc: int
    """CRC-32 of the whole snapshot."""
    offset: int
    data: bytes


class SnapshotAck(_Message, frozen=True, tag=11):
    term: int
    round: int
    index: int
    received_bytes: int


PeerMessage = (
    Hello | Refused | Append | Ping | Ack | VoteRequest | Vote | PreVoteRequest | PreVote | TimeoutNow
    | SnapshotPart | SnapshotAck
)  # fmt: skip

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(PeerMessage).decode
"""Raises msgspec.DecodeError."""
