"""The Dask scheduler: each task of a graph is an ftray task, and its result stays where it was made.

Role: shell between Dask's interface for schedulers and ours. All tasks are submitted at once, in Dask's order, each
with the references of what it needs as arguments: ftray runs it when they are there, and moves values between workers.
This process waits, and lets go of an intermediate result when it is there and all who need it have been submitted: it
is freed with the last of them. Only what was asked for comes here.

Rules: an error is raised as it was, with a note that names its key; what else was submitted is cancelled.

Rejected: submitting a task when its arguments are ready (a round trip through this process for each layer); keeping
references to the end (all intermediate results would be in memory at once).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import dask
from dask.callbacks import local_callbacks, unpack_callbacks
from dask.utils import key_split

import ftray
from ftray.api.lifecycle import init, is_initialized
from ftray.api.objects import get, put
from ftray.api.packaging import portable
from ftray.api.remote_function import RemoteFunction
from ftray.exceptions import FtrayError, TaskError
from ftray.util.arrivals import Arrivals
from ftray.util.dask.graph import Key, Node, flat_keys, mapping_of, nested, nodes_of, order_of, resolved
from ftray.util.errors import as_raised
from ftray.worker.core import get_core
from ftray.worker.refs import ObjectRef
from ftray.worker.waiting import FAILED

WATCH_MAX = 256
"""Tasks submitted between two looks at what has arrived."""


def ftray_dask_get(
    dsk: Any,
    keys: Any,
    *,
    remote_args: Mapping[str, Any] | None = None,
    ray_remote_args: Mapping[str, Any] | None = None,
    ftray_persist: bool = False,
    ray_persist: bool = False,
    **others: Any,
) -> Any:
    """A scheduler for Dask: `dask.compute(x, scheduler=ftray_dask_get)`. Returns the values of `keys`, nested as these.

    Starts a session with `ftray.init()` when none runs. `remote_args` are options of `@ftray.remote` for the tasks
    (`ray_remote_args` is the same). With `ftray_persist` (or `ray_persist`) the references are returned instead of the
    values. Dask's callbacks are called here, with references in place of results. Other keywords are Dask's for its own
    schedulers, and have no meaning here.

    Raises what a task raised, with a note that names its key; KeyError for a key that the graph does not have,
    RuntimeError for a cycle, errors of ftray as `ftray.get`.
    """
    options = {**(ray_remote_args or {}), **(remote_args or {})}
    RemoteFunction(run_node, options)  # raises for wrong options
    if not is_initialized():
        init()
    options = portable(options, get_core())  # a folder is packed once, and not again for each kind of task
    dsk = mapping_of(dsk)
    graph = nodes_of(dsk)
    wanted = flat_keys(keys)
    with local_callbacks() as callbacks:
        run = _Run(_needed(graph, wanted), wanted, options, _Callbacks(dsk, list(callbacks)))
        refs, data = run.go()
    if ftray_persist or ray_persist:
        values = {key: refs[key] if key in refs else put(data[key]) for key in wanted}
    else:
        remote = [key for key in wanted if key in refs]
        values = dict(zip(remote, get([refs[key] for key in remote]))) | data
    return nested(keys, values)


def run_node(key: Any, run: Any, needs: tuple[Any, ...], /, *values: Any) -> Any:
    """In the worker: computes a node from the values of what it needs."""
    try:
        return resolved(run)(dict(zip(needs, values)))
    except Exception as error:
        error.add_note(_note(key))
        raise


def _note(key: Any) -> str:
    return f"in the Dask task {key!r}"


def _needed(look_up: Any, wanted: list[Key]) -> dict[Key, Node]:
    """The nodes that `wanted` are made of. Raises KeyError."""
    found: dict[Key, Node] = {}
    ahead: list[tuple[Key, Key | None]] = [(key, None) for key in wanted]
    while ahead:
        key, whose = ahead.pop()
        if key in found:
            continue
        try:
            node: Node = look_up(key)
        except KeyError:
            asks = "was asked for" if whose is None else f"is needed by {whose!r}"
            raise KeyError(f"the Dask graph has no key {key!r}, which {asks}") from None
        found[key] = node
        ahead += [(need, key) for need in node.needs]
    return found


class _Callbacks:
    """Dask's callbacks, and the state that they look at; nothing of it is kept when there are none."""

    def __init__(self, dsk: Any, callbacks: list[Any]) -> None:
        self.dsk = dsk
        self.all = callbacks
        self.state: dict[str, Any] = {}
        self.started: list[Any] = []
        if callbacks:
            _, _, self.before, self.after, _ = unpack_callbacks(callbacks)

    def start(self, graph: Mapping[Key, Node]) -> None:
        if not self.all:
            return
        for each in self.all:
            if each[0]:
                each[0](self.dsk)
            self.started.append(each)
        waiting = {key: set(node.needs) for key, node in graph.items() if node.run is not None}
        self.state = {
            "waiting": waiting, "ready": [], "running": set(), "finished": set(), "cache": {}, "released": set(),
            "dependencies": {key: set(node.needs) for key, node in graph.items()},
        }  # fmt: skip
        for each in self.all:
            if each[1]:
                each[1](self.dsk, self.state)

    def submitted(self, key: Key) -> None:
        if self.all:
            self.state["waiting"].pop(key, None)
            self.state["running"].add(key)
            for each in self.before:
                each(key, self.dsk, self.state)

    def finished(self, key: Key, ref: ObjectRef[Any]) -> None:
        if self.all:
            self.state["running"].discard(key)
            self.state["finished"].add(key)
            for each in self.after:
                each(key, ref, self.dsk, self.state, None)

    def end(self, failed: bool) -> None:
        for each in self.started:
            if each[4]:
                each[4](self.dsk, self.state, failed)


