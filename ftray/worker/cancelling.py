"""Cancelling tasks: at their owner, who finds a task wherever it is, and in the worker that has it.

Role: shell. `Canceller` is the owner's half, in every driver and worker; `WorkerCancels` acts on what an owner says, in
workers.

What has been cancelled ends in `TaskCancelledError`, whatever it does from then on: the owner marks the record, and
takes no value of a marked task. A task that has not been pushed fails at once. One that has been is answered for by
its worker: dropped if it has not begun, interrupted if it runs (`interrupts.py`), or, with `force`, killed with its
process.

Rules:
- Everything runs under the core's lock. The owner flushes the task channel before it sends a `CancelTask` on the peer
  link, and the worker reads its task channels before it acts on one, so that the push is there before the cancellation;
  where it is not (another node), the worker remembers the id for `FORGET_MS`.
- A worker kills itself for a forced cancellation only while it runs that very task, after it has cancelled the task's
  children and told its raylet the reason. Until it dies or says that it does not run it, the lease is `ending`: nothing
  is pushed, and its end is no crash. One that does not react (native code that keeps the interpreter lock) is killed by
  the owner after `FORCE_MS`.
- Children are found by the prefix of their ids, in the tables of the worker that submitted them.

Rejected: killing from the owner at once (the worker may have begun another task, and its children would not hear of
it); a set of children for each task (a cost for all tasks, for what is hardly ever asked).
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from typing import TYPE_CHECKING

from ftray.exceptions import TaskCancelledError
from ftray.ids import PUT_INDEX, RETURN_INDEX, children_prefix
from ftray.ownership.finding import QueueIndex
from ftray.ownership.streams import DROPPED
from ftray.wire.messages import (
    CancelObject,
    CancelTask,
    KillWorker,
    PushActorTask,
    PushTask,
    StreamRead,
    TaskFailed,
    TaskReturns,
)
from ftray.worker import waiting

if TYPE_CHECKING:
    from ftray.ownership.calls import ActorCalls
    from ftray.ownership.dispatch import Lease
    from ftray.ownership.tasks import TaskRecord
    from ftray.wire.reactor import Link
    from ftray.worker.core import Core
    from ftray.worker.execution import Executor

FORCE_MS = 250.0
"""How long a worker may take to react to a forced cancellation before its owner has it killed."""
FORGET_MS = 10_000.0
"""How long a worker remembers the cancellation of a task that it does not have."""
LOOK_AGAIN_MS = (1.0, 5.0, 50.0, 500.0)
"""When a worker looks again for a call of its actor that is to be cancelled and cannot be found."""
INDEX_MS = 1_000.0
"""How long what was read for finding queued tasks is kept."""
DRAIN_MS = 5.0
KILL_WAIT_S = 2.0
DIE_TRIES = 50
DIE_PAUSE_MS = 2.0


class Canceller:
    """See the module: the owner's half."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.forced: dict[int, set[bytes]] = {}
        """Leases that are ending -> tasks that were cancelled there with force."""
        self._indexes: dict[int, tuple[deque[TaskRecord], QueueIndex]] = {}
        self._forgetting = False

    # --- entries -----------------------------------------------------------------------------------------------------

    def cancel_object(self, object_id: bytes, force: bool, recursive: bool) -> None:
        """Cancels the task that makes an object known here, if it has not ended.

        Raises TypeError for an actor's handle object, ValueError for a `put` and for force on an actor call owned here.
        """
        core = self.core
        if object_id[16:] == PUT_INDEX:
            raise ValueError("the object was made by ftray.put: there is no task that could be cancelled")
        if object_id[16:] == RETURN_INDEX[0] and object_id[:16] in core.actors.calls:
            raise TypeError("the creation of an actor cannot be cancelled: end the actor with ftray.kill")
        entry = core.entries.get(object_id)
        if entry is None or entry.state != waiting.PENDING:
            return
        if entry.owner is not None:
            link = core.peers.link_to(entry.owner, entry.owner_endpoint)
            if link is not None:
                link.send(CancelObject(object_id, force, recursive))
            return
        self.cancel_task(object_id[:16], force, recursive)

    def cancel_task(self, task_id: bytes, force: bool, recursive: bool) -> None:
        """Cancels a task submitted here, if it has not ended. Raises ValueError for force on an actor call."""
        found = self._find(task_id)
        if found is None:
            return
        task, lease = found
        if force and task.actor is not None:
            raise ValueError(
                f"force=True is not for calls of actors ({task.function.name}): it would end the actor with all its "
                "state; use ftray.kill for that, or force=False"
            )
        self._cancel(task, lease, force, recursive)
        self.core.submitter.after()

    def asked(self, message: CancelObject) -> None:
        """A borrower wants the task cancelled that makes an object owned here."""
        entry = self.core.entries.get(message.object_id)
        if entry is None or entry.owner is not None or message.object_id[16:] == PUT_INDEX:
            return
        found = self._find(message.object_id[:16]) if entry.state == waiting.PENDING else None
        if found is not None:
            task, lease = found
            # Only the owner knows that it is a call of an actor, which force is not for.
            self._cancel(task, lease, message.force and task.actor is None, message.recursive)
            self.core.submitter.after()
            self.core.settle()

    def cancel_children(self, parent_id: bytes, force: bool) -> None:
        """Cancels what a task has submitted in this process, and all below."""
        core = self.core
        prefix = children_prefix(parent_id)
        submitter = core.submitter
        found: dict[bytes, tuple[TaskRecord, Lease | None]] = {}
        for lease in submitter.dispatcher.leases.values():
            for task_id, task in lease.inflight.items():
                if task_id.startswith(prefix):
                    found[task_id] = (task, lease)
        waiting_tasks = [*submitter.unfinished.values(), *submitter.oom.resting.values()]
        for cls in submitter.dispatcher.by_id.values():
            waiting_tasks += [task for task in cls.queue if not task.cancelled]
        for calls in core.actors.calls.values():
            waiting_tasks += [*calls.inflight.values(), *calls.queued()]
        for task in waiting_tasks:
            if task.task_id.startswith(prefix):
                found[task.task_id] = (task, None)
        for task, where in found.values():
            self._cancel(task, where, force and task.actor is None, True)
        if found:
            submitter.after()

    def error(self, task: TaskRecord) -> TaskCancelledError:
        """What a cancelled task ends in."""
        return TaskCancelledError(task.task_id.hex(), task.function.name)

    def discard(
        self, task: TaskRecord, message: TaskReturns | None = None, worker_id: bytes = b"", endpoint: str = ""
    ) -> None:
        """A cancelled task has returned all the same: lets go of its values and of the references in them."""
        core = self.core
        if message is not None:
            for index, value in enumerate(message.returns):
                if value.refs:
                    core.peers.ack_returns((worker_id, endpoint, task.task_id, task.attempt, index))
        core.submitter.fail(task, self.error(task))

    # --- one task ----------------------------------------------------------------------------------------------------

    def _cancel(self, task: TaskRecord, lease: Lease | None, force: bool, recursive: bool) -> None:
        core = self.core
        submitter = core.submitter
        calls: ActorCalls | None = task.actor
        if lease is not None and task.task_id not in lease.inflight:
            # Another one was cancelled just before, and writing to the worker has shown that it is dead.
            found = self._find(task.task_id)
            if found is None:
                return
            task, lease = found
        if lease is not None:
            task.cancelled = True
            if lease.link is not None:
                lease.link.flush()
            self._tell(lease.worker_id, lease.endpoint, CancelTask(task.task_id, force, recursive))
            if force:
                self._end_worker(lease, task)
            return
        if calls is not None and task.task_id in calls.inflight:
            task.cancelled = True
            if calls.link is not None:
                calls.link.flush()
                self._tell(calls.worker_id, calls.endpoint, CancelTask(task.task_id, False, recursive))
            return
        submitter.unfinished.pop(task.task_id, None)
        submitter.oom.resting.pop(task.task_id, None)
        if calls is not None:
            task.cancelled = True
            if any(task is each for each in core.actors.doomed.get(calls.actor_id, ())):
                return  # its actor's death, found in the same way, is about to fail it
            calls.take_out(task)
        elif not task.deps_left:
            submitter.dispatcher.cancel_queued(task)
        task.cancelled = True
        submitter.fail(task, self.error(task))
        if calls is not None:
            core.actors.pump(calls)

    def _tell(self, worker_id: bytes, endpoint: str, message: CancelTask) -> None:
        link = self.core.peers.link_to(worker_id, endpoint)
        if link is not None:
            link.send(message)

    # --- force -------------------------------------------------------------------------------------------------------

    def _end_worker(self, lease: Lease, task: TaskRecord) -> None:
        dispatcher = self.core.submitter.dispatcher
        if lease.lease_id not in dispatcher.leases:
            return  # it is dead already, as writing to it has shown
        dispatcher.end_worker(lease)
        self.forced.setdefault(lease.lease_id, set()).add(task.task_id)
        reason = f"{task.function.name} was cancelled with force"

        def insist() -> None:
            if lease.lease_id not in dispatcher.leases:
                self.forced.pop(lease.lease_id, None)
                return
            if task.task_id not in self.forced.get(lease.lease_id, ()):
                return
            if next(iter(lease.inflight), b"") == task.task_id:
                self.core.raylet.send(KillWorker(lease.worker_id, reason))
            self.core.reactor.call_later(FORCE_MS, insist)

        self.core.reactor.call_later(FORCE_MS, insist)

    def answered(self, lease: Lease, task_id: bytes) -> None:
        """The worker does not run this cancelled task (any more): it need not die for it."""
        tasks = self.forced.get(lease.lease_id)
        if tasks is not None:
            tasks.discard(task_id)
            if not tasks:
                del self.forced[lease.lease_id]
                self.core.submitter.dispatcher.spare_worker(lease)

    # --- finding -----------------------------------------------------------------------------------------------------

    def _find(self, task_id: bytes) -> tuple[TaskRecord, Lease | None] | None:
        """An unfinished task, and the lease that it was pushed to if it was."""
        submitter = self.core.submitter
        pushed = submitter.dispatcher.find_pushed(task_id)
        if pushed is not None:
            return pushed[1], pushed[0]
        task = submitter.unfinished.get(task_id) or submitter.oom.resting.get(task_id)
        if task is None:
            task = submitter.dispatcher.find_queued(task_id) or self._find_call(task_id)
            if not self._forgetting:
                self._forgetting = True
                self.core.reactor.call_later(INDEX_MS, self._forget)
        return None if task is None or (task.cancelled and not self._in_flight(task)) else (task, None)

    def _in_flight(self, task: TaskRecord) -> bool:
        return task.actor is not None and task.task_id in task.actor.inflight

    def _find_call(self, task_id: bytes) -> TaskRecord | None:
        actors = self.core.actors
        queues: list[deque[TaskRecord]] = []
        for calls in actors.calls.values():
            task: TaskRecord | None = calls.inflight.get(task_id) or calls.waiting.get(task_id)
            if task is not None:
                return task
            if calls.queue:
                queues.append(calls.queue)
            queues += [lane.queue for lane in calls.lanes.values() if lane.queue]
        for doomed in actors.doomed.values():
            for task in doomed:
                if task.task_id == task_id:
                    return None  # its actor's death is about to fail it
        for queue in queues:
            held = self._indexes.get(id(queue))
            if held is None:
                held = self._indexes[id(queue)] = (queue, QueueIndex())
            task = held[1].find(queue, task_id)
            if task is not None:
                return task
        for queue in queues:  # an actor's death may have put it back where the index does not look
            for task in queue:
                if task.task_id == task_id:
                    return task
        return None

    def _forget(self) -> None:
        self._forgetting = False
        self._indexes.clear()
        self.core.submitter.dispatcher.forget_index()


