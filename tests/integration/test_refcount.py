"""When the program drops everything, nothing is left: not in the driver, not in the store, not in the workers."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.harness import check_drained, held, meet, wait_for_file, wait_for_none, worker_entries

import ftray
from ftray import exceptions

pytestmark = pytest.mark.usefixtures("session")

LARGE = 200_000


@pytest.fixture(autouse=True)
def _everything_goes(session: Any) -> Iterator[None]:
    check_drained()
    yield
    check_drained()


def keeper() -> Any:
    """An actor that keeps references and lets go of them."""

    @ftray.remote
    class Keeper:
        def __init__(self) -> None:
            self.kept: list[Any] = []

        def keep(self, box: Any) -> None:
            self.kept.append(box)

        def read(self) -> Any:
            return [len(ftray.get(ref)) for box in self.kept for ref in box]

        def give(self) -> Any:
            return self.kept[-1]

        def drop(self) -> None:
            self.kept.clear()

        def entries(self) -> int:
            return worker_entries()

    return Keeper.remote()



def test_the_check_sees_what_is_held() -> None:
    small, large = ftray.put(1), ftray.put(bytes(LARGE))
    found = held()
    assert small.hex() in found["entries"]
    assert large.hex() in found["entries"]
    assert len(found["store"]) == 1
    del small
    wait_for_none(lambda: len(held()["entries"]) > 1)
    assert large.hex() in held()["entries"]


def test_puts_and_gets() -> None:
    refs = [ftray.put(bytes(n)) for n in (10, LARGE, 10, LARGE)]
    ftray.get(refs)
    ftray.get(refs * 2)
    copies = list(refs)
    del refs
    assert [len(value) for value in ftray.get(copies)] == [10, LARGE, 10, LARGE]


def test_puts_that_are_dropped_at_once() -> None:
    for _ in range(100):
        ftray.put(bytes(10))
    for _ in range(20):
        ftray.put(bytes(LARGE))


def test_results_that_nobody_gets() -> None:
    @ftray.remote
    def make(n: int) -> bytes:
        return bytes(n)

    for n in (10, LARGE):
        for _ in range(20):
            make.remote(n)
    refs = [make.remote(n) for n in (10, LARGE) for _ in range(20)]
    ftray.wait(refs, num_returns=len(refs), timeout=20)


def test_some_of_several_results() -> None:
    @ftray.remote(num_returns=3)
    def make() -> Any:
        return bytes(10), bytes(LARGE), [ftray.put(bytes(LARGE))]

    _, second, _ = make.remote()
    assert len(ftray.get(second)) == LARGE
    third = make.remote()[2]
    assert len(ftray.get(ftray.get(third)[0])) == LARGE


def test_failed_tasks() -> None:
    @ftray.remote(num_returns=2)
    def fail(value: Any, box: Any) -> None:
        raise ValueError("mine")

    refs = fail.remote(ftray.put(bytes(LARGE)), [ftray.put(bytes(LARGE))])
    for ref in refs:
        with pytest.raises(ValueError, match="mine"):
            ftray.get(ref)


def test_arguments_by_reference_and_by_value() -> None:
    @ftray.remote
    def size(a: Any, box: Any = None) -> int:
        return len(a)

    small, large = ftray.put(bytes(10)), ftray.put(bytes(LARGE))
    refs = [size.remote(small), size.remote(large, [small, large]), size.remote(bytes(LARGE)), size.remote(large)]
    del small, large
    assert ftray.get(refs) == [10, LARGE, LARGE, LARGE]


def test_references_dropped_before_their_task_runs(tmp_path: Path) -> None:
    release = tmp_path / "release"

    @ftray.remote
    def wait_for(value: Any) -> Any:
        wait_for_file(release)
        return value

    @ftray.remote
    def size(value: Any, box: Any) -> int:
        return len(value) + len(ftray.get(box[0]))

    ref = size.remote(wait_for.remote(bytes(LARGE)), [ftray.put(bytes(LARGE))])
    gc.collect()
    release.touch()
    assert ftray.get(ref, timeout=20) == 2 * LARGE


def test_a_chain_of_results() -> None:
    @ftray.remote
    def more(value: bytes) -> bytes:
        return value + b"x"

    ref = ftray.put(bytes(LARGE))
    for _ in range(20):
        ref = more.remote(ref)
    assert len(ftray.get(ref)) == LARGE + 20


def test_references_inside_references() -> None:
    ref: Any = ftray.put(bytes(LARGE))
    for i in range(5):
        ref = ftray.put([ref, bytes(LARGE if i % 2 else 10)])
    outer = ref
    del ref
    for _ in range(5):
        outer = ftray.get(outer)[0]
    assert len(ftray.get(outer)) == LARGE


def test_the_inner_outlives_the_outer() -> None:
    outer = ftray.put([ftray.put(bytes(LARGE)) for _ in range(3)])
    inner = ftray.get(outer)[1]
    del outer
    wait_for_none(lambda: len(held()["store"]) > 1, what="what nobody holds")
    assert len(ftray.get(inner)) == LARGE


def test_results_that_contain_references_of_the_worker() -> None:
    @ftray.remote
    def make(n: int) -> Any:
        return [ftray.put(bytes(LARGE)) for _ in range(n)]

    @ftray.remote
    def nest(depth: int) -> Any:
        return [nest.remote(depth - 1)] if depth else [ftray.put(bytes(LARGE))]

    refs = ftray.get(make.remote(5))
    one = refs[2]
    del refs
    assert len(ftray.get(one)) == LARGE
    box = ftray.get(nest.remote(4), timeout=20)
    for _ in range(4):
        box = ftray.get(box[0], timeout=20)
    assert len(ftray.get(box[0])) == LARGE
    for _ in range(10):
        make.remote(2)
    ftray.wait([make.remote(2) for _ in range(3)], num_returns=3, timeout=20)


def test_results_that_contain_their_arguments() -> None:
    @ftray.remote
    def back(box: Any) -> Any:
        return box, ftray.put(box)

    ref = ftray.put(bytes(LARGE))
    box, again = ftray.get(back.remote([ref]))
    del ref
    assert len(ftray.get(box[0])) == LARGE
    del box
    assert len(ftray.get(ftray.get(again)[0])) == LARGE


def test_a_borrower_keeps_an_object_until_it_lets_go() -> None:
    actor = keeper()
    ref = ftray.put(bytes(LARGE))
    ftray.get(actor.keep.remote([ref]))
    name = ref.hex()
    del ref
    gc.collect()
    assert ftray.get(actor.read.remote()) == [LARGE]
    assert name in held()["entries"]
    ftray.get(actor.drop.remote())
    wait_for_none(lambda: name in held().get("entries", {}), what="the borrowed object")
    wait_for_none(lambda: ftray.get(actor.entries.remote()), what="entries in the actor")


def test_a_borrower_that_dies_lets_go() -> None:
    actor = keeper()
    ref = ftray.put(bytes(LARGE))
    ftray.get(actor.keep.remote([ref]))
    del ref
    ftray.kill(actor)


def test_objects_of_an_actor_that_the_driver_borrows() -> None:
    @ftray.remote
    class Maker:
        def make(self) -> Any:
            return [ftray.put(bytes(LARGE)), ftray.put(b"small")]

        def entries(self) -> int:
            return worker_entries()

    maker = Maker.remote()
    large, small = ftray.get(maker.make.remote())
    assert len(ftray.get(large)) == LARGE
    assert ftray.get(small) == b"small"
    assert ftray.get(maker.entries.remote()) >= 2
    del large, small
    wait_for_none(lambda: ftray.get(maker.entries.remote()), what="entries in the actor")


def test_an_object_handed_from_borrower_to_borrower() -> None:
    first, second = keeper(), keeper()

    @ftray.remote
    def hand_over(a: Any, b: Any) -> None:
        ftray.get(b.keep.remote(ftray.get(a.give.remote())))

    ref = ftray.put(bytes(LARGE))
    name = ref.hex()
    ftray.get(first.keep.remote([ref]))
    del ref
    ftray.get(hand_over.remote(first, second))
    ftray.get(first.drop.remote())
    wait_for_none(lambda: ftray.get(first.entries.remote()), what="entries in the first")
    assert ftray.get(second.read.remote()) == [LARGE]
    assert name in held()["entries"]
    ftray.get(second.drop.remote())
    wait_for_none(lambda: name in held().get("entries", {}), what="the borrowed object")


def test_the_owner_dies_before_its_borrowers() -> None:
    @ftray.remote
    class Maker:
        def make(self) -> Any:
            return [ftray.put(bytes(LARGE))]

        def pid(self) -> int:
            return os.getpid()

    maker, actor = Maker.remote(), keeper()
    box = ftray.get(maker.make.remote())
    ftray.get(actor.keep.remote(box))
    os.kill(ftray.get(maker.pid.remote()), signal.SIGKILL)
    with pytest.raises(exceptions.ActorDiedError):
        ftray.get(maker.make.remote(), timeout=20)
    with pytest.raises(exceptions.ObjectLostError):
        ftray.get(actor.read.remote(), timeout=20)
    ftray.get(actor.drop.remote())
    wait_for_none(lambda: ftray.get(actor.entries.remote()), what="entries in the actor")


def test_workers_of_tasks_keep_nothing(tmp_path: Path) -> None:
    @ftray.remote
    def work(value: Any, box: Any) -> Any:
        local = [ftray.put(bytes(LARGE)) for _ in range(3)]
        inner = [ftray.put(bytes(10)), box[0]]
        ftray.get(local)
        return inner

    @ftray.remote
    def look(directory: str) -> int:
        meet(directory, 2)
        return worker_entries()

    refs = [work.remote(ftray.put(bytes(LARGE)), [ftray.put(bytes(LARGE))]) for _ in range(10)]
    ftray.get([ref for box in ftray.get(refs) for ref in box])
    del refs
    rounds = iter(range(1000))

    def left() -> list[int]:
        directory = tmp_path / str(next(rounds))
        directory.mkdir()
        return [n for n in ftray.get([look.remote(str(directory)) for _ in range(2)], timeout=20) if n]

    wait_for_none(left, what="entries in workers")


def test_a_task_that_dies_lets_go(tmp_path: Path) -> None:
    marker = tmp_path / "died"

    @ftray.remote
    def once(value: Any, box: Any) -> Any:
        local = [ftray.put(bytes(LARGE)), box[0]]
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return local

    @ftray.remote(max_retries=0)
    def dies(value: Any, box: Any) -> Any:
        local = [ftray.put(bytes(LARGE)), box]
        os.kill(os.getpid(), signal.SIGKILL)
        return local

    box = ftray.get(once.remote(ftray.put(bytes(LARGE)), [ftray.put(bytes(LARGE))]), timeout=20)
    assert [len(value) for value in ftray.get(box)] == [LARGE, LARGE]
    with pytest.raises(exceptions.WorkerCrashedError):
        ftray.get(dies.remote(ftray.put(bytes(LARGE)), [ftray.put(bytes(LARGE))]), timeout=20)


def test_actor_handles_and_constructor_arguments() -> None:
    @ftray.remote
    class Holder:
        def __init__(self, value: Any, box: Any, other: Any = None) -> None:
            self.box = box
            self.other = other

        def size(self) -> int:
            own = len(ftray.get(self.box[0]))
            return own if self.other is None else own + ftray.get(self.other.size.remote())

    inner = Holder.remote(ftray.put(bytes(LARGE)), [ftray.put(bytes(LARGE))])
    outer = Holder.remote(bytes(LARGE), [ftray.put(bytes(10))], inner)
    del inner
    gc.collect()
    assert ftray.get(outer.size.remote(), timeout=20) == LARGE + 10


def test_handles_inside_values() -> None:
    box = ftray.put([keeper()])
    actor = ftray.get(box)[0]
    ftray.get(actor.keep.remote([ftray.put(bytes(LARGE))]))
    del box
    assert ftray.get(actor.read.remote()) == [LARGE]


def test_zero_copy_views() -> None:
    @ftray.remote
    def make() -> Any:
        return np.arange(100_000)

    array = ftray.get(make.remote())
    part = array[10:20]
    del array
    gc.collect()
    assert held()["store"]
    assert part.tolist() == list(range(10, 20))


def test_timeouts_and_waits_keep_nothing(tmp_path: Path) -> None:
    release = tmp_path / "release"

    @ftray.remote
    def wait_for() -> bytes:
        wait_for_file(release)
        return bytes(LARGE)

    refs = [wait_for.remote() for _ in range(3)]
    with pytest.raises(exceptions.GetTimeoutError):
        ftray.get(refs, timeout=0.01)
    ftray.wait(refs, timeout=0.01)
    refs[0].future().cancel()
    release.touch()


def test_a_result_written_before_its_task_failed() -> None:
    @ftray.remote(num_returns=2, max_retries=0)
    def half() -> Any:
        return bytes(LARGE), threading.Lock()

    @ftray.remote(num_returns=2, max_retries=0)
    def dies() -> Any:
        class Dies:
            def __reduce__(self) -> Any:
                os.kill(os.getpid(), signal.SIGKILL)

        return bytes(LARGE), Dies()

    for task, error in ((half, exceptions.SerializationError), (dies, exceptions.WorkerCrashedError)):
        with pytest.raises(error):
            ftray.get(task.remote()[0], timeout=20)


def test_a_constructor_that_is_not_needed() -> None:
    @ftray.remote
    class Shared:
        def __init__(self, value: Any, box: Any) -> None: ...

    def make(**options: Any) -> Any:
        return Shared.options(name="shared", **options).remote(ftray.put(bytes(LARGE)), [ftray.put(bytes(LARGE))])

    first = make()
    assert make(get_if_exists=True) == first
    with pytest.raises(ValueError, match="shared"):
        make()


def test_exceptions_keep_nothing() -> None:
    @ftray.remote
    def fail(box: Any) -> None:
        values = [bytes(LARGE), box, ftray.put(bytes(LARGE))]
        raise ValueError("mine", len(values))

    for _ in range(5):
        with pytest.raises(ValueError, match="mine"):
            ftray.get(fail.remote([ftray.put(bytes(LARGE))]))
