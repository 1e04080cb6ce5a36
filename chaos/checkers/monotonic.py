"""Watch streams: is a watcher told everything, once, in order, also when it had to resume?

Role: pure, one pass. The *log* is what really changed, in order; a *stream* is what one watcher was told.

Rules
- A stream has each change of the log to the keys that it watches, from where it began: none lost, none twice, none in
  another order, none that was not. Several changes may have the same revision; they have different keys.
- A watch that resumes names the revision up to which it was told. It may be higher than that of the last change, if
  nothing that it watches changed in between.
- A snapshot stands for all changes up to its revision, and must be what the log makes of them.

After a problem the check goes on from where the stream is, so that one fault is reported once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from chaos.checkers.exactly_once import shown
from chaos.checkers.history import HistoryError, Value, counted, frozen


class MalformedLogError(HistoryError):
    """The log to check streams against goes back, or changes a key twice in one revision: record it at the source."""


@dataclass(frozen=True, slots=True)
class Change:
    """A key has a new value; None if it was deleted."""

    revision: int
    key: Value
    value: Value

    def __str__(self) -> str:
        what = "deleted" if self.value is None else f"= {self.value!r}"
        return f"revision {self.revision} ({self.key!r} {what})"


@dataclass(frozen=True, slots=True)
class Resumed:
    """The watch was made anew, for changes after this revision."""

    after: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is watched, as it is at a revision."""

    revision: int
    items: Mapping[Value, Value] = field(default_factory=dict)


Told: TypeAlias = Change | Resumed | Snapshot


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What was found out about a stream or a log. `str()` gives it in words."""

    name: str
    changes: int
    resumptions: int
    snapshots: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        counts = [counted(self.changes, "change")]
        counts += [counted(self.resumptions, "resumption")] * (self.resumptions > 0)
        counts += [counted(self.snapshots, "snapshot")] * (self.snapshots > 0)
        head = f"{self.name} ({', '.join(counts)})"
        return f"in order: {head}" if self.ok else "\n".join([f"not in order: {head}", *shown(self.problems)])


def check_log(log: Iterable[Change]) -> StreamReport:
    """Whether each revision of a log is the last one plus one, or the same with another key."""
    problems = []
    revision = count = 0
    keys: set[Value] = set()
    last: Change | None = None
    for each in log:
        count += 1
        if last is None or each.revision != revision:
            if last is not None and each.revision < revision:
                problems.append(f"{each} comes after {last}: the log goes back")
            elif last is not None and each.revision > revision + 1:
                missing = counted(each.revision - revision - 1, "revision")
                problems.append(f"{each} comes after {last}: lost between them: {missing}")
            keys = set()
        if each.key in keys:
            problems.append(f"{each} comes after another change of that key in the same revision")
        keys.add(each.key)
        revision, last = each.revision, each
    return StreamReport("log", count, 0, 0, tuple(problems))


def check_stream(
    log: Sequence[Change],
    stream: Iterable[Told],
    *,
    name: str = "stream",
    keys: Container[Value] | None = None,
    since: int = 0,
    until: int | None = None,
    initial: Mapping[Value, Value] | None = None,
) -> StreamReport:
    """Checks what a watcher was told against the log.

    Args:
        keys: what it watches; None: everything.
        since: the revision after which it began.
        until: the revision up to which it must have been told everything; None: the end may be missing.
        initial: what there was before the log began, if streams have snapshots.

    Raises MalformedLogError.
    """
    check = _Check([each for each in log if keys is None or each.key in keys], keys, since, initial or {})
    for each in stream:
        if isinstance(each, Change):
            check.change(each)
        elif isinstance(each, Resumed):
            check.resumed(each)
        else:
            check.snapshot(each)
    if until is not None:
        check.lost_before(check.after(until), f"it ended at revision {check.told}, and should have gone on to {until}")
    return StreamReport(name, check.changes, check.resumptions, check.snapshots, tuple(check.problems))


class _Check:
    """One pass over a stream."""

    def __init__(
        self, log: list[Change], keys: Container[Value] | None, since: int, initial: Mapping[Value, Value]
    ) -> None:
        self.log = log
        self.revisions = [each.revision for each in log]
        self.places = {(each.revision, each.key): place for place, each in enumerate(log)}
        if self.revisions != sorted(self.revisions) or len(self.places) != len(log):
            raise MalformedLogError("the log goes back, or changes a key twice in one revision; see check_log")
        self.keys = keys
        self.initial = {key: value for key, value in initial.items() if keys is None or key in keys}
        self.items = dict(self.initial)
        self.applied = 0
        """How many changes of the log are in `items`."""
        self.told = since
        self.next = self.after(since)
        """The place of the change that is expected next."""
        self.changes = self.resumptions = self.snapshots = 0
        self.problems: list[str] = []

    def after(self, revision: int) -> int:
        """The place of the first change after a revision."""
        return bisect_right(self.revisions, revision)

    def change(self, each: Change) -> None:
        self.changes += 1
        place = self.places.get((each.revision, each.key))
        if self.keys is not None and each.key not in self.keys:
            self.problems.append(f"it was told of {each}, which it does not watch")
        elif place is None:
            self.problems.append(f"it was told of {each}, which is not in the log")
        elif place < self.next:
            # Skipped by a snapshot or told before: either way it lies behind.
            self.problems.append(f"it was told of {each} when it was at revision {self.told}: twice, or too late")
        else:
            if self.log[place].value != each.value:
                self.problems.append(f"it was told of {each}, but the log has {self.log[place]}")
            self.lost_before(place, f"then came {each}")
            self.next = place + 1
            self.told = each.revision

    def resumed(self, each: Resumed) -> None:
        self.resumptions += 1
        place = self.after(each.after)
        if place < self.next:
            repeated = self.next - place
            self.problems.append(
                f"it resumed after revision {each.after}, but was told up to {self.told}: "
                f"{counted(repeated, 'change')} would come twice"
            )
        self.lost_before(place, f"then it resumed after revision {each.after}")
        self.next, self.told = place, each.after

    def snapshot(self, each: Snapshot) -> None:
        self.snapshots += 1
        place = self.after(each.revision)
        if each.revision < self.told:
            self.problems.append(f"it got a snapshot of revision {each.revision} when it was at {self.told} already")
        if place < self.applied:
            self.items, self.applied = dict(self.initial), 0
        for change in self.log[self.applied : place]:
            if change.value is None:
                self.items.pop(change.key, None)
            else:
                self.items[change.key] = change.value
        self.applied = place
        given = {frozen(key): frozen(value) for key, value in each.items.items() if value is not None}
        for key in [*self.items, *(key for key in given if key not in self.items)]:
            if self.items.get(key) != given.get(key):
                self.problems.append(
                    f"in the snapshot of revision {each.revision}, {key!r} is {given.get(key)!r}, "
                    f"and by the log {self.items.get(key)!r}"
                )
        self.next, self.told = place, each.revision

    def lost_before(self, place: int, context: str) -> None:
        """Reports the changes between what was told and this place."""
        lost = self.log[self.next : place]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            self.problems.append(f"it was not told of {', '.join(map(str, lost[:3]))}{more}; {context}")
