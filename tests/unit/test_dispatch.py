"""The owner's half of scheduling: which task goes to which lease, without any process."""

from __future__ import annotations

from ftray.ownership.dispatch import ClassQueue, Lease, TaskDispatcher
from ftray.ownership.tasks import FunctionInfo, TaskRecord


class Setup:
    def __init__(self, leases: int = 0, work_us: float = 4000.0, depth: int = 256) -> None:
        self.dispatcher = TaskDispatcher(want_max=64, depth_max=depth, pipeline_work_us=work_us)
        self.cls: ClassQueue = self.dispatcher.class_for("c", {"CPU": 1.0}, "f")
        self.function = FunctionInfo(b"f", "f")
        self.count = 0
        self.lease_count = 0
        self.leases: list[Lease] = []
        if leases:
            self.cls.want = leases
        for _ in range(leases):
            self.grant()

    def grant(self) -> Lease:
        self.lease_count += 1
        number = self.lease_count
        lease = Lease(number, self.cls, b"w%d" % number, f"unix:/w{number}", b"n", 100 + number)
        self.leases.append(lease)
        self.dispatcher.grant(self.cls.class_id, lease)
        return lease

    def submit(self, retries: int = 3) -> TaskRecord:
        self.count += 1
        task = TaskRecord(b"t%d" % self.count, self.function, 1, retries, cls=self.cls, solo=retries == 0)
        self.dispatcher.enqueue(task)
        return task

    def pushed(self) -> list[tuple[int, bytes]]:
        pushes = [(lease.lease_id, task.task_id) for lease, task in self.dispatcher.pushes]
        self.dispatcher.pushes.clear()
        return pushes


def test_demand_is_declared_with_the_queue_and_doubles() -> None:
    setup = Setup()
    wants = []
    for _ in range(20):
        setup.submit()
        if setup.dispatcher.demands:
            wants.append(setup.cls.want)
            setup.cls.said = setup.cls.want
            setup.dispatcher.demands.clear()
    assert wants == [1, 2, 3, 4, 8, 16]
    assert setup.cls.want == 20
    assert setup.dispatcher.lagging  # and is said when the caller blocks


def test_demand_has_a_ceiling() -> None:
    setup = Setup()
    for _ in range(1000):
        setup.submit()
    assert setup.cls.want == 64


def test_an_unmeasured_function_is_not_pipelined() -> None:
    setup = Setup(leases=2)
    for _ in range(4):
        setup.submit()
    assert setup.pushed() == [(1, b"t1"), (2, b"t2")]


def test_short_tasks_are_pipelined_round_robin_once_measured() -> None:
    setup = Setup(leases=2)
    setup.submit()
    setup.pushed()
    setup.dispatcher.done(setup.leases[0], b"t1", 10)
    for _ in range(6):
        setup.submit()
    pushed = setup.pushed()
    assert len(pushed) == 6
    assert [lease for lease, _ in pushed].count(1) == 3


def test_long_tasks_are_never_pipelined() -> None:
    setup = Setup(leases=1)
    setup.submit()
    setup.pushed()
    setup.dispatcher.done(setup.leases[0], b"t1", 50_000)
    setup.submit()
    setup.submit()
    assert setup.pushed() == [(1, b"t2")]


def test_a_stuck_head_gives_up_what_queues_behind_it() -> None:
    setup = Setup(leases=1)
    setup.submit()
    setup.dispatcher.done(setup.leases[0], b"t1", 10)
    for _ in range(3):
        setup.submit()
    setup.pushed()
    setup.dispatcher.tick(100)
    assert not setup.dispatcher.recalls  # the first tick only looks
    setup.dispatcher.tick(100)
    assert setup.dispatcher.recalls == [(setup.leases[0], (b"t3", b"t4"))]
    setup.dispatcher.handed_back(setup.leases[0], (b"t3", b"t4"), False)
    assert not setup.pushed()  # the lease stays blocked until its head is done
    other = setup.grant()
    assert setup.pushed() == [(other.lease_id, b"t3"), (other.lease_id, b"t4")]


def test_a_blocked_worker_gets_nothing_until_its_task_is_done() -> None:
    setup = Setup(leases=1)
    setup.submit()
    setup.dispatcher.done(setup.leases[0], b"t1", 10)
    setup.submit()
    setup.submit()
    setup.pushed()
    setup.dispatcher.handed_back(setup.leases[0], (b"t3",), True)
    assert not setup.pushed()
    setup.dispatcher.done(setup.leases[0], b"t2", 10)
    assert setup.pushed() == [(1, b"t3")]


