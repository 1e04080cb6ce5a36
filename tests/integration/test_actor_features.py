"""Actors: concurrency groups, bounds, order, methods, names."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from integration.counters import counter_class
from integration.harness import (
    meet,
    wait_for_file,
    wait_until,
)

import ftray
from ftray import exceptions

pytestmark = pytest.mark.usefixtures("session")

LOOPS = pytest.mark.parametrize("options", [{}, {"event_loop": "trio"}], ids=["asyncio", "trio"])


# --- concurrency groups ---------------------------------------------------------------------------------------------


def test_groups_of_threads(tmp_path: Path) -> None:
    @ftray.remote(concurrency_groups={"io": 2, "compute": 4})
    class Grouped:
        @ftray.method(concurrency_group="io")
        def block(self, directory: str) -> str:
            meet(directory, 2)
            wait_for_file(Path(directory).parent / "release")
            return threading.current_thread().name

        @ftray.method(concurrency_group="compute")
        def compute(self) -> str:
            return threading.current_thread().name

        def plain(self) -> str:
            return threading.current_thread().name

    actor = Grouped.remote()
    directory = tmp_path / "met"
    directory.mkdir()
    blocked = [actor.block.remote(str(directory)) for _ in range(3)]
    wait_until(lambda: len(list(directory.iterdir())) == 2)
    assert ftray.get(actor.compute.remote(), timeout=20).startswith("Grouped.compute-")
    assert ftray.get(actor.plain.remote(), timeout=20) == "Grouped-0"
    assert ftray.get(actor.plain.options(concurrency_group="compute").remote()).startswith("Grouped.compute-")
    behind = actor.plain.options(concurrency_group="io").remote()
    assert ftray.wait([*blocked, behind], num_returns=4, timeout=0.02)[0] == []
    assert len(list(directory.iterdir())) == 2, "no third call of the group runs"
    (tmp_path / "release").touch()
    names = ftray.get([*blocked, behind], timeout=20)
    assert set(names) == {"Grouped.io-0", "Grouped.io-1"}


@LOOPS
def test_groups_of_coroutines(options: dict[str, Any], tmp_path: Path) -> None:
    @ftray.remote(concurrency_groups={"slow": 2}, max_concurrency=1, **options)
    class Grouped:
        def __init__(self) -> None:
            self.now = self.most = 0
            self.released = False

        @ftray.method(concurrency_group="slow")
        async def block(self) -> int:
            self.now += 1
            self.most = max(self.most, self.now)
            while not self.released:
                await self.sleep()
            self.now -= 1
            return self.most

        async def release(self) -> int:
            while self.now < 2:
                await self.sleep()
            self.released = True
            return self.now

        async def sleep(self) -> None:
            if options:
                import trio

                await trio.sleep(0.001)
            else:
                import asyncio

                await asyncio.sleep(0.001)

    actor = Grouped.remote()
    refs = [actor.block.remote() for _ in range(6)]
    assert ftray.get(actor.release.remote(), timeout=20) == 2
    assert max(ftray.get(refs, timeout=20)) == 2


def test_a_full_group_holds_up_no_other_at_the_caller(tmp_path: Path) -> None:
    @ftray.remote(concurrency_groups={"slow": 1})
    class Grouped:
        @ftray.method(concurrency_group="slow")
        def block(self, path: str) -> None:
            wait_for_file(path)

        def plain(self) -> str:
            return "here"

    actor = Grouped.remote()
    refs = [actor.block.remote(str(tmp_path / "release")) for _ in range(5_000)]
    assert ftray.get(actor.plain.remote(), timeout=20) == "here"
    (tmp_path / "release").touch()
    assert ftray.get(refs, timeout=20) == [None] * 5_000


def test_wrong_groups() -> None:
    class Typo:
        @ftray.method(concurrency_group="oi")
        def f(self) -> None: ...

    with pytest.raises(ValueError, match=r"Typo\.f has no concurrency group 'oi': it has 'io'"):
        ftray.remote(concurrency_groups={"io": 1})(Typo)
    without = ftray.remote(Typo)
    with pytest.raises(ValueError, match="it has none"):
        without.remote()
    actor = without.options(concurrency_groups={"oi": 1}).remote()
    with pytest.raises(ValueError, match="no concurrency group 'nope'"):
        actor.f.options(concurrency_group="nope")
    assert ftray.get(actor.f.remote(), timeout=20) is None
    for wrong in ({"io": 0}, {"io": "many"}, {"": 1}, ["io"]):
        with pytest.raises((TypeError, ValueError), match="concurrency"):
            without.options(concurrency_groups=wrong)


# --- bounds and order -----------------------------------------------------------------------------------------------


def test_max_pending_calls(tmp_path: Path) -> None:
    counter = counter_class(max_pending_calls=3).remote()
    refs = [counter.wait_for.remote(str(tmp_path / "release")) for _ in range(3)]
    for _ in range(2):
        with pytest.raises(exceptions.PendingCallsLimitExceeded, match="max_pending_calls is 3"):
            counter.add.remote(ftray.put(1))
    (tmp_path / "release").touch()
    assert ftray.get(refs, timeout=20) == [1, 2, 3]
    assert ftray.get(counter.add.remote(), timeout=20) == 4

    @ftray.remote
    def elsewhere(counter: Any) -> Any:
        refs = []
        try:
            for _ in range(4):
                refs.append(counter.wait_for.remote(str(tmp_path / "release")))
        except exceptions.PendingCallsLimitExceeded:
            return len(refs)
        return refs

    (tmp_path / "release").unlink()
    ref = elsewhere.remote(counter)
    assert ftray.get(ref, timeout=20) == 3, "the bound goes with the handle"
    (tmp_path / "release").touch()
    unbounded = counter_class(max_pending_calls=-1).remote()
    assert ftray.get([unbounded.add.remote() for _ in range(100)], timeout=20)[-1] == 100
    for wrong in (0, -2, 1.5):
        with pytest.raises((TypeError, ValueError), match="max_pending_calls"):
            counter_class(max_pending_calls=wrong)


@pytest.mark.parametrize(
    "options", [{"max_concurrency": 2}, {"allow_out_of_order_execution": True}], ids=["threads", "serial"]
)
def test_calls_overtake_one_whose_argument_is_not_there(options: dict[str, Any], tmp_path: Path) -> None:
    @ftray.remote
    def late() -> int:
        wait_for_file(tmp_path / "release")
        return 100

    counter = counter_class(**options).remote()
    waiting = counter.add.remote(late.remote())
    assert ftray.get([counter.add.remote(), counter.add.remote()], timeout=20) == [1, 2]
    (tmp_path / "release").touch()
    assert ftray.get(waiting, timeout=20) == 102


def test_calls_whose_arguments_fail_leave_the_others_alone() -> None:
    @ftray.remote
    def fail() -> None:
        raise ValueError("mine")

    for options in ({}, {"allow_out_of_order_execution": True}):
        counter = counter_class(**options).remote()
        refs = [counter.add.remote(fail.remote()) if i % 2 else counter.add.remote() for i in range(20)]
        for i, ref in enumerate(refs):
            if i % 2:
                with pytest.raises(ValueError, match="mine"):
                    ftray.get(ref, timeout=20)
            else:
                assert ftray.get(ref, timeout=20) == 1 + i // 2


def test_order_cannot_be_asked_for_where_calls_run_together() -> None:
    with pytest.raises(ValueError, match="several threads"):
        counter_class(max_concurrency=2, allow_out_of_order_execution=False)

    class Async:
        async def f(self) -> None: ...

    with pytest.raises(ValueError, match="async methods"):
        ftray.remote(allow_out_of_order_execution=False)(Async)
    with pytest.raises(TypeError, match="allow_out_of_order_execution"):
        counter_class(allow_out_of_order_execution="yes")


# --- methods --------------------------------------------------------------------------------------------------------


def test_special_methods() -> None:
    @ftray.remote
    class Table:
        def __init__(self) -> None:
            self.rows = {"a": 1}

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, key: str) -> int:
            return self.rows[key]

        def __setitem__(self, key: str, value: int) -> None:
            self.rows[key] = value

        def __contains__(self, key: str) -> bool:
            return key in self.rows

        def __repr__(self) -> str:
            return "mine"

    table = Table.remote()
    table.__setitem__.remote("b", 2)
    assert ftray.get([table.__len__.remote(), table.__getitem__.remote("b"), table.__contains__.remote("c")]) == [
        2,
        2,
        False,
    ]
    with pytest.raises(KeyError, match="z"):
        ftray.get(table.__getitem__.remote("z"))
    with pytest.raises(AttributeError, match="__iter__"):
        table.__iter__  # noqa: B018
    assert "__len__" in dir(table)
    assert repr(table).startswith("Actor(Table, ")


def test_options_of_methods_at_the_decorator(tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    @ftray.remote
    class Flaky:
        @ftray.method(max_task_retries=2, retry_exceptions=[ConnectionError], name="a flaky call")
        def flaky(self, error: type[Exception]) -> int:
            with runs.open("a") as file:
                file.write("x")
            if runs.stat().st_size < 3:
                raise error("again")
            return runs.stat().st_size

    flaky = Flaky.remote()
    with pytest.raises(ValueError, match="again"):
        ftray.get(flaky.flaky.remote(ValueError), timeout=20)
    assert ftray.get(flaky.flaky.remote(ConnectionError), timeout=20) == 3


def test_a_trio_actor_is_constructed_in_its_run() -> None:
    @ftray.remote(event_loop="trio")
    class Trio:
        def __init__(self, fails: bool = False) -> None:
            import trio

            self.started = trio.current_time()
            self.token = trio.lowlevel.current_trio_token()
            self.beats = 0
            trio.lowlevel.spawn_system_task(self.beat)
            if fails:
                raise ValueError("mine")

        async def beat(self) -> None:
            import trio

            while True:
                self.beats += 1
                await trio.sleep(0.001)

        async def same(self) -> bool:
            import trio

            while self.beats < 3:
                await trio.sleep(0.001)
            return self.token is trio.lowlevel.current_trio_token() and trio.current_time() >= self.started

    assert ftray.get(Trio.remote().same.remote(), timeout=20)
    with pytest.raises(exceptions.ActorDiedError, match="ValueError: mine"):
        ftray.get(Trio.remote(True).same.remote(), timeout=20)


# --- names ----------------------------------------------------------------------------------------------------------


def test_get_if_exists_needs_a_name_and_has_one_winner() -> None:
    with pytest.raises(ValueError, match="needs a name"):
        counter_class().options(get_if_exists=True)
    shared = counter_class().options(name="raced", get_if_exists=True)

    @ftray.remote
    def find(directory: str) -> Any:
        meet(directory, 2)
        return ftray.get(shared.remote().pid.remote())

    for _ in range(3):
        with tempfile.TemporaryDirectory() as directory:
            keeper = counter_class().remote()  # so that all of them are alive at once
            holders = [find.remote(directory), find.remote(directory)]
            pids = ftray.get(holders, timeout=20)
            del keeper
        # The winner's task may have ended before the other one looked: then that one has made it anew.
        assert all(isinstance(pid, int) for pid in pids)

    @ftray.remote
    class Holder:
        def find(self, directory: str) -> Any:
            meet(directory, 3)
            self.actor = shared.remote()
            return ftray.get(self.actor.pid.remote())

    with tempfile.TemporaryDirectory() as directory:
        holding = [Holder.remote() for _ in range(3)]
        assert len(set(ftray.get([holder.find.remote(directory) for holder in holding], timeout=20))) == 1
    assert "raced" in ftray.list_named_actors()
