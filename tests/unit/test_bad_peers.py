"""Heads that are not what they say they are, and strangers at a head's port: recognised, told why, of no effect."""

from __future__ import annotations

import logging
import os
import re
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gcs_world import put
from heads_world import HeadsWorld
from raft_world import CLUSTER, Disk, Host, MemoryJournal, World
from wire_hosts import Clock, RawPeer, install_clock, make_reactor

from ftray.gcs.raft import messages as m
from ftray.gcs.raft.errors import MembershipMismatchError, ReplicaRefusedError
from ftray.gcs.raft.log import RaftLog
from ftray.gcs.raft.memory import BOOTS_KEPT, Memory
from ftray.wire import strangers
from ftray.wire.names import Names, is_name
from ftray.wire.strangers import Strangers


def made(heads: int = 3) -> World:
    world = World(1, heads)
    world.start()
    world.leader()
    return world


def a_follower(world: World) -> Host:
    return next(host for host in world.hosts.values() if not host.leads)


def copy_of(disk: Disk) -> Disk:
    copy = Disk(disk.replica_id)
    copy.records, copy.size = list(disk.records), disk.size
    return copy


# --- a directory that was copied -------------------------------------------------------------------------------------


def test_an_older_copy_of_a_directory_is_refused_and_the_right_one_is_not() -> None:
    world = made()
    world.write(b"a")
    world.run(200)
    head = a_follower(world)
    older = copy_of(head.disk)
    for number in range(5):
        world.write(b"k%d" % number)
    world.run(200)
    latest = head.disk
    head.crash()
    head.disk = older
    head.start()
    world.run_until(lambda: head.replica is None)
    assert isinstance(head.error, ReplicaRefusedError)
    text = str(head.error)
    assert "is an older copy" in text and "ftray heads replace" in text and "Start it with its latest directory" in text
    assert world.write(b"meanwhile") is not head
    head.disk = latest
    head.start()
    world.run_until(lambda: world.has(head, b"meanwhile"))
    assert head.error is None


def test_an_older_copy_of_the_leaders_directory_is_refused_by_those_who_followed() -> None:
    """In the same term: it has sent them more than it has."""
    world = made()
    leader = world.leader()
    world.run(100)
    older = copy_of(leader.disk)
    for number in range(5):
        world.write(b"k%d" % number)
    world.run(200)
    leader.crash()
    leader.disk = older
    leader.start()
    world.run_until(lambda: leader.replica is None)
    assert isinstance(leader.error, ReplicaRefusedError)
    world.write(b"on")
    assert all(world.has(host, b"k4") for host in world.hosts.values() if host.replica is not None)


def test_without_that_memory_an_older_copy_would_vote_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "why_not", lambda memory, hello: "")
    world = made()
    world.run(100)
    head = a_follower(world)
    older = copy_of(head.disk)
    world.write(b"k")
    world.run(100)
    head.crash()
    head.disk = older
    head.start()
    world.run(500)
    assert head.replica is not None and head.error is None


def test_two_processes_with_one_identity_are_told_so() -> None:
    """A copy that is as new as the original: nothing is forgotten yet, and both can't stay."""
    world = made()
    world.write(b"a")
    world.run(200)
    head = a_follower(world)
    twin = Host(world, head.endpoint, head.heads, copy_of(head.disk))
    world.hosts["twin"] = twin
    twin.start()
    world.run_until(lambda: head.replica is None or twin.replica is None)
    stopped = head if head.replica is None else twin
    assert isinstance(stopped.error, ReplicaRefusedError)
    assert "runs twice" in str(stopped.error) and "Stop one of them" in str(stopped.error)
    world.hosts.pop("twin")
    world.write(b"b")
    world.run(500)
    survivor = twin if stopped is head else head
    assert survivor.replica is not None
    assert all(world.has(host, b"b") for host in (survivor, world.leader()))


def hello(boot: int, term: int = 0, last: int = 0, replica_id: bytes = b"x" * 16) -> m.Hello:
    return m.Hello(m.PEER_VERSION, CLUSTER, replica_id, "x:1", boot, (), (), 0, True, False, term, last)


