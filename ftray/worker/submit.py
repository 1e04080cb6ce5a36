"""Submitting tasks: from a call to a frame on a worker's channel, and from its reply to a value.

Role: shell around `ownership/dispatch.py`. The frame of a task without dependencies is encoded at submission; a task
with some waits for them and is encoded when they are there, with small values inline.

Output is batched, never delayed: the first task on an idle channel is sent at once, the following ones when 8 KB have
gathered, and the rest with the first reply, the next blocking call or the next tick, whichever comes first.

Rejected: a flush for each task (a system call of 5 us each); waking the loop to flush (it would compete for the
interpreter lock with the thread that submits).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ftray.exceptions import DeathCause, FtrayError, TaskUnschedulableError, WorkerCrashedError
from ftray.gcs.state.commands import JobKvPut
from ftray.gcs.state.tables import Code
from ftray.ids import RETURN_INDEX, return_id
from ftray.ownership.dispatch import ClassQueue, Lease, TaskDispatcher
from ftray.ownership.references import Entry
from ftray.ownership.tasks import FunctionInfo, TaskRecord
from ftray.wire.frames import PREFIX
from ftray.wire.handshake import ROLE_TASK
from ftray.wire.messages import (
    IN_STORE,
    INLINE,
    AskDeathCause,
    Dependency,
    KillWorker,
    LeaseDemand,
    LeaseGranted,
    LeaseInfeasible,
    Message,
    PushActorTask,
    PushTask,
    ReturnLeases,
    TaskDone,
    TaskFailed,
    TaskReturns,
    TasksReturned,
    TaskYield,
    decode,
    encode,
)
from ftray.wire.reactor import Link
from ftray.worker import waiting
from ftray.worker.call_sites import note_site
from ftray.worker.oom_retries import OomRetries
from ftray.worker.peers import value_of

if TYPE_CHECKING:
    from ftray.worker.core import Core

log = logging.getLogger("ftray.worker")

INDEX0 = RETURN_INDEX[0]
FLUSH_BYTES = 8192
_ENDS = frozenset(("builtins.SystemExit", "ftray.exceptions.ActorExit"))
"""What ends a worker from inside a task: never repeated."""
FUNCTIONS = "functions"
"""The key-value namespace of exported functions and classes."""


class DependencyWaiter:
    """Counts down a task's dependencies."""

    __slots__ = ("core", "task")

    def __init__(self, core: Core, task: TaskRecord) -> None:
        self.core = core
        self.task = task

    def ready(self, object_id: bytes, entry: Entry) -> None:
        task = self.task
        task.deps_left -= 1
        if task.deps_left == 0:
            self.core.submitter.dependencies_ready(task)