class _Run:
    """One computation."""

    def __init__(
        self, graph: dict[Key, Node], wanted: list[Key], options: dict[str, Any], callbacks: _Callbacks
    ) -> None:
        self.core = get_core()
        self.graph = graph
        self.options = options
        self.callbacks = callbacks
        self.refs: dict[Key, ObjectRef[Any]] = {}
        self.data: dict[Key, Any] = {}
        self.out: dict[bytes, Key] = {}
        """Results that are not there yet."""
        self.users = dict.fromkeys(graph, 0)
        """How many have not been submitted that need a key; what was asked for has one more, which stays."""
        for key in wanted:
            self.users[key] += 1
        for node in graph.values():
            for need in node.needs:
                self.users[need] += 1
        self.places: dict[Key, int] = {}
        self.remotes: dict[str, RemoteFunction[Any, Any]] = {}
        self.arrivals = Arrivals(self.core)

    def go(self) -> tuple[dict[Key, ObjectRef[Any]], dict[Key, Any]]:
        """References and data of what was asked for, when all is there. Raises the first error of a task."""
        failed = True
        try:
            self.callbacks.start(self.graph)
            order = order_of(self.graph)
            self.places = {key: place for place, key in enumerate(order)}
            new: list[bytes] = []
            for key in order:
                self.submit(key, new)
                if len(new) >= WATCH_MAX:
                    self.arrivals.add(new)
                    new.clear()
                    self.take()
            self.arrivals.add(new)
            while self.out:
                self.arrivals.wait(None)
                self.take()
            failed = False
            return self.refs, self.data
        finally:
            if failed:
                self.cancel()
            self.arrivals.close()
            self.callbacks.end(failed)

    def submit(self, key: Key, new: list[bytes]) -> None:
        node = self.graph[key]
        if node.target is not None:
            if node.target in self.refs:
                self.refs[key] = self.refs[node.target]
            else:
                self.data[key] = self.data[node.target]
        elif node.run is None:
            if isinstance(node.data, ObjectRef):
                self.refs[key] = node.data
            else:
                self.data[key] = node.data
        else:
            try:
                ref = self.remote(key).remote(key, node.run, node.needs, *map(self.reference, node.needs))
            except Exception as error:
                error.add_note(_note(key))
                raise
            self.refs[key] = ref
            self.out[ref._id] = key
            new.append(ref._id)
            self.callbacks.submitted(key)
        for need in node.needs:
            self.users[need] -= 1
            self.drop(need)

    def reference(self, key: Key) -> ObjectRef[Any]:
        """Data that a task needs goes to the store, once."""
        ref = self.refs.get(key)
        if ref is None:
            ref = self.refs[key] = put(self.data[key])
        return ref

    def drop(self, key: Key) -> None:
        """Lets go of a result that is there and that nobody here needs any more."""
        if self.users[key]:
            return
        self.data.pop(key, None)
        ref = self.refs.get(key)
        # The reference of a task is kept while it runs, to cancel it by; another name for it is not needed for that.
        if ref is not None and (ref._id not in self.out or self.graph[key].target is not None):
            del self.refs[key]

    def remote(self, key: Key) -> RemoteFunction[Any, Any]:
        """Tasks of a kind are measured together, and named in errors and in `ftray status`."""
        name = str(key_split(key)) or "dask"
        made = self.remotes.get(name)
        if made is None:
            made = self.remotes[name] = RemoteFunction(run_node, {"name": name, **self.options})
        return made

    def take(self) -> None:
        """Takes in what has arrived. Raises the error of a task."""
        arrived = self.arrivals.arrived
        while arrived:
            object_id = arrived.popleft()
            key = self.out[object_id]
            entry = self.core.entries.get(object_id)
            if entry is not None and entry.state == FAILED:
                raise self.error(key)
            del self.out[object_id]
            self.callbacks.finished(key, self.refs[key])
            self.drop(key)

    def error(self, key: Key) -> BaseException:
        """What to raise when a task has failed: its own error, not that of one which needs it."""
        with self.core.lock:  # those that fail with it do so in one go
            failed = [key]
            for object_id in self.arrivals.arrived:
                entry = self.core.entries.get(object_id)
                if entry is not None and entry.state == FAILED and object_id in self.out:
                    failed.append(self.out[object_id])
        key = min(failed, key=self.places.__getitem__)
        raised: BaseException
        try:
            get(self.refs[key])
            raise AssertionError("a failed object has no value")
        except TaskError as error:
            raised = as_raised(error)
        except FtrayError as error:
            raised = error
        if _note(key) not in getattr(raised, "__notes__", ()):
            raised.add_note(_note(key))
        return raised

    def cancel(self) -> None:
        """Nothing that is still out is wanted."""
        cancel = getattr(ftray, "cancel", None)
        if cancel is None or self.core.closed:
            return
        for key in self.out.values():
            cancel(self.refs[key])


