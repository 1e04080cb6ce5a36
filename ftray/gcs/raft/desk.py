"""Who has asked a replica what, and what is told them.

Role: logic. Questions are collected between turns; answers are collected within one, and given by `release` when all
that they rest on is durable.

Rules
- Everybody who asks is answered once. An exception in a callback is logged and hurts no other.
- Changes are published before the results of the same turn, so whoever has a result finds its effect in every watch.
- A fresh read is answered when a majority has answered a message that was sent after the read came (its *round*): so no
  other leader had been elected by then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from ftray.gcs.raft.membership import Table
from ftray.gcs.replica import ChangeCallback, ReplyCallback, Request
from ftray.gcs.state.tables import Change, Code, Result

log = logging.getLogger("ftray.gcs")

T = TypeVar("T")
Confirmed = Callable[[bool], None]
TableChange = Callable[[Table], Table | str]

UNKNOWN = "another head leads now: the outcome is not known here"


class Desk:
    """See the module."""

    def __init__(self, revision: Callable[[], int]) -> None:
        self.busy = False
        """A callback is running."""
        self.requests: list[tuple[Request, ReplyCallback]] = []
        self.table_requests: list[tuple[TableChange, ReplyCallback]] = []
        self.hand_overs: list[tuple[bytes, ReplyCallback]] = []
        """Who is to lead instead of this one (empty: any), and who asks."""
        self.reads: list[Confirmed] = []
        """Fresh reads that have no round yet."""
        self.on_change: list[ChangeCallback] = []
        self.on_reset: list[Callable[[], None]] = []
        self.round = 0
        """Of this leader's messages; a new one for fresh reads."""
        self._revision = revision
        self._waiting: dict[int, tuple[int, ReplyCallback]] = {}
        """By entry, its term and who waits for it."""
        self._reading: list[tuple[int, Confirmed]] = []
        self._answers: list[tuple[ReplyCallback, Result]] = []
        """Given by the next `release`; the same for `_confirmed`."""
        self._handing_over: ReplyCallback | None = None
        """Who waits until another head leads."""
        self._confirmed: list[tuple[Confirmed, bool]] = []

    @property
    def pending(self) -> bool:
        """Whether something was asked since the last turn."""
        return bool(self.requests or self.table_requests or self.reads or self.hand_overs)

    @property
    def waited_for(self) -> bool:
        """Whether anybody waits for an answer."""
        return self.pending or bool(self._waiting or self._reading)

    def take_requests(self) -> list[tuple[Request, ReplyCallback]]:
        taken, self.requests = self.requests, []
        return taken

    def take_table_requests(self) -> list[tuple[TableChange, ReplyCallback]]:
        taken, self.table_requests = self.table_requests, []
        return taken

    def take_hand_overs(self) -> list[tuple[bytes, ReplyCallback]]:
        taken, self.hand_overs = self.hand_overs, []
        return taken

    # --- within a turn ------------------------------------------------------------------------------------------------

    def wait(self, index: int, term: int, reply: ReplyCallback) -> None:
        """The entry will have been applied, or another one in its place."""
        self._waiting[index] = (term, reply)

    def applied(self, index: int, term: int, result: Result) -> None:
        """What has become of an entry."""
        known = self._waiting.pop(index, None)
        if known is not None:
            if known[0] == term:
                self.give(known[1], result)
            else:
                self.answer(known[1], Code.NOT_LEADER, UNKNOWN)

    def give(self, reply: ReplyCallback, result: Result) -> None:
        self._answers.append((reply, result))

    def answer(self, reply: ReplyCallback, code: Code, message: str) -> None:
        self.give(reply, Result(code, message, self._revision()))

    @property
    def handing_over(self) -> bool:
        """Somebody waits until another head leads."""
        return self._handing_over is not None

    def wait_for_leader(self, reply: ReplyCallback) -> None:
        self._handing_over = reply

    def handed_over(self, code: Code, message: str) -> None:
        """What has become of the lead."""
        reply, self._handing_over = self._handing_over, None
        if reply is not None:
            self.answer(reply, code, message)

    def begin_reads(self) -> bool:
        """At the leader: fresh reads get a round. Returns whether there are any, so that peers must be asked."""
        if not self.reads:
            return False
        self.round += 1
        self._reading += [(self.round, each) for each in self.reads]
        self.reads = []
        return True

    def end_reads(self, reached: int) -> None:
        """A majority has answered that round."""
        for round, confirmed in self._reading:
            if round <= reached:
                self._confirmed.append((confirmed, True))
        self._reading = [each for each in self._reading if each[0] > reached]

    def refuse_reads(self) -> None:
        """This replica does not lead."""
        reads, self.reads = [*self.reads, *(each for _, each in self._reading)], []
        self._reading = []
        for confirmed in reads:
            self._call(partial(confirmed, False))

    def fail_waiting(self, message: str) -> None:
        """Who waits for an entry is told that the outcome is not known."""
        waiting, self._waiting = self._waiting, {}
        for _, reply in waiting.values():
            self._refuse(reply, Code.NOT_LEADER, message)

    def refuse(self, code: Code, message: str) -> None:
        """What was asked since the last turn is not done."""
        for _, reply in [*self.take_requests(), *self.take_table_requests(), *self.take_hand_overs()]:
            self._refuse(reply, code, message)
        self.refuse_reads()

    def _refuse(self, reply: ReplyCallback, code: Code, message: str) -> None:
        """At once: it rests on nothing that must be durable."""
        self._call(partial(reply, Result(code, message, self._revision())))

    # --- after it -----------------------------------------------------------------------------------------------------

    def release(self, changes: Sequence[Change] = ()) -> None:
        """Tells everybody."""
        if changes:
            for callback in tuple(self.on_change):
                self._call(partial(callback, changes))
        answers, self._answers = self._answers, []
        for reply, result in answers:
            self._call(partial(reply, result))
        confirmed, self._confirmed = self._confirmed, []
        for read, fresh in confirmed:
            self._call(partial(read, fresh))

    def reset(self) -> None:
        """The state is another one."""
        for callback in tuple(self.on_reset):
            self._call(callback)

    def close(self, message: str) -> None:
        """Answers everybody that the replica is gone. What was not released yet is not known to be durable."""
        self._answers = [
            (reply, Result(Code.NOT_LEADER, message, self._revision())) for reply, _ in self._answers
        ]
        self._confirmed = [(confirmed, False) for confirmed, _ in self._confirmed]
        self.handed_over(Code.NOT_LEADER, message)
        self.fail_waiting(message)
        self.refuse(Code.NOT_LEADER, message)
        self.release()

    def _call(self, callback: Callable[[], object]) -> None:
        self.busy = True
        try:
            callback()
        except Exception:
            log.exception("a callback of the GCS replica failed")
        finally:
            self.busy = False


def register(callbacks: list[T], callback: T) -> Callable[[], None]:
    """Adds a callback, and returns a function that takes it away."""
    callbacks.append(callback)

    def end() -> None:
        if callback in callbacks:
            callbacks.remove(callback)

    return end
