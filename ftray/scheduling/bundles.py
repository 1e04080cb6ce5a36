"""The bundles of placement groups that one node holds: prepared, committed, given back.

Role: pure, on the ledger of `LeaseScheduler`. A *reservation* is all that the node holds for one attempt of one group.

    prepare ──► QUEUED ──granted──► PREPARED ──commit──► COMMITTED
                  │ refused             │ give_back          │ give_back
                  ▼                     ▼                    ▼
                 gone                  gone ◄─leases ended─ RETURNING

- To prepare is to take the resources, all of a reservation at once. They may be in use by tasks, whose owners are asked
  for them as for an actor; what has waited for `PREPARE_WAIT_MS` is refused, because other nodes hold theirs meanwhile.
- To commit is to offer them under names of the bundle (`ids.bundle_resources`): leases that ask for those run in it.
- To give back is to offer them no more, to end the leases that run in the bundle, and when the last one has ended to
  free the resources. Only then is it said to be returned.

Rules: everything is told apart by group and attempt, so what is repeated does no harm; whoever asks is answered, also
about what is not here. The methods return what the shell is to do, in order.

Rejected: two ledgers, one of the node and one in each bundle (a lease would have to know where it takes from; under
names of their own a bundle's resources are dispatched, recalled and shown like all others); freeing the resources
while the workers that use them are being killed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from ftray.ids import BUNDLE, bundle_resources, group_resource
from ftray.scheduling.leases import LeaseScheduler
from ftray.scheduling.resources import ResourceSet

PREPARE_WAIT_MS = 5_000.0


class BundleToken(NamedTuple):
    """Under which a reservation asks the scheduler for its resources."""

    group_id: bytes
    attempt: int


class Prepared(NamedTuple):
    """To the GCS: the resources are held."""

    group_id: bytes
    attempt: int


class Refused(NamedTuple):
    """To the GCS: they can't be, and nothing is held."""

    group_id: bytes
    attempt: int
    reason: str


class Committed(NamedTuple):
    """To the GCS: they are on offer."""

    group_id: bytes
    attempt: int


class Returned(NamedTuple):
    """To the GCS: nothing is held of this attempt."""

    group_id: bytes
    attempt: int
    reason: str


class EndLeases(NamedTuple):
    """To the node: end what runs under these leases, and then the leases."""

    lease_ids: tuple[int, ...]
    reason: str


BundleEffect: TypeAlias = Prepared | Refused | Committed | Returned | EndLeases


class Stage(enum.IntEnum):
    QUEUED = 1
    PREPARED = 2
    COMMITTED = 3
    RETURNING = 4


class Reservation:
    """What is held for one attempt of one group."""

    __slots__ = ("bundles", "ends", "lease_id", "offered", "reason", "since_ms", "stage", "token")

    def __init__(self, token: BundleToken, bundles: dict[int, dict[str, float]], now_ms: float) -> None:
        self.token = token
        self.bundles = bundles
        """Resources by index of the bundle."""
        self.stage = Stage.QUEUED
        self.since_ms = now_ms
        self.lease_id = 0
        self.offered: dict[str, int] = {}
        """Units on offer, by name."""
        self.ends: tuple[int, ...] = ()
        """While it is given back, the leases that run in these bundles and are to end before."""
        self.reason = ""
        """Why it is being given back."""


class BundleRow(NamedTuple):
    """For status: one reservation."""

    group_id: bytes
    attempt: int
    stage: str
    bundles: dict[int, dict[str, float]]
    reason: str


