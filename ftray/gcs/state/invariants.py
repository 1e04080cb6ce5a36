"""What must hold of the GCS state after each command. For tests, the simulator, and a replica that doubts itself.

Role: pure, reads only. Each violation is a sentence that names the records.
"""

from __future__ import annotations

from collections.abc import Iterator

from ftray.gcs.state.groups import UNDECIDED, WAITING_GROUP, breaks_strategy
from ftray.gcs.state.lifecycle import ON_NODE, WAITING
from ftray.gcs.state.store import Store
from ftray.gcs.state.tables import (
    ActorRecord,
    ActorState,
    BundleState,
    DeathKind,
    GroupRecord,
    GroupState,
    JobState,
)


def violations(store: Store) -> Iterator[str]:
    """All that is wrong with the tables; nothing if they are sound."""
    yield from store.index_faults()
    names: dict[tuple[str, str], bytes] = {}
    workers: dict[bytes, bytes] = {}
    for actor in store.actors.values():
        who = f"actor {actor.actor_id.hex()} ({actor.state.name})"
        if actor.state is ActorState.DEAD:
            yield from _dead(actor, who)
        else:
            yield from _live(store, actor, who)
            if actor.name:
                other = names.setdefault((actor.namespace, actor.name), actor.actor_id)
                if other != actor.actor_id:
                    yield f"{who} has the same name as {other.hex()}"
                named = store.named_actor(actor.namespace, actor.name)
                if named is None or named.actor_id != other:
                    yield f"the name of {who} does not lead to it"
        if actor.state is ActorState.ALIVE:
            other = workers.setdefault(actor.worker_id, actor.actor_id)
            if other != actor.actor_id:
                yield f"{who} lives in the same worker as {other.hex()}"
        if actor.leftover is not None:
            if not store.node_alive(actor.leftover.node_id):
                yield f"{who} has a leftover process on a node that is not alive"
            if actor.leftover.incarnation >= actor.incarnation:
                yield f"{who} has a leftover of its present life"
            if actor.leftover.graceful and actor.state is not ActorState.DEAD:
                yield f"{who} waits for a leftover that may take its time"
        if 0 <= actor.max_restarts < actor.restarts:
            yield f"{who} has spent {actor.restarts} restarts of {actor.max_restarts}"
        if actor.incarnation < actor.restarts:
            yield f"{who} has more restarts than lives"
    for job in store.jobs.values():
        if job.state is JobState.RUNNING:
            if not store.node_alive(job.node_id):
                yield f"job {job.job_id.hex()} runs, but its driver's node is not alive"
            if job.driver_worker_id in store.worker_failures:
                yield f"job {job.job_id.hex()} runs, but its driver has died"
    yield from _groups(store)


def _groups(store: Store) -> Iterator[str]:
    names: dict[tuple[str, str], bytes] = {}
    for group in store.placement_groups.values():
        who = f"placement group {group.group_id.hex()} ({group.state.name})"
        yield from _bundles(store, group, who)
        yield from _leftovers(store, group, who)
        if group.state is GroupState.REMOVED:
            if group.kind is DeathKind.NONE or group.cause is None:
                yield f"{who} was removed for no reason"
            continue
        if group.name:
            other = names.setdefault((group.namespace, group.name), group.group_id)
            named = store.named_group(group.namespace, group.name)
            if other != group.group_id:
                yield f"{who} has the same name as {other.hex()}"
            if named is None or named.group_id != other:
                yield f"the name of {who} does not lead to it"
        if group.detached != (group.owner_worker_id is None):
            yield f"{who} must be detached or have an owner"
        if not group.detached:
            job, maker = store.jobs.get(group.job_id), store.actors.get(group.owner_actor_id)
            if (job is None or job.state is JobState.FINISHED) and (maker is None or maker.state is ActorState.DEAD):
                yield f"{who} outlives its job, and is neither detached nor made in an actor that lives"


