"""Replies of tasks: from a result or an exception to what its owner gets.

Role: shell, in workers. Small values travel in the reply, large ones are written into the node's store first. A reply
whose task keeps references waits until those have been registered (`ownership/references.py`).

Rules: all returns are serialised before any is written or handed off. The channels' lock is taken after the core's.
"""

from __future__ import annotations

import os
import time
from threading import get_ident
from types import AsyncGeneratorType, GeneratorType
from typing import TYPE_CHECKING, Any

from ftray.exceptions import ActorExit, SerializationError
from ftray.ids import return_id
from ftray.wire.messages import (
    IN_STORE,
    INLINE,
    Message,
    PushActorTask,
    PushTask,
    Ref,
    TaskDone,
    TaskFailed,
    TaskReturns,
    Value,
)
from ftray.wire.reactor import Link
from ftray.worker.failures import task_error_payload
from ftray.worker.generators import Generators
from ftray.worker.inheritance import end_child
from ftray.worker.serialization import Serialized, serialize
from ftray.worker.task_events import bare
from ftray.worker.waiting import Waiter, block

DEFERRED_WAIT_S = 1.0
MAX_CALLS = "its function has run max_calls times"

if TYPE_CHECKING:
    from ftray.worker.execution import Executor


def _serialize_all(results: list[Any]) -> list[Serialized]:
    """Raises SerializationError that says which one it is, if there are several."""
    try:
        return [serialize(item, "return value") for item in results]
    except SerializationError:
        if len(results) == 1:
            raise
        for index, item in enumerate(results):
            serialize(item, f"return value {index}")
        raise


