"""Running what is pushed: the main thread of a worker.

Role: shell. The main thread owns the reactor of incoming task channels: it receives, runs, replies. Arrivals go to
`pending`; replies are written when nothing is pending, when 64 KB have gathered, or after a millisecond of work, and a
tick of the background loop writes those that a long task would hold up.

Rules:
- `exec_reactor.lock` is taken after the core's lock, never before it.
- A task whose arguments may hold references is bracketed by `begin_task` and `end_task` (`ownership/references.py`);
  its reply waits until what it kept has been registered.
- While the main thread is blocked in `get`, what is queued behind it is handed back to its owners, and so is what
  still arrives: pipelining never makes a task wait for one that waits for it.

Rejected: a thread for each task (a handover for each); the loop receiving for the main thread (two).
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections import deque
from threading import get_ident
from typing import TYPE_CHECKING, Any

from ftray.exceptions import FtrayError
from ftray.wire.messages import (
    ERROR,
    INLINE,
    ActorCreation,
    CreateActor,
    ExitWorker,
    Message,
    PeerHello,
    PushActorTask,
    PushTask,
    TasksReturned,
    Unregister,
    WorkerAssigned,
    WorkerBlocked,
    WorkerUnblocked,
)
from ftray.wire.reactor import Link, Reactor
from ftray.worker.actor_birth import become_actor
from ftray.worker.cancelling import WorkerCancels
from ftray.worker.core import Core, current_task, task_context
from ftray.worker.environment import apply_environment, enter_job
from ftray.worker.failures import load_task_error
from ftray.worker.gcs_access import wait_for_gcs
from ftray.worker.inheritance import end_child
from ftray.worker.interrupts import TaskInterrupts, interruptible
from ftray.worker.objects import Answer
from ftray.worker.replies import Replies
from ftray.worker.serialization import deserialize, deserialize_args, loading_refs
from ftray.worker.submit import FUNCTIONS
from ftray.worker.task_events import TaskEvents
from ftray.worker.waiting import block

if TYPE_CHECKING:
    from ftray.worker.actor_modes import ActorMode

log = logging.getLogger("ftray.worker")

FLUSH_BYTES = 65536
FLUSH_AFTER_S = 0.001
TICK_MS = 5
WRITE_OUT_S = 2.0
IDLE_EXIT = "idle"
"""The reason in `ExitWorker` that a worker may refuse."""


class ChannelGreeting:
    """Handles a new incoming task channel until its owner has said who it is; then the main thread has it."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        if link.peer is not None:
            link.tag.append((message, payload))
            return
        if not isinstance(message, PeerHello):
            link.reactor.drop(link, "a task channel must begin with a greeting")
            return
        link.peer = message
        link.tag = []
        link.reactor.detach(link)
        # Not here: the main thread would read and decode on while the rest of this batch is being cut into frames.
        link.reactor.call_later(0, lambda: self._hand_over(link))

    def _hand_over(self, link: Link) -> None:
        if link.closed:
            return
        executor = self.executor
        arrived, link.tag = link.tag, None
        with executor.reactor.lock:
            executor.reactor.attach(link, executor)
            for message, payload in arrived:
                executor.on_message(link, message, payload)
        executor.wake()

    def on_closed(self, link: Link, reason: str) -> None:
        pass


