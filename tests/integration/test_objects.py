"""Objects: `put`, `get`, `wait`, zero-copy reads, references inside values, awaiting, a full store."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
from integration.harness import check_drained, wait_for_file

import ftray
from ftray import exceptions

MB = 1 << 20
SESSION = {"num_cpus": 2, "object_store_memory": 96 * MB, "_system_config": {"store_room_wait_ms": 300}}
pytestmark = pytest.mark.usefixtures("session")


def blocked(path: Path) -> Any:
    """A task that waits for a file."""

    @ftray.remote
    def wait_for(value: Any) -> Any:
        wait_for_file(path)
        return value

    return wait_for


def failing() -> Any:
    @ftray.remote
    def fail() -> None:
        raise ValueError("mine")

    return fail


# --- put, get -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, -1.5, "text", b"bytes", (1, [2, {3: {4}}]), bytes(300_000), {"a": bytearray(200_000)}, range(5), "x" * MB],
    ids=lambda value: f"{type(value).__name__}-{len(repr(value))}",
)
def test_what_is_put_is_got(value: Any) -> None:
    assert ftray.get(ftray.put(value)) == value


def test_get_keeps_order_and_takes_duplicates() -> None:
    refs = [ftray.put(i) for i in range(10)]
    assert ftray.get(refs[::-1]) == list(range(10))[::-1]
    assert ftray.get([refs[3], refs[3], refs[1]]) == [3, 3, 1]
    assert ftray.get([]) == []
    assert ftray.get(tuple(refs[:2])) == [0, 1]
    big = ftray.put(bytes(200_000))
    assert [len(x) for x in ftray.get([big, refs[0], big]) if x != 0] == [200_000, 200_000]


def test_get_waits_until_values_are_there(tmp_path: Path) -> None:
    release = tmp_path / "release"
    ref = blocked(release).remote("value")
    threading.Timer(0.05, release.touch).start()
    assert ftray.get(ref, timeout=20) == "value"


def test_a_timeout_says_what_is_awaited(tmp_path: Path) -> None:
    release = tmp_path / "release"
    ref = blocked(release).remote(1)
    later = blocked(release).remote(ref)
    try:
        for timeout in (0, 0.05):
            with pytest.raises(exceptions.GetTimeoutError, match="wait_for") as caught:
                ftray.get([ref, later], timeout=timeout)
            assert isinstance(caught.value, TimeoutError)
        with pytest.raises(exceptions.GetTimeoutError, match=r"worker pid \d+"):
            ftray.get(ref, timeout=0.2)
        with pytest.raises(exceptions.GetTimeoutError, match="waits for 1 argument"):
            ftray.get(later, timeout=0.01)
    finally:
        release.touch()
    assert ftray.get(later, timeout=20) == 1


def test_the_first_error_in_order_is_raised() -> None:
    fine = ftray.put(1)
    with pytest.raises(ValueError, match="mine"):
        ftray.get([fine, failing().remote(), fine])


def test_get_from_many_threads() -> None:
    @ftray.remote
    def value(i: int) -> Any:
        return np.full(50_000, i) if i % 10 == 0 else i

    refs = [value.remote(i) for i in range(60)]
    wrong: list[Any] = []

    def read() -> None:
        for i, got in enumerate(ftray.get(refs, timeout=20)):
            if not np.all(got == i):
                wrong.append((i, got))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong


# --- wait -----------------------------------------------------------------------------------------------------------


def test_wait_splits_by_readiness_in_the_order_given(tmp_path: Path) -> None:
    release = tmp_path / "release"
    pending = blocked(release).remote("late")
    ready = [ftray.put(i) for i in range(3)]
    refs = [ready[0], pending, ready[1], ready[2]]
    try:
        assert ftray.wait(refs, num_returns=4, timeout=0) == (ready, [pending])
        assert ftray.wait(refs, num_returns=4, timeout=0.02) == (ready, [pending])
        assert ftray.wait(refs, num_returns=2) == ([ready[0], ready[1]], [pending, ready[2]])
        assert ftray.wait(refs) == ([ready[0]], [pending, ready[1], ready[2]])
        assert ftray.wait([pending], timeout=0) == ([], [pending])
    finally:
        release.touch()
    assert ftray.wait(refs, num_returns=4, timeout=20) == (refs, [])
    assert ftray.wait([]) == ([], [])


def test_wait_returns_when_enough_are_ready(tmp_path: Path) -> None:
    gates = [tmp_path / str(i) for i in range(2)]
    refs = [blocked(gate).remote(i) for i, gate in enumerate(gates)]
    gates[1].touch()
    try:
        assert ftray.wait(refs, timeout=20) == ([refs[1]], [refs[0]])
    finally:
        gates[0].touch()
    assert ftray.wait(refs, num_returns=2, timeout=20) == (refs, [])


def test_an_error_counts_as_ready() -> None:
    ref = failing().remote()
    assert ftray.wait([ref], timeout=20) == ([ref], [])
    with pytest.raises(ValueError, match="mine"):
        ftray.get(ref)


@pytest.mark.parametrize("num_returns", [0, -1, 3])
def test_wait_for_an_impossible_number_is_refused(num_returns: int) -> None:
    with pytest.raises(ValueError, match="num_returns must be from 1 to the number of references"):
        ftray.wait([ftray.put(1), ftray.put(2)], num_returns=num_returns)


def test_wait_for_duplicates_is_refused() -> None:
    ref = ftray.put(1)
    with pytest.raises(ValueError, match="duplicates"):
        ftray.wait([ref, ref])


# --- shared memory --------------------------------------------------------------------------------------------------


def mapping_of(array: Any) -> str:
    """The line of /proc/self/maps that an array's memory is in."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return line
    return ""


