"""The commands of placement groups: checks, then writes, as in `handlers.py`, which has their table.

Role: pure, on the store.

Rules: a command about an attempt counts only for bundles that were placed in it, and on that node. Whatever else is
said is refused, and tells the node that said so to give back what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from ftray.gcs.state import commands as c
from ftray.gcs.state import failures, groups
from ftray.gcs.state.checks import (
    NAME_CHARS_MAX,
    Refusal,
    Value,
    because,
    check_id,
    check_name,
    check_owner,
    check_resources,
)
from ftray.gcs.state.commands import DeathCauseRecord
from ftray.gcs.state.placement import UNITS
from ftray.gcs.state.store import Store
from ftray.gcs.state.tables import (
    Bundle,
    BundleState,
    Code,
    DeathKind,
    GroupRecord,
    GroupState,
    JobState,
    Strategy,
)
from ftray.ids import BUNDLE

BUNDLES_MAX = 1_000
"""Each answer of a node writes the whole record, so the cost of making a group grows with the square."""
AMOUNT_MAX = 1 << 60


def create_group(store: Store, command: c.CreateGroup) -> Value:
    check_id(command.group_id, "group_id")
    check_name(command.name, "name")
    check_name(command.namespace, "namespace")
    strategy = _strategy(command.strategy)
    _check_bundles(command.bundles)
    if command.detached != (command.owner_worker_id is None):
        raise Refusal(Code.INVALID, "a detached placement group has no owner, any other has one")
    known = store.placement_groups.get(command.group_id)
    if known is not None:
        if (known.job_id, known.owner_worker_id) != (command.job_id, command.owner_worker_id):
            raise Refusal(Code.EXISTS, f"the id {command.group_id.hex()} is another placement group's: draw another")
        if known.state is GroupState.REMOVED:
            raise Refusal(
                Code.ENDED, f"placement group {known.group_id.hex()} has ended ({known.kind}){because(known.cause)}"
            )
        return known.group_id
    if command.name:
        holder = store.named_group(command.namespace, command.name)
        if holder is not None:
            raise Refusal(
                Code.EXISTS,
                f"the name {command.name!r} is taken in namespace {command.namespace!r} by placement group "
                f"{holder.group_id.hex()}: use another name, or look that one up",
            )
    maker = None
    if command.owner_worker_id is not None:
        check_owner(store, command.owner_worker_id, command.owner_node_id)
        maker = store.actor_in(command.owner_worker_id)
        if maker is not None and maker.job_id != command.job_id:
            raise Refusal(Code.INVALID, f"actor {maker.actor_id.hex()} is not of job {command.job_id.hex()}")
    job = store.jobs.get(command.job_id)
    if job is None:
        raise Refusal(Code.NOT_FOUND, f"no job {command.job_id.hex()} is known")
    if job.state is JobState.FINISHED:
        # A detached actor outlives its job, and may go on making groups.
        if maker is None:
            raise Refusal(Code.ENDED, f"job {command.job_id.hex()} has finished{because(job.cause)}")
    store.put(
        GroupRecord(
            command.group_id,
            command.job_id,
            command.owner_worker_id,
            command.owner_node_id,
            command.name,
            command.namespace,
            strategy,
            command.detached,
            [Bundle(resources) for resources in command.bundles],
            owner_actor_id=maker.actor_id if maker is not None else b"",
        )
    )
    return command.group_id


def group_placing(store: Store, command: c.GroupPlacing) -> Value:
    group = _group(store, command.group_id, command.attempt)
    if group.state is GroupState.PREPARING:
        if all(
            0 <= index < len(group.bundles)
            and group.bundles[index].node_id == node_id
            and group.bundles[index].attempt == command.attempt
            for index, node_id in command.nodes.items()
        ):
            return None
        raise Refusal(Code.ILLEGAL, f"placement group {group.group_id.hex()} has been placed otherwise")
    if group.leftovers:
        left = group.leftovers[0]
        raise Refusal(
            Code.ILLEGAL,
            f"placement group {group.group_id.hex()} can't be placed before node {left.node_id.hex()} has given back "
            f"what it holds of attempt {left.attempt}",
        )
    if sorted(command.nodes) != groups.unplaced(group):
        raise Refusal(Code.INVALID, "nodes are to be given for the bundles that have none, and for no others")
    for node_id in command.nodes.values():
        if not store.node_alive(node_id):
            raise Refusal(Code.NOT_FOUND, f"no live node {node_id.hex()} to place a bundle on")
    nodes = [command.nodes.get(index, bundle.node_id) for index, bundle in enumerate(group.bundles)]
    wrong = groups.breaks_strategy(group.strategy, nodes)
    if wrong:
        raise Refusal(Code.INVALID, wrong)
    store.put(groups.placed(group, command.nodes))
    return None


def bundles_prepared(store: Store, command: c.BundlesPrepared) -> Value:
    group, bundles = _held(store, command.group_id, command.attempt, command.node_id)
    if bundles[0].state is BundleState.PREPARING:
        store.put(groups.prepared(group, command.node_id))
    return None


def bundles_refused(store: Store, command: c.BundlesRefused) -> Value:
    _gone(store, command.group_id, command.attempt, command.node_id, command.reason)
    return None


def bundles_committed(store: Store, command: c.BundlesCommitted) -> Value:
    group, bundles = _held(store, command.group_id, command.attempt, command.node_id)
    if bundles[0].state in groups.UNDECIDED:
        raise Refusal(
            Code.ILLEGAL, f"placement group {group.group_id.hex()} is not made yet: its bundles can't be committed"
        )
    if bundles[0].state is BundleState.COMMITTING:
        store.put(groups.committed(group, command.node_id, command.attempt))
    return None


def bundles_returned(store: Store, command: c.BundlesReturned) -> Value:
    _gone(store, command.group_id, command.attempt, command.node_id, command.reason)
    return None


def remove_group(store: Store, command: c.RemoveGroup) -> Value:
    group = _known(store, command.group_id)
    if group.state is not GroupState.REMOVED:
        cause = DeathCauseRecord(what="placement group", reason=command.reason or "removed by request")
        failures.end_group(store, group, DeathKind.REMOVED, failures.shortened(cause))
    return None


def group_infeasible(store: Store, command: c.GroupInfeasible) -> Value:
    group = _group(store, command.group_id, command.attempt)
    if group.state not in groups.WAITING_GROUP:
        raise Refusal(Code.STALE_INCARNATION, "the placement group has been placed since that was found")
    missing = command.missing[: failures.CAUSE_CHARS_MAX]
    if group.missing != missing:
        store.put(replace(group, missing=missing))
    return None


# --- checks ---------------------------------------------------------------------------------------------------------


def _strategy(name: str) -> Strategy:
    try:
        return Strategy(name)
    except ValueError:
        raise Refusal(Code.INVALID, f"there is no strategy {name[:80]!r}: there are {', '.join(Strategy)}") from None


def _check_bundles(bundles: list[dict[str, float]]) -> None:
    if not 1 <= len(bundles) <= BUNDLES_MAX:
        raise Refusal(Code.INVALID, f"a placement group of {len(bundles)} bundles: 1 to {BUNDLES_MAX} are allowed")
    for index, resources in enumerate(bundles):
        for name in resources:
            if not 1 <= len(name) <= NAME_CHARS_MAX or "\0" in name or name == BUNDLE:
                raise Refusal(
                    Code.INVALID,
                    f"bundle {index} asks for {name[:80]!r}: a resource has a name of 1 to {NAME_CHARS_MAX} characters "
                    f"without NUL, other than {BUNDLE!r}",
                )
        check_resources(resources)
        if not any(resources.values()):
            raise Refusal(Code.INVALID, f"bundle {index} asks for nothing: each needs an amount of some resource")
        for name, amount in resources.items():
            if "_group_" in name:
                raise Refusal(
                    Code.INVALID, f"bundle {index} asks for {name[:80]!r}: groups inside of groups can't be made"
                )
            units = amount * UNITS
            if amount >= AMOUNT_MAX or abs(units - round(units)) > max(1e-6, units * 1e-15):
                raise Refusal(
                    Code.INVALID,
                    f"bundle {index} asks for {amount!r} {name[:80]!r}: less than 2**60 in steps of 1/{UNITS} is "
                    "possible",
                )


def _known(store: Store, group_id: bytes) -> GroupRecord:
    group = store.placement_groups.get(group_id)
    if group is None:
        raise Refusal(
            Code.NOT_FOUND, f"no placement group {group_id.hex()} is known (never created, or removed for long)"
        )
    return group


def _group(store: Store, group_id: bytes, attempt: int) -> GroupRecord:
    """The live group at this attempt."""
    group = _known(store, group_id)
    if group.attempt != attempt or group.state is GroupState.REMOVED:
        raise Refusal(
            Code.STALE_INCARNATION,
            f"placement group {group_id.hex()} is {group.state.name} at attempt {group.attempt}, not {attempt}",
        )
    return group


def _bundles(group: GroupRecord, attempt: int, node_id: bytes) -> list[Bundle]:
    return [
        bundle for bundle in group.bundles
        if bundle.node_id == node_id and bundle.attempt == attempt and bundle.state is not BundleState.UNPLACED
    ]  # fmt: skip


def _held(store: Store, group_id: bytes, attempt: int, node_id: bytes) -> tuple[GroupRecord, list[Bundle]]:
    """The group, and its bundles that were placed on the live node in this attempt: at least one, all in one state."""
    if not store.node_alive(node_id):
        raise Refusal(Code.FENCED, f"node {node_id.hex()} is not a live member: what it holds does not count")
    group = _known(store, group_id)
    bundles = _bundles(group, attempt, node_id)
    if not bundles:
        raise Refusal(
            Code.STALE_INCARNATION,
            f"placement group {group_id.hex()} ({group.state.name}, attempt {group.attempt}) has no bundle of attempt "
            f"{attempt} on node {node_id.hex()}: it is to be given back",
        )
    return group, bundles


def _gone(store: Store, group_id: bytes, attempt: int, node_id: bytes, reason: str) -> None:
    """The node holds nothing of the attempt: that was to be given back, or is lost."""
    group = _known(store, group_id)
    if any((left.node_id, left.attempt) == (node_id, attempt) for left in group.leftovers):
        store.put(groups.returned(group, node_id, attempt))
        return
    if not _bundles(group, attempt, node_id):
        raise Refusal(
            Code.STALE_INCARNATION,
            f"placement group {group_id.hex()} has no bundle of attempt {attempt} on node {node_id.hex()}",
        )
    cause = DeathCauseRecord(node_id=node_id.hex(), what="placement group", reason=reason)
    cause = failures.shortened(cause)
    store.put(
        groups.lost(
            group, lambda bundle: (bundle.node_id, bundle.attempt) == (node_id, attempt), cause, store.node_alive
        )
    )


GROUP_HANDLERS: dict[type, Callable[[Store, Any], Value]] = {
    c.CreateGroup: create_group,
    c.GroupPlacing: group_placing,
    c.BundlesPrepared: bundles_prepared,
    c.BundlesRefused: bundles_refused,
    c.BundlesCommitted: bundles_committed,
    c.BundlesReturned: bundles_returned,
    c.RemoveGroup: remove_group,
    c.GroupInfeasible: group_infeasible,
}
