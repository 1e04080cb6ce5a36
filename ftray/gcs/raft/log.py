"""The log as the library sees it, kept in ftray's journal.

Role: shell around a journal. In memory a list of entries; what changes is collected, and `sync` writes it as one frame.

What is in the journal
- `ENTRY`: an entry. One whose index is not after the last one replaces that entry and all after it.
- `META`: the term, the vote, the commit index, and the first table of members. Written with each batch; the last one
  counts.
- `SNAPSHOT`: state and table of members after an entry; first in its file.

Rules
- An entry that is here already (same index, same term) is left alone. Only one that contradicts is cut off, with all
  after it. The library cuts off whatever follows the entry that a message refers to, so that a late or repeated
  message takes back entries that were acknowledged.
- What is committed is never cut off: `DivergedError` instead.
- A batch that could not be written stays, and is written by the next `sync`.

Rejected: a record for each truncation (the entry that takes the place says it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, overload

import msgspec

from ftray.gcs.compaction import Compacting, Source
from ftray.gcs.journal_format import ENTRY, META, SNAPSHOT, Record
from ftray.gcs.raft.errors import DivergedError, NewerCommandError
from ftray.gcs.raft.membership import Table, decode_table
from ftray.gcs.raft.snapshots import Made
from ftray.gcs.state.errors import JournalCorruptError, JournalVersionError

REGULAR, NO_OP, MEMBERSHIP = 0, 1, 2
"""The first byte of an entry's command; the numbers are the library's."""

KEEP_ENTRIES = 4096
"""Entries before a snapshot that stay in memory, so that a follower that is a little behind needs no snapshot..."""
KEEP_BYTES = 8 << 20
"""...but no more of them than this."""

_NO_OP_COMMAND = bytes([NO_OP])

Entry = tuple[bytes, int, int]
"""Command, index, term: the library's order."""


class JournalLike(Protocol):
    """What is used of `ftray.gcs.journal.Journal`; a simulated disk offers the same."""

    replica_id: bytes
    cluster_id: bytes

    @property
    def size_bytes(self) -> int: ...
    def replay(self) -> Iterator[Record]: ...
    def append(self, records: Iterable[Record]) -> None: ...
    def sync(self) -> None: ...
    def seal(self) -> None: ...
    def compact(self, snapshot: bytes, term: int, index: int, keep: Iterable[Record] = ()) -> None: ...
    def begin_compaction(
        self, source: Source, term: int, index: int, keep: Iterable[Record] = (), *, wait: bool = False
    ) -> Compacting: ...
    def open_snapshot(self) -> Made | None: ...
    def forget_snapshot(self) -> None: ...
    def close(self) -> None: ...


class _Meta(msgspec.Struct, array_like=True, frozen=True):
    vote: str
    members: Table
    members_index: int
    active: bool


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """What a snapshot holds beside the state."""

    members: Table
    members_index: int
    state: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode_meta = msgspec.msgpack.Decoder(_Meta).decode
decode_snapshot_body = msgspec.msgpack.Decoder(Snapshot).decode
"""Raises msgspec.DecodeError."""


_BIN32 = b"\xc6"


class _SnapshotSource:
    """A `Snapshot` as bytes, whose state is read from a source. The state's length always has four bytes."""

    def __init__(self, members: Table, members_index: int, state: Source) -> None:
        self._begin = b"\x93" + _encode(members) + _encode(members_index) + _BIN32
        self._state = state
        self.head_bytes = len(self._begin) + 4 + state.head_bytes
        self.read = state.read

    def head(self, body_bytes: int, body_crc: int) -> bytes:
        length = self._state.head_bytes + body_bytes
        return self._begin + length.to_bytes(4, "big") + self._state.head(body_bytes, body_crc)


