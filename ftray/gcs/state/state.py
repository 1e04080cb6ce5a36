"""The GCS state machine: commands in, results and changes out.

Role: pure and deterministic: equal commands in equal order give equal states, results and snapshots on every replica
and in every process.

Rules
- `apply` never raises. A refused command is a result, and changes nothing. A fault inside a handler is undone and
  answered `internal`. (Only MemoryError goes through: a replica that is out of memory must stop, not guess.)
- Each command that changes something raises the revision by one, and all its changes carry that revision.
- `(client_id, sequence)` takes effect once: `sessions`.
- A watch that resumes from revision r gets `changes_since(r)`, or COMPACTED if the ring does not reach back that far.

Rejected: handlers as methods of one class (a thousand lines); changes recorded in the snapshot (a watcher further
behind gets the tables, which are smaller).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from ftray.gcs.state import invariants, job_keys
from ftray.gcs.state.checks import Refusal, Value
from ftray.gcs.state.commands import AnyCommand, FinishJob, ForgetClients, JobKvPut, KvPut, RegisterActor, WorkerDied
from ftray.gcs.state.failures import settle, shortened
from ftray.gcs.state.handlers import HANDLERS
from ftray.gcs.state.lifecycle import IllegalTransition
from ftray.gcs.state.sessions import Sessions
from ftray.gcs.state.snapshot import Picture, decode_snapshot, encode_snapshot
from ftray.gcs.state.store import Store
from ftray.gcs.state.tables import (
    ActorRecord,
    Change,
    Code,
    GroupRecord,
    KvRecord,
    NodeRecord,
    Result,
    Table,
    kv_key,
)

VALUE_BYTES_MAX = 64 << 20
RING_CHANGES_MAX = 20_000
RING_BYTES_MAX = 64 << 20
REST_BYTES_MAX = 1 << 20
"""The largest command, its value not counted."""
CHANGE_BYTES = 500
"""What a change is taken to weigh, beside the values in it."""
BUNDLE_BYTES = 300
"""The same for each bundle of a placement group."""


class _Compacted(enum.Enum):
    COMPACTED = "compacted"


COMPACTED: Final = _Compacted.COMPACTED
"""The changes asked for are not all there any more: start from the tables."""


def admit(command: AnyCommand, value_bytes_max: int = VALUE_BYTES_MAX, command_bytes: int = 0) -> str | None:
    """Why a command, which takes `command_bytes` in all, is too large to be accepted, or None.

    Asked by the replica before the command is written: a limit that differed between replicas must not decide inside
    `apply`. A command refused so has not used up its sequence number.
    """
    if isinstance(command, (KvPut, JobKvPut)) and len(command.value) > value_bytes_max:
        size, what = len(command.value), f"the value of key {command.key[:80]!r} (namespace {command.namespace[:80]!r})"
    elif isinstance(command, RegisterActor) and len(command.creation) > value_bytes_max:
        size, what = len(command.creation), f"the class and arguments of actor {command.class_name[:80]}"
    else:
        value = command.value if isinstance(command, KvPut) else getattr(command, "creation", b"")
        rest_bytes = command_bytes - len(value)
        if rest_bytes <= REST_BYTES_MAX:
            return None
        return (
            f"a command ({type(command).__name__}) of {rest_bytes} bytes beside its value, more than the limit of "
            f"{REST_BYTES_MAX}: names, labels, resources and reports of errors must be shorter"
        )
    return (
        f"{what} takes {size} bytes, more than the limit of {value_bytes_max} (value_bytes_max): "
        "pass large data by ftray.put and a reference"
    )


class GcsState:
    """The tables, the sessions, and the latest changes of one cluster.

    Readers use `store` and its lookups, and must not write to it.
    """

    __slots__ = ("cluster_id", "revision", "store", "sessions", "_ring", "_ring_bytes", "_ring_floor", "_fresh")

    def __init__(self, cluster_id: bytes) -> None:
        self.cluster_id = cluster_id
        self.revision = 0
        self.store = Store()
        self.sessions = Sessions()
        self._ring: deque[Change] = deque()
        self._ring_bytes = 0
        self._ring_floor = 0
        """Changes after this revision are all in the ring."""
        self._fresh: list[Change] = []

    # --- writing -----------------------------------------------------------------------------------------------------

    def apply(self, client_id: bytes, sequence: int, command: AnyCommand, checksum: int = 0) -> Result:
        """Carries out a command once, and says what became of it.

        With an empty `client_id` there is no session: for commands that are harmless when repeated, as those of the
        managers are (each names an incarnation). `checksum` is that of the command's bytes; 0: it is not compared.
        """
        if client_id:
            known = self.sessions.recall(client_id, sequence, self.revision, checksum)
            if known is not None:
                return known
        result = self._apply(client_id, command)
        if client_id:
            self.sessions.record(client_id, sequence, result, checksum)
        return result

    def recall(self, client_id: bytes, sequence: int, checksum: int = 0) -> Result | None:
        """What `apply` would answer without looking at the command (a repeat, a stale or expired client), or None."""
        return self.sessions.recall(client_id, sequence, self.revision, checksum) if client_id else None

    def _apply(self, client_id: bytes, command: AnyCommand) -> Result:
        store = self.store
        try:
            value: Value
            if isinstance(command, ForgetClients):
                value = self.sessions.forget(each for each in command.client_ids if each != client_id)
            else:
                cause = getattr(command, "cause", None)
                if cause is not None:
                    command = replace(command, cause=shortened(cause))
                value = HANDLERS[type(command)](store, command)
                settle(store)
                job_keys.clean_up(store)
                store.evict()
        except Refusal as refusal:
            store.roll_back()
            return Result(refusal.code, refusal.message, self.revision)
        except IllegalTransition as error:
            store.roll_back()
            return Result(Code.ILLEGAL, str(error), self.revision)
        except MemoryError:
            raise
        except Exception as error:
            store.roll_back()
            what = f"{type(error).__name__}: {error}"
            message = f"{type(command).__name__} failed inside the GCS ({what}): please report it"
            return Result(Code.INTERNAL, message, self.revision)
        if store.dirty:
            self.revision += 1
            self._publish(store.commit(self.revision))
        if isinstance(command, WorkerDied) and command.worker_id != client_id:
            self.sessions.forget([command.worker_id])
        elif isinstance(command, FinishJob):
            driver = store.jobs[command.job_id].driver_worker_id if command.job_id in store.jobs else client_id
            if driver != client_id:
                self.sessions.forget([driver])
        return Result(Code.OK, "", self.revision, value)

    # --- the change feed ---------------------------------------------------------------------------------------------

    def take_changes(self) -> list[Change]:
        """The changes since the last call, in order."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def changes_since(self, revision: int, tables: Iterable[Table] | None = None) -> Sequence[Change] | _Compacted:
        """Changes after `revision` to the tables (default: all), oldest first, or COMPACTED.

        A revision that this state has not reached yet (a replica that lags behind the one asked before) has none.
        """
        if revision < self._ring_floor:
            return COMPACTED
        wanted = set(Table) if tables is None else set(tables)
        found = []
        for change in reversed(self._ring):
            if change.revision <= revision:
                break
            if change.table in wanted:
                found.append(change)
        found.reverse()
        return found

    def rows_as_changes(self, tables: Iterable[Table]) -> list[Change]:
        """The tables as changes at the present revision: what a watcher gets instead of those it has missed."""
        return [
            Change(self.revision, table, key, record)
            for table in tables
            for key, record in self.store.rows(table).items()
        ]

    def _publish(self, changes: list[Change]) -> None:
        self._fresh += changes
        for change in changes:
            self._ring.append(change)
            self._ring_bytes += _weight(change)
        while len(self._ring) > RING_CHANGES_MAX or self._ring_bytes > RING_BYTES_MAX:
            dropped = self._ring.popleft()
            self._ring_bytes -= _weight(dropped)
            self._ring_floor = dropped.revision

    # --- reading -----------------------------------------------------------------------------------------------------

    def actor(self, actor_id: bytes) -> ActorRecord | None:
        return self.store.actors.get(actor_id)

    def named_actor(self, namespace: str, name: str) -> ActorRecord | None:
        """The live actor of that name."""
        return self.store.named_actor(namespace, name)

    def group(self, group_id: bytes) -> GroupRecord | None:
        return self.store.placement_groups.get(group_id)

    def named_group(self, namespace: str, name: str) -> GroupRecord | None:
        """The live placement group of that name."""
        return self.store.named_group(namespace, name)

    def node(self, node_id: bytes) -> NodeRecord | None:
        return self.store.nodes.get(node_id)

    def kv_get(self, namespace: str, key: bytes) -> bytes | None:
        record = self.store.kv.get(kv_key(namespace, key))
        return record.value if record is not None else None

    def kv_keys(self, namespace: str, prefix: bytes = b"") -> list[bytes]:
        """The keys of a namespace that start with `prefix`, in order. Costs a pass over the table."""
        start = kv_key(namespace, prefix)
        rows: dict[bytes, KvRecord] = self.store.kv
        return sorted(record.key for key, record in rows.items() if key.startswith(start))

    # --- snapshots and checks ----------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """The whole state with checksum, version and cluster id. Equal states give equal bytes."""
        return encode_snapshot(self.cluster_id, self.revision, self.store, self.sessions)

    def picture(self) -> Picture:
        """The same, to be read piece by piece while this state goes on."""
        return Picture(self.cluster_id, self.revision, self.store, self.sessions)

    @classmethod
    def restore(cls, data: bytes | memoryview, cluster_id: bytes) -> GcsState:
        """The state in a snapshot of this cluster.

        Raises SnapshotCorruptError, SnapshotVersionError, ClusterMismatchError.
        """
        state = cls(cluster_id)
        state.revision, state.store, state.sessions = decode_snapshot(data, cluster_id)
        state._ring_floor = state.revision
        return state

    def check(self) -> list[str]:
        """The invariants that do not hold (there should be none)."""
        return list(invariants.violations(self.store))


def _weight(change: Change) -> int:
    record = change.record
    if isinstance(record, KvRecord):
        return CHANGE_BYTES + len(record.value)
    if isinstance(record, ActorRecord):
        return CHANGE_BYTES + len(record.creation)
    if isinstance(record, GroupRecord):
        return CHANGE_BYTES + BUNDLE_BYTES * len(record.bundles)
    return CHANGE_BYTES
