"""Starting a node process that outlives the command, and saying well why it did not start.

Role: shell. The node reads its spec as one JSON line from stdin, and answers with one on stdout when it is ready.

Rejected: starting the node's code in the command's own process and forking into the background (the node wants a fresh,
single-threaded interpreter, and a failed start would have no one left to report it).
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from ftray.cli.output import NOT_FOUND, Failure
from ftray.cli.tool import ToolClient
from ftray.exceptions import AuthenticationError, ProtocolError, ProtocolVersionError
from ftray.wire.handshake import ROLE_GCS

NODE_CODE = (
    f"import runpy, sys; sys.path.append({str(Path(__file__).resolve().parents[2])!r}); "
    "runpy.run_module('ftray.raylet.main', run_name='__main__')"
)
"""`-m ftray.raylet.main`, but (with `-P`) so that nothing that lies where the user stands shadows a module."""
READY_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 5.0
STDERR_LINES = 15


def spawn(spec: dict[str, Any]) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """Starts a node in a session of its own; returns the process and its ready line. Raises Failure.

    With `lifeline` in the spec, the node lives as long as the process's `stdin` is open.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", NODE_CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(spec).encode() + b"\n")
            process.stdin.flush()
            if not spec.get("lifeline"):
                process.stdin.close()
            ready = _ready_line(process, process.stdout)
        except BaseException:
            _end(process)
            raise
        finally:
            process.stdout.close()
        if ready is None:
            raise Failure(
                "the node process ended before it was ready" if process.poll() is not None
                else f"the node was not ready within {READY_TIMEOUT_S:g} s",
                _last_words(errors),
                exit_code_of_node=_end(process),
            )  # fmt: skip
    if not ready.get("ok"):
        _end(process)
        raise explained(str(ready.get("error", "the node did not say why it failed")), spec)
    return process, ready


def let_go(process: subprocess.Popen[bytes]) -> None:
    """The process outlives this one: nobody waits for it here, and Python need not warn of that."""
    process.returncode = 0


def _ready_line(process: subprocess.Popen[bytes], stdout: IO[bytes]) -> dict[str, Any] | None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    data = b""
    while b"\n" not in data:
        readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return None
        chunk = os.read(stdout.fileno(), 65536)
        if not chunk:
            process.wait()
            return None
        data += chunk
    try:
        ready = json.loads(data.partition(b"\n")[0])
    except ValueError:
        return {"ok": False, "error": f"the node answered with what is not JSON: {data[:200]!r}"}
    return ready if isinstance(ready, dict) else None


def _end(process: subprocess.Popen[bytes]) -> int | None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None and not process.stdin.closed:
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
    return process.returncode


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").splitlines()[-STDERR_LINES:]
    return "its last words were:\n    " + "\n    ".join(lines) if lines else "it printed nothing"


def explained(error: str, spec: dict[str, Any]) -> Failure:
    """A failure that the node itself reported, with a remedy where there is a known one."""
    lowered = error.lower()
    if "address already in use" in lowered or "address in use" in lowered:
        return port_in_use(spec.get("host", "127.0.0.1"), spec.get("port") or 0)
    if "token" in lowered:
        return Failure(error, TOKEN_REMEDY)
    if "the gcs does not answer" in lowered:
        return Failure(error, "start the heads that do not answer, each with its directory; see `ftray heads list`")
    return Failure(error)


TOKEN_REMEDY = "set FTRAY_TOKEN to the content of the token file of the head node (`ftray start --head` names it)"


def check_port_free(host: str, port: int) -> None:
    """Raises Failure, naming the holder, if the head could not listen there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise Failure(f"--host {host} is not an address of this machine: {error.strerror or error}") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except PermissionError:
            raise Failure(f"port {port} is reserved for root", "choose a port above 1023 with --port") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise port_in_use(host, port) from None
            raise Failure(
                f"cannot listen on {host}:{port}: {error.strerror}",
                "give --host an address of this machine (0.0.0.0 for all of them)",
            ) from None


def port_in_use(host: str, port: int) -> Failure:
    """The failure to report when somebody else listens there."""
    holder, pid = _holder(port)
    if "(ftray" in holder:
        remedy = "a head runs already: join it with `ftray start --address`, stop it with `ftray stop`, or take --port"
    else:
        remedy = f"choose another port with --port (0 takes a free one){', or stop that process' if holder else ''}"
    return Failure(f"port {port} of {host} is in use{f' by {holder}' if holder else ''}", remedy, holder_pid=pid)


def _holder(port: int) -> tuple[str, int | None]:
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                if connection.pid is None:
                    return "another user's process", None
                process = psutil.Process(connection.pid)
                name = process.name()  # a node says what it is by its name
                command = name if name.startswith("ftray") else " ".join(process.cmdline())[:80]
                return f"process {connection.pid} ({command})", connection.pid
    except (psutil.Error, OSError):
        pass
    return "", None


def check_heads(endpoints: list[str], token: bytes) -> None:
    """Raises Failure if none of the heads answers, or one refuses us for good."""
    tried = []
    for endpoint in endpoints:
        where = endpoint.removeprefix("tcp:")
        try:
            ToolClient(endpoint, token, role=ROLE_GCS, timeout_s=PROBE_TIMEOUT_S).close()
            return
        except AuthenticationError:
            raise Failure(f"the head at {where} does not accept the token", TOKEN_REMEDY) from None
        except ProtocolVersionError as error:
            raise Failure(f"the head at {where} can't be joined: {error}") from None
        except ProtocolError:
            tried.append(f"{where}: something answers there that is not an ftray head")
        except OSError as error:
            tried.append(f"{where}: {error.strerror or error}")
    raise Failure(
        f"no head answers ({'; '.join(tried)})",
        "check the address that `ftray start --head` printed, and that its --host is one that this machine can reach; "
        "`ftray heads list` on a machine of the cluster shows where its heads are now",
        NOT_FOUND,
    )
