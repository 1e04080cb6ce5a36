"""Why a replica of several refuses to start, or stops.

Role: leaf of the room. Each message says what is wrong, with the values that disagree, and what to do about it.
"""

from __future__ import annotations

from ftray.gcs.state.errors import GcsError


class RaftError(GcsError):
    """A replica can't take part in its cluster."""


class MembershipMismatchError(RaftError):
    """The heads that this replica was started with are not those that it knows."""


class ReplicaRefusedError(RaftError):
    """The peers don't take this replica for a member: its disk is another one, or was emptied."""


class ReplicaRemovedError(RaftError):
    """This replica was removed from the cluster, so it stops."""


class DivergedError(RaftError):
    """An entry that was committed here would have been replaced: the state here can't be trusted."""


class NewerCommandError(RaftError):
    """A committed command can't be read here: it was written by a newer version of ftray."""


class UnreadableSnapshotError(RaftError):
    """The leader has sent a snapshot that can't be read here: it was written by another version of ftray."""


class LibraryMovedError(RaftError):
    """The installed pysyncobj is not one that this code knows."""
