"""Where am I, and what is there: the runtime context, nodes and resources.

Role: shell around the core's context and the raylet's answers.
"""

from __future__ import annotations

import json
from typing import Any

from ftray.api.actor import ActorHandle
from ftray.api.actor import current_actor as current_actor_of
from ftray.exceptions import FtrayError
from ftray.runtime_env import RuntimeEnv, decode
from ftray.wire.handshake import ROLE_TOOL
from ftray.wire.messages import Message, ToolQuery, ToolReply
from ftray.wire.reactor import Link
from ftray.worker.core import Core, get_core
from ftray.worker.gcs_access import wait_for_gcs
from ftray.worker.objects import Answer
from ftray.worker.waiting import block


class RuntimeContext:
    """What is known of the program, task or actor that asks."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._context = core.context()

    def get_job_id(self) -> str:
        return self._core.job_id.hex()

    def get_node_id(self) -> str:
        return self._core.node_id.hex()

    def get_worker_id(self) -> str:
        return self._core.worker_id.hex()

    def get_task_id(self) -> str | None:
        """The id of the running task or actor call; None in a driver."""
        return self._context.task_id.hex() or None

    def get_task_name(self) -> str | None:
        return self._context.function_name or None

    def get_task_function_name(self) -> str | None:
        """The same: a task is called by its function's name."""
        return self.get_task_name()

    def is_canceled(self) -> bool:
        """Whether `ftray.cancel` was called for the task or actor call that asks. Calls of actors without coroutines
        are not interrupted: a long one asks from time to time, cleans up and returns.

        Raises RuntimeError in a driver, where there is nothing to cancel.
        """
        context, executor = self._context, self._core.executor
        if executor is None or not context.task_id:
            raise RuntimeError("is_canceled is for tasks and methods of actors: a program is not cancelled")
        return context.cancelled or context.task_id in executor.cancelled

    is_cancelled = is_canceled

    def get_actor_id(self) -> str | None:
        executor = self._core.executor
        return executor.actor_id.hex() if executor is not None and executor.actor_id else None

    def get_actor_name(self) -> str | None:
        """The name of this actor, empty if it has none; None outside of actors."""
        executor = self._core.executor
        return executor.creation.name if executor is not None and executor.creation is not None else None

    @property
    def current_actor(self) -> ActorHandle:
        """A handle of this actor, to hand to others. Raises RuntimeError outside of actors.

        An actor that keeps it keeps itself alive.
        """
        return current_actor_of(self._core)

    def get_assigned_resources(self) -> dict[str, float]:
        """What this worker has of its node for the task or actor that it runs; the CPUs of a task also while it waits
        in `get` and has lent them. Raises RuntimeError in a driver, FtrayError when the node does not answer."""
        core = self._core
        if core.executor is None:
            raise RuntimeError("get_assigned_resources is for tasks and actors: a program has no resources of its own")
        worker_id, actor_id = core.worker_id.hex(), core.executor.actor_id.hex()
        for lease in ask_raylet("status")["leases"]:
            if lease["worker_id"] == worker_id or (actor_id and lease["actor"] == actor_id):
                return {name: float(amount) for name, amount in lease["resources"].items()}
        return {}

    def get_node_labels(self) -> dict[str, str]:
        """The labels of this node. Raises FtrayError when the node does not answer."""
        labels: dict[str, str] = ask_raylet("status")["node"]["labels"]
        return labels

    def get_attempt_number(self) -> int:
        """0 for the first run of the task, counted up with each retry."""
        return self._context.attempt

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether this actor was restarted after a death."""
        executor = self._core.executor
        return executor is not None and bool(executor.actor_id) and executor.incarnation > 0

    @property
    def namespace(self) -> str:
        return self._core.namespace

    @property
    def runtime_env(self) -> RuntimeEnv:
        """The runtime environment of this task, actor or driver as its children inherit it: local paths have become
        packages of the cluster. Of a driver it is the job's, which the driver itself does not run in."""
        return decode(self._core.environment)

    def get_runtime_env_string(self) -> str:
        """The same as JSON."""
        return self._core.environment or "{}"

    @property
    def gcs_address(self) -> str:
        return ",".join(self._core.gcs.client.endpoints)


def get_runtime_context() -> RuntimeContext:
    """The context of the caller. Raises NotInitializedError."""
    return RuntimeContext(get_core())


class _ToolLink:
    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        if isinstance(message, ToolReply):
            self.answer.give(message, bytes(payload))
            link.close("answered")

    def on_closed(self, link: Link, reason: str) -> None:
        self.answer.fail(FtrayError(f"the raylet did not answer: {reason}"))


def ask_raylet(what: str, **arguments: Any) -> Any:
    """Asks this node's raylet a question of the command-line tools; returns the decoded answer. Raises FtrayError."""
    core = get_core()
    answer = Answer()
    with core.lock:
        link = core.reactor.connect(core.raylet_endpoint, ROLE_TOOL, _ToolLink(answer))
        link.send(ToolQuery(1, what, arguments))
        core.settle()
    block(core.reactor, answer.waiter, 10.0)
    if answer.error is not None:
        raise answer.error
    if answer.message is None:
        raise FtrayError("the raylet did not answer within 10 s")
    if answer.message.error:
        raise FtrayError(answer.message.error)
    return json.loads(answer.payload)


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, dead ones included, with ids, addresses, resources and labels."""
    core = get_core()
    answer = Answer()
    with core.lock:
        core.gcs.nodes(answer.give)
        core.settle()
    wait_for_gcs(core, answer, "ftray.nodes()")
    core.check_open()
    return [
        {
            "NodeID": record.node_id.hex(),
            "Alive": record.state == 1,
            "NodeManagerHostname": record.hostname,
            "NodeManagerAddress": record.endpoint,
            "Resources": dict(record.resources),
            "Labels": dict(record.labels),
            "Pid": record.pid,
        }
        for record in answer.message or ()
    ]


def cluster_resources() -> dict[str, float]:
    """The total resources of all live nodes."""
    total: dict[str, float] = {}
    for node in nodes():
        if node["Alive"]:
            for name, amount in node["Resources"].items():
                total[name] = total.get(name, 0.0) + amount
    return total


def available_resources() -> dict[str, float]:
    """What is not in use on this node at the moment."""
    status = ask_raylet("status")
    available: dict[str, float] = status["resources"]["available"]
    return available
