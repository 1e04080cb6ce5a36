"""`Pool`: the interface and the semantics of `multiprocessing.Pool`; its workers are actors.

Role: shell: checks of arguments, cutting work into batches, the states of a pool. The work is the engine's.

What is better than in the standard library: a worker that dies is replaced, and the batch it had is run again (up to
three times; then its error says how the worker died); results that are waited for when the pool is terminated fail with
`PoolTerminatedError` instead of never coming; functions need not be importable.

Rejected: tasks instead of actors (no process of its own for an initializer, no way to end what runs).
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.pool import CLOSE, RUN, TERMINATE
from typing import Any

from ftray.api.context import cluster_resources
from ftray.api.lifecycle import init, is_initialized
from ftray.exceptions import FtrayError, TaskCancelledError
from ftray.util.multiprocessing.crew import Batch, Function
from ftray.util.multiprocessing.engine import Engine
from ftray.util.multiprocessing.results import AsyncResult, IMapIterator, IMapUnorderedIterator
from ftray.util.multiprocessing.worker import CALL, MAP, STAR
from ftray.worker.core import core_or_none
from ftray.worker.serialization import dump_inband

log = logging.getLogger("ftray.util")

AHEAD_PER_WORKER = 64
"""How many batches `imap` takes from its iterable before they are done, for each worker."""


class PoolTerminatedError(TaskCancelledError):
    """The pool was terminated before the call was done."""

    def __init__(self, message: str = "the pool was terminated before the call was done") -> None:
        super().__init__()
        self.args = (message,)


class BrokenPoolError(FtrayError, RuntimeError):
    """No worker of the pool can start: its initializer raises, or its `ray_remote_args` cannot be met. See the
    cause."""


class Pool:
    """A pool of worker processes, as `multiprocessing.Pool`.

    `processes` is their number (default: the CPUs of the cluster). `initializer(*initargs)` runs in each when it
    starts. `maxtasksperchild` is how many batches a worker does before another takes its place. `context` is accepted
    and changes nothing. Without a session one is started as by `ftray.init`, at `ray_address` (or `ftray_address`) if
    it is given. `ray_remote_args` are options of the workers' actors (`{"num_cpus": 1, "resources": {...}}`); without
    any they reserve no CPU, so that there may be more of them than CPUs.

    Raises ValueError and TypeError for wrong arguments, SerializationError for an initializer that cannot be pickled.
    An error of the initializer is raised by the results.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: dict[str, Any] | None = None,
        *,
        ftray_address: str | None = None,
    ) -> None:
        self._state = CLOSE  # until there is something to end
        if processes is not None:
            if isinstance(processes, bool) or not isinstance(processes, int):
                raise TypeError(f"processes must be a whole number, not {processes!r}")
            if processes < 1:
                raise ValueError(f"Number of processes must be at least 1, not {processes}")
        if maxtasksperchild is not None and (
            isinstance(maxtasksperchild, bool) or not isinstance(maxtasksperchild, int) or maxtasksperchild < 1
        ):
            raise ValueError(f"maxtasksperchild must be a positive int or None, not {maxtasksperchild!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if ray_remote_args is not None and not isinstance(ray_remote_args, dict):
            raise TypeError(f"ray_remote_args must be a dict of options, not {type(ray_remote_args).__name__}")
        if ray_address and ftray_address and ray_address != ftray_address:
            raise ValueError("ray_address and ftray_address are two names for one thing: give one of them")
        if context is not None:
            log.info("the argument `context` of a pool changes nothing: its workers are started by the cluster")
        address = ftray_address or ray_address
        if not is_initialized():
            if address:
                init(address)
            else:
                init(num_cpus=processes)
        if processes is None:
            processes = max(1, int(cluster_resources().get("CPU", 1)))
        setup = None if initializer is None else dump_inband((initializer, tuple(initargs or ())))
        self._processes = processes
        self._engine = Engine(processes, setup, maxtasksperchild, {"num_cpus": 0, **(ray_remote_args or {})})
        self._state = RUN

    # --- one call ----------------------------------------------------------------------------------------------------

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: dict[str, Any] | None = None) -> Any:
        """`func(*args, **kwds)` in a worker; waits for the result. Raises what it raises."""
        engine = self._check_running()
        _check_callable(func)
        items = (tuple(args or ()), dict(kwds or {}))
        ok, value = engine.call(lambda: AsyncResult(self, engine, 1, True, None, None), func, items)
        if ok:
            return value
        raise value

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: dict[str, Any] | None = None,
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """As `apply`, without waiting. `callback` is called with the result, or `error_callback` with the exception."""
        engine = self._check_running()
        _check_callable(func)
        items = (tuple(args or ()), dict(kwds or {}))
        result = AsyncResult(self, engine, 1, True, callback, error_callback)
        self._submit(engine, result, CALL, func, [items])
        return result

    # --- many calls --------------------------------------------------------------------------------------------------

    def map(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """`func` of each item, as a list; batches of `chunksize` items go to a worker together. Raises what the first
        batch that failed raised, once all are done."""
        return self._map_async(func, iterable, MAP, chunksize).get()  # type: ignore[no-any-return]

    def starmap(self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """As `map`, for `func(*item)`."""
        return self._map_async(func, iterable, STAR, chunksize).get()  # type: ignore[no-any-return]

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """As `map`, without waiting."""
        return self._map_async(func, iterable, MAP, chunksize, callback, error_callback)

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """As `starmap`, without waiting."""
        return self._map_async(func, iterable, STAR, chunksize, callback, error_callback)

    def _map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        kind: int,
        chunksize: int | None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        engine = self._check_running()
        _check_callable(func)
        if chunksize is not None:
            _check_chunksize(chunksize)
        items = list(iterable)
        if chunksize is None:
            chunksize = -(-len(items) // (self._processes * 4)) or 1
        batches = [items[i : i + chunksize] for i in range(0, len(items), chunksize)]
        result = AsyncResult(self, engine, len(batches), False, callback, error_callback)
        if batches:
            self._submit(engine, result, kind, func, batches)
        return result

    def _submit(self, engine: Engine, job: AsyncResult, kind: int, func: Any, batches: list[Any]) -> None:
        try:
            function = engine.function(func)
        except Exception as error:  # it cannot be pickled: that is the job's result
            for index in range(len(batches)):
                job.deliver(Batch(job, index, kind, Function(None, None), None), False, error)
            return
        sizes = [1 if kind == CALL else len(items) for items in batches]
        engine.submit([Batch(job, index, kind, function, items, sizes[index]) for index, items in enumerate(batches)])

    # --- iterators ---------------------------------------------------------------------------------------------------

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> IMapIterator:
        """`func` of each item, as an iterator in the order of the items.

        Items are taken from `iterable` in a thread of its own, a few for each worker ahead of what is done. An
        exception that it raises comes in the place of the batch that was being filled, and ends the iteration.
        """
        return self._imap(func, iterable, chunksize, IMapIterator)

    def imap_unordered(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> IMapIterator:
        """As `imap`, with the results in the order in which batches are done."""
        return self._imap(func, iterable, chunksize, IMapUnorderedIterator)

    def _imap(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int, kind: type[IMapIterator]
    ) -> IMapIterator:
        engine = self._check_running()
        _check_callable(func)
        _check_chunksize(chunksize)
        items = iter(iterable)
        results = kind(self, engine)
        ahead = threading.Semaphore(self._processes * AHEAD_PER_WORKER)
        results.on_delivery = ahead.release
        with engine.lock:
            engine.crew.feeds += 1
        threading.Thread(
            target=_feed, args=(engine, results, func, items, chunksize, ahead), name="ftray-pool-feed", daemon=True
        ).start()
        return results

    # --- the states of a pool ----------------------------------------------------------------------------------------

    def _check_running(self) -> Engine:
        if self._state != RUN:
            raise ValueError("Pool not running")
        engine = self._engine
        if core_or_none() is not engine.core:
            raise ValueError("Pool not running: the session it was made in is over")
        broken = engine.crew.broken
        if broken is not None:
            raise BrokenPoolError(f"no worker of the pool can start: {broken}") from broken
        return engine

    def close(self) -> None:
        """No more work is taken; workers exit when what there is has been done."""
        if self._state == RUN:
            self._state = CLOSE
            self._engine.close()

    def terminate(self) -> None:
        """Ends the workers at once; results that are not there yet fail with PoolTerminatedError."""
        if self._state != TERMINATE or not self._engine.stopped:
            self._state = TERMINATE
            self._engine.terminate(PoolTerminatedError())

    def join(self) -> None:
        """Waits until the workers have exited. Raises ValueError unless `close` or `terminate` was called."""
        if self._state == RUN:
            raise ValueError("Pool is still running")
        engine = self._engine
        engine.wait_until(lambda: engine.stopped)
        if engine.thread is not threading.current_thread():
            engine.thread.join()

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.terminate()

    def __del__(self) -> None:
        if self._state == RUN:
            warnings.warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._engine.abandon()

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __repr__(self) -> str:
        return f"<ftray.util.multiprocessing.Pool state={self._state} processes={getattr(self, '_processes', 0)}>"

    @property
    def _pool(self) -> list[int]:
        """One number for each worker; programs ask for its length."""
        return list(self._engine.crew.members)


def _feed(
    engine: Engine,
    results: IMapIterator,
    func: Callable[[Any], Any],
    items: Iterator[Any],
    chunksize: int,
    ahead: threading.Semaphore,
) -> None:
    """The thread behind an `imap`."""
    try:
        function = engine.function(func)
        while True:
            ahead.acquire()
            if engine.crew.broken is not None:
                break
            batch = list(islice(items, chunksize))
            if not batch:
                break
            engine.submit([Batch(results, results.next_number(), MAP, function, batch, len(batch))])
    except BaseException as error:
        results.put(results.next_number(), False, error)
    finally:
        with engine.lock:
            engine.crew.feed_ended()
        results.fed()
        engine.act()
        engine.stop_if_over()


def _check_callable(func: Any) -> None:
    if not callable(func):
        raise TypeError(f"func must be callable, not {type(func).__name__}")


def _check_chunksize(chunksize: int) -> None:
    if isinstance(chunksize, bool) or not isinstance(chunksize, int):
        raise TypeError(f"chunksize must be a whole number, not {chunksize!r}")
    if chunksize < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize}")
