"""Actors called by this process: one channel to each, restarts, deaths. What it makes itself is in `actor_creation.py`.

Role: shell around `ownership/calls.py`. An actor's life is the GCS's business; this process watches the actors that it
has handles of, connects to where they live, and pushes calls over one channel each. Handles are counted as references
to the actor's handle object (return 0 of its creation); when that is freed at the owner, the actor goes out of scope.

Rules: calls in flight when the channel closes wait for the GCS's word on the cause: the error says what happened.
What a dead process has answered before its end counts: its channel is read to the end before its calls are given up.
No more than `out_max` bytes of calls wait to be written: an actor that reads slowly must not cost it its channel.

Rejected: calls through the raylet (two hops more); asking the GCS for each call.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from ftray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    DeathCause,
    FtrayError,
    GcsUnavailableError,
    PendingCallsLimitExceeded,
    RuntimeEnvSetupError,
)
from ftray.gcs.state.commands import DeathCauseRecord, KillActor, KvDelete
from ftray.gcs.state.tables import ActorRecord, ActorState, DeathKind
from ftray.ids import RETURN_INDEX, return_id
from ftray.ownership.calls import ALIVE, DEAD, RESTARTING, ActorCalls
from ftray.ownership.references import Entry
from ftray.ownership.tasks import TaskRecord
from ftray.runtime_env import SETUP
from ftray.wire.frames import PREFIX
from ftray.wire.handshake import ROLE_TASK
from ftray.wire.messages import Message, PushActorTask, TaskDone, TaskFailed, TaskReturns, TaskYield, encode
from ftray.wire.reactor import Link
from ftray.worker import waiting
from ftray.worker.actor_creation import ActorCreator
from ftray.worker.call_sites import note_site
from ftray.worker.gcs_access import HANDLES, wait_for_gcs
from ftray.worker.objects import Answer
from ftray.worker.submit import FLUSH_BYTES, DependencyWaiter

if TYPE_CHECKING:
    from ftray.worker.core import Core

log = logging.getLogger("ftray.worker")

INDEX0 = RETURN_INDEX[0]
_STATES = {ActorState.ALIVE: ALIVE, ActorState.RESTARTING: RESTARTING, ActorState.DEAD: DEAD}
LOOK_AGAIN_MS = 1_000
OUT_BYTES_MAX = 16 << 20
"""No call is added to a channel's output while more than this waits to be written."""


def cause_of(record: DeathCauseRecord | None) -> DeathCause | None:
    """The record of a death as exceptions carry it."""
    if record is None:
        return None
    return DeathCause(
        record.node_id, record.pid, record.worker_id, record.exit_code, record.signal, record.what,
        tuple(record.stderr_tail), record.reason,
    )  # fmt: skip


