"""Actors made and called by this process: creation, calls, restarts, end of scope.

Role: shell around `ownership/calls.py`. An actor's life is the GCS's business; this process watches the actors that it
has handles of, connects to where they live, and pushes calls over one channel each. Handles are counted as references
to the actor's handle object (return 0 of its creation); when that is freed at the owner, the actor goes out of scope.

Calls in flight when the channel closes wait for the GCS's word on the cause, so that the error says what happened.

Rejected: calls through the raylet (two hops more); asking the GCS for each call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ftray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    DeathCause,
    FtrayError,
    GcsUnavailableError,
)
from ftray.gcs.state.commands import ActorOutOfScope, DeathCauseRecord, KillActor, KvDelete, RegisterActor
from ftray.gcs.state.tables import ActorRecord, ActorState, DeathKind
from ftray.ids import RETURN_INDEX, return_id
from ftray.ownership.calls import ALIVE, DEAD, RESTARTING, ActorCalls
from ftray.ownership.references import Entry
from ftray.ownership.tasks import FunctionInfo, TaskRecord
from ftray.wire.frames import PREFIX
from ftray.wire.handshake import ROLE_TASK
from ftray.wire.messages import (
    ActorCreation,
    Dependency,
    Message,
    PushActorTask,
    TaskDone,
    TaskFailed,
    TaskReturns,
    encode,
)
from ftray.wire.reactor import Link
from ftray.worker import waiting
from ftray.worker.failures import load_task_error
from ftray.worker.gcs_access import HANDLES
from ftray.worker.objects import Answer
from ftray.worker.peers import value_of
from ftray.worker.submit import FLUSH_BYTES, DependencyWaiter
from ftray.worker.waiting import block

if TYPE_CHECKING:
    from ftray.worker.core import Core

log = logging.getLogger("ftray.worker")

INDEX0 = RETURN_INDEX[0]
_STATES = {ActorState.ALIVE: ALIVE, ActorState.RESTARTING: RESTARTING, ActorState.DEAD: DEAD}
LOOK_AGAIN_MS = 1_000
NONE_PICKLED = b"\x80\x05N."


def cause_of(record: DeathCauseRecord | None) -> DeathCause | None:
    """The record of a death as exceptions carry it."""
    if record is None:
        return None
    return DeathCause(
        record.node_id, record.pid, record.worker_id, record.exit_code, record.signal, record.what,
        tuple(record.stderr_tail), record.reason,
    )  # fmt: skip


class CreationWaiter:
    """Counts down the references among a constructor's arguments."""

    __slots__ = ("fn", "left")

    def __init__(self, left: int, fn: Callable[[], None]) -> None:
        self.left = left
        self.fn = fn

    def ready(self, object_id: bytes, entry: Entry) -> None:
        self.left -= 1
        if self.left == 0:
            self.fn()


