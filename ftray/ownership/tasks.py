"""What an owner knows of a task it has submitted, and whether it may run again.

Role: pure. A `TaskRecord` lives from submission until its reply is processed. The encoded push frame is kept rather
than the arguments: a task without dependencies is encoded once, at submission, and every push is one append to a
buffer.

Rules (design `ownership.md`, failures): a worker's death spends `retries_left`; an exception of the function spends it
only when `retry_exceptions` allows. -1 is unlimited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftray.ownership.dispatch import ClassQueue


class FunctionInfo:
    """A remote function or method as its submissions share it."""

    __slots__ = ("exported", "function_id", "mean_us", "name")

    def __init__(self, function_id: bytes, name: str) -> None:
        self.function_id = function_id
        self.name = name
        self.exported = False
        self.mean_us = -1.0
        """Running mean of its measured time; negative until it has been measured."""


class TaskRecord:
    """One submitted, unfinished task (or actor call)."""

    __slots__ = (
        "actor", "args", "attempt", "cancelled", "cls", "deps", "deps_left", "expect_us", "frame", "function", "holds",
        "method", "num_returns", "retries_left", "retry_exceptions", "solo", "task_id",
    )  # fmt: skip

    def __init__(
        self,
        task_id: bytes,
        function: FunctionInfo,
        num_returns: int,
        retries_left: int,
        retry_exceptions: Any = False,
        holds: tuple[bytes, ...] = (),
        args: bytes = b"",
        deps: Any = (),
        cls: ClassQueue | None = None,
    ) -> None:
        self.task_id = task_id
        self.function = function
        self.num_returns = num_returns
        self.retries_left = retries_left
        self.retry_exceptions = retry_exceptions
        self.holds = holds
        """Object ids that this task keeps alive until it ends."""
        self.args = args
        self.deps = deps
        """(position, object id) of the top-level reference arguments."""
        self.deps_left = 0
        self.cls = cls
        self.attempt = 0
        self.expect_us = 0.0
        self.frame = b""
        self.solo = retries_left == 0 and cls is not None
        """Pushed only to a worker with nothing else in flight, so that its fate says nothing of others."""
        self.cancelled = False
        self.actor: Any = None
        self.method = ""

    def spend_retry(self) -> bool:
        """Takes one retry; False when there is none left."""
        if self.cancelled or self.retries_left == 0:
            return False
        if self.retries_left > 0:
            self.retries_left -= 1
        self.attempt += 1
        return True
