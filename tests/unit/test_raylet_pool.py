"""Which worker serves whom, and how many there are. Pure; times are made up."""

from __future__ import annotations

from ftray.raylet.pool import BACKOFF_FIRST_MS, FAILURES_MAX, State, WorkerPool

IDLE_KILL_MS = 10_000.0


def pool(cpus: float = 2, extra: int = 1) -> WorkerPool:
    return WorkerPool(cpus, extra, IDLE_KILL_MS)


def ready(made: WorkerPool, *names: bytes, now_ms: float = 0.0) -> None:
    for name in names:
        made.started(name, now_ms)
        assert made.registered(name, now_ms)


def test_it_starts_as_many_as_cpus_and_some() -> None:
    made = pool()
    assert made.forks(0) == 3
    for name in (b"a", b"b", b"c"):
        made.started(name, 0)
    assert made.forks(0) == 0
    assert pool(cpus=0.5).forks(0) == 1
    assert pool(cpus=0, extra=0).forks(0) == 0


def test_many_cpus_do_not_start_all_at_once() -> None:
    assert pool(cpus=128).forks(0) == 32


def test_a_worker_serves_one_job_for_good() -> None:
    made = pool()
    ready(made, b"a", b"b")
    first = made.acquire(b"J")
    assert first is not None
    made.release(first.worker_id, 1)
    other = made.acquire(b"K")
    assert other is not None and other is not first
    assert made.acquire(b"K") is None  # `first` is J's
    again = made.acquire(b"J")
    assert again is first


def test_a_worker_serves_one_environment_for_good() -> None:
    made = pool()
    ready(made, b"a", b"b", b"c")
    first = made.acquire(b"J", environment="E")
    assert first is not None
    made.release(first.worker_id, 1)
    plain, other = made.acquire(b"J"), made.acquire(b"J", environment="F")
    assert plain is not None and other is not None and first not in (plain, other)
    assert made.acquire(b"J") is None and made.acquire(b"K", environment="E") is None
    assert made.acquire(b"J", environment="E") is first
    made.release(plain.worker_id, 2)
    made.request("x", b"J", environment="G")
    assert made.match() == [] and made.forks(2) > 0


def test_workers_of_many_environments_do_not_pile_up() -> None:
    made = pool()
    for number in range(40):
        name = b"w%d" % number
        ready(made, name, now_ms=number)
        worker = made.acquire(b"J", environment=str(number))
        assert worker is not None
        made.release(name, number)
    asked = made.expire(50)  # long before the time of any of them
    assert asked == [b"w%d" % number for number in range(40 - 2 * 3 - 8)]
    assert made.expire(51) == []
    assert len(made.expire(50 + IDLE_KILL_MS)) == 14 - 3


def test_the_last_to_become_idle_works_next() -> None:
    made = pool()
    ready(made, b"a", b"b")
    one, two = made.acquire(b"J"), made.acquire(b"J")
    assert one is not None and two is not None
    made.release(two.worker_id, 1)
    made.release(one.worker_id, 2)
    assert made.acquire(b"J") is one


def test_a_replacement_is_forked_when_one_dies() -> None:
    made = pool()
    ready(made, b"a", b"b", b"c")
    busy = made.acquire(b"J")
    assert busy is not None
    assert made.forks(0) == 0
    assert not made.gone(busy.worker_id, 0)
    assert made.forks(0) == 1


def test_actors_do_not_use_up_the_warm_workers() -> None:
    made = pool()
    ready(made, b"a", b"b", b"c")
    assert made.acquire(b"J", dedicated=True) is not None
    assert made.forks(0) == 1


def test_a_blocked_worker_is_made_up_for() -> None:
    made = pool()
    ready(made, b"a", b"b", b"c")
    one = made.acquire(b"J")
    assert one is not None
    made.block(one.worker_id, True)
    made.block(one.worker_id, True)
    assert made.forks(0) == 1
    made.block(one.worker_id, False)
    assert made.forks(0) == 0


