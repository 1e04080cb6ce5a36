"""What clients and heads of the GCS say to each other, and heads among themselves.

Role: pure data, a part of the union in `messages.py`.

What a client has *seen* is the newest revision of which any head has told it. It goes with all that a head may answer
without asking the others: a head that is not as far waits, so that nobody is shown the past.
"""

from __future__ import annotations

from ftray.wire.values import Message

# --- any client <-> GCS ---------------------------------------------------------------------------------------------


class GcsHello(Message, tag=60):
    """First on a GCS link. `node_id` only from a raylet. One of several heads answers `GcsHeads` or `GcsFollower`."""

    client_id: bytes
    node_id: bytes = b""


class GcsCommand(Message, tag=61):
    """Payload: an encoded command of `gcs/state/commands.py`. Retried with the same sequence number."""

    request: int
    sequence: int


class GcsRead(Message, tag=62):
    """Read a record (by key, or a live actor by namespace and name), or a whole table. `wait`: until the key exists.

    With `cached`, any head answers from what it has, once that is not older than `seen` (-1: of whatever age).
    """

    request: int
    table: str
    key: bytes = b""
    all: bool = False
    wait: bool = False
    named: tuple[str, str] | None = None
    cached: bool = False
    seen: int = -1


class GcsWatch(Message, tag=63):
    """From now on, send changes of these tables, and of these keys in others, since a revision; -1: first how they are.

    Any head does, once it is as far as `seen`. All of one message is answered at once.
    """

    tables: tuple[str, ...]
    since_revision: int = -1
    keys: tuple[tuple[str, bytes], ...] = ()
    seen: int = -1


class GcsUnwatch(Message, tag=89):
    """These keys need not be told of any more. What is under way may still come."""

    keys: tuple[tuple[str, bytes], ...]
    seen: int = -1


class GcsResult(Message, tag=64):
    """Payload: the encoded record(s), if any. `code` is empty on success."""

    request: int
    revision: int
    code: str = ""
    message: str = ""
    leader_hint: str = ""


class GcsChanges(Message, tag=65):
    """Payload: encoded list of changes up to and with `revision`."""

    revision: int
    snapshot: bool = False


class GcsHeartbeat(Message, tag=66):
    node_id: bytes
    available: dict[str, float]


# --- which head leads -----------------------------------------------------------------------------------------------


class GcsHeads(Message, tag=67):
    """To a client: this head leads, from now on if it did not before; and where all heads are, when that changes."""

    endpoints: tuple[str, ...]


class GcsFollower(Message, tag=68):
    """To a client: this head does not lead. It serves watches and cached reads, and drops all else. It says so anew
    whenever another one leads, or none does."""

    leader: str
    """Where the leader is; empty if none is known."""
    reason: str
    """Who answers and who does not, if there is no leader."""
    revision: int
    """How far this head is; -1 if it can't serve anybody now."""
    endpoints: tuple[str, ...]
    """Where all heads are, as far as is known here."""


class GcsEndpoints(Message, tag=56):
    """From a raylet to its drivers and workers: where all heads are, as a leader has told it, when that changes. Who
    has asked nothing for long has no link to a head from which to learn it."""

    endpoints: tuple[str, ...]


class GcsPing(Message, tag=69):
    """From a client, and back: is anybody there? A frozen process keeps its connections."""


# --- head <-> head --------------------------------------------------------------------------------------------------


class RaftPacket(Message, tag=90):
    """Head to head. Payload: a message of `gcs/raft/messages.py`."""
