"""All messages, one tagged union.

Role: pure data. Headers are MessagePack arrays (`array_like`), first element the tag; fields are only ever appended,
with defaults, so that a newer peer can talk to an older one within a protocol version. Payloads (values, pickled
arguments, GCS commands and records) follow the header as raw bytes and are described by lengths in it.

Who sends what to whom is the heading above each group. `request` numbers are the sender's, echoed in the answer.

Rejected: a struct per frame batch (a second format for the same thing, 0.3 us saved a task).
"""

from __future__ import annotations

from typing import Any

import msgspec

from ftray.wire.group_messages import GroupMessage
from ftray.wire.head_messages import GcsChanges as GcsChanges
from ftray.wire.head_messages import GcsCommand as GcsCommand
from ftray.wire.head_messages import GcsEndpoints as GcsEndpoints
from ftray.wire.head_messages import GcsFollower as GcsFollower
from ftray.wire.head_messages import GcsHeads, GcsPing, RaftPacket
from ftray.wire.head_messages import GcsHeartbeat as GcsHeartbeat
from ftray.wire.head_messages import GcsHello as GcsHello
from ftray.wire.head_messages import GcsRead as GcsRead
from ftray.wire.head_messages import GcsResult as GcsResult
from ftray.wire.head_messages import GcsUnwatch as GcsUnwatch
from ftray.wire.head_messages import GcsWatch as GcsWatch
from ftray.wire.values import ERROR as ERROR
from ftray.wire.values import IN_STORE as IN_STORE
from ftray.wire.values import INLINE as INLINE
from ftray.wire.values import MISSING as MISSING
from ftray.wire.values import ActorCreation as ActorCreation
from ftray.wire.values import Dependency as Dependency
from ftray.wire.values import Message as Message
from ftray.wire.values import Ref as Ref
from ftray.wire.values import Value as Value

# --- first message on every link to a worker, both ways -------------------------------------------------------------


class PeerHello(Message, tag=1):
    worker_id: bytes
    node_id: bytes
    job_id: bytes
    endpoint: str
    pid: int


# --- task channel: owner -> worker ----------------------------------------------------------------------------------


STREAMING = -1
"""`num_returns` of a generator task: each item comes in a `TaskYield` of its own."""
DYNAMIC = -2
"""The same for `num_returns="dynamic"`: return 0 is the list of references to the items, which the owner makes of them
at the end."""


class PushTask(Message, tag=2):
    """Run a function. Payload: `args_bytes` of packed arguments, then the inline dependencies in order."""

    task_id: bytes
    function_id: bytes
    num_returns: int
    attempt: int = 0
    args_bytes: int = 0
    deps: tuple[Dependency, ...] = ()
    name: str = ""
    ahead_max: int = 0
    """For a generator: items that may wait unread at the owner; 0: they are read when they arrive, and the bound of
    the settings holds."""
    max_calls: int = 0
    """The worker ends after this many runs of the function; 0 is no bound."""


class PushActorTask(Message, tag=3):
    """Call a method of the actor that lives in this worker."""

    task_id: bytes
    actor_id: bytes
    method: str
    num_returns: int
    attempt: int = 0
    args_bytes: int = 0
    deps: tuple[Dependency, ...] = ()
    group: str = ""
    """The concurrency group; empty is the method's own, or the default one."""
    ahead_max: int = 0


# --- task channel: worker -> owner ----------------------------------------------------------------------------------


class TaskDone(Message, tag=4):
    """One inline return without contained references: the payload is the value. The common case."""

    task_id: bytes
    work_us: int


class TaskReturns(Message, tag=5):
    """Any number of returns of any kind. `hold` says that the worker keeps contained refs until `ReturnsHeld`."""

    task_id: bytes
    work_us: int
    returns: tuple[Value, ...]
    hold: bool = False
    exits: bool = False
    """The worker ends after this reply (`max_calls`)."""
    yielded: int = 0
    """How many items a generator has yielded in all."""


