"""The life of a placement group: one table of legal transitions, and pure functions from record to record.

Role: pure. What a failure means for one group is decided here; which groups a failure reaches is `failures.py`.

    PENDING ──PLACE──► PREPARING ──DECIDE──► COMMITTING ──FINISH──► CREATED
       ▲                  │  │ ▲                 │                     │
       └─────GIVE_UP──────┘  │ └──PLACE──┐       │ LOSE                │ LOSE
                             └───LOSE──► RESCHEDULING ◄────────────────┘       any but REMOVED ──END──► REMOVED

Two phases: all nodes hold their bundles (prepared) before any of them offers its own (committed). The decision is not a
command of its own: the command that says that the last node is prepared takes it, so nobody ever sees a group that
is prepared everywhere and waits for somebody to notice.

Rules: before the decision a failed node gives up the whole attempt: all bundles or none. After it the group is made:
bundles that are lost are placed again in an attempt of their own, and the others stay. The attempt is raised whenever
bundles are given up or lost, so that whatever is still said of it is recognised. What a live node may hold of a
former attempt stays in the record until the node has given it back.

Rejected: giving up what was decided when a node dies before it has committed (nodes that offer their bundles would have
to take them back); placing anew before the last attempt is given back (two reservations of one bundle, and a node
that seems full is filled by the group itself).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from ftray.gcs.state.commands import DeathCauseRecord
from ftray.gcs.state.lifecycle import IllegalTransition
from ftray.gcs.state.tables import Bundle, BundleState, DeathKind, GroupRecord, GroupState, Reservation, Strategy


class GroupEvent(enum.Enum):
    PLACE = "place"
    DECIDE = "decide"
    FINISH = "finish"
    GIVE_UP = "give up"
    LOSE = "lose"
    END = "end"


TRANSITIONS: dict[tuple[GroupState, GroupEvent], GroupState] = {
    (GroupState.PENDING, GroupEvent.PLACE): GroupState.PREPARING,
    (GroupState.PENDING, GroupEvent.END): GroupState.REMOVED,
    (GroupState.PREPARING, GroupEvent.DECIDE): GroupState.COMMITTING,
    (GroupState.PREPARING, GroupEvent.GIVE_UP): GroupState.PENDING,
    (GroupState.PREPARING, GroupEvent.LOSE): GroupState.RESCHEDULING,
    (GroupState.PREPARING, GroupEvent.END): GroupState.REMOVED,
    (GroupState.COMMITTING, GroupEvent.FINISH): GroupState.CREATED,
    (GroupState.COMMITTING, GroupEvent.LOSE): GroupState.RESCHEDULING,
    (GroupState.COMMITTING, GroupEvent.END): GroupState.REMOVED,
    (GroupState.CREATED, GroupEvent.LOSE): GroupState.RESCHEDULING,
    (GroupState.CREATED, GroupEvent.END): GroupState.REMOVED,
    (GroupState.RESCHEDULING, GroupEvent.PLACE): GroupState.PREPARING,
    (GroupState.RESCHEDULING, GroupEvent.LOSE): GroupState.RESCHEDULING,
    (GroupState.RESCHEDULING, GroupEvent.END): GroupState.REMOVED,
}
"""All there is. Anything else is refused (a late or foolish command) or a fault of ours."""

WAITING_GROUP = (GroupState.PENDING, GroupState.RESCHEDULING)
"""States in which bundles wait to be placed."""

UNDECIDED = (BundleState.PREPARING, BundleState.PREPARED)
"""What becomes of these bundles depends on all others of their attempt."""


def step(group: GroupRecord, event: GroupEvent) -> GroupState:
    """The state after `event`. Raises IllegalTransition."""
    after = TRANSITIONS.get((group.state, event))
    if after is None:
        raise IllegalTransition(
            f"placement group {group.group_id.hex()} is {group.state.name}: {event.value} is not possible"
        )
    return after


def unplaced(group: GroupRecord) -> list[int]:
    """Which bundles have no node."""
    return [index for index, bundle in enumerate(group.bundles) if bundle.state is BundleState.UNPLACED]


def nodes_of(group: GroupRecord) -> list[bytes]:
    """The nodes on which bundles lie or are being prepared, each once, in the order of the bundles."""
    return list(dict.fromkeys(bundle.node_id for bundle in group.bundles if bundle.node_id))


def breaks_strategy(strategy: Strategy, nodes: Iterable[bytes]) -> str:
    """What is wrong with bundles on these nodes, one for each bundle; '' if nothing."""
    nodes = list(nodes)
    different = len(set(nodes))
    if strategy is Strategy.STRICT_PACK and different > 1:
        return f"STRICT_PACK puts all bundles on one node, not on {different}"
    if strategy is Strategy.STRICT_SPREAD and different < len(nodes):
        return f"STRICT_SPREAD puts each bundle on another node, not {len(nodes)} on {different}"
    return ""


def placed(group: GroupRecord, nodes: Mapping[int, bytes]) -> GroupRecord:
    """Waiting -> PREPARING: the bundles without a node have one."""
    bundles = list(group.bundles)
    for index, node_id in nodes.items():
        bundles[index] = Bundle(bundles[index].resources, BundleState.PREPARING, node_id, group.attempt)
    return replace(group, state=step(group, GroupEvent.PLACE), bundles=bundles, missing="")


def prepared(group: GroupRecord, node_id: bytes) -> GroupRecord:
    """A node holds its bundles of the present attempt. When it is the last one, the group is made: COMMITTING."""
    if group.state is not GroupState.PREPARING:
        raise IllegalTransition(f"placement group {group.group_id.hex()} is {group.state.name}: nothing is prepared")
    bundles = _changed(
        group,
        lambda bundle: bundle.state is BundleState.PREPARING and bundle.node_id == node_id,
        BundleState.PREPARED,
    )
    group = replace(group, bundles=bundles)
    return decided(group) if all_prepared(group) else group


def all_prepared(group: GroupRecord) -> bool:
    """Whether every bundle is held by its node."""
    return all(bundle.state >= BundleState.PREPARED for bundle in group.bundles)


def decided(group: GroupRecord) -> GroupRecord:
    """PREPARING -> COMMITTING: no node can refuse any more."""
    bundles = _changed(group, lambda bundle: bundle.state in UNDECIDED, BundleState.COMMITTING)
    return replace(group, state=step(group, GroupEvent.DECIDE), bundles=bundles, made=True)


def committed(group: GroupRecord, node_id: bytes, attempt: int) -> GroupRecord:
    """A node offers its bundles of an attempt. When all do: CREATED."""
    bundles = _changed(
        group,
        lambda bundle: (bundle.state, bundle.node_id, bundle.attempt) == (BundleState.COMMITTING, node_id, attempt),
        BundleState.COMMITTED,
    )
    group = replace(group, bundles=bundles)
    if all(bundle.state is BundleState.COMMITTED for bundle in bundles):
        group = replace(group, state=step(group, GroupEvent.FINISH))
    return group


def lost(
    group: GroupRecord, gone: Callable[[Bundle], bool], cause: DeathCauseRecord, alive: Callable[[bytes], bool]
) -> GroupRecord:
    """The bundles of which `gone` is true have no node any more; nothing is left of them there.

    An attempt that is under way is given up with them, and its bundles are to be given back where nodes are alive.
    """
    given_up = group.state is GroupState.PREPARING
    bundles, left = [], group
    if given_up:
        left = _with_leftovers(group, lambda bundle: bundle.state in UNDECIDED and not gone(bundle), alive)
    for bundle in group.bundles:
        out = gone(bundle) or (given_up and bundle.state in UNDECIDED)
        bundles.append(Bundle(bundle.resources) if out else bundle)
    event = GroupEvent.LOSE if group.made else GroupEvent.GIVE_UP
    return replace(
        left, state=step(group, event), attempt=group.attempt + 1, bundles=bundles, cause=cause, missing=""
    )


REMOVED_BUNDLES_MAX = 16
"""A removed group that had more bundles does not keep them: a thousand removed groups are kept."""


def returned(group: GroupRecord, node_id: bytes, attempt: int | None = None) -> GroupRecord:
    """The node holds nothing of this attempt any more (None: of any)."""
    leftovers = [
        left for left in group.leftovers
        if left.node_id != node_id or (attempt is not None and left.attempt != attempt)
    ]  # fmt: skip
    if len(leftovers) == len(group.leftovers):
        return group
    return _over(replace(group, leftovers=leftovers))


def removed(
    group: GroupRecord, kind: DeathKind, cause: DeathCauseRecord, alive: Callable[[bytes], bool]
) -> GroupRecord:
    """Any state -> REMOVED, for good; what live nodes hold is to be given back."""
    left = _with_leftovers(group, lambda bundle: bundle.state is not BundleState.UNPLACED, alive)
    return _over(
        replace(
            left,
            state=step(group, GroupEvent.END),
            attempt=group.attempt + 1,
            bundles=[Bundle(bundle.resources) for bundle in group.bundles],
            kind=kind,
            cause=cause,
            missing="",
        )
    )


def _over(group: GroupRecord) -> GroupRecord:
    """When nothing is left of a removed group, many bundles go too."""
    done = group.state is GroupState.REMOVED and not group.leftovers
    return replace(group, bundles=[]) if done and len(group.bundles) > REMOVED_BUNDLES_MAX else group


def _changed(group: GroupRecord, which: Callable[[Bundle], bool], state: BundleState) -> list[Bundle]:
    return [replace(bundle, state=state) if which(bundle) else bundle for bundle in group.bundles]


def _with_leftovers(
    group: GroupRecord, which: Callable[[Bundle], bool], alive: Callable[[bytes], bool]
) -> GroupRecord:
    held: dict[tuple[bytes, int], list[int]] = {}
    for index, bundle in enumerate(group.bundles):
        if which(bundle) and alive(bundle.node_id):
            held.setdefault((bundle.node_id, bundle.attempt), []).append(index)
    leftovers = [Reservation(node_id, attempt, indices) for (node_id, attempt), indices in held.items()]
    return replace(group, leftovers=[*group.leftovers, *leftovers])
