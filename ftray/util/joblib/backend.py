"""The joblib backend: each batch of calls is a call of an `FtrayExecutor`.

Role: shell between joblib's interface for backends and ours. joblib decides how many calls make a batch (it measures
them) and dispatches the next when one is done; here a batch becomes a task, and its future tells joblib.

Large numpy arrays among the arguments go to the store once for each call of `Parallel`, however many batches take
them, and are read there without a copy; they are read-only in the calls, as with joblib's own process backend. An array
that is changed between two calls that take it is not stored anew, also as there.

Inside a batch, nested `Parallel` calls use threads, and below that none: joblib's rule for a backend of processes.

Rejected: nested calls as tasks of their own (a batch that waits for them holds its worker, and small inner loops would
pay a round trip for each batch; who wants it can register and name the backend inside).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from copy import copy
from typing import Any

from joblib.parallel import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from ftray.api.context import cluster_resources
from ftray.api.lifecycle import init, is_initialized
from ftray.api.objects import put
from ftray.util.executor import FtrayExecutor
from ftray.worker.pickler import is_ndarray
from ftray.worker.refs import ObjectRef

SHARED_BYTES_MIN = 1 << 20
"""Arrays from this size on are stored once for all batches."""


class _Place:
    """Stands in a batch for an array that travels beside it."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def run_batch(batch: Any, *arrays: Any) -> Any:
    """In the worker: puts the arrays back into their places, and runs the batch."""
    if arrays:
        batch.items = [
            (
                function,
                tuple(arrays[each.index] if type(each) is _Place else each for each in args),
                {name: arrays[each.index] if type(each) is _Place else each for name, each in kwargs.items()},
            )
            for function, args, kwargs in batch.items
        ]
    return batch()


class _Shared:
    """Arrays that were stored, as long as the program has them."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[weakref.ref[Any], ObjectRef[Any]]] = {}

    def reference(self, array: Any) -> ObjectRef[Any]:
        key = id(array)
        known = self.stored.get(key)
        if known is not None and known[0]() is array:
            return known[1]
        stored = self.stored
        ref = put(array)
        stored[key] = (weakref.ref(array, lambda _: stored.pop(key, None)), ref)
        return ref

    def pack(self, batch: Any) -> tuple[Any, list[ObjectRef[Any]]]:
        """The batch with large arrays taken out, and references to them."""
        refs: dict[ObjectRef[Any], int] = {}

        def out(value: Any) -> Any:
            if not is_ndarray(type(value)) or value.nbytes < SHARED_BYTES_MIN or value.dtype.hasobject:
                return value
            return _Place(refs.setdefault(self.reference(value), len(refs)))

        items = [
            (function, tuple(map(out, args)), {name: out(value) for name, value in kwargs.items()})
            for function, args, kwargs in batch.items
        ]
        if refs:
            batch = copy(batch)
            batch.items = items
        return batch, list(refs)


class FtrayBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """See the module. `remote_args` are options of `@ftray.remote` for the tasks; `ray_remote_args` is the same."""

    supports_retrieve_callback = True
    supports_inner_max_num_threads = False
    supports_sharedmem = False
    uses_threads = False
    default_n_jobs = -1

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        remote_args: Mapping[str, Any] | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads, **others)
        self._remote_args = {**(ray_remote_args or {}), **(remote_args or {})}
        self._executor: FtrayExecutor | None = None
        self._shared = _Shared()
        self.parallel: Any = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many calls run at once: negative numbers count from the cluster's CPUs, -1 is all of them.

        Raises ValueError for 0.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs > 0:
            return n_jobs
        if not is_initialized():
            init()
        cpus = cluster_resources().get("CPU", 1.0)
        needs = self._remote_args.get("num_cpus") or 1.0
        return max(int(cpus / needs) + 1 + n_jobs, 1)

    def configure(
        self, n_jobs: int = 1, parallel: Any = None, prefer: Any = None, require: Any = None, **others: Any
    ) -> int:
        """Begins a call of `Parallel`. A single job runs in this process, as with joblib's own backends."""
        jobs = self.effective_n_jobs(n_jobs)
        if jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        self._executor = FtrayExecutor(jobs, **self._remote_args)
        return jobs

    def submit(self, func: Any, callback: Callable[[Any], Any] | None = None) -> Future[Any]:
        """Runs a batch; `callback` is called with its future when that is done."""
        executor = self._executor
        if executor is None:
            raise RuntimeError("this call of Parallel is over")
        batch, arrays = self._shared.pack(func)
        future: Future[Any] = executor.submit(run_batch, batch, *arrays)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit
    """The name of `submit` before joblib 1.5."""

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """The results of a batch, or what it raised."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Nothing that was dispatched is wanted any more."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.terminate_workers()
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)

    def terminate(self) -> None:
        """The call of `Parallel`, or the block that keeps the backend, is over."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
        self._shared = _Shared()
        self.reset_batch_stats()