class TaskFailed(Message, tag=6):
    """The function raised: the payload is the packed exception."""

    task_id: bytes
    work_us: int
    exits: bool = False
    """The worker ends after this reply (`exit_actor`, SystemExit)."""
    mro: tuple[str, ...] = ()
    """`module.qualname` of the exception's class and its bases, for `retry_exceptions` without unpickling user
    types."""
    cancelled: bool = False
    """It was cancelled: not retried, whatever the options say. No payload. Where it is `absent`, this is no reply."""
    yielded: int = 0
    absent: bool = False


class TasksReturned(Message, tag=7):
    """Never started: handed back for another worker."""

    task_ids: tuple[bytes, ...]
    blocked: bool = False


class TaskYield(Message, tag=8):
    """Item `index` of a generator task; its object is return `index` of the task (`index` + 1 if DYNAMIC)."""

    task_id: bytes
    attempt: int
    index: int
    value: Value


# --- worker to worker: ownership ------------------------------------------------------------------------------------


class AddBorrowers(Message, tag=10):
    """The sender holds these objects of the receiver. Answered by `BorrowersAdded`."""

    object_ids: tuple[bytes, ...]


class BorrowersAdded(Message, tag=11):
    object_ids: tuple[bytes, ...]
    missing: tuple[bytes, ...] = ()


class RemoveBorrowers(Message, tag=12):
    object_ids: tuple[bytes, ...]


class ReturnsHeld(Message, tag=13):
    """The receiver of a reply has registered with the owners of all refs in it."""

    task_id: bytes
    attempt: int
    index: int
    """Which return."""


class ResolveObjects(Message, tag=14):
    """A borrower wants the values; each is answered by an `ObjectResolved` when it is there."""

    object_ids: tuple[bytes, ...]


class ObjectResolved(Message, tag=15):
    object_id: bytes
    value: Value


class RecallTasks(Message, tag=16):
    """Hand back those of these tasks that have not started (answered on the task channel)."""

    task_ids: tuple[bytes, ...]


class CancelTask(Message, tag=17):
    """From the owner of a task to the worker that has it, queued or running."""

    task_id: bytes
    force: bool = False
    recursive: bool = True


class PinForever(Message, tag=18):
    """The sender has serialised these objects of the receiver out of band: they are kept for good."""

    object_ids: tuple[bytes, ...]


class CancelObject(Message, tag=19):
    """From a borrower to the owner: cancel the task that makes this object."""

    object_id: bytes
    force: bool = False
    recursive: bool = True


class StreamRead(Message, tag=82):
    """From the owner of a generator task to the worker that runs it: so many items have been read. -1: nobody reads it
    any more, end it; -2: they count as read when they arrive, and the bound of the settings holds from now on."""

    task_id: bytes
    attempt: int
    read: int


# --- driver or worker -> raylet -------------------------------------------------------------------------------------


class RegisterClient(Message, tag=20):
    worker_id: bytes
    pid: int
    endpoint: str
    driver: bool
    job_id: bytes = b""
    entrypoint: str = ""
    namespace: str = ""
    log_to_driver: bool = True
    sys_path: tuple[str, ...] = ()
    cwd: str = ""


class LeaseDemand(Message, tag=21):
    """'I want `want` leases of this class in all', replacing what was said of the class before."""

    class_id: int
    want: int
    resources: dict[str, float] | None = None
    name: str = ""
    environment: str = ""
    """The runtime environment as JSON (`runtime_env.py`), empty for the job's; said with `resources`."""
    retriable: bool = True
    """Its tasks may be repeated if the memory monitor ends their worker; said with `resources`."""


class ReturnLeases(Message, tag=22):
    lease_ids: tuple[int, ...]


class WorkerBlocked(Message, tag=23):
    """The sending worker waits in `get`: lend its CPU."""


class WorkerUnblocked(Message, tag=24):
    pass


class CreateObject(Message, tag=25):
    request: int
    object_id: bytes
    size: int
    owner: bytes


class SealObject(Message, tag=26):
    object_id: bytes


class AbortObject(Message, tag=27):
    object_id: bytes


