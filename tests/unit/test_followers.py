"""Heads that do not lead, over real sockets: what they serve, what they hold back, and what they never say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs_world import JOB, NODE, WORKER, Events, put, register_actor
from heads_world import Head, HeadsWorld
from wire_hosts import Recorder, install_clock, make_reactor

from ftray.gcs import held as held_module
from ftray.gcs.client import BEHIND_MS, NO_LEADER_MS, GcsClient
from ftray.gcs.codec import decode_changes
from ftray.gcs.held import Held
from ftray.gcs.raft import log as raft_log
from ftray.gcs.state import commands as c
from ftray.gcs.state.tables import Change, KvRecord, Table, kv_key
from ftray.wire import messages as m
from ftray.wire.handshake import ROLE_GCS


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeadsWorld]:
    made = HeadsWorld(tmp_path, install_clock(monkeypatch))
    yield made
    made.close()


class Raw:
    """A link to one head that stays there, and on which single messages are sent."""

    def __init__(self, world: HeadsWorld, head: Head, node_id: bytes = b"") -> None:
        self.world = world
        self.reactor = make_reactor(name="raw")
        world.client_reactors.append(self.reactor)
        self.told = Recorder()
        self.link = self.reactor.connect(head.endpoint, ROLE_GCS, self.told)
        self.say(m.GcsHello(b"raw", node_id))

    def say(self, message: m.Message) -> None:
        self.link.send(message)
        self.world.settle()

    def of(self, kind: type[m.Message]) -> list[tuple[Any, bytes]]:
        return [each for each in zip(self.told.messages, self.told.payloads) if isinstance(each[0], kind)]

    def rows(self, request: int) -> dict[bytes, bytes | None]:
        """What was answered; fails if nothing was."""
        [payload] = [payload for message, payload in self.of(m.GcsResult) if message.request == request]
        return {row.key: row.record.value if isinstance(row.record, KvRecord) else None
                for row in decode_changes(payload)[1]}  # fmt: skip

    def changes(self) -> list[tuple[bytes, bytes | None]]:
        return [
            (change.key, change.record.value if isinstance(change.record, KvRecord) else None)
            for _, payload in self.of(m.GcsChanges)
            for change in decode_changes(payload)[1]
        ]


def key(name: bytes) -> bytes:
    return kv_key("ns", name)


def begin(world: HeadsWorld) -> tuple[GcsClient, Head, list[Head]]:
    """A client that has written `a`, which all heads have; the leader; and the others."""
    world.start()
    leader = world.leader()
    client = world.client()
    assert world.run(client, put(b"a", b"1")).ok
    world.until(lambda: all(head.host and head.host.replica.state.kv_get("ns", b"a") for head in world.heads))
    return client, leader, [head for head in world.heads if head is not leader]


def cut_off(head: Head) -> None:
    """What is under way to it is lost."""
    assert head.host is not None and head.reactor is not None
    for link in list(head.host._links):
        head.reactor.drop(link, "cut off")


def status(head: Head) -> dict[str, Any]:
    assert head.host is not None
    return head.host.server.status()


def test_the_last_head_serves_watches_and_cached_reads_and_the_rest_waits(world: HeadsWorld) -> None:
    client, leader, (other, last) = begin(world)
    told: list[Change] = []
    watch = client.watch([Table.KV], [key(b"a")], told.append)
    world.until(lambda: told)
    leader.kill()
    other.kill()
    events = Events()
    client.read(Table.KV, key(b"a"), events.note("cached"), cached=True)
    client.read(Table.KV, key(b"a"), events.note("immutable"), wait=True, immutable=True)
    client.read_all(Table.KV, events.note("all"), cached=True)
    client.read(Table.KV, key(b"a"), events.note("fresh"))
    client.command(put(b"b"), events.note("result"))
    world.until(lambda: len(events) == 3)
    assert client.served_by == last.endpoint and not client.connected
    assert events.of("cached")[0].value == events.of("immutable")[0].value == b"1"
    assert list(events.of("all")[0]) == [key(b"a")]
    more: list[Change] = []
    client.watch([Table.KV], [key(b"a")], more.append)
    world.until(lambda: more)
    assert more[0].record == told[0].record
    link = client._links.link
    world.settle(10 * NO_LEADER_MS)
    assert client._links.link is link  # it is not left while nobody else answers
    assert len(events) == 3
    text = str(client.unavailable())
    assert f"{last.endpoint}: it answers, but there is no leader: that takes 2 heads of 3" in text
    assert all(f"{head.endpoint}: cannot connect" in text or f"{head.endpoint}: [Errno" in text
               for head in (leader, other)), text  # fmt: skip
    assert status(last)["reads_following"] >= 3 and status(last)["tellings_following"] >= 1
    other.start(world.endpoints)
    world.until(lambda: events.of("result") and events.of("fresh"))
    assert events.of("result")[0].ok and client.connected
    client.add_watch_key(watch, key(b"b"))
    world.until(lambda: any(change.key == key(b"b") for change in told))


def test_a_follower_that_is_behind_holds_what_it_is_asked(world: HeadsWorld) -> None:
    client, leader, (other, late) = begin(world)
    late.frozen = True
    cut_off(late)
    assert world.run(client, put(b"a", b"2")).ok
    leader.kill()
    other.kill()
    late.frozen = False
    events = Events()
    client.read(Table.KV, key(b"a"), events.note("cached"), cached=True)
    client.read(Table.KV, key(b"a"), events.note("immutable"), immutable=True)
    told: list[Change] = []
    client.watch([Table.KV], None, told.append)
    world.until(lambda: events)
    assert events.of("immutable")[0].value == b"1"  # as the caller wanted it: whoever has it
    assert status(late)["held"] == 2
    first = client._links.link
    world.until(lambda: client._links.link is not first, 2 * BEHIND_MS)
    world.settle(3 * BEHIND_MS)
    assert not events.of("cached") and not told
    assert "behind" in str(client.failures) or client.served_by == late.endpoint
    other.start(world.endpoints)
    world.until(lambda: events.of("cached") and told)
    assert events.of("cached")[0].value == b"2"
    assert [change.record.value for change in told if isinstance(change.record, KvRecord)] == [b"2"]
    assert status(late)["held"] == 0


def test_a_follower_has_what_was_acknowledged_without_any_time_passing(world: HeadsWorld) -> None:
    client, _, followers = begin(world)
    for number in range(5):
        results = Events()
        client.command(put(b"n%d" % number), results.note("result"))
        before_s = world.clock.now_s
        world.settle()
        assert results.of("result") and world.clock.now_s == before_s
        for follower in followers:
            assert follower.host is not None and follower.host.replica.state.revision == client.seen


def test_what_is_held_is_answered_in_order_when_the_head_gets_there_and_goes_with_its_link(world: HeadsWorld) -> None:
    client, _, (_, late) = begin(world)
    assert late.host is not None
    seen = client.seen
    raw, gone = Raw(world, late), Raw(world, late)
    raw.say(m.GcsWatch(("kv",), seen, (), seen + 2))
    raw.say(m.GcsRead(1, "kv", key(b"b"), cached=True, seen=seen + 2))
    raw.say(m.GcsRead(2, "kv", key(b"a"), cached=True, seen=seen + 1))
    gone.say(m.GcsRead(3, "kv", key(b"a"), cached=True, seen=seen + 1))
    assert status(late)["held"] == 4
    gone.link.close("away")
    world.settle()
    assert status(late)["held"] == 3
    assert world.run(client, put(b"a", b"2")).ok
    world.until(lambda: raw.of(m.GcsResult))
    assert raw.rows(2) == {key(b"a"): b"2"} and not raw.of(m.GcsChanges)
    assert world.run(client, put(b"b", b"3")).ok
    world.until(lambda: len(raw.of(m.GcsResult)) == 2)
    assert raw.rows(1) == {key(b"b"): b"3"}
    assert raw.changes() == [(key(b"a"), b"2"), (key(b"b"), b"3")]
    kinds = [type(each) for each in raw.told.messages]
    assert kinds.index(m.GcsChanges) < len(kinds) - 1 - kinds[::-1].index(m.GcsResult)
    assert status(late)["held"] == 0


def test_a_follower_does_not_say_that_something_is_not_there(world: HeadsWorld) -> None:
    client, leader, (follower, other) = begin(world)
    raw = Raw(world, follower)
    raw.say(m.GcsWatch((), -1, (("kv", key(b"no")), ("kv", key(b"a")), ("kv", key(b"later")))))
    raw.say(m.GcsRead(1, "kv", key(b"no"), cached=True))
    raw.say(m.GcsRead(2, "kv", key(b"later"), wait=True, cached=True))
    assert raw.changes() == [(key(b"a"), b"1")] and not raw.of(m.GcsResult)
    assert world.run(client, put(b"later", b"x")).ok
    world.until(lambda: raw.of(m.GcsResult))
    assert raw.rows(2) == {key(b"later"): b"x"}
    assert raw.changes() == [(key(b"a"), b"1"), (key(b"later"), b"x")]
    # When it leads it is sure, and says so to the watcher; reads are asked anew.
    other.frozen = True
    world.settle()
    leader.kill()
    world.settle(600)
    assert not follower.leads
    other.frozen = False
    world.until(lambda: follower.leads or other.leads)
    if other.leads:
        assert other.host is not None
        other.host.replica.hand_over()
        other.host.server.wake()
        world.until(lambda: follower.leads)
    world.until(lambda: (key(b"no"), None) in raw.changes())
    assert isinstance(raw.told.messages[0], m.GcsFollower)
    assert isinstance([each for each in raw.told.messages if not isinstance(each, m.GcsChanges)][-1], m.GcsHeads)
    raw.say(m.GcsRead(3, "kv", key(b"no"), cached=True))
    world.until(lambda: [each for each, _ in raw.of(m.GcsResult) if each.request == 3])
    assert raw.rows(3) == {key(b"no"): None}


def test_a_stale_leader_does_not_say_so_either(world: HeadsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    client, leader, _ = begin(world)
    assert leader.host is not None
    raw = Raw(world, leader)
    hearing = leader.host.replica.link_message
    monkeypatch.setattr(leader.host.replica, "link_message", lambda link, data: None)  # it is cut off
    raw.say(m.GcsWatch((), -1, (("kv", key(b"a")), ("kv", key(b"no")))))
    raw.say(m.GcsRead(1, "kv", key(b"a"), cached=True))
    raw.say(m.GcsRead(2, "kv", key(b"no"), cached=True))
    world.settle(1000)
    assert raw.changes() == [(key(b"a"), b"1")]
    assert [message.request for message, _ in raw.of(m.GcsResult)] == [1]
    assert isinstance(raw.told.messages[-1], m.GcsFollower)
    monkeypatch.setattr(leader.host.replica, "link_message", hearing)
    world.until(lambda: any(head.leads for head in world.heads))
    assert world.run(client, put(b"no", b"yes")).ok
    world.until(lambda: len(raw.of(m.GcsResult)) == 2)
    assert raw.rows(2) == {key(b"no"): b"yes"}
    assert raw.changes() == [(key(b"a"), b"1"), (key(b"no"), b"yes")]


def test_a_head_that_begins_to_lead_serves_its_clients_on_the_link_that_they_have(
    world: HeadsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, leader, (winner, other) = begin(world)
    assert winner.host is not None and other.host is not None
    engine = other.host.replica._engine
    assert engine is not None
    monkeypatch.setattr(other.host.replica._elections, "plan", lambda now_ms: engine.postpone())
    events = Events()
    client = world.client([winner.endpoint], events=events)
    told: list[Change] = []
    client.watch([Table.KV], None, told.append)
    leader.frozen = True
    client._links._failed_ms[leader.endpoint] = world.clock.now_s * 1000.0  # so it is not looked for there
    world.until(lambda: told)
    client.command(put(b"b"), events.note("result"))
    link = client._links.link
    world.until(lambda: events.of("result"))
    assert winner.leads and client._links.link is link
    assert events.of("connected") == [True, False, True]
    world.until(lambda: len(told) == 2)
    leader.kill()


def test_a_client_is_served_by_a_follower_until_the_leader_answers(world: HeadsWorld) -> None:
    _, leader, (follower, _) = begin(world)
    leader_accepts = leader.host
    assert leader_accepts is not None
    client = world.client([follower.endpoint])
    told: list[Change] = []
    client.watch([Table.KV], None, told.append)
    world.until(lambda: client.connected)
    assert client.served_by == leader.endpoint
    assert [change.key for change in told].count(key(b"a")) == 1
    assert world.run(client, put(b"b")).ok
    world.until(lambda: len(told) == 2)


def test_a_snapshot_at_a_follower_reaches_those_who_watch_and_wait_there(
    world: HeadsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raft_log, "KEEP_ENTRIES", 0)
    monkeypatch.setattr(raft_log, "KEEP_BYTES", 0)
    client, leader, (_, late) = begin(world)
    assert late.host is not None
    raw = Raw(world, late)
    raw.say(m.GcsWatch(("kv",), -1))
    raw.say(m.GcsRead(1, "kv", key(b"new"), wait=True, cached=True))
    raw.say(m.GcsWatch((), -1, (("nodes", b"none"),)))
    held = client.seen + 1
    raw.say(m.GcsRead(2, "kv", key(b"a"), cached=True, seen=held))
    late.frozen = True
    for name in (b"new", b"more"):
        assert world.run(client, put(name, b"n")).ok
    assert world.run(client, c.KvDelete("ns", b"a")).ok
    for head in world.heads:
        if head is not late and head.host is not None:
            head.host.replica.compact()
    cut_off(late)
    late.frozen = False
    snapshots = late.host.server.watchers.snapshots
    before = len(raw.of(m.GcsChanges))
    world.until(lambda: late.host and late.host.replica.state.revision == client.seen)
    world.settle()
    assert late.host.server.watchers.snapshots == snapshots + 1
    assert raw.rows(1) == {key(b"new"): b"n"}
    message, payload = raw.of(m.GcsChanges)[before]
    whole, rows = decode_changes(payload)
    assert message.snapshot and whole == [Table.KV]
    assert sorted(row.key for row in rows) == [key(b"more"), key(b"new")]  # so `a` is gone
    assert not [each for each, _ in raw.of(m.GcsResult) if each.request == 2]  # that it is gone only a leader says
    assert status(late)["held"] == 0
    raw.told.messages.clear()
    raw.told.payloads.clear()
    assert world.run(client, put(b"after", b"z")).ok
    world.until(lambda: raw.changes() == [(key(b"after"), b"z")])
    assert leader.leads


def test_a_head_that_begins_to_lead_says_so_before_it_asks_anything_of_a_raylet(world: HeadsWorld) -> None:
    client, leader, followers = begin(world)
    assert world.run(client, c.RegisterNode(NODE, "tcp:127.0.0.1:9", {"CPU": 1.0}, {}, 1, "host", 1)).ok
    assert world.run(client, c.AddJob(JOB, WORKER, 2, NODE, "main.py", "")).ok
    raylets = [Raw(world, head, NODE) for head in followers]
    assert world.run(client, register_actor()).ok  # the leader has no link to the raylet
    leader.kill()
    world.until(lambda: any(raw.of(m.StartActor) for raw in raylets))
    told = [[type(each) for each in raw.told.messages] for raw in raylets]
    assert any(kinds[kinds.index(m.GcsHeads):].count(m.StartActor) for kinds in told if m.GcsHeads in kinds)
    assert all(m.StartActor not in kinds[: kinds.index(m.GcsHeads)] for kinds in told if m.GcsHeads in kinds)


def test_a_head_that_knows_nothing_yet_serves_nobody(world: HeadsWorld) -> None:
    world.heads[0].start(world.endpoints)
    world.settle()
    raw = Raw(world, world.heads[0])
    raw.say(m.GcsWatch(("kv",), -1))
    raw.say(m.GcsRead(1, "nodes", all=True, cached=True, seen=0))
    assert [type(each) for each in raw.told.messages] == [m.GcsFollower]
    assert raw.told.messages[0].revision == -1  # type: ignore[attr-defined]
    for head in world.heads[1:]:
        head.start(world.endpoints)
    world.leader()
    assert world.run(world.client(), put(b"k", b"v")).ok
    world.until(lambda: raw.changes() == [(key(b"k"), b"v")] and raw.of(m.GcsResult))


def test_what_a_client_sends_a_follower_wrongly_costs_its_link(world: HeadsWorld) -> None:
    _, _, (follower, _) = begin(world)
    for wrong in (m.GcsWatch(("nonsense",)), m.GcsRead(1, "nonsense", cached=True), m.NodeFenced("from a client")):
        raw = Raw(world, follower)
        raw.say(wrong)
        world.until(lambda raw=raw: raw.told.closed)
    assert world.run(world.client(), put(b"k")).ok


def test_too_many_questions_that_wait_cost_the_link(world: HeadsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "HELD_MAX", 10)
    client, _, (follower, _) = begin(world)
    raw = Raw(world, follower)
    for number in range(11):
        raw.say(m.GcsRead(number, "kv", key(b"a"), cached=True, seen=client.seen + 100))
    assert raw.told.closed and status(follower)["held"] == 0


def test_held_questions_are_taken_in_order_and_forgotten_with_their_link() -> None:
    held: Held[str, int] = Held()
    for number, (seen, link) in enumerate([(5, "a"), (3, "b"), (5, "b"), (3, "a"), (9, "a")]):
        assert held.add(seen, link, number)
    assert held.take(2) == []
    assert held.take(5) == [("b", 1), ("a", 3), ("a", 0), ("b", 2)]
    held.forget("b")
    held.forget("a")
    assert len(held) == 0 and held.take(100) == []
