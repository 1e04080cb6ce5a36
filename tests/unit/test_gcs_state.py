"""The GCS state machine: nodes, jobs, actors and their failures, exactly once, change feed, snapshots."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ftray.gcs.state import commands as c
from ftray.gcs.state import handlers, sessions, state, store
from ftray.gcs.state.errors import (
    ClusterMismatchError,
    CommandError,
    CommandVersionError,
    SnapshotCorruptError,
    SnapshotVersionError,
    UnknownCommandError,
)
from ftray.gcs.state.lifecycle import TRANSITIONS, ActorEvent
from ftray.gcs.state.state import COMPACTED, GcsState, admit
from ftray.gcs.state.tables import ActorRecord, ActorState, Code, DeathKind, JobState, NodeState, Result, Table

CLUSTER = b"C" * 16
JOB = b"job1"
DRIVER = b"D" * 16
CAUSE = c.DeathCauseRecord(reason="killed by signal 9", signal=9, stderr_tail=["boom"])


def ident(name: str) -> bytes:
    return name.encode().ljust(16, b".")


N1, N2, N3 = ident("n1"), ident("n2"), ident("n3")
A, B, C3 = ident("a"), ident("b"), ident("c")


class Gcs:
    """A state with short ways to say things; checks the invariants after each command."""

    def __init__(self, nodes: int = 2) -> None:
        self.state = GcsState(CLUSTER)
        for node_id in (N1, N2, N3)[:nodes]:
            assert self.do(register_node(node_id)).ok
        if nodes:
            assert self.do(c.AddJob(JOB, DRIVER, 7, N1, "main.py", "ns")).ok

    def do(self, command: Any, client: bytes = b"", sequence: int = 0) -> Result:
        result = self.state.apply(client, sequence, command)
        assert self.state.check() == []
        return result

    def actor(self, actor_id: bytes = A) -> ActorRecord:
        record = self.state.actor(actor_id)
        assert record is not None
        return record

    def register(self, actor_id: bytes = A, owner: bytes | None = DRIVER, node: bytes = N1, **more: Any) -> Result:
        detached = owner is None
        return self.do(c.RegisterActor(actor_id, JOB, owner, node, "Counter", detached=detached, creation=b"x", **more))

    def alive(self, actor_id: bytes = A, node: bytes = N2, worker: bytes | None = None) -> bytes:
        """Places the actor and reports it alive; returns its worker."""
        incarnation = self.actor(actor_id).incarnation
        worker = worker or ident(f"w{actor_id[:1].decode()}{incarnation}")
        assert self.do(c.ActorPlacing(actor_id, incarnation, node)).ok
        assert self.do(c.ActorAlive(actor_id, incarnation, worker, "unix:/w", node, 11)).ok
        return worker


def register_node(node_id: bytes, incarnation: int = 1) -> c.RegisterNode:
    return c.RegisterNode(node_id, "unix:/n", {"CPU": 4.0}, {"zone": "a"}, incarnation, "host", 3)


EXAMPLES: list[Any] = [
    register_node(N1),
    c.MarkNodeDead(N1, 1, CAUSE),
    c.AddJob(JOB, DRIVER, 7, N1, "main.py", "ns"),
    c.FinishJob(JOB, CAUSE),
    c.KvPut("ns", b"k", b"v", False),
    c.KvDelete("ns", b"k", True),
    c.RegisterActor(A, JOB, DRIVER, N1, "Counter", "name", "ns", 3, False, {"CPU": 1.0}, b"spec", True),
    c.ActorPlacing(A, 0, N1),
    c.ActorAlive(A, 0, B, "unix:/w", N1, 12),
    c.ActorDied(A, 0, CAUSE, False),
    c.ActorOutOfScope(A, DRIVER),
    c.KillActor(A, True, "enough"),
    c.ActorUnplaced(A, 0, N1, "no room"),
    c.WorkerDied(B, N1, CAUSE),
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


# --- exactly once -----------------------------------------------------------------------------------------------------


def test_a_retry_takes_effect_once() -> None:
    gcs = Gcs(0)
    first = gcs.do(c.KvPut("ns", b"k", b"1"), b"me", 1)
    gcs.do(c.KvPut("ns", b"k", b"2"), b"you", 1)
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"me", 1) == first
    assert gcs.state.kv_get("ns", b"k") == b"2"
    refused = gcs.do(c.KvPut("ns", b"k", b"3", overwrite=False), b"me", 2)
    gcs.do(c.KvDelete("ns", b"k"), b"you", 2)
    assert gcs.do(c.KvPut("ns", b"k", b"3", overwrite=False), b"me", 2) == refused
    assert gcs.state.kv_get("ns", b"k") is None
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"me", 1).code is Code.STALE
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"x" * 65, 1).code is Code.INVALID
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"me", -1).code is Code.INVALID


def test_forgotten_clients_stay_barred() -> None:
    gcs = Gcs()
    worker = ident("worker")
    gcs.do(c.KvPut("ns", b"k", b"1"), worker, 1)
    gcs.do(c.WorkerDied(worker, N1, CAUSE))
    gcs.do(c.KvDelete("ns", b"k"))
    assert gcs.do(c.KvPut("ns", b"k", b"1"), worker, 1).code is Code.SESSION_EXPIRED
    assert gcs.state.kv_get("ns", b"k") is None
    gcs.do(c.KvPut("ns", b"k", b"1"), b"x", 1)
    # A client can't forget itself: its own retry must find the result.
    assert gcs.do(c.ForgetClients([b"x", b"y", b"z"]), b"y", 1).value == 1
    assert gcs.do(c.ForgetClients([b"x", b"y", b"z"]), b"y", 1).value == 1
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"z", 1).code is Code.SESSION_EXPIRED
    # A driver that says goodbye gets the same answer again.
    assert gcs.do(c.FinishJob(JOB), DRIVER, 1) == gcs.do(c.FinishJob(JOB), DRIVER, 1)


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CLIENTS_MAX", 3)
    monkeypatch.setattr(sessions, "FORGOTTEN_MAX", 2)
    gcs = Gcs(0)
    for i in range(3):
        gcs.do(c.KvPut("ns", b"k", b"1"), b"c%d" % i, 1)
    gcs.do(c.KvPut("ns", b"k", b"2"), b"c0", 2)
    for i in range(3, 6):
        gcs.do(c.KvPut("ns", b"k", b"1"), b"c%d" % i, 1)
    assert set(gcs.state.sessions.last) == {b"c3", b"c4", b"c5"}
    assert list(gcs.state.sessions.forgotten) == [b"c2", b"c0"]


# --- faults -----------------------------------------------------------------------------------------------------------


def test_apply_never_raises_and_a_fault_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    gcs = Gcs()
    before = gcs.state.snapshot()

    def broken(tables: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(state, "settle", broken)
    result = gcs.state.apply(b"", 0, c.MarkNodeDead(N1, 1, CAUSE))
    assert result.code is Code.INTERNAL and "a bug" in result.message
    monkeypatch.undo()
    assert gcs.state.snapshot() == before and gcs.state.check() == []
    wrong: Any = [
        c.KvPut(["?"], b"k", b"v"),  # type: ignore[arg-type]
        c.RegisterActor(A, JOB, DRIVER, N1, "X", name=["?"]),  # type: ignore[arg-type]
        c.RegisterNode(None, "", {}, {}, 1, "", 1),  # type: ignore[arg-type]
        "not a command",
    ]
    for each in wrong:
        assert gcs.do(each).code is Code.INTERNAL
    assert gcs.state.snapshot() == before


def test_out_of_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tables: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(state, "settle", broken)
    with pytest.raises(MemoryError):
        Gcs(0).state.apply(b"", 0, c.KvPut("ns", b"k", b"v"))


# --- the change feed --------------------------------------------------------------------------------------------------


def test_one_command_one_revision_and_the_net_changes() -> None:
    gcs = Gcs()
    gcs.register(A, name="x")
    gcs.register(B)
    gcs.state.take_changes()
    revision = gcs.state.revision
    gcs.do(c.FinishJob(JOB))
    changes = gcs.state.take_changes()
    assert {each.revision for each in changes} == {revision + 1}
    assert [(each.table, each.key) for each in changes] == [(Table.JOBS, JOB), (Table.ACTORS, A), (Table.ACTORS, B)]
    assert changes[1].record == gcs.actor(A)
    gcs.do(c.KvPut("ns", b"k", b"v"))
    gcs.do(c.KvDelete("ns", b"k"))
    assert gcs.state.take_changes()[-1].record is None
    assert gcs.state.take_changes() == []


def test_a_watch_resumes_from_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "RING_CHANGES_MAX", 3)
    gcs = Gcs(0)
    for i in range(5):
        gcs.do(c.KvPut("ns", b"%d" % i, b"v"))
    assert [each.revision for each in gcs.state.changes_since(3) or []] == [4, 5]
    assert [each.revision for each in gcs.state.changes_since(2) or []] == [3, 4, 5]
    assert gcs.state.changes_since(1) is COMPACTED
    assert gcs.state.changes_since(5) == [] and gcs.state.changes_since(99) == []
    assert gcs.state.changes_since(2, [Table.NODES]) == []
    assert len(gcs.state.rows_as_changes([Table.KV])) == 5
    monkeypatch.setattr(state, "RING_BYTES_MAX", 10_000)
    gcs.do(c.KvPut("ns", b"big", bytes(20_000)))
    assert gcs.state.changes_since(5) is COMPACTED
    assert gcs.state.changes_since(6) == []


def test_ended_records_are_bounded_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.ENDED_MAX, Table.ACTORS, 2)
    monkeypatch.setitem(store.ENDED_MAX, Table.WORKER_FAILURES, 2)
    gcs = Gcs()
    ids = [ident(f"x{i}") for i in range(4)]
    for actor_id in ids:
        gcs.register(actor_id)
    for actor_id in (ids[2], ids[0], ids[1]):
        gcs.do(c.KillActor(actor_id, True, ""))
    assert set(gcs.state.store.actors) == {ids[0], ids[1], ids[3]}
    assert gcs.state.take_changes()[-1].record is None
    for i in range(4):
        gcs.do(c.WorkerDied(ident(f"w{i}"), N2, CAUSE))
    assert list(gcs.state.store.worker_failures) == [ident("w2"), ident("w3")]


# --- snapshots --------------------------------------------------------------------------------------------------------


def busy() -> Gcs:
    gcs = Gcs(3)
    gcs.register(A, max_restarts=3, name="x", resources={"CPU": 1.0})
    gcs.do(c.WorkerDied(gcs.alive(), N2, CAUSE), b"raylet", 5)
    gcs.register(B, owner=None)
    gcs.alive(B)
    gcs.do(c.KillActor(B, True, "enough"))
    gcs.do(c.KvPut("fn", b"k", b"v" * 100), DRIVER, 1)
    gcs.do(c.MarkNodeDead(N3, 1, CAUSE))
    gcs.do(c.ForgetClients([b"gone"]))
    return gcs


def test_a_snapshot_gives_the_same_state_back() -> None:
    gcs = busy()
    data = gcs.state.snapshot()
    again = GcsState.restore(data, CLUSTER)
    assert again.snapshot() == data
    assert again.revision == gcs.state.revision and again.check() == []
    assert again.changes_since(again.revision - 1) is COMPACTED
    retry = c.KvPut("fn", b"k", b"other")
    assert again.apply(DRIVER, 1, retry) == gcs.state.apply(DRIVER, 1, retry)
    assert again.apply(b"gone", 1, retry).code is Code.SESSION_EXPIRED
    for each in (again, gcs.state):
        each.apply(b"", 0, c.MarkNodeDead(N1, 1, CAUSE))
    assert again.snapshot() == gcs.state.snapshot()


def test_a_damaged_or_foreign_snapshot_is_refused() -> None:
    data = busy().state.snapshot()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(SnapshotCorruptError):
            GcsState.restore(bytes(damaged), CLUSTER)
    for size in range(0, len(data), 7):
        with pytest.raises(SnapshotCorruptError):
            GcsState.restore(data[:size], CLUSTER)
    with pytest.raises(SnapshotCorruptError):
        GcsState.restore(data + b"\0", CLUSTER)
    with pytest.raises(ClusterMismatchError, match=CLUSTER.hex()):
        GcsState.restore(data, b"other cluster id")


def test_a_newer_snapshot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftray.gcs.state import snapshot

    monkeypatch.setattr(snapshot, "SNAPSHOT_VERSION", 2)
    data = busy().state.snapshot()
    monkeypatch.undo()
    with pytest.raises(SnapshotVersionError, match="version 2"):
        GcsState.restore(data, CLUSTER)
