"""Finding a task in a queue by its id, with little reading."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from ftray.ownership.finding import QueueIndex
from ftray.ownership.tasks import FunctionInfo, TaskRecord

INFO = FunctionInfo(b"", "f")


def tasks(*numbers: int) -> list[TaskRecord]:
    return [TaskRecord(b"%d" % number, INFO, 1, 0) for number in numbers]


class Counting(deque[TaskRecord]):
    """A queue that counts how many of its tasks are looked at from the right."""

    looked = 0

    def __reversed__(self):  # type: ignore[no-untyped-def]
        for task in super().__reversed__():
            self.looked += 1
            yield task


def test_a_queue_is_read_once() -> None:
    queue = Counting(tasks(*range(1000)))
    index = QueueIndex()
    for number in range(0, 1000, 3):
        found = index.find(queue, b"%d" % number)
        assert found is not None
        assert found.task_id == b"%d" % number
    assert queue.looked <= 1000 + 1000 // 3 + 1
    queue.looked = 0
    queue.extend(tasks(*range(1000, 1010)))
    assert index.find(queue, b"1005") is queue[1005]
    assert queue.looked <= 11


def test_what_has_left_is_not_found() -> None:
    queue = deque(tasks(1, 2, 3))
    index = QueueIndex()
    assert index.find(queue, b"1") is queue[0]
    queue.popleft()
    assert index.find(queue, b"1") is None
    queue.clear()
    assert index.find(queue, b"3") is None
    queue.extend(tasks(4, 5))
    assert index.find(queue, b"3") is None
    assert index.find(queue, b"5") is queue[1]


@given(st.lists(st.one_of(st.just("append"), st.just("pop"), st.just("back"), st.just("clear"), st.integers(0, 30))))
def test_it_finds_what_a_scan_finds(steps: list[str | int]) -> None:
    queue: deque[TaskRecord] = deque()
    index = QueueIndex()
    made: list[TaskRecord] = []
    left: list[TaskRecord] = []
    for step in steps:
        if step == "append":
            made += tasks(len(made))
            queue.append(made[-1])
        elif step == "pop" and queue:
            left.append(queue.popleft())
        elif step == "back" and left:
            queue.appendleft(left.pop())
            index.clear()
        elif step == "clear":
            index.clear()
        elif isinstance(step, int):
            task_id = b"%d" % step
            assert index.find(queue, task_id) is next((task for task in queue if task.task_id == task_id), None)