class Executor:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.reactor = Reactor(core.config, core.token, core.cluster_id, None, "tasks")
        self.pending: deque[tuple[Link | None, Any, Any]] = deque()
        self.functions: dict[bytes, Any] = {}
        self.calls: dict[bytes, int] = {}
        """Functions with `max_calls` -> how often they have run here."""
        self.assigned = Answer()
        self.actor: ActorMode | None = None
        self.actor_id = b""
        self.creation: ActorCreation | None = None
        self.incarnation = 0
        self.events = TaskEvents(core.config.task_events_max, self.function_name)
        self.replies = Replies(self)
        self.dead_callers: deque[bytes] = deque()
        self.ticking = False
        self.ran = 0
        self.ran_at_tick = -1
        self.blocked_threads = 0
        self.forked = False
        self.exiting = ""
        self.exit_code = 0
        """Other than 0, the end is no clean exit: an actor that ends so may be restarted."""
        self.running: PushTask | PushActorTask | None = None
        self.cancelled: set[bytes] = set()
        """Tasks and calls here that their owners have cancelled, until they are answered."""
        self.cancels = WorkerCancels(self)
        self.interrupts = TaskInterrupts(self)
        self.main_thread = get_ident()
        self.streams: list[Any] = []
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.reactor.watch(self._wake_fd, self._woken)
        self.greeting = ChannelGreeting(self)
        channels: Any = self.reactor.lock
        in_tables, in_channels = core.inside, channels._is_owned
        core.inside = lambda: in_tables() or in_channels()

    # --- waking the main thread --------------------------------------------------------------------------------------

    def wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _woken(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass

    def from_raylet(self, message: Message, payload: bytes) -> None:
        """From the loop, under the core's lock."""
        if isinstance(message, WorkerAssigned):
            enter_job(self, message)
        else:
            self.pending.append((None, message, payload))
            self.wake()

    # --- the task channels -------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        """A push. Also called by the loop while it drains the channels for a blocked or busy main thread."""
        if isinstance(message, PushTask | PushActorTask):
            self.pending.append((link, message, payload))
            if get_ident() != self.main_thread:
                # Read by the loop: the main thread may have gone to sleep in front of an empty socket.
                self.wake()
        else:
            self.reactor.drop(link, f"unexpected {type(message).__name__} on a task channel")

    def on_closed(self, link: Link, reason: str) -> None:
        if link.peer is not None:
            self.dead_callers.append(link.peer.worker_id)
            self.replies.generators.closed(link)
            if get_ident() != self.main_thread:
                self.wake()

    def _next(self) -> tuple[Link | None, Any, Any] | None:
        with self.reactor.lock:
            return self.pending.popleft() if self.pending else None

    def put_back(self, item: tuple[Link | None, Any, Any]) -> None:
        """What `_next` gave is to be taken again. Another thread may be looking through what is pending."""
        with self.reactor.lock:
            self.pending.appendleft(item)

    def run(self) -> None:
        """The main thread's life. Returns when the worker is to exit; replies are flushed."""
        reactor = self.reactor
        last_flush = 0.0
        while not self.exiting:
            item = self._next()
            if item is None:
                if self.actor is not None and self.actor.takes_over:
                    self.actor.serve(self)
                    continue
                self.flush_prints()
                with reactor.lock:
                    reactor.flush_dirty()
                if self.dead_callers:
                    self._bury_callers()
                reactor.poll(-1)
                last_flush = 0.0
                continue
            link, message, payload = item
            if link is None:
                self._control(message, payload)
                continue
            if self.actor is not None:
                if self.cancelled and message.task_id in self.cancelled:
                    self.replies.cancelled(link, message)  # before it came
                else:
                    self.actor.dispatch(self, link, message, payload)
            else:
                self.execute(link, message, payload)
            now = time.perf_counter()
            if last_flush == 0.0:
                last_flush = now
            if not self.pending or now - last_flush > FLUSH_AFTER_S or len(link.out) > FLUSH_BYTES:
                if self.dead_callers:
                    self._bury_callers()
                self.flush_prints()
                with reactor.lock:
                    reactor.flush_dirty()
                last_flush = now
        with reactor.lock:
            reactor.flush_dirty()
        self._write_out()

    def _write_out(self) -> None:
        """The process is about to end: what has been answered is written, as long as its readers go on reading."""
        reactor = self.reactor
        deadline = time.monotonic() + WRITE_OUT_S
        while any(link.out for link in tuple(reactor.links.values())) and time.monotonic() < deadline:
            reactor.poll(0.05)

    def flush_prints(self) -> None:
        """Writes lines that the user's code has printed without an end: a reply may be the last thing we do."""
        for stream in self.streams:
            if stream.partial:
                stream.partial = False
                try:
                    stream.flush()
                except (OSError, ValueError):
                    pass  # closed by the user's code

    def _bury_callers(self) -> None:
        core = self.core
        with core.lock:
            while self.dead_callers:
                core.table.process_died(self.dead_callers.popleft())
            core.settle()

    def _control(self, message: Message, payload: bytes) -> None:
        if isinstance(message, CreateActor):
            become_actor(self, message, payload)
        elif isinstance(message, WorkerAssigned):
            apply_environment(self, message)
        elif isinstance(message, ExitWorker):
            if message.reason == IDLE_EXIT and self._is_needed():
                return
            if self.actor is not None:
                self.actor.finish(self)
            self.exiting = message.reason or "asked to exit"

    def _is_needed(self) -> bool:
        """Whether objects that others may want live here: then an idle worker stays."""
        core = self.core
        with core.lock:
            core.drain()
            return bool(core.entries or self.pending)

    def arm_tick(self) -> None:
        """A reply waits to be written while a task runs: the loop sees to it in a moment."""
        self.ticking = True
        core = self.core
        with core.lock:
            core.reactor.call_later(TICK_MS, self._tick)

    def _tick(self) -> None:
        with self.reactor.lock:
            self.reactor.flush_dirty()
        if self.ran != self.ran_at_tick:
            self.ran_at_tick = self.ran
            self.core.reactor.call_later(TICK_MS, self._tick)
        else:
            self.ticking = False

    # --- functions ---------------------------------------------------------------------------------------------------

    def function(self, function_id: bytes) -> Any:
        """An exported function or class; fetched once. Raises what unpickling raises."""
        function = self.functions.get(function_id)
        if function is None:
            core = self.core
            answer = Answer()
            with core.lock:
                core.gcs.read_kv(FUNCTIONS, function_id, answer.give, wait=True, immutable=True)
                core.reactor.flush_dirty()
            wait_for_gcs(core, answer, "fetching a function that has not run here yet")
            if answer.message is None:
                raise FtrayError("the function could not be fetched: no GCS answers")
            with loading_refs(core.peers.ref_loader(None)):
                function = interruptible(deserialize(answer.message))
            self.functions[function_id] = function
        return function

    # --- one task ----------------------------------------------------------------------------------------------------

    def execute(self, link: Link, message: PushTask, payload: Any) -> None:
        """Runs a function and queues its reply."""
        core = self.core
        if self.assigned.message is None:
            block(core.reactor, self.assigned.waiter, None)
        if link.dirty and not self.ticking:
            self.arm_tick()
        self.ran += 1
        task_id = message.task_id
        self.running = message
        if self.cancelled and task_id in self.cancelled:
            self.running = None
            self.replies.cancelled(link, message)
            return
        if message.max_calls:
            self.count_call(message)
        started = time.perf_counter()
        context = task_context(task_id, message.attempt, "")
        variable = current_task.set(context)
        held = False
        args: Any = None
        kwargs: Any = None
        result: Any = None
        try:
            function = self.functions.get(message.function_id)
            if function is None:
                function = self.function(message.function_id)
            context.function_name = function.__name__
            if message.deps or (message.args_bytes and b"ftray" in payload):
                held = True
                with core.lock:
                    core.table.begin_task((task_id, message.attempt))
                args, kwargs = self.arguments(message, payload)
                result = function(*args, **kwargs)
                args = kwargs = None
            elif message.args_bytes:
                args, kwargs = deserialize_args(payload)
                result = function(*args, **kwargs)
                args = kwargs = None
            else:
                result = function()
            if self.forked:
                end_child()
            self.replies.succeed(link, message, result, started, held)
            result = None
        except BaseException as error:
            args = kwargs = result = None
            self.replies.fail(link, message, error, started, held, context.function_name)
        finally:
            current_task.reset(variable)
            self.running = None

    def function_name(self, function_id: bytes) -> str:
        """The name of a function that has run here."""
        function = self.functions.get(function_id)
        return getattr(function, "__qualname__", None) or function_id.hex()[:12]

    def running_name(self) -> str:
        """What the main thread runs now, for tools."""
        message = self.running
        if message is None:
            return ""
        return self.function_name(message.function_id) if isinstance(message, PushTask) else message.method

    def count_call(self, message: PushTask) -> None:
        """A function with `max_calls` runs: after its last time here the worker ends."""
        count = self.calls.get(message.function_id, 0) + 1
        self.calls[message.function_id] = count
        self.replies.exits = count >= message.max_calls

    def arguments(self, message: PushTask | PushActorTask, payload: Any) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a task with references: loaded, and top-level ones replaced by their values."""
        core = self.core
        token = (message.task_id, message.attempt)
        offset = message.args_bytes
        with loading_refs(core.peers.task_ref_loader(token)):
            args, kwargs = deserialize_args(payload[:offset])
        stored: list[tuple[int | str, bytes]] = []
        for dep in message.deps:
            value: Any = dep.value
            if value.kind == INLINE:
                data = payload[offset : offset + value.size]
                offset += value.size
                if b"ftray" in data:  # references may be inside, which this one covers
                    with core.lock:
                        core.table.note_task_ref(token, dep.object_id, dep.owner, dep.endpoint)
                    value = core.objects.load(dep.object_id, data)
                else:
                    value = deserialize(data)
            elif value.kind == ERROR:
                raise load_task_error(payload[offset : offset + value.size])
            else:
                with core.lock:
                    core.table.note_task_ref(token, dep.object_id, dep.owner, dep.endpoint)
                stored.append((dep.position, dep.object_id))
                continue
            if isinstance(dep.position, int):
                args[dep.position] = value
            else:
                kwargs[dep.position] = value
        if stored:
            for (position, _), value in zip(
                stored, core.objects.load_stored([object_id for _, object_id in stored]), strict=True
            ):
                if isinstance(position, int):
                    args[position] = value
                else:
                    kwargs[position] = value
        return args, kwargs

    # --- blocked, recalled -------------------------------------------------------------------------------------------

    def blocked(self) -> None:
        """A thread of this worker waits in `get`: lend the CPU, hand back what queues behind it."""
        core = self.core
        with core.lock:
            self.blocked_threads += 1
            if self.blocked_threads == 1:
                core.raylet.send(WorkerBlocked())
                if self.actor is None:
                    self._hand_back(None, True)
                    core.reactor.watch(self.reactor._epoll.fileno(), self._bounce)
                core.settle()
        with self.reactor.lock:
            self.reactor.flush_dirty()

    def unblocked(self) -> None:
        core = self.core
        with core.lock:
            self.blocked_threads -= 1
            if self.blocked_threads == 0:
                core.raylet.send(WorkerUnblocked())
                if self.actor is None:
                    core.reactor.unwatch(self.reactor._epoll.fileno())
                    self.wake()
                core.settle()

    def _bounce(self) -> None:
        """Something arrived on a task channel while the main thread is blocked, under the core's lock."""
        self._hand_back(None, True)

    def _hand_back(self, task_ids: frozenset[bytes] | None, blocked: bool) -> None:
        """Returns tasks that have not started to their owners, under the core's lock."""
        reactor = self.reactor
        with reactor.lock:
            reactor.handle(reactor.poll_events(0, 64))
            keep: list[tuple[Link | None, Any, Any]] = []
            back: dict[Link, list[bytes]] = {}
            while self.pending:
                item = self.pending.popleft()
                link, message, _ = item
                if link is None or (task_ids is not None and message.task_id not in task_ids):
                    keep.append(item)
                else:
                    back.setdefault(link, []).append(message.task_id)
            self.pending.extend(keep)
            if keep and not blocked:
                self.wake()
            for link, ids in back.items():
                link.send(TasksReturned(tuple(ids), blocked))
            if blocked and not back:
                # The owner of the running task shall not push more behind it.
                for link in reactor.links.values():
                    link.send(TasksReturned((), True))
            reactor.flush_dirty()

    def recall(self, owner: bytes, task_ids: tuple[bytes, ...]) -> None:
        """An owner wants these back if they have not started, under the core's lock."""
        if self.actor is None:
            self._hand_back(frozenset(task_ids), False)

    # --- the end -----------------------------------------------------------------------------------------------------

    def exit_now(self) -> None:
        """Says goodbye and ends the process."""
        core = self.core
        self.replies.wait_deferred()
        with core.lock:
            core.closed = True
            core.raylet.say_events()
            core.raylet.send(Unregister(self.exiting, self.exit_code))
            core.settle()
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(self.exit_code)
