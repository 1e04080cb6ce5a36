"""What a leader does: takes commands and reads when it may, changes the table step by step, gives the lead away."""

from __future__ import annotations

import zlib
from functools import partial

import msgspec
import pytest
from raft_steps import behind, followers, learner_of, made, short_logs, tell
from raft_world import Disk, Host, World

from ftray.gcs.raft import hand_over as hand_over_module
from ftray.gcs.raft import membership
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.errors import ReplicaRemovedError
from ftray.gcs.raft.hand_over import HandOver
from ftray.gcs.raft.library import Engine
from ftray.gcs.raft.log import MEMBERSHIP
from ftray.gcs.raft.membership import Member
from ftray.gcs.replica import Request
from ftray.gcs.state import commands
from ftray.gcs.state.commands import KvPut, encode_command
from ftray.gcs.state.tables import Code, Result


def elected(world: World, host: Host, voters: int) -> None:
    """That follower leads now, and nothing has reached anybody since."""
    others = [link.peer for link in host.links]
    world.cut(host.endpoint)
    host.engine.observe(host.engine.term + 1)
    assert host.replica is not None and host.replica._elections is not None
    host.replica._elections._granted = True
    host.engine.campaign()
    host.turn()
    for other in others[:voters]:
        tell(host, other, m.Vote(host.engine.term))
    assert host.engine.leads


# --- reads ------------------------------------------------------------------------------------------------------------


def test_a_new_leader_confirms_no_read_before_its_own_term_is_applied() -> None:
    """Whoever answers has not got its entries yet, and what was acknowledged before may not be applied here."""
    world = made()
    host = followers(world)[0]
    elected(world, host, 1)
    reads: list[bool] = []
    assert host.replica is not None
    host.replica.confirm(reads.append)
    host.turn()
    for link in list(host.links):
        tell(host, link.peer, m.Ack(host.engine.term, host.replica.round, 0, False, False))
    assert reads == [] and not host.engine.own_term_applied


def test_a_read_is_confirmed_by_a_majority_and_at_once() -> None:
    world = made(heads=5)
    leader = world.leader()
    reads: list[bool] = []
    assert leader.replica is not None
    began_ms = world.now_ms
    leader.replica.confirm(reads.append)
    leader.turn()
    world.run_until(lambda: bool(reads), 8.0)  # a round trip
    assert reads == [True] and world.now_ms - began_ms < 8.0
    world.cut(leader.endpoint)
    leader.replica.confirm(reads.append)
    leader.turn()
    first, second, *_ = followers(world)
    answer = m.Ack(leader.engine.term, leader.replica.round, leader.engine.last_index + 1, False, True)
    tell(leader, first, answer, answer)
    assert reads == [True], "two of five"
    tell(leader, second, answer)
    assert reads == [True, True]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_who_waits_at_a_leader_that_falls_hears_that_the_outcome_is_not_known() -> None:
    world = made()
    leader = world.leader()
    world.cut(leader.endpoint)
    results = world.put(leader, b"k")
    world.run(150)
    assert results == []
    world.run(1000)
    assert [result.code for result in results] == [Code.NOT_LEADER] and "not known" in results[0].message


def test_what_is_known_or_wrong_is_answered_without_an_entry() -> None:
    world = made()
    leader = world.leader()
    replica = leader.replica
    assert replica is not None
    first = world.put(leader, b"k", b"client", 7)
    world.run_until(lambda: bool(first))
    last = leader.engine.last_index
    again = world.put(leader, b"k", b"client", 7)
    assert again == first
    results: list[Result] = []
    replica.propose(Request(b"c", 1, b"\xc1 no command"), results.append)
    large = encode_command(KvPut("n", b"k", bytes(replica.value_bytes_max + 1)))
    replica.propose(Request(b"c", 2, large), results.append)
    leader.turn()
    assert [result.code for result in results] == [Code.INVALID, Code.TOO_LARGE]
    assert leader.engine.last_index == last


