"""A driver joins a node, and leaves it.

Role: shell, apart from `lifecycle` because importing it takes a tenth of a second, which `init` spends while the node
starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from ftray.api.output import OutputPrinter
from ftray.config import Config
from ftray.exceptions import FtrayError, GcsUnavailableError
from ftray.ids import driver_prefix
from ftray.runtime_env import THREAD_VARIABLES, decode
from ftray.store.arena import Arena
from ftray.wire.handshake import ROLE_PEER
from ftray.wire.messages import RegisterClient, Unregister
from ftray.wire.reactor import Handler, Link
from ftray.worker import core as core_module
from ftray.worker import inheritance, interrupts
from ftray.worker.assembly import assemble
from ftray.worker.class_environments import prepare
from ftray.worker.core import Core, TaskContext
from ftray.worker.serialization import set_default_ref_loader
from ftray.worker.waiting import block

LAST_OUTPUT_TIMEOUT_S = 0.5
"""How long `shutdown` waits for what workers have printed."""


def join(
    info: Mapping[str, Any],
    namespace: str,
    log_to_driver: bool,
    timeout_s: float,
    runtime_env: Mapping[str, Any] | None = None,
    own_node: bool = True,
) -> tuple[Core, OutputPrinter | None]:
    """Connects to the node that `info` describes; this process is its driver from then on.

    `own_node` says that this process has started the node, which has inherited its environment variables. Raises
    AuthenticationError, ClusterNotFoundError, GcsUnavailableError, FtrayError, and for `runtime_env` as
    `packaging.pack_environment` does.
    """
    worker_id = os.urandom(16)
    session_dir: str = info["session_dir"]
    endpoint = f"unix:{session_dir}/sockets/d-{worker_id.hex()[:12]}.sock"
    core = Core(
        Config(), bytes.fromhex(info["token"]), bytes.fromhex(info["cluster_id"]), worker_id, endpoint, is_driver=True
    )
    core.raylet_endpoint = info["raylet_endpoint"]
    assemble(core, session_dir)
    printer = OutputPrinter() if log_to_driver else None
    core.log_sink = printer

    def accept(link: Link) -> Handler | None:
        return core.peers if link.role == ROLE_PEER else None

    try:
        core.reactor.listen(endpoint, accept)
        core.raylet.connect(
            info["raylet_endpoint"],
            RegisterClient(
                worker_id, os.getpid(), endpoint, True, b"", " ".join(sys.argv)[:500], namespace, log_to_driver,
                tuple(path or os.getcwd() for path in sys.path), os.getcwd(),
            ),
        )  # fmt: skip
        with core.lock:
            core.settle()
        answer = core.raylet.registered
        if not block(core.reactor, answer.waiter, timeout_s):
            raise FtrayError(f"the node at {info['raylet_endpoint']} did not answer within {timeout_s:.0f} s")
        if answer.error is not None:
            raise answer.error
        registered = answer.message
        if registered.error:
            kind = GcsUnavailableError if registered.gcs_away else FtrayError
            raise kind(f"the node refused this driver: {registered.error}")
    except BaseException:
        core.closed = True
        set_default_ref_loader(None)
        with core.lock:
            core.reactor.close()
        _unlink(endpoint)
        raise
    if answer.payload is not None:
        core.reactor.config = answer.payload
        core.adopt_config(answer.payload)
    core.node_id = registered.node_id
    core.job_id = registered.job_id
    core.namespace = registered.namespace or namespace
    core.root_context = TaskContext(driver_prefix(core.job_id, worker_id), b"")
    core.objects.arena = Arena.open(registered.node_pid, registered.arena_fd, registered.arena_bytes)
    core.gcs.set_endpoints(list(registered.gcs_endpoints))
    core_module.set_core(core)
    inheritance.install()
    interrupts.install()
    core.start_loop()
    if not own_node:
        runtime_env = _with_thread_counts(runtime_env)
    if runtime_env:
        from ftray.api.packaging import environment_of

        try:
            core.environment = environment_of(core, runtime_env)
            if core.environment and decode(core.environment).get("config", {}).get("eager_install", True):
                prepare(core, core.environment)
        except BaseException:
            leave(core)
            raise
    return core, printer


def _with_thread_counts(runtime_env: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The job's environment, with what this process's says of thread counts: a node that runs already can't know."""
    said = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    if not said:
        return runtime_env
    return {**(runtime_env or {}), "env_vars": {**said, **((runtime_env or {}).get("env_vars") or {})}}


def leave(core: Core) -> None:
    """Says goodbye and closes everything; pending references fail from then on."""
    core_module.set_core(None)
    with core.lock:
        goodbye = not core.closed
        if goodbye:
            core.raylet.send(Unregister("shutdown"))
            core.settle()
    if goodbye and core.log_sink is not None:
        block(core.reactor, core.raylet.output_ended.waiter, LAST_OUTPUT_TIMEOUT_S)
    with core.lock:
        if not core.closed:
            core.fail_all(FtrayError("ftray.shutdown() was called"))
        core.gcs.close()
        core.settle()
    core.stop_loop()
    interrupts.uninstall()
    set_default_ref_loader(None)
    if core.objects.arena is not None:
        core.objects.arena.close()
    _unlink(core.endpoint)


def _unlink(endpoint: str) -> None:
    try:
        os.unlink(endpoint.partition(":")[2])
    except OSError:
        pass
