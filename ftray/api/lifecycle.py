"""`init`, `shutdown`, `is_initialized`.

Role: shell. Without an address `init` starts a node process and joins it; with one it joins a node that runs on this
machine. Imports that take time are done while the node starts.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ftray.api.node_process import NodeProcess
from ftray.exceptions import AlreadyInitializedError, ClusterNotFoundError, FtrayError, NotInitializedError

log = logging.getLogger("ftray")

REGISTER_TIMEOUT_S = 15.0
_registered_at_fork = False

_session: Session | None = None


class Session:
    """What `init` returns: facts about the session, and a context manager that ends it."""

    def __init__(self, core: Any, node: NodeProcess | None, info: Mapping[str, Any], printer: Any) -> None:
        self._core = core
        self._node = node
        self._printer = printer
        self.address_info: dict[str, Any] = {name: value for name, value in info.items() if name != "token"}
        self.session_dir: str = info["session_dir"]
        self.node_id: str = info["node_id"]

    @property
    def dashboard_url(self) -> str:
        """Empty: this version has no dashboard."""
        return ""

    def __getitem__(self, name: str) -> Any:
        return self.address_info[name]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutdown()

    def disconnect(self) -> None:
        """The same as `ftray.shutdown()`."""
        shutdown()

    def __repr__(self) -> str:
        return f"<ftray session, node {self.node_id[:12]}, logs in {self.session_dir}/logs>"


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    memory: float | None = None,
    resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    object_store_memory: int | None = None,
    namespace: str | None = None,
    log_to_driver: bool = True,
    ignore_reinit_error: bool = False,
    logging_level: int | str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    _system_config: Mapping[str, Any] | None = None,
    **others: Any,
) -> Session:
    """Starts a session, or joins a cluster.

    Without `address` (and without FTRAY_ADDRESS) a node is started on this machine for this program alone; it ends with
    the program. "auto" joins the newest node that `ftray start` has started here, "host:port" (of several heads
    "host:port,host:port") the node here that belongs to that cluster, "local" starts a new node whatever the
    environment says.

    `num_cpus` (default: the CPUs this process may use), `num_gpus`, `memory` (bytes) and `resources` say what the new
    node offers; `object_store_memory` is the size of its store in bytes. `log_to_driver=False` keeps worker output in
    files.

    `logging_level` is that of the logger "ftray" in this process. Options of Ray's that concern its dashboard and log
    formats (`include_dashboard`, `dashboard_port`, ...) are accepted and change nothing.

    `runtime_env` (a dict or an `ftray.runtime_env.RuntimeEnv`) is the environment of all tasks and actors of this
    program: variables, files, modules, a hook.

    Returns a `Session`, usable as a context manager. Raises AlreadyInitializedError (unless `ignore_reinit_error`),
    ClusterNotFoundError when there is nothing to join, GcsUnavailableError when too few of its heads run,
    AuthenticationError for a wrong token, ValueError or TypeError for wrong arguments, RuntimeEnvSetupError for a
    runtime_env that can't be packed or that this version has not, FtrayError when the node cannot start.
    """
    global _session, _registered_at_fork
    _check_others(others)
    if runtime_env:
        runtime_env = _checked(runtime_env)
    if logging_level is not None:
        log.setLevel(logging_level)
    if _session is not None:
        if ignore_reinit_error:
            return _session
        raise AlreadyInitializedError(
            "ftray.init() was called already: call ftray.shutdown() first, or pass ignore_reinit_error=True"
        )
    if is_initialized():  # in a task or actor: its worker belongs to a session already
        if ignore_reinit_error:
            return _session_of_worker()
        raise AlreadyInitializedError(
            "a task or actor belongs to the session that runs it: leave ftray.init() out, or pass "
            "ignore_reinit_error=True"
        )
    if address is None:
        address = os.environ.get("FTRAY_ADDRESS") or None
    if address is not None and not isinstance(address, str):
        raise TypeError(f"address must be a string, not {address!r}")
    new_node = {
        "num_cpus": num_cpus, "num_gpus": num_gpus, "memory": memory, "resources": resources, "labels": labels,
        "object_store_memory": object_store_memory,
    }  # fmt: skip
    node: NodeProcess | None = None
    if address in (None, "local"):
        _check_new_node(new_node)
        node = NodeProcess(_spec(new_node, _system_config))
    else:
        given = [name for name, value in new_node.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} describe a new node, but address={address!r} joins one that runs already"
            )
    try:
        # While the node starts: what the rest needs takes about as long to import.
        import ftray.wire.loop  # noqa: F401
        from ftray.api.joining import join

        info = node.ready() if node is not None else _find(str(address))
        core, printer = join(
            info, namespace or "", log_to_driver, REGISTER_TIMEOUT_S, runtime_env, own_node=node is not None
        )
    except BaseException:
        if node is not None:
            node.stop()
        raise
    _session = Session(core, node, info, printer)
    atexit.register(shutdown)
    if not _registered_at_fork:
        _registered_at_fork = True
        os.register_at_fork(after_in_child=_in_child)
    return _session


def _in_child() -> None:
    """A child made by `os.fork` has no session, and must not hold its parent's lifeline."""
    global _session
    session, _session = _session, None
    if session is not None and session._node is not None:
        session._node.forget()


