"""The leader's manager of placement groups: looks at their table and says what has to be done next.

Role: pure, like `managers.ActorManager`, whose picture of the nodes it shares. Two phases: `GroupPlacing` is a command;
when it is committed the nodes are asked to prepare; when all have said that they did, which is the decision
(`groups.prepared`), they are asked to commit. A leader that dies anywhere leaves a table from which the next one
goes on: it asks again for what has not been answered.

Rules
- Within one leadership a node is asked once for the same, unless it connects anew.
- A group that finds no room waits until there may be more, and says for what. If nodes keep refusing it, it is tried
  again after pauses that grow.
- Looking for room costs a look at all nodes, so few groups are looked at in one `plan` if there are many nodes, and
  equal ones once. Those that were not looked at are the first next time, so that none waits for ever behind others.

Rejected: waiting for the answers of nodes before the next step (a leader that dies would have to be told where its
predecessor was; the table says it).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import inf

from ftray.gcs.state.commands import AnyCommand, GroupInfeasible, GroupPlacing
from ftray.gcs.state.effects import CommitBundles, Effect, PrepareBundles, ReturnBundles, Submit
from ftray.gcs.state.group_placement import choose_nodes, missing
from ftray.gcs.state.groups import WAITING_GROUP
from ftray.gcs.state.managers import INFEASIBLE_AFTER_MS
from ftray.gcs.state.placement import Placement, to_units
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Bundle, BundleState, Change, GroupRecord, GroupState, Result, Table
from ftray.ids import bundle_resources

LOOK_COST_MAX = 6_000
"""So many nodes, times different bundles, are looked at for room in one `plan`: that takes 20 ms or so."""
LOOK_AGAIN_MS = 50.0
"""Groups for which that was not enough are looked at so much later."""
FAILURES_FREE = 1
"""So many failed attempts in a row are followed by another one at once; then they are delayed, doubling."""
RETRY_DELAY_MS = 50.0
RETRY_DELAY_MAX_MS = 2_000.0

_PREPARE, _COMMIT, _RETURN = "prepare", "commit", "return"
Ask = tuple[str, bytes, int]
"""What a node is asked, which node, about which attempt."""
_Key = tuple[bytes, int, int]
"""A bundle in the picture of what is held: group, index, attempt."""


class _Watched:
    """What a manager remembers of one group. Lost with the leader, at the cost of an effect issued twice."""

    __slots__ = (
        "due_ms", "failures", "holds", "kind", "offers", "proposal", "proposed", "reason", "say_ms", "told", "waits",
    )  # fmt: skip

    def __init__(self) -> None:
        self.told: set[Ask] = set()
        self.proposed = -1
        """The attempt for which nodes have been proposed."""
        self.proposal: dict[int, bytes] = {}
        self.waits = -1
        """The attempt that was found waiting last."""
        self.failures = 0
        """Attempts in a row that came to nothing."""
        self.due_ms = 0.0
        self.say_ms: float | None = None
        """When the record is to say what the group waits for."""
        self.holds: set[_Key] = set()
        """What is entered in the picture for it."""
        self.offers: set[_Key] = set()
        self.reason = ""
        self.kind: tuple[Hashable, int] | None = None
        """See `_kind`; None when it is to be found anew."""


class GroupManager:
    """See the module. `placement` is that of the manager of actors, who tells it of nodes."""

    __slots__ = (
        "_dirty", "_due_ms", "_infeasible_after_ms", "_look", "_look_ms", "_placement", "_queued", "_seen", "_waiting",
        "_watched",
    )  # fmt: skip

    def __init__(
        self, state: GcsState, placement: Placement, *, infeasible_after_ms: float = INFEASIBLE_AFTER_MS
    ) -> None:
        self._placement = placement
        self._infeasible_after_ms = infeasible_after_ms
        self._watched: dict[bytes, _Watched] = {}
        self._dirty: dict[bytes, None] = {}
        self._waiting: dict[bytes, None] = {}
        """Groups that look for nodes, and have found none, or whose next attempt is delayed."""
        self._look: dict[bytes, None] = {}
        """Those of them that are to be looked at."""
        self._look_ms = 0.0
        """Not before, because there was more to look at than is done at once."""
        self._due_ms: float | None = None
        """When the first of the others in `_waiting` has something to do by itself; None when it is to be found."""
        self._seen = -1
        """The `changes` of the placement when all who wait were last looked at, or about to be."""
        self._queued: list[Effect] = []
        for group in state.store.placement_groups.values():
            self._see(group.group_id, group)

    # --- events -------------------------------------------------------------------------------------------------------

    def on_changes(self, changes: Iterable[Change]) -> None:
        """The tables have changed. The manager of actors is to be told before."""
        for change in changes:
            if change.table is Table.PLACEMENT_GROUPS:
                assert change.record is None or isinstance(change.record, GroupRecord)
                self._see(change.key, change.record)

    def on_result(self, state: GcsState, command: AnyCommand, result: Result) -> None:
        """What became of a command that this manager submitted. A refused one is thought over in the next plan."""
        if isinstance(command, GroupPlacing) and not result.ok:
            watched = self._watched.get(command.group_id)
            if watched is not None and watched.proposed == command.attempt:
                watched.proposed = -1
                self._see(command.group_id, state.group(command.group_id))

    def on_node_connected(self, state: GcsState, node_id: bytes) -> None:
        """A raylet has connected (anew): what it was told over an earlier link is told again."""
        for group in state.store.groups_on(node_id):
            watched = self._watched.get(group.group_id)
            if watched is not None:
                watched.told = {ask for ask in watched.told if ask[1] != node_id}
            self._dirty[group.group_id] = None

    def on_node_report(self, state: GcsState, node_id: bytes, held: Sequence[tuple[bytes, int]]) -> None:
        """A raylet says of which groups, in which attempt, it holds bundles, when it has connected.

        What it holds and should not it is to give back. What it should hold and does not it is asked about, and says
        itself that it is lost: the report may be from a link that was held up, and older than what the node has told
        another leader since. What it has not answered it is asked again: a node that did not know yet that it is a
        member (again) has dropped it.
        """
        self.on_node_connected(state, node_id)
        here = set(held)
        known: set[tuple[bytes, int]] = set()
        for group in state.store.groups_on(node_id):
            known.update((group.group_id, left.attempt) for left in group.leftovers if left.node_id == node_id)
            on_node: dict[int, dict[int, Bundle]] = {}
            for index, bundle in enumerate(group.bundles):
                if bundle.node_id == node_id:
                    on_node.setdefault(bundle.attempt, {})[index] = bundle
            known.update((group.group_id, attempt) for attempt in on_node)
            for attempt, bundles in on_node.items():
                if (group.group_id, attempt) not in here:
                    stage = next(iter(bundles.values())).state  # all are in the same
                    if stage is BundleState.COMMITTED:
                        self._queued.append(CommitBundles(node_id, group.group_id, attempt))
                    elif stage is BundleState.PREPARED:
                        asked = {index: bundle.resources for index, bundle in bundles.items()}
                        self._queued.append(PrepareBundles(node_id, group.group_id, attempt, asked))
        for group_id, attempt in held:
            if (group_id, attempt) not in known:
                self._queued.append(ReturnBundles(node_id, group_id, attempt, "it is not wanted any more"))

    def _see(self, group_id: bytes, group: GroupRecord | None) -> None:
        """Enters in the picture what the group holds and offers."""
        watched = self._watched.get(group_id)
        if watched is None:
            if group is None or (group.state is GroupState.REMOVED and not group.leftovers):
                return
            watched = self._watched[group_id] = _Watched()
        held: dict[_Key, tuple[bytes, int]] = {}
        offered: set[_Key] = set()
        if group is not None:
            for index, bundle in enumerate(group.bundles):
                if bundle.node_id:
                    key = (group_id, index, bundle.attempt)
                    held[key] = (bundle.node_id, index)
                    if bundle.state is BundleState.COMMITTED:
                        offered.add(key)
            for left in group.leftovers:
                held.update(((group_id, index, left.attempt), (left.node_id, index)) for index in left.indices)
            if group.state in WAITING_GROUP and watched.proposed == group.attempt:
                for index, node_id in watched.proposal.items():
                    held[group_id, index, group.attempt] = (node_id, index)
            for key, (node_id, index) in held.items():
                resources = group.bundles[index].resources
                if key not in watched.holds:
                    self._placement.hold(key, node_id, to_units(resources))
                if key in offered and key not in watched.offers:
                    self._placement.offer(key, node_id, to_units(bundle_resources(group_id, index, resources)))
        for key in watched.holds - held.keys():
            self._placement.release(key)
        for key in watched.offers - offered:
            self._placement.withdraw(key)
        watched.holds, watched.offers, watched.kind = set(held), offered, None
        self._dirty[group_id] = None

    def _forget(self, group_id: bytes) -> None:
        self._watched.pop(group_id, None)
        self._waiting.pop(group_id, None)
        self._look.pop(group_id, None)
        self._due_ms = None

    # --- plan ---------------------------------------------------------------------------------------------------------

    def plan(self, state: GcsState, now_ms: float) -> list[Effect]:
        """What is to be done now. Call it after events, and by `next_wake_ms`."""
        effects, self._queued = self._queued, []
        dirty, self._dirty = self._dirty, {}
        for group_id in dirty:
            group = state.group(group_id)
            if group is None or (group.state is GroupState.REMOVED and not group.leftovers):
                self._forget(group_id)
            elif group_id in self._watched:
                self._look_at(group, self._watched[group_id], now_ms, effects)
        if self._placement.changes != self._seen:
            self._seen = self._placement.changes
            self._look.update(self._waiting)
            self._due_ms = None
        if self._next_due_ms() <= now_ms:
            self._look.update(dict.fromkeys(each for each in self._waiting if self._wake_ms(each) <= now_ms))
            self._due_ms = None
        if self._look and self._look_ms <= now_ms:
            self._place_some(state, now_ms, effects)
        return effects

    def next_wake_ms(self) -> float | None:
        """When `plan` has something to do though nothing happens, or None."""
        wake_ms = min(self._next_due_ms(), self._look_ms if self._look else inf)
        return wake_ms if wake_ms < inf else None

    def _next_due_ms(self) -> float:
        if self._due_ms is None:
            waiting = (self._wake_ms(each) for each in self._waiting if each not in self._look)
            self._due_ms = min(waiting, default=inf)
        return self._due_ms

    def _wake_ms(self, group_id: bytes) -> float:
        watched = self._watched[group_id]
        return min(watched.due_ms or inf, inf if watched.say_ms is None else watched.say_ms)

    def pending_reason(self, group_id: bytes) -> str:
        """Why the group is not there yet, or not gone yet, for people; empty if nothing stands in its way."""
        watched = self._watched.get(group_id)
        return watched.reason if watched is not None else ""

    def _look_at(self, group: GroupRecord, watched: _Watched, now_ms: float, effects: list[Effect]) -> None:
        """Asks the nodes for what they have not been asked yet."""
        needed = self._needed(group)
        for ask, effect in needed.items():
            if ask not in watched.told:
                effects.append(effect)
        watched.told = set(needed)
        if group.state in WAITING_GROUP and not group.leftovers:
            self._wait(group, watched, now_ms)
            return
        self._waiting.pop(group.group_id, None)
        self._look.pop(group.group_id, None)
        self._due_ms = None
        if group.state in (GroupState.COMMITTING, GroupState.CREATED):
            watched.failures = 0
        watched.reason = _reason(group, needed)

    @staticmethod
    def _needed(group: GroupRecord) -> dict[Ask, Effect]:
        needed: dict[Ask, Effect] = {}
        reason = group.cause.reason if group.cause is not None else "it is not wanted any more"
        for left in group.leftovers:
            needed[_RETURN, left.node_id, left.attempt] = ReturnBundles(
                left.node_id, group.group_id, left.attempt, reason
            )
        to_prepare: dict[tuple[bytes, int], dict[int, dict[str, float]]] = {}
        for index, bundle in enumerate(group.bundles):
            if bundle.state is BundleState.PREPARING:
                to_prepare.setdefault((bundle.node_id, bundle.attempt), {})[index] = bundle.resources
            elif bundle.state is BundleState.COMMITTING:
                ask = (_COMMIT, bundle.node_id, bundle.attempt)
                needed[ask] = CommitBundles(bundle.node_id, group.group_id, bundle.attempt)
        for (node_id, attempt), bundles in to_prepare.items():
            needed[_PREPARE, node_id, attempt] = PrepareBundles(node_id, group.group_id, attempt, bundles)
        return needed

    def _wait(self, group: GroupRecord, watched: _Watched, now_ms: float) -> None:
        """It waits for nodes: when is it to look for them?"""
        if watched.proposed == group.attempt:
            return
        if watched.waits != group.attempt:
            first, watched.waits = watched.waits < 0, group.attempt
            watched.failures += not first
            delays = watched.failures - FAILURES_FREE
            if delays > 0:
                watched.due_ms = now_ms + min(RETRY_DELAY_MS * 2.0 ** min(delays - 1, 20), RETRY_DELAY_MAX_MS)
                why = f": {group.cause.reason}" if group.cause is not None else ""
                watched.reason = f"{watched.failures} attempts have failed, the next one is delayed{why}"
        elif group.missing and group.missing == watched.reason and group.group_id in self._waiting:
            watched.say_ms, self._due_ms = None, None  # that was written down, and nothing else has happened
            return
        self._waiting[group.group_id] = None
        self._look[group.group_id] = None

    def _place_some(self, state: GcsState, now_ms: float, effects: list[Effect]) -> None:
        """Looks for nodes, for a few of those that are to be looked at."""
        no_room: dict[Hashable, str] = {}
        nodes_there = sum(1 for _ in self._placement.nodes())
        cost = 0
        self._due_ms = None
        for group_id in list(self._look):
            group, watched = state.group(group_id), self._watched[group_id]
            if group is None or group.state not in WAITING_GROUP or group_id in self._dirty:
                del self._look[group_id]  # it has changed, and is looked at when that is told
                continue
            if watched.due_ms > now_ms:
                del self._look[group_id]
                continue
            if watched.kind is None:
                watched.kind = _kind(group)
            kind, shapes = watched.kind
            lacks = no_room.get(kind)
            if lacks is None:
                if cost >= LOOK_COST_MAX:
                    continue
                look = nodes_there * shapes + len(group.bundles)
                nodes = choose_nodes(self._placement, group)
                cost += look if nodes is not None else 3 * look
                if nodes is not None:
                    self._propose(group, watched, nodes, effects)
                    continue
                lacks = no_room[kind] = missing(self._placement, group)
            del self._look[group_id]
            watched.due_ms = 0.0
            self._say(group, watched, lacks, now_ms, effects)
        self._look_ms = now_ms + LOOK_AGAIN_MS if self._look else 0.0

    def _propose(
        self, group: GroupRecord, watched: _Watched, nodes: dict[int, bytes], effects: list[Effect]
    ) -> None:
        watched.proposed, watched.proposal = group.attempt, nodes
        watched.due_ms, watched.say_ms, watched.reason = 0.0, None, "is being placed"
        for index, node_id in nodes.items():
            key = (group.group_id, index, group.attempt)
            self._placement.hold(key, node_id, to_units(group.bundles[index].resources))
            watched.holds.add(key)
        del self._look[group.group_id]
        self._waiting.pop(group.group_id, None)
        effects.append(Submit(GroupPlacing(group.group_id, group.attempt, nodes)))

    def _say(
        self, group: GroupRecord, watched: _Watched, lacks: str, now_ms: float, effects: list[Effect]
    ) -> None:
        """There is no room. What no set of nodes could give is written down, when it has been so for a while."""
        watched.reason = lacks or "waits until actors or other placement groups give back resources"
        if lacks == group.missing:
            watched.say_ms = None
        elif watched.say_ms is None:
            watched.say_ms = now_ms + self._infeasible_after_ms
        elif watched.say_ms <= now_ms:
            watched.say_ms = now_ms + self._infeasible_after_ms
            effects.append(Submit(GroupInfeasible(group.group_id, group.attempt, lacks)))


def _kind(group: GroupRecord) -> tuple[Hashable, int]:
    """Groups of the same kind find room or don't, in the same picture. And how many different bundles it has."""
    bundles = tuple((bundle.node_id, tuple(sorted(bundle.resources.items()))) for bundle in group.bundles)
    return (group.strategy, bundles), len(set(bundles))


def _reason(group: GroupRecord, needed: dict[Ask, Effect]) -> str:
    by_what: dict[str, list[bytes]] = {}
    for what, node_id, _ in needed:
        by_what.setdefault(what, []).append(node_id)
    if _RETURN in by_what:
        return f"waits until nodes have given back what they hold of an earlier attempt: {_some(by_what[_RETURN])}"
    if _PREPARE in by_what:
        return f"waits until nodes hold its resources: {_some(by_what[_PREPARE])}"
    if _COMMIT in by_what:
        return f"is being committed on {len(by_what[_COMMIT])} nodes"
    return ""


def _some(nodes: list[bytes]) -> str:
    return ", ".join(node_id.hex()[:12] for node_id in nodes[:4]) + (f" and {len(nodes) - 4} more" if nodes[4:] else "")
