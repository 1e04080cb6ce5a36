"""The heart of a driver or worker: one lock, one reactor, the reference table, and the parts around them.

Role: shell. `Core` ties the parts together and runs the effects of the reference table:

- `objects.ObjectPlane`: values, `get`, `wait`, `put`, the node's store
- `submit.Submitter`: tasks, leases, retries
- `actors.ActorClient`: actors made and called here
- `peers.Peers`: other workers: borrowing, values that a borrower asks for
- `raylet_client.RayletClient`: the link to this node's raylet
- `cancelling.Canceller`: cancels tasks submitted here
- `execution.Executor`: in workers, runs what is pushed

Rules: whoever holds `lock` neither blocks nor calls user code nor serialises. Each entry from a user thread begins with
`drain` (released references) and ends with `settle` (effects). Finalisers only append to `released` and `unviewed`.

Rejected: one class for all of it; a lock for each part (a reply touches four of them).
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftray.config import Config
from ftray.exceptions import LocalRayletDiedError, NotInitializedError, ReentrantCallError
from ftray.ids import children_prefix
from ftray.ownership.references import (
    AckReturns,
    AddBorrower,
    BorrowLost,
    Entry,
    Forgot,
    Freed,
    PinAtOwner,
    ReferenceTable,
    RemoveBorrower,
    TaskMayReply,
)
from ftray.wire.reactor import Reactor

if TYPE_CHECKING:
    import trio

    from ftray.worker.actors import ActorClient
    from ftray.worker.cancelling import Canceller
    from ftray.worker.execution import Executor
    from ftray.worker.gcs_access import GcsAccess
    from ftray.worker.objects import ObjectPlane
    from ftray.worker.peers import Peers
    from ftray.worker.raylet_client import RayletClient
    from ftray.worker.streams import Streams
    from ftray.worker.submit import Submitter

log = logging.getLogger("ftray.worker")

IDLE_TICK_MS, IDLE_TICK_MAX_MS = 100, 800
"""How soon released references are taken in when nothing else happens, at first and at last."""


class TaskContext:
    """What runs in the current thread or coroutine: the parent of whatever it submits."""

    __slots__ = ("_prefix", "actor_id", "attempt", "cancelled", "counter", "function_name", "task_id")

    def __init__(self, prefix: bytes, task_id: bytes, attempt: int = 0, name: str = "", actor_id: bytes = b"") -> None:
        self._prefix = prefix
        self.task_id = task_id
        self.counter = itertools.count().__next__
        self.attempt = attempt
        self.function_name = name
        self.actor_id = actor_id
        self.cancelled = False
        """Somebody wants it cancelled: it may ask, and end."""

    @property
    def prefix(self) -> bytes:
        """The prefix of its children's ids; hashed when the first child is made, since most tasks have none."""
        prefix = self._prefix
        if not prefix:
            prefix = self._prefix = children_prefix(self.task_id)
        return prefix


def task_context(task_id: bytes, attempt: int, name: str, actor_id: bytes = b"") -> TaskContext:
    """The context in which a task runs; its children's prefix is a hash of its id."""
    return TaskContext(b"", task_id, attempt, name, actor_id)


current_task: contextvars.ContextVar[TaskContext | None] = contextvars.ContextVar("ftray_task", default=None)


