"""The leader's managers: placement, starts and stops, change of leader, jobs, and the health of nodes."""

from __future__ import annotations

from typing import Any

import pytest

from ftray.gcs.state import commands as c
from ftray.gcs.state.effects import Effect, Probe, ReportInfeasible, StartActor, StopActor, StopJob, Submit
from ftray.gcs.state.health import NodeHealth
from ftray.gcs.state.managers import SHORT_LIVES_FREE, ActorManager, JobManager
from ftray.gcs.state.placement import Placement, to_units
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import ActorState, Code, Result

JOB = b"job1"
DRIVER = b"D" * 16
CAUSE = c.DeathCauseRecord(reason="killed by signal 9")


def ident(name: str) -> bytes:
    return name.encode().ljust(16, b".")


N1, N2, N3 = ident("n1"), ident("n2"), ident("n3")
A, B = ident("a"), ident("b")


class Leader:
    """A state with an actor manager on it, and raylets that do as they are told when asked."""

    def __init__(self, *cpus: float) -> None:
        self.state = GcsState(b"C" * 16)
        self.now_ms = 1_000.0
        self.actors = ActorManager(self.state)
        self.jobs = JobManager(self.state)
        for node_id, cpu in zip((N1, N2, N3), cpus):
            self.do(c.RegisterNode(node_id, "unix:/" + node_id.decode(), {"CPU": cpu}, {}, 1, "host", 1))
        self.do(c.AddJob(JOB, DRIVER, 7, N1, "main.py", "ns"))

    def do(self, command: Any) -> Result:
        result = self.state.apply(b"", 0, command)
        assert self.state.check() == []
        changes = self.state.take_changes()
        self.actors.on_changes(changes)
        self.jobs.on_changes(changes)
        return result

    def register(self, actor_id: bytes = A, cpu: float = 1.0, restarts: int = 0, **more: Any) -> None:
        self.do(
            c.RegisterActor(
                actor_id,
                JOB,
                DRIVER,
                N1,
                "Counter",
                max_restarts=restarts,
                resources={"CPU": cpu},
                creation=b"x",
                **more,
            )
        )

    def plan(self) -> list[Effect]:
        """Effects, with what is submitted carried out, until nothing is left to do."""
        all_effects: list[Effect] = []
        while effects := self.actors.plan(self.state, self.now_ms):
            for effect in effects:
                if isinstance(effect, Submit):
                    self.actors.on_result(effect.command, self.do(effect.command))
                else:
                    all_effects.append(effect)
        return all_effects

    def node_of(self, actor_id: bytes = A) -> bytes:
        actor = self.state.actor(actor_id)
        assert actor is not None
        return actor.node_id

    def start(self, actor_id: bytes = A) -> bytes:
        """Reports a placed actor alive."""
        actor = self.state.actor(actor_id)
        assert actor is not None
        worker = ident(f"w{actor_id[:3].decode()}{actor.incarnation}")
        assert self.do(c.ActorAlive(actor_id, actor.incarnation, worker, "unix:/w", actor.node_id, 9)).ok
        return worker

    def new_leader(self) -> None:
        self.state = GcsState.restore(self.state.snapshot(), b"C" * 16)
        self.actors = ActorManager(self.state)
        self.jobs = JobManager(self.state)


# --- placement --------------------------------------------------------------------------------------------------------


def test_an_actor_is_placed_then_started_once() -> None:
    leader = Leader(2, 4)
    leader.register()
    (start,) = leader.plan()
    assert start == StartActor(N2, A, 0, JOB, DRIVER, "Counter", {"CPU": 1.0}, b"x")
    assert leader.plan() == []
    leader.start()
    assert leader.plan() == []
    assert leader.actors.pending_reason(A) == ""


def test_placing_is_committed_before_anything_is_started() -> None:
    leader = Leader(2)
    leader.register()
    (first,) = leader.actors.plan(leader.state, 0)
    assert first == Submit(c.ActorPlacing(A, 0, N1))
    assert leader.actors.plan(leader.state, 0) == []
    leader.do(c.ActorPlacing(A, 0, N1))
    assert [type(each) for each in leader.actors.plan(leader.state, 0)] == [StartActor]