class ActorClient:
    """See the module. Methods run under the core's lock unless they say otherwise."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.calls: dict[bytes, ActorCalls] = {}
        self.created: dict[bytes, tuple[bytes, ...]] = {}
        """Actors made here and not detached -> the object ids that their constructors' arguments hold."""
        self.doomed: dict[bytes, list[TaskRecord]] = {}

    # --- creation ----------------------------------------------------------------------------------------------------

    def create(
        self,
        creation: ActorCreation,
        register: RegisterActor,
        deps: tuple[tuple[int | str, bytes], ...],
        holds: tuple[bytes, ...],
        wait: bool,
    ) -> bytes:
        """Registers an actor, and returns its id (another's with `get_if_exists`). Not under the lock.

        With `wait` (named actors) the GCS's answer is waited for. Raises ValueError when the name is taken.
        """
        core = self.core
        actor_id = creation.task_id
        answer = Answer()

        def answered(result: Any) -> None:
            if result is None:
                self._dead(
                    actor_id, GcsUnavailableError(f"actor {creation.class_name} was not created: no GCS answers")
                )
            elif result.code and not wait:
                self._dead(
                    actor_id, ActorDiedError(f"it was not created: {result.message}", class_name=creation.class_name)
                )
            answer.give(result)

        def send() -> None:
            inline: list[bytes] = []
            packed: list[Dependency] = []
            for position, object_id in deps:
                entry = core.entries[object_id]
                if entry.state == waiting.FAILED:
                    error: Any = entry.value
                    self._dead(actor_id, error)
                    answer.give(None)
                    return
                value, data = value_of(entry)
                packed.append(
                    Dependency(
                        position, object_id, entry.owner or core.worker_id, entry.owner_endpoint or core.endpoint, value
                    )
                )
                inline.append(data)
            creation.deps, creation.inline = tuple(packed), tuple(inline)
            core.gcs.command(_with_creation(register, creation), answered)

        with core.lock:
            core.drain()
            entry = core.table.add_owned(actor_id + INDEX0)
            if entry.state == waiting.PENDING:
                core.objects.resolve(actor_id + INDEX0, entry, waiting.INLINE, NONE_PICKLED)
            if holds:
                core.table.add_submitted(holds)
            self.watch(actor_id, creation.class_name).name_kept = bool(register.name)
            if not register.detached:
                self.created[actor_id] = holds
            left = 0
            waiter = CreationWaiter(0, send)
            for _, object_id in deps:
                dep = core.entries[object_id]
                if dep.state == waiting.PENDING:
                    left += 1
                    core.objects.hang(object_id, dep, waiter)
            waiter.left = left
            if not left:
                send()
            core.tick_soon()
            core.settle()
        if not wait:
            return actor_id
        block(core.reactor, answer.waiter, None)
        result = answer.message
        if result is None:
            with core.lock:
                cause = calls.cause if (calls := self.calls.get(actor_id)) is not None else None
                self.not_made(actor_id)
                core.table.remove_local(actor_id + INDEX0)
                core.settle()
            if isinstance(cause, bytes):
                raise load_task_error(cause)
            if isinstance(cause, Exception):
                raise cause
            raise GcsUnavailableError(f"actor {creation.class_name} could not be registered")
        if result.code:
            with core.lock:
                self.not_made(actor_id)
                core.table.remove_local(actor_id + INDEX0)
                core.settle()
            core.check_open()
            raise ValueError(f"actor {register.name!r} cannot be created: {result.message}")
        return actor_id if not result.value else bytes(result.value)

    def not_made(self, actor_id: bytes) -> None:
        """The name is another actor's: there is nothing to end."""
        self._let_go_of_arguments(actor_id)
        self.created.pop(actor_id, None)
        self._forget(actor_id)

    def watch(self, actor_id: bytes, class_name: str) -> ActorCalls:
        """The call queue of an actor, made (and its record watched) at first use."""
        calls = self.calls.get(actor_id)
        if calls is None:
            calls = ActorCalls(actor_id, class_name, actor_id + INDEX0)
            self.calls[actor_id] = calls
            self.core.gcs.watch_actor(actor_id, self.changed)
        return calls

    def handle_freed(self, object_id: bytes) -> None:
        """No handle is left, here or (for an actor made here) anywhere."""
        actor_id = object_id[:16]
        if actor_id not in self.calls:
            return
        holds = self.created.pop(actor_id, None)
        if holds is not None:
            if holds:
                self.core.table.remove_submitted(holds)
            if self.calls[actor_id].name_kept:
                self.core.gcs.command(KvDelete(HANDLES, actor_id), lambda result: None)
            if self.calls[actor_id].state != DEAD:
                self.core.gcs.command(ActorOutOfScope(actor_id, self.core.worker_id), lambda result: None)
        self._forget(actor_id)

    def _forget(self, actor_id: bytes) -> None:
        calls = self.calls.pop(actor_id, None)
        if calls is not None:
            self.core.gcs.unwatch_actor(actor_id)
            if calls.link is not None:
                link, calls.link = calls.link, None
                link.tag = None
                link.close("no handle is left")

    def kill(self, actor_id: bytes, no_restart: bool) -> None:
        """Ends an actor now. Not under the lock. Raises GcsUnavailableError."""
        core = self.core
        answer = Answer()
        with core.lock:
            core.drain()
            core.gcs.command(KillActor(actor_id, no_restart, "killed by ftray.kill"), answer.give)
            core.settle()
        block(core.reactor, answer.waiter, None)
        if answer.message is None:
            raise GcsUnavailableError("the actor could not be killed: no GCS answers")
        core.check_open()

    # --- calls -------------------------------------------------------------------------------------------------------

    def submit(self, calls: ActorCalls, task: TaskRecord, payload: bytes) -> None:
        """Sends a call on its way, in order. Not under the lock."""
        core = self.core
        task_id = task.task_id
        task.actor = calls
        if not task.deps:
            header = encode(PushActorTask(task_id, calls.actor_id, task.method, task.num_returns, 0, len(payload)))
            task.frame = PREFIX.pack(len(header), len(payload)) + header + payload
        with core.lock:
            if core.released:
                core.drain()
            if core.closed:
                raise FtrayError(f"this session is over: {core.close_reason}")
            if task.num_returns == 1:
                core.entries[task_id + INDEX0] = Entry(None, "", 1)
            else:
                for index in range(task.num_returns):
                    core.table.add_owned(return_id(task_id, index))
            core.table.add_submitted(task.holds)
            if not core._ticking:
                core.tick_soon()
            if calls.state == DEAD:
                core.submitter.fail(task, self._death_error(calls))
                return
            if task.deps:
                self._hang(task, payload)
            calls.queue.append(task)
            if calls.link is not None:
                self.pump(calls)
            if core.table.effects or core.objects.resolving:
                core.settle()

    def _hang(self, task: TaskRecord, payload: bytes) -> None:
        core = self.core
        task.args = payload
        left = 0
        waiter = DependencyWaiter(core, task)
        for _, object_id in task.deps:
            entry = core.entries[object_id]
            if entry.state == waiting.PENDING:
                left += 1
                core.objects.hang(object_id, entry, waiter)
        task.deps_left = left
        if left:
            core.submitter.unfinished[task.task_id] = task

    def drop_call(self, task: TaskRecord) -> None:
        """A queued call will not be made: an argument has failed."""
        calls: ActorCalls = task.actor
        if task in calls.queue:
            calls.queue.remove(task)
        self.pump(calls)

    def pump(self, calls: ActorCalls) -> None:
        """Sends what may go now."""
        calls.pump()
        link = calls.link
        pushes = calls.pushes
        if not pushes or link is None:
            return
        submitter = self.core.submitter
        batch = pushes[:]
        pushes.clear()
        out = link.out
        first = len(calls.inflight) == len(batch)
        dropped = False
        for task in batch:
            if task.deps:
                failed = next((e for _, x in task.deps if (e := self.core.entries[x]).state == waiting.FAILED), None)
                if failed is not None:
                    calls.inflight.pop(task.task_id, None)
                    submitter.fail(task, failed.value)
                    dropped = True
                    continue
            out += task.frame if task.attempt == 0 and task.frame else submitter.frame(task)
        if first or len(out) > FLUSH_BYTES:
            link.flush()
        elif not link.dirty:
            link.dirty = True
            self.core.reactor.dirty.append(link)
        if dropped and calls.queue:
            self.pump(calls)  # what failed here has made room, and no reply will come that would pump again

    # --- replies -----------------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        calls: ActorCalls | None = link.tag
        if calls is None:
            return
        core = self.core
        kind = type(message)
        task_id: bytes = message.task_id  # type: ignore[attr-defined]
        task = calls.inflight.pop(task_id, None)
        if calls.queue:
            self.pump(calls)
        if task is None:
            return
        if kind is TaskDone:
            object_id = task_id + INDEX0
            entry = core.entries.get(object_id)
            if entry is not None:
                entry.state = waiting.INLINE
                entry.value = payload
                if entry.waiters is not None:
                    waiters: Any = entry.waiters
                    entry.waiters = None
                    for waiter in waiters:
                        waiter.ready(object_id, entry)
            core.submitter.release(task)
        elif isinstance(message, TaskReturns):
            core.submitter.finish(task, message, payload, calls.worker_id, calls.endpoint)
        elif isinstance(message, TaskFailed):
            if message.exits:
                self.doomed.setdefault(calls.actor_id, []).append(task)  # its error is the actor's end, which follows
            else:
                core.submitter.failed(task, message, payload)
        else:
            core.reactor.drop(link, f"an actor answered with an unexpected {kind.__name__}")

    # --- lives and deaths --------------------------------------------------------------------------------------------

    def changed(self, record: ActorRecord | None, actor_id: bytes) -> None:
        """The GCS has news of an actor (None: it does not know it)."""
        calls = self.calls.get(actor_id)
        if calls is None or record is None:
            return
        state = _STATES.get(record.state, calls.state if calls.state != ALIVE else RESTARTING)
        cause: Any = None
        if record.state == ActorState.DEAD:
            cause = record
        link = calls.link
        renewed = False
        if calls.update(state, record.incarnation, record.worker_id, record.node_id, record.endpoint, cause):
            renewed = True
            if link is not None:
                # The old life's channel may not have closed yet; its calls are settled by its loss.
                link.tag = None
                self._lost(calls, "the actor was restarted")
                link.close("the actor was restarted")
            self._connect(calls)
        if actor_id in self.doomed and (calls.state != ALIVE or renewed):
            self._fail_doomed(calls)
        if calls.state == DEAD:
            self._end(calls)
        elif record.state == ActorState.ALIVE and 0 <= record.max_restarts <= record.restarts:
            self._let_go_of_arguments(actor_id)  # no constructor will run again

    def _connect(self, calls: ActorCalls) -> None:
        core = self.core
        try:
            link = core.reactor.connect(calls.endpoint, ROLE_TASK, self)
        except OSError:
            return  # it has died again: the GCS will say so
        link.tag = calls
        link.send(core.peers.hello())
        calls.link = link
        self.pump(calls)
        link.flush()

    def on_closed(self, link: Link, reason: str) -> None:
        calls = link.tag
        if isinstance(calls, ActorCalls) and calls.link is link:
            self._lost(calls, reason)
            if calls.state != ALIVE:
                self._fail_doomed(calls)
            else:
                self._look_again(calls)
        self.core.settle()

    def _look_again(self, calls: ActorCalls) -> None:
        """The channel broke. If no news of a death comes, the actor lives (it read too slowly, say): connect anew."""
        incarnation = calls.incarnation

        def again() -> None:
            same = self.calls.get(calls.actor_id) is calls and calls.incarnation == incarnation
            if same and calls.state == ALIVE and calls.link is None:
                self._fail_doomed(calls)
                self._connect(calls)
                if calls.link is None:
                    self._look_again(calls)

        self.core.reactor.call_later(LOOK_AGAIN_MS, again)

    def _lost(self, calls: ActorCalls, reason: str) -> None:
        failed = calls.lost()
        if failed:
            self.doomed.setdefault(calls.actor_id, []).extend(failed)

    def _fail_doomed(self, calls: ActorCalls) -> None:
        for task in self.doomed.pop(calls.actor_id, ()):
            if calls.state == DEAD:
                self.core.submitter.fail(task, self._death_error(calls))
            else:
                error = ActorUnavailableError(
                    f"its process died while it ran {calls.name}.{task.method}; it is being restarted",
                    actor_id=calls.actor_id.hex(), class_name=calls.name,
                )  # fmt: skip
                self.core.submitter.fail(task, error)

    def _end(self, calls: ActorCalls) -> None:
        if calls.link is not None:
            link = calls.link
            link.tag = None
            self._lost(calls, "the actor is dead")
            link.close("the actor is dead")
        self._fail_doomed(calls)
        for task in calls.take_all():
            self.core.submitter.fail(task, self._death_error(calls))
        self._let_go_of_arguments(calls.actor_id)
        self.core.run_effects()

    def _let_go_of_arguments(self, actor_id: bytes) -> None:
        holds = self.created.get(actor_id)
        if holds:
            self.created[actor_id] = ()
            self.core.table.remove_submitted(holds)
            self.core.run_effects()

    def _death_error(self, calls: ActorCalls) -> Exception:
        record = calls.cause
        if isinstance(record, Exception):
            return record
        if isinstance(record, bytes):
            return ActorDiedError("an argument of its constructor failed", class_name=calls.name)
        actor_id = calls.actor_id.hex()
        if not isinstance(record, ActorRecord):
            return ActorDiedError("", actor_id=actor_id, class_name=calls.name)
        cause = cause_of(record.cause)
        if record.kind == DeathKind.CREATION_FAILED:
            text = cause.reason if cause is not None else ""
            return ActorDiedError(f"its constructor raised\n{text}", actor_id=actor_id, class_name=calls.name)
        if record.kind == DeathKind.UNSCHEDULABLE:
            return ActorUnschedulableError(cause.reason if cause else "", actor_id=actor_id, class_name=calls.name)
        if record.kind == DeathKind.WORKER_DIED and cause is not None:
            return ActorDiedError(cause, actor_id=actor_id, class_name=calls.name)
        reason = cause.reason if cause is not None and cause.reason else str(record.kind).replace("_", " ")
        return ActorDiedError(reason, actor_id=actor_id, class_name=calls.name)

    def _dead(self, actor_id: bytes, error: object) -> None:
        calls = self.calls.get(actor_id)
        if calls is not None:
            calls.state = DEAD
            calls.cause = error
            self._end(calls)

    def describe(self, task_id: bytes) -> str:
        """What a pending call waits for, in words; empty when it is no call of ours."""
        for calls in self.calls.values():
            if task_id in calls.inflight:
                return f"{calls.name}.{calls.inflight[task_id].method}, running or queued in the actor"
            for task in calls.queue:
                if task.task_id == task_id:
                    return f"{calls.name}.{task.method}, which waits for the actor ({calls.state.lower()})"
        return ""


def _with_creation(register: RegisterActor, creation: ActorCreation) -> RegisterActor:

    return msgspec.structs.replace(register, creation=msgspec.msgpack.encode(creation))


def method_info(class_name: str, method: str) -> FunctionInfo:
    """A method as errors name it."""
    return FunctionInfo(b"", f"{class_name}.{method}")