def test_what_a_head_remembers_of_another_ones_disk() -> None:
    log = RaftLog(MemoryJournal(Disk(b"a" * 16)))
    log.term = 5
    memory = Memory(log)
    assert memory.why_not(hello(1)) == ""
    memory.greeted(hello(1))
    memory.heard(b"x" * 16, m.Append(5, 0, 0, 10, 4, ((b"\x01", 11, 5),)))
    assert memory.why_not(hello(1, 5, 3)) == ""  # the same process: said before, over another link
    assert "11 entries" in memory.why_not(hello(2, 5, 10)) and memory.why_not(hello(2, 5, 11)) == ""
    memory.heard(b"x" * 16, m.Ack(5, 0, 21, False, True))
    assert "20 entries" in memory.why_not(hello(2, 5, 19)) and memory.why_not(hello(2, 5, 20)) == ""
    memory.heard(b"x" * 16, m.Ack(5, 0, 90, True, False))  # it lacks entry 90
    memory.heard(b"x" * 16, m.Ack(4, 0, 90, False, True))  # of an earlier term
    assert memory.why_not(hello(2, 5, 20)) == ""
    assert memory.why_not(hello(2, 6, 1)) == ""  # in a later term a leader may have taken back what was not committed
    memory.heard(b"x" * 16, m.PreVote(7, 1, True))
    assert "term 7" in memory.why_not(hello(2, 6, 99)) and memory.why_not(hello(2, 7, 0)) == ""
    assert memory.why_not(hello(1, 0, 0, b"y" * 16)) == ""
    memory.greeted(hello(2, 9, 30))
    assert memory.why_not(hello(1, 5, 3)) == ""  # of the process before it, and held up on the way
    assert "term 9" in memory.why_not(hello(3, 8, 99)) and memory.why_not(hello(3, 9, 7)) == ""


def test_two_processes_that_take_turns_are_found_out_and_a_late_greeting_is_not() -> None:
    memory = Memory(RaftLog(MemoryJournal(Disk(b"a" * 16))))
    for boot in range(1, BOOTS_KEPT + 9):
        assert memory.why_not(hello(boot)) == ""
        memory.greeted(hello(boot))
    for _ in range(2):  # what the former process had said was held up
        for boot in (BOOTS_KEPT + 7, BOOTS_KEPT + 8):
            assert memory.why_not(hello(boot)) == ""
            memory.greeted(hello(boot))
    turns = 0
    while not memory.why_not(hello(BOOTS_KEPT + 7 + turns % 2)):
        memory.greeted(hello(BOOTS_KEPT + 7 + turns % 2))
        turns += 1
    assert turns <= 4 and "runs twice" in memory.why_not(hello(BOOTS_KEPT + 7 + turns % 2))
    assert memory.why_not(hello(99)) == ""  # one that has just been started


# --- peers that say what is none -------------------------------------------------------------------------------------