class NodeBundles:
    """See the module."""

    __slots__ = ("_by_group", "_reservations", "_returning", "_scheduler")

    def __init__(self, scheduler: LeaseScheduler) -> None:
        self._scheduler = scheduler
        self._reservations: dict[BundleToken, Reservation] = {}
        self._by_group: dict[bytes, dict[BundleToken, Reservation]] = {}
        self._returning: dict[BundleToken, Reservation] = {}

    @property
    def returning(self) -> bool:
        """Whether `leases_ended` is to be called when leases have ended."""
        return bool(self._returning)

    def held(self) -> tuple[BundleToken, ...]:
        """All that is here, for the report to a GCS to which the node has connected."""
        return tuple(self._reservations)

    def rows(self) -> list[BundleRow]:
        """For status."""
        return [
            BundleRow(*token, each.stage.name, each.bundles, each.reason) for token, each in self._reservations.items()
        ]

    # --- what the GCS asks --------------------------------------------------------------------------------------------

    def prepare(
        self, group_id: bytes, attempt: int, bundles: Mapping[int, Mapping[str, float]], now_ms: float
    ) -> list[BundleEffect]:
        """Hold these resources. The answer comes when they are there (`granted`), or can't be."""
        token = BundleToken(group_id, attempt)
        known = self._reservations.get(token)
        if known is not None:
            # The GCS asks again because it has not heard.
            return [Prepared(*token)] if known.stage in (Stage.PREPARED, Stage.COMMITTED) else []
        effects: list[BundleEffect] = []
        former = [
            other for other in self._by_group.get(group_id, {}).values()
            if other.stage is not Stage.RETURNING and not other.bundles.keys().isdisjoint(bundles)
        ]  # fmt: skip
        if any(other.token.attempt > attempt for other in former):
            return []  # an old request that was under way for long
        for other in former:
            effects += self._give_back(other, "its bundles are placed anew")
        reservation = Reservation(token, {index: dict(each) for index, each in bundles.items()}, now_ms)
        try:
            self._scheduler.allocate_dedicated(token, _sum(reservation.bundles), now_ms)
        except (TypeError, ValueError) as error:  # a DemandError is one
            return [*effects, Refused(*token, str(error))]
        self._reservations[token] = reservation
        self._by_group.setdefault(group_id, {})[token] = reservation
        return effects

    def commit(self, group_id: bytes, attempt: int) -> list[BundleEffect]:
        """Offer what is held."""
        token = BundleToken(group_id, attempt)
        reservation = self._reservations.get(token)
        if reservation is None:
            return [Returned(*token, "the node does not hold it")]
        if reservation.stage is Stage.QUEUED:  # nobody may have said that it is prepared
            return self._give_back(reservation, "it was to be committed before it was prepared")
        if reservation.stage is Stage.RETURNING:
            return []  # answered when it is returned
        if reservation.stage is Stage.PREPARED:
            reservation.stage = Stage.COMMITTED
            offered: dict[str, int] = {}
            for index, resources in reservation.bundles.items():
                for name, units in ResourceSet.of(bundle_resources(group_id, index, resources)).items():
                    offered[name] = offered.get(name, 0) + units
            reservation.offered = offered
            self._scheduler.change_total(offered, 1)
        return [Committed(*token)]

    def give_back(self, group_id: bytes, attempt: int, reason: str) -> list[BundleEffect]:
        """Free what is held, after what runs in it has ended. Answered also if nothing is here."""
        token = BundleToken(group_id, attempt)
        reservation = self._reservations.get(token)
        return [Returned(*token, reason)] if reservation is None else self._give_back(reservation, reason)

    def not_wanted(self, group_id: bytes, attempt: int, reason: str) -> list[BundleEffect]:
        """The GCS refuses what the node has said of it: the same, unless it is not here any more."""
        reservation = self._reservations.get(BundleToken(group_id, attempt))
        return [] if reservation is None else self._give_back(reservation, reason)

    def drop_all(self, reason: str) -> list[BundleEffect]:
        """The node is fenced: whatever it holds has no meaning any more, and nobody waits for answers."""
        effects: list[BundleEffect] = []
        for reservation in list(self._reservations.values()):
            effects += [each for each in self._give_back(reservation, reason) if isinstance(each, EndLeases)]
        return effects

    # --- what the node tells ------------------------------------------------------------------------------------------

    def granted(self, token: BundleToken, lease_id: int) -> list[BundleEffect]:
        """The scheduler has taken the resources."""
        reservation = self._reservations.get(token)
        if reservation is None:
            self._scheduler.end_lease(lease_id)
            return []
        reservation.stage = Stage.PREPARED
        reservation.lease_id = lease_id
        return [Prepared(*token)]

    def infeasible(self, token: BundleToken, missing: str) -> list[BundleEffect]:
        """The node can't ever hold them."""
        return self._refuse(self._reservations.get(token), missing)

    def expire(self, now_ms: float) -> list[BundleEffect]:
        """Refuses what has waited for too long."""
        effects: list[BundleEffect] = []
        for reservation in list(self._reservations.values()):
            if reservation.stage is Stage.QUEUED and now_ms - reservation.since_ms >= PREPARE_WAIT_MS:
                reason = f"tasks have held its resources for {PREPARE_WAIT_MS / 1000:g} s"
                effects += self._refuse(reservation, reason)
        return effects

    def leases_ended(self) -> list[BundleEffect]:
        """Leases have ended: some were perhaps the last ones in bundles that are given back."""
        effects: list[BundleEffect] = []
        for reservation in list(self._returning.values()):
            if not self._scheduler.runs(reservation.ends):
                effects += self._free(reservation)
        return effects

    # --- within -------------------------------------------------------------------------------------------------------

    def _give_back(self, reservation: Reservation, reason: str) -> list[BundleEffect]:
        if reservation.stage is Stage.RETURNING:
            return []
        reservation.reason = reason
        if reservation.stage is not Stage.COMMITTED:
            return self._free(reservation)
        self._scheduler.change_total(reservation.offered, -1)
        reservation.ends = self._ends(reservation)
        if not reservation.ends:
            return self._free(reservation)
        reservation.stage = Stage.RETURNING
        self._returning[reservation.token] = reservation
        return [EndLeases(reservation.ends, f"the placement group in which it ran is gone: {reason}")]

    def _ends(self, reservation: Reservation) -> tuple[int, ...]:
        """The leases that run in these bundles, which are not on offer any more.

        Which bundle a lease runs in that asks for any one of the group is not decided: it goes on as long as the other
        bundles have what it asked for, and of several the oldest ones do.
        """
        group_id = reservation.token.group_id
        others = [
            other for other in self._by_group[group_id].values()
            if other is not reservation and other.stage is Stage.COMMITTED
        ]  # fmt: skip
        on_offer: set[str] = set()
        certain: set[str] = set()
        for other in others:
            on_offer.update(other.offered)
            certain.update(_in_certain_bundles(other))
        gone = {name for name in reservation.offered if name not in on_offer} | _in_certain_bundles(reservation)
        ends = dict.fromkeys(self._scheduler.leases_on(gone))
        spared = set(self._scheduler.leases_on(certain - gone))
        for name in reservation.offered:
            if name not in gone:
                ends.update(dict.fromkeys(self._scheduler.leases_over(name, ends, spared)))
        return tuple(ends)

    def _free(self, reservation: Reservation) -> list[BundleEffect]:
        lease_id = self._scheduler.cancel_dedicated(reservation.token)
        if lease_id is not None:
            self._scheduler.end_lease(lease_id)
        self._forget(reservation)
        return [Returned(*reservation.token, reservation.reason)]

    def _refuse(self, reservation: Reservation | None, reason: str) -> list[BundleEffect]:
        if reservation is None or reservation.stage is not Stage.QUEUED:
            return []
        self._scheduler.cancel_dedicated(reservation.token)
        self._forget(reservation)
        return [Refused(*reservation.token, reason)]

    def _forget(self, reservation: Reservation) -> None:
        del self._reservations[reservation.token]
        self._returning.pop(reservation.token, None)
        group = self._by_group[reservation.token.group_id]
        del group[reservation.token]
        if not group:
            del self._by_group[reservation.token.group_id]


def _in_certain_bundles(reservation: Reservation) -> set[str]:
    """The names for those who ask for a certain bundle of it."""
    return {
        group_resource(name, reservation.token.group_id, index)
        for index, resources in reservation.bundles.items()
        for name in (*resources, BUNDLE)
    }


def _sum(bundles: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """What all bundles need together."""
    units: dict[str, int] = {}
    for resources in bundles.values():
        for name, amount in ResourceSet.of(resources).items():
            units[name] = units.get(name, 0) + amount
    return ResourceSet(units).amounts()
