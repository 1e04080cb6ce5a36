"""`ObjectRefGenerator`: what the caller of a generator task iterates over.

Role: shell around `worker/streams.py`. Each step waits for the next item, as `get` would for an object, and gives a
reference to it; the values stay where they are until they are asked for.

Rejected: a reader that hands out references before their items are there (nobody could tell where the end is).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from ftray.ids import return_id
from ftray.wire.messages import DYNAMIC
from ftray.worker.core import Core
from ftray.worker.refs import ObjectRef, check_current
from ftray.worker.streams import COMPLETION_INDEX, HANDLE_INDEX
from ftray.worker.streams import DynamicObjectRefGenerator as DynamicObjectRefGenerator
from ftray.worker.waiting import Waiter

if TYPE_CHECKING:
    import asyncio

    from ftray.worker.streams import StreamRecord

log = logging.getLogger("ftray.worker")

R = TypeVar("R")


def returned(core: Core, task_id: bytes, num_returns: int) -> Any:
    """What the call of a generator task returns."""
    if num_returns == DYNAMIC:
        return ObjectRef(return_id(task_id, 0), core)
    return ObjectRefGenerator(core, task_id)


class ObjectRefGenerator(Generic[R]):
    """The references to what a generator task yields, in order, each as soon as its item is there.

    Iterate with `for` or, under asyncio and trio, with `async for`; `ftray.wait` takes it among references, where it is
    ready when the next step need not wait. If the task fails, the last reference raises why at `get`.

    Dropping it ends the task, unless `completed()` is held. It stays in the process that called the task.
    """

    __slots__ = ("__weakref__", "_core", "_generator_ref", "_handle_id", "_record")

    def __init__(self, core: Core, task_id: bytes) -> None:
        self._core = core
        self._handle_id = return_id(task_id, HANDLE_INDEX)
        self._generator_ref: ObjectRef[None] = ObjectRef(return_id(task_id, COMPLETION_INDEX), core)
        self._record: StreamRecord = core.streams.records[task_id]

    def __del__(self) -> None:
        try:
            self._core.released.append(self._handle_id)
        except AttributeError:
            pass  # made without __init__, by hand

    @property
    def _task_id(self) -> bytes:
        return self._handle_id[:16]

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self._task_id.hex()})"

    # --- reading -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> ObjectRefGenerator[R]:
        return self

    def __next__(self) -> ObjectRef[R]:
        """The next reference; waits until its item is there. Raises StopIteration at the end, ForeignRefError."""
        core = self._core
        while True:
            ref, head_id, waiter = core.streams.step(self._record, _new_waiter)
            if ref is not None:
                return ref  # type: ignore[no-any-return]
            if waiter is None:
                raise StopIteration
            self._wait(waiter, head_id)

    def _wait(self, waiter: Waiter, head_id: bytes) -> None:
        check_current(self._generator_ref)
        core = self._core
        warning_s = core.config.wait_warning_ms / 1000.0
        done = False
        try:
            done = core.objects.block(waiter, warning_s)
            if not done:
                log.warning("still waiting: %s", core.objects.describe_pending([head_id], warning_s))
                done = core.objects.block(waiter, None)
        finally:
            if not done:
                core.objects._unhang([head_id], waiter)

    def __aiter__(self) -> ObjectRefGenerator[R]:
        return self

    async def __anext__(self) -> ObjectRef[R]:
        """The same without blocking the event loop. Raises StopAsyncIteration at the end, ForeignRefError."""
        core = self._core
        while True:
            ref, head_id, waiter = core.streams.step(self._record, AsyncWaiter)
            if ref is not None:
                return ref  # type: ignore[no-any-return]
            if waiter is None:
                raise StopAsyncIteration
            done = False
            try:
                check_current(self._generator_ref)
                await waiter.wait()
                done = True
            finally:
                if not done:
                    core.objects._unhang([head_id], waiter)  # type: ignore[arg-type]

    # --- looking -----------------------------------------------------------------------------------------------------

    def completed(self) -> ObjectRef[None]:
        """A reference that is ready (its value is None) when the task has ended, and raises its error at `get`.

        Whoever waits for it lifts the bound of unread items, since the task may have to yield more of them to end.
        """
        return self._generator_ref

    def next_ready(self) -> bool:
        """Whether `next` would give a reference at once. False at the end."""
        state = self._record.state
        return state.read < state.arrived

    def is_finished(self) -> bool:
        """Whether the task has ended and all references have been taken: `next` would raise StopIteration."""
        state = self._record.state
        return state.over and state.read == state.arrived

    def _peek(self) -> NextItem:
        """What `wait` looks at in place of the generator."""
        core = self._core
        record = self._record
        with core.lock:
            state = record.state
            if state.read < state.arrived:
                return NextItem(record.item_id(state.read), self._core)
            core.streams.tell(record, True)
            return NextItem(record.item_id(state.arrived), self._core)

    # --- what it is not ----------------------------------------------------------------------------------------------

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ObjectRefGenerator cannot be sent to another process or copied: pass the references that it gives, or "
            "completed()"
        )


def _new_waiter() -> Waiter:
    return Waiter(1)


class AsyncWaiter:
    """What a coroutine hangs on an object, under asyncio or trio, whichever runs."""

    __slots__ = ("ready", "wait")

    def __init__(self) -> None:
        self.ready: Callable[[bytes, Any], None]
        self.wait: Callable[[], Awaitable[None]]
        import asyncio  # not before: it is a good part of what `import ftray` would take

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            import trio

            event = trio.Event()
            token = trio.lowlevel.current_trio_token()

            def set_event(object_id: bytes, entry: Any) -> None:
                try:
                    token.run_sync_soon(event.set)
                except trio.RunFinishedError:
                    pass

            self.ready, self.wait = set_event, event.wait
        else:
            future: asyncio.Future[None] = loop.create_future()

            def set_future(object_id: bytes, entry: Any) -> None:
                try:
                    loop.call_soon_threadsafe(_wake_future, future)
                except RuntimeError:
                    pass  # that loop has been closed

            self.ready, self.wait = set_future, lambda: future


def _wake_future(event: asyncio.Future[None]) -> None:
    if not event.done():
        event.set_result(None)


class NextItem:
    """An object that need not exist yet, for `ObjectPlane.wait`."""

    __slots__ = ("_core", "_id")

    def __init__(self, object_id: bytes, core: Core) -> None:
        self._id = object_id
        self._core = core


def wait_mixed(
    core: Core, waited: Sequence[Any], num_returns: int, timeout_s: float | None
) -> tuple[list[Any], list[Any]]:
    """`ObjectPlane.wait` for references and generators."""
    looked = [each._peek() if isinstance(each, ObjectRefGenerator) else each for each in waited]
    given = {id(look): each for look, each in zip(looked, waited, strict=True)}
    ready, rest = core.objects.wait(looked, num_returns, timeout_s)
    return [given[id(look)] for look in ready], [given[id(look)] for look in rest]
