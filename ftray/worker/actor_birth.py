"""How a worker becomes an actor: the constructor runs, and the raylet hears of it.

Role: shell, in the worker's main thread. Constructors of trio actors run inside the trio run that later serves their
calls (`TrioMode`), all others before anything is served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ftray.wire.messages import ActorCreation, ActorReady, CreateActor, PushActorTask
from ftray.worker.actor_loops import AsyncioMode, TrioMode
from ftray.worker.actor_modes import ActorMode, SerialMode, ThreadMode
from ftray.worker.core import current_task, task_context
from ftray.worker.failures import remote_traceback
from ftray.worker.waiting import block

if TYPE_CHECKING:
    from ftray.worker.execution import Executor


def become_actor(executor: Executor, message: CreateActor, payload: bytes) -> None:
    """Runs the constructor, and reports. One that raised ends the worker."""
    core = executor.core
    if executor.assigned.message is None:
        block(core.reactor, executor.assigned.waiter, None)
    spec = msgspec.msgpack.decode(payload, type=ActorCreation)
    executor.actor_id = message.actor_id
    executor.incarnation = message.incarnation
    executor.creation = spec
    birth = Birth(executor, message, spec)
    if spec.asynchronous == "trio":
        executor.actor = TrioMode(spec, birth)
    else:
        birth.run(lambda cls, args, kwargs: make_mode(spec, cls, args, kwargs))


def make_mode(spec: ActorCreation, cls: type, args: list[Any], kwargs: dict[str, Any]) -> ActorMode:
    """Constructs the instance and what runs its methods. Raises what the constructor raises."""
    if spec.asynchronous == "asyncio":
        return AsyncioMode(spec, cls, args, kwargs)
    if spec.max_concurrency > 1 or spec.concurrency_groups:
        return ThreadMode(spec, cls(*args, **kwargs))
    return SerialMode(spec, cls(*args, **kwargs))


class Birth:
    """One run of a constructor."""

    def __init__(self, executor: Executor, message: CreateActor, spec: ActorCreation) -> None:
        self.executor = executor
        self.message = message
        self.spec = spec

    def run(self, make: Callable[[type, list[Any], dict[str, Any]], ActorMode]) -> None:
        """Loads the arguments, constructs by `make`, and reports."""
        executor, message, spec = self.executor, self.message, self.spec
        core = executor.core
        token = (message.actor_id, message.incarnation)
        context = task_context(*token, f"{spec.class_name}.__init__", message.actor_id)
        variable = current_task.set(context)
        text = b""
        mode: ActorMode | None = None
        try:
            cls = executor.function(spec.class_id)
            push = PushActorTask(
                message.actor_id, message.actor_id, "__init__", 0, message.incarnation, len(spec.args), spec.deps
            )
            with core.lock:
                core.table.begin_task(token)
            args, kwargs = executor.arguments(push, spec.args + b"".join(spec.inline))
            mode = make(cls, args, kwargs)
            del args, kwargs
        except BaseException as error:
            text = remote_traceback(error).encode("utf-8", "replace")
            error.__traceback__ = None
        finally:
            current_task.reset(variable)
        with core.lock:
            core.drain()
            executor.actor = mode
            ready = ActorReady(message.actor_id, message.incarnation, mode is not None)
            link = core.raylet.link
            # Its creator may let go of the arguments once it is alive: what it keeps of them is registered before.
            if core.table.end_task(token) or mode is None:
                if link is not None:
                    link.send(ready, text)
            elif link is not None:
                executor.replies.deferred[token] = (link, ready, text)
            core.settle()
        if mode is None:
            executor.exiting = "the actor's constructor raised"
