"""What programs leave in the GCS of a cluster that stays: their records, for a while, and nothing else."""

from __future__ import annotations

from integration.harness import wait_until

import ftray
from ftray.cluster_utils import Cluster
from ftray.gcs.state.job_keys import HANDLES
from ftray.gcs.state.tables import JOB_KEYS, KvRecord, Table
from ftray.worker.core import get_core
from ftray.worker.submit import FUNCTIONS


def keys() -> set[str]:
    """The namespaces of all keys."""
    core, found = get_core(), []
    with core.lock:
        core.gcs.client.read_all(Table.KV, found.append)
        core.settle()
    wait_until(lambda: found, what="the keys")
    return {row.namespace for row in found[0].values() if isinstance(row, KvRecord)}


def use_it() -> None:
    """A program: functions of the driver and of a worker, a named actor."""

    @ftray.remote(num_cpus=0)
    def inner(number: int) -> int:
        return number + 1

    @ftray.remote
    def outer() -> int:
        return int(ftray.get(inner.remote(1)))

    class Named:
        def value(self) -> int:
            return 3

    named = ftray.remote(Named).options(name="here", num_cpus=0).remote()
    assert ftray.get(outer.remote()) == 2
    assert ftray.get(named.value.remote()) == 3
    assert ftray.get(ftray.get_actor("here").value.remote()) == 3
    assert {FUNCTIONS, HANDLES, JOB_KEYS} <= keys()


def test_a_program_that_has_ended_leaves_no_keys() -> None:
    with Cluster(heads=1, head_num_cpus=2, fsync=False) as cluster:
        cluster.connect()
        use_it()
        ftray.shutdown()
        cluster.connect()
        wait_until(lambda: not keys() & {FUNCTIONS, HANDLES, JOB_KEYS}, what="the end of the first program's keys")
        use_it()  # what the first one had is exported anew
        ftray.shutdown()