def test_large_arrays_are_read_without_a_copy_and_cannot_be_written() -> None:
    array = np.arange(1_000_000)
    got = ftray.get(ftray.put(array))
    assert np.array_equal(got, array)
    line = mapping_of(got)
    assert "memfd:ftray-arena" in line
    assert " r--s " in line
    assert not got.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1
    with pytest.raises(ValueError):
        got.flags.writeable = True
    copy = got.copy()
    copy[0] = 1


def test_tasks_read_and_return_large_arrays_without_a_copy() -> None:
    @ftray.remote
    def look(array: Any) -> Any:
        try:
            array[0] = 1
        except ValueError as error:
            return mapping_of(array), array.sum(), str(error)
        return "writable"

    @ftray.remote
    def make() -> Any:
        return {"array": np.ones(300_000), "name": "ones"}

    line, total, text = ftray.get(look.remote(ftray.put(np.ones(300_000))))
    assert "memfd:ftray-arena" in line
    assert total == 300_000
    assert "read-only" in text
    made = ftray.get(make.remote())
    assert made["name"] == "ones"
    assert made["array"].sum() == 300_000
    assert "memfd:ftray-arena" in mapping_of(made["array"])


def test_small_arrays_are_read_only_too() -> None:
    got = ftray.get(ftray.put(np.arange(10)))
    assert not got.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        got += 1


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_like_values(kind: Any) -> None:
    data = os.urandom(500_000)
    got = ftray.get(ftray.put(kind(data)))
    assert type(got) is kind
    assert got == data
    if kind is memoryview:
        assert got.readonly


def test_arrays_of_all_shapes_come_back() -> None:
    arrays = [
        np.zeros((0, 5)), np.asfortranarray(np.arange(60_000.0).reshape(200, 300)), np.arange(200_000)[::2],
        np.array(["a", None], dtype=object), np.arange(100_000, dtype=">i2"),
        np.zeros(3000, dtype=[("x", "f8"), ("name", "S40")]), np.array(5), np.ma.masked_array([1, 2], [True, False]),
    ]  # fmt: skip
    for array, got in zip(arrays, ftray.get([ftray.put(array) for array in arrays]), strict=True):
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        assert np.array_equal(got, array)


def test_an_object_stays_for_as_long_as_anything_looks_into_it() -> None:
    array = np.arange(1_000_000)
    ref = ftray.put(array)
    got = ftray.get(ref)
    part = got[1000:2000]
    view = memoryview(got)[5000:6000]
    del ref, got
    gc.collect()
    others = []
    for i in range(20):  # they would lie where the first one was
        others.append(ftray.put(np.full(1_000_000, -i)))
        if len(others) > 4:
            others.pop(0)
    assert np.array_equal(part, array[1000:2000])
    assert view.tolist() == array[5000:6000].tolist()
    del others, part
    gc.collect()
    assert view.tolist() == array[5000:6000].tolist()
    view.release()
    del view
    check_drained()


