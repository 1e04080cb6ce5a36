"""The links to other heads: who is at the other end, and whether it belongs to the cluster.

Role: logic around links that it does not open: `opened`, `on_hello`, `closed` are told to it.

How a cluster is formed
1. Each head is started with the same list of heads, and draws an identity with its disk. They tell each other
   (`Hello`). Who knows all identities writes the table down (*prepared*).
2. Who has heard that all others have written down the same table takes part (*active*), or who hears from one that
   does. So no replica votes or acknowledges anything before its identity is known to all, and a head whose disk is
   emptied later is always recognised.

Rules
- A head that is not in the table is refused and told why: it was removed, its disk was emptied, or it is of another
  cluster. One that waits to be added (`joining`) may keep its link, and takes the table over once it stands in it.
- Who has a later table than ours knows better who belongs to it.
- A head that comes back with less than it had is refused, and stops (`memory.py`).
- Of two links between the same two heads the one that the head with the smaller id has dialled stays, except that a
  restarted head's new link always replaces the one from its former life.

Rejected: trusting the identity seen first (a head with an emptied disk could vote again at a peer that had not met it
before); a designated first head that forms the cluster (one more thing to configure differently).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from ftray.gcs.raft.errors import MembershipMismatchError, ReplicaRefusedError, ReplicaRemovedError
from ftray.gcs.raft.log import RaftLog
from ftray.gcs.raft.membership import Member, Table, find, show
from ftray.gcs.raft.memory import Memory
from ftray.gcs.raft.messages import PEER_VERSION, Hello, PeerMessage, Refused, TermMessage
from ftray.gcs.state import commands

log = logging.getLogger("ftray.gcs")

Link = Hashable
"""A connection, as the shell knows it."""


REFUSALS_MAX = 100
"""So many are remembered: strangers may come from any number of addresses."""


class PeersOwner(Protocol):
    """What the links ask of their replica."""

    def queue(self, link: Link, message: PeerMessage) -> None:
        """Sends, after the next sync."""
        ...

    def queue_close(self, link: Link, reason: str) -> None:
        """Closes, after what was queued."""
        ...

    def tell(self, link: Link, message: Refused) -> None:
        """Sends at once: it rests on nothing that must be durable."""
        ...

    def on_peer(self, peer: bytes) -> None:
        """There is a link to that member now."""
        ...

    def on_peer_lost(self, peer: bytes) -> None:
        """There is no link to that member any more."""
        ...

    def on_active(self) -> None:
        """The cluster is formed, as far as this replica is concerned."""
        ...


class _Peer:
    __slots__ = ("accepted", "dialled", "hello")

    def __init__(self, dialled: bool) -> None:
        self.dialled = dialled
        self.hello: Hello | None = None
        self.accepted = False


class Peers:
    """See the module."""

    def __init__(
        self, owner: PeersOwner, raft_log: RaftLog, cluster_id: bytes, endpoint: str, heads: Iterable[str], boot: int,
        joining: bool,
    ) -> None:  # fmt: skip
        self._owner = owner
        self._log = raft_log
        self._cluster_id = cluster_id
        self.me: bytes = raft_log.journal.replica_id
        self._endpoint = endpoint
        self._heads = tuple(sorted(set(heads)))
        self._boot = boot
        self._joining = joining
        self._links: dict[Link, _Peer] = {}
        self._by_id: dict[bytes, Link] = {}
        self._memory = Memory(raft_log)
        self._editions: dict[bytes, int] = {}
        """Of the commands that each head can read, as it has said last."""
        self.refusals: dict[str, str] = {}
        """By endpoint, why that head refused this one, or was refused."""

    def start(self) -> None:
        """Forms the cluster as far as that is possible alone."""
        if not self._log.active and not self._joining:
            self._form()

    # --- who is there -------------------------------------------------------------------------------------------------

    def link_to(self, peer: bytes) -> Link | None:
        """The link to a member."""
        return self._by_id.get(peer)

    def sender(self, link: Link, message: TermMessage | None = None) -> Hello | None:
        """Who is at the other end, if what it says counts; it has said that message."""
        peer = self._links.get(link)
        if peer is None or not peer.accepted or peer.hello is None:
            return None
        if message is not None:
            self._memory.heard(peer.hello.replica_id, message)
        return peer.hello

    def older_than(self, edition: int) -> list[str]:
        """Endpoints of the other members that can't read commands of that edition, or have not said that they can."""
        return [
            member.endpoint
            for member in self._log.members
            if member.replica_id != self.me and self._editions.get(member.replica_id, 1) < edition
        ]

    @property
    def connected(self) -> list[bytes]:
        return sorted(self._by_id)

    def guests(self) -> list[tuple[bytes, str]]:
        """Heads that wait to be added: id and endpoint."""
        return sorted(
            (peer.hello.replica_id, peer.hello.endpoint)
            for peer in self._links.values()
            if peer.hello is not None and self._waits(peer.hello)
        )

    def _waits(self, hello: Hello) -> bool:
        """Whether a head is to be added by a command. Also one that was being added when the leader fell: it has taken
        over a table that was never committed."""
        if find(self._log.members, hello.replica_id) is not None:
            return False
        as_it_thinks = find(hello.members, hello.replica_id)
        return hello.joining or (hello.active and as_it_thinks is not None and not as_it_thinks.voter)

    def wanted(self) -> list[str]:
        """Endpoints of heads that there should be a link to, and is none."""
        endpoints = {member.endpoint for member in self._log.members} or {*self._heads, *self._told_heads()}
        endpoints.discard(self._endpoint)
        for peer in self._links.values():
            if peer.hello is not None:
                endpoints.discard(peer.hello.endpoint)
        return sorted(endpoints)

    def _told_heads(self) -> list[str]:
        """Where the heads are, for one that waits to be added: the list that it was started with may be an old one, or
        a part, and without the leader. Of the heads that it has met, one that knows the latest table has told it."""
        tables = [peer.hello for peer in self._links.values() if peer.hello is not None and peer.hello.active]
        if not self._joining or not tables:
            return []
        return [member.endpoint for member in max(tables, key=lambda hello: hello.members_index).members]

    # --- events -------------------------------------------------------------------------------------------------------

    def opened(self, link: Link, dialled: bool) -> None:
        self._links[link] = _Peer(dialled)
        self._owner.queue(link, self._hello())

    def closed(self, link: Link) -> None:
        peer = self._links.pop(link, None)
        if peer is not None and peer.hello is not None and self._by_id.get(peer.hello.replica_id) == link:
            del self._by_id[peer.hello.replica_id]
            self._owner.on_peer_lost(peer.hello.replica_id)

    def on_hello(self, link: Link, hello: Hello) -> None:
        """Raises MembershipMismatchError, ReplicaRefusedError: this replica must stop."""
        peer = self._links.get(link)
        if peer is None:
            return
        if hello.version != PEER_VERSION:
            peer.hello = hello
            self._refuse(
                link, f"{hello.endpoint} speaks version {hello.version} of the heads' protocol, {self._endpoint} "
                f"{PEER_VERSION}: install the same version of ftray on both",
            )  # fmt: skip
        elif hello.cluster_id != self._cluster_id:
            peer.hello = hello
            self._refuse(
                link, f"{hello.endpoint} belongs to cluster {hello.cluster_id.hex()}, {self._endpoint} to "
                f"{self._cluster_id.hex()}: start both with the same FTRAY_TOKEN and directories of that cluster",
            )  # fmt: skip
        elif hello.replica_id == self.me:
            self._drop(link, "it leads to this head itself")
        elif reason := self._memory.why_not(hello):
            peer.hello = hello
            self._refuse(link, reason, forgot=True)
        elif self._keep(link, peer, hello):
            self._memory.greeted(hello)
            self._editions[hello.replica_id] = hello.edition
            peer.hello = hello
            if not self._log.active:
                self._form(hello, link)
            if self._log.active:
                self._judge(link, peer)

    def on_refused(self, link: Link, refused: Refused) -> None:
        """Raises ReplicaRemovedError, ReplicaRefusedError: this replica must stop."""
        peer = self._links.get(link)
        where = peer.hello.endpoint if peer is not None and peer.hello is not None else "a peer"
        news = self.refusals.get(where) != refused.reason  # it is told again with each link
        self._note_refusal(where, refused.reason)
        if refused.removed and self._log.active and refused.members_index > self._log.members_index:
            raise ReplicaRemovedError(
                f"this head (replica {self.me.hex()}) was removed from the cluster, says {where}: {refused.reason}"
            )
        if refused.forgot or (not self._log.active and not self._joining):
            raise ReplicaRefusedError(f"{where} refuses this head: {refused.reason}")
        if news:
            log.warning("%s refuses this head: %s", where, refused.reason)

    def _note_refusal(self, where: str, reason: str) -> None:
        self.refusals.pop(where, None)
        self.refusals[where] = reason
        if len(self.refusals) > REFUSALS_MAX:
            del self.refusals[next(iter(self.refusals))]

    def table_changed(self) -> None:
        """The table of members is another one: says so, and judges all links anew."""
        for link, peer in list(self._links.items()):
            self._owner.queue(link, self._hello())
            if peer.hello is not None and self._log.active:
                self._judge(link, peer)

    # --- judging ------------------------------------------------------------------------------------------------------

    def _keep(self, link: Link, peer: _Peer, hello: Hello) -> bool:
        """Whether this is the link to use for that head. Closes the other."""
        for other, former in list(self._links.items()):
            if other == link or former.hello is None or former.hello.replica_id != hello.replica_id:
                continue
            ours = self.me < hello.replica_id
            if former.hello.boot == hello.boot and former.dialled != peer.dialled and peer.dialled != ours:
                self._drop(link, "there is another link between these heads")
                return False
            self._drop(other, "a new link takes its place")
        return True

    def _judge(self, link: Link, peer: _Peer) -> None:
        hello = peer.hello
        assert hello is not None
        members, index = self._log.members, self._log.members_index
        knows_better = (
            hello.active
            and hello.members_index > index
            and find(hello.members, self.me) is not None
            and find(hello.members, hello.replica_id) is not None
        )
        if find(members, hello.replica_id) is not None or knows_better:
            if not peer.accepted:
                peer.accepted = True
                self._by_id[hello.replica_id] = link
                self.refusals.pop(hello.endpoint, None)
                self._owner.on_peer(hello.replica_id)
            return
        if peer.accepted:
            peer.accepted = False
            if self._by_id.get(hello.replica_id) == link:
                del self._by_id[hello.replica_id]
                self._owner.on_peer_lost(hello.replica_id)
        if hello.joining or (hello.active and hello.members_index > index):
            return
        committed, committed_index = self._log.members_at(self._log.commit)
        if find(committed, hello.replica_id) is None:
            self._refuse(link, self._why_not(hello, committed), committed_index, removed=True)

    def _why_not(self, hello: Hello, members: Table) -> str:
        for member in members:
            if member.endpoint == hello.endpoint:
                return (
                    f"{hello.endpoint} is replica {member.replica_id.hex()} in this cluster, and comes with another "
                    f"disk (replica {hello.replica_id.hex()}). A head that lost its disk has lost what it acknowledged "
                    "and must not come back as if it had not: let it join as a new one and replace the former "
                    "(ftray heads replace)"
                )
        return (
            f"replica {hello.replica_id.hex()} at {hello.endpoint} is not a member: the heads are {show(members)}. "
            "It was removed, or never added: to add it, empty its directory and let it join (ftray heads add)"
        )

    def _refuse(
        self, link: Link, reason: str, index: int = 0, removed: bool = False, forgot: bool = False
    ) -> None:
        peer = self._links.get(link)
        where = peer.hello.endpoint if peer is not None and peer.hello is not None else ""
        if self.refusals.get(where) != reason:
            log.warning("refused a head: %s", reason)
        self._note_refusal(where, reason)
        self._owner.queue(link, Refused(reason, index, removed, forgot))
        self._drop(link, "refused: " + reason)

    def _drop(self, link: Link, reason: str) -> None:
        self._owner.queue_close(link, reason)
        self.closed(link)

    # --- forming ------------------------------------------------------------------------------------------------------

    def _form(self, hello: Hello | None = None, link: Link | None = None) -> None:
        """Goes on towards an active table, after a greeting or at the start."""
        if hello is not None and hello.active:
            if find(hello.members, self.me) is not None:
                self._activate(hello.members, hello.members_index)
            return  # otherwise they refuse this head themselves, and say why
        if self._joining or (hello is not None and hello.joining):
            return
        if hello is not None and hello.heads != self._heads:
            text = (
                f"the heads were started with different lists: {self._endpoint} with {', '.join(self._heads)}; "
                f"{hello.endpoint} with {', '.join(hello.heads)}. Start all of them with the same list"
            )
            self._owner.tell(link, Refused(text, 0, False))  # so that both say it, whoever is heard first
            raise MembershipMismatchError(text)
        ours = self._log.first_members
        if not ours:
            ours = self._prepare()
        if hello is not None and ours and hello.members and hello.members != ours:
            raise ReplicaRefusedError(
                f"this head and {hello.endpoint} have seen different heads while the cluster was formed ({show(ours)}; "
                f"there {show(hello.members)}): a disk was changed meanwhile. Nothing has been written yet: stop all "
                "heads, empty their GCS directories, and start them again"
            )
        if ours:
            agreed = {
                peer.hello.replica_id
                for peer in self._links.values()
                if peer.hello is not None and peer.hello.members == ours
            }
            if all(member.replica_id in agreed for member in ours if member.replica_id != self.me):
                self._activate(ours, 0)

    def _prepare(self) -> Table:
        """Writes the table down if the identities of all heads are known. Returns it, or ()."""
        known = {self._endpoint: self.me}
        for peer in self._links.values():
            if peer.hello is not None and peer.hello.endpoint in self._heads and not peer.hello.joining:
                known[peer.hello.endpoint] = peer.hello.replica_id
        if any(endpoint not in known for endpoint in self._heads):
            return ()
        members = tuple(sorted(Member(known[endpoint], endpoint) for endpoint in self._heads))
        self._log.set_first_members(members, 0, active=False)
        self._greet()
        return members

    def _activate(self, members: Table, index: int) -> None:
        self._log.set_first_members(members, index, active=True)
        self._owner.on_active()
        self._greet()
        for link, peer in list(self._links.items()):
            if peer.hello is not None:
                self._judge(link, peer)

    def _greet(self) -> None:
        for link in self._links:
            self._owner.queue(link, self._hello())

    def _hello(self) -> Hello:
        raft_log = self._log
        return Hello(
            PEER_VERSION, self._cluster_id, self.me, self._endpoint, self._boot, self._heads, raft_log.members,
            raft_log.members_index, raft_log.active, self._joining and find(raft_log.members, self.me) is None,
            raft_log.term, raft_log[-1][1] if len(raft_log) else 0, commands.EDITION,
        )  # fmt: skip


def check_heads(raft_log: RaftLog, endpoint: str, heads: Sequence[str], join: bool) -> None:
    """Raises MembershipMismatchError if a head is started as, or with, others than its disk knows."""
    members = raft_log.members
    if not members:
        if not heads or (not join and endpoint not in heads):
            raise MembershipMismatchError(
                f"this head, {endpoint}, is not in the list of heads ({', '.join(heads) or 'empty'}) that it was "
                "started with: give all heads the same list, with each of them"
            )
        return
    known = sorted({member.endpoint for member in members})  # two share one while a head is being replaced
    if heads and not join and sorted(set(heads)) != known:
        raise MembershipMismatchError(
            f"this head was started with the heads {', '.join(sorted(set(heads)))}, but the cluster, as its disk knows "
            f"it, has {', '.join(known)}. Start it without a list to go on with what the disk says; to change the "
            "cluster use ftray heads add, remove or replace"
        )
    mine = find(members, raft_log.journal.replica_id)
    if mine is not None and mine.endpoint != endpoint:
        raise MembershipMismatchError(
            f"this head's disk belongs to {mine.endpoint}, and it was started as {endpoint}: start it under its own "
            "address, or empty its directory and replace it (ftray heads replace)"
        )
