"""Other workers: borrowing from them, and lending to them.

Role: shell around the borrowing protocol (`ownership/references.py`). What this process tells an owner goes over its
own outgoing link to it, always the same one, so that "add" and "remove" arrive in order; answers come back on it. A
link that breaks means that the process at its other end is dead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftray.exceptions import OwnerDiedError
from ftray.ownership.references import REGISTERED, Entry
from ftray.wire.handshake import ROLE_PEER
from ftray.wire.messages import (
    ERROR,
    IN_STORE,
    INLINE,
    MISSING,
    AddBorrowers,
    BorrowersAdded,
    CancelObject,
    CancelTask,
    Message,
    ObjectResolved,
    PeerHello,
    PinForever,
    RecallTasks,
    RemoveBorrowers,
    ResolveObjects,
    ReturnsHeld,
    StreamRead,
    Value,
)
from ftray.wire.reactor import Link
from ftray.worker import waiting
from ftray.worker.failures import error_payload
from ftray.worker.waiting import Callback

if TYPE_CHECKING:
    from ftray.worker.core import Core

log = logging.getLogger("ftray.worker")


class Peers:
    """See the module. All methods but `ref_loader`'s result run under the core's lock."""

    def __init__(self, core: Core, make_ref: Callable[[bytes, Core], Any]) -> None:
        self.core = core
        self.make_ref = make_ref
        self.outgoing: dict[bytes, Link] = {}
        self.dead: set[bytes] = set()

    def hello(self) -> PeerHello:
        core = self.core
        return PeerHello(core.worker_id, core.node_id, core.job_id, core.endpoint, os.getpid())

    def link_to(self, worker_id: bytes, endpoint: str) -> Link | None:
        """The outgoing link to a worker, made at first use; None when it is dead."""
        link = self.outgoing.get(worker_id)
        if link is not None:
            return link
        if worker_id in self.dead:
            return None
        try:
            link = self.core.reactor.connect(endpoint, ROLE_PEER, self)
        except (OSError, ValueError) as error:
            self._gone(worker_id, endpoint, str(error))
            return None
        link.peer = None
        link.tag = (worker_id, endpoint)
        self.outgoing[worker_id] = link
        link.send(self.hello())
        return link

    def _gone(self, worker_id: bytes, endpoint: str, why: str) -> None:
        self.dead.add(worker_id)
        self.outgoing.pop(worker_id, None)
        self.core.table.process_died(worker_id)
        self.core.objects.owner_died(worker_id, endpoint, why)

    # --- told by the reference table ---------------------------------------------------------------------------------

    def add_borrower(self, owner: bytes, endpoint: str, object_ids: list[bytes]) -> None:
        link = self.link_to(owner, endpoint)
        if link is not None:
            link.send(AddBorrowers(tuple(object_ids)))
        else:
            # What a process sent just before its death may be read after it: nobody will answer this registration.
            self.core.objects.owner_died(owner, endpoint, "it is gone")

    def remove_borrower(self, owner: bytes, endpoint: str, object_ids: list[bytes]) -> None:
        link = self.link_to(owner, endpoint)
        if link is not None:
            link.send(RemoveBorrowers(tuple(object_ids)))

    def pin_at_owner(self, owner: bytes, endpoint: str, object_ids: list[bytes]) -> None:
        link = self.link_to(owner, endpoint)
        if link is not None:
            link.send(PinForever(tuple(object_ids)))

    def ack_returns(self, token: Any) -> None:
        worker_id, endpoint, task_id, attempt, index = token
        link = self.link_to(worker_id, endpoint)
        if link is not None:
            link.send(ReturnsHeld(task_id, attempt, index))

    def resolve(self, owner: bytes, endpoint: str, object_id: bytes) -> None:
        link = self.link_to(owner, endpoint)
        if link is not None:
            link.send(ResolveObjects((object_id,)))
        else:
            entry = self.core.entries.get(object_id)
            if entry is not None and entry.state == waiting.PENDING:
                self.core.objects.owner_died(owner, endpoint, "it is gone")
                if entry.state == waiting.PENDING:
                    self.core.objects.resolve(
                        object_id,
                        entry,
                        waiting.FAILED,
                        OwnerDiedError(object_id.hex(), "it is gone", owner=owner.hex()),
                    )

    def recall(self, worker_id: bytes, endpoint: str, task_ids: tuple[bytes, ...]) -> None:
        link = self.link_to(worker_id, endpoint)
        if link is not None:
            link.send(RecallTasks(task_ids))

    # --- what peers say ----------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        core = self.core
        if link.incoming and link.peer is None:
            if not isinstance(message, PeerHello):
                core.reactor.drop(link, "a peer must say who it is first")
                return
            link.peer = message
            return
        kind = type(message)
        if isinstance(message, ObjectResolved):
            asked = core.objects.resolving.get(link.tag[0])
            if asked is not None:
                asked.discard(message.object_id)
            entry = core.entries.get(message.object_id)
            if entry is not None and entry.owner is not None:
                core.objects.take_value(message.object_id, message.value, payload)
        elif isinstance(message, BorrowersAdded):
            core.table.registered(link.tag[0], message.object_ids, message.missing)
        elif isinstance(message, AddBorrowers):
            borrower = link.peer.worker_id
            missing = tuple(x for x in message.object_ids if not core.table.borrower_added(x, borrower))
            known = tuple(x for x in message.object_ids if x not in missing) if missing else message.object_ids
            link.send(BorrowersAdded(known, missing))
        elif isinstance(message, RemoveBorrowers):
            for object_id in message.object_ids:
                core.table.borrower_removed(object_id, link.peer.worker_id)
        elif isinstance(message, ResolveObjects):
            for object_id in message.object_ids:
                self._serve(link, object_id)
        elif isinstance(message, ReturnsHeld):
            core.table.handed_off((message.task_id, message.attempt, message.index))
        elif isinstance(message, PinForever):
            for object_id in message.object_ids:
                core.table.pin_forever(object_id)
        elif isinstance(message, RecallTasks) and core.executor is not None:
            core.executor.recall(link.peer.worker_id, message.task_ids)
        elif isinstance(message, StreamRead) and core.executor is not None:
            core.executor.replies.generators.told(message)
        elif isinstance(message, CancelTask) and core.executor is not None:
            core.executor.cancels.take(message, link.peer.worker_id)
        elif isinstance(message, CancelObject):
            core.canceller.asked(message)
        else:
            core.reactor.drop(link, f"a peer sent an unexpected {kind.__name__}")
            return
        if core.table.effects:
            core.run_effects()

    def on_closed(self, link: Link, reason: str) -> None:
        if link.incoming:
            if link.peer is not None:
                self.core.table.process_died(link.peer.worker_id)
        else:
            worker_id, endpoint = link.tag if isinstance(link.tag, tuple) else (b"", "")
            if self.outgoing.get(worker_id) is link:
                self._gone(worker_id, endpoint, reason)
        self.core.run_effects()

    # --- values for borrowers ----------------------------------------------------------------------------------------

    def _serve(self, link: Link, object_id: bytes) -> None:
        entry = self.core.entries.get(object_id)
        if entry is None:
            link.send(ObjectResolved(object_id, Value(MISSING, 0)))
        elif entry.state == waiting.PENDING:
            answer = Callback(lambda oid, ready: self._answer(link, oid, ready))
            self.core.objects.hang(object_id, entry, answer)
        else:
            self._answer(link, object_id, entry)

    def _answer(self, link: Link, object_id: bytes, entry: Entry) -> None:
        value, payload = value_of(entry)
        link.send(ObjectResolved(object_id, value), payload)

    # --- references that arrive inside values ------------------------------------------------------------------------

    def ref_loader(self, outer_id: bytes | None) -> Callable[[bytes, bytes, str], Any]:
        """What deserialisation calls for each reference inside the value of `outer_id` (None: out of band)."""
        core = self.core
        lock, entries, make_ref = core.lock, core.entries, self.make_ref

        def load(object_id: bytes, owner: bytes, endpoint: str) -> Any:
            with lock:
                entry = entries.get(object_id)
                if entry is not None and (entry.owner is None or entry.registration >= REGISTERED):
                    entry.local += 1  # nothing to say to anybody: the common case, ten thousand times in one value
                    return make_ref(object_id, core)
                if outer_id is not None:
                    entry = core.table.note_from_outer(outer_id, object_id, owner, endpoint)
                    entry.local += 1
                else:
                    entry = core.table.add_borrowed(object_id, owner, endpoint)
                    entry.local += 1
                    core.table.register(object_id)
                core.tick_soon()
                core.settle()
            return make_ref(object_id, core)

        return load

    def task_ref_loader(self, token: Any) -> Callable[[bytes, bytes, str], Any]:
        """The same for references inside the arguments of a running task."""
        core = self.core

        def load(object_id: bytes, owner: bytes, endpoint: str) -> Any:
            with core.lock:
                entry = core.table.note_task_ref(token, object_id, owner, endpoint)
                entry.local += 1
                core.tick_soon()
            return self.make_ref(object_id, core)

        return load


def value_of(entry: Entry) -> tuple[Value, bytes]:
    """A ready entry as it travels."""
    if entry.state == waiting.INLINE:
        data: Any = entry.value
        return Value(INLINE, len(data)), data
    if entry.state == waiting.IN_STORE:
        place: Any = entry.value
        return Value(IN_STORE, place[1], place[0]), b""
    error: Any = entry.value
    if isinstance(error, BaseException):
        error = error_payload(error)
    return Value(ERROR, len(error)), error
