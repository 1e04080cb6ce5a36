"""The simulator is tested: each planted defect is found within a bounded number of seeds."""

from __future__ import annotations

from functools import partial

import pytest
from planted import (
    PLANTED,
    Planted,
    gaps_move_a_follower_forward,
    replayed_is_not_synced,
    stale_acknowledgement_accepted,
    unverified_entry_committed,
    votes_during_a_compaction_lost,
    watchers_forgotten_when_a_snapshot_comes,
)

from ftray.gcs.raft.messages import TimeoutNow
from ftray.gcs.replica import Request
from ftray.gcs.state.commands import KvPut, encode_command
from ftray.sim.clients import WatchClient
from ftray.sim.heads import Head
from ftray.sim.process import Process
from ftray.sim.runner import CRASH, LIVENESS, SAFETY, Outcome, run_seed
from ftray.sim.world import Options, World, _tuned


def search(planted: Planted, patch: pytest.MonkeyPatch) -> Outcome | None:
    """The first seed that shows the defect."""
    planted.plant(patch)
    for seed in range(planted.first, planted.first + planted.seeds_max):
        outcome = run_seed(seed, planted.options, planted.hooks)
        if not outcome.ok:
            return outcome
    return None


@pytest.mark.parametrize(
    "planted",
    [pytest.param(each, id=each.name, marks=[pytest.mark.slow] if each.slow else []) for each in PLANTED],
)
def test_a_planted_defect_is_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = search(planted, monkeypatch)
    assert outcome is not None, f"{planted.name} was not noticed in {planted.seeds_max} seeds"
    assert outcome.kind in (SAFETY, LIVENESS, CRASH)
    monkeypatch.undo()
    right = run_seed(outcome.seed, planted.options)
    assert right.ok, right


class _Led(World):
    """A world in which a history is led by hand, because it is too rare for a random search."""

    def leading(self, among: list[Head] | None = None) -> Head:
        return max((head for head in among or self.heads if head.engine is not None),
                   key=lambda head: (head.leads, head.engine.term))  # fmt: skip

    def until_true(self, condition: object) -> None:
        assert self._run(5000.0, condition)  # type: ignore[arg-type]

    def write(self, head: Head, count: int) -> None:
        for number in range(count):
            command = encode_command(KvPut("n", b"%d" % number, head.name.encode()))
            if head.replica is not None:
                head.handle(partial(head.replica.propose, Request(b"", 0, command), lambda result: None))
        if head.host is not None:
            head.handle(head.host.server.wake)

    def begin(self) -> Head:
        """Returns the first leader."""
        for head in self.heads:
            head.run()
        self.until_true(lambda: any(head.leads for head in self.heads))
        return self.leading()


class _Gap(_Led):
    """A follower has entries of its own where the leader has many, which take several messages."""

    def run(self) -> str:
        with _tuned(self.tuning):
            first = self.begin()
            others = [head for head in self.heads if head is not first]
            apart = [pair for b in others for pair in ((first.name, b.name), (b.name, first.name))]
            self.network.cut(apart)
            self.write(first, 2)
            self.until_true(lambda: any(head.leads for head in others))
            self.write(self.leading(others), 8)
            self._run(100.0, None)
            self.network.heal(apart, broken=True)
            self._run(2000.0, None)
            return "" if len({head.engine.last_applied for head in self.heads}) == 1 else self.show()


class _StaleTail(_Led):
    """A follower has, after what it does not know to be committed yet, entries that the leader never had.

    The leader's messages are small, so the first one that fits ends before those entries.
    """

    def run(self) -> str:
        with _tuned(self.tuning):
            first = self.begin()
            self.until_true(lambda: first.engine.own_term_applied)
            others = [head for head in self.heads if head is not first]
            answers = [(head.name, first.name) for head in others]
            requests = [(first.name, head.name) for head in others]
            self.network.cut(answers)
            self.write(first, 3)
            self._run(60.0, None)
            self.network.cut(requests)
            self.write(first, 3)
            self.until_true(lambda: any(head.leads for head in others))
            self.write(self.leading(others), 8)
            self._run(100.0, None)
            self.network.heal(answers + requests, broken=True)
            self._run(2000.0, None)
            return "" if len({head.engine.last_applied for head in self.heads}) == 1 else self.show()


class _LateSnapshot(_Led):
    """Who watches at a follower, when that lacks so much that it is sent a snapshot."""

    def run(self) -> str:
        with _tuned(self.tuning):
            first = self.begin()
            self.until_true(lambda: first.engine.own_term_applied)
            [client] = [each for each in self.clients if isinstance(each, WatchClient)]
            client.run()
            self.write(first, 1)
            self.until_true(lambda: client.view)
            follower, other = [head for head in self.heads if head is not first]
            self.network.cut(_between(client, first, other))
            self.until_true(lambda: client.gcs.served_by == follower.name)
            apart = _between(follower, first, other)
            self.network.cut(apart)
            self.write(first, 20)
            self._run(300.0, None)
            first.handle(first.replica.compact)
            self.network.heal(apart, broken=True)
            self._run(1000.0, None)
            assert follower.replica._log[0][1] == first.replica._log.snapshot_index
            return "".join(str(item) for item in client.missed(first.replica.state))


def _between(one: Process, *others: Process) -> list[tuple[str, str]]:
    return [pair for other in others for pair in ((one.name, other.name), (other.name, one.name))]


