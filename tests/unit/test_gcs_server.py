"""What GCS clients get for commands and reads: once, durable first, and never somebody else's fault."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs_world import ACTOR, NODE, Events, RawClient, World, gcs_world, put, register_actor
from wire_hosts import RawPeer

from ftray.gcs import journal as journal_module
from ftray.gcs.client import RECONNECT_MAX_MS, REPEAT_MS, REPEATS_MAX
from ftray.gcs.replica import SingleReplica
from ftray.gcs.state.commands import encode_command
from ftray.gcs.state.tables import ActorRecord, Code, Result, Table, kv_key
from ftray.wire import messages as m
from ftray.wire.handshake import ROLE_GCS, ROLE_TASK
from ftray.wire.reactor import Link


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with gcs_world(tmp_path, monkeypatch) as world:
        yield world


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_command_takes_effect_and_its_result_comes_back(world: World) -> None:
    client = world.client()
    assert world.run(client, put(b"k")).value == 1
    assert world.run(client, put(b"k", b"other")).value == 0
    refused = world.run(client, put(b"k", overwrite=False))
    assert refused.code is Code.EXISTS and "exists" in refused.message
    assert world.replica.state.kv_get("ns", b"k") == b"other"


def test_many_commands_in_order(world: World) -> None:
    client = world.client()
    events = Events()
    for number in range(50):
        client.command(put(b"k", b"%d" % number), events.note("result"))
    world.settle()
    assert [result.value for result in events.of("result")] == [1] + [0] * 49
    assert world.replica.state.kv_get("ns", b"k") == b"49"


def test_a_retry_takes_effect_once_and_gets_the_same_answer(world: World) -> None:
    raw = RawClient(world)
    command = encode_command(put(b"k", overwrite=False))
    raw.send(m.GcsCommand(1, 1), command)
    [(first, value)] = raw.received()
    raw.close()
    again = RawClient(world)  # the reply was lost: the same client on another link
    again.send(m.GcsCommand(7, 1), command)
    [(second, same_value)] = again.received()
    again.close()
    assert (first.code, second.code, second.request) == ("", "", 7)
    assert (second.revision, same_value) == (first.revision, value)
    assert world.replica.state.revision == 1


def test_a_command_whose_reply_is_lost_takes_effect_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = world.client()
    assert world.run(client, put(b"first")).ok
    sent: list[m.Message] = []
    send = Link.send

    def lossy(link: Link, message: m.Message, payload: Any = b"") -> None:
        if isinstance(message, m.GcsResult) and not sent:
            sent.append(message)
            world.reactor.drop(link, "the network breaks before the reply")
            return
        send(link, message, payload)

    monkeypatch.setattr(Link, "send", lossy)
    results: list[Result] = []
    client.command(put(b"k", overwrite=False), results.append)
    world.settle(RECONNECT_MAX_MS)
    assert len(sent) == 1
    assert [result.code for result in results] == [Code.OK]


@pytest.mark.parametrize("size", [1, 5])
def test_commands_survive_a_restart_of_the_head(world: World, size: int) -> None:
    client = world.client()
    assert world.run(client, put(b"before")).ok
    world.restart()
    events = Events()
    for number in range(size):
        client.command(put(b"%d" % number, overwrite=False), events.note("result"))
    world.settle(RECONNECT_MAX_MS)
    assert [result.code for result in events.of("result")] == [Code.OK] * size
    assert world.replica.state.kv_get("ns", b"before") == b"v"


def test_persist_before_reply_and_one_sync_for_a_batch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    sync, send = journal_module.Journal.sync, Link.send

    def noted_sync(journal: Any) -> None:
        sync(journal)
        events.append(("sync", None))

    def noted_send(link: Link, message: m.Message, payload: Any = b"") -> None:
        if isinstance(message, m.GcsResult | m.GcsChanges):
            events.append((type(message).__name__, message.revision))
        send(link, message, payload)

    watcher = world.client(b"watcher")
    watcher.watch([Table.KV], None, lambda change: None)
    raws = [RawClient(world, b"client%d" % number) for number in range(5)]
    world.settle()
    monkeypatch.setattr(journal_module.Journal, "sync", noted_sync)
    monkeypatch.setattr(Link, "send", noted_send)
    for number, raw in enumerate(raws):
        raw.send(m.GcsCommand(1, 1), encode_command(put(b"%d" % number)))
    world.settle()
    for raw in raws:
        raw.close()
    names = [name for name, _ in events]
    assert names == ["sync", "GcsChanges"] + ["GcsResult"] * 5


def test_what_a_full_disk_refuses_is_repeated_for_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = world.client()
    tries: list[int] = []

    def full(*arguments: Any) -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    results: list[Result] = []
    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "write_all", full)
        client.command(put(b"k"), results.append)
        world.settle(3 * REPEAT_MS)
    assert len(tries) > 1 and results == []
    world.settle(2 * REPEAT_MS)
    assert [result.code for result in results] == [Code.OK]


def test_a_full_disk_is_an_answer_in_the_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = world.client()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "write_all", full)
        results: list[Result] = []
        client.command(put(b"k"), results.append)
        world.settle(REPEAT_MS * (REPEATS_MAX + 3))
    [result] = results
    assert result.code is Code.UNAVAILABLE and "No space left" in result.message
    assert world.replica.state.kv_get("ns", b"k") is None
    assert world.run(client, put(b"k")).value == 1


def test_a_fault_in_the_replica_leaves_nobody_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = world.client()
    assert world.run(client, put(b"before")).ok
    results: list[Result] = []
    with monkeypatch.context() as patch:
        patch.setattr(SingleReplica, "submit_many", lambda replica, requests: 1 // 0)
        client.command(put(b"k"), results.append)
        world.settle()
    assert results == []
    assert len(world.reactor.handler_errors) == 1
    world.reactor.handler_errors.clear()
    world.settle(RECONNECT_MAX_MS)  # the client has noticed, and asks again
    assert [result.code for result in results] == [Code.OK]


def test_what_is_not_a_command_is_refused_as_an_answer(world: World) -> None:
    raw = RawClient(world)
    raw.send(m.GcsCommand(1, 1), b"\x01\xc1 garbage")
    [(answer, _)] = raw.received()
    assert answer.code == Code.INVALID
    raw.close()


@pytest.mark.parametrize(
    "message",
    [
        m.GcsCommand(1, 1),
        m.GcsWatch(("no such table",)),
        m.GcsHeartbeat(NODE, {}),
        m.NodeFenced("nonsense from a client"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_a_client_sends_wrong_costs_its_own_link(world: World, message: m.Message) -> None:
    good = world.client(b"good")
    assert world.run(good, put(b"k")).ok
    bad = RawClient(world)
    if isinstance(message, m.GcsCommand):  # before a hello
        bad.close()
        bad.peer = RawPeer(world.endpoint)
        bad.peer.authenticate(world.reactor, role=ROLE_GCS)
    bad.send(message)
    world.settle()
    assert bad.peer.is_cut_off()
    bad.close()
    assert world.run(good, put(b"k2")).ok
    assert good.failures == {}


def test_only_gcs_clients_are_served(world: World) -> None:
    peer = RawPeer(world.endpoint)
    peer.authenticate(world.reactor, role=ROLE_TASK)
    assert peer.is_cut_off()
    peer.close()


# --- reads ------------------------------------------------------------------------------------------------------------


def test_reads_of_records_and_tables(world: World) -> None:
    client = world.client()
    events = Events()
    world.run(client, put(b"a", b"1"))
    world.run(client, put(b"b", b"2"))
    client.read(Table.KV, kv_key("ns", b"a"), events.note("one"))
    client.read(Table.KV, b"missing", events.note("missing"))
    client.read_all(Table.KV, events.note("all"))
    client.read_all(Table.NODES, events.note("none"))
    world.settle()
    assert events.of("one")[0].value == b"1"
    assert events.of("missing") == [None]
    assert sorted(events.of("all")[0]) == [kv_key("ns", b"a"), kv_key("ns", b"b")]
    assert events.of("none") == [{}]


def test_reads_of_actors_by_name(world: World) -> None:
    client = world.client()
    world.add_node(client)
    world.add_job(client)
    assert world.run(client, register_actor("mine")).ok
    events = Events()
    client.read_named("", "mine", events.note("found"))
    client.read_named("elsewhere", "mine", events.note("missing"))
    client.read_named("", "other", events.note("missing"))
    world.settle()
    assert [record.actor_id for record in events.of("found")] == [ACTOR]
    assert events.of("missing") == [None, None]


def test_a_read_sees_the_clients_own_write_of_the_same_batch(world: World) -> None:
    client = world.client()
    world.run(client, put(b"a", b"old"))
    events = Events()
    client.command(put(b"a", b"new"), events.note("result"))
    client.read(Table.KV, kv_key("ns", b"a"), events.note("read"))
    world.settle()
    assert events.of("read")[0].value == b"new"


def test_a_waiting_read_is_answered_when_the_key_exists(world: World) -> None:
    reader, writer = world.client(b"reader"), world.client(b"writer")
    events = Events()
    key = kv_key("ns", b"later")
    reader.read(Table.KV, key, events.note("read"), wait=True)
    reader.read(Table.KV, key, events.note("read too"), wait=True)
    world.settle()
    assert events == []
    world.run(writer, put(b"other"))
    assert events == []
    world.run(writer, put(b"later", b"here"))
    assert [record.value for _, record in events] == [b"here", b"here"]
    reader.read(Table.KV, key, events.note("again"), wait=True)
    world.settle()
    assert events.of("again")[0].value == b"here"


def test_a_waiting_read_survives_a_restart_of_the_head(world: World) -> None:
    reader, writer = world.client(b"reader"), world.client(b"writer")
    events = Events()
    reader.read(Table.KV, kv_key("ns", b"later"), events.note("read"), wait=True)
    world.settle()
    world.restart()
    world.settle(RECONNECT_MAX_MS)
    world.run(writer, put(b"later", b"here"))
    assert [record.value for _, record in events] == [b"here"]


def test_waits_of_a_closed_link_are_forgotten(world: World) -> None:
    reader = world.client()
    reader.read(Table.KV, b"never", lambda record: None, wait=True)
    world.settle()
    assert world.server.serving._waits
    reader.close()
    world.settle()
    assert not world.server.serving._waits


def test_an_answer_that_is_too_large_is_refused_and_single_keys_still_work(world: World) -> None:
    world.restart(output_backlog_bytes_max=100_000)
    client = world.client()
    events = Events()
    for number in range(4):
        assert world.run(client, put(b"%d" % number, bytes(60_000))).ok
    client.read_all(Table.KV, events.note("all"), on_error=events.note("error"))
    client.read(Table.KV, kv_key("ns", b"2"), events.note("one"))
    world.settle()
    assert events.of("all") == []
    assert events.of("error")[0][0] is Code.TOO_LARGE
    assert len(events.of("one")[0].value) == 60_000


def test_readers_get_actors_without_their_creation_spec(world: World) -> None:
    client = world.client()
    world.add_node(client)
    world.add_job(client)
    assert world.run(client, register_actor(creation=b"large")).ok
    events = Events()
    client.read(Table.ACTORS, ACTOR, events.note("actor"))
    world.settle()
    [actor] = events.of("actor")
    assert isinstance(actor, ActorRecord) and actor.creation == b"" and actor.class_name == "Counter"
    stored = world.replica.state.actor(ACTOR)
    assert stored is not None and stored.creation == b"large"
