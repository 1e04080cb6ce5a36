"""Which task goes to which leased worker, how many at once, and how many leases to ask for.

Role: pure, the owner's half of scheduling. Tasks queue per scheduling class (what they need, not which function they
are, so that one function's leases serve the next); leases of a class take tasks round robin, as many as are expected
to fill `pipeline_work_us`: many of microseconds, one long one. Effects are lists that the shell drains: `pushes`,
`demands`, `returns`, `recalls`.

Rules:
- A function that has never been measured is taken for a long one: pipelining must not cost parallelism.
- A lease whose head has not finished between two ticks is *stuck*: what queues behind the head is recalled and the
  lease takes nothing until the head is done. No clock is read for this, ticks are enough.
- After a worker's death its oldest unfinished task spends a retry. Those behind it may have run or not; they run again
  *solo* (nothing else in flight on that lease), so that a task that kills its worker is told from its neighbours. A
  task that may not be retried is solo from the start: it runs at most once, and no neighbour's crash can fail it.
- A worker that is killed on purpose (`ending`) is nobody's fault: what else it had is queued again as if never pushed.
- A cancelled task stays where it is in the queue and is passed over; the front of a queue is never cancelled, so that
  an empty queue is an empty deque. One that comes back from a lease is not queued again but put into `ended`.

Rejected: one lease request per task (a round trip to the raylet each); choosing the least loaded lease by a scan
(O(leases) per task; round robin over those with room is as even); removing cancelled tasks from the middle of a queue
(O(queue) for each).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from ftray.ownership.finding import QueueIndex
from ftray.ownership.tasks import TaskRecord

OVERHEAD_US = 10.0
"""What a task costs beyond its own time."""


class Lease:
    """A worker that this owner may push tasks of one class to."""

    __slots__ = (
        "blocked", "closing", "cls", "done_count", "doomed", "ending", "endpoint", "idle_ticks", "in_room", "inflight",
        "lease_id", "link", "load_us", "node_id", "pid", "seen_count", "solo", "worker_id",
    )  # fmt: skip

    def __init__(
        self, lease_id: int, cls: ClassQueue, worker_id: bytes, endpoint: str, node_id: bytes, pid: int
    ) -> None:
        self.lease_id = lease_id
        self.cls = cls
        self.worker_id = worker_id
        self.endpoint = endpoint
        self.node_id = node_id
        self.pid = pid
        self.inflight: dict[bytes, TaskRecord] = {}
        self.link: Any = None
        self.load_us = 0.0
        """Expected work of what is in flight."""
        self.blocked = False
        self.closing = False
        self.ending = False
        """Its worker is about to be killed on purpose: it gets nothing more, and is not returned but ends with it."""
        self.solo = False
        self.in_room = False
        self.done_count = 0
        self.seen_count = -1
        self.idle_ticks = 0
        self.doomed = ""
        """Why the node is about to end its worker for want of memory, if it is."""


class ClassQueue:
    """Tasks with the same needs, and the leases that serve them."""

    __slots__ = (
        "cancelled", "class_id", "declared", "environment", "index", "leases", "name", "queue", "resources",
        "retriable", "room", "said", "want", "want_max",
    )  # fmt: skip

    def __init__(self, class_id: int, resources: Mapping[str, float], name: str, retriable: bool = True) -> None:
        self.class_id = class_id
        self.resources = dict(resources)
        self.name = name
        self.retriable = retriable
        """Its tasks may be repeated: the memory monitor ends those first."""
        self.environment = ""
        """The runtime environment of its tasks, packed."""
        self.queue: deque[TaskRecord] = deque()
        self.cancelled = 0
        """How many of the queue are cancelled."""
        self.index = QueueIndex()
        self.leases: dict[int, Lease] = {}
        self.room: deque[Lease] = deque()
        self.want_max = 0
        """The most leases it may hold: how many of its tasks may run at once."""
        self.want = 0
        self.said = 0
        """The want that the raylet knows."""
        self.declared = False


class TaskDispatcher:
    """See the module. Not thread-safe: the shell holds its lock."""

    def __init__(self, want_max: int, depth_max: int, pipeline_work_us: float) -> None:
        self.want_max = want_max
        self.depth_max = depth_max
        self.pipeline_work_us = pipeline_work_us
        self.classes: dict[Any, ClassQueue] = {}
        self.by_id: dict[int, ClassQueue] = {}
        self.leases: dict[int, Lease] = {}
        self.pushes: list[tuple[Lease, TaskRecord]] = []
        self.demands: dict[int, ClassQueue] = {}
        self.lagging: dict[int, ClassQueue] = {}
        """Demands that may be said a little later."""
        self.reclaimed_early: set[int] = set()
        """Leases that the raylet wants back although their grant has not arrived yet."""
        self.returns: list[int] = []
        self.recalls: list[tuple[Lease, tuple[bytes, ...]]] = []
        self.ended: list[TaskRecord] = []
        """Cancelled tasks that came back from a lease without having run."""

    def class_for(
        self, key: Any, resources: Mapping[str, float], name: str, retriable: bool = True
    ) -> ClassQueue:
        """The queue of a scheduling class, made at first use."""
        cls = self.classes.get(key)
        if cls is None:
            cls = ClassQueue(len(self.by_id) + 1, resources, name, retriable)
            cls.want_max = self.want_max
            self.classes[key] = cls
            self.by_id[cls.class_id] = cls
        return cls

    # --- tasks -------------------------------------------------------------------------------------------------------

    def enqueue(self, task: TaskRecord) -> None:
        """A task whose dependencies are there."""
        cls = task.cls
        assert cls is not None
        cls.queue.append(task)
        if cls.room:
            self.pump(cls)
        if cls.queue:
            self._ask(cls)

    def requeue(self, tasks: Iterable[TaskRecord]) -> None:
        """Tasks that come back go to the front, in their order; cancelled ones do not."""
        back = list(tasks)
        touched: dict[int, ClassQueue] = {}
        for task in reversed(back):
            assert task.cls is not None
            if task.cancelled:
                self.ended.append(task)
                continue
            task.cls.queue.appendleft(task)
            task.cls.index.clear()
            touched[task.cls.class_id] = task.cls
        for cls in touched.values():
            self.pump(cls)
            if cls.queue:
                self._ask(cls)

    def _ask(self, cls: ClassQueue) -> None:
        """Declares more demand when the queue has outgrown it. Doublings are said at once, which keeps the messages of
        a burst few; what lies between is said when the caller blocks, or at the next tick."""
        need = len(cls.queue) - cls.cancelled + len(cls.leases)
        if need > cls.want_max:
            need = cls.want_max
        if need > cls.want:
            cls.want = need
            if cls.said < 4 or need >= 2 * cls.said:
                self.demands[cls.class_id] = cls
            else:
                self.lagging[cls.class_id] = cls

    def pump(self, cls: ClassQueue) -> None:
        """Pushes what the leases of a class have room for."""
        queue, room, pushes = cls.queue, cls.room, self.pushes
        depth, work_us = self.depth_max, self.pipeline_work_us
        cancelled = cls.cancelled
        passed = 0
        while queue and room:
            lease = room[0]
            inflight = lease.inflight
            if not lease.in_room or lease.load_us >= work_us or len(inflight) >= depth:
                room.popleft()
                lease.in_room = False
                continue
            task = queue[0]
            if task.solo:
                if inflight:
                    passed += 1
                    if passed > len(room):
                        return
                    room.rotate(-1)
                    continue
                lease.solo = True
            queue.popleft()
            if cancelled:
                cancelled = self._pass_over(cls)
            passed = 0
            inflight[task.task_id] = task
            mean_us = task.function.mean_us
            expect_us = task.expect_us = work_us if mean_us < 0 else mean_us + OVERHEAD_US
            lease.load_us += expect_us
            pushes.append((lease, task))
            if lease.solo or lease.load_us >= work_us or len(inflight) >= depth:
                room.popleft()
                lease.in_room = False
            elif len(room) > 1:
                room.rotate(-1)

    def _pass_over(self, cls: ClassQueue) -> int:
        """Drops cancelled tasks from the front of a queue; returns how many are left behind it."""
        queue = cls.queue
        while queue and queue[0].cancelled:
            queue.popleft()
            cls.cancelled -= 1
        return cls.cancelled

    # --- cancelling --------------------------------------------------------------------------------------------------

    def find_queued(self, task_id: bytes) -> TaskRecord | None:
        """The queued task with this id. The first question after `forget_index` reads the queues, others do not."""
        for cls in self.by_id.values():
            if cls.queue:
                task = cls.index.find(cls.queue, task_id)
                if task is not None:
                    return task
        return None

    def find_pushed(self, task_id: bytes) -> tuple[Lease, TaskRecord] | None:
        """The task in flight with this id, and where."""
        for lease in self.leases.values():
            task = lease.inflight.get(task_id)
            if task is not None:
                return lease, task
        return None

    def forget_index(self) -> None:
        """No more questions for a while."""
        for cls in self.by_id.values():
            cls.index.clear()

    def cancel_queued(self, task: TaskRecord) -> None:
        """A queued task will not run. The demand falls with it."""
        if task.cancelled:
            return
        cls: ClassQueue = task.cls
        task.cancelled = True
        cls.cancelled += 1
        self._pass_over(cls)
        if cls.cancelled > 32 and cls.cancelled * 2 > len(cls.queue):
            live = [each for each in cls.queue if not each.cancelled]
            cls.queue.clear()
            cls.queue.extend(live)
            cls.cancelled = 0
        want = min(len(cls.queue) - cls.cancelled + len(cls.leases), cls.want_max)
        if want < cls.want:
            cls.want = want
            self.lagging[cls.class_id] = cls

    def end_worker(self, lease: Lease) -> None:
        """Its worker is about to be killed on purpose."""
        lease.ending = True
        self._leave_room(lease)

    def spare_worker(self, lease: Lease) -> None:
        """It is not, after all."""
        if lease.lease_id not in self.leases:
            return  # it leaves of its own will
        lease.ending = False
        if lease.closing:
            if not lease.inflight:
                self.give_back(lease)
        elif not lease.in_room and not lease.blocked and lease.load_us < self.pipeline_work_us:
            lease.in_room = True
            lease.cls.room.append(lease)
            self.pump(lease.cls)

    # --- replies -----------------------------------------------------------------------------------------------------

    def done(self, lease: Lease, task_id: bytes, work_us: int) -> TaskRecord | None:
        """A reply arrived; returns its task, or None for one that this lease does not run."""
        task = lease.inflight.pop(task_id, None)
        if task is None:
            return None
        cls = lease.cls
        function = task.function
        mean = function.mean_us
        function.mean_us = work_us if mean < 0 else mean + (work_us - mean) * 0.125
        if lease.inflight:
            lease.load_us -= task.expect_us
        else:
            lease.load_us = 0.0  # no drift by rounding
        lease.done_count += 1
        lease.blocked = False
        lease.solo = False
        if lease.closing or lease.ending:
            if not lease.inflight and not lease.ending:
                self.give_back(lease)
        elif not lease.in_room and lease.load_us < self.pipeline_work_us:
            lease.in_room = True
            cls.room.append(lease)
        if cls.queue and cls.room:
            self.pump(cls)
        return task

    def handed_back(self, lease: Lease, task_ids: Iterable[bytes], blocked: bool) -> None:
        """The worker returned tasks that it had not started. It may say so when it works for somebody else by now."""
        if lease.lease_id not in self.leases:
            return
        if blocked and lease.inflight:
            self._block(lease)
        tasks = [task for task_id in task_ids if (task := lease.inflight.pop(task_id, None)) is not None]
        lease.load_us = sum(task.expect_us for task in lease.inflight.values())
        if not lease.inflight:
            lease.blocked = False
            lease.solo = False
            if lease.ending:
                pass
            elif lease.closing:
                self.give_back(lease)
            elif not lease.in_room:
                lease.in_room = True
                lease.cls.room.append(lease)
        self.requeue(tasks)

    def _block(self, lease: Lease) -> None:
        lease.blocked = True
        self._leave_room(lease)

    def _leave_room(self, lease: Lease) -> None:
        lease.in_room = False
        if lease in lease.cls.room:
            lease.cls.room.remove(lease)

    # --- leases ------------------------------------------------------------------------------------------------------

    def grant(self, class_id: int, lease: Lease) -> None:
        """A lease was granted. One that is not needed any more goes straight back; one that others want by now runs one
        task before, since otherwise classes whose workers take long to get ready could recall each other's for ever."""
        cls = lease.cls
        cls.leases[lease.lease_id] = lease
        self.leases[lease.lease_id] = lease
        early = lease.lease_id in self.reclaimed_early
        if early:
            self.reclaimed_early.discard(lease.lease_id)
            lease.closing = lease.solo = True
        if not cls.queue and (early or len(cls.leases) > cls.want):
            self.give_back(lease)
            return
        lease.in_room = True
        cls.room.append(lease)
        self.pump(cls)

    def give_back(self, lease: Lease) -> None:
        """Returns an idle lease to the raylet and lowers the demand to what is held and needed."""
        self._remove(lease)
        self.returns.append(lease.lease_id)
        cls = lease.cls
        want = min(len(cls.leases) + len(cls.queue) - cls.cancelled, cls.want_max)
        if want != cls.want:
            cls.want = want
            self.demands[cls.class_id] = cls

    def _remove(self, lease: Lease) -> None:
        self.leases.pop(lease.lease_id, None)
        lease.cls.leases.pop(lease.lease_id, None)
        if lease.in_room:
            lease.in_room = False
            if lease in lease.cls.room:
                lease.cls.room.remove(lease)

    def lost(self, lease: Lease) -> list[TaskRecord]:
        """The worker died; returns its unfinished tasks, oldest first, all marked solo unless it was killed on purpose.
        The demand stands."""
        self._remove(lease)
        tasks = list(lease.inflight.values())
        lease.inflight.clear()
        if not lease.ending:
            for task in tasks:
                task.solo = True
        return tasks

    def leaving(self, lease: Lease, task_id: bytes) -> TaskRecord | None:
        """The worker ends of its own will after this task: it gets nothing more; what it has not begun is queued anew.

        The lease is not returned: it ends with the worker, which must not be given to anybody meanwhile.
        """
        task = lease.inflight.pop(task_id, None)
        unbegun = list(lease.inflight.values())
        lease.inflight.clear()
        self._remove(lease)
        self.requeue(unbegun)
        return task

    def reclaim(self, lease_id: int) -> None:
        """Others wait: idle leases go back, and the named one as soon as its running tasks are done."""
        for lease in list(self.leases.values()):
            if not lease.inflight and not lease.cls.queue and not lease.ending:
                self.give_back(lease)
        named = self.leases.get(lease_id)
        if named is None:
            if lease_id:
                self.reclaimed_early.add(lease_id)
        else:
            named.closing = True
            if named.in_room:
                named.in_room = False
                if named in named.cls.room:
                    named.cls.room.remove(named)
            if named.ending:
                pass
            elif not named.inflight:
                self.give_back(named)
            elif len(named.inflight) > 1:
                self.recalls.append((named, tuple(named.inflight)[1:]))

    def tick(self, linger_ticks: int) -> bool:
        """Recalls from stuck leases, returns long idle ones. True while there is a reason to tick again."""
        for lease in list(self.leases.values()):
            if lease.inflight:
                lease.idle_ticks = 0
                if lease.seen_count == lease.done_count and len(lease.inflight) > 1 and not lease.blocked:
                    self._block(lease)
                    self.recalls.append((lease, tuple(lease.inflight)[1:]))
                lease.seen_count = lease.done_count
            elif not lease.cls.queue and not lease.ending:
                lease.idle_ticks += 1
                if lease.idle_ticks > linger_ticks:
                    self.give_back(lease)
        return bool(self.leases)

    def withdraw(self, class_id: int) -> list[TaskRecord]:
        """Takes all queued tasks of a class (it is infeasible), and its demand."""
        cls = self.by_id[class_id]
        tasks = [task for task in cls.queue if not task.cancelled]
        cls.queue.clear()
        cls.cancelled = 0
        cls.want = len(cls.leases)
        self.demands[class_id] = cls
        return tasks

    def waiting(self) -> int:
        """Tasks queued and in flight."""
        queued = sum(len(cls.queue) - cls.cancelled for cls in self.by_id.values())
        return queued + sum(len(lease.inflight) for lease in self.leases.values())
