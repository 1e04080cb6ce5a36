"""The link of a driver or worker to its node's raylet.

Role: shell. Requests that are answered carry a number; a thread waits for an answer by reading (`ask`), the runtime's
own code gets a callback (`request`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ftray.config import Config
from ftray.exceptions import FtrayError, GetTimeoutError, LocalRayletDiedError
from ftray.wire.handshake import ROLE_CLIENT
from ftray.wire.messages import (
    AbortObject,
    AskClient,
    ClientAnswer,
    CreateActor,
    CreateObject,
    DeathCauseKnown,
    ExitWorker,
    GcsEndpoints,
    LeaseEnvironmentFailed,
    LeaseGranted,
    LeaseInfeasible,
    LeaseReclaim,
    LogLines,
    Message,
    ObjectCreated,
    ObjectsPinned,
    PinObjects,
    RegisterClient,
    Registered,
    ReleaseObjects,
    StorePressure,
    WorkerAssigned,
    WorkerDoomed,
)
from ftray.wire.reactor import Link
from ftray.worker.class_environments import environment_failed
from ftray.worker.objects import Answer
from ftray.worker.waiting import block

if TYPE_CHECKING:
    from ftray.worker.core import Core

log = logging.getLogger("ftray.worker")


class RayletClient:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.link: Link | None = None
        self.registered: Answer = Answer()
        self.output_ended: Answer = Answer()
        """After a driver's goodbye: the raylet has sent all that the workers have printed."""
        self._requests: dict[int, Answer | Callable[[Any, Any], None]] = {}
        self._next_request = 0

    def connect(self, endpoint: str, hello: RegisterClient) -> None:
        """Connects and registers; `registered` gets the answer. Raises OSError when nobody listens."""
        with self.core.lock:
            self.link = self.core.reactor.connect(endpoint, ROLE_CLIENT, self)
            self.link.send(hello)

    def send(self, message: Message) -> None:
        """Queues a message, under the lock."""
        if self.link is not None:
            self.link.send(message)

    def request(self, make: Callable[[int], Message], callback: Callable[[Any, Any], None]) -> None:
        """Sends a request; `callback(message or None, payload)` runs under the lock. Under the lock."""
        self._next_request += 1
        self._requests[self._next_request] = callback
        self.send(make(self._next_request))

    def ask(self, make: Callable[[int], Message], timeout_s: float | None = None) -> Any:
        """Sends a request and waits for its answer. Not under the lock.

        Raises LocalRayletDiedError when the raylet goes, GetTimeoutError after `timeout_s`.
        """
        core = self.core
        core.check_entry()
        answer = Answer()
        with core.lock:
            if core.closed:
                raise LocalRayletDiedError(core.close_reason)
            core.drain()
            self._next_request += 1
            request = self._next_request
            self._requests[request] = answer
            asked = make(request)
            self.send(asked)
            core.reactor.flush_dirty()
        try:
            if not block(core.reactor, answer.waiter, timeout_s):
                raise GetTimeoutError(f"this node's store did not answer within {timeout_s} s")
        except BaseException:
            # Out of time or interrupted: what is granted later must be given back, or what was granted just now.
            with core.lock:
                if answer.message is not None:
                    self._give_back(asked, answer.message)
                elif answer.error is None:
                    self._requests[request] = lambda message, payload: self._give_back(asked, message)
            raise
        if answer.error is not None:
            raise answer.error
        return answer.message

    def _give_back(self, asked: Message, message: Any) -> None:
        if isinstance(asked, CreateObject) and isinstance(message, ObjectCreated) and message.offset >= 0:
            self.send(AbortObject(asked.object_id))
            self.send(ReleaseObjects((asked.object_id,)))
        elif isinstance(asked, PinObjects) and isinstance(message, ObjectsPinned):
            places = zip(asked.object_ids, message.places, strict=True)
            self.send(ReleaseObjects(tuple(object_id for object_id, (offset, _) in places if offset != -1)))

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        core = self.core
        kind = type(message)
        if kind is LeaseGranted:
            core.submitter.granted(message)  # type: ignore[arg-type]
        elif kind is LeaseReclaim:
            core.submitter.reclaim(message.lease_id)  # type: ignore[attr-defined]
        elif kind is LeaseInfeasible:
            core.submitter.infeasible(message)  # type: ignore[arg-type]
        elif isinstance(message, AskClient):
            self._asked(link, message)
        elif isinstance(message, StorePressure):
            core.objects.let_go(message.request)
        elif isinstance(message, LeaseEnvironmentFailed):
            environment_failed(core, message)
        elif isinstance(message, WorkerDoomed):
            core.submitter.oom.doomed(message)
        elif isinstance(message, ObjectCreated | ObjectsPinned | DeathCauseKnown):
            waiting = self._requests.pop(message.request, None)
            if isinstance(waiting, Answer):
                waiting.give(message, payload)
            elif waiting is not None:
                waiting(message, payload)
        elif isinstance(message, LogLines):
            if not message.lines and not message.dropped:
                self.output_ended.give(None)
            elif core.log_sink is not None:
                core.log_sink(message)
        elif isinstance(message, GcsEndpoints):
            core.gcs.set_endpoints(message.endpoints)
        elif isinstance(message, Registered):
            self.registered.give(message, msgspec.msgpack.decode(bytes(payload), type=Config) if payload else None)
        elif core.executor is not None and isinstance(message, WorkerAssigned | CreateActor | ExitWorker):
            core.executor.from_raylet(message, bytes(payload))
        else:
            log.warning("the raylet sent an unexpected %s", kind.__name__)

    def _asked(self, link: Link, message: AskClient) -> None:
        from ftray.worker.introspection import answer

        try:
            payload = msgspec.json.encode(answer(self.core, message.what, message.arguments))
        except Exception as error:
            log.warning("the question %r of a tool could not be answered", message.what, exc_info=True)
            link.send(ClientAnswer(message.request, str(error) or type(error).__name__))
            return
        link.send(ClientAnswer(message.request), payload)

    def say_events(self) -> None:
        """A worker that leaves gives the raylet what it remembers of its tasks, under the lock."""
        executor = self.core.executor
        if executor is not None and self.link is not None:
            rows = executor.events.rows(executor.events.kept_max)
            if rows:
                self.link.send(ClientAnswer(0), msgspec.json.encode({"events": rows}))

    def on_closed(self, link: Link, reason: str) -> None:
        core = self.core
        error = link.error if isinstance(link.error, FtrayError) else None
        if not core.is_driver:
            # A worker without its raylet has no resources and no owner to answer to.
            os._exit(0 if core.closed else 1)
        self.link = None
        self.output_ended.give(None)
        if not core.closed:
            core.fail_all(error or LocalRayletDiedError(f"the node process of this session is gone: {reason}"))

    def fail_all(self, error: BaseException) -> None:
        """Ends all waiting for answers, under the lock."""
        requests, self._requests = self._requests, {}
        for waiting in requests.values():
            if isinstance(waiting, Answer):
                waiting.fail(error)
            else:
                waiting(None, b"")
        if self.registered.message is None and self.registered.error is None:
            self.registered.fail(error)
