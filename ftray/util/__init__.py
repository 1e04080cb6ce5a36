"""Conveniences on top of the public interface, under the names and module paths that Ray's users know.

Names are loaded when they are first used, as in `ftray` itself: importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "ActorPool": "ftray.util.actor_pool",
    "as_completed": "ftray.util.completion",
    "map_unordered": "ftray.util.completion",
    "list_named_actors": "ftray.api.actor",
    "FtrayExecutor": "ftray.util.executor",
}
_MODULES = ("actor_pool", "completion", "dask", "executor", "joblib", "multiprocessing", "queue")

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is not None:
        value = getattr(importlib.import_module(where), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"ftray.util.{name}")
    raise AttributeError(f"module 'ftray.util' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE, *_MODULES])


if TYPE_CHECKING:
    from ftray.api.actor import list_named_actors as list_named_actors
    from ftray.util.actor_pool import ActorPool as ActorPool
    from ftray.util.completion import as_completed as as_completed
    from ftray.util.completion import map_unordered as map_unordered
    from ftray.util.executor import FtrayExecutor as FtrayExecutor