def test_a_refused_placement_is_thought_over() -> None:
    leader = Leader(4, 2)
    leader.register(cpu=2)
    (submit,) = leader.actors.plan(leader.state, 0)
    assert isinstance(submit, Submit) and submit.command == c.ActorPlacing(A, 0, N1)
    leader.state.apply(b"", 0, c.MarkNodeDead(N1, 1, CAUSE))  # The manager has not heard of it yet.
    leader.do(c.AddJob(b"job2", DRIVER, 7, N2, "main.py", "ns"))
    assert leader.state.actor(A).state is ActorState.DEAD  # type: ignore[union-attr]  # its owner was on N1
    leader.do(c.RegisterActor(B, b"job2", ident("o"), N2, "X", resources={"CPU": 2.0}))
    leader.actors.on_result(submit.command, Result(Code.NOT_FOUND, "", 0))
    (start,) = leader.plan()
    assert isinstance(start, StartActor) and (start.node_id, start.actor_id) == (N2, B)


def test_actors_are_spread_by_what_they_hold() -> None:
    leader = Leader(4, 4)
    ids = [ident(f"x{i}") for i in range(8)]
    for actor_id in ids:
        leader.register(actor_id)
    leader.plan()
    assert [leader.node_of(each) for each in ids] == [N1, N2] * 4
    leader.register(A)
    assert leader.plan() == []
    assert leader.actors.pending_reason(A) == "waits until other actors or placement groups give back resources"
    assert leader.actors.next_wake_ms() is None
    leader.do(c.KillActor(ids[3], True, ""))
    (stop,) = leader.plan()
    assert isinstance(stop, StopActor) and stop.actor_id == ids[3]
    assert leader.node_of(A) == b""  # The process holds its resources until it is gone.
    leader.do(c.ActorDied(ids[3], 0, CAUSE))
    (start,) = leader.plan()
    assert isinstance(start, StartActor) and (start.node_id, start.actor_id) == (N2, A)


def test_actors_that_hold_nothing_are_spread_by_number() -> None:
    leader = Leader(4, 4)
    for i in range(4):
        leader.do(c.RegisterActor(ident(f"x{i}"), JOB, DRIVER, N1, "X"))
    leader.plan()
    assert [leader.node_of(ident(f"x{i}")) for i in range(4)] == [N1, N2, N1, N2]


def test_reports_of_load_rank_nodes_but_rule_none_out() -> None:
    leader = Leader(4, 4)
    leader.actors.on_load(N1, {"CPU": 0.0})
    leader.register(A)
    leader.plan()
    assert leader.node_of(A) == N2
    leader.actors.on_load(N2, {"CPU": 0.0})
    leader.register(B)
    leader.plan()
    assert leader.node_of(B) in (N1, N2)


def test_an_actor_that_fits_nowhere_is_reported_after_a_while_and_placed_when_a_node_joins() -> None:
    leader = Leader(2, 4)
    leader.register(cpu=8)
    assert leader.plan() == []
    wake_ms = leader.actors.next_wake_ms()
    assert wake_ms == leader.now_ms + 2_000
    leader.now_ms = wake_ms
    (report,) = leader.plan()
    assert isinstance(report, ReportInfeasible)
    assert report.missing == "8 CPU is needed on one node; the most that any of 2 live nodes has is 4 CPU"
    assert leader.actors.pending_reason(A) == report.missing
    assert leader.plan() == [] and leader.actors.next_wake_ms() is None
    leader.do(c.RegisterNode(N3, "unix:/3", {"CPU": 8.0}, {}, 1, "host", 1))
    (start,) = leader.plan()
    assert isinstance(start, StartActor) and start.node_id == N3


def test_sums_of_fractions_do_not_drift() -> None:
    placement = Placement()
    placement.set_node(N1, {"CPU": 0.3})
    for _ in range(1_000):
        for i in range(3):
            asked = to_units({"CPU": 0.1})
            assert placement.choose(asked, b"") == N1
            placement.hold(b"%d" % i, N1, asked)
        assert placement.choose(to_units({"CPU": 0.1}), b"") is None
        for i in range(3):
            assert placement.release(b"%d" % i)
        assert placement.used(N1) == {}
    assert "no live node" in Placement().missing(to_units({"CPU": 1}))


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_crashed_actor_is_restarted_at_once() -> None:
    leader = Leader(2, 2)
    leader.register(restarts=1)
    leader.plan()
    worker = leader.start()
    leader.plan()
    leader.now_ms += 5_000
    leader.do(c.WorkerDied(worker, leader.node_of(), CAUSE))
    (start,) = leader.plan()
    assert isinstance(start, StartActor) and start.incarnation == 1


def test_a_dead_nodes_actors_go_elsewhere() -> None:
    leader = Leader(2, 4)
    leader.register(restarts=1)
    leader.plan()
    leader.start()
    leader.do(c.MarkNodeDead(N2, 1, CAUSE))
    (start,) = leader.plan()
    assert isinstance(start, StartActor) and (start.node_id, start.incarnation) == (N1, 1)


