"""Terms, votes, promises and acknowledgements.

Each of these tests was seen to fail without what it is about; see docs/raft.md.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from raft_steps import A, again, compact, followers, learner_of, made, raft_log, tell
from raft_world import Disk, Host, World

from ftray.gcs.raft import messages as m
from ftray.gcs.raft.log import Snapshot

# --- terms, votes, acknowledgements -----------------------------------------------------------------------------------


def test_term_and_vote_survive_a_restart() -> None:
    """And a compaction, and a snapshot from the leader."""
    log = raft_log(5)
    log.setCurrentTerm(7, "a")
    log.sync()
    assert (again(log).term, again(log).vote) == (7, "a")
    log.setCurrentTerm(7, "b")
    log.sync()
    assert again(log).vote == "b"
    log.setRaftCommitIndex(3)
    compact(log, 3)
    after = again(log)
    assert (after.term, after.vote, after[-1][1]) == (7, "b", 5)
    body = Snapshot((A,), 0, b"later")
    log.install(body, msgspec.msgpack.encode(body), 20, 7)
    after = again(log)
    assert (after.term, after.vote, after[-1][1], after.commit) == (7, "b", 20, 20)


def test_a_head_that_restarts_goes_on_in_its_term() -> None:
    world = made()
    for host in world.hosts.values():
        host.engine.observe(50)
    world.run_until(lambda: any(host.leads for host in world.hosts.values()))
    terms = {host.endpoint: host.engine.term for host in world.hosts.values()}
    assert min(terms.values()) >= 50
    for host in world.hosts.values():
        host.crash()
    for host in world.hosts.values():
        host.start()
        assert host.engine.term >= terms[host.endpoint]


def test_only_the_terms_own_votes_count() -> None:
    world = made(heads=5)
    host = followers(world)[0]
    others = [link.peer for link in host.links]
    world.cut(host.endpoint)
    host.engine.observe(host.engine.term + 10)
    assert host.replica is not None and host.replica._elections is not None
    host.replica._elections._granted = True
    host.engine.campaign()
    host.turn()
    for other in others:
        tell(host, other, m.Vote(host.engine.term - 1))
    assert not host.engine.leads
    assert not host.replica._elections.first_vote(b"no voter")
    for other in others[:2]:
        tell(host, other, m.Vote(host.engine.term))
    assert host.engine.leads


def test_an_acknowledgement_says_no_more_than_it_can() -> None:
    world = made()
    leader, follower = world.leader(), followers(world)[0]
    assert leader.replica is not None and leader.replica._leading is not None
    term, last = leader.engine.term, leader.engine.last_index
    tell(leader, follower, m.Ack(term, 0, last + 1000, False, True))
    assert leader.engine.match_index(follower.disk.replica_id) == last
    leader.replica._leading.on_ack(b"no member", m.Ack(term, 99, last, True, True), world.now_ms)
    assert b"no member" not in leader.replica._leading._rounds


def test_whoever_answers_is_there() -> None:
    """A leader that sends a snapshot gets no acknowledgements of entries for a while, and stays leader."""
    world = made()
    leader, follower = world.leader(), followers(world)[0]
    world.cut(leader.endpoint)
    world.run(200)
    peer = follower.disk.replica_id
    assert leader.engine.heard_ms(peer) < world.now_ms - 150.0
    tell(leader, follower, m.Ack(leader.engine.term, 0, 0, False, False))
    assert leader.engine.heard_ms(peer) == pytest.approx(world.now_ms)
    said = tell(follower, leader, m.Ping(leader.engine.term, 12))
    assert m.Ack(leader.engine.term, 12, 0, False, False) in said


def test_a_head_that_is_no_member_is_not_heard() -> None:
    world = made()
    guest = Host(world, "new:1", tuple(world.hosts), Disk(world.new_id()), join=True)
    world.hosts["new:1"] = guest
    guest.start()
    world.run(100)
    leader = world.leader()
    term = leader.engine.term
    tell(leader, guest, m.VoteRequest(term + 10, 1 << 40, term + 9))
    assert leader.engine.term == term and leader.leads


def test_a_later_term_is_begun_without_vote_and_leader() -> None:
    world = made()
    for host in world.hosts.values():
        term = host.engine.term
        host.engine.observe(term + 5)
        assert (host.engine.term, host.engine.leader, host.engine.leads) == (term + 5, None, False)
        assert host.replica is not None and host.replica._log.vote is None


# --- pre-votes --------------------------------------------------------------------------------------------------------


def test_a_promise_is_given_to_who_could_lead_and_costs_nothing() -> None:
    world = made()
    leader, (host, other) = world.leader(), followers(world)
    world.write(b"k")
    world.run(100)
    term, last, last_term = host.engine.term, host.engine.last_index, host.engine.last_term

    def promises(ask_term: int, index: int, index_term: int) -> bool:
        before = (host.engine.term, host.replica._log.vote, host.engine.leader)  # type: ignore[union-attr]
        said = tell(host, other, m.PreVoteRequest(ask_term, index, index_term, 77))
        answers = [message for message in said if isinstance(message, m.PreVote)]
        assert len(answers) == 1 and answers[0].attempt == 77 and answers[0].term == term
        assert before == (host.engine.term, host.replica._log.vote, host.engine.leader)  # type: ignore[union-attr]
        return answers[0].granted

    assert not promises(term, last, last_term), "it hears a leader"
    assert not promises(term + 9, last + 9, term + 8), "whatever the term"
    leader.freeze()
    world.cut(host.endpoint)
    world.run(220)
    assert host.engine.term == term
    assert promises(term, last, last_term)
    assert promises(term, last + 1, last_term)
    assert promises(term, last - 1, last_term + 1)
    assert not promises(term - 1, last, last_term)
    assert not promises(term, last - 1, last_term)
    assert not promises(term, last + 9, last_term - 1)


def test_half_of_the_heads_are_no_majority() -> None:
    world = made(heads=4)
    leader = world.leader()
    pair = followers(world)[:2]
    term = leader.engine.term
    for host in world.hosts.values():
        if host not in pair:
            for each in pair:
                world.stall(host.endpoint, each.endpoint)
                world.stall(each.endpoint, host.endpoint)
    world.run(3000)
    assert [host.engine.term for host in pair] == [term, term]


def test_promises_count_that_were_given_now_by_voters() -> None:
    world = made(heads=5)
    host = followers(world)[0]
    others = [link.peer for link in host.links]
    world.cut(host.endpoint)
    world.run(1000)
    assert host.replica is not None and host.replica._elections is not None
    elections = host.replica._elections
    world.run_until(lambda: elections._promises == set())
    term, attempt = host.engine.term, elections._attempt
    tell(host, others[0], m.PreVote(term, attempt - 1, True), m.PreVote(term, attempt, False))
    assert elections._promises == set()
    elections.on_answer(b"no voter", m.PreVote(term, attempt, True), world.now_ms)
    assert elections._promises == set()
    tell(host, others[0], m.PreVote(term, attempt, True), m.PreVote(term, attempt, True))
    assert elections._promises == {others[0].disk.replica_id} and host.engine.term == term
    # A leader that is heard makes them void, and so does a later term.
    tell(host, others[1], m.Ping(term, 0))
    assert elections._promises is None
    elections._promises, elections._asked_term = set(), term
    host.engine.observe(term + 1)
    for other in others:
        elections.on_answer(other.disk.replica_id, m.PreVote(term, attempt, True), world.now_ms)
    assert not elections._granted
    elections._asked_term = term + 1
    for other in others[:2]:
        elections.on_answer(other.disk.replica_id, m.PreVote(term + 1, attempt, True), world.now_ms)
    assert elections._granted
    elections.lost_leader(world.now_ms)
    elections.heard_leader(world.now_ms)
    assert not elections._granted and elections.next_wake_ms() == float("inf")


def test_a_term_that_was_missed_is_taken_over_by_those_without_a_leader_only() -> None:
    world = made()
    host, other = followers(world)
    term = host.engine.term
    tell(host, other, m.PreVote(term + 5, 1, False))
    assert host.engine.term == term, "it hears a leader"
    world.leader().freeze()
    world.cut(host.endpoint)
    world.run(1000)
    tell(host, other, m.PreVote(term + 5, 1, False))
    assert host.engine.term == term + 5


def questions(world: World, ms: float) -> list[str]:
    """Who asks for promises meanwhile."""
    asks: list[str] = []
    send = Host.send

    def noted(host: Host, link: Any, data: bytes) -> None:
        if isinstance(m.decode(data), m.PreVoteRequest):
            asks.append(host.endpoint)
        send(host, link, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Host, "send", noted)
        world.run(ms)
    return asks


def test_nobody_asks_for_promises_while_there_is_a_leader() -> None:
    assert questions(made(), 3000.0) == []


def test_a_learner_votes_when_asked_and_never_campaigns() -> None:
    """Who asks may know that it has become a voter."""
    world = made()
    host = learner_of(world)
    leader = world.leader()
    term = leader.engine.term
    tell(host, leader, m.TimeoutNow(term))
    assert not host.engine.handing_over
    for each in list(world.hosts.values()):
        if each is not host:
            each.crash(silently=True)
    said = tell(host, leader, m.VoteRequest(term + 1, 1 << 40, term))
    assert m.Vote(term + 1) in said
    asks = questions(world, 3000.0)
    assert asks == [] and host.engine.term == term + 1 and not host.engine.leads
