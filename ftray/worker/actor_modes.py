"""How an actor runs its calls: one at a time, on several threads, or as coroutines.

Role: shell, in the actor's worker.

- `SerialMode`: in the main thread, in arrival order.
- `ThreadMode`: `max_concurrency` threads share one queue; the main thread receives.
- `AsyncioMode`: an asyncio loop in the main thread reads the task channels itself; each call is a task, at most
  `max_concurrency` at once. `TrioMode` does the same with a trio nursery.

Rejected: an event loop in a thread of its own (two handovers for each call).
"""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ftray.wire.messages import ActorCreation, PushActorTask
from ftray.wire.reactor import Link
from ftray.worker.core import current_task, task_context
from ftray.worker.inheritance import end_child
from ftray.worker.serialization import deserialize_args

if TYPE_CHECKING:
    from ftray.worker.execution import Executor


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


def make_mode(spec: ActorCreation, cls: type, args: list[Any], kwargs: dict[str, Any]) -> ActorMode:
    """Constructs the instance and what runs its methods. Raises what the constructor raises."""
    if spec.asynchronous == "asyncio":
        return AsyncioMode(spec, cls, args, kwargs)
    if spec.asynchronous == "trio":
        return TrioMode(spec, cls, args, kwargs)
    if spec.max_concurrency > 1:
        return ThreadMode(spec, cls(*args, **kwargs))
    return SerialMode(spec, cls(*args, **kwargs))


class _Mode:
    """What the modes share: finding the method, and one call from its push to its reply."""

    takes_over = False

    def __init__(self, spec: ActorCreation, instance: Any) -> None:
        self.spec = spec
        self.instance = instance
        self._names: dict[str, str] = {}

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

    def call(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        """One synchronous call."""
        started = time.perf_counter()
        name = self.name(message.method)
        context = task_context(message.task_id, message.attempt, name, message.actor_id)
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
            executor.replies.fail(link, message, error, started, held, name)
        finally:
            current_task.reset(variable)

    def serve(self, executor: Executor) -> None:
        raise AssertionError("only modes that take over serve")

    def finish(self, executor: Executor) -> None:
        pass


def _ready() -> None:
    """Answers once the actor is alive."""


class SerialMode(_Mode):
    def dispatch(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        if link.dirty and not executor.ticking:
            executor.arm_tick()
        executor.ran += 1
        self.call(executor, link, message, payload)


class ThreadMode(_Mode):
    def __init__(self, spec: ActorCreation, instance: Any) -> None:
        super().__init__(spec, instance)
        self._queue: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0

    def dispatch(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        self._queue.put((executor, link, message, payload))
        if len(self._threads) < self.spec.max_concurrency and self._queue.qsize() > self._idle:
            thread = threading.Thread(
                target=self._work, name=f"{self.spec.class_name}-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            self._idle += 1
            item = self._queue.get()
            self._idle -= 1
            if item is None:
                return
            executor, link, message, payload = item
            del item
            self.call(executor, link, message, payload)
            if executor.exiting:
                executor.wake()
            executor.flush_prints()
            with executor.reactor.lock:
                executor.reactor.flush_dirty()
            del link, message, payload

    def finish(self, executor: Executor) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


class _AsyncMode(_Mode):
    takes_over = True

    async def acall(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        """One call, awaited if the method is a coroutine function."""
        started = time.perf_counter()
        name = self.name(message.method)
        current_task.set(task_context(message.task_id, message.attempt, name, message.actor_id))
        held = False
        try:
            args, kwargs, held = self.prepare(executor, message, payload)
            result = self.method(message)(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
            if executor.forked:
                end_child()
            args = kwargs = None  # type: ignore[assignment]
            executor.replies.succeed(link, message, result, started, held)
            result = None
        except BaseException as error:
            args = kwargs = result = None  # type: ignore[assignment]
            executor.replies.fail(link, message, error, started, held, name)

    def dispatch(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        executor.pending.appendleft((link, message, payload))
        self.serve(executor)


class AsyncioMode(_AsyncMode):
    def __init__(self, spec: ActorCreation, cls: type, args: list[Any], kwargs: dict[str, Any]) -> None:
        import asyncio

        self._asyncio = asyncio
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._running: set[Any] = set()
        self._waiting: list[tuple[Link, PushActorTask, Any]] = []
        self._flush_scheduled = False
        self._stop: Any = None

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

    def _readable(self, executor: Executor) -> None:
        executor.reactor.poll(0)
        self._take(executor)

    def _take(self, executor: Executor) -> None:
        loop = self._loop
        while (item := executor._next()) is not None:
            link, message, payload = item
            if link is None:
                executor.pending.appendleft(item)
                loop.stop()
                return
            if len(self._running) >= self.spec.max_concurrency:
                self._waiting.append((link, message, payload))
            else:
                self._start(executor, link, message, payload)
        if executor.exiting:
            loop.stop()

    def _start(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        task = self._loop.create_task(self.acall(executor, link, message, payload))
        self._running.add(task)
        task.add_done_callback(lambda done: self._done(executor, done))

    def _done(self, executor: Executor, task: Any) -> None:
        self._running.discard(task)
        if self._waiting:
            self._start(executor, *self._waiting.pop(0))
        if executor.exiting:
            self._loop.stop()
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush, executor)

    def _flush(self, executor: Executor) -> None:
        self._flush_scheduled = False
        executor.flush_prints()
        with executor.reactor.lock:
            executor.reactor.flush_dirty()
        if executor.dead_callers:
            executor._bury_callers()

    def finish(self, executor: Executor) -> None:
        if self._running:
            self._loop.run_until_complete(self._asyncio.wait(set(self._running)))
        self._flush(executor)


class TrioMode(_AsyncMode):
    """Coroutine methods under trio. The constructor runs inside the trio run, so it may make locks and channels."""

    def __init__(self, spec: ActorCreation, cls: type, args: list[Any], kwargs: dict[str, Any]) -> None:
        super().__init__(spec, None)
        self._construct: Callable[[], Any] | None = lambda: cls(*args, **kwargs)
        self._leave = False
        # The instance is made here, outside of the run, because creation must report before calls are served; trio's
        # synchronisation objects do not need a running loop.
        self.instance = self._construct()
        self._construct = None

    def serve(self, executor: Executor) -> None:
        import trio

        trio.run(self._main, executor)

    async def _main(self, executor: Executor) -> None:
        import trio

        limiter = trio.Semaphore(self.spec.max_concurrency)
        fd = executor.reactor._epoll.fileno()

        async def one(link: Link, message: PushActorTask, payload: Any) -> None:
            try:
                await self.acall(executor, link, message, payload)
            finally:
                limiter.release()
                executor.flush_prints()
                with executor.reactor.lock:
                    executor.reactor.flush_dirty()
                if executor.exiting:
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            while not executor.exiting:
                item = executor._next()
                if item is None:
                    await trio.lowlevel.wait_readable(fd)
                    executor.reactor.poll(0)
                    continue
                link, message, payload = item
                if link is None:
                    executor.pending.appendleft(item)
                    return  # the nursery waits for the running calls
                await limiter.acquire()
                nursery.start_soon(one, link, message, payload)