def test_a_leader_that_falls_sends_no_more_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    short_logs(monkeypatch)
    world = made()
    late = behind(world)
    late.start()
    leader = world.leader()
    assert leader.replica is not None
    sender = leader.replica._sender
    world.run_until(lambda: sender._sending)  # type: ignore[arg-type,return-value]
    leader.engine.observe(leader.engine.term + 1)
    leader.turn()
    assert not sender._sending


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_learner_that_has_not_caught_up_gets_no_vote() -> None:
    world = made()
    host = learner_of(world)
    world.run(200)
    replica = world.leader().replica
    assert replica is not None
    member = membership.find(replica.members, host.disk.replica_id)
    assert member is not None and not member.voter


def test_the_next_step_waits_until_the_last_one_is_committed() -> None:
    world = made()
    new = Host(world, "new:1", tuple(world.hosts), Disk(world.new_id()), join=True)
    world.hosts["new:1"] = new
    new.start()
    world.run(100)
    leader = world.leader()
    for other in followers(world):
        if other is not new:
            world.stall(leader.endpoint, other.endpoint)
            world.stall(other.endpoint, leader.endpoint)
    results: list[Result] = []
    assert leader.replica is not None
    leader.replica.add_head(new.disk.replica_id, new.endpoint, results.append)
    leader.turn()
    world.run(250)
    assert leader.engine.match_index(new.disk.replica_id) > leader.engine.commit_index and results == []
    assert not next(each for each in leader.replica.members if each.replica_id == new.disk.replica_id).voter


def test_a_new_leader_changes_nothing_before_its_own_term_is_applied() -> None:
    """It might know less of the table than its predecessor had agreed upon."""
    world = made(heads=4)
    host, other = followers(world)[:2]
    replica = host.replica
    assert replica is not None
    table = [
        Member(each.replica_id, each.endpoint, True, other.disk.replica_id if each.endpoint == host.endpoint else b"")
        for each in replica.members
    ]
    index = host.engine.last_index + 1
    replica._log.add(bytes([MEMBERSHIP]) + membership.encode_table(table), index, host.engine.term)
    host.engine._raft._SyncObj__raftCommitIndex = index
    host.turn()
    assert host.engine.commit_index == index
    elected(world, host, 2)
    assert host.engine.commit_index == index and replica._log.members_index == index
    assert not host.engine.own_term_applied


def test_a_leader_that_is_replaced_lets_the_next_one_remove_it() -> None:
    world = made()
    leader = world.leader()
    term = leader.engine.term
    new = Host(world, "new:1", tuple(world.hosts), Disk(world.new_id()), join=True)
    world.hosts["new:1"] = new
    new.start()
    world.run(100)
    results: list[Result] = []
    assert leader.replica is not None
    leader.replica.add_head(new.disk.replica_id, new.endpoint, results.append, leader.disk.replica_id)
    leader.turn()
    world.run_until(lambda: leader.replica is None)
    assert isinstance(leader.error, ReplicaRemovedError)
    removed = [
        entry_term
        for entry_term, command in world.committed.values()
        if command[:1] == bytes([MEMBERSHIP])
        and membership.find(membership.decode_table(command[1:]), leader.disk.replica_id) is None
    ]
    assert len(removed) == 1 and removed[0] > term
    assert world.now_ms < 5000.0


# --- another one leads ------------------------------------------------------------------------------------------------


def transfer(world: World, to: Host | None = None) -> list[Result]:
    leader, results = world.leader(), list[Result]()
    assert leader.replica is not None
    leader.replica.hand_over(b"" if to is None else to.disk.replica_id, results.append)
    leader.turn()
    return results


@pytest.mark.parametrize("seed", range(6))
def test_the_head_that_is_named_leads(seed: int) -> None:
    world = made(seed, heads=5)
    for _ in range(6):
        target = world.rng.choice(followers(world))
        began_ms, former = world.now_ms, world.leader()
        written = world.put(former, b"written meanwhile")
        results = transfer(world, target)
        assert not former.leads
        world.run_until(partial(bool, results), 100.0)
        assert results[0].ok and target.engine.leads and world.now_ms - began_ms < 30.0
        assert world.leader() is target
        world.run_until(partial(bool, written))
    world.converge()


