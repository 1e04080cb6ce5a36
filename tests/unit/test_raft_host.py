"""Several heads over real sockets: forming, redirects, failover, fresh reads, watches, and what errors say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from gcs_world import NODE, Events, put
from heads_world import HeadsWorld
from wire_hosts import install_clock

from ftray.gcs.client import NO_LEADER_MS, SILENCE_MS
from ftray.gcs.raft import log as raft_log
from ftray.gcs.raft.errors import MembershipMismatchError, ReplicaRefusedError, ReplicaRemovedError
from ftray.gcs.replica import JOURNAL_NAME
from ftray.gcs.state import commands as c
from ftray.gcs.state.tables import Change, Code, KvRecord, NodeState, Table, kv_key
from ftray.wire.handshake import cluster_id_of


@pytest.fixture
def short_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compacted is gone from memory, too: who was away gets a snapshot."""
    monkeypatch.setattr(raft_log, "KEEP_ENTRIES", 0)
    monkeypatch.setattr(raft_log, "KEEP_BYTES", 0)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeadsWorld]:
    made = HeadsWorld(tmp_path, install_clock(monkeypatch))
    yield made
    made.close()


def value_of(world: HeadsWorld, index: int, key: bytes) -> bytes | None:
    host = world.heads[index].host
    assert host is not None
    return host.replica.state.kv_get("ns", key)


def read(world: HeadsWorld, client: object, key: bytes) -> bytes | None:
    found: list[object] = []
    client.read(Table.KV, kv_key("ns", key), found.append)  # type: ignore[attr-defined]
    world.until(lambda: found)
    return found[0].value if isinstance(found[0], KvRecord) else None


def test_heads_form_a_cluster_and_whoever_is_asked_leads_to_the_leader(world: HeadsWorld) -> None:
    world.start()
    leader = world.leader()
    for head in world.heads:
        client = world.client([head.endpoint])
        assert world.run(client, put(head.endpoint.encode())).ok
        assert read(world, client, head.endpoint.encode()) == b"v"
        assert client.endpoints[0] == leader.endpoint and sorted(client.endpoints) == world.endpoints
        assert client.failures == {}
    world.until(lambda: all(value_of(world, index, world.endpoints[2].encode()) for index in range(3)))


def test_a_client_that_comes_before_there_is_a_leader_is_served_when_there_is_one(world: HeadsWorld) -> None:
    world.heads[0].start(world.endpoints)
    client = world.client()
    results = Events()
    client.command(put(b"k"), results.note("result"))
    world.settle(2 * NO_LEADER_MS)
    assert results == []
    text = str(client.unavailable())
    assert "it answers, but there is no leader: that takes 2 heads of 3" in text
    assert f"only {world.endpoints[0]} answers; not {world.endpoints[1]} (" in text
    assert f"{world.endpoints[1]}: " in text
    for head in world.heads[1:]:
        head.start(world.endpoints)
    world.until(lambda: results)
    assert results.of("result")[0].ok


def test_the_leader_dies_and_everything_goes_on(world: HeadsWorld) -> None:
    world.start()
    leader = world.leader()
    writer, watcher = world.client(), world.client()
    told: list[Change] = []
    watcher.watch([Table.KV], [kv_key("ns", b"k%d" % number) for number in range(20)], told.append)
    results = Events()
    for number in range(20):
        writer.command(put(b"k%d" % number, overwrite=False), results.note("result"))
    world.until(lambda: len(results) >= 5)
    leader.kill()
    begun_ms = world.clock.now_s * 1000
    world.until(lambda: len(results) == 20)
    # Once each: what is there already would answer `exists`.
    assert [result.code for result in results.of("result")] == [Code.OK] * 20
    assert world.clock.now_s * 1000 - begun_ms < 150
    world.until(lambda: sum(change.record is not None for change in told) >= 20)
    keys = {change.key for change in told if change.record is not None}
    assert keys == {kv_key("ns", b"k%d" % number) for number in range(20)}
    assert read(world, watcher, b"k19") == b"v"


def test_a_frozen_leader_is_left(world: HeadsWorld) -> None:
    world.start()
    leader = world.leader()
    client = world.client()
    assert world.run(client, put(b"a")).ok
    leader.frozen = True
    assert world.run(client, put(b"b"), limit_ms=800).ok
    leader.frozen = False
    world.settle(600)
    assert read(world, client, b"b") == b"v"
    assert sum(head.leads for head in world.heads) == 1