def test_requests_are_served_in_order_as_far_as_jobs_allow() -> None:
    made = pool()
    ready(made, b"a")
    worker = made.acquire(b"J")
    assert worker is not None
    for token, job in ((1, b"K"), (2, b"J"), (3, b"J")):
        made.request(token, job)
        made.request(token, job)
    assert made.match() == []
    made.release(b"a", 1)
    assert [(token, found.worker_id) for token, found in made.match()] == [(2, b"a")]
    ready(made, b"b", b"c")
    assert made.cancel(3)
    assert not made.cancel(3)
    assert [token for token, _ in made.match()] == [1]
    assert made.requests == 0


def test_waiting_requests_fork_workers() -> None:
    made = pool()
    for token in range(3):
        made.request(token, b"J")
    assert made.forks(0) == 4  # one for each, and a fresh one; more do not start at the same time
    for token in range(3):
        made.cancel(token)
    assert made.forks(0) == 3


def test_idle_workers_that_are_too_many_are_asked_to_leave() -> None:
    made = pool()
    names = [b"%d" % number for number in range(6)]
    ready(made, *names)
    for name in names:
        worker = made.acquire(b"J" if name < b"4" else b"K")
        assert worker is not None
    for name in names[:5]:
        made.release(name, 100)
    assert made.expire(100 + IDLE_KILL_MS - 1) == []
    asked = made.expire(100 + IDLE_KILL_MS)
    assert len(asked) == 3
    assert all(made.workers[name].state is State.LEAVING for name in asked)
    assert made.acquire(b"J") is not None or made.acquire(b"K") is not None
    # One leaves, the others own something and stay: later they may be used again.
    made.gone(asked[0], 200)
    assert made.expire(100 + IDLE_KILL_MS) == []
    made.expire(100 + 3 * IDLE_KILL_MS)
    assert made.workers[asked[1]].state is State.IDLE


def test_fresh_workers_are_not_asked_to_leave() -> None:
    made = pool(cpus=0, extra=1)
    ready(made, b"a", b"b")
    assert made.expire(IDLE_KILL_MS) == [b"a"]
    assert made.expire(2 * IDLE_KILL_MS) == []


def test_workers_that_do_not_start_slow_the_pool_down() -> None:
    made = pool()
    now_ms = 0.0
    told = 0
    for number in range(1, 3 * FAILURES_MAX):
        name = b"%d" % number
        made.started(name, now_ms)
        told += made.gone(name, now_ms)
        if number == 1:
            assert made.retry_in_ms(now_ms) is None
            assert made.forks(now_ms) == 1
            continue
        assert made.forks(now_ms) == 0
        pause_ms = made.retry_in_ms(now_ms)
        assert pause_ms is not None
        assert pause_ms >= BACKOFF_FIRST_MS
        now_ms += pause_ms
        assert made.forks(now_ms) == 1
        assert made.retry_in_ms(now_ms) is None
    assert told == 1
    ready(made, b"good", now_ms=now_ms)
    assert made.failures == 0
    assert made.forks(now_ms) == 2


def test_workers_that_take_too_long_are_named() -> None:
    made = pool()
    made.started(b"a", 0)
    made.started(b"b", 50)
    assert made.late(100, 60.0) == [b"a"]


def test_nonsense_is_harmless() -> None:
    made = pool()
    assert not made.registered(b"x", 0)
    assert not made.gone(b"x", 0)
    made.release(b"x", 0)
    made.retire(b"x")
    made.block(b"x", True)
    ready(made, b"a")
    assert not made.registered(b"a", 0)
    made.release(b"a", 5)
    assert made.workers[b"a"].state is State.IDLE


def test_a_retired_worker_is_not_used_again() -> None:
    made = pool()
    ready(made, b"a", b"b")
    made.retire(b"a")
    worker = made.acquire(b"J")
    assert worker is not None and worker.worker_id == b"b"
    made.retire(b"b")
    made.release(b"b", 1)
    made.expire(10 * IDLE_KILL_MS)
    assert made.acquire(b"J") is None
    assert made.forks(0) == 3
