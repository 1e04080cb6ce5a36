"""Which node an actor goes to: what the nodes have, what actors and bundles hold of it, and the choice.

Role: pure. What actors and the bundles of placement groups hold is derived from their tables, so that a new leader
starts with the same figures; all are in one picture, so that no node is given away twice. What tasks hold besides is
soft: nodes report it, and it only ranks nodes. An actor goes to a node that is busy with tasks if no other has room,
and waits there for its turn, because the leader's picture of tasks is always some time old. Where bundles go is
`group_placement.py`.

The choice: nodes with room beside what is held there; of these, for an actor that asks for no CPU, those that have any
(a head without CPUs is not meant to run things); of these, those with room by their last report; of these, the one
whose scarcest asked-for resource would be used least; then the one with the fewest actors, the owner's, the lowest id.

Amounts are counted in ten-thousandths, because sums of floats drift: 0.1 + 0.2 - 0.1 - 0.2 is not 0.

Rejected: random choice of two (needs randomness, and clusters are small enough to look at all nodes).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

UNITS = 10_000
CPU = "CPU"


def to_units(amounts: Mapping[str, float]) -> dict[str, int]:
    """Amounts in ten-thousandths, without zeros."""
    units = {name: round(amount * UNITS) for name, amount in amounts.items()}
    return {name: amount for name, amount in units.items() if amount}


class _Node:
    __slots__ = ("actors", "own", "reported", "total", "used")

    def __init__(self, total: dict[str, int]) -> None:
        self.own = total
        self.total = dict(total)
        """With what bundles offer there."""
        self.used: dict[str, int] = {}
        self.reported: dict[str, int] | None = None
        self.actors = 0

    def could_hold(self, asked: dict[str, int]) -> bool:
        return all(self.total.get(name, 0) >= amount for name, amount in asked.items())

    def has_room(self, asked: dict[str, int]) -> bool:
        used = self.used
        return all(self.total.get(name, 0) - used.get(name, 0) >= amount for name, amount in asked.items())

    def reports_room(self, asked: dict[str, int]) -> bool:
        reported = self.reported
        return reported is None or all(reported.get(name, 0) >= amount for name, amount in asked.items())

    def pressure(self, asked: dict[str, int]) -> float:
        worst = 0.0
        for name, amount in asked.items():
            total = self.total[name]
            used = self.used.get(name, 0)
            if self.reported is not None:
                used = max(used, total - self.reported.get(name, 0))
            worst = max(worst, (used + amount) / total)
        return round(worst, 4)


class Placement:
    """Resources of the live nodes, and which actor or bundle holds what where."""

    __slots__ = ("_holds", "_nodes", "_offers", "changes")

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        self._holds: dict[Hashable, tuple[bytes, dict[str, int]]] = {}
        self._offers: dict[Hashable, tuple[bytes, dict[str, int]]] = {}
        self.changes = 0
        """Grows when there may be more room than before, or less on offer: who waits is to be looked at again."""

    def set_node(self, node_id: bytes, resources: Mapping[str, float]) -> None:
        """A live node with these totals, new or changed."""
        own = to_units(resources)
        node = self._nodes.get(node_id)
        if node is not None and node.own == own:
            return
        self.changes += 1
        if node is None:
            self._nodes[node_id] = node = _Node(own)
            for held_at, asked in self._holds.values():
                if held_at == node_id:
                    self._count(node, asked, 1)
        node.own, node.total = own, dict(own)
        for offered_at, offered in self._offers.values():
            if offered_at == node_id:
                _add(node.total, offered, 1)

    def drop_node(self, node_id: bytes) -> None:
        if self._nodes.pop(node_id, None) is not None:
            self.changes += 1

    def report(self, node_id: bytes, available: Mapping[str, float]) -> None:
        """What the node says is free, tasks included."""
        node = self._nodes.get(node_id)
        if node is not None:
            node.reported = to_units(available)

    def hold(self, holder: Hashable, node_id: bytes, asked: dict[str, int]) -> None:
        """The actor or bundle holds `asked` on the node, instead of what it held before."""
        held = self._holds.get(holder)
        if held is not None:
            if held[0] == node_id and held[1] == asked:
                return
            self.release(holder)
        self._holds[holder] = (node_id, asked)
        node = self._nodes.get(node_id)
        if node is not None:
            self._count(node, asked, 1)

    def release(self, holder: Hashable) -> bool:
        """It holds nothing any more. Returns whether it did."""
        held = self._holds.pop(holder, None)
        if held is None:
            return False
        self.changes += 1
        node = self._nodes.get(held[0])
        if node is not None:
            self._count(node, held[1], -1)
        return True

    def offer(self, bundle: Hashable, node_id: bytes, offered: dict[str, int]) -> None:
        """A committed bundle offers these resources on the node, besides what the node has."""
        if bundle not in self._offers:
            self.changes += 1
            self._offers[bundle] = (node_id, offered)
            node = self._nodes.get(node_id)
            if node is not None:
                _add(node.total, offered, 1)

    def withdraw(self, bundle: Hashable) -> None:
        """It offers nothing any more."""
        was = self._offers.pop(bundle, None)
        if was is not None:
            self.changes += 1
            node = self._nodes.get(was[0])
            if node is not None:
                _add(node.total, was[1], -1)

    def choose(self, asked: dict[str, int], prefer: bytes) -> bytes | None:
        """The node for an actor that asks for this, or None if no node has room; `prefer` breaks ties."""
        best: tuple[bool, bool, float, int, bool, bytes] | None = None
        no_cpu = CPU not in asked
        for node_id, node in self._nodes.items():
            if node.has_room(asked):
                rank = (
                    no_cpu and CPU not in node.own,
                    not node.reports_room(asked),
                    node.pressure(asked),
                    node.actors,
                    node_id != prefer,
                    node_id,
                )
                if best is None or rank < best:
                    best = rank
        return best[-1] if best is not None else None

    def missing(self, asked: dict[str, int]) -> str:
        """Why no live node could ever hold this, or '' if one could."""
        if any(node.could_hold(asked) for node in self._nodes.values()):
            return ""
        need = ", ".join(f"{show_units(amount)} {name}" for name, amount in sorted(asked.items()))
        if not self._nodes:
            return f"{need or 'nothing'} is needed on one node, and there is no live node"
        have = ", ".join(f"{show_units(self._most(name))} {name}" for name in sorted(asked))
        return f"{need} is needed on one node; the most that any of {len(self._nodes)} live nodes has is {have}"

    def _most(self, name: str) -> int:
        return max(node.total.get(name, 0) for node in self._nodes.values())

    @staticmethod
    def _count(node: _Node, asked: dict[str, int], sign: int) -> None:
        for name, amount in asked.items():
            node.used[name] = node.used.get(name, 0) + sign * amount
        node.actors += sign

    def free(self, node_id: bytes, names: Iterable[str], reported: bool) -> dict[str, int]:
        """What is free of these on a live node beside what actors and bundles hold, in units; `reported`: and by the
        node's last report."""
        node = self._nodes[node_id]
        used, said = node.used, node.reported if reported else None
        if said is None:
            return {name: node.own.get(name, 0) - used.get(name, 0) for name in names}
        return {name: min(node.own.get(name, 0) - used.get(name, 0), said.get(name, 0)) for name in names}

    def total(self, node_id: bytes) -> dict[str, int]:
        """What a live node has, in units, without what bundles offer. Not to be changed."""
        return self._nodes[node_id].own

    def used(self, node_id: bytes) -> dict[str, float]:
        """What actors and bundles hold on the node, for status pages."""
        node = self._nodes.get(node_id)
        return {} if node is None else {name: amount / UNITS for name, amount in node.used.items() if amount}

    def nodes(self) -> Iterable[bytes]:
        return self._nodes.keys()


def _add(total: dict[str, int], units: dict[str, int], sign: int) -> None:
    for name, amount in units.items():
        left = total.get(name, 0) + sign * amount
        if left:
            total[name] = left
        else:
            total.pop(name, None)


def show_units(units: int) -> str:
    """An amount for people."""
    return f"{units / UNITS:g}"
