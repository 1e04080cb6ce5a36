"""What a node is told when it is started, checked and completed.

Role: reads the machine once (CPUs, memory) to fill in what was left out. The specification is one line of JSON on the
standard input of `python -m ftray.raylet.main`; ARCHITECTURE.md and `NodeSpec` say what may be in it.

Rejected: command-line arguments (the token would be in everybody's `ps`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from ftray.exceptions import FtrayError
from ftray.raylet.forking import WORKER_ENTRY, WORKER_START
from ftray.scheduling.resources import parse_resources

TOKEN_BYTES = 32
STORE_SHARE = 0.3
"""The part of the memory that the object store may use."""
STORE_BYTES_MIN = 1 << 20
HEAP_SHARE = 0.6
"""The part of the memory that tasks may ask for."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class SpecError(FtrayError):
    """The node's specification is wrong."""


class NodeSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """See the module. What is None is found out or has a default."""

    head: bool = True
    address: str | None = None
    """The GCS endpoints of the cluster to join, `host:port`, separated by commas."""
    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: float | None = None
    """Bytes that tasks may ask for."""
    resources: dict[str, float] | None = None
    labels: dict[str, str] | None = None
    object_store_bytes: int | None = None
    session_root: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    """TCP port of the GCS; 0 is any, None is none."""
    heads: list[str] = []
    """All heads of a cluster with several, as `tcp:host:port`, this one among them; of a cluster to be joined, if
    `join`. Empty for a head that goes on with what its `gcs_dir` says."""
    head_endpoint: str | None = None
    """Which of the heads this one is; None for the only head of its cluster."""
    join: bool = False
    """This head is a new one for a cluster that runs: it waits to be added (`ftray heads add`)."""
    gcs_dir: str | None = None
    """Where the GCS keeps its journal. Without it in the session, and it ends with the node."""
    join_timeout_ms: float | None = None
    """How long the node may take to become a member of its cluster."""
    lifeline: bool = False
    """End when standard input does; and at once, without giving workers time."""
    token: str | None = None
    """Hex."""
    config: dict[str, Any] = {}
    fsync: bool | None = None
    """Whether GCS writes survive a power cut; by default, if others can join."""
    worker_entry: str = WORKER_ENTRY
    worker_start: str = WORKER_START
    """What a forked worker calls, and with which struct (tests put their own here)."""


def parse_spec(line: bytes) -> NodeSpec:
    """The specification in a line of JSON. Raises SpecError."""
    try:
        spec = msgspec.json.decode(line, type=NodeSpec)
    except msgspec.MsgspecError as error:
        raise SpecError(f"the specification of the node is wrong: {error}") from None
    if not spec.head and not spec.address:
        raise SpecError("a node that is no head needs the address of one: host:port")
    if spec.address:
        endpoints_of(spec.address)
    if (spec.heads or spec.join) and spec.head_endpoint is None:
        raise SpecError("one of several heads must be told which one it is: head_endpoint")
    if not spec.head and spec.head_endpoint is not None:
        raise SpecError("a node that is no head can't be one of several")
    for endpoint in (*spec.heads, *([spec.head_endpoint] if spec.head_endpoint is not None else [])):
        if endpoints_of(endpoint) != [endpoint] or not endpoint.startswith("tcp:"):
            raise SpecError(f"{endpoint!r} is not the endpoint of a head: it must be tcp:host:port")
    if spec.head_endpoint is not None and spec.heads and not spec.join and spec.head_endpoint not in spec.heads:
        raise SpecError(f"this head, {spec.head_endpoint}, is not among the heads: {', '.join(spec.heads)}")
    return spec


def token_of(spec: NodeSpec, environ: Mapping[str, str]) -> bytes:
    """The cluster token: given, from FTRAY_TOKEN, or, for a head, a new one. Raises SpecError."""
    text = spec.token or environ.get("FTRAY_TOKEN", "")
    if not text:
        if spec.head:
            return os.urandom(TOKEN_BYTES)
        raise SpecError("joining a cluster needs its token: set FTRAY_TOKEN to what is in the head's token file")
    try:
        return bytes.fromhex(text.strip())
    except ValueError:
        raise SpecError("the cluster token must be hexadecimal, as in the head's token file") from None


def endpoints_of(address: str) -> list[str]:
    """`host:port,host:port` as endpoints; what is an endpoint already stays. Raises SpecError."""
    found = []
    for part in address.split(","):
        part = part.strip()
        if part.startswith(("tcp:", "unix:")):
            found.append(part)
            continue
        host, _, port = part.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise SpecError(f"{part!r} is not the address of a head: it must be host:port")
        found.append(f"tcp:{host}:{port}")
    return found


def memory_bytes() -> int:
    """The memory that this process may use at most: of the machine, or of its container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
        break
    return total


def store_bytes_of(spec: NodeSpec) -> int:
    """The size of the object store. Raises SpecError."""
    if spec.object_store_bytes is None:
        return max(int(memory_bytes() * STORE_SHARE), STORE_BYTES_MIN)
    if spec.object_store_bytes < STORE_BYTES_MIN:
        raise SpecError(f"object_store_bytes={spec.object_store_bytes}: the least is {STORE_BYTES_MIN}")
    if spec.object_store_bytes > memory_bytes():
        raise SpecError(
            f"object_store_bytes={spec.object_store_bytes}: this machine has {memory_bytes()} bytes of memory in all; "
            "writing beyond them would end the writer"
        )
    return spec.object_store_bytes


def resources_of(spec: NodeSpec) -> dict[str, float]:
    """What the node has. Raises SpecError."""
    cpus = spec.num_cpus if spec.num_cpus is not None else len(os.sched_getaffinity(0))
    memory = spec.memory if spec.memory is not None else int(memory_bytes() * HEAP_SHARE)
    try:
        return parse_resources(cpus, spec.num_gpus, memory, spec.resources)
    except (TypeError, ValueError) as error:
        raise SpecError(f"the resources of the node are wrong: {error}") from None
