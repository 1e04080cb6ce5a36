"""What a replica of several asks of the shell that drives it.

Role: types only.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ftray.gcs.raft.peers import Link


class Timing(NamedTuple):
    """Times of Raft, in milliseconds."""

    election_min_ms: float = 200.0
    election_max_ms: float = 400.0
    append_ms: float = 30.0
    """How often a leader that has nothing to say is heard."""
    fallback_ms: float = 400.0
    """A leader that hears no majority for so long steps down."""


class Opened(NamedTuple):
    """What happens to a link, between the messages that come over it."""

    dialled: bool


class Closed(NamedTuple):
    reason: str


class PeerTransport(Protocol):
    """Links to other heads: ordered, and without loss while they are open. A link is any hashable of the shell's."""

    def send(self, link: Link, data: bytes) -> None:
        """Sends a message. One to a link that has closed is dropped."""
        ...

    def close(self, link: Link, reason: str) -> None:
        """Closes the link when all that was sent has left. `link_closed` need not follow."""
        ...