class WorkerCancels:
    """See the module: the worker's half."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._asked: dict[bytes, tuple[CancelTask, bytes]] = {}
        self._draining = False

    def take(self, message: CancelTask, owner: bytes) -> None:
        """An owner has cancelled a task. What arrives together is acted on together, with one look at the queue."""
        before = self._asked.get(message.task_id)
        if before is not None:
            message.force |= before[0].force
            message.recursive |= before[0].recursive
        if not self._asked:
            self.executor.core.reactor.call_later(0, self._act)
        self._asked[message.task_id] = (message, owner)

    def _act(self) -> None:
        executor = self.executor
        core = executor.core
        reactor = executor.reactor
        asked, self._asked = self._asked, {}
        # Known as cancelled first, looked for second: the main thread does it the other way round (`execute`).
        executor.cancelled.update(asked)
        parents = [(task_id, message.force) for task_id, (message, _) in asked.items() if message.recursive]
        dropped: list[tuple[Link, PushTask | PushActorTask]] = []
        with reactor.lock:
            reactor.handle(reactor.poll_events(0, 64))
            keep = []
            while executor.pending:
                item = executor.pending.popleft()
                link, push, _payload = item
                if link is not None and push.task_id in asked:
                    dropped.append((link, push))
                else:
                    keep.append(item)
            executor.pending.extend(keep)
            if keep:
                executor.wake()
        generators = executor.replies.generators
        for task_id, attempt in [key for key in tuple(generators.flows) if key[0] in asked]:
            generators.told(StreamRead(task_id, attempt, DROPPED))  # it ends where it stands
        for link, push in dropped:
            del asked[push.task_id]
            executor.replies.cancelled(link, push)
        for task_id, (message, owner) in asked.items():
            self._not_pending(task_id, message, owner)
        for task_id, force in parents:  # after it: they would wake it if it waits for them
            core.canceller.cancel_children(task_id, force)
        self._flush()
        core.settle()

    def _flush(self) -> None:
        """Writes what has been answered. The main thread may be busy for long, so that what the sockets do not take at
        once is written from here too."""
        reactor = self.executor.reactor
        with reactor.lock:
            reactor.flush_dirty()
            if not any(link.writing for link in reactor.links.values()):
                return
            reactor.handle(reactor.poll_events(0, 64))
        if not self._draining:
            self._draining = True
            self.executor.core.reactor.call_later(DRAIN_MS, self._drain)

    def _drain(self) -> None:
        self._draining = False
        self._flush()

    def _not_pending(self, task_id: bytes, message: CancelTask, owner: bytes) -> None:
        executor = self.executor
        if executor.actor is not None:
            self._cancel_call(task_id, 0)
            return
        running = executor.running
        if running is None or running.task_id != task_id:
            self._forget_later(task_id)
            if message.force:
                self._say_not_here(task_id, owner)
        elif message.force:
            core = executor.core
            core.reactor.call_later(0, lambda: self._die(running, owner, 0))
        else:
            executor.interrupts.interrupt(task_id)

    def _cancel_call(self, task_id: bytes, tries: int) -> None:
        """A call that the mode does not know has been answered, or is between the queue and the mode just now."""
        executor = self.executor
        core = executor.core
        if executor.actor is None or executor.actor.cancel(executor, task_id):
            return
        if tries == len(LOOK_AGAIN_MS):
            self._forget_later(task_id)
            return

        def again() -> None:
            if task_id in executor.cancelled:  # not answered meanwhile
                self._cancel_call(task_id, tries + 1)
                self._flush()

        core.reactor.call_later(LOOK_AGAIN_MS[tries], again)

    def _forget_later(self, task_id: bytes) -> None:
        """It has ended, or not come yet."""
        executor = self.executor

        def forget() -> None:
            running = executor.running
            if running is None or running.task_id != task_id:
                executor.cancelled.discard(task_id)

        executor.core.reactor.call_later(FORGET_MS, forget)

    def _say_not_here(self, task_id: bytes, owner: bytes) -> None:
        """If it has been here, its reply has gone out, or waits for registrations: the owner goes on to expect that."""
        reactor = self.executor.reactor
        with reactor.lock:
            for link in reactor.links.values():
                if link.peer is not None and link.peer.worker_id == owner:
                    link.send(TaskFailed(task_id, 0, cancelled=True, absent=True))

    def _die(self, running: PushTask | PushActorTask, owner: bytes, tries: int) -> None:
        """Kills this process for a forced cancellation; no reply leaves it any more."""
        executor = self.executor
        core = executor.core
        if tries < DIE_TRIES and any(link.out for link in core.peers.outgoing.values()):
            # The task's children are to hear of it first, on links that may have to be opened.
            core.reactor.call_later(DIE_PAUSE_MS, lambda: self._die(running, owner, tries + 1))
            return
        with executor.reactor.lock:
            if executor.running is running:
                executor.reactor.flush_dirty()
                reason = f"{executor.running_name()} was cancelled with force"
                core.raylet.send(KillWorker(core.worker_id, reason))
                core.settle()
                time.sleep(KILL_WAIT_S)
                os.kill(os.getpid(), signal.SIGKILL)
        self._say_not_here(running.task_id, owner)  # it has ended: the reply is on its way
