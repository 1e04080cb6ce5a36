"""Options of tasks and actors: their names, types and ranges, checked where they are written.

Role: pure checks. A wrong option is an error at the decorator or at `.options()`, not at the first call.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ftray.scheduling.resources import parse_resources

RESOURCE_OPTIONS = ("num_cpus", "num_gpus", "memory", "resources")
COMMON = (*RESOURCE_OPTIONS, "name")
TASK_OPTIONS = frozenset((*COMMON, "num_returns", "max_calls", "max_retries", "retry_exceptions"))
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
    )
)
METHOD_OPTIONS = frozenset(("num_returns", "name", "max_task_retries", "retry_exceptions"))
LATER = frozenset(
    (
        "runtime_env", "scheduling_strategy", "label_selector", "accelerator_type", "concurrency_groups",
        "concurrency_group", "max_pending_calls", "allow_out_of_order_execution", "placement_group",
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
    elif name == "max_concurrency":
        _integer(name, value, what, 1, "")
    elif name == "num_returns":
        if isinstance(value, str):
            if value in ("streaming", "dynamic"):
                raise ValueError(f"num_returns={value!r} of {what} is not available in this version of ftray")
            raise ValueError(f"num_returns of {what} must be a whole number from 0, not {value!r}")
        _integer(name, value, what, 0, "")
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
    elif name == "event_loop" and value not in ("asyncio", "trio"):
        raise ValueError(f"event_loop of {what} must be 'asyncio' or 'trio', not {value!r}")


def _integer(name: str, value: Any, what: str, least: int, also: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} of {what} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(
            f"{name} of {what} must be at least {least}" + (f" ({also})" if also else "") + f", not {value}"
        )


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
