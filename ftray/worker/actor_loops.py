"""How an async actor runs its calls: as coroutines, in an asyncio loop or a trio run in the worker's main thread.

Role: shell, in the actor's worker. The loop reads the task channels itself; each call is a task of it, and each
concurrency group has so many at once as it allows.

Rules: as in `actor_modes.py`. What belongs to the loop (tasks, cancel scopes, those who wait for their group) is
touched by the loop's thread alone; `cancel`, which comes from another one, only looks whether a call is there.

Rejected: an event loop in a thread of its own (two handovers for each call).
"""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from ftray.exceptions import ActorExit
from ftray.wire.messages import ActorCreation, PushActorTask, Unregister
from ftray.wire.reactor import Link
from ftray.worker.actor_modes import ActorMode, BaseMode, leaves
from ftray.worker.core import TaskContext, current_task
from ftray.worker.inheritance import end_child

if TYPE_CHECKING:
    from ftray.worker.actor_birth import Birth
    from ftray.worker.execution import Executor

LEAVE_S = 1.0
"""Coroutines that an exiting actor leaves behind are cancelled, and waited for so long."""
LEAVE_AT_LAST_S = 6.0
"""After this time the process of an exiting actor ends in any case."""


class _Lane:
    """The coroutines of one concurrency group."""

    __slots__ = ("limit", "running", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0
        self.waiting: deque[tuple[Link, PushActorTask, Any]] = deque()


class _AsyncMode(BaseMode):
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
        executor.put_back((link, message, payload))
        self.serve(executor)

    def _arrived(self, executor: Executor, link: Link, message: PushActorTask, payload: Any) -> None:
        """Starts a call, or lets it wait for its group."""
        if executor.cancelled and message.task_id in executor.cancelled:
            executor.replies.cancelled(link, message)
            self._flush(executor)  # nothing else may run that would do it
            return
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
            core.raylet.send(Unregister(executor.exiting, executor.exit_code))
            core.settle()
            os._exit(executor.exit_code)

        with core.lock:
            core.reactor.call_later(LEAVE_AT_LAST_S * 1000.0, late)


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
                executor.put_back(item)
                self._loop.stop()
                return
            if single is not None and single.running < single.limit and not executor.cancelled:
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
                    executor.put_back(item)
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
