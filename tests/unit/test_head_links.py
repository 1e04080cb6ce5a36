"""A client's way to the heads: who is asked, when the link changes, and what must not get lost or doubled meanwhile.

Heads here say what the test has them say, over real sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs_world import CLIENT, Events, put
from heads_world import Head, HeadsWorld
from wire_hosts import Clock, install_clock, make_reactor, settle

from ftray.gcs.client import SILENCE_MS, GcsClient
from ftray.gcs.codec import encode_change, encode_result, join_changes
from ftray.gcs.raft.library import BATCH_BYTES
from ftray.gcs.state.tables import Change, Code, KvRecord, Result, Table, kv_key
from ftray.wire import messages as m
from ftray.wire.head_messages import GcsFollower, GcsHeads, GcsPing
from ftray.wire.reactor import Link

STEP_MS = 5.0


class Scripted:
    """A head that answers a greeting with `role`, pings if it is `awake`, and nothing else by itself."""

    def __init__(self, world: Play, name: str) -> None:
        self.endpoint = f"unix:{world.path}/{name}"
        self.role: m.Message | None = None
        self.awake = True
        self.links: list[Link] = []
        self.heard: list[tuple[Link, Any, bytes]] = []
        self.closed: list[Link] = []
        self.reactor = make_reactor(name=name)
        world.reactors.append(self.reactor)
        self.reactor.listen(self.endpoint, self._accept)

    def _accept(self, link: Link) -> Scripted:
        self.links.append(link)
        return self

    def on_message(self, link: Link, message: m.Message, payload: bytes | bytearray) -> None:
        self.heard.append((link, message, bytes(payload)))
        if isinstance(message, m.GcsHello) and self.role is not None:
            link.send(self.role)
        elif isinstance(message, GcsPing) and self.awake:
            link.send(message)

    def on_closed(self, link: Link, reason: str) -> None:
        self.closed.append(link)

    def say(self, message: m.Message, payload: bytes = b"") -> None:
        """To whoever has come last."""
        self.links[-1].send(message, payload)

    def of(self, kind: type[m.Message]) -> list[Any]:
        return [message for _, message, _ in self.heard if isinstance(message, kind)]

    def answer(self, result: Result) -> None:
        """To the last command."""
        self.say(*encode_result(self.of(m.GcsCommand)[-1].request, result, ""))


class Play:
    """See the module."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self.clock = clock
        self.reactors: list[Any] = []
        self.heads = [Scripted(self, name) for name in "abc"]
        self.endpoints = tuple(head.endpoint for head in self.heads)
        reactor = make_reactor(name="client")
        self.reactors.append(reactor)
        self.events = Events()
        self.client = GcsClient(reactor, self.endpoints, CLIENT, on_connected=self.events.note("connected"))
        self.client.several = True

    def leads(self, index: int) -> GcsHeads:
        return GcsHeads(self.endpoints)

    def follows(self, leader: int | None, revision: int = 0) -> GcsFollower:
        at = "" if leader is None else self.endpoints[leader]
        return GcsFollower(at, "it follows", revision, self.endpoints)

    def settle(self, ms: float = 0.0) -> None:
        while True:
            for reactor in self.reactors:
                reactor.flush_dirty()
            settle(*self.reactors)
            if ms <= 0:
                return
            self.clock.advance_ms(min(ms, STEP_MS))
            ms -= STEP_MS

    def until(self, condition: Callable[[], Any], limit_ms: float = 5_000.0) -> None:
        self.settle()
        while not condition():
            assert limit_ms > 0, "waited in vain"
            self.settle(STEP_MS)
            limit_ms -= STEP_MS

    def close(self) -> None:
        self.client.close()
        errors = [error for reactor in self.reactors for error in reactor.handler_errors]
        for reactor in self.reactors:
            reactor.close()
        assert errors == []


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    made = Play(tmp_path, install_clock(monkeypatch))
    yield made
    made.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeadsWorld]:
    made = HeadsWorld(tmp_path, install_clock(monkeypatch))
    yield made
    made.close()


def kv(name: bytes, value: bytes | None, revision: int) -> Change:
    record = None if value is None else KvRecord("ns", name, value)
    return Change(revision, Table.KV, kv_key("ns", name), record)


def told(revision: int, changes: list[Change], whole: list[Table], snapshot: bool) -> tuple[m.GcsChanges, bytes]:
    return m.GcsChanges(revision, snapshot), join_changes([encode_change(change) for change in changes], whole)


