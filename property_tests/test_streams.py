"""Both ends of a stream with two lossless queues between them, against a naive twin: the list of what was read.

The task may die at any time and be repeated, with items of other sizes and another number of them.

Safety: items are read once, in order, each as it arrived first; the worker is never further ahead of the reader than
its window. Liveness: when all messages are delivered and the reader waits, the worker may go on; a stream that nobody
wants any more is closed at its worker, and one that nobody reads runs to its end.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ftray.ownership.streams import DISCARD, DROPPED, FREE, GAP, SKIP, TAKE, Stream, Window

FREE_MAX, BYTES_MAX = 12, 60

several = st.integers(1, 8)
events = st.one_of(
    st.tuples(st.just("yield"), several, st.sampled_from([0, 1, 1, 3, 7, 20, 80])),
    st.tuples(st.sampled_from(["item", "item", "read", "take"]), several),
    st.tuples(st.sampled_from(["item", "read", "wait"]), st.just(100)),
)
rare = st.tuples(st.sampled_from(["die", "die", "die", "lift", "leave", "drop", "end", "fail"]), st.just(1))
# Some stretches of ordinary life with one rare event after each: lives that end at once show little.
scripts = st.lists(st.tuples(st.lists(events, min_size=5, max_size=25), rare), max_size=5)


class World:
    def __init__(self, items_max: int) -> None:
        self.items_max = items_max
        self.stream = Stream(items_max, FREE_MAX, BYTES_MAX)
        self.attempt = -1
        self.first: list[tuple[int, int]] = []
        """(attempt, size) of each item, as it arrived first."""
        self.taken: list[int] = []
        self.restart()

    def restart(self) -> None:
        self.attempt += 1
        self.window = Window(self.items_max or FREE_MAX, FREE_MAX, BYTES_MAX)
        self.sizes: list[int] = []
        self.items: deque[tuple[int, int, int]] = deque()
        self.reads: deque[int] = deque()
        self.running = True

    def tell(self, hungry: bool) -> None:
        while (read := self.stream.say(hungry)) is not None:
            self.reads.append(read)

    # --- events ------------------------------------------------------------------------------------------------------

    def do_yield(self, size: int = 1) -> None:
        if self.running and self.window.has_room() and not self.window.closed:
            self.items.append((self.attempt, self.window.sent, size))
            self.window.yielded(size)
            self.sizes.append(size)

    def do_item(self) -> None:
        if not self.items:
            return
        attempt, index, size = self.items.popleft()
        verdict = self.stream.item(attempt, index, size)
        assert verdict is not GAP
        if index < len(self.first) or self.stream.over:
            assert verdict is SKIP
        else:
            self.first.append((attempt, size))
            assert verdict is (DISCARD if self.stream.left else TAKE)
        self.tell(False)

    def do_read(self) -> None:
        if self.reads:
            read = self.reads.popleft()
            self.window.told(read)

    def do_take(self) -> None:
        if self.stream.left:
            return
        index = self.stream.take()
        if index >= 0:
            assert index == len(self.taken), "read out of order, or twice"
            self.taken.append(index)
            self.tell(False)
        else:
            assert len(self.taken) == len(self.first) + self.stream.failed, "an item that has arrived is not given"

    def do_wait(self) -> None:
        """The reader takes all there is and waits for more."""
        while not self.stream.left and self.stream.read < self.stream.arrived:
            self.do_take()
        self.tell(True)

    def do_die(self) -> None:
        if not self.stream.over:
            self.restart()

    def do_lift(self) -> None:
        self.stream.lift()
        self.tell(False)

    def do_leave(self) -> None:
        if not self.stream.left:
            unread = self.stream.leave()
            assert list(unread) == list(range(len(self.taken), len(self.first) + self.stream.failed))
            self.tell(False)

    def do_drop(self) -> None:
        if self.stream.left:
            self.stream.drop()
            self.tell(False)

    def do_end(self) -> None:
        if self.running and not self.stream.over:
            while self.items:
                self.do_item()
            self.running = False
            assert self.stream.end(self.window.sent)
            assert self.stream.arrived == len(self.first)

    def do_fail(self) -> None:
        if not self.stream.over:
            self.items.clear()
            self.running = False
            self.stream.fail()

    # --- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        stream, window = self.stream, self.window
        if stream.free:
            ahead, unread = window.sent - len(self.first), self.sizes[len(self.first) :]
            most = max(self.items_max, FREE_MAX)
        else:
            ahead, unread, most = window.sent - len(self.taken), self.sizes[len(self.taken) :], self.items_max
        if not stream.left and not stream.over and not (stream.free and self.items_max):
            # (A stream that became free has what was unread then, and the larger window, on top of each other.)
            assert ahead <= most, "further ahead than the window"
            assert sum(unread[:-1]) < BYTES_MAX, "more bytes ahead than the window has"

    def settle(self) -> None:
        """Everything is delivered, and the reader waits; nobody reads where arrival counts as reading."""
        while self.items or self.reads:
            self.do_item()
            self.do_read()
            if not self.stream.free:
                self.do_wait()
        if not self.stream.free:
            self.do_wait()
        while self.reads:
            self.do_read()


@given(st.sampled_from([0, 1, 2, 5, 30]), scripts)
def test_streams(items_max: int, script: list[tuple[list[tuple[Any, ...]], tuple[Any, ...]]]) -> None:
    world = World(items_max)
    for life, event in script:
        for name, times, *arguments in [*life, event]:
            for _ in range(times):
                getattr(world, f"do_{name}")(*arguments)
                world.check()
    world.settle()
    stream = world.stream
    if stream.over:
        world.do_wait()
        assert stream.say(True) is None
        assert stream.left or len(world.taken) == len(world.first) + stream.failed
        assert stream.take() == -1
        return
    assert world.window.has_room() or stream.dropped, "the reader waits, nothing is on its way, and the worker may not"
    before = len(world.sizes)
    world.do_yield()
    world.settle()
    if stream.dropped:
        assert world.window.closed or len(world.sizes) == before
    else:
        assert len(world.sizes) == before + 1
        for _ in range(3 * FREE_MAX):  # and it goes on as long as there is anything to yield
            world.do_yield(9)
            world.settle()
        assert len(world.sizes) == before + 1 + 3 * FREE_MAX


def test_a_window_of_a_thousand_is_told_in_a_few_messages() -> None:
    stream, said = Stream(1_000, 1_000, 1 << 24), []
    for index in range(10_000):
        assert stream.item(0, index, 10) is TAKE
        assert stream.take() == index
        while (read := stream.say(False)) is not None:
            said.append(read)
    assert said == list(range(125, 10_001, 125))


def test_a_repeated_attempt_with_larger_items_does_not_wait_for_reads_that_were_too_small_to_tell() -> None:
    world = World(30)
    for _ in range(3):
        world.do_yield()
        world.do_item()
    world.do_die()
    for _ in range(2):
        assert world.window.has_room()
        world.do_yield(BYTES_MAX)
        world.do_item()
        world.do_take()
        world.do_read()
    assert not world.window.has_room()
    world.settle()
    assert world.window.has_room()


def test_what_was_read_before_an_attempt_does_not_fill_its_window() -> None:
    window = Window(5, 5, 10)
    window.told(3)
    for _ in range(3):
        window.yielded(8)
    assert window.has_room()
    window.yielded(8)
    assert window.has_room()
    window.yielded(8)
    assert not window.has_room()
    window.told(4)
    assert window.has_room()


def test_reads_of_large_items_are_told_at_once() -> None:
    stream = Stream(1_000, 1_000, 800)
    for size in (99, 1, 1):
        stream.item(0, stream.arrived, size)
    stream.take()
    assert stream.say(False) is None
    stream.take()
    assert stream.say(False) == 2
    stream.item(0, 3, 800)
    assert stream.say(False) is None
    stream.lift()
    assert [stream.say(False), stream.say(False)] == [FREE, 4]


def test_a_stream_that_became_free_has_the_larger_window() -> None:
    world = World(1)
    world.do_yield()
    world.do_item()
    world.do_lift()
    world.settle()
    for _ in range(2 * FREE_MAX):
        world.do_yield()
    assert world.window.sent == FREE_MAX


def test_gaps_are_seen() -> None:
    stream = Stream(5, 5, 100)
    assert stream.item(0, 0, 1) is TAKE
    assert stream.item(0, 2, 1) is GAP
    assert not stream.end(2)


def test_a_worker_that_repeats_a_task_hears_what_was_read_and_that_it_is_dropped() -> None:
    stream = Stream(100, 100, 100)
    for index in range(3):
        stream.item(0, index, 1)
        stream.take()
    assert stream.say(False) is None
    assert stream.item(1, 0, 1) is SKIP
    assert stream.say(False) == 3
    stream.leave()
    stream.drop()
    assert stream.say(False) == DROPPED
    assert stream.say(False) is None
    assert stream.item(2, 0, 1) is SKIP
    assert stream.say(False) == DROPPED
