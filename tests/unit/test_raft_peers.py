"""Links to other heads, in cases that the simulator has found."""

from __future__ import annotations

from typing import Any

import pytest
from raft_world import CLUSTER, Disk, MemoryJournal

from ftray.gcs.raft.errors import MembershipMismatchError
from ftray.gcs.raft.log import RaftLog
from ftray.gcs.raft.membership import Member, Table
from ftray.gcs.raft.messages import PEER_VERSION, Hello
from ftray.gcs.raft.peers import Peers, check_heads

HEADS = ("a:1", "b:1", "c:1")
MEMBERS = tuple(Member(name[:1].encode() * 16, name) for name in HEADS)
NEW = Member(b"n" * 16, "c:1", voter=False, replaces=b"c" * 16)


class Owner:
    """Takes everything, does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


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