def test_each_flipped_bit_of_a_message_is_noticed() -> None:
    data = m.encode(m.Append(3, 1, 2, 4, 3, ((b"\x00command", 5, 3),)))
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(msgspec.DecodeError):
                m.decode(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(msgspec.DecodeError):
            m.decode(data[:length])


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode([2, -1, 0, 0, 0, 0, []]),
        msgspec.msgpack.encode([2, 1 << 63, 0, 0, 0, 0, []]),
        msgspec.msgpack.encode([2, 1, 0, 0, 0, 0, [[b"", 1, 1]]]),
        msgspec.msgpack.encode([99, 1]),
        b"\x94\x01\xa1\xff\x00\xc2",
        b"\x91" * 10_000,
        b"",
    ],
)
def test_what_is_out_of_range_is_no_message(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        m.decode(zlib.crc32(body).to_bytes(4, "little") + body)


def test_heads_of_different_versions_refuse_each_other_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    world = made()
    follower = a_follower(world)
    assert follower.replica is not None
    peers = follower.replica._peers
    newer = m.Hello(m.PEER_VERSION + 1, CLUSTER, b"x" * 16, "new:1", 1, (), (), 0, True, False)
    with caplog.at_level(logging.WARNING, "ftray.gcs"):
        for link in ("one", "two", "three"):
            follower.replica.link_opened(link, False)
            follower.replica.link_message(link, m.encode(newer))
            peers.opened(link, False)
            peers.on_hello(link, newer)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "install the same version of ftray on both" in said[0]
    assert "install the same version" in follower.replica.status()["refusals"]["new:1"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_both_heads_with_different_lists_say_so(
    order: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hears the other first stops; the other must not wait for it in vain. And neither forms a cluster."""
    world = HeadsWorld(tmp_path, install_clock(monkeypatch))
    lists = (world.endpoints, world.endpoints[:2])
    for index in order:
        world.heads[index].start(lists[index])
    world.until(lambda: all(head.failed for head in world.heads[:2]))
    errors = [head.failed[0] for head in world.heads[:2]]
    assert any(isinstance(error, MembershipMismatchError) for error in errors)
    assert all(re.search("different lists.*Start all of them with the same", str(error)) for error in errors)
    world.heads[2].start(world.endpoints)
    world.settle(500)
    assert not any(head.leads for head in world.heads)
    world.close()


# --- strangers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return install_clock(monkeypatch)


@pytest.fixture
def heads(tmp_path: Path, clock: Clock) -> Iterator[HeadsWorld]:
    world = HeadsWorld(tmp_path, clock)
    world.start()
    yield world
    world.close()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: head\r\n\r\n", os.urandom(2000), b"F"])
def test_strangers_at_a_heads_port_change_nothing(
    heads: HeadsWorld, said: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "STRANGERS_MAX", 20)
    leader = heads.leader()
    assert leader.reactor is not None and leader.host is not None
    term = leader.host.replica.status()["term"]
    client = heads.client()
    with caplog.at_level(logging.INFO, "ftray.wire"):
        peers: list[RawPeer] = []
        for _ in range(5):
            for _ in range(20):
                peers.append(RawPeer(leader.endpoint))
                if said:
                    peers[-1].send(said)
            heads.settle(5)
            assert len(leader.reactor.strangers) <= 20
            assert heads.run(client, put(b"k")).ok
    assert len([record for record in caplog.records if "incoming link closed" in record.getMessage()]) <= 1
    assert sum(not peer.is_cut_off() for peer in peers) <= 20
    assert leader.leads and leader.host.replica.status()["term"] == term
    for peer in peers:
        peer.close()


def test_what_was_not_written_of_strangers_is_counted() -> None:
    known = Strangers()
    for number in range(10):
        known.came(number)
    assert known.closed(0, "no token", 1.0) == "no token"
    assert [known.closed(number, "no token", 2.0) for number in range(1, 5)] == [""] * 4
    later_ms = 1.0 + strangers.LOG_PAUSE_MS
    assert known.closed(5, "no token", later_ms) == "no token (4 more since the last such line)"
    known.known(6)
    assert known.closed(6, "the program has ended", later_ms) == "the program has ended"  # no stranger: always written
    assert len(known) == 3


def test_the_oldest_stranger_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "STRANGERS_MAX", 3)
    known = Strangers()
    assert [known.came(each) for each in "abc"] == [None] * 3
    known.known("a")
    assert known.came("d") is None and known.came("e") == "b"


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_are_looked_up_aside_and_faults_are_said() -> None:
    import threading

    answer, asked = threading.Event(), []

    def look_up(host: str) -> str:
        asked.append(host)
        answer.wait(20)
        if host == "nobody":
            raise socket.gaierror(-2, "Name or service not known")
        return "10.0.0.7"

    names = Names(look_up)
    assert names.endpoint("tcp:10.0.0.1:6380") == "tcp:10.0.0.1:6380"
    assert names.endpoint("tcp:[::1]:6380") == "tcp:[::1]:6380"
    assert names.endpoint("unix:/head") == "unix:/head"
    assert [names.endpoint("tcp:a:6380") for _ in range(3)] == [None] * 3
    assert names.endpoint("tcp:nobody:6380") is None
    answer.set()
    for thread in threading.enumerate():
        if thread.name.startswith("look-up of"):
            thread.join(20)
    assert sorted(asked) == ["a", "nobody"]
    assert names.endpoint("tcp:a:6380") == "tcp:10.0.0.7:6380"
    with pytest.raises(OSError, match="nobody can't be looked up: Name or service not known"):
        names.endpoint("tcp:nobody:6380")
    with pytest.raises(ValueError, match="not an endpoint"):
        names.endpoint("tcp:a")
    assert is_name("localhost") and not is_name("127.0.0.1")


def test_a_head_with_a_name_that_leads_nowhere_is_named(heads: HeadsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    leader = heads.leader()
    host = leader.host
    assert host is not None

    def address_of(endpoint: str) -> str | None:
        raise OSError("head9 can't be looked up: Name or service not known")

    monkeypatch.setattr(host, "address_of", address_of)
    monkeypatch.setattr(host.replica, "wanted", lambda: ["tcp:head9:1"])
    monkeypatch.setattr(host, "endpoints", lambda: (host.endpoint, "tcp:head9:1"))
    heads.settle(2000)
    assert "tcp:head9:1 (head9 can't be looked up: Name or service not known)" in host.why_no_leader()


def test_a_greeting_that_is_cut_short_is_waited_for_and_then_given_up(heads: HeadsWorld, clock: Clock) -> None:
    leader = heads.leader()
    assert leader.reactor is not None
    reactor: Any = make_reactor()
    slow = RawPeer(leader.endpoint)
    for byte in b"FTRY":
        slow.send(bytes([byte]))
        heads.settle(1000)
    assert not slow.is_cut_off()
    heads.settle(leader.reactor.config.handshake_timeout_ms)
    assert slow.is_cut_off() and len(leader.reactor.strangers) == 0
    slow.close()
    reactor.close()
