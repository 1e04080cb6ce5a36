"""Packages of runtime environments leave the key-value table with the last job that uses them."""

from __future__ import annotations

from gcs_states import DRIVER, JOB, N1, A, Gcs, ident

from ftray.gcs.state import commands as c
from ftray.gcs.state.packages import PACKAGES, USERS
from ftray.gcs.state.tables import kv_key

OTHER = b"job2"
ONE, TWO = b"1" * 16, b"2" * 16


def use(gcs: Gcs, job: bytes, *digests: bytes) -> None:
    gcs.do(c.KvPut(USERS, job, b""))
    for digest in digests:
        gcs.do(c.KvPut(USERS, job + digest, b""))
        for key in (digest, digest + b"\0\0\0\0", digest + b"\0\0\0\1"):
            gcs.do(c.KvPut(PACKAGES, key, key))


def packages(gcs: Gcs) -> set[bytes]:
    start = len(kv_key(PACKAGES, b""))
    return {key[start : start + 16] for key in gcs.state.store.kv if key.startswith(kv_key(PACKAGES, b""))}


def test_the_last_user_takes_a_package_along() -> None:
    gcs = Gcs()
    gcs.do(c.AddJob(OTHER, ident("driver2"), 8, N1, "other.py", "ns"))
    gcs.do(c.KvPut("functions", ONE, b"kept"))
    use(gcs, JOB, ONE, TWO)
    use(gcs, OTHER, TWO)
    gcs.do(c.FinishJob(JOB))
    assert packages(gcs) == {TWO}
    gcs.do(c.FinishJob(JOB))
    gcs.do(c.FinishJob(OTHER))
    assert list(gcs.state.store.kv) == [kv_key("functions", ONE)]


def test_detached_actors_keep_the_packages_of_their_job() -> None:
    for ended in (False, True):
        gcs = Gcs()
        use(gcs, JOB, ONE)
        gcs.register(A, owner=None, name="kept", namespace="ns")
        gcs.alive(A)
        if ended:
            gcs.do(c.KillActor(A, True, "not wanted"))
        gcs.do(c.FinishJob(JOB))
        assert packages(gcs) == (set() if ended else {ONE})


def test_a_drivers_death_is_the_end_of_its_job() -> None:
    gcs = Gcs()
    use(gcs, JOB, ONE)
    gcs.do(c.WorkerDied(DRIVER, N1, c.DeathCauseRecord(reason="killed")))
    assert packages(gcs) == set()
