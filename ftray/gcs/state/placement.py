"""Which node an actor goes to: what the nodes have, what actors hold of it, and the choice.

Role: pure. What actors hold is derived from the actors table, so that a new leader starts with the same figures. What
tasks hold besides is soft: nodes report it, and it only ranks nodes. An actor goes to a node that is busy with tasks if
no other has room, and waits there for its turn, because the leader's picture of tasks is always some time old.

The choice: nodes with room beside their actors; of these, those with room by their last report; of these, the one whose
scarcest asked-for resource would be used least; then the one with the fewest actors, the owner's, the lowest id.

Amounts are counted in ten-thousandths, because sums of floats drift: 0.1 + 0.2 - 0.1 - 0.2 is not 0.

Rejected: random choice of two (needs randomness, and clusters are small enough to look at all nodes).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

UNITS = 10_000


def to_units(amounts: Mapping[str, float]) -> dict[str, int]:
    """Amounts in ten-thousandths, without zeros."""
    units = {name: round(amount * UNITS) for name, amount in amounts.items()}
    return {name: amount for name, amount in units.items() if amount}


class _Node:
    __slots__ = ("actors", "reported", "total", "used")

    def __init__(self, total: dict[str, int]) -> None:
        self.total = total
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
    """Resources of the live nodes, and which actor holds what where."""

    __slots__ = ("_holds", "_nodes")

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        self._holds: dict[bytes, tuple[bytes, dict[str, int]]] = {}

    def set_node(self, node_id: bytes, resources: Mapping[str, float]) -> None:
        """A live node with these totals, new or changed."""
        total = to_units(resources)
        node = self._nodes.get(node_id)
        if node is None:
            self._nodes[node_id] = node = _Node(total)
            for held_at, asked in self._holds.values():
                if held_at == node_id:
                    self._count(node, asked, 1)
        node.total = total

    def drop_node(self, node_id: bytes) -> None:
        self._nodes.pop(node_id, None)

    def report(self, node_id: bytes, available: Mapping[str, float]) -> None:
        """What the node says is free, tasks included."""
        node = self._nodes.get(node_id)
        if node is not None:
            node.reported = to_units(available)

    def hold(self, actor_id: bytes, node_id: bytes, asked: dict[str, int]) -> None:
        """The actor holds `asked` on the node, instead of what it held before."""
        held = self._holds.get(actor_id)
        if held is not None:
            if held[0] == node_id and held[1] == asked:
                return
            self.release(actor_id)
        self._holds[actor_id] = (node_id, asked)
        node = self._nodes.get(node_id)
        if node is not None:
            self._count(node, asked, 1)

    def release(self, actor_id: bytes) -> bool:
        """The actor holds nothing any more. Returns whether it did."""
        held = self._holds.pop(actor_id, None)
        if held is None:
            return False
        node = self._nodes.get(held[0])
        if node is not None:
            self._count(node, held[1], -1)
        return True

    def choose(self, asked: dict[str, int], prefer: bytes) -> bytes | None:
        """The node for an actor that asks for this, or None if no node has room; `prefer` breaks ties."""
        best: tuple[bool, float, int, bool, bytes] | None = None
        for node_id, node in self._nodes.items():
            if node.has_room(asked):
                rank = (
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
        need = ", ".join(f"{_show(amount)} {name}" for name, amount in sorted(asked.items()))
        if not self._nodes:
            return f"{need or 'nothing'} is needed on one node, and there is no live node"
        have = ", ".join(f"{_show(self._most(name))} {name}" for name in sorted(asked))
        return f"{need} is needed on one node; the most that any of {len(self._nodes)} live nodes has is {have}"

    def _most(self, name: str) -> int:
        return max(node.total.get(name, 0) for node in self._nodes.values())

    @staticmethod
    def _count(node: _Node, asked: dict[str, int], sign: int) -> None:
        for name, amount in asked.items():
            node.used[name] = node.used.get(name, 0) + sign * amount
        node.actors += sign

    def used(self, node_id: bytes) -> dict[str, float]:
        """What actors hold on the node, for status pages."""
        node = self._nodes.get(node_id)
        return {} if node is None else {name: amount / UNITS for name, amount in node.used.items() if amount}

    def nodes(self) -> Iterable[bytes]:
        return self._nodes.keys()


def _show(units: int) -> str:
    return f"{units / UNITS:g}"
