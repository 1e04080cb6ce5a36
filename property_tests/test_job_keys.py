"""Keys that go with the last job that needs them, against a twin that looks at everything after each command."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ftray.gcs.state import commands as c
from ftray.gcs.state.job_keys import HANDLES
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import JOB_KEYS, ActorRecord, ActorState, Code, JobState

CLUSTER = b"C" * 16
NODE = b"n" * 16
JOBS = [b"job1", b"job2", b"job3"]
ACTORS = [bytes([number]) * 16 for number in range(1, 5)]
KEYS = [b"f", b"g", b"h"]
CAUSE = c.DeathCauseRecord(reason="crashed")

jobs, actors, names = st.sampled_from(JOBS), st.sampled_from(ACTORS), st.sampled_from(KEYS)


def driver(job: bytes) -> bytes:
    return job * 4


class JobKeys(RuleBasedStateMachine):
    """`notes` is who has put what: namespace and key to jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.state = GcsState(CLUSTER)
        self.notes: dict[tuple[str, bytes], set[bytes]] = {}

    @initialize()
    def begin(self) -> None:
        self.do(c.RegisterNode(NODE, "unix:/n", {"CPU": 9.0}, {}, 1, "host", 1))

    def do(self, command: c.AnyCommand) -> bool:
        before = dict(self.state.store.actors)
        result = self.state.apply(b"", 0, command)
        assert result.code is not Code.INTERNAL, result.message
        self._forget(before)
        return result.ok

    def _over(self, job: bytes) -> bool:
        record = self.state.store.jobs.get(job)
        lives = any(
            actor.job_id == job and actor.state is not ActorState.DEAD for actor in self.state.store.actors.values()
        )
        return record is not None and record.state is JobState.FINISHED and not lives

    def _forget(self, before: dict[bytes, ActorRecord]) -> None:
        for item, users in list(self.notes.items()):
            actor = self.state.actor(item[1])
            died = actor is not None and actor.state is ActorState.DEAD and actor is not before.get(item[1])
            self.notes[item] = {job for job in users if not self._over(job)}
            if (died and item[0] == HANDLES) or not self.notes[item]:
                del self.notes[item]

    def _put(self, job: bytes, namespace: str, key: bytes) -> None:
        allowed = job in self.state.store.jobs and not self._over(job)
        assert self.do(c.JobKvPut(job, namespace, key, b"value")) is allowed
        if allowed:
            self.notes.setdefault((namespace, key), set()).add(job)

    @rule(job=jobs)
    def start(self, job: bytes) -> None:
        self.do(c.AddJob(job, driver(job), 1, NODE, "main.py", ""))

    @rule(job=jobs, killed=st.booleans())
    def finish(self, job: bytes, killed: bool) -> None:
        self.do(c.WorkerDied(driver(job), NODE, CAUSE) if killed else c.FinishJob(job))

    @rule(job=jobs, name=names)
    def export(self, job: bytes, name: bytes) -> None:
        self._put(job, "functions", name)

    @rule(name=names, prefix=st.booleans())
    def delete(self, name: bytes, prefix: bool) -> None:
        self.do(c.KvDelete("functions", name, prefix))
        self.notes.pop(("functions", name), None)

    @rule(job=jobs, actor=actors, detached=st.booleans(), restarts=st.sampled_from((0, 1)))
    def make(self, job: bytes, actor: bytes, detached: bool, restarts: int) -> None:
        self._put(job, HANDLES, actor)
        owner = None if detached else driver(job)
        self.do(c.RegisterActor(actor, job, owner, NODE, "Thing", "", "", restarts, detached))

    @rule(actor=actors)
    def live(self, actor: bytes) -> None:
        record = self.state.actor(actor)
        if record is not None:
            worker = actor[:15] + bytes([record.incarnation % 256])
            self.do(c.ActorPlacing(actor, record.incarnation, NODE))
            self.do(c.ActorAlive(actor, record.incarnation, worker, "unix:/w", NODE, 2))

    @rule(actor=actors, for_good=st.booleans())
    def kill(self, actor: bytes, for_good: bool) -> None:
        self.do(c.KillActor(actor, for_good, "enough"))

    @rule(actor=actors)
    def gone(self, actor: bytes) -> None:
        record = self.state.actor(actor)
        if record is not None:
            incarnation = record.incarnation if record.leftover is None else record.leftover.incarnation
            self.do(c.ActorDied(actor, incarnation, CAUSE))

    @rule()
    def restore(self) -> None:
        restored = GcsState.restore(self.state.snapshot(), CLUSTER)
        assert restored.snapshot() == self.state.snapshot()
        self.state = restored

    @invariant()
    def same(self) -> None:
        assert self.state.check() == []
        kept = {(row.namespace, row.key) for row in self.state.store.kv.values() if row.namespace != JOB_KEYS}
        assert kept == set(self.notes)
        entries = sum(row.namespace == JOB_KEYS for row in self.state.store.kv.values())
        assert entries == sum(map(len, self.notes.values()))


TestJobKeys = JobKeys.TestCase
TestJobKeys.settings = settings(stateful_step_count=40)
