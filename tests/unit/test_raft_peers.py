"""Links to other heads, in cases that the simulator has found."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from raft_steps import again
from raft_world import CLUSTER, Disk, MemoryJournal

from ftray.gcs.raft.errors import MembershipMismatchError, ReplicaRefusedError
from ftray.gcs.raft.log import RaftLog
from ftray.gcs.raft.membership import Member, Table
from ftray.gcs.raft.messages import PEER_VERSION, Hello, Refused
from ftray.gcs.raft.peers import Peers, check_heads

HEADS = ("a:1", "b:1", "c:1")
MEMBERS = tuple(Member(name[:1].encode() * 16, name) for name in HEADS)
NEW = Member(b"n" * 16, "c:1", voter=False, replaces=b"c" * 16)


class Owner:
    """Takes everything, does nothing but note what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.told.append((name, *arguments))

    def refusals(self) -> list[str]:
        return [each[2].reason for each in self.told if each[0] == "queue" and isinstance(each[2], Refused)]

    def closed(self) -> list[Any]:
        return [each[1] for each in self.told if each[0] == "queue_close"]


def log_of(members: Table) -> RaftLog:
    log = RaftLog(MemoryJournal(Disk(b"a" * 16)))
    log.set_first_members(members, 0, active=True)
    return log


def test_a_head_may_restart_while_another_is_being_replaced() -> None:
    """Two members share an address then; the list of heads is still the same."""
    check_heads(log_of((*MEMBERS, NEW)), "a:1", HEADS, join=False)
    with pytest.raises(MembershipMismatchError):
        check_heads(log_of((*MEMBERS, NEW)), "a:1", HEADS[:2], join=False)


def test_a_head_that_was_being_added_when_the_leader_fell_can_be_added_again() -> None:
    """It goes by a table that was never committed, and is no member."""
    peers = Peers(Owner(), log_of(MEMBERS), CLUSTER, "a:1", HEADS, 1, joining=False)
    peers.start()
    peers.opened("link", dialled=True)
    table = (*MEMBERS, NEW)
    peers.on_hello("link", Hello(PEER_VERSION, CLUSTER, b"n" * 16, "c:1", 2, HEADS, table, 9, True, False))
    assert peers.guests() == [(b"n" * 16, "c:1")]


def met(hello: Hello, members: Table = MEMBERS) -> tuple[Peers, Owner]:
    """The head a, which was greeted so on its one link."""
    owner = Owner()
    peers = Peers(owner, log_of(members), CLUSTER, "a:1", HEADS, 1, joining=False)
    peers.start()
    peers.opened("link", dialled=True)
    peers.on_hello("link", hello)
    return peers, owner


def hello(replica_id: bytes = b"b" * 16, **more: Any) -> Hello:
    known = Hello(PEER_VERSION, CLUSTER, replica_id, "b:1", 2, HEADS, MEMBERS, 0, True, False)
    return msgspec.structs.replace(known, **more)


def test_who_is_let_in_and_why_others_are_not() -> None:
    peers, owner = met(hello())
    assert peers.link_to(b"b" * 16) == "link" and owner.refusals() == []
    for greeting, text in (
        (hello(version=PEER_VERSION + 1), f"version {PEER_VERSION + 1} of the heads' protocol"),
        (hello(cluster_id=b"D" * 16), "belongs to cluster 4444"),
        (hello(b"x" * 16), "comes with another disk"),
        (hello(b"x" * 16, endpoint="x:1"), "was removed, or never added"),
    ):
        peers, owner = met(greeting)
        assert peers.link_to(greeting.replica_id) is None and peers.sender("link") is None
        assert len(owner.refusals()) == 1 and text in owner.refusals()[0] and owner.closed() == ["link"]
    peers, owner = met(hello(b"a" * 16))
    assert owner.refusals() == [] and owner.closed() == ["link"], "its own address leads back to it"


def test_a_head_with_a_later_table_is_let_in_if_both_are_in_it() -> None:
    table = (*MEMBERS, NEW)
    peers, owner = met(hello(NEW.replica_id, endpoint="c:1", members=table, members_index=9))
    assert peers.link_to(NEW.replica_id) == "link"
    peers, owner = met(hello(NEW.replica_id, endpoint="c:1", members=table[1:], members_index=9))
    assert peers.link_to(NEW.replica_id) is None and owner.refusals() == [], "it will say itself that a was removed"


def test_one_link_to_each_head_and_the_same_at_both_ends() -> None:
    """That of the head with the smaller id stays, and that of a head that has restarted."""
    for dialled in (True, False):
        peers, owner = met(hello())
        peers.opened("other", dialled=dialled)
        peers.on_hello("other", hello())
        assert len(owner.closed()) == 1
        stays = "other" if dialled else "link"  # the newer one of two in the same direction; otherwise the one of a
        assert peers.link_to(b"b" * 16) == stays and owner.closed() != [stays]
    peers, owner = met(hello())
    peers.opened("other", dialled=False)
    peers.on_hello("other", hello(boot=3))
    assert peers.link_to(b"b" * 16) == "other" and owner.closed() == ["link"]


def test_a_head_that_leaves_the_table_loses_its_link() -> None:
    peers, owner = met(hello())
    log = peers._log
    log.set_first_members(MEMBERS[:1] + MEMBERS[2:], 5, active=True)
    log.add(b"\1", 1, 0)
    log.setRaftCommitIndex(5)
    peers.table_changed()
    assert peers.link_to(b"b" * 16) is None and len(owner.refusals()) == 1
    assert [each[1:] for each in owner.told if each[0] == "on_peer_lost"] == [(b"b" * 16,)]


def test_tables_that_differ_before_the_cluster_is_formed_are_refused() -> None:
    """A disk was changed meanwhile: two majorities could come about."""
    log = RaftLog(MemoryJournal(Disk(b"a" * 16)))
    log.set_first_members(MEMBERS, 0, active=False)
    peers = Peers(Owner(), log, CLUSTER, "a:1", HEADS, 1, joining=False)
    peers.start()
    peers.opened("link", dialled=True)
    other = (*MEMBERS[:2], Member(b"x" * 16, "c:1"))
    with pytest.raises(ReplicaRefusedError, match="a disk was changed meanwhile"):
        peers.on_hello("link", hello(members=other, active=False))
    assert not log.active


def test_the_table_is_on_disk_before_anybody_is_told_of_it() -> None:
    """Otherwise the head could come back without it, and write down another one."""
    log = RaftLog(MemoryJournal(Disk(b"a" * 16)))
    peers = Peers(Owner(), log, CLUSTER, "a:1", HEADS, 1, joining=False)
    peers.start()
    for replica_id, endpoint in ((b"b" * 16, "b:1"), (b"c" * 16, "c:1")):
        peers.opened(endpoint, dialled=True)
        peers.on_hello(endpoint, hello(replica_id, endpoint=endpoint, members=(), active=False))
    assert log.first_members == MEMBERS and not log.active
    log.sync()
    assert again(log).first_members == MEMBERS
