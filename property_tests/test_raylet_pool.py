"""The worker pool under any sequence of events: its counters are those of a scan, and nobody is in two places."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ftray.raylet.pool import State, WorkerPool

IDLE_KILL_MS = 10_000.0


class PoolMachine(RuleBasedStateMachine):
    """Forks, deaths, requests and the passing of time, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = WorkerPool(2, 1, IDLE_KILL_MS)
        self.now_ms = 0.0
        self.born = 0
        self.asked = 0

    def pick(self, number: int) -> bytes:
        names = list(self.pool.workers)
        return names[number % len(names)] if names else b"nobody"

    @rule(passed_ms=st.sampled_from([1.0, 100.0, IDLE_KILL_MS, 3 * IDLE_KILL_MS]))
    def fork(self, passed_ms: float) -> None:
        self.now_ms += passed_ms
        for _ in range(self.pool.forks(self.now_ms)):
            self.born += 1
            self.pool.started(b"w%d" % self.born, self.now_ms)

    @rule(number=st.integers(0, 20))
    def register(self, number: int) -> None:
        self.pool.registered(self.pick(number), self.now_ms)

    @rule(job=st.sampled_from([b"J", b"K"]), dedicated=st.booleans())
    def ask(self, job: bytes, dedicated: bool) -> None:
        self.asked += 1
        self.pool.request(self.asked, job, dedicated)

    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        self.pool.cancel(self.asked - number)

    @rule()
    def match(self) -> None:
        for _, worker in self.pool.match():
            assert worker.state is State.BUSY

    @rule(number=st.integers(0, 20), blocked=st.booleans())
    def block(self, number: int, blocked: bool) -> None:
        self.pool.block(self.pick(number), blocked)

    @rule(number=st.integers(0, 20))
    def release(self, number: int) -> None:
        self.pool.release(self.pick(number), self.now_ms)

    @rule(number=st.integers(0, 20))
    def retire(self, number: int) -> None:
        self.pool.retire(self.pick(number))

    @rule(number=st.integers(0, 20))
    def die(self, number: int) -> None:
        self.pool.gone(self.pick(number), self.now_ms)

    @rule()
    def expire(self) -> None:
        self.pool.expire(self.now_ms)

    @invariant()
    def counters_agree(self) -> None:
        made = self.pool
        workers = made.workers.values()
        idle = {worker.worker_id for worker in workers if worker.state is State.IDLE}
        listed = list(made._fresh) + [name for names in made._idle.values() for name in names]
        assert sorted(listed) == sorted(idle)
        assert all(worker.job_id == b"" for worker in made._fresh.values())
        assert made._starting == sum(worker.state is State.STARTING for worker in workers)
        assert made._task_busy == sum(
            worker.state is State.BUSY and not worker.blocked and not worker.dedicated for worker in workers
        )
        assert made._task_requests == sum(not request.dedicated for request in made._requests.values())


TestPoolMachine = PoolMachine.TestCase
