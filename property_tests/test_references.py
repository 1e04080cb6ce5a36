"""Reference counting between processes: hypothesis chooses what happens in `reference_world`, whose twin judges it.

Canaries: tables with a planted bug, each of which the machine must catch. Some of these races take a dozen steps in the
right order, so a canary may start in the middle (`openings`); the real table starts there, too, now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from ftray.ownership.references import (
    COVERED,
    LOST,
    REGISTERING,
    AckReturns,
    Entry,
    ReferenceTable,
    Token,
    is_held,
)
from property_tests.reference_world import Violation, World, chain, circle, empty

PROCESSES = 4

process_numbers = st.integers(0, PROCESSES - 1)
numbers = st.integers(0, 7)
picks = st.lists(numbers, max_size=2)
some_picks = st.lists(numbers, min_size=1, max_size=2)


def choose(pool: Sequence[bytes], chosen: Iterable[int]) -> list[bytes]:
    """Different objects out of a pool, the newest first."""
    return list(dict.fromkeys(pool[-1 - number % len(pool)] for number in chosen)) if pool else []


masks = st.integers(0, 3)
fresh = st.sampled_from((False, False, True))
call = st.tuples(st.just("call"), process_numbers, process_numbers, numbers, masks, picks, fresh)
actions = st.one_of(
    st.tuples(st.just("put"), process_numbers, picks),
    st.tuples(st.just("drop"), process_numbers, numbers),
    st.tuples(st.sampled_from(("drop", "drop", "drop_all")), process_numbers),
    st.tuples(st.just("submit"), process_numbers, process_numbers, some_picks, st.booleans()),
    st.tuples(st.just("finish"), numbers, masks, picks, fresh),
    call,
    call,
    st.tuples(st.just("fetch"), process_numbers, numbers, st.booleans()),
    st.tuples(st.just("deliver"), st.integers(0, 15), st.integers(1, 4)),
    st.tuples(st.sampled_from(("rush", "probe"))),
)


class References(RuleBasedStateMachine):
    """Processes without crashes."""

    table: type[ReferenceTable] = ReferenceTable
    processes = PROCESSES
    audit = True
    openings: tuple[Callable[[World], None], ...] = (empty, chain, circle)

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.table, self.processes, self.audit)
        self.eager = False
        self.slow = (0, 0)

    @initialize(opening=numbers, eager=st.booleans(), source=process_numbers, to=process_numbers)
    def begin(self, opening: int, eager: bool, source: int, to: int) -> None:
        """One link is slow. Where the rest is eager, all else arrives at once: most races are two or three messages."""
        self.eager = eager
        source %= self.processes
        self.slow = (source, (source + 1 + to % (self.processes - 1)) % self.processes)
        self.openings[opening % len(self.openings)](self.world)

    def at(self, number: int) -> int:
        """A live process."""
        alive = [index for index, process in enumerate(self.world.processes) if process.alive]
        return alive[number % len(alive)]

    def holder(self, number: int) -> int:
        """A live process whose user code holds something, if there is any."""
        at = self.at(number)
        live = [index for index, process in enumerate(self.world.processes) if process.alive and process.pool()]
        return live[number % len(live)] if live else at

    def put(self, number: int, chosen: list[int]) -> None:
        at = self.at(number)
        self.world.put(at, choose(self.world.processes[at].pool(), chosen))

    def drop(self, number: int, index: int = 0) -> None:
        at = self.holder(number)
        refs = self.world.processes[at].refs
        if refs:
            self.world.drop(at, index % len(refs))

    def drop_all(self, number: int) -> None:
        at = self.holder(number)
        while self.world.processes[at].refs:
            self.world.drop(at, -1)

    def executor(self, at: int, number: int) -> int | None:
        others = [to for to, process in enumerate(self.world.processes) if process.alive and to != at]
        to = others[number % len(others)]
        return None if to in self.world.processes[at].buried else to

    def submit(self, number: int, other: int, chosen: list[int], forget: bool) -> None:
        at = self.at(number)
        to = self.executor(at, other)
        if to is not None:
            self.world.submit(at, to, choose(self.world.processes[at].pool(), chosen))
            if forget:
                self.world.drop(at, -1)

    def finish(self, number: int, keep: int, chosen: list[int], fresh: bool) -> None:
        tasks = [(at, token) for at, p in enumerate(self.world.processes) if p.alive for token in p.running]
        if tasks:
            self.end(*tasks[number % len(tasks)], keep, chosen, fresh)

    def end(self, at: int, token: int, keep: int, chosen: list[int], fresh: bool) -> None:
        process = self.world.processes[at]
        frame = process.running[token]
        returned = choose(process.refs + frame.refs, chosen)
        if fresh:
            returned = [self.world.put(at, returned)]
            frame.refs.append(process.refs.pop())
            keep &= ~(1 << len(frame.refs) - 1)
        self.world.finish(at, token, keep, returned)

    def call(self, number: int, other: int, index: int, keep: int, chosen: list[int], fresh: bool) -> None:
        """A whole task at once: leads quickly to states with many borrowers."""
        at = self.at(number)
        to = self.executor(at, other)
        if to is not None:
            token = self.world.submit(at, to, choose(self.world.processes[at].pool(), [index]))
            if not chosen:
                self.world.drop(at, -1)
            self.world.rush(self.slow)
            if token in self.world.processes[to].running:
                self.end(to, token, keep, chosen, fresh)
                self.world.rush(self.slow)

    def fetch(self, number: int, index: int, cache: bool) -> None:
        at = self.holder(number)
        for outer in choose(self.world.processes[at].pool(), [index]):
            self.world.fetch(at, outer, cache)

    def deliver(self, number: int, count: int) -> None:
        if self.eager and count > 1:
            return  # Only the slow link has anything, and it is to be slow.
        alive = self.world.processes
        ready = [link for link, messages in self.world.links.items() if messages and alive[link[1]].alive]
        if ready:
            link = ready[number % len(ready)]
            for _ in range(min(count, len(self.world.links[link]))):
                self.world.deliver(*link)
                self.world.check()

    def rush(self) -> None:
        self.world.rush(self.slow)

    def probe(self) -> None:
        self.world.probe()

    @rule(action=actions)
    def act(self, action: tuple[Any, ...]) -> None:
        # One rule for all: hypothesis would leave out some rules in each run, and most races need them all.
        getattr(self, action[0])(*action[1:])

    @invariant()
    def sound(self) -> None:
        self.world.check()
        if self.eager:
            self.world.rush(self.slow)

    def teardown(self) -> None:
        if not self.world.broken:
            self.world.probe()
            self.world.drain()


class ReferencesWithCrashes(References):
    """Processes that crash, until two are left."""

    @rule(number=process_numbers, delivered=numbers)
    def crash(self, number: int, delivered: int) -> None:
        if self.world.tokens > 5 and sum(process.alive for process in self.world.processes) > 2:
            self.world.crash(self.at(number), delivered)


profile = settings(max_examples=max(200, settings().max_examples), stateful_step_count=50)
TestReferences = References.TestCase
TestReferences.settings = profile
TestReferencesWithCrashes = ReferencesWithCrashes.TestCase
TestReferencesWithCrashes.settings = profile


# Canaries


class RepliesBeforeAck(ReferenceTable):
    """The reply leaves, and with it the cover, while the registration is still on its way."""

    def end_task(self, token: Token) -> bool:
        super().end_task(token)
        return True


class FreesWithHandoffsPending(ReferenceTable):
    def _let_go(self, object_id: bytes, entry: Entry) -> bool:
        handoffs, entry.handoffs = entry.handoffs, 0
        try:
            return super()._let_go(object_id, entry)
        finally:
            entry.handoffs = handoffs

    def handed_off(self, token: Token) -> None:
        receiver, object_ids = self._handoffs.get(token, (b"", ()))
        if receiver:
            self._handoffs[token] = (receiver, tuple(ref for ref in object_ids if ref in self.entries))
        super().handed_off(token)


class AcksBeforeRegistered(ReferenceTable):
    def receive_contained(
        self, outer_id: bytes, inner: Sequence[tuple[bytes, bytes, str]], token: Token | None
    ) -> None:
        super().receive_contained(outer_id, inner, token)
        if token is not None:
            self.effects.append(AckReturns(token))


class DropsOuterWhileRegistering(ReferenceTable):
    """A reference out of a value relies on an outer object that is let go too early."""

    def note_from_outer(self, outer_id: bytes, inner_id: bytes, owner: bytes, owner_endpoint: str) -> Entry:
        entry = self.add_borrowed(inner_id, owner, owner_endpoint)
        if entry.owner is not None and entry.registration == COVERED and not entry.guards:
            self._register(inner_id, entry)
        return entry


class ForgetsWhileRegistering(ReferenceTable):
    """Nobody takes back a registration that is under way when the last hold goes."""

    def _let_go(self, object_id: bytes, entry: Entry) -> bool:
        if entry.registration == REGISTERING and not is_held(entry) and not entry.guards:
            entry.registration = LOST
            self._uncover(entry)
        return super()._let_go(object_id, entry)


class TrustsOtherTask(ReferenceTable):
    """Of two tasks that cover a reference one ends: it is left to the other, whose submitter may have it from us."""

    def end_task(self, token: Token) -> bool:
        notes = self._tasks.get(token) or {}
        for ref, entry in list(notes.items()):
            if entry.guards is not None and len(entry.guards) > 1:
                entry.guards.discard(token)
                del notes[ref]
        return super().end_task(token)


class LeavesItToNobody(ReferenceTable):
    """When one of two tasks that cover a reference ends, the other one does not look at it any more."""

    def end_task(self, token: Token) -> bool:
        notes = self._tasks.get(token) or {}
        for ref, entry in list(notes.items()):
            others = (entry.guards or set()) - {token}
            if others and is_held(entry):
                for other in others:
                    del (self._tasks[other] or {})[ref]
                entry.guards = None
                del notes[ref]
        return super().end_task(token)


class ForgetsToAckForDroppedResult(ReferenceTable):
    def receive_contained(
        self, outer_id: bytes, inner: Sequence[tuple[bytes, bytes, str]], token: Token | None
    ) -> None:
        if outer_id in self.entries:
            super().receive_contained(outer_id, inner, token)


class RegistersOnlyLocalRefs(ReferenceTable):
    """At the end of a task only ObjectRefs count, not what submitted tasks or put values hold."""

    def end_task(self, token: Token) -> bool:
        for ref, entry in list((self._tasks.get(token) or {}).items()):
            if not entry.local and is_held(entry) and entry.guards == {token}:
                entry.guards = None
                del (self._tasks[token] or {})[ref]
        return super().end_task(token)


class KeepsDeadBorrowers(ReferenceTable):
    def process_died(self, worker_id: bytes) -> None:
        for token in tuple(self._handoffs_to.get(worker_id, ())):
            self.handed_off(token)


class KeepsHandoffsToTheDead(ReferenceTable):
    def process_died(self, worker_id: bytes) -> None:
        for object_id in self._borrowed_by.pop(worker_id, ()):
            self._drop_borrower(object_id, worker_id)


class WaitsForDeadOwner(ReferenceTable):
    def owner_died(self, owner: bytes) -> list[bytes]:
        return []


@pytest.mark.parametrize(
    ("bug", "machine", "opening"),
    [
        (RepliesBeforeAck, References, empty),
        (FreesWithHandoffsPending, References, empty),
        (AcksBeforeRegistered, References, chain),
        (DropsOuterWhileRegistering, References, chain),
        (ForgetsWhileRegistering, References, empty),
        (TrustsOtherTask, References, circle),
        (LeavesItToNobody, References, circle),
        (ForgetsToAckForDroppedResult, References, empty),
        (RegistersOnlyLocalRefs, References, empty),
        (KeepsDeadBorrowers, ReferencesWithCrashes, chain),
        (KeepsHandoffsToTheDead, ReferencesWithCrashes, chain),
        (WaitsForDeadOwner, ReferencesWithCrashes, chain),
    ],
)
def test_planted_bug_is_caught(
    bug: type[ReferenceTable], machine: type[References], opening: Callable[[World], None]
) -> None:
    # The twin has to see it, so the tables do not check themselves.
    attributes = {"table": bug, "processes": 3, "openings": (opening,), "audit": False}
    canary = type("Canary", (machine,), attributes)

    fixed = settings(
        max_examples=4_000,
        stateful_step_count=30,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(Violation):
        run_state_machine_as_test(canary, settings=fixed)
