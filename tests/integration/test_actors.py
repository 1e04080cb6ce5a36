"""Actors: state, order, handles, names, and how they end and come back."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from integration.harness import is_running, meet, wait_for_file, wait_for_none, wait_until

import ftray
from ftray import exceptions

pytestmark = pytest.mark.usefixtures("session")


def counter_class(**options: Any) -> Any:
    class Counter:
        def __init__(self, start: int = 0) -> None:
            self.value = start

        def add(self, n: int = 1) -> int:
            self.value += n
            return self.value

        def pid(self) -> int:
            return os.getpid()

        def wait_for(self, path: str) -> int:
            wait_for_file(path)
            return self.add()

        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def again(self) -> bool:
            return ftray.get_runtime_context().was_current_actor_reconstructed

    return ftray.remote(**options)(Counter) if options else ftray.remote(Counter)


def patiently(call: Callable[[], Any]) -> Any:
    """Repeats a call while its actor restarts."""

    def attempt() -> Any:
        try:
            return [ftray.get(call(), timeout=10)]
        except exceptions.ActorUnavailableError:
            return None

    return wait_until(attempt)[0]


# --- state and order ------------------------------------------------------------------------------------------------


def test_an_actor_keeps_its_state() -> None:
    counter = counter_class().remote(10)
    assert ftray.get([counter.add.remote(), counter.add.remote(5), counter.add.remote(n=-1)]) == [11, 16, 15]
    other = counter_class().remote()
    assert ftray.get(other.add.remote()) == 1
    assert ftray.get(counter.pid.remote()) != ftray.get(other.pid.remote())


def test_calls_of_one_caller_run_in_order() -> None:
    counter = counter_class().remote()
    assert ftray.get([counter.add.remote() for _ in range(1000)]) == list(range(1, 1001))


def test_order_holds_when_arguments_come_late(tmp_path: Path) -> None:
    @ftray.remote
    class Log:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def note(self, value: Any) -> None:
            self.seen.append(value)

        def show(self) -> Any:
            return self.seen

    @ftray.remote
    def late(path: str) -> str:
        wait_for_file(path)
        return "late"

    log = Log.remote()
    release = tmp_path / "release"
    ref = late.remote(str(release))
    log.note.remote(1)
    log.note.remote(ref)
    log.note.remote(3)
    shown = log.show.remote()
    release.touch()
    assert ftray.get(shown, timeout=20) == [1, "late", 3]


def test_two_callers_each_see_their_own_order() -> None:
    @ftray.remote
    class Log:
        def __init__(self) -> None:
            self.seen: list[tuple[str, int]] = []

        def note(self, who: str, i: int) -> None:
            self.seen.append((who, i))

        def show(self) -> Any:
            return self.seen

    @ftray.remote
    def caller(log: Any, who: str) -> None:
        ftray.get([log.note.remote(who, i) for i in range(200)])

    log = Log.remote()
    refs = [caller.remote(log, "a"), caller.remote(log, "b")]
    ftray.get([log.note.remote("driver", i) for i in range(200)])
    ftray.get(refs, timeout=20)
    seen = ftray.get(log.show.remote())
    for who in ("a", "b", "driver"):
        assert [i for name, i in seen if name == who] == list(range(200))


def test_calls_before_the_constructor_is_done_wait_for_it(tmp_path: Path) -> None:
    release = tmp_path / "release"

    @ftray.remote
    class Slow:
        def __init__(self) -> None:
            wait_for_file(release)
            self.ready = True

        def show(self) -> bool:
            return self.ready

    slow = Slow.remote()
    refs = [slow.show.remote() for _ in range(3)]
    assert ftray.wait(refs, timeout=0.02)[0] == []
    release.touch()
    assert ftray.get(refs, timeout=20) == [True] * 3


def test_constructor_arguments_may_be_references() -> None:
    @ftray.remote
    class Holder:
        def __init__(self, a: Any, box: Any, *, c: Any) -> None:
            self.values = [a, ftray.get(box[0]), len(c)]

        def show(self) -> Any:
            return self.values

    @ftray.remote
    def make() -> str:
        return "made"

    holder = Holder.remote(make.remote(), [ftray.put("boxed")], c=ftray.put(bytes(200_000)))
    assert ftray.get(holder.show.remote(), timeout=20) == ["made", "boxed", 200_000]


def test_several_returns_and_options_of_methods() -> None:
    @ftray.remote
    class Many:
        @ftray.method(num_returns=2)
        def two(self) -> Any:
            return 1, 2

        def one(self) -> Any:
            return [3, 4]

        @ftray.method(num_returns=0)
        def none(self) -> None: ...

    many = Many.remote()
    a, b = many.two.remote()
    assert ftray.get([a, b]) == [1, 2]
    assert ftray.get(many.one.remote()) == [3, 4]
    assert ftray.get(many.one.options(num_returns=2).remote()) == [3, 4]
    assert many.none.remote() is None
    for ref in many.two.options(num_returns=3).remote():
        with pytest.raises(ValueError, match="num_returns is 3"):
            ftray.get(ref)


def test_inheritance_and_special_methods() -> None:
    class Base:
        def __init__(self) -> None:
            self.base = True

        def hello(self) -> str:
            return "base"

        @staticmethod
        def static() -> str:
            return "static"

    @ftray.remote
    class Derived(Base):
        def hello(self) -> str:
            return "derived of " + super().hello()

        def __call__(self, x: int) -> int:
            return x

    derived = Derived.remote()
    assert ftray.get(derived.hello.remote()) == "derived of base"
    assert ftray.get(derived.static.remote()) == "static"
    assert ftray.get(derived.__call__.remote(7)) == 7


def test_misuse_is_explained() -> None:
    counter_type = counter_class()
    with pytest.raises(TypeError, match=r"Counter\.remote\(\.\.\.\)"):
        counter_type()
    counter = counter_type.remote()
    with pytest.raises(TypeError, match=r"add\.remote\(\.\.\.\)"):
        counter.add()
    with pytest.raises(AttributeError, match="no method 'subtract'"):
        counter.subtract  # noqa: B018
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        ftray.get(counter.add.remote(x=1))


# --- handles --------------------------------------------------------------------------------------------------------


def test_handles_go_to_tasks_and_actors() -> None:
    @ftray.remote
    def add(counter: Any, times: int) -> int:
        return int(ftray.get([counter.add.remote() for _ in range(times)])[-1])

    @ftray.remote
    class Front:
        def __init__(self, counter: Any) -> None:
            self.counter = counter

        def add(self) -> Any:
            return ftray.get(self.counter.add.remote())

        def handle(self) -> Any:
            return self.counter

    counter = counter_class().remote()
    assert ftray.get(add.remote(counter, 5)) == 5
    front = Front.remote(counter)
    assert ftray.get(front.add.remote()) == 6
    again = ftray.get(front.handle.remote())
    assert again == counter
    assert hash(again) == hash(counter)
    assert ftray.get(again.add.remote()) == 7
    assert ftray.get(add.remote(ftray.get(ftray.put({"x": [counter]}))["x"][0], 1)) == 8


def test_an_actor_ends_when_no_handle_is_left() -> None:
    counter = counter_class().remote()
    pid = ftray.get(counter.pid.remote())
    del counter
    gc.collect()
    wait_for_none(lambda: is_running(pid), what="the actor's process")


def test_an_actor_lives_while_any_handle_does() -> None:
    @ftray.remote
    class Holder:
        def __init__(self, counter: Any) -> None:
            self.counter = counter

        def add(self) -> Any:
            return ftray.get(self.counter.add.remote())

        def drop(self) -> None:
            self.counter = None
            gc.collect()

    counter = counter_class().remote()
    pid = ftray.get(counter.pid.remote())
    holder = Holder.remote(counter)
    assert ftray.get(holder.add.remote()) == 1
    del counter
    gc.collect()
    assert ftray.get([holder.add.remote() for _ in range(20)])[-1] == 21
    assert is_running(pid)
    ftray.get(holder.drop.remote())
    wait_for_none(lambda: is_running(pid), what="the actor's process")


def test_calls_made_before_the_last_handle_goes_are_done() -> None:
    counter = counter_class().remote()
    refs = [counter.add.remote() for _ in range(100)]
    del counter
    gc.collect()
    assert ftray.get(refs, timeout=20) == list(range(1, 101))
    assert ftray.get(counter_class().remote(5).add.remote(), timeout=20) == 6


def test_an_actor_made_by_a_task_outlives_the_task_by_its_handle() -> None:
    @ftray.remote
    def make() -> Any:
        counter = counter_class().remote(3)
        ftray.get(counter.add.remote())
        return counter

    counter = ftray.get(make.remote(), timeout=20)
    assert ftray.get(counter.add.remote(), timeout=20) == 5


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


# --- concurrency ----------------------------------------------------------------------------------------------------


def test_async_methods_run_at_the_same_time() -> None:
    @ftray.remote
    class Async:
        def __init__(self) -> None:
            self.event = asyncio.Event()
            self.now = self.most = 0

        async def wait(self) -> str:
            self.now += 1
            self.most = max(self.most, self.now)
            await self.event.wait()
            self.now -= 1
            return "released"

        async def release(self) -> int:
            while self.now < 20:
                await asyncio.sleep(0)
            self.event.set()
            return self.most

        def plain(self) -> str:
            return "plain"

        async def fail(self) -> None:
            await asyncio.sleep(0)
            raise ValueError("mine")

    actor = Async.remote()
    waiting = [actor.wait.remote() for _ in range(20)]
    assert ftray.get(actor.release.remote(), timeout=20) == 20
    assert ftray.get(waiting, timeout=20) == ["released"] * 20
    assert ftray.get(actor.plain.remote()) == "plain"
    with pytest.raises(ValueError, match="mine"):
        ftray.get(actor.fail.remote())
    assert ftray.get([actor.plain.remote() for _ in range(500)], timeout=20) == ["plain"] * 500


def test_async_methods_await_references() -> None:
    @ftray.remote
    def double(x: int) -> int:
        return 2 * x

    @ftray.remote
    class Async:
        async def sum(self, box: Any, n: int) -> int:
            refs = [double.remote(i) for i in range(n)]
            return await box[0] + sum(await asyncio.gather(*refs))

    actor = Async.remote()
    refs = [actor.sum.remote([ftray.put(1000)], n) for n in range(10)]
    assert ftray.get(refs, timeout=20) == [1000 + n * (n - 1) for n in range(10)]


def test_max_concurrency_bounds_async_methods() -> None:
    @ftray.remote(max_concurrency=3)
    class Async:
        def __init__(self) -> None:
            self.now = self.most = 0

        async def work(self) -> int:
            self.now += 1
            self.most = max(self.most, self.now)
            for _ in range(20):
                await asyncio.sleep(0.001)
            self.now -= 1
            return self.most

    actor = Async.remote()
    assert max(ftray.get([actor.work.remote() for _ in range(12)], timeout=20)) == 3


def test_trio_actors() -> None:
    @ftray.remote(event_loop="trio")
    class Trio:
        def __init__(self) -> None:
            import trio

            self.event = trio.Event()
            self.now = 0

        async def wait(self) -> str:
            self.now += 1
            await self.event.wait()
            return "released"

        async def release(self) -> int:
            import trio

            while self.now < 5:
                await trio.sleep(0)
            self.event.set()
            return self.now

        async def read(self, box: Any) -> Any:
            return await box[0]

        async def fail(self) -> None:
            raise ValueError("mine")

        def plain(self) -> str:
            return "plain"

    actor = Trio.remote()
    waiting = [actor.wait.remote() for _ in range(5)]
    assert ftray.get(actor.release.remote(), timeout=20) == 5
    assert ftray.get(waiting, timeout=20) == ["released"] * 5
    assert ftray.get(actor.read.remote([ftray.put("value")]), timeout=20) == "value"
    with pytest.raises(ValueError, match="mine"):
        ftray.get(actor.fail.remote(), timeout=20)
    assert ftray.get(actor.plain.remote(), timeout=20) == "plain"


@pytest.mark.parametrize("options", [{}, {"event_loop": "trio"}], ids=["asyncio", "trio"])
def test_async_actors_end_and_restart(options: dict[str, Any]) -> None:
    @ftray.remote(max_restarts=1, **options)
    class Async:
        async def pid(self) -> int:
            return os.getpid()

        async def leave(self) -> None:
            ftray.exit_actor()

    actor = Async.remote()
    pid = ftray.get(actor.pid.remote(), timeout=20)
    os.kill(pid, signal.SIGKILL)
    again = patiently(actor.pid.remote)
    assert again != pid
    with pytest.raises(exceptions.ActorDiedError, match="exit_actor"):
        ftray.get(actor.leave.remote(), timeout=20)
    wait_for_none(lambda: is_running(again), what="the actor's process")
    second = Async.remote()
    pid = ftray.get(second.pid.remote(), timeout=20)
    del second
    gc.collect()
    wait_for_none(lambda: is_running(pid), what="the actor's process")


def test_threaded_actors(tmp_path: Path) -> None:
    directory = str(tmp_path)

    @ftray.remote(max_concurrency=4)
    class Threaded:
        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.names: set[str] = set()

        def meet(self) -> None:
            with self.lock:
                self.names.add(threading.current_thread().name)
            meet(directory, 4)

        def count(self) -> int:
            return len(self.names)

        def nested(self, box: Any) -> Any:
            return ftray.get(box[0])

    actor = Threaded.remote()
    ftray.get([actor.meet.remote() for _ in range(4)], timeout=20)
    assert ftray.get(actor.count.remote()) == 4
    refs = [actor.nested.remote([ftray.put(i)]) for i in range(100)]
    assert ftray.get(refs, timeout=20) == list(range(100))


def test_an_actor_that_calls_itself_through_a_task() -> None:
    @ftray.remote(max_concurrency=2)
    class Self:
        def outer(self, me: Any) -> Any:
            return ftray.get(call_inner.remote(me))

        def inner(self) -> str:
            return "inner"

    @ftray.remote
    def call_inner(actor: Any) -> Any:
        return ftray.get(actor.inner.remote())

    actor = Self.remote()
    assert ftray.get(actor.outer.remote(actor), timeout=20) == "inner"


def test_ready_tells_when_an_actor_lives() -> None:
    counter = counter_class().remote()
    assert ftray.get(counter.__ftray_ready__(), timeout=20) is None
    assert ftray.get_runtime_context().get_actor_id() is None

    @ftray.remote
    class Knows:
        def ids(self) -> Any:
            return ftray.get_runtime_context().get_actor_id(), ftray.get_runtime_context().get_task_name()

    knows = Knows.remote()
    actor_id, name = ftray.get(knows.ids.remote(), timeout=20)
    assert actor_id == knows._actor_id
    assert name == "Knows.ids"
