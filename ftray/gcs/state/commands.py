"""Commands: everything that can change the GCS state, and their encoding.

Role: pure data. A command is one byte of format version and a MessagePack array whose first element is the command's
tag. Tags are for ever: one that is retired is not used again. 3 is kept for draining a node, 50 to 59 are placement
groups'.

Rules: a new command raises `EDITION`. A field is never given another meaning, and adding one raises
`COMMAND_VERSION`, because a replica that ignored a field which another one obeys would hold a different state. Hence
unknown fields are refused, not skipped. Reads are not commands. A command carries no clock reading that decides
anything, and no randomness.

Rejected: pickle (executes what it reads); names instead of integer tags (commands are written to disk for each actor
and each export); one struct with optional fields (nothing says which belong together).
"""

from __future__ import annotations

from typing import Any

import msgspec

from ftray.gcs.state.errors import CommandError, CommandVersionError, UnknownCommandError

COMMAND_VERSION = 1
EDITION = 1
"""Of the set of commands: a later one has more. Heads tell each other, and the leader takes none that one of them
lacks, because a head that finds a command in its log which it can't read stops."""
EDITIONS: dict[int, int] = {}
"""By tag, the edition that a command came with, if that is not the first."""


class DeathCauseRecord(msgspec.Struct, array_like=True, frozen=True):
    """Why a process or node is gone: who, where, how. The wire and disk form of the cause that exceptions carry."""

    node_id: str = ""
    """Hexadecimal, empty if unknown, like `worker_id`."""
    pid: int = 0
    worker_id: str = ""
    exit_code: int | None = None
    signal: int | None = None
    what: str = ""
    """What the process was or ran: an actor's class, a task's name, 'node'."""
    stderr_tail: list[str] = []
    """The last lines that it wrote to stderr, oldest first."""
    reason: str = ""
    """A clause for people: 'killed by signal 9 (SIGKILL)'."""


class Command(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of all commands."""


class RegisterNode(Command, frozen=True, tag=1):
    """A node joins, or comes back with a higher incarnation, or repeats itself. Answer `fenced`: it must exit."""

    node_id: bytes
    endpoint: str
    resources: dict[str, float]
    labels: dict[str, str]
    incarnation: int
    hostname: str
    pid: int


class MarkNodeDead(Command, frozen=True, tag=2):
    """The node is dead: its actors fail over, what its workers owned ends, jobs driven from it finish."""

    node_id: bytes
    incarnation: int
    cause: DeathCauseRecord


class AddJob(Command, frozen=True, tag=10):
    """A driver starts a job. Answer `exists`: the job id is another driver's, draw another."""

    job_id: bytes
    driver_worker_id: bytes
    driver_pid: int
    node_id: bytes
    entrypoint: str
    namespace: str


class FinishJob(Command, frozen=True, tag=11):
    """The job is over: its actors end, but for detached ones and what those own."""

    job_id: bytes
    cause: DeathCauseRecord | None = None


class KvPut(Command, frozen=True, tag=20):
    """Answer: value 1 for a new key, 0 for a replaced one; `exists` when the key is there and `overwrite` is false."""

    namespace: str
    key: bytes
    value: bytes
    overwrite: bool = True


class KvDelete(Command, frozen=True, tag=21):
    """Deletes a key, or all keys that start with it. Answer: how many."""

    namespace: str
    key: bytes
    prefix: bool = False


class JobKvPut(Command, frozen=True, tag=22):
    """As `KvPut`, for a key that goes with the last of the jobs that have put it; `ended` when the job is over."""

    job_id: bytes
    namespace: str
    key: bytes
    value: bytes
    overwrite: bool = True


class RegisterActor(Command, frozen=True, tag=30):
    """Answer: the actor's id, or with `get_if_exists` that of the live actor which has the name.

    The same owner may repeat it. Another owner of the same id is a later run of the task that made the actor: what
    the earlier run made ends, and the actor starts anew with a higher incarnation.
    """

    actor_id: bytes
    job_id: bytes
    owner_worker_id: bytes | None
    """None for a detached actor."""
    owner_node_id: bytes
    class_name: str
    name: str = ""
    namespace: str = ""
    max_restarts: int = 0
    """-1: without end."""
    detached: bool = False
    resources: dict[str, float] = {}
    creation: bytes = b""
    """Opaque here; kept while the actor may be started again."""
    get_if_exists: bool = False


class ActorPlacing(Command, frozen=True, tag=31):
    """The leader has chosen a node for this incarnation. Only when this is committed is the node asked to start it."""

    actor_id: bytes
    incarnation: int
    node_id: bytes


class ActorAlive(Command, frozen=True, tag=32):
    """The constructor has returned. Answer other than success: this incarnation is not wanted, stop the worker."""

    actor_id: bytes
    incarnation: int
    worker_id: bytes
    endpoint: str
    node_id: bytes
    pid: int


class ActorDied(Command, frozen=True, tag=33):
    """Nothing runs of this incarnation any more. Also the answer to each request to stop one.

    `may_restart` is false when the constructor raised or the actor left of its own will.
    """

    actor_id: bytes
    incarnation: int
    cause: DeathCauseRecord
    may_restart: bool = True


class ActorOutOfScope(Command, frozen=True, tag=34):
    """No handle is left: the actor finishes the calls it has and ends. With `owner_worker_id`, only if that owns it."""

    actor_id: bytes
    owner_worker_id: bytes | None = None


class KillActor(Command, frozen=True, tag=35):
    """End the actor now; without `no_restart` it is restarted if restarts are left."""

    actor_id: bytes
    no_restart: bool
    reason: str


class ActorUnplaced(Command, frozen=True, tag=36):
    """The node did not take the actor (no room, draining): another is chosen, no restart is spent."""

    actor_id: bytes
    incarnation: int
    node_id: bytes
    reason: str


class ActorUnschedulable(Command, frozen=True, tag=37):
    """No node of the cluster could ever host this life, and none has joined in a while: the actor ends."""

    actor_id: bytes
    incarnation: int
    missing: str


class WorkerDied(Command, frozen=True, tag=40):
    """A worker or driver process is gone: its actor fails over, what it owned ends, the job that it drove finishes."""

    worker_id: bytes
    node_id: bytes
    cause: DeathCauseRecord


class CreateGroup(Command, frozen=True, tag=50):
    """A placement group. Answer: its id. The same owner may repeat it.

    If it is not detached it ends with its job; one that was made in an actor which outlives the job, with that actor.
    """

    group_id: bytes
    job_id: bytes
    owner_worker_id: bytes | None
    """The driver or worker that makes it; None for a detached group."""
    owner_node_id: bytes
    bundles: list[dict[str, float]]
    strategy: str = "PACK"
    name: str = ""
    namespace: str = ""
    detached: bool = False


class GroupPlacing(Command, frozen=True, tag=51):
    """The leader has chosen nodes for all bundles that have none. Only when this is committed are they asked.

    `nodes`: by index of the bundle.
    """

    group_id: bytes
    attempt: int
    nodes: dict[int, bytes]


class BundlesPrepared(Command, frozen=True, tag=52):
    """The node holds the resources of all bundles of this attempt that were placed on it.

    Answer other than success: they are not wanted, give them back.
    """

    group_id: bytes
    attempt: int
    node_id: bytes


class BundlesRefused(Command, frozen=True, tag=53):
    """The node can't hold them, and holds nothing of this attempt: other nodes are chosen."""

    group_id: bytes
    attempt: int
    node_id: bytes
    reason: str


class BundlesCommitted(Command, frozen=True, tag=54):
    """The node offers what it holds for this attempt. Answer other than success: it is not wanted, give it back."""

    group_id: bytes
    attempt: int
    node_id: bytes


class BundlesReturned(Command, frozen=True, tag=55):
    """The node holds nothing of this attempt any more. Also the answer to each request to give something back."""

    group_id: bytes
    attempt: int
    node_id: bytes
    reason: str


class RemoveGroup(Command, frozen=True, tag=56):
    """The group is over; what runs in its bundles ends with them."""

    group_id: bytes
    reason: str = ""


class GroupInfeasible(Command, frozen=True, tag=57):
    """No set of live nodes could hold the group: it goes on waiting, and its record says for what."""

    group_id: bytes
    attempt: int
    missing: str


class ForgetClients(Command, frozen=True, tag=90):
    """These clients will never retry: their last results are dropped. What they send later is refused."""

    client_ids: list[bytes]


AnyCommand = (
    RegisterNode | MarkNodeDead | AddJob | FinishJob | KvPut | KvDelete | JobKvPut
    | RegisterActor | ActorPlacing | ActorAlive | ActorDied | ActorOutOfScope | KillActor | ActorUnplaced
    | ActorUnschedulable | WorkerDied | CreateGroup | GroupPlacing | BundlesPrepared | BundlesRefused
    | BundlesCommitted | BundlesReturned | RemoveGroup | GroupInfeasible | ForgetClients
)  # fmt: skip

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AnyCommand).decode
_VERSION = bytes([COMMAND_VERSION])


