"""The owner's queue under any sequence of submissions, replies, recalls, deaths and cancellations.

A naive twin knows every task that has not ended, and where it runs. After each step: nothing is lost, nothing runs
twice at the same time, nothing cancelled is pushed, the demand is what is needed, and each task is found where it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ftray.ownership.dispatch import Lease, TaskDispatcher
from ftray.ownership.tasks import FunctionInfo, TaskRecord

WANT_MAX = 6


class Cancelling(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = TaskDispatcher(want_max=WANT_MAX, depth_max=4, pipeline_work_us=4000.0)
        self.classes = [self.dispatcher.class_for(name, {"CPU": 1.0}, name) for name in "ab"]
        self.functions = [FunctionInfo(b"fast", "fast"), FunctionInfo(b"slow", "slow")]
        self.functions[0].mean_us = 10.0
        self.tasks: dict[bytes, TaskRecord] = {}
        """All that have not ended."""
        self.running: dict[bytes, Lease] = {}
        self.ended: set[bytes] = set()
        self.count = 0
        self.lease_count = 0

    @initialize()
    def begin_busy(self) -> None:
        self.submit(0, 0, 3, 12)
        self.grant(0)

    # --- events -------------------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 1), function=st.integers(0, 1), retries=st.sampled_from([0, 3]), many=st.integers(1, 5))
    def submit(self, which: int, function: int, retries: int, many: int) -> None:
        for _ in range(many):
            self.count += 1
            task = TaskRecord(
                b"task-%d" % self.count, self.functions[function], 1, retries, cls=self.classes[which],
                solo=retries == 0,
            )  # fmt: skip
            self.tasks[task.task_id] = task
            self.dispatcher.enqueue(task)
        self.push()

    @rule(which=st.integers(0, 1))
    def grant(self, which: int) -> None:
        cls = self.classes[which]
        if len(cls.leases) < cls.want:
            self.lease_count += 1
            number = self.lease_count
            self.dispatcher.grant(cls.class_id, Lease(number, cls, b"w%d" % number, "unix:/w", b"n", number))
        self.push()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def reply(self, data: Any) -> None:
        lease = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        task_id = next(iter(lease.inflight))
        assert self.dispatcher.done(lease, task_id, 10) is self.tasks[task_id]
        self.end(task_id)
        self.push()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), blocked=st.booleans())
    def hand_back(self, data: Any, blocked: bool) -> None:
        lease = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        back = tuple(lease.inflight)[1:]
        for task_id in back:
            del self.running[task_id]
        self.dispatcher.handed_back(lease, back, blocked)
        self.push()

    @precondition(lambda self: self.dispatcher.leases)
    @rule(data=st.data())
    def die(self, data: Any) -> None:
        lease = self.dispatcher.leases[data.draw(st.sampled_from(sorted(self.dispatcher.leases)))]
        ending = lease.ending
        solo_before = {task_id for task_id, task in lease.inflight.items() if task.solo}
        lost = self.dispatcher.lost(lease)
        for task in lost:
            del self.running[task.task_id]
            assert task.solo == (not ending or task.task_id in solo_before)
        self.dispatcher.requeue(lost)
        self.push()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), force=st.booleans())
    def cancel(self, data: Any, force: bool) -> None:
        self.cancel_one(data.draw(st.sampled_from(sorted(self.tasks))), force)

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel_many(self, data: Any) -> None:
        for task_id in data.draw(st.lists(st.sampled_from(sorted(self.tasks)), unique=True)):
            if task_id in self.tasks:
                self.cancel_one(task_id, False)

    def cancel_one(self, task_id: bytes, force: bool) -> None:
        pushed = self.dispatcher.find_pushed(task_id)
        queued = self.dispatcher.find_queued(task_id)
        task = self.tasks[task_id]
        if task_id in self.running:
            assert pushed == (self.running[task_id], task)
            assert queued is None
            task.cancelled = True
            if force:
                self.dispatcher.end_worker(self.running[task_id])
        else:
            assert pushed is None
            assert queued is task
            self.dispatcher.cancel_queued(task)
            self.end(task_id)
        self.push()

    @precondition(lambda self: any(lease.ending for lease in self.dispatcher.leases.values()))
    @rule(data=st.data())
    def spare(self, data: Any) -> None:
        ending = sorted(number for number, lease in self.dispatcher.leases.items() if lease.ending)
        self.dispatcher.spare_worker(self.dispatcher.leases[data.draw(st.sampled_from(ending))])
        self.push()

    @rule(linger=st.integers(0, 2))
    def tick(self, linger: int) -> None:
        self.dispatcher.tick(linger)
        self.push()

    @precondition(lambda self: self.dispatcher.leases)
    @rule(data=st.data())
    def reclaim(self, data: Any) -> None:
        self.dispatcher.reclaim(data.draw(st.sampled_from(sorted(self.dispatcher.leases))))
        self.push()

    @rule()
    def forget_index(self) -> None:
        self.dispatcher.forget_index()

    # --- effects ------------------------------------------------------------------------------------------------------

    def end(self, task_id: bytes) -> None:
        del self.tasks[task_id]
        self.running.pop(task_id, None)
        self.ended.add(task_id)

    def push(self) -> None:
        for lease, task in self.dispatcher.pushes:
            assert not task.cancelled, "a cancelled task was pushed"
            assert not lease.ending, "pushed to a worker that is about to die"
            assert task.task_id not in self.running
            assert task.task_id in self.tasks
            self.running[task.task_id] = lease
        self.dispatcher.pushes.clear()
        for task in self.dispatcher.ended:
            assert task.cancelled
            self.end(task.task_id)
        self.dispatcher.ended.clear()
        for lease_id in self.dispatcher.returns:
            assert lease_id not in {lease.lease_id for lease in self.running.values()}
        self.dispatcher.returns.clear()
        self.dispatcher.recalls.clear()
        for changes in (self.dispatcher.demands, self.dispatcher.lagging):
            for cls in changes.values():
                cls.said = cls.want
            changes.clear()

    # --- what holds always --------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        places = Counter(
            task.task_id for cls in self.classes for task in cls.queue if not task.cancelled
        ) + Counter(task_id for lease in self.dispatcher.leases.values() for task_id in lease.inflight)
        assert places == Counter(list(self.tasks))
        assert self.dispatcher.waiting() == len(self.tasks)

    @invariant()
    def an_empty_queue_is_an_empty_deque(self) -> None:
        for cls in self.classes:
            assert not cls.queue or not cls.queue[0].cancelled
            assert cls.cancelled == sum(task.cancelled for task in cls.queue)

    @invariant()
    def the_demand_is_what_is_needed(self) -> None:
        for cls in self.classes:
            live = len(cls.queue) - cls.cancelled
            assert cls.want >= min(live + len(cls.leases), WANT_MAX) or cls.leases
            assert not live or cls.want > 0
            assert cls.said == cls.want, "the raylet has not heard"

    @invariant()
    def what_waits_has_no_free_worker(self) -> None:
        for cls in self.classes:
            if not cls.queue or cls.queue[0].solo:
                continue
            for lease in cls.leases.values():
                free = not (lease.inflight or lease.ending or lease.closing or lease.blocked)
                assert not free, f"lease {lease.lease_id} is free, and {cls.queue[0].task_id!r} waits"


TestCancelling = Cancelling.TestCase
