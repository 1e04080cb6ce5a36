"""The GCS state machine: commands, nodes, jobs, key-value, and the life of actors through all failures."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from gcs_states import C3, CAUSE, DRIVER, JOB, N1, N2, N3, A, B, Gcs, ident, register_node

from ftray.gcs.state import commands as c
from ftray.gcs.state import handlers
from ftray.gcs.state.errors import CommandError, CommandVersionError, UnknownCommandError
from ftray.gcs.state.lifecycle import TRANSITIONS, ActorEvent
from ftray.gcs.state.state import admit
from ftray.gcs.state.tables import ActorState, Code, DeathKind, JobState, NodeState

EXAMPLES: list[Any] = [
    register_node(N1),
    c.MarkNodeDead(N1, 1, CAUSE),
    c.AddJob(JOB, DRIVER, 7, N1, "main.py", "ns"),
    c.FinishJob(JOB, CAUSE),
    c.KvPut("ns", b"k", b"v", False),
    c.KvDelete("ns", b"k", True),
    c.JobKvPut(JOB, "functions", b"key", b"value", False),
    c.RegisterActor(A, JOB, DRIVER, N1, "Counter", "name", "ns", 3, False, {"CPU": 1.0}, b"spec", True),
    c.ActorPlacing(A, 0, N1),
    c.ActorAlive(A, 0, B, "unix:/w", N1, 12),
    c.ActorDied(A, 0, CAUSE, False),
    c.ActorOutOfScope(A, DRIVER),
    c.KillActor(A, True, "enough"),
    c.ActorUnplaced(A, 0, N1, "no room"),
    c.ActorUnschedulable(A, 0, "9 CPU asked, no node has more than 2"),
    c.WorkerDied(B, N1, CAUSE),
    c.CreateGroup(A, JOB, DRIVER, N1, [{"CPU": 1.0}, {"GPU": 2.0}], "SPREAD", "name", "ns", False),
    c.GroupPlacing(A, 0, {0: N1, 1: N1}),
    c.BundlesPrepared(A, 0, N1),
    c.BundlesRefused(A, 0, N1, "no room"),
    c.BundlesCommitted(A, 0, N1),
    c.BundlesReturned(A, 0, N1, "removed"),
    c.RemoveGroup(A, "enough"),
    c.GroupInfeasible(A, 0, "2 GPU are needed"),
    c.ForgetClients([DRIVER]),
]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_each_command_survives_encoding_and_has_a_handler() -> None:
    assert {type(each).__name__ for each in EXAMPLES} == set(c.COMMAND_NAMES.values())
    for command in EXAMPLES:
        assert c.decode_command(c.encode_command(command)) == command
    assert {*handlers.HANDLERS, c.ForgetClients} == {type(each) for each in EXAMPLES}


def test_bytes_that_are_no_command_are_typed_errors() -> None:
    version = bytes([c.COMMAND_VERSION])
    with pytest.raises(CommandVersionError, match="version 99"):
        c.decode_command(b"\x63" + c.encode_command(EXAMPLES[0])[1:])
    with pytest.raises(UnknownCommandError, match="type 77"):
        c.decode_command(version + msgspec.msgpack.encode([77, 1]))
    with pytest.raises(CommandError, match="FinishJob"):
        c.decode_command(version + msgspec.msgpack.encode([11, "not bytes"]))
    with pytest.raises(CommandError, match="malformed"):
        c.decode_command(version + msgspec.msgpack.encode([20, "ns", b"k", b"v", True, "a field too many"]))
    for rubbish in (b"", version, version + b"\xff\x00", version + b"\x91" * 5000, version + b"\xc1"):
        with pytest.raises(CommandError):
            c.decode_command(rubbish)


def test_values_over_the_limit_are_named() -> None:
    assert admit(c.KvPut("fn", b"k", bytes(10)), 10) is None
    assert "takes 11 bytes, more than the limit of 10" in str(admit(c.KvPut("fn", b"k", bytes(11)), 10))
    assert "Counter" in str(admit(c.RegisterActor(A, JOB, DRIVER, N1, "Counter", creation=bytes(11)), 10))


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_a_repeated_registration_changes_nothing() -> None:
    gcs = Gcs()
    revision = gcs.state.revision
    assert gcs.do(register_node(N1)).ok
    assert gcs.state.revision == revision


def test_a_dead_node_is_fenced_until_it_comes_with_a_higher_incarnation() -> None:
    gcs = Gcs()
    assert gcs.do(c.MarkNodeDead(N2, 1, CAUSE)).ok
    fenced = gcs.do(register_node(N2))
    assert fenced.code is Code.FENCED and "killed by signal 9" in fenced.message
    assert gcs.do(register_node(N2, 2)).ok
    assert gcs.do(register_node(N2, 1)).code is Code.FENCED
    assert gcs.do(c.MarkNodeDead(N2, 1, CAUSE)).code is Code.STALE_INCARNATION
    assert gcs.do(c.MarkNodeDead(ident("who"), 1, CAUSE)).code is Code.NOT_FOUND


def test_a_nodes_death_restarts_its_actors_and_ends_what_its_workers_owned() -> None:
    gcs = Gcs(3)
    gcs.register(A, max_restarts=1)
    worker = gcs.alive(A, N2)
    gcs.register(B, owner=worker, node=N2, max_restarts=5)
    gcs.alive(B, N3)
    assert gcs.do(c.MarkNodeDead(N2, 1, CAUSE)).ok
    actor = gcs.actor(A)
    assert (actor.state, actor.restarts, actor.incarnation, actor.kind) == (
        ActorState.RESTARTING,
        1,
        1,
        DeathKind.NODE_DIED,
    )
    owned = gcs.actor(B)
    assert (owned.state, owned.kind) == (ActorState.DEAD, DeathKind.OWNER_DIED)
    assert owned.leftover is not None and owned.leftover.node_id == N3


def test_nothing_is_left_to_be_stopped_on_a_dead_node() -> None:
    gcs = Gcs()
    gcs.register(A)
    worker = gcs.alive(A, N2)
    gcs.register(B, owner=worker, node=N2)
    owned = gcs.alive(B, N2)
    gcs.register(C3, owner=owned, node=N2)
    gcs.do(c.ActorOutOfScope(A))
    gcs.do(c.MarkNodeDead(N2, 1, CAUSE))
    assert [gcs.actor(each).leftover for each in (A, B, C3)] == [None] * 3
    assert [gcs.actor(each).kind for each in (A, B, C3)] == [
        DeathKind.OUT_OF_SCOPE,
        DeathKind.OWNER_DIED,
        DeathKind.OWNER_DIED,
    ]


def test_a_node_that_dies_before_the_actor_ran_costs_no_restart() -> None:
    gcs = Gcs()
    gcs.register()
    gcs.do(c.ActorPlacing(A, 0, N2))
    gcs.do(c.MarkNodeDead(N2, 1, CAUSE))
    actor = gcs.actor()
    assert (actor.state, actor.restarts, actor.incarnation) == (ActorState.PENDING, 0, 1)
    assert gcs.do(c.ActorAlive(A, 0, B, "unix:/w", N2, 1)).code is Code.FENCED
    assert gcs.do(c.ActorAlive(A, 0, B, "unix:/w", N1, 1)).code is Code.STALE_INCARNATION


def test_a_node_that_started_again_has_lost_its_actors() -> None:
    gcs = Gcs()
    gcs.register(max_restarts=-1)
    gcs.alive()
    assert gcs.do(register_node(N2, 2)).ok
    assert gcs.actor().state is ActorState.RESTARTING
    node = gcs.state.node(N2)
    assert node is not None and node.state is NodeState.ALIVE and node.incarnation == 2


def test_the_drivers_node_takes_the_job_with_it() -> None:
    gcs = Gcs()
    gcs.register(A)
    gcs.register(B, owner=None)
    gcs.alive(B, N2)
    gcs.do(c.MarkNodeDead(N1, 1, CAUSE))
    assert gcs.state.store.jobs[JOB].state is JobState.FINISHED
    assert gcs.actor(A).state is ActorState.DEAD
    assert gcs.actor(B).state is ActorState.ALIVE


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_job_ids_are_one_drivers() -> None:
    gcs = Gcs()
    assert gcs.do(c.AddJob(JOB, DRIVER, 7, N1, "main.py", "ns")).ok
    assert gcs.do(c.AddJob(JOB, ident("other"), 7, N1, "x.py", "ns")).code is Code.EXISTS
    assert gcs.do(c.AddJob(b"long!", DRIVER, 7, N1, "x.py", "ns")).code is Code.INVALID
    assert gcs.do(c.AddJob(b"job2", ident("other"), 7, N3, "x.py", "ns")).code is Code.OWNER_DIED
    assert gcs.do(c.FinishJob(b"none")).code is Code.NOT_FOUND
    assert gcs.do(c.FinishJob(JOB)).ok
    assert gcs.do(c.AddJob(JOB, DRIVER, 7, N1, "main.py", "ns")).code is Code.ENDED


def test_a_finished_job_ends_all_but_detached_actors_and_what_they_own() -> None:
    gcs = Gcs()
    gcs.register(A)
    gcs.alive(A, N1)
    gcs.register(B, owner=None)
    detached = gcs.alive(B, N1)
    gcs.register(C3, owner=detached, node=N1)
    child = gcs.alive(C3, N2)
    gcs.register(ident("d"), owner=child, node=N2)
    assert gcs.do(c.FinishJob(JOB)).ok
    dead = gcs.actor(A)
    assert (dead.state, dead.kind) == (ActorState.DEAD, DeathKind.JOB_FINISHED)
    assert dead.leftover is not None and not dead.leftover.graceful
    assert [gcs.actor(each).state for each in (B, C3, ident("d"))] == [
        ActorState.ALIVE,
        ActorState.ALIVE,
        ActorState.PENDING,
    ]
    # The detached actor may go on creating actors; nobody else of the job may.
    assert gcs.register(ident("e"), owner=detached, node=N1).ok
    assert gcs.register(ident("f")).code is Code.ENDED
    # All of it goes with the detached actor.
    assert gcs.do(c.KillActor(B, True, "")).ok
    assert {gcs.actor(each).kind for each in (C3, ident("d"), ident("e"))} == {DeathKind.OWNER_DIED}


def test_a_drivers_death_finishes_its_job_with_the_cause() -> None:
    gcs = Gcs()
    gcs.register()
    assert gcs.do(c.WorkerDied(DRIVER, N1, CAUSE)).ok
    assert gcs.state.store.jobs[JOB].cause == CAUSE
    actor = gcs.actor()
    assert actor.kind is DeathKind.JOB_FINISHED
    assert actor.cause is not None and actor.cause.reason.endswith("because its driver died: killed by signal 9")
    assert gcs.register(B).code is Code.OWNER_DIED


# --- key-value --------------------------------------------------------------------------------------------------------


def test_key_value() -> None:
    gcs = Gcs(0)
    assert gcs.do(c.KvPut("ns", b"a", b"1")).value == 1
    assert gcs.do(c.KvPut("ns", b"a", b"2")).value == 0
    revision = gcs.state.revision
    assert gcs.do(c.KvPut("ns", b"a", b"2")).value == 0
    assert gcs.state.revision == revision
    assert gcs.do(c.KvPut("ns", b"a", b"3", overwrite=False)).code is Code.EXISTS
    assert gcs.do(c.KvPut("ns", b"ab", b"4")).value == 1
    assert gcs.do(c.KvPut("other", b"a", b"5")).value == 1
    assert (gcs.state.kv_get("ns", b"a"), gcs.state.kv_get("ns", b"x")) == (b"2", None)
    assert gcs.state.kv_keys("ns") == [b"a", b"ab"]
    assert gcs.do(c.KvDelete("ns", b"x")).value == 0
    assert gcs.do(c.KvDelete("ns", b"a", prefix=True)).value == 2
    assert gcs.state.kv_keys("ns") == []
    assert gcs.state.kv_keys("other", b"a") == [b"a"]
    assert gcs.do(c.KvPut("n\0s", b"a", b"1")).code is Code.INVALID
    assert gcs.do(c.KvPut("ns", b"", b"1")).code is Code.INVALID
    assert gcs.do(c.KvPut("ns", bytes(handlers.KEY_BYTES_MAX + 1), b"1")).code is Code.INVALID


# --- actors -----------------------------------------------------------------------------------------------------------


def test_the_transition_table_is_closed() -> None:
    assert {state for state, _ in TRANSITIONS} == set(ActorState) - {ActorState.DEAD}
    assert all((state, ActorEvent.END) in TRANSITIONS for state in set(ActorState) - {ActorState.DEAD})


def test_an_actors_life_with_restarts() -> None:
    gcs = Gcs()
    assert gcs.register(max_restarts=2).value == A
    for restart in (1, 2):
        worker = gcs.alive()
        assert gcs.do(c.WorkerDied(worker, N2, CAUSE)).ok
        actor = gcs.actor()
        assert (actor.state, actor.restarts, actor.incarnation) == (ActorState.RESTARTING, restart, restart)
        assert (actor.kind, actor.cause, actor.leftover) == (DeathKind.WORKER_DIED, CAUSE, None)
    worker = gcs.alive()
    gcs.do(c.ActorDied(A, 2, CAUSE))
    actor = gcs.actor()
    assert (actor.state, actor.restarts, actor.creation) == (ActorState.DEAD, 2, b"")
    assert actor.cause is not None and actor.cause.reason == "killed by signal 9; its 2 restarts are spent"
    assert gcs.do(c.ActorDied(A, 2, CAUSE)).code is Code.STALE_INCARNATION
    assert gcs.do(c.WorkerDied(worker, N2, CAUSE)).ok


def test_restarts_without_end() -> None:
    gcs = Gcs()
    gcs.register(max_restarts=-1)
    for _ in range(5):
        gcs.do(c.WorkerDied(gcs.alive(), N2, CAUSE))
    assert gcs.actor().state is ActorState.RESTARTING


def test_a_constructor_that_raises_is_final_but_one_that_crashes_is_not() -> None:
    gcs = Gcs()
    gcs.register(A, max_restarts=5)
    gcs.do(c.ActorPlacing(A, 0, N1))
    gcs.do(c.ActorDied(A, 0, CAUSE, may_restart=True))
    assert gcs.actor().state is ActorState.RESTARTING
    gcs.do(c.ActorPlacing(A, 1, N1))
    gcs.do(c.ActorDied(A, 1, CAUSE, may_restart=False))
    assert gcs.actor().kind is DeathKind.CREATION_FAILED
    gcs.register(B, max_restarts=5)
    gcs.alive(B)
    gcs.do(c.ActorDied(B, 0, CAUSE, may_restart=False))
    assert gcs.actor(B).kind is DeathKind.EXITED


def test_names() -> None:
    gcs = Gcs()
    assert gcs.register(A, name="x", namespace="ns").ok
    taken = gcs.register(B, name="x", namespace="ns")
    assert taken.code is Code.EXISTS and "get_if_exists" in taken.message and A.hex() in taken.message
    assert gcs.register(B, name="x", namespace="ns", get_if_exists=True).value == A
    assert gcs.state.actor(B) is None
    assert gcs.register(B, name="x", namespace="other").ok
    gcs.do(c.KillActor(A, True, ""))
    assert gcs.state.named_actor("ns", "x") is None
    assert gcs.register(C3, name="x", namespace="ns", get_if_exists=True).value == C3


def test_registrations_that_can_not_be_right() -> None:
    gcs = Gcs()
    bad = [
        c.RegisterActor(b"short", JOB, DRIVER, N1, "X"),
        c.RegisterActor(A, JOB, None, N1, "X"),
        c.RegisterActor(A, JOB, DRIVER, N1, "X", detached=True),
        c.RegisterActor(A, JOB, DRIVER, N1, "X", max_restarts=-2),
        c.RegisterActor(A, JOB, DRIVER, N1, "X", resources={"CPU": float("nan")}),
        c.RegisterActor(A, JOB, DRIVER, N1, "X", resources={"CPU": -1.0}),
        c.RegisterActor(A, JOB, DRIVER, N1, "X", name="x" * 5000),
    ]
    assert {gcs.do(each).code for each in bad} == {Code.INVALID}
    assert gcs.do(c.RegisterActor(A, b"none", DRIVER, N1, "X")).code is Code.NOT_FOUND
    assert gcs.do(c.RegisterActor(A, JOB, DRIVER, N3, "X")).code is Code.OWNER_DIED


def test_an_actor_is_ended_by_its_last_handle_with_grace() -> None:
    gcs = Gcs()
    gcs.register()
    worker = gcs.alive()
    gcs.register(B, owner=worker, node=N2)
    assert gcs.do(c.ActorOutOfScope(A, ident("not its owner"))).code is Code.STALE_INCARNATION
    assert gcs.do(c.ActorOutOfScope(A, DRIVER)).ok
    actor = gcs.actor()
    assert (actor.state, actor.kind) == (ActorState.DEAD, DeathKind.OUT_OF_SCOPE)
    assert actor.leftover is not None and actor.leftover.graceful
    assert gcs.actor(B).state is ActorState.PENDING  # It may be needed for the calls that are being finished.
    assert gcs.do(c.KillActor(A, True, "now")).ok
    leftover = gcs.actor().leftover
    assert leftover is not None and not leftover.graceful
    assert gcs.actor(B).state is ActorState.DEAD
    assert gcs.do(c.WorkerDied(worker, N2, CAUSE)).ok
    assert gcs.actor().leftover is None
    assert gcs.do(c.ActorOutOfScope(ident("nobody"))).code is Code.NOT_FOUND


def test_a_detached_actor_does_not_go_out_of_scope() -> None:
    gcs = Gcs()
    gcs.register(owner=None)
    assert gcs.do(c.ActorOutOfScope(A)).code is Code.ILLEGAL


def test_a_killed_actor_is_not_placed_again_before_its_process_is_gone() -> None:
    gcs = Gcs()
    gcs.register(max_restarts=1)
    gcs.alive()
    assert gcs.do(c.KillActor(A, False, "")).ok
    actor = gcs.actor()
    assert (actor.state, actor.incarnation, actor.kind) == (ActorState.RESTARTING, 1, DeathKind.KILLED)
    assert gcs.do(c.ActorPlacing(A, 1, N1)).code is Code.ILLEGAL
    assert gcs.do(c.ActorDied(A, 0, CAUSE)).ok
    assert gcs.do(c.ActorPlacing(A, 1, N1)).ok
    assert gcs.do(c.ActorPlacing(A, 1, N1)).ok  # A repeat.
    assert gcs.do(c.ActorPlacing(A, 1, N2)).code is Code.ILLEGAL
    assert gcs.do(c.KillActor(A, False, "")).ok
    assert gcs.actor().state is ActorState.DEAD
    assert gcs.do(c.KillActor(A, False, "")).ok


def test_killing_with_restart_an_actor_that_is_not_running_changes_nothing() -> None:
    gcs = Gcs()
    gcs.register(max_restarts=1)
    revision = gcs.state.revision
    assert gcs.do(c.KillActor(A, False, "")).ok
    assert gcs.state.revision == revision


def test_a_node_may_refuse_an_actor() -> None:
    gcs = Gcs()
    gcs.register()
    gcs.do(c.ActorPlacing(A, 0, N2))
    assert gcs.do(c.ActorUnplaced(A, 0, N1, "?")).code is Code.ILLEGAL
    assert gcs.do(c.ActorUnplaced(A, 0, N2, "no room")).ok
    actor = gcs.actor()
    assert (actor.state, actor.incarnation, actor.node_id, actor.restarts) == (ActorState.PENDING, 1, b"", 0)


def test_a_task_that_runs_again_takes_its_actor_over() -> None:
    gcs = Gcs()
    gcs.register(A, owner=ident("t1"), node=N2, name="x")
    assert gcs.register(A, owner=ident("t1"), node=N2, name="x").ok
    gcs.alive(A, N2)
    assert gcs.register(A, owner=ident("t2"), node=N1, name="x").value == A
    actor = gcs.actor()
    assert (actor.state, actor.incarnation, actor.restarts) == (ActorState.PENDING, 1, 0)
    assert actor.leftover is not None and actor.leftover.incarnation == 0
    # The earlier owner's death is no longer this actor's business.
    assert gcs.do(c.WorkerDied(ident("t1"), N2, CAUSE)).ok
    assert gcs.actor().state is ActorState.PENDING
    assert gcs.do(c.WorkerDied(ident("t2"), N1, CAUSE)).ok
    assert gcs.register(A, owner=ident("t3"), node=N1, name="x").ok
    assert gcs.actor().state is ActorState.PENDING
    gcs.do(c.KillActor(A, True, "done"))
    assert gcs.register(A, owner=ident("t3"), node=N1, name="x").code is Code.ENDED


def test_a_long_chain_of_owners_falls_with_the_first() -> None:
    gcs = Gcs()
    owner = DRIVER
    names = [f"x{i}".encode().ljust(16, b"-") for i in range(1500)]
    for actor_id in names:
        worker = b"w" + actor_id[1:]
        for command in (
            c.RegisterActor(actor_id, JOB, owner, N1, "X"),
            c.ActorPlacing(actor_id, 0, N1),
            c.ActorAlive(actor_id, 0, worker, "unix:/w", N1, 1),
        ):
            assert gcs.state.apply(b"", 0, command).ok
        owner = worker
    assert gcs.do(c.WorkerDied(b"w" + names[0][1:], N1, CAUSE)).ok
    dead = [gcs.actor(each) for each in names]
    assert all(each.state is ActorState.DEAD for each in dead)
    assert all(len(each.cause.reason) < 200 for each in dead if each.cause is not None)


def test_what_a_dead_worker_or_node_says_does_not_count() -> None:
    gcs = Gcs()
    gcs.register(max_restarts=1)
    gcs.do(c.ActorPlacing(A, 0, N2))
    gcs.do(c.WorkerDied(B, N2, CAUSE))
    assert gcs.do(c.ActorAlive(A, 0, B, "unix:/w", N2, 1)).code is Code.ENDED
    assert gcs.do(c.ActorAlive(A, 0, C3, "unix:/w", N1, 1)).code is Code.ILLEGAL
    assert gcs.do(c.ActorAlive(A, 0, C3, "unix:/w", N3, 1)).code is Code.FENCED
    assert gcs.do(c.ActorAlive(A, 0, C3, "unix:/w", N2, 1)).ok
    assert gcs.do(c.ActorAlive(A, 0, C3, "unix:/w", N2, 1)).ok
