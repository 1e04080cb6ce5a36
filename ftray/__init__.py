"""ftray: a fault-tolerant distributed runtime for Python.

    import ftray

    ftray.init()

    @ftray.remote
    def square(x):
        return x * x

    print(ftray.get([square.remote(i) for i in range(4)]))

Names are loaded when they are first used, so that importing ftray is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "init": "ftray.api.lifecycle",
    "shutdown": "ftray.api.lifecycle",
    "is_initialized": "ftray.api.lifecycle",
    "remote": "ftray.api.remote_function",
    "get": "ftray.api.objects",
    "put": "ftray.api.objects",
    "wait": "ftray.api.objects",
    "cancel": "ftray.api.cancel",
    "ObjectRef": "ftray.worker.refs",
    "ObjectRefGenerator": "ftray.api.generators",
    "DynamicObjectRefGenerator": "ftray.api.generators",
    "method": "ftray.api.actor",
    "get_actor": "ftray.api.actor",
    "list_named_actors": "ftray.api.actor",
    "kill": "ftray.api.actor",
    "exit_actor": "ftray.api.actor",
    "ActorHandle": "ftray.api.actor",
    "get_runtime_context": "ftray.api.context",
    "nodes": "ftray.api.context",
    "cluster_resources": "ftray.api.context",
    "available_resources": "ftray.api.context",
    "timeline": "ftray.api.timeline",
}
_MODULES = ("exceptions", "actor", "runtime_context", "runtime_env", "util")

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is not None:
        value = getattr(importlib.import_module(where), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"ftray.{name}")
    raise AttributeError(f"module 'ftray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE, *_MODULES])


if TYPE_CHECKING:
    from ftray.api.actor import (
        ActorHandle as ActorHandle,
    )
    from ftray.api.actor import (
        exit_actor as exit_actor,
    )
    from ftray.api.actor import (
        get_actor as get_actor,
    )
    from ftray.api.actor import (
        kill as kill,
    )
    from ftray.api.actor import (
        list_named_actors as list_named_actors,
    )
    from ftray.api.actor import (
        method as method,
    )
    from ftray.api.cancel import cancel as cancel
    from ftray.api.context import (
        available_resources as available_resources,
    )
    from ftray.api.context import (
        cluster_resources as cluster_resources,
    )
    from ftray.api.context import (
        get_runtime_context as get_runtime_context,
    )
    from ftray.api.context import (
        nodes as nodes,
    )
    from ftray.api.generators import DynamicObjectRefGenerator as DynamicObjectRefGenerator
    from ftray.api.generators import ObjectRefGenerator as ObjectRefGenerator
    from ftray.api.lifecycle import init as init
    from ftray.api.lifecycle import is_initialized as is_initialized
    from ftray.api.lifecycle import shutdown as shutdown
    from ftray.api.objects import get as get
    from ftray.api.objects import put as put
    from ftray.api.objects import wait as wait
    from ftray.api.remote_function import remote as remote
    from ftray.api.timeline import timeline as timeline
    from ftray.worker.refs import ObjectRef as ObjectRef
