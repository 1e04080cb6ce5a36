"""Who belongs to the cluster: the table of heads, and which changes to it are safe.

Role: pure. The table is replicated: it is an entry of the log, in force from the moment a replica has the entry (as
Raft's single-server changes are), and a part of every snapshot.

Rules
- One voter comes or goes with each entry, and the next entry is made when the last one is committed: so any two
  majorities, of the old table and of the new one, share a head.
- A new head begins as a learner: it is given the log, and counts for nothing. It votes when it has caught up.
- A head is its disk. One that comes back with another disk is another head, which takes the former's place
  (`replaces`): first the new one votes, then the old one goes, so that the quorum is never smaller than before.

Rejected: joint consensus (two majorities for each commit, for changes of several heads at once, which nobody needs);
names or addresses as identities (a head with an emptied disk would vote a second time).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec


class Member(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One head."""

    replica_id: bytes
    """16 bytes, made with its disk."""
    endpoint: str
    voter: bool = True
    replaces: bytes = b""
    """The member that goes when this one votes."""


Table = tuple[Member, ...]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[Member, ...])


def encode_table(members: Iterable[Member]) -> bytes:
    return _encoder.encode(sorted(members))


def decode_table(data: bytes | memoryview) -> Table:
    """Raises msgspec.DecodeError."""
    return _decoder.decode(data)


def find(members: Iterable[Member], replica_id: bytes) -> Member | None:
    for member in members:
        if member.replica_id == replica_id:
            return member
    return None


def show(members: Iterable[Member]) -> str:
    """The table in a message."""
    return ", ".join(
        f"{member.endpoint} (replica {member.replica_id.hex()[:8]}{'' if member.voter else ', not voting yet'})"
        for member in sorted(members, key=lambda member: member.endpoint)
    )


def add(members: Table, replica_id: bytes, endpoint: str, replaces: bytes = b"") -> Table | str:
    """The table with a learner more, or why not."""
    known = find(members, replica_id)
    if known is not None:
        return f"replica {replica_id.hex()} is a member already, as {known.endpoint}"
    for member in members:
        if member.endpoint == endpoint and member.replica_id != replaces:
            return (
                f"{endpoint} belongs to replica {member.replica_id.hex()}: if that one's disk is lost, replace it "
                "(ftray heads replace)"
            )
        if not member.voter:
            return f"{member.endpoint} is still being added: wait until it has caught up, or remove it"
    if replaces and find(members, replaces) is None:
        return f"there is no replica {replaces.hex()} to replace: the heads are {show(members)}"
    return (*members, Member(replica_id, endpoint, False, replaces))


def promote(members: Table, replica_id: bytes) -> Table:
    """The table in which the learner votes."""
    return tuple(
        msgspec.structs.replace(member, voter=True) if member.replica_id == replica_id else member
        for member in members
    )


def remove(members: Table, replica_id: bytes) -> Table | str:
    """The table without that head, or why not."""
    member = find(members, replica_id)
    if member is None:
        return f"there is no replica {replica_id.hex()}: the heads are {show(members)}"
    if member.voter and sum(each.voter for each in members) == 1:
        return f"{member.endpoint} is the only head that votes: add another one first"
    return tuple(
        msgspec.structs.replace(each, replaces=b"") if each.replaces == replica_id else each
        for each in members
        if each.replica_id != replica_id
    )


def next_step(members: Table, caught_up: Sequence[bytes]) -> Table | None:
    """The leader's next step of the changes that are under way, if any; learners in `caught_up` may vote."""
    for member in members:
        if member.voter and member.replaces:
            without = remove(members, member.replaces)
            if isinstance(without, tuple):
                return without
    for member in members:
        if not member.voter and member.replica_id in caught_up:
            return promote(members, member.replica_id)
    return None