def test_a_head_that_is_named_before_it_leads_is_followed_the_moment_it_does(play: Play) -> None:
    """Who is elected is known to its followers before its first entry is on disks, so before it may lead."""
    first, elected, _ = play.heads
    first.role, elected.role = play.follows(1), play.follows(None)
    results: list[Result] = []
    play.client.command(put(b"k"), results.append)
    play.settle()
    assert [type(each) for each in elected.of(m.GcsHello)] == [m.GcsHello]
    assert not elected.of(m.GcsCommand) and play.client.served_by == first.endpoint
    elected.say(play.leads(1))
    play.settle()  # no time passes
    assert play.client.served_by == elected.endpoint and play.client.connected
    assert len(elected.of(m.GcsHello)) == 1  # on the link that was there
    elected.answer(Result(Code.OK, "", 1))
    play.settle()
    assert [result.code for result in results] == [Code.OK]


def test_a_head_that_never_leads_is_not_waited_for(play: Play) -> None:
    first, named, third = play.heads
    first.role, named.role, third.role = play.follows(1), play.follows(None), play.leads(2)
    play.client.command(put(b"k"), lambda result: None)
    play.settle()
    for _ in range(20):  # news that are none do not put it off
        named.say(play.follows(None))
        play.settle(100.0)
    assert play.client.served_by == third.endpoint
    assert set(named.links) == set(named.closed) and set(first.links) == set(first.closed)


def test_a_command_that_is_refused_under_way_goes_to_the_next_head_with_its_number(play: Play) -> None:
    first, second, _ = play.heads
    first.role, second.role = play.leads(0), play.leads(1)
    results: list[Result] = []
    play.client.command(put(b"k"), results.append)
    play.client.command(put(b"l"), results.append)
    play.settle()
    (sent,) = first.of(m.GcsCommand)
    first.say(m.GcsResult(sent.request, 0, Code.NOT_LEADER.value, "it does not lead", second.endpoint))
    first.say(*encode_result(sent.request, Result(Code.OK, "", 1), ""))  # too late: the link has been left
    play.until(lambda: second.of(m.GcsCommand))
    assert results == []
    assert second.of(m.GcsCommand)[0].sequence == sent.sequence
    second.answer(Result(Code.OK, "", 1))
    play.settle()
    assert len(results) == 1 and second.of(m.GcsCommand)[-1].sequence == sent.sequence + 1
    second.answer(Result(Code.OK, "", 2))
    play.settle()
    assert len(results) == 2


def test_a_watch_goes_over_to_another_head_without_a_gap_and_without_the_past(play: Play) -> None:
    first, second, _ = play.heads
    first.role, second.role = play.follows(None), play.follows(None)
    changes: list[tuple[bytes | None, int]] = []
    watch = play.client.watch(
        [Table.KV], [], lambda change: changes.append((getattr(change.record, "value", None), change.revision))
    )
    play.client.add_watch_key(watch, kv_key("ns", b"a"))
    play.until(lambda: first.of(m.GcsWatch))
    first.say(*told(3, [kv(b"a", b"3", 3)], [], True))
    play.settle()
    play.client.add_watch_key(watch, kv_key("ns", b"b"))  # is not told before the change of heads
    play.settle()
    first.say(play.follows(1, 3))
    play.settle()
    second.say(play.leads(1))
    first.say(*told(4, [kv(b"a", b"4", 4)], [], False))  # comes over a link that is left in the same turn, or was read
    play.settle()
    resumed, fresh = second.of(m.GcsWatch)
    assert resumed.keys == (("kv", kv_key("ns", b"a")),) and fresh.keys == (("kv", kv_key("ns", b"b")),)
    assert fresh.since_revision == -1 and fresh.seen == resumed.seen == resumed.since_revision
    assert resumed.since_revision == changes[-1][1]
    second.say(*told(5, [kv(b"a", None, 5)], [], False))
    second.say(*told(5, [kv(b"b", None, 5)], [], True))
    play.settle()
    assert [each for each in changes if each[1] != 4] == [(b"3", 3), (None, 5), (None, 5)]
    assert set(first.closed) == set(first.links)


