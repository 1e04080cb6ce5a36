"""`as_completed` and `map_unordered`: results in the order in which they are done.

Role: shell on the public interface. Both are iterators that go on after an error: the error of a task is raised where
its result would have come, and the next `next()` has the next result. Closing one early, or dropping it, lets go of all
that it held; the tasks run to their end.

Rejected: generators (one that has raised is finished, and so the first failed task would hide the results of all
others); results in batches of `chunk_size` (it makes the first result wait for others; it is the most that is read at
once here).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ftray.api.objects import check_refs, check_timeout
from ftray.exceptions import GetTimeoutError
from ftray.util.arrivals import Arrivals
from ftray.worker.core import get_core
from ftray.worker.refs import ObjectRef
from ftray.worker.waiting import IN_STORE

DEFAULT_CHUNK_SIZE = 10
DEFAULT_BACKPRESSURE_SIZE = 100


def as_completed(
    refs: Sequence[ObjectRef[Any]],
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    yield_obj_refs: bool = False,
    timeout: float | None = None,
    fetch_local: bool = True,
) -> Completions:
    """Iterates over the values of references in the order in which they become ready.

    With `yield_obj_refs` the references come instead of their values. `timeout` is in seconds, for the whole iteration,
    counted from this call. At most `chunk_size` values that are ready are read from the store at once.

    The error of a task is raised by the `next()` whose result it is; the iteration can go on after it. `next()` raises
    GetTimeoutError when time is up. Raises TypeError for what is not a list of references, ValueError for duplicates
    and for a `chunk_size` below 1.
    """
    if isinstance(refs, ObjectRef):
        raise TypeError("ftray.util.as_completed takes a list of references: use as_completed([ref])")
    given: Any = refs
    if isinstance(given, Iterable) and not isinstance(given, list | tuple | str | bytes):
        given = list(given)
    checked = check_refs(given, "util.as_completed")
    _at_least_1("chunk_size", chunk_size)
    check_timeout(timeout)
    completions = Completions(chunk_size, yield_obj_refs, timeout)
    completions.add(checked)
    return completions


def map_unordered(
    fn: Any,
    items: Iterable[Any],
    *,
    backpressure_size: int | None = DEFAULT_BACKPRESSURE_SIZE,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    yield_obj_refs: bool = False,
    timeout: float | None = None,
    fetch_local: bool = True,
) -> Completions:
    """Calls a remote function (or an actor's method) with each item, and iterates over the results as they are done.

    Items are taken from `items` as results are consumed: at most `backpressure_size` calls are unfinished or not
    consumed at any time; None calls it for all items at the first `next()`. The other arguments are those of
    `as_completed`, and so is what happens on an error. An error of `items` itself ends the supply: it is raised once,
    and the results of what was submitted still come.

    Raises TypeError when `fn` is no remote function with one result, or `items` cannot be iterated, ValueError for
    sizes below 1.
    """
    submit = getattr(fn, "remote", None)
    if not callable(submit):
        raise TypeError(f"map_unordered calls a remote function: decorate {fn!r:.80} with @ftray.remote")
    if backpressure_size is not None:
        _at_least_1("backpressure_size", backpressure_size)
    _at_least_1("chunk_size", chunk_size)
    check_timeout(timeout)
    return _Mapped(submit, iter(items), backpressure_size, chunk_size, yield_obj_refs, timeout)


class Completions(Iterator[Any]):
    """What `as_completed` returns; `close()` lets go of what has not come yet. For one thread at a time."""

    def __init__(self, chunk_size: int, yield_obj_refs: bool, timeout_s: float | None) -> None:
        self._core = core = get_core()
        self._chunk_size = chunk_size
        self._yield_obj_refs = yield_obj_refs
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._held: dict[bytes, ObjectRef[Any]] = {}
        """References whose results have not come yet."""
        self._batch: deque[bytes] = deque()
        self._read: dict[bytes, Any] = {}
        self._arrivals = Arrivals(core)

    def add(self, refs: Sequence[ObjectRef[Any]]) -> None:
        """More references to wait for. Raises ValueError for one that is waited for already."""
        ids = [ref._id for ref in refs]
        held = self._held
        for index, object_id in enumerate(ids):
            if object_id in held:
                for added in ids[:index]:
                    del held[added]
                raise ValueError(f"each reference is taken once; item {index} ({refs[index]!r}) is a duplicate")
            held[object_id] = refs[index]
        self._arrivals.add(ids)

    def __iter__(self) -> Completions:
        return self

    def __next__(self) -> Any:
        batch = self._batch
        if not batch:
            if not self._held:
                raise StopIteration
            self._next_batch()
        object_id = batch.popleft()
        ref = self._held.pop(object_id)
        if self._yield_obj_refs:
            return ref
        if object_id in self._read:
            return self._read.pop(object_id)
        return self._core.objects.get((ref,), None)[0]

    def _next_batch(self) -> None:
        arrivals = self._arrivals
        if not arrivals.arrived:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            if not arrivals.wait(left):
                pending = self._core.objects.describe_pending(list(self._held), self._timeout_s)
                raise GetTimeoutError(pending)
        for _ in range(min(self._chunk_size, len(arrivals.arrived))):
            self._batch.append(arrivals.arrived.popleft())
        if not self._yield_obj_refs:
            self._read_stored()

    def _read_stored(self) -> None:
        """Several values of the store are mapped with one request to the node."""
        core = self._core
        entries = core.entries
        stored = [x for x in self._batch if (entry := entries.get(x)) is not None and entry.state == IN_STORE]
        if len(stored) > 1:
            try:
                self._read.update(zip(stored, core.objects.load_stored(stored), strict=True))
            except Exception:
                pass  # one of them is lost or can't be unpickled: each will tell its own error

    def close(self) -> None:
        """Ends the iteration, and lets go of all results that have not come."""
        self._arrivals.close()
        self._batch.clear()
        self._read.clear()
        self._held.clear()

    def __enter__(self) -> Completions:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        arrivals = getattr(self, "_arrivals", None)  # missing when no session ran
        if arrivals is not None:
            arrivals.close()


class _Mapped(Completions):
    def __init__(
        self,
        submit: Callable[[Any], Any],
        items: Iterator[Any],
        limit: int | None,
        chunk_size: int,
        yield_obj_refs: bool,
        timeout_s: float | None,
    ) -> None:
        super().__init__(chunk_size, yield_obj_refs, timeout_s)
        self._submit = submit
        self._items: Iterator[Any] | None = items
        self._limit = limit

    def __next__(self) -> Any:
        if self._items is not None and (self._limit is None or len(self._held) < self._limit):
            self._fill(self._items)
        return super().__next__()

    def _fill(self, items: Iterator[Any]) -> None:
        refs: list[ObjectRef[Any]] = []
        room = None if self._limit is None else self._limit - len(self._held)
        try:
            while room is None or len(refs) < room:
                try:
                    item = next(items)
                except BaseException as error:
                    self._items = None
                    if isinstance(error, StopIteration):
                        break
                    raise
                ref = self._submit(item)
                if not isinstance(ref, ObjectRef):
                    raise TypeError(
                        f"map_unordered calls functions with one result; this call returned {type(ref).__name__}"
                    )
                refs.append(ref)
        finally:
            self.add(refs)

    def close(self) -> None:
        self._items = None
        super().close()


def _at_least_1(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
