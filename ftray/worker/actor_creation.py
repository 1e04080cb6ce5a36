"""Actors made by this process: registration, what their constructors' arguments hold, end of scope.

Role: shell, a part of `ActorClient` (`actors.py`). An actor is registered with the GCS as soon as the references among
its constructor's arguments are there. What the arguments hold is kept for as long as the constructor may run (again):
until the actor is dead, or alive with no restart left.

Rules: an actor that is not detached ends when its handle object is freed here, at its owner. A detached one has no
owner; who made it keeps what its constructor needs, and watches its record for that even when it has no handle.

Rejected: letting go of the arguments when the actor is first alive (a restart would find them gone).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ftray.exceptions import ActorDiedError, GcsUnavailableError
from ftray.gcs.state.commands import ActorOutOfScope, KvDelete, RegisterActor
from ftray.ids import RETURN_INDEX
from ftray.ownership.calls import DEAD, ActorCalls
from ftray.ownership.references import Entry
from ftray.wire.messages import ActorCreation, Dependency
from ftray.worker import waiting
from ftray.worker.failures import load_task_error
from ftray.worker.gcs_access import HANDLES, wait_for_gcs
from ftray.worker.objects import Answer
from ftray.worker.peers import value_of

if TYPE_CHECKING:
    from ftray.worker.actors import ActorClient

INDEX0 = RETURN_INDEX[0]
NONE_PICKLED = b"\x80\x05N."

Deps = tuple[tuple[int | str, bytes], ...]


class CreationWaiter:
    """Counts down the references among a constructor's arguments."""

    __slots__ = ("fn", "left")

    def __init__(self, left: int, fn: Callable[[], None]) -> None:
        self.left = left
        self.fn = fn

    def ready(self, object_id: bytes, entry: Entry) -> None:
        self.left -= 1
        if self.left == 0:
            self.fn()


