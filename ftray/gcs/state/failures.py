"""What a failure reaches: from a node, worker, owner, driver or job to the actors and groups that end or begin anew.

Role: pure, on the store. What a failure means for one actor is in `lifecycle.py`, for a placement group in `groups.py`.

Rules: one command carries the whole effect of a failure, so that no reader sees half of it and no leader can die in the
middle of it. When an actor's process goes, what it owned goes with it, and so on down: `settle` works through that by
a list, since chains of owners may be long. An actor that may finish its calls (out of scope) keeps what it owns
until its process is reported gone.

Rejected: clean-up by a manager, one command for each actor (many more writes, and states in between in which a live
actor has a dead owner).
"""

from __future__ import annotations

from msgspec.structs import replace

from ftray.gcs.state import groups, lifecycle
from ftray.gcs.state.commands import DeathCauseRecord
from ftray.gcs.state.store import Store
from ftray.gcs.state.tables import (
    ActorRecord,
    ActorState,
    DeathKind,
    GroupRecord,
    GroupState,
    JobRecord,
    JobState,
    Leftover,
    NodeRecord,
    NodeState,
)

CAUSE_CHARS_MAX = 2_000
STDERR_CHARS_MAX = 8_000
"""What is kept of a cause of death: thousands of them are, and a line of stderr may be a megabyte."""


def shortened(cause: DeathCauseRecord) -> DeathCauseRecord:
    """As much of a cause as is kept: of stderr the end."""
    if (
        len(cause.reason) <= CAUSE_CHARS_MAX
        and len(cause.what) <= CAUSE_CHARS_MAX
        and sum(map(len, cause.stderr_tail)) <= STDERR_CHARS_MAX
    ):
        return cause
    left = STDERR_CHARS_MAX
    tail: list[str] = []
    for line in reversed(cause.stderr_tail):
        if left <= 0:
            break
        tail.append(line[-left:])
        left -= len(line)
    return replace(
        cause, reason=cause.reason[:CAUSE_CHARS_MAX], what=cause.what[:CAUSE_CHARS_MAX], stderr_tail=tail[::-1]
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
    _put(store, lifecycle.ended(actor, kind, own, _left(store, actor, graceful)), own)
    if not graceful and actor.state is ActorState.ALIVE:
        _doom(store, actor.worker_id, cause)


def fail_actor(
    store: Store, actor: ActorRecord, kind: DeathKind, cause: DeathCauseRecord, *, process_gone: bool
) -> None:
    """A placed or live actor failed: restarted if restarts are left, else ended."""
    left = None if process_gone else _left(store, actor, graceful=False)
    _put(store, lifecycle.failed(actor, kind, cause, left), cause)
    if actor.state is ActorState.ALIVE:
        _doom(store, actor.worker_id, cause)


def end_life(store: Store, actor: ActorRecord, kind: DeathKind, cause: DeathCauseRecord) -> None:
    """The node says that nothing runs of the actor's present life, and that it must not be restarted."""
    _put(store, lifecycle.ended(actor, kind, cause, None), cause)
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
    for group in store.groups_on(node.node_id):
        left = groups.returned(group, node.node_id)
        if any(bundle.node_id == node.node_id for bundle in left.bundles):
            reason = f"node {node.node_id.hex()} died: {cause.reason}"
            left = groups.lost(
                left, lambda bundle: bundle.node_id == node.node_id, replace(cause, reason=reason), store.node_alive
            )
        store.put(left)


def end_group(
    store: Store, group: GroupRecord, kind: DeathKind, cause: DeathCauseRecord, *, reason: str = ""
) -> None:
    """Removes a live placement group. `reason` replaces that of `cause`."""
    if group.state is not GroupState.REMOVED:
        own = replace(cause, reason=reason) if reason else cause
        store.put(groups.removed(group, kind, own, store.node_alive))


def finish_job(store: Store, job: JobRecord, cause: DeathCauseRecord | None) -> None:
    """Ends a job's actors and placement groups, but for detached ones and what detached actors own, directly or not."""
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
    for group in store.groups_of_job(job.job_id):
        maker = store.actors.get(group.owner_actor_id)
        outlives = maker is not None and maker.state is not ActorState.DEAD and maker.actor_id in kept
        if not group.detached and not outlives:
            end_group(store, group, DeathKind.JOB_FINISHED, cause or DeathCauseRecord(), reason=reason)
    for actor in actors:
        if actor.actor_id not in kept:
            end_actor(store, actor, DeathKind.JOB_FINISHED, cause or DeathCauseRecord(), reason=reason)


def settle(store: Store) -> None:
    """Ends what the workers lost in this command owned, and what those owned."""
    while store.doomed:
        worker_id, cause = store.doomed.pop()
        reason = f"its owner, the worker {worker_id.hex()}, died: {cause.reason}"
        for actor in store.actors_owned_by(worker_id):
            end_actor(store, actor, DeathKind.OWNER_DIED, cause, reason=reason)


def _put(store: Store, actor: ActorRecord, cause: DeathCauseRecord) -> None:
    """Writes an actor that may have died: groups that were made in it and have outlived their job end with it."""
    store.put(actor)
    if actor.state is ActorState.DEAD:
        for group in store.groups_made_in(actor.actor_id):
            job = store.jobs.get(group.job_id)
            if job is None or job.state is JobState.FINISHED:
                reason = f"its job has finished, and actor {actor.actor_id.hex()}, which made it, died: {cause.reason}"
                end_group(store, group, DeathKind.OWNER_DIED, cause, reason=reason)


def _left(store: Store, actor: ActorRecord, graceful: bool) -> Leftover | None:
    left = lifecycle.leftover_of(actor, graceful)
    return left if left is not None and store.node_alive(left.node_id) else None


def _doom(store: Store, worker_id: bytes, cause: DeathCauseRecord) -> None:
    if worker_id:
        store.doomed.append((worker_id, cause))
