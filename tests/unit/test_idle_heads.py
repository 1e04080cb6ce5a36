"""What heads do that have nothing to do: exact counts in virtual time, so that it can't creep up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ftray.config import Config
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.idle import ANSWER_EACH
from ftray.gcs.raft.library import Engine
from ftray.gcs.raft_host import RaftHost
from ftray.gcs.server import GcsServer
from ftray.sim.heads import Head
from ftray.sim.world import Options, World

SECONDS = 10
APPENDS = 34
"""A second, to each follower: one every 30 ms."""
ANSWERS = APPENDS / ANSWER_EACH


class Cluster:
    """Three simulated heads without faults and clients, and what each of them does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.world = World(3, Options(clients=0, schedule=()))
        for head in self.world.heads:
            head.config = Config()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._count(patch, GcsServer, "_turn", lambda server: server.heads.endpoint)
        self._count(patch, RaftHost, "on_message", lambda host: host.endpoint)
        self._count(patch, RaftHost, "_look", lambda host: host.endpoint)
        self._count(patch, Engine, "tick", lambda engine: engine._raft._ftray_owner.endpoint)
        for head in self.world.heads:
            head.run()

    def _count(self, patch: pytest.MonkeyPatch, kind: type, name: str, who: Callable[[Any], str]) -> None:
        real = getattr(kind, name)

        def counted(each: Any, *arguments: Any) -> Any:
            self.counts[name, who(each)] += 1
            return real(each, *arguments)

        patch.setattr(kind, name, counted)

    def until_led(self) -> Head:
        """Until one leads and has told the others."""
        world = self.world
        assert world._run(10_000.0, lambda: any(head.leads for head in world.heads))
        world._run(1_000.0, None)
        return world.leader_or(-1)

    def rest(self, seconds: float) -> None:
        """Counts what is done in that time."""
        self.counts.clear()
        for head in self.world.heads:
            head.disk.syncs = 0
        self.world._run(seconds * 1000.0, None)
        assert not self.world.problems and not self.world.errors


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_idle_heads_do_next_to_nothing(cluster: Cluster) -> None:
    leader = cluster.until_led()
    term = leader.engine.term
    cluster.rest(SECONDS)
    assert leader.leads and leader.engine.term == term
    for head in cluster.world.heads:
        done = {what: cluster.counts[what, head.name] / SECONDS for what in ("_turn", "tick", "on_message", "_look")}
        messages = 2 * ANSWERS if head is leader else APPENDS
        assert messages * 0.9 <= done["on_message"] <= messages, (head.name, done)
        # The nodes are looked at five times a second; and a timer is not put off, so that some come too early.
        assert done["_turn"] <= 8 and done["tick"] <= 8, (head.name, done)
        assert done["_look"] <= 1.1, (head.name, done)
        assert head.disk.syncs == 0, head.name


def test_a_leader_that_falls_silent_is_noticed_as_soon_as_ever(cluster: Cluster) -> None:
    """The short way postpones elections as the library does, and no more."""
    leader = cluster.until_led()
    cluster.rest(2)
    leader.freeze()
    froze_ms = cluster.world.sim.now_ms
    others = [head for head in cluster.world.heads if head is not leader]
    assert cluster.world._run(2_000.0, lambda: any(head.leads for head in others))
    assert 150.0 <= cluster.world.sim.now_ms - froze_ms <= 500.0


def test_a_leader_that_hears_nobody_steps_down(cluster: Cluster) -> None:
    """Signs of life without a turn do not outlast the majority."""
    leader = cluster.until_led()
    cluster.rest(2)
    for head in cluster.world.heads:
        if head is not leader:
            head.freeze()
    assert cluster.world._run(600.0, lambda: not leader.leads)


def test_only_what_is_known_already_takes_the_short_way(cluster: Cluster) -> None:
    leader = cluster.until_led()
    cluster.rest(1)
    replica, engine = leader.replica, leader.engine
    follower = next(head for head in cluster.world.heads if head is not leader)
    idle = follower.replica._idle
    hello = follower.replica._peers.sender(follower.replica._peers.link_to(leader.replica_id))
    term, last, last_term = engine.term, engine.last_index, engine.last_term
    same = m.Append(term, 0, last, last, last_term, ())
    answer = m.Ack(term, 0, last + 1, False, True)
    answers = [idle.answer(hello, same) for _ in range(2 * ANSWER_EACH)]
    assert answers.count(answer) == 2 and answers.count(True) == 2 * (ANSWER_EACH - 1)  # one of several
    assert idle.answer(hello, m.Append(term, 1, last, last, last_term, ())) == m.Ack(term, 1, last + 1, False, True)
    assert idle.answer(hello, same) == answer  # nothing is as it was said last
    for other in (
        m.Append(term + 1, 0, last, last, last_term, ()), m.Append(term, 0, last + 1, last, last_term, ()),
        m.Append(term, 0, last, last - 1, last_term, ()), m.Append(term, 0, last, last, last_term - 1, ()),
        m.Append(term, 0, last, last, last_term, ((b"\x01", last + 1, term),)), m.Ping(term, 0),
    ):  # fmt: skip
        assert idle.answer(hello, other) is None, other
    third = next(head for head in cluster.world.heads if head not in (leader, follower))
    stranger = third.replica._peers.sender(third.replica._peers.link_to(follower.replica_id))
    assert idle.answer(stranger, same) is None  # it is not the leader
    assert idle.answer(None, same) is None

    said = m.Ack(engine.term, 0, last + 1, False, True)
    known = replica._peers.sender(replica._peers.link_to(follower.replica_id))
    assert replica._idle.answer(known, said) is True
    for news in (
        m.Ack(engine.term + 1, 0, last + 1, False, True), m.Ack(engine.term, 1, last + 1, False, True),
        m.Ack(engine.term, 0, last, False, True), m.Ack(engine.term, 0, last + 1, True, True),
        m.Ack(engine.term, 0, last + 1, False, False),
    ):  # fmt: skip
        assert replica._idle.answer(known, news) is None, news


