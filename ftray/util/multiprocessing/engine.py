"""What drives a pool: it carries out what the crew decides, and hands results to the jobs they belong to.

Role: shell. Two kinds of threads call `process`, which acts on the answers that have arrived:

- a thread that waits for a result (`wait_until`): it reads the answer itself, starts the next batch, and is done,
  without any handover;
- the pool's own thread, whenever nobody waits. It also runs the callbacks, one after another.

Rules: `lock` guards the crew and the counters of jobs, and is held neither over calls into the runtime nor over user
code. An interrupt in `process` or `act` leaves what was not done yet to the next who calls them. Whoever completes a
job wakes all who wait (`notify`); one of them may be blocked in reading, which the event descriptor ends.

Rejected: the pool's thread for all results (two handovers for each `apply`); starting batches from handlers under the
core's lock (they are serialised when they start).
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]
from queue import SimpleQueue
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from ftray.api.actor import ActorClass, ActorHandle, kill
from ftray.api.objects import put
from ftray.exceptions import ActorDiedError, ActorUnavailableError, FtrayError, GetTimeoutError, SerializationError
from ftray.util.arrivals import Arrivals
from ftray.util.multiprocessing.crew import Batch, Crew, Effect, Function, Hire, Kill, Leave, Run
from ftray.util.multiprocessing.worker import CALL, HANDED_BACK_PICKLED, PICKLED, Answer, PoolWorker
from ftray.worker.core import Core, get_core
from ftray.worker.refs import ObjectRef
from ftray.worker.serialization import serialize
from ftray.worker.waiting import FAILED

if TYPE_CHECKING:
    from ftray.util.multiprocessing.results import AsyncResult

log = logging.getLogger("ftray.util")

DIRECT_S = 1.0
"""A call that takes longer than this is waited for like others."""

Outcome = tuple[bool, Any]
"""(True, result) or (False, exception)."""


class _Arrivals(Arrivals):
    """Wakes the pool's thread when nobody waits."""

    def __init__(self, core: Core, inbox: SimpleQueue[Any]) -> None:
        super().__init__(core)
        self._inbox = inbox
        self.looking: set[object] = set()
        """Those in `wait_until`: they look at what has arrived before they wait, and when they leave."""

    def ready(self, object_id: bytes, entry: Any) -> None:
        super().ready(object_id, entry)
        if not self.looking:
            self._inbox.put(None)


class _Call:
    """What was asked of a worker and is not answered."""

    __slots__ = ("effect", "ref")

    def __init__(self, effect: Effect, ref: ObjectRef[Any]) -> None:
        self.effect = effect
        self.ref = ref


