"""What runs in a pool's worker: an actor that calls functions, as a process of `multiprocessing.Pool` does.

Role: shell, in the worker. One call of `run` is one batch. An exception of the user's function is an answer like
others: `(False, exception)`, with the remote traceback as its cause. A third field says how long it took.

Batches may queue behind the one that runs. When that takes longer than `LONG_S`, a second thread (`_Relief`) answers in
their place that they have not begun, and the pool gives them to others.

Functions and classes of the program's `__main__` (and of whatever else cannot be imported) travel by value. Here they
share one set of globals for each module they come from, for as long as the worker lives, as they would in a forked
process: what the initializer has set is there for the tasks, and what a task has counted is there for the next. Names
that are not yet there are taken from what arrives; functions, classes and modules always are, so that a function
defined anew takes the place of the old.

Rejected: a set of globals for each pickle, which is what cloudpickle does: an initializer could then set nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from types import FunctionType, ModuleType
from typing import Any

from ftray.api.actor import exit_actor
from ftray.exceptions import ActorExit
from ftray.wire.messages import PushActorTask
from ftray.worker.core import get_core
from ftray.worker.serialization import deserialize, serialize

CALL, MAP, STAR = 0, 1, 2
"""What `items` of a batch is: `(args, kwargs)` of one call, a list of single arguments, or of tuples of arguments."""
PICKLED = 8
"""Added to these: `items` is a pickle of them."""
KEPT_MAX = 256
"""Functions that a worker keeps unpickled."""

LONG_S = 0.004
"""What runs longer than this has nothing queue behind it."""
LOOK_MAX_S = 0.1
HANDED_BACK = "ftray: not begun"
"""The answer for a batch that was handed back."""
HANDED_BACK_PICKLED = serialize(HANDED_BACK).to_bytes()

Answer = tuple[bool, Any, float]
"""(True, result or list of results, microseconds) or (False, exception, microseconds)."""


class PoolWorker:
    """See the module."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Callable[..., Any]] = {}
        self._relief = _Relief()
        _share_globals()

    def setup(self, initializer: bytes | None) -> Answer:
        """Runs the initializer; answers with the process id."""
        if initializer is not None:
            try:
                function, args = deserialize(initializer)
                function(*args)
            except ActorExit:
                raise
            except BaseException as error:
                return False, _carried(error), 0.0
        return True, os.getpid(), 0.0

    def run(self, kind: int, function: Any, keep: bool | None, items: Any) -> Answer:
        """Runs a batch. `function` is pickled; it is kept for later batches with `keep`, and is itself with None."""
        started = self._relief.begin()
        try:
            if keep is not None:
                function = self._load(function, keep)
            if kind & PICKLED:
                items = deserialize(items)
                kind -= PICKLED
            if kind == CALL:
                args, kwargs = items
                result = function(*args, **kwargs)
            elif kind == MAP:
                result = list(map(function, items))
            else:
                result = [function(*args) for args in items]
            return True, result, (time.perf_counter() - started) * 1e6
        except ActorExit:
            raise
        except BaseException as error:
            return False, _carried(error), (time.perf_counter() - started) * 1e6
        finally:
            self._relief.started = 0.0

    def _load(self, pickled: bytes, keep: bool) -> Callable[..., Any]:
        function = self._kept.get(pickled) if keep else None
        if function is None:
            function = deserialize(pickled)
            if keep:
                if len(self._kept) >= KEPT_MAX:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[bytes(pickled)] = function
        loaded: Callable[..., Any] = function
        return loaded

    def leave(self) -> None:
        """Ends the process."""
        exit_actor()


class _Relief(threading.Thread):
    """Looks every few milliseconds, while batches run, whether one of them has become long."""

    def __init__(self) -> None:
        super().__init__(name="ftray-pool-relief", daemon=True)
        self.started = 0.0
        """When the batch began that runs; 0 between batches."""
        self._wanted = threading.Event()
        self.start()

    def begin(self) -> float:
        """A batch begins, in the main thread."""
        self.started = started = time.perf_counter()
        if not self._wanted.is_set():
            self._wanted.set()
        return started

    def run(self) -> None:
        pause_s = LONG_S
        seen = 0.0
        idle = 0
        while True:
            time.sleep(pause_s)
            started = self.started
            if not started:
                idle += 1
                pause_s = LONG_S
                if idle > 10:
                    self._wanted.clear()
                    if not self.started:
                        self._wanted.wait()
                    idle = 0
            elif started == seen:
                hand_back()
                pause_s = min(2 * pause_s, LOOK_MAX_S)
            else:
                idle = 0
                pause_s = LONG_S
            seen = started


def hand_back() -> None:
    """Answers batches that have arrived and not begun, in their place."""
    executor = get_core().executor
    if executor is None:
        return
    reactor = executor.reactor
    kept: list[Any] = []
    found: list[Any] = []
    with reactor.lock:
        reactor.handle(reactor.poll_events(0, 64))
        while executor.pending:
            item = executor.pending.popleft()
            link, message, _ = item
            queued = link is not None and isinstance(message, PushActorTask) and message.method == "run"
            (found if queued else kept).append(item)
        executor.pending.extend(kept)
    if kept:
        executor.wake()  # what was read here is not readable any more
    for link, message, _ in found:
        executor.replies.succeed(link, message, HANDED_BACK, time.perf_counter(), False)
    if found:
        with reactor.lock:
            reactor.flush_dirty()


def _carried(error: BaseException) -> Any:
    if not isinstance(error, Exception):  # it would end the program that asks for the result
        name = type(error).__name__
        text = f"the function raised {name}({', '.join(map(repr, error.args))}) in a worker of the pool"
        stand_in = RuntimeError(text)
        return ExceptionWithTraceback(stand_in, error.__traceback__)
    return ExceptionWithTraceback(error, error.__traceback__)


def _share_globals() -> None:
    """Has cloudpickle give functions of one module one set of globals, in this process."""
    from cloudpickle import cloudpickle

    make, set_state = cloudpickle._make_function, cloudpickle._function_setstate
    modules: dict[str, dict[str, Any]] = {}

    def make_function(code: Any, base: dict[str, Any], name: Any, defaults: Any, closure: Any) -> Any:
        module = base.get("__name__")
        return make(code, base if module is None else modules.setdefault(module, base), name, defaults, closure)

    def set_function_state(function: Any, state: Any) -> None:
        attributes, slots = state
        there = function.__globals__
        slots["__globals__"] = {
            name: value
            for name, value in slots["__globals__"].items()
            if name not in there or isinstance(value, FunctionType | type | ModuleType)
        }
        set_state(function, (attributes, slots))

    cloudpickle._make_function, cloudpickle._function_setstate = make_function, set_function_state