def test_nothing_overtakes_what_waits_for_a_turn_or_for_the_disk(cluster: Cluster) -> None:
    leader = cluster.until_led()
    cluster.rest(1)
    replica, engine = leader.replica, leader.engine
    follower = next(head for head in cluster.world.heads if head is not leader)
    follows = follower.replica
    link = follows._peers.link_to(leader.replica_id)
    last = engine.last_index
    same = m.encode(m.Append(engine.term, 0, last, last, engine.last_term, ()))

    def takes_a_turn() -> bool:
        took = [follows.link_message(link, same) for _ in range(ANSWER_EACH)]
        assert len(set(took)) == 1
        follows._inbound.clear()
        return took[0]

    assert not takes_a_turn()
    follows._inbound.append((link, m.Ping(engine.term, 0)))
    assert takes_a_turn()
    follows._outbox.append((link, same, ""))
    assert takes_a_turn()
    follows._outbox.clear()
    follows._stalled_ms = 0.0
    assert takes_a_turn()
    follows._stalled_ms = None
    follows._log.setCurrentTerm(engine.term, "another")
    assert takes_a_turn()
    follows._log.sync()
    assert not takes_a_turn()

    def beats() -> bool:
        engine._raft._SyncObj__newAppendEntriesTime = 0.0  # it is time
        return replica.beat()

    assert beats()
    for name, value in (("_inbound", [(link, m.Ping(1, 0))]), ("_outbox", [(link, same, "")]), ("_stalled_ms", 0.0)):
        before = getattr(replica, name)
        setattr(replica, name, value)
        assert not beats(), name
        setattr(replica, name, before)
    vote = replica._log.vote
    replica._log.setCurrentTerm(engine.term, "another")
    assert not beats()
    replica._log.setCurrentTerm(engine.term, vote)
    replica._log.sync()
    for wait in (
        lambda: replica.confirm(lambda fresh: None), lambda: replica._desk.wait(last, engine.term, lambda result: None),
        lambda: replica.hand_over(), lambda: replica._saving.compactor.begin(),
    ):  # fmt: skip
        assert beats()
        wait()
        assert not beats()
        replica._desk.reads.clear()
        replica._desk._waiting.clear()
        replica._desk.hand_overs.clear()
    replica._saving.give_up()
    assert beats()


def test_a_leader_that_has_something_to_do_takes_a_turn(cluster: Cluster) -> None:
    leader = cluster.until_led()
    cluster.rest(1)
    replica, engine, raft = leader.replica, leader.engine, leader.engine._raft
    peers = [head.replica_id for head in cluster.world.heads if head is not leader]
    nodes = [engine.node(peer) for peer in peers]

    def beats() -> bool:
        raft._SyncObj__newAppendEntriesTime = 0.0
        return replica.beat()

    assert beats()
    raft._SyncObj__lastResponseTime[nodes[0]] -= 1.0
    assert beats()  # a majority is heard
    raft._SyncObj__lastResponseTime[nodes[1]] -= 1.0
    assert not beats()  # it steps down
    for node in nodes:
        raft._SyncObj__lastResponseTime[node] += 1.0
    for name in ("raftNextIndex", "raftMatchIndex"):
        indexes = getattr(raft, f"_SyncObj__{name}")
        indexes[nodes[0]] -= 1
        assert not beats(), name  # that one lacks something
        indexes[nodes[0]] += 1
    for name in ("raftCommitIndex", "raftLastApplied"):
        setattr(raft, f"_SyncObj__{name}", engine.last_index - 1)
        assert not beats(), name
        setattr(raft, f"_SyncObj__{name}", engine.last_index)
    assert beats()

    known = replica._peers.sender(replica._peers.link_to(peers[0]))
    said = m.Ack(engine.term, 0, engine.last_index + 1, False, True)
    assert replica._idle.answer(known, said) is True
    replica._sender._sending[peers[0]] = None  # it has the snapshot that is on its way to it
    assert replica._idle.answer(known, said) is None
