"""What the lease scheduler remembers: clients, their demand by class, leases, and two indexes over them.

Role: pure data with the operations that keep it consistent; the decisions are in `leases.py`.

- A **shape** is one resource request, interned: all who ask for the same amounts queue there, so a dispatch looks at
  each distinct request once, however many wait for it.
- The queue of a shape is a heap by (client's turn, class's turn). A turn usually grows, and then the stored key is a
  lower bound: a head whose key is out of date is put back under its true one. A turn that shrinks needs a new entry
  (`advance`), and the old one is skipped when it surfaces.
- **Holders**, one for each resource name, say which clients hold how many leases on it: buckets by count, in which the
  top moves by one at a time, and each client's leases in the order of their grant.

Rejected: one queue of clients for all shapes (those whose request does not fit would be passed over at every event);
removing entries from the middle of a heap (they are skipped when they surface, and swept when they are the majority).
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from ftray.ids import group_resource
from ftray.scheduling.resources import CPU, ResourceSet

_LONG_AGO_MS: Final = float("-inf")
_CPU_OF_GROUP: Final = group_resource(CPU, b"")


def _is_cpu(name: str) -> bool:
    return name == CPU or name.startswith(_CPU_OF_GROUP)


class Turns:
    """Numbers that say who is next: the lowest. Those of the front are below all others; each kind only grows."""

    __slots__ = ("_front", "_last")

    def __init__(self) -> None:
        self._last = 0
        self._front = -(1 << 62)

    def last(self) -> int:
        """After everybody."""
        self._last += 1
        return self._last

    def front(self) -> int:
        """Before everybody but those who are at the front already."""
        self._front += 1
        return self._front


class Client:
    """One owner: its classes, its leases, and how long it has been waiting."""

    __slots__ = (
        "client_id", "classes", "waiting", "leases", "turn", "asked_ms", "recall_after_ms", "dropped",
    )  # fmt: skip

    def __init__(self, client_id: bytes, turn: int) -> None:
        self.client_id = client_id
        self.classes: dict[int, DemandClass] = {}
        self.waiting: dict[int, DemandClass] = {}
        """Classes with unmet feasible demand."""
        self.leases: dict[int, Lease] = {}
        self.turn = turn
        """Set by each grant to it, and to the front when it holds no lease."""
        self.asked_ms = _LONG_AGO_MS
        """When it was last asked for idle leases."""
        self.recall_after_ms = _LONG_AGO_MS
        """Until then no lease of another client is recalled for it."""
        self.dropped = False

    def holds_elsewhere(self) -> bool:
        """Whether it holds leases of classes in which it does not wait for more."""
        return len(self.leases) > sum(len(demand.held) for demand in self.waiting.values())


class DemandClass:
    """A client's demand for leases of one kind: `want` in all, `held` of them granted."""

    __slots__ = (
        "client", "class_id", "job_id", "shape", "want", "held", "turn", "since_ms", "backoff_ms", "timer", "due_ms",
        "fresh", "waiting", "entry", "reported", "reserve_ms",
    )  # fmt: skip

    def __init__(self, client: Client, class_id: int, job_id: bytes, shape: Shape) -> None:
        self.client = client
        self.class_id = class_id
        self.job_id = job_id
        self.shape = shape
        self.want = 0
        self.held: dict[int, Lease] = {}
        self.turn = 0
        self.since_ms = 0.0
        """When it began to wait, or was last served."""
        self.backoff_ms = 0.0
        self.timer = 0
        """The number of its entry among the timers of `Fairness`, due at `due_ms`; 0 if it has none."""
        self.due_ms = 0.0
        self.fresh = False
        """It has begun to wait and nobody has looked at the clock yet."""
        self.waiting = False
        self.entry = 0
        """The number of its entry in its shape's heap while it waits, or else 0."""
        self.reported = False
        """Its client has been told that the node can never give it."""
        self.reserve_ms = 0.0
        """How long its last reservation was, if that came to nothing."""


class Dedicated:
    """An allocation for one actor: waiting until it has a lease."""

    __slots__ = (
        "token", "shape", "turn", "since_ms", "backoff_ms", "timer", "due_ms", "waiting", "reported", "lease_id",
        "reserve_ms",
    )  # fmt: skip

    def __init__(self, token: Hashable, shape: Shape, turn: int, now_ms: float) -> None:
        self.token = token
        self.shape = shape
        self.turn = turn
        self.since_ms = now_ms
        self.backoff_ms = 0.0
        self.timer = 0
        self.due_ms = 0.0
        self.waiting = False
        self.reported = False
        self.lease_id = 0
        self.reserve_ms = 0.0


class Lease:
    """Resources granted to one worker: for a client's class, or dedicated to an actor."""

    __slots__ = ("lease_id", "shape", "demand", "dedicated", "blocked", "recalled")

    def __init__(
        self, lease_id: int, shape: Shape, demand: DemandClass | None = None, dedicated: Dedicated | None = None
    ) -> None:
        self.lease_id = lease_id
        self.shape = shape
        self.demand = demand
        self.dedicated = dedicated
        self.blocked = False
        """Its CPU is lent to others."""
        self.recalled = False
        """Its client has been asked for this very lease; it is not asked twice."""