class PinObjects(Message, tag=28):
    """Answered once with all of them, when all are sealed here (or known to be missing)."""

    request: int
    object_ids: tuple[bytes, ...]


class ReleaseObjects(Message, tag=29):
    object_ids: tuple[bytes, ...]
    pressure: int = 0
    """The number of the `StorePressure` that this answers, if it does."""


class FreeObjects(Message, tag=30):
    """From the owner: the values are not needed any more."""

    object_ids: tuple[bytes, ...]


class AskDeathCause(Message, tag=31):
    """Answered when the cause is known (the template has reaped the process) or after a bounded wait."""

    request: int
    worker_id: bytes


class TaskNames(Message, tag=32):
    """What the sending worker runs now, for status and for the error about its death."""

    name: str


class ActorReady(Message, tag=33):
    """The constructor returned (payload empty) or raised (payload: the packed exception)."""

    actor_id: bytes
    incarnation: int
    ok: bool


class KillWorker(Message, tag=34):
    """An owner asks to SIGKILL a worker it has leased, or a worker itself (forced cancel)."""

    worker_id: bytes
    reason: str


class Unregister(Message, tag=35):
    """A driver or worker says goodbye; what follows is a clean exit, not a death. `reason` for the record. With a
    `code` that is not 0 it is a death all the same, which is known before the process has ended."""

    reason: str = ""
    code: int = 0


class ClientAnswer(Message, tag=36):
    """The answer to `AskClient`. Payload: JSON."""

    request: int
    error: str = ""


class EnvironmentReady(Message, tag=37):
    """A worker has applied its runtime environment, or could not: `error` says why."""

    error: str = ""


class DoomedSeen(Message, tag=38):
    """The owner knows that this worker is about to be killed."""

    worker_id: bytes


# --- raylet -> driver or worker -------------------------------------------------------------------------------------


class Registered(Message, tag=40):
    """Payload: the session's `Config` as MessagePack."""

    node_id: bytes
    job_id: bytes
    cluster_id: bytes
    node_pid: int
    arena_fd: int
    arena_bytes: int
    gcs_endpoints: tuple[str, ...]
    session_dir: str
    resources: dict[str, float]
    namespace: str = ""
    error: str = ""
    gcs_away: bool = False
    """Why there is an `error`: nobody answers for the GCS."""


class LeaseGranted(Message, tag=41):
    class_id: int
    lease_id: int
    worker_id: bytes
    endpoint: str
    node_id: bytes
    pid: int


class LeaseInfeasible(Message, tag=42):
    class_id: int
    missing: str


class LeaseReclaim(Message, tag=43):
    """Others wait: give back idle leases of any class, and `lease_id` (if not 0) once its running tasks are done."""

    lease_id: int = 0


class ObjectCreated(Message, tag=44):
    """`offset` is -1 with an `error`, -2 when the object exists already (sealed), -3 with an `error` when there is no
    room because the disk is full."""

    request: int
    offset: int
    error: str = ""
    fresh: bool = False
    """Nothing has been written in this part of the arena yet."""


class ObjectsPinned(Message, tag=45):
    """In the order asked for: `(offset, size)`, `(-1, 0)` for an object that this node has not, or `(-2, size)` for one
    that is pinned too, but is to be read from its file, since there is no room for it in memory."""

    request: int
    places: tuple[tuple[int, int], ...]
    files: dict[int, tuple[str, int]] = {}
    """By position, path and checksum of what is to be read from a file."""
    lost: dict[int, str] = {}
    """By position, why an object is not here, where there is more to say than that."""


class DeathCauseKnown(Message, tag=46):
    request: int
    cause: dict[str, Any] | None


class LogLines(Message, tag=47):
    """Output of a worker: `(stream, name, pid, text)`; stream 1 is stdout, 2 is stderr."""

    lines: tuple[tuple[int, str, int, str], ...]
    dropped: int = 0


