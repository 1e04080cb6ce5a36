"""Why processes died: gathered from the closed link, the template's report and the last words, told to who asks.

Role: shell-side bookkeeping, with the reactor's timers. Freeing what a dead worker held never waits for its cause;
whoever needs the cause waits here, for a bounded time, and then gets what is known.

Rejected: an exit status in each lease's end (the link closes a millisecond before the template has reaped).
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Callable

from msgspec.structs import replace

from ftray.gcs.state.commands import DeathCauseRecord
from ftray.raylet.clients import Client
from ftray.raylet.processes import Process
from ftray.wire.reactor import Reactor, Timer

CAUSES_KEPT = 1_000

Told = Callable[[DeathCauseRecord | None], None]


class _Question:
    __slots__ = ("callback", "timer")

    def __init__(self, callback: Told) -> None:
        self.callback = callback
        self.timer: Timer | None = None


class Deaths:
    """See the module. Under the reactor's lock."""

    def __init__(self, reactor: Reactor, node_id: bytes) -> None:
        self._reactor = reactor
        self._node = node_id.hex()
        self._whole: OrderedDict[bytes, DeathCauseRecord] = OrderedDict()
        self._partial: OrderedDict[bytes, DeathCauseRecord] = OrderedDict()
        self._questions: dict[bytes, list[_Question]] = {}

    def link_closed(self, client: Client, what: str, reason: str) -> None:
        """The process is gone or of no use; how it ended is not known yet."""
        if client.worker_id in self._whole:
            return
        text = client.goodbye if client.goodbye is not None else f"its connection was closed ({reason})"
        record = DeathCauseRecord(self._node, client.pid, client.worker_id.hex(), what=what, reason=text)
        _keep(self._partial, client.worker_id, record)

    def reaped(self, process: Process, what: str) -> None:
        """The template knows how the process ended, and all its output is read."""
        partial = self._partial.pop(process.worker_id, None)
        status = process.status
        code = status if status is not None and status >= 0 else None
        signum = -status if status is not None and status < 0 else None
        reason = process.kill_reason
        if not reason and code == 0 and partial is not None:
            reason = partial.reason
        record = DeathCauseRecord(
            self._node, process.pid, process.worker_id.hex(), code, signum,
            what or (partial.what if partial is not None else ""), process.stderr_tail(), reason,
        )  # fmt: skip
        _keep(self._whole, process.worker_id, record)
        for question in self._questions.pop(process.worker_id, ()):
            if question.timer is not None:
                question.timer.cancel()
            question.callback(record)

    def known(self, worker_id: bytes) -> DeathCauseRecord | None:
        """What is known now, be it only a part."""
        return self._whole.get(worker_id) or self._partial.get(worker_id)

    def ask(self, worker_id: bytes, wait_ms: float, callback: Told) -> None:
        """Tells the cause when it is known, or after `wait_ms` what is known by then (None: nothing)."""
        record = self._whole.get(worker_id)
        if record is not None:
            callback(record)
            return
        question = _Question(callback)
        self._questions.setdefault(worker_id, []).append(question)

        def late() -> None:
            waiting = self._questions.get(worker_id, [])
            if question in waiting:
                waiting.remove(question)
                if not waiting:
                    del self._questions[worker_id]
                callback(self.known(worker_id))

        question.timer = self._reactor.call_later(wait_ms, late)


def how(record: DeathCauseRecord) -> str:
    """For people: 'was killed by SIGKILL', 'exited with code 1', or 'died'."""
    if record.signal is not None:
        try:
            return f"was killed by {signal.Signals(record.signal).name}"
        except ValueError:
            return f"was killed by signal {record.signal}"
    return f"exited with code {record.exit_code}" if record.exit_code is not None else "died"


def with_what(record: DeathCauseRecord, what: str) -> DeathCauseRecord:
    """The record, saying what the process was."""
    return replace(record, what=what) if what and not record.what else record


def _keep(table: OrderedDict[bytes, DeathCauseRecord], worker_id: bytes, record: DeathCauseRecord) -> None:
    table[worker_id] = record
    if len(table) > CAUSES_KEPT:
        table.popitem(last=False)
