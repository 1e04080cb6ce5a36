"""Actors: names, and how they end and come back."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from integration.counters import counter_class, patiently
from integration.harness import is_running, wait_for_file, wait_for_none

import ftray
from ftray import exceptions

pytestmark = pytest.mark.usefixtures("session")


# --- names ----------------------------------------------------------------------------------------------------------


def test_named_actors() -> None:
    counter = counter_class().options(name="counter").remote()
    assert ftray.get(counter.add.remote()) == 1
    found = ftray.get_actor("counter")
    assert found == counter
    assert ftray.get(found.add.remote()) == 2
    assert ftray.list_named_actors() == ["counter"]
    with pytest.raises(ValueError, match="'counter'"):
        counter_class().options(name="counter").remote()

    @ftray.remote
    def use() -> Any:
        return ftray.get(ftray.get_actor("counter").add.remote())

    assert ftray.get(use.remote(), timeout=20) == 3
    assert ftray.get(counter.add.remote()) == 4
    with pytest.raises(ValueError, match=r"'nobody' in namespace"):
        ftray.get_actor("nobody")
    for wrong in ("", None, 5):
        with pytest.raises((ValueError, TypeError)):
            ftray.get_actor(wrong)  # type: ignore[arg-type]


def test_a_name_is_free_again_after_the_end() -> None:
    first = counter_class().options(name="again").remote()
    pid = ftray.get(first.pid.remote())
    ftray.kill(first)
    wait_for_none(lambda: "again" in ftray.list_named_actors())
    second = counter_class().options(name="again").remote()
    assert ftray.get(second.pid.remote()) != pid
    del second
    gc.collect()
    wait_for_none(lambda: "again" in ftray.list_named_actors())
    with pytest.raises(ValueError, match="again"):
        ftray.get_actor("again")


def test_get_if_exists() -> None:
    options = {"name": "shared", "get_if_exists": True}
    first = counter_class().options(**options).remote(100)
    second = counter_class().options(**options).remote(200)
    assert first == second
    assert ftray.get([first.add.remote(), second.add.remote()]) == [101, 102]


def test_namespaces_keep_names_apart() -> None:
    a = counter_class().options(name="same", namespace="a").remote(1)
    b = counter_class().options(name="same", namespace="b").remote(10)
    assert ftray.get(ftray.get_actor("same", namespace="a").add.remote()) == 2
    assert ftray.get(ftray.get_actor("same", namespace="b").add.remote()) == 11
    with pytest.raises(ValueError, match="same"):
        ftray.get_actor("same")
    everywhere = ftray.list_named_actors(all_namespaces=True)
    assert {"name": "same", "namespace": "a"} in everywhere
    assert {"name": "same", "namespace": "b"} in everywhere
    assert ftray.get([a.add.remote(), b.add.remote()]) == [3, 12]


def test_a_detached_actor_outlives_its_handles_and_ends_by_kill() -> None:
    counter = counter_class().options(name="detached", lifetime="detached").remote()
    pid = ftray.get(counter.pid.remote())
    del counter
    gc.collect()
    found = ftray.get_actor("detached")
    assert ftray.get(found.pid.remote()) == pid
    ftray.kill(found)
    wait_for_none(lambda: is_running(pid), what="the actor's process")


# --- deaths and restarts --------------------------------------------------------------------------------------------


def test_a_killed_actor_restarts_with_fresh_state() -> None:
    counter = counter_class(max_restarts=1).remote(10)
    assert ftray.get([counter.add.remote(), counter.again.remote()]) == [11, False]
    pid = ftray.get(counter.pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert patiently(counter.add.remote) == 11
    assert ftray.get(counter.pid.remote()) != pid
    assert ftray.get(counter.again.remote())
    os.kill(ftray.get(counter.pid.remote()), signal.SIGKILL)
    with pytest.raises(exceptions.ActorDiedError, match="SIGKILL"):
        patiently(counter.add.remote)


def test_without_restarts_a_death_is_final_and_explained() -> None:
    counter = counter_class().remote()
    pid = ftray.get(counter.pid.remote())
    ref = counter.die.remote()
    with pytest.raises(exceptions.ActorDiedError) as caught:
        ftray.get(ref, timeout=20)
    text = str(caught.value)
    for part in ("Counter", "SIGKILL", str(pid)):
        assert part in text
    assert caught.value.death is not None
    assert caught.value.death.signal == signal.SIGKILL
    for _ in range(3):  # at once from now on
        with pytest.raises(exceptions.ActorDiedError, match="SIGKILL"):
            ftray.get(counter.add.remote(), timeout=1)


def test_calls_run_at_most_once_by_default(tmp_path: Path) -> None:
    counter = counter_class(max_restarts=1).remote()
    started = tmp_path / "started"

    @ftray.remote(max_restarts=1)
    class Noted:
        def once(self) -> None:
            with started.open("a") as file:
                file.write("x")
            wait_for_file("/nonexistent", 100)

        def fine(self) -> str:
            return "fine"

        def pid(self) -> int:
            return os.getpid()

    noted = Noted.remote()
    pid = ftray.get(noted.pid.remote())
    ref = noted.once.remote()
    wait_for_file(started)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(exceptions.ActorUnavailableError, match=r"Noted\.once"):
        ftray.get(ref, timeout=20)
    assert patiently(noted.fine.remote) == "fine"
    assert started.read_text() == "x"
    assert ftray.get(counter.add.remote()) == 1


def test_max_task_retries_repeats_calls_in_order(tmp_path: Path) -> None:
    release = tmp_path / "release"
    counter = counter_class(max_restarts=1, max_task_retries=1).remote()
    pid = ftray.get(counter.pid.remote())
    refs = [counter.wait_for.remote(str(release))] + [counter.add.remote() for _ in range(20)]
    os.kill(pid, signal.SIGKILL)
    wait_for_none(lambda: is_running(pid))
    release.touch()
    assert ftray.get(refs, timeout=20) == list(range(1, 22))
    assert ftray.get(counter.pid.remote()) != pid


def test_a_call_that_always_kills_its_actor_spends_its_retries() -> None:
    counter = counter_class(max_restarts=-1, max_task_retries=2).remote()
    with pytest.raises(exceptions.ActorError):
        ftray.get(counter.die.remote(), timeout=20)
    assert patiently(counter.add.remote) == 1


def test_kill_ends_an_actor_at_once() -> None:
    counter = counter_class(max_restarts=5).remote()
    pid = ftray.get(counter.pid.remote())
    running = counter.wait_for.remote("/nonexistent")
    ftray.kill(counter)
    with pytest.raises(exceptions.ActorDiedError, match="kill"):
        ftray.get(running, timeout=20)
    wait_for_none(lambda: is_running(pid), what="the actor's process")
    with pytest.raises(exceptions.ActorDiedError, match="kill"):
        ftray.get(counter.add.remote(), timeout=1)
    ftray.kill(counter)  # dead already: nothing happens
    with pytest.raises(TypeError, match="takes an actor handle"):
        ftray.kill(running)


def test_kill_with_restart() -> None:
    counter = counter_class(max_restarts=1).remote()
    pid = ftray.get(counter.pid.remote())
    assert ftray.get(counter.add.remote(5)) == 5
    ftray.kill(counter, no_restart=False)
    wait_for_none(lambda: is_running(pid), what="the actor's process")
    assert patiently(counter.add.remote) == 1
    assert ftray.get(counter.pid.remote()) != pid


def test_kill_of_an_actor_that_is_not_alive_yet(tmp_path: Path) -> None:
    @ftray.remote
    class Slow:
        def __init__(self) -> None:
            wait_for_file("/nonexistent", 100)

        def hello(self) -> None: ...

    slow = Slow.remote()
    ref = slow.hello.remote()
    ftray.kill(slow)
    with pytest.raises(exceptions.ActorDiedError):
        ftray.get(ref, timeout=20)


def test_a_constructor_that_raises() -> None:
    @ftray.remote(max_restarts=3)
    class Broken:
        def __init__(self, text: str) -> None:
            self.fail(text)

        def fail(self, text: str) -> None:
            raise ValueError(text)

        def hello(self) -> None: ...

    broken = Broken.remote("no such file: data.csv")
    ref = broken.hello.remote()
    with pytest.raises(exceptions.ActorDiedError) as caught:
        ftray.get(ref, timeout=20)
    text = str(caught.value)
    for part in ("Broken", "constructor raised", "ValueError: no such file: data.csv", "in fail", "Traceback"):
        assert part in text
    with pytest.raises(exceptions.ActorDiedError, match="data.csv"):
        ftray.get(broken.hello.remote(), timeout=1)


def test_a_constructor_whose_argument_failed() -> None:
    @ftray.remote
    def fail() -> None:
        raise ValueError("mine")

    counter = counter_class().remote(fail.remote())
    with pytest.raises((exceptions.ActorDiedError, ValueError)):
        ftray.get(counter.add.remote(), timeout=20)


def test_a_constructor_that_dies() -> None:
    @ftray.remote
    class Dies:
        def __init__(self) -> None:
            os._exit(9)

        def hello(self) -> None: ...

    with pytest.raises(exceptions.ActorDiedError, match="exited with code 9"):
        ftray.get(Dies.remote().hello.remote(), timeout=20)


def test_an_exception_in_a_method_leaves_the_actor_alive() -> None:
    @ftray.remote
    class Risky:
        def __init__(self) -> None:
            self.calls = 0

        def divide(self, a: int, b: int) -> float:
            self.calls += 1
            return a / b

        def count(self) -> int:
            return self.calls

    risky = Risky.remote()
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        ftray.get(risky.divide.remote(1, 0))
    assert "Risky.divide" in str(caught.value)
    assert ftray.get(risky.divide.remote(4, 2)) == 2
    assert ftray.get(risky.count.remote()) == 2


def test_retry_exceptions_of_methods(tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    @ftray.remote(max_task_retries=2)
    class Flaky:
        def flaky(self) -> int:
            with runs.open("a") as file:
                file.write("x")
            if runs.stat().st_size < 3:
                raise ConnectionError("try again")
            return runs.stat().st_size

    flaky = Flaky.remote()
    assert ftray.get(flaky.flaky.options(retry_exceptions=True).remote(), timeout=20) == 3


def test_exit_actor() -> None:
    @ftray.remote(max_restarts=3)
    class Leaver:
        def leave(self) -> None:
            try:
                ftray.exit_actor()
            except Exception:
                os._exit(1)

        def pid(self) -> int:
            return os.getpid()

    leaver = Leaver.remote()
    pid = ftray.get(leaver.pid.remote())
    with pytest.raises(exceptions.ActorDiedError, match="exit_actor"):
        ftray.get(leaver.leave.remote(), timeout=20)
    wait_for_none(lambda: is_running(pid), what="the actor's process")
    with pytest.raises(exceptions.ActorDiedError):
        ftray.get(leaver.pid.remote(), timeout=20)
    with pytest.raises(RuntimeError, match="methods of actors"):
        ftray.exit_actor()


def test_an_actor_that_no_node_can_host() -> None:
    counter = counter_class(num_cpus=100).remote()
    with pytest.raises(exceptions.ActorError, match="CPU"):
        ftray.get(counter.add.remote(), timeout=20)


def test_more_actors_than_cpus() -> None:
    counters = [counter_class().remote(i) for i in range(6)]
    assert ftray.get([counter.add.remote() for counter in counters], timeout=20) == list(range(1, 7))


def test_actors_take_the_resources_they_ask_for(tmp_path: Path) -> None:
    first = counter_class(num_cpus=2).remote()
    assert ftray.get(first.add.remote()) == 1
    second = counter_class(num_cpus=2).remote()
    ref = second.add.remote()
    assert ftray.wait([ref], timeout=0.1)[0] == []
    ftray.kill(first)
    assert ftray.get(ref, timeout=20) == 1




def test_a_burst_before_the_actor_lives_arrives_whole() -> None:
    """More than one receive buffer travels with the channel's greeting."""

    @ftray.remote
    class Sink:
        def size(self, data: bytes) -> int:
            return len(data)

    for _ in range(5):
        sink = Sink.remote()
        assert ftray.get([sink.size.remote(bytes(200)) for _ in range(1500)], timeout=20) == [200] * 1500


def test_a_remote_class_is_no_base() -> None:
    @ftray.remote
    class Base: ...

    with pytest.raises(TypeError, match="inherit from the plain class"):

        class Derived(Base): ...  # type: ignore[misc]