def test_a_task_that_keeps_an_argument_in_use_keeps_it_right() -> None:
    @ftray.remote
    class Keeper:
        def keep(self, array: Any) -> None:
            self.part = array[10:20]

        def show(self) -> Any:
            return self.part.copy()

    keeper = Keeper.remote()
    ref = ftray.put(np.arange(500_000))
    ftray.get(keeper.keep.remote(ref))
    del ref
    gc.collect()
    for i in range(10):
        ftray.put(np.full(2_000_000, -i))
    assert ftray.get(keeper.show.remote()).tolist() == list(range(10, 20))


# --- a full store ---------------------------------------------------------------------------------------------------


def test_a_full_store_is_a_typed_error_and_room_comes_back() -> None:
    with pytest.raises(exceptions.ObjectStoreFullError, match="object_store_memory"):
        ftray.put(np.zeros(200 * MB, dtype=np.uint8))
    refs = [ftray.put(np.zeros(20 * MB, dtype=np.uint8)) for _ in range(4)]
    looked_into = ftray.get(refs)
    with pytest.raises(exceptions.ObjectStoreFullError, match="in use"):
        ftray.put(np.zeros(30 * MB, dtype=np.uint8))
    assert looked_into[3][-1] == 0
    del looked_into[:2]
    refs.append(ftray.put(np.ones(30 * MB, dtype=np.uint8)))
    assert ftray.get(refs[-1])[-1] == 1


def test_a_result_that_does_not_fit_fails_its_task() -> None:
    @ftray.remote
    def large(megabytes: int) -> Any:
        return np.zeros(megabytes * MB, dtype=np.uint8)

    with pytest.raises(exceptions.ObjectStoreFullError):
        ftray.get(large.remote(200), timeout=20)
    assert ftray.get(large.remote(20), timeout=20).nbytes == 20 * MB


def test_an_argument_that_does_not_fit_is_refused_at_the_call() -> None:
    @ftray.remote
    def size(array: Any) -> int:
        return int(array.nbytes)

    with pytest.raises(exceptions.ObjectStoreFullError):
        size.remote(np.zeros(200 * MB, dtype=np.uint8))
    assert ftray.get(size.remote(np.zeros(MB, dtype=np.uint8))) == MB


# --- references inside values ---------------------------------------------------------------------------------------


def test_references_inside_values_stay_references() -> None:
    inner = [ftray.put(i) for i in range(3)]
    outer = ftray.put({"refs": inner})
    del inner
    got = ftray.get(outer)
    assert all(isinstance(ref, ftray.ObjectRef) for ref in got["refs"])
    assert ftray.get(got["refs"]) == [0, 1, 2]
    deep = ftray.put([ftray.put([ftray.put("deep")])])
    assert ftray.get(ftray.get(ftray.get(deep)[0])[0]) == "deep"


def test_top_level_references_are_resolved_and_nested_ones_are_not() -> None:
    @ftray.remote
    def look(a: Any, b: Any, *, c: Any) -> Any:
        return a, isinstance(b[0], ftray.ObjectRef), ftray.get(b), type(c["x"]).__name__, ftray.get(c["x"])

    ref, big = ftray.put("small"), ftray.put(bytes(200_000))
    a, nested, values, kind, length = ftray.get(look.remote(ref, [ref, big], c={"x": big}))
    assert (a, nested, kind) == ("small", True, "ObjectRef")
    assert values[0] == "small"
    assert len(values[1]) == len(length) == 200_000


def test_results_that_contain_references() -> None:
    @ftray.remote
    def make(n: int) -> Any:
        return [ftray.put(("value", i, bytes(i * 100_000))) for i in range(n)]

    @ftray.remote
    def forward(refs: Any) -> Any:
        return {"refs": refs, "task": make.remote(1)}

    refs = ftray.get(make.remote(3))
    assert [value[1] for value in ftray.get(refs)] == [0, 1, 2]
    got = ftray.get(forward.remote(refs))
    assert [value[1] for value in ftray.get(got["refs"])] == [0, 1, 2]
    assert ftray.get(ftray.get(got["task"])[0])[1] == 0


def test_a_reference_passes_through_many_workers() -> None:
    @ftray.remote
    def pass_on(box: Any, n: int) -> Any:
        return ftray.get(box[0]) if n == 0 else ftray.get(pass_on.remote(box, n - 1))

    @ftray.remote
    def hand_back(box: Any) -> Any:
        return box

    value = {"array": np.arange(100_000)}
    box: Any = [ftray.put(value)]
    assert np.array_equal(ftray.get(pass_on.remote(box, 5), timeout=30)["array"], value["array"])
    for _ in range(5):
        box = ftray.get(hand_back.remote(box))
    assert np.array_equal(ftray.get(box[0])["array"], value["array"])