def test_a_client_that_waits_for_nothing_leaves_a_frozen_leader_too(world: HeadsWorld) -> None:
    world.start()
    leader = world.leader()
    client = world.client()
    told: list[Change] = []
    client.watch([Table.KV], [kv_key("ns", b"k")], told.append)
    world.until(lambda: told)
    leader.frozen = True
    other = world.client()
    assert world.run(other, put(b"k")).ok
    world.until(lambda: told[-1].record is not None, 10 * SILENCE_MS)


def test_a_stale_leader_answers_no_read(world: HeadsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is thawed, it hears what a client asks, and of the other heads nothing."""
    world.start()
    leader = world.leader()
    stuck = world.client()
    assert world.run(stuck, put(b"k", b"old")).ok
    found: list[object] = []
    leader.frozen = True
    stuck.read(Table.KV, kv_key("ns", b"k"), found.append)
    stuck.reactor.flush_dirty()
    world.client_reactors.remove(stuck.reactor)
    assert world.run(world.client(), put(b"k", b"new")).ok
    assert leader.host is not None
    monkeypatch.setattr(leader.host.replica, "link_message", lambda link, data: None)
    leader.frozen = False
    world.settle()
    world.client_reactors.append(stuck.reactor)
    world.until(lambda: found)
    assert isinstance(found[0], KvRecord) and found[0].value == b"new"


def test_a_command_whose_answer_is_lost_takes_effect_once(world: HeadsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.start()
    leader = world.leader()
    client = world.client()
    assert world.run(client, put(b"a")).ok
    assert leader.host is not None
    monkeypatch.setattr(leader.host.server, "_reply", lambda *answer: None)
    results = Events()
    client.command(put(b"k", overwrite=False), results.note("result"))
    world.until(lambda: all(value_of(world, index, b"k") for index in range(3)))
    leader.kill()
    world.until(lambda: results)
    assert results.of("result")[0].code is Code.OK  # carried out again it would be `exists`


def test_leadership_is_handed_over_and_clients_follow(world: HeadsWorld) -> None:
    world.start()
    leader = world.leader()
    client = world.client()
    events = Events()
    raylet = world.client(node_id=NODE, events=events)
    endpoint = raylet.reactor.listen(f"unix:{world.path}/raylet", lambda link: None)
    assert world.run(raylet, c.RegisterNode(NODE, endpoint, {"CPU": 1.0}, {}, 1, "host", 1)).ok
    assert world.run(client, put(b"a")).ok
    assert leader.host is not None
    leader.host.replica.hand_over()
    leader.host.server.wake()
    world.until(lambda: not leader.leads)
    follower = world.leader()
    assert world.run(client, put(b"b")).ok
    assert client.endpoints[0] == follower.endpoint
    assert follower.host is not None
    server = follower.host.server
    world.until(lambda: NODE in server._nodes)  # what its managers have to tell the raylet reaches it
    node = follower.host.replica.state.node(NODE)
    assert node is not None and node.state is NodeState.ALIVE


@pytest.mark.usefixtures("short_logs")
def test_a_watch_resumes_at_a_head_that_got_its_state_as_a_snapshot(world: HeadsWorld) -> None:
    world.start()
    world.leader()
    client, watcher = world.client(), world.client()
    told: list[Change] = []
    watcher.watch([Table.KV], None, told.append)
    assert world.run(client, put(b"a")).ok
    world.until(lambda: told)
    world.client_reactors.remove(watcher.reactor)  # it hears nothing for a while
    first = world.leader().host
    assert first is not None
    next(link for link in first.server._links if link.peer.client_id == watcher.client_id).close("cut off")
    late = next(head for head in world.heads if not head.leads)
    late.kill()
    for number in range(30):
        assert world.run(client, put(b"n%d" % number)).ok
    assert world.run(client, c.KvDelete("ns", b"a")).ok
    for head in world.heads:
        if head.host is not None:
            head.host.replica.compact()
    late.start(world.endpoints)
    world.until(lambda: late.host is not None and late.host.replica.state.kv_get("ns", b"n29") == b"v")
    next(head for head in world.heads if not head.leads and head is not late).kill()
    leader = world.leader()
    assert leader.host is not None
    leader.host.replica.hand_over()
    leader.host.server.wake()
    world.until(lambda: late.leads)
    told.clear()
    world.client_reactors.append(watcher.reactor)
    world.until(lambda: any(change.key == kv_key("ns", b"n29") for change in told))
    assert [change.record for change in told if change.key == kv_key("ns", b"a")] == [None]
    assert late.host is not None
    assert late.host.server.watchers.snapshots == 1


def test_all_heads_die_and_what_was_acknowledged_is_there(world: HeadsWorld) -> None:
    world.start()
    client = world.client()
    for number in range(10):
        assert world.run(client, put(b"k%d" % number)).ok
    for head in world.heads:
        head.kill()
    world.settle(300)
    assert not client.connected
    world.start()
    assert world.run(client, put(b"more")).ok
    assert [read(world, client, b"k%d" % number) for number in range(10)] == [b"v"] * 10


def test_a_head_is_added_and_another_one_removed(world: HeadsWorld) -> None:
    world.start()
    world.leader()
    client = world.client()
    assert world.run(client, put(b"k")).ok
    new = type(world.heads[0])(world, "h9")
    world.heads.append(new)
    new.start(world.endpoints, join=True)
    leader = world.leader()
    assert leader.host is not None and new.host is not None
    replica = leader.host.replica
    (guest,) = world.until(lambda: replica.guests)
    assert guest == (new.host.replica.replica_id, new.endpoint)
    results = Events()
    replica.add_head(*guest, results.note("added"))
    leader.host.server.wake()
    world.until(lambda: len(replica.members) == 4 and all(member.voter for member in replica.members))
    world.until(lambda: new.endpoint in client.endpoints)
    assert value_of(world, 3, b"k") == b"v"
    world.settle(50)  # one change at a time: the last step is committed by then
    gone = next(head for head in world.heads if not head.leads and head is not new)
    assert gone.host is not None
    replica.remove_head(gone.host.replica.replica_id, results.note("removed"))
    leader.host.server.wake()
    world.until(lambda: gone.failed)
    assert isinstance(gone.failed[0], ReplicaRemovedError)
    world.until(lambda: gone.endpoint not in client.endpoints)
    assert [result.ok for _, result in results] == [True, True]


def test_a_head_that_lost_its_disk_is_refused(world: HeadsWorld) -> None:
    world.start()
    world.leader()
    lost = next(head for head in world.heads if not head.leads)
    lost.kill()
    shutil.rmtree(lost.directory)
    lost.start(world.endpoints)
    world.until(lambda: lost.failed)
    assert isinstance(lost.failed[0], ReplicaRefusedError)
    assert "ftray heads replace" in str(lost.failed[0])
    assert world.run(world.client(), put(b"k")).ok


def test_lists_that_differ_are_refused(world: HeadsWorld) -> None:
    world.heads[0].start(world.endpoints)
    world.heads[1].start(world.endpoints[:2])
    world.until(lambda: world.heads[0].failed and world.heads[1].failed)
    errors = [head.failed[0] for head in world.heads[:2]]
    assert any(isinstance(error, MembershipMismatchError) for error in errors)
    assert all("different lists" in str(error) for error in errors)


def test_a_folder_of_another_kind_is_refused(world: HeadsWorld) -> None:
    head = world.heads[0]
    with pytest.raises(MembershipMismatchError, match="--heads"):
        head.start([])
    head.directory.mkdir(exist_ok=True)
    (head.directory / JOURNAL_NAME).touch()
    with pytest.raises(MembershipMismatchError, match="alone in its cluster"):
        head.start(world.endpoints)


def test_one_head_of_several_may_be_the_only_one(world: HeadsWorld) -> None:
    """A cluster that begins with one replicated head can grow."""
    head = world.heads[0]
    head.start([head.endpoint])
    client = world.client([head.endpoint])
    assert world.run(client, put(b"k")).ok
    assert read(world, client, b"k") == b"v"


def test_what_heads_do_not_say_costs_the_link(world: HeadsWorld) -> None:
    from ftray.wire.handshake import ROLE_HEAD
    from ftray.wire.head_messages import RaftPacket

    world.start()
    leader = world.leader()
    from wire_hosts import Recorder, make_reactor

    reactor = make_reactor(name="foe")
    world.client_reactors.append(reactor)
    recorder = Recorder()
    link = reactor.connect(leader.endpoint, ROLE_HEAD, recorder)
    link.send(RaftPacket(), b"\xff\xff")
    world.until(lambda: recorder.closed)
    assert world.run(world.client(), put(b"k")).ok


def test_the_cluster_id_follows_from_the_token() -> None:
    assert cluster_id_of(b"a") == cluster_id_of(b"a") != cluster_id_of(b"b")
    assert len(cluster_id_of(b"a")) == 16