def test_a_killed_actor_is_stopped_first_and_then_restarted() -> None:
    leader = Leader(2)
    leader.register(restarts=1)
    leader.plan()
    worker = leader.start()
    leader.do(c.KillActor(A, False, "enough"))
    (stop,) = leader.plan()
    assert stop == StopActor(N1, A, 0, worker, False, "enough")
    assert "process of its last life" in leader.actors.pending_reason(A)
    leader.do(c.ActorDied(A, 0, CAUSE))
    (start,) = leader.plan()
    assert isinstance(start, StartActor) and start.incarnation == 1


def test_grace_may_be_taken_back() -> None:
    leader = Leader(2)
    leader.register()
    leader.plan()
    worker = leader.start()
    leader.do(c.ActorOutOfScope(A))
    (stop,) = leader.plan()
    assert isinstance(stop, StopActor) and stop.graceful
    leader.do(c.KillActor(A, True, "now"))
    (stop,) = leader.plan()
    assert isinstance(stop, StopActor) and not stop.graceful
    leader.do(c.WorkerDied(worker, N1, CAUSE))
    assert leader.plan() == []


def test_a_crash_loop_is_slowed_down() -> None:
    leader = Leader(2)
    leader.register(restarts=-1)
    delays = []
    for incarnation in range(SHORT_LIVES_FREE + 7):
        before_ms = leader.now_ms
        while not (effects := leader.plan()):
            wake_ms = leader.actors.next_wake_ms()
            assert wake_ms is not None and wake_ms > leader.now_ms
            assert "delayed" in leader.actors.pending_reason(A)
            leader.now_ms = wake_ms
        (start,) = effects
        assert isinstance(start, StartActor) and start.incarnation == incarnation
        delays.append(leader.now_ms - before_ms)
        leader.do(c.ActorDied(A, incarnation, CAUSE))
    assert delays == [0] * (SHORT_LIVES_FREE + 1) + [50, 100, 200, 400, 800, 1000]
    leader.plan()
    leader.now_ms += 10_000
    leader.plan()
    leader.start()
    leader.plan()
    leader.now_ms += 1_000  # A life of some length ends the series.
    leader.do(c.ActorDied(A, SHORT_LIVES_FREE + 7, CAUSE))
    assert len(leader.plan()) == 1


def test_a_new_leader_carries_on() -> None:
    leader = Leader(4, 4)
    waiting, placing, alive, killed = (ident(name) for name in ("waits", "placing", "alive", "killed"))
    for actor_id in (placing, alive, killed):
        leader.register(actor_id)
    leader.plan()
    leader.start(alive)
    leader.start(killed)
    leader.do(c.KillActor(killed, True, ""))
    leader.register(waiting)
    leader.new_leader()
    effects = leader.plan()
    assert {(type(each), each.actor_id) for each in effects if not isinstance(each, (Submit, StopJob, Probe))} == {
        (StartActor, waiting),
        (StartActor, placing),
        (StopActor, killed),
    }
    assert len(effects) == 3
    assert leader.plan() == []
    # What is held is known from the tables.
    big = ident("big")
    leader.register(big, cpu=4)
    assert leader.plan() == []


def test_a_raylet_that_connects_anew_is_compared_with_the_tables() -> None:
    leader = Leader(8)
    placing, alive, lost, killed = (ident(name) for name in ("placing", "alive", "lost", "killed"))
    for actor_id in (placing, alive, lost, killed):
        leader.register(actor_id, restarts=1)
    leader.plan()
    for actor_id in (alive, lost, killed):
        leader.start(actor_id)
    leader.do(c.KillActor(killed, True, ""))
    leader.plan()
    leader.actors.on_node_report(leader.state, N1, [(alive, 0), (killed, 0), (placing, 0), (ident("who"), 3)])
    effects = leader.plan()
    assert {(type(each).__name__, each.actor_id, each.incarnation) for each in effects} == {  # type: ignore[union-attr]
        ("StartActor", placing, 0),
        ("StopActor", killed, 0),
        ("StopActor", ident("who"), 3),
        ("StartActor", lost, 1),
    }
    assert leader.plan() == []