class Replies:
    """See the module."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.core = executor.core
        self.reactor = executor.reactor
        self.deferred: dict[Any, tuple[Link, Message, Any]] = {}
        """Replies that wait for registrations, by task and attempt; under the core's lock."""
        self.generators = Generators(self)
        self.keeps_events = executor.core.config.task_events_max > 0
        self.note_event = executor.events.append
        self.exits = False
        """The worker ends after the reply that comes next: its function has run `max_calls` times here."""

    def succeed(self, link: Link, message: PushTask | PushActorTask, result: Any, started: float, held: bool) -> None:
        """Serialises the result and replies."""
        core = self.core
        count = message.num_returns
        if count < 0:
            self.generators.run(link, message, result, started, held)
            return
        if self.exits:
            self.leave_after()
        if count == 1:
            try:
                serialized = serialize(result, "return value")
            except SerializationError as error:
                raise self._no_generator(result, error) from None
            if serialized.size <= core.config.inline_bytes_max and not serialized.refs and not self.exits:
                result = None
                data = serialized.to_bytes()
                work_us = int((time.perf_counter() - started) * 1e6)
                self.reply(link, message, TaskDone(message.task_id, work_us), data, held)
                return
            results = [result]
        elif count == 0:
            results = []
        else:
            if (
                not isinstance(result, tuple | list)
                and hasattr(result, "__iter__")
                and not isinstance(result, str | bytes)
            ):
                result = list(result)
            if not isinstance(result, tuple | list):
                raise ValueError(
                    f"num_returns is {count}, but the task returned one {type(result).__name__}: return a tuple or "
                    f"list of {count} values"
                )
            if len(result) != count:
                raise ValueError(f"num_returns is {count}, but the task returned {len(result)} values")
            results = list(result)
        result = None
        values: list[Value] = []
        parts: list[bytes] = []
        kept: list[tuple[Any, list[bytes]]] = []
        limit = core.config.inline_bytes_max
        # All are serialised before any is written, and all written before any is handed off: one that cannot be, or an
        # interrupt while the store makes room, must not leave holds of others that nobody would let go of.
        packed = _serialize_all(results)
        for index, serialized in enumerate(packed):
            refs: tuple[Ref, ...] = ()
            if serialized.refs:
                refs = tuple(ref.wire() for ref in serialized.refs)
                kept.append(((message.task_id, message.attempt, index), [ref.object_id for ref in refs]))
            if serialized.size <= limit:
                data = serialized.to_bytes()
                parts.append(data)
                values.append(Value(INLINE, len(data), b"", refs))
            else:
                object_id = return_id(message.task_id, index)
                core.objects.write(object_id, serialized, link.peer.worker_id, keep=False)
                values.append(Value(IN_STORE, serialized.size, core.node_id, refs))
        if kept:
            with core.lock:
                core.drain()
                if not link.closed:  # else the caller's death may have been told already
                    for token, ids in kept:
                        core.table.hand_off(token, ids, link.peer.worker_id)
            held = True
        results.clear()
        packed.clear()
        serialized = None  # type: ignore[assignment]
        work_us = int((time.perf_counter() - started) * 1e6)
        answer = TaskReturns(message.task_id, work_us, tuple(values), exits=self.exits)
        self.reply(link, message, answer, b"".join(parts), held)

    def fail(
        self, link: Link, message: PushTask | PushActorTask, error: BaseException, started: float, held: bool, name: str
    ) -> None:
        """Packs the exception and replies."""
        executor = self.executor
        if executor.forked:
            end_child(error)
        if self.exits:
            self.leave_after()
        exits = self.exits or isinstance(error, SystemExit | ActorExit)
        cancelled = bool(executor.cancelled) and message.task_id in executor.cancelled
        if cancelled:
            payload = b""  # its owner knows what to say
        else:
            payload = task_error_payload(error, name, os.getpid(), self.core.node_id.hex())
        mro = tuple(f"{c.__module__}.{c.__qualname__}" for c in type(error).__mro__)
        error.__traceback__ = None
        work_us = int((time.perf_counter() - started) * 1e6)
        answer = TaskFailed(message.task_id, work_us, exits, mro, cancelled)
        if message.num_returns < 0:
            answer.yielded = self.generators.yielded.pop((message.task_id, message.attempt), 0)
        self.reply(link, message, answer, payload, held)
        if exits and not self.exits:
            executor.exiting = "exit_actor was called" if isinstance(error, ActorExit) else "the task called sys.exit"

    def cancelled(self, link: Link, message: PushTask | PushActorTask) -> None:
        """Answers for a task or call that was cancelled before it began."""
        self.reply(link, message, TaskFailed(message.task_id, 0, cancelled=True), b"", False)

    @staticmethod
    def _no_generator(result: Any, error: SerializationError) -> Exception:
        """The error for a single result that cannot be pickled: a generator needs another `num_returns`."""
        if not isinstance(result, GeneratorType | AsyncGeneratorType):
            return error
        return TypeError(
            f"num_returns is 1, but the task returned the generator {result.__name__}, which cannot be sent: use "
            'num_returns="streaming" to get its items one by one, or return a list'
        )

    def leave_after(self) -> None:
        """The worker ends with this reply, unless it owns objects: those would be lost. Then a later call ends it."""
        core = self.core
        with core.lock:
            core.drain()
            self.exits = all(entry.owner is not None for entry in core.entries.values())
        if self.exits:
            self.executor.exiting = MAX_CALLS

    def wait_deferred(self) -> None:
        """The worker is about to end: replies that still wait for registrations go out first, within a second."""
        deadline = time.monotonic() + DEFERRED_WAIT_S
        while self.deferred and time.monotonic() < deadline:
            block(self.core.reactor, Waiter(1), 0.005)

    def reply(self, link: Link, message: PushTask | PushActorTask, answer: Message, payload: bytes, held: bool) -> None:
        """Queues a reply; one that must wait for registrations is sent by `may_reply`."""
        if self.keeps_events:
            kept = bare(message) if message.deps else message
            failed = type(answer) is TaskFailed
            self.note_event((kept, answer.work_us, failed, time.perf_counter(), get_ident()))  # type: ignore[attr-defined]
        if self.executor.cancelled:
            self.executor.cancelled.discard(message.task_id)
        if held:
            core = self.core
            token = (message.task_id, message.attempt)
            with core.lock:
                core.drain()
                self.deferred[token] = (link, answer, payload)
                may = core.table.end_task(token)
                core.settle()
                if not may:
                    return
                if self.deferred.pop(token, None) is None:
                    return
        with self.reactor.lock:
            link.send(answer, payload)

    def may_reply(self, token: Any) -> None:
        """What the task kept has been registered, under the core's lock."""
        reply = self.deferred.pop(token, None)
        if reply is not None:
            link, answer, payload = reply
            with self.reactor.lock:
                link.send(answer, payload)
                self.reactor.flush_dirty()
