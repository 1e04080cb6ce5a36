"""The order of actor calls over lives and deaths, without any process."""

from __future__ import annotations

from ftray.ownership.calls import ALIVE, DEAD, RESTARTING, ActorCalls
from ftray.ownership.tasks import FunctionInfo, TaskRecord

INFO = FunctionInfo(b"", "A.m")


def call(number: int, retries: int = 0) -> TaskRecord:
    return TaskRecord(b"%d" % number, INFO, 1, retries)


def alive(calls: ActorCalls, incarnation: int = 0) -> None:
    assert calls.update(ALIVE, incarnation, b"w", b"n", "unix:/w", None)
    calls.connected(object())


def pushed(calls: ActorCalls) -> list[bytes]:
    ids = [task.task_id for task in calls.pushes]
    calls.pushes.clear()
    return ids


def test_calls_wait_for_the_actor_and_go_in_order() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    for number in range(3):
        calls.submit(call(number))
    assert pushed(calls) == []
    alive(calls)
    assert pushed(calls) == [b"0", b"1", b"2"]


def test_a_call_that_waits_for_an_argument_holds_back_later_ones() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    alive(calls)
    first = call(0)
    first.deps_left = 1
    calls.submit(first)
    calls.submit(call(1))
    assert pushed(calls) == []
    first.deps_left = 0
    calls.pump()
    assert pushed(calls) == [b"0", b"1"]


def test_at_most_once_unless_retries_are_allowed() -> None:
    calls = ActorCalls(b"a", "A", b"h", inflight_max=3)
    alive(calls)
    for number in range(5):
        calls.submit(call(number, retries=1 if number == 1 else 0))
    assert pushed(calls) == [b"0", b"1", b"2"]
    failed = calls.lost()
    assert [task.task_id for task in failed] == [b"0", b"2"]
    calls.update(RESTARTING, 1, b"", b"", "", None)
    alive(calls, 1)
    assert pushed(calls) == [b"1", b"3", b"4"]


def test_the_next_life_may_begin_before_the_link_to_the_last_one_closes() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    alive(calls)
    assert not calls.update(RESTARTING, 1, b"", b"", "", None)
    assert calls.link is not None
    assert calls.update(ALIVE, 1, b"w", b"n", "unix:/w", None), "connect anew"


def test_old_news_is_ignored() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    alive(calls, 2)
    assert not calls.update(ALIVE, 1, b"x", b"n", "unix:/x", None)
    assert calls.endpoint == "unix:/w"
    assert not calls.update(DEAD, 2, b"", b"", "", "why")
    assert not calls.update(ALIVE, 3, b"x", b"n", "unix:/x", None)
    assert calls.state == DEAD


def test_a_dead_actor_gives_up_everything_in_order() -> None:
    calls = ActorCalls(b"a", "A", b"h", inflight_max=1)
    alive(calls)
    for number in range(3):
        calls.submit(call(number))
    assert [task.task_id for task in calls.take_all()] == [b"0", b"1", b"2"]
    assert calls.idle
