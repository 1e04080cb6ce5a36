"""What messages are made of: values and references as they travel, and the spec that makes an actor.

Role: pure data, as `messages.py`, which gives these names on: import them from there.
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, array_like=True, gc=False):
    """Base of all messages."""


INLINE = 0
"""The value's bytes are in the payload."""
IN_STORE = 1
"""The value is in the arena of the node `node_id`."""
ERROR = 2
"""The payload is a packed exception (`worker/failures.py`)."""
MISSING = 3
"""The owner does not know the object (freed)."""


class Ref(Message):
    """A reference inside a value or an argument: object, and where its owner lives."""

    object_id: bytes
    owner: bytes
    endpoint: str


class Value(Message):
    """What a return, a dependency or an owner's answer is; `size` bytes of the payload belong to it unless in store."""

    kind: int
    size: int
    node_id: bytes = b""
    refs: tuple[Ref, ...] = ()


class Dependency(Message):
    """A top-level argument that was a reference: at `position` (or keyword), with its value."""

    position: int | str
    object_id: bytes
    owner: bytes
    endpoint: str
    value: Value


class ActorCreation(msgspec.Struct, array_like=True):
    """The creation spec of an actor, kept by the GCS as opaque bytes and unpacked by the worker that becomes it."""

    task_id: bytes
    class_id: bytes
    class_name: str
    args: bytes
    deps: tuple[Dependency, ...]
    inline: tuple[bytes, ...]
    max_concurrency: int
    max_task_retries: int
    asynchronous: str
    """'' for a plain class, 'asyncio' or 'trio' when it has coroutine methods."""
    owner: bytes
    owner_endpoint: str
    max_restarts: int = 0
    name: str = ""
    concurrency_groups: dict[str, int] = {}
    out_of_order: bool = False
    """Calls may start before earlier ones whose arguments are not there yet."""
    environment: str = ""