def test_actors_that_are_gone_leave_nothing_behind() -> None:
    leader = Leader(2)
    leader.register()
    leader.plan()
    leader.do(c.WorkerDied(leader.start(), N1, CAUSE))
    leader.plan()
    assert leader.actors._watched == {} and leader.actors._waiting == {} and leader.actors._dirty == {}
    assert leader.actors._placement.used(N1) == {}


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_finished_job_is_ended_on_each_live_node_once() -> None:
    leader = Leader(1, 1, 1)
    leader.do(c.MarkNodeDead(N3, 1, CAUSE))
    leader.jobs.on_driver_gone(JOB, CAUSE)
    (submit,) = leader.jobs.plan()
    assert submit == Submit(c.FinishJob(JOB, CAUSE))
    leader.do(c.FinishJob(JOB, CAUSE))
    assert leader.jobs.plan() == [StopJob(N1, JOB), StopJob(N2, JOB)]
    leader.do(c.FinishJob(JOB))
    assert leader.jobs.plan() == []
    leader.new_leader()
    leader.jobs.on_node_report(leader.state, N1, [JOB, b"????"])
    assert leader.jobs.plan() == [StopJob(N1, JOB), StopJob(N1, b"????")]


# --- health -----------------------------------------------------------------------------------------------------------


def health(leader: Leader) -> NodeHealth:
    return NodeHealth(leader.state, 0, timeout_ms=1_000)


def tick(monitor: NodeHealth, start_ms: int, end_ms: int, *alive: bytes) -> list[Effect]:
    """Plans every 100 ms, with heartbeats of the nodes in `alive`."""
    effects: list[Effect] = []
    for now_ms in range(start_ms, end_ms + 1, 100):
        for node_id in alive:
            assert monitor.on_heartbeat(node_id, now_ms)
        effects += monitor.plan(now_ms)
    return effects


def test_a_silent_node_is_declared_dead_once() -> None:
    monitor = health(Leader(1, 1))
    assert tick(monitor, 100, 900, N1) == []
    (effect,) = tick(monitor, 1_000, 3_000, N1)
    assert isinstance(effect, Submit) and isinstance(effect.command, c.MarkNodeDead)
    assert (effect.command.node_id, effect.command.incarnation) == (N2, 1)
    assert effect.command.cause.reason == "no heartbeat for 1000 ms (the limit is 1000 ms)"
    # If the command was refused, the node gets a little more time.
    monitor.on_result(effect.command, Result(Code.NOT_LEADER, "", 0), 3_000)
    assert len(tick(monitor, 3_100, 3_300, N1)) == 1


def test_a_closed_connection_and_a_refused_probe_are_proof() -> None:
    monitor = health(Leader(1, 1))
    assert monitor.on_closed(N2) == [Probe(N2, 1, "unix:/" + N2.decode())]
    assert monitor.plan(10) == []
    monitor.on_probe(N2, 1, refused=False)
    assert monitor.plan(11) == []
    monitor.on_probe(N2, 1, refused=True)
    (effect,) = monitor.plan(12)
    assert isinstance(effect, Submit) and "process is gone" in effect.command.cause.reason  # type: ignore[union-attr]
    assert monitor.on_closed(N2) == []


def test_a_node_that_is_back_before_the_probe_is_not_dead() -> None:
    monitor = health(Leader(1, 1))
    monitor.on_closed(N2)
    monitor.on_heartbeat(N2, 5)
    monitor.on_probe(N2, 1, refused=True)
    assert monitor.plan(10) == []


def test_a_leader_that_was_frozen_itself_blames_nobody() -> None:
    monitor = health(Leader(1, 1))
    tick(monitor, 100, 500, N1, N2)
    assert monitor.plan(60_000) == []
    assert tick(monitor, 60_100, 61_500, N1, N2) == []
    assert len(tick(monitor, 61_600, 62_600, N1)) == 1


def test_dead_and_unknown_nodes_are_told_so() -> None:
    leader = Leader(1, 1)
    monitor = health(leader)
    leader.state.take_changes()
    leader.state.apply(b"", 0, c.MarkNodeDead(N2, 1, CAUSE))
    monitor.on_changes(leader.state.take_changes(), 10)
    assert not monitor.on_heartbeat(N2, 20)
    assert not monitor.on_heartbeat(N3, 20)
    assert monitor.on_closed(N2) == []
    monitor.on_probe(N2, 1, refused=True)
    leader.state.apply(b"", 0, c.RegisterNode(N2, "unix:/2", {}, {}, 2, "host", 1))
    monitor.on_changes(leader.state.take_changes(), 900)
    assert monitor.on_heartbeat(N2, 1_000)
    assert monitor.next_wake_ms() == pytest.approx(200)
