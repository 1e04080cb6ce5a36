"""How an actor runs its calls: one at a time or on several threads (as coroutines: `actor_loops.py`).

Role: shell, in the actor's worker.

- `SerialMode`: in the main thread, in arrival order.
- `ThreadMode`: the threads of a concurrency group, as many as it allows, share one queue; the main thread receives.

Rules: a call waits for its own group alone. Calls that wait inside a mode are in `_queued` until they begin: whoever
takes a call out of there, the mode or `cancel`, has it. An actor that exits does so at once: what waits, and what runs
beside the call that has ended it, is left unanswered, so that its caller learns of the actor's end.

Rejected: a lock around the counts of a thread pool (each thread counts what it has done, and the main thread adds up).
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ftray.wire.messages import ActorCreation, PushActorTask
from ftray.wire.reactor import Link
from ftray.worker.core import TaskContext, current_task
from ftray.worker.inheritance import end_child
from ftray.worker.serialization import deserialize_args

if TYPE_CHECKING:
    from ftray.worker.execution import Executor

READ_AHEAD_MAX = 64
"""Reads of the task channels in search of a call that is to be cancelled."""


class ActorMode(Protocol):
    """What the executor calls."""

    takes_over: bool
    """`serve` is called instead of waiting for arrivals."""

    def dispatch(self, executor: Executor, link: Link, message: Any, payload: Any) -> None:
        """Runs a call, or sees to it that it runs."""

    def serve(self, executor: Executor) -> None:
        """Receives and runs until the executor exits or something else is to be done."""

    def finish(self, executor: Executor) -> None:
        """Waits until what was dispatched is done."""

    def cancel(self, executor: Executor, task_id: bytes) -> bool:
        """Cancels a call, under the core's lock, from the loop's thread. False if there is none: not yet, or no more.

        One that has not begun is answered so; a coroutine is cancelled; a synchronous call is only told so
        (`TaskContext.cancelled`).
        """


class BaseMode:
    """What the modes share: finding method and group, and one call from its push to its reply."""

    takes_over = False

    def __init__(self, spec: ActorCreation, instance: Any) -> None:
        self.spec = spec
        self.instance = instance
        self._names: dict[str, str] = {}
        self._groups: dict[str, str] = {}
        self._queued: dict[bytes, tuple[Link, PushActorTask]] = {}

    def name(self, method: str) -> str:
        name = self._names.get(method)
        if name is None:
            name = self._names[method] = f"{self.spec.class_name}.{method}"
        return name

    def method(self, message: PushActorTask) -> Callable[..., Any]:
        if message.method == "__ftray_ready__":
            return _ready
        method: Callable[..., Any] = getattr(self.instance, message.method)
        return method

    def group(self, message: PushActorTask) -> str:
        """The concurrency group in which to run the call: its own, its method's, or the default one (empty)."""
        groups = self.spec.concurrency_groups
        if not groups:
            return ""
        if message.group in groups:
            return message.group
        name = message.method
        group = self._groups.get(name)
        if group is None:
            options = getattr(getattr(type(self.instance), name, None), "__ftray_method_options__", {})
            group = options.get("concurrency_group") or ""
            group = self._groups[name] = group if group in groups else ""
        return group

    def limits(self) -> dict[str, int]:
        """How many calls of each group may run at once."""
        return {"": self.spec.max_concurrency, **self.spec.concurrency_groups}

    def prepare(
        self, executor: Executor, message: PushActorTask, payload: Any
    ) -> tuple[list[Any], dict[str, Any], bool]:
        """Loads the arguments; the last item says whether the call holds references."""
        if message.deps or (message.args_bytes and b"ftray" in payload):
            with executor.core.lock:
                executor.core.table.begin_task((message.task_id, message.attempt))
            try:
                args, kwargs = executor.arguments(message, payload)
            except BaseException:
                with executor.core.lock:
                    executor.core.table.end_task((message.task_id, message.attempt))
                    executor.core.settle()
                raise
            return args, kwargs, True
        if message.args_bytes:
            args, kwargs = deserialize_args(payload)
            return args, kwargs, False
        return [], {}, False

    def call(
        self, executor: Executor, link: Link, message: PushActorTask, payload: Any, context: TaskContext
    ) -> None:
        """One synchronous call."""
        started = time.perf_counter()
        variable = current_task.set(context)
        held = False
        try:
            args, kwargs, held = self.prepare(executor, message, payload)
            result = self.method(message)(*args, **kwargs)
            if executor.forked:
                end_child()
            args = kwargs = None  # type: ignore[assignment]
            executor.replies.succeed(link, message, result, started, held)
            result = None
        except BaseException as error:
            args = kwargs = result = None  # type: ignore[assignment]
            if not leaves(executor, error):
                executor.replies.fail(link, message, error, started, held, context.function_name)
        finally:
            current_task.reset(variable)

    def serve(self, executor: Executor) -> None:
        raise AssertionError("only modes that take over serve")

    def finish(self, executor: Executor) -> None:
        pass

    def _cancel_queued(self, executor: Executor, task_id: bytes) -> bool:
        """A call that has not begun is answered: it waits in the mode, or has arrived, or can be read."""
        found = self._queued.pop(task_id, None)
        if found is None:
            reactor = executor.reactor
            with reactor.lock:
                for _ in range(READ_AHEAD_MAX):
                    events = reactor.poll_events(0, 64)
                    if not events:
                        break
                    reactor.handle(events)
                for index, (link, message, _) in enumerate(executor.pending):
                    if link is not None and message.task_id == task_id:
                        found = link, message
                        del executor.pending[index]
                        break
            executor.wake()  # what was read here is not readable any more
        if found is None:
            return False
        executor.replies.cancelled(*found)
        return True


