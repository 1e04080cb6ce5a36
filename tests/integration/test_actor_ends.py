"""Actors: how they exit, what must not get lost when they do, and detached ones."""

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
            wait_for_file(tmp_path / "go")
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
        (tmp_path / "go").touch()
        wait_until(lambda: unread_bytes(channel) > 150_000, what="the answers")
        (tmp_path / "die").touch()
        wait_for_file(tmp_path / "again")
        endpoint = f"w-{(tmp_path / 'again').read_text()[:12]}.sock".encode()
        news: Any = core.gcs.client._links.link
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
