"""Options of tasks and actors: their names, types and ranges, checked where they are written.

Role: pure checks. A wrong option is an error at the decorator or at `.options()`, not at the first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ftray.runtime_env import RuntimeEnv
from ftray.scheduling.resources import parse_resources
from ftray.wire.messages import DYNAMIC, STREAMING

RETURN_WORDS = {"streaming": STREAMING, "dynamic": DYNAMIC}
NO_BOUND = -1

RESOURCE_OPTIONS = ("num_cpus", "num_gpus", "memory", "resources")
COMMON = (*RESOURCE_OPTIONS, "name", "runtime_env")
AHEAD_OPTIONS = ("generator_backpressure_num_objects", "_generator_backpressure_num_objects")
"""Two names of one option: how many items of a streaming task may wait unread."""
TASK_OPTIONS = frozenset((*COMMON, "num_returns", "max_calls", "max_retries", "retry_exceptions", *AHEAD_OPTIONS))
ACTOR_OPTIONS = frozenset(
    (
        *COMMON,
        "max_restarts",
        "max_task_retries",
        "max_concurrency",
        "lifetime",
        "namespace",
        "get_if_exists",
        "event_loop",
        "concurrency_groups",
        "max_pending_calls",
        "allow_out_of_order_execution",
    )
)
METHOD_OPTIONS = frozenset(
    ("num_returns", "name", "max_task_retries", "retry_exceptions", "concurrency_group", *AHEAD_OPTIONS)
)
LATER = frozenset(
    (
        "scheduling_strategy", "label_selector", "accelerator_type", "placement_group",
        "placement_group_bundle_index", "placement_group_capture_child_tasks",
    )
)  # fmt: skip
"""Options of Ray's that this version does not have yet: named, so that the error is not a riddle."""


def check_options(options: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    """Raises TypeError for an unknown option, ValueError or TypeError for a wrong value."""
    for name, value in options.items():
        if name not in known:
            if name in LATER:
                raise TypeError(f"option {name!r} of {what} is not available in this version of ftray")
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"unknown option {name!r} of {what}{hint} Known are: {', '.join(sorted(known))}")
        _check_value(name, value, what)
    resources = {name: options[name] for name in RESOURCE_OPTIONS if options.get(name) is not None}
    if resources:
        resource_needs(resources, 0.0)


def _check_value(name: str, value: Any, what: str) -> None:
    if name in ("max_retries", "max_restarts", "max_task_retries"):
        _integer(name, value, what, -1, "-1 for without end")
    elif name == "max_calls":
        _integer(name, value, what, 0, "0 for without end")
    elif name == "runtime_env":
        if value is not None:
            RuntimeEnv.of(value)
    elif name == "max_concurrency":
        _integer(name, value, what, 1, "")
    elif name == "max_pending_calls":
        if value is not None and value != -1:
            _integer(name, value, what, 1, "or -1 for without end")
    elif name == "concurrency_groups":
        _groups(value, what)
    elif name == "concurrency_group":
        if value is not None and (not isinstance(value, str) or not value):
            raise TypeError(f"{name} of {what} must be the name of a group, not {value!r}")
    elif name == "num_returns":
        if isinstance(value, str):
            if value not in RETURN_WORDS:
                raise ValueError(
                    f'num_returns of {what} must be a whole number from 0, "streaming" or "dynamic", not {value!r}'
                )
        elif value is not None:
            _integer(name, value, what, 0, "")
    elif name in AHEAD_OPTIONS:
        if value is not None and (value != NO_BOUND or isinstance(value, bool)):
            _integer(name, value, what, 1, f"or {NO_BOUND} for no bound")
    elif name == "retry_exceptions":
        if isinstance(value, bool) or value is None:
            return
        if not isinstance(value, list | tuple) or not all(
            isinstance(item, type) and issubclass(item, BaseException) for item in value
        ):
            raise TypeError(f"retry_exceptions of {what} must be a bool or a list of exception types, not {value!r}")
    elif name in ("name", "namespace"):
        if value is not None and (not isinstance(value, str) or not value):
            raise TypeError(f"{name} of {what} must be a non-empty string, not {value!r}")
    elif name == "lifetime":
        if value not in (None, "detached", "non_detached"):
            raise ValueError(f"lifetime of {what} must be 'detached' or None, not {value!r}")
    elif name == "get_if_exists":
        if not isinstance(value, bool):
            raise TypeError(f"get_if_exists of {what} must be a bool, not {value!r}")
    elif name == "allow_out_of_order_execution":
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} of {what} must be a bool, not {value!r}")
    elif name == "event_loop" and value not in ("asyncio", "trio"):
        raise ValueError(f"event_loop of {what} must be 'asyncio' or 'trio', not {value!r}")


def _groups(value: Any, what: str) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise TypeError(f"concurrency_groups of {what} must be a dict of names and numbers, not {value!r}")
    for group, limit in value.items():
        if not isinstance(group, str) or not group:
            raise TypeError(f"a name in concurrency_groups of {what} must be a non-empty string, not {group!r}")
        _integer(f"concurrency group {group!r}", limit, what, 1, "")


def _integer(name: str, value: Any, what: str, least: int, also: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} of {what} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(
            f"{name} of {what} must be at least {least}" + (f" ({also})" if also else "") + f", not {value}"
        )


def return_count(options: Mapping[str, Any], function: Any) -> int:
    """`num_returns` as it travels: a generator function streams unless the options say otherwise."""
    count = options.get("num_returns")
    if count is None:
        generates = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        return STREAMING if generates else 1
    return RETURN_WORDS[count] if isinstance(count, str) else int(count)


def items_ahead(options: Mapping[str, Any], default: int) -> int:
    """How many items of a streaming task may wait unread, as it travels: 0 is no bound of its own."""
    for name in AHEAD_OPTIONS:
        bound = options.get(name)
        if bound is not None:
            return 0 if bound == NO_BOUND else int(bound)
    return default


def resource_needs(options: Mapping[str, Any], default_cpus: float) -> dict[str, float]:
    """What a task or actor needs, from its options. Raises ValueError or TypeError."""
    cpus = options.get("num_cpus")
    return parse_resources(
        num_cpus=default_cpus if cpus is None else cpus,
        num_gpus=options.get("num_gpus"),
        memory=options.get("memory"),
        resources=options.get("resources"),
    )


def exception_names(types: Any) -> Any:
    """`retry_exceptions` as the submitter compares it: a bool, or `module.qualname` of the types."""
    if types is None or isinstance(types, bool):
        return bool(types)
    return frozenset(f"{item.__module__}.{item.__qualname__}" for item in types)
