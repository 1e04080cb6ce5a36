"""How much of the log is on its way to a peer: no more than it takes, whatever it lacks."""

from __future__ import annotations

from pathlib import Path

import heads_world
import pytest
from gcs_world import put
from heads_world import HeadsWorld
from raft_steps import followers, made
from wire_hosts import install_clock, make_reactor

from ftray.gcs.raft import library
from ftray.gcs.raft import messages as m
from ftray.gcs.raft import window as window_module
from ftray.gcs.raft.window import Window
from ftray.gcs.state.tables import Result
from ftray.wire.reactor import Reactor


def test_no_more_is_under_way_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "WINDOW_BYTES", 100)
    window = Window()
    assert window.take(b"a", 1, 10, 60) and not window.take(b"a", 1, 20, 60)
    assert window.take(b"b", 1, 10, 1000)  # one message goes always
    assert not window.take(b"b", 1, 11, 1)
    assert not window.acknowledged(b"a", 9)
    assert window.acknowledged(b"a", 10) and not window.acknowledged(b"a", 10)
    assert window.take(b"a", 1, 20, 60) and window.take(b"a", 1, 30, 40) and not window.take(b"a", 1, 40, 1)
    window.forget(b"a")
    assert window.take(b"a", 1, 20, 60)
    assert window.take(b"a", 2, 20, 60)  # of another term, nothing counts
    assert not window.acknowledged(b"b", 10) and window.take(b"b", 2, 11, 1)


@pytest.mark.parametrize("away", ["killed", "frozen", "there"])
def test_large_values_do_not_cut_off_who_lacks_them(
    away: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are more than may wait on a link. Without the window the peer is cut off for reading too slowly, comes back,
    and is cut off again; and when it is a voter that is needed, nobody leads for long."""
    dropped: list[str] = []
    drop = Reactor.drop

    def noted(reactor: Reactor, link: object, reason: str, error: Exception | None = None) -> None:
        dropped.append(reason)
        drop(reactor, link, reason, error)  # type: ignore[arg-type]

    monkeypatch.setattr(Reactor, "drop", noted)
    monkeypatch.setattr(window_module, "WINDOW_BYTES", 256 << 10)
    monkeypatch.setattr(
        heads_world, "make_reactor", lambda name="": make_reactor(name=name, output_backlog_bytes_max=2 << 20)
    )
    world = HeadsWorld(tmp_path, install_clock(monkeypatch))
    world.start()
    leader = world.leader()
    assert leader.host is not None
    term = leader.host.replica.status()["term"]
    head = next(each for each in world.heads if not each.leads)
    if away == "killed":
        head.kill()
    head.frozen = away == "frozen"
    results: list[Result] = []
    clients = [world.client() for _ in range(5)]
    for number in range(40):
        clients[number % 5].command(put(b"k%d" % number, bytes(200_000)), results.append)
    world.until(lambda: len(results) == 40)
    head.frozen = False
    if away == "killed":
        head.start(world.endpoints)
    world.until(lambda: head.host is not None and len(head.host.replica.state.kv_keys("ns")) == 40)
    assert not [reason for reason in dropped if "too slowly" in reason]
    assert leader.leads and leader.host.replica.status()["term"] == term
    world.close()


def test_what_a_full_disk_has_dropped_is_not_under_way_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link stays, and no answer comes for what was not taken."""
    monkeypatch.setattr(window_module, "WINDOW_BYTES", 200)
    monkeypatch.setattr(library, "BATCH_BYTES", 100)
    world = made()
    full = followers(world)[0]
    full.disk.full = True
    for number in range(20):
        world.write(b"k%d" % number)
    world.run(500)
    assert not world.has(full, b"k19")
    full.disk.full = False
    world.run_until(lambda: world.has(full, b"k19"))
    world.converge()


def test_with_a_new_link_and_when_something_is_lacking_nothing_is_under_way() -> None:
    world = made()
    leader, peer = world.leader(), followers(world)[0].disk.replica_id
    engine, term = leader.engine, leader.engine.term

    def fill() -> None:
        assert engine.window.take(peer, term, 10**6, 10**9) and not engine.window.take(peer, term, 10**6, 1)

    fill()
    engine.connected(peer)
    fill()
    engine.on_ack(peer, m.Ack(term, 0, engine.last_index + 1, True, False))
    fill()


def test_more_is_sent_as_soon_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the next sign of life only: that would be 30 ms for each window."""
    world = made()
    world.write(b"a")
    world.run(100)
    leader, peer = world.leader(), followers(world)[0].disk.replica_id
    engine, last = leader.engine, leader.engine.last_index
    monkeypatch.setattr(window_module, "WINDOW_BYTES", 100)
    assert engine.window.take(peer, engine.term, last, 90) and not engine.window.take(peer, engine.term, last + 1, 90)
    assert engine.next_wake_ms() > world.now_ms
    engine.on_ack(peer, m.Ack(engine.term, 0, last + 1, False, True))
    assert engine.next_wake_ms() <= world.now_ms