class Core:
    """See the module. `worker_id` names this process in the cluster."""

    objects: ObjectPlane
    submitter: Submitter
    actors: ActorClient
    peers: Peers
    streams: Streams
    raylet: RayletClient
    gcs: GcsAccess
    canceller: Canceller
    executor: Executor | None

    def __init__(
        self, config: Config, token: bytes, cluster_id: bytes, worker_id: bytes, endpoint: str, is_driver: bool
    ) -> None:
        self.config = config
        self.token = token
        self.cluster_id = cluster_id
        self.worker_id = worker_id
        self.endpoint = endpoint
        self.is_driver = is_driver
        self.lock = threading.RLock()
        """Never taken twice by one thread: it knows its owner so that `inside` can tell."""
        self.inside: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]
        """Whether this thread is in the runtime's tables already: a finaliser or signal handler of user code has
        interrupted it there. Every call of the public interface asks, since it would wait for itself for ever."""
        self.reactor = Reactor(config, token, cluster_id, self.lock, "driver" if is_driver else "worker")
        self.table = ReferenceTable(worker_id)
        self.entries = self.table.entries
        self.released: deque[bytes] = deque()
        self.unviewed: deque[bytes] = deque()
        self.node_id = b""
        self.job_id = b""
        self.namespace = ""
        self.environment = ""
        """The runtime environment of this process as its children inherit it (of a driver: its job's), packed; JSON."""
        self.raylet_endpoint = ""
        self.root_context = TaskContext(b"", b"")
        self.executor = None
        self.closed = False
        self.close_reason = ""
        self.sites: dict[bytes, str] | None = None
        """Where objects were made, for `ftray memory`; None unless `record_call_sites` is set."""
        self.log_sink: Callable[[Any], None] | None = None
        self.callbacks = concurrent.futures.ThreadPoolExecutor(4, "ftray-callback")
        """Runs what calls user code when an object is ready; its threads start with the first use."""
        self._ticking = False
        self._idle_ms = IDLE_TICK_MS
        self._thread: threading.Thread | None = None
        self._trio_token: trio.lowlevel.TrioToken | None = None
        self._stop_scope: trio.CancelScope | None = None

        self.adopt_config(config)

    def adopt_config(self, config: Config) -> None:
        """The settings of the session, which a driver learns when it registers."""
        self.config = config
        if config.record_call_sites and self.sites is None:
            self.sites = {}

    # --- entries ----------------------------------------------------------------------------------------------------

    def context(self) -> TaskContext:
        """Where we are: the running task's context, or the program's."""
        return current_task.get() or self.root_context

    def drain(self) -> None:
        """Takes in what finalisers have queued, under the lock."""
        released = self.released
        if released:
            entries, release = self.entries, self.table.release
            while released:
                try:
                    object_id = released.popleft()
                except IndexError:
                    break
                entry = entries.get(object_id)
                if entry is not None:
                    entry.local -= 1
                    if not entry.local and not entry.contained:  # else a live object keeps it, as `release` would find
                        release(object_id, entry)
        if self.unviewed:
            self.objects.drop_views()
        if self.table.effects:
            self.run_effects()

    def settle(self) -> None:
        """Runs effects and sends what they and the entry queued, under the lock."""
        if self.table.effects:
            self.run_effects()
        if self.submitter.dispatcher.lagging:
            self.submitter.say_demands()
        if self.reactor.dirty:
            self.reactor.flush_dirty()

    def run_effects(self) -> None:
        """Carries out what the reference table decided, under the lock."""
        table = self.table
        while table.effects:
            for effect in table.take_effects():
                if isinstance(effect, Freed):
                    self.objects.freed(effect.object_id, effect.entry)
                elif isinstance(effect, Forgot):
                    self.objects.forgot(effect.object_id, effect.entry)
                elif isinstance(effect, AddBorrower):
                    self.peers.add_borrower(effect.owner, effect.owner_endpoint, effect.object_ids)
                elif isinstance(effect, RemoveBorrower):
                    self.peers.remove_borrower(effect.owner, effect.owner_endpoint, effect.object_ids)
                elif isinstance(effect, PinAtOwner):
                    self.peers.pin_at_owner(effect.owner, effect.owner_endpoint, effect.object_ids)
                elif isinstance(effect, BorrowLost):
                    self.objects.borrow_lost(effect.object_id, effect.entry)
                elif isinstance(effect, AckReturns):
                    self.peers.ack_returns(effect.token)
                elif isinstance(effect, TaskMayReply) and self.executor is not None:
                    self.executor.replies.may_reply(effect.token)

    def tick_soon(self) -> None:
        """Housekeeping runs every `recall_after_ms` while there is anything to keep, under the lock."""
        if not self._ticking and not self.closed:
            self._ticking = True
            self.reactor.call_later(self.config.recall_after_ms, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self.drain()
        busy = self.submitter.tick()
        self.settle()
        if busy:
            self._idle_ms = IDLE_TICK_MS
            self.tick_soon()
        elif self.entries and not self.closed:
            # Nothing but references that user code may let go of without a word: looked after less and less often.
            self._ticking = True
            self.reactor.call_later(self._idle_ms, self._tick)
            self._idle_ms = min(2 * self._idle_ms, IDLE_TICK_MAX_MS)

    # --- the background loop -----------------------------------------------------------------------------------------

    def start_loop(self) -> None:
        """Starts the thread whose trio loop drives the reactor when no user thread does."""
        # Not before: trio is half of what `import ftray` would take; a driver has time for it while its node starts.
        import trio

        from ftray.wire.loop import drive

        started = threading.Event()

        async def main() -> None:
            self._trio_token = trio.lowlevel.current_trio_token()
            with trio.CancelScope() as scope:
                self._stop_scope = scope
                started.set()
                await drive(self.reactor)

        self._thread = threading.Thread(target=trio.run, args=(main,), name="ftray-loop", daemon=True)
        self._thread.start()
        started.wait()

    def stop_loop(self) -> None:
        """Ends that thread and closes all links."""
        import trio

        thread, token, scope = self._thread, self._trio_token, self._stop_scope
        if thread is not None and token is not None and scope is not None:
            try:
                token.run_sync_soon(scope.cancel)
            except trio.RunFinishedError:
                pass
            if thread is not threading.current_thread():
                thread.join(5.0)
        self.callbacks.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            self.reactor.close()

    def check_entry(self) -> None:
        """Raises ReentrantCallError when the caller has interrupted the runtime in this thread."""
        if self.inside():
            raise ReentrantCallError("ftray was called from a finaliser or signal handler that had interrupted ftray")

    def check_open(self) -> None:
        """Raises LocalRayletDiedError when the session has ended under the caller."""
        if self.closed:
            raise LocalRayletDiedError(self.close_reason)

    def fail_all(self, error: Exception) -> None:
        """Nothing more will come (the node is gone, or shutdown): every pending object becomes `error`. Under the
        lock."""
        self.closed = True
        self.close_reason = str(error)
        self.raylet.fail_all(error)
        if self.is_driver:
            self.gcs.close()  # what waits for its answers is told, rather than left waiting
        for object_id, entry in list(self.entries.items()):
            if entry.state == 0:
                self.objects.resolve(object_id, entry, 3, error)


_core: Core | None = None


def set_core(core: Core | None) -> None:
    """Makes `core` this process's."""
    global _core
    _core = core


def get_core() -> Core:
    """This process's core. Raises NotInitializedError."""
    core = _core
    if core is None:
        raise NotInitializedError(
            "ftray is not running in this process: call ftray.init() first (and not after ftray.shutdown(), "
            "nor in a child made by os.fork)"
        )
    return core


def core_or_none() -> Core | None:
    """This process's core, if there is one."""
    return _core


def make_entry(core: Core, object_id: bytes) -> Entry:
    """Enters an object owned here with one local reference, under the lock."""
    return core.table.add_owned(object_id)