def _bundles(store: Store, group: GroupRecord, who: str) -> Iterator[str]:
    """What the states of the bundles, and that of the group, say of each other."""
    states = {bundle.state for bundle in group.bundles}
    for index, bundle in enumerate(group.bundles):
        if (bundle.state is BundleState.UNPLACED) == bool(bundle.node_id):
            yield f"bundle {index} of {who} is {bundle.state.name} with the node {bundle.node_id.hex() or 'nobody'}"
        if bundle.node_id and not store.node_alive(bundle.node_id):
            yield f"bundle {index} of {who} is on a node that is not alive"
        if bundle.attempt > group.attempt or (bundle.state in UNDECIDED and bundle.attempt != group.attempt):
            yield f"bundle {index} of {who} is of attempt {bundle.attempt}, the group at {group.attempt}"
    nodes = [bundle.node_id for bundle in group.bundles if bundle.node_id]
    wrong = breaks_strategy(group.strategy, nodes)
    if wrong:
        yield f"{who}: {wrong}"
    unplaced, undecided = BundleState.UNPLACED in states, bool(states.intersection(UNDECIDED))
    committing = BundleState.COMMITTING in states
    sound = {
        GroupState.PENDING: states == {BundleState.UNPLACED} and not group.made,
        GroupState.PREPARING: BundleState.PREPARING in states
        and not unplaced
        and (group.made or states.issubset(UNDECIDED)),
        GroupState.COMMITTING: committing and not unplaced and not undecided and group.made,
        GroupState.CREATED: states == {BundleState.COMMITTED} and group.made,
        GroupState.RESCHEDULING: unplaced and not undecided and group.made,
        GroupState.REMOVED: states.issubset({BundleState.UNPLACED}),
    }
    if not sound[group.state]:
        yield f"{who} has bundles that are {', '.join(sorted(state.name for state in states))}"
    if group.missing and group.state not in WAITING_GROUP:
        yield f"{who} says what it waits for, and does not wait"


def _leftovers(store: Store, group: GroupRecord, who: str) -> Iterator[str]:
    seen: set[tuple[bytes, int]] = set()
    for left in group.leftovers:
        if not store.node_alive(left.node_id):
            yield f"{who} is to be given back by a node that is not alive"
        if left.attempt >= group.attempt:
            yield f"{who} has a leftover of its present attempt"
        if (left.node_id, left.attempt) in seen or not left.indices:
            yield f"{who} has a leftover twice, or one of nothing"
        seen.add((left.node_id, left.attempt))
    if group.leftovers and group.state is GroupState.PREPARING:
        yield f"{who} was placed while a node has to give back what it holds of an earlier attempt"


def _live(store: Store, actor: ActorRecord, who: str) -> Iterator[str]:
    if actor.state in WAITING and (actor.node_id or actor.worker_id or actor.endpoint):
        yield f"{who} waits, but has a node or worker"
    if actor.state in ON_NODE:
        if not store.node_alive(actor.node_id):
            yield f"{who} is on a node that is not alive"
        if actor.leftover is not None:
            yield f"{who} was placed while an earlier life may still run"
    if actor.state is ActorState.ALIVE:
        if not actor.worker_id:
            yield f"{who} has no worker"
        if actor.worker_id in store.worker_failures:
            yield f"{who} lives in a worker that has died"
    if actor.detached != (actor.owner_worker_id is None):
        yield f"{who} must be detached or have an owner"
    if actor.owner_worker_id is not None:
        if actor.owner_worker_id in store.worker_failures:
            yield f"{who} has an owner that has died"
        if not store.node_alive(actor.owner_node_id):
            yield f"{who} has an owner on a node that is not alive"
        job = store.jobs.get(actor.job_id)
        if (
            (job is None or job.state is JobState.FINISHED)
            and store.actor_in(actor.owner_worker_id) is None
            and not store.leftovers_in(actor.owner_worker_id)
        ):
            yield f"{who} outlives its job, and is neither detached nor owned by an actor"


def _dead(actor: ActorRecord, who: str) -> Iterator[str]:
    if actor.kind is DeathKind.NONE or actor.cause is None:
        yield f"{who} died for no reason"
    if actor.creation:
        yield f"{who} still has its creation spec"
