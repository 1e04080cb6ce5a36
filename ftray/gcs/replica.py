"""A replica of the GCS state: takes commands, makes them durable, applies them, answers.

Role: shell. `Replica` is what server, managers and the node's own code see; `SingleReplica` is the one for a cluster
with one head. A replica that is one of several stands behind the same interface.

What the interface promises
- `propose` takes a command and a callback; `flush` carries out what has been proposed. A result is given only when the
  command is durable (on a majority of the replicas, if there are several), and survives any crash from then on.
- Results and changes come in the order in which commands were applied. Changes are published before the results of the
  batch are given, so whoever has a result finds its effect in every watch fed from here.
- With one replica `flush` gives all results before it returns. With several, results come in a later `flush`, or, after
  a change of leader, not at all: then `reply` is called with the code `not_leader`, which says that the outcome is not
  known. The client repeats the command with the same sequence number at the leader, and it takes effect once.
- `confirm` is for reads that must be fresh: it calls back from a `flush`, after the results of what came before.
- Callbacks may propose, and must not flush. An exception in one is logged and hurts no other.
- `state` is for reading. At the leader it has every command that has been answered.

Rejected: applying before writing (after a failed write the state would be ahead of the disk, and the replica would have
to stop, where a full disk need only refuse); one fsync for each command.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from ftray.gcs.compaction import Compaction, Compactor
from ftray.gcs.journal import Journal
from ftray.gcs.journal_format import ENTRY, SNAPSHOT, Record
from ftray.gcs.state.commands import AnyCommand, decode_command
from ftray.gcs.state.errors import (
    CommandError,
    CommandVersionError,
    GcsError,
    JournalCorruptError,
    JournalVersionError,
    JournalWriteError,
    SnapshotError,
    SnapshotVersionError,
    UnknownCommandError,
)
from ftray.gcs.state.sessions import checksum_of
from ftray.gcs.state.state import VALUE_BYTES_MAX, GcsState, admit
from ftray.gcs.state.tables import Change, Code, Result

log = logging.getLogger(__name__)

COMPACT_BYTES = 64 << 20
"""A journal that has grown by so much, and to twice its last snapshot, is compacted."""

JOURNAL_NAME = "gcs.journal"
NEVER_MS = float("inf")

ChangeCallback = Callable[[Sequence[Change]], None]
ReplyCallback = Callable[[Result], None]
Confirmed = Callable[[bool], None]
T = TypeVar("T")


class Request(NamedTuple):
    """A command as a client sent it. `client_id` is empty for commands without a session (the managers')."""

    client_id: bytes
    sequence: int
    command: bytes


class ReplicaClosedError(GcsError):
    """The replica is closed, or has stopped because its disk failed."""


class Replica(Protocol):
    """See the module's docstring for what is promised."""

    @property
    def state(self) -> GcsState:
        """The state, to read."""
        ...

    @property
    def is_leader(self) -> bool:
        """Whether commands are taken here."""
        ...

    @property
    def leader_hint(self) -> str:
        """The endpoint of the leader as far as is known here, or ''."""
        ...

    def propose(self, request: Request, reply: ReplyCallback) -> None:
        """Queues a command; `reply` gets its result from a `flush`. Raises ReplicaClosedError."""
        ...

    def flush(self) -> None:
        """Carries out what has been proposed. Call it at the end of each batch of messages."""
        ...

    def next_wake_ms(self) -> float:
        """When `flush` is to be called at the latest, by the clock of the shell; infinity if nothing is due."""
        ...

    def confirm(self, confirmed: Confirmed) -> None:
        """Calls back from a `flush` with True once `state` has everything that was acknowledged anywhere before this
        call, or with False if this replica does not lead. Raises ReplicaClosedError."""
        ...

    def on_change(self, callback: ChangeCallback) -> Callable[[], None]:
        """Calls back with each batch of changes, from now on. Returns a function that ends it."""
        ...

    def on_reset(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back when `state` is another object, that no changes have led to. Returns a function that ends it."""
        ...

    def close(self) -> None:
        """Stops the replica. May be repeated."""
        ...


class _Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a journal entry holds."""

    client_id: bytes
    sequence: int
    command: bytes


_encode_entry = msgspec.msgpack.Encoder().encode
_decode_entry = msgspec.msgpack.Decoder(_Entry).decode


class SingleReplica:
    """The only replica of its cluster: its own leader, durable on one disk.

    Not thread-safe: one thread, which the disk may block for as long as an fsync takes.
    """

    __slots__ = (
        "endpoint",
        "note",
        "state",
        "value_bytes_max",
        "_busy",
        "_callbacks",
        "_compactor",
        "_index",
        "_journal",
        "_queue",
        "_reads",
    )

    def __init__(
        self,
        directory: str | os.PathLike[str],
        cluster_id: bytes,
        *,
        fsync: bool = True,
        endpoint: str = "",
        value_bytes_max: int = VALUE_BYTES_MAX,
        compact_bytes: int = COMPACT_BYTES,
    ) -> None:
        """Opens the replica in `directory`, with every write that was acknowledged there.

        `fsync=False` is for sessions whose state need not outlive the machine. `endpoint` is what `leader_hint` says.

        Raises the errors of `Journal.open` and `Journal.replay`: another cluster's directory, one that is in use, one
        of a newer version, or a damaged one.
        """
        self.endpoint = endpoint
        self.value_bytes_max = value_bytes_max
        self._queue: list[tuple[Request, ReplyCallback]] = []
        self._callbacks: list[ChangeCallback] = []
        self._reads: list[Confirmed] = []
        self._busy = False
        self._index = 0
        self.state = GcsState(cluster_id)
        self._journal: Journal | None = Journal.open(Path(directory) / JOURNAL_NAME, cluster_id, fsync=fsync)
        try:
            snapshot_bytes = self._replay(self._journal)
        except BaseException:
            self._journal.close()
            raise
        self.note = self._journal.note
        """What was cut off at the start, for the log; empty if nothing."""
        journal = self._journal
        self._compactor = Compactor(lambda: journal.size_bytes, compact_bytes, snapshot_bytes, self._begin_compaction)

    @property
    def is_leader(self) -> bool:
        return self._journal is not None

    @property
    def leader_hint(self) -> str:
        return self.endpoint

    @property
    def replica_id(self) -> bytes:
        """Made with the disk, 16 bytes."""
        return self._open_journal().replica_id

    # --- commands ----------------------------------------------------------------------------------------------------

    def propose(self, request: Request, reply: ReplyCallback) -> None:
        """Queues a command; `reply` gets its result from the next `flush`. Raises ReplicaClosedError."""
        self._open_journal()
        self._queue.append((request, reply))

    def flush(self) -> None:
        """Carries out what has been proposed, and what callbacks propose meanwhile, and gives the results.

        If the disk refuses a batch (it is full, say), its commands are answered `unavailable`. Raises
        JournalFailedError if the disk failed: the replica is closed, the commands are answered `not_leader`.
        """
        if self._busy:
            raise RuntimeError("flush inside a callback of the replica: propose is enough, its turn comes")
        if not self._queue and self._journal is not None:
            self._journal.seal()
        if not self._queue and self._compactor.running:
            self._compact_on()
        while self._queue:
            batch, self._queue = self._queue, []
            try:
                results = self.submit_many([request for request, _ in batch])
            except JournalWriteError as error:
                log.error("%s", error)
                self._answer_all(batch, Code.UNAVAILABLE, f"the command was not carried out: {error}")
                continue
            except BaseException as error:
                self._answer_all(batch, Code.NOT_LEADER, f"this head has stopped: {error}")
                raise
            for (_, reply), result in zip(batch, results):
                self._call(reply, result)
        if self._reads:
            self._end_reads(True)

    def next_wake_ms(self) -> float:
        """At once while the journal is being compacted; otherwise never: all is done in the `flush` after it was asked
        for."""
        return 0.0 if self._compactor.running else NEVER_MS

    def confirm(self, confirmed: Confirmed) -> None:
        """Calls back with True from the next `flush`, or with False from `close`. Raises ReplicaClosedError."""
        self._open_journal()
        self._reads.append(confirmed)

    def _end_reads(self, fresh: bool) -> None:
        reads, self._reads = self._reads, []
        for confirmed in reads:
            self._call(confirmed, fresh)

    def _answer_all(self, batch: Sequence[tuple[Request, ReplyCallback]], code: Code, message: str) -> None:
        for _, reply in batch:
            self._call(reply, Result(code, message, self.state.revision))

    def submit(self, client_id: bytes, sequence: int, command: bytes) -> Result:
        """Carries out one command at once. See `submit_many`."""
        return self.submit_many([Request(client_id, sequence, command)])[0]

    def submit_many(self, requests: Sequence[Request]) -> list[Result]:
        """Carries out commands with one fsync for all, publishes their changes, and returns the results in order.

        Raises JournalWriteError (the disk is full, say): nothing has been applied, and it may be tried again. Raises
        JournalFailedError (the disk failed; the replica is closed), ReplicaClosedError, and RuntimeError inside a
        callback, where `propose` is to be used.
        """
        journal = self._open_journal()
        if self._busy:
            raise RuntimeError("submit inside a callback of the replica: use propose")
        results: list[Result | None] = [None] * len(requests)
        commands: list[tuple[int, AnyCommand]] = []
        records: list[Record] = []
        for position, request in enumerate(requests):
            checked = self._check(request)
            if isinstance(checked, Result):
                results[position] = checked
                continue
            commands.append((position, checked))
            payload = _encode_entry(_Entry(request.client_id, request.sequence, request.command))
            records.append(Record(ENTRY, 0, self._index + len(records) + 1, payload))
        if records:
            try:
                journal.append(records)
                journal.sync()
                self._index += len(records)
                for position, command in commands:
                    request = requests[position]
                    checksum = checksum_of(request.command)
                    results[position] = self.state.apply(request.client_id, request.sequence, command, checksum)
            except JournalWriteError:
                self._compactor.put_off()  # the room that it takes is what is missing, perhaps
                raise
            except BaseException:
                self.close()  # What is in the journal and what is in memory may differ now.
                raise
            self._publish()
            self._compact_on()
        return [result for result in results if result is not None]

    def _check(self, request: Request) -> AnyCommand | Result:
        """The command, or the answer to one that is not to be written."""
        state = self.state
        known = state.recall(request.client_id, request.sequence, checksum_of(request.command))
        if known is not None:
            return known
        try:
            command = decode_command(request.command)
        except CommandError as error:
            return Result(Code.INVALID, str(error), state.revision)
        refused = admit(command, self.value_bytes_max, len(request.command))
        return command if refused is None else Result(Code.TOO_LARGE, refused, state.revision)

    # --- changes -----------------------------------------------------------------------------------------------------

    def on_change(self, callback: ChangeCallback) -> Callable[[], None]:
        """Calls back with each batch of changes, from now on. Returns a function that ends it."""
        self._callbacks.append(callback)

        def end() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return end

    def on_reset(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Never calls back: the state of the only replica grows by changes alone."""
        return lambda: None

    def _publish(self) -> None:
        changes = self.state.take_changes()
        if changes:
            for callback in tuple(self._callbacks):
                self._call(callback, changes)

    def _call(self, callback: Callable[[T], None], argument: T) -> None:
        self._busy = True
        try:
            callback(argument)
        except Exception:
            log.exception("a callback of the GCS replica failed")
        finally:
            self._busy = False

    # --- the journal -------------------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Replaces the journal by a snapshot of the state, before it returns: for tools, since nothing else is done
        meanwhile. Raises JournalWriteError (the old one goes on), JournalFailedError, ReplicaClosedError."""
        self._open_journal()
        try:
            self._compactor.at_once()
        except JournalWriteError:
            raise
        except BaseException:
            self.close()
            raise

    def _compact_on(self) -> None:
        """Begins to compact the journal if it is long, or goes on with that by one step."""
        try:
            self._compactor.turn()
        except BaseException:
            self.close()
            raise

    def _begin_compaction(self, wait: bool) -> Compaction:
        return self._open_journal().begin_compaction(self.state.picture(), 0, self._index, wait=wait)

    def close(self) -> None:
        """Closes the journal. What has been proposed and not flushed is answered `not_leader`. May be repeated."""
        journal, self._journal = self._journal, None
        if journal is not None:
            self._compactor.abort()
            journal.close()
        batch, self._queue = self._queue, []
        self._answer_all(batch, Code.NOT_LEADER, "this head is stopping")
        self._end_reads(False)

    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise ReplicaClosedError(
                "the GCS replica is closed: its node is stopping, or its disk failed (see the log)"
            )
        return self._journal

    def _replay(self, journal: Journal) -> int:
        """Builds the state from the journal. Returns the size of the snapshot in it."""
        snapshot_bytes = 0
        for record in journal.replay():
            try:
                if record.kind == SNAPSHOT:
                    self.state = GcsState.restore(record.payload, journal.cluster_id)
                    self._index, snapshot_bytes = record.index, len(record.payload)
                elif record.kind == ENTRY:
                    self._apply_entry(record)
            except (SnapshotVersionError, CommandVersionError, UnknownCommandError) as error:
                raise JournalVersionError(f"journal {journal.path} was written by a newer ftray: {error}") from error
            except (SnapshotError, CommandError, msgspec.DecodeError) as error:
                # The checksum was right, so this was written wrongly; what follows depends on it.
                raise JournalCorruptError(str(journal.path), 0, f"entry {record.index}: {error}") from error
        self.state.take_changes()
        return snapshot_bytes

    def _apply_entry(self, record: Record) -> None:
        if record.index != self._index + 1:
            raise CommandError(f"entry {record.index} follows entry {self._index}")
        entry = _decode_entry(record.payload)
        command = decode_command(entry.command)
        self.state.apply(entry.client_id, entry.sequence, command, checksum_of(entry.command))
        self._index = record.index
