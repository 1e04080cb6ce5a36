"""Values: `put`, `get`, `wait`.

Role: shell. A small value is bytes in its reference entry. A large one is in the node's store, of which `store_client`
is this process's side.

Rejected: small values in the store as well (a request to the raylet for each).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from ftray.exceptions import (
    ForeignRefError,
    FtrayError,
    GetTimeoutError,
    ObjectFreedError,
    ObjectLostError,
    OwnerDiedError,
    TaskError,
)
from ftray.ids import PUT_INDEX, return_id, short_object
from ftray.ownership.references import Entry
from ftray.wire.messages import (
    ERROR,
    IN_STORE,
    INLINE,
    Value,
)
from ftray.worker import waiting
from ftray.worker.call_sites import note_site
from ftray.worker.explaining import describe
from ftray.worker.failures import load_task_error
from ftray.worker.serialization import Serialized, deserialize, loading_refs
from ftray.worker.store_client import StoreClient
from ftray.worker.waiting import Callback, Waiter, block

log = logging.getLogger("ftray.worker")

READ_PATIENCE_S = 1.0
"""What is ready in the store may take so long to be read, whatever the caller's timeout: the node is asked for it, and
it may have to come back from disk. With less, `get(..., timeout=0)` would fail for what `wait` calls ready."""

if TYPE_CHECKING:
    from ftray.worker.core import Core

PENDING, READY_INLINE, READY_STORE, FAILED = waiting.PENDING, waiting.INLINE, waiting.IN_STORE, waiting.FAILED


class ObjectPlane(StoreClient):
    """See the module."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.resolving: dict[bytes, set[bytes]] = {}
        """Owner -> objects asked of it and not answered."""
        self.waits: dict[Waiter, tuple[str, list[bytes]]] = {}
        """Threads that wait in a call (`get`, `wait`) for objects, for `ftray list pending`."""

    # --- values arrive -----------------------------------------------------------------------------------------------

    def resolve(self, object_id: bytes, entry: Entry, state: int, value: object) -> None:
        """The value (or error) of an object is known, under the lock."""
        entry.state = state
        entry.value = value
        waiters: Any = entry.waiters
        if waiters is not None:
            entry.waiters = None
            for waiter in waiters:
                waiter.ready(object_id, entry)

    def take_value(self, object_id: bytes, value: Value, payload: bytes | bytearray | memoryview) -> None:
        """A `Value` arrived for an object known here (or not: then the store is told to free it)."""
        entry = self.core.entries.get(object_id)
        if entry is None:
            if value.kind == IN_STORE:
                self.free_in_store(object_id)
            return
        if entry.state != PENDING:
            return
        if value.kind == INLINE:
            self.resolve(object_id, entry, READY_INLINE, payload)
        elif value.kind == IN_STORE:
            self.resolve(object_id, entry, READY_STORE, (value.node_id, value.size))
        elif value.kind == ERROR:
            self.resolve(object_id, entry, FAILED, bytes(payload))
        else:
            self.resolve(
                object_id, entry, FAILED, ObjectFreedError(object_id.hex(), "its owner has freed it")
            )

    def freed(self, object_id: bytes, entry: Entry) -> None:
        """Nobody holds an object owned here."""
        if entry.state == READY_STORE:
            self.unhold(object_id)
            self.free_in_store(object_id)
        elif entry.task is not None:
            self.core.streams.let_go(object_id, entry.task)
        if self.core.sites:
            self.core.sites.pop(object_id, None)
        if object_id[16:] == b"\0\0\0\0":
            self.core.actors.handle_freed(object_id)

    def forgot(self, object_id: bytes, entry: Entry) -> None:
        """A borrowed object is not held here any more."""
        self.unhold(object_id)
        if entry.owner is not None:
            asked = self.resolving.get(entry.owner)
            if asked is not None:
                asked.discard(object_id)
        if object_id[16:] == b"\0\0\0\0":
            self.core.actors.handle_freed(object_id)

    def borrow_lost(self, object_id: bytes, entry: Entry) -> None:
        if entry.state == PENDING:
            self.resolve(
                object_id,
                entry,
                FAILED,
                ObjectLostError(object_id.hex(), "its owner freed it before this process could register"),
            )

    def owner_died(self, owner: bytes, endpoint: str, why: str) -> None:
        """The link to an owner broke: its objects are lost here, under the lock."""
        for object_id in self.core.table.owner_died(owner):
            entry = self.core.entries[object_id]
            if entry.state == PENDING:
                self.resolve(
                    object_id,
                    entry,
                    FAILED,
                    OwnerDiedError(object_id.hex(), f"at {endpoint}: {why}", owner=owner.hex()),
                )
        self.resolving.pop(owner, None)

    def free_leftovers(self, task_id: bytes, num_returns: int) -> None:
        """A retried task is done, under the lock: an earlier attempt may have stored what is small now, or an error."""
        for index in range(num_returns):
            object_id = return_id(task_id, index)
            entry = self.core.entries.get(object_id)
            if entry is None or entry.state != READY_STORE:
                self.free_in_store(object_id)

    # --- put ---------------------------------------------------------------------------------------------------------

    def put(self, serialized: Serialized) -> bytes:
        """Stores a value owned here; returns its id, with one local reference counted.

        Raises ObjectStoreFullError when it does not fit, OutOfDiskError when that is because the disk is full.
        """
        core = self.core
        if core.inside():
            core.check_entry()
        context = core.context()
        object_id = context.prefix + context.counter().to_bytes(4, "little") + PUT_INDEX
        inner = [ref.binary() for ref in serialized.refs]
        if core.sites is not None:
            note_site(core, object_id)
        if serialized.size <= core.config.inline_bytes_max:
            data = serialized.to_bytes()
            with core.lock:
                core.drain()
                entry = core.table.add_owned(object_id)
                entry.state = READY_INLINE
                entry.value = data
                if inner:
                    core.table.set_contains(object_id, inner)
                core.tick_soon()
            return object_id
        self.write(object_id, serialized, core.worker_id, keep=True)
        with core.lock:
            core.drain()
            entry = core.table.add_owned(object_id)
            entry.state = READY_STORE
            entry.value = (core.node_id, serialized.size)
            if inner:
                core.table.set_contains(object_id, inner)
            core.tick_soon()
        return object_id

    # --- get ---------------------------------------------------------------------------------------------------------

    def wait_ready(self, refs: Sequence[Any], timeout_s: float | None) -> None:
        """Blocks until all are ready. Raises GetTimeoutError naming what is missing."""
        core = self.core
        if core.inside():
            core.check_entry()
        entries = core.entries
        waiter: Waiter | None = None
        missing = 0
        hung: list[bytes] = []
        borrowed: list[bytes] = []
        with core.lock:
            core.drain()
            for ref in refs:
                object_id = ref._id
                entry = entries.get(object_id)
                if entry is None:
                    raise ObjectFreedError(object_id.hex())
                if entry.state == PENDING:
                    if waiter is None:
                        waiter = Waiter(0)
                    missing += 1
                    waiters: Any = entry.waiters
                    if waiters is None:
                        entry.waiters = [waiter]
                    else:
                        waiters.append(waiter)
                    hung.append(object_id)
                    if entry.owner is not None:
                        borrowed.append(object_id)
            if waiter is None:
                return
            waiter.remaining = missing
            for object_id in borrowed:  # only now: of an owner that is known to be dead the answer comes at once
                self.request(object_id, entries[object_id])
            core.settle()
        done = False
        waits = self.waits
        waits[waiter] = ("get", hung)
        try:
            warning_s = core.config.wait_warning_ms / 1000.0
            if timeout_s is not None and timeout_s <= warning_s:
                done = self.block(waiter, timeout_s)
            else:
                done = self.block(waiter, warning_s)
                if not done:
                    log.warning("still waiting: %s", self.describe_pending(hung, warning_s))
                    done = self.block(waiter, None if timeout_s is None else timeout_s - warning_s)
        finally:
            waits.pop(waiter, None)
            if not done:
                self._unhang(hung, waiter)
        if not done:
            raise GetTimeoutError(self.describe_pending(hung, timeout_s))

    def block(self, waiter: Waiter, timeout_s: float | None) -> bool:
        """Waits; in a worker, lends the CPU after a moment."""
        core = self.core
        executor = core.executor
        if executor is None:
            return block(core.reactor, waiter, timeout_s)
        notice_s = core.config.block_notice_ms / 1000.0
        if timeout_s is not None and timeout_s <= notice_s:
            return block(core.reactor, waiter, timeout_s)
        if block(core.reactor, waiter, notice_s):
            return True
        executor.blocked()
        started_s = time.perf_counter()
        try:
            return block(core.reactor, waiter, None if timeout_s is None else timeout_s - notice_s)
        finally:
            executor.events.waited(core.context().task_id, started_s)
            executor.unblocked()

    def _unhang(self, object_ids: list[bytes], waiter: Waiter) -> None:
        with self.core.lock:
            for object_id in object_ids:
                entry = self.core.entries.get(object_id)
                waiters: Any = entry.waiters if entry is not None else None
                if waiters is not None and waiter in waiters:
                    waiters.remove(waiter)

    def describe_pending(self, object_ids: list[bytes], timeout_s: float | None) -> str:
        """What a `get` that ran out of time was waiting for."""
        core = self.core
        with core.lock:
            left = [x for x in object_ids if (e := core.entries.get(x)) is not None and e.state == PENDING]
            lines = [f"  {short_object(x)}: {describe(core, x)}" for x in left[:5]]
            trouble = core.gcs.trouble()
        more = f"\n  and {len(left) - 5} more" if len(left) > 5 else ""
        more += f"\n{trouble}" if trouble else ""
        head = f"{len(left)} of the objects were not ready within {timeout_s} s; waiting for:\n"
        return head + "\n".join(lines) + more

    def hang(self, object_id: bytes, entry: Entry, waiter: Any) -> None:
        """Has `waiter.ready` called when a pending object is ready; a borrowed one is asked for. Under the lock."""
        if entry.waiters is None:
            entry.waiters = [waiter]
        else:
            entry.waiters.append(waiter)
        if entry.owner is not None:
            self.request(object_id, entry)

    def request(self, object_id: bytes, entry: Entry) -> None:
        """Asks the owner for a borrowed object's value, once, under the lock."""
        owner = entry.owner
        assert owner is not None
        asked = self.resolving.setdefault(owner, set())
        if object_id not in asked:
            asked.add(object_id)
            self.core.peers.resolve(owner, entry.owner_endpoint, object_id)

    def get(self, refs: Sequence[Any], timeout_s: float | None) -> list[Any]:
        """The values, in order; raises the first error found."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.wait_ready(refs, timeout_s)
        entries = self.core.entries
        values: list[Any] = []
        stored: list[int] = []
        for index, ref in enumerate(refs):
            entry = entries.get(ref._id)
            if entry is None:
                raise ObjectFreedError(ref.hex())
            state = entry.state
            if state == READY_INLINE:
                values.append(self.load(ref._id, entry.value))
            elif state == READY_STORE:
                stored.append(index)
                values.append(None)
            else:
                raise self.error_of(entry)
        if stored:
            left = None if deadline is None else max(READ_PATIENCE_S, deadline - time.monotonic())
            for index, value in zip(stored, self.load_stored([refs[i]._id for i in stored], left), strict=True):
                values[index] = value
        return values

    def load(self, object_id: bytes, data: Any) -> Any:
        """Deserialises an inline value. Not under the lock."""
        if b"ftray" not in data:  # no reference can be inside: each names its loader
            return deserialize(data)
        with loading_refs(self.core.peers.ref_loader(object_id)):
            return deserialize(data)

    def error_of(self, entry: Entry) -> BaseException:
        """The exception that a failed object stands for; a new one each time, since raising adds a traceback."""
        value = entry.value
        if isinstance(value, bytes | bytearray | memoryview):
            error = load_task_error(value)
            if isinstance(error, TaskError):
                return error.as_instance_of_cause()
            return error
        assert isinstance(value, FtrayError)
        return copy(value)  # its traceback would keep the caller's variables, and with them references

    # --- wait --------------------------------------------------------------------------------------------------------

    def wait(self, refs: list[Any], num_returns: int, timeout_s: float | None) -> tuple[list[Any], list[Any]]:
        """Splits into (ready, not ready) once `num_returns` are ready or time is up.

        Raises ForeignRefError for a reference of another session, if it comes across it: they are not all looked at.
        """
        core = self.core
        core.check_entry()
        entries = core.entries
        waiter: Waiter | None = None
        with core.lock:
            core.drain()
            ready_count = 0
            for ref in refs:
                entry = entries.get(ref._id)
                if entry is None and ref._core is not core:
                    raise ForeignRefError(f"{ref!r} belongs to a session that is over or to another cluster")
                if entry is None or entry.state != PENDING:
                    ready_count += 1
                    if ready_count >= num_returns:
                        break
            if ready_count < num_returns:
                waiter = Waiter(num_returns - ready_count)
                for ref in refs:
                    entry = entries.get(ref._id)
                    if entry is not None and entry.state == PENDING:
                        self.hang(ref._id, entry, waiter)
            core.settle()
        if waiter is not None:
            hung = [ref._id for ref in refs]
            self.waits[waiter] = ("wait", hung)
            try:
                self.block(waiter, timeout_s)
            finally:
                self.waits.pop(waiter, None)
                self._unhang(hung, waiter)
        ready: list[Any] = []
        rest: list[Any] = []
        for index, ref in enumerate(refs):
            entry = entries.get(ref._id)
            if entry is None or entry.state != PENDING:
                ready.append(ref)
                if len(ready) == num_returns:
                    rest += refs[index + 1 :]
                    break
            else:
                rest.append(ref)
        return ready, rest

    def when_ready(self, object_id: bytes, fn: Callable[[], None]) -> None:
        """Calls `fn` (under the lock: it must only hand over) when the object is ready; at once if it is."""
        core = self.core
        core.check_entry()
        with core.lock:
            core.drain()
            entry = core.entries.get(object_id)
            if entry is None or entry.state != PENDING:
                fn()
            else:
                self.hang(object_id, entry, Callback(lambda _object_id, _entry: fn()))
            core.settle()


class Answer:
    """Where a thread waits for the answer to one request."""

    __slots__ = ("error", "message", "payload", "waiter")

    def __init__(self) -> None:
        self.waiter = Waiter(1)
        self.message: Any = None
        self.payload: Any = None
        self.error: BaseException | None = None

    def give(self, message: Any, payload: Any = b"") -> None:
        self.message, self.payload = message, payload
        self.waiter.ready(b"", None)  # type: ignore[arg-type]

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.waiter.ready(b"", None)  # type: ignore[arg-type]
