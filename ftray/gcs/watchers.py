"""Who watches what, and how changes reach them, however slowly they read.

Role: shell, without sockets of its own. `WatchHub` takes the change feed of the replica and sends each watcher what
concerns it.

Rules
- What is watched from now on is told as it is (a snapshot; keys that do not exist are told too), then its changes.
- A watch that resumes from a revision gets the changes since, or, if those have been compacted, a snapshot.
- Of several heads none says on its own that a key was never there: what a follower (or a leader that is none any more)
  lacks may have been written long ago. It tells of the key when there is something, or when it is sure that it leads.
- The state may be replaced by a later one: then each watcher gets the difference as a snapshot.
- A watcher that reads slowly is bounded: while more than `backlog_bytes_max` waits for it, it is told nothing, and
  later it gets what it has missed since, in portions, or a snapshot. It misses states in between, never the newest.
- A change is encoded once, and a change costs those who watch it, not all watchers.

Rejected: a queue for each watcher (unbounded, or with gaps); sending on every revision to everybody (most watch a few
actors out of thousands).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ftray.gcs.codec import encode_change, join_changes
from ftray.gcs.state.state import COMPACTED, GcsState
from ftray.gcs.state.tables import Change, Table
from ftray.wire.messages import GcsChanges
from ftray.wire.reactor import Link, Reactor

CATCH_UP_MS = 20
"""How often a watcher that was left behind is looked at."""

Item = tuple[Table, bytes]


class Watcher:
    """What one link watches, and how far it has been told."""

    __slots__ = ("behind", "keys", "link", "new_keys", "new_tables", "sent_revision", "tables", "unsure")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.tables: set[Table] = set()
        self.keys: set[Item] = set()
        self.new_tables: set[Table] = set()
        """Watched, but not told yet how they are; the same for `new_keys`."""
        self.new_keys: set[Item] = set()
        self.unsure: set[Item] = set()
        """Keys that are not there, as far as is known here; the watcher has not been told so."""
        self.sent_revision = 0
        self.behind = False

    def wants(self, change: Change) -> bool:
        return change.table in self.tables or (change.table, change.key) in self.keys


class WatchHub:
    """All watchers of one replica. Used under the reactor's lock."""

    __slots__ = (
        "_behind", "_by_key", "_by_table", "_one_of_several", "_reactor", "backlog_bytes_max", "follows", "snapshots",
        "tellings_following",
    )  # fmt: skip

    def __init__(self, reactor: Reactor, backlog_bytes_max: int, one_of_several: bool = False) -> None:
        self._reactor = reactor
        self._one_of_several = one_of_several
        self.backlog_bytes_max = backlog_bytes_max
        self.follows = False
        """This head does not lead."""
        self.snapshots = 0
        """How many were sent, for status and tests; the same for `tellings_following`."""
        self.tellings_following = 0
        """Messages to watchers while this head did not lead."""
        self._by_table: dict[Table, dict[Watcher, None]] = {table: {} for table in Table}
        self._by_key: dict[Item, dict[Watcher, None]] = {}
        self._behind: dict[Watcher, None] = {}

    # --- watching -----------------------------------------------------------------------------------------------------

    def add(
        self, state: GcsState, watcher: Watcher, tables: Sequence[Table], keys: Sequence[Item], since: int
    ) -> None:
        """Adds to what is watched: whole tables, and keys in others; `since` is -1, or how far it has been told."""
        concerned = {*tables, *(table for table, _ in keys)}
        missed = state.changes_since(since, concerned) if 0 <= since <= state.revision else COMPACTED
        self._index(watcher, tables, keys)
        if self._one_of_several and since < 0:
            watcher.unsure.update(keys)
        if missed is COMPACTED or watcher.behind:
            watcher.new_tables.update(tables)
            watcher.new_keys.update(keys)
            self._catch_up(state, watcher)
            return
        wanted, whole = set(keys), set(tables)
        told = [change for change in missed if change.table in whole or (change.table, change.key) in wanted]
        self._send(watcher, [encode_change(change) for change in told], state.revision)

    def tell_absent(self, state: GcsState, watcher: Watcher) -> None:
        """It is sure that the state has all that was acknowledged anywhere: what is not in it is not there."""
        watcher.new_keys |= watcher.unsure
        watcher.unsure.clear()
        if watcher.new_keys:
            self._catch_up(state, watcher)

    def reset(self, state: GcsState) -> None:
        """The state is another, later one: no changes lead to it."""
        watchers: dict[Watcher, None] = {}
        for some in (*self._by_table.values(), *self._by_key.values()):
            watchers.update(some)
        for watcher in watchers:
            self._leave_behind(watcher)
            self._catch_up(state, watcher)

    def _index(self, watcher: Watcher, tables: Iterable[Table], items: Iterable[Item]) -> None:
        for table in tables:
            watcher.tables.add(table)
            self._by_table[table][watcher] = None
        for item in items:
            watcher.keys.add(item)
            self._by_key.setdefault(item, {})[watcher] = None

    def drop(self, watcher: Watcher, items: Iterable[Item]) -> None:
        """The watcher need not be told of these keys any more."""
        for item in items:
            watcher.keys.discard(item)
            watcher.new_keys.discard(item)
            watcher.unsure.discard(item)
            self._unindex(watcher, item)

    def remove(self, watcher: Watcher) -> None:
        """The watcher's link is gone."""
        for table in watcher.tables:
            self._by_table[table].pop(watcher, None)
        for item in watcher.keys:
            self._unindex(watcher, item)
        watcher.tables, watcher.keys = set(), set()
        watcher.unsure.clear()
        self._behind.pop(watcher, None)

    def _unindex(self, watcher: Watcher, item: Item) -> None:
        watchers = self._by_key.get(item)
        if watchers is not None:
            watchers.pop(watcher, None)
            if not watchers:
                del self._by_key[item]

    # --- telling ------------------------------------------------------------------------------------------------------

    def publish(self, changes: Sequence[Change], revision: int) -> None:
        """The state has changed up to `revision`."""
        parts: dict[Watcher, list[bytes]] = {}
        for change in changes:
            by_key = self._by_key.get((change.table, change.key))
            by_table = self._by_table[change.table]
            if not by_key and not by_table:
                continue
            encoded = encode_change(change)
            for watcher in by_table:
                parts.setdefault(watcher, []).append(encoded)
            for watcher in by_key or ():
                if watcher.unsure:
                    watcher.unsure.discard((change.table, change.key))
                if watcher not in by_table:
                    parts.setdefault(watcher, []).append(encoded)
        for watcher, encoded_changes in parts.items():
            if watcher.behind:
                continue
            if len(watcher.link.out) > self.backlog_bytes_max:
                self._leave_behind(watcher)
            else:
                self._send(watcher, encoded_changes, revision)

    def _send(
        self, watcher: Watcher, encoded: list[bytes], revision: int, whole: Iterable[Table] = (), snapshot: bool = False
    ) -> None:
        watcher.sent_revision = revision
        self.tellings_following += self.follows
        watcher.link.send(GcsChanges(revision, snapshot), join_changes(encoded, whole))

    def _leave_behind(self, watcher: Watcher) -> None:
        watcher.behind = True
        self._behind[watcher] = None

    def catch_up(self, state: GcsState) -> None:
        """Tells those that were left behind what they missed, if they have read by now what was sent."""
        for watcher in list(self._behind):
            self._catch_up(state, watcher)

    @property
    def any_behind(self) -> bool:
        return bool(self._behind)

    def _catch_up(self, state: GcsState, watcher: Watcher) -> None:
        if len(watcher.link.out) > self.backlog_bytes_max:
            self._leave_behind(watcher)
            return
        if watcher.behind:
            watcher.behind = False
            self._behind.pop(watcher, None)
            missed = state.changes_since(watcher.sent_revision)
            if missed is COMPACTED:
                watcher.new_tables |= watcher.tables
                watcher.new_keys |= watcher.keys
            elif not self._send_missed(watcher, missed, state.revision):
                self._leave_behind(watcher)
                return
        if watcher.new_tables or watcher.new_keys:
            self._send_snapshot(state, watcher)

    def _send_missed(self, watcher: Watcher, missed: Sequence[Change], revision: int) -> bool:
        """Sends the newest change of each record, as much as may wait for the watcher. False if more is left."""
        newest = {(change.table, change.key): change for change in missed if watcher.wants(change)}
        told: list[bytes] = []
        size_bytes = 0
        reached = watcher.sent_revision
        for change in sorted(newest.values(), key=lambda change: change.revision):
            if size_bytes > self.backlog_bytes_max and change.revision > reached:
                self._send(watcher, told, reached)
                return False
            told.append(encode_change(change))
            size_bytes += len(told[-1])
            reached = change.revision
        self._send(watcher, told, revision)
        return True

    def _send_snapshot(self, state: GcsState, watcher: Watcher) -> None:
        self.snapshots += 1
        tables, watcher.new_tables = sorted(watcher.new_tables), set()
        keys, watcher.new_keys = sorted(watcher.new_keys), set()
        rows = state.rows_as_changes(tables)
        for table, key in keys:
            record = state.store.rows(table).get(key)
            if record is not None:
                watcher.unsure.discard((table, key))
            elif (table, key) in watcher.unsure:
                continue
            if table not in tables:
                rows.append(Change(state.revision, table, key, record))
        self._send(watcher, [encode_change(row) for row in rows], state.revision, tables, snapshot=True)
