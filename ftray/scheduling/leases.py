"""Leases: which client may use a worker of this node, and what is asked back when others wait.

Role: pure. Clients (drivers and workers, as owners of tasks) declare demand by class, "n leases of these resources in
all"; actors ask for one dedicated allocation each. `dispatch` turns free resources into grants, `reclaims` names what
clients should give back (its rules are in `fairness.py`), `infeasible` who waits in vain. The shell finds a worker for
each grant, and calls `end_lease` when the owner has returned it or the worker is dead.

Rules:
- Demand is a level, not a request: it is repeated without harm, and a lease that ends while it is still wanted is
  granted anew without a word from the client.
- Turns go round: of those whose request fits, the client served longest ago is next (the queue of actors counts as one
  client), then its class served longest ago. Clients that hold nothing come first, in the order in which they came to
  that: they can't get on at all, and they are often workers whose task waits for a task of its own, which it is better
  to finish than to start more like it.
- A blocked worker lends its CPU, nothing else, and takes it back without asking: free CPU may be negative for a while.

Cost: a grant looks at each *distinct* waiting request once, the end of a client's last lease at the classes in which it
waits, any other event at nothing but what it names; none scans leases, clients or classes.

Rejected: priorities by age alone (one client with many old classes holds the node); strict first-come order (a
request for all CPUs idles the node for as long as the longest task runs); revoking leases by killing workers.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import NamedTuple
from weakref import WeakValueDictionary

from ftray.scheduling.fairness import Fairness, Reclaim
from ftray.scheduling.records import Client, Dedicated, DemandClass, Lease, Shape, Turns
from ftray.scheduling.resources import NodeResources, ResourceSet


class DemandError(ValueError):
    """A client declared demand that makes no sense: its own mistake, and nobody else's state is touched."""


class Grant(NamedTuple):
    """A lease for a client: the shell finds a worker of the job for it. `resources` is shared: not to be changed."""

    client: bytes
    class_id: int
    lease_id: int
    job_id: bytes
    resources: Mapping[str, float]


class DedicatedGrant(NamedTuple):
    """The lease that `allocate_dedicated` asked for under `token`."""

    token: Hashable
    lease_id: int
    resources: Mapping[str, float]


class EndedLease(NamedTuple):
    """What a lease was, told when it ends; `token` is None unless it was dedicated, and then `client` is b''."""

    client: bytes
    class_id: int
    token: Hashable


class Infeasible(NamedTuple):
    """This node can never grant what the client asks for."""

    client: bytes
    class_id: int
    missing: str


class DedicatedInfeasible(NamedTuple):
    """This node can never grant what was asked for under `token`."""

    token: Hashable
    missing: str


class DemandRow(NamedTuple):
    """For status: one class of a client, or one waiting actor (`token` is not None, `want` is 1)."""

    client: bytes
    class_id: int
    token: Hashable
    job_id: bytes
    want: int
    held: int
    resources: Mapping[str, float]
    missing: str


class LeaseRow(NamedTuple):
    """For status: one lease."""

    lease_id: int
    client: bytes
    class_id: int
    token: Hashable
    job_id: bytes
    resources: Mapping[str, float]
    blocked: bool
    recalled: bool


