"""The engine of an executor: a queue of calls, how many are out as tasks, and the thread that completes futures.

Role: shell. The `FtrayExecutor` (`executor.py`) is what the user holds; the `Engine` outlives it while calls are left.
A call waits in the engine's queue, where it can be cancelled, until there is room; then it counts as running and is
one ftray task. One thread for each executor takes results as they come, reading the sockets itself, completes the
futures, and hands out what waits.

How many run at once is bounded by leases: the tasks of an executor are a scheduling class of their own, which asks for
`max_workers` leases at most. What is handed out beyond (so that no worker idles for a round trip) is bounded by
expected work, measured for each function: calls that take long or were never measured are handed out one for each
worker, short ones a few milliseconds ahead.

Rules:
- The engine's lock is held for moments: never while user code runs, pickles, or waits.
- One thread at a time hands out, in the order of submission.
- Futures are completed by the engine's thread, outside all locks; done-callbacks may submit.

Rejected: a thread for each future; several calls batched into one task (a call that has returned would wait for its
neighbour, and may be what the neighbour waits for); one call in flight for each worker (it idles for a round trip after
each); actors as workers (what queues behind a long call would stay there, where tasks are recalled).
"""

from __future__ import annotations

import contextvars
import functools
import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, Future, InvalidStateError
from threading import _register_atexit  # type: ignore[attr-defined]
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from ftray.api.objects import put
from ftray.api.remote_function import RemoteFunction
from ftray.exceptions import TaskError, WorkerCrashedError
from ftray.ownership.dispatch import ClassQueue
from ftray.util.arrivals import Arrivals
from ftray.util.errors import as_raised, remote_traceback
from ftray.util.executor_calls import (
    InitializerFailed,
    call,
    call_chunk,
    call_chunk_initialized,
    call_initialized,
    name_of,
)
from ftray.worker.core import Core, core_or_none
from ftray.worker.refs import ObjectRef
from ftray.worker.serialization import serialize, serialize_function

log = logging.getLogger("concurrent.futures")
"""The standard executors' logger: a failing initializer is told there."""

AHEAD_US = 4000
"""The work handed out for each worker, by measured time, the running call included."""
OVERHEAD_US = 10
"""What a call costs beyond its own time."""
INLINE_BYTES_MAX = 16 * 1024
"""A function or initializer whose pickle is larger goes to the store once, rather than with each call."""
LINGER_S = 0.002
"""How long the thread reads on when nothing is out: the next call then needs no thread to be woken."""
HAND_OUT_MAX = 32
"""Calls handed out, and results taken, between two looks at the other."""
HAND_OUT_FOR_OTHERS_MAX = 1000
"""Calls of other threads that one which submits hands out for them before it leaves that to the engine's thread."""


class BrokenFtrayExecutor(BrokenExecutor):
    """The executor takes no more calls: its initializer failed, or its ftray session has ended. Make a new executor."""


class CallCrashedError(WorkerCrashedError, BrokenExecutor):
    """The worker died while it ran the call, more often than `max_retries` allow. The executor itself goes on.

    It is a BrokenExecutor because that is what the standard library's process pool raises when a worker dies.
    """


# --- how many leases --------------------------------------------------------------------------------------------------

_spare_lock = threading.Lock()
_spare: weakref.WeakKeyDictionary[Core, dict[Any, list[ClassQueue]]] = weakref.WeakKeyDictionary()
"""Scheduling classes that ended executors have left, to be used again: they are never forgotten by the session."""


def _take_class(core: Core, like: ClassQueue, max_workers: int) -> tuple[Any, ClassQueue]:
    """A scheduling class with the needs of `like` that no other executor uses, and the kind it is."""
    kind = (max_workers, like.retriable, like.environment, *sorted(like.resources.items()))
    with _spare_lock:
        kinds = _spare.setdefault(core, {})
        spare = kinds.setdefault(kind, [])
        if spare:
            return kind, spare.pop()
    with core.lock:
        key = ("executor", os.urandom(8), kind)
        made = core.submitter.dispatcher.class_for(key, like.resources, like.name, like.retriable)
        made.want_max = min(made.want_max, max_workers)
        made.environment = like.environment
    return kind, made


def _leave_class(core: Core, kind: Any, left: ClassQueue) -> None:
    with _spare_lock:
        _spare[core][kind].append(left)


# --- a call -----------------------------------------------------------------------------------------------------------


