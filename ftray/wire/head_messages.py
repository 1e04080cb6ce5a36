"""What the heads of a cluster with several say: to each other, and to clients about who leads.

Role: pure data, a part of the union in `messages.py`.
"""

from __future__ import annotations

from ftray.wire.values import Message


class GcsHeads(Message, tag=67):
    """To a client that this head serves, at first and when they change: where all heads are."""

    endpoints: tuple[str, ...]


class GcsNoLeader(Message, tag=68):
    """To a client: this head answers, but knows no leader. It says so when it knows one."""

    reason: str


class GcsPing(Message, tag=69):
    """From a client, and back: is anybody there? A frozen process keeps its connections."""


class RaftPacket(Message, tag=90):
    """Head to head. Payload: a message of `gcs/raft/messages.py`."""
