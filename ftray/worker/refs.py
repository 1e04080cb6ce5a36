"""`ObjectRef`: a counted reference to an object that is or will be.

Role: what user code holds. Its life is its count: making one (by the runtime) follows an increment of the entry's
`local`, its end appends the id to a deque that the next entry of the runtime drains; no lock, no message, from any
thread and from inside the garbage collector.

Rejected: `weakref.finalize` for each reference (600 bytes); counting in `__init__` (the runtime counts under its lock
anyway).
"""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ftray.exceptions import ForeignRefError
from ftray.wire.messages import Ref
from ftray.worker.core import core_or_none
from ftray.worker.serialization import load_ref, note_ref

if TYPE_CHECKING:
    import asyncio

    from ftray.worker.core import Core

R = TypeVar("R")


class ObjectRef(Generic[R]):
    """A future: the id of an object, kept alive while this reference lives.

    Get its value with `ftray.get(ref)`, `await ref` (asyncio or trio) or `ref.future()`. Passing it to a remote call
    as an argument passes the value; inside another value it stays a reference.
    """

    __slots__ = ("__weakref__", "_core", "_id")

    def __init__(self, object_id: bytes, core: Core) -> None:
        self._id = object_id
        self._core = core

    def __del__(self) -> None:
        try:
            self._core.released.append(self._id)
        except AttributeError:
            pass  # made without __init__, by hand

    def binary(self) -> bytes:
        """The object's id, 20 bytes."""
        return self._id

    def hex(self) -> str:
        """The object's id in hexadecimal."""
        return self._id.hex()

    def task_id(self) -> str:
        """The id of the task that makes the object, in hexadecimal."""
        return self._id[:16].hex()

    def is_nil(self) -> bool:
        return False

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and other._id == self._id

    def __repr__(self) -> str:
        return f"ObjectRef({self._id.hex()})"

    def wire(self) -> Ref:
        """As messages carry it: the object, and where its owner lives."""
        core = self._core
        entry = core.entries.get(self._id)
        if entry is None or entry.owner is None:
            return Ref(self._id, core.worker_id, core.endpoint)
        return Ref(self._id, entry.owner, entry.owner_endpoint)

    def __reduce__(self) -> tuple[Any, ...]:
        core = self._core
        check_current(self)
        contained = note_ref(self)
        wire = self.wire()
        if not contained:
            with core.lock:
                core.table.pin_forever(self._id)
                core.settle()
        return load_ref, (wire.object_id, wire.owner, wire.endpoint)

    def __copy__(self) -> ObjectRef[R]:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ObjectRef[R]:
        return self

    # --- waiting in other ways ---------------------------------------------------------------------------------------

    def future(self) -> concurrent.futures.Future[R]:
        """A `concurrent.futures.Future` of the value."""
        future: concurrent.futures.Future[R] = concurrent.futures.Future()
        core = self._core
        check_current(self)

        def resolve() -> None:
            # Deserialising runs user code, which must not happen under the core's lock or in its loop.
            core.callbacks.submit(_settle, self, future)

        core.objects.when_ready(self._id, resolve)
        return future

    def __await__(self) -> Generator[Any, Any, R]:
        return self._wait().__await__()

    async def _wait(self) -> R:
        core = self._core
        check_current(self)
        # Who waits in asyncio has imported it; `import ftray` does not.
        asyncio = sys.modules.get("asyncio")
        try:
            loop = asyncio.get_running_loop() if asyncio is not None else None
        except RuntimeError:
            loop = None
        if loop is not None:
            event = loop.create_future()

            def wake() -> None:
                try:
                    loop.call_soon_threadsafe(_wake_future, event)
                except RuntimeError:
                    pass  # that loop has been closed

            entry = core.entries.get(self._id)
            if entry is None or not entry.state:
                core.objects.when_ready(self._id, wake)
                await event
        else:
            await _wait_in_trio(self)
        value: R = core.objects.get([self], None)[0]
        return value


def _wake_future(event: asyncio.Future[None]) -> None:
    if not event.done():
        event.set_result(None)


async def _wait_in_trio(ref: ObjectRef[Any]) -> None:
    import trio

    event = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def wake() -> None:
        try:
            token.run_sync_soon(event.set)
        except trio.RunFinishedError:
            pass

    ref._core.objects.when_ready(ref._id, wake)
    await event.wait()


def _settle(ref: ObjectRef[Any], future: concurrent.futures.Future[Any]) -> None:
    try:
        value = ref._core.objects.get([ref], None)[0]
    except BaseException as error:
        if not future.cancelled():
            future.set_exception(error)
    else:
        if not future.cancelled():
            future.set_result(value)


def check_current(ref: ObjectRef[Any]) -> None:
    """Raises ForeignRefError for a reference of an earlier session or another cluster."""
    core = core_or_none()
    if ref._core is not core:
        from ftray.worker.core import get_core

        get_core()  # says so when no session runs at all
        raise ForeignRefError(
            f"{ref!r} belongs to a session that is over or to another cluster; "
            "references do not outlive ftray.shutdown()"
        )
