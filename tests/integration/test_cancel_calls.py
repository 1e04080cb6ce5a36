"""`ftray.cancel` for calls of actors, in all the ways in which they run, and for generators."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from integration.cancelling import GET_S, Plain, begun, check_cancelled, hold, holding
from integration.harness import wait_for_file

import ftray
from ftray import exceptions

SESSION = {"num_cpus": 2, "_system_config": {"infeasible_timeout_ms": 60_000}}
pytestmark = pytest.mark.usefixtures("session")


# --- actors -----------------------------------------------------------------------------------------------------------


class Async:
    def __init__(self) -> None:
        self.log: list[Any] = []

    async def stay(self, directory: str) -> None:
        try:
            Path(directory, "begun-0").write_text(str(os.getpid()))
            await _sleep()
        except BaseException as error:
            self.log.append(type(error).__name__)
            raise

    async def note(self, number: int) -> int:
        self.log.append(number)
        return number

    async def read(self) -> list[Any]:
        return self.log


async def _sleep() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        import trio

        await trio.sleep(60)
    else:
        await asyncio.sleep(60)


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_of_a_plain_actor(threads: int, tmp_path: Path) -> None:
    actor = ftray.remote(Plain).options(max_concurrency=threads).remote()
    stays = [actor.stay.remote(str(tmp_path / str(n))) for n in range(threads) if (tmp_path / str(n)).mkdir() is None]
    notes = [actor.note.remote(number) for number in range(6)]
    for n in range(threads):
        begun(tmp_path / str(n))
    for index in (0, 3):
        ftray.cancel(notes[index])
        check_cancelled(notes[index], "Plain.note")
    for n, ref in enumerate(stays):
        assert not Path(tmp_path, str(n), "seen").exists()
        ftray.cancel(ref)  # not interrupted: it asks
        check_cancelled(ref, "Plain.stay")
        assert Path(tmp_path, str(n), "seen").exists()
    assert ftray.get([notes[index] for index in (1, 2, 4, 5)], timeout=GET_S) == [1, 2, 4, 5]
    log = ftray.get(actor.read.remote(), timeout=GET_S)
    assert (log if threads == 1 else sorted(log)) == [1, 2, 4, 5]


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_calls_of_an_async_actor(loop: str, tmp_path: Path) -> None:
    actor = ftray.remote(Async).options(max_concurrency=1, event_loop=loop).remote()
    stays = actor.stay.remote(str(tmp_path))
    notes = [actor.note.remote(number) for number in range(4)]
    begun(tmp_path)
    ftray.cancel(notes[1])
    check_cancelled(notes[1], "Async.note")
    ftray.cancel(stays)
    check_cancelled(stays, "Async.stay")
    assert ftray.get([notes[0], notes[2], notes[3]], timeout=GET_S) == [0, 2, 3]
    error = "CancelledError" if loop == "asyncio" else "Cancelled"
    assert ftray.get(actor.read.remote(), timeout=GET_S) == [error, 0, 2, 3]


def test_calls_that_were_not_sent_yet(tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")

    class Slow(Plain):
        def __init__(self) -> None:
            super().__init__()
            wait_for_file(gate)

    actor = ftray.remote(Slow).remote()
    slow = holding.remote(str(tmp_path))
    notes = [actor.note.remote(0), actor.note.remote(slow), actor.note.remote(2), actor.note.remote(3)]
    ftray.cancel(notes[1])  # waits for its argument, and holds up those behind it
    ftray.cancel(notes[3])
    check_cancelled(notes[1], "Slow.note")
    check_cancelled(notes[3], "Slow.note")
    Path(gate).touch()
    assert ftray.get([notes[0], notes[2], actor.read.remote()], timeout=GET_S) == [0, 2, [0, 2]]
    ftray.cancel(slow)


def test_children_of_a_call_and_calls_as_children(tmp_path: Path) -> None:
    actor = ftray.remote(Plain).remote()
    ref = actor.wait_for.remote(str(tmp_path))
    begun(tmp_path)
    ftray.cancel(ref)
    wait_for_file(tmp_path / "interrupted-0")
    check_cancelled(ref, "Plain.wait_for")

    @ftray.remote(num_cpus=0)
    def call(actor: Any, directory: str) -> None:
        ftray.get(actor.stay.remote(directory))

    (tmp_path / "below").mkdir()
    ref = call.remote(actor, str(tmp_path / "below"))
    begun(tmp_path / "below")
    ftray.cancel(ref, force=True)  # not for the actor: it lives
    check_cancelled(ref, "call")
    wait_for_file(tmp_path / "below" / "seen")
    assert ftray.get(actor.note.remote(1), timeout=GET_S) == 1


# --- generators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["queued", "in its code", "waits for its reader", "in an actor"])
def test_a_generator(where: str, tmp_path: Path) -> None:
    def items(directory: str, stay: bool) -> Any:
        try:
            for n in range(1_000_000):
                if stay and n == 2:
                    Path(directory, "begun-0").write_text("1")
                    hold()
                yield n
        finally:
            Path(directory, "closed").touch()

    class Yielder:
        def items(self, directory: str, stay: bool) -> Any:
            yield from items(directory, stay)

    options: dict[str, Any] = {"num_returns": "streaming", "_generator_backpressure_num_objects": 4}
    if where == "in an actor":
        actor = ftray.remote(Yielder).remote()
        generator = actor.items.options(**options).remote(str(tmp_path), False)
    else:
        if where == "queued":
            options["resources"] = {"nowhere": 1}
        generator = ftray.remote(**options)(items).remote(str(tmp_path), where == "in its code")
    read = 0
    if where == "in its code":
        begun(tmp_path)
    if where != "queued":
        assert ftray.get(next(generator), timeout=GET_S) == 0
        read = 1
    ftray.cancel(generator)
    with pytest.raises(exceptions.TaskCancelledError):
        for ref in generator:
            assert ftray.get(ref, timeout=GET_S) == read
            read += 1
    assert read < 1_000_000
    with pytest.raises(StopIteration):
        next(generator)
    with pytest.raises(exceptions.TaskCancelledError):
        ftray.get(generator.completed(), timeout=GET_S)
    if where != "queued":
        wait_for_file(tmp_path / "closed")
    ftray.cancel(generator)  # has ended