class Submitter:
    """See the module. Methods run under the core's lock unless they say otherwise."""

    def __init__(self, core: Core) -> None:
        self.core = core
        config = core.config
        self.dispatcher = TaskDispatcher(
            config.lease_want_max, config.pipeline_depth_max, config.pipeline_work_ms * 1000.0
        )
        self.channels: dict[bytes, Link] = {}
        """Worker -> open task channel, kept over leases."""
        self.linger_ticks = max(1, config.lease_linger_ms // config.recall_after_ms)
        self.unfinished: dict[bytes, TaskRecord] = {}
        """Tasks with dependencies that are not there yet."""
        self.infeasible_classes: dict[int, str] = {}
        self.exporting: dict[bytes, str] = {}
        self.oom = OomRetries(core)

    # --- submission --------------------------------------------------------------------------------------------------

    def export(self, function: FunctionInfo, data: bytes) -> None:
        """Stores a function or class in the GCS, once, for as long as its job lasts. Not under the lock.

        Raises ValueError when it is too large.
        """
        core = self.core
        core.check_entry()
        if len(data) > core.config.value_bytes_max:
            raise ValueError(
                f"{function.name} is {len(data):,} bytes when serialised, over the limit of "
                f"{core.config.value_bytes_max:,}: it captures a large object; pass it with ftray.put() instead"
            )
        with core.lock:
            function.exported = True
            core.gcs.command(JobKvPut(core.job_id, FUNCTIONS, function.function_id, data), self._exported)
            core.reactor.flush_dirty()

    def _exported(self, result: Any) -> None:
        if result is not None and result.code not in (Code.OK, Code.ENDED) and not self.core.closed:
            log.error("the GCS refused a function: %s %s", result.code, result.message)

    def submit(self, task: TaskRecord, payload: bytes) -> None:
        """Enters the returns (one local reference each) and sends the task on its way. Not under the lock."""
        core = self.core
        if core.inside():
            core.check_entry()
        entries = core.entries
        task_id = task.task_id
        if not task.deps:
            function = task.function
            header = encode(
                PushTask(
                    task_id, function.function_id, task.num_returns, 0, len(payload), (), "", task.ahead_max,
                    function.max_calls,
                )
            )
            task.frame = PREFIX.pack(len(header), len(payload)) + header + payload
        with core.lock:
            if core.released:
                core.drain()
            if core.closed:
                raise FtrayError(f"this session is over: {core.close_reason}")
            if task.num_returns == 1:
                entries[task_id + INDEX0] = Entry(None, "", 1)
            elif task.num_returns < 0:
                core.streams.open(task)
            else:
                for index in range(task.num_returns):
                    core.table.add_owned(return_id(task_id, index))
            if task.holds:
                core.table.add_submitted(task.holds)
            if not core._ticking:
                core.tick_soon()
            if core.sites is not None:
                note_site(core, task_id + INDEX0)
            if task.deps and self._waits(task, payload):
                core.settle()
                return
            dispatcher = self.dispatcher
            dispatcher.enqueue(task)
            if dispatcher.pushes:
                self.push()
            if dispatcher.demands:
                if task.cls is not None and task.cls.class_id in self.infeasible_classes:
                    self._infeasible_again(task.cls)
                self.say_demands()

    def _waits(self, task: TaskRecord, payload: bytes) -> bool:
        """Hangs a task on its pending dependencies; True when there are any (or one has failed)."""
        core = self.core
        task.args = payload
        left = 0
        failed: Entry | None = None
        waiter = DependencyWaiter(core, task)
        for _, object_id in task.deps:
            entry = core.entries[object_id]
            if entry.state == waiting.PENDING:
                left += 1
                core.objects.hang(object_id, entry, waiter)
            elif entry.state == waiting.FAILED and failed is None:
                failed = entry
        task.deps_left = left
        if left:
            self.unfinished[task.task_id] = task
            return True
        if failed is not None:
            self.fail(task, failed.value)
            return True
        return False

    def dependencies_ready(self, task: TaskRecord) -> None:
        """The last dependency has come."""
        if task.cancelled:
            return
        self.unfinished.pop(task.task_id, None)
        for _, object_id in task.deps:
            entry = self.core.entries.get(object_id)
            if entry is not None and entry.state == waiting.FAILED:
                if task.actor is not None:
                    self.core.actors.drop_call(task)
                self.fail(task, entry.value)
                return
        if task.actor is not None:
            task.actor.ready(task)
            self.core.actors.pump(task.actor)
            return
        self.dispatcher.enqueue(task)
        self.push()
        self.say_demands()

    def frame(self, task: TaskRecord) -> bytes:
        """The push frame of a task whose dependencies are there; values that are small travel with it."""
        if task.frame and task.attempt == 0:
            return task.frame
        if task.frame:
            header_len, _ = PREFIX.unpack_from(task.frame)
            message: Any = decode(task.frame[8 : 8 + header_len])
            message.attempt = task.attempt
            header = encode(message)
            payload = task.frame[8 + header_len :]
            return PREFIX.pack(len(header), len(payload)) + header + payload
        deps: list[Dependency] = []
        parts = [task.args]
        core = self.core
        for position, object_id in task.deps:
            entry = core.entries[object_id]
            value, data = value_of(entry)
            if value.kind == INLINE and b"ftray" not in data:
                # Nothing inside that somebody would have to be asked about: the worker need not know whose it is.
                deps.append(Dependency(position, object_id, b"", "", value))
            else:
                owner, endpoint = entry.owner or core.worker_id, entry.owner_endpoint or core.endpoint
                deps.append(Dependency(position, object_id, owner, endpoint, value))
            if data:
                parts.append(data)
        payload = b"".join(parts)
        if task.actor is not None:
            header = encode(
                PushActorTask(
                    task.task_id, task.actor.actor_id, task.method, task.num_returns, task.attempt, len(task.args),
                    tuple(deps), task.group, task.ahead_max,
                )
            )  # fmt: skip
        else:
            header = encode(
                PushTask(
                    task.task_id, task.function.function_id, task.num_returns, task.attempt, len(task.args),
                    tuple(deps), ahead_max=task.ahead_max, max_calls=task.function.max_calls,
                )
            )  # fmt: skip
        return PREFIX.pack(len(header), len(payload)) + header + payload

    def push(self) -> None:
        """Sends what the dispatcher decided."""
        core = self.core
        dirty = core.reactor.dirty
        pushes = self.dispatcher.pushes
        while pushes:
            batch = pushes[:]
            pushes.clear()
            for lease, task in batch:
                link = lease.link
                if link is None:
                    link = self._open(lease)
                    if link is None:
                        continue  # the worker is gone, its tasks are queued again
                elif link.closed:
                    continue
                out = link.out
                out += task.frame if task.attempt == 0 and task.frame else self.frame(task)
                if len(lease.inflight) == 1 or len(out) > FLUSH_BYTES:
                    link.flush()
                elif not link.dirty:
                    link.dirty = True
                    dirty.append(link)

    def _open(self, lease: Lease) -> Link | None:
        link = self.channels.get(lease.worker_id)
        if link is None or link.closed:
            try:
                link = self.core.reactor.connect(lease.endpoint, ROLE_TASK, self)
            except OSError as error:
                self._lease_lost(lease, str(error))
                return None
            link.send(self.core.peers.hello())
            self.channels[lease.worker_id] = link
        lease.link = link
        link.tag = lease
        return link

    def say_demands(self) -> None:
        """Sends changed demands and returned leases to the raylet, at once."""
        dispatcher = self.dispatcher
        raylet = self.core.raylet
        if dispatcher.returns:
            raylet.send(ReturnLeases(tuple(dispatcher.returns)))
            dispatcher.returns.clear()
        if dispatcher.lagging:
            dispatcher.demands.update(dispatcher.lagging)
            dispatcher.lagging.clear()
        if dispatcher.demands:
            for cls in dispatcher.demands.values():
                cls.said = cls.want
                raylet.send(
                    LeaseDemand(
                        cls.class_id, cls.want, None if cls.declared else cls.resources, cls.name,
                        "" if cls.declared else cls.environment, cls.retriable,
                    )
                )  # fmt: skip
                cls.declared = True
            dispatcher.demands.clear()
        if raylet.link is not None and raylet.link.dirty:
            raylet.link.flush()

    # --- from the raylet ---------------------------------------------------------------------------------------------

    def granted(self, message: LeaseGranted) -> None:
        dispatcher = self.dispatcher
        cls = dispatcher.by_id.get(message.class_id)
        if cls is None:
            self.core.raylet.send(ReturnLeases((message.lease_id,)))
            return
        self.infeasible_classes.pop(message.class_id, None)
        lease = Lease(message.lease_id, cls, message.worker_id, message.endpoint, message.node_id, message.pid)
        dispatcher.grant(message.class_id, lease)
        self.after()
        self.core.tick_soon()

    def reclaim(self, lease_id: int) -> None:
        self.dispatcher.reclaim(lease_id)
        self.after()

    def after(self) -> None:
        """Carries out everything that the dispatcher has decided."""
        self.push()
        dispatcher = self.dispatcher
        if dispatcher.ended:
            ended, dispatcher.ended = dispatcher.ended, []
            for task in ended:
                self.fail(task, self.core.canceller.error(task))
        if dispatcher.recalls:
            for lease, task_ids in dispatcher.recalls:
                self.core.peers.recall(lease.worker_id, lease.endpoint, task_ids)
            dispatcher.recalls.clear()
        if dispatcher.demands or dispatcher.returns:
            self.say_demands()

    def infeasible(self, message: LeaseInfeasible) -> None:
        """No node could ever run this class: say so now, fail its tasks if that has not changed in a while."""
        cls = self.dispatcher.by_id.get(message.class_id)
        if cls is None:
            return
        if message.class_id not in self.infeasible_classes:
            log.warning(
                "%s cannot be scheduled: %s. It fails in %.1f s unless a node that fits joins.",
                cls.name, message.missing, self.core.config.infeasible_timeout_ms / 1000.0,
            )  # fmt: skip
        self.infeasible_classes[message.class_id] = message.missing
        self._infeasible_again(cls)

    def _infeasible_again(self, cls: ClassQueue) -> None:
        def fail() -> None:
            missing = self.infeasible_classes.get(cls.class_id)
            if missing is None or cls.leases:
                return
            for task in self.dispatcher.withdraw(cls.class_id):
                self.fail(task, TaskUnschedulableError(f"{task.function.name} cannot be scheduled: {missing}"))
            self.after()

        self.core.reactor.call_later(self.core.config.infeasible_timeout_ms, fail)

    def tick(self) -> bool:
        """Housekeeping; True while there is more to keep."""
        busy = self.dispatcher.tick(self.linger_ticks)
        self.after()
        if self.dispatcher.lagging:
            self.say_demands()
        return busy or bool(self.unfinished)

    # --- replies -----------------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        lease: Lease = link.tag
        kind = type(message)
        if kind is TaskDone:
            dispatcher = self.dispatcher
            task_id = message.task_id  # type: ignore[attr-defined]
            task = dispatcher.done(lease, task_id, message.work_us)  # type: ignore[attr-defined]
            if task is not None:
                if task.cancelled:
                    self.core.canceller.discard(task)
                    self.after()
                    return
                object_id = task_id + INDEX0
                entry = self.core.entries.get(object_id)
                if entry is not None:
                    entry.state = waiting.INLINE
                    entry.value = payload
                    if entry.waiters is not None:
                        waiters: Any = entry.waiters
                        entry.waiters = None
                        for waiter in waiters:
                            waiter.ready(object_id, entry)
                if task.holds or task.attempt:
                    self.release(task)
            if dispatcher.pushes or dispatcher.returns:
                self.after()
        elif kind is TaskYield:
            self.core.streams.item(message, payload, lease.worker_id, lease.endpoint)  # type: ignore[arg-type]
        elif isinstance(message, TaskReturns):
            if message.exits:
                self.channels.pop(lease.worker_id, None)
                task = self.dispatcher.leaving(lease, message.task_id)
            else:
                task = self.dispatcher.done(lease, message.task_id, message.work_us)
            if task is not None:
                self.finish(task, message, payload, lease.worker_id, lease.endpoint)
            self.after()
        elif isinstance(message, TaskFailed):
            if message.exits:
                self.channels.pop(lease.worker_id, None)
                task = self.dispatcher.leaving(lease, message.task_id)
            elif message.absent:
                task = None
            else:
                task = self.dispatcher.done(lease, message.task_id, message.work_us)
            if message.cancelled:
                self.core.canceller.answered(lease, message.task_id)
            if task is not None:
                self.failed(task, message, payload)
            self.after()
        elif isinstance(message, TasksReturned):
            self.dispatcher.handed_back(lease, message.task_ids, message.blocked)
            self.after()
        else:
            self.core.reactor.drop(link, f"a worker answered with an unexpected {kind.__name__}")

    def finish(self, task: TaskRecord, message: TaskReturns, payload: Any, worker_id: bytes, endpoint: str) -> None:
        """A task's returns have arrived: enters them, takes over the references in them, lets go of its arguments."""
        core = self.core
        if task.cancelled:
            core.canceller.discard(task, message, worker_id, endpoint)
            return
        offset = 0
        entries, resolve, task_id = core.entries, core.objects.resolve, task.task_id
        payload = bytes(payload)
        for index, value in enumerate(message.returns):
            object_id = return_id(task_id, index)
            if value.kind == INLINE and not value.refs:
                end = offset + value.size
                entry = entries.get(object_id)
                if entry is not None and entry.state == waiting.PENDING:
                    resolve(object_id, entry, waiting.INLINE, payload[offset:end])
                offset = end
                continue
            if value.refs:
                token = (worker_id, endpoint, task_id, task.attempt, index)
                inner = [(ref.object_id, ref.owner, ref.endpoint) for ref in value.refs]
                core.table.receive_contained(object_id, inner, token)
            if value.kind == IN_STORE:
                core.objects.take_value(object_id, value, b"")
            else:
                core.objects.take_value(object_id, value, payload[offset : offset + value.size])
                offset += value.size
        if task.num_returns < 0:
            core.streams.ended(task, message.yielded)
        self.release(task)

    def failed(self, task: TaskRecord, message: TaskFailed, payload: bytes | bytearray) -> None:
        """The function raised: again, if that is allowed."""
        if message.cancelled:
            task.cancelled = True
        allowed = task.retry_exceptions
        if allowed is not True and allowed:
            allowed = any(name in allowed for name in message.mro)
        if allowed and not (message.exits and _ENDS.intersection(message.mro)) and task.spend_retry():
            if task.actor is not None:
                task.actor.again(task)
                self.core.actors.pump(task.actor)
            else:
                self.dispatcher.requeue([task])
            return
        self.fail(task, bytes(payload))

    def fail(self, task: TaskRecord, error: object) -> None:
        """Makes all returns of a task `error` (packed bytes or an exception), and lets go of its arguments."""
        core = self.core
        if task.cancelled:
            error = core.canceller.error(task)
        if task.deps:
            self.unfinished.pop(task.task_id, None)
        for index in range(task.num_returns):
            object_id = return_id(task.task_id, index)
            entry = core.entries.get(object_id)
            if entry is not None and entry.state == waiting.PENDING:
                core.objects.resolve(object_id, entry, waiting.FAILED, error)
            if isinstance(error, Exception) or task.num_returns > 1:
                core.objects.free_in_store(object_id)  # it may have been written before what failed the task
        if task.num_returns < 0:
            core.streams.failed(task, error)
        self.release(task)

    def release(self, task: TaskRecord) -> None:
        if self.oom.spent:
            self.oom.ended(task.task_id)
        if task.attempt:
            self.core.objects.free_leftovers(task.task_id, task.num_returns)
        if task.holds:
            holds, task.holds = task.holds, ()
            self.core.table.remove_submitted(holds)
            if self.core.table.effects:
                self.core.run_effects()

    # --- deaths ------------------------------------------------------------------------------------------------------

    def on_closed(self, link: Link, reason: str) -> None:
        lease = link.tag
        if isinstance(lease, Lease):
            self._lease_lost(lease, reason)
        if link.error is not None:
            log.error("a worker refused the task channel: %s", link.error)

    def _lease_lost(self, lease: Lease, reason: str) -> None:
        """The worker died: what it had goes to another one, or fails with the cause of its death."""
        self.channels.pop(lease.worker_id, None)
        if lease.lease_id not in self.dispatcher.leases:
            return
        tasks = self.dispatcher.lost(lease)
        # If it lives (only the channel broke), it must not go on with what others are about to run.
        self.core.raylet.send(KillWorker(lease.worker_id, f"the channel to its owner broke: {reason}"))
        again: list[TaskRecord] = []
        failing: list[TaskRecord] = []
        self.core.canceller.forced.pop(lease.lease_id, None)
        for index, task in enumerate(tasks):
            if task.cancelled:
                self.fail(task, None)
            elif index == 0 and lease.doomed:
                self.oom.take(lease, task)
            elif index == 0 and not lease.ending:
                (again if task.spend_retry() else failing).append(task)
            else:
                task.attempt += 1
                again.append(task)
        self.dispatcher.requeue(again)
        if failing:
            self.fail_with_cause(failing, lease.worker_id, reason, lambda task, cause: WorkerCrashedError(cause))
        self.after()
        self.core.settle()

    def fail_with_cause(
        self,
        tasks: Iterable[TaskRecord],
        worker_id: bytes,
        reason: str,
        make: Callable[[TaskRecord, DeathCause | str], Exception],
    ) -> None:
        """Asks the raylet why a worker died, then fails the tasks with that."""

        def known(message: Any, payload: Any) -> None:
            cause: DeathCause | str = f"the worker's connection closed: {reason}"
            if message is not None and message.cause is not None:
                cause = DeathCause(**message.cause)
            for task in tasks:
                text = cause
                if isinstance(cause, DeathCause):
                    text = DeathCause(
                        cause.node_id, cause.pid, cause.worker_id, cause.exit_code, cause.signal,
                        task.function.name, cause.stderr_tail, cause.reason,
                    )  # fmt: skip
                self.fail(task, make(task, text))
            self.core.settle()

        self.core.raylet.request(lambda request: AskDeathCause(request, worker_id), known)
