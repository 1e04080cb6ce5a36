"""Identifiers: what they are made of, and how they are shown.

Role: every id is `bytes` on hot paths, hex for people. Task ids are derived, never drawn, so that a task that runs
again makes the same ids for its children and its objects (design `ownership.md`, lineage): a task's children share a
12-byte prefix, which is a hash of the task's own id, and are told apart by a counter.

Rejected: classes for ids (a wrapper costs 60 bytes and 150 ns each, a million times); uuid4 for tasks (not
reproducible); a hash per task (1 us where a concatenation is 0.1 us).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

JOB_ID_BYTES = 4
NODE_ID_BYTES = 16
WORKER_ID_BYTES = 16
PREFIX_BYTES = 12
TASK_ID_BYTES = 16
OBJECT_ID_BYTES = 20

GROUP_ID_BYTES = 16
"""Of a placement group."""

BUNDLE = "bundle"
BUNDLE_PLACES = 1000.0

PUT_INDEX = b"\xff\xff\xff\xff"
"""The index part of an object made by `put`: no task has that many returns."""

RETURN_INDEX = tuple(i.to_bytes(4, "little") for i in range(64))
"""The index part of the first returns, made once."""


def children_prefix(task_id: bytes) -> bytes:
    """The 12-byte prefix of all tasks submitted and objects put by the task `task_id`."""
    return blake2b(task_id, digest_size=PREFIX_BYTES).digest()


def driver_prefix(job_id: bytes, worker_id: bytes) -> bytes:
    """The prefix of what a driver's main program submits."""
    return blake2b(job_id + worker_id, digest_size=PREFIX_BYTES, person=b"ftray-driver").digest()


def return_id(task_id: bytes, index: int) -> bytes:
    """The object id of the `index`-th return (from 0) of a task."""
    return task_id + (RETURN_INDEX[index] if index < 64 else index.to_bytes(4, "little"))


def content_hash(data: bytes) -> bytes:
    """The 16-byte id under which a function or class is exported: equal bytes, equal id."""
    return blake2b(data, digest_size=16).digest()


def group_resource(name: str, group_id: bytes, index: int | None = None) -> str:
    """What the resource `name` is called inside of a bundle of a placement group, or of any of its bundles."""
    return f"{name}_group_{group_id.hex()}" if index is None else f"{name}_group_{index}_{group_id.hex()}"


def group_of_resource(name: str) -> bytes | None:
    """The placement group of a name that `group_resource` has made; None for other names."""
    before, inside, rest = name.rpartition("_group_")
    try:
        return bytes.fromhex(rest.rpartition("_")[2]) if inside and before else None
    except ValueError:
        return None


def bundle_resources(group_id: bytes, index: int, resources: Mapping[str, float]) -> dict[str, float]:
    """What a bundle offers once it is committed: its resources under names of its own and of its group, and places
    (`bundle`) for what needs no resources but is to run in it."""
    offered: dict[str, float] = {}
    for name, amount in (*resources.items(), (BUNDLE, BUNDLE_PLACES)):
        if amount:
            offered[group_resource(name, group_id, index)] = amount
            offered[group_resource(name, group_id)] = amount
    return offered


def short(identifier: bytes) -> str:
    """An id for messages: the first 12 hex digits."""
    return identifier.hex()[:12]


def short_object(identifier: bytes | str) -> str:
    """An object's or task's id for messages: what tells it apart from others of the same parent is shown whole."""
    text = identifier if isinstance(identifier, str) else identifier.hex()
    return f"{text[:6]}..{text[2 * PREFIX_BYTES :]}"
