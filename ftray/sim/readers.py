"""Simulated clients that read without a leader: what they are told, by whichever head, must never be older than what
they know.

Role: shell. Everything goes through the production `GcsClient`.

What a client knows of a key is the newest number that it has been told, by any way: its own acknowledged write, a
fresh read, a cached one (of the key, or of the whole table), a watch of the key. Each key has one writer, which counts
up; so a smaller number is the past. Nobody deletes keys, and clients ask only for those whose first write somebody has
seen acknowledged: that such a key is not there is wrong from any head, but in a table as a whole. Watches are added and
taken away all the time, so that many begin at a follower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ftray.gcs.client import Watch
from ftray.gcs.state import commands as c
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Change, KvRecord, Record, Result, Table, kv_key
from ftray.sim.clients import Client

SPACE = "seen"
WATCHED_MAX = 4


class ReaderClient(Client):
    """See the module."""

    def began(self) -> None:
        self.known: dict[bytes, int] = {}
        """By key of the table, the newest number that this client was told."""
        self.watched: dict[bytes, int | None] = {}
        """The same for what its watch has said, of the keys that are watched now."""
        self._mine = f"{self.who}".encode()
        self._written = 0
        self._writing = self._reading = False
        self._watch: Watch = self.gcs.watch((Table.KV,), (), self._on_change)
        self._pause()

    def step(self) -> None:
        """One of the things in the module. Only what any head answers is waited for."""
        what = self.rng.choice(("write", "cached", "cached", "cached", "all", "watch", "watch", "fresh"))
        keys = self.histories.read_keys
        if what == "write" or not keys:
            self._write()
        elif what == "watch":
            self._change_watch(self.rng.choice(keys))
        elif what == "fresh":
            self._read_fresh(self.rng.choice(keys))
        elif what == "all":
            self.gcs.read_all(Table.KV, self._told_all, on_error=self._refused, cached=True)
            return
        else:
            key, wait = self.rng.choice(keys), self.rng.random() < 0.3
            done = self._reader(key, "a cached read", self._pause)
            self.gcs.read(Table.KV, key, done, wait, self._refused, cached=True)
            return
        self._pause()

    # --- what it asks -------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        if self._writing:
            return
        self._writing = True
        self._written += 1
        number, key = self._written, kv_key(SPACE, self._mine)

        def told(result: Result) -> None:
            self._writing = False
            if result.ok:
                if number == 1:
                    self.histories.read_keys.append(key)
                self._learn(key, number, "its own write")

        self.gcs.command(c.KvPut(SPACE, self._mine, b"%d" % number), told)

    def _read_fresh(self, key: bytes) -> None:
        if not self._reading:
            self._reading = True

            def done() -> None:
                self._reading = False

            self.gcs.read(Table.KV, key, self._reader(key, "a fresh read", done), on_error=self._refused)

    def _change_watch(self, key: bytes) -> None:
        if key in self.watched or len(self.watched) >= WATCHED_MAX:
            key = self.rng.choice(list(self.watched))
            self.gcs.remove_watch_key(self._watch, key)
            del self.watched[key]
        else:
            self.watched[key] = None
            self.gcs.add_watch_key(self._watch, key)

    # --- what it is told ----------------------------------------------------------------------------------------------

    def _reader(self, key: bytes, how: str, then: Callable[[], None]) -> Callable[[Record | None], None]:
        def told(record: Record | None) -> None:
            if how != "a fresh read" and not self.gcs.connected:
                self.histories.reads_following += 1
            self._learn(key, _number(record), how)
            then()

        return told

    def _told_all(self, rows: dict[bytes, Record]) -> None:
        if not self.gcs.connected:
            self.histories.reads_following += 1
        for key in sorted(self.known.keys() | {key for key, row in rows.items() if _number(row) is not None}):
            number = _number(rows.get(key))
            if number is not None or key in self.known:
                self._learn(key, number, "a cached read of the whole table")
        self._pause()

    def _on_change(self, change: Change) -> None:
        if not self.gcs.connected:
            self.histories.tellings_following += 1
        number = _number(change.record)
        if change.key in self.watched:
            self.watched[change.key] = number
        self._learn(change.key, number, "a watch")

    def _learn(self, key: bytes, number: int | None, how: str) -> None:
        before = self.known.get(key, 0)
        if number is None or number < before:
            self.histories.problems.append(
                f"{self.who}: {how} at {self.gcs.served_by or 'nobody'} says that {key!r} is "
                f"{'not there' if number is None else number}, when it was told of {before} before"
            )
            return
        self.known[key] = number

    def missed(self, state: GcsState) -> Sequence[object]:
        rows = state.store.rows(Table.KV)
        return [key for key, number in self.watched.items() if number != _number(rows.get(key))]


def _number(record: Record | None) -> int | None:
    return int(record.value) if isinstance(record, KvRecord) and record.namespace == SPACE else None
