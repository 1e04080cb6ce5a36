"""`ActorPool`: a fixed set of actors, one call at a time for each, and results in order or as they come.

Role: shell on the public interface. Submissions that find no idle actor queue here, in order. Completions are gathered
by an `Arrivals`; they are acted on (the actor is idle again, or dead; a queued submission starts) inside `get_next` and
`get_next_unordered`, in the caller's thread, because starting one calls the user's `fn`. So an actor counts as busy
until one of these two has been called after its call was done, as Ray's users know it.

Rules: every submission has a *slot* until its result, or its error, was returned. An actor that has died leaves the
pool; submissions never go to it again. When no actor is left, what still queues fails with the error of the last death.

Rejected: waiting for the slot that is next (the other actors would idle behind it); starting queued submissions in a
background thread (`fn` would run in two threads).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from ftray.api.actor import ActorHandle
from ftray.api.objects import check_timeout, get
from ftray.exceptions import ActorDiedError, GetTimeoutError
from ftray.util.arrivals import Arrivals
from ftray.worker.core import get_core
from ftray.worker.refs import ObjectRef

V = TypeVar("V")
Fn = Callable[[Any, V], Any]


class _Slot:
    """One submission that has started."""

    __slots__ = ("actor", "error", "index", "left", "result")

    def __init__(self, index: int, actor: ActorHandle | None, result: Any, error: Exception | None) -> None:
        self.index = index
        self.actor = actor
        """Who is busy with it; None once it is done."""
        self.result = result
        """A reference, or a list of them for a method with several results."""
        self.error = error
        """Why it could not be started."""
        self.left: set[bytes] = set()
        """Objects that are not ready."""


class ActorPool(Generic[V]):
    """Calls on a fixed set of actors, each busy with one call at a time. For one thread at a time.

    `fn(actor, value)` calls a method of the actor and returns the reference.

        pool = ActorPool([Worker.remote(), Worker.remote()])
        list(pool.map(lambda actor, value: actor.double.remote(value), [1, 2, 3]))

    Raises TypeError for what is not a list of actor handles.
    """

    def __init__(self, actors: Iterable[ActorHandle]) -> None:
        if isinstance(actors, ActorHandle | str | bytes) or not isinstance(actors, Iterable):
            raise TypeError(f"ActorPool takes a list of actor handles, not {type(actors).__name__}")
        self._idle: list[ActorHandle] = list(actors)
        for index, actor in enumerate(self._idle):
            _check_actor(actor, f"item {index} of the actors")
        self._arrivals = Arrivals(get_core())
        self._slots: dict[int, _Slot] = {}
        """Started, and not returned yet, by number."""
        self._slot_of: dict[bytes, _Slot] = {}
        """By the objects that are not ready; also those of calls that were given up, whose actors are busy still."""
        self._done: deque[_Slot] = deque()
        """In the order in which they were done; with some that were returned already."""
        self._queue: deque[tuple[Fn[V], V]] = deque()
        self._next_index = 0
        self._next_return = 0
        self._last_death: ActorDiedError | None = None

    # --- results of many ---------------------------------------------------------------------------------------------

    def map(self, fn: Fn[V], values: Iterable[V]) -> Iterator[Any]:
        """Calls `fn(actor, value)` for each value; iterates over the results in the order of the values.

        All are submitted at once; those before that were not fetched are given up. The iterator goes on after an error.
        """
        self._give_up()
        for value in values:
            self.submit(fn, value)
        return _Results(self, self.get_next)

    def map_unordered(self, fn: Fn[V], values: Iterable[V]) -> Iterator[Any]:
        """As `map`, with the results in the order in which they are done."""
        self._give_up()
        for value in values:
            self.submit(fn, value)
        return _Results(self, self.get_next_unordered)

    def _give_up(self) -> None:
        self._queue.clear()
        self._slots.clear()
        self._done.clear()
        self._next_return = self._next_index

    # --- one by one --------------------------------------------------------------------------------------------------

    def submit(self, fn: Fn[V], value: V) -> None:
        """Calls `fn(actor, value)` on an idle actor, now or as soon as there is one.

        Raises what `fn` raises if it is called now (the actor stays idle); else the `get_next` of its result does.
        """
        if not callable(fn):
            raise TypeError(f"fn must be a function of an actor and a value, not {type(fn).__name__}")
        if self._idle and not self._queue:
            self._start(fn, value)
        else:
            self._queue.append((fn, value))

    def _start(self, fn: Fn[V], value: V) -> None:
        actor = self._idle.pop()
        try:
            result = fn(actor, value)
            refs = result if isinstance(result, list | tuple) else [result]
            for ref in refs:
                if not isinstance(ref, ObjectRef):
                    raise TypeError(
                        f"fn must return the reference of its call (or a list of them), not {type(ref).__name__}: "
                        "return actor.method.remote(value)"
                    )
                if ref._id in self._slot_of:
                    raise ValueError(f"fn returned {ref!r} for two values: it must call the actor for each")
        except BaseException:
            self._idle.append(actor)
            raise
        slot = _Slot(self._next_index, actor, result, None)
        self._next_index += 1
        self._slots[slot.index] = slot
        slot.left = {ref._id for ref in refs}
        if not refs:
            self._finished(slot)
        for object_id in slot.left:
            self._slot_of[object_id] = slot
        self._arrivals.add(slot.left)

    def _start_queued(self) -> None:
        while self._queue and self._idle:
            fn, value = self._queue.popleft()
            try:
                self._start(fn, value)
            except Exception as error:
                self._not_started(error)

    def _not_started(self, error: Exception) -> None:
        slot = _Slot(self._next_index, None, None, error)
        self._next_index += 1
        self._slots[slot.index] = slot
        self._done.append(slot)

    def has_next(self) -> bool:
        """Whether there is a result that was not returned yet."""
        return bool(self._slots or self._queue)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The next result in the order of submission; waits for it, at most `timeout` seconds.

        Raises the error of the call (ActorDiedError when its actor died), StopIteration when nothing was submitted,
        GetTimeoutError (a TimeoutError) when time is up: with `ignore_if_timedout` the result is given up, without it
        the next call waits on. Raises ValueError after `get_next_unordered` has returned a later result, and for a pool
        without actors.
        """
        check_timeout(timeout)
        if not self.has_next():
            raise StopIteration("no result is left to get: nothing was submitted since the last one")
        self._take_arrived()
        index = self._next_return
        if index not in self._slots and (index < self._next_index or not self._queue):
            raise ValueError("get_next() cannot follow get_next_unordered(), which has returned later results already")

        def there() -> _Slot | None:
            slot = self._slots.get(index)
            return slot if slot is not None and slot.actor is None else None

        slot = self._wait_for(there, timeout)
        if slot is not None:
            return self._return(slot)
        waiting = self._slots.get(index)
        return self._timed_out(timeout, waiting, ignore_if_timedout)

    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """Any result, those that were done first at first; waits for one, at most `timeout` seconds.

        Raises as `get_next` does; with `ignore_if_timedout` the result that was submitted first is given up.
        """
        check_timeout(timeout)
        if not self.has_next():
            raise StopIteration("no result is left to get: nothing was submitted since the last one")
        self._take_arrived()
        slot = self._wait_for(self._first_done, timeout)
        if slot is not None:
            return self._return(slot)
        return self._timed_out(timeout, next(iter(self._slots.values()), None), ignore_if_timedout)

    def _first_done(self) -> _Slot | None:
        done = self._done
        while done and done[0].index not in self._slots:
            done.popleft()
        return done[0] if done else None

    def _wait_for(self, there: Callable[[], _Slot | None], timeout: float | None) -> _Slot | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (slot := there()) is None:
            if not self._slot_of and not self._idle:  # nobody works, and nobody could
                raise ValueError("the pool has no actors: push() one")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0 and not self._arrivals.arrived:
                return None
            self._arrivals.wait(left)
            self._take_arrived()
        return slot

    def _take_arrived(self) -> None:
        """Acts on what is ready."""
        arrived = self._arrivals.arrived
        while arrived:
            object_id = arrived.popleft()
            slot = self._slot_of.pop(object_id)
            slot.left.discard(object_id)
            if not slot.left:
                self._finished(slot)
        self._start_queued()
        if self._queue and not self._idle and not self._slot_of and self._last_death is not None:
            # The last actor is dead. `push` brings another; until then each submission tells why it cannot run.
            for _ in range(len(self._queue)):
                self._queue.popleft()
                self._not_started(ActorDiedError(f"no actor of the pool is left; the last error: {self._last_death}"))

    def _finished(self, slot: _Slot) -> None:
        actor, slot.actor = slot.actor, None
        assert actor is not None
        death = _death(slot.result)
        if death is None:
            self._idle.append(actor)
        else:
            self._last_death = death
        if self._slots.get(slot.index) is slot:
            self._done.append(slot)

    def _return(self, slot: _Slot) -> Any:
        del self._slots[slot.index]
        self._next_return = max(self._next_return, slot.index + 1)
        if slot.error is not None:
            raise slot.error
        return get(slot.result)

    def _timed_out(self, timeout: float | None, slot: _Slot | None, ignore: bool) -> Any:
        text = f"no result within {timeout:g} s"
        if ignore and slot is not None:
            del self._slots[slot.index]
            self._next_return = max(self._next_return, slot.index + 1)
            text += f"; the call of {slot.result!r} was given up, its actor is busy until it is done"
        elif ignore:
            self._queue.popleft()
            text += "; the submission was given up before an actor was free for it"
        raise GetTimeoutError(text)

    # --- actors ------------------------------------------------------------------------------------------------------

    def has_free(self) -> bool:
        """Whether an actor is idle, and no submission waits for one."""
        return bool(self._idle) and not self._queue

    def pop_idle(self) -> ActorHandle | None:
        """Takes an idle actor out of the pool; None when there is none."""
        return self._idle.pop() if self.has_free() else None

    def push(self, actor: ActorHandle) -> None:
        """Adds an actor. Raises ValueError for one that is in the pool, TypeError for what is no handle."""
        _check_actor(actor, "push() takes an actor handle; this")
        if actor in self._idle or any(slot.actor == actor for slot in self._slot_of.values()):
            raise ValueError(f"{actor!r} belongs to the pool already")
        self._idle.append(actor)
        self._start_queued()


    def __del__(self) -> None:
        arrivals = getattr(self, "_arrivals", None)  # missing when the arguments were refused
        if arrivals is not None:
            arrivals.close()


class _Results(Iterator[Any]):
    """All results of a pool; goes on after an error."""

    def __init__(self, pool: ActorPool[Any], take: Callable[[], Any]) -> None:
        self._pool = pool
        self._take = take

    def __next__(self) -> Any:
        return self._take()  # which raises StopIteration when there is none


def _check_actor(actor: Any, what: str) -> None:
    if not isinstance(actor, ActorHandle):
        hint = ": make one with .remote()" if callable(getattr(actor, "remote", None)) else ""
        raise TypeError(f"{what} is no actor handle but {type(actor).__name__}{hint}")


def _death(result: Any) -> ActorDiedError | None:
    """The error of a call that is done, if it says that its actor is dead for good."""
    for ref in result if isinstance(result, list | tuple) else [result]:
        core = ref._core
        entry = core.entries.get(ref._id)
        if entry is not None and isinstance(entry.value, ActorDiedError):
            return entry.value
    return None
