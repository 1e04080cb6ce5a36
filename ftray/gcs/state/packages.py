"""Packages of runtime environments in the key-value table, and their end: with the last job that uses them.

Role: pure. A package lies under its digest (a manifest) and under its digest and a number (its parts), in the namespace
`PACKAGES`. Each job that uses it says so first, in the namespace `USERS`: an entry for the job, so that the end of one
without packages costs nothing, and one for the job and the digest. Only then does it look whether the package is there;
so one that it finds stays.

Rule: a job whose detached actors live on keeps its packages, for their restarts on other nodes, until the last of them
is dead (`job_keys.py`). A part that an ended job's worker still brings has no user, and goes with the next job's end.

Rejected: a count in the manifest (a job that repeats itself would count twice); an end by age (programs run longer).
"""

from __future__ import annotations

from ftray.gcs.state.store import Store
from ftray.gcs.state.tables import Table, kv_key

PACKAGES = "runtime-env-packages"
USERS = "runtime-env-users"
DIGEST_BYTES = 16


def job_over(store: Store, job_id: bytes) -> None:
    """Deletes what the job alone has used, and what nobody uses."""
    mark = kv_key(USERS, job_id)
    if mark not in store.kv:
        return
    users, packages = kv_key(USERS, b""), kv_key(PACKAGES, b"")
    others: set[bytes] = set()
    parts: list[tuple[bytes, bytes]] = []
    doomed = []
    for key in store.kv:
        if key.startswith(mark):
            doomed.append(key)
        elif key.startswith(users):
            others.add(key[-DIGEST_BYTES:])
        elif key.startswith(packages):
            parts.append((key[len(packages) : len(packages) + DIGEST_BYTES], key))
    doomed += [key for digest, key in parts if digest not in others]
    for key in sorted(doomed):
        store.delete(Table.KV, key)
