"""Calls of one actor, as seen by one caller: order, concurrency groups, restarts, retries.

Role: pure. Calls go out in the order in which they were submitted, over one connection to the actor's current
incarnation. In an actor that keeps the order, a call whose arguments are not there yet holds back those after it; in
one that does not (`out_of_order`) it waits aside, and goes behind those that are ready when its arguments come.

A concurrency group is a *lane* with a queue and a bound of its own, so that a group whose calls do not return holds up
no other. Calls without a group are in the main lane, `queue`.

When the incarnation dies, calls in flight spend a retry (`max_task_retries`) or fail; those that were never pushed just
wait for the next incarnation. Retried calls go before the waiting ones, in their old order (design `ownership.md`,
failures). As soon as the actor is known not to live any more, nothing is pushed, though its channel may be open still:
what its last process would answer then is of no use to anybody.

Rejected: sequence numbers on the wire (the connection is first-in first-out, and the caller alone decides what is sent
again); failing queued calls when the actor restarts (they had no effect yet).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from ftray.ownership.tasks import TaskRecord

PENDING, ALIVE, RESTARTING, DEAD = "PENDING", "ALIVE", "RESTARTING", "DEAD"
TAKEN_OUT = -1
"""`TaskRecord.deps_left` of a call that was taken out of a queue (less if arguments come later): it is skipped when it
comes to the front."""


class Lane:
    """The calls of one concurrency group."""

    __slots__ = ("inflight", "queue")

    def __init__(self) -> None:
        self.queue: deque[TaskRecord] = deque()
        self.inflight = 0


class ActorCalls:
    """All calls of this process to one actor."""

    __slots__ = (
        "actor_id", "cause", "connecting", "endpoint", "grouped", "handle_id", "incarnation", "inflight",
        "inflight_max", "lanes", "link", "linked", "live", "name", "name_kept", "node_id", "out_of_order",
        "pending_max", "queue", "ran", "state", "taken_out", "unowned", "waiting", "worker_id",
    )  # fmt: skip

    def __init__(self, actor_id: bytes, name: str, handle_id: bytes, inflight_max: int = 4096) -> None:
        self.actor_id = actor_id
        self.name = name
        self.handle_id = handle_id
        self.state = PENDING
        self.incarnation = -1
        self.worker_id = b""
        self.node_id = b""
        self.endpoint = ""
        self.cause: Any = None
        self.link: Any = None
        self.linked = -1
        """The incarnation that it leads to: it may be open still when the next one is alive."""
        self.live = False
        """The link leads to a live incarnation: calls may be pushed."""
        self.connecting = False
        self.queue: deque[TaskRecord] = deque()
        self.inflight: dict[bytes, TaskRecord] = {}
        """What was pushed, of all lanes, oldest first."""
        self.inflight_max = inflight_max
        """The most calls of one lane that are in flight."""
        self.lanes: dict[str, Lane] = {}
        """The lanes of concurrency groups, made at their first call."""
        self.grouped = 0
        """How many of those in flight have a group."""
        self.out_of_order = False
        self.waiting: dict[bytes, TaskRecord] = {}
        """Calls to an actor without order whose arguments are not there yet."""
        self.pending_max = -1
        """The most unfinished calls (`max_pending_calls`); -1 is no bound."""
        self.taken_out = 0
        """How many calls in the queues were taken out."""
        self.ran = ""
        """The method that ran when the last life ended, as far as this caller knows."""
        self.name_kept = False
        """The GCS keeps facts for handles made from its name, which end with it."""
        self.unowned = False
        """No handle is left here; the record is watched on for what the constructor's arguments hold."""

    # --- on their way ------------------------------------------------------------------------------------------------

    def go(self, task: TaskRecord) -> bool:
        """Puts a new call in flight if nothing stands before it; else it is to be `submit`ted. The common case."""
        if (
            self.queue
            or task.deps_left
            or task.group
            or not self.live
            or len(self.inflight) - self.grouped >= self.inflight_max
        ):
            return False
        self.inflight[task.task_id] = task
        return True

    def submit(self, task: TaskRecord) -> None:
        """Queues a call."""
        if task.deps_left and self.out_of_order:
            self.waiting[task.task_id] = task
        else:
            self._queue_of(task).append(task)

    def ready(self, task: TaskRecord) -> None:
        """The last of its arguments has come."""
        if self.waiting.pop(task.task_id, None) is not None:
            self._queue_of(task).append(task)

    def again(self, task: TaskRecord) -> None:
        """A call that was answered is to be made once more, before those that wait."""
        self._queue_of(task).appendleft(task)

    def take(self) -> TaskRecord | None:
        """The next call that may be pushed; it is in flight from now on."""
        if not self.live:
            return None
        if self.queue and len(self.inflight) - self.grouped < self.inflight_max:
            task = self._front(self.queue)
            if task is not None:
                self.inflight[task.task_id] = task
                return task
        for lane in self.lanes.values():
            if lane.queue and lane.inflight < self.inflight_max:
                task = self._front(lane.queue)
                if task is not None:
                    lane.inflight += 1
                    self.grouped += 1
                    self.inflight[task.task_id] = task
                    return task
        return None

    def _front(self, queue: deque[TaskRecord]) -> TaskRecord | None:
        while queue:
            left = queue[0].deps_left
            if left > 0:
                return None
            task = queue.popleft()
            if left == 0:
                return task
            self.taken_out -= 1
        return None

    def _queue_of(self, task: TaskRecord) -> deque[TaskRecord]:
        group = task.group
        if not group:
            return self.queue
        lane = self.lanes.get(group)
        if lane is None:
            lane = self.lanes[group] = Lane()
        return lane.queue

    def done(self, task_id: bytes) -> TaskRecord | None:
        """A reply arrived. None when nothing is known of the call."""
        task = self.inflight.pop(task_id, None)
        if task is not None and task.group:
            self.left_lane(task)
        return task

    def left_lane(self, task: TaskRecord) -> None:
        """A call with a group is no longer in flight."""
        self.lanes[task.group].inflight -= 1
        self.grouped -= 1

    def take_out(self, task: TaskRecord) -> bool:
        """A call that waits will not be made. False when it does not wait here."""
        if self.waiting.pop(task.task_id, None) is not None:
            return True
        if task.task_id in self.inflight or task.deps_left <= TAKEN_OUT:
            return False
        # Not removed from its queue: each removal would cost a walk through all that wait.
        task.deps_left = TAKEN_OUT
        self.taken_out += 1
        return True

    # --- lives and deaths --------------------------------------------------------------------------------------------

    def connected(self, link: Any) -> None:
        """The link to the current incarnation is open."""
        self.link = link
        self.live = True
        self.connecting = False
        self.ran = ""

    def lost(self) -> list[TaskRecord]:
        """The link closed. Calls that have a retry left are queued again, in order; the others are returned to fail."""
        self.link = None
        self.live = False
        self.connecting = False
        failed: list[TaskRecord] = []
        again: list[TaskRecord] = []
        if self.inflight:
            self.ran = next(iter(self.inflight.values())).method
        for task in self.inflight.values():
            (again if task.spend_retry() else failed).append(task)
        self._nothing_in_flight()
        for task in reversed(again):
            self._queue_of(task).appendleft(task)
        return failed

    def update(self, state: str, incarnation: int, worker_id: bytes, node_id: bytes, endpoint: str, cause: Any) -> bool:
        """The GCS says so. Returns whether to connect to `endpoint`. Old news is ignored."""
        if self.state == DEAD or incarnation < self.incarnation:
            return False
        if incarnation == self.incarnation and state == self.state:
            return False
        self.state = state
        self.incarnation = incarnation
        if cause is not None:
            self.cause = cause
        if state != ALIVE:
            self.live = False
            return False
        self.worker_id, self.node_id, self.endpoint = worker_id, node_id, endpoint
        newer = incarnation != self.linked
        self.linked = incarnation
        return newer or (self.link is None and not self.connecting)

    def take_all(self) -> list[TaskRecord]:
        """The actor is dead: everything unfinished is returned to fail."""
        tasks = [*self.inflight.values(), *self.queued()]
        self._nothing_in_flight()
        self.queue.clear()
        self.lanes.clear()
        self.waiting.clear()
        self.taken_out = 0
        return tasks

    def _nothing_in_flight(self) -> None:
        self.inflight.clear()
        self.grouped = 0
        for lane in self.lanes.values():
            lane.inflight = 0

    # --- looking -----------------------------------------------------------------------------------------------------

    def queued(self) -> Iterator[TaskRecord]:
        """Calls that were not pushed yet."""
        for queue in (self.queue, *(lane.queue for lane in self.lanes.values())):
            for task in queue:
                if task.deps_left > TAKEN_OUT:
                    yield task
        yield from self.waiting.values()

    @property
    def unfinished(self) -> int:
        """How many calls have no answer yet."""
        count = len(self.queue) + len(self.inflight) + len(self.waiting) - self.taken_out
        if self.lanes:
            count += sum(len(lane.queue) for lane in self.lanes.values())
        return count

    @property
    def full(self) -> bool:
        """Whether one more call would be more than `pending_max`."""
        return 0 <= self.pending_max <= self.unfinished

    @property
    def idle(self) -> bool:
        return not self.unfinished
