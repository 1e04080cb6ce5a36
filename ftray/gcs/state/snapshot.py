"""Snapshots of the GCS state: their encoding and checks.

Role: pure. `magic(8) version(u32) crc32(u32) length(u64)`, then the body in MessagePack. The checksum covers version,
length and body. Equal states give equal bytes, so that replicas can be compared by their snapshots.

Rules: nothing of a snapshot that fails a check is used. A snapshot names its cluster, and is refused elsewhere.

Rejected: pickle (executes what it reads, and changes with the code); encoding at once (a second of the loop for 500 MB,
in which a leader loses its followers), in a thread (it would hold the interpreter's lock), or in a forked process (the
reactor's descriptors and the arena would be in it); tables that are copied when they are written to (a list of the
records is cheap enough).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from struct import Struct
from typing import NamedTuple

import msgspec

from ftray.gcs.state.checksums import joined_crc
from ftray.gcs.state.errors import ClusterMismatchError, SnapshotCorruptError, SnapshotVersionError
from ftray.gcs.state.sessions import Sessions
from ftray.gcs.state.store import ENDED_MAX, Store
from ftray.gcs.state.tables import (
    ActorRecord,
    GroupRecord,
    JobRecord,
    KvRecord,
    NodeRecord,
    Record,
    Result,
    Table,
    WorkerFailureRecord,
)

MAGIC = b"FTRYSNAP"
SNAPSHOT_VERSION = 2
"""1 had neither checksums of sessions nor placement groups, and counted finished jobs of which actors live on among the
ended records. It is still read."""
_HEAD = Struct("<8sIIQ")
_SUMMED = Struct("<IQ")


class _Body(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    cluster_id: bytes
    revision: int
    nodes: list[NodeRecord]
    jobs: list[JobRecord]
    actors: list[ActorRecord]
    kv: list[KvRecord]
    worker_failures: list[WorkerFailureRecord]
    ended: dict[Table, list[bytes]]
    sessions: list[tuple[bytes, int, Result]]
    forgotten: list[bytes]
    checksums: list[int] = []
    """Of the sessions' last commands."""
    groups: list[GroupRecord] = []


READ_PIECES = 1000
"""Records that are encoded in one `read`: less than a millisecond."""
_WHOLE_BYTES = 16 << 20

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Body).decode


class Picture:
    """The state at one moment, which becomes bytes piece by piece.

    To take it costs the lists of the records (1 ms for 100,000): records are frozen, so that they can be shared with
    the state that goes on. What is replaced meanwhile lives until its table has been read.
    """

    head_bytes = _HEAD.size

    def __init__(self, cluster_id: bytes, revision: int, store: Store, sessions: Sessions) -> None:
        ids, last = list(sessions.last), list(sessions.last.values())
        self._fields: list[object] = [
            cluster_id,
            revision,
            list(store.nodes.values()),
            list(store.jobs.values()),
            list(store.actors.values()),
            list(store.kv.values()),
            list(store.worker_failures.values()),
            {table: list(keys) for table, keys in store.ended.items()},
            _Items(len(last), ((client_id, each[0], each[1]) for client_id, each in zip(ids, last))),
            list(sessions.forgotten),
            _Items(len(last), (each[2] for each in last)),
            list(store.placement_groups.values()),
        ]
        """What `_Body` has, in its order."""
        self._pieces = self._encoded()
        self._rest = memoryview(b"")

    def read(self, limit_bytes: int) -> bytes:
        """The next bytes of the body: at most so many, and of at most `READ_PIECES` records. Empty at the end."""
        rest = self._rest
        if not rest:
            parts: list[bytes] = []
            size = 0
            for piece in islice(self._pieces, READ_PIECES):
                parts.append(piece)
                size += len(piece)
                if size >= limit_bytes:
                    break
            rest = memoryview(b"".join(parts))
        self._rest = rest[limit_bytes:]
        return bytes(rest[:limit_bytes])

    def head(self, body_bytes: int, body_crc: int) -> bytes:
        """What stands before the body, `head_bytes` long. `body_crc` is the CRC-32 of the body."""
        seed = zlib.crc32(_SUMMED.pack(SNAPSHOT_VERSION, body_bytes))
        return _HEAD.pack(MAGIC, SNAPSHOT_VERSION, joined_crc(seed, body_crc, body_bytes), body_bytes)

    def _encoded(self) -> Iterator[bytes]:
        """As `_encode` of a whole `_Body` would give it."""
        fields = self._fields
        yield _array_head(len(fields))
        while fields:
            field = fields.pop(0)
            if isinstance(field, list):
                yield _array_head(len(field))
                yield from map(_encode, field)
            elif isinstance(field, dict):
                yield bytes([0x80 + len(field)])  # a map; there are few tables
                for key, items in field.items():
                    yield _encode(key)
                    yield _array_head(len(items))
                    yield from map(_encode, items)
            elif isinstance(field, _Items):
                yield _array_head(field.length)
                yield from map(_encode, field.items)
            else:
                yield _encode(field)


