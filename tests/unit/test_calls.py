"""The order of actor calls over lives and deaths, without any process."""

from __future__ import annotations

from ftray.ownership.calls import ALIVE, DEAD, RESTARTING, ActorCalls
from ftray.ownership.tasks import FunctionInfo, TaskRecord

INFO = FunctionInfo(b"", "A.m")


def call(number: int, retries: int = 0, group: str = "", deps_left: int = 0) -> TaskRecord:
    task = TaskRecord(b"%d" % number, INFO, 1, retries, group=group, deps_left=deps_left)
    task.method = f"m{number}"
    return task


def alive(calls: ActorCalls, incarnation: int = 0) -> None:
    assert calls.update(ALIVE, incarnation, b"w", b"n", "unix:/w", None)
    calls.connected(object())


def submit(calls: ActorCalls, *tasks: TaskRecord) -> None:
    for task in tasks:
        calls.submit(task)


def pushed(calls: ActorCalls) -> list[bytes]:
    """All that may be pushed now."""
    ids = []
    while (task := calls.take()) is not None:
        ids.append(task.task_id)
    return ids


def test_calls_wait_for_the_actor_and_go_in_order() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    submit(calls, *map(call, range(3)))
    assert pushed(calls) == []
    alive(calls)
    assert pushed(calls) == [b"0", b"1", b"2"]


def test_a_call_that_waits_for_an_argument_holds_back_later_ones() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    alive(calls)
    first = call(0, deps_left=1)
    submit(calls, first, call(1))
    assert not calls.go(call(2)), "something stands before it"
    assert pushed(calls) == []
    first.deps_left = 0
    calls.ready(first)
    assert pushed(calls) == [b"0", b"1"]


def test_without_order_it_holds_back_nothing() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    calls.out_of_order = True
    alive(calls)
    first = call(0, deps_left=1)
    submit(calls, first, call(1))
    assert calls.go(call(2)) is False, "1 has not gone yet"
    assert pushed(calls) == [b"1"]
    assert calls.go(call(2))
    assert calls.unfinished == 3
    first.deps_left = 0
    calls.ready(first)
    assert pushed(calls) == [b"0"]


def test_a_full_group_holds_up_no_other() -> None:
    calls = ActorCalls(b"a", "A", b"h", inflight_max=2)
    alive(calls)
    submit(calls, *(call(number, group="slow") for number in range(4)), call(4), call(5, group="io"), call(6), call(7))
    assert sorted(pushed(calls)) == [b"0", b"1", b"4", b"5", b"6"]
    assert not calls.go(call(8)), "two calls without a group are in flight"
    assert calls.done(b"4") is not None
    assert pushed(calls) == [b"7"]
    assert calls.done(b"1") is not None
    assert pushed(calls) == [b"2"]
    assert calls.unfinished == 6


def test_a_call_goes_at_once_if_nothing_stands_before_it() -> None:
    calls = ActorCalls(b"a", "A", b"h", inflight_max=2)
    assert not calls.go(call(0)), "not alive yet"
    alive(calls)
    assert calls.go(call(0))
    assert calls.go(call(1))
    assert not calls.go(call(2)), "enough in flight"
    assert calls.done(b"0") is not None
    assert calls.done(b"0") is None
    assert not calls.go(call(3, group="io")), "calls with a group go through their lane"


def test_the_bound_counts_all_that_have_no_answer() -> None:
    calls = ActorCalls(b"a", "A", b"h", inflight_max=1)
    calls.out_of_order = True
    calls.pending_max = 4
    alive(calls)
    submit(calls, call(0), call(1), call(2, group="io"), call(3, deps_left=1))
    assert pushed(calls) == [b"0", b"2"]
    assert calls.full
    calls.done(b"0")
    assert not calls.full
    calls.pending_max = -1
    submit(calls, *map(call, range(4, 50)))
    assert not calls.full


def test_what_is_taken_out_is_passed_over() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    tasks = [call(0, deps_left=1), call(1), call(2, group="io"), call(3)]
    submit(calls, *tasks)
    alive(calls)
    for task in (tasks[0], tasks[2]):
        assert calls.take_out(task)
        assert not calls.take_out(task)
    assert [task.task_id for task in calls.queued()] == [b"1", b"3"]
    assert calls.unfinished == 2
    assert pushed(calls) == [b"1", b"3"]
    assert not calls.take_out(tasks[1]), "in flight"
    assert pushed(calls) == []
    assert calls.unfinished == 2


def test_at_most_once_unless_retries_are_allowed() -> None:
    calls = ActorCalls(b"a", "A", b"h", inflight_max=3)
    alive(calls)
    submit(calls, *(call(number, retries=1 if number == 1 else 0) for number in range(5)))
    assert pushed(calls) == [b"0", b"1", b"2"]
    failed = calls.lost()
    assert [task.task_id for task in failed] == [b"0", b"2"]
    assert calls.ran == "m0"
    calls.update(RESTARTING, 1, b"", b"", "", None)
    alive(calls, 1)
    assert calls.ran == ""
    assert pushed(calls) == [b"1", b"3", b"4"]


def test_lanes_start_anew_with_each_life() -> None:
    calls = ActorCalls(b"a", "A", b"h", inflight_max=1)
    alive(calls)
    submit(calls, *(call(number, retries=-1, group="io") for number in range(3)))
    assert pushed(calls) == [b"0"]
    assert calls.lost() == []
    calls.update(RESTARTING, 1, b"", b"", "", None)
    alive(calls, 1)
    assert pushed(calls) == [b"0"]
    assert calls.done(b"0") is not None
    assert pushed(calls) == [b"1"]


def test_nothing_is_pushed_to_a_life_that_is_over() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    alive(calls)
    assert calls.go(call(0))
    calls.update(RESTARTING, 1, b"", b"", "", None)
    assert calls.link is not None, "its channel is still open, and what it has answered counts"
    assert not calls.go(call(1))
    submit(calls, call(1))
    assert pushed(calls) == []
    assert calls.done(b"0") is not None


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
    tasks = list(map(call, range(4)))
    submit(calls, *tasks)
    calls.take_out(tasks[2])
    assert calls.take() is tasks[0]
    assert [task.task_id for task in calls.take_all()] == [b"0", b"1", b"3"]
    assert calls.idle


def test_a_call_that_was_taken_out_stays_out_when_its_arguments_come() -> None:
    calls = ActorCalls(b"a", "A", b"h")
    first = call(0)
    first.deps_left = 2
    calls.submit(first)
    calls.submit(call(1))
    assert calls.take_out(first)
    first.deps_left -= 1
    assert not calls.take_out(first)
    assert [task.task_id for task in calls.queued()] == [b"1"]
    assert calls.unfinished == 1
    alive(calls)
    taken = calls.take()
    assert taken is not None
    assert taken.task_id == b"1"
