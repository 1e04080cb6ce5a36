"""Three heads whose journals are compacted under writes, with a state of some size: nobody notices."""

from __future__ import annotations

import threading
from typing import Any

from integration.harness import wait_until

from ftray.cluster_utils import Cluster
from ftray.gcs.replica import COMPACT_BYTES
from ftray.gcs.state.commands import KvPut
from ftray.gcs.state.tables import Code, Result
from ftray.worker.core import get_core

VALUE_BYTES = 4 << 20
KEYS = 10


def put(key: str, value: bytes) -> Result:
    core, results = get_core(), []
    with core.lock:
        core.gcs.command(KvPut("large", key.encode(), value), results.append)
        core.settle()
    wait_until(lambda: results, 20.0, f"the write of {key}")
    result: Result = results[0]
    return result


def test_compactions_under_writes_change_no_leader_and_fail_no_request() -> None:
    with Cluster(heads=3, nodes=0) as cluster:
        cluster.connect()

        def statuses() -> list[dict[str, Any]]:
            return [cluster.ask_head(index) for index in range(3)]

        leader, before = cluster.leader(), statuses()
        assert [status["snapshot_index"] for status in before] == [0, 0, 0]
        small: list[Result] = []
        stop = threading.Event()

        def write_small() -> None:
            while not stop.is_set():
                small.append(put("small", b"v"))

        writer = threading.Thread(target=write_small)
        writer.start()
        try:
            written = 0
            while written < 1.2 * COMPACT_BYTES or not all(status["snapshot_index"] for status in statuses()):
                assert put(f"key{written // VALUE_BYTES % KEYS}", bytes(VALUE_BYTES)).code is Code.OK
                written += VALUE_BYTES
                assert written < 4 * COMPACT_BYTES
        finally:
            stop.set()
            writer.join()
        assert {result.code for result in small} == {Code.OK}
        after = statuses()
        assert [status["term"] for status in after] == [status["term"] for status in before]
        assert cluster.leader() == leader and not any(status["disk_full"] for status in after)
        # A head that comes back after that has it from its own snapshot and the entries carried over.
        another = (leader + 1) % 3
        cluster.kill_head(another)
        cluster.restart_head(another)
        newest = statuses()[leader]["commit_index"]
        wait_until(lambda: cluster.ask_head(another)["applied_index"] >= newest, what="the head has all entries")
        assert cluster.ask_head(another)["snapshot_index"] > 0
