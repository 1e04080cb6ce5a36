"""Questions of tools that only the drivers and workers of this node can answer, and what those that left have said.

Role: shell, under the reactor's lock. A question goes to any number of processes at once; the answer is given when all
have spoken or gone, or when time is up: who has not answered by then is named.

Rejected: connecting to each process from the tool (a second way in, with its own authentication, for the same words).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ftray.raylet.clients import Client
from ftray.wire.messages import AskClient, ClientAnswer
from ftray.wire.reactor import Reactor, Timer

LEFT_EVENTS_MAX = 100_000
LIVES_MAX = 10_000
BUSY = "it does not answer: its interpreter is busy, or it is stopped"


class Said(NamedTuple):
    """One process's answer: `answer` is None if it has not spoken, and `error` says why."""

    worker_id: bytes
    pid: int
    driver: bool
    answer: dict[str, Any] | None
    error: str


class _Question:
    __slots__ = ("done", "said", "timer", "waiting")

    def __init__(self, done: Callable[[list[Said]], None]) -> None:
        self.done = done
        self.waiting: dict[bytes, Client] = {}
        self.said: list[Said] = []
        self.timer: Timer | None = None


class Asking:
    """See the module."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._questions: dict[int, _Question] = {}
        self._next = 0
        self.left_events: deque[dict[str, Any]] = deque(maxlen=LEFT_EVENTS_MAX)
        """What workers that have left remembered of their tasks."""
        self.lives: deque[tuple[float, int, str, str]] = deque(maxlen=LIVES_MAX)
        """(seconds since the epoch, process id, "ended", what it ran) of processes that are gone."""

    def ask(
        self,
        clients: Iterable[Client],
        what: str,
        arguments: dict[str, Any],
        timeout_ms: float,
        done: Callable[[list[Said]], None],
    ) -> None:
        """Asks all of them; `done` gets what they said, once, in no order."""
        question = _Question(done)
        self._next += 1
        request = self._next
        for client in clients:
            question.waiting[client.worker_id] = client
            client.link.send(AskClient(request, what, arguments))
        if not question.waiting:
            done([])
            return
        self._questions[request] = question
        question.timer = self._reactor.call_later(timeout_ms, lambda: self._late(request))

    def answered(self, client: Client, message: ClientAnswer, payload: bytes | bytearray) -> None:
        """A process has answered; request 0 is what one that leaves says of its own accord."""
        if message.request == 0:
            for row in json.loads(bytes(payload)).get("events", ()):
                row["pid"] = client.pid
                self.left_events.append(row)
            return
        question = self._questions.get(message.request)
        if question is None or question.waiting.pop(client.worker_id, None) is None:
            return  # it was late
        answer = None if message.error else json.loads(bytes(payload))
        question.said.append(Said(client.worker_id, client.pid, client.driver, answer, message.error))
        self._finish_if_all(message.request, question)

    def gone(self, client: Client, what: str) -> None:
        """A process is dead: nobody waits for its answer."""
        self.lives.append((time.time(), client.pid, "ended", what))
        for request, question in list(self._questions.items()):
            if question.waiting.pop(client.worker_id, None) is not None:
                question.said.append(Said(client.worker_id, client.pid, client.driver, None, "it has ended"))
                self._finish_if_all(request, question)

    def _finish_if_all(self, request: int, question: _Question) -> None:
        if not question.waiting:
            del self._questions[request]
            if question.timer is not None:
                question.timer.cancel()
            question.done(question.said)

    def _late(self, request: int) -> None:
        question = self._questions.pop(request, None)
        if question is not None:
            for client in question.waiting.values():
                question.said.append(
                    Said(client.worker_id, client.pid, client.driver, None, BUSY)
                )
            question.done(question.said)
