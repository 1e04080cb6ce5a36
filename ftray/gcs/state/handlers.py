"""One function for each command: checks, then writes.

Role: pure, on the store. A handler returns the value of the result, or raises `Refusal` before it has written anything.
Writing nothing is success too: the state is already as the command wants it, as after a repeat by another client.

Rules: a command about a life of an actor or node names its incarnation, and counts only if that is the present one.
Checks against ended owners and nodes close the gap between a failure and what the failed one had still sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftray.gcs.state import commands as c
from ftray.gcs.state import failures, job_keys, lifecycle, packages
from ftray.gcs.state.checks import Refusal, Value
from ftray.gcs.state.checks import because as _because
from ftray.gcs.state.checks import check_id as _check_id
from ftray.gcs.state.checks import check_name as _check_name
from ftray.gcs.state.checks import check_owner as _check_owner
from ftray.gcs.state.checks import check_resources as _check_resources
from ftray.gcs.state.commands import DeathCauseRecord
from ftray.gcs.state.group_handlers import GROUP_HANDLERS
from ftray.gcs.state.store import Store
from ftray.gcs.state.tables import (
    JOB_ID_BYTES,
    ActorRecord,
    ActorState,
    Code,
    DeathKind,
    JobRecord,
    JobState,
    KvRecord,
    NodeRecord,
    NodeState,
    Table,
    WorkerFailureRecord,
    kv_key,
)

KEY_BYTES_MAX = 64 << 10
INCARNATION_MAX = (1 << 63) - 1


# --- nodes ----------------------------------------------------------------------------------------------------------


def register_node(store: Store, command: c.RegisterNode) -> Value:
    _check_id(command.node_id, "node_id")
    _check_resources(command.resources)
    if not 0 <= command.incarnation <= INCARNATION_MAX:
        raise Refusal(Code.INVALID, f"incarnation {command.incarnation} is not in 0..2**63-1")
    known = store.nodes.get(command.node_id)
    if known is not None:
        if command.incarnation < known.incarnation or (
            known.state is NodeState.DEAD and command.incarnation == known.incarnation
        ):
            stale = command.incarnation < known.incarnation
            what = "a later incarnation of it is known" if stale else "it was declared dead"
            raise Refusal(
                Code.FENCED,
                f"node {command.node_id.hex()} (incarnation {command.incarnation}) may not join: {what}"
                f"{_because(known.cause)}; start it again under a new node id",
            )
        if known.state is NodeState.ALIVE and command.incarnation > known.incarnation:
            reason = f"started again with incarnation {command.incarnation}"
            failures.node_gone(store, known, DeathCauseRecord(node_id=known.node_id.hex(), what="node", reason=reason))
    record = NodeRecord(
        command.node_id,
        command.endpoint,
        command.resources,
        command.labels,
        command.incarnation,
        command.hostname,
        command.pid,
    )
    if store.nodes.get(command.node_id) != record:
        store.put(record)
    return None


def mark_node_dead(store: Store, command: c.MarkNodeDead) -> Value:
    node = store.nodes.get(command.node_id)
    if node is None:
        raise Refusal(Code.NOT_FOUND, f"no node {command.node_id.hex()} is known")
    if command.incarnation != node.incarnation:
        raise Refusal(
            Code.STALE_INCARNATION,
            f"node {command.node_id.hex()} is at incarnation {node.incarnation}, not {command.incarnation}",
        )
    if node.state is NodeState.ALIVE:
        failures.node_gone(store, node, command.cause)
    return None


# --- jobs -----------------------------------------------------------------------------------------------------------


def add_job(store: Store, command: c.AddJob) -> Value:
    if len(command.job_id) != JOB_ID_BYTES:
        raise Refusal(Code.INVALID, f"job_id has {len(command.job_id)} bytes instead of {JOB_ID_BYTES}")
    _check_id(command.driver_worker_id, "driver_worker_id")
    _check_name(command.namespace, "namespace")
    known = store.jobs.get(command.job_id)
    if known is not None:
        if known.driver_worker_id != command.driver_worker_id:
            raise Refusal(Code.EXISTS, f"job id {command.job_id.hex()} is another driver's: draw another")
        if known.state is JobState.FINISHED:
            raise Refusal(Code.ENDED, f"job {command.job_id.hex()} has finished{_because(known.cause)}")
        return None
    _check_owner(store, command.driver_worker_id, command.node_id)
    store.put(
        JobRecord(
            command.job_id,
            command.driver_worker_id,
            command.driver_pid,
            command.node_id,
            command.entrypoint,
            command.namespace,
        )
    )
    return None


def finish_job(store: Store, command: c.FinishJob) -> Value:
    job = store.jobs.get(command.job_id)
    if job is None:
        raise Refusal(Code.NOT_FOUND, f"no job {command.job_id.hex()} is known")
    failures.finish_job(store, job, command.cause)
    return None


def worker_died(store: Store, command: c.WorkerDied) -> Value:
    _check_id(command.worker_id, "worker_id")
    if command.worker_id not in store.worker_failures:
        store.put(WorkerFailureRecord(command.worker_id, command.node_id, command.cause))
        failures.worker_gone(store, command.worker_id, command.cause)
    return None


# --- key-value ------------------------------------------------------------------------------------------------------


def kv_put(store: Store, command: c.KvPut) -> Value:
    _check_name(command.namespace, "namespace")
    if not 1 <= len(command.key) <= KEY_BYTES_MAX:
        raise Refusal(Code.INVALID, f"a key of {len(command.key)} bytes: 1 to {KEY_BYTES_MAX} are allowed")
    if command.namespace == packages.USERS:
        _check_not_over(store, command.key[:JOB_ID_BYTES])
    old = store.kv.get(kv_key(command.namespace, command.key))
    if old is not None:
        if not command.overwrite:
            raise Refusal(Code.EXISTS, f"the key {command.key[:80]!r} exists in namespace {command.namespace!r}")
        if old.value == command.value:
            return 0
    store.put(KvRecord(command.namespace, command.key, command.value))
    return 1 if old is None else 0


def kv_delete(store: Store, command: c.KvDelete) -> Value:
    _check_name(command.namespace, "namespace")
    key = kv_key(command.namespace, command.key)
    if not command.prefix:
        if key not in store.kv:
            return 0
        store.delete(Table.KV, key)
        job_keys.deleted(store, key)
        return 1
    doomed = [each for each in store.kv if each.startswith(key)]
    for each in doomed:
        store.delete(Table.KV, each)
    for each in doomed:
        job_keys.deleted(store, each)
    return len(doomed)


def job_kv_put(store: Store, command: c.JobKvPut) -> Value:
    if command.job_id not in store.jobs:
        raise Refusal(Code.NOT_FOUND, f"no job {command.job_id.hex()} is known")
    _check_not_over(store, command.job_id)
    value = kv_put(store, c.KvPut(command.namespace, command.key, command.value, command.overwrite))
    job_keys.note(store, command.job_id, kv_key(command.namespace, command.key))
    return value


def _check_not_over(store: Store, job_id: bytes) -> None:
    if job_keys.is_over(store, job_id):
        job = store.jobs[job_id]
        raise Refusal(Code.ENDED, f"job {job_id.hex()} has finished{_because(job.cause)}: nothing is kept for it")


# --- actors ---------------------------------------------------------------------------------------------------------


def register_actor(store: Store, command: c.RegisterActor) -> Value:
    _check_id(command.actor_id, "actor_id")
    _check_name(command.name, "name")
    _check_name(command.namespace, "namespace")
    _check_resources(command.resources)
    if command.max_restarts < -1:
        raise Refusal(Code.INVALID, f"max_restarts is {command.max_restarts}: -1 (no limit), 0 or more are allowed")
    if command.detached != (command.owner_worker_id is None):
        raise Refusal(Code.INVALID, "a detached actor has no owner, any other has one")
    if command.name:
        holder = store.named_actor(command.namespace, command.name)
        if holder is not None and holder.actor_id != command.actor_id:
            if command.get_if_exists:
                return holder.actor_id
            raise Refusal(
                Code.EXISTS,
                f"the name {command.name!r} is taken in namespace {command.namespace!r} by actor "
                f"{holder.actor_id.hex()} ({holder.class_name}): use another name, or get_if_exists=True",
            )
    known = store.actors.get(command.actor_id)
    if known is not None and known.owner_worker_id == command.owner_worker_id:
        if known.state is ActorState.DEAD:
            raise Refusal(Code.ENDED, f"actor {known.actor_id.hex()} has ended ({known.kind}){_because(known.cause)}")
        return known.actor_id
    _check_may_own(store, command)
    incarnation, leftover = 0, None
    if known is not None:
        reason = "the task that created it ran again, and created it anew"
        failures.end_actor(store, known, DeathKind.OWNER_DIED, DeathCauseRecord(reason=reason))
        known = store.actors[known.actor_id]
        incarnation, leftover = known.incarnation, known.leftover  # Raised when it ended.
    store.put(
        ActorRecord(
            command.actor_id,
            command.job_id,
            command.owner_worker_id,
            command.owner_node_id,
            command.class_name,
            command.name,
            command.namespace,
            command.max_restarts,
            command.detached,
            command.resources,
            command.creation,
            incarnation=incarnation,
            leftover=leftover,
        )
    )
    return command.actor_id


def actor_placing(store: Store, command: c.ActorPlacing) -> Value:
    actor = _actor(store, command.actor_id, command.incarnation)
    if actor.state is ActorState.PLACING and actor.node_id == command.node_id:
        return None
    if not store.node_alive(command.node_id):
        raise Refusal(Code.NOT_FOUND, f"no live node {command.node_id.hex()} to place actor {actor.actor_id.hex()} on")
    if actor.leftover is not None:
        raise Refusal(
            Code.ILLEGAL,
            f"actor {actor.actor_id.hex()} can't be placed before its process of incarnation "
            f"{actor.leftover.incarnation} on node {actor.leftover.node_id.hex()} is gone",
        )
    store.put(lifecycle.placed(actor, command.node_id))
    return None


def actor_alive(store: Store, command: c.ActorAlive) -> Value:
    _check_id(command.worker_id, "worker_id")
    node = store.nodes.get(command.node_id)
    if node is None or node.state is NodeState.DEAD:
        raise Refusal(Code.FENCED, f"node {command.node_id.hex()} is not a live member: what it starts does not count")
    if command.worker_id in store.worker_failures:
        raise Refusal(Code.ENDED, f"worker {command.worker_id.hex()} is known to have died")
    actor = _actor(store, command.actor_id, command.incarnation)
    if actor.node_id != command.node_id:
        raise Refusal(Code.ILLEGAL, f"actor {actor.actor_id.hex()} was not placed on node {command.node_id.hex()}")
    if actor.state is ActorState.ALIVE and actor.worker_id == command.worker_id:
        return None
    if store.actor_in(command.worker_id) is not None:
        raise Refusal(Code.ILLEGAL, f"worker {command.worker_id.hex()} is another actor already")
    store.put(lifecycle.started(actor, command.worker_id, command.endpoint, command.pid))
    return None


def actor_died(store: Store, command: c.ActorDied) -> Value:
    known = store.actors.get(command.actor_id)
    left = known.leftover if known is not None else None
    if known is not None and left is not None and left.incarnation == command.incarnation:
        failures.clear_leftover(store, known, command.cause)
        return None
    actor = _actor(store, command.actor_id, command.incarnation)
    if actor.state in lifecycle.WAITING:
        raise Refusal(Code.ILLEGAL, f"actor {actor.actor_id.hex()} is {actor.state.name}: it has no life to lose")
    if command.may_restart:
        failures.fail_actor(store, actor, DeathKind.WORKER_DIED, command.cause, process_gone=True)
    else:
        kind = DeathKind.CREATION_FAILED if actor.state is ActorState.PLACING else DeathKind.EXITED
        failures.end_life(store, actor, kind, command.cause)
    return None


def actor_unplaced(store: Store, command: c.ActorUnplaced) -> Value:
    actor = _actor(store, command.actor_id, command.incarnation)
    if actor.node_id != command.node_id:
        raise Refusal(Code.ILLEGAL, f"actor {actor.actor_id.hex()} was not placed on node {command.node_id.hex()}")
    cause = DeathCauseRecord(node_id=command.node_id.hex(), what="node", reason=command.reason)
    store.put(lifecycle.unplaced(actor, cause))
    return None


def actor_out_of_scope(store: Store, command: c.ActorOutOfScope) -> Value:
    actor = _known_actor(store, command.actor_id)
    if actor.detached:
        raise Refusal(Code.ILLEGAL, f"actor {actor.actor_id.hex()} is detached: only a kill ends it")
    if command.owner_worker_id is not None and command.owner_worker_id != actor.owner_worker_id:
        raise Refusal(Code.STALE_INCARNATION, f"actor {actor.actor_id.hex()} has another owner by now")
    if actor.state is not ActorState.DEAD:
        cause = DeathCauseRecord(what=actor.class_name, reason="all handles to it went out of scope")
        failures.end_actor(store, actor, DeathKind.OUT_OF_SCOPE, cause, graceful=True)
    return None


def kill_actor(store: Store, command: c.KillActor) -> Value:
    actor = _known_actor(store, command.actor_id)
    cause = DeathCauseRecord(
        node_id=actor.node_id.hex(),
        pid=actor.pid,
        worker_id=actor.worker_id.hex(),
        what=actor.class_name,
        reason=command.reason or "killed by request",
    )
    if command.no_restart:
        failures.end_actor(store, actor, DeathKind.KILLED, cause)
    elif actor.state in lifecycle.ON_NODE:
        failures.fail_actor(store, actor, DeathKind.KILLED, cause, process_gone=False)
    return None


def actor_unschedulable(store: Store, command: c.ActorUnschedulable) -> Value:
    actor = _known_actor(store, command.actor_id)
    if actor.incarnation != command.incarnation or actor.state not in lifecycle.WAITING:
        raise Refusal(Code.STALE_INCARNATION, "the actor has been placed, or has ended, since that was found")
    cause = DeathCauseRecord(what=actor.class_name, reason=command.missing)
    failures.end_actor(store, actor, DeathKind.UNSCHEDULABLE, cause)
    return None


# --- checks ---------------------------------------------------------------------------------------------------------


def _known_actor(store: Store, actor_id: bytes) -> ActorRecord:
    actor = store.actors.get(actor_id)
    if actor is None:
        raise Refusal(Code.NOT_FOUND, f"no actor {actor_id.hex()} is known (never registered, or dead for long)")
    return actor


def _actor(store: Store, actor_id: bytes, incarnation: int) -> ActorRecord:
    """The live actor at this incarnation."""
    actor = _known_actor(store, actor_id)
    if actor.incarnation != incarnation or actor.state is ActorState.DEAD:
        raise Refusal(
            Code.STALE_INCARNATION,
            f"actor {actor_id.hex()} is {actor.state.name} at incarnation {actor.incarnation}, not {incarnation}",
        )
    return actor


def _check_may_own(store: Store, command: c.RegisterActor) -> None:
    if command.owner_worker_id is not None:
        _check_owner(store, command.owner_worker_id, command.owner_node_id)
    job = store.jobs.get(command.job_id)
    if job is None:
        raise Refusal(Code.NOT_FOUND, f"no job {command.job_id.hex()} is known")
    if job.state is JobState.FINISHED:
        # A detached actor outlives its job, and may go on creating actors.
        if command.owner_worker_id is None or store.actor_in(command.owner_worker_id) is None:
            raise Refusal(Code.ENDED, f"job {command.job_id.hex()} has finished{_because(job.cause)}")


HANDLERS: dict[type, Callable[[Store, Any], Value]] = {
    c.RegisterNode: register_node,
    c.MarkNodeDead: mark_node_dead,
    c.AddJob: add_job,
    c.FinishJob: finish_job,
    c.WorkerDied: worker_died,
    c.ActorUnschedulable: actor_unschedulable,
    c.KvPut: kv_put,
    c.KvDelete: kv_delete,
    c.JobKvPut: job_kv_put,
    c.RegisterActor: register_actor,
    c.ActorPlacing: actor_placing,
    c.ActorAlive: actor_alive,
    c.ActorDied: actor_died,
    c.ActorUnplaced: actor_unplaced,
    c.ActorOutOfScope: actor_out_of_scope,
    c.KillActor: kill_actor,
    **GROUP_HANDLERS,
}
"""All commands but ForgetClients, which is about sessions."""
