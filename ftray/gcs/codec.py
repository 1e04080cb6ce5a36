"""How records and changes travel between GCS server and clients.

Role: pure functions on bytes, the same for both ends. A payload of `GcsChanges`, and of a `GcsResult` that answers a
read, is the array `[tables, changes]`: the tables that the changes show *whole* (what is not among them does not
exist), and the `Change`s. The payload of a `GcsResult` that answers a command is the result's value.

Rules: a change is encoded once, however many watchers get it (`encode_change`, then `join_changes`). The creation spec
of an actor stays with the GCS and the node that starts it: readers of actors get the record without it, because it
may be large and nobody else needs it.

Rejected: an array of records for reads (a second format); pickle (executes what it reads).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from ftray.gcs.state.tables import ActorRecord, Change, Code, Record, Result, Table
from ftray.wire.messages import GcsResult

_encode = msgspec.msgpack.Encoder().encode
_decode_changes = msgspec.msgpack.Decoder(tuple[list[Table], list[Change]]).decode
_decode_value = msgspec.msgpack.Decoder(bytes | int | None).decode
_PAIR = b"\x92"
_ARRAY32 = b"\xdd"


def without_creation(record: Record | None) -> Record | None:
    """The record as readers get it."""
    if type(record) is ActorRecord and record.creation:
        return replace(record, creation=b"")
    return record


def encode_change(change: Change) -> bytes:
    """One change, for `join_changes`."""
    record = without_creation(change.record)
    return _encode(change if record is change.record else replace(change, record=record))


def join_changes(encoded: Sequence[bytes], whole: Iterable[Table] = ()) -> bytes:
    """The payload made of changes that are encoded already."""
    return b"".join((_PAIR, _encode(list(whole)), _ARRAY32, len(encoded).to_bytes(4, "big"), *encoded))


def encode_changes(changes: Iterable[Change], whole: Iterable[Table] = ()) -> bytes:
    """The payload that shows these changes, with all rows of the tables `whole`."""
    return join_changes([encode_change(change) for change in changes], whole)


def decode_changes(payload: bytes | bytearray) -> tuple[list[Table], list[Change]]:
    """The tables shown whole, and the changes. Raises msgspec.DecodeError or msgspec.ValidationError."""
    return _decode_changes(payload)


def encode_result(request: int, result: Result, leader_hint: str = "") -> tuple[GcsResult, bytes]:
    """The answer to a command: message and payload."""
    message = GcsResult(request, result.revision, result.code.value, result.message, leader_hint)
    return message, _encode(result.value)


def decode_result(message: GcsResult, payload: bytes | bytearray) -> Result:
    """The other way.

    Raises msgspec.DecodeError or msgspec.ValidationError.
    """
    value = _decode_value(payload) if payload else None
    return Result(code_of(message.code), message.message, message.revision, value)


def code_of(text: str) -> Code:
    """The code of that name; `internal` for one that only a newer GCS knows."""
    try:
        return Code(text)
    except ValueError:
        return Code.INTERNAL
