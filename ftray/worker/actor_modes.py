"""How an actor runs its calls: one at a time, on several threads, or as coroutines.

Role: shell, in the actor's worker.

- `SerialMode`: in the main thread, in arrival order.
- `ThreadMode`: the threads of a concurrency group, as many as it allows, share one queue; the main thread receives.
- `AsyncioMode`: an asyncio loop in the main thread reads the task channels itself; each call is a task, and each group
  has so many at once as it allows. `TrioMode` does the same with a trio nursery.

Rules: a call waits for its own group alone. Calls that wait inside a mode are in `_queued` until they begin: whoever
takes a call out of there, the mode or `cancel`, has it. An actor that exits does so at once: what waits, and what runs
beside the call that has ended it, is left unanswered, so that its caller learns of the actor's end.

Rejected: an event loop in a thread of its own (two handovers for each call).
"""

from __future__ import annotations

import functools
import inspect
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ftray.exceptions import ActorExit
from ftray.wire.messages import ActorCreation, PushActorTask, Unregister
from ftray.wire.reactor import Link
from ftray.worker.core import TaskContext, current_task
from ftray.worker.inheritance import end_child
from ftray.worker.serialization import deserialize_args

if TYPE_CHECKING:
    from ftray.worker.actor_birth import Birth
    from ftray.worker.execution import Executor

LEAVE_S = 1.0
"""Coroutines that an exiting actor leaves behind are cancelled, and waited for so long."""
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


def make_mode(spec: ActorCreation, cls: type, args: list[Any], kwargs: dict[str, Any]) -> ActorMode:
    """Constructs the instance and what runs its methods. Raises what the constructor raises."""
    if spec.asynchronous == "asyncio":
        return AsyncioMode(spec, cls, args, kwargs)
    if spec.max_concurrency > 1 or spec.concurrency_groups:
        return ThreadMode(spec, cls(*args, **kwargs))
    return SerialMode(spec, cls(*args, **kwargs))


class _Mode:
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


class SerialMode(_Mode):
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


class ThreadMode(_Mode):
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


