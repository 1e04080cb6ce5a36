"""What a worker is told at birth.

Role: leaf, shared by the raylet's template, which forks workers, and the worker's main program.
"""

from __future__ import annotations

import msgspec

from ftray.config import Config


class WorkerStart(msgspec.Struct, frozen=True):
    """Everything a forked worker needs before it can register with its raylet."""

    worker_id: bytes
    raylet_endpoint: str
    token: bytes
    cluster_id: bytes
    node_id: bytes
    arena_fd: int
    arena_bytes: int
    session_dir: str
    config: Config