def test_what_was_deleted_between_two_heads_is_told(play: Play) -> None:
    first, second, _ = play.heads
    first.role, second.role = play.leads(0), play.leads(1)
    events: list[tuple[bytes, bytes | None]] = []
    play.client.watch(
        [Table.KV], None, lambda change: events.append((change.key, getattr(change.record, "value", None)))
    )
    play.settle()
    first.say(*told(2, [kv(b"a", b"1", 1), kv(b"b", b"2", 2)], [Table.KV], True))
    play.settle()
    first.reactor.drop(first.links[-1], "killed")
    play.until(lambda: second.of(m.GcsWatch))
    assert second.of(m.GcsWatch)[0].since_revision == 2
    second.say(*told(9, [kv(b"b", b"2", 2)], [Table.KV], True))  # the changes since have been compacted
    play.settle()
    assert events[2:] == [(kv_key("ns", b"b"), b"2"), (kv_key("ns", b"a"), None)]


def test_a_read_that_waits_is_asked_again_and_answered_once(play: Play) -> None:
    first, second, _ = play.heads
    first.role, second.role = play.follows(None), play.follows(None)
    values: list[Any] = []
    play.client.read(Table.KV, kv_key("ns", b"f"), values.append, wait=True, immutable=True)
    play.until(lambda: first.of(m.GcsRead))
    first.say(play.follows(1))
    play.settle()
    second.say(play.leads(1))
    play.settle()
    (asked,) = {read.request for read in (*first.of(m.GcsRead), *second.of(m.GcsRead))}
    assert len(second.of(m.GcsRead)) == 1 and second.of(m.GcsRead)[0].seen == -1
    payload = join_changes([encode_change(kv(b"f", b"code", 1))], ())
    for _ in range(2):
        second.say(m.GcsResult(asked, 1), payload)
    play.settle()
    assert [value.value for value in values] == [b"code"]


def test_the_head_in_this_process_is_not_pinged_and_any_other_one_is(play: Play) -> None:
    home, other, _ = play.heads
    home.role, other.role = play.leads(0), play.leads(1)
    play.client.own_endpoint = home.endpoint
    play.client.watch([Table.KV], None, lambda change: None)
    play.settle()
    assert play.client.at_home
    play.settle(10 * SILENCE_MS)
    play.client.command(put(b"k"), lambda result: None)
    play.settle(10 * SILENCE_MS)  # its answer takes as long as it takes: it is as frozen as the client
    assert home.of(GcsPing) == [] and play.client.served_by == home.endpoint
    home.say(play.follows(1))
    play.settle()
    assert not play.client.at_home and play.client.served_by == other.endpoint and other.of(GcsPing)
    other.awake = False
    other.role = None
    home.role = play.leads(0)
    play.until(lambda: play.client.at_home)
    assert home.of(GcsPing) == []


def test_a_client_that_only_watches_notices_a_frozen_follower(play: Play) -> None:
    first, second, _ = play.heads
    first.role = second.role = play.follows(None)
    play.client.watch([Table.KV], None, lambda change: None)
    play.until(lambda: first.of(GcsPing))
    first.awake = False
    first.role = None
    play.until(lambda: play.client.served_by not in ("", first.endpoint), limit_ms=12 * SILENCE_MS)


def freeze(head: Scripted) -> None:
    head.awake, head.role = False, None


def thaw(head: Scripted, role: m.Message) -> None:
    head.awake, head.role = True, role


def test_who_was_silent_before_another_head_led_is_asked_at_once_when_it_leads(play: Play) -> None:
    first, second, third = play.heads
    first.role, third.role = play.leads(0), play.follows(0)
    second.role = GcsHeads((second.endpoint, third.endpoint, first.endpoint))  # the third is the next to be asked
    play.client.command(put(b"k"), lambda result: None)
    play.until(lambda: play.client.served_by == first.endpoint)
    freeze(first)
    play.until(lambda: play.client.served_by == second.endpoint and play.client.connected)
    thaw(first, play.leads(0))
    freeze(second)
    play.until(lambda: third.of(m.GcsHello), limit_ms=3 * SILENCE_MS)
    play.settle()  # no time passes
    assert play.client.served_by == first.endpoint and play.client.connected


def test_a_frozen_head_that_is_still_named_is_asked_again_when_it_is_elected(play: Play) -> None:
    first, second, _ = play.heads
    first.role, second.role = play.leads(0), play.follows(0)
    play.client.command(put(b"k"), lambda result: None)
    play.until(lambda: play.client.served_by == first.endpoint)
    freeze(first)
    play.until(lambda: play.client.served_by == second.endpoint)
    links = len(first.links)
    play.settle()
    assert len(first.links) == links  # the follower has not noticed yet
    second.say(play.follows(None))
    play.settle()
    thaw(first, play.leads(0))
    second.say(play.follows(0))
    play.settle()
    assert play.client.served_by == first.endpoint and play.client.connected


