"""The validator of a reference table, and its report.

Both read the parts of a `ReferenceTable` and change nothing. They walk over everything, so neither is for a fast path:
tests and the simulator run `audit` after each step, `ftray memory` asks for `rows`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from ftray.ownership.reference_types import (
    COVERED,
    REGISTERING,
    REGISTRATION_NAMES,
    Entry,
    Row,
    Token,
    Wait,
    is_held,
)


def _require(condition: bool, object_id: bytes, problem: str) -> None:
    if not condition:
        raise AssertionError(f"object {object_id.hex()}: {problem}")


def audit(
    entries: Mapping[bytes, Entry],
    tasks: Mapping[Token, Mapping[bytes, Entry] | None],
    handoffs: Mapping[Token, tuple[bytes, Sequence[bytes]]],
    handoffs_to: Mapping[bytes, AbstractSet[Token]],
    borrowed_by: Mapping[bytes, AbstractSet[bytes]],
    borrowed_from: Mapping[bytes, AbstractSet[bytes]],
) -> None:
    """Recount everything that is kept as a count or an index. Raises AssertionError at the first difference."""
    contained: Counter[bytes] = Counter()
    covering: Counter[bytes] = Counter()
    waiting: Counter[int] = Counter()
    waits: dict[int, Wait] = {}
    for entry in entries.values():
        contained.update(entry.contains or ())
        for cover in entry.covers or ():
            if isinstance(cover, Wait):
                waiting[id(cover)] += 1
                waits[id(cover)] = cover
            else:
                covering[cover] += 1
    handed: Counter[bytes] = Counter()
    for token, (receiver, object_ids) in handoffs.items():
        handed.update(object_ids)
        if token not in handoffs_to.get(receiver, ()):
            raise AssertionError(f"reply {token!r}: missing in the index of its receiver")
    if sum(map(len, handoffs_to.values())) != len(handoffs):
        raise AssertionError("the index of receivers names replies that are not handed off")
    for key, wait in waits.items():
        if wait.remaining != waiting[key]:
            raise AssertionError(f"{wait.effect!r} waits for {wait.remaining} answers, {waiting[key]} are under way")
    for name, counts in (("contained", contained), ("covering", covering), ("handed off", handed)):
        for object_id in counts:
            _require(object_id in entries, object_id, f"counted as {name}, but not in the table")
    for object_id, entry in entries.items():
        counts_ok = entry.contained == contained[object_id] and entry.covering == covering[object_id]
        _require(counts_ok and entry.handoffs == handed[object_id], object_id, "a count differs from what is counted")
        _require(entry.local >= 0 and entry.submitted >= 0, object_id, "a count is negative")
        _require(entry.guards is None or bool(entry.guards), object_id, "an empty set of guards")
        for token in entry.guards or ():
            _require((tasks.get(token) or {}).get(object_id) is entry, object_id, f"not noted by its guard {token!r}")
        if entry.owner is None:
            _require(is_held(entry), object_id, "owned and held by nobody, but not freed")
            for borrower in entry.borrowers or ():
                _require(object_id in borrowed_by.get(borrower, ()), object_id, "missing in the index of borrowers")
            borrowing = entry.registration != COVERED or entry.guards is not None or entry.covers is not None
            _require(not borrowing, object_id, "owned here and borrowed as well")
        else:
            waits_for_end = entry.guards is not None or entry.registration == REGISTERING
            _require(is_held(entry) or waits_for_end, object_id, "borrowed and held by nobody, but not forgotten")
            _require(object_id in borrowed_from.get(entry.owner, ()), object_id, "missing in the index of owners")
            _require(entry.borrowers is None, object_id, "borrowers of an object that is not owned here")
            _require(entry.covers is None or entry.registration == REGISTERING, object_id, "covers kept needlessly")
    for borrower, ids in borrowed_by.items():
        for object_id in ids:
            borrowers = entries[object_id].borrowers if object_id in entries else None
            _require(borrower in (borrowers or ()), object_id, "the index of borrowers names it wrongly")
    for owner, ids in borrowed_from.items():
        for object_id in ids:
            _require(object_id in entries and entries[object_id].owner == owner, object_id, "not of the indexed owner")
    for token, notes in tasks.items():
        for object_id in notes or ():
            _require(object_id in entries, object_id, f"noted by task {token!r}, but not in the table")
            _require(token in (entries[object_id].guards or ()), object_id, f"lacks its guard {token!r}")


def reasons(entry: Entry) -> tuple[str, ...]:
    """What keeps an entry, in words."""
    counted = (
        (entry.local, "local reference", "local references"),
        (entry.submitted, "argument of an unfinished task", "unfinished tasks have it as an argument"),
        (entry.contained, "contained in a live object", "live objects contain it"),
        (entry.handoffs, "in a reply not yet acknowledged", "replies with it are not yet acknowledged"),
        (entry.covering, "covers a registration under way", "registrations under way rely on it"),
        (len(entry.borrowers or ()), "borrowed by a process", "processes borrow it"),
        (len(entry.guards or ()), "argument of a running task", "running tasks have it as an argument"),
    )
    found = [one if count == 1 else f"{count} {many}" for count, one, many in counted if count]
    if entry.pinned:
        found.append("pinned for good: serialised out of band")
    if not found:
        found.append("waits for the answer of its owner")
    return tuple(found)


def rows(entries: Mapping[bytes, Entry]) -> list[Row]:
    """A line for each entry, in the order in which the entries were made."""
    return [
        Row(
            object_id,
            entry.owner,
            entry.local,
            entry.submitted,
            entry.contained,
            entry.handoffs,
            len(entry.borrowers or ()),
            "" if entry.owner is None else REGISTRATION_NAMES[entry.registration],
            reasons(entry),
        )
        for object_id, entry in entries.items()
    ]