def test_any_head_leads_if_none_is_named() -> None:
    world = made()
    former = world.leader()
    results = transfer(world)
    world.run_until(lambda: bool(results), 100.0)
    assert results[0].ok and world.leader() is not former
    world.converge()


def test_a_head_that_cannot_lead_is_refused_with_the_reason() -> None:
    world = made(heads=5)
    leader, (down, slow, silent, _) = world.leader(), followers(world)
    learner = learner_of(world)
    down.crash()
    world.run(50)

    def refused(to: bytes) -> str:
        results: list[Result] = []
        assert leader.replica is not None
        leader.replica.hand_over(to, results.append)
        leader.turn()
        assert [result.code for result in results] == [Code.INVALID]
        assert leader.leads
        return results[0].message

    assert "leads already" in refused(leader.disk.replica_id)
    assert f"{down.endpoint} is not connected" in refused(down.disk.replica_id)
    assert "new:1 does not vote yet" in refused(learner.disk.replica_id)
    assert "no replica 78787878" in refused(b"x" * 16)
    silent.freeze()
    world.run(320)
    assert f"{silent.endpoint} has not answered for 3" in refused(silent.disk.replica_id)
    world.stall(slow.endpoint, leader.endpoint)
    for number in range(hand_over_module.BEHIND_MAX + 1):
        leader.replica.propose(  # type: ignore[union-attr]
            Request(b"", 0, encode_command(KvPut("n", b"%d" % number, b""))), lambda result: None
        )
    leader.turn()
    assert f"{slow.endpoint} is 1001 entries behind" in refused(slow.disk.replica_id)


def test_a_follower_refuses_to_give_away_what_it_has_not() -> None:
    world = made()
    results: list[Result] = []
    host = followers(world)[0]
    assert host.replica is not None
    host.replica.hand_over(b"", results.append)
    host.turn()
    assert [result.code for result in results] == [Code.NOT_LEADER]
    lonely = made(heads=1).leader()
    assert lonely.replica is not None
    lonely.replica.hand_over(b"", results.append)
    lonely.turn()
    assert results[1].code is Code.INVALID and "no other head" in results[1].message


