"""What must hold in a simulated cluster, after each step and at the end.

Role: logic over a world, but for its reading of replicas' insides.

After each batch of a head
- one leader in each term; what the leader takes a follower to have it has;
- what is applied at an index is the same everywhere and for ever; a new leader has everything that was committed in the
  terms before; a read that is confirmed as fresh misses nothing that was applied anywhere when it was asked;
- a restarted head knows its term and vote; heads that publish a change of the same revision publish the same.

Now and then: log matching. At the end: the histories are linearizable, increments took effect once and are all there,
watchers have seen how it ended, and all heads hold the same state.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chaos.checkers.linearizability import Verdict, check
from chaos.checkers.models import KeyValue, Model, NamedActors
from ftray.gcs.state.tables import Change, Record, Table

if TYPE_CHECKING:
    from ftray.sim.clients import Histories
    from ftray.sim.heads import Head

MATCH_ENTRIES = 300
"""Log matching is looked at for so many entries at the end of each log."""


class Checks:
    """The invariants of one run. `problems` gets what does not hold."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.leaders: dict[int, str] = {}
        self.committed: dict[int, tuple[int, bytes]] = {}
        self.committed_in: dict[int, int] = {}
        """The term in which an entry was first applied."""
        self.changes: dict[tuple[int, Table, bytes], Record | None] = {}
        self.last_applied = 0
        self.undecided = 0
        self.heads: Sequence[Head] = ()
        self._told: dict[bytes, tuple[int, str | None]] = {}
        """By replica, the term and vote that it has shown."""
        self._matched: dict[tuple[bytes, bytes], tuple[int, int]] = {}
        """By leader and peer, the term and the match index that were looked at."""

    def problem(self, what: str) -> None:
        self.problems.append(what)

    # --- after each step ----------------------------------------------------------------------------------------------

    def applied(self, head: Head, index: int, term: int, command: bytes) -> None:
        engine = head.engine
        self.last_applied = max(self.last_applied, index)
        if index not in self.committed:
            self.committed[index] = (term, command)
            self.committed_in[index] = engine.term if engine is not None else term
        elif self.committed[index] != (term, command):
            self.problem(
                f"{head.name} applies entry {index} of term {term}, but entry {index} of term "
                f"{self.committed[index][0]} was applied before"
            )

    def published(self, head: Head, changes: Sequence[Change]) -> None:
        for change in changes:
            key = (change.revision, change.table, change.key)
            known = self.changes.setdefault(key, change.record)
            if known != change.record:
                self.problem(f"{head.name} publishes {change}, and another head {known}")

    def restarted(self, head: Head) -> None:
        """A head has read its disk: it must know its term and its vote."""
        replica = head.replica
        assert replica is not None
        term, vote = self._told.get(head.replica_id, (0, None))
        log = replica._log
        if log.term < term or (log.term == term and vote is not None and log.vote != vote):
            self.problem(
                f"{head.name} has restarted with term {log.term} and vote {log.vote}, and had shown {term} and {vote}"
            )

    def checked(self, head: Head) -> None:
        engine = head.engine
        if engine is None:
            return
        log = engine._log
        if not log.dirty:  # otherwise the disk is full, and nothing is said
            self._told[head.replica_id] = (log.term, log.vote)
        if not engine.leads:
            return
        self._matches(head)
        known = self.leaders.get(engine.term)
        if known is None:
            self.leaders[engine.term] = head.name
            head.sim.note(f"{head.name} leads in term {engine.term}")
            self._complete(head)
        elif known != head.name:
            self.problem(f"{known} and {head.name} both lead in term {engine.term}")

    def _matches(self, head: Head) -> None:
        """What the leader takes a peer to have, the peer has. (Unless the peer is in a later term already.)"""
        engine, log = head.engine, head.engine._log
        term = engine.term
        for peer in self.heads:
            if peer is head or peer.replica is None or peer.engine is None or peer.engine.term > term:
                continue
            match = engine.match_index(peer.replica_id)
            pair = (head.replica_id, peer.replica_id)
            if self._matched.get(pair) == (term, match):
                continue
            self._matched[pair] = (term, match)
            first = log[0][1]
            if match > first and not peer.replica._log.has(match, log[match - first][2]):
                self.problem(
                    f"{head.name}, the leader in term {term}, takes {peer.name} to have entry {match}, which it has not"
                )

    def _complete(self, head: Head) -> None:
        replica = head.replica
        assert replica is not None
        log = replica._log
        first = log[0][1]
        term = head.engine.term
        size = len(log)
        for index, (entry_term, command) in self.committed.items():
            # One that gets its votes late leads in an old term, and does no harm.
            if index > first and self.committed_in[index] < term:
                position = index - first
                if position >= size or log[position][2] != entry_term or log[position][0] != command:
                    self.problem(f"the new leader {head.name} lacks entry {index}, which was committed before")
                    return

    def logs(self, heads: Sequence[Head]) -> None:
        """Log matching: two logs with a common entry agree before it."""
        logs = [
            (head, head.replica._log[max(1, len(head.replica._log) - MATCH_ENTRIES) :])
            for head in heads
            if head.replica is not None and head.engine is not None
        ]
        for number, (head, log) in enumerate(logs):
            for other, other_log in logs[:number]:
                theirs = {index: (term, command) for command, index, term in other_log}
                common = False
                for command, index, term in reversed(log):
                    entry = theirs.get(index)
                    if entry is None:
                        continue
                    if common or entry[0] == term:
                        common = True
                        if entry != (term, command):
                            self.problem(f"{head.name} and {other.name} differ at {index}, and agree later")
                            return

    # --- at the end ---------------------------------------------------------------------------------------------------

    def histories(self, histories: Histories) -> None:
        self.problems += histories.problems
        models: tuple[tuple[Model, list[object]], ...] = (
            (KeyValue(), list(histories.table.history())),
            (NamedActors(), list(histories.names.history())),
        )
        for model, history in models:
            report = check(history, model)  # type: ignore[arg-type]
            if report.verdict is Verdict.NOT_LINEARIZABLE:
                self.problem(str(report))
            elif report.verdict is Verdict.UNDECIDED:
                self.undecided += 1
        self._counts(histories)

    def _counts(self, histories: Histories) -> None:
        invoked = sorted(each[0] for each in histories.increments)
        acknowledged = sorted(each[1] for each in histories.increments)
        for begin_ms, end_ms, total in histories.counts:
            low, high = bisect.bisect_left(acknowledged, begin_ms), bisect.bisect_right(invoked, end_ms)
            if not low <= total <= high:
                self.problem(
                    f"a fresh read between {begin_ms:.3f} and {end_ms:.3f} ms counted {total} increments: {low} were "
                    f"acknowledged before it, and {high} were asked for"
                )

    def ends(self, heads: Sequence[Head], acknowledged: Sequence[bytes]) -> None:
        """All have converged."""
        self.logs(heads)
        first = heads[0].replica
        assert first is not None
        for head in heads:
            replica = head.replica
            assert replica is not None
            lost = [key for key in acknowledged if replica.state.kv_get("count", key) is None]
            if lost:
                self.problem(f"{head.name} lacks acknowledged writes: {lost[:5]}")
            if replica.state.snapshot() != first.state.snapshot():
                self.problem(f"{head.name} and {heads[0].name} have applied the same, and hold different states")
            self.problems += [f"{head.name}: {each}" for each in replica.state.check()]
