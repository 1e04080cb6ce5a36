"""What the scheduler wants to know of a Dask graph, for both of Dask's representations.

Role: pure. Up to 2024.11 a graph is a mapping of tuples, lists and literals; since then of `GraphNode` objects, to
which the old form is converted where it still comes. A `Node` says of either what it is: data, another key's name, or
something to run, and which keys it needs.

References inside a node's arguments (of `persist`, or the user's own) are taken out and become dependencies like
others: in a task a reference stands for its value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from dask.core import flatten, get_dependencies, istask

from ftray.worker.refs import ObjectRef

try:
    from dask._task_spec import Alias, DataNode, Task, TaskRef, convert_legacy_graph
except ImportError:
    convert_legacy_graph = None

Key = Hashable


class RefKey:
    """Names, among the dependencies of a node, a reference that was found in its arguments."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __hash__(self) -> int:
        return hash((RefKey, self.index))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RefKey) and other.index == self.index

    def __repr__(self) -> str:
        return f"<reference {self.index}>"


class Node:
    """One key of a graph. `run(values by key)` computes it, `target` is a key with the same value, else it is `data`."""

    __slots__ = ("data", "needs", "refs", "run", "target")

    def __init__(
        self,
        needs: tuple[Key, ...] = (),
        run: Callable[[dict[Key, Any]], Any] | None = None,
        target: Key | None = None,
        data: Any = None,
        refs: tuple[ObjectRef[Any], ...] = (),
    ) -> None:
        self.needs = needs
        self.run = run
        self.target = target
        self.data = data
        self.refs = refs
        """Found in its arguments: their values are in `run`'s mapping, by `RefKey` of their number here."""


def nodes_of(graph: Any) -> Callable[[Key], Node]:
    """Looks a key up in a graph of either kind. The function raises KeyError."""
    if not isinstance(graph, Mapping):
        graph = graph.__dask_graph__()
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
    refs: list[ObjectRef[Any]] = []
    if type(node) is Task and any(isinstance(each, ObjectRef) for each in (*node.args, *node.kwargs.values())):
        needs = tuple(node.dependencies)

        def out(value: Any) -> Any:
            if not isinstance(value, ObjectRef):
                return value
            refs.append(value)
            return TaskRef(RefKey(len(refs) - 1))

        named = {name: out(value) for name, value in node.kwargs.items()}
        changed = Task(node.key, node.func, *map(out, node.args), **named)
        return Node(needs, changed, refs=tuple(refs))
    return Node(tuple(node.dependencies), node)


# --- before ---------------------------------------------------------------------------------------------------------


class _OldTask:
    """Runs a task of tuples."""

    __slots__ = ("task",)

    def __init__(self, task: Any) -> None:
        self.task = task

    def __call__(self, values: dict[Key, Any]) -> Any:
        from dask.core import _execute_task

        return _execute_task(self.task, values)


def _old_node(graph: Mapping[Key, Any], value: Any) -> Node:
    if isinstance(value, ObjectRef):
        return Node(data=value)
    try:
        if not istask(value) and value in graph:
            return Node((value,), target=value)
    except TypeError:
        pass  # not hashable, so not a key
    needs = tuple(get_dependencies(graph, task=value))
    refs: list[ObjectRef[Any]] = []

    def out(part: Any) -> Any:
        if isinstance(part, ObjectRef):
            refs.append(part)
            return RefKey(len(refs) - 1)
        if istask(part):
            return (part[0], *map(out, part[1:]))
        return [out(each) for each in part] if type(part) is list else part

    changed = out(value)
    if not needs and not refs and not _has_tasks(value):
        return Node(data=value)
    return Node(needs, _OldTask(changed), refs=tuple(refs))


def _has_tasks(value: Any) -> bool:
    return istask(value) or (type(value) is list and any(map(_has_tasks, value)))
