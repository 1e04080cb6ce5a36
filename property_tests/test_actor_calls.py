"""Calls of one actor under any sequence of events, against a twin that keeps them in plain lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ftray.ownership.calls import ALIVE, DEAD, RESTARTING, ActorCalls
from ftray.ownership.tasks import FunctionInfo, TaskRecord

INFO = FunctionInfo(b"", "A.m")
INFLIGHT_MAX = 2
GROUPS = ("", "io", "slow")

picks = st.integers(0, 1_000)
kinds = st.tuples(st.sampled_from(GROUPS), st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from([0, 1, -1]))
"""Calls: the group, how many arguments are missing, how many retries there are."""


@dataclass(eq=False)
class Call:
    """What the twin knows of a call."""

    task: TaskRecord
    group: str
    missing: int
    retries: int


class Twin:
    """All rules in the plainest way: lists, searched from the front."""

    def __init__(self, out_of_order: bool) -> None:
        self.out_of_order = out_of_order
        self.queued: list[Call] = []
        self.aside: list[Call] = []
        self.flight: list[Call] = []
        self.live = False

    def submit(self, call: Call) -> None:
        (self.aside if self.out_of_order and call.missing else self.queued).append(call)

    def push(self, groups: tuple[str, ...] = GROUPS) -> list[bytes]:
        """All that goes out now, group by group."""
        went = []
        for group in groups:
            for call in [each for each in self.queued if each.group == group]:
                here = sum(each.group == group for each in self.flight)
                if call.missing or here >= INFLIGHT_MAX or not self.live:
                    break
                self.queued.remove(call)
                self.flight.append(call)
                went.append(call.task.task_id)
        return went

    def lost(self) -> list[bytes]:
        failed = [call for call in self.flight if not call.retries]
        again = [call for call in self.flight if call.retries]
        for call in again:
            call.retries -= call.retries > 0
        self.queued = again + self.queued
        self.flight = []
        self.live = False
        return [call.task.task_id for call in failed]

    @property
    def waiting(self) -> list[Call]:
        return [call for call in self.queued + self.aside if call.missing]


class ActorCallsMachine(RuleBasedStateMachine):
    """Submissions, arguments, replies, lost channels, restarts and an end, in any order."""

    @initialize(out_of_order=st.booleans(), pending_max=st.sampled_from([-1, 4, 10]))
    def start(self, out_of_order: bool, pending_max: int) -> None:
        self.calls = ActorCalls(b"a", "A", b"h", INFLIGHT_MAX)
        self.calls.out_of_order = out_of_order
        self.calls.pending_max = pending_max
        self.twin = Twin(out_of_order)
        self.count = 0
        self.incarnation = 0
        self.dead = False

    # --- calls -------------------------------------------------------------------------------------------------------

    @rule(kinds=st.lists(kinds, min_size=1, max_size=5))
    def submit(self, kinds: list[tuple[str, int, int]]) -> None:
        for kind in kinds:
            self.submit_one(*kind)

    def submit_one(self, group: str, missing: int, retries: int) -> None:
        if self.dead:
            return
        held = len(self.twin.queued) + len(self.twin.aside) + len(self.twin.flight)
        assert self.calls.full == (0 <= self.calls.pending_max <= held)
        if self.calls.full:
            return
        self.count += 1
        task = TaskRecord(self.count.to_bytes(16, "little"), INFO, 1, retries, deps_left=missing, group=group)
        call = Call(task, group, missing, retries)
        self.twin.submit(call)
        if missing == 0 and self.calls.go(task):
            assert self.twin.push(("",)) == [task.task_id], "nothing may be overtaken"
        else:
            self.calls.submit(task)

    @rule(pick=picks)
    def an_argument_comes(self, pick: int) -> None:
        waiting = self.twin.waiting
        if waiting:
            call = waiting[pick % len(waiting)]
            call.missing -= 1
            call.task.deps_left -= 1
            if not call.missing:
                if call in self.twin.aside:
                    self.twin.aside.remove(call)
                    self.twin.queued.append(call)
                self.calls.ready(call.task)

    @rule(pick=picks)
    def an_argument_fails(self, pick: int) -> None:
        waiting = self.twin.waiting
        if waiting:
            call = waiting[pick % len(waiting)]
            (self.twin.aside if call in self.twin.aside else self.twin.queued).remove(call)
            assert self.calls.take_out(call.task)

    @rule()
    def pump(self) -> None:
        went = []
        while (task := self.calls.take()) is not None:
            went.append(task.task_id)
        before = len(self.twin.flight)
        expected = self.twin.push()
        of = {call.task.task_id: call for call in self.twin.flight}
        assert sorted(went) == sorted(expected)
        for group in GROUPS:
            assert [x for x in went if of[x].group == group] == [x for x in expected if of[x].group == group]
        # Which group goes first is of no account: the twin follows.
        self.twin.flight[before:] = [of[task_id] for task_id in went]

    @rule(pick=picks, again=st.booleans())
    def a_reply_comes(self, pick: int, again: bool) -> None:
        if not self.twin.flight:
            assert self.calls.done(b"x" * 16) is None
            return
        call = self.twin.flight.pop(pick % len(self.twin.flight))
        assert self.calls.done(call.task.task_id) is call.task
        if again and call.retries and call.task.spend_retry():
            call.retries -= call.retries > 0
            self.twin.queued.insert(0, call)
            self.calls.again(call.task)

    # --- lives and deaths --------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.dead and not self.twin.live)
    @rule()
    def alive(self) -> None:
        if self.calls.link is not None:
            assert self._ids(self.calls.lost()) == self.twin.lost()
        connect = self.calls.update(ALIVE, self.incarnation, b"w", b"n", "unix:/w", None)
        assert connect == (self.calls.linked == self.incarnation and self.calls.link is None)
        self.calls.connected(object())
        self.twin.live = True

    @precondition(lambda self: self.calls.link is not None)
    @rule()
    def the_channel_closes(self) -> None:
        assert self._ids(self.calls.lost()) == self.twin.lost()
        self.incarnation += 1

    @precondition(lambda self: self.twin.live)
    @rule()
    def it_restarts(self) -> None:
        self.incarnation += 1
        assert not self.calls.update(RESTARTING, self.incarnation, b"", b"", "", None)
        self.twin.live = False

    @rule(past=st.integers(1, 3))
    def old_news(self, past: int) -> None:
        if self.calls.incarnation >= past:
            assert not self.calls.update(ALIVE, self.calls.incarnation - past, b"o", b"n", "unix:/o", None)

    @precondition(lambda self: not self.dead and self.count > 10)
    @rule()
    def it_dies(self) -> None:
        self.incarnation += 1
        self.calls.update(DEAD, self.incarnation, b"", b"", "", "why")
        if self.calls.link is not None:
            assert self._ids(self.calls.lost()) == self.twin.lost()
        twin = self.twin
        left = {call.task.task_id for call in twin.flight + twin.queued + twin.aside}
        ended = self._ids(self.calls.take_all())
        assert set(ended) == left
        assert len(ended) == len(left)
        assert self.calls.idle
        self.twin = Twin(twin.out_of_order)
        self.dead = True

    # --- always ------------------------------------------------------------------------------------------------------

    @invariant()
    def both_know_the_same(self) -> None:
        twin, calls = self.twin, self.calls
        assert list(calls.inflight) == [call.task.task_id for call in twin.flight]
        assert calls.unfinished == len(twin.flight) + len(twin.queued) + len(twin.aside)
        assert calls.grouped == sum(bool(call.group) for call in twin.flight)
        queued = list(calls.queued())
        for group in GROUPS:
            mine = [call.task for call in twin.queued + twin.aside if call.group == group]
            assert [task for task in queued if task.group == group] == mine
        assert {task.task_id for task in calls.waiting.values()} == {call.task.task_id for call in twin.aside}

    @staticmethod
    def _ids(tasks: list[Any]) -> list[bytes]:
        return [task.task_id for task in tasks]


TestActorCalls = ActorCallsMachine.TestCase
TestActorCalls.settings = settings(stateful_step_count=100)
