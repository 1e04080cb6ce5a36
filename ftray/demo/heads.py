"""The demo's cluster of three heads, and the SIGKILL to the one that leads.

Role: shell around `cluster_utils.Cluster`. The recovery time is from just before the `kill` system call to the answer
to the next write: one that was begun after the kill, through this program's own client, and that the new leader has
acknowledged. The killed head is started again in its folder and catches up.

Rejected: the time until somebody says that it leads (what programs feel is the write).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from ftray.cluster_utils import Cluster
from ftray.demo.killer import LEADER, Kill
from ftray.demo.trace import clock_ms
from ftray.exceptions import FtrayError
from ftray.gcs.state.commands import KvPut
from ftray.gcs.state.tables import Result
from ftray.worker.core import get_core

NAMESPACE = "ftray.demo"
ASK_S = 0.3


class LeaderKiller:
    """Kills the leading head, one at a time; `on_recovery` is told when a write has been answered again."""

    def __init__(self, cluster: Cluster, on_recovery: Callable[[Kill], None]) -> None:
        self._cluster = cluster
        self._on_recovery = on_recovery
        self._restart: threading.Thread | None = None
        self.failed: list[str] = []
        """Why heads did not come back."""

    def __call__(self) -> Kill | None:
        """Kills the leader. None if that is not possible now: one is still coming back, or none leads."""
        if self._restart is not None and self._restart.is_alive():
            return None
        try:
            index = self._cluster.leader(timeout_s=ASK_S)
        except FtrayError:
            return None
        head = self._cluster.heads[index]
        if head is None:
            return None
        kill = Kill(LEADER, head.pid, clock_ms(), "the control service")
        os.kill(head.pid, signal.SIGKILL)
        self._write(kill)
        self._restart = threading.Thread(target=self._again, args=(index,), name="demo-head", daemon=True)
        self._restart.start()
        return kill

    def _write(self, kill: Kill) -> None:
        core = get_core()

        def answered(result: Result | None) -> None:
            if result is not None and result.ok:
                kill.recovery_ms = clock_ms() - kill.at_ms
                self._on_recovery(kill)

        with core.lock:
            core.gcs.command(KvPut(NAMESPACE, b"beat", str(kill.pid).encode()), answered)
            core.settle()

    def _again(self, index: int) -> None:
        try:
            self._cluster.stop_head(index, signal.SIGKILL)
            self._cluster.restart_head(index)
        except (FtrayError, OSError, ValueError) as error:
            self.failed.append(str(error))

    def wait(self) -> None:
        """Until the last one that was killed is back."""
        if self._restart is not None:
            self._restart.join()