class _Items(NamedTuple):
    """A list whose items are made when they are wanted."""

    length: int
    items: Iterator[object]


def _array_head(count: int) -> bytes:
    """How MessagePack begins an array."""
    if count < 16:
        return bytes([0x90 + count])
    return b"\xdc" + count.to_bytes(2, "big") if count < 1 << 16 else b"\xdd" + count.to_bytes(4, "big")


def encode_snapshot(cluster_id: bytes, revision: int, store: Store, sessions: Sessions) -> bytes:
    """The whole state as bytes, at once."""
    picture = Picture(cluster_id, revision, store, sessions)
    body = b"".join(iter(lambda: picture.read(_WHOLE_BYTES), b""))
    return picture.head(len(body), zlib.crc32(body)) + body


def decode_snapshot(data: bytes | memoryview, cluster_id: bytes) -> tuple[int, Store, Sessions]:
    """The revision, tables and sessions in a snapshot of cluster `cluster_id`.

    Raises SnapshotCorruptError, SnapshotVersionError for one of a newer version, ClusterMismatchError.
    """
    view = memoryview(data)
    if len(view) < _HEAD.size:
        raise SnapshotCorruptError(
            f"a snapshot of {len(view)} bytes is cut short: use another replica's, or an older one"
        )
    magic, version, crc, length = _HEAD.unpack_from(view)
    body = view[_HEAD.size :]
    if magic != MAGIC:
        raise SnapshotCorruptError(f"not a snapshot of a GCS state: it begins with {magic!r} instead of {MAGIC!r}")
    if len(body) != length or zlib.crc32(body, zlib.crc32(_SUMMED.pack(version, length))) != crc:
        raise SnapshotCorruptError("the snapshot's checksum is wrong: use another replica's, or an older one")
    if not 1 <= version <= SNAPSHOT_VERSION:
        raise SnapshotVersionError(
            f"the snapshot is in version {version} of the format, this process reads 1 to {SNAPSHOT_VERSION}: "
            "run the version of ftray that wrote it, or a later one"
        )
    try:
        content = _decode(body)
    except msgspec.DecodeError as error:
        raise SnapshotCorruptError(f"the snapshot's checksum is right, but its content is not ({error})") from None
    if content.cluster_id != cluster_id:
        raise ClusterMismatchError(
            f"the snapshot is of cluster {content.cluster_id.hex()}, this replica belongs to {cluster_id.hex()}: "
            "check the directory that it was started with"
        )
    store = Store()
    tables: tuple[Sequence[Record], ...] = (
        content.nodes,
        content.jobs,
        content.actors,
        content.kv,
        content.worker_failures,
        content.groups,
    )
    for table_records in tables:
        for record in table_records:
            store.load(record)
    for table in ENDED_MAX:
        keys = content.ended.get(table, [])
        if version == 1:
            keys = [key for key in keys if key in store.ended[table]]
        if set(keys) != set(store.ended[table]):
            raise SnapshotCorruptError(f"the snapshot's list of ended {table} does not fit the table")
        store.ended[table] = dict.fromkeys(keys)
    sessions = Sessions()
    checksums = content.checksums or [0] * len(content.sessions)
    if len(checksums) != len(content.sessions):
        raise SnapshotCorruptError("the snapshot has more or fewer checksums than sessions")
    for (client_id, sequence, result), checksum in zip(content.sessions, checksums):
        sessions.last[client_id] = (sequence, result, checksum)
    sessions.forgotten = dict.fromkeys(content.forgotten)
    return content.revision, store, sessions
