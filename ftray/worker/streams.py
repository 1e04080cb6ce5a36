"""The owner's end of generator tasks: items become objects, readers get their references, workers hear of reads.

Role: shell around `ownership/streams.py`. A streaming task has, besides its items, two entries in the reference table:

- the *completion* (`completed()`), which is ready when the task has ended, and
- the *handle*, held by the `ObjectRefGenerator` alone: that it is freed means that nobody will read.

The next item that has not arrived is an entry as well (the *head*), so that a reader waits for it as for any object: in
`next`, in `wait`, under asyncio and trio. When the stream ends without it, the head is freed, which is an answer too.

Rules: an item is held by the stream from its arrival until it is read; then its reference takes over the hold. When
handle and completion are gone the worker is told to close the generator. For `num_returns="dynamic"` the completion is
return 0, whose value is the list of the others' references: it is pickled by a thread of `core.callbacks`, since
nothing is serialised under the lock.

Rejected: a hook for each reference that is waited for, to learn that somebody waits for the completion (a list that
tells when something is hung on it costs nothing elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ftray.exceptions import FtrayError
from ftray.ids import return_id
from ftray.ownership.references import Entry
from ftray.ownership.streams import GAP, TAKE, Stream
from ftray.ownership.tasks import TaskRecord
from ftray.wire.messages import DYNAMIC, IN_STORE, INLINE, StreamRead, TaskYield
from ftray.worker import waiting
from ftray.worker.serialization import serialize

if TYPE_CHECKING:
    from ftray.worker.core import Core

W = TypeVar("W")
HANDLE_INDEX = 0xFFFF_FFFD
COMPLETION_INDEX = 0xFFFF_FFFE
"""Returns that no task has: `put` has the one after these, items the ones from 0."""
NONE_PICKLED = b"\x80\x05N."


class DynamicObjectRefGenerator:
    """The value of a task with `num_returns="dynamic"`: the references of what it has yielded, in order."""

    def __init__(self, refs: Sequence[Any]) -> None:
        self._refs = list(refs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __repr__(self) -> str:
        return f"<DynamicObjectRefGenerator of {len(self)} references>"


class CompletionWaiters(list[Any]):
    """What waits for a stream's end: the first one lifts its bound, for who waits for the end reads no items."""

    def __init__(self, streams: Streams, record: StreamRecord) -> None:
        super().__init__()
        self.streams = streams
        self.record = record

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        self.record.state.lift()
        self.streams.tell(self.record, False)


class StreamRecord:
    """One streaming task, from its submission until it has ended and its generator is gone."""

    __slots__ = ("endpoint", "head", "head_id", "offset", "orphan", "state", "task", "task_id", "worker_id")

    def __init__(self, task: TaskRecord, state: Stream) -> None:
        self.task: TaskRecord | None = task
        """None when it has ended."""
        self.task_id = task.task_id
        self.state = state
        self.offset = 1 if task.num_returns == DYNAMIC else 0
        """The return index of item 0."""
        self.worker_id = b""
        self.endpoint = ""
        """Where the newest item came from."""
        self.head_id = b""
        self.head: Entry | None = None
        self.orphan = -1
        """The item that the attempt before may have written into the store without telling of it."""

    @property
    def completion_id(self) -> bytes:
        return return_id(self.task_id, 0 if self.offset else COMPLETION_INDEX)

    def item_id(self, index: int) -> bytes:
        return return_id(self.task_id, index + self.offset)


