"""What an owner knows of a task it has submitted, and whether it may run again.

Role: pure. A `TaskRecord` lives from submission until its reply is processed. The encoded push frame is kept rather
than the arguments: a task without dependencies is encoded once, at submission, and every push is one append to a
buffer.

Rules (design `ownership.md`, failures): a worker's death spends `retries_left`; an exception of the function spends it
only when `retry_exceptions` allows. -1 is unlimited.
"""

from __future__ import annotations

from typing import Any

import msgspec


class FunctionInfo:
    """A remote function or method as its submissions share it."""

    __slots__ = ("exported", "function_id", "max_calls", "mean_us", "name")

    def __init__(self, function_id: bytes, name: str) -> None:
        self.function_id = function_id
        self.name = name
        self.exported = False
        self.max_calls = 0
        """A worker ends after so many runs of it; 0 is no bound."""
        self.mean_us = -1.0
        """Running mean of its measured time; negative until it has been measured."""


class TaskRecord(msgspec.Struct, gc=False, eq=False):
    """One submitted, unfinished task (or actor call).

    Not tracked by the garbage collector: a million of them would make each of its full passes take a second. Every
    cycle through one ends when the task does.
    """

    task_id: bytes
    function: FunctionInfo
    num_returns: int
    retries_left: int
    retry_exceptions: Any = False
    holds: tuple[bytes, ...] = ()
    """Object ids that this task keeps alive until it ends."""
    args: bytes = b""
    deps: tuple[tuple[int | str, bytes], ...] = ()
    """(position, object id) of the top-level reference arguments."""
    cls: Any = None
    """Its `dispatch.ClassQueue`; None for an actor call."""
    solo: bool = False
    """Pushed only to a worker with nothing else in flight, so that its fate says nothing of others."""
    deps_left: int = 0
    attempt: int = 0
    expect_us: float = 0.0
    frame: bytes = b""
    cancelled: bool = False
    actor: Any = None
    """The `calls.ActorCalls` of an actor call."""
    method: str = ""
    ahead_max: int = 0
    """Of a generator task: how many items may wait unread; 0 is no bound of its own."""
    group: str = ""
    """The concurrency group of an actor call."""

    def spend_retry(self) -> bool:
        """Takes one retry; False when there is none left."""
        if self.cancelled or self.retries_left == 0:
            return False
        if self.retries_left > 0:
            self.retries_left -= 1
        self.attempt += 1
        return True
