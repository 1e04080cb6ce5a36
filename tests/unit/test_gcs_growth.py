"""What the GCS lets go of: keys of ended jobs and actors, watches that ended, clients that were silent for long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gcs_states import JOB, N1, N2, A, B, Gcs, ident
from gcs_world import CLIENT, World, gcs_world, put

from ftray.gcs.raft.peers import REFUSALS_MAX, Peers
from ftray.gcs.replica import Request
from ftray.gcs.state import commands as c
from ftray.gcs.state import sessions, store
from ftray.gcs.state.job_keys import HANDLES
from ftray.gcs.state.managers import ActorManager
from ftray.gcs.state.packages import PACKAGES, USERS
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import ActorState, Change, Code, Result, Table, kv_key

OTHER, DRIVER2 = b"job2", ident("driver2")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with gcs_world(tmp_path, monkeypatch) as world:
        yield world


def export(job: bytes, key: bytes) -> c.JobKvPut:
    return c.JobKvPut(job, "functions", key, key)


def two_jobs() -> Gcs:
    gcs = Gcs()
    assert gcs.do(c.AddJob(OTHER, DRIVER2, 8, N1, "other.py", "ns")).ok
    return gcs


def end(gcs: Gcs, actor_id: bytes) -> None:
    gcs.do(c.KillActor(actor_id, True, "enough"))


# --- keys of jobs -----------------------------------------------------------------------------------------------------


def test_a_key_goes_with_the_last_job_that_has_put_it() -> None:
    gcs = two_jobs()
    gcs.do(put(b"of nobody"))
    assert gcs.do(export(JOB, b"mine")).value == 1
    assert gcs.do(export(JOB, b"ours")).value == 1
    assert gcs.do(export(OTHER, b"ours")).value == 0
    gcs.do(c.FinishJob(JOB))
    assert gcs.state.kv_keys("functions") == [b"ours"]
    assert GcsState.restore(gcs.state.snapshot(), gcs.state.cluster_id).check() == []
    gcs.do(c.WorkerDied(DRIVER2, N1, c.DeathCauseRecord(reason="killed")))
    assert list(gcs.state.store.kv) == [kv_key("ns", b"of nobody")]


def test_what_is_put_for_no_job_or_one_that_is_over_is_refused() -> None:
    gcs = Gcs()
    assert gcs.do(export(OTHER, b"k")).code is Code.NOT_FOUND
    gcs.do(c.FinishJob(JOB))
    assert gcs.do(export(JOB, b"k")).code is Code.ENDED
    assert gcs.do(c.KvPut(USERS, JOB + b"1" * 16, b"")).code is Code.ENDED
    assert gcs.state.store.kv == {}


def test_detached_actors_keep_the_keys_of_their_job_until_the_last_is_dead() -> None:
    gcs = Gcs()
    gcs.do(c.KvPut(USERS, JOB, b""))
    gcs.do(c.KvPut(USERS, JOB + b"1" * 16, b""))
    gcs.do(c.KvPut(PACKAGES, b"1" * 16, b"code"))
    gcs.do(export(JOB, b"class"))
    for actor_id, name in ((A, "one"), (B, "two")):
        gcs.register(actor_id, owner=None, name=name, namespace="ns")
        gcs.alive(actor_id)
    gcs.do(c.FinishJob(JOB))
    assert gcs.do(export(JOB, b"another")).ok  # what they export, they may need
    end(gcs, A)
    assert gcs.state.kv_keys("functions") == [b"another", b"class"] and gcs.state.kv_keys(PACKAGES) == [b"1" * 16]
    end(gcs, B)
    assert gcs.state.store.kv == {}


def test_what_is_kept_for_a_named_actor_goes_with_it() -> None:
    gcs = Gcs()
    for actor_id in (A, B):
        gcs.do(c.JobKvPut(JOB, HANDLES, actor_id, b"facts"))
        gcs.register(actor_id, name=actor_id.decode(), namespace="ns")
        gcs.alive(actor_id)
    end(gcs, A)
    assert gcs.state.kv_keys(HANDLES) == [B] and len(gcs.state.store.kv) == 2
    gcs.do(c.KillActor(B, False, "to be started again"))
    assert gcs.actor(B).state is ActorState.DEAD and gcs.state.store.kv == {}


def test_a_refused_actors_facts_go_with_the_job() -> None:
    gcs = Gcs()
    gcs.do(c.JobKvPut(JOB, HANDLES, A, b"facts"))  # and its driver dies before it registers the actor
    gcs.do(c.FinishJob(JOB))
    assert gcs.state.store.kv == {}


def test_a_deleted_key_is_needed_by_nobody() -> None:
    gcs = Gcs()
    for key in (b"a", b"b1", b"b2"):
        gcs.do(export(JOB, key))
    assert gcs.do(c.KvDelete("functions", b"a")).value == 1
    assert gcs.do(c.KvDelete("functions", b"b", prefix=True)).value == 2
    assert gcs.state.store.kv == {} and gcs.state.check() == []


def test_parts_of_a_package_that_came_late_go_with_the_next_job() -> None:
    gcs = two_jobs()
    for job in (JOB, OTHER):
        gcs.do(c.KvPut(USERS, job, b""))
    gcs.do(c.FinishJob(JOB))
    gcs.do(c.KvPut(PACKAGES, b"1" * 16 + b"\0\0\0\1", b"part"))
    gcs.do(c.FinishJob(OTHER))
    assert gcs.state.store.kv == {}


def test_a_finished_job_is_kept_while_actors_of_it_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.ENDED_MAX, Table.JOBS, 1)
    gcs = Gcs()
    gcs.register(A, owner=None, name="a", namespace="ns")
    worker = gcs.alive(A)
    gcs.do(c.FinishJob(JOB))
    for number in range(3):
        job = b"old%d" % number
        gcs.do(c.AddJob(job, ident(f"d{number}"), 8, N1, "other.py", "ns"))
        gcs.do(c.FinishJob(job))
    assert list(gcs.state.store.jobs) == [JOB, b"old2"]
    assert gcs.register(B, owner=worker, node=N2).ok  # a detached actor goes on
    restored = GcsState.restore(gcs.state.snapshot(), gcs.state.cluster_id)
    assert restored.snapshot() == gcs.state.snapshot()
    end(gcs, A)
    for actor_id in (A, B):
        left = gcs.actor(actor_id).leftover
        if left is not None:
            gcs.do(c.ActorDied(actor_id, left.incarnation, c.DeathCauseRecord(reason="stopped")))
    assert list(gcs.state.store.jobs) == [JOB]  # the newest that has ended


# --- what shells remember ---------------------------------------------------------------------------------------------


def test_an_actor_that_fails_for_ever_is_not_remembered_for_ever() -> None:
    gcs = Gcs()
    manager = ActorManager(gcs.state)
    gcs.register(A, max_restarts=-1)
    for now_s in range(200):
        manager.on_changes(gcs.state.take_changes())
        for effect in manager.plan(gcs.state, now_s * 10_000.0):
            if type(effect).__name__ == "Submit":
                gcs.do(effect.command)  # type: ignore[union-attr]
        if gcs.actor().state is ActorState.PLACING:
            manager.on_changes(gcs.state.take_changes())
            manager.plan(gcs.state, now_s * 10_000.0)
            gcs.do(c.ActorDied(A, gcs.actor().incarnation, c.DeathCauseRecord(reason="its constructor crashed")))
    assert gcs.actor().restarts > 50
    assert len(manager._watched[A].told) < 4


def test_the_server_forgets_keys_that_are_not_watched_any_more(world: World) -> None:
    watcher, writer = world.client(b"watcher"), world.client(b"writer")
    changes: list[Change] = []
    watch = watcher.watch([Table.KV], (), changes.append)
    for number in range(50):
        watcher.add_watch_key(watch, kv_key("ns", b"%d" % number))
        world.settle()
        if number:
            watcher.remove_watch_key(watch, kv_key("ns", b"%d" % number))
    world.settle()
    assert list(world.server.watchers._by_key) == [(Table.KV, kv_key("ns", b"0"))]
    world.run(writer, put(b"0", b"told"))
    world.run(writer, put(b"1", b"not told"))
    assert [change.key for change in changes if change.record is not None] == [kv_key("ns", b"0")]
    watcher.add_watch_key(watch, kv_key("ns", b"1"))
    world.settle()
    assert changes[-1].key == kv_key("ns", b"1") and changes[-1].record is not None


# --- clients that were silent for long --------------------------------------------------------------------------------


def forget(world: World, client_id: bytes = CLIENT) -> None:
    world.replica.propose(Request(b"", 0, c.encode_command(c.ForgetClients([client_id]))), lambda result: None)
    world.replica.flush()


def test_a_client_that_was_forgotten_goes_on_under_a_new_id(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CLIENTS_MAX", 3)
    quiet = world.client()
    told: list[Change] = []
    quiet.watch([Table.KV], [kv_key("ns", b"k")], told.append)
    assert world.run(quiet, put(b"k", b"1")).ok
    for number in range(4):
        assert world.run(world.client(b"other%d" % number), put(b"other")).ok
    assert CLIENT in world.replica.state.sessions.forgotten
    results: list[Result] = []
    quiet.command(put(b"k", b"2"), results.append)
    quiet.command(put(b"k", b"3"), results.append)
    world.settle(100)
    assert [result.ok for result in results] == [True, True]
    assert quiet.client_id != CLIENT and len(quiet.client_id) == len(CLIENT)
    assert [change.record.value for change in told if change.record is not None][-1] == b"3"  # type: ignore[union-attr]


def test_a_command_that_may_have_taken_effect_is_not_repeated_under_another_id(world: World) -> None:
    client = world.client()
    assert world.run(client, put(b"k")).ok
    results: list[Result] = []
    client.command(c.KvDelete("ns", b"k"), results.append)
    client.reactor.flush_dirty()
    world.stop()  # it may have been carried out before
    world.settle()
    world.start()
    forget(world)
    client.command(put(b"next"), results.append)
    world.settle(1_000)
    assert [result.code for result in results] == [Code.SESSION_EXPIRED, Code.OK]
    assert world.replica.state.kv_get("ns", b"k") is not None


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_of_a_cause_of_death_a_part_is_kept() -> None:
    gcs = Gcs()
    gcs.register(A)
    gcs.alive(A)
    lines = ["first " + "a" * 7_000, "b" * 5_000, "last"]
    gcs.do(c.ActorDied(A, gcs.actor().incarnation, c.DeathCauseRecord(reason="r" * 9_000, stderr_tail=lines), False))
    cause = gcs.actor().cause
    assert cause is not None
    assert cause.reason == "r" * 2_000
    assert cause.stderr_tail == ["a" * 2_996, "b" * 5_000, "last"]  # the end is what explains it
    short = c.DeathCauseRecord(reason="short", stderr_tail=["line"])
    gcs.do(c.WorkerDied(ident("w9"), N1, short))
    assert gcs.state.store.worker_failures[ident("w9")].cause == short


def test_refusals_of_strangers_are_bounded() -> None:
    peers = Peers.__new__(Peers)
    peers.refusals = {}
    for number in range(3 * REFUSALS_MAX):
        peers._note_refusal(f"tcp:stranger{number}:1", "no member")
    assert len(peers.refusals) == REFUSALS_MAX and f"tcp:stranger{3 * REFUSALS_MAX - 1}:1" in peers.refusals