class Engine:
    """See the module. It does not know its pool, so that a pool that nobody holds can end."""

    def __init__(
        self, size: int, initializer: bytes | None, batches_max: int | None, actor_options: dict[str, Any]
    ) -> None:
        self.core = core = get_core()
        self.lock = threading.Lock()
        self.jobs: set[Any] = set()
        """Those that are not done."""
        self.pids: dict[int, int] = {}
        """Process ids of the workers that have started."""
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        """For the pool's thread: None (look at what arrived) or a function to call."""
        self._initializer: Any = initializer
        if initializer is not None and len(initializer) > core.config.inline_bytes_max:
            self._initializer = put(initializer)
        self._class = ActorClass(PoolWorker, actor_options)
        self._handles: dict[int, ActorHandle] = {}
        self._calls: dict[bytes, _Call] = {}
        self._unread: deque[_Call] = deque()
        """Answers whose workers have got the next batch, and that are not unpickled yet."""
        self._functions: weakref.WeakKeyDictionary[Any, Function] = weakref.WeakKeyDictionary()
        self._arrivals = _Arrivals(core, self.inbox)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self.stopped = False
        """There is nothing left of it."""
        with core.lock:
            core.reactor.watch(self._wake_fd, self._woken)
        self.crew = Crew(size, batches_max)
        self.thread = threading.Thread(target=self._serve, name="ftray-pool", daemon=True)
        self.thread.start()
        self.act()

    # --- work --------------------------------------------------------------------------------------------------------

    def function(self, function: Callable[..., Any]) -> Function:
        """A function as batches carry it. A plain one is pickled once for all its jobs."""
        if isinstance(function, FunctionType):
            plain = function.__closure__ is None
        else:
            plain = isinstance(function, BuiltinFunctionType) and isinstance(function.__self__, ModuleType)
        packed = self._functions.get(function) if plain else None
        if packed is None:
            pickled = serialize(function, f"function {getattr(function, '__qualname__', function)}")
            if pickled.refs:
                return Function(function, None)  # as an argument, so that whoever holds the references is known
            data: Any = pickled.to_bytes()
            packed = Function(put(data) if len(data) > self.core.config.inline_bytes_max else data, plain)
            if plain:
                self._functions[function] = packed
        return packed

    def submit(self, batches: list[Batch]) -> None:
        """Starts them, or queues them."""
        with self.lock:
            for batch in batches:
                self.crew.submit(batch)
        self.act()

    def call(self, job: Callable[[], AsyncResult], func: Callable[..., Any], items: tuple[Any, Any]) -> Outcome:
        """One call, waited for: the answer. When a worker is idle nothing but the call itself is in the way.

        `job()` makes the job that takes over otherwise: no worker is idle, the worker dies, or the call takes long.
        """
        function = self.function(func)
        batch = Batch(_NOBODY, 0, CALL, function, items)
        with self.lock:
            number = self.crew.take(batch)
        handle = None if number is None else self._handles.get(number)
        if number is None or handle is None:
            return self._call_in_turn(job(), batch)
        try:
            ref = handle.run.remote(CALL, function.data, function.keep, items)
        except BaseException as error:
            self._free(number, batch)
            if isinstance(error, Exception):
                return False, _plain(error)
            raise
        try:
            ok, value, took_us = self.core.objects.get((ref,), DIRECT_S)[0]
        except BaseException as error:
            if isinstance(error, GetTimeoutError | ActorDiedError | ActorUnavailableError):
                batch.job = result = job()
                with self.lock:
                    broken = self.crew.broken
                if broken is not None:  # terminated meanwhile, with nobody to be told
                    result.abort(broken)
                    return False, broken
                self._track(Run(number, batch), ref)
                return result.outcome()
            if isinstance(error, Exception):
                ok, value, took_us = False, _unread(error), 0.0
            else:  # an interrupt: the call goes on, and nobody wants its result
                self._track(Run(number, batch), ref)
                raise
        self._free(number, batch)
        if took_us:
            self.crew.measured(batch, took_us)
        return ok, value

    def _call_in_turn(self, job: AsyncResult, batch: Batch) -> Outcome:
        batch.job = job
        self.submit([batch])
        return job.outcome()

    def _free(self, number: int, batch: Batch) -> None:
        with self.lock:
            self.crew.finished(number, batch)
            more = self.crew.has_effects
        if more:
            self.act()

    def add_job(self, job: Any) -> None:
        with self.lock:
            self.jobs.add(job)

    def job_done(self, job: Any) -> None:
        """All of it is done, callbacks included."""
        with self.lock:
            self.jobs.discard(job)
        if self.crew.closed:
            self.stop_if_over()
        self.notify()

    # --- carrying out what the crew decides --------------------------------------------------------------------------

    def act(self) -> None:
        """Carries out all effects there are; what is sent to one worker goes out together."""
        while True:
            with self.lock:
                effects = self.crew.take_effects()
            if not effects:
                return
            done = 0
            sent: list[bytes] = []
            try:
                for effect in effects:
                    self._carry_out(effect, sent)
                    done += 1
            except BaseException:
                with self.lock:
                    self.crew.give_back(effects[done:])
                raise
            finally:
                if sent:
                    self._arrivals.add(sent)

    def _carry_out(self, effect: Effect, sent: list[bytes]) -> None:
        if isinstance(effect, Run):
            self._run(effect, sent)
        elif isinstance(effect, Hire):
            self._hire(effect, sent)
        elif isinstance(effect, Leave):
            self._leave(effect, sent)
        elif isinstance(effect, Kill):
            self.pids.pop(effect.number, None)
            handle = self._handles.pop(effect.number, None)
            if handle is not None:
                try:
                    kill(handle)
                except FtrayError:
                    pass  # the session is over, and the worker with it
        else:
            effect.batch.job.deliver(effect.batch, False, effect.error)

    def _sent(self, effect: Effect, ref: ObjectRef[Any], sent: list[bytes]) -> None:
        self._calls[ref._id] = _Call(effect, ref)
        sent.append(ref._id)

    def _track(self, effect: Effect, ref: ObjectRef[Any]) -> None:
        sent: list[bytes] = []
        self._sent(effect, ref, sent)
        self._arrivals.add(sent)

    def _hire(self, effect: Hire, sent: list[bytes]) -> None:
        number = effect.number
        try:
            handle = self._handles[number] = self._class.remote()
            self._sent(effect, handle.setup.remote(self._initializer), sent)
        except Exception as error:
            with self.lock:
                self.crew.broke(error)
            return
        with self.lock:
            wanted = number in self.crew.members
        if not wanted:  # the pool was terminated while it was made
            self._carry_out(Kill(number), sent)

    def _leave(self, effect: Leave, sent: list[bytes]) -> None:
        handle = self._handles.get(effect.number)
        try:
            if handle is not None:
                self._sent(effect, handle.leave.remote(), sent)
        except Exception:  # the session is over, and the worker with it
            with self.lock:
                self.crew.gone(effect.number)
            self.stop_if_over()

    def _run(self, effect: Run, sent: list[bytes]) -> None:
        batch = effect.batch
        handle = self._handles.get(effect.number)
        if handle is None:
            return  # terminated: the batch has failed with the others
        try:
            kind, items = self._pack(batch)
            function = batch.function
            self._sent(effect, handle.run.remote(kind, function.data, function.keep, items), sent)
        except Exception as error:  # the items cannot be pickled
            with self.lock:
                self.crew.finished(effect.number, batch)
            batch.job.deliver(batch, False, _plain(error))

    def _pack(self, batch: Batch) -> tuple[int, Any]:
        """The items as they travel: pickled once, whatever their size; as they are when there are references inside."""
        pickled = serialize(batch.items, "items")
        if pickled.refs:
            return batch.kind, batch.items
        core = self.core
        if pickled.size > core.config.inline_bytes_max:
            return batch.kind, ObjectRef(core.objects.put(pickled), core)
        return batch.kind | PICKLED, pickled.to_bytes()

    # --- answers -----------------------------------------------------------------------------------------------------

    def process(self) -> None:
        """Acts on all answers that have arrived: workers get more to do first, and then results are unpickled."""
        arrived, unread = self._arrivals.arrived, self._unread
        while arrived or unread:
            while arrived:
                try:
                    object_id = arrived.popleft()
                except IndexError:
                    break
                call = self._calls.pop(object_id, None)
                if call is not None:
                    self._answered(call)
            call = None
            self.act()
            while unread:
                try:
                    call = unread.popleft()
                except IndexError:
                    break
                try:
                    self._read(call)
                except BaseException:
                    unread.appendleft(call)
                    raise
                call = None
        if self.crew.closed:
            self.stop_if_over()

    def _answered(self, call: _Call) -> None:
        effect = call.effect
        entry = self.core.entries.get(call.ref._id)
        value: Any = entry.value if entry is not None else None
        failed = entry is not None and entry.state == FAILED
        dead = failed and isinstance(value, ActorDiedError | ActorUnavailableError)
        if isinstance(effect, Leave) or dead:
            number = effect.number  # type: ignore[union-attr]
            self._handles.pop(number, None)
            self.pids.pop(number, None)
            with self.lock:
                if isinstance(effect, Leave):
                    self.crew.gone(number)
                else:
                    self.crew.died(number, value)
        elif isinstance(effect, Hire):
            ok, answer, _ = self._load(call.ref)
            with self.lock:
                if ok:
                    self.pids[effect.number] = answer
                    self.crew.started(effect.number)
                else:
                    self.crew.broke(answer)
        elif isinstance(effect, Run):
            with self.lock:
                if value == HANDED_BACK_PICKLED:
                    self.crew.handed_back(effect.number, effect.batch)
                else:
                    self.crew.finished(effect.number, effect.batch)
                    self._unread.append(call)

    def _read(self, call: _Call) -> None:
        batch: Batch = call.effect.batch  # type: ignore[union-attr]
        ok, value, took_us = self._load(call.ref)
        if took_us:
            self.crew.measured(batch, took_us)
        batch.job.deliver(batch, ok, value)

    def _load(self, ref: ObjectRef[Any]) -> Answer:
        """A worker's answer, or why there is none."""
        try:
            answer: Answer = self.core.objects.get((ref,), None)[0]
        except Exception as error:
            return False, _unread(error), 0.0
        return answer

    # --- waiting -----------------------------------------------------------------------------------------------------

    def wait_until(self, there: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Waits until `there()`, which another thread may bring about; acts on answers meanwhile. False when time is
        up."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        arrivals = self._arrivals
        me = object()
        arrivals.looking.add(me)
        try:
            while True:
                self.process()
                if there():
                    return True
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                arrivals.wait(left, there)
        finally:
            arrivals.looking.discard(me)
            if arrivals.arrived:
                self.inbox.put(None)

    def notify(self) -> None:
        """Something has happened that a waiting thread may wait for."""
        if self._arrivals.waiters:
            with self.core.lock:
                self._wake_all()

    def _wake_all(self) -> None:
        if self._arrivals.waiters and not self.stopped:
            self._arrivals.wake()
            os.eventfd_write(self._wake_fd, 1)

    def _woken(self) -> None:
        """Under the core's lock; the thread that was reading looks again after this."""
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
        if self.stopped:
            self.core.reactor.unwatch(self._wake_fd)
            os.close(self._wake_fd)

    # --- the pool's thread -------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            item = self.inbox.get()
            try:
                if item is None:
                    self.process()
                elif item is _STOP:
                    self._end()
                    return
                else:
                    item()
            except Exception:
                log.exception("the thread of a pool failed")
            item = None  # what it holds shall not live until the next

    # --- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self.lock:
            self.crew.close()
        self.act()
        self.stop_if_over()

    def terminate(self, error: BaseException) -> None:
        """Ends the workers; all that is not done fails with `error`."""
        with self.lock:
            self.crew.terminate(error)
            jobs = list(self.jobs)
        self._calls.clear()
        self._arrivals.close()
        for job in jobs:
            job.abort(error)
        self.act()
        self.stop_if_over()

    def abandon(self) -> None:
        """Nobody holds the pool any more. A finaliser may call this."""
        self.inbox.put(self._abandoned)

    def _abandoned(self) -> None:
        self.terminate(RuntimeError("the pool was dropped"))

    def stop_if_over(self) -> None:
        """Ends the pool's thread once there is nothing left for it."""
        with self.lock:
            if self._stopping or self.jobs or not self.crew.over:
                return
            self._stopping = True
        self.inbox.put(_STOP)

    def _end(self) -> None:
        """The last that happens here, in the pool's thread."""
        self._functions.clear()
        core = self.core
        with core.lock:
            self._arrivals.wake()
            self.stopped = True
            if core.closed:
                os.close(self._wake_fd)
            else:
                os.eventfd_write(self._wake_fd, 1)


class _Nobody:
    """The job of a call whose caller was interrupted."""

    def deliver(self, batch: Batch, ok: bool, value: Any) -> None:
        pass


_NOBODY = _Nobody()
_STOP = object()


def _unread(error: Exception) -> Exception:
    """Why an answer could not be carried over."""
    return MaybeEncodingError(error, "the result") if isinstance(error, SerializationError) else error


def _plain(error: Exception) -> Exception:
    """What pickling an argument raised, rather than the account of where."""
    cause = error.__cause__
    return cause if isinstance(error, SerializationError) and isinstance(cause, Exception) else error
