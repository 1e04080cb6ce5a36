"""A cluster of several heads and nodes on one machine, for tests and to try things out.

Role: shell. Each head and each node is a real process with a session and a journal of its own, on ports of the loopback
interface; all of them end with the process that has made the cluster.

    with Cluster(heads=3, nodes=1, num_cpus=2) as cluster:
        cluster.connect()
        cluster.kill_head(cluster.leader())

Rules: a head keeps its port and its folder for as long as the cluster lives, so that it can be killed and come back.
Heads offer no CPUs unless they are told to: programs run on the nodes, and a killed head takes no task with it.

Rejected: heads as threads of one process (what is to be shown is that processes may die).
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from ftray.exceptions import FtrayError

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.005


class ClusterError(FtrayError):
    """A process of a test cluster did not start, or did not do what it should."""


class NodeProcess:
    """One process of the cluster: a head, or a node that has joined."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from ftray.cli.launch import NODE_CODE

        self.spec = spec
        self.ready: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile()
        self._line = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", NODE_CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(spec).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended already: `wait_ready` says so

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def node_id(self) -> str:
        return str(self.ready.get("node_id", ""))

    @property
    def session_dir(self) -> str:
        return str(self.ready.get("session_dir", ""))

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Waits until it is a member of its cluster. Raises ClusterError with what it said if it becomes none."""
        stdout = self.process.stdout
        assert stdout is not None
        deadline = time.monotonic() + timeout_s
        while not self.ready:
            readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(stdout.fileno(), 65536) if readable else b""
            self._line += data
            if b"\n" in self._line:
                self.ready = json.loads(self._line.partition(b"\n")[0])
            elif not data:
                what = "ended before it was ready" if readable else f"was not ready within {timeout_s:g} s"
                self._errors.seek(0)
                raise ClusterError(f"a node {what}: {self._errors.read()[-3000:].decode(errors='replace')}")
        if not self.ready.get("ok"):
            raise ClusterError(str(self.ready.get("error", "a node did not say why it failed")))

    def stop(self, signum: int = signal.SIGTERM, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Sends a signal, and waits for the end. What does not end in time is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                pass
        self._errors.close()


class Cluster:
    """See the module. `heads` must be odd to be of use: three outlive the loss of one, five of two.

    `num_cpus` is what each of the `nodes` offers (2 by default), `head_num_cpus` what each head does. `config` are
    settings as of `_system_config`; with `fsync=False` writes survive the death of processes, not of the machine.
    Raises ClusterError if a process does not start; then nothing is left running.
    """

    def __init__(
        self,
        heads: int = 3,
        nodes: int = 0,
        *,
        num_cpus: float = 2,
        head_num_cpus: float = 0,
        config: dict[str, Any] | None = None,
        fsync: bool = True,
        object_store_bytes: int = 64 << 20,
    ) -> None:
        if heads < 1:
            raise ValueError(f"heads={heads}: a cluster has at least one")
        self.token = secrets.token_hex(32)
        self.session_root = tempfile.mkdtemp(prefix="ftc-", dir="/tmp")  # short, because paths of sockets must be
        self._common = {
            "token": self.token, "session_root": self.session_root, "lifeline": True, "memory": 1 << 30,
            "object_store_bytes": object_store_bytes, "config": config or {}, "fsync": fsync,
        }  # fmt: skip
        self._head_num_cpus = head_num_cpus
        self._num_cpus = num_cpus
        self.nodes: list[NodeProcess] = []
        self.heads: list[NodeProcess | None] = [None] * heads
        """By index; None while that head does not run."""
        self.endpoints = [f"tcp:127.0.0.1:{port}" for port in free_ports(heads)]
        self._closed = False
        try:
            self.restart_heads(range(heads))
            for _ in range(nodes):
                self.add_node()
        except BaseException:
            self.shutdown()
            raise

    @property
    def address(self) -> str:
        """What `ftray.init(address=...)` and `ftray start --address` take: all heads, separated by commas."""
        return ",".join(endpoint.removeprefix("tcp:") for endpoint in self.endpoints)

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables with which another program, or the command line, finds this cluster."""
        return {"FTRAY_SESSION_ROOT": self.session_root, "FTRAY_ADDRESS": self.address, "FTRAY_TOKEN": self.token}

    def connect(self, **arguments: Any) -> Any:
        """`ftray.init` for this process, with this cluster's address. `shutdown` ends that session, too."""
        import ftray

        former = {name: os.environ.get(name) for name in self.environ}
        os.environ.update(self.environ)
        try:
            return ftray.init(address=self.address, **arguments)
        finally:
            for name, value in former.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    # --- nodes --------------------------------------------------------------------------------------------------------

    def add_node(self, num_cpus: float | None = None, **spec: Any) -> NodeProcess:
        """Starts a node that joins. `spec` are fields of the node's specification: `resources`, `labels`, ... Raises
        ClusterError."""
        cpus = self._num_cpus if num_cpus is None else num_cpus
        node = NodeProcess({**self._common, "head": False, "address": self.address, "num_cpus": cpus, **spec})
        self.nodes.append(node)
        node.wait_ready()
        return node

    def remove_node(self, node: NodeProcess, signum: int = signal.SIGTERM) -> None:
        """Ends a node."""
        self.nodes.remove(node)
        node.stop(signum)

    # --- heads --------------------------------------------------------------------------------------------------------

    def kill_head(self, index: int) -> None:
        """SIGKILL: nobody is told anything. Returns when the process is gone."""
        self.stop_head(index, signal.SIGKILL)

    def stop_head(self, index: int, signum: int = signal.SIGTERM) -> None:
        """Asks a head to stop, and waits until it has."""
        head, self.heads[index] = self.heads[index], None
        if head is None:
            raise ValueError(f"head {index} does not run")
        head.stop(signum)

    def restart_head(self, index: int, **spec: Any) -> NodeProcess:
        """Starts a head again, in its folder. Returns when it is a member, for which a majority must run. Raises
        ClusterError."""
        return self.restart_heads([index], **spec)[0]

    def restart_heads(self, indices: Iterable[int], **spec: Any) -> list[NodeProcess]:
        """Starts several heads at once, and waits for all of them. Raises ClusterError."""
        started = [self.start_head(index, **spec) for index in indices]
        for head in started:
            head.wait_ready()
        return started

    def start_head(self, index: int, **spec: Any) -> NodeProcess:
        """Starts a head without waiting for it."""
        if self.heads[index] is not None:
            raise ValueError(f"head {index} runs already")
        endpoint = self.endpoints[index]
        own = {
            "head": True, "heads": self.endpoints, "head_endpoint": endpoint, "num_cpus": self._head_num_cpus,
            "port": int(endpoint.rpartition(":")[2]), "gcs_dir": self.gcs_dir(index),
        }  # fmt: skip
        head = self.heads[index] = NodeProcess({**self._common, **own, **spec})
        return head

    def gcs_dir(self, index: int) -> str:
        """Where that head keeps the state of the cluster."""
        return os.path.join(self.session_root, f"gcs-{self.endpoints[index].rpartition(':')[2]}")

    def ask_head(self, index: int, what: str = "heads", timeout_s: float = 5.0, **arguments: Any) -> Any:
        """Asks one head as `ftray heads` does. Raises OSError or FtrayError if it does not answer."""
        from ftray.cli.tool import ToolClient

        with ToolClient(self.endpoints[index], bytes.fromhex(self.token), timeout_s=timeout_s) as client:
            return client.query(what, **arguments)

    def leader(self, timeout_s: float = 10.0) -> int:
        """The index of the head that leads, as it says itself; waits for an election. Raises ClusterError."""
        deadline = time.monotonic() + timeout_s
        while True:
            for index, head in enumerate(self.heads):
                if head is None:
                    continue
                try:
                    if self.ask_head(index, timeout_s=1.0)["role"] == "leader":
                        return index
                except (OSError, FtrayError):
                    continue
            if time.monotonic() > deadline:
                raise ClusterError(f"no head leads after {timeout_s:g} s")
            time.sleep(POLL_S)

    # --- the end ------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Ends this process's session, if it is one of this cluster, and all processes; removes their files. May be
        repeated."""
        if self._closed:
            return
        self._closed = True
        if "ftray.api.lifecycle" in sys.modules:
            import ftray
            from ftray.api import lifecycle

            session = lifecycle._session
            if session is not None and str(session.session_dir).startswith(self.session_root):
                ftray.shutdown()
        for node in self.nodes:
            node.stop()
        for head in self.heads:
            if head is not None:
                head.stop(signal.SIGKILL)  # there is nothing to hand over to
        shutil.rmtree(self.session_root, ignore_errors=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface on which nobody listens now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
