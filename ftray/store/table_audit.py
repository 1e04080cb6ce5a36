"""Whether the books of an object table are consistent.

Role: pure, for tests and simulation; linear in what the table holds.

Rejected: a part of `table.py` (it reads every private field, and changes none).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftray.store.records import DISK, IDLE, NOWHERE, RESTORING, SPILLING, StoredObject

if TYPE_CHECKING:
    from ftray.store.table import ObjectTable


def check_table(table: ObjectTable) -> None:
    """Raises AssertionError if the books are not consistent."""
    table._allocator.check()
    entries = list(table._all())
    here = [entry for entry in entries if entry.room and entry.offset != NOWHERE]
    places = {entry.offset: entry.room for entry in here}
    assert dict(table._allocator.blocks()) == places
    assert len(places) == len(here), "two objects in one place"
    pinned: dict[bytes, set[StoredObject]] = {}
    for entry in entries:
        assert entry.room >= entry.size >= 0
        assert all(count > 0 for count in entry.pins.values())
        assert entry.pins or not entry.doomed, "a doomed object without pins"
        assert entry.sealed or entry.pins == {entry.creator: 1}, "a creation is its creator's alone"
        idle = entry.sealed and not entry.pins and entry.offset != NOWHERE
        assert (table._cached.get(entry.object_id) is entry) == (idle and (not entry.primary or entry.file > 0))
        spillable = idle and entry.primary and not entry.file and entry.room > 0
        assert (table._spillable.get(entry.object_id) is entry) == spillable
        assert (entry.offset == NOWHERE) == (entry.is_spilled or bool(entry.lost)), "neither in memory nor on disk"
        assert (entry.busy != IDLE) == (DISK in entry.pins) == (entry in table._jobs.values())
        assert entry.busy == IDLE or (entry.busy == RESTORING) == (entry.file > 0)
        for client in entry.pins:
            pinned.setdefault(client, set()).add(entry)
    assert {client: set(held) for client, held in table._clients.items()} == pinned
    assert table._evictable_bytes == sum(entry.room for entry in table._cached.values())
    assert table._freed_count == sum(entry.doomed for entry in entries)
    assert table._spillable_bytes == sum(entry.room for entry in table._spillable.values())
    assert table._spilling_bytes == sum(entry.room for entry in entries if entry.busy == SPILLING)
    files = {entry.file: entry.size for entry in entries if entry.file}
    assert table._files == len(files) == sum(entry.file > 0 for entry in entries), "two objects in one file"
    assert table._file_bytes == sum(files.values())
    assert not files.keys() & set(table._unlinks), "a file that is needed is to go"
    spilled = [entry.size for entry in entries if entry.is_spilled]
    assert (table._spilled_count, table._spilled_bytes) == (len(spilled), sum(spilled))
    owned: dict[bytes, set[bytes]] = {}
    for entry in table._objects.values():
        owned.setdefault(entry.owner, set()).add(entry.object_id)
    assert {owner: set(ids) for owner, ids in table._owned.items()} == owned
    assert not any(object_id in table for object_id in table._waiters)
    for client, object_id in table._released:
        assert sum(client in entry.pins for entry in table._doomed.get(object_id, ())) >= 1
