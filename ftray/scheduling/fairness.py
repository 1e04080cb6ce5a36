"""Fairness: what clients are asked to give back because others wait, and what is kept back for a large request.

Role: pure; the half of `LeaseScheduler` that deals in time. The other half (`leases.py`) tells it who waits, who was
served and who holds what.

Rules:
- Idle leases come back at once: while somebody waits for a resource, each other holder of it is asked for its idle
  ones, at most once in `ASK_PERIOD_MS`. So is a client that waits alone, if it holds leases of other classes.
- Busy leases come back by fairness: for a class that was not served for `FAIR_AFTER_MS`, and whose client holds nothing
  of what it lacks (or at least two leases fewer than the client with the most), that client's oldest leases are
  recalled, as many as cover the lack. If the client's own other classes hold the resources, theirs are. Again after
  pauses that grow. Running tasks end first; nothing is killed. The class goes to the front of the queue.
- Large requests are not starved by small ones: one that has waited for `RESERVE_AFTER_MS`, and has less than its share,
  keeps back from others what it needs; one after the other, in the order of their claims. A reservation that comes to
  nothing, since some lease does not end, lapses; the next one begins after a pause of three times its length, and the
  same request's next one is longer. So what can't be met costs the node a quarter of these resources at worst. None is
  made if actors hold so much that the request can't fit.

Cost: amortised constant for each event and each pause of each waiting class. A round of asking scans the holders of
one resource, whose number the resources of the node bound.

Rejected: recalling all a client holds beyond its share at once (one client with one short task would empty every worker
of the others); a share by weights of resources (the units of GPUs and memory do not compare).
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Final, NamedTuple

from ftray.scheduling.records import Client, Dedicated, DemandClass, Holders, Lease, Shape, Turns
from ftray.scheduling.resources import NodeResources

ASK_PERIOD_MS: Final = 50
"""A client is asked for idle leases at most this often."""
FAIR_AFTER_MS: Final = 100
"""For a class that was not served for longer than this, busy leases are recalled."""
RECALL_PAUSE_MAX_MS: Final = 1_600
"""The longest pause between two such recalls for one class; they double from `FAIR_AFTER_MS`."""
RECALLS_AT_ONCE_MAX: Final = 64
RESERVE_AFTER_MS: Final = 200
"""A request that has waited this long may keep resources back from others."""
RESERVE_MS: Final = 500
"""For how long at first."""
RESERVE_MAX_MS: Final = 8_000
"""For how long at most: longer each time it came to nothing."""
RESERVE_PAUSES: Final = 3
"""After a reservation that came to nothing there is none for this many times as long."""


class Reclaim(NamedTuple):
    """Ask a client for idle leases (`lease_id` is None; `class_id` is an example), or for one lease once it is idle."""

    client: bytes
    class_id: int
    lease_id: int | None


class Fairness:
    """Who waits how long, who holds what, and what follows. `waiting` is the scheduler's own dictionary."""

    __slots__ = (
        "dedicated_turn", "reserved", "_claims", "_dedicated_units", "_due", "_fresh", "_holders", "_node",
        "_reserve_again_ms", "_reserved_until_ms", "_turns", "_waiting",
    )  # fmt: skip

    def __init__(self, node: NodeResources, waiting: Iterable[Shape], turns: Turns) -> None:
        self._node = node
        self._turns = turns
        self._waiting = waiting
        self._holders: dict[str, Holders] = {}
        self._dedicated_units: dict[str, int] = {}
        self._fresh: list[DemandClass] = []
        self._due: list[tuple[float, int, DemandClass | Dedicated]] = []
        self.dedicated_turn = 0
        """The turn of the queue of actors."""
        self.reserved: DemandClass | Dedicated | None = None
        """Who is next as soon as it fits, and before whom nobody takes what it needs."""
        self._claims: dict[DemandClass | Dedicated, None] = {}
        """Who would reserve, the first to say so first."""
        self._reserved_until_ms = 0.0
        self._reserve_again_ms = 0.0

    # --- what the scheduler tells ------------------------------------------------------------------------------------

    def begins(self, waiter: DemandClass | Dedicated) -> None:
        """It had nothing to wait for, and now has."""
        if isinstance(waiter, Dedicated):
            self._time(waiter, waiter.since_ms + FAIR_AFTER_MS)
        elif not waiter.fresh:
            waiter.fresh = True
            self._fresh.append(waiter)

    def stamp(self, now_ms: float) -> None:
        """Writes the time to classes that began to wait since the clock was last seen (demand comes without one)."""
        if self.reserved is not None and now_ms >= self._reserved_until_ms:
            self._reserve_again_ms = now_ms + self.reserved.reserve_ms * RESERVE_PAUSES
            self.reserved = None
        if self._fresh:
            for demand in self._fresh:
                demand.fresh = False
                self.served(demand, now_ms)
            self._fresh.clear()

    def served(self, demand: DemandClass, now_ms: float) -> None:
        """Its patience begins anew."""
        demand.since_ms = now_ms
        demand.backoff_ms = 0.0
        if demand.waiting:
            self._time(demand, now_ms + FAIR_AFTER_MS)

    def settled(self, waiter: DemandClass | Dedicated) -> None:
        """It was served, or wants nothing any more."""
        waiter.reserve_ms = 0.0
        self._claims.pop(waiter, None)
        if self.reserved is waiter:
            self.reserved = None

    def ask_again(self, shape: Shape) -> None:
        """Somebody new waits with this request: holders may be asked as soon as each one's own period is over."""
        for name in shape.names:
            holders = self._holders.get(name)
            if holders is not None:
                holders.ask_again()

    def enlist(self, lease: Lease, client: Client) -> None:
        """The lease can be asked back for what it holds."""
        if lease.recalled or client.dropped:
            return
        for name in lease.shape.names_blocked if lease.blocked else lease.shape.names:
            holders = self._holders.get(name)
            if holders is None:
                holders = self._holders[name] = Holders()
            holders.add(client, lease)

    def delist(self, lease: Lease, client: Client) -> None:
        """The lease can't be asked back any more, or not for the same."""
        if lease.recalled:
            return
        for name in lease.shape.names_blocked if lease.blocked else lease.shape.names:
            self._holders[name].remove(client, lease)

    def dedicated_holds(self, shape: Shape, sign: int) -> None:
        """An actor got (`sign` 1) or gave back (-1) an allocation."""
        for name, units in shape.request.items():
            self._dedicated_units[name] = self._dedicated_units.get(name, 0) + sign * units

    # --- what the scheduler asks -------------------------------------------------------------------------------------

    def reclaims(self, now_ms: float) -> list[Reclaim]:
        """What to ask clients for."""
        found: list[Reclaim] = []
        self.stamp(now_ms)
        waits = False
        for shape in self._waiting:
            waits = True
            for name in self._node.short(shape.request):
                holders = self._holders.get(name)
                if holders is not None and holders.ask_after_ms <= now_ms:
                    self._ask(shape, holders, now_ms, found)
        while self._due and (self._due[0][0] < now_ms or not waits):
            _, timer, waiter = heappop(self._due)
            if timer == waiter.timer:
                waiter.timer = 0
                if waiter.waiting:
                    self._overdue(waiter, now_ms, found)
        while self._claims and self.reserved is None and self._reserve_again_ms <= now_ms:
            self._reserve(now_ms, found)
        return found

    def _time(self, waiter: DemandClass | Dedicated, due_ms: float) -> None:
        """Sees to it that the waiter is looked at when `due_ms` is past (or earlier, which does no harm)."""
        if not waiter.timer or waiter.due_ms > due_ms:
            waiter.timer = self._turns.last()
            waiter.due_ms = due_ms
            heappush(self._due, (due_ms, waiter.timer, waiter))

    def _ask(self, shape: Shape, holders: Holders, now_ms: float, found: list[Reclaim]) -> None:
        holders.ask_after_ms = now_ms + ASK_PERIOD_MS
        for client in holders.clients:
            again_ms = client.asked_ms + ASK_PERIOD_MS
            if again_ms > now_ms:
                holders.ask_after_ms = min(holders.ask_after_ms, again_ms)
                continue
            if shape.waits_only_for(client) and not client.holds_elsewhere():
                continue
            client.asked_ms = now_ms
            demand = holders.oldest(client).demand
            assert demand is not None  # dedicated leases are not listed
            found.append(Reclaim(client.client_id, demand.class_id, None))

    def _overdue(self, waiter: DemandClass | Dedicated, now_ms: float, found: list[Reclaim]) -> None:
        due_ms = waiter.since_ms + FAIR_AFTER_MS
        if due_ms < now_ms:
            short = self._node.short(waiter.shape.request)
            if short:
                if self._recall(waiter, short, now_ms, found):
                    self._advance(waiter)
                # A class at the front was behind its share when it got there, and has not been served since.
                behind = isinstance(waiter, Dedicated) or waiter.turn < 0
                if behind and now_ms - waiter.since_ms >= RESERVE_AFTER_MS and waiter is not self.reserved:
                    self._claims[waiter] = None
            waiter.backoff_ms = min(max(waiter.backoff_ms * 2, FAIR_AFTER_MS), RECALL_PAUSE_MAX_MS)
            due_ms = now_ms + waiter.backoff_ms
        self._time(waiter, due_ms)

    def _recall(
        self, waiter: DemandClass | Dedicated, short: dict[str, int], now_ms: float, found: list[Reclaim],
        reserves: bool = False,
    ) -> bool:  # fmt: skip
        """Names the oldest leases of those with the most until what is short would be covered.

        A client has leases of others recalled for one of its classes at a time, unless the class `reserves`.

        Returns whether the waiter has less than its share, even if there was nothing to name.
        """
        client = waiter.client if isinstance(waiter, DemandClass) else None
        from_others = reserves or client is None or client.recall_after_ms < now_ms
        left = RECALLS_AT_ONCE_MAX
        deserves = False
        for name, units in short.items():
            holders = self._holders.get(name)
            if holders is None or not holders.clients:  # all recalled already, or not to be had
                deserves = deserves or isinstance(waiter, Dedicated) or not waiter.held
            while units > 0 and left and holders is not None:
                victim = self._victim(waiter, holders)
                if victim is None:
                    break
                deserves = True
                if client is not None and victim is not client:
                    if not from_others:
                        break
                    client.recall_after_ms = now_ms + FAIR_AFTER_MS
                lease = holders.oldest(victim)
                self.delist(lease, victim)
                lease.recalled = True
                assert lease.demand is not None
                found.append(Reclaim(victim.client_id, lease.demand.class_id, lease.lease_id))
                units -= lease.shape.request.units[name]
                left -= 1
        return deserves

    def _victim(self, waiter: DemandClass | Dedicated, holders: Holders) -> Client | None:
        """Whose oldest lease on the resource the waiter may have recalled."""
        top = holders.top()
        if top is None:
            return None
        if isinstance(waiter, Dedicated):
            return top[0]
        own = holders.count(waiter.client)
        if own == 0 or top[1] >= own + 2:
            return top[0]
        # Nobody has more to give than the client itself: one of its classes makes room for one that has nothing.
        return waiter.client if not waiter.held else None

    def _advance(self, waiter: DemandClass | Dedicated) -> None:
        """What comes back is for the waiter: it goes to the front, behind those who went there before."""
        if isinstance(waiter, Dedicated):
            if self.dedicated_turn >= 0:
                self.dedicated_turn = self._turns.front()
            return
        if waiter.client.turn > 0:
            waiter.client.turn = self._turns.front()
        if waiter.turn > 0:
            waiter.turn = self._turns.front()
        waiter.shape.advance(waiter, self._turns.last())

    def _reserve(self, now_ms: float, found: list[Reclaim]) -> None:
        """Reserves for the first who claims it, if there is still reason to."""
        waiter = next(iter(self._claims))
        del self._claims[waiter]
        short = self._node.short(waiter.shape.request)
        if not short or not self._node.feasible(waiter.shape.request, besides=self._dedicated_units):
            return
        self._recall(waiter, short, now_ms, found, reserves=True)
        self.reserved = waiter
        waiter.reserve_ms = min(max(waiter.reserve_ms * 2, RESERVE_MS), RESERVE_MAX_MS)
        self._reserved_until_ms = now_ms + waiter.reserve_ms
