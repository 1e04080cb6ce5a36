"""The tables with their indices, and an undo log so that a command takes effect whole or not at all.

Role: pure. All writes go through `put` and `delete`, which keep the indices and collect the changes of the command at
work. `commit` stamps them with a revision, `roll_back` undoes them.

Rules: nothing may be iterated whose order depends on the process (sets of bytes are hashed with a seed), because two
replicas would then differ: what comes out of an index is sorted, tables and the orders of `ended` are dictionaries.

Ended records are kept for those who ask why, the latest of each table up to `ENDED_MAX`; an actor with a leftover
process is not counted as ended yet, nor is a finished job of which actors live on, nor a removed placement group while
nodes have to give something of it back.

Rejected: copying the tables before each command (the cost grows with the cluster); scans instead of indices (a node's
death would cost a pass over all actors).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from ftray.gcs.state.commands import DeathCauseRecord
from ftray.gcs.state.groups import nodes_of
from ftray.gcs.state.lifecycle import ON_NODE
from ftray.gcs.state.tables import (
    JOB_ID_BYTES,
    JOB_KEYS,
    ActorRecord,
    ActorState,
    Change,
    GroupRecord,
    GroupState,
    JobRecord,
    JobState,
    KvRecord,
    NodeRecord,
    NodeState,
    Record,
    Table,
    WorkerFailureRecord,
    kv_key,
)

ENDED_MAX: dict[Table, int] = {
    Table.NODES: 1_000,
    Table.JOBS: 1_000,
    Table.ACTORS: 10_000,
    Table.WORKER_FAILURES: 1_000,
    Table.PLACEMENT_GROUPS: 1_000,
}
"""How many ended records are kept. Part of the state machine: all replicas must agree."""

IndexKey = tuple[str, bytes] | tuple[str, str, str]
R = TypeVar("R", bound=Record)


class Store:
    """Tables, indices, and the changes of the command at work."""

    __slots__ = (
        "nodes", "jobs", "actors", "kv", "worker_failures", "placement_groups", "ended", "doomed", "_index", "_undo",
    )  # fmt: skip

    def __init__(self) -> None:
        self.nodes: dict[bytes, NodeRecord] = {}
        self.jobs: dict[bytes, JobRecord] = {}
        self.actors: dict[bytes, ActorRecord] = {}
        self.kv: dict[bytes, KvRecord] = {}
        self.worker_failures: dict[bytes, WorkerFailureRecord] = {}
        self.placement_groups: dict[bytes, GroupRecord] = {}
        self.ended: dict[Table, dict[bytes, None]] = {table: {} for table in ENDED_MAX}
        """Ended records of each table, oldest first."""
        self.doomed: list[tuple[bytes, DeathCauseRecord]] = []
        """Workers lost in the command at work, whose actors have not been dealt with yet."""
        self._index: dict[IndexKey, set[bytes]] = {}
        self._undo: list[tuple[Table, bytes, Record | None, Record | None]] = []

    # --- writing -----------------------------------------------------------------------------------------------------

    def put(self, record: Record) -> None:
        """Adds or replaces a record."""
        table, key = _place(record)
        old = self._write(table, key, record)
        self._undo.append((table, key, old, record))

    def delete(self, table: Table, key: bytes) -> None:
        """Removes a record that exists."""
        old = self._write(table, key, None)
        self._undo.append((table, key, old, None))

    def _write(self, table: Table, key: bytes, record: Record | None) -> Record | None:
        rows: dict[bytes, Record] = getattr(self, table.value)
        old = rows.get(key)
        before = _index_keys(old) if old is not None else ()
        after = _index_keys(record) if record is not None else ()
        hash(after)  # A field of a wrong type must raise before anything is written.
        if record is None:
            del rows[key]
        else:
            rows[key] = record
        if before != after:
            for index_key in before:
                if index_key not in after:
                    members = self._index[index_key]
                    members.discard(key)
                    if not members:
                        del self._index[index_key]
                        self._let_go(index_key)
            for index_key in after:
                if index_key not in before:
                    self._index.setdefault(index_key, set()).add(key)
                    self._let_go(index_key)
        if table in ENDED_MAX:
            self._note_ended(table, key, record)
        return old

    def _note_ended(self, table: Table, key: bytes, record: Record | None) -> None:
        held = table is Table.JOBS and ("job", key) in self._index
        if record is not None and _is_ended(record) and not held:
            self.ended[table].setdefault(key)
        else:
            self.ended[table].pop(key, None)

    def _let_go(self, index_key: IndexKey) -> None:
        """A finished job is kept while it has actors; these have come or gone."""
        job_id = index_key[1]
        if index_key[0] == "job" and isinstance(job_id, bytes):
            self._note_ended(Table.JOBS, job_id, self.jobs.get(job_id))

    def evict(self) -> None:
        """Lets go of the oldest ended records beyond the limits."""
        for table, limit in ENDED_MAX.items():
            ended = self.ended[table]
            while len(ended) > limit:
                self.delete(table, next(iter(ended)))

    @property
    def dirty(self) -> bool:
        """Whether the command at work has changed anything."""
        return bool(self._undo)

    def commit(self, revision: int) -> list[Change]:
        """Ends the command: its net changes, one for each record."""
        last: dict[tuple[Table, bytes], Record | None] = {}
        for table, key, _, record in self._undo:
            last[table, key] = record
        self._undo.clear()
        return [Change(revision, table, key, record) for (table, key), record in last.items()]

    def touched(self) -> list[tuple[Table, bytes, Record | None]]:
        """What the command at work has written so far, and what was there before each time."""
        return [(table, key, old) for table, key, old, _ in self._undo]

    def roll_back(self) -> None:
        """Undoes the command at work."""
        self.doomed.clear()
        for table, key, old, _ in reversed(self._undo):
            self._write(table, key, old)
        self._undo.clear()

    def load(self, record: Record) -> None:
        """Adds a record of a snapshot; no change comes of it."""
        table, key = _place(record)
        self._write(table, key, record)

    # --- reading -----------------------------------------------------------------------------------------------------

    def rows(self, table: Table) -> dict[bytes, Record]:
        """A whole table, to read."""
        rows: dict[bytes, Record] = getattr(self, table.value)
        return rows

    def node_alive(self, node_id: bytes) -> bool:
        node = self.nodes.get(node_id)
        return node is not None and node.state is NodeState.ALIVE

    def named_actor(self, namespace: str, name: str) -> ActorRecord | None:
        """The live actor of that name."""
        for actor_id in self._index.get(("name", namespace, name), ()):
            return self.actors[actor_id]
        return None

    def actors_of_job(self, job_id: bytes) -> list[ActorRecord]:
        """Actors of the job that live, or whose last process may."""
        return self._actors(("job", job_id))

    def job_has_live_actors(self, job_id: bytes) -> bool:
        return any(self.actors[key].state is not ActorState.DEAD for key in self._index.get(("job", job_id), ()))

    def notes_of_job(self, job_id: bytes) -> list[bytes]:
        """Entries of `JOB_KEYS` of this job."""
        return sorted(self._index.get(("notes_of_job", job_id), ()))

    def notes_of_key(self, key: bytes) -> list[bytes]:
        """Entries of `JOB_KEYS` about this key."""
        return sorted(self._index.get(("notes_of_key", key), ()))

    def actors_owned_by(self, worker_id: bytes) -> list[ActorRecord]:
        """Live actors that end when this worker does."""
        return self._actors(("owner", worker_id))

    def actors_owned_from(self, node_id: bytes) -> list[ActorRecord]:
        """Live actors whose owner runs on this node."""
        return self._actors(("owner_node", node_id))

    def actors_on(self, node_id: bytes) -> list[ActorRecord]:
        """Actors placed or alive on the node."""
        return self._actors(("node", node_id))

    def leftovers_on(self, node_id: bytes) -> list[ActorRecord]:
        """Actors with a process of an earlier life that may still run on the node."""
        return self._actors(("left_node", node_id))

    def leftovers_in(self, worker_id: bytes) -> list[ActorRecord]:
        return self._actors(("left_worker", worker_id))

    def actor_in(self, worker_id: bytes) -> ActorRecord | None:
        """The live actor that this worker is."""
        for actor_id in self._index.get(("worker", worker_id), ()):
            return self.actors[actor_id]
        return None

    def named_group(self, namespace: str, name: str) -> GroupRecord | None:
        """The live placement group of that name."""
        for group_id in self._index.get(("group_name", namespace, name), ()):
            return self.placement_groups[group_id]
        return None

    def groups_of_job(self, job_id: bytes) -> list[GroupRecord]:
        """Live placement groups of the job."""
        return self._groups(("group_job", job_id))

    def groups_made_in(self, actor_id: bytes) -> list[GroupRecord]:
        """Live placement groups, but for detached ones, that were made in this actor."""
        return self._groups(("group_actor", actor_id))

    def groups_on(self, node_id: bytes) -> list[GroupRecord]:
        """Placement groups with bundles on the node, or of which it may still hold some."""
        return self._groups(("group_node", node_id))

    def jobs_driven_by(self, worker_id: bytes) -> list[JobRecord]:
        """Running jobs of this driver."""
        return [self.jobs[key] for key in sorted(self._index.get(("driver", worker_id), ()))]

    def jobs_driven_from(self, node_id: bytes) -> list[JobRecord]:
        return [self.jobs[key] for key in sorted(self._index.get(("driver_node", node_id), ()))]

    def _actors(self, index_key: IndexKey) -> list[ActorRecord]:
        return [self.actors[key] for key in sorted(self._index.get(index_key, ()))]

    def _groups(self, index_key: IndexKey) -> list[GroupRecord]:
        return [self.placement_groups[key] for key in sorted(self._index.get(index_key, ()))]

    def index_faults(self) -> Iterator[str]:
        """Differences between the indices and the tables (there must be none)."""
        fresh = Store()
        for table in Table:
            for record in self.rows(table).values():
                fresh.load(record)
        if fresh._index != self._index:
            yield "the indices differ from the tables"
        for table in ENDED_MAX:
            if set(fresh.ended[table]) != set(self.ended[table]):
                yield f"the list of ended {table} differs from the table"
            if len(self.ended[table]) > ENDED_MAX[table]:
                yield f"more ended {table} are kept than {ENDED_MAX[table]}"


def _place(record: Record) -> tuple[Table, bytes]:
    match record:
        case KvRecord():
            return Table.KV, kv_key(record.namespace, record.key)
        case ActorRecord():
            return Table.ACTORS, record.actor_id
        case NodeRecord():
            return Table.NODES, record.node_id
        case JobRecord():
            return Table.JOBS, record.job_id
        case WorkerFailureRecord():
            return Table.WORKER_FAILURES, record.worker_id
        case GroupRecord():
            return Table.PLACEMENT_GROUPS, record.group_id


def _is_ended(record: Record) -> bool:
    match record:
        case ActorRecord():
            return record.state is ActorState.DEAD and record.leftover is None
        case NodeRecord():
            return record.state is NodeState.DEAD
        case JobRecord():
            return record.state is JobState.FINISHED
        case GroupRecord():
            return record.state is GroupState.REMOVED and not record.leftovers
        case WorkerFailureRecord():
            return True
        case KvRecord():
            return False


def _index_keys(record: Record) -> tuple[IndexKey, ...]:
    keys: list[IndexKey] = []
    if isinstance(record, ActorRecord):
        live = record.state is not ActorState.DEAD
        if live or record.leftover is not None:
            keys.append(("job", record.job_id))
        if live and record.name:
            keys.append(("name", record.namespace, record.name))
        if live and record.owner_worker_id is not None:
            keys.append(("owner", record.owner_worker_id))
            keys.append(("owner_node", record.owner_node_id))
        if record.state in ON_NODE:
            keys.append(("node", record.node_id))
        if record.state is ActorState.ALIVE:
            keys.append(("worker", record.worker_id))
        if record.leftover is not None:
            keys.append(("left_node", record.leftover.node_id))
            if record.leftover.worker_id:
                keys.append(("left_worker", record.leftover.worker_id))
    elif isinstance(record, KvRecord) and record.namespace == JOB_KEYS:
        keys.append(("notes_of_job", record.key[:JOB_ID_BYTES]))
        keys.append(("notes_of_key", record.key[JOB_ID_BYTES:]))
    elif isinstance(record, GroupRecord):
        if record.state is not GroupState.REMOVED:
            keys.append(("group_job", record.job_id))
            if record.name:
                keys.append(("group_name", record.namespace, record.name))
            if record.owner_actor_id:
                keys.append(("group_actor", record.owner_actor_id))
        nodes = dict.fromkeys([*nodes_of(record), *(left.node_id for left in record.leftovers)])
        keys += [("group_node", node_id) for node_id in nodes]
    elif isinstance(record, JobRecord) and record.state is JobState.RUNNING:
        keys.append(("driver", record.driver_worker_id))
        keys.append(("driver_node", record.node_id))
    return tuple(keys)