class Streams:
    """See the module. Methods run under the core's lock unless they say otherwise."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.records: dict[bytes, StreamRecord] = {}

    def open(self, task: TaskRecord) -> None:
        """A streaming task is about to be submitted: enters completion, handle and head, a local reference each."""
        core = self.core
        config = core.config
        state = Stream(task.ahead_max, config.generator_ahead_max, config.generator_ahead_bytes_max)
        record = StreamRecord(task, state)
        self.records[task.task_id] = record
        completion = core.table.add_owned(record.completion_id)
        completion.task = record
        if record.offset:
            return
        completion.waiters = CompletionWaiters(self, record)
        handle = core.table.add_owned(return_id(task.task_id, HANDLE_INDEX))
        handle.task = record
        self._new_head(record)

    def _new_head(self, record: StreamRecord) -> None:
        record.head_id = head_id = record.item_id(record.state.arrived)
        record.head = self.core.table.add_owned(head_id)

    # --- items arrive ------------------------------------------------------------------------------------------------

    def item(self, message: TaskYield, payload: bytes | bytearray, worker_id: bytes, endpoint: str) -> None:
        """An item of a task of ours."""
        record = self.records.get(message.task_id)
        value = message.value
        if record is None or record.task is None or message.attempt != record.task.attempt:
            self._refuse(message, worker_id, endpoint)
            return
        state = record.state
        if state.attempt != message.attempt:
            record.worker_id, record.endpoint = worker_id, endpoint
            if message.attempt:
                record.orphan = state.arrived
        verdict = state.item(message.attempt, message.index, value.size)
        if verdict is TAKE:
            core = self.core
            head, head_id = record.head, record.head_id
            if head is None:  # a dynamic one: nobody waits for a single item
                head_id = record.item_id(message.index)
                head = core.table.add_owned(head_id)
            else:
                self._new_head(record)
            if value.refs:
                inner = [(ref.object_id, ref.owner, ref.endpoint) for ref in value.refs]
                token = (worker_id, endpoint, message.task_id, message.attempt, message.index)
                core.table.receive_contained(head_id, inner, token)
                core.run_effects()
            if value.kind == INLINE:
                core.objects.resolve(head_id, head, waiting.INLINE, payload)
                if message.index == record.orphan:
                    core.objects.free_in_store(head_id)
            else:
                core.objects.take_value(head_id, value, payload)
        else:
            self._refuse(message, worker_id, endpoint)
            if verdict is GAP:
                self._stop(record, f"item {state.arrived} did not arrive, but item {message.index} did")
                return
        if state.free or message.attempt:
            self.tell(record, False)

    def _refuse(self, message: TaskYield, worker_id: bytes, endpoint: str) -> None:
        """Lets go of an item that is not wanted, and of the references in it."""
        core = self.core
        value = message.value
        if value.refs:
            core.peers.ack_returns((worker_id, endpoint, message.task_id, message.attempt, message.index))
        if value.kind == IN_STORE:
            record = self.records.get(message.task_id)
            # Of a stream that has been forgotten it is not known which of two objects it was; both are of no use then.
            for offset in (0, 1) if record is None else (record.offset,):
                object_id = return_id(message.task_id, message.index + offset)
                entry = core.entries.get(object_id)
                if entry is None or entry.state == waiting.INLINE:
                    core.objects.free_in_store(object_id)

    def _stop(self, record: StreamRecord, why: str) -> None:
        """The worker breaks the rules: its task fails, and it is told to end."""
        record.state.drop()
        self.tell(record, False)
        task = record.task
        assert task is not None
        task.retries_left = 0
        self.failed(task, FtrayError(f"{task.function.name} failed: {why}"))

    # --- the task ends -----------------------------------------------------------------------------------------------

    def ended(self, task: TaskRecord, yielded: int) -> None:
        """The generator has come to its end."""
        record = self.records.get(task.task_id)
        if record is None or record.task is None:
            return
        state = record.state
        if not state.end(yielded):
            state.over = False
            error = f"{yielded} items were sent, but only {state.arrived} arrived"
            return self.failed(task, FtrayError(f"{task.function.name} failed: {error}"))
        record.task = None
        if task.attempt and not state.left:
            self.core.objects.free_in_store(record.item_id(state.arrived))  # see `orphan`
        if record.offset and not state.left:
            self._list(record, yielded)
            return
        self._drop_head(record)
        self._complete(record, waiting.INLINE, NONE_PICKLED)
        self.core.run_effects()

    def failed(self, task: TaskRecord, error: object) -> None:
        """The task has failed for good, with packed bytes or an exception of ours."""
        record = self.records.get(task.task_id)
        if record is None or record.task is None:
            return
        core = self.core
        state = record.state
        record.task = None
        last = state.arrived
        lost_id = record.item_id(last)
        if record.offset and not state.left and not isinstance(error, BaseException):
            # What the function raised is the last of the references, as it is for a stream.
            state.fail()
            entry = core.table.add_owned(lost_id)
            core.objects.resolve(lost_id, entry, waiting.FAILED, error)
            self._list(record, last + 1)
            return
        core.objects.free_in_store(lost_id)  # it may have been written before what failed the task
        if record.offset:
            state.end(last)
            self._let_go(record, state.leave())
        else:
            state.fail()
            head, head_id = record.head, record.head_id
            record.head = None
            if head is not None and head.state == waiting.PENDING:
                core.objects.resolve(head_id, head, waiting.FAILED, error)
        self._complete(record, waiting.FAILED, error)
        core.run_effects()

    def _complete(self, record: StreamRecord, state: int, value: object) -> None:
        if record.state.left or record.offset:
            self.records.pop(record.task_id, None)
        completion_id = record.completion_id
        entry = self.core.entries.get(completion_id)
        if entry is not None:
            entry.task = None
            if entry.state == waiting.PENDING:
                self.core.objects.resolve(completion_id, entry, state, value)

    def _drop_head(self, record: StreamRecord) -> None:
        """No more items will come: whoever waits for the next one is told, and finds nothing."""
        head = record.head
        if head is not None:
            record.head = None
            if head.state == waiting.PENDING:
                self.core.objects.resolve(record.head_id, head, waiting.INLINE, NONE_PICKLED)
            self._let_go_of((record.head_id,))

    def _let_go(self, record: StreamRecord, indexes: range) -> None:
        self._let_go_of([record.item_id(index) for index in indexes])

    def _let_go_of(self, object_ids: Sequence[bytes]) -> None:
        for object_id in object_ids:
            self.core.table.remove_local(object_id)

    # --- dynamic: the list of all ------------------------------------------------------------------------------------

    def _list(self, record: StreamRecord, count: int) -> None:
        """Hands the items to a thread that makes the list of their references."""
        unread = record.state.leave()  # the thread takes over their holds
        self._let_go(record, unread[count:])  # which only an attempt before has yielded
        ids = [record.item_id(index) for index in unread[:count]]
        try:
            self.core.callbacks.submit(self._make_list, record, ids)
        except RuntimeError:  # the session ends
            self._let_go_of(ids)
        self.core.run_effects()

    def _make_list(self, record: StreamRecord, ids: list[bytes]) -> None:
        """Not under the lock."""
        core = self.core
        refs = [core.peers.make_ref(object_id, core) for object_id in ids]
        object_id = record.completion_id
        state, stored = waiting.INLINE, False
        value: object = None
        try:
            serialized = serialize(DynamicObjectRefGenerator(refs))
            if serialized.size <= core.config.inline_bytes_max:
                value = serialized.to_bytes()
            else:
                core.objects.write(object_id, serialized, core.worker_id, keep=True)
                stored = True
                state, value = waiting.IN_STORE, (core.node_id, serialized.size)
        except FtrayError as error:
            state, value = waiting.FAILED, error
        with core.lock:
            core.drain()
            entry = core.entries.get(object_id)
            if entry is None and stored:
                core.objects.unhold(object_id)
                core.objects.free_in_store(object_id)
            elif entry is not None and state != waiting.FAILED:
                core.table.set_contains(object_id, ids)
            self._complete(record, state, value)
            core.settle()

    # --- reading -----------------------------------------------------------------------------------------------------

    def take(self, record: StreamRecord) -> bytes | None:
        """The id of the next item, whose hold the caller takes over; None when it has not arrived."""
        state = record.state
        index = state.take()
        if index >= 0:
            if not state.free:
                self.tell(record, False)
            return record.item_id(index)
        head = record.head
        if head is not None and head.state == waiting.FAILED:
            # The session is over: everything that was pending has failed.
            record.head = None
            state.fail()
            return record.item_id(state.take())
        if not state.over:
            self.tell(record, True)
        return None

    def step(self, record: StreamRecord, make_waiter: Callable[[], W]) -> tuple[Any, bytes, W | None]:
        """The reference of the next item; or None, with the id of the object that a waiter hangs on now, and the waiter
        (neither at the end). Not under the lock."""
        core = self.core
        with core.lock:
            if core.released:
                core.drain()
            object_id = self.take(record)
            if object_id is not None:
                if core.reactor.dirty:
                    core.settle()
                return core.peers.make_ref(object_id, core), b"", None
            head = record.head
            if head is None or head.state != waiting.PENDING:
                return None, b"", None
            waiter = make_waiter()
            core.objects.hang(record.head_id, head, waiter)
            core.settle()
            return None, record.head_id, waiter

    def tell(self, record: StreamRecord, hungry: bool) -> None:
        """Says to the worker what it has to hear, if anything."""
        while (read := record.state.say(hungry)) is not None:
            link = self.core.peers.link_to(record.worker_id, record.endpoint)
            if link is not None:
                link.send(StreamRead(record.task_id, record.state.attempt, read))

    # --- nobody reads ------------------------------------------------------------------------------------------------

    def let_go(self, object_id: bytes, record: StreamRecord) -> None:
        """The handle has been freed, or the completion while it was pending. From `ObjectPlane.freed`."""
        state = record.state
        if object_id[16:] == HANDLE_INDEX.to_bytes(4, "little"):
            unread = state.leave()
            self._drop_head(record)
            self._let_go(record, unread)
            if record.task is None:
                self.records.pop(record.task_id, None)
                return
        elif not state.left and not record.offset:
            return  # somebody reads it still
        if record.completion_id not in self.core.entries:
            if record.offset:
                self._let_go(record, state.leave())
            state.drop()
            if record.task is not None:
                record.task.retries_left = 0  # it need not run again for nobody
        self.tell(record, False)
