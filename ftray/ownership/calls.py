"""Calls of one actor, as seen by one caller: order, restarts, retries.

Role: pure. Calls go out in the order in which they were submitted, over one connection to the actor's current
incarnation; a call whose arguments are not there yet holds back those after it. When the incarnation dies, calls in
flight spend a retry (`max_task_retries`) or fail; those that were never pushed just wait for the next incarnation.
Retried calls go before the waiting ones, in their old order (design `ownership.md`, failures).

Rejected: sequence numbers on the wire (the connection is first-in first-out, and the caller alone decides what is sent
again); failing queued calls when the actor restarts (they had no effect yet).
"""

from __future__ import annotations

from collections import deque
from typing import Any

from ftray.ownership.tasks import TaskRecord

PENDING, ALIVE, RESTARTING, DEAD = "PENDING", "ALIVE", "RESTARTING", "DEAD"


class ActorCalls:
    """All calls of this process to one actor."""

    __slots__ = (
        "actor_id", "cause", "connecting", "endpoint", "handle_id", "incarnation", "inflight", "inflight_max",
        "link", "linked", "name", "name_kept", "node_id", "pushes", "queue", "state", "worker_id",
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
        self.connecting = False
        self.queue: deque[TaskRecord] = deque()
        self.inflight: dict[bytes, TaskRecord] = {}
        self.inflight_max = inflight_max
        self.pushes: list[TaskRecord] = []
        self.name_kept = False
        """The GCS keeps facts for handles made from its name, which end with it."""

    def submit(self, task: TaskRecord) -> None:
        """Queues a call; pushes it if it may go now."""
        self.queue.append(task)
        if self.link is not None:
            self.pump()

    def pump(self) -> None:
        """Pushes from the front of the queue while calls are ready and the link takes them."""
        if self.link is None:
            return
        queue, inflight = self.queue, self.inflight
        while queue and len(inflight) < self.inflight_max:
            task = queue[0]
            if task.deps_left:
                return
            queue.popleft()
            inflight[task.task_id] = task
            self.pushes.append(task)

    def done(self, task_id: bytes) -> TaskRecord | None:
        """A reply arrived."""
        task = self.inflight.pop(task_id, None)
        if self.queue:
            self.pump()
        return task

    def connected(self, link: Any) -> None:
        """The link to the current incarnation is open."""
        self.link = link
        self.connecting = False
        self.pump()

    def lost(self) -> list[TaskRecord]:
        """The link closed. Calls that have a retry left are queued again, in order; the others are returned to fail."""
        self.link = None
        self.connecting = False
        failed: list[TaskRecord] = []
        again: list[TaskRecord] = []
        for task in self.inflight.values():
            (again if task.spend_retry() else failed).append(task)
        self.inflight.clear()
        self.queue.extendleft(reversed(again))
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
            return False
        self.worker_id, self.node_id, self.endpoint = worker_id, node_id, endpoint
        newer = incarnation != self.linked
        self.linked = incarnation
        return newer or (self.link is None and not self.connecting)

    def take_all(self) -> list[TaskRecord]:
        """The actor is dead: everything unfinished is returned to fail."""
        tasks = list(self.inflight.values()) + list(self.queue)
        self.inflight.clear()
        self.queue.clear()
        return tasks

    @property
    def idle(self) -> bool:
        return not self.queue and not self.inflight
