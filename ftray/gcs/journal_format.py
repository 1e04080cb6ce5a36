"""The bytes of a journal file: header, frames, records.

Role: pure. The rules are in `journal.py`.

    file    header, frame*
    header  magic(8) version(u32) cluster_id(16) replica_id(16) salt(16) born_bytes(u64) crc(u32)
    frame   marker(4) sequence(u64) length(u64) body_crc(u32) head_crc(u32), body
    body    record*
    record  length(u32) kind(u8) term(u64) index(u64), payload

`born_bytes`: the size of the file when it got its name. The header keeps its layout in all versions.

Both checksums of a frame begin with the file's salt and the frame's offset, so that bytes that are a good frame
elsewhere (in a payload, in an older file, moved within this one) are not one here.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple

import msgspec

MAGIC = b"FTRYJRNL"
JOURNAL_VERSION = 1
CLUSTER_ID_BYTES = 16
REPLICA_ID_BYTES = 16
SALT_BYTES = 16
RECORD_BYTES_MAX = (1 << 32) - 1
MARKER = b"\xf7FTR"

ENTRY = 1
"""A log entry; what is in it is the replica's business."""
SNAPSHOT = 2
"""The state after the entry `index` of `term`; only ever the first record of a file."""
META = 3
"""A replica's own small state (term and vote); the last one counts."""

_HEADER = Struct("<8sI16s16s16sQI")
_FRAME = Struct("<4sQQII")
_FRAME_SUMMED = Struct("<QQI")
_OFFSET = Struct("<Q")
_RECORD = Struct("<IBQQ")

HEADER_BYTES = _HEADER.size
FRAME_HEAD_BYTES = _FRAME.size
RECORD_HEAD_BYTES = _RECORD.size


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record. `payload` is the caller's."""

    kind: int
    term: int
    index: int
    payload: bytes


class Header(NamedTuple):
    magic: bytes
    version: int
    cluster_id: bytes
    replica_id: bytes
    salt: bytes
    born_bytes: int
    crc: int


class FrameHead(NamedTuple):
    sequence: int
    length: int
    body_crc: int


def encode_header(cluster_id: bytes, replica_id: bytes, salt: bytes, born_bytes: int) -> bytes:
    data = _HEADER.pack(MAGIC, JOURNAL_VERSION, cluster_id, replica_id, salt, born_bytes, 0)[:-4]
    return data + zlib.crc32(data).to_bytes(4, "little")


def decode_header(data: bytes) -> Header | str:
    """The header, or what is wrong with it. Version and ids are for the caller to compare."""
    if len(data) < HEADER_BYTES:
        return "the header is cut short"
    header = Header(*_HEADER.unpack(data))
    if header.magic != MAGIC:
        return f"it begins with {header.magic!r} instead of {MAGIC!r}"
    if header.crc != zlib.crc32(data[:-4]):
        return "the header's checksum is wrong"
    return header


def place_crc(salt_crc: int, offset: int) -> int:
    """What the checksums of the frame at `offset` start from; `salt_crc` is the CRC-32 of the file's salt."""
    return zlib.crc32(_OFFSET.pack(offset), salt_crc)


def encode_frame_head(place: int, sequence: int, body: Sequence[bytes], length: int) -> bytes:
    """The head of a frame with this body of `length` bytes, at the place with the checksum `place`."""
    body_crc = place
    for part in body:
        body_crc = zlib.crc32(part, body_crc)
    return encode_summed_frame_head(place, sequence, length, body_crc)


def encode_summed_frame_head(place: int, sequence: int, length: int, body_crc: int) -> bytes:
    """The same for a body whose checksum, which begins with `place`, is known."""
    head_crc = zlib.crc32(_FRAME_SUMMED.pack(sequence, length, body_crc), place)
    return _FRAME.pack(MARKER, sequence, length, body_crc, head_crc)


def decode_frame_head(data: bytes, place: int) -> FrameHead | None:
    """The head of a frame, or None if these bytes are none."""
    if len(data) < FRAME_HEAD_BYTES:
        return None
    marker, sequence, length, body_crc, head_crc = _FRAME.unpack(data)
    if marker != MARKER or head_crc != zlib.crc32(_FRAME_SUMMED.pack(sequence, length, body_crc), place):
        return None
    return FrameHead(sequence, length, body_crc)


def encode_record(record: Record, into: list[bytes]) -> int:
    """Appends the record's parts to `into`, and returns their size. Raises ValueError if it is 4 GiB or more."""
    length = len(record.payload)
    if length > RECORD_BYTES_MAX:
        raise ValueError(f"a record of {length} bytes: at most {RECORD_BYTES_MAX} fit")
    into.append(encode_record_head(record.kind, record.term, record.index, length))
    into.append(record.payload)
    return _RECORD.size + length


def encode_record_head(kind: int, term: int, index: int, length: int) -> bytes:
    """What stands before a payload of `length` bytes."""
    return _RECORD.pack(length, kind, term, index)


def decode_records(body: bytes) -> Iterator[Record]:
    """The records in a frame's body. Raises ValueError if it does not consist of whole records."""
    position, size = 0, len(body)
    while position < size:
        if size - position < _RECORD.size:
            raise ValueError("a record is cut short inside a good frame")
        length, kind, term, index = _RECORD.unpack_from(body, position)
        position += _RECORD.size
        if length > size - position:
            raise ValueError("a record is longer than its frame")
        yield Record(kind, term, index, body[position : position + length])
        position += length
