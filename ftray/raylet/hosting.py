"""The GCS of a head: alone in its cluster, or one of several.

Role: shell, a part of `node.py`. It makes the replica, and everything that listens for the GCS's clients.

Rules: the journal of a session without `gcs_dir` ends with the session. One of several heads is asked for its clients'
sake: what it says of a quorum is in their errors.

Rejected: the replica of several heads for every cluster (its library takes 60 ms to import, and `init` 190 in all).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ftray.config import Config
from ftray.gcs.state.errors import JournalOpenError
from ftray.raylet.spec import NodeSpec
from ftray.wire.handshake import ROLE_GCS
from ftray.wire.head_messages import GcsFollower, GcsHello, GcsPing
from ftray.wire.messages import Message
from ftray.wire.reactor import Handler, Link, Reactor, parse_endpoint

if TYPE_CHECKING:
    from ftray.gcs.raft_host import RaftHost

HEADS_JOURNAL = "heads.journal"
"""As in `gcs/raft_host.py`, which would be slow to import."""
RESIGN_TIMEOUT_MS = 500.0
"""How long a head that stops may take to hand over."""


class _FormerHead:
    """Handler of clients' links to a head that was removed, whose node goes on."""

    def __init__(self, where: Callable[[], tuple[str, Sequence[str]]]) -> None:
        self._where = where

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        if type(message) is GcsHello:
            leader, endpoints = self._where()
            link.send(GcsFollower(leader, "it was removed, and is no head any more", -1, tuple(endpoints)))
        elif type(message) is GcsPing:
            link.send(message)

    def on_closed(self, link: Link, reason: str) -> None:
        """Nothing is kept for a client."""


class Hosting:
    """See the module. `parts` gets what is to be undone; `on_failed` is told why this head has stopped by itself."""

    def __init__(
        self,
        spec: NodeSpec,
        reactor: Reactor,
        session_dir: str,
        parts: list[Callable[[], None]],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self.host: RaftHost | None = None
        self._former: _FormerHead | None = None
        self.endpoints: list[str] = []
        """Where the clients on this node find the GCS; first here."""
        fsync = spec.fsync if spec.fsync is not None else spec.port is not None or spec.head_endpoint is not None
        directory = spec.gcs_dir or os.path.join(session_dir, "gcs")
        if spec.head_endpoint is None:
            self._host_alone(spec, reactor, session_dir, directory, fsync, parts)
        else:
            self._host_with_others(spec, spec.head_endpoint, reactor, directory, fsync, parts, on_failed)

    def _host_alone(
        self, spec: NodeSpec, reactor: Reactor, session_dir: str, directory: str, fsync: bool,
        parts: list[Callable[[], None]],
    ) -> None:  # fmt: skip
        from ftray.gcs.replica import SingleReplica
        from ftray.gcs.server import GcsServer

        if os.path.lexists(os.path.join(directory, HEADS_JOURNAL)):
            raise JournalOpenError(
                f"the directory {directory} is that of one of several heads: start this head as that one again (--host "
                "and --port, and --heads if there is a list), or with another directory"
            )
        endpoint = f"unix:{session_dir}/sockets/gcs.sock"
        replica = SingleReplica(directory, reactor.cluster_id, fsync=fsync, endpoint=endpoint)
        parts.append(replica.close)
        server = GcsServer(reactor, replica, reactor.config)
        parts.append(server.close)
        self.endpoints.append(reactor.listen(endpoint, server.accept))
        if spec.port is not None:
            self.endpoints.append(reactor.listen(f"tcp:{spec.host}:{spec.port}", server.accept))

    def _host_with_others(
        self, spec: NodeSpec, endpoint: str, reactor: Reactor, directory: str, fsync: bool,
        parts: list[Callable[[], None]], on_failed: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        from ftray.gcs.raft_host import RaftHost

        self.host = host = RaftHost(
            reactor, directory, endpoint, spec.heads, join=spec.join, fsync=fsync, on_failed=on_failed
        )
        parts.append(host.close)
        _, (_, port) = parse_endpoint(endpoint)
        reactor.listen(f"tcp:{spec.host}:{port}", self._accept)
        self.endpoints += [endpoint, *(each for each in host.endpoints() if each != endpoint)]

    def adopt_config(self, config: Config) -> None:
        """The settings of the cluster are known."""
        if self.host is not None:
            self.host.server.config = config

    def _accept(self, link: Link) -> Handler | None:
        if self._former is not None and link.role == ROLE_GCS:
            return self._former
        return self.host.accept(link) if self.host is not None else None

    def retire(self, where: Callable[[], tuple[str, Sequence[str]]]) -> None:
        """One of several heads that was removed: ends it. Whoever still comes here for the GCS, because this head
        stands in an old list of addresses, is told `where()` the leader is ('' if unknown), and all heads."""
        if self.host is not None:
            self.host.close()
            self._former = _FormerHead(where)

    def resign(self, reactor: Reactor, pump: Callable[[float, Callable[[], bool]], bool]) -> None:
        """Lets another head lead before this one stops, if this one does."""
        host = self.host
        if host is None:
            return
        with reactor.lock:
            host.replica.resign()
            host.server.wake()
        pump(RESIGN_TIMEOUT_MS, lambda: host.replica.resigned)