def _session_of_worker() -> Session:
    from ftray.worker.core import get_core

    core = get_core()
    info = {"node_id": core.node_id.hex(), "session_dir": str(Path(core.endpoint.partition(":")[2]).parents[1])}
    return Session(core, None, info, None)


WITHOUT_EFFECT = frozenset(
    ("include_dashboard", "dashboard_host", "dashboard_port", "configure_logging", "logging_format", "logging_config")
)
"""Options of Ray's `init` that a program may go on passing."""


def _checked(runtime_env: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is wrong with the environment of the job is said before a node is started."""
    from ftray.api.packaging import check_paths
    from ftray.runtime_env import RuntimeEnv

    env = RuntimeEnv.of(runtime_env)
    check_paths(env)
    return env


def _check_others(others: Mapping[str, Any]) -> None:
    unknown = sorted(set(others) - WITHOUT_EFFECT)
    if unknown:
        from difflib import get_close_matches

        known = [name for name in inspect.signature(init).parameters if name != "others"]
        near = get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"ftray.init() has no option {unknown[0]!r}{hint}")


def _check_new_node(new_node: Mapping[str, Any]) -> None:
    from ftray.scheduling.resources import parse_resources

    parse_resources(new_node["num_cpus"], new_node["num_gpus"], new_node["memory"], new_node["resources"])
    store = new_node["object_store_memory"]
    if store is not None:
        if isinstance(store, bool) or not isinstance(store, int | float):
            raise TypeError(f"object_store_memory is a number of bytes, not {store!r}")
        if store < 1 << 20:
            raise ValueError(f"object_store_memory must be at least 1 MiB, not {store} bytes")
    labels = new_node["labels"] or {}
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in labels.items()):
        raise TypeError("labels are strings by strings")


def _spec(new_node: Mapping[str, Any], system_config: Mapping[str, Any] | None) -> dict[str, Any]:
    from ftray.config import config_from

    config_from(os.environ, system_config)  # raises here rather than in the node
    store = new_node["object_store_memory"]
    return {
        "head": True,
        "lifeline": True,
        "num_cpus": new_node["num_cpus"],
        "num_gpus": new_node["num_gpus"],
        "memory": new_node["memory"],
        "resources": dict(new_node["resources"] or {}),
        "labels": dict(new_node["labels"] or {}),
        "object_store_bytes": None if store is None else int(store),
        "config": dict(system_config or {}),
        "fsync": False,
    }


def _find(address: str) -> dict[str, Any]:
    from ftray.raylet.session import default_root, find_sessions

    root = os.environ.get("FTRAY_SESSION_ROOT") or default_root()
    sessions = [each for each in find_sessions(root) if any(e.startswith("tcp:") for e in each["gcs_endpoints"])]
    if address != "auto":
        wanted = set()
        for part in address.removeprefix("ftray://").split(","):
            host, _, port = part.strip().rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"address must be 'auto', 'local' or 'host:port' (of each head), not {address!r}")
            wanted.add(f"tcp:{host}:{port}")
        sessions = [each for each in sessions if wanted & set(each.get("gcs_endpoints", ()))]
    if not sessions:
        raise ClusterNotFoundError(
            f"no node of {'a cluster' if address == 'auto' else 'the cluster at ' + address} runs on this machine: "
            "start one with `ftray start --head` (or `ftray start --address HOST:PORT`), or call ftray.init() "
            "without an address"
        )
    cluster = [each for each in sessions if each.get("cluster_id") == sessions[0].get("cluster_id")]
    # A head need not offer anything to run on.
    cluster.sort(key=lambda each: (not each.get("cpus", 1), bool(each.get("head"))))
    info = dict(cluster[0])
    token = os.environ.get("FTRAY_TOKEN")
    if token:
        info["token"] = token
    return info


def shutdown() -> None:
    """Ends the session: everything that it started is gone when this returns. Does nothing when none runs."""
    global _session
    session, _session = _session, None
    if session is None:
        return
    atexit.unregister(shutdown)
    from ftray.api.joining import leave

    leave(session._core)
    if session._node is not None:
        session._node.stop()
    if session._printer is not None:
        session._printer.close()


def is_initialized() -> bool:
    """Whether a session runs in this process (in a task or actor: always)."""
    core_module = sys.modules.get("ftray.worker.core")
    return core_module is not None and core_module.core_or_none() is not None


__all__ = ["FtrayError", "NotInitializedError", "Session", "init", "is_initialized", "shutdown"]
