"""What a handle has to know of its actor: the methods with their options, and how calls are made.

Role: pure. Facts are made from the class and the options with which an actor is made, travel inside handles, and are
kept in the GCS for handles made from an actor's name.

Rejected: asking the actor for its methods (a typing error would show only at `get`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import msgspec

from ftray.api.options import exception_names, items_ahead, return_count

_NOT_CALLED = frozenset(("__class_getitem__", "__deepcopy__", "__del__", "__getattr__"))
"""Special methods that others look for on a handle, or that mean nothing when they are called from outside."""


class MethodFacts(msgspec.Struct, array_like=True, frozen=True):
    """One method: what `@ftray.method` says of it."""

    num_returns: int = 1
    group: str = ""
    """Its concurrency group; empty is the default one."""
    max_task_retries: int | None = None
    """None is the actor's."""
    retry_exceptions: bool | frozenset[str] = False
    name: str = ""
    """By which errors call it, if not by `Class.method`."""
    ahead_max: int | None = None
    """For a generator: how many items may wait unread (0: no bound); None is the cluster's setting."""


class HandleFacts(msgspec.Struct, array_like=True, frozen=True):
    """What all handles of one actor share."""

    class_name: str
    methods: dict[str, MethodFacts]
    max_task_retries: int = 0
    max_pending_calls: int = -1
    groups: tuple[str, ...] = ()
    out_of_order: bool = False


class NamedFacts(msgspec.Struct, array_like=True, frozen=True):
    """What a handle made from an actor's name needs."""

    owner_endpoint: str
    facts: HandleFacts


def method_table(cls: type) -> dict[str, MethodFacts]:
    """The methods of a class that can be called, inherited ones included, and special ones that it defines."""
    table = {"__ftray_ready__": MethodFacts()}
    for name, member in inspect.getmembers(cls, callable):
        if name.startswith("__") and name.endswith("__") and name != "__call__":
            if hasattr(object, name) or name in _NOT_CALLED:
                continue
        table[name] = _method_facts(member, getattr(member, "__ftray_method_options__", {}))
    return table


def _method_facts(method: Any, options: Mapping[str, Any]) -> MethodFacts:
    ahead_max = items_ahead(options, -1)
    return MethodFacts(
        num_returns=return_count(options, method),
        group=options.get("concurrency_group") or "",
        max_task_retries=options.get("max_task_retries"),
        retry_exceptions=exception_names(options.get("retry_exceptions")),
        name=options.get("name") or "",
        ahead_max=None if ahead_max < 0 else ahead_max,
    )


def has_coroutines(cls: type) -> bool:
    """Whether any method is a coroutine function (or an asynchronous generator): then the actor is an async one."""
    return any(
        inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
        for _, member in inspect.getmembers(cls, callable)
    )


def check_groups(class_name: str, methods: Mapping[str, MethodFacts], groups: Mapping[str, int]) -> None:
    """Raises ValueError for a method whose group the class does not have."""
    for name, method in methods.items():
        if method.group and method.group not in groups:
            raise unknown_group(method.group, f"{class_name}.{name}", tuple(groups))


def unknown_group(group: str, what: str, groups: tuple[str, ...]) -> ValueError:
    """The error for a concurrency group that an actor does not have."""
    known = f"it has {', '.join(map(repr, groups))}" if groups else "it has none (option concurrency_groups)"
    return ValueError(f"the actor of {what} has no concurrency group {group!r}: {known}")


def out_of_order(options: Mapping[str, Any], asynchronous: bool, class_name: str) -> bool:
    """Whether calls may overtake one another, from the options of an actor.

    Raises ValueError when order is asked for where several calls run at the same time.
    """
    several = asynchronous or (options.get("max_concurrency") or 1) > 1 or bool(options.get("concurrency_groups"))
    said: bool | None = options.get("allow_out_of_order_execution")
    if said is False and several:
        kind = "async methods" if asynchronous else "several threads"
        raise ValueError(
            f"allow_out_of_order_execution=False of the remote class {class_name}: an actor with {kind} runs several "
            "calls at the same time, and cannot keep their order"
        )
    return several if said is None else said
