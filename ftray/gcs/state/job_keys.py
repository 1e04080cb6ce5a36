"""Keys that end with the jobs that need them, and what else goes when a job or an actor has ended.

Role: pure, on the store. `JobKvPut` says for which job a key is put: an exported function, what a handle made from an
actor's name has to know. An entry in the namespace `JOB_KEYS` notes it: the job's id, then the key in the table. A key
that several jobs have put (functions lie under the hash of what is in them) goes with the last of them.

Rules
- A job needs its keys while it runs, and afterwards while actors of it live: detached ones, and what those own.
- What an ended job still sends is refused, so nothing is put for it that nobody would take away.
- What is kept for a named actor goes with the actor, not only with its job.
- The cost is that of what ends: the entries are indexed by job and by key.

Rejected: a job in each key (functions would be stored once for each job); a time to live (programs run longer);
deletion by the drivers (they die).
"""

from __future__ import annotations

from ftray.gcs.state import packages
from ftray.gcs.state.store import Store
from ftray.gcs.state.tables import JOB_KEYS, ActorRecord, ActorState, JobState, KvRecord, Table, kv_key

HANDLES = "actor-handles"
"""The namespace of what a handle made from an actor's name has to know, by actor."""


def note(store: Store, job_id: bytes, key: bytes) -> None:
    """The job needs the key."""
    entry = KvRecord(JOB_KEYS, job_id + key, b"")
    if kv_key(JOB_KEYS, entry.key) not in store.kv:
        store.put(entry)


def deleted(store: Store, key: bytes) -> None:
    """The key was deleted: no job needs it any more."""
    for entry in store.notes_of_key(key):
        store.delete(Table.KV, entry)


def is_over(store: Store, job_id: bytes) -> bool:
    """The job has finished, and no actor of it lives. One that is not known is not over."""
    job = store.jobs.get(job_id)
    return job is not None and job.state is JobState.FINISHED and not store.job_has_live_actors(job_id)


def clean_up(store: Store) -> None:
    """After a command: deletes what nobody needs any more of the jobs and actors that have ended in it."""
    jobs: dict[bytes, None] = {}
    for table, key, old in store.touched():
        if table is Table.ACTORS:
            actor = store.actors.get(key)
            if actor is not None and actor.state is ActorState.DEAD:
                _release(store, kv_key(HANDLES, key))
                jobs[actor.job_id] = None
            if isinstance(old, ActorRecord):  # it may have been of another job, which has lost its last actor so
                jobs[old.job_id] = None
        elif table is Table.JOBS:
            jobs[key] = None
    for job_id in jobs:
        if is_over(store, job_id):
            _job_over(store, job_id)


def _job_over(store: Store, job_id: bytes) -> None:
    for entry in store.notes_of_job(job_id):
        key = entry[len(kv_key(JOB_KEYS, job_id)) :]
        store.delete(Table.KV, entry)
        if key in store.kv and not store.notes_of_key(key):
            store.delete(Table.KV, key)
    packages.job_over(store, job_id)


def _release(store: Store, key: bytes) -> None:
    if key in store.kv:
        store.delete(Table.KV, key)
    deleted(store, key)
