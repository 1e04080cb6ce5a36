"""What a replica saves of its state: compactions of its journal, and snapshots for those who lag behind.

Role: logic; a part of `RaftReplica`. The journal does the writing, `Compactor` says when.

Rules
- A step of a compaction is taken in a turn, after all that the turn had to tell has left, and not before
  `STEP_PAUSE_MS` have passed: half of the time at most goes into it.
- While a snapshot is being sent the journal may grow to twice its limit before it is compacted, so that the receiver
  finds the entries after it in the log.
- A follower that needs a snapshot gets the one in the journal. If that can't be sent, a compaction begins, and the
  follower is served after it: it goes on asking.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ftray.gcs.compaction import Compacting, Compactor, Source
from ftray.gcs.raft.elections import NEVER_MS
from ftray.gcs.raft.errors import UnreadableSnapshotError
from ftray.gcs.raft.log import JournalLike, RaftLog, Snapshot, decode_snapshot_body
from ftray.gcs.raft.snapshots import Made, Sender
from ftray.gcs.state.errors import (
    ClusterMismatchError,
    JournalCorruptError,
    JournalVersionError,
    SnapshotError,
    SnapshotVersionError,
)
from ftray.gcs.state.state import GcsState

STEP_PAUSE_MS = 2.0
AGAIN_MS = 1_000.0


class Saving:
    """See the module."""

    def __init__(
        self,
        raft_log: RaftLog,
        compact_bytes: int,
        snapshot_bytes: int,
        picture: Callable[[], tuple[int, Source] | None],
        send: Callable[[bytes, Made, int], object],
    ) -> None:
        """`picture` gives the last applied entry and the state after it; None before the replica takes part."""
        self._log = raft_log
        self._picture = picture
        self._step_ms = -NEVER_MS
        """When the next step may be taken."""
        self._again_ms = -NEVER_MS
        """When a compaction that somebody waits for, and that failed, is tried again."""
        self._wanted = False
        """Somebody waits for a snapshot, though the journal may have nothing to gain by one."""
        self._index = 0
        self.compactor = Compactor(
            lambda: raft_log.journal.size_bytes, compact_bytes, snapshot_bytes, self._begin, self._done
        )
        self.sender = Sender(self._open, send, raft_log.journal.forget_snapshot)

    @property
    def next_wake_ms(self) -> float:
        """When the next step is due."""
        return self._step_ms if self.compactor.running else NEVER_MS

    @property
    def busy(self) -> bool:
        """Whether the next turn has, or may soon have, something to do here."""
        return self.compactor.running or self._wanted

    def turn(self, now_ms: float) -> None:
        """Takes a step, if one is due. Raises JournalFailedError."""
        compactor = self.compactor
        if now_ms < self._step_ms:
            return
        if self._wanted and now_ms >= self._again_ms:
            self._again_ms = now_ms + AGAIN_MS
            compactor.hurry()
        compactor.turn(2 if self.sender.busy else 1)
        if compactor.running:
            self._step_ms = now_ms + STEP_PAUSE_MS

    def put_off(self) -> None:
        """The disk is full."""
        self.compactor.put_off()

    def give_up(self) -> None:
        """The state is about to be replaced."""
        self.compactor.abort()

    def end(self) -> None:
        """The replica is closed."""
        self.sender.drop_all()
        self.compactor.abort()

    def _begin(self, wait: bool) -> Compacting | None:
        found = self._picture()
        if found is None or found[0] < self._log.snapshot_index + (not self._wanted):
            return None
        self._index = found[0]
        return self._log.begin_compaction(found[0], found[1], wait)

    def _done(self) -> None:
        self._wanted = False
        self._log.compacted(self._index)

    def _open(self) -> Made | None:
        try:
            made = self._log.journal.open_snapshot()
        except OSError:
            made = None
        if made is None:
            self._wanted = True
        return made


def restore(journal: JournalLike, data: bytes) -> GcsState:
    """The state in a snapshot that was read from this journal.

    Raises JournalVersionError, JournalCorruptError.
    """
    where = str(getattr(journal, "path", "the journal"))
    try:
        return GcsState.restore(data, journal.cluster_id)
    except SnapshotVersionError as error:
        raise JournalVersionError(f"journal {where}: its snapshot is of a newer ftray: {error}") from error
    except SnapshotError as error:
        raise JournalCorruptError(where, 0, f"its snapshot: {error}") from error


def sent(data: bytes, cluster_id: bytes) -> tuple[Snapshot, GcsState]:
    """What is in a snapshot that the leader has sent, undamaged. Raises UnreadableSnapshotError."""
    try:
        body = decode_snapshot_body(data)
        return body, GcsState.restore(body.state, cluster_id)
    except (SnapshotError, ClusterMismatchError, msgspec.DecodeError, ValueError) as error:
        raise UnreadableSnapshotError(
            f"the state that the leader has sent can't be read here: {error}. What this head has on its disk is as it "
            "was: start it with the version of ftray that the leader runs"
        ) from error
