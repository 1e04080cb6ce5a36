"""The worker pool under any sequence of events: its counters are those of a scan, nobody is in two places, and no
worker ever serves two jobs or two environments."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

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
        self.wanted: dict[int, tuple[bytes, str]] = {}
        """What each request that still waits has asked for."""
        self.served: dict[bytes, tuple[bytes, str]] = {}
        """Job and environment of each worker that has served."""

    def pick(self, number: int, state: State | None = None) -> bytes:
        """Mostly one of that state, if there is any; now and then anybody."""
        names = [name for name, worker in self.pool.workers.items() if state is None or worker.state is state]
        if not names or number == 0:
            names = list(self.pool.workers)
        return names[number % len(names)] if names else b"nobody"

    @initialize(count=st.integers(1, 3))
    def begin(self, count: int) -> None:
        self.fork(1.0)
        for number in range(count):
            self.register(1 + number)

    @rule(passed_ms=st.sampled_from([1.0, 100.0, IDLE_KILL_MS, 3 * IDLE_KILL_MS]))
    def fork(self, passed_ms: float) -> None:
        self.now_ms += passed_ms
        for _ in range(self.pool.forks(self.now_ms)):
            self.born += 1
            self.pool.started(b"w%d" % self.born, self.now_ms)

    @rule(number=st.integers(0, 20))
    def register(self, number: int) -> None:
        self.pool.registered(self.pick(number, State.STARTING), self.now_ms)

    @rule(
        job=st.sampled_from([b"J", b"K"]), environment=st.sampled_from(["", "E"]), dedicated=st.booleans(),
        matched=st.booleans(), used=st.booleans(),
    )  # fmt: skip
    def ask(self, job: bytes, environment: str, dedicated: bool, matched: bool, used: bool) -> None:
        """Often somebody is served at once, and has done in a moment."""
        self.asked += 1
        self.wanted[self.asked] = (job, environment)
        self.pool.request(self.asked, job, dedicated, environment)
        if matched:
            self.match()
            if used:
                self.release(1)

    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        assert self.pool.cancel(self.asked - number) == (self.wanted.pop(self.asked - number, None) is not None)

    @rule()
    def match(self) -> None:
        for token, worker in self.pool.match():
            assert isinstance(token, int)
            assert worker.state is State.BUSY
            assert self.served.setdefault(worker.worker_id, self.wanted[token]) == self.wanted.pop(token)
        # Whoever still waits could not have been served by anybody who idles.
        idle = [worker for worker in self.pool.workers.values() if worker.state is State.IDLE]
        assert not self.wanted or all(worker.worker_id in self.served for worker in idle)
        assert not {self.served.get(worker.worker_id) for worker in idle} & set(self.wanted.values())

    @rule(number=st.integers(0, 20), blocked=st.booleans())
    def block(self, number: int, blocked: bool) -> None:
        self.pool.block(self.pick(number, State.BUSY), blocked)

    @rule(number=st.integers(0, 20))
    def release(self, number: int) -> None:
        self.pool.release(self.pick(number, State.BUSY), self.now_ms)

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
        assert all((w.job_id, w.environment) == key for key, ids in made._idle.items() for w in ids.values())
        assert made._idle_number == sum(map(len, made._idle.values())) and all(made._idle.values())
        assert made._starting == sum(worker.state is State.STARTING for worker in workers)
        assert made._task_busy == sum(
            worker.state is State.BUSY and not worker.blocked and not worker.dedicated for worker in workers
        )
        assert made._task_requests == sum(not request.dedicated for request in made._requests.values())


TestPoolMachine = PoolMachine.TestCase