class RaftLog:
    """The library's journal. Read with `replay` before anything else."""

    def __init__(self, journal: JournalLike) -> None:
        self.journal = journal
        self.term = 0
        self.vote: str | None = None
        self.commit = 1
        self.first_members: Table = ()
        """The table that the cluster was formed with, or that this head joined with; empty before."""
        self.first_index = 0
        """The entry that the first table stands in, for a head that joined; it is in the log of its peers."""
        self.active = False
        """The first table is agreed upon."""
        self.snapshot_index = 0
        """The entry after which the snapshot in the journal was made; 0 without one."""
        self._entries: list[Entry] = []
        self._tables: list[tuple[int, Table]] = []
        """Tables in the log, and the one in the snapshot, with their entries."""
        self._pending: list[Record] = []
        self._meta_due = False

    # --- reading back -------------------------------------------------------------------------------------------------

    def replay(self) -> bytes | None:
        """Reads the journal. Returns the state in its snapshot, if there is one.

        Raises JournalCorruptError (records that don't follow from each other), JournalVersionError, and what
        `Journal.replay` raises.
        """
        state: bytes | None = None
        for record in self.journal.replay():
            try:
                if record.kind == SNAPSHOT:
                    snapshot = decode_snapshot_body(record.payload)
                    state = snapshot.state
                    self._set_anchor(snapshot, record.index, record.term)
                elif record.kind == ENTRY:
                    self._replay_entry(record)
                elif record.kind == META:
                    meta = _decode_meta(record.payload)
                    self.term, self.commit, self.vote = record.term, record.index, meta.vote or None
                    self.first_members, self.first_index = meta.members, meta.members_index
                    self.active = meta.active
                else:
                    raise JournalVersionError(
                        f"the journal of this head holds records of kind {record.kind}, which this ftray does not "
                        "know: run the version that wrote it, or a later one"
                    )
            except (msgspec.DecodeError, ValueError) as error:
                raise self._corrupt(f"record {record.index}: {error}") from error
        if self._entries:
            self.commit = max(self.snapshot_index, min(self.commit, self._entries[-1][1]), 1)
        return state

    def _replay_entry(self, record: Record) -> None:
        if not record.payload:
            raise ValueError("an entry without a command")
        if not self._entries:
            if record.index != 1:
                raise ValueError("the log begins in the middle")
        else:
            first, last = self._entries[0][1], self._entries[-1][1]
            if not first < record.index <= last + 1:
                raise ValueError(f"it follows entry {last} of a log that begins with {first}")
            self._cut_after(record.index - 1)
        self._push((record.payload, record.index, record.term))

    def _corrupt(self, what: str) -> JournalCorruptError:
        return JournalCorruptError(str(getattr(self.journal, "path", "")), 0, what)

    # --- what the library calls ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, item: int) -> Entry: ...
    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...
    def __getitem__(self, item: int | slice) -> Entry | list[Entry]:
        return self._entries[item]

    def add(self, command: bytes, index: int, term: int) -> None:
        """Takes an entry, unless it is here already."""
        entries = self._entries
        if entries:
            first, last = entries[0][1], entries[-1][1]
            if index <= last:
                if index < first or entries[index - first][2] == term:
                    return
                if index <= self.commit:
                    raise DivergedError(
                        f"entry {index} was committed here in term {entries[index - first][2]} and would be replaced "
                        f"by one of term {term}: the state of this head can't be trusted. Replace it (ftray heads "
                        "replace); it is then filled from the others"
                    )
                self._cut_after(index - 1)
            elif index != last + 1:
                raise DivergedError(f"entry {index} was given to a log that ends with {last}: please report it")
        try:
            self._push((command, index, term))
        except (msgspec.DecodeError, ValueError) as error:
            raise NewerCommandError(
                f"entry {index}, a table of heads, can't be read ({error}): it was written by a head with a newer "
                "ftray. Start this head with the same version"
            ) from error
        self._pending.append(Record(ENTRY, term, index, command))

    def setCurrentTerm(self, term: int, voted_for: str | None) -> None:
        if term != self.term or voted_for != self.vote:
            self.term, self.vote, self._meta_due = term, voted_for, True

    def getCurrentTerm(self) -> int:
        return self.term

    def getVotedForNodeId(self) -> str | None:
        return self.vote

    def setRaftCommitIndex(self, index: int) -> None:
        self.commit = index  # written with the next batch: what it says can be learnt again

    def getRaftCommitIndex(self) -> int:
        return self.commit

    def onOneSecondTimer(self) -> None:
        """Nothing: what must be durable is synced with each batch."""

    def _destroy(self) -> None:
        """Nothing: the journal is the replica's."""

    # --- tables of members --------------------------------------------------------------------------------------------

    @property
    def members(self) -> Table:
        """The table in force."""
        return self._tables[-1][1] if self._knows_later else self.first_members

    @property
    def members_index(self) -> int:
        return self._tables[-1][0] if self._knows_later else self.first_index

    @property
    def _knows_later(self) -> bool:
        """Whether the log has a table that counts. A head that was added begins with the table in which it stands, and
        then gets the log from its beginning, with all former tables: they are over, and it is in none of them."""
        return bool(self._tables) and self._tables[-1][0] >= self.first_index

    def members_at(self, index: int) -> tuple[Table, int]:
        """The table after entry `index`, and its entry."""
        for position, members in reversed(self._tables):
            if position <= index:
                return members, position
        return self.first_members, self.first_index

    def set_first_members(self, members: Table, index: int, active: bool) -> None:
        self.first_members, self.first_index, self.active, self._meta_due = members, index, active, True

    # --- writing ------------------------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether something waits for `sync`."""
        return self._meta_due or bool(self._pending)

    def sync(self) -> None:
        """Makes everything durable. Raises JournalWriteError (try again), JournalFailedError, JournalClosedError."""
        if self.dirty:
            self.journal.append([*self._pending, self._meta()])
            self.journal.sync()
            self._pending.clear()
            self._meta_due = False
        else:
            self.journal.seal()

    def begin_compaction(self, index: int, state: Source, wait: bool = False) -> Compacting:
        """Begins to replace what is before entry `index` by the state after it. When that has been done: `compacted`.

        Raises what `Journal.begin_compaction` and `sync` raise.
        """
        self.sync()
        first = self._entries[0][1]
        term = self._entries[index - first][2]
        members, members_index = self.members_at(index)
        later = [Record(ENTRY, each[2], each[1], each[0]) for each in self._entries[index - first + 1 :]]
        source = _SnapshotSource(members, members_index, state)
        return self.journal.begin_compaction(source, term, index, [*later, self._meta()], wait=wait)

    def compacted(self, index: int) -> None:
        """The journal begins with the state after entry `index` now: entries before it need not be in memory."""
        self.snapshot_index = index
        self._forget_before(index)

    def install(self, body: Snapshot, data: bytes, index: int, term: int) -> None:
        """Replaces everything by a snapshot that a peer sent. Raises DivergedError, and what `compact` raises."""
        if index <= self.commit:  # the entry is here, and another one
            raise DivergedError(
                f"a snapshot after entry {index} of term {term} contradicts what was committed here: the state of this "
                "head can't be trusted. Replace it (ftray heads replace); it is then filled from the others"
            )
        self.sync()
        self.journal.compact(data, term, index, [self._meta(index)])
        self._set_anchor(body, index, term)  # not before: without room for it, what is here is not committed by it

    def has(self, index: int, term: int) -> bool:
        """Whether this entry is in the log, or was before its snapshot."""
        first = self._entries[0][1]
        if index < first:
            return True
        return index <= self._entries[-1][1] and self._entries[index - first][2] == term

    def first_of_term(self, index: int) -> int:
        """The first entry with the term of entry `index`, not before what is committed."""
        first = self._entries[0][1]
        term, floor = self._entries[index - first][2], max(first, self.commit) + 1
        while index > floor and self._entries[index - 1 - first][2] == term:
            index -= 1
        return index

    def _meta(self, commit: int = 0) -> Record:
        meta = _Meta(self.vote or "", self.first_members, self.first_index, self.active)
        return Record(META, self.term, commit or self.commit, _encode(meta))

    def _set_anchor(self, snapshot: Snapshot, index: int, term: int) -> None:
        self._entries = [(_NO_OP_COMMAND, index, term)]
        self._tables = [(snapshot.members_index, snapshot.members)]
        self.snapshot_index = index
        self.commit = max(self.commit, index)

    def _push(self, entry: Entry) -> None:
        self._entries.append(entry)
        if entry[0][0] == MEMBERSHIP:
            self._tables.append((entry[1], decode_table(memoryview(entry[0])[1:])))

    def _cut_after(self, index: int) -> None:
        del self._entries[index - self._entries[0][1] + 1 :]
        while self._tables and self._tables[-1][0] > index:
            self._tables.pop()

    def _forget_before(self, index: int) -> None:
        """Frees memory: of the entries before `index` only the latest stay."""
        first = self._entries[0][1]
        start = index - first
        size = 0
        while start > 0 and index - first - start < KEEP_ENTRIES:
            size += len(self._entries[start - 1][0])
            if size > KEEP_BYTES:
                break
            start -= 1
        del self._entries[:start]
        floor = self._entries[0][1]
        older = [each for each in self._tables if each[0] <= floor]
        self._tables = older[-1:] + [each for each in self._tables if each[0] > floor]


