"""`ftray.util.queue.Queue`."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import Any

import pytest
from integration.harness import Driver, wait_until

import ftray
from ftray import exceptions
from ftray.util.queue import Empty, Full, Queue

pytestmark = pytest.mark.usefixtures("session")


def test_in_order_and_with_a_bound() -> None:
    q = Queue(maxsize=3)
    for item in (1, None, [3]):
        q.put(item)
    assert len(q) == q.qsize() == q.size() == 3 and q.full() and not q.empty()
    with pytest.raises(Full):
        q.put_nowait(4)
    with pytest.raises(queue.Full):  # the standard library's
        q.put(4, timeout=0.01)
    assert [q.get(), q.get_nowait(), q.get(timeout=5)] == [1, None, [3]]
    assert q.empty()
    with pytest.raises(Empty):
        q.get(block=False)
    with pytest.raises(queue.Empty):
        q.get(timeout=0.01)
    assert not Queue().full()


def test_batches_go_in_whole_or_not_at_all() -> None:
    q = Queue(maxsize=3)
    q.put_nowait_batch([1, 2])
    with pytest.raises(Full, match="room for 1"):
        q.put_nowait_batch(iter([3, 4]))
    with pytest.raises(Empty, match="2 items"):
        q.get_nowait_batch(3)
    assert q.get_nowait_batch(2) == [1, 2]
    assert q.get_nowait_batch(0) == []


def test_a_blocked_get_holds_up_nobody() -> None:
    q = Queue()

    @ftray.remote(num_cpus=0)
    def consume(queue: Queue) -> Any:
        return queue.get()

    refs = [consume.remote(q) for _ in range(3)]
    waiting = [threading.Thread(target=q.get) for _ in range(3)]
    for thread in waiting:
        thread.start()
    assert q.empty()
    for item in range(6):
        q.put(item)
    for thread in waiting:
        thread.join(20)
    assert len(ftray.get(refs, timeout=20)) == 3
    assert q.empty()


def test_a_blocked_put_goes_on_when_there_is_room() -> None:
    q = Queue(maxsize=1)
    q.put(1)
    thread = threading.Thread(target=q.put, args=(2,))
    thread.start()
    assert q.get() == 1
    assert q.get(timeout=20) == 2
    thread.join(20)


def test_no_item_is_lost_to_who_does_not_wait_any_more() -> None:
    q = Queue()
    with pytest.raises(Empty):
        q.get(timeout=0.01)

    async def impatient() -> Any:
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(q.get_async(), 0.01)
        with pytest.raises(Empty):
            await q.get_async(block=False)
        await q.put_async("kept")
        return await q.get_async(timeout=20)

    assert asyncio.run(impatient()) == "kept"


def test_an_item_that_was_handed_to_an_interrupted_get_comes_back() -> None:
    q = Queue()
    ref = q.actor.get.remote(None)
    q.put("only")
    ftray.wait([ref])
    q._take_back(ref, "give_back")  # as on an interrupt that comes when the answer is there
    assert q.get(timeout=20) == "only"


def test_a_put_that_was_cancelled_is_not_in() -> None:
    q = Queue(maxsize=1)
    q.put(1)

    async def impatient() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(q.put_async(2), 0.01)
        with pytest.raises(Full):
            await q.put_async(3, timeout=0.01)

    asyncio.run(impatient())
    assert q.get() == 1
    assert q.empty()


def test_ctrl_c_in_a_blocked_get_loses_nothing() -> None:
    code = """
    from ftray.util.queue import Queue
    ftray.init(num_cpus=1)
    q = Queue()
    q.qsize()
    threading.Timer(0.0, lambda: say("waiting")).start()
    try:
        q.get()
    except KeyboardInterrupt:
        say("interrupted")
    q.put("kept")
    say("got", q.get(timeout=10))
    ftray.shutdown()
    """
    with Driver(code) as driver:
        driver.wait_for("waiting")
        wait_until(lambda: _interrupt(driver), what="the interrupt is taken")
        driver.wait_for("got kept")
        assert driver.finish() == 0, driver.dump()


def _interrupt(driver: Driver) -> bool:
    import signal

    if "interrupted" not in driver.out:
        driver.signal(signal.SIGINT)
    return "interrupted" in driver.out


def test_references_as_items_are_resolved_and_inner_ones_kept() -> None:
    q = Queue()
    q.put(ftray.put("value"))
    q.put([ftray.put("inner")])
    assert q.get() == "value"
    (ref,) = q.get()
    assert ftray.get(ref) == "inner"


def test_shutdown_reaches_everybody() -> None:
    q = Queue(actor_options={"name": "jobs"})
    other = ftray.get(ftray.put([q]))[0]

    @ftray.remote(num_cpus=0)
    def consume(queue: Queue) -> Any:
        return queue.get()

    ref = consume.remote(q)
    ftray.wait([ref], timeout=0)
    q.shutdown()
    q.shutdown()
    for call in (lambda: ftray.get(ref, timeout=20), q.get, q.qsize, lambda: q.put(1), other.get, other.qsize):
        with pytest.raises(exceptions.ActorDiedError):
            call()
    forced = Queue()
    forced.put(1)
    forced.shutdown(force=True)
    with pytest.raises(exceptions.ActorDiedError, match="shut down"):
        forced.get()


def test_wrong_arguments() -> None:
    q = Queue()
    calls: list[tuple[type[Exception], Any]] = [
        (TypeError, lambda: Queue("3")),  # type: ignore[arg-type]
        (TypeError, lambda: Queue(actor_options=["num_cpus"])),  # type: ignore[arg-type]
        (TypeError, lambda: Queue(actor_options={"num_cpu": 1})),
        (ValueError, lambda: q.get(timeout=-1)),
        (ValueError, lambda: q.put(1, timeout=-0.1)),
        (TypeError, lambda: q.get(timeout="1")),  # type: ignore[arg-type]
        (TypeError, lambda: q.put_nowait_batch(5)),  # type: ignore[arg-type]
        (TypeError, lambda: q.get_nowait_batch("2")),  # type: ignore[arg-type]
        (ValueError, lambda: q.get_nowait_batch(-1)),
        (exceptions.SerializationError, lambda: q.put(threading.Lock())),
    ]
    for error, call in calls:
        with pytest.raises(error):
            call()
    assert q.empty()
