"""Generator tasks: items while the task runs, backpressure, ends of all kinds; sync, in actors, async and dynamic."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from integration.harness import check_drained, held, wait_for_file, wait_for_none, wait_until

import ftray
from ftray import exceptions

pytestmark = pytest.mark.usefixtures("session")

LARGE = 200_000


@pytest.fixture(autouse=True)
def _everything_goes(session: Any) -> Iterator[None]:
    yield
    check_drained()


def leave_mark(directory: Path) -> None:
    with open(directory / "marks", "ab", buffering=0) as file:
        file.write(b".")


def counted(directory: Path) -> int:
    """How many marks there are."""
    path = directory / "marks"
    return path.stat().st_size if path.exists() else 0


@ftray.remote
def count(n: int) -> Iterator[int]:
    yield from range(n)


@ftray.remote
def mark(directory: Path, size: int = 0) -> Iterator[Any]:
    """Yields without end; each item leaves a mark, and the end a file."""
    try:
        for index in range(1_000_000):
            leave_mark(directory)
            yield bytes(size) if size else index
    finally:
        (directory / "closed").touch()


def test_items_come_in_order_and_while_the_task_runs(tmp_path: Path) -> None:
    @ftray.remote
    def wait_in_the_middle() -> Iterator[str]:
        yield "first"
        yield "second"
        wait_for_file(tmp_path / "go")
        yield "last"

    refs = wait_in_the_middle.remote()
    assert isinstance(refs, ftray.ObjectRefGenerator)
    assert [ftray.get(next(refs)), ftray.get(next(refs))] == ["first", "second"]
    assert not refs.next_ready()
    assert not refs.is_finished()
    (tmp_path / "go").touch()
    assert [ftray.get(ref) for ref in refs] == ["last"]
    assert refs.is_finished()
    assert next(refs, None) is None
    assert ftray.get(refs.completed()) is None


def test_ten_thousand_small_items() -> None:
    assert [ftray.get(ref) for ref in count.remote(10_000)] == list(range(10_000))
    assert ftray.get(list(count.remote(10_000))) == list(range(10_000))


def test_backpressure_counts_exactly(tmp_path: Path) -> None:
    refs = mark.options(_generator_backpressure_num_objects=3).remote(tmp_path)
    wait_until(lambda: counted(tmp_path) == 3)
    for taken in range(1, 5):
        assert ftray.get(next(refs)) == taken - 1
        wait_until(lambda taken=taken: counted(tmp_path) == 3 + taken)  # type: ignore[misc]
    assert ftray.get(count.remote(1).completed(), timeout=10) is None  # it lends its CPU while it waits
    assert counted(tmp_path) == 7
    del refs
    wait_for_file(tmp_path / "closed")


def test_an_endless_generator_that_nobody_reads_stops_ahead_and_ends_when_it_is_dropped(tmp_path: Path) -> None:
    refs = mark.remote(tmp_path)
    ahead = refs._core.config.generator_ahead_max
    wait_until(lambda: counted(tmp_path) == ahead)
    assert len(held()["entries"]) == ahead + 3  # and the next item, the handle, the completion
    del refs
    wait_for_file(tmp_path / "closed")
    assert counted(tmp_path) == ahead


def test_large_items_are_bounded_by_bytes_and_freed_unread(tmp_path: Path) -> None:
    refs = mark.remote(tmp_path, LARGE)
    most = refs._core.config.generator_ahead_bytes_max
    wait_until(lambda: counted(tmp_path) == -(-most // (LARGE + 128)))
    assert [len(ftray.get(next(refs))) for _ in range(100)] == [LARGE] * 100
    kept = next(refs)
    del refs
    wait_for_file(tmp_path / "closed")
    wait_for_none(lambda: len(held()["store"]) > 1)
    assert len(ftray.get(kept)) == LARGE


def test_waiting_for_the_end_lifts_the_bound(tmp_path: Path) -> None:
    @ftray.remote(generator_backpressure_num_objects=1)
    def few(n: int) -> Iterator[int]:
        for index in range(n):
            leave_mark(tmp_path)
            yield index

    refs = few.remote(3_000)
    assert ftray.get(refs.completed(), timeout=20) is None
    assert counted(tmp_path) == 3_000
    assert sum(ftray.get(list(refs))) == sum(range(3_000))
    assert ftray.get(few.remote(2_000).completed(), timeout=20) is None  # though nobody can read it any more


def test_an_error_is_the_last_item() -> None:
    @ftray.remote
    def fail() -> Iterator[int]:
        yield 1
        raise KeyError("mine")

    refs = fail.remote()
    first, second = refs
    assert ftray.get(first) == 1
    for ref in (second, refs.completed()):
        with pytest.raises(KeyError, match="mine"):
            ftray.get(ref)
    assert refs.is_finished()

    @ftray.remote
    def bad_item() -> Iterator[Any]:
        yield 1
        yield {"generator": (x for x in ())}

    _, ref = bad_item.remote()
    with pytest.raises(exceptions.SerializationError, match=r"item 1\['generator'\]"):
        ftray.get(ref)


def test_exceptions_are_retried_without_repeating_items() -> None:
    @ftray.remote(max_retries=2, retry_exceptions=[ConnectionError])
    def flaky() -> Iterator[tuple[int, int]]:
        attempt = ftray.get_runtime_context().get_attempt_number()
        for index in range(4):
            if index == attempt + 1 and attempt < 2:
                raise ConnectionError
            yield index, attempt

    assert ftray.get(list(flaky.remote())) == [(0, 0), (1, 1), (2, 2), (3, 2)]


def test_a_killed_worker_is_retried_and_no_item_comes_twice(tmp_path: Path) -> None:
    @ftray.remote(max_retries=1)
    def dies(fatal: int) -> Iterator[tuple[int, bytes, Any]]:
        attempt = ftray.get_runtime_context().get_attempt_number()
        for index in range(20):
            yield index, bytes(LARGE), [ftray.put(index)]
            if index == 9 and attempt < fatal:
                wait_for_file(tmp_path / "read")
                os.kill(os.getpid(), signal.SIGKILL)

    refs = dies.remote(1)
    taken = [ftray.get(next(refs)) for _ in range(10)]
    taken = [index for index, _, _ in taken]
    (tmp_path / "read").touch()
    for ref in refs:
        index, _, (inner,) = ftray.get(ref)
        assert ftray.get(inner) == index
        taken.append(index)
    assert taken == list(range(20))
    del index, _, inner, ref, refs

    *items, last = dies.remote(2)
    assert [ftray.get(item)[0] for item in items] == list(range(10))
    with pytest.raises(exceptions.WorkerCrashedError, match="SIGKILL"):
        ftray.get(last)


def test_references_inside_items() -> None:
    @ftray.remote
    def boxes(argument: list[Any]) -> Iterator[list[Any]]:
        for size in (10, LARGE):
            yield [ftray.put(bytes(size)), argument[0]]

    outer = list(boxes.remote([ftray.put("argument")]))
    for ref, size in zip(outer, (10, LARGE)):
        made, given = ftray.get(ref)
        assert len(ftray.get(made)) == size
        assert ftray.get(given) == "argument"
    del ref, outer, made
    assert ftray.get(given) == "argument"
    boxes.remote([given])  # dropped, with what is inside


def test_wait_takes_generators_among_references(tmp_path: Path) -> None:
    @ftray.remote(num_cpus=0)
    def when(name: str) -> Iterator[str]:
        wait_for_file(tmp_path / name)
        yield name

    slow, fast, ref = when.remote("slow"), when.remote("fast"), count.options(num_returns=2).remote(2)[1]
    assert ftray.wait([slow, fast, ref], num_returns=1, timeout=20) == ([ref], [slow, fast])
    (tmp_path / "fast").touch()
    assert ftray.wait([slow, fast], timeout=20) == ([fast], [slow])
    assert ftray.get(next(fast)) == "fast"
    assert ftray.wait([slow], timeout=0) == ([], [slow])
    assert ftray.wait([fast], timeout=20) == ([fast], [])  # its end is an answer
    assert next(fast, None) is None
    (tmp_path / "slow").touch()
    assert ftray.wait([slow, fast], num_returns=2, timeout=20) == ([slow, fast], [])


def test_dynamic_returns() -> None:
    @ftray.remote(num_returns="dynamic")
    def halves(n: int, fail: bool) -> Iterator[Any]:
        for index in range(n):
            yield bytes(LARGE) if index == 1 else index
        if fail:
            raise ValueError("mine")

    ref = halves.remote(3, False)
    listed = ftray.get(ref)
    assert isinstance(listed, ftray.DynamicObjectRefGenerator)
    assert len(listed) == 3
    first, second, third = listed
    assert ftray.get([first, third]) == [0, 2]
    assert len(ftray.get(second)) == LARGE

    @ftray.remote
    def total(refs: Any) -> int:
        return sum(ftray.get(list(refs)))

    assert ftray.get(total.remote(count.options(num_returns="dynamic").remote(5_000))) == sum(range(5_000))
    *_, error = ftray.get(halves.remote(2, True))
    with pytest.raises(ValueError, match="mine"):
        ftray.get(error)
    halves.remote(3, False)  # dropped


def test_fixed_numbers_of_returns() -> None:
    assert ftray.get(count.options(num_returns=3).remote(3)) == [0, 1, 2]
    with pytest.raises(TypeError, match="num_returns is 1, but the task returned the generator count"):
        ftray.get(count.options(num_returns=1).remote(3))

    @ftray.remote(num_returns="streaming")
    def no_generator(value: Any) -> Any:
        return value

    assert ftray.get(list(no_generator.remote([1, 2]))) == [1, 2]
    (ref,) = no_generator.remote(7)
    with pytest.raises(TypeError, match='num_returns is "streaming", but the task returned one int'):
        ftray.get(ref)


def test_misuse_is_told() -> None:
    refs = count.remote(2)
    with pytest.raises(TypeError, match="iterate over it"):
        ftray.get(refs)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="iterate over it"):
        ftray.get([refs])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"use ftray.wait\(\[generator\]\)"):
        ftray.wait(refs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        pickle.dumps(refs)
    with pytest.raises(exceptions.SerializationError, match=r"argument 1.*cannot be sent to another process"):
        count.remote(refs)
    with pytest.raises(ValueError, match='"streaming" or "dynamic", not \'stream\''):
        count.options(num_returns="stream")
    with pytest.raises(ValueError, match="at least 1"):
        count.options(_generator_backpressure_num_objects=0)


# --- actors ---------------------------------------------------------------------------------------------------------


@ftray.remote
class Plain:
    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    @ftray.method(_generator_backpressure_num_objects=2)
    def mark(self, directory: Path) -> Iterator[int]:
        for index in range(1_000_000):
            leave_mark(directory)
            yield index

    @ftray.method(num_returns="streaming")
    def listed(self) -> list[int]:
        return [7, 8]

    def one(self) -> int:
        return 1


@pytest.mark.parametrize("concurrency", [1, 2])
def test_generators_of_actors(tmp_path: Path, concurrency: int) -> None:
    actor = Plain.options(max_concurrency=concurrency).remote()
    assert ftray.get(list(actor.count.remote(1_000))) == list(range(1_000))
    assert ftray.get(list(actor.listed.remote())) == [7, 8]
    refs = actor.mark.remote(tmp_path)
    wait_until(lambda: counted(tmp_path) == 2)
    assert ftray.get(next(refs)) == 0
    wait_until(lambda: counted(tmp_path) == 3)
    if concurrency == 2:
        assert ftray.get(actor.one.remote(), timeout=10) == 1
    del refs
    assert ftray.get(actor.one.remote(), timeout=10) == 1
    assert counted(tmp_path) == 3


class Async:
    """The same under both event loops."""

    def __init__(self) -> None:
        self.entered = 0
        self.closed = 0

    async def sleep(self) -> None:
        raise NotImplementedError

    async def together(self, n: int) -> AsyncIterator[int]:
        """Goes on when two of them run."""
        self.entered += 1
        while self.entered < 2:
            await self.sleep()
        for index in range(n):
            yield index
            await self.sleep()

    async def endless(self) -> AsyncIterator[int]:
        try:
            index = 0
            while True:
                yield index
                index += 1
        finally:
            self.closed += 1

    async def fail(self) -> AsyncIterator[int]:
        yield 1
        raise KeyError("mine")

    def plain(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def closings(self) -> int:
        return self.closed


@ftray.remote
class UnderAsyncio(Async):
    async def sleep(self) -> None:
        await asyncio.sleep(0)


@ftray.remote(event_loop="trio")
class UnderTrio(Async):
    async def sleep(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("cls", [UnderAsyncio, UnderTrio], ids=["asyncio", "trio"])
def test_async_generators(cls: Any) -> None:
    actor = cls.remote()
    one, two = actor.together.remote(100), actor.together.remote(100)
    assert ftray.get(list(one)) == ftray.get(list(two)) == list(range(100))
    endless = actor.endless.options(_generator_backpressure_num_objects=5).remote()
    assert [ftray.get(next(endless)) for _ in range(500)] == list(range(500))
    assert ftray.get(list(actor.plain.remote(100))) == list(range(100))  # while the other waits for room
    _, error = actor.fail.remote()
    with pytest.raises(KeyError, match="mine"):
        ftray.get(error)
    assert ftray.get(actor.closings.remote()) == 0
    del endless
    wait_until(lambda: ftray.get(actor.closings.remote()) == 1)
    if cls is UnderAsyncio:
        assert ftray.get(actor.plain.options(num_returns=2).remote(2)) == [0, 1]


def test_reading_under_asyncio_and_trio() -> None:
    async def read() -> list[int]:
        values = []
        async for ref in count.remote(50):
            values.append(await ref)
        return values

    async def two() -> list[list[int]]:
        return await asyncio.gather(read(), read())

    assert asyncio.run(two()) == [list(range(50))] * 2
    assert trio.run(read) == list(range(50))

    async def give_up(refs: Any) -> int:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(refs), 0.01)
        return len(refs._record.head.waiters or ())

    @ftray.remote
    def never() -> Iterator[int]:
        wait_for_file("/nowhere")
        yield 1

    refs = never.remote()
    assert asyncio.run(give_up(refs)) == 0
    leases = refs._core.submitter.dispatcher.leases
    (worker,) = wait_until(lambda: [lease.pid for lease in leases.values() if lease.inflight])
    del refs
    os.kill(worker, signal.SIGKILL)  # nobody wants it: it is not run again


def test_a_generator_in_a_worker_is_read_there() -> None:
    @ftray.remote
    def read() -> int:
        return sum(ftray.get(ref) for ref in count.remote(2_000))

    assert ftray.get(read.remote()) == sum(range(2_000))


def test_an_actor_survives_the_death_of_the_reader(tmp_path: Path) -> None:
    @ftray.remote(max_retries=0)
    def reader(actor: Any) -> None:
        refs = actor.mark.remote(tmp_path)
        next(refs)
        os.kill(os.getpid(), signal.SIGKILL)

    actor = Plain.remote()
    with pytest.raises(exceptions.WorkerCrashedError):
        ftray.get(reader.remote(actor))
    assert ftray.get(actor.one.remote(), timeout=10) == 1
