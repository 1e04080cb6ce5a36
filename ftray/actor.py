"""Actor names under the module path that Ray's users know (`ray.actor`)."""

from __future__ import annotations

from ftray.api.actor import ActorClass, ActorHandle, ActorMethod, exit_actor, method

__all__ = ["ActorClass", "ActorHandle", "ActorMethod", "exit_actor", "method"]
