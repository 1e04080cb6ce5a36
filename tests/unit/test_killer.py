"""The demo's trace and its killer (ftray/demo/trace.py, killer.py)."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftray.demo.job import GATHERER as CONSTRUCTOR
from ftray.demo.killer import GATHERER, LEADER, WORKER, Kill, Killer, schedule
from ftray.demo.trace import History, TraceReader, clock_ms, traced
from ftray.exceptions import FtrayError


def history_of(*lines: tuple[str, str, int, float]) -> History:
    history = History()
    for line in lines:
        history.add(*line)
    return history


def test_a_trace_is_read_back_as_it_grows(tmp_path: Path) -> None:
    path = str(tmp_path / "trace")
    history = History()
    reader = TraceReader(path, history)
    reader.read()
    assert not history.begins
    with traced(path, "count/0/0"):
        reader.read()
        assert history.running() == {os.getpid(): "count/0/0"}
    with pytest.raises(ZeroDivisionError):
        with traced(path, "count/0/1"):
            1 / 0  # noqa: B018
    reader.read()
    assert history.ended == {"count/0/0"}
    assert history.attempts() == 2


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    history = History()
    reader = TraceReader(str(path), history)
    path.write_bytes(b"begin a 7 1.5\nend a ")
    reader.read()
    assert history.running() == {7: "a"}
    with path.open("ab") as file:
        file.write(b"7 2.5\n")
    reader.read()
    assert history.ended == {"a"}


def test_a_task_begun_again_elsewhere_counts_as_repeated_and_as_the_recovery() -> None:
    history = history_of(("begin", "a", 7, 1.0), ("begin", "b", 8, 2.0), ("begin", "a", 8, 12.0), ("end", "a", 8, 13.0))
    assert (history.attempts(), history.repeated(), history.repeated("b")) == (3, 1, 0)
    assert history.interrupted(7) == "a"
    assert history.began_again("a", after_ms=5.0, killed_pid=7) == 12.0
    assert history.began_again("a", after_ms=5.0, killed_pid=8) is None
    assert history.began_again("a", after_ms=12.0, killed_pid=7) is None


def test_a_task_that_had_ended_is_still_the_last_one_of_its_process() -> None:
    history = history_of(("begin", "a", 7, 1.0), ("end", "a", 7, 2.0))
    assert history.running() == {}
    assert history.interrupted(7) == "a"
    assert history.interrupted(9) == ""


def test_the_schedule_is_one_kill_in_each_period_with_two_for_the_gatherer() -> None:
    plan = list(schedule(random.Random(1), 9, 100.0))
    assert [int(at_ms // 100) for at_ms, _ in plan] == list(range(9))
    assert [number for number, (_, victim) in enumerate(plan) if victim == GATHERER] == [2, 5]
    assert [number for number, (_, victim) in enumerate(plan) if victim == LEADER] == [1, 6]
    assert plan == list(schedule(random.Random(1), 9, 100.0))
    assert plan == list(itertools.islice(schedule(random.Random(1), None, 100.0), 9))
    assert list(schedule(random.Random(1), 0, 100.0)) == []


class Scene:
    """A killer with processes to kill."""

    def __init__(self, plan: list[tuple[float, str]]) -> None:
        self.history = History()
        self.workers: list[dict[str, Any]] = []
        self.said: list[Kill] = []
        self.recovered: list[Kill] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.killer = Killer(
            iter(plan), random.Random(0), self.history, self.status, self.said.append, self.recovered.append
        )

    def status(self) -> Any:
        return {"workers": self.workers}

    def start(self, actor_id: str = "") -> int:
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.processes.append(process)
        self.workers.append({"pid": process.pid, "actor_id": actor_id})
        return process.pid

    def dead(self) -> list[int]:
        return [each.pid for each in self.processes if each.poll() is not None]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def scene(request: pytest.FixtureRequest) -> Any:
    made = Scene(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("scene", [[(0.0, WORKER)]], indirect=True)
def test_only_a_worker_of_the_session_that_is_in_a_task_is_killed(scene: Scene) -> None:
    idle, busy, actor = scene.start(), scene.start(), scene.start(actor_id="ab")
    scene.killer.step()
    assert scene.said == []
    scene.history.add("begin", "gather/0/0", actor, clock_ms())
    scene.history.add("begin", "foreign", os.getpid(), clock_ms())
    scene.killer.step()
    assert scene.said == []
    scene.history.add("begin", "a", busy, clock_ms())
    scene.killer.step()
    (kill,) = scene.said
    assert (kill.pid, kill.victim, kill.task) == (busy, WORKER, "a")
    scene.processes[1].wait(10)
    assert scene.dead() == [busy]
    scene.killer.step()
    assert scene.recovered == []
    scene.history.add("begin", "a", idle, kill.at_ms + 25.0)
    scene.killer.step()
    assert scene.recovered == [kill]
    assert kill.recovery_ms == pytest.approx(25.0)
    scene.killer.step()
    assert scene.recovered == [kill]


@pytest.mark.parametrize("scene", [[(0.0, GATHERER)]], indirect=True)
def test_the_gatherer_is_killed_once_it_is_there(scene: Scene) -> None:
    scene.start()
    actor = scene.start(actor_id="ab")
    scene.history.add("begin", CONSTRUCTOR, actor, clock_ms())
    scene.killer.step()
    assert scene.said == []
    scene.history.add("end", CONSTRUCTOR, actor, clock_ms())
    scene.killer.step()
    (kill,) = scene.said
    assert (kill.pid, kill.victim) == (actor, GATHERER)
    scene.history.add("begin", CONSTRUCTOR, 999_999, kill.at_ms + 40.0)
    scene.killer.look()
    assert kill.recovery_ms == pytest.approx(40.0)


@pytest.mark.parametrize("scene", [[(0.0, WORKER), (0.0, WORKER)]], indirect=True)
def test_the_next_kill_waits_for_the_recovery_from_the_last(scene: Scene) -> None:
    first, second = scene.start(), scene.start()
    scene.history.add("begin", "a", first, clock_ms())
    scene.killer.step()
    scene.history.add("begin", "b", second, clock_ms())
    scene.killer.step()
    assert [kill.pid for kill in scene.said] == [first]
    scene.history.add("begin", "a", 999_999, clock_ms() + 1)
    scene.killer.step()
    assert [kill.pid for kill in scene.said] == [first, second]


@pytest.mark.parametrize("scene", [[(0.0, WORKER), (0.0, WORKER)]], indirect=True)
def test_a_kill_between_two_tasks_interrupts_nothing_and_holds_up_nothing(scene: Scene) -> None:
    first, second = scene.start(), scene.start()
    scene.history.add("begin", "a", first, clock_ms())
    scene.killer.step()
    scene.history.add("end", "a", first, clock_ms())
    scene.history.add("begin", "b", second, clock_ms())
    scene.killer.step()
    assert [kill.pid for kill in scene.said] == [first, second]
    assert (scene.said[0].task, scene.said[0].recovery_ms) == ("", None)


@pytest.mark.parametrize("scene", [[(0.0, WORKER)]], indirect=True)
def test_a_session_that_is_gone_has_no_victims(scene: Scene) -> None:
    def status() -> Any:
        raise FtrayError("closed")

    scene.killer._status = status
    scene.history.add("begin", "a", scene.start(), clock_ms())
    scene.killer.step()
    assert scene.said == []
    assert scene.dead() == []


def test_the_leader_is_killed_by_who_knows_it_and_waited_for() -> None:
    """None leads at first; then it is killed, and no other before a write has been answered."""
    answers: list[Kill | None] = [None, Kill(LEADER, 9, 0.0, "the control service"), Kill(LEADER, 10, 1.0)]
    said: list[Kill] = []
    killer = Killer(
        plan=iter([(0.0, LEADER), (0.0, LEADER)]),
        rng=random.Random(1),
        history=History(),
        status=lambda: {"workers": []},
        on_kill=said.append,
        on_recovery=lambda kill: None,
        kill_leader=lambda: answers.pop(0),
    )
    killer.step()
    assert said == []
    killer.step()
    assert [kill.pid for kill in said] == [9]
    killer.step()
    assert len(answers) == 1, "the first one has not been recovered from"
    said[0].recovery_ms = 12.0
    killer.step()
    assert [kill.pid for kill in killer.kills] == [9, 10]