class Target:
    """A function as the calls of it share it: the remote function that runs it, and what names it in the worker."""

    __slots__ = ("remote", "sent")

    def __init__(self, remote: RemoteFunction[Any, Any], sent: Any) -> None:
        self.remote = remote
        self.sent = sent

    def cost_us(self) -> int:
        mean_us = self.remote._info.mean_us
        return AHEAD_US if mean_us < 0 else min(AHEAD_US, int(mean_us) + OVERHEAD_US)


class Call:
    """One submitted call, from the queue to its result; `chunked`: a list of calls of one function."""

    __slots__ = ("args", "chunked", "cost_us", "function", "future", "kwargs", "ref")

    def __init__(
        self, future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        chunked: bool = False,
    ) -> None:  # fmt: skip
        self.future = future
        self.chunked = chunked
        self.function: Any = function
        self.args = args
        self.kwargs = kwargs
        self.cost_us = 0
        self.ref: ObjectRef[Any] | None = None


# --- the engine -------------------------------------------------------------------------------------------------------


class Engine:
    """See the module. Lives as long as its executor or its thread."""

    def __init__(
        self, core: Core, max_workers: int, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.core = core
        self.pid = os.getpid()
        self.max_workers = max_workers
        self.lock = threading.RLock()
        """Re-entrant, since a finaliser may submit while this thread holds it."""
        self.queue: deque[Call] = deque()
        self.out: dict[bytes, Call] = {}
        """Calls that are tasks, by the id of their result."""
        self.running = 0
        """Calls handed out or being handed out."""
        self.load_us = 0
        self.handing_out = False
        self.closing = False
        self.broken = ""
        self.broken_by: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.sleeping = False
        self.bell = threading.Lock()
        self.bell.acquire()
        self.arrivals = Arrivals(core)
        self.targets: list[weakref.WeakKeyDictionary[Any, Target]] = [
            weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary(),
        ]  # fmt: skip
        """By function, for single calls and for chunks."""
        self.prefix: tuple[Any, ...] = ()
        self.initializer = (initializer, tuple(initargs)) if initializer is not None else None
        in_worker = (call, call_chunk) if initializer is None else (call_initialized, call_chunk_initialized)
        self.remotes: list[RemoteFunction[Any, Any]] = [RemoteFunction(each, options) for each in in_worker]
        self.own_class: tuple[Any, ClassQueue] | None = None
        self.context = contextvars.copy_context()
        """Of whoever made the executor: inside a task, the calls are that task's children."""

    # --- submitting --------------------------------------------------------------------------------------------------

    def add(self, new: Sequence[Call]) -> None:
        """Queues calls, and hands out what there is room for. Raises RuntimeError when none is taken any more."""
        with self.lock:
            self.check_open()
            if self.thread is None:
                thread = threading.Thread(target=self.context.run, args=(self.run,), name="ftray-executor", daemon=True)
                thread.start()
                self.thread = thread
                _engines.add(self)
            self.queue.extend(new)
        self.hand_out(len(new) + HAND_OUT_FOR_OTHERS_MAX)
        if self.sleeping:
            self.ring()

    def check_open(self) -> None:
        """Raises BrokenFtrayExecutor or RuntimeError."""
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if not self.broken and core_or_none() is not self.core:
            self.broken = "its ftray session has ended: ftray.shutdown() was called"
        if self.broken:
            raise self.broken_error()
        if self.closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def broken_error(self) -> BrokenFtrayExecutor:
        error = BrokenFtrayExecutor(f"the executor takes no more calls: {self.broken}")
        error.__cause__ = self.broken_by
        return error

    def target(self, function: Callable[..., Any], chunked: bool) -> Target:
        """How a function travels. Raises SerializationError when it can't.

        Plain functions are pickled once for the executor; those with a closure, methods and other callables each time,
        for what they hold may have changed.
        """
        if isinstance(function, FunctionType):
            stays = function.__closure__ is None
        elif isinstance(function, BuiltinFunctionType):
            stays = isinstance(function.__self__, ModuleType)
        else:
            stays = isinstance(function, type)
        kin: Any = function if stays else _kin(function)
        known = self.targets[chunked].get(kin)
        if known is None:
            known = Target(self.remote_for(name_of(function), chunked), None)
            if stays:
                data: Any = serialize_function(function)[0]
                known.sent = data if len(data) <= INLINE_BYTES_MAX else put(data)
            self.targets[chunked][kin] = known
        if stays:
            return known
        return Target(known.remote, function)

    def remote_for(self, name: str, chunked: bool) -> RemoteFunction[Any, Any]:
        """A remote function that is measured by itself, in the class of this executor."""
        made = self.remotes[chunked].options(name=name)
        made._bind(self.core)
        if self.own_class is None:
            self.own_class = _take_class(self.core, made._class, self.max_workers)
            if self.initializer is not None:
                packed = serialize(self.initializer, "initializer").to_bytes()
                sent = packed if len(packed) <= INLINE_BYTES_MAX else [put(packed)]
                self.prefix = (os.urandom(16), sent)
        made._class = self.own_class[1]
        return made

    # --- handing out -------------------------------------------------------------------------------------------------

    def hand_out(self, at_most: int) -> None:
        """Makes tasks of queued calls while there is room. At most one thread is in here: the others leave it to it."""
        with self.lock:
            if self.handing_out or not self.queue:
                return
            self.handing_out = True
        launched: list[bytes] = []
        try:
            while at_most > 0:
                at_most -= 1
                next_call = self.next_call()
                if next_call is not None and self.launch(next_call):
                    assert next_call.ref is not None
                    launched.append(next_call.ref._id)
                if launched and (next_call is None or len(launched) >= HAND_OUT_MAX):
                    watched, launched = launched, []
                    self.arrivals.add(watched)
                if next_call is None:
                    with self.lock:
                        if not self.queue or not self.has_room():
                            self.handing_out = False
                            return
        except BaseException:
            self.leave_handing_out(launched)  # an interrupted main thread
            raise
        self.leave_handing_out(launched)

    def leave_handing_out(self, launched: list[bytes]) -> None:
        """The engine's thread goes on with it."""
        with self.lock:
            self.handing_out = False
        if launched:
            self.arrivals.add(launched)
        with self.core.lock:
            self.arrivals.wake()
        self.ring()

    def has_room(self) -> bool:
        return self.load_us < self.max_workers * AHEAD_US

    def next_call(self) -> Call | None:
        """Takes the first call that nobody has cancelled, and counts it as running; None when there is no room."""
        with self.lock:
            while self.queue and self.has_room():
                taken = self.queue.popleft()
                try:
                    if not taken.future.set_running_or_notify_cancel():
                        continue
                except (RuntimeError, InvalidStateError):
                    continue  # completed by somebody else
                self.running += 1
                taken.cost_us = AHEAD_US  # until its function is known
                self.load_us += AHEAD_US
                return taken
            return None

    def launch(self, taken: Call) -> bool:
        """Makes a task of a call; what can't be pickled fails its future. False when there is no task."""
        try:
            if self.broken:
                raise self.broken_error()
            if core_or_none() is not self.core:
                self.break_down("its ftray session has ended: ftray.shutdown() was called", None)
                raise self.broken_error()
            target = self.target(taken.function, taken.chunked)
            ref: ObjectRef[Any] = target.remote.remote(*self.prefix, target.sent, *taken.args, **taken.kwargs)
        except BaseException as error:
            self.count_down((taken,))
            _complete(taken.future, None, error)
            if not isinstance(error, Exception):
                raise
            return False
        taken.ref = ref
        # What the call holds of the user's is the task's from here on.
        taken.function = taken.args = taken.kwargs = None  # type: ignore[assignment]
        with self.lock:
            self.out[ref._id] = taken
            cost_us = target.cost_us()
            self.load_us += cost_us - taken.cost_us
            taken.cost_us = cost_us
        return True

    def count_down(self, done: Iterable[Call]) -> None:
        with self.lock:
            for each in done:
                self.running -= 1
                self.load_us -= each.cost_us

    # --- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Takes results until the executor is closed and nothing is left."""
        try:
            self.serve()
            if self.own_class is not None and not self.core.closed:
                _leave_class(self.core, *self.own_class)
        except BaseException as error:  # a fault of ours: nobody may be left waiting
            log.exception("the thread of an executor failed")
            self.break_down(f"its thread failed with {type(error).__name__}: {error}", error)
            for each in list(self.out.values()):
                _complete(each.future, None, self.broken_error())

    def serve(self) -> None:
        while True:
            # Without an end only while something is out that is sure to arrive.
            if self.wait(None if self.out else LINGER_S):
                self.take()
                continue
            with self.lock:
                if not self.running and not self.queue:
                    if self.closing or _exiting:
                        return
                    self.sleeping = True
            if self.sleeping:
                self.bell.acquire()
                self.sleeping = False
            else:
                self.hand_out(sys.maxsize)  # the room is the bound

    def wait(self, timeout_s: float | None) -> bool:
        """Whether something has arrived, or anything is out of a session that is over."""
        try:
            return self.arrivals.wait(timeout_s)
        except (OSError, ValueError):
            if not self.core.closed:
                raise
            return bool(self.arrivals.arrived)  # the sockets were closed under us

    def take(self) -> None:
        """Completes the futures of what has arrived, after handing out what that made room for."""
        arrived = self.arrivals.arrived
        done: list[Call] = []
        while arrived and len(done) < HAND_OUT_MAX:
            done.append(self.out.pop(arrived.popleft()))
        self.count_down(done)
        if self.queue:
            self.hand_out(sys.maxsize)  # the room is the bound
        done.reverse()
        while done:
            self.complete(done.pop())

    def complete(self, done: Call) -> None:
        ref, future = done.ref, done.future
        done.ref = None
        try:
            value = self.core.objects.get((ref,), None)[0]
        except BaseException as error:
            ref = None
            if isinstance(error, TaskError) and isinstance(error.cause, InitializerFailed):
                self.initializer_failed(error)
                error = self.broken_error()
            else:
                error = own_error(error)
            _complete(future, None, error)
            del error
        else:
            ref = None
            _complete(future, value, None)
            del value

    # --- the end -----------------------------------------------------------------------------------------------------

    def initializer_failed(self, error: TaskError) -> None:
        failed = error.cause
        assert failed is not None
        cause = failed.__cause__ or failed
        if self.broken:
            return
        if cause.__cause__ is None:
            cause.__cause__ = remote_traceback(error)
        log.critical("Exception in initializer:", exc_info=cause)
        self.break_down(f"its initializer raised {type(cause).__name__}: {cause}", cause)

    def break_down(self, why: str, cause: BaseException | None) -> None:
        """Fails all that is queued, and what is submitted from now on."""
        with self.lock:
            if self.broken:
                return
            self.broken, self.broken_by = why, cause
            left = list(self.queue)
            self.queue.clear()
        for each in left:
            try:
                if each.future.set_running_or_notify_cancel():
                    _complete(each.future, None, self.broken_error())
            except (RuntimeError, InvalidStateError):
                pass

    def close(self, cancel_futures: bool) -> None:
        """No more calls are taken; with `cancel_futures` those that are queued are cancelled."""
        left: list[Call] = []
        with self.lock:
            self.closing = True
            if cancel_futures:
                left = list(self.queue)
                self.queue.clear()
        for each in left:
            if each.future.cancel():
                try:
                    each.future.set_running_or_notify_cancel()  # tells those who wait in `futures.wait`
                except (RuntimeError, InvalidStateError):
                    pass  # another thread was faster
        self.ring()

    def refs_out(self) -> list[ObjectRef[Any]]:
        """The results of calls that are out."""
        with self.lock:
            return [each.ref for each in list(self.out.values()) if each.ref is not None]

    def ring(self) -> None:
        """Wakes the thread if it sleeps. Takes no lock: finalisers call this."""
        try:
            self.bell.release()
        except RuntimeError:
            pass  # it has been rung

    def join(self) -> None:
        thread = self.thread
        if thread is not None and thread is not threading.current_thread() and self.pid == os.getpid():
            thread.join()


def _kin(function: Callable[..., Any]) -> Any:
    """What callables with much the same running time have in common, for measuring them together."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    return code if code is not None else type(function)


def _complete(future: Future[Any], value: Any, error: BaseException | None) -> None:
    """Sets a future's outcome; its callbacks run here."""
    try:
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
    except InvalidStateError:
        pass  # completed by somebody else
    except BaseException:  # the future itself logs and drops what is an Exception
        if threading.current_thread() is threading.main_thread():
            raise
        log.exception("a done-callback of %r failed", future)


def own_error(error: BaseException) -> BaseException:
    """What a future raises: the call's exception as it was, or a CallCrashedError for the death of its worker."""
    error.__traceback__ = None
    if isinstance(error, TaskError):
        return as_raised(error)
    if isinstance(error, WorkerCrashedError):
        return CallCrashedError(error.death if error.death is not None else error.reason)
    return error


# --- the end of the program -------------------------------------------------------------------------------------------

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_exiting = False


def _finish_all() -> None:
    """Before the interpreter ends, and ftray's session with it, what was submitted is done, as in standard pools."""
    global _exiting
    _exiting = True
    engines = [engine for engine in list(_engines) if engine.pid == os.getpid()]
    for engine in engines:
        engine.ring()
    for engine in engines:
        engine.join()


_register_atexit(_finish_all)
