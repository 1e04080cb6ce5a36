"""Actors as a node hosts them, from the GCS's placement to their end. A real node, fake workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from raylet_node import Driver, GcsPeer, NodeProcess, Tool, wait_gone

from ftray.gcs.state.commands import ActorOutOfScope, KillActor, RegisterActor
from ftray.gcs.state.tables import ActorRecord, ActorState, DeathKind
from ftray.wire import messages as m


class Stage:
    """A node, a driver, a client of the GCS, a tool."""

    def __init__(self) -> None:
        self.node = NodeProcess()
        self.driver = Driver(self.node)
        self.gcs = GcsPeer(self.node)
        self.tool = Tool(self.node)

    def actor(self, creation: bytes = b"live", **options: object) -> tuple[bytes, list[ActorRecord]]:
        """Registers an actor; returns its id, and the list in which its states gather."""
        actor_id = os.urandom(16)
        seen = self.gcs.watch_actor(actor_id)
        driver = self.driver
        fields: dict[str, object] = {"resources": {"CPU": 1.0}, "owner_worker_id": driver.worker_id, **options}
        command = RegisterActor(  # type: ignore[misc]
            actor_id, driver.registered.job_id, owner_node_id=bytes.fromhex(self.node.ready["node_id"]),
            class_name="Counter", creation=creation, **fields,
        )  # fmt: skip
        result = self.gcs.command(command)
        assert result.ok, result
        return actor_id, seen

    def until_state(self, seen: list[ActorRecord], state: ActorState, lives: int = 1) -> ActorRecord:
        """Waits for the actor to be in this state, in its life of that number at least."""
        self.gcs.until(lambda: seen and seen[-1].state is state and seen[-1].restarts >= lives - 1)
        return seen[-1]

    def close(self) -> None:
        for peer in (self.driver, self.gcs, self.tool):
            peer.close()
        self.node.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    assert "Traceback" not in made.node.log
    made.close()


def test_an_actor_comes_to_life_and_holds_its_resources(stage: Stage) -> None:
    actor_id, seen = stage.actor()
    record = stage.until_state(seen, ActorState.ALIVE)
    assert record.node_id.hex() == stage.node.ready["node_id"]
    status = stage.tool.ask("status")
    assert status["resources"]["available"]["CPU"] == 1.0
    (actor,) = status["actors"]
    assert (actor["actor_id"], actor["class_name"], actor["stage"]) == (actor_id.hex(), "Counter", "ALIVE")
    (worker,) = [row for row in status["workers"] if row["actor_id"]]
    assert (worker["pid"], worker["running"]) == (record.pid, "Counter")
    (lease,) = status["leases"]
    assert lease["actor"] == actor_id.hex()


def test_a_constructor_that_raises(stage: Stage) -> None:
    _, seen = stage.actor(b"raise", max_restarts=5)
    record = stage.until_state(seen, ActorState.DEAD)
    assert record.kind is DeathKind.CREATION_FAILED
    assert record.cause is not None
    assert record.cause.reason == "Traceback: it raised"
    assert record.cause.what == "Counter"
    status = stage.tool.ask_until(lambda status: not status["leases"])
    assert status["resources"]["available"]["CPU"] == 2.0


def test_a_constructor_that_kills_its_process(stage: Stage) -> None:
    _, seen = stage.actor(b"die", max_restarts=1)
    record = stage.until_state(seen, ActorState.DEAD)
    assert record.restarts == 1
    assert record.cause is not None
    assert record.cause.signal == signal.SIGKILL
    assert record.cause.stderr_tail == ["about to die"]


def test_a_killed_actor_is_restarted(stage: Stage) -> None:
    _, seen = stage.actor(max_restarts=1)
    first = stage.until_state(seen, ActorState.ALIVE)
    os.kill(first.pid, signal.SIGKILL)
    second = stage.until_state(seen, ActorState.ALIVE, lives=2)
    assert second.pid != first.pid
    assert second.incarnation > first.incarnation
    assert second.cause is not None
    assert (second.cause.signal, second.cause.pid, second.cause.what) == (signal.SIGKILL, first.pid, "Counter")
    os.kill(second.pid, signal.SIGKILL)
    assert stage.until_state(seen, ActorState.DEAD).kind is DeathKind.WORKER_DIED


def test_a_death_is_reported_with_its_cause_if_nothing_waits_for_a_restart(stage: Stage) -> None:
    """However long it takes to learn the exit status: whoever reaps the processes is stopped."""
    _, last = stage.actor(max_restarts=0)
    _, restarted = stage.actor(max_restarts=1)
    pids = [stage.until_state(seen, ActorState.ALIVE).pid for seen in (last, restarted)]
    with open(f"/proc/{pids[0]}/stat") as file:
        template = int(file.read().rpartition(")")[2].split()[1])
    os.kill(template, signal.SIGSTOP)
    try:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        stage.gcs.until(lambda: restarted[-1].restarts >= 1)  # it may be alive again by now
        assert last[-1].state is ActorState.ALIVE
    finally:
        os.kill(template, signal.SIGCONT)
    cause = stage.until_state(last, ActorState.DEAD).cause
    assert cause is not None
    assert cause.signal == signal.SIGKILL


def test_an_actor_that_nobody_needs_ends_gracefully(stage: Stage) -> None:
    actor_id, seen = stage.actor()
    record = stage.until_state(seen, ActorState.ALIVE)
    assert stage.gcs.command(ActorOutOfScope(actor_id)).ok
    wait_gone(record.pid)
    stage.gcs.until(lambda: seen[-1].state is ActorState.DEAD and seen[-1].leftover is None)
    assert seen[-1].kind is DeathKind.OUT_OF_SCOPE


def test_an_actor_is_killed_in_any_stage(stage: Stage) -> None:
    alive_id, alive = stage.actor()
    hanging_id, hanging = stage.actor(b"hang")
    stage.until_state(alive, ActorState.ALIVE)
    queued_id, queued = stage.actor(resources={"CPU": 2.0})  # there is no room for it
    stages = ["ALIVE", "CREATING"]
    stage.tool.ask_until(lambda status: sorted(row["stage"] for row in status["actors"])[:2] == stages)
    for actor_id, seen in ((alive_id, alive), (hanging_id, hanging), (queued_id, queued)):
        assert stage.gcs.command(KillActor(actor_id, True, "enough of it")).ok
        stage.gcs.until(lambda seen=seen: seen[-1].state is ActorState.DEAD and seen[-1].leftover is None)
    stage.tool.ask_until(lambda status: not status["actors"] and not status["leases"])


def test_an_actor_waits_for_the_tasks_that_hold_its_resources(stage: Stage) -> None:
    grants = stage.driver.lease(2)
    _, seen = stage.actor(resources={"CPU": 2.0})
    stage.tool.ask_until(lambda status: [row["stage"] for row in status["actors"]] == ["QUEUED"])
    stage.driver.take(m.LeaseReclaim)
    stage.driver.say(m.LeaseDemand(1, 0))
    stage.driver.say(m.ReturnLeases((grants[0].lease_id,)))
    os.kill(grants[1].pid, signal.SIGKILL)
    stage.until_state(seen, ActorState.ALIVE)


def test_detached_actors_outlive_their_driver_and_others_do_not(stage: Stage) -> None:
    _, plain = stage.actor(resources={})
    _, detached = stage.actor(resources={}, detached=True, owner_worker_id=None, max_restarts=1)
    first = stage.until_state(plain, ActorState.ALIVE)
    second = stage.until_state(detached, ActorState.ALIVE)
    stage.driver.close()
    wait_gone(first.pid)
    stage.until_state(plain, ActorState.DEAD)
    os.kill(second.pid, signal.SIGKILL)
    third = stage.until_state(detached, ActorState.ALIVE, lives=2)
    assert [row["pid"] for row in stage.tool.ask("status")["workers"] if row["actor_id"]] == [third.pid]


def test_many_actors_without_cpus(stage: Stage) -> None:
    actors = [stage.actor(resources={}) for _ in range(20)]
    pids = {stage.until_state(seen, ActorState.ALIVE).pid for _, seen in actors}
    assert len(pids) == 20