class LeaseScheduler:
    """The leases of one node. All methods are synchronous and cheap; times are milliseconds of any steady clock."""

    __slots__ = (
        "_clients", "_dedicated", "_fairness", "_leases", "_next_lease_id", "_node", "_reports", "_shapes", "_turns",
        "_waiting",
    )  # fmt: skip

    def __init__(self, total: Mapping[str, float]) -> None:
        """`total`: what the node has. Raises TypeError or ValueError as `ResourceSet.of` does."""
        self._node = NodeResources(ResourceSet.of(total))
        self._clients: dict[bytes, Client] = {}
        self._leases: dict[int, Lease] = {}
        self._next_lease_id = 1
        self._dedicated: dict[Hashable, Dedicated] = {}
        self._turns = Turns()
        self._shapes: WeakValueDictionary[ResourceSet, Shape] = WeakValueDictionary()
        self._waiting: dict[Shape, None] = {}
        self._fairness = Fairness(self._node, self._waiting, self._turns)
        self._reports: dict[DemandClass | Dedicated, None] = {}

    @property
    def total(self) -> dict[str, float]:
        """What the node has."""
        return self._node.total

    @property
    def available(self) -> dict[str, float]:
        """What of it is free; negative where blocked workers woke up."""
        return self._node.available

    @property
    def waiting(self) -> bool:
        """Whether feasible demand waits: `dispatch` and `reclaims` should then be called again within 50 ms."""
        return bool(self._waiting)

    def set_demand(
        self,
        client: bytes,
        class_id: int,
        want: int,
        resources: Mapping[str, float] | None = None,
        job_id: bytes = b"",
    ) -> None:
        """The client wants `want` leases of the class in all, those it holds included. Replaces what it said before.

        `resources` is needed the first time a client names the class, and stays. Raises DemandError, and changes
        nothing, for a `want` that is not a whole number of zero or more, for a class that is new without resources or
        known with other ones, and for amounts that are not valid.
        """
        if not isinstance(want, int) or isinstance(want, bool) or want < 0:
            raise DemandError(f"class {class_id}: want={want!r} is not a number of leases")
        owner = self._clients.get(client)
        demand = owner.classes.get(class_id) if owner is not None else None
        if demand is None:
            if resources is None:
                if want:
                    raise DemandError(f"class {class_id} is new: say its resources with the first demand")
                return
            shape = self._shape(class_id, resources)
            if owner is None:
                owner = self._clients[client] = Client(client, self._turns.front())
            demand = owner.classes[class_id] = DemandClass(owner, class_id, job_id, shape)
        elif resources is not None and self._shape(class_id, resources) is not demand.shape:
            raise DemandError(f"class {class_id} was declared with {demand.shape.amounts}, now with {dict(resources)}")
        demand.want = want
        if not want:
            demand.reported = False  # asked anew later, it is told anew
        self._refresh(demand)

    def drop_client(self, client: bytes) -> list[int]:
        """The client is gone: its demand with it. Returns its leases, which hold their resources until `end_lease`."""
        owner = self._clients.pop(client, None)
        if owner is None:
            return []
        owner.dropped = True
        for demand in owner.classes.values():
            self._refresh(demand)
        for lease in owner.leases.values():
            self._fairness.delist(lease, owner)
            lease.recalled = True
        return list(owner.leases)

    def allocate_dedicated(self, token: Hashable, resources: Mapping[str, float], now_ms: float) -> bool:
        """Queues an allocation for an actor; `dispatch` answers. Returns False, doing nothing, if the token is known.

        Raises DemandError for amounts that are not valid.
        """
        if token in self._dedicated:
            return False
        dedicated = Dedicated(token, self._shape(token, resources), self._turns.last(), now_ms)
        self._dedicated[token] = dedicated
        self._refresh_dedicated(dedicated)
        return True

    def cancel_dedicated(self, token: Hashable) -> int | None:
        """Forgets a waiting allocation. Returns the lease if it has been granted already (end it), or else None."""
        dedicated = self._dedicated.get(token)
        if dedicated is None:
            return None
        if dedicated.lease_id:
            return dedicated.lease_id
        del self._dedicated[token]
        self._refresh_dedicated(dedicated)
        return None

    def dispatch(self, now_ms: float, max_grants: int) -> list[Grant | DedicatedGrant]:
        """Grants what fits, up to `max_grants` leases, in fair order. The resources are taken when it returns."""
        if not self._waiting:
            return []
        self._fairness.stamp(now_ms)
        grants: list[Grant | DedicatedGrant] = []
        while len(grants) < max_grants:
            chosen = self._next_in_turn()
            if chosen is None:
                break
            self._fairness.settled(chosen)
            self._node.allocate(chosen.shape.request)
            if isinstance(chosen, Dedicated):
                grants.append(self._grant_dedicated(chosen))
            else:
                grants.append(self._grant(chosen, now_ms))
        return grants

    def end_lease(self, lease_id: int) -> EndedLease | None:
        """The owner returned the lease, or its worker is dead. Returns None, and does nothing, if it is not known."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return None
        self._node.release(lease.shape.rest if lease.blocked else lease.shape.request)
        dedicated, demand = lease.dedicated, lease.demand
        if demand is None:
            assert dedicated is not None
            self._fairness.dedicated_holds(lease.shape, -1)
            del self._dedicated[dedicated.token]
            return EndedLease(b"", 0, dedicated.token)
        client = demand.client
        self._fairness.delist(lease, client)
        del demand.held[lease_id]
        del client.leases[lease_id]
        if not client.leases and not client.dropped:
            client.turn = self._turns.front()
            for waiting in client.waiting.values():
                waiting.shape.advance(waiting, self._turns.last())
        self._refresh(demand)
        return EndedLease(client.client_id, demand.class_id, None)

    def block(self, lease_id: int) -> bool:
        """The worker waits in `get`: lends its CPU. Returns whether the lease is known; doing it twice is once."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        if not lease.blocked:
            self._node.release(lease.shape.cpu)
            if lease.demand is not None and lease.shape.cpu:
                self._fairness.delist(lease, lease.demand.client)
                lease.blocked = True
                self._fairness.enlist(lease, lease.demand.client)
            lease.blocked = True
        return True

    def unblock(self, lease_id: int) -> bool:
        """The worker goes on: takes its CPU back, free or not. Returns whether the lease is known; twice is once."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        if lease.blocked:
            self._node.force_allocate(lease.shape.cpu)
            if lease.demand is not None and lease.shape.cpu:
                self._fairness.delist(lease, lease.demand.client)
                lease.blocked = False
                self._fairness.enlist(lease, lease.demand.client)
            lease.blocked = False
        return True

    def set_total(self, total: Mapping[str, float]) -> None:
        """The node has more or less from now on; what is infeasible is reported anew. Raises as `ResourceSet.of`."""
        self._node.set_total(ResourceSet.of(total))
        for shape in self._shapes.values():
            shape.feasible = self._node.feasible(shape.request)
        for client in self._clients.values():
            for demand in client.classes.values():
                demand.reported = False
                self._refresh(demand)
        for dedicated in self._dedicated.values():
            dedicated.reported = False
            self._refresh_dedicated(dedicated)

    def change_total(self, units: Mapping[str, int], sign: int) -> None:
        """The node has so many units more (`sign` 1) or less (-1) of these resources, as when a bundle comes or goes.

        Looks at the demand for these alone.
        """
        self._node.change_total(units, sign)
        changed: set[Shape] = set()
        for shape in self._shapes.values():
            if any(name in units for name in shape.names):
                feasible = self._node.feasible(shape.request)
                if feasible != shape.feasible:
                    shape.feasible = feasible
                    changed.add(shape)
        if not changed:
            return
        for client in self._clients.values():
            for demand in client.classes.values():
                if demand.shape in changed:
                    demand.reported = False
                    self._refresh(demand)
        for dedicated in self._dedicated.values():
            if dedicated.shape in changed:
                dedicated.reported = False
                self._refresh_dedicated(dedicated)

    def runs(self, lease_ids: Iterable[int]) -> bool:
        """Whether any of these leases has not ended."""
        return any(lease_id in self._leases for lease_id in lease_ids)

    def leases_on(self, names: Collection[str]) -> list[int]:
        """The leases that hold some of these resources, oldest first. Looks at all leases."""
        if not names:
            return []
        return [
            lease.lease_id for lease in self._leases.values() if any(name in names for name in lease.shape.names)
        ]

    def leases_over(self, name: str, left_out: Collection[int], spared: Collection[int]) -> list[int]:
        """The newest leases on `name` without which the others fit into what there is of it, `left_out` not counted.
        None of `spared` is among them. Looks at all leases."""
        used = [
            (lease.lease_id, lease.shape.request.units[name])
            for lease in self._leases.values()
            if name in lease.shape.names and lease.lease_id not in left_out
        ]
        over = sum(units for _, units in used) - self._node.total_units(name)
        found: list[int] = []
        for lease_id, units in reversed(used):
            if over <= 0:
                break
            if lease_id not in spared:
                found.append(lease_id)
                over -= units
        return found

    def infeasible(self) -> list[Infeasible | DedicatedInfeasible]:
        """Demand that this node can never meet, each reported once until the total changes or it is withdrawn."""
        found: list[Infeasible | DedicatedInfeasible] = []
        for entry in self._reports:
            entry.reported = True
            missing = self._node.missing(entry.shape.request)
            if isinstance(entry, Dedicated):
                found.append(DedicatedInfeasible(entry.token, missing))
            else:
                found.append(Infeasible(entry.client.client_id, entry.class_id, missing))
        self._reports.clear()
        return found

    def reclaims(self, now_ms: float) -> list[Reclaim]:
        """What to ask clients for, because others wait: idle leases, and by fairness busy ones."""
        return self._fairness.reclaims(now_ms)

    def demands(self) -> list[DemandRow]:
        """For status: all classes with demand or leases, then all actors that wait for an allocation."""
        rows = [
            DemandRow(
                client.client_id, demand.class_id, None, demand.job_id, demand.want, len(demand.held),
                demand.shape.amounts,
                self._node.missing(demand.shape.request) if demand.want > len(demand.held) else "",
            )
            for client in self._clients.values()
            for demand in client.classes.values()
            if demand.want or demand.held
        ]  # fmt: skip
        for entry in self._dedicated.values():
            if not entry.lease_id:
                missing = self._node.missing(entry.shape.request)
                rows.append(DemandRow(b"", 0, entry.token, b"", 1, 0, entry.shape.amounts, missing))
        return rows

    def leases(self) -> list[LeaseRow]:
        """For status: all leases, oldest first."""
        rows = []
        for lease in self._leases.values():
            client, class_id, token, job_id = b"", 0, None, b""
            if lease.demand is not None:
                client, class_id, job_id = lease.demand.client.client_id, lease.demand.class_id, lease.demand.job_id
            elif lease.dedicated is not None:
                token = lease.dedicated.token
            rows.append(
                LeaseRow(
                    lease.lease_id, client, class_id, token, job_id, lease.shape.amounts, lease.blocked, lease.recalled
                )
            )
        return rows

    # --- who is next ------------------------------------------------------------------------------------------------

    def _next_in_turn(self) -> DemandClass | Dedicated | None:
        """Of all whose request fits, the one whose turn it is; None if nobody's does."""
        reserved = self._fairness.reserved
        if reserved is not None and self._node.fits(reserved.shape.request):
            return reserved
        best: DemandClass | Dedicated | None = None
        best_turn = (0, 0)
        for shape in self._waiting:
            if reserved is None:
                if not self._node.fits(shape.request):
                    continue
            elif not self._node.fits_beside(shape.request, reserved.shape.request):
                continue
            turn, waiter = self._head(shape)
            if best is None or turn < best_turn:
                best, best_turn = waiter, turn
        return best

    def _head(self, shape: Shape) -> tuple[tuple[int, int], DemandClass | Dedicated]:
        """Of all who wait with this request, the one whose turn it is, and its turn."""
        demand = shape.head()
        if shape.dedicated:
            dedicated = next(iter(shape.dedicated.values()))
            turn = (self._fairness.dedicated_turn, dedicated.turn)
            if demand is None or turn < (demand.client.turn, demand.turn):
                return turn, dedicated
        assert demand is not None  # a shape is among the waiting only while somebody waits
        return (demand.client.turn, demand.turn), demand

    def _grant(self, demand: DemandClass, now_ms: float) -> Grant:
        client, shape = demand.client, demand.shape
        lease = Lease(self._take_lease_id(), shape, demand=demand)
        self._leases[lease.lease_id] = lease
        demand.held[lease.lease_id] = lease
        client.leases[lease.lease_id] = lease
        self._fairness.enlist(lease, client)
        client.turn = demand.turn = self._turns.last()
        self._refresh(demand)
        self._fairness.served(demand, now_ms)
        return Grant(client.client_id, demand.class_id, lease.lease_id, demand.job_id, shape.amounts)

    def _grant_dedicated(self, dedicated: Dedicated) -> DedicatedGrant:
        shape = dedicated.shape
        lease = Lease(self._take_lease_id(), shape, dedicated=dedicated)
        self._leases[lease.lease_id] = lease
        dedicated.lease_id = lease.lease_id
        self._fairness.dedicated_holds(shape, 1)
        self._fairness.dedicated_turn = self._turns.last()
        self._refresh_dedicated(dedicated)
        return DedicatedGrant(dedicated.token, lease.lease_id, shape.amounts)

    def _take_lease_id(self) -> int:
        self._next_lease_id += 1
        return self._next_lease_id - 1

    # --- who waits --------------------------------------------------------------------------------------------------

    def _shape(self, what: Hashable, resources: Mapping[str, float]) -> Shape:
        try:
            request = ResourceSet.of(resources)
        except (TypeError, ValueError) as error:
            raise DemandError(f"{what!r}: {error}") from None
        shape = self._shapes.get(request)
        if shape is None:
            shape = self._shapes[request] = Shape(request, self._node.feasible(request))
        return shape

    def _refresh(self, demand: DemandClass) -> None:
        """Puts the class where it belongs after any change: waiting, to be reported, or neither."""
        client, shape = demand.client, demand.shape
        unmet = demand.want > len(demand.held) and not client.dropped
        self._report(demand, unmet and not shape.feasible)
        waiting = unmet and shape.feasible
        if waiting == demand.waiting:
            return
        demand.waiting = waiting
        if waiting:
            self._fairness.begins(demand)
            client.waiting[demand.class_id] = demand
            demand.turn = self._turns.last()
            shape.enqueue(demand, self._turns.last())
            self._begins_to_wait(shape)
        else:
            del client.waiting[demand.class_id]
            shape.dequeue(demand)
            self._waits_no_more(demand)

    def _refresh_dedicated(self, dedicated: Dedicated) -> None:
        shape = dedicated.shape
        unmet = not dedicated.lease_id and dedicated.token in self._dedicated
        self._report(dedicated, unmet and not shape.feasible)
        waiting = unmet and shape.feasible
        if waiting == dedicated.waiting:
            return
        dedicated.waiting = waiting
        if waiting:
            shape.dedicated[dedicated.token] = dedicated
            self._begins_to_wait(shape)
            self._fairness.begins(dedicated)
        else:
            del shape.dedicated[dedicated.token]
            self._waits_no_more(dedicated)

    def _report(self, entry: DemandClass | Dedicated, due: bool) -> None:
        if due and not entry.reported:
            self._reports[entry] = None
        elif self._reports and not due:
            self._reports.pop(entry, None)

    def _begins_to_wait(self, shape: Shape) -> None:
        self._waiting[shape] = None
        self._fairness.ask_again(shape)

    def _waits_no_more(self, waiter: DemandClass | Dedicated) -> None:
        self._fairness.settled(waiter)
        if not waiter.shape.is_waiting():
            del self._waiting[waiter.shape]
