"""What the asynchronous methods of a pool return: results to wait for, and iterators over results as they come.

Role: shell between the engine, which delivers the outcome of batches from any thread, and the user's threads that wait.

Rules: an outcome is delivered once for each batch; what comes after `abort` is ignored. Callbacks run in the pool's
thread, before the result counts as ready, and one that raises is logged and hurts nobody. A job holds its pool until it
is done, as in the standard library: a pool does not end under a result that somebody waits for.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from multiprocessing import TimeoutError
from typing import TYPE_CHECKING, Any

from ftray.util.multiprocessing.crew import Batch

if TYPE_CHECKING:
    from ftray.util.multiprocessing.engine import Engine

log = logging.getLogger("ftray.util")


class AsyncResult:
    """The result of `apply_async`, `map_async` or `starmap_async`."""

    def __init__(
        self,
        pool: Any,
        engine: Engine,
        parts: int,
        single: bool,
        callback: Callable[[Any], Any] | None,
        error_callback: Callable[[BaseException], Any] | None,
    ) -> None:
        self._pool = pool
        self._engine = engine
        self._single = single
        self._callback = callback
        self._error_callback = error_callback
        self._parts: list[Any] = [None] * parts
        self._left = parts
        self._success = True
        self._value: Any = None
        self._done = False
        engine.add_job(self)
        if not parts:
            self._complete()

    # --- for the user ------------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the call has completed, its callback included."""
        return self._done

    def successful(self) -> bool:
        """Whether it completed without an exception. Raises ValueError when it is not ready."""
        if not self._done:
            raise ValueError(f"{self!r} not ready")
        return self._success

    def wait(self, timeout: float | None = None) -> None:
        """Waits until it is ready, at most `timeout` seconds."""
        if not self._done:
            self._engine.wait_until(self.ready, timeout)

    def get(self, timeout: float | None = None) -> Any:
        """The result; waits for it. Raises the exception of the call (of the first batch that failed, for a map), or
        `multiprocessing.TimeoutError` when it is not ready within `timeout` seconds."""
        self.wait(timeout)
        if not self._done:
            raise TimeoutError(f"no result within {timeout:g} s")
        if self._success:
            return self._value
        raise self._value

    def outcome(self) -> tuple[bool, Any]:
        """Waits, and returns (True, result) or (False, exception)."""
        self.wait()
        return self._success, self._value

    # --- for the engine ----------------------------------------------------------------------------------------------

    def deliver(self, batch: Batch, ok: bool, value: Any) -> None:
        """The outcome of a batch, from any thread."""
        with self._engine.lock:
            if self._left <= 0:
                return
            if ok:
                self._parts[batch.index] = value
            elif self._success:
                self._success, self._value = False, value
            self._left -= 1
            if self._left:
                return
        self._complete()

    def _complete(self) -> None:
        if self._success:
            self._value = self._parts[0] if self._single else list(chain.from_iterable(self._parts))
        self._parts = []
        if (self._callback if self._success else self._error_callback) is None:
            self._set_done()
        else:
            self._engine.inbox.put(self._call_back)

    def _call_back(self) -> None:
        callback = self._callback if self._success else self._error_callback
        assert callback is not None
        try:
            callback(self._value)
        except Exception:
            name = getattr(callback, "__qualname__", repr(callback))
            log.exception("a callback of a pool raised: %s", name)
        finally:
            self._set_done()

    def _set_done(self) -> None:
        self._callback = self._error_callback = None
        self._done = True
        self._pool = None
        self._engine.job_done(self)

    def abort(self, error: BaseException) -> None:
        """The pool was terminated. No callback is called."""
        with self._engine.lock:
            if self._left <= 0:
                return  # complete; its callback may still be waiting
            self._left = 0
            self._success, self._value, self._parts = False, error, []
        self._set_done()


class IMapIterator(Iterator[Any]):
    """The results of `imap` in the order of the items. An exception takes the place of its batch; iteration can go
    on."""

    def __init__(self, pool: Any, engine: Engine) -> None:
        self._pool = pool
        self._engine = engine
        self._outcomes: dict[int, tuple[bool, Any]] = {}
        """Delivered, and not taken: by number of the batch."""
        self._taken = 0
        self._submitted = 0
        self._delivered = 0
        self._fed = False
        self._ended = False
        """Nothing more will be delivered."""
        self._items: deque[Any] = deque()
        """Of the batch that is being handed out."""
        self.on_delivery: Callable[[], Any] | None = None
        """Tells a feed that there is room."""
        engine.add_job(self)

    # --- for the user ------------------------------------------------------------------------------------------------

    def __iter__(self) -> IMapIterator:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next result; waits for it. Raises its exception, StopIteration after the last, or
        `multiprocessing.TimeoutError` when there is none within `timeout` seconds."""
        while not self._items:
            if not self._there() and not self._engine.wait_until(self._there, timeout):
                raise TimeoutError(f"no result within {timeout:g} s")
            with self._engine.lock:
                number = self._number()
                outcome = self._outcomes.pop(number, None)
                if outcome is None:
                    raise StopIteration
                self._taken += 1
            ok, value = outcome
            if not ok:
                raise value
            self._items.extend(value)
        return self._items.popleft()

    def _there(self) -> bool:
        return self._ended or self._number() in self._outcomes

    def _number(self) -> int:
        return self._taken

    # --- for the engine and the feed ---------------------------------------------------------------------------------

    def next_number(self) -> int:
        """The number of a batch that is about to be submitted."""
        with self._engine.lock:
            self._submitted += 1
            return self._submitted - 1

    def deliver(self, batch: Batch, ok: bool, value: Any) -> None:
        """The outcome of a batch, from any thread."""
        self.put(batch.index, ok, value)

    def put(self, number: int, ok: bool, value: Any) -> None:
        """An outcome: of a batch, or an exception in the place of one."""
        with self._engine.lock:
            if self._ended:
                return
            self._outcomes[number] = (ok, value)
            self._delivered += 1
        if self.on_delivery is not None:
            self.on_delivery()
        self._end_if_all()

    def fed(self) -> None:
        """All batches are submitted."""
        self._fed = True
        self._end_if_all()

    def _end_if_all(self) -> None:
        with self._engine.lock:
            ended = self._fed and self._delivered == self._submitted and not self._ended
            if ended:
                self._ended = True
                self._pool = None
        if ended:
            self._engine.job_done(self)
        else:
            self._engine.notify()

    def abort(self, error: BaseException) -> None:
        """The pool was terminated: one exception takes the place of all that is left."""
        with self._engine.lock:
            if self._ended:
                return
            self._ended = True
            self._pool = None
            number = self._taken
            while number in self._outcomes:
                number += 1
            self._outcomes[number] = (False, error)
        if self.on_delivery is not None:
            self.on_delivery()
        self._engine.job_done(self)


class IMapUnorderedIterator(IMapIterator):
    """The results of `imap_unordered`, as they come."""

    def _number(self) -> int:
        return next(iter(self._outcomes), -1)