# --- for a whole program ----------------------------------------------------------------------------------------------

_lock = threading.Lock()
_enabled: list[Enabled] = []


class Enabled:
    """What `enable_dask_on_ftray` returns: as a context manager it ends with its block."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = dask.config.set(settings)
        self._ended = False

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Restores the settings of before."""
        with _lock:
            if self._ended:
                return
            self._ended = True
            _enabled.remove(self)
            self._settings.__exit__(None, None, None)


def enable_dask_on_ftray(shuffle: str | None = "tasks", **others: Any) -> Enabled:
    """Makes ftray Dask's scheduler, until `disable_dask_on_ftray()` or the end of the `with` block.

    `shuffle` is how DataFrames are shuffled: "tasks" works between nodes; None leaves Dask's setting. Further options
    of Ray's function of this kind are accepted and change nothing.
    """
    settings: dict[str, Any] = {"scheduler": ftray_dask_get}
    if shuffle is not None:
        settings["dataframe.shuffle.method"] = shuffle
    with _lock:
        made = Enabled(settings)
        _enabled.append(made)
    return made


def disable_dask_on_ftray() -> None:
    """Takes the last `enable_dask_on_ftray` back; does nothing when there is none."""
    with _lock:
        last = _enabled[-1] if _enabled else None
    if last is not None:
        last.end()


def persist(*collections: Any, **options: Any) -> Any:
    """`dask.persist` on ftray: computes collections, leaves their results in the cluster, returns a tuple of new ones.

    They hold references, which later computations on ftray use in place; elsewhere their parts are references.
    """
    return dask.persist(*collections, scheduler=_get_refs, **options)


def _get_refs(dsk: Any, keys: Any, **options: Any) -> Any:
    return ftray_dask_get(dsk, keys, **{**options, "ftray_persist": True})


def _persist_collections(collections: Any, optimize_graph: bool = True, **options: Any) -> Any:
    return persist(*collections, optimize_graph=optimize_graph, **options)


# Newer Dask asks a scheduler whether it has a way to persist.
ftray_dask_get.persist = _persist_collections  # type: ignore[attr-defined]
