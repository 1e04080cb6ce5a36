"""`FtrayExecutor`: the standard library's `concurrent.futures.Executor` on ftray tasks.

Role: shell; the interface, around `executor_engine.py`. It holds to what users of `ProcessPoolExecutor` know, with
three differences: the workers are the cluster's; the death of a worker repeats its call rather than breaking the
executor; functions need not be importable.

An executor starts a session when none runs, because a program that moves here from a process pool has no place to do
it, and never ends one: a session belongs to the process, and by the time the executor is shut down others may use it.

Rejected: refusing to work without `ftray.init()` (nothing is gained: what it would start is what the user is told to
start); ending the session that it started (references that the program still holds would fail, far from the cause).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor as BaseExecutor
from concurrent.futures import Future
from itertools import chain, islice
from typing import Any, ParamSpec, TypeVar

from ftray.api.context import cluster_resources
from ftray.api.lifecycle import init, is_initialized
from ftray.api.packaging import portable
from ftray.api.remote_function import RemoteFunction
from ftray.util.executor_calls import call
from ftray.util.executor_engine import BrokenFtrayExecutor, Call, CallCrashedError, Engine
from ftray.worker.core import get_core

P = ParamSpec("P")
T = TypeVar("T")

__all__ = ["BrokenFtrayExecutor", "CallCrashedError", "Executor", "FtrayExecutor"]

class FtrayExecutor(BaseExecutor):
    """Runs calls as ftray tasks, behind the interface of `concurrent.futures`.

    Starts a session with `ftray.init()` when none runs; that session stays until the program ends or calls
    `ftray.shutdown()`, for others may have come to use it.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        max_retries: int | None = None,
        **options: Any,
    ) -> None:
        """`max_workers` is how many calls may run at once, by default as many as the cluster has CPUs for.

        `initializer(*initargs)` runs once in each worker process before the first call of this executor there; when it
        raises, the executor breaks. `max_retries` says how often a call runs again after the death of its worker (by
        default as often as any task); with 0 a call runs once at most. The other options are those of `@ftray.remote`
        for functions (`num_cpus`, `num_gpus`, `memory`, `resources`, `retry_exceptions`, `runtime_env`, ...), and hold
        for each call.

        Raises ValueError and TypeError for wrong arguments, RuntimeEnvSetupError for a `runtime_env` that can't be
        packed, and what `ftray.init()` raises.
        """
        if max_workers is not None:
            if isinstance(max_workers, bool) or not isinstance(max_workers, int):
                raise TypeError(f"max_workers must be a whole number or None, not {max_workers!r}")
            if max_workers <= 0:
                raise ValueError(f"max_workers must be greater than 0, not {max_workers}")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a callable, not {initializer!r}")
        for name in ("num_returns", "name"):
            if name in options:
                raise TypeError(f"{name} is not an option of an executor: each call has one result and its own name")
        if max_retries is not None:
            options["max_retries"] = max_retries
        RemoteFunction(call, options)  # raises for wrong options, before anything is started
        if not is_initialized():
            init()
        if max_workers is None:
            needs = options.get("num_cpus")
            cpus = cluster_resources().get("CPU", 1.0)
            max_workers = max(1, int(cpus / needs) if needs else int(cpus))
        self._max_workers = max_workers
        core = get_core()
        # A folder of `runtime_env` is packed once, now, and not again with each function.
        self._engine = Engine(core, max_workers, initializer, initargs, portable(options, core))

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)  # missing when the arguments were wrong
        if engine is not None:
            # What was submitted is still done, and then the thread ends. Without the lock: this may run anywhere.
            engine.closing = True
            engine.ring()

    @property
    def _broken(self) -> str:
        return self._engine.broken

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Schedules `fn(*args, **kwargs)`; returns its future. References among the arguments stand for their values.

        Arguments are pickled when the call is handed to a worker; if that fails, the future has the SerializationError.
        The future can be cancelled until then. Raises TypeError when `fn` cannot be called, RuntimeError after
        `shutdown`, BrokenFtrayExecutor when the initializer has failed or the session has ended.
        """
        _check_callable(fn)
        future: Future[T] = Future()
        self._engine.add((Call(future, fn, args, kwargs),))
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like `map(fn, *iterables)`, but the calls run at once on the cluster; the results come in order.

        The iterables are read at once, or with `buffersize` as results are taken, that many calls ahead. `timeout` is
        in seconds from this call on, for each result. `chunksize` calls make one task. Iterating raises what a call
        raised (its whole chunk then has no results), and TimeoutError; what has not begun is cancelled.

        Raises as `submit`, and ValueError for sizes below 1.
        """
        _check_callable(fn)
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None:
            if isinstance(buffersize, bool) or not isinstance(buffersize, int):
                raise TypeError(f"buffersize must be a whole number or None, not {buffersize!r}")
            if buffersize < 1:
                raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else timeout + time.monotonic()
        engine = self._engine
        with engine.lock:
            engine.check_open()
        rows = zip(*iterables)
        if chunksize == 1:
            return _results(self, fn, rows, deadline, buffersize, False)
        chunks = ((chunk,) for chunk in iter(lambda: list(islice(rows, chunksize)), []))
        buffered = None if buffersize is None else -(-buffersize // chunksize)
        return chain.from_iterable(_results(self, fn, chunks, deadline, buffered, True))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more calls; with `wait`, returns when all that were taken are done.

        `cancel_futures` cancels those that have not been handed to a worker. The ftray session goes on.
        """
        self._engine.close(cancel_futures)
        if wait:
            self._engine.join()

    def terminate_workers(self) -> None:
        """Takes no more calls, cancels those that wait, and asks those that run to end (`ftray.cancel`).

        Their futures fail with TaskCancelledError, or complete if they were faster. Returns at once.
        """
        self._abandon(force=False)

    def kill_workers(self) -> None:
        """As `terminate_workers`, but workers that run a call of this executor are killed."""
        self._abandon(force=True)

    def _abandon(self, force: bool) -> None:
        import ftray

        engine = self._engine
        engine.close(cancel_futures=True)
        cancel = getattr(ftray, "cancel", None)
        if cancel is not None:
            for ref in engine.refs_out():
                cancel(ref, force=force)


Executor = FtrayExecutor


def _check_callable(fn: Any) -> None:
    if isinstance(fn, RemoteFunction):
        raise TypeError(f"{fn!r} is a remote function: call .remote(...), or give the executor its .__wrapped__")
    if not callable(fn):
        raise TypeError(f"an executor calls functions, but {fn!r:.80} is {type(fn).__name__}, which cannot be called")


def _results(
    executor: FtrayExecutor, fn: Callable[..., Any], rows: Iterator[Any], deadline: float | None, ahead: int | None,
    chunked: bool,
) -> Iterator[Any]:  # fmt: skip
    """Submits now, so that the calls run before the first result is asked for; returns the results' iterator."""

    def submit(some: Iterable[Any]) -> list[Future[Any]]:
        calls = [Call(Future(), fn, args, {}, chunked) for args in some]
        if calls:
            executor._engine.add(calls)
        return [each.future for each in calls]

    if ahead is None:
        return _iterate(deque(submit(rows)), deadline, None)
    # This one keeps the executor, which would be closed when the user drops it.
    return _iterate(deque(submit(islice(rows, ahead))), deadline, lambda: submit(islice(rows, 1)))


def _iterate(
    futures: deque[Future[Any]], deadline: float | None, more: Callable[[], list[Future[Any]]] | None
) -> Iterator[Any]:
    try:
        while futures:
            if more is not None:
                futures.extend(more())
            # Neither the future nor its result is held while the caller works with it.
            yield _result_of(futures.popleft(), deadline)
    finally:
        while futures:
            futures.pop().cancel()


def _result_of(future: Future[Any], deadline: float | None) -> Any:
    try:
        try:
            return future.result(None if deadline is None else deadline - time.monotonic())
        finally:
            future.cancel()
    finally:
        del future
