"""Watches: how it is, then each change; resumed after a cut; bounded for those who do not read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gcs_world import Events, RawClient, World, gcs_world, put

from ftray.gcs.client import RECONNECT_MAX_MS, GcsClient
from ftray.gcs.codec import decode_changes
from ftray.gcs.state import commands as c
from ftray.gcs.state import state as state_module
from ftray.gcs.state.commands import encode_command
from ftray.gcs.state.tables import Change, Result, Table, kv_key
from ftray.wire import messages as m
from ftray.wire.reactor import Link


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with gcs_world(tmp_path, monkeypatch) as world:
        yield world


def values(changes: list[Change]) -> list[tuple[bytes, bytes | None]]:
    return [(change.key[3:], None if change.record is None else change.record.value) for change in changes]  # type: ignore[union-attr]


def test_a_watch_tells_how_it_is_and_then_each_change(world: World) -> None:
    watcher, writer = world.client(b"watcher"), world.client(b"writer")
    world.run(writer, put(b"a", b"1"))
    changes: list[Change] = []
    watcher.watch([Table.KV], None, changes.append)
    world.settle()
    assert values(changes) == [(b"a", b"1")]
    world.run(writer, put(b"a", b"2"))
    world.run(writer, c.KvDelete("ns", b"a"))
    assert values(changes) == [(b"a", b"1"), (b"a", b"2"), (b"a", None)]


def test_a_watch_of_keys_hears_of_these_alone_and_keys_can_be_added(world: World) -> None:
    watcher, writer = world.client(b"watcher"), world.client(b"writer")
    world.run(writer, put(b"b", b"1"))
    changes: list[Change] = []
    watch = watcher.watch([Table.KV], [kv_key("ns", b"a")], changes.append)
    world.settle()
    assert values(changes) == [(b"a", None)]
    world.run(writer, put(b"a", b"1"))
    world.run(writer, put(b"b", b"2"))
    watcher.add_watch_key(watch, kv_key("ns", b"b"))
    world.settle()
    world.run(writer, put(b"b", b"3"))
    world.run(writer, put(b"c", b"1"))
    assert values(changes) == [(b"a", None), (b"a", b"1"), (b"b", b"2"), (b"b", b"3")]
    watcher.remove_watch_key(watch, kv_key("ns", b"b"))
    world.run(writer, put(b"b", b"4"))
    assert len(changes) == 4


def test_watchers_of_other_things_get_no_messages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, writer = world.client(b"watcher"), world.client(b"writer")
    watcher.watch([Table.ACTORS], None, lambda change: None)
    watcher.watch([Table.KV], [kv_key("ns", b"mine")], lambda change: None)
    world.run(writer, put(b"start"))
    seen: list[m.Message] = []
    on_answer = GcsClient.on_answer

    def noted(client: GcsClient, link: Link, message: m.Message, payload: bytes) -> None:
        if client is watcher:
            seen.append(message)
        on_answer(client, link, message, payload)

    monkeypatch.setattr(GcsClient, "on_answer", noted)
    world.run(writer, put(b"others"))
    assert seen == []
    world.run(writer, put(b"mine"))
    assert len(seen) == 1


def test_a_watch_resumes_from_its_revision_after_a_restart(world: World) -> None:
    watcher, writer = world.client(b"watcher"), world.client(b"writer")
    changes: list[Change] = []
    watcher.watch([Table.KV], None, changes.append)
    world.run(writer, put(b"a", b"1"))
    # The watcher's link breaks, and while it is away something changes.
    [link] = [link for link in world.server._links if link.peer.client_id == b"watcher"]
    world.reactor.drop(link, "a cut")
    snapshots = world.server.watchers.snapshots
    results: list[Result] = []
    writer.command(put(b"b", b"2"), results.append)
    writer.command(c.KvDelete("ns", b"a"), results.append)
    world.settle(RECONNECT_MAX_MS)
    assert values(changes) == [(b"a", b"1"), (b"b", b"2"), (b"a", None)]
    assert world.server.watchers.snapshots == snapshots  # the changes alone
    world.run(writer, put(b"c", b"3"))
    assert values(changes)[-1] == (b"c", b"3")


@pytest.mark.parametrize("whole", [True, False], ids=["table", "keys"])
def test_after_compaction_a_watch_resumes_with_a_snapshot(
    world: World, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(state_module, "RING_CHANGES_MAX", 3)
    watcher, writer = world.client(b"watcher"), world.client(b"writer")
    changes: list[Change] = []
    keys = None if whole else [kv_key("ns", key) for key in (b"gone", b"kept", b"new")]
    watcher.watch([Table.KV], keys, changes.append)
    world.run(writer, put(b"gone"))
    world.run(writer, put(b"kept", b"1"))
    world.stop()
    changes.clear()
    world.start()
    world.replica.submit(b"other", 1, encode_command(c.KvDelete("ns", b"gone")))
    for number in range(10):
        world.replica.submit(b"other", 2 + number, encode_command(put(b"kept", b"%d" % number)))
    world.replica.submit(b"other", 20, encode_command(put(b"new", b"n")))
    world.settle(RECONNECT_MAX_MS)
    assert dict(values(changes)) == {b"gone": None, b"kept": b"9", b"new": b"n"}
    assert len(changes) == 3
    assert world.server.watchers.snapshots == 1
    world.run(writer, put(b"kept", b"after"))
    assert values(changes)[-1] == (b"kept", b"after")


def test_two_watches_in_one_client_hear_the_same(world: World) -> None:
    client = world.client()
    one: list[Change] = []
    two: list[Change] = []
    client.watch([Table.KV, Table.NODES], None, one.append)
    client.watch([Table.KV], [kv_key("ns", b"a")], two.append)
    world.run(client, put(b"a", b"1"))
    assert values(one) == values(two)[-1:] == [(b"a", b"1")]


def test_a_watcher_that_does_not_read_is_bounded_and_misses_only_states_in_between(world: World) -> None:
    world.restart(output_backlog_bytes_max=400_000)
    watcher, writer = RawClient(world, b"watcher"), world.client(b"writer")
    watcher.send(m.GcsWatch(("kv",)))
    world.settle()
    for number in range(40):
        assert world.run(writer, put(b"k", b"%d" % number + bytes(50_000))).ok
    [link] = [link for link in world.server._links if link.peer.client_id == b"watcher"]
    assert world.server.watchers.any_behind
    assert len(link.out) < 200_000
    seen: list[bytes] = []
    for _ in range(20):
        for message, payload in watcher.received():
            if isinstance(message, m.GcsChanges):
                seen += [change.record.value for change in decode_changes(payload)[1]]  # type: ignore[union-attr]
        world.settle(30)
    assert seen[-1].startswith(b"39")
    assert not world.server.watchers.any_behind
    watcher.close()


def test_a_callback_that_raises_costs_nobody_anything(world: World) -> None:
    client = world.client()
    events = Events()

    def broken(change: Change) -> None:
        raise RuntimeError("a bug")

    client.watch([Table.KV], None, broken)
    client.watch([Table.KV], None, events.note("change"))
    assert world.run(client, put(b"a")).ok
    assert events.of("change")
    assert client.reactor.handler_errors == ["RuntimeError('a bug')"]
    client.reactor.handler_errors.clear()