def _ready() -> None:
    """Answers once the actor is alive."""


def leaves(executor: Executor, error: BaseException) -> bool:
    """Whether the exception ends the process as a crash would: `sys.exit` with a code that is not 0. Not answered, so
    that the call is repeated if it may be, and the actor restarted."""
    if not isinstance(error, SystemExit) or error.code is None or error.code == 0:
        return False
    if executor.forked:
        end_child(error)
    if not isinstance(error.code, int):
        print(error.code, file=sys.stderr)  # as the interpreter does
    executor.exit_code = error.code & 0xFF or 1 if isinstance(error.code, int) else 1
    executor.exiting = f"a method called sys.exit({error.code!r})"
    return True


class SerialMode(BaseMode):
    def __init__(self, spec: ActorCreation, instance: Any) -> None:
        super().__init__(spec, instance)
        self._context: TaskContext | None = None

    def dispatch(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        if link.dirty and not executor.ticking:
            executor.arm_tick()
        executor.ran += 1
        context = TaskContext(b"", message.task_id, message.attempt, self.name(message.method), message.actor_id)
        self._context = context
        self.call(executor, link, message, payload, context)
        self._context = None

    def cancel(self, executor: Executor, task_id: bytes) -> bool:
        context = self._context
        if context is not None and context.task_id == task_id:
            context.cancelled = True
            return True
        return self._cancel_queued(executor, task_id)


class _Pool:
    """The threads of one concurrency group."""

    __slots__ = ("dispatched", "done", "limit", "name", "queue", "threads")

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.queue: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.dispatched = 0
        self.done: list[int] = []
        """How many calls each thread has done: each counts its own, so that no lock is needed."""

    @property
    def short(self) -> bool:
        """Whether another thread is of use: more calls than threads are unfinished."""
        count = len(self.threads)
        return count < self.limit and self.dispatched - sum(self.done) > count


class ThreadMode(BaseMode):
    def __init__(self, spec: ActorCreation, instance: Any) -> None:
        super().__init__(spec, instance)
        self._pools = {
            group: _Pool(f"{spec.class_name}.{group}" if group else spec.class_name, limit)
            for group, limit in self.limits().items()
        }
        self._running: dict[bytes, TaskContext] = {}

    def dispatch(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        pool = self._pools[self.group(message)]
        self._queued[message.task_id] = link, message
        pool.queue.put((executor, link, message, payload))
        pool.dispatched += 1
        if pool.short:
            number = len(pool.threads)
            pool.done.append(0)
            thread = threading.Thread(target=self._work, args=(pool, number), name=f"{pool.name}-{number}", daemon=True)
            pool.threads.append(thread)
            thread.start()

    def _work(self, pool: _Pool, number: int) -> None:
        while True:
            item = pool.queue.get()
            if item is None:
                return
            executor, link, message, payload = item
            del item
            task_id = message.task_id
            context = TaskContext(b"", task_id, message.attempt, self.name(message.method), message.actor_id)
            self._running[task_id] = context
            if self._queued.pop(task_id, None) is not None:
                self.call(executor, link, message, payload, context)
            self._running.pop(task_id, None)
            pool.done[number] += 1
            if executor.exiting:
                executor.wake()
            executor.flush_prints()
            with executor.reactor.lock:
                executor.reactor.flush_dirty()
            del link, message, payload, context

    def finish(self, executor: Executor) -> None:
        pools = list(self._pools.values())
        for pool in pools:
            for _ in pool.threads:
                pool.queue.put(None)
        for pool in pools:
            for thread in pool.threads:
                thread.join()

    def cancel(self, executor: Executor, task_id: bytes) -> bool:
        if self._cancel_queued(executor, task_id):
            return True
        context = self._running.get(task_id)
        if context is None:
            return False
        context.cancelled = True
        return True
