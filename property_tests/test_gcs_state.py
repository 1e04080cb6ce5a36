"""The GCS state machine against a naive twin, under any sequence of commands, repeats and restarts from a snapshot.

The twin keeps plain dictionaries, finds everything by looking at everything, and follows failures by going round until
nothing changes. It knows which commands succeed and what the tables then hold. Beside it run a watcher that sees
nothing but the change feed, and a second state that gets the same commands through their encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ftray.gcs.state import commands as c
from ftray.gcs.state.state import COMPACTED, GcsState
from ftray.gcs.state.tables import ActorState, Code, JobState, NodeState, Result, Table

CLUSTER = b"C" * 16
CAUSE = c.DeathCauseRecord(reason="crashed")


def pool(letter: str, count: int) -> list[bytes]:
    return [f"{letter}{i}".encode().ljust(16, b".") for i in range(count)]


NODES, WORKERS, ACTORS, JOBS = pool("n", 3), pool("w", 8), pool("a", 5), [b"job1", b"job2"]
CLIENTS = [b"x", b"y", *WORKERS[:2]]


@dataclass
class TwinActor:
    job: bytes
    owner: bytes | None
    owner_node: bytes
    name: str
    max_restarts: int
    state: ActorState = ActorState.PENDING
    incarnation: int = 0
    restarts: int = 0
    node: bytes = b""
    worker: bytes = b""
    left: tuple[int, bytes, bytes, bool] | None = None

    def placed(self) -> bool:
        return self.state in (ActorState.PLACING, ActorState.ALIVE)


@dataclass
class Twin:
    nodes: dict[bytes, tuple[int, bool]] = field(default_factory=dict)
    jobs: dict[bytes, tuple[bytes, bytes, bool]] = field(default_factory=dict)
    """Driver, its node, and whether it runs."""
    actors: dict[bytes, TwinActor] = field(default_factory=dict)
    kv: dict[tuple[str, bytes], bytes] = field(default_factory=dict)
    dead_workers: set[bytes] = field(default_factory=set)
    gone: set[bytes] = field(default_factory=set)
    """Workers lost in this command."""

    def apply(self, command: Any) -> bool:
        """Carries out a command; False if it is refused."""
        self.gone = set()
        step: Callable[[Any], bool] = getattr(self, type(command).__name__)
        done = step(command)
        while self._spread():
            pass
        return done

    def _alive(self, node: bytes) -> bool:
        return self.nodes.get(node, (0, False))[1]

    def _spread(self) -> bool:
        """One round of consequences; whether there were any."""
        for actor in self.actors.values():
            if actor.left and not self._alive(actor.left[1]):
                self.gone.add(actor.left[2])
                actor.left = None
                return True
            if actor.state is ActorState.DEAD:
                continue
            if actor.owner is not None and (actor.owner in self.gone or not self._alive(actor.owner_node)):
                self._end(actor)
                return True
            if actor.placed() and not self._alive(actor.node):
                if actor.state is ActorState.PLACING:
                    self._next(actor, ActorState.PENDING)
                else:
                    self._fail(actor)
                return True
        return False

    def _next(self, actor: TwinActor, state: ActorState) -> None:
        actor.state, actor.node, actor.worker = state, b"", b""
        actor.incarnation += 1

    def _fail(self, actor: TwinActor, may_run: bool = False) -> None:
        if actor.state is ActorState.ALIVE:
            self.gone.add(actor.worker)
        left = (actor.incarnation, actor.node, actor.worker, False) if may_run else None
        if actor.max_restarts >= 0 and actor.restarts >= actor.max_restarts:
            actor.state = ActorState.DEAD
            actor.incarnation += 1
        else:
            actor.restarts += 1
            self._next(actor, ActorState.RESTARTING)
        actor.left = left

    def _end(self, actor: TwinActor, graceful: bool = False, may_run: bool = True) -> None:
        if actor.state is ActorState.DEAD:
            if actor.left and actor.left[3] and not graceful:
                actor.left = (*actor.left[:3], False)
                self.gone.add(actor.left[2])
            return
        if actor.placed():
            actor.left = (actor.incarnation, actor.node, actor.worker, graceful) if may_run else None
            if actor.state is ActorState.ALIVE and not graceful:
                self.gone.add(actor.worker)
        actor.state = ActorState.DEAD
        actor.incarnation += 1

    def _finish(self, job_id: bytes) -> None:
        driver, node, running = self.jobs[job_id]
        self.jobs[job_id] = (driver, node, False)
        if not running:
            return
        kept: set[bytes] = set()
        while True:
            hosts = {a.worker for i, a in self.actors.items() if i in kept and a.state is ActorState.ALIVE}
            more = {
                actor_id
                for actor_id, actor in self.actors.items()
                if (actor.owner is None and actor.job == job_id)
                or (actor.owner in hosts and actor.state is not ActorState.DEAD)
            }
            if more <= kept:
                break
            kept |= more
        for actor_id, actor in self.actors.items():
            if actor.job == job_id and actor_id not in kept:
                self._end(actor)

    # --- commands -----------------------------------------------------------------------------------------------------

    def RegisterNode(self, m: c.RegisterNode) -> bool:
        known = self.nodes.get(m.node_id)
        if known and (m.incarnation < known[0] or (m.incarnation == known[0] and not known[1])):
            return False
        if known and known[1] and m.incarnation > known[0]:
            self.MarkNodeDead(c.MarkNodeDead(m.node_id, known[0], CAUSE))
            while self._spread():
                pass
        self.nodes[m.node_id] = (m.incarnation, True)
        return True

    def MarkNodeDead(self, m: c.MarkNodeDead) -> bool:
        known = self.nodes.get(m.node_id)
        if known is None or known[0] != m.incarnation:
            return False
        if known[1]:
            self.nodes[m.node_id] = (known[0], False)
            for job_id, (_, node, running) in self.jobs.items():
                if running and node == m.node_id:
                    self._finish(job_id)
            for actor in self.actors.values():  # What is left on the node can't run any more.
                if actor.left and actor.left[1] == m.node_id:
                    self.gone.add(actor.left[2])
                    actor.left = None
        return True

    def AddJob(self, m: c.AddJob) -> bool:
        known = self.jobs.get(m.job_id)
        if known:
            return known[0] == m.driver_worker_id and known[2]
        if m.driver_worker_id in self.dead_workers or not self._alive(m.node_id):
            return False
        self.jobs[m.job_id] = (m.driver_worker_id, m.node_id, True)
        return True

    def FinishJob(self, m: c.FinishJob) -> bool:
        if m.job_id not in self.jobs:
            return False
        self._finish(m.job_id)
        return True

    def KvPut(self, m: c.KvPut) -> bool:
        if (m.namespace, m.key) in self.kv and not m.overwrite:
            return False
        self.kv[m.namespace, m.key] = m.value
        return True

    def KvDelete(self, m: c.KvDelete) -> bool:
        for namespace, key in list(self.kv):
            if namespace == m.namespace and (key == m.key or (m.prefix and key.startswith(m.key))):
                del self.kv[namespace, key]
        return True

    def RegisterActor(self, m: c.RegisterActor) -> bool:
        for actor_id, other in self.actors.items():
            if m.name and other.name == m.name and other.state is not ActorState.DEAD and actor_id != m.actor_id:
                return m.get_if_exists
        known = self.actors.get(m.actor_id)
        if known and known.owner == m.owner_worker_id:
            return known.state is not ActorState.DEAD
        if m.owner_worker_id is not None:
            if m.owner_worker_id in self.dead_workers or not self._alive(m.owner_node_id):
                return False
        if m.job_id not in self.jobs:
            return False
        if not self.jobs[m.job_id][2]:
            hosts = {a.worker for a in self.actors.values() if a.state is ActorState.ALIVE}
            if m.owner_worker_id not in hosts:
                return False
        new = TwinActor(m.job_id, m.owner_worker_id, m.owner_node_id, m.name, m.max_restarts)
        if known:
            self._end(known)
            new.incarnation, new.left = known.incarnation, known.left
        self.actors[m.actor_id] = new
        return True

    def _at(self, actor_id: bytes, incarnation: int) -> TwinActor | None:
        actor = self.actors.get(actor_id)
        return actor if actor and actor.incarnation == incarnation and actor.state is not ActorState.DEAD else None

    def ActorPlacing(self, m: c.ActorPlacing) -> bool:
        actor = self._at(m.actor_id, m.incarnation)
        if actor is None:
            return False
        if actor.state is ActorState.PLACING and actor.node == m.node_id:
            return True
        if actor.placed() or actor.left or not self._alive(m.node_id):
            return False
        actor.state, actor.node = ActorState.PLACING, m.node_id
        return True

    def ActorAlive(self, m: c.ActorAlive) -> bool:
        actor = self._at(m.actor_id, m.incarnation)
        if actor is None or not self._alive(m.node_id) or m.worker_id in self.dead_workers or actor.node != m.node_id:
            return False
        if actor.state is ActorState.ALIVE:
            return actor.worker == m.worker_id
        if any(a.worker == m.worker_id and a.state is ActorState.ALIVE for a in self.actors.values()):
            return False
        actor.state, actor.worker = ActorState.ALIVE, m.worker_id
        return True

    def ActorDied(self, m: c.ActorDied) -> bool:
        known = self.actors.get(m.actor_id)
        if known and known.left and known.left[0] == m.incarnation:
            self.gone.add(known.left[2])
            known.left = None
            return True
        actor = self._at(m.actor_id, m.incarnation)
        if actor is None or not actor.placed():
            return False
        if m.may_restart:
            self._fail(actor)
        else:
            self._end(actor, may_run=False)
        return True

    def ActorUnplaced(self, m: c.ActorUnplaced) -> bool:
        actor = self._at(m.actor_id, m.incarnation)
        if actor is None or actor.state is not ActorState.PLACING or actor.node != m.node_id:
            return False
        self._next(actor, ActorState.PENDING)
        return True

    def ActorOutOfScope(self, m: c.ActorOutOfScope) -> bool:
        actor = self.actors.get(m.actor_id)
        if actor is None or actor.owner is None or m.owner_worker_id not in (None, actor.owner):
            return False
        self._end(actor, graceful=True)
        return True

    def KillActor(self, m: c.KillActor) -> bool:
        actor = self.actors.get(m.actor_id)
        if actor is None:
            return False
        if m.no_restart:
            self._end(actor)
        elif actor.placed():
            self._fail(actor, may_run=True)
        return True

    def WorkerDied(self, m: c.WorkerDied) -> bool:
        if m.worker_id in self.dead_workers:
            return True
        self.dead_workers.add(m.worker_id)
        for actor in self.actors.values():
            if actor.state is ActorState.ALIVE and actor.worker == m.worker_id:
                self._fail(actor)
            elif actor.left and actor.left[2] == m.worker_id:
                actor.left = None
        for job_id, (driver, _, running) in self.jobs.items():
            if running and driver == m.worker_id:
                self._finish(job_id)
        self.gone.add(m.worker_id)
        return True


node_ids, worker_ids, actor_ids = st.sampled_from(NODES), st.sampled_from(WORKERS), st.sampled_from(ACTORS)
job_ids, near = st.sampled_from(JOBS), st.sampled_from([0, 0, 0, 0, -1, 1])


class GcsMachine(RuleBasedStateMachine):
    """Draws commands that are often right, and sometimes late, foreign or foolish."""

    def __init__(self) -> None:
        super().__init__()
        self.state = GcsState(CLUSTER)
        self.other = GcsState(CLUSTER)
        self.twin = Twin()
        self.sent: dict[bytes, tuple[int, Any, Result]] = {}
        self.sequence = 0
        self.watched: dict[tuple[Table, bytes], Any] = {}
        self.watched_revision = 0

    @initialize(restarts=st.lists(st.sampled_from([0, 1, 1, 2, -1]), min_size=4, max_size=4))
    def begin(self, restarts: list[int]) -> None:
        """Three nodes, a job, its actor, and a detached one that owns an actor that owns another, on the same node."""
        for node_id in NODES:
            self.send(b"", c.RegisterNode(node_id, "e", {}, {}, 1, "h", 1))
        self.send(b"", c.AddJob(JOBS[0], WORKERS[0], 1, NODES[0], "m", "ns"))
        owners: list[bytes | None] = [WORKERS[0], None, None, None]
        node = NODES[0]
        for number, actor_id in enumerate(ACTORS[:4]):
            owner = owners[number]
            self.send(
                b"", c.RegisterActor(actor_id, JOBS[0], owner, node, "X", "", "", restarts[number], owner is None)
            )
            for _ in range(2):
                self.step_forward(b"", actor_id, min(number, 1))
            node = self.twin.actors[actor_id].node
            if number in (1, 2):
                owners[number + 1] = self.twin.actors[actor_id].worker

    def step_forward(self, client: bytes, actor_id: bytes, choice: int) -> None:
        """What its manager and raylet would do next with the actor."""
        actor = self.twin.actors.get(actor_id)
        nodes = [node for node in NODES if self.twin.nodes.get(node, (0, False))[1]]
        if actor is None or not nodes:
            return
        if actor.left and choice % 2:
            self.send(client, c.WorkerDied(actor.left[2] or WORKERS[-1], actor.left[1], CAUSE))
        elif actor.left:
            self.send(client, c.ActorDied(actor_id, actor.left[0], CAUSE))
        elif actor.state in (ActorState.PENDING, ActorState.RESTARTING):
            self.send(client, c.ActorPlacing(actor_id, actor.incarnation, nodes[choice % len(nodes)]))
        elif actor.state is ActorState.PLACING:
            worker = b"fresh%d" % self.sequence
            self.send(client, c.ActorAlive(actor_id, actor.incarnation, worker.ljust(16, b"."), "e", actor.node, 1))

    def send(self, client: bytes, command: Any) -> None:
        """A new command of a client: exactly the effect that the twin expects."""
        self.sequence += 1
        before = self.state.revision
        expired = client in self.state.sessions.forgotten and client not in self.state.sessions.last
        result = self.state.apply(client, self.sequence, command)
        again = self.other.apply(client, self.sequence, c.decode_command(c.encode_command(command)))
        assert again == result
        assert (result.code is Code.SESSION_EXPIRED) == expired
        if not expired:
            assert result.ok == self.twin.apply(command), result
            if client:
                self.sent[client] = (self.sequence, command, result)
            if isinstance(command, c.WorkerDied) and result.ok and command.worker_id != client:
                self.sent.pop(command.worker_id, None)
            if isinstance(command, c.FinishJob) and result.ok:
                driver = self.twin.jobs[command.job_id][0]
                if driver != client:
                    self.sent.pop(driver, None)
        assert result.revision == self.state.revision
        changes = self.state.take_changes()
        assert self.state.revision == before + bool(changes)
        assert result.ok or not changes

    def incarnation(self, actor_id: bytes, off: int) -> int:
        actor = self.twin.actors.get(actor_id)
        return max(0, (actor.incarnation if actor else 0) + off)

    # --- commands -----------------------------------------------------------------------------------------------------

    clients = st.sampled_from([b"", *CLIENTS])

    @rule(client=clients, actor=actor_ids, choice=st.integers(0, 5))
    def forward(self, client: bytes, actor: bytes, choice: int) -> None:
        self.step_forward(client, actor, choice)

    @rule(client=clients, actor=actor_ids, choice=st.integers(0, 5))
    def forward_again(self, client: bytes, actor: bytes, choice: int) -> None:
        self.step_forward(client, actor, choice)

    @rule(client=clients, actor=actor_ids)
    def actors_worker_died(self, client: bytes, actor: bytes) -> None:
        known = self.twin.actors.get(actor)
        if known and known.state is ActorState.ALIVE:
            self.send(client, c.WorkerDied(known.worker, known.node, CAUSE))

    @rule(client=clients, node=node_ids, off=near)
    def register_node(self, client: bytes, node: bytes, off: int) -> None:
        incarnation = max(0, self.twin.nodes.get(node, (1, True))[0] + off)
        self.send(client, c.RegisterNode(node, "e", {}, {}, incarnation, "h", 1))

    @rule(client=clients, node=st.sampled_from([NODES[1], NODES[1], NODES[2], NODES[2], NODES[0]]), off=near)
    def mark_node_dead(self, client: bytes, node: bytes, off: int) -> None:
        incarnation = max(0, self.twin.nodes.get(node, (1, True))[0] + off)
        self.send(client, c.MarkNodeDead(node, incarnation, CAUSE))

    @rule(client=clients, job=job_ids, driver=worker_ids, node=node_ids)
    def add_job(self, client: bytes, job: bytes, driver: bytes, node: bytes) -> None:
        self.send(client, c.AddJob(job, driver, 1, node, "m", "ns"))

    @rule(client=clients, job=job_ids)
    def finish_job(self, client: bytes, job: bytes) -> None:
        self.send(client, c.FinishJob(job))

    @rule(client=clients, worker=st.sampled_from(WORKERS[2:]), node=node_ids)
    def worker_died(self, client: bytes, worker: bytes, node: bytes) -> None:
        self.send(client, c.WorkerDied(worker, node, CAUSE))

    @rule(client=clients, ns=st.sampled_from(["", "n"]), key=st.binary(min_size=1, max_size=2), write=st.booleans())
    def kv_put(self, client: bytes, ns: str, key: bytes, write: bool) -> None:
        self.send(client, c.KvPut(ns, key, b"%d" % self.sequence, write))

    @rule(client=clients, ns=st.sampled_from(["", "n"]), key=st.binary(max_size=2), prefix=st.booleans())
    def kv_delete(self, client: bytes, ns: str, key: bytes, prefix: bool) -> None:
        self.send(client, c.KvDelete(ns, key, prefix))

    @rule(
        client=clients,
        actor=actor_ids,
        job=job_ids,
        owner=st.none() | worker_ids,
        by=st.none() | actor_ids,
        node=node_ids,
        name=st.sampled_from(["", "p", "q"]),
        restarts=st.sampled_from([0, 1, -1]),
        get=st.booleans(),
    )
    def register_actor(
        self,
        client: bytes,
        actor: bytes,
        job: bytes,
        owner: bytes | None,
        by: bytes | None,
        node: bytes,
        name: str,
        restarts: int,
        get: bool,
    ) -> None:
        creator = self.twin.actors.get(by) if by else None
        if creator and creator.state is ActorState.ALIVE and by != actor and owner is not None:
            owner, node, job = creator.worker, creator.node, creator.job
        self.send(
            client,
            c.RegisterActor(actor, job, owner, node, "X", name, "", restarts, owner is None, get_if_exists=get),
        )

    @rule(client=clients, actor=actor_ids)
    def kill_and_place(self, client: bytes, actor: bytes) -> None:
        """Placed again at once: refused while the killed process may still run."""
        self.send(client, c.KillActor(actor, False, ""))
        self.send(client, c.ActorPlacing(actor, self.incarnation(actor, 0), NODES[0]))

    @rule(client=clients, actor=actor_ids, off=near, node=node_ids)
    def actor_placing(self, client: bytes, actor: bytes, off: int, node: bytes) -> None:
        self.send(client, c.ActorPlacing(actor, self.incarnation(actor, off), node))

    @rule(client=clients, actor=actor_ids, off=near, worker=worker_ids, node=st.none() | node_ids)
    def actor_alive(self, client: bytes, actor: bytes, off: int, worker: bytes, node: bytes | None) -> None:
        known = self.twin.actors.get(actor)
        where = known.node if known and known.node and node is None else NODES[0]
        self.send(client, c.ActorAlive(actor, self.incarnation(actor, off), worker, "e", where, 1))

    @rule(client=clients, actor=actor_ids, off=near, restart=st.booleans())
    def actor_died(self, client: bytes, actor: bytes, off: int, restart: bool) -> None:
        self.send(client, c.ActorDied(actor, self.incarnation(actor, off), CAUSE, restart))

    @rule(client=clients, actor=actor_ids, node=node_ids)
    def actor_unplaced(self, client: bytes, actor: bytes, node: bytes) -> None:
        self.send(client, c.ActorUnplaced(actor, self.incarnation(actor, 0), node, "full"))

    @rule(client=clients, actor=actor_ids, owner=st.none() | worker_ids)
    def actor_out_of_scope(self, client: bytes, actor: bytes, owner: bytes | None) -> None:
        self.send(client, c.ActorOutOfScope(actor, owner))

    @rule(client=clients, actor=actor_ids, no_restart=st.booleans())
    def kill_actor(self, client: bytes, actor: bytes, no_restart: bool) -> None:
        self.send(client, c.KillActor(actor, no_restart, ""))

    # --- repeats and restarts -----------------------------------------------------------------------------------------

    @rule(client=st.sampled_from(CLIENTS), back=st.integers(0, 1))
    def retry(self, client: bytes, back: int) -> None:
        if client in self.sent:
            sequence, command, result = self.sent[client]
            before = self.state.snapshot()
            again = self.state.apply(client, sequence - back, command)
            assert again == result if not back else again.code is Code.STALE
            assert self.state.snapshot() == before

    @rule()
    def restart(self) -> None:
        data = self.state.snapshot()
        self.state = GcsState.restore(data, CLUSTER)
        assert self.state.snapshot() == data

    @rule()
    def watch(self) -> None:
        changes = self.state.changes_since(self.watched_revision)
        if changes is COMPACTED:
            self.watched.clear()
            changes = self.state.rows_as_changes(Table)
        for change in changes:
            if change.record is None:
                del self.watched[change.table, change.key]
            else:
                self.watched[change.table, change.key] = change.record
        self.watched_revision = self.state.revision
        rows = {(table, key): row for table in Table for key, row in self.state.store.rows(table).items()}
        assert self.watched == rows

    # --- always -------------------------------------------------------------------------------------------------------

    @invariant()
    def sound(self) -> None:
        assert self.state.check() == []

    @invariant()
    def as_the_twin_has_it(self) -> None:
        store, twin = self.state.store, self.twin
        assert {(r.namespace, r.key): r.value for r in store.kv.values()} == twin.kv
        assert {k: (r.incarnation, r.state is NodeState.ALIVE) for k, r in store.nodes.items()} == twin.nodes
        found_jobs = {k: (r.driver_worker_id, r.node_id, r.state is JobState.RUNNING) for k, r in store.jobs.items()}
        assert found_jobs == twin.jobs
        assert set(store.worker_failures) == twin.dead_workers
        found = {}
        for key, r in store.actors.items():
            left = r.leftover
            found[key] = TwinActor(
                r.job_id,
                r.owner_worker_id,
                r.owner_node_id,
                r.name,
                r.max_restarts,
                r.state,
                r.incarnation,
                r.restarts,
                r.node_id if r.state is not ActorState.DEAD else b"",
                r.worker_id if r.state is not ActorState.DEAD else b"",
                (left.incarnation, left.node_id, left.worker_id, left.graceful) if left else None,
            )
        expected = {
            k: replace(a, node=b"", worker=b"") if a.state is ActorState.DEAD else a for k, a in twin.actors.items()
        }
        assert found == expected

    @invariant()
    def replicas_agree(self) -> None:
        assert self.other.snapshot() == self.state.snapshot()


GcsMachine.TestCase.settings = settings(stateful_step_count=40)
TestGcsState = GcsMachine.TestCase
