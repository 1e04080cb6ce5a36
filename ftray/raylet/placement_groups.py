"""Placement groups on this node: what the GCS asks of it, and what it answers.

Role: shell around `scheduling/bundles.py`, under the reactor's lock. It carries out what that decides: commands to the
GCS, and the ends of leases.

Rules: a command that the GCS refuses is about something that it does not want any more, and what is held for it is
given back. One that could not be made durable there is repeated. When the GCS has connected it is told all that is
held, so that nothing is kept for a group that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from ftray.gcs.state.commands import BundlesCommitted, BundlesPrepared, BundlesRefused, BundlesReturned
from ftray.gcs.state.tables import Code, Result
from ftray.scheduling.bundles import (
    BundleEffect,
    BundleToken,
    Committed,
    EndLeases,
    NodeBundles,
    Prepared,
    Refused,
    Returned,
)
from ftray.wire.group_messages import BundlesHeld, CommitBundles, GroupMessage, PrepareBundles, ReturnBundles

if TYPE_CHECKING:
    from ftray.raylet.raylet import Raylet

REPEAT_MS = 500.0
"""After it a command is repeated that could not be made durable."""


class PlacementGroups:
    """See the module."""

    def __init__(self, raylet: Raylet) -> None:
        self.raylet = raylet
        self.bundles = NodeBundles(raylet.leases.scheduler)
        self._fenced = False
        """Until the node is a member again, whatever it is asked was meant for the life before."""

    def from_gcs(self, message: GroupMessage) -> None:
        """The GCS asks for something."""
        if self._fenced:
            return
        bundles = self.bundles
        match message:
            case PrepareBundles(group_id, attempt, wanted):
                effects = bundles.prepare(group_id, attempt, wanted, self.raylet.reactor.now_ms())
            case CommitBundles(group_id, attempt):
                effects = bundles.commit(group_id, attempt)
            case ReturnBundles(group_id, attempt, reason):
                effects = bundles.give_back(group_id, attempt, reason)
            case _:
                return
        self._carry_out(effects)
        self.raylet.leases.settle_soon()

    def gcs_connected(self) -> None:
        """The GCS serves this node (again): it is told what is here."""
        self.raylet.gcs.send(BundlesHeld(tuple((each.group_id, each.attempt) for each in self.bundles.held())))

    def granted(self, token: BundleToken, lease_id: int) -> None:
        """The scheduler has taken the resources of a reservation."""
        self._carry_out(self.bundles.granted(token, lease_id))

    def infeasible(self, token: BundleToken, missing: str) -> None:
        """This node can't ever hold them."""
        self._carry_out(self.bundles.infeasible(token, missing))

    def settled(self) -> None:
        """Leases have ended, and some bundles are being given back."""
        effects = self.bundles.leases_ended()
        self._carry_out(effects)
        if effects:
            self.raylet.leases.settle_soon()  # what they held is free

    def tidy(self, now_ms: float) -> None:
        """Now and then: gives up what has waited for too long."""
        self._carry_out(self.bundles.expire(now_ms))

    def fenced(self, reason: str) -> None:
        """The cluster has declared this node dead: what it holds means nothing any more."""
        self._fenced = True
        self._carry_out(self.bundles.drop_all(reason))
        self.raylet.leases.settle_soon()

    def registered(self) -> None:
        """The node is a member (again), perhaps for a while: what it was asked meanwhile it is to be asked again."""
        if self._fenced:
            self._fenced = False
            self.gcs_connected()

    def _carry_out(self, effects: Iterable[BundleEffect]) -> None:
        for effect in effects:
            if isinstance(effect, EndLeases):
                for lease_id in effect.lease_ids:
                    self._end_lease(lease_id, effect.reason)
            else:
                self._tell(effect)

    def _end_lease(self, lease_id: int, reason: str) -> None:
        leases = self.raylet.leases
        lease = leases.given.get(lease_id)
        if lease is not None:
            leases.end(lease, reason)
        else:
            self.raylet.actors.end_lease(lease_id, reason)

    def _tell(self, effect: Prepared | Refused | Committed | Returned) -> None:
        node_id = self.raylet.node_id
        command: BundlesPrepared | BundlesRefused | BundlesCommitted | BundlesReturned
        match effect:
            case Prepared(group_id, attempt):
                command = BundlesPrepared(group_id, attempt, node_id)
            case Refused(group_id, attempt, reason):
                command = BundlesRefused(group_id, attempt, node_id, reason)
            case Committed(group_id, attempt):
                command = BundlesCommitted(group_id, attempt, node_id)
            case Returned(group_id, attempt, reason):
                command = BundlesReturned(group_id, attempt, node_id, reason)
        self.raylet.gcs.command(command, partial(self._told, effect))

    def _told(self, effect: Prepared | Refused | Committed | Returned, result: Result) -> None:
        if result.ok or self.raylet.stopping:
            return
        if result.code is Code.UNAVAILABLE:
            self.raylet.reactor.call_later(REPEAT_MS, partial(self._tell, effect))
        elif isinstance(effect, Prepared | Committed):
            self._carry_out(self.bundles.not_wanted(effect.group_id, effect.attempt, result.message))
            self.raylet.leases.settle_soon()
