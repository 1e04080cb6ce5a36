"""One head of several, on the reactor of its node: the replica, its journal, and the links to the other heads.

Role: shell around `gcs/raft`. It opens the journal, dials the heads that the replica wants to be linked with, hands
messages to and fro, and answers tools (`ftray heads`). `GcsServer` drives it: a turn of the server flushes the replica.

Rules
- Which cluster a head belongs to follows from the cluster's token. So heads agree on it before they have met, and a
  journal of another cluster is refused when it is opened.
- A head is dialled again with a growing pause while nobody answers there, at once when its link has closed.
- The library is imported with this module, so nodes that have one head do without it.

Rejected: a cluster id drawn by the first head (there is none); the links' own greeting as the place to agree on one
(the journal has the id in its header, and is opened before anybody is met).
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftray.exceptions import ProtocolError
from ftray.gcs.files import OS_FILES, Files
from ftray.gcs.journal import Journal
from ftray.gcs.raft.errors import MembershipMismatchError
from ftray.gcs.raft.membership import Table, find, show
from ftray.gcs.raft.replica import RaftReplica
from ftray.gcs.replica import JOURNAL_NAME, ReplicaClosedError
from ftray.gcs.server import GcsServer
from ftray.gcs.state.tables import Code, Result
from ftray.wire.handshake import ROLE_GCS, ROLE_HEAD, ROLE_TOOL
from ftray.wire.head_messages import RaftPacket
from ftray.wire.messages import Message, ToolQuery, ToolReply
from ftray.wire.names import NAMES
from ftray.wire.reactor import Handler, Link, Reactor, Timer

log = logging.getLogger("ftray.gcs")

HEADS_JOURNAL_NAME = "heads.journal"
DIAL_FIRST_MS = 10.0
DIAL_MAX_MS = 500.0
NOTES_MAX = 100
"""When more endpoints than this are remembered, those of heads that were replaced are forgotten."""
LOOK_MS = 100.0
"""How often the heads that should be linked are looked at while one is missing; at once when a link has closed."""
LOOK_WHOLE_MS = 1_000.0
"""The same when none is missing; when others are heads, with the next message of one."""
_PACKET = RaftPacket()


class _Transport:
    """What the replica sees of the links."""

    def __init__(self, host: RaftHost) -> None:
        self._host = host

    def send(self, link: Any, data: bytes) -> None:
        link.send(_PACKET, data)

    def close(self, link: Any, reason: str) -> None:
        self._host.close_link(link, reason)


class RaftHost:
    """See the module. Everything runs under `reactor.lock`."""

    address_of: Callable[[str], str | None] = staticmethod(NAMES.endpoint)
    """Looks names up; the simulator has none."""

    def __init__(
        self,
        reactor: Reactor,
        directory: str | os.PathLike[str],
        endpoint: str,
        heads: Sequence[str],
        *,
        join: bool = False,
        fsync: bool = True,
        on_failed: Callable[[Exception], None] = lambda error: None,
        files: Files = OS_FILES,
        rng: random.Random | None = None,
        cluster_id: bytes | None = None,
        replica_id: bytes | None = None,
        replica_kind: Callable[..., RaftReplica] = RaftReplica,
    ) -> None:
        """Opens the head in `directory`, listens at `endpoint` (as the others know it), and begins to dial.

        `heads` is empty for a head that goes on with what its directory says. `on_failed` is told why the replica has
        stopped by itself; it is closed then.

        What the simulator has its own of: the `files` under the journal; `rng`, for the pauses before elections (None:
        seeded by the system); the `cluster_id` (None: the reactor's) and the `replica_id` that the journal must have
        (None: any); and what makes the replica, called as `RaftReplica` is. Raises the errors of `Journal` and of
        `RaftReplica`.
        """
        self.reactor = reactor
        self.endpoint = endpoint
        self.on_failed = on_failed
        path = Path(directory)
        if files.exists(path / JOURNAL_NAME):
            raise MembershipMismatchError(
                f"the directory {path} is that of a head that is alone in its cluster: it can't become one of several. "
                "Start this head with another directory"
            )
        if not heads and not files.exists(path / HEADS_JOURNAL_NAME):
            raise MembershipMismatchError(f"the directory {path} knows no heads: say which there are (--heads)")
        journal = Journal.open(
            path / HEADS_JOURNAL_NAME, reactor.cluster_id if cluster_id is None else cluster_id, replica_id,
            fsync=fsync, files=files,
        )  # fmt: skip
        try:
            self.replica = replica_kind(
                journal, endpoint=endpoint, heads=heads, transport=_Transport(self), now_ms=reactor.now_ms,
                rng=rng or random.Random(), join=join, value_bytes_max=reactor.config.value_bytes_max,
            )  # fmt: skip
        except BaseException:
            journal.close()
            raise
        if journal.note:
            log.warning("%s", journal.note)
        self.heads = tuple(heads)
        self._links: dict[Link, None] = {}
        self._dialled: dict[str, Link] = {}
        self._pauses: dict[str, tuple[float, float]] = {}
        """By endpoint, when it may be dialled again, and the pause after that."""
        self._unreached: dict[str, str] = {}
        """By endpoint, why it could not be reached."""
        self._timer: Timer | None = None
        self._looked_at: Table = ()
        """The heads as they were when it was looked whether one is missing."""
        self._closed = False
        self._failed = False
        self.server = GcsServer(reactor, self.replica, reactor.config, self)
        self._look()

    def accept(self, link: Link) -> Handler | None:
        """For `Reactor.listen`: heads, clients of the GCS, and tools."""
        if self._closed or self._failed:
            return None
        if link.role == ROLE_HEAD:
            self._opened(link, dialled=False)
            return self
        if link.role == ROLE_GCS:
            return self.server.accept(link)
        return HeadTool(self) if link.role == ROLE_TOOL else None

    def close(self) -> None:
        """Ends the service, the links and the replica. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.server.close()
        self.replica.close()
        for link in list(self._links):
            link.close("this head is stopping")
        self._links.clear()

    # --- what the server asks -----------------------------------------------------------------------------------------

    def endpoints(self) -> tuple[str, ...]:
        """Where all heads are, as far as is known here."""
        return tuple(sorted(member.endpoint for member in self.replica.members)) or self.heads

    def why_no_leader(self) -> str:
        """Which heads answer this one, and which do not."""
        others = [each for each in self.endpoints() if each != self.endpoint]
        linked = set(others).difference(self.replica.wanted())
        there = [self.endpoint, *(each for each in others if each in linked)]
        gone = [
            f"{each} ({self.replica.status()['refusals'].get(each) or self._unreached.get(each, 'no answer yet')})"
            for each in others
            if each not in linked
        ]
        majority = (len(others) + 1) // 2 + 1
        if len(there) >= majority:
            return f"it answers, and so do {len(there) - 1} of the other heads; they have not agreed on a leader yet"
        return (
            f"it answers, but there is no leader: that takes {majority} heads of {len(others) + 1}, and only "
            f"{', '.join(there)} answer{'s' if len(there) == 1 else ''}; not {', '.join(gone)}"
        )

    def beat(self) -> bool:
        """Lets the other heads hear this one, if it leads and has nothing else to do. False: a turn is due instead."""
        return self.replica.beat()

    def failed(self, error: Exception) -> None:
        """The replica has stopped by itself."""
        if not self._failed:
            self._failed = True
            log.error("this head has stopped: %s", error)
            self.on_failed(error)

    # --- links to other heads -----------------------------------------------------------------------------------------

    def close_link(self, link: Link, reason: str) -> None:
        """For the replica."""
        self._links.pop(link, None)
        link.close(reason)
        self._ended(link, reason)

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        if type(message) is not RaftPacket:
            raise ProtocolError(f"{type(message).__name__} is not what heads say to each other")
        if self.replica.link_message(link, payload):
            self.server.wake()
        if self.replica.members is not self._looked_at:
            self._look()

    def on_closed(self, link: Link, reason: str) -> None:
        if self._links.pop(link, 0) is None:  # it was open
            self.replica.link_closed(link, reason)
            self.server.wake()
        self._ended(link, reason)

    def _opened(self, link: Link, dialled: bool) -> None:
        self._links[link] = None
        self.replica.link_opened(link, dialled)
        self.server.wake()

    def _ended(self, link: Link, reason: str) -> None:
        for endpoint, each in list(self._dialled.items()):
            if each is link:
                del self._dialled[endpoint]
                self._unreached[endpoint] = reason
        if not self._closed:
            self._look_in(DIAL_FIRST_MS)

    # --- dialling -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Dials whom the replica wants to be linked with, unless that is under way or was tried a moment ago."""
        if self._closed:
            return
        now_ms = self.reactor.now_ms()
        wanted = self.replica.wanted()
        if max(len(self._pauses), len(self._unreached)) > NOTES_MAX:
            known = {*wanted, *self.endpoints()}
            self._pauses = {at: each for at, each in self._pauses.items() if at in known}
            self._unreached = {at: each for at, each in self._unreached.items() if at in known}
        wake_ms = now_ms + (LOOK_MS if wanted else LOOK_WHOLE_MS)
        self._looked_at = self.replica.members
        for endpoint in [each for each in self._pauses if each not in wanted]:
            del self._pauses[endpoint]  # not as soon as it is open: whoever lets us in to send us away is no head now
        for endpoint in wanted:
            if endpoint in self._dialled:
                continue
            due_ms, pause_ms = self._pauses.get(endpoint, (0.0, DIAL_FIRST_MS))
            if now_ms >= due_ms:
                self._pauses[endpoint] = (now_ms + pause_ms, min(2 * pause_ms, DIAL_MAX_MS))
                self._dial(endpoint)
            else:
                wake_ms = min(wake_ms, due_ms)
        self._look_in(max(1.0, wake_ms - now_ms))

    def _look_in(self, delay_ms: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.reactor.call_later(delay_ms, self._look)

    def _dial(self, endpoint: str) -> None:
        def opened(link: Link) -> None:
            self._unreached.pop(endpoint, None)
            self._opened(link, dialled=True)

        try:
            address = self.address_of(endpoint)
            if address is None:
                self._unreached.setdefault(endpoint, "its name is being looked up")
            else:
                self._dialled[endpoint] = self.reactor.connect(address, ROLE_HEAD, self, on_open=opened)
        except (OSError, ValueError) as error:
            self._unreached[endpoint] = str(error)


class HeadTool:
    """Handler of links with ROLE_TOOL to a head: `ftray heads`."""

    def __init__(self, host: RaftHost) -> None:
        self._host = host

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        if type(message) is not ToolQuery:
            raise ProtocolError(f"a head takes no {type(message).__name__} from a tool")
        request = message.request
        try:
            self._answer(link, message)
        except (ValueError, ReplicaClosedError) as error:
            link.send(ToolReply(request, str(error)))

    def on_closed(self, link: Link, reason: str) -> None:
        """Nothing is kept for a tool."""

    def _answer(self, link: Link, query: ToolQuery) -> None:
        host = self._host
        replica = host.replica
        if query.what == "heads":
            guests = [{"replica": replica_id.hex(), "endpoint": endpoint} for replica_id, endpoint in replica.guests]
            status = {
                **replica.status(), "heads": list(host.endpoints()), "guests": guests, "pid": os.getpid(),
                "why_no_leader": "",
            }  # fmt: skip
            if not replica.leader_hint and not replica.is_leader:
                status["why_no_leader"] = host.why_no_leader()
            link.send(ToolReply(query.request), json.dumps(status).encode())
        elif query.what == "transfer":
            to = _text(query, "to", "")
            began_ms = host.reactor.now_ms()
            replica.hand_over(
                self._member(to) if to else b"",
                lambda result: self._handed_over(link, query.request, result, began_ms),
            )
            host.server.wake()
        elif query.what == "add":
            endpoint, replaced = _text(query, "endpoint"), _text(query, "replaces", "")
            guest = [each for each in replica.guests if each[1] == endpoint]
            if not guest:
                raise ValueError(
                    f"no head at {endpoint} waits to be added: start it there first, with `ftray start --head "
                    "--address` and the heads of this cluster"
                )
            old = self._member(replaced) if replaced else b""
            replica.add_head(guest[0][0], endpoint, lambda result: self._changed(link, query.request, result), old)
            host.server.wake()
        elif query.what == "remove":
            old = self._member(_text(query, "endpoint"))
            replica.remove_head(old, lambda result: self._changed(link, query.request, result))
            host.server.wake()
        else:
            raise ValueError(f"{query.what!r} is no query to a head: ask for heads, add, remove or transfer")

    def _member(self, text: str) -> bytes:
        """A member by its endpoint, or by the beginning of its id. Of two at one endpoint, the one that votes."""
        members = self._host.replica.members
        found = [each for each in members if text and (each.endpoint == text or each.replica_id.hex().startswith(text))]
        if len(found) > 1:
            found = [each for each in found if each.voter] or found
        ids = {each.replica_id for each in found}
        if len(ids) != 1:
            raise ValueError(f"{text!r} names {len(ids) or 'none'} of the heads, which are {show(members)}")
        member = find(members, ids.pop())
        assert member is not None
        return member.replica_id

    def _handed_over(self, link: Link, request: int, result: Result, began_ms: float) -> None:
        took_ms = round(self._host.reactor.now_ms() - began_ms, 1)
        answer = {"leader": self._host.replica.leader_hint, "took_ms": took_ms}
        self._changed(link, request, result, json.dumps(answer).encode())

    def _changed(self, link: Link, request: int, result: Result, answer: bytes = b"{}") -> None:
        if result.ok:
            link.send(ToolReply(request), answer)
        else:
            code = f" ({result.code.value})" if result.code is Code.NOT_LEADER else ""
            link.send(ToolReply(request, f"{result.message}{code}"))


def _text(query: ToolQuery, name: str, default: str | None = None) -> str:
    value = query.arguments.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{query.what} needs {name!r}, a text")
    return value
