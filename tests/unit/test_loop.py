"""`host`: a reactor driven by its own thread, with a trio run as its guest."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import trio
from wire_hosts import make_reactor

from ftray.raylet.main import STOP_SIGNALS, note_stop_signals, serve
from ftray.wire.loop import host
from ftray.wire.reactor import Reactor


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = make_reactor()
    yield made
    made.close()


def later(reactor: Reactor, fn: Callable[[], object], delay_ms: float = 0.0) -> None:
    """As any thread may ask for it."""
    with reactor.lock:
        reactor.call_later(delay_ms, fn)  # type: ignore[arg-type]


def test_it_ends_with_main_and_leaves_nothing_behind(reactor: Reactor) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    ran: list[str] = []

    async def main(word: str) -> None:
        stopped = trio.Event()
        later(reactor, lambda: (ran.append(word), stopped.set()), 1)
        await stopped.wait()

    host(reactor, main, "timer")
    assert ran == ["timer"] and reactor.on_earlier_timer is None
    assert sorted(os.listdir("/proc/self/fd")) == before
    later(reactor, lambda: None)  # wakes nobody


def test_what_main_raises_comes_out(reactor: Reactor) -> None:
    async def main() -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        host(reactor, main)
    assert reactor.on_earlier_timer is None


def test_descriptors_and_timers_of_trio_have_their_turns(reactor: Reactor) -> None:
    read, write = os.pipe()
    told: list[bytes] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def hear() -> None:
                await trio.lowlevel.wait_readable(read)
                told.append(os.read(read, 10))

            nursery.start_soon(hear)
            await trio.sleep(0.001)
            later(reactor, lambda: os.write(write, b"x"))

    host(reactor, main)
    assert told == [b"x"]
    os.close(read)
    os.close(write)


def test_a_timer_of_another_thread_wakes_it(reactor: Reactor) -> None:
    """It would sleep for an hour otherwise."""

    async def main() -> None:
        stopped = trio.Event()
        thread = threading.Thread(target=later, args=(reactor, stopped.set))
        later(reactor, thread.start)  # so that it starts when all is asleep but this
        await stopped.wait()
        thread.join()

    host(reactor, main)


def test_a_signal_wakes_it(reactor: Reactor) -> None:
    seen: list[int] = []

    async def main() -> None:
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            later(reactor, lambda: os.kill(os.getpid(), signal.SIGUSR1))
            async for signum in signals:
                seen.append(signum)
                return

    host(reactor, main)
    assert seen == [signal.SIGUSR1]


def test_the_loop_s_own_timers_wake_nobody(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    rung: list[int] = []
    write = os.eventfd_write
    monkeypatch.setattr(os, "eventfd_write", lambda fd, value: (rung.append(fd), write(fd, value)))

    async def main() -> None:
        stopped = trio.Event()
        left = [20]

        def again() -> None:
            left[0] -= 1
            later(reactor, again if left[0] else stopped.set)

        later(reactor, again)
        before = len(rung)
        await stopped.wait()
        assert len(rung) - before <= 3  # the end of trio's own wait

    host(reactor, main)


def test_a_cancelled_timer_is_not_waited_for(reactor: Reactor) -> None:
    with reactor.lock:
        first = reactor.call_later(1_000, lambda: None)
        reactor.call_later(60_000, lambda: None)
        first.cancel()
        reactor.run_timers()
    assert reactor.next_timer_s() > 50


def test_when_the_reactor_fails_main_is_cancelled_and_the_failure_comes_out(
    reactor: Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trio's thread must not go on ringing: the bell's number may be another file's by then."""
    before = sorted(os.listdir("/proc/self/fd"))
    seen: list[str] = []
    poll = reactor.poll

    def broken(timeout_s: float) -> bool:
        if seen:
            raise OSError("the reactor is broken")
        return poll(timeout_s)

    monkeypatch.setattr(reactor, "poll", broken)

    async def main() -> None:
        seen.append("begun")
        try:
            await trio.sleep_forever()
        finally:
            seen.append("ended")

    with pytest.raises(OSError, match="the reactor is broken"):
        host(reactor, main)
    assert seen == ["begun", "ended"] and reactor.on_earlier_timer is None
    assert sorted(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(reactor, "poll", poll)
    host(reactor, trio.sleep, 0)  # nothing of the former run is in the way


def test_an_interrupt_that_nobody_hears_ends_it_in_order(reactor: Reactor) -> None:
    """Wherever it arrives: in trio's part it comes out of `main`, in the reactor's it cancels it."""
    seen: list[str] = []

    async def main() -> None:
        later(reactor, lambda: os.kill(os.getpid(), signal.SIGINT), 1)
        try:
            await trio.sleep_forever()
        finally:
            seen.append("ended")

    with pytest.raises(BaseException) as raised:
        host(reactor, main)
    assert isinstance(raised.value, KeyboardInterrupt) and seen == ["ended"]
    assert reactor.on_earlier_timer is None and not reactor.reader.locked()


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_that_came_before_it_was_heard_stops_the_node(reactor: Reactor, signum: signal.Signals) -> None:
    """Between the node's word that it is ready and the receiver of signals."""
    reasons: list[str] = []

    def stop(reason: str) -> None:
        reasons.append(reason)
        node.on_stop()

    node = SimpleNamespace(stopping="", on_stop=lambda: None, stop=stop)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        noted = note_stop_signals()
        os.kill(os.getpid(), signum)
        host(reactor, serve, node, noted)
        assert reasons == [f"{signum.name} arrived"]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