class ActorClient:
    """See the module. Methods run under the core's lock unless they say otherwise."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.calls: dict[bytes, ActorCalls] = {}
        self.doomed: dict[bytes, list[TaskRecord]] = {}
        self.ends: dict[bytes, DeathCauseRecord] = {}
        """How the last life of an actor ended that is being restarted."""
        """Calls that a lost channel has left unanswered, until the GCS says why."""
        self.out_max = OUT_BYTES_MAX
        self.creation = ActorCreator(self)

    # --- handles -----------------------------------------------------------------------------------------------------

    def watch(self, actor_id: bytes, class_name: str) -> ActorCalls:
        """The call queue of an actor, made (and its record watched) at first use."""
        calls = self.calls.get(actor_id)
        if calls is None:
            calls = ActorCalls(actor_id, class_name, actor_id + INDEX0)
            self.calls[actor_id] = calls
            self.core.gcs.watch_actor(actor_id, self.changed)
        calls.unowned = False
        return calls

    def handle_freed(self, object_id: bytes) -> None:
        """No handle is left, here or (for an actor made here) anywhere."""
        calls = self.calls.get(object_id[:16])
        if calls is None:
            return
        if self.creation.handle_freed(calls):
            self.forget(calls.actor_id)
        else:
            calls.unowned = True

    def forget(self, actor_id: bytes) -> None:
        """Nothing here needs the actor any more."""
        calls = self.calls.pop(actor_id, None)
        self.ends.pop(actor_id, None)
        if calls is not None:
            self.core.gcs.unwatch_actor(actor_id)
            if calls.link is not None:
                link, calls.link = calls.link, None
                link.tag = None
                link.close("no handle is left")

    def kill(self, actor_id: bytes, no_restart: bool) -> None:
        """Ends an actor now: no later call of this process is answered by it. Not under the lock.

        Raises GcsUnavailableError.
        """
        core = self.core
        core.check_entry()
        answer = Answer()
        with core.lock:
            core.drain()
            if no_restart and actor_id in self.creation.waiting:
                self._killed(actor_id)
                return
            core.gcs.command(KillActor(actor_id, no_restart, "killed by ftray.kill"), answer.give)
            core.settle()
        wait_for_gcs(core, answer, "ftray.kill")
        if answer.message is None:
            raise GcsUnavailableError("the actor could not be killed: no GCS answers")
        core.check_open()
        # Its record's change was told before the answer, unless this process reads too slowly for the watch.
        with core.lock:
            calls = self.calls.get(actor_id)
            if no_restart and not answer.message.code and calls is not None and calls.state != DEAD:
                self._killed(actor_id)

    def _killed(self, actor_id: bytes) -> None:
        name = self.calls[actor_id].name
        self.dead(actor_id, ActorDiedError("killed by ftray.kill", actor_id=actor_id.hex(), class_name=name))
        self.core.settle()

    # --- calls -------------------------------------------------------------------------------------------------------

    def submit(self, calls: ActorCalls, task: TaskRecord, payload: bytes) -> None:
        """Sends a call on its way, in order. Not under the lock. Raises PendingCallsLimitExceeded."""
        core = self.core
        if core.inside():
            core.check_entry()
        task_id = task.task_id
        task.actor = calls
        if not task.deps:
            header = encode(
                PushActorTask(
                    task_id, calls.actor_id, task.method, task.num_returns, 0, len(payload), (), task.group,
                    task.ahead_max,
                )
            )  # fmt: skip
            task.frame = PREFIX.pack(len(header), len(payload)) + header + payload
        with core.lock:
            if core.released:
                core.drain()
            if core.closed:
                raise FtrayError(f"this session is over: {core.close_reason}")
            if calls.pending_max >= 0 and calls.full:
                raise PendingCallsLimitExceeded(
                    f"{calls.unfinished} calls of this process to actor {calls.name} are unfinished, and "
                    f"max_pending_calls is {calls.pending_max}: get some of their results before calling on"
                )
            if task.num_returns == 1:
                core.entries[task_id + INDEX0] = Entry(None, "", 1)
            elif task.num_returns < 0:
                core.streams.open(task)
            else:
                for index in range(task.num_returns):
                    core.table.add_owned(return_id(task_id, index))
            core.table.add_submitted(task.holds)
            if not core._ticking:
                core.tick_soon()
            if core.sites is not None:
                note_site(core, task_id + INDEX0)
            if calls.state == DEAD:
                core.submitter.fail(task, self._death_error(calls))
                return
            link = calls.link
            if task.deps:
                self._hang(task, payload)
                calls.submit(task)
                if link is not None:
                    self.pump(calls)
            elif link is not None and len(link.out) < self.out_max and calls.go(task):
                out = link.out
                out += task.frame
                if len(calls.inflight) == 1 or len(out) > FLUSH_BYTES:
                    link.flush()
                elif not link.dirty:
                    link.dirty = True
                    core.reactor.dirty.append(link)
            else:
                calls.submit(task)
                if task.group and link is not None:
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
        """A call that waits for its turn or its arguments will not be made."""
        calls: ActorCalls = task.actor
        calls.take_out(task)
        self.pump(calls)

    def pump(self, calls: ActorCalls) -> None:
        """Sends what may go now."""
        link = calls.link
        if link is None:
            return
        submitter = self.core.submitter
        entries = self.core.entries
        out = link.out
        first = not calls.inflight
        more = False
        while len(out) < self.out_max:
            task = calls.take()
            if task is None:
                break
            if task.deps:
                failed = next((e for _, x in task.deps if (e := entries[x]).state == waiting.FAILED), None)
                if failed is not None:
                    calls.done(task.task_id)
                    submitter.fail(task, failed.value)
                    continue
            out += task.frame if task.attempt == 0 and task.frame else submitter.frame(task)
            more = True
        if not more:
            return
        if first or len(out) > FLUSH_BYTES:
            link.flush()
        elif not link.dirty:
            link.dirty = True
            self.core.reactor.dirty.append(link)

    def _drained(self, link: Link) -> None:
        """All that waited for the socket is written: what was held back for that may follow."""
        if isinstance(link.tag, ActorCalls):
            self.pump(link.tag)

    # --- replies -----------------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        calls: ActorCalls | None = link.tag
        if calls is None:
            return
        core = self.core
        kind = type(message)
        if kind is TaskYield:
            core.streams.item(message, payload, calls.worker_id, calls.endpoint)  # type: ignore[arg-type]
            return
        task_id: bytes = message.task_id  # type: ignore[attr-defined]
        task = calls.inflight.pop(task_id, None)
        if task is not None and task.group:
            calls.left_lane(task)
        if calls.queue or calls.lanes:
            self.pump(calls)
        if task is None:
            return
        if kind is TaskDone:
            if task.cancelled:
                core.canceller.discard(task)
                return
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
        link = calls.link
        if link is not None and (state == DEAD or (state == ALIVE and record.incarnation > calls.linked)):
            # The old life's channel may not have been read to its end yet: what was answered was answered.
            self.core.reactor.read_rest(link)
            link = calls.link
        if state == RESTARTING and record.cause is not None:
            self.ends[actor_id] = record.cause
        renewed = False
        cause: Any = record if state == DEAD else None
        if calls.update(state, record.incarnation, record.worker_id, record.node_id, record.endpoint, cause):
            renewed = True
            if link is not None:
                link.tag = None
                self._lost(calls)
                link.close("the actor was restarted")
            self._connect(calls)
        if actor_id in self.doomed and (calls.state != ALIVE or renewed):
            self._fail_doomed(calls)
        if calls.state == DEAD:
            if record.detached and record.name:
                # Nobody owns it who would do so. All who watch it say the same; once is enough.
                self.core.gcs.command(KvDelete(HANDLES, actor_id), _ignored)
            self._end(calls)
        elif record.state == ActorState.ALIVE and 0 <= record.max_restarts <= record.restarts:
            self.creation.let_go(actor_id)
        if calls.unowned and actor_id not in self.creation.holds:
            self.forget(actor_id)

    def _connect(self, calls: ActorCalls) -> None:
        core = self.core
        try:
            link = core.reactor.connect(calls.endpoint, ROLE_TASK, self)
        except OSError:
            self._look_again(calls)  # it has died again, as the GCS will say, or too many connect at once
            return
        self.out_max = min(OUT_BYTES_MAX, core.config.output_backlog_bytes_max // 4)
        link.tag = calls
        link.on_drained = self._drained
        link.send(core.peers.hello())
        calls.connected(link)
        self.pump(calls)
        link.flush()

    def on_closed(self, link: Link, reason: str) -> None:
        calls = link.tag
        if isinstance(calls, ActorCalls) and calls.link is link:
            self._lost(calls)
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

        self.core.reactor.call_later(LOOK_AGAIN_MS, again)

    def _lost(self, calls: ActorCalls) -> None:
        failed = calls.lost()
        if failed:
            self.doomed.setdefault(calls.actor_id, []).extend(failed)

    def _fail_doomed(self, calls: ActorCalls) -> None:
        for task in self.doomed.pop(calls.actor_id, ()):
            if calls.state == DEAD:
                self.core.submitter.fail(task, self._death_error(calls, task))
            else:
                cause = cause_of(self.ends.get(calls.actor_id))
                how = f". Its {cause.describe()}".rstrip(".\n") if cause is not None else ""
                error = ActorUnavailableError(
                    f"its process died while it ran {calls.name}.{task.method}; it is being restarted{how}",
                    actor_id=calls.actor_id.hex(), class_name=calls.name,
                )  # fmt: skip
                self.core.submitter.fail(task, error)

    def _end(self, calls: ActorCalls) -> None:
        if calls.link is not None:
            link = calls.link
            link.tag = None
            self._lost(calls)
            link.close("the actor is dead")
        self._fail_doomed(calls)
        for task in calls.take_all():
            self.core.submitter.fail(task, self._death_error(calls))
        self.creation.let_go(calls.actor_id)
        self.core.run_effects()

    def dead(self, actor_id: bytes, error: object) -> None:
        """An actor has failed before the GCS knew it, or is known to be dead before the GCS says so."""
        calls = self.calls.get(actor_id)
        if calls is not None:
            calls.state = DEAD
            calls.cause = error
            self._end(calls)

    # --- explaining --------------------------------------------------------------------------------------------------

    def _death_error(self, calls: ActorCalls, task: TaskRecord | None = None) -> Exception:
        """Why a call can't be answered. `task` is one that was in flight when the actor died."""
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
            if cause is not None and cause.what == SETUP:
                return RuntimeEnvSetupError(
                    f"actor {calls.name} was not created: its runtime environment could not be set up: {text}"
                )
            return ActorDiedError(f"its constructor raised\n{text}", actor_id=actor_id, class_name=calls.name)
        if record.kind == DeathKind.UNSCHEDULABLE:
            return ActorUnschedulableError(cause.reason if cause else "", actor_id=actor_id, class_name=calls.name)
        if record.kind == DeathKind.WORKER_DIED and cause is not None:
            # Where calls run in their order it was the oldest; else any of them may have run.
            method = task.method if task is not None and calls.out_of_order else calls.ran
            if method and cause.what == calls.name:
                cause = dataclasses.replace(cause, what=f"{calls.name}.{method}")
            return ActorDiedError(cause, actor_id=actor_id, class_name=calls.name)
        reason = cause.reason if cause is not None and cause.reason else str(record.kind).replace("_", " ")
        if record.kind == DeathKind.EXITED:
            reason = f"the actor exited: {reason}"
        return ActorDiedError(reason, actor_id=actor_id, class_name=calls.name)

    def describe(self, task_id: bytes) -> str:
        """What a pending call waits for, in words; empty when it is no call of ours."""
        for calls in self.calls.values():
            if task_id in calls.inflight:
                return f"{calls.name}.{calls.inflight[task_id].method}, running or queued in the actor"
            for task in calls.queued():
                if task.task_id == task_id:
                    return f"{calls.name}.{task.method}, which waits for the actor ({calls.state.lower()})"
        return ""


def _ignored(result: Any) -> None:
    """Whatever the answer, there is nothing to be done about it."""
