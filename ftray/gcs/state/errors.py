"""Errors of the GCS that are raised, as opposed to results of commands, which are values.

Role: leaf of the room. A command that the state machine refuses is an answer (`tables.Result`); an error here means
that bytes could not be understood or must not be trusted.
"""

from __future__ import annotations

from ftray.exceptions import FtrayError


class GcsError(FtrayError):
    """Base of the errors of the global control service."""


class CommandError(GcsError):
    """The bytes are not a command."""


class UnknownCommandError(CommandError):
    """The command's type is not known here: the sender is newer than this process, or the bytes are foreign."""


class CommandVersionError(CommandError):
    """The command was written in a version of the format that this process does not speak."""


class SnapshotError(GcsError):
    """A snapshot of the GCS state can't be used."""


class SnapshotCorruptError(SnapshotError):
    """The snapshot's checksum or shape is wrong."""


class SnapshotVersionError(SnapshotError):
    """The snapshot was written by a newer version."""


class ClusterMismatchError(GcsError):
    """The bytes belong to another cluster."""


class JournalError(GcsError):
    """The journal of a GCS replica can't be used."""


class JournalCorruptError(JournalError):
    """Records that were acknowledged are damaged."""

    def __init__(self, path: str = "", offset: int = 0, what: str = "") -> None:
        super().__init__(
            f"the journal {path} is damaged at byte {offset} ({what}). Its records can't be trusted from there on. If "
            "the cluster has other heads, replace this one, and it is filled from them (ftray heads replace); "
            "otherwise put back a copy of the file from a backup, or move the file away to start with an empty cluster"
        )
        self.path = path
        self.offset = offset


class JournalVersionError(JournalError):
    """The journal was written by a newer version of ftray."""


class JournalClusterError(JournalError, ClusterMismatchError):
    """The journal belongs to another cluster."""


class JournalIdentityError(JournalError):
    """The journal belongs to another replica of the cluster."""


class JournalLockedError(JournalError):
    """Another process has the journal open."""


class JournalOpenError(JournalError):
    """The operating system does not let the journal be opened or made: a matter of permissions, disks or paths."""


class JournalWriteError(JournalError):
    """The journal could not be written. Nothing of the batch took effect; it may be tried again."""


class JournalFailedError(JournalError):
    """The disk failed while the journal was made durable: what is on it is not known. The replica must stop."""


class JournalClosedError(JournalError):
    """The journal is closed, or has not been replayed yet."""
