"""What a failure reaches: from a node, worker, owner, driver or job to the actors that end or are started again.

Role: pure, on the store. What a failure means for one actor is in `lifecycle.py`.

Rules: one command carries the whole effect of a failure, so that no reader sees half of it and no leader can die in the
middle of it. When an actor's process goes, what it owned goes with it, and so on down: `settle` works through that by
a list, since chains of owners may be long. An actor that may finish its calls (out of scope) keeps what it owns
until its process is reported gone.

Rejected: clean-up by a manager, one command for each actor (many more writes, and states in between in which a live
actor has a dead owner).
"""

from __future__ import annotations

from msgspec.structs import replace

from ftray.gcs.state import lifecycle, packages
from ftray.gcs.state.commands import DeathCauseRecord
from ftray.gcs.state.store import Store
from ftray.gcs.state.tables import (
    ActorRecord,
    ActorState,
    DeathKind,
    JobRecord,
    JobState,
    Leftover,
    NodeRecord,
    NodeState,
)


def end_actor(
    store: Store,
    actor: ActorRecord,
    kind: DeathKind,
    cause: DeathCauseRecord,
    *,
    reason: str = "",
    graceful: bool = False,
) -> None:
    """Ends an actor for good, or takes away the grace of one that is ending. Dead already: nothing.

    `reason` replaces that of `cause` in this actor's record; what the actor owned gets reasons of its own.
    """
    if actor.state is ActorState.DEAD:
        left = actor.leftover
        if left is not None and left.graceful and not graceful:
            store.put(replace(actor, leftover=replace(left, graceful=False)))
            _doom(store, left.worker_id, cause)
        return
    own = replace(cause, reason=reason) if reason else cause
    store.put(lifecycle.ended(actor, kind, own, _left(store, actor, graceful)))
    if not graceful and actor.state is ActorState.ALIVE:
        _doom(store, actor.worker_id, cause)


def fail_actor(
    store: Store, actor: ActorRecord, kind: DeathKind, cause: DeathCauseRecord, *, process_gone: bool
) -> None:
    """A placed or live actor failed: restarted if restarts are left, else ended."""
    left = None if process_gone else _left(store, actor, graceful=False)
    store.put(lifecycle.failed(actor, kind, cause, left))
    if actor.state is ActorState.ALIVE:
        _doom(store, actor.worker_id, cause)


def end_life(store: Store, actor: ActorRecord, kind: DeathKind, cause: DeathCauseRecord) -> None:
    """The node says that nothing runs of the actor's present life, and that it must not be restarted."""
    store.put(lifecycle.ended(actor, kind, cause, None))
    if actor.state is ActorState.ALIVE:
        _doom(store, actor.worker_id, cause)


def clear_leftover(store: Store, actor: ActorRecord, cause: DeathCauseRecord) -> None:
    """The process of the earlier life is gone, and what it owned goes too."""
    if actor.leftover is not None:
        store.put(replace(actor, leftover=None))
        _doom(store, actor.leftover.worker_id, cause)


def worker_gone(store: Store, worker_id: bytes, cause: DeathCauseRecord) -> None:
    """A worker or driver process has ended: as an actor, as an owner and as a driver."""
    actor = store.actor_in(worker_id)
    if actor is not None:
        fail_actor(store, actor, DeathKind.WORKER_DIED, cause, process_gone=True)
    for left in store.leftovers_in(worker_id):
        clear_leftover(store, left, cause)
    for job in store.jobs_driven_by(worker_id):
        finish_job(store, job, cause)
    _doom(store, worker_id, cause)


def node_gone(store: Store, node: NodeRecord, cause: DeathCauseRecord) -> None:
    """A node has died, or was started again: everything on it is gone."""
    store.put(replace(node, state=NodeState.DEAD, cause=cause))
    for job in store.jobs_driven_from(node.node_id):
        finish_job(store, job, cause)
    for actor in store.leftovers_on(node.node_id):
        clear_leftover(store, actor, cause)
    for actor in store.actors_owned_from(node.node_id):
        reason = f"its owner's node {node.node_id.hex()} died: {cause.reason}"
        end_actor(store, actor, DeathKind.OWNER_DIED, cause, reason=reason)
    for actor in store.actors_on(node.node_id):
        if actor.state is ActorState.PLACING:
            store.put(lifecycle.unplaced(actor, cause))
        else:
            fail_actor(store, actor, DeathKind.NODE_DIED, cause, process_gone=True)


def finish_job(store: Store, job: JobRecord, cause: DeathCauseRecord | None) -> None:
    """Ends a job's actors, but for detached ones and what those own, directly or not."""
    if job.state is JobState.FINISHED:
        return
    store.put(replace(job, state=JobState.FINISHED, cause=cause))
    actors = store.actors_of_job(job.job_id)
    kept = {actor.actor_id for actor in actors if actor.detached}
    owners = [actor.worker_id for actor in actors if actor.detached and actor.state is ActorState.ALIVE]
    while owners:
        for actor in store.actors_owned_by(owners.pop()):
            if actor.actor_id not in kept:
                kept.add(actor.actor_id)
                if actor.state is ActorState.ALIVE:
                    owners.append(actor.worker_id)
    reason = "its job finished" if cause is None else f"its job finished because its driver died: {cause.reason}"
    for actor in actors:
        if actor.actor_id not in kept:
            end_actor(store, actor, DeathKind.JOB_FINISHED, cause or DeathCauseRecord(), reason=reason)
    if not any(actor.detached and actor.state is not ActorState.DEAD for actor in actors):
        packages.job_finished(store, job.job_id)


def settle(store: Store) -> None:
    """Ends what the workers lost in this command owned, and what those owned."""
    while store.doomed:
        worker_id, cause = store.doomed.pop()
        reason = f"its owner, the worker {worker_id.hex()}, died: {cause.reason}"
        for actor in store.actors_owned_by(worker_id):
            end_actor(store, actor, DeathKind.OWNER_DIED, cause, reason=reason)


def _left(store: Store, actor: ActorRecord, graceful: bool) -> Leftover | None:
    left = lifecycle.leftover_of(actor, graceful)
    return left if left is not None and store.node_alive(left.node_id) else None


def _doom(store: Store, worker_id: bytes, cause: DeathCauseRecord) -> None:
    if worker_id:
        store.doomed.append((worker_id, cause))