def encode_command(command: AnyCommand) -> bytes:
    """The command as bytes, for the wire and the journal."""
    return _VERSION + _encode(command)


def decode_command(data: bytes | memoryview) -> AnyCommand:
    """The command in `data`, with the types of all fields checked.

    Raises CommandVersionError for another version of the format, UnknownCommandError for a type that is not known
    here, CommandError for anything else that is not a command.
    """
    view = memoryview(data)
    if not view:
        raise CommandError("an empty command: the sender must send what encode_command returns")
    if view[0] != COMMAND_VERSION:
        raise CommandVersionError(
            f"a command in version {view[0]} of the format, but this process speaks {COMMAND_VERSION}: "
            "run the same version of ftray on all nodes"
        )
    try:
        command: AnyCommand = _decode(view[1:])
    except UnicodeDecodeError as error:
        raise CommandError(f"a malformed command (a text in it is not UTF-8: {error})") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise _explained(view[1:], error) from None
    return command


def _explained(body: memoryview, error: Exception) -> CommandError:
    try:
        plain: Any = msgspec.msgpack.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return CommandError(f"a command that is not valid MessagePack ({error})")
    tag = plain[0] if isinstance(plain, list) and plain else None
    if isinstance(tag, int) and tag not in COMMAND_NAMES:
        return UnknownCommandError(
            f"a command of the unknown type {tag}: the sender is newer than this process; upgrade the head nodes first"
        )
    name = COMMAND_NAMES.get(tag, "?") if isinstance(tag, int) else "?"
    return CommandError(f"a malformed command ({name}: {error})")


def _tag(kind: type) -> int:
    tag = kind.__struct_config__.tag  # type: ignore[attr-defined]  # set by msgspec on each struct
    assert isinstance(tag, int)
    return tag


def edition_of(command: AnyCommand) -> int:
    """From which edition on a head can read it."""
    return EDITIONS.get(_tag(type(command)), 1) if EDITIONS else 1


COMMAND_NAMES: dict[int, str] = {_tag(kind): kind.__name__ for kind in AnyCommand.__args__}
"""Tag -> name, for messages and tests."""
