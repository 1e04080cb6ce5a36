"""What the scheduler wants to know of a Dask graph, for both of Dask's representations.

Role: pure. Up to 2024.11 a graph is a mapping of tuples, lists and literals; since then of `GraphNode` objects, to
which the old form is converted where it still comes. A `Node` says of either what it is: data, another key's name, or
something to run, and which keys it needs.

A reference that is the value of a key is a result like any other. One inside a node's arguments (of `persist`, where
Dask has fused tasks, or the user's own) is replaced by its value in the worker: in a task a reference stands for that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from dask.core import flatten, get_dependencies, istask

from ftray.api.objects import get
from ftray.worker.refs import ObjectRef

try:
    from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef, convert_legacy_graph
except ImportError:
    convert_legacy_graph = None

Key = Hashable


class Node:
    """One key of a graph. `run(values by key)` computes it, or `target` is a key with its value, or it is `data`."""

    __slots__ = ("data", "needs", "run", "target")

    def __init__(
        self, needs: tuple[Key, ...] = (), run: Callable[[dict[Key, Any]], Any] | None = None,
        target: Key | None = None, data: Any = None,
    ) -> None:  # fmt: skip
        self.needs = needs
        self.run = run
        self.target = target
        self.data = data


def mapping_of(graph: Any) -> Mapping[Key, Any]:
    """A graph as a mapping: since 2025 Dask hands over expressions."""
    return graph if isinstance(graph, Mapping) else graph.__dask_graph__()


def nodes_of(graph: Mapping[Key, Any]) -> Callable[[Key], Node]:
    """Looks a key up in a graph of either kind. The function raises KeyError."""
    if convert_legacy_graph is not None:
        converted = convert_legacy_graph(graph)
        return lambda key: _new_node(converted[key])
    plain = dict(graph)
    return lambda key: _old_node(plain, plain[key])


def order_of(graph: Mapping[Key, Node]) -> list[Key]:
    """The keys in Dask's order: after what they need, and so that results are used up soon.

    Raises RuntimeError for a graph with a cycle.
    """
    from dask.order import order

    def nothing(*_: Any) -> None: ...

    if convert_legacy_graph is not None:
        plain: dict[Key, Any] = {
            key: Task(key, nothing, *map(TaskRef, node.needs)) if node.needs else DataNode(key, None)
            for key, node in graph.items()
        }
    else:
        plain = {key: (nothing, *node.needs) if node.needs else None for key, node in graph.items()}
    places = order(plain)
    return sorted(graph, key=places.__getitem__)


def flat_keys(keys: Any) -> list[Key]:
    """The keys of nested lists of them, each once."""
    return list(dict.fromkeys(flatten(keys))) if isinstance(keys, list) else [keys]


def nested(keys: Any, values: Mapping[Key, Any]) -> Any:
    """Values in the place of keys; lists become tuples, as with Dask's own schedulers."""
    if isinstance(keys, list):
        return tuple(nested(each, values) for each in keys)
    return values[keys]


# --- since 2024.12 --------------------------------------------------------------------------------------------------


def _new_node(node: Any) -> Node:
    if isinstance(node, DataNode):
        return Node(data=node.value)
    if isinstance(node, Alias):
        return Node((node.target,), target=node.target)
    return Node(tuple(node.dependencies), node)


def _swap_new(part: Any, swap: Callable[[Any], Any]) -> Any:
    """A part of a node with the references in it swapped; changes the node itself, which is the worker's own."""
    if isinstance(part, ObjectRef):
        return swap(part)
    if isinstance(part, DataNode):
        return DataNode(part.key, swap(part.value)) if isinstance(part.value, ObjectRef) else part
    if isinstance(part, Task):
        part.args = tuple(_swap_new(each, swap) for each in part.args)
        part.kwargs = {name: _swap_new(each, swap) for name, each in part.kwargs.items()}
    elif type(part) is dict and part and isinstance(next(iter(part.values())), GraphNode):  # of fused tasks
        return {key: _swap_new(each, swap) for key, each in part.items()}
    return part


# --- before ---------------------------------------------------------------------------------------------------------


class OldTask:
    """Runs a task of tuples."""

    __slots__ = ("task",)

    def __init__(self, task: Any) -> None:
        self.task = task

    def __call__(self, values: dict[Key, Any]) -> Any:
        from dask.core import _execute_task

        return _execute_task(self.task, values)


def _old_node(graph: Mapping[Key, Any], value: Any) -> Node:
    try:
        if not istask(value) and value in graph:
            return Node((value,), target=value)
    except TypeError:
        pass  # not hashable, so not a key
    needs = tuple(get_dependencies(graph, task=value))
    if not needs and not _has_tasks(value):
        return Node(data=value)
    return Node(needs, OldTask(value))


def _has_tasks(value: Any) -> bool:
    return istask(value) or (type(value) is list and any(map(_has_tasks, value)))


class _Literal:
    """Gives a value in a task of tuples: there it would be looked at, and taken for a key or a task."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


def _swap_old(part: Any, swap: Callable[[Any], Any]) -> Any:
    if isinstance(part, ObjectRef):
        return (_Literal(swap(part)),)
    if istask(part):
        return (part[0], *(_swap_old(each, swap) for each in part[1:]))
    return [_swap_old(each, swap) for each in part] if type(part) is list else part


# --- in the worker --------------------------------------------------------------------------------------------------


def resolved(run: Any) -> Any:
    """A node's `run` with the references in its arguments replaced by their values."""
    swap_in: Any = _swap_new
    part = run
    if isinstance(run, OldTask):
        swap_in, part = _swap_old, run.task
    found: dict[ObjectRef[Any], Any] = {}

    def note(ref: ObjectRef[Any]) -> ObjectRef[Any]:
        found[ref] = None
        return ref

    swap_in(part, note)
    if not found:
        return run
    found = dict(zip(found, get(list(found))))
    part = swap_in(part, found.__getitem__)
    return OldTask(part) if isinstance(run, OldTask) else part
