"""Actors: state, order, handles, several calls at a time."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from integration.counters import counter_class, patiently
from integration.harness import is_running, meet, wait_for_file, wait_for_none

import ftray
from ftray import exceptions

pytestmark = pytest.mark.usefixtures("session")


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
