"""The runtime context under the module path that Ray's users know (`ray.runtime_context`)."""

from __future__ import annotations

from ftray.api.context import RuntimeContext, get_runtime_context

__all__ = ["RuntimeContext", "get_runtime_context"]
