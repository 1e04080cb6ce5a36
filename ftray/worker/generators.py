"""Generator tasks in the worker that runs them: each item goes to the owner at once, as far ahead as it allows.

Role: shell around `ownership/streams.Window`. `run` drives a generator in the thread that called the function, `arun`
one in an async actor (plain or `async def`, under asyncio or trio).

Rules:
- An item is serialised and sent like a return value; references in it are handed off before that.
- Before the generator is resumed there must be room. Who waits for it lends its CPU, as in `get`; `StreamRead` comes
  over the owner's link and is taken in by whichever thread reads that.
- A generator that nobody reads any more is closed: GeneratorExit is raised where it stands.
- Items are written at once if nothing was in the last millisecond, else with the next ones, or by the loop in 5 ms.

Rejected: a thread that sends (a handover for each item); sending when the generator is resumed (the reader would have
each item when the next one is asked for).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

from ftray.ownership.streams import Window, item_id
from ftray.wire.messages import (
    IN_STORE,
    INLINE,
    STREAMING,
    PushActorTask,
    PushTask,
    StreamRead,
    TaskReturns,
    TaskYield,
    Value,
)
from ftray.wire.reactor import Link
from ftray.worker.inheritance import end_child
from ftray.worker.serialization import serialize
from ftray.worker.waiting import Waiter, block

if TYPE_CHECKING:
    from ftray.worker.replies import Replies

FLUSH_BYTES = 65536
FLUSH_AFTER_S = 0.001
FLUSH_LATE_MS = 5


class Flow:
    """A generator that runs here."""

    __slots__ = ("handed_off", "link", "message", "wake", "window")

    def __init__(self, link: Link, message: PushTask | PushActorTask, window: Window) -> None:
        self.link = link
        self.message = message
        self.window = window
        self.wake: Callable[[], None] | None = None
        """Wakes who waits for room; more than once does no harm."""
        self.handed_off = False

    @property
    def may_go_on(self) -> bool:
        """There is room, or no reason to wait for it."""
        return self.window.has_room() or self.window.closed or self.link.closed


class Generators:
    """See the module."""

    def __init__(self, replies: Replies) -> None:
        self.replies = replies
        self.executor = replies.executor
        self.core = replies.core
        self.reactor = replies.reactor
        self.flows: dict[tuple[bytes, int], Flow] = {}
        """By task and attempt."""
        self.yielded: dict[tuple[bytes, int], int] = {}
        """Of generators that raised: how many items they had sent, for their reply."""
        self.flushed = 0.0
        self.flush_late = False
        """The loop will flush."""

    # --- in a thread -------------------------------------------------------------------------------------------------

    def run(self, link: Link, message: PushTask | PushActorTask, result: Any, started: float, held: bool) -> None:
        """Runs a generator to its end and replies. Raises what it raises, SerializationError naming an item, and
        TypeError for a result that is no generator."""
        iterator = iterate(result, message)
        del result
        flow = self._begin(link, message)
        window = flow.window
        try:
            while True:
                if not window.has_room():
                    self._wait(flow)
                if window.closed or link.closed:
                    break
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                if self.executor.forked:
                    end_child()
                self._send(flow, item)
                item = None
            close(iterator)
        except BaseException:
            self._failed(flow)
            item = None
            close_quietly(iterator)
            raise
        finally:
            self._end(flow)
        self._reply(flow, started, held)

    def _wait(self, flow: Flow) -> None:
        """Waits until the generator may be resumed."""
        core, executor = self.core, self.executor
        self._flush()
        timeout_s: float | None = core.config.block_notice_ms / 1000.0
        blocked = False
        started_s = 0.0
        try:
            while not flow.may_go_on:
                waiter = Waiter(1)
                flow.wake = functools.partial(_release, waiter)
                if flow.may_go_on or block(core.reactor, waiter, timeout_s):
                    continue
                if not blocked:
                    blocked = True
                    timeout_s = None
                    started_s = time.perf_counter()
                    executor.blocked()
                    self._watch_channels(True)
        finally:
            flow.wake = None
            if blocked:
                self._watch_channels(False)
                executor.unblocked()
                executor.events.waited(flow.message.task_id, started_s)

    def _watch_channels(self, on: bool) -> None:
        """Has the task channels read and written while the main thread of an actor waits, as `blocked` has it done
        for tasks: the owner may die, or the socket may be what has no room."""
        executor, core = self.executor, self.core
        if executor.actor is not None and get_ident() == executor.main_thread:
            with core.lock:
                if on:
                    core.reactor.watch(self.reactor._epoll.fileno(), self._serve_channels)
                else:
                    core.reactor.unwatch(self.reactor._epoll.fileno())

    def _serve_channels(self) -> None:
        """From whichever thread reads the core's reactor, under its lock."""
        reactor = self.reactor
        with reactor.lock:
            reactor.handle(reactor.poll_events(0, 64))

    # --- in a coroutine ----------------------------------------------------------------------------------------------

    async def arun(
        self, link: Link, message: PushTask | PushActorTask, result: Any, started: float, held: bool
    ) -> None:
        """As `run`, in an event loop that must not be blocked."""
        is_async = hasattr(result, "__aiter__")
        iterator = result.__aiter__() if is_async else iterate(result, message)
        del result
        flow = self._begin(link, message)
        window = flow.window
        pause, wait = _primitives()
        try:
            while True:
                while not flow.may_go_on:
                    self._flush()
                    await wait(flow)
                if window.closed or link.closed:
                    break
                try:
                    item = await iterator.__anext__() if is_async else next(iterator)
                except (StopAsyncIteration, StopIteration):
                    break
                if self.executor.forked:
                    end_child()
                flushed = self._send(flow, item)
                item = None
                if flushed:
                    await pause()  # a generator that never waits for anything must not keep the others waiting
            if is_async:
                if hasattr(iterator, "aclose"):
                    await iterator.aclose()
            else:
                close(iterator)
        except BaseException:
            self._failed(flow)
            item = None
            if not is_async:
                close_quietly(iterator)
            elif hasattr(iterator, "aclose"):
                try:
                    await iterator.aclose()
                except BaseException:  # the first error is the one to tell
                    pass
            raise
        finally:
            flow.wake = None
            self._end(flow)
        self._reply(flow, started, held)

    # --- both --------------------------------------------------------------------------------------------------------

    def _begin(self, link: Link, message: PushTask | PushActorTask) -> Flow:
        config = self.core.config
        most = config.generator_ahead_max
        window = Window(message.ahead_max or most, most, config.generator_ahead_bytes_max)
        flow = Flow(link, message, window)
        self.flows[message.task_id, message.attempt] = flow
        return flow

    def _end(self, flow: Flow) -> None:
        self.flows.pop((flow.message.task_id, flow.message.attempt), None)

    def _failed(self, flow: Flow) -> None:
        self.yielded[flow.message.task_id, flow.message.attempt] = flow.window.sent

    def _reply(self, flow: Flow, started: float, held: bool) -> None:
        replies, message = self.replies, flow.message
        if replies.exits:
            replies.leave_after()
        work_us = int((time.perf_counter() - started) * 1e6)
        answer = TaskReturns(message.task_id, work_us, (), exits=replies.exits, yielded=flow.window.sent)
        replies.reply(flow.link, message, answer, b"", held or flow.handed_off)

    def _send(self, flow: Flow, item: Any) -> bool:
        """Sends an item; returns whether it was written at once."""
        core, link, message, window = self.core, flow.link, flow.message, flow.window
        index = window.sent
        serialized = serialize(item, f"item {index}")
        size = serialized.size
        refs = tuple(ref.wire() for ref in serialized.refs)
        if size <= core.config.inline_bytes_max:
            data = serialized.to_bytes()
            value = Value(INLINE, size, b"", refs)
        else:
            object_id = item_id(message.task_id, message.num_returns, index)
            core.objects.write(object_id, serialized, link.peer.worker_id, keep=False)
            data = b""
            value = Value(IN_STORE, size, core.node_id, refs)
        if refs:  # after all that may fail or be interrupted: nobody would let go of them
            token = (message.task_id, message.attempt, index)
            with core.lock:
                core.drain()
                if not link.closed:
                    core.table.hand_off(token, [ref.object_id for ref in refs], link.peer.worker_id)
                    flow.handed_off = True
                core.settle()
        window.yielded(size)
        reactor = self.reactor
        with reactor.lock:
            link.send(TaskYield(message.task_id, message.attempt, index, value), data)
            now = time.perf_counter()
            if now - self.flushed > FLUSH_AFTER_S or len(link.out) > FLUSH_BYTES or not data:
                self.flushed = now
                reactor.flush_dirty()
                if link.writing:
                    reactor.handle(reactor.poll_events(0, 64))  # the socket was full: it may have room again
                return True
        if not self.flush_late:
            self.flush_late = True
            with core.lock:
                core.reactor.call_later(FLUSH_LATE_MS, self._flush_now)
        return False

    def closed(self, link: Link) -> None:
        """A task channel has closed: nobody will read what runs for it. Under the channels' lock."""
        for flow in tuple(self.flows.values()):
            wake = flow.wake
            if flow.link is link and wake is not None:
                wake()

    def _flush(self) -> None:
        with self.reactor.lock:
            self.reactor.flush_dirty()

    def _flush_now(self) -> None:
        """From the loop, under the core's lock."""
        self.flush_late = False  # first: what is added from here on asks anew
        self._flush()

    # --- from owners -------------------------------------------------------------------------------------------------

    def told(self, message: StreamRead) -> None:
        """An owner has read, under the core's lock. A generator that has ended meanwhile need not know."""
        flow = self.flows.get((message.task_id, message.attempt))
        if flow is not None:
            flow.window.told(message.read)
            wake = flow.wake  # not cleared: it may be a newer one by then
            if wake is not None:
                wake()


