"""How much memory is in use, of how much.

Role: shell; reads `/proc` and the control group. Three limits are known: one that the session was given
(`memory_limit_bytes`, over the private memory of its workers), that of the control group that the node runs in, and the
machine's. The one with the least room counts.

Rejected: psutil for this (it reads ten files where one will do, four times a second).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ftray.scheduling.memory import Usage

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
CGROUP_ROOT = "/sys/fs/cgroup"
LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
USED_FILES = ("memory.current", "memory.usage_in_bytes")
"""Of version 2, and of version 1."""
NO_LIMIT_BYTES = 1 << 60
"""Control groups without a limit say "max", or a number of this size."""


def process_bytes(pid: int) -> int:
    """The private resident memory of a process; 0 when it is gone. Shared memory (the object store) is not in it."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
    except OSError:
        return 0
    return max(0, int(fields[1]) - int(fields[2])) * PAGE_BYTES


def machine_usage() -> Usage:
    """What the kernel says of the machine: total, less what is available without swapping."""
    total = available = 0
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemTotal:"):
                total = int(line.split()[1]) * 1024
            elif line.startswith(b"MemAvailable:"):
                available = int(line.split()[1]) * 1024
                break
    return Usage(total - available, total, "this machine")


def cgroup_directory() -> str | None:
    """The memory control group of this process, of either version, if it has a limit; looked up once."""
    try:
        with open("/proc/self/cgroup") as file:
            found = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return None
    for _, controllers, path in found:
        if controllers == "":
            root = CGROUP_ROOT
        elif "memory" in controllers.split(","):
            root = f"{CGROUP_ROOT}/memory"
        else:
            continue
        # Inside a container the path is often that of the host, and the limit is at the mounted root.
        for directory in (root + path.rstrip("/"), root):
            limit = _first_number(directory, LIMIT_FILES)
            if limit is not None and limit < NO_LIMIT_BYTES:
                return directory
    return None


def cgroup_usage(directory: str) -> Usage | None:
    """Use and limit of a control group; file pages that can be dropped do not count."""
    used, limit = _first_number(directory, USED_FILES), _first_number(directory, LIMIT_FILES)
    if used is None or limit is None:
        return None
    droppable = 0
    try:
        with open(f"{directory}/memory.stat", "rb") as file:
            for line in file:
                # Version 1 has both, first without the groups below and then with them.
                if line.startswith((b"inactive_file ", b"total_inactive_file ")):
                    droppable = int(line.split()[1])
    except OSError:
        pass
    return Usage(max(0, used - droppable), limit, "this node's control group")


def _first_number(directory: str, names: tuple[str, ...]) -> int | None:
    return next((number for name in names if (number := _number(f"{directory}/{name}")) is not None), None)


def _number(path: str) -> int | None:
    try:
        with open(path, "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


class MemoryGauge:
    """Reads the limit that has the least room."""

    def __init__(self, limit_bytes: int) -> None:
        """`limit_bytes` over all workers together; 0 for none of its own."""
        self.limit_bytes = limit_bytes
        self._cgroup = cgroup_directory()

    def read(self, pids: Iterable[int]) -> Usage:
        """The usage that is nearest to its limit; `pids` are those of the workers."""
        readings = [machine_usage()]
        if self._cgroup is not None:
            group = cgroup_usage(self._cgroup)
            if group is not None:
                readings.append(group)
        if self.limit_bytes:
            readings.append(Usage(sum(map(process_bytes, pids)), self.limit_bytes, "this session's memory limit"))
        return max(readings, key=lambda usage: usage.used_bytes / max(1, usage.limit_bytes))