class Shape:
    """One resource request and all who wait for it."""

    __slots__ = (
        "request", "amounts", "cpu", "rest", "names", "names_blocked", "feasible", "dedicated", "waiting",
        "_heap", "_stale", "__weakref__",
    )  # fmt: skip

    def __init__(self, request: ResourceSet, feasible: bool) -> None:
        self.request = request
        self.amounts = request.amounts()
        """Amounts by name, shared by all grants of this shape: not to be changed."""
        self.cpu = ResourceSet({name: units for name, units in request.items() if _is_cpu(name)})
        """Its CPU, also that of a bundle of a placement group: what a blocked worker lends."""
        self.rest = ResourceSet({name: units for name, units in request.items() if not _is_cpu(name)})
        """What a blocked worker keeps: memory and GPUs stay full of its data whether it runs or not."""
        self.names = tuple(request.units)
        self.names_blocked = tuple(self.rest.units)
        self.feasible = feasible
        self.dedicated: dict[Hashable, Dedicated] = {}
        """Waiting allocations for actors, oldest first."""
        self.waiting: dict[Client, int] = {}
        """Clients with unmet demand here, and in how many classes."""
        self._heap: list[tuple[int, int, int, DemandClass]] = []
        self._stale = 0

    def is_waiting(self) -> bool:
        return bool(self.waiting) or bool(self.dedicated)

    def enqueue(self, demand: DemandClass, entry: int) -> None:
        """The class begins to wait under its own and its client's turn. `entry`: a number never used before."""
        client = demand.client
        self.waiting[client] = self.waiting.get(client, 0) + 1
        demand.entry = entry
        heappush(self._heap, (client.turn, demand.turn, entry, demand))

    def advance(self, demand: DemandClass, entry: int) -> None:
        """Its turn, or its client's, has become lower. `entry`: a number never used before."""
        demand.entry = entry
        heappush(self._heap, (demand.client.turn, demand.turn, entry, demand))
        self._sweep()

    def dequeue(self, demand: DemandClass) -> None:
        """The class waits no longer."""
        client = demand.client
        count = self.waiting[client] - 1
        if count:
            self.waiting[client] = count
        else:
            del self.waiting[client]
        demand.entry = 0
        self._sweep()

    def _sweep(self) -> None:
        self._stale += 1
        if self._stale * 2 > len(self._heap) + 16:
            self._heap = [item for item in self._heap if item[2] == item[3].entry]
            heapify(self._heap)
            self._stale = 0

    def head(self) -> DemandClass | None:
        """The waiting class whose turn it is."""
        heap = self._heap
        while heap:
            client_turn, turn, entry, demand = heap[0]
            if entry != demand.entry:
                heappop(heap)
                self._stale -= 1
            elif client_turn != demand.client.turn or turn != demand.turn:
                heapreplace(heap, (demand.client.turn, demand.turn, entry, demand))
            else:
                return demand
        return None

    def waits_only_for(self, client: Client) -> bool:
        """Whether `client` alone waits here."""
        return not self.dedicated and len(self.waiting) == 1 and client in self.waiting


class Holders:
    """Who holds leases on one resource that could be asked back."""

    __slots__ = ("clients", "ask_after_ms", "_buckets", "_top")

    def __init__(self) -> None:
        self.clients: dict[Client, dict[int, Lease]] = {}
        """The leases of each, oldest first."""
        self.ask_after_ms = _LONG_AGO_MS
        self._buckets: dict[int, dict[Client, None]] = {}
        self._top = 0

    def add(self, client: Client, lease: Lease) -> None:
        leases = self.clients.setdefault(client, {})
        self._move(client, len(leases), len(leases) + 1)
        leases[lease.lease_id] = lease

    def remove(self, client: Client, lease: Lease) -> None:
        leases = self.clients[client]
        del leases[lease.lease_id]
        self._move(client, len(leases) + 1, len(leases))
        if not leases:
            del self.clients[client]

    def count(self, client: Client | None) -> int:
        return len(self.clients.get(client, ())) if client is not None else 0

    def top(self) -> tuple[Client, int] | None:
        """The client with the most leases, and how many; of several, the one that has been there longest."""
        if not self._top:
            return None
        return next(iter(self._buckets[self._top])), self._top

    def oldest(self, client: Client) -> Lease:
        return next(iter(self.clients[client].values()))

    def ask_again(self) -> None:
        """Somebody new waits: the clients may be asked again as soon as each one's own period is over."""
        self.ask_after_ms = _LONG_AGO_MS

    def _move(self, client: Client, before: int, after: int) -> None:
        if before:
            bucket = self._buckets[before]
            del bucket[client]
            if not bucket:
                del self._buckets[before]
                if self._top == before:
                    # One step is enough: either this client has gone there, or `after` is 0 and nobody is left above.
                    self._top = before - 1
        if after:
            self._buckets.setdefault(after, {})[client] = None
            if after > self._top:
                self._top = after