class _KilledInSync(_Led):
    """A follower is killed in a sync, comes back, and says what it has read. Then its machine loses power."""

    def run(self) -> str:
        with _tuned(self.tuning):
            first = self.begin()
            self.until_true(lambda: first.engine.own_term_applied)
            follower = next(head for head in self.heads if head is not first)
            follower.disk.crash_in_sync, follower.disk.kill_in_sync = False, True
            self.write(first, 1)
            self.until_true(lambda: not follower.running)
            follower.run()
            self.until_true(lambda: follower.engine.last_applied == first.engine.last_applied)
            follower.crash(power=True)
            follower.run()
            self._run(2000.0, None)
            return ""


class _VoteWhileCompacting(_Led):
    """A follower votes while its journal is being compacted, and is killed when that is done."""

    def run(self) -> str:
        with _tuned(self.tuning):
            first = self.begin()
            self.until_true(lambda: first.engine.own_term_applied)
            voter, other = [head for head in self.heads if head is not first]
            self.write(first, 40)
            self._run(300.0, None)
            voter.disk.fsync_ms = (30.0, 30.0)
            voter.handle(voter.replica.begin_compaction)
            voter.handle(voter.host.server.wake)
            first.handle(partial(first.replica.on_send, other.replica_id, TimeoutNow(first.engine.term)))
            first.handle(first.host.server.wake)
            self.until_true(lambda: other.leads)
            self._run(300.0, None)
            voter.crash()
            voter.run()
            self._run(500.0, None)
            return ""


class _History(_Led):
    """Acknowledgements that arrive two elections late."""

    def run(self) -> str:
        first = self.begin()
        follower, *others = [head for head in self.heads if head is not first]
        # The leader and one follower are apart from the others; what the follower answers takes long.
        apart = [pair for a in (first, follower) for b in others for pair in ((a.name, b.name), (b.name, a.name))]
        self.network.slow[follower.name, first.name] = [1500.0]
        self.network.cut(apart)
        self.write(first, 6)
        self.until_true(lambda: any(head.leads for head in others))
        self.write(self.leading(others), 1)
        self._run(40.0, None)
        # Together again, both take over what the new leader has, which is less. Then the first leads once more.
        self.network.heal(apart, broken=False)
        self._run(60.0, None)
        self.network.slow[first.name, follower.name] = [1500.0]
        leader = self.leading(others)
        assert leader.replica is not None and leader.host is not None
        leader.handle(partial(leader.replica.on_send, first.replica_id, TimeoutNow(leader.engine.term)))
        leader.handle(leader.host.server.wake)
        self._run(5.0 * self.network.latency_ms[1] + 10.0, None)
        self.led_again = first.leads
        self.write(first, 12)
        self._run(1500.0, None)
        return ""


def test_a_stale_acknowledgement_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    led, found = 0, []
    for seed in range(12):
        options = Options(heads=5, clients=0, faults=())
        right = _History(seed, options)
        right.run()
        assert not right.problems and not right.errors
        led += right.led_again
        with monkeypatch.context() as patch:
            stale_acknowledgement_accepted(patch)
            wrong = _History(seed, options)
            wrong.run()
            found += [problem for problem in wrong.problems if "to have entry" in problem]
    assert led > 3 and found


def test_a_commit_of_what_was_not_compared_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        options = Options(clients=0, faults=(), small=True)
        right = _StaleTail(seed, options)
        assert right.run() == "" and not right.problems
        with monkeypatch.context() as patch:
            unverified_entry_committed(patch)
            wrong = _StaleTail(seed, options)
            wrong.run()
            assert any("was applied before" in problem for problem in wrong.problems)


def test_watchers_that_are_forgotten_when_a_snapshot_comes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        options = Options(clients=5, faults=(), small=True, nodes=1)
        right = _LateSnapshot(seed, options)
        assert right.run() == "" and not right.problems
        with monkeypatch.context() as patch:
            watchers_forgotten_when_a_snapshot_comes(patch)
            assert _LateSnapshot(seed, options).run()


def test_what_is_read_again_and_not_synced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in range(8):
        options = Options(clients=0, faults=())
        right = _KilledInSync(seed, options)
        assert right.run() == "" and not right.problems
        with monkeypatch.context() as patch:
            replayed_is_not_synced(patch)
            wrong = _KilledInSync(seed, options)
            wrong.run()
            found += wrong.problems
    assert any("to have entry" in problem or "an older copy" in problem for problem in found), found


def test_votes_that_a_compaction_loses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in range(6):
        options = Options(clients=0, faults=(), small=True)
        right = _VoteWhileCompacting(seed, options)
        assert right.run() == "" and not right.problems
        with monkeypatch.context() as patch:
            votes_during_a_compaction_lost(patch)
            wrong = _VoteWhileCompacting(seed, options)
            wrong.run()
            found += wrong.problems
    assert any("has restarted with term" in problem for problem in found), found


def test_a_follower_that_goes_in_circles_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = []
    for seed in range(6):
        options = Options(clients=0, faults=(), small=True)
        right = _Gap(seed, options)
        assert right.run() == "" and not right.problems
        with monkeypatch.context() as patch:
            gaps_move_a_follower_forward(patch)
            stuck.append(_Gap(seed, options).run())
    assert any(stuck)