class ActorCreator:
    """See the module. Methods run under the core's lock unless they say otherwise."""

    def __init__(self, actors: ActorClient) -> None:
        self.actors = actors
        self.core = actors.core
        self.owned: set[bytes] = set()
        """Actors made here and not detached."""
        self.holds: dict[bytes, tuple[bytes, ...]] = {}
        """Actors made here -> the object ids that their constructors' arguments hold."""
        self.waiting: set[bytes] = set()
        """Those whose arguments are awaited: the GCS does not know them yet."""

    def create(
        self, creation: ActorCreation, register: RegisterActor, deps: Deps, holds: tuple[bytes, ...], wait: bool
    ) -> bytes:
        """Registers an actor, and returns its id (another's with `get_if_exists`). Not under the lock.

        With `wait` (named actors) the GCS's answer is waited for. Raises ValueError when the name is taken.
        """
        core = self.core
        actor_id = creation.task_id
        core.check_entry()
        answer = Answer()
        with core.lock:
            core.drain()
            entry = core.table.add_owned(actor_id + INDEX0)
            if entry.state == waiting.PENDING:
                core.objects.resolve(actor_id + INDEX0, entry, waiting.INLINE, NONE_PICKLED)
            if holds:
                core.table.add_submitted(holds)
                self.holds[actor_id] = holds
            calls = self.actors.watch(actor_id, creation.class_name)
            calls.name_kept = bool(register.name)
            if not register.detached:
                self.owned.add(actor_id)
            left = 0
            waiter = CreationWaiter(0, lambda: self._register(creation, register, deps, wait, answer))
            for _, object_id in deps:
                dep = core.entries[object_id]
                if dep.state == waiting.PENDING:
                    left += 1
                    core.objects.hang(object_id, dep, waiter)
            waiter.left = left
            if left:
                self.waiting.add(actor_id)
            else:
                waiter.fn()
            core.tick_soon()
            core.settle()
        if wait:
            return self._answered(creation, register, answer)
        return actor_id

    def _register(
        self, creation: ActorCreation, register: RegisterActor, deps: Deps, wait: bool, answer: Answer
    ) -> None:
        """All its arguments are there, or have failed."""
        core = self.core
        actor_id, name = creation.task_id, creation.class_name
        self.waiting.discard(actor_id)
        calls = self.actors.calls.get(actor_id)
        if calls is None or calls.state == DEAD:
            return  # its last handle went while the arguments were awaited, or it was killed: nobody would end it
        inline: list[bytes] = []
        packed: list[Dependency] = []
        for position, object_id in deps:
            entry = core.entries[object_id]
            if entry.state == waiting.FAILED:
                error: Any = entry.value
                self.actors.dead(actor_id, error)
                answer.give(None)
                return
            value, data = value_of(entry)
            packed.append(
                Dependency(
                    position, object_id, entry.owner or core.worker_id, entry.owner_endpoint or core.endpoint, value
                )
            )
            inline.append(data)
        creation.deps, creation.inline = tuple(packed), tuple(inline)

        def answered(result: Any) -> None:
            if result is None:
                self.actors.dead(actor_id, GcsUnavailableError(f"actor {name} was not created: no GCS answers"))
            elif result.code and not wait:
                self.actors.dead(actor_id, ActorDiedError(f"it was not created: {result.message}", class_name=name))
            answer.give(result)

        core.gcs.command(msgspec.structs.replace(register, creation=msgspec.msgpack.encode(creation)), answered)

    def _answered(self, creation: ActorCreation, register: RegisterActor, answer: Answer) -> bytes:
        """Waits for the GCS's word on a named actor. Not under the lock."""
        core = self.core
        actor_id = creation.task_id
        wait_for_gcs(core, answer, f"the creation of actor {register.name!r}")
        result = answer.message
        if result is not None and not result.code:
            return actor_id if not result.value else bytes(result.value)
        with core.lock:
            calls = self.actors.calls.get(actor_id)
            cause = calls.cause if calls is not None else None
            self.not_made(actor_id)
            core.table.remove_local(actor_id + INDEX0)
            core.settle()
        if result is not None:
            core.check_open()
            raise ValueError(f"actor {register.name!r} cannot be created: {result.message}")
        if isinstance(cause, bytes):
            raise load_task_error(cause)
        if isinstance(cause, Exception):
            raise cause
        raise GcsUnavailableError(f"actor {creation.class_name} could not be registered")

    def not_made(self, actor_id: bytes) -> None:
        """The name is another actor's: there is nothing to end."""
        self.let_go(actor_id)
        self.owned.discard(actor_id)
        self._forget_facts(actor_id)
        self.actors.forget(actor_id)

    def let_go(self, actor_id: bytes) -> None:
        """No constructor will run again."""
        self.waiting.discard(actor_id)
        holds = self.holds.pop(actor_id, None)
        if holds:
            self.core.table.remove_submitted(holds)
            self.core.run_effects()

    def handle_freed(self, calls: ActorCalls) -> bool:
        """No handle is left here, or (for an actor owned here) anywhere. False if its record is to be watched on."""
        actor_id = calls.actor_id
        if actor_id in self.owned:
            self.owned.discard(actor_id)
            self.let_go(actor_id)
            self._forget_facts(actor_id)
            if calls.state != DEAD:
                self.core.gcs.command(ActorOutOfScope(actor_id, self.core.worker_id), _ignored)
            return True
        if actor_id in self.holds and calls.state != DEAD:
            return False  # detached, and it may be constructed anew
        self.let_go(actor_id)
        return True

    def _forget_facts(self, actor_id: bytes) -> None:
        calls = self.actors.calls.get(actor_id)
        if calls is not None and calls.name_kept:
            calls.name_kept = False
            self.core.gcs.command(KvDelete(HANDLES, actor_id), _ignored)


def _ignored(result: Any) -> None:
    """Whatever the answer, there is nothing to be done about it."""