def test_after_a_death_the_unfinished_run_alone() -> None:
    setup = Setup(leases=1)
    setup.submit()
    setup.dispatcher.done(setup.leases[0], b"t1", 10)
    for _ in range(3):
        setup.submit()
    setup.pushed()
    tasks = setup.dispatcher.lost(setup.leases[0])
    assert [task.task_id for task in tasks] == [b"t2", b"t3", b"t4"]
    setup.dispatcher.requeue(tasks)
    lease = setup.grant()
    assert setup.pushed() == [(lease.lease_id, b"t2")]
    setup.dispatcher.done(lease, b"t2", 10)
    assert setup.pushed() == [(lease.lease_id, b"t3")]


def test_a_task_without_retries_shares_a_worker_with_nobody() -> None:
    setup = Setup(leases=2)
    setup.submit()
    setup.dispatcher.done(setup.leases[0], b"t1", 10)
    setup.pushed()
    setup.submit(retries=0)
    setup.submit()
    setup.submit()
    pushed = setup.pushed()
    alone = next(lease for lease, task in pushed if task == b"t2")
    assert [lease for lease, _ in pushed].count(alone) == 1


def test_an_idle_lease_goes_back_after_lingering_and_demand_falls() -> None:
    setup = Setup(leases=1)
    setup.submit()
    setup.dispatcher.done(setup.leases[0], b"t1", 10)
    for _ in range(4):
        setup.dispatcher.tick(3)
    assert setup.dispatcher.returns == [1]
    assert setup.cls.want == 0
    assert not setup.dispatcher.leases


def test_reclaim_returns_idle_leases_at_once_and_busy_ones_when_done() -> None:
    setup = Setup(leases=2)
    setup.submit()
    setup.pushed()
    busy = next(lease for lease in setup.leases if lease.inflight)
    setup.dispatcher.reclaim(busy.lease_id)
    idle = next(lease for lease in setup.leases if lease is not busy)
    assert setup.dispatcher.returns == [idle.lease_id]
    setup.dispatcher.done(busy, b"t1", 10)
    assert setup.dispatcher.returns == [idle.lease_id, busy.lease_id]


def test_a_lease_that_is_recalled_before_it_is_granted_runs_one_task() -> None:
    """Workers that take long to get ready would be asked for by turns, and none would ever be used."""
    setup = Setup()
    setup.submit()
    setup.submit()
    setup.dispatcher.reclaim(1)
    lease = setup.grant()
    assert lease.lease_id == 1
    assert setup.pushed() == [(1, b"t1")]
    assert not setup.dispatcher.returns
    setup.dispatcher.done(lease, b"t1", 10)
    assert not setup.pushed()
    assert setup.dispatcher.returns == [1]
    setup.dispatcher.cancel_queued(setup.cls.queue[0])
    setup.dispatcher.reclaim(2)
    setup.cls.want = 1
    assert setup.grant().lease_id == 2
    assert setup.dispatcher.returns == [1, 2]  # without a task it goes straight back


def test_a_grant_that_nobody_needs_goes_straight_back() -> None:
    setup = Setup()
    lease = setup.grant()
    assert setup.dispatcher.returns == [lease.lease_id]


def test_a_worker_that_leaves_gets_nothing_more_and_costs_no_retry() -> None:
    setup = Setup(leases=1)
    setup.submit()
    setup.dispatcher.done(setup.leases[0], b"t1", 10)
    for _ in range(3):
        setup.submit()
    setup.pushed()
    task = setup.dispatcher.leaving(setup.leases[0], b"t2")
    assert task is not None
    assert task.task_id == b"t2"
    assert not setup.dispatcher.returns  # it ends with its worker, which must not be leased to others meanwhile
    lease = setup.grant()
    pushed = setup.pushed()
    assert [task_id for _, task_id in pushed] == [b"t3", b"t4"]
    assert all(task.retries_left == 3 for task in lease.inflight.values())


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_cancelled_tasks_are_passed_over_and_the_demand_falls() -> None:
    setup = Setup()
    tasks = [setup.submit() for _ in range(4)]
    for index in (0, 2):
        setup.dispatcher.cancel_queued(tasks[index])
    assert setup.cls.want == 2
    assert setup.dispatcher.waiting() == 2
    setup.grant()
    setup.grant()
    assert setup.pushed() == [(1, b"t2"), (2, b"t4")]
    assert not setup.cls.queue
    assert setup.cls.cancelled == 0