class _Lane:
    """The coroutines of one concurrency group."""

    __slots__ = ("limit", "running", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0
        self.waiting: deque[tuple[Link, PushActorTask, Any]] = deque()


class _AsyncMode(_Mode):
    takes_over = True

    def __init__(self, spec: ActorCreation, instance: Any) -> None:
        super().__init__(spec, instance)
        self._lanes = {group: _Lane(limit) for group, limit in self.limits().items()}
        self._single = None if spec.concurrency_groups else self._lanes[""]

    async def acall(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        """One call, awaited if the method is a coroutine function."""
        started = time.perf_counter()
        name = self.name(message.method)
        current_task.set(TaskContext(b"", message.task_id, message.attempt, name, message.actor_id))
        held = False
        try:
            args, kwargs, held = self.prepare(executor, message, payload)
            result = self.method(message)(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
            if executor.forked:
                end_child()
            args = kwargs = None  # type: ignore[assignment]
            if message.num_returns < 0:
                await executor.replies.generators.arun(link, message, result, started, held)
            else:
                if message.num_returns > 1 and inspect.isasyncgen(result):
                    result = [item async for item in result]
                executor.replies.succeed(link, message, result, started, held)
            result = None
        except BaseException as error:
            args = kwargs = result = None  # type: ignore[assignment]
            if executor.exiting and not isinstance(error, Exception | ActorExit | SystemExit):
                return  # cancelled because the actor exits: that is what its caller is to learn
            if not leaves(executor, error):
                executor.replies.fail(link, message, error, started, held, name)

    def dispatch(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        executor.pending.appendleft((link, message, payload))
        self.serve(executor)

    def _arrived(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        """Starts a call, or lets it wait for its group."""
        lane = self._single or self._lanes[self.group(message)]
        if lane.running >= lane.limit:
            self._queued[message.task_id] = link, message
            lane.waiting.append((link, message, payload))
        else:
            self._start(executor, lane, link, message, payload)

    def _next_of(self, executor: Executor, lane: _Lane) -> None:
        """A call of this group is done: the next may begin."""
        while lane.waiting and lane.running < lane.limit and not executor.exiting:
            link, message, payload = lane.waiting.popleft()
            if self._queued.pop(message.task_id, None) is not None:
                self._start(executor, lane, link, message, payload)

    def _start(self, executor: Executor, lane: _Lane, link: Link, message: PushActorTask, payload: Any) -> None:
        raise NotImplementedError

    def _flush(self, executor: Executor) -> None:
        executor.flush_prints()
        with executor.reactor.lock:
            executor.reactor.flush_dirty()

    def _read(self, executor: Executor) -> None:
        executor.reactor.poll(0)
        if executor.dead_callers:
            executor._bury_callers()

    def _leave_in_time(self, executor: Executor) -> None:
        """The actor exits. Should a coroutine not let go in time, the process ends without it."""
        core = executor.core

        def late() -> None:
            if not executor.exit_code:
                core.raylet.send(Unregister(executor.exiting))
                core.settle()
            os._exit(executor.exit_code)

        with core.lock:
            core.reactor.call_later(2 * LEAVE_S * 1000.0, late)


class AsyncioMode(_AsyncMode):
    def __init__(self, spec: ActorCreation, cls: type, args: list[Any], kwargs: dict[str, Any]) -> None:
        import asyncio

        self._asyncio = asyncio
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._running: dict[bytes, Any] = {}
        self._flush_scheduled = False
        self._leaving = False
        """The loop runs only for what was cancelled at the end."""

        async def construct() -> Any:
            return cls(*args, **kwargs)

        super().__init__(spec, self._loop.run_until_complete(construct()))

    def serve(self, executor: Executor) -> None:
        """Runs the loop until a control message or exit."""
        loop = self._loop
        fd = executor.reactor._epoll.fileno()
        loop.add_reader(fd, self._readable, executor)
        loop.call_soon(self._take, executor)
        try:
            loop.run_forever()
        finally:
            loop.remove_reader(fd)
        if executor.exiting and self._running:
            self._leave_in_time(executor)
            self._leaving = True
            for task in self._running.values():
                task.cancel()
            loop.run_until_complete(self._asyncio.wait(set(self._running.values()), timeout=LEAVE_S))

    def _readable(self, executor: Executor) -> None:
        self._read(executor)
        self._take(executor)

    def _take(self, executor: Executor) -> None:
        single = self._single
        while (item := executor._next()) is not None:
            link, message, payload = item
            if link is None:
                executor.pending.appendleft(item)
                self._loop.stop()
                return
            if single is not None and single.running < single.limit:
                self._start(executor, single, link, message, payload)
            else:
                self._arrived(executor, link, message, payload)
        if executor.exiting:
            self._loop.stop()

    def _start(self, executor: Executor, lane: _Lane, link: Link, message: PushActorTask, payload: Any) -> None:
        lane.running += 1
        task = self._loop.create_task(self.acall(executor, link, message, payload))
        self._running[message.task_id] = task
        task.add_done_callback(functools.partial(self._done, executor, lane, link, message))

    def _done(self, executor: Executor, lane: _Lane, link: Link, message: PushActorTask, task: Any) -> None:
        if self._running.get(message.task_id) is task:
            del self._running[message.task_id]
        if task.cancelled() and not executor.exiting:
            with executor.core.lock:  # cancelled before it began: `acall` has not run at all
                executor.replies.cancelled(link, message)
        lane.running -= 1
        if lane.waiting:
            self._next_of(executor, lane)
        if executor.exiting and not self._leaving:
            self._loop.stop()
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush, executor)

    def _flush(self, executor: Executor) -> None:
        self._flush_scheduled = False
        super()._flush(executor)

    def finish(self, executor: Executor) -> None:
        while self._running:
            self._loop.run_until_complete(self._asyncio.wait(set(self._running.values())))
        self._flush(executor)

    def cancel(self, executor: Executor, task_id: bytes) -> bool:
        running = task_id in self._running
        if not running and self._cancel_queued(executor, task_id):
            return True
        # Also when it was not found: it may have been on its way from the one place to the other.
        self._loop.call_soon_threadsafe(self._cancel_running, task_id)
        return running

    def _cancel_running(self, task_id: bytes) -> None:
        task = self._running.get(task_id)
        if task is not None:
            task.cancel()


class TrioMode(_AsyncMode):
    """Coroutine methods under trio. The constructor runs inside the trio run, so it may make whatever needs one."""

    def __init__(self, spec: ActorCreation, birth: Birth) -> None:
        super().__init__(spec, None)
        self._birth: Birth | None = birth
        self._scopes: dict[bytes, Any] = {}
        self._token: Any = None
        self._nursery: Any = None

    def serve(self, executor: Executor) -> None:
        import trio

        trio.run(self._main, executor)

    def _construct(self, cls: type, args: list[Any], kwargs: dict[str, Any]) -> ActorMode:
        self.instance = cls(*args, **kwargs)
        return self

    async def _main(self, executor: Executor) -> None:
        import trio

        self._token = trio.lowlevel.current_trio_token()
        if self._birth is not None:
            birth, self._birth = self._birth, None
            birth.run(self._construct)
        fd = executor.reactor._epoll.fileno()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while not executor.exiting:
                item = executor._next()
                if item is None:
                    await trio.lowlevel.wait_readable(fd)
                    self._read(executor)
                    continue
                link, message, payload = item
                if link is None:
                    executor.pending.appendleft(item)
                    return  # the nursery waits for the running calls, and those start the waiting ones
                self._arrived(executor, link, message, payload)
            self._leave_in_time(executor)
            nursery.cancel_scope.cancel()

    def _start(self, executor: Executor, lane: _Lane, link: Link, message: PushActorTask, payload: Any) -> None:
        import trio

        lane.running += 1
        scope = trio.CancelScope()
        self._scopes[message.task_id] = scope
        self._nursery.start_soon(self._one, executor, lane, scope, link, message, payload)

    async def _one(
        self, executor: Executor, lane: _Lane, scope: Any, link: Link, message: PushActorTask, payload: Any
    ) -> None:
        try:
            with scope:
                await self.acall(executor, link, message, payload)
        finally:
            if self._scopes.get(message.task_id) is scope:
                del self._scopes[message.task_id]
            lane.running -= 1
            self._next_of(executor, lane)
            self._flush(executor)
            if executor.exiting:
                self._nursery.cancel_scope.cancel()

    def cancel(self, executor: Executor, task_id: bytes) -> bool:
        running = task_id in self._scopes
        if not running and self._cancel_queued(executor, task_id):
            return True
        if self._token is not None:
            try:
                self._token.run_sync_soon(self._cancel_running, task_id)
            except RuntimeError:
                return False  # the run is over
        return running

    def _cancel_running(self, task_id: bytes) -> None:
        scope = self._scopes.get(task_id)
        if scope is not None:
            scope.cancel()
