"""Records of the GCS tables, and what `apply` answers.

Role: pure data. Records are frozen: a change replaces the record, so that a change feed, a snapshot and a reader can
share them without copying. The dictionaries and lists inside are not to be written to either.

Rejected: records that are updated in place (each reader would need a copy, and a watch would show the future).
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from ftray.gcs.state.commands import DeathCauseRecord


class Table(enum.StrEnum):
    """Names of the tables, as in watches and reads."""

    NODES = "nodes"
    JOBS = "jobs"
    ACTORS = "actors"
    KV = "kv"
    WORKER_FAILURES = "worker_failures"
    PLACEMENT_GROUPS = "placement_groups"


class Code(enum.StrEnum):
    """How a command ended. Empty is success; all others changed nothing."""

    OK = ""
    STALE = "stale"
    """The client has had a result for a later sequence number."""
    SESSION_EXPIRED = "session_expired"
    """The client was forgotten: what became of earlier commands is not known here any more."""
    INVALID = "invalid"
    """The command can't ever be right: the sender's fault."""
    TOO_LARGE = "too_large"
    NOT_FOUND = "not_found"
    EXISTS = "exists"
    """The key, name or id is taken by another."""
    ENDED = "ended"
    """The job or actor is over."""
    OWNER_DIED = "owner_died"
    FENCED = "fenced"
    """The node was declared dead, or a later incarnation of it is known: nothing that it says counts."""
    STALE_INCARNATION = "stale_incarnation"
    """Said of an earlier life of the actor or node."""
    ILLEGAL = "illegal"
    """Not possible in the present state."""
    NOT_LEADER = "not_leader"
    """Given by replicas, not by the state: ask the leader."""
    UNAVAILABLE = "unavailable"
    """Given by replicas: the command could not be made durable and was not carried out. It may be repeated as it is."""
    INTERNAL = "internal"
    """A fault of ftray: please report it. The state is as it was before."""


class NodeState(enum.IntEnum):
    ALIVE = 1
    DEAD = 2


class JobState(enum.IntEnum):
    RUNNING = 1
    FINISHED = 2


class ActorState(enum.IntEnum):
    """See `lifecycle.TRANSITIONS`."""

    PENDING = 1
    """To be placed; has not run, or was not taken by the node."""
    PLACING = 2
    """A node has been chosen and is to start it."""
    ALIVE = 3
    RESTARTING = 4
    """Failed, to be placed again."""
    DEAD = 5


class Strategy(enum.StrEnum):
    """How the bundles of a placement group are to lie."""

    PACK = "PACK"
    """On as few nodes as possible."""
    SPREAD = "SPREAD"
    """On as many nodes as possible."""
    STRICT_PACK = "STRICT_PACK"
    """All on one node, or not at all."""
    STRICT_SPREAD = "STRICT_SPREAD"
    """Each on another node, or not at all."""


class GroupState(enum.IntEnum):
    """See `groups.TRANSITIONS`."""

    PENDING = 1
    """To be placed; nothing is held for it."""
    PREPARING = 2
    """Nodes have been chosen for all bundles that had none, and are to hold their resources."""
    COMMITTING = 3
    """All nodes hold them, so the group is made: they are to offer them."""
    CREATED = 4
    RESCHEDULING = 5
    """Was made, has lost bundles, which are to be placed again; the others stay."""
    REMOVED = 6


class BundleState(enum.IntEnum):
    UNPLACED = 1
    PREPARING = 2
    """Its node is to hold its resources."""
    PREPARED = 3
    """Its node has said that it holds them."""
    COMMITTING = 4
    """All have: its node is to offer them."""
    COMMITTED = 5


class DeathKind(enum.StrEnum):
    """Why an actor ended, or failed last; why a placement group was removed."""

    NONE = ""
    CREATION_FAILED = "creation_failed"
    WORKER_DIED = "worker_died"
    NODE_DIED = "node_died"
    OWNER_DIED = "owner_died"
    JOB_FINISHED = "job_finished"
    OUT_OF_SCOPE = "out_of_scope"
    KILLED = "killed"
    UNSCHEDULABLE = "unschedulable"
    EXITED = "exited"
    """Left of its own will."""
    REMOVED = "removed"
    """A placement group, by request."""


class NodeRecord(msgspec.Struct, array_like=True, frozen=True, tag=1):
    node_id: bytes
    endpoint: str
    resources: dict[str, float]
    labels: dict[str, str]
    incarnation: int
    hostname: str
    pid: int
    state: NodeState = NodeState.ALIVE
    cause: DeathCauseRecord | None = None


class JobRecord(msgspec.Struct, array_like=True, frozen=True, tag=2):
    job_id: bytes
    driver_worker_id: bytes
    driver_pid: int
    node_id: bytes
    entrypoint: str
    namespace: str
    state: JobState = JobState.RUNNING
    cause: DeathCauseRecord | None = None
    """Why it finished, when its driver did not say goodbye."""


class Leftover(msgspec.Struct, array_like=True, frozen=True):
    """A process of an earlier or ended life of an actor that may still run, on a live node, and must be stopped.

    It goes when the node says that nothing runs (`ActorDied`, `WorkerDied`) or is declared dead. While it is there, the
    actor is not placed: two lives never overlap.
    """

    incarnation: int
    node_id: bytes
    worker_id: bytes
    """Empty if the life had not been reported alive."""
    graceful: bool
    """It may finish the calls it has."""


class ActorRecord(msgspec.Struct, array_like=True, frozen=True, tag=3):
    actor_id: bytes
    job_id: bytes
    owner_worker_id: bytes | None
    owner_node_id: bytes
    class_name: str
    name: str
    namespace: str
    max_restarts: int
    detached: bool
    resources: dict[str, float]
    creation: bytes
    """Empty once the actor is dead."""
    state: ActorState = ActorState.PENDING
    incarnation: int = 0
    """Of the present or next life; raised whenever one ends."""
    restarts: int = 0
    """Restarts spent."""
    node_id: bytes = b""
    """Where it is placed or lives, or last lived when dead; the same for worker, endpoint and pid."""
    worker_id: bytes = b""
    endpoint: str = ""
    pid: int = 0
    kind: DeathKind = DeathKind.NONE
    """Why the last life ended; kept while the next one runs, like `cause`."""
    cause: DeathCauseRecord | None = None
    leftover: Leftover | None = None


class KvRecord(msgspec.Struct, array_like=True, frozen=True, tag=4):
    namespace: str
    key: bytes
    value: bytes


class WorkerFailureRecord(msgspec.Struct, array_like=True, frozen=True, tag=5):
    worker_id: bytes
    node_id: bytes
    cause: DeathCauseRecord


class Bundle(msgspec.Struct, array_like=True, frozen=True):
    """Resources of a placement group that lie on one node."""

    resources: dict[str, float]
    state: BundleState = BundleState.UNPLACED
    node_id: bytes = b""
    attempt: int = 0
    """In which attempt it was placed there: what is said of others does not count."""


class Reservation(msgspec.Struct, array_like=True, frozen=True):
    """What a live node may still hold for bundles that are not there any more, and must give back.

    It goes when the node says that it holds nothing of the attempt (`BundlesReturned`, `BundlesRefused`) or is declared
    dead. While it is there no bundle of the group is placed: two reservations of one bundle never overlap.
    """

    node_id: bytes
    attempt: int
    indices: list[int]
    """Which bundles."""


class GroupRecord(msgspec.Struct, array_like=True, frozen=True, tag=6):
    """A placement group."""

    group_id: bytes
    job_id: bytes
    owner_worker_id: bytes | None
    """The driver or worker that made it, which is not needed any more; None if it is detached."""
    owner_node_id: bytes
    name: str
    namespace: str
    strategy: Strategy
    detached: bool
    bundles: list[Bundle]
    state: GroupState = GroupState.PENDING
    attempt: int = 0
    """Of the present or next placing; raised whenever bundles are given up or lost."""
    made: bool = False
    """All its bundles were prepared once. Before that they are placed all or none, later each that is lost."""
    kind: DeathKind = DeathKind.NONE
    cause: DeathCauseRecord | None = None
    """Why the last attempt failed, bundles were lost, or it was removed."""
    missing: str = ""
    """What no set of live nodes could give it; it waits for other nodes."""
    leftovers: list[Reservation] = []
    owner_actor_id: bytes = b""
    """The actor in which it was made, with which it ends if that outlives the job."""


Record: TypeAlias = NodeRecord | JobRecord | ActorRecord | KvRecord | WorkerFailureRecord | GroupRecord


class Change(msgspec.Struct, array_like=True, frozen=True):
    """A record came to be as it is (or, None, went) at `revision`. One command's changes share a revision."""

    revision: int
    table: Table
    key: bytes
    record: Record | None


class Result(msgspec.Struct, array_like=True, frozen=True):
    """What became of a command. `revision` is that of the state after it."""

    code: Code
    message: str
    revision: int
    value: bytes | int | None = None

    @property
    def ok(self) -> bool:
        return self.code is Code.OK


JOB_KEYS = "job-keys"
"""The key-value namespace that says which jobs need which keys (see `job_keys.py`)."""
JOB_ID_BYTES = 4


def kv_key(namespace: str, key: bytes) -> bytes:
    """The key of an entry in the key-value table. Namespaces contain no NUL, so no two entries share one."""
    return namespace.encode() + b"\0" + key