def test_when_all_are_cancelled_a_lease_goes_straight_back() -> None:
    setup = Setup()
    for task in [setup.submit() for _ in range(3)]:
        setup.dispatcher.cancel_queued(task)
        setup.dispatcher.cancel_queued(task)  # again is nothing
    assert setup.cls.want == 0
    assert setup.dispatcher.lagging  # the raylet hears of it
    setup.grant()
    assert setup.dispatcher.returns == [1]


def test_a_long_queue_of_cancelled_tasks_does_not_stay() -> None:
    setup = Setup()
    tasks = [setup.submit() for _ in range(1000)]
    for task in tasks[1:]:
        setup.dispatcher.cancel_queued(task)
    assert len(setup.cls.queue) < 70
    assert setup.dispatcher.waiting() == 1


def test_a_cancelled_task_that_comes_back_is_not_queued_again() -> None:
    setup = Setup(leases=1)
    setup.submit()
    setup.dispatcher.done(setup.leases[0], b"t1", 10)
    tasks = [setup.submit() for _ in range(3)]
    setup.pushed()
    tasks[1].cancelled = True
    setup.dispatcher.handed_back(setup.leases[0], (b"t3", b"t4"), True)
    assert setup.dispatcher.ended == [tasks[1]]
    setup.dispatcher.done(setup.leases[0], b"t2", 10)
    assert setup.pushed() == [(1, b"t4")]


def test_a_worker_that_is_ended_on_purpose_gets_nothing_and_its_tasks_are_not_suspected() -> None:
    setup = Setup(leases=1)
    setup.submit()
    lease = setup.leases[0]
    setup.dispatcher.done(lease, b"t1", 10)
    setup.submit()
    setup.submit()
    setup.pushed()
    setup.dispatcher.end_worker(lease)
    setup.submit()
    setup.dispatcher.done(lease, b"t2", 10)
    assert not setup.pushed()
    setup.dispatcher.reclaim(lease.lease_id)
    for _ in range(10):
        setup.dispatcher.tick(1)
    assert not setup.dispatcher.returns  # it ends with its worker
    lost = setup.dispatcher.lost(lease)
    assert [(task.task_id, task.solo) for task in lost] == [(b"t3", False)]


def test_a_worker_that_is_spared_goes_on() -> None:
    setup = Setup(leases=1)
    setup.submit()
    lease = setup.leases[0]
    setup.dispatcher.done(lease, b"t1", 10)
    setup.pushed()
    setup.dispatcher.end_worker(lease)
    setup.submit()
    assert not setup.pushed()
    setup.dispatcher.spare_worker(lease)
    assert setup.pushed() == [(1, b"t2")]


def test_a_worker_that_leaves_while_it_is_to_be_ended_gets_nothing_more() -> None:
    setup = Setup(leases=1)
    setup.submit()
    lease = setup.leases[0]
    setup.pushed()
    setup.dispatcher.end_worker(lease)
    setup.dispatcher.leaving(lease, b"t1")
    setup.dispatcher.spare_worker(lease)
    setup.submit()
    assert not setup.pushed()


def test_an_ended_worker_that_was_reclaimed_is_returned_when_it_is_spared() -> None:
    setup = Setup(leases=1)
    setup.submit()
    setup.pushed()
    lease = setup.leases[0]
    setup.dispatcher.end_worker(lease)
    setup.dispatcher.reclaim(lease.lease_id)
    setup.dispatcher.done(lease, b"t1", 10)
    assert not setup.dispatcher.returns
    setup.dispatcher.spare_worker(lease)
    assert setup.dispatcher.returns == [1]


def test_an_infeasible_class_gives_up_only_what_is_not_cancelled() -> None:
    setup = Setup()
    tasks = [setup.submit() for _ in range(3)]
    setup.dispatcher.cancel_queued(tasks[1])
    assert setup.dispatcher.withdraw(setup.cls.class_id) == [tasks[0], tasks[2]]
    assert setup.dispatcher.waiting() == 0
