"""Actors: concurrency groups, bounds, order, exits, special methods, detached ones, and what must not get lost."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from integration.counters import counter_class, patiently
from integration.harness import (
    Driver,
    entries_left,
    is_running,
    meet,
    run_driver,
    wait_for_file,
    wait_for_none,
    wait_until,
)

import ftray
from ftray import exceptions
from ftray.api.context import ask_raylet
from ftray.worker.core import get_core

pytestmark = pytest.mark.usefixtures("session")

LOOPS = pytest.mark.parametrize("options", [{}, {"event_loop": "trio"}], ids=["asyncio", "trio"])
MODES = pytest.mark.parametrize("mode", ["serial", "threads", "asyncio", "trio"])


def leaver_class(mode: str, **options: Any) -> Any:
    """An actor of each kind whose calls wait, and end it."""

    class Plain:
        def pid(self) -> int:
            return os.getpid()

        def wait(self) -> None:
            wait_for_file("/nonexistent", 100)

        def leave(self, directory: str, how: Any) -> None:
            wait_for_file(Path(directory) / "leave")
            leave(how)

    class Async:
        async def pid(self) -> int:
            return os.getpid()

        async def wait(self) -> None:
            await sleep(100)

        async def leave(self, directory: str, how: Any) -> None:
            while not (Path(directory) / "leave").exists():
                await sleep(0.001)
            leave(how)

    async def sleep(seconds: float) -> None:
        if mode == "trio":
            import trio

            await trio.sleep(seconds)
        else:
            import asyncio

            await asyncio.sleep(seconds)

    def leave(how: Any) -> None:
        if how == "exit_actor":
            ftray.exit_actor()
        sys.exit(how)

    if mode == "threads":
        options["max_concurrency"] = 3
    elif mode == "trio":
        options["event_loop"] = "trio"
    cls: Any = Plain if mode in ("serial", "threads") else Async
    return ftray.remote(**options)(cls) if options else ftray.remote(cls)


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


# --- exits ----------------------------------------------------------------------------------------------------------


@MODES
def test_an_actor_that_exits_takes_what_it_has_not_answered_along(mode: str, tmp_path: Path) -> None:
    actor = leaver_class(mode, max_restarts=3).remote()
    pid = ftray.get(actor.pid.remote(), timeout=20)
    answered = actor.pid.remote()
    beside = [actor.wait.remote()] if mode != "serial" else []
    leaving = actor.leave.remote(str(tmp_path), "exit_actor")
    behind = [actor.wait.remote() for _ in range(5)]
    assert ftray.get(answered, timeout=20) == pid
    (tmp_path / "leave").touch()
    for ref in (leaving, *beside, *behind):
        with pytest.raises(exceptions.ActorDiedError, match="the actor exited: exit_actor was called"):
            ftray.get(ref, timeout=20)
    wait_for_none(lambda: is_running(pid), what="the actor's process")
    with pytest.raises(exceptions.ActorDiedError, match="exit_actor"):
        ftray.get(actor.pid.remote(), timeout=20)


@MODES
def test_sys_exit(mode: str, tmp_path: Path) -> None:
    (tmp_path / "leave").touch()
    actor = leaver_class(mode, max_restarts=3).remote()
    with pytest.raises(exceptions.ActorDiedError, match=r"exited: the task called sys\.exit"):
        ftray.get(actor.leave.remote(str(tmp_path), 0), timeout=20)
    failing = leaver_class(mode, max_restarts=1).remote()
    pid = ftray.get(failing.pid.remote(), timeout=20)
    with pytest.raises(exceptions.ActorUnavailableError, match="leave"):
        ftray.get(failing.leave.remote(str(tmp_path), 3), timeout=20)
    assert patiently(failing.pid.remote) != pid, "a code that says failure is a failure: the actor is restarted"
    with pytest.raises(exceptions.ActorDiedError, match="exited with code 3") as caught:
        patiently(lambda: failing.leave.remote(str(tmp_path), 3))
    assert caught.value.death is not None
    assert caught.value.death.exit_code == 3
    assert ".leave" in caught.value.death.what


def test_exit_from_a_coroutine_that_no_call_waits_for() -> None:
    @ftray.remote
    class Async:
        def __init__(self) -> None:
            self.tasks: list[Any] = []

        async def arm(self) -> int:
            import asyncio

            async def later() -> None:
                ftray.exit_actor()

            self.tasks.append(asyncio.create_task(later()))
            return os.getpid()

    actor = Async.remote()
    pid = ftray.get(actor.arm.remote(), timeout=20)
    wait_for_none(lambda: is_running(pid), what="the actor's process")


def test_large_answers_before_an_exit_arrive() -> None:
    @ftray.remote
    class Leaver:
        def data(self) -> bytes:
            return bytes(100_000)

        def leave(self) -> None:
            ftray.exit_actor()

    leaver = Leaver.remote()
    refs = [leaver.data.remote() for _ in range(100)]
    leaver.leave.remote()
    assert {len(data) for data in ftray.get(refs, timeout=20)} == {100_000}


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


# --- what must not get lost -----------------------------------------------------------------------------------------


def test_more_calls_than_a_channel_holds(tmp_path: Path) -> None:
    @ftray.remote
    class Slow:
        def take(self, data: bytes, path: str) -> int:
            wait_for_file(path)
            return len(data)

    slow = Slow.remote()
    refs = [slow.take.remote(bytes(90_000), str(tmp_path / "release")) for _ in range(900)]
    core = get_core()
    with core.lock:
        waiting = len(slow._ftray_calls.link.out) if slow._ftray_calls.link is not None else 0
    assert waiting < 20 << 20
    (tmp_path / "release").touch()
    assert sum(ftray.get(refs, timeout=60)) == 900 * 90_000


def test_calls_flow_on_though_none_is_answered() -> None:
    @ftray.remote
    class Gate:
        def __init__(self) -> None:
            import asyncio

            self.event = asyncio.Event()
            self.size = 0

        async def enter(self, data: bytes) -> None:
            self.size += len(data)
            if self.size >= 300 * 90_000:
                self.event.set()
            await self.event.wait()

    gate = Gate.remote()
    assert ftray.get([gate.enter.remote(bytes(90_000)) for _ in range(300)], timeout=60) == [None] * 300


def unread_bytes(sock: socket.socket) -> int:
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_answers_of_the_last_life_count_when_news_of_the_next_come_first(tmp_path: Path) -> None:
    @ftray.remote(max_restarts=1)
    class Restarted:
        def __init__(self) -> None:
            name = "again" if ftray.get_runtime_context().was_current_actor_reconstructed else "first"
            (tmp_path / f"{name}.part").write_text(ftray.get_runtime_context().get_worker_id())
            (tmp_path / f"{name}.part").rename(tmp_path / name)

        def pid(self) -> int:
            return os.getpid()

        def data(self) -> bytes:
            return bytes(50_000)

        def die(self) -> None:
            wait_for_file(tmp_path / "die")
            os.kill(os.getpid(), signal.SIGKILL)

    actor = Restarted.remote()
    ftray.get(actor.pid.remote(), timeout=20)
    core = get_core()
    refs = [actor.data.remote() for _ in range(3)]
    actor.die.remote()
    with core.lock:  # nothing is read here until the news of the next life has come
        core.settle()
        channel = actor._ftray_calls.link.sock
        wait_until(lambda: unread_bytes(channel) > 150_000, what="the answers")
        (tmp_path / "die").touch()
        wait_for_file(tmp_path / "again")
        endpoint = f"w-{(tmp_path / 'again').read_text()[:12]}.sock".encode()
        news: Any = core.gcs.client._link
        wait_until(lambda: endpoint in news.sock.recv(1 << 20, socket.MSG_PEEK))
        record_first = news.fd
        order = core.reactor.poll_events
        core.reactor.poll_events = lambda *args: sorted(order(*args), key=lambda event: event[0] != record_first)
    try:
        assert {len(data) for data in ftray.get(refs, timeout=20)} == {50_000}
    finally:
        core.reactor.poll_events = order


def test_no_later_call_is_answered_by_a_killed_actor() -> None:
    counter = counter_class(max_restarts=-1).remote()
    pids = [ftray.get(counter.pid.remote(), timeout=20)]
    for _ in range(5):
        ftray.kill(counter, no_restart=False)
        pids.append(ftray.get(counter.pid.remote(), timeout=20))
    assert len(set(pids)) == 6
    ftray.kill(counter)
    with pytest.raises(exceptions.ActorDiedError, match="killed"):
        ftray.get(counter.pid.remote(), timeout=1)


def test_a_death_names_the_method_that_ran() -> None:
    counter = counter_class().remote()
    ftray.get(counter.add.remote(), timeout=20)
    dying, behind = counter.die.remote(), counter.add.remote()
    for ref in (dying, behind):
        with pytest.raises(exceptions.ActorDiedError, match=r"SIGKILL while running Counter\.die"):
            ftray.get(ref, timeout=20)


@MODES
def test_what_a_dead_caller_held_is_let_go_at_once(mode: str, tmp_path: Path) -> None:
    class Plain:
        def __init__(self) -> None:
            self.ref = ftray.put(bytes(300_000))

        def lend(self) -> Any:
            return [self.ref]

        def drop(self) -> None:
            self.ref = None

    class Async(Plain):
        async def beat(self) -> None: ...

    options: dict[str, Any] = {"threads": {"max_concurrency": 2}, "trio": {"event_loop": "trio"}}.get(mode, {})
    cls: Any = Plain if mode in ("serial", "threads") else Async
    owner = (ftray.remote(**options)(cls) if options else ftray.remote(cls)).remote()

    @ftray.remote(max_retries=0)
    def borrow(owner: Any) -> None:
        ref = ftray.get(owner.lend.remote())[0]
        assert len(ftray.get(ref)) == 300_000
        (tmp_path / "part").write_text(str(os.getpid()))
        (tmp_path / "part").rename(tmp_path / "pid")
        wait_for_file("/nonexistent", 100)

    borrowed = borrow.remote(owner)
    wait_for_file(tmp_path / "pid")
    ftray.get(owner.drop.remote(), timeout=20)
    assert ask_raylet("memory")["objects"]
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    wait_for_none(lambda: ask_raylet("memory")["objects"], what="what the dead caller has borrowed")
    with pytest.raises(exceptions.WorkerCrashedError):
        ftray.get(borrowed, timeout=20)


# --- detached actors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_restarts", [0, 2])
def test_a_detached_actor_lets_go_of_its_constructors_arguments(max_restarts: int) -> None:
    cls = counter_class(lifetime="detached", name="keeper", max_restarts=max_restarts)
    one = ftray.put(1)
    held = one.hex()
    actor = cls.remote(one)
    assert ftray.get(actor.add.remote(), timeout=20) == 2
    pid = ftray.get(actor.pid.remote())
    del one
    if max_restarts:
        assert held in entries_left(), "a restart needs it"
        del actor
        gc.collect()
        assert held in entries_left(), "whether there is a handle or not"
        os.kill(pid, signal.SIGKILL)
        actor = ftray.get_actor("keeper")
        assert patiently(lambda: actor.add.remote()) == 2
        del actor
        gc.collect()
        ftray.kill(ftray.get_actor("keeper"))
    else:
        ftray.kill(actor)
        del actor
    wait_for_none(lambda: held in entries_left(), what="the constructor's argument")
    wait_for_none(lambda: "keeper" in ftray.list_named_actors())


@contextmanager
def head() -> Iterator[dict[str, str]]:
    """A node that outlives its drivers; the environment in which they find it."""
    with tempfile.TemporaryDirectory(prefix="ft-") as root:
        environ = {**os.environ, "FTRAY_SESSION_ROOT": root}
        node = [sys.executable, "-m", "ftray.cli"]
        subprocess.run([*node, "start", "--head", "--port", "0", "--num-cpus", "1"], env=environ, check=True)
        try:
            yield {"FTRAY_SESSION_ROOT": root}
        finally:
            subprocess.run([*node, "stop"], env=environ, check=True)


def test_a_detached_actor_outlives_its_driver(capfd: pytest.CaptureFixture[str]) -> None:
    with head() as env:
        first = """
            ftray.init(address="auto", namespace="mine")

            @ftray.remote(lifetime="detached", name="lasting", max_restarts=1)
            class Lasting:
                def __init__(self, start, data):
                    self.value = start + len(data)

                def add(self):
                    self.value += 1
                    return self.value, os.getpid()

            lasting = Lasting.remote(10, ftray.put(bytes(5)))
            say("added", *ftray.get(lasting.add.remote()))
        """
        with run_driver(first, env=env) as driver:
            value, pid = driver.wait_for("added").split()
        assert value == "16"
        assert is_running(int(pid))
        second = f"""
            ftray.init(address="auto", namespace="other")
            try:
                ftray.get_actor("lasting")
            except ValueError:
                say("not here")
            assert ftray.list_named_actors() == []
            assert ftray.list_named_actors(all_namespaces=True) == [{{"name": "lasting", "namespace": "mine"}}]
            lasting = ftray.get_actor("lasting", namespace="mine")
            assert ftray.get(lasting.add.remote()) == (17, {pid})
            try:
                ftray.get_actor("lasting", "mine").subtract
            except AttributeError:
                pass
            ftray.kill(lasting)
            say("killed")
        """
        with run_driver(second, env=env) as driver:
            driver.wait_for("killed")
        wait_for_none(lambda: is_running(int(pid)), what="the actor's process")
    capfd.readouterr()


def test_an_actor_that_is_not_detached_ends_with_its_driver() -> None:
    code = """
        ftray.init(num_cpus=1)

        @ftray.remote
        class Bound:
            def pid(self):
                return os.getpid()

        bound = Bound.options(name="bound").remote()
        say("pid", ftray.get(bound.pid.remote()))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with Driver(code) as driver:
        driver.finish()
        pid = int(driver.out.split()[1])
        wait_for_none(lambda: is_running(pid), what="the actor's process")
        driver.check_clean()
