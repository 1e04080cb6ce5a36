"""Sessions: the last result of each client, so that a retry takes effect once.

Role: pure. A client draws its id anew when its process starts (workers and drivers: their worker id), numbers its
commands upwards, and has one in flight: it retries with the same number until it has a result, whichever replica
gives it. So one result for each client is enough.

A result is given only for the command that it is of: beside it a checksum of the command is kept. Somebody who uses the
id and the number of another client, with another command, is refused, and changes nothing. (Ids are drawn at random and
never repeated, so that is a program that copies them. One who goes ahead of the true client's numbers takes its place,
and the true one is told that it is stale: its commands are refused, never answered with what another one did.)

Rules: a client is forgotten when its process is known to be dead, by ForgetClients, or as the one that was silent for
the most commands when there are more than `CLIENTS_MAX`. A forgotten client's id stays barred (the latest
`FORGOTTEN_MAX` of them), because a copy of a command that is still under way would otherwise take effect a second time.

Rejected: expiry by time (the state machine has no clock); a session to be opened first (a round trip more for each
process that starts); keeping all results since the last acknowledged one (unbounded, for clients that pipeline).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from ftray.gcs.state.tables import Code, Result

CLIENTS_MAX = 100_000
FORGOTTEN_MAX = 20_000
"""A copy of a command is under way for seconds, or minutes if the network was cut."""
CLIENT_ID_BYTES_MAX = 64
SEQUENCE_MAX = (1 << 63) - 1


def checksum_of(command: bytes) -> int:
    """The checksum of a command's bytes; never 0."""
    return zlib.crc32(command) or 1


class Sessions:
    """Last sequence number and result of each client."""

    __slots__ = ("forgotten", "last")

    def __init__(self) -> None:
        self.last: dict[bytes, tuple[int, Result, int]] = {}
        """Number, result and checksum of the last command (0: not known), the most silent client first."""
        self.forgotten: dict[bytes, None] = {}

    def recall(self, client_id: bytes, sequence: int, revision: int, checksum: int = 0) -> Result | None:
        """The answer to a command that must not be applied (again); None if it is new."""
        if not 1 <= len(client_id) <= CLIENT_ID_BYTES_MAX or not 0 <= sequence <= SEQUENCE_MAX:
            return Result(
                Code.INVALID,
                f"a client id of {len(client_id)} bytes (1 to {CLIENT_ID_BYTES_MAX} are allowed) or a sequence number "
                f"out of 0..2**63-1 ({sequence})",
                revision,
            )
        known = self.last.get(client_id)
        if known is not None:
            if sequence > known[0]:
                return None
            if sequence == known[0]:
                if checksum and known[2] and checksum != known[2]:
                    return Result(
                        Code.STALE,
                        f"client {client_id.hex()} has used the sequence number {sequence} for another command: two "
                        "processes use the same client id. This command was not carried out; take a new client id",
                        revision,
                    )
                return known[1]
            return Result(
                Code.STALE,
                f"client {client_id.hex()} has had the result of command {known[0]} already, that of {sequence} is "
                "not kept: one command may be in flight",
                revision,
            )
        if client_id in self.forgotten:
            return Result(
                Code.SESSION_EXPIRED,
                f"client {client_id.hex()} was forgotten (its process was reported dead, or it was silent for long): "
                "take a new client id, and read what became of the last command",
                revision,
            )
        return None

    def record(self, client_id: bytes, sequence: int, result: Result, checksum: int = 0) -> None:
        self.last.pop(client_id, None)
        self.last[client_id] = (sequence, result, checksum)
        if len(self.last) > CLIENTS_MAX:
            self.forget([next(iter(self.last))])

    def forget(self, client_ids: Iterable[bytes]) -> int:
        """Bars the clients. Returns how many had a session."""
        had = 0
        for client_id in client_ids:
            had += self.last.pop(client_id, None) is not None
            self.forgotten.pop(client_id, None)
            self.forgotten[client_id] = None
        while len(self.forgotten) > FORGOTTEN_MAX:
            del self.forgotten[next(iter(self.forgotten))]
        return had