def iterate(result: Any, message: PushTask | PushActorTask) -> Any:
    """The iterator of a generator task's result. Raises TypeError when it has none."""
    if inspect.isasyncgen(result):
        raise TypeError("an async generator must be a method of an async actor: there is no event loop here")
    if not hasattr(result, "__iter__") or isinstance(result, str | bytes | bytearray | dict):
        asked = "streaming" if message.num_returns == STREAMING else "dynamic"
        raise TypeError(
            f'num_returns is "{asked}", but the task returned one {type(result).__name__}: yield the values, or return '
            "an iterator of them"
        )
    return iter(result)


def close(iterator: Any) -> None:
    """Ends a generator where it stands. Raises what its own clean-up raises."""
    if hasattr(iterator, "close"):
        iterator.close()


def close_quietly(iterator: Any) -> None:
    """The same after an error, which is the one to tell."""
    try:
        close(iterator)
    except BaseException:
        pass


def _release(waiter: Waiter) -> None:
    """Ends a thread's wait; two others may say so at the same time."""
    waiter.remaining = 0
    try:
        waiter.lock.release()
    except RuntimeError:
        pass


def _primitives() -> tuple[Callable[[], Any], Callable[[Flow], Any]]:
    """How to let others run, and how to wait for room, in the event loop that runs now."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        import trio

        return trio.lowlevel.checkpoint, _wait_in_trio
    return lambda: asyncio.sleep(0), _wait_in_asyncio


def _wake_future(event: asyncio.Future[None]) -> None:
    if not event.done():
        event.set_result(None)


async def _wait_in_asyncio(flow: Flow) -> None:
    loop = asyncio.get_running_loop()
    event = loop.create_future()

    def wake() -> None:
        try:
            loop.call_soon_threadsafe(_wake_future, event)
        except RuntimeError:
            pass  # the loop is closed

    flow.wake = wake
    if not flow.may_go_on:
        await event


async def _wait_in_trio(flow: Flow) -> None:
    import trio

    event = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def wake() -> None:
        try:
            token.run_sync_soon(event.set)
        except trio.RunFinishedError:
            pass

    flow.wake = wake
    if not flow.may_go_on:
        await event.wait()
