"""Which nodes the bundles of a placement group go to: all of them at once, or nowhere.

Role: pure, on the picture of `placement.py`. The same picture gives the same choice.

First what fits by the nodes' last reports, so that nothing has to wait for tasks; if that is not enough, what fits
beside actors and bundles.

- PACK: nodes that have bundles of the group already; the tightest node that holds all the rest; else the node that
  holds the largest part of it, and so on with what is left.
- STRICT_PACK: the tightest node that holds all.
- SPREAD: for each bundle, of the nodes with the fewest bundles of the group, the one that would be used least.
- STRICT_SPREAD: the same with one bundle for each node. When that ends in a dead end (a bundle that fits anywhere took
  the node that another one needs), a matching is looked for, so that it is found if there is one.

The largest bundles come first: those that take most of what the cluster has of something. Bundles that ask for the same
are dealt with together, so the cost grows with nodes times *different* bundles: 1,000 nodes and 100 bundles take
some milliseconds.

PACK and SPREAD are preferences: what one can't place is tried in the other's way. Both are greedy, so there are sets
of bundles of different shapes that would fit and that neither places (bundles that are all equal are always placed).
For these a way is searched for, up to `SEARCH_MAX` looks at nodes: that finds one for up to a dozen of bundles on a few
nodes. A larger set that is so tight waits, and says that no way was found to divide it.

Rejected: the best packing (bin packing is NP-hard); placing one bundle at a time by command (half a group would
be placed, and would have to be taken back).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from math import inf

from ftray.gcs.state.placement import Placement, show_units, to_units
from ftray.gcs.state.tables import BundleState, GroupRecord, Strategy

SEARCH_MAX = 5_000
SEARCH_BUNDLES_MAX = 64

Units = dict[str, int]


class _Room:
    """What one node has left in this choice."""

    __slots__ = ("bundles", "free", "node_id", "total")

    def __init__(self, node_id: bytes, free: Units, total: Units) -> None:
        self.node_id = node_id
        self.free = free
        self.total = total
        self.bundles = 0
        """Of the group."""

    def holds(self, asked: Units) -> bool:
        free = self.free
        for name, amount in asked.items():
            if free[name] < amount:
                return False
        return True

    def take(self, asked: Units) -> None:
        for name, amount in asked.items():
            self.free[name] -= amount
        self.bundles += 1

    def give_back(self, asked: Units) -> None:
        for name, amount in asked.items():
            self.free[name] += amount
        self.bundles -= 1

    def pressure(self, asked: Units) -> float:
        """How much of the scarcest asked-for resource would be used."""
        total, free = self.total, self.free
        used = (1 - (free[name] - amount) / total[name] for name, amount in asked.items())
        return round(max(used, default=0.0), 4)

    def share(self, asked: Units) -> float:
        """How often it could hold so much; a part of one, if not at all."""
        return min((self.free[name] / amount for name, amount in asked.items()), default=inf)


class _Kind:
    """Bundles that ask for the same."""

    __slots__ = ("asked", "indices")

    def __init__(self, asked: Units) -> None:
        self.asked = asked
        self.indices: deque[int] = deque()


def choose_nodes(placement: Placement, group: GroupRecord) -> dict[int, bytes] | None:
    """A node for each bundle that has none, or None if they have no room now."""
    for reported in (True, False):
        chosen = _choose(placement, group, reported=reported)
        if chosen is not None:
            return chosen
    return None


def missing(placement: Placement, group: GroupRecord) -> str:
    """Why the live nodes could not hold the bundles even if nobody else held anything, or '' if they could."""
    if _choose(placement, group, empty=True) is not None:
        return ""
    asked = _asked(group)
    nodes = list(placement.nodes())
    if not nodes:
        return "there is no live node"
    for index, each in asked.items():
        if not any(all(placement.total(node).get(name, 0) >= each[name] for name in each) for node in nodes):
            return f"bundle {index} needs {_show(each)} on one node; {_most(placement, nodes, each)}"
    total = _sum(list(asked.values()))
    if group.strategy is Strategy.STRICT_PACK:
        kept = _kept(group)
        where = f"on node {kept[0].hex()}, where its other bundles are" if kept else "on one node (STRICT_PACK)"
        return f"{_show(total)} is needed {where}; {_most(placement, nodes, total)}"
    if group.strategy is Strategy.STRICT_SPREAD:
        return (
            f"{len(group.bundles)} different nodes are needed (STRICT_SPREAD), each with room for a bundle, and the "
            f"{len(nodes)} live ones are too few or too small"
        )
    have = ", ".join(
        f"{show_units(sum(placement.total(node).get(name, 0) for node in nodes))} {name}" for name in sorted(total)
    )
    return (
        f"{len(asked)} bundles need {_show(total)} in all; the {len(nodes)} live nodes have {have}, and no way was "
        "found to divide the bundles among them"
    )


def _choose(
    placement: Placement, group: GroupRecord, reported: bool = False, empty: bool = False
) -> dict[int, bytes] | None:
    asked = _asked(group)
    names = sorted({name for each in asked.values() for name in each})
    rooms = [
        _Room(
            node_id,
            {name: placement.total(node_id).get(name, 0) for name in names} if empty
            else placement.free(node_id, names, reported),
            placement.total(node_id),
        )
        for node_id in sorted(placement.nodes())
    ]  # fmt: skip
    by_id = {room.node_id: room for room in rooms}
    for bundle in group.bundles:
        room = by_id.get(bundle.node_id)
        if bundle.state is not BundleState.UNPLACED and room is not None:
            room.bundles += 1
            if empty:
                for name, amount in to_units(bundle.resources).items():
                    if name in room.free:
                        room.free[name] -= amount
    kinds = _kinds(asked, rooms)
    match group.strategy:
        case Strategy.STRICT_PACK:
            return _on_one(kinds, rooms)
        case Strategy.STRICT_SPREAD:
            return _apart(kinds, rooms)
        case Strategy.PACK:
            ways = (_pack, _spread)
        case Strategy.SPREAD:
            ways = (_spread, _pack)
    for way in ways:
        chosen = way([_copy(kind) for kind in kinds], [_copy_room(room) for room in rooms])
        if chosen is not None:
            return chosen
    return None if reported else _search(kinds, rooms, group.strategy)


def _asked(group: GroupRecord) -> dict[int, Units]:
    return {
        index: to_units(bundle.resources)
        for index, bundle in enumerate(group.bundles)
        if bundle.state is BundleState.UNPLACED
    }


def _kept(group: GroupRecord) -> list[bytes]:
    return [bundle.node_id for bundle in group.bundles if bundle.state is not BundleState.UNPLACED]


def _kinds(asked: Mapping[int, Units], rooms: Sequence[_Room]) -> list[_Kind]:
    """The different bundles, the largest first."""
    kinds: dict[tuple[tuple[str, int], ...], _Kind] = {}
    for index, each in asked.items():
        shape = tuple(sorted(each.items()))
        kind = kinds.get(shape)
        if kind is None:
            kind = kinds[shape] = _Kind(each)
        kind.indices.append(index)
    there: Units = {}
    for room in rooms:
        for name, amount in room.free.items():
            there[name] = there.get(name, 0) + max(0, amount)

    def size(item: tuple[tuple[tuple[str, int], ...], _Kind]) -> tuple[float, tuple[tuple[str, int], ...]]:
        shape = item[0]
        return -max((amount / there[name] if there.get(name) else inf for name, amount in shape), default=0.0), shape

    return [kind for _, kind in sorted(kinds.items(), key=size)]


def _copy(kind: _Kind) -> _Kind:
    copied = _Kind(kind.asked)
    copied.indices.extend(kind.indices)
    return copied


def _copy_room(room: _Room) -> _Room:
    copied = _Room(room.node_id, dict(room.free), room.total)
    copied.bundles = room.bundles
    return copied


def _fill(room: _Room, kinds: list[_Kind], chosen: dict[int, bytes]) -> bool:
    """Puts as many bundles on the node as it holds, the largest first. Returns whether none is left."""
    left = False
    for kind in kinds:
        while kind.indices and room.holds(kind.asked):
            room.take(kind.asked)
            chosen[kind.indices.popleft()] = room.node_id
        left = left or bool(kind.indices)
    return not left


def _rest(kinds: list[_Kind]) -> Units:
    total: Units = {}
    for kind in kinds:
        for name, amount in kind.asked.items():
            total[name] = total.get(name, 0) + amount * len(kind.indices)
    return {name: amount for name, amount in total.items() if amount}


def _on_one(kinds: list[_Kind], rooms: list[_Room]) -> dict[int, bytes] | None:
    total = _rest(kinds)
    kept = [room for room in rooms if room.bundles]
    fitting = [room for room in kept or rooms if room.holds(total)]
    if not fitting:
        return None
    chosen: dict[int, bytes] = {}
    _fill(min(fitting, key=lambda room: (room.share(total), room.node_id)), kinds, chosen)
    return chosen


def _pack(kinds: list[_Kind], rooms: list[_Room]) -> dict[int, bytes] | None:
    chosen: dict[int, bytes] = {}
    for room in rooms:
        if room.bundles and _fill(room, kinds, chosen):
            return chosen
    total = _rest(kinds)
    order = sorted((room for room in rooms if not room.bundles), key=lambda room: (room.share(total), room.node_id))
    shares = [room.share(total) for room in order]
    while order:
        rest = _rest(kinds)
        if len(rest) < len(total):  # nobody asks for some resource any more, so that nodes without it count too
            total = rest
            order.sort(key=lambda room: (room.share(total), room.node_id))
            shares = [room.share(total) for room in order]
        # A node with less than this share of the whole lacks something; from there on, the first that fits is tightest.
        least = min(rest[name] / total[name] for name in rest)
        for at in range(bisect_left(shares, least - 1e-9), len(order)):
            if order[at].holds(rest):
                _fill(order[at], kinds, chosen)
                return chosen
        shares.pop()
        if _fill(order.pop(), kinds, chosen):
            return chosen
    return None


def _spread(kinds: list[_Kind], rooms: list[_Room]) -> dict[int, bytes] | None:
    chosen: dict[int, bytes] = {}
    for kind in kinds:
        asked = kind.asked
        heap = [(room.bundles, room.pressure(asked), at) for at, room in enumerate(rooms) if room.holds(asked)]
        heapify(heap)
        while kind.indices:
            if not heap:
                return None
            at = heappop(heap)[2]
            room = rooms[at]
            room.take(asked)
            chosen[kind.indices.popleft()] = room.node_id
            if room.holds(asked):
                heappush(heap, (room.bundles, room.pressure(asked), at))
    return chosen


def _search(kinds: list[_Kind], rooms: list[_Room], strategy: Strategy) -> dict[int, bytes] | None:
    """Tries ways to place the bundles, the largest first, one after the other, for a while."""
    total = _rest(kinds)
    bundles = [(kind.asked, index) for kind in kinds for index in kind.indices]
    if len(bundles) > SEARCH_BUNDLES_MAX:
        return None
    if any(sum(max(0, room.free[name]) for room in rooms) < amount for name, amount in total.items()):
        return None
    way: list[_Room] = []
    seen: set[tuple[int, tuple[tuple[int, ...], ...]]] = set()
    """Where it led to nothing: how many bundles were placed, and what the nodes had left."""
    looks = 0

    def place(at: int) -> bool:
        nonlocal looks
        if at == len(bundles):
            return True
        left = {id(room): tuple(room.free[name] for name in total) for room in rooms}
        state = (at, tuple(sorted(left.values())))
        if state in seen:
            return False
        asked, tried = bundles[at][0], set()
        order = sorted(rooms, key=lambda room: room.bundles if strategy is Strategy.SPREAD else not room.bundles)
        for room in order:
            looks += 1
            if looks > SEARCH_MAX:
                return False
            like = left[id(room)]
            if like in tried or not room.holds(asked):
                continue
            tried.add(like)
            room.take(asked)
            way.append(room)
            if place(at + 1):
                return True
            way.pop()
            room.give_back(asked)
        seen.add(state)
        return False

    if not place(0):
        return None
    return {index: room.node_id for (_, index), room in zip(bundles, way)}


def _apart(kinds: list[_Kind], rooms: list[_Room]) -> dict[int, bytes] | None:
    rooms = [room for room in rooms if not room.bundles]
    if sum(len(kind.indices) for kind in kinds) > len(rooms):
        return None
    fitting: list[list[int]] = []
    """For each kind the nodes that hold one of it, the least used first."""
    for kind in kinds:
        fits = [(room.pressure(kind.asked), at) for at, room in enumerate(rooms) if room.holds(kind.asked)]
        if len(fits) < len(kind.indices):
            return None
        fitting.append([at for _, at in sorted(fits)])
    taken: dict[int, int] = {}
    """Which bundle, as a position in `wanted`, has the node."""
    wanted = [number for number, kind in enumerate(kinds) for _ in kind.indices]
    indices = [index for kind in kinds for index in kind.indices]
    for bundle in range(len(wanted)):
        if not _augment(bundle, wanted, fitting, taken):
            return None
    return {indices[bundle]: rooms[at].node_id for at, bundle in taken.items()}


def _augment(bundle: int, wanted: list[int], fitting: list[list[int]], taken: dict[int, int]) -> bool:
    """Finds a node for one bundle more, if need be by moving others (a shortest augmenting path)."""
    came_from: dict[int, int] = {}
    """For a node that was looked at, the bundle that would move to it."""
    had = dict(taken)
    kinds_seen: set[int] = set()
    queue = deque([bundle])
    home = {each: node for node, each in had.items()}
    while queue:
        mover = queue.popleft()
        kind = wanted[mover]
        if kind in kinds_seen:
            continue  # its nodes have all been looked at
        kinds_seen.add(kind)
        for node in fitting[kind]:
            if node in came_from:
                continue
            came_from[node] = mover
            if node in had:
                queue.append(had[node])
                continue
            while True:
                each = came_from[node]
                taken[node] = each
                if each == bundle:
                    return True
                node = home[each]
    return False


def _sum(units: list[Units]) -> Units:
    total: Units = {}
    for each in units:
        for name, amount in each.items():
            total[name] = total.get(name, 0) + amount
    return total


def _show(units: Units) -> str:
    return ", ".join(f"{show_units(amount)} {name}" for name, amount in sorted(units.items()))


def _most(placement: Placement, nodes: list[bytes], asked: Units) -> str:
    have = ", ".join(
        f"{show_units(max(placement.total(node).get(name, 0) for node in nodes))} {name}" for name in sorted(asked)
    )
    return f"the most that any of {len(nodes)} live nodes has is {have}"