class WorkerAssigned(Message, tag=48):
    """To a worker: it belongs to this job from now on."""

    job_id: bytes
    sys_path: tuple[str, ...] = ()
    cwd: str = ""
    namespace: str = ""
    environment: str = ""
    """JSON of what the runtime environment means on this node; answered by `EnvironmentReady`."""
    num_cpus: float = 0.0
    """Of the first lease: how many threads numerical libraries may start."""


class CreateActor(Message, tag=49):
    """To a worker: become this actor. Payload: the creation spec (`ActorCreation`)."""

    actor_id: bytes
    incarnation: int
    job_id: bytes
    owner: bytes = b""


class ExitWorker(Message, tag=50):
    """To a worker: finish what has been pushed, then exit with code 0."""

    reason: str


class WorkerDoomed(Message, tag=52):
    """To the owner that has leased a worker: it is about to be killed because the node is short of memory. Answered by
    `DoomedSeen`, so that its end is not taken for a crash."""

    worker_id: bytes
    reason: str


class LeaseEnvironmentFailed(Message, tag=53):
    """The runtime environment of this class could not be set up here."""

    class_id: int
    error: str


class AskClient(Message, tag=54):
    """A tool's question that only the process itself can answer: `what` is references, stack, pending, events."""

    request: int
    what: str
    arguments: dict[str, Any] = {}


class StorePressure(Message, tag=55):
    """To who holds pins: room is needed. Answered by a `ReleaseObjects` of all that nothing here looks into, which may
    be empty."""

    request: int


# --- GCS -> raylet (its actor manager's effects) --------------------------------------------------------------------


class StartActor(Message, tag=70):
    """Payload: the creation spec."""

    actor_id: bytes
    incarnation: int
    job_id: bytes
    resources: dict[str, float]
    class_name: str
    owner: bytes = b""
    restartable: bool = False


class StopActor(Message, tag=71):
    actor_id: bytes
    incarnation: int
    graceful: bool
    reason: str


class JobEnded(Message, tag=72):
    job_id: bytes


class NodeFenced(Message, tag=73):
    """You were declared dead: exit."""

    reason: str


# --- command-line tools <-> raylet ----------------------------------------------------------------------------------


class ToolQuery(Message, tag=80):
    request: int
    what: str
    arguments: dict[str, Any] = {}


class ToolReply(Message, tag=81):
    """Payload: JSON."""

    request: int
    error: str = ""


ANY_MESSAGE = (
    PeerHello | PushTask | PushActorTask | TaskDone | TaskReturns | TaskFailed | TasksReturned | TaskYield
    | AddBorrowers | BorrowersAdded | RemoveBorrowers | ReturnsHeld | ResolveObjects | ObjectResolved
    | RecallTasks | CancelTask | PinForever | CancelObject | StreamRead
    | RegisterClient | LeaseDemand | ReturnLeases | WorkerBlocked | WorkerUnblocked
    | CreateObject | SealObject | AbortObject | PinObjects | ReleaseObjects | FreeObjects
    | AskDeathCause | TaskNames | ActorReady | KillWorker | Unregister
    | ClientAnswer | EnvironmentReady | DoomedSeen
    | Registered | LeaseGranted | LeaseInfeasible | LeaseReclaim | ObjectCreated | ObjectsPinned
    | DeathCauseKnown | LogLines | WorkerAssigned | CreateActor | ExitWorker
    | WorkerDoomed | LeaseEnvironmentFailed | AskClient | StorePressure
    | GcsHello | GcsCommand | GcsRead | GcsWatch | GcsResult | GcsChanges | GcsHeartbeat
    | StartActor | StopActor | JobEnded | NodeFenced | GcsHeads | GcsFollower | GcsPing | RaftPacket
    | ToolQuery | ToolReply | GroupMessage | GcsUnwatch | GcsEndpoints
)  # fmt: skip

encode = msgspec.msgpack.Encoder().encode
"""Message -> header bytes."""

decode = msgspec.msgpack.Decoder(ANY_MESSAGE).decode
"""Header bytes -> message. Raises msgspec.DecodeError or msgspec.ValidationError."""
