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
