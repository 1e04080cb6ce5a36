"""`Queue`: a first-in, first-out queue in an actor, for producers and consumers anywhere in the cluster.

Role: shell on the public interface: an asyncio actor that keeps the items and who waits for them, and a handle that can
be passed to tasks and actors.

Rules:
- An item is in one place: in the queue, or in the answer to one `get`. A getter that waits is handed the item directly;
  its timeout runs in the actor, in the same thread, so that it cannot pass each other with an item.
- Whoever waits costs no thread and holds up nobody: a blocked call is a coroutine.
- A caller that stops waiting (Ctrl-C, a cancelled coroutine) takes its `get` back (`_QueueActor.give_back`).
- Answers are plain values, since an exception costs more to carry than the answer: `(item,)` or True when it is done,
  None for empty or full, False once the queue is shut down.

Rejected: `asyncio.Queue` under `asyncio.wait_for` (a cancellation that meets an item loses it on some versions).
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable
from typing import Any

from ftray.api.actor import ActorClass, exit_actor, kill
from ftray.api.context import get_runtime_context
from ftray.api.objects import check_timeout, get, wait
from ftray.exceptions import ActorDiedError
from ftray.worker.refs import ObjectRef

GRACE_PERIOD_S = 5.0
WAITERS_MAX = 1 << 30
"""Blocked calls are calls that run, as the actor sees it, and are in flight, as the caller does: no bound on either."""


class Empty(queue.Empty):
    """The queue has no item, or got none in time."""


class Full(queue.Full):
    """The queue has no room, or got none in time."""


class Queue:
    """A first-in, first-out queue. It lives in an actor, which ends with the last handle or by `shutdown`.

    `maxsize` is the most items it holds; 0 (or less) for no bound. `actor_options` are options of its actor
    (`{"num_cpus": 1}`, `{"name": "jobs"}`). A reference that is put as an item is resolved: its value is what `get`
    returns.

    Raises TypeError for wrong arguments. All methods raise ActorDiedError when the actor is dead, or the queue shut
    down.
    """

    def __init__(self, maxsize: int = 0, actor_options: dict[str, Any] | None = None) -> None:
        if isinstance(maxsize, bool) or not isinstance(maxsize, int):
            raise TypeError(f"maxsize must be a whole number of items, not {maxsize!r}")
        if actor_options is not None and not isinstance(actor_options, dict):
            raise TypeError(f"actor_options must be a dict of options, not {type(actor_options).__name__}")
        self.maxsize = maxsize
        options = {"max_concurrency": WAITERS_MAX, **(actor_options or {})}
        self.actor: Any = ActorClass(_QueueActor, options).remote(maxsize)
        self._lift_limit()

    def _lift_limit(self) -> None:
        self.actor._ftray_calls.inflight_max = WAITERS_MAX

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.actor is not None:
            self._lift_limit()

    def _calls(self) -> Any:
        if self.actor is None:
            raise _shut_down()
        return self.actor

    # --- how much is in it -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.qsize()

    def qsize(self) -> int:
        """The number of items; it may have changed when the caller reads it."""
        size: int = get(self._calls().qsize.remote())
        return size

    def size(self) -> int:
        """As `qsize`."""
        return self.qsize()

    def empty(self) -> bool:
        """Whether there is no item."""
        return self.qsize() == 0

    def full(self) -> bool:
        """Whether there is no room; never for a queue without a bound."""
        return 0 < self.maxsize <= self.qsize()

    # --- put ---------------------------------------------------------------------------------------------------------

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Appends an item; waits for room if `block`, at most `timeout` seconds.

        Raises Full, ValueError for a negative timeout, SerializationError. After an interrupt the item may or may not
        be in.
        """
        _check(block, timeout)
        ref = self._calls().put.remote(item, timeout if block else 0.0)
        _stored(self._wait(ref, "withdraw"))

    async def put_async(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """As `put`, without blocking the event loop."""
        _check(block, timeout)
        ref = self._calls().put.remote(item, timeout if block else 0.0)
        _stored(await self._wait_async(ref, "withdraw"))

    def put_nowait(self, item: Any) -> None:
        """As `put(item, block=False)`."""
        self.put(item, block=False)

    def put_nowait_batch(self, items: Iterable[Any]) -> None:
        """Appends all items, in order, or none. Raises Full when there is no room for all of them, TypeError."""
        if isinstance(items, str | bytes) or not isinstance(items, Iterable):
            raise TypeError(f"items must be a list or another iterable of items, not {type(items).__name__}")
        batch = list(items)
        room = get(self._calls().put_batch.remote(batch))
        if room is False:
            raise _shut_down()
        if room is not True:
            raise Full(f"{len(batch)} items do not fit: the queue has room for {room[0]} (maxsize {self.maxsize})")

    # --- get ---------------------------------------------------------------------------------------------------------

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Takes the first item out; waits for one if `block`, at most `timeout` seconds.

        Raises Empty, ValueError for a negative timeout.
        """
        _check(block, timeout)
        ref = self._calls().get.remote(timeout if block else 0.0)
        return _item(self._wait(ref, "give_back"))

    async def get_async(self, block: bool = True, timeout: float | None = None) -> Any:
        """As `get`, without blocking the event loop. When the coroutine is cancelled no item is lost."""
        _check(block, timeout)
        ref = self._calls().get.remote(timeout if block else 0.0)
        return _item(await self._wait_async(ref, "give_back"))

    def get_nowait(self) -> Any:
        """As `get(block=False)`."""
        return self.get(block=False)

    def get_nowait_batch(self, num_items: int) -> list[Any]:
        """Takes the first `num_items` items out. Raises Empty when there are fewer, and then takes none; TypeError,
        ValueError for a negative number."""
        if isinstance(num_items, bool) or not isinstance(num_items, int):
            raise TypeError(f"num_items must be a whole number, not {num_items!r}")
        if num_items < 0:
            raise ValueError(f"num_items must not be negative, but is {num_items}")
        answer = get(self._calls().get_batch.remote(num_items))
        if answer is False:
            raise _shut_down()
        if isinstance(answer, tuple):
            raise Empty(f"the queue has {answer[0]} items, not {num_items}")
        items: list[Any] = answer
        return items

    # --- waiting, and giving up ---------------------------------------------------------------------------------------

    def _wait(self, ref: ObjectRef[Any], take_back: str) -> Any:
        try:
            wait([ref])  # unlike `get` it does not warn of a long wait, which is what a queue is for
            return get(ref)
        except Exception:
            raise
        except BaseException:
            self._take_back(ref, take_back)
            raise

    async def _wait_async(self, ref: ObjectRef[Any], take_back: str) -> Any:
        try:
            return await ref
        except Exception:
            raise
        except BaseException:  # the cancellation of asyncio or trio
            self._take_back(ref, take_back)
            raise

    def _take_back(self, ref: ObjectRef[Any], method: str) -> None:
        if self.actor is not None:
            getattr(self.actor, method).remote(ref.task_id(), [ref])

    # --- the end -----------------------------------------------------------------------------------------------------

    def shutdown(self, force: bool = False, grace_period_s: float = GRACE_PERIOD_S) -> None:
        """Ends the actor, and with it the queue and its items; who waits for it gets ActorDiedError.

        Without `force` calls before this one are answered first; after `grace_period_s` seconds it is killed all the
        same. Doing it again does nothing.
        """
        check_timeout(grace_period_s)
        actor, self.actor = self.actor, None
        if actor is None:
            return
        if not force:
            done, _ = wait([actor.stop.remote()], timeout=grace_period_s)
            if done:
                return
        kill(actor)


def _check(block: bool, timeout: float | None) -> None:
    if block and timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, int | float):
            raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
        if not timeout >= 0:
            raise ValueError(f"'timeout' must be a non-negative number, not {timeout}")


def _stored(answer: bool | None) -> None:
    if answer is None:
        raise Full("the queue is full")
    if not answer:
        raise _shut_down()


def _item(answer: Any) -> Any:
    if answer is None:
        raise Empty("the queue is empty")
    if answer is False:
        raise _shut_down()
    return answer[0]


def _shut_down() -> ActorDiedError:
    return ActorDiedError("the queue was shut down; make a new one", class_name="Queue")


class _QueueActor:
    """The items, and who waits. All methods run in one event loop, and are atomic between their `await`s."""

    def __init__(self, maxsize: int) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._sleep = asyncio.sleep
        self._maxsize = maxsize
        self._items: deque[Any] = deque()
        self._getters: dict[str, Any] = {}
        """Who waits for an item, by the ids of their calls: futures of the answer."""
        self._putters: dict[str, tuple[Any, Any]] = {}
        """Who waits for room: futures of the answer, and items."""
        self._stopped = False

    def qsize(self) -> int:
        return len(self._items)

    def _room(self) -> int:
        return self._maxsize - len(self._items) if self._maxsize > 0 else 1 << 60

    def _add(self, item: Any) -> None:
        """To the first who waits for one, or to the end."""
        if not self._hand_over(item):
            self._items.append(item)

    def _hand_over(self, item: Any) -> bool:
        getters = self._getters
        while getters:
            future = getters.pop(next(iter(getters)))
            if not future.done():
                future.set_result((item,))
                return True
        return False

    def _fill(self) -> None:
        """There is room: for the first who waits for it."""
        while self._putters and self._room() > 0:
            future, item = self._putters.pop(next(iter(self._putters)))
            if not future.done():
                future.set_result(True)
                self._items.append(item)

    def _expiring(self, timeout: float | None) -> Any:
        """A future of an answer, which is None when the time is up."""
        future = self._loop.create_future()
        if timeout is not None:
            timer = self._loop.call_later(timeout, _expire, future)
            future.add_done_callback(lambda _: timer.cancel())
        return future

    async def put(self, item: Any, timeout: float | None) -> bool | None:
        if self._stopped:
            return False
        if self._room() > 0:
            self._add(item)
            return True
        if timeout == 0:
            return None
        future = self._expiring(timeout)
        call = get_runtime_context().get_task_id() or ""
        self._putters[call] = (future, item)
        try:
            done: bool | None = await future
            return done
        finally:
            self._putters.pop(call, None)

    async def get(self, timeout: float | None) -> Any:
        if self._items:
            item = self._items.popleft()
            self._fill()
            return (item,)
        if self._stopped:
            return False
        if timeout == 0:
            return None
        future = self._expiring(timeout)
        call = get_runtime_context().get_task_id() or ""
        self._getters[call] = future
        try:
            return await future
        except BaseException:
            if future.done() and not future.cancelled() and future.result():
                self._put_first(future.result()[0])  # it was cancelled with the item in its hand
            raise
        finally:
            self._getters.pop(call, None)

    def _put_first(self, item: Any) -> None:
        if not self._hand_over(item):
            self._items.appendleft(item)

    async def give_back(self, call: str, refs: list[Any]) -> None:
        """The caller of a `get` does not want its answer any more."""
        future = self._getters.pop(call, None)
        if future is not None:
            _expire(future)
            return
        answer = await refs[0]
        if answer:
            self._put_first(answer[0])

    async def withdraw(self, call: str, refs: list[Any]) -> None:
        """The caller of a `put` does not wait for room any more."""
        waiting = self._putters.pop(call, None)
        if waiting is not None:
            _expire(waiting[0])

    def put_batch(self, items: list[Any]) -> bool | tuple[int]:
        if self._stopped:
            return False
        room = self._room()
        if len(items) > room:
            return (max(0, room),)
        for item in items:
            self._add(item)
        return True

    def get_batch(self, count: int) -> Any:
        if self._stopped:
            return False
        if count > len(self._items):
            return (len(self._items),)
        taken = [self._items.popleft() for _ in range(count)]
        self._fill()
        return taken

    async def stop(self) -> None:
        self._stopped = True
        waiting = [*self._getters.values(), *(future for future, _ in self._putters.values())]
        for future in waiting:
            if not future.done():
                future.set_result(False)
        while self._getters or self._putters:  # those calls answer first: the actor ends after this one
            await self._sleep(0)
        exit_actor()


def _expire(future: Any) -> None:
    if not future.done():
        future.set_result(None)
