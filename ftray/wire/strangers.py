"""Incoming connections that have not shown who they are: how many there may be, and what is written of them.

Role: logic beside `reactor.py`; time is asked of the caller.

Rules
- At most `STRANGERS_MAX` at a time; one more, and the oldest is cut off. Those who know the token need a few
  milliseconds for the handshake, so whoever fills the queue displaces others of its kind, and not the descriptors that
  peers and clients need.
- One line in `LOG_PAUSE_MS` for what was cut off, with the number of those that got none: a scanner or a broken client
  must not fill the disk with lines.

Rejected: a limit for each address (all that comes through a proxy has one); no new connections while there are too many
(that would shut out the ones that are waited for).
"""

from __future__ import annotations

from typing import Any

STRANGERS_MAX = 512
LOG_PAUSE_MS = 5_000.0


class Strangers:
    """Those of one reactor."""

    __slots__ = ("_links", "_quiet_until_ms", "_unsaid")

    def __init__(self) -> None:
        self._links: dict[Any, None] = {}
        """Oldest first."""
        self._quiet_until_ms = float("-inf")
        self._unsaid = 0

    def __len__(self) -> int:
        return len(self._links)

    def came(self, link: Any) -> Any:
        """A connection was accepted. Returns the one to be cut off for it, or None."""
        self._links[link] = None
        return next(iter(self._links)) if len(self._links) > STRANGERS_MAX else None

    def known(self, link: Any) -> None:
        """It has shown who it is."""
        self._links.pop(link, None)

    def closed(self, link: Any, reason: str, now_ms: float) -> str:
        """What to write of an incoming connection that was closed, known or not; '' if nothing now."""
        if link not in self._links:
            return reason
        del self._links[link]
        if now_ms < self._quiet_until_ms:
            self._unsaid += 1
            return ""
        unsaid, self._unsaid = self._unsaid, 0
        self._quiet_until_ms = now_ms + LOG_PAUSE_MS
        return reason + (f" ({unsaid} more since the last such line)" if unsaid else "")