def test_a_worker_waits_for_a_value_that_its_caller_will_have(tmp_path: Path) -> None:
    release = tmp_path / "release"

    @ftray.remote(num_cpus=0)
    def read(box: Any) -> Any:
        return ftray.get(box[0])

    pending = blocked(release).options(num_cpus=0).remote("late")
    readers = [read.remote([pending]) for _ in range(3)]
    assert ftray.wait(readers, timeout=0.05)[0] == []
    release.touch()
    assert ftray.get(readers, timeout=20) == ["late"] * 3


def test_an_error_reaches_whoever_borrows_it() -> None:
    @ftray.remote
    def read(box: Any) -> Any:
        try:
            ftray.get(box[0])
        except ValueError as error:
            return str(error)

    assert "mine" in ftray.get(read.remote([failing().remote()]), timeout=20)


def test_references_compare_hash_and_print() -> None:
    a, b = ftray.put(1), ftray.put(1)
    got = ftray.get(ftray.put([a]))[0]
    assert got == a
    assert got != b
    assert {got, a, b} == {a, b}
    assert a.hex() in repr(a)
    assert bytes.fromhex(a.hex()) == a.binary()


# --- awaiting -------------------------------------------------------------------------------------------------------


def test_references_are_awaitable_under_asyncio(tmp_path: Path) -> None:
    release = tmp_path / "release"

    async def main() -> Any:
        late = blocked(release).remote("late")
        first = await asyncio.gather(*(ftray.put(i) for i in range(5)), failing().remote(), return_exceptions=True)
        task = asyncio.ensure_future(asyncio.wait_for(late, 20))
        await asyncio.sleep(0)
        assert not task.done()
        release.touch()
        with pytest.raises(ValueError, match="mine"):
            await failing().remote()
        big = await ftray.put(np.arange(100_000))
        return first, await task, int(big.sum())

    first, late, total = asyncio.run(main())
    assert first[:5] == [0, 1, 2, 3, 4]
    assert isinstance(first[5], ValueError)
    assert late == "late"
    assert total == sum(range(100_000))


def test_an_asyncio_wait_can_be_cancelled(tmp_path: Path) -> None:
    release = tmp_path / "release"

    async def main() -> Any:
        late = blocked(release).remote("late")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(wait(late))), 0.02)
        release.touch()
        return await late

    async def wait(ref: Any) -> Any:
        return await ref

    assert asyncio.run(main()) == "late"


def test_references_are_awaitable_under_trio(tmp_path: Path) -> None:
    release = tmp_path / "release"

    async def main() -> Any:
        late = blocked(release).remote("late")
        with trio.move_on_after(0.02) as scope:
            await late
        assert scope.cancelled_caught
        got: list[Any] = []

        async def take(ref: Any) -> None:
            got.append(await ref)

        async with trio.open_nursery() as nursery:
            for ref in [ftray.put(1), late, ftray.put(bytes(200_000))]:
                nursery.start_soon(take, ref)
            release.touch()
        with pytest.raises(ValueError, match="mine"):
            await failing().remote()
        return got

    got = trio.run(main)
    assert sorted(map(str, got)) == sorted(map(str, [1, "late", bytes(200_000)]))


def test_a_reference_as_a_future() -> None:
    import concurrent.futures

    futures = [ftray.put(i).future() for i in range(5)]
    assert [future.result(20) for future in futures] == [0, 1, 2, 3, 4]
    broken = failing().remote().future()
    assert isinstance(broken.exception(20), ValueError)
    done, _ = concurrent.futures.wait([*futures, broken], 20)
    assert len(done) == 6


def test_puts_are_as_quick_as_they_are_small() -> None:
    """A sanity check against a message for each: not a benchmark."""
    begun = time.monotonic()
    refs = [ftray.put(i) for i in range(5000)]
    assert ftray.get(refs) == list(range(5000))
    assert time.monotonic() - begun < 2.0


def test_a_long_wait_says_what_it_waits_for(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftray.worker.core import get_core

    core = get_core()
    monkeypatch.setattr(core, "config", msgspec.structs.replace(core.config, wait_warning_ms=50))

    @ftray.remote
    def slow() -> int:
        time.sleep(0.3)
        return 1

    with caplog.at_level("WARNING", logger="ftray.worker"):
        assert ftray.get(slow.remote(), timeout=20) == 1
    assert "still waiting" in caplog.text
    assert "slow, running on worker pid" in caplog.text