def test_a_client_without_a_link_hears_of_new_heads(play: Play) -> None:
    """All heads may be replaced while it has nothing to ask."""
    old, second, new = play.heads
    client = GcsClient(play.reactors[-1], [old.endpoint], b"idle")
    new.role = GcsHeads((new.endpoint,))
    for head in (old, second):
        head.reactor.close()
        play.reactors.remove(head.reactor)
    client.heads_are([new.endpoint])
    results: list[Result] = []
    client.command(put(b"k"), results.append)
    play.settle()
    assert client.served_by == new.endpoint
    client.heads_are([old.endpoint])  # older news, by a detour
    assert client.endpoints == [new.endpoint]
    client.close()


def test_nothing_is_left_of_a_client_that_was_closed(play: Play) -> None:
    first, second, _ = play.heads
    first.role, second.role = play.follows(1, revision=-1), play.follows(None)
    play.client.watch([Table.KV], None, lambda change: None)
    play.client.command(put(b"k"), lambda result: None)
    play.settle()
    links = play.client._links
    assert links._behind is not None and links._scout is not None  # a timer of each kind is running
    play.client.close()
    play.settle()
    assert [timer for _, _, timer in play.reactors[-1]._timers if timer.fn is not None] == []
    assert play.reactors[-1].links == {}


def test_many_rounds_in_vain_become_rarer(play: Play) -> None:
    for head in play.heads:
        head.reactor.close()
    del play.reactors[:3]
    tries = Events()
    connect = play.client.reactor.connect

    def counted(*arguments: Any, **named: Any) -> Link:
        tries.append(("try", None))
        return connect(*arguments, **named)

    play.client.reactor.connect = counted  # type: ignore[method-assign]
    play.client.watch([Table.KV], None, lambda change: None)
    play.settle(4_000.0)
    tries.clear()
    play.settle(2_000.0)
    assert 3 * 8 <= len(tries) <= 3 * 12


def test_a_new_head_that_was_started_with_an_old_list_is_found_by_the_leader(world: HeadsWorld) -> None:
    world.start()
    leader = world.leader()
    follower = next(head for head in world.heads if head is not leader)
    new = Head(world, "new")
    world.heads.append(new)
    new.start([follower.endpoint, f"unix:{world.path}/gone"], join=True)
    assert leader.host is not None and new.host is not None
    replica = leader.host.replica
    world.until(lambda: replica.guests == [(new.host.replica.replica_id, new.endpoint)])


def add_head(world: HeadsWorld, name: str) -> Head:
    """A new head, once it votes."""
    leader = world.leader()
    assert leader.host is not None
    replica = leader.host.replica
    new = Head(world, name)
    world.heads.append(new)
    new.start([head.endpoint for head in world.heads if head.host is not None], join=True)
    (guest,) = world.until(lambda: replica.guests)
    replica.add_head(*guest, lambda result: None)
    leader.host.server.wake()
    world.until(lambda: new.failed or any(each.replica_id == guest[0] and each.voter for each in replica.members))
    assert new.failed == []
    return new


def test_a_new_head_is_not_led_astray_by_the_tables_of_the_past(world: HeadsWorld) -> None:
    """It gets the log from its beginning, in several batches: in the former tables it does not stand."""
    world.start()
    client = world.client()
    for name in ("d", "e"):
        new = add_head(world, name)
        for each in (b"k", b"l", b"m", b"n"):
            assert world.run(client, put(each, bytes(BATCH_BYTES // 3))).ok
    new.kill()
    new.start([])  # with what its disk says
    world.until(lambda: world.clients and new.host and new.host.replica.state.kv_get("ns", b"n"))
    assert new.host is not None and len(new.host.replica.members) == 5


def test_a_head_that_lets_others_in_and_sends_them_away_is_dialled_less_and_less(world: HeadsWorld) -> None:
    first, second, _ = world.heads
    reactor = make_reactor(name="former")
    world.client_reactors.append(reactor)
    reactor.listen(second.endpoint, lambda link: None)
    first.start(world.endpoints)
    world.settle(1_000.0)
    assert 5 <= reactor.refused <= 12
