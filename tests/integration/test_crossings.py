"""What crosses on its way: cancellations and replies, handles that go before their actors are there, dead callers.

Each of these has been seen to leave something behind: an object that nobody frees, an actor that nobody ends.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.cancelling import GET_S, begun, check_cancelled, hold, holding
from integration.harness import check_drained, wait_for_file, wait_for_none, wait_until, worker_entries

import ftray
from ftray import exceptions
from ftray.api.actor import _actor_records
from ftray.api.context import ask_raylet
from ftray.gcs.state.commands import ActorOutOfScope
from ftray.gcs.state.tables import ActorState
from ftray.wire.messages import RecallTasks
from ftray.worker.core import get_core
from ftray.worker.introspection import answer

MB = 1 << 20
SESSION = {"num_cpus": 3, "object_store_memory": 32 * MB, "resources": {"slot": 1}}
pytestmark = pytest.mark.usefixtures("session")


@pytest.fixture(autouse=True)
def _everything_goes(session: Any) -> Iterator[None]:
    yield
    check_drained()


@ftray.remote(num_cpus=0)
def opened(gate: str) -> int:
    wait_for_file(gate)
    return 1


class Plain:
    def __init__(self, value: Any = None) -> None:
        self.begun = 0

    def give(self, gate: str) -> Any:
        Path(f"{gate}-begun").touch()
        wait_for_file(gate)
        return [ftray.put(bytes(200_000)), ftray.put(1)], 1

    def entries(self) -> int:
        return worker_entries()

    def name(self) -> str:
        return "Plain"


class Async(Plain):
    async def give(self, gate: str) -> Any:
        import asyncio

        Path(f"{gate}-begun").touch()
        while not Path(gate).exists():
            await asyncio.sleep(0.001)
        return [ftray.put(bytes(200_000)), ftray.put(1)], 1

    async def begin(self) -> None:
        self.begun += 1

    async def looked(self, task_id: bytes = b"") -> tuple[int, bool]:
        """How many calls have begun, and whether that one is known as cancelled."""
        executor = get_core().executor
        assert executor is not None
        return self.begun, task_id in executor.cancelled


def alive() -> list[str]:
    return [record.class_name for record in _actor_records(get_core()) if record.state is not ActorState.DEAD]


# --- actors whose arguments are awaited -------------------------------------------------------------------------------


def test_an_actor_whose_handle_goes_before_its_arguments_come(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    argument = opened.remote(str(gate))
    actor = ftray.remote(Plain).remote(argument)
    made = actor._actor_id
    del actor
    wait_for_none(lambda: [x for x in get_core().actors.calls if x.hex() == made], what="the handle")
    gate.touch()
    assert ftray.get(argument, timeout=GET_S) == 1
    other = ftray.remote(Plain).remote()
    assert ftray.get(other.name.remote(), timeout=GET_S) == "Plain"  # the GCS takes commands in their order
    assert len(alive()) == 1


def test_an_actor_that_is_killed_before_its_arguments_come(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    argument = opened.remote(str(gate))
    actor = ftray.remote(Plain).remote(argument)
    before = actor.name.remote()
    ftray.kill(actor)
    gate.touch()
    assert ftray.get(argument, timeout=GET_S) == 1
    for ref in (before, actor.name.remote()):
        with pytest.raises(exceptions.ActorDiedError, match=r"killed by ftray\.kill"):
            ftray.get(ref, timeout=GET_S)
    assert not get_core().actors.creation.waiting
    wait_for_none(alive)


# --- callers that die, replies that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_references_in_an_answer_to_a_dead_caller(kind: str, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    if kind == "threads":
        actor: Any = ftray.remote(Plain).options(max_concurrency=2).remote()
    else:
        actor = ftray.remote(Async).remote()

    @ftray.remote(max_retries=0)
    def call(actor: Any) -> None:
        refs = actor.give.remote(gate), actor.give.options(num_returns=2).remote(gate)
        wait_for_file(f"{gate}-begun")
        assert refs
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(exceptions.WorkerCrashedError):
        ftray.get(call.remote(actor), timeout=GET_S)
    Path(gate).touch()
    wait_for_none(lambda: ask_raylet("memory")["objects"], what="what was returned")
    wait_for_none(lambda: ftray.get(actor.entries.remote(), timeout=GET_S), what="references in the actor")


@pytest.mark.parametrize("streaming", [False, True])
def test_references_beside_a_value_that_the_store_cannot_hold(streaming: bool) -> None:
    def both() -> Any:
        return [ftray.put(1)], [ftray.put(2), bytes(64 * MB)]

    def items() -> Any:
        yield from both()

    options: dict[str, Any] = {"resources": {"slot": 1}, "num_returns": "streaming" if streaming else 2}
    refs = list(ftray.remote(**options)(items if streaming else both).remote())
    with pytest.raises(exceptions.ObjectStoreFullError):
        ftray.get(refs, timeout=GET_S)
    del refs
    gc.collect()
    left = ftray.remote(resources={"slot": 1})(worker_entries)
    wait_for_none(lambda: ftray.get(left.remote(), timeout=GET_S), what="references in the worker")


# --- cancellations that cross -----------------------------------------------------------------------------------------


def test_a_forced_cancellation_and_a_reply_that_waits_for_registrations(tmp_path: Path) -> None:
    """The task has run, but its reply is kept back until the owner of what it keeps has answered, who is stopped."""
    kept: list[Any] = []

    class Owner:
        def lend(self) -> Any:
            return os.getpid(), [ftray.put("lent")]

        def entries(self) -> int:
            return worker_entries()

    @ftray.remote(resources={"slot": 1})
    def keep(box: list[Any], directory: str) -> Any:
        executor = get_core().executor
        assert executor is not None
        sys_kept().append(box[0])

        def tell() -> None:
            wait_until(lambda: executor.running is None)
            Path(directory, "ran").touch()

        threading.Thread(target=tell).start()
        return [ftray.put(bytes(200_000))]

    @ftray.remote(resources={"slot": 1})
    def drop() -> int:
        sys_kept().clear()
        return worker_entries()

    def sys_kept() -> list[Any]:
        import sys

        return sys.__dict__.setdefault("kept_by_test", kept)  # type: ignore[no-any-return]

    owner = ftray.remote(Owner).remote()
    pid, box = ftray.get(owner.lend.remote(), timeout=GET_S)
    os.kill(pid, signal.SIGSTOP)
    try:
        ref = keep.remote(box, str(tmp_path))
        wait_for_file(tmp_path / "ran")
        assert ftray.wait([ref], timeout=0)[0] == []
        ftray.cancel(ref, force=True)
        wait_for_none(lambda: get_core().canceller.forced, what="leases whose workers are to die")
    finally:
        os.kill(pid, signal.SIGCONT)
    check_cancelled(ref, "keep")
    del box, ref
    wait_for_none(lambda: ftray.get(drop.remote(), timeout=GET_S), what="references in the worker")
    wait_for_none(lambda: ftray.get(owner.entries.remote(), timeout=GET_S), what="references at the owner")


@pytest.mark.parametrize("options", [{}, {"event_loop": "trio"}, {"concurrency_groups": {"io": 1}}], ids=str)
def test_a_cancellation_that_overtakes_its_call(options: dict[str, Any]) -> None:
    actor = (ftray.remote(**options)(Async) if options else ftray.remote(Async)).remote()
    assert ftray.get(actor.looked.remote(), timeout=GET_S) == (0, False)
    core = get_core()

    @ftray.remote
    def look(actor: Any, task_id: bytes) -> None:
        wait_until(lambda: ftray.get(actor.looked.remote(task_id), timeout=GET_S) == (0, True))

    calls = core.actors.calls[bytes.fromhex(actor._actor_id)]
    with core.lock:
        calls.link.writing = True  # as if the socket took nothing more
    ref = actor.begin.remote()
    ftray.cancel(ref)
    ftray.get(look.remote(actor, ref.binary()[:16]), timeout=GET_S)
    with core.lock:
        calls.link.writing = False
        calls.link.flush()
    check_cancelled(ref, "Async.begin")
    assert ftray.get(actor.looked.remote(), timeout=GET_S) == (0, False)


def kill_unseen(lease: Any) -> None:
    """Kills a worker such that its owner, who holds its lock, learns of it when it writes the next time."""
    os.kill(lease.pid, signal.SIGKILL)
    hung_up = select.poll()
    hung_up.register(lease.link.fd, 0)
    wait_until(lambda: hung_up.poll(0), what="the socket's other end is closed")
    lease.link.send(RecallTasks(()))


def test_a_forced_cancellation_that_finds_the_worker_dead(tmp_path: Path) -> None:
    ref = holding.remote(str(tmp_path))
    begun(tmp_path)
    core = get_core()
    with core.lock:
        lease, _ = core.submitter.dispatcher.find_pushed(ref.binary()[:16]) or pytest.fail("it was pushed")
        kill_unseen(lease)
        core.canceller.cancel_object(ref.binary(), True, True)
        assert not core.canceller.forced
        core.settle()
    check_cancelled(ref, "holding")


def test_cancelling_the_children_of_a_task_finds_their_worker_dead(tmp_path: Path) -> None:
    """The first one that is cancelled shows it, and the others are on their way back into the queue."""

    @ftray.remote(resources={"slot": 1})
    def child(directory: str, number: int) -> int:
        if number:
            Path(directory, f"begun-{number}").touch()
            if number == 1:
                hold()
        return number

    @ftray.remote(num_cpus=0)
    def parent(directory: str) -> list[int]:
        core = get_core()
        dispatcher = core.submitter.dispatcher
        ftray.get(child.remote(directory, 0))
        dispatcher.tick = lambda linger_ticks: True  # type: ignore[method-assign]  # nothing is recalled
        child._info.mean_us = 1.0
        refs = [child.remote(directory, number) for number in range(1, 5)]
        wait_for_file(Path(directory, "begun-1"))
        with core.lock:
            (lease,) = dispatcher.leases.values()
            assert len(lease.inflight) == 4
            kill_unseen(lease)
            core.canceller.cancel_children(core.context().task_id, False)
            core.settle()
        ended = []
        for ref in refs:
            try:
                ended.append(ftray.get(ref, timeout=GET_S))
            except exceptions.TaskCancelledError:
                ended.append(0)
        return ended

    assert ftray.get(parent.remote(str(tmp_path)), timeout=60) == [0] * 4
    assert os.listdir(tmp_path) == ["begun-1"]


def test_what_is_said_to_be_pending(tmp_path: Path) -> None:
    """Each task and call once, those of groups too, and none that was cancelled in its queue."""
    gate = str(tmp_path / "gate")
    argument = opened.remote(gate)
    never = opened.options(resources={"nowhere": 1})
    tasks = [never.remote(gate) for _ in range(3)]
    actor = ftray.remote(Plain).options(concurrency_groups={"io": 1}, resources={"nowhere": 1}).remote()
    calls = [actor.name.remote() for _ in range(3)]
    calls += [actor.name.options(concurrency_group="io").remote() for _ in range(2)]
    waits = [actor.give.remote(argument), never.remote(argument)]
    cancelled = [tasks.pop(1), calls.pop(1)]
    for ref in cancelled:
        ftray.cancel(ref)
    wanted = sorted(ref.task_id() for ref in (argument, *tasks, *calls, *waits))
    core = get_core()
    with core.lock:
        said = answer(core, "pending", {"limit": 100})
    assert sorted(row["task_id"] for row in said["rows"]) == wanted
    assert said["total"] == len(wanted)
    for ref in (*tasks, *calls, *waits):
        ftray.cancel(ref)
    Path(gate).touch()
    ftray.get(argument, timeout=GET_S)


def test_a_named_actor_whose_last_handle_goes_while_another_one_is_made() -> None:
    """Its owner has let go of it, but the GCS does not know yet: the name is looked up anew until it does."""

    @ftray.remote(num_cpus=0)
    class Owner:
        def make(self) -> Any:
            self.actor = named.remote()
            return ftray.get(self.actor.pid.remote())

        def drop(self) -> None:
            core = get_core()
            send, kept = core.gcs.command, []

            def release() -> None:
                for each in kept:
                    send(*each)
                core.settle()

            with core.lock:
                core.gcs.command = lambda *each: kept.append(each)  # type: ignore[method-assign]
                self.actor = None
                gc.collect()
                core.drain()
                core.gcs.command = send  # type: ignore[method-assign]
                assert ActorOutOfScope in [type(command) for command, _ in kept]
                core.reactor.call_later(200, release)

    class Named:
        def pid(self) -> int:
            return os.getpid()

    named = ftray.remote(name="crossing", get_if_exists=True)(Named)
    owner = Owner.remote()
    first = ftray.get(owner.make.remote(), timeout=GET_S)
    ftray.get(owner.drop.remote(), timeout=GET_S)
    with pytest.raises(ValueError, match="no live actor"):
        ftray.get_actor("crossing")
    second = named.remote()
    assert ftray.get(second.pid.remote(), timeout=GET_S) != first