def test_a_head_that_does_not_take_over_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It freezes at that moment. The leader goes on, and later it can be another one."""
    world = made()
    steps: list[str] = []
    ask, end = Engine.hand_over, HandOver._end
    monkeypatch.setattr(Engine, "hand_over", lambda engine, peer: (steps.append("asked"), ask(engine, peer))[1])
    monkeypatch.setattr(HandOver, "_end", lambda each, *why: (steps.append("given up"), end(each, *why))[1])
    leader, target = world.leader(), followers(world)[0]
    target.freeze()
    began_ms = world.now_ms
    results = transfer(world, target)
    again = transfer_at(leader)
    world.run_until(lambda: bool(results))
    assert results[0].code is Code.UNAVAILABLE and world.now_ms - began_ms < 1100.0
    assert f"{target.endpoint} did not take over within 1 s" in results[0].message
    assert again[0].code is Code.NOT_LEADER
    assert steps[-1] == "given up" and steps.count("asked") > 1
    assert leader.leads and world.write(b"k") is leader
    # It wakes up and finds what it was asked. Whoever leads then, all goes on.
    target.thaw()
    world.run(500)
    world.write(b"l")
    world.converge()


def transfer_at(host: Host) -> list[Result]:
    results: list[Result] = []
    assert host.replica is not None
    host.replica.hand_over(b"", results.append)
    host.turn()
    return results


def test_a_head_that_has_given_the_lead_away_can_have_it_again() -> None:
    world = made()
    former, results = world.leader(), list[Result]()
    assert former.replica is not None
    former.replica.remove_head(former.disk.replica_id, results.append)  # it hands over first; nobody asks again
    former.turn()
    world.run_until(lambda: any(host.leads and host is not former for host in world.hosts.values()))
    assert results[0].code is Code.NOT_LEADER
    back = transfer(world, former)
    world.run_until(lambda: bool(back))
    assert back[0].ok
    world.run_until(lambda: former.leads, 20.0)
    world.run(500)
    assert world.leader() is former


def test_when_none_is_named_a_frozen_head_is_passed_over() -> None:
    for number in range(2):
        world = made()
        world.run(100)
        followers(world)[number].freeze()
        results = transfer(world)
        world.run_until(partial(bool, results), 300.0)
        assert results[0].ok


def test_who_asked_is_answered_when_nobody_takes_the_lead() -> None:
    world = made()
    leader, target = world.leader(), followers(world)[0]
    results = transfer(world, target)
    world.run_until(lambda: not leader.engine.leads, 50.0)
    target.crash(silently=True)
    for other in followers(world):
        if other is not leader and other.replica is not None:
            other.crash(silently=True)
    assert leader.replica is not None and leader.replica._leading is not None
    assert world.now_ms < leader.replica._leading.next_wake_ms(world.now_ms) <= world.now_ms + 1000.0
    world.run(1200)
    assert [result.code for result in results] == [Code.UNAVAILABLE] and "no other one leads yet" in results[0].message
    # And when the replica ends before.
    world = made()
    results = transfer(world, followers(world)[0])
    replica = next(host.replica for host in world.hosts.values() if host.replica is not None and host.engine.leads)
    replica.close()
    assert [result.code for result in results] == [Code.NOT_LEADER]


def test_a_command_that_an_older_head_cannot_read_is_refused_until_all_are_upgraded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would stop that head, and with it perhaps the majority."""
    world = made()
    tag = KvPut.__struct_config__.tag
    monkeypatch.setitem(commands.EDITIONS, tag, 2)
    monkeypatch.setattr(commands, "EDITION", 2)
    leader, (first, second) = world.leader(), followers(world)

    def put(key: bytes) -> Result:
        results = world.put(world.leader(), key)
        world.run(300)
        return results[0]

    first.crash()
    first.start()
    world.run(300)
    refused = put(b"a")
    assert refused.code is Code.UNAVAILABLE and second.endpoint in refused.message and "newer ftray" in refused.message
    assert first.endpoint not in refused.message and not any(world.has(host, b"a") for host in (leader, first, second))
    second.crash()
    assert put(b"b").code is Code.UNAVAILABLE  # what it can read is what it has said last
    second.start()
    world.run(300)
    assert put(b"c").ok
    world.converge()
    assert not world.stops


def test_each_command_that_is_added_has_an_edition() -> None:
    first = {1, 2, 10, 11, 20, 21, 22, *range(30, 38), 40, *range(50, 58), 90}
    assert set(commands.COMMAND_NAMES) == first | set(commands.EDITIONS)
    assert max(commands.EDITIONS.values(), default=1) == commands.EDITION


def test_a_head_that_says_nothing_of_editions_has_the_first() -> None:
    """And one that does not know them reads the rest of the greeting."""
    hello = m.Hello(m.PEER_VERSION, b"C" * 16, b"x" * 16, "x:1", 1, (), (), 0, True, False, 5, 6, 7)
    body = msgspec.msgpack.decode(m.encode(hello)[4:])
    assert len(body) == 14 and body[-1] == 7  # the last one, so that it can be left out, and skipped
    data = msgspec.msgpack.encode(body[:-1])
    former = m.decode(zlib.crc32(data).to_bytes(4, "little") + data)
    assert isinstance(former, m.Hello) and former.edition == 1 and former.last_index == 6
    data = msgspec.msgpack.encode([*body, "of a later version"])
    assert m.decode(zlib.crc32(data).to_bytes(4, "little") + data) == hello
