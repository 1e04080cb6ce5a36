"""Snapshots of the GCS state: their encoding and checks.

Role: pure. `magic(8) version(u32) crc32(u32) length(u64)`, then the body in MessagePack. The checksum covers version,
length and body. Equal states give equal bytes, so that replicas can be compared by their snapshots.

Rules: nothing of a snapshot that fails a check is used. A snapshot names its cluster, and is refused elsewhere.

Rejected: pickle (executes what it reads, and changes with the code).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from struct import Struct

import msgspec

from ftray.gcs.state.errors import ClusterMismatchError, SnapshotCorruptError, SnapshotVersionError
from ftray.gcs.state.sessions import Sessions
from ftray.gcs.state.store import ENDED_MAX, Store
from ftray.gcs.state.tables import (
    ActorRecord,
    JobRecord,
    KvRecord,
    NodeRecord,
    Record,
    Result,
    Table,
    WorkerFailureRecord,
)

MAGIC = b"FTRYSNAP"
SNAPSHOT_VERSION = 1
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


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Body).decode


def encode_snapshot(cluster_id: bytes, revision: int, store: Store, sessions: Sessions) -> bytes:
    """The whole state as bytes."""
    body = _encode(
        _Body(
            cluster_id,
            revision,
            list(store.nodes.values()),
            list(store.jobs.values()),
            list(store.actors.values()),
            list(store.kv.values()),
            list(store.worker_failures.values()),
            {table: list(keys) for table, keys in store.ended.items()},
            [(client_id, sequence, result) for client_id, (sequence, result) in sessions.last.items()],
            list(sessions.forgotten),
        )
    )
    crc = zlib.crc32(body, zlib.crc32(_SUMMED.pack(SNAPSHOT_VERSION, len(body))))
    return _HEAD.pack(MAGIC, SNAPSHOT_VERSION, crc, len(body)) + body


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
    if version != SNAPSHOT_VERSION:
        raise SnapshotVersionError(
            f"the snapshot is in version {version} of the format, this process reads {SNAPSHOT_VERSION}: "
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
    )
    for table_records in tables:
        for record in table_records:
            store.load(record)
    for table in ENDED_MAX:
        keys = content.ended.get(table, [])
        if set(keys) != set(store.ended[table]):
            raise SnapshotCorruptError(f"the snapshot's list of ended {table} does not fit the table")
        store.ended[table] = dict.fromkeys(keys)
    sessions = Sessions()
    for client_id, sequence, result in content.sessions:
        sessions.last[client_id] = (sequence, result)
    sessions.forgotten = dict.fromkeys(content.forgotten)
    return content.revision, store, sessions
