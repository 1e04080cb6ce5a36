"""The ledger of one node under bundles, tasks and actors that come, block, wake up and go in any order.

At every moment what is free is what the node has, with what its bundles offer, less what leases hold; when all has
ended, the node has what it had at first, and all of it is free, exactly. Leases in a bundle that is given back are told
to end, and hold its resources until they do, also those that lend their CPU.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ftray.ids import BUNDLE, bundle_resources, group_resource
from ftray.scheduling.bundles import BundleEffect, BundleToken, EndLeases, NodeBundles, Returned, Stage
from ftray.scheduling.leases import DedicatedGrant, DedicatedInfeasible, LeaseScheduler

OWN = {"CPU": 3.7, "GPU": 1.0, "memory": 1e9}
GROUPS = [bytes([number]) * 16 for number in range(3)]
BUNDLES = [{"CPU": 0.1}, {"CPU": 0.7, "GPU": 0.5}, {"CPU": 1.0, "memory": 3e8}, {"GPU": 0.3}, {"CPU": 2.0}]
OWNERS = (b"one", b"two")


class Ledger(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0.0
        self.scheduler = LeaseScheduler(OWN)
        self.bundles = NodeBundles(self.scheduler)
        self.attempts = [0, 0, 0]
        self.running: dict[int, bool] = {}
        """Leases of tasks and actors, and whether they have been told to end."""
        self.classes: dict[tuple[str, ...], int] = {}
        self.actors = 0

    def settle(self) -> None:
        if self.bundles.returning:
            self.carry_out(self.bundles.leases_ended())
        for grant in self.scheduler.dispatch(self.now_ms, 64):
            if isinstance(grant, DedicatedGrant) and isinstance(grant.token, BundleToken):
                self.carry_out(self.bundles.granted(grant.token, grant.lease_id))
            else:
                self.running[grant.lease_id] = False
        for found in self.scheduler.infeasible():
            if isinstance(found, DedicatedInfeasible):
                if isinstance(found.token, BundleToken):
                    self.carry_out(self.bundles.infeasible(found.token, found.missing))
                else:
                    self.scheduler.cancel_dedicated(found.token)

    def carry_out(self, effects: list[BundleEffect]) -> None:
        for effect in effects:
            if isinstance(effect, EndLeases):
                for lease_id in effect.lease_ids:
                    self.running[lease_id] = True
            elif isinstance(effect, Returned):
                held = {(row.group_id, row.attempt) for row in self.bundles.rows()}
                assert (effect.group_id, effect.attempt) not in held

    # --- the GCS ------------------------------------------------------------------------------------------------------

    numbers = st.integers(0, 2)

    @rule(number=numbers, wanted=st.lists(st.integers(0, 4), min_size=1, max_size=3), anew=st.booleans())
    def prepare(self, number: int, wanted: list[int], anew: bool) -> None:
        self.attempts[number] += anew
        bundles = {index: BUNDLES[index] for index in wanted}
        self.carry_out(self.bundles.prepare(GROUPS[number], self.attempts[number], bundles, self.now_ms))
        self.settle()

    @rule(number=numbers, back=st.integers(0, 1))
    def commit(self, number: int, back: int) -> None:
        self.carry_out(self.bundles.commit(GROUPS[number], self.attempts[number] - back))

    @rule(number=numbers, wanted=st.lists(st.integers(0, 4), min_size=1, max_size=3))
    def make(self, number: int, wanted: list[int]) -> None:
        self.prepare(number, wanted, True)
        self.commit(number, 0)

    @rule(number=numbers, back=st.integers(0, 2), refused=st.booleans(), settles=st.booleans())
    def give_back(self, number: int, back: int, refused: bool, settles: bool) -> None:
        end = self.bundles.not_wanted if refused else self.bundles.give_back
        self.carry_out(end(GROUPS[number], self.attempts[number] - back, "so"))
        if settles:
            self.settle()

    @rule(really=st.sampled_from([False, False, True]))
    def fenced(self, really: bool) -> None:
        if really:
            self.carry_out(self.bundles.drop_all("fenced"))
            self.settle()

    # --- who uses them ------------------------------------------------------------------------------------------------

    def names(self, number: int, index: int | None, what: str) -> list[str]:
        """As tasks ask: one in a certain bundle asks for both names."""
        names = [group_resource(what, GROUPS[number])]
        return names if index is None else [*names, group_resource(what, GROUPS[number], index)]

    @rule(
        number=st.integers(0, 3), index=st.none() | st.integers(0, 4), owner=st.sampled_from(OWNERS),
        what=st.sampled_from(["CPU", "CPU", "GPU", BUNDLE]), amount=st.sampled_from([0.1, 0.3, 1.0]),
        count=st.integers(0, 3), actor=st.sampled_from([False, False, True]),
    )  # fmt: skip
    def ask(
        self, number: int, index: int | None, owner: bytes, what: str, amount: float, count: int, actor: bool
    ) -> None:
        names = [what] if number == 3 else self.names(number, index, what)
        if number == 3 and what == BUNDLE:
            return
        resources = dict.fromkeys(names, amount)
        if actor:
            self.actors += 1
            self.scheduler.allocate_dedicated(("actor", self.actors), resources, self.now_ms)
        else:
            class_id = self.classes.setdefault((*names, str(amount)), len(self.classes) + 1)
            self.scheduler.set_demand(owner, class_id, count, resources)
        self.settle()

    @rule(which=st.integers(0, 20), what=st.sampled_from(["block", "unblock", "end", "end", "owner dies"]))
    def something_happens(self, which: int, what: str) -> None:
        if what == "owner dies":
            for lease_id in self.scheduler.drop_client(OWNERS[which % 2]):
                self.scheduler.end_lease(lease_id)
                self.running.pop(lease_id, None)
        elif self.running:
            lease_id = list(self.running)[which % len(self.running)]
            if what == "end":
                self.scheduler.end_lease(lease_id)
                del self.running[lease_id]
            else:
                assert getattr(self.scheduler, what)(lease_id)
        self.settle()

    @rule(ms=st.sampled_from([10.0, 6_000.0]))
    def time_passes(self, ms: float) -> None:
        self.now_ms += ms
        self.carry_out(self.bundles.expire(self.now_ms))
        self.settle()

    # --- always -------------------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost_or_made(self) -> None:
        total = {name: round(amount * 10_000) for name, amount in OWN.items()}
        for row in self.bundles.rows():
            if row.stage == Stage.COMMITTED.name:
                for index, resources in row.bundles.items():
                    for name, amount in bundle_resources(row.group_id, index, resources).items():
                        total[name] = total.get(name, 0) + round(amount * 10_000)
        assert {name: round(each * 10_000) for name, each in self.scheduler.total.items()} == total
        free = dict(total)
        for lease in self.scheduler.leases():
            for name, amount in lease.resources.items():
                if not (lease.blocked and (name == "CPU" or name.startswith("CPU_group_"))):
                    free[name] = free.get(name, 0) - round(amount * 10_000)
        available = {name: round(each * 10_000) for name, each in self.scheduler.available.items()}
        assert {name: each for name, each in available.items() if each} == {k: v for k, v in free.items() if v}

    @invariant()
    def who_runs_in_what_is_given_back_is_told_to_end(self) -> None:
        stages: dict[bytes, set[str]] = {}
        for row in self.bundles.rows():
            stages.setdefault(row.group_id, set()).add(row.stage)
        for lease in self.scheduler.leases():
            for name in lease.resources:
                if "_group_" in name and lease.lease_id in self.running:
                    group = bytes.fromhex(name.rpartition("_")[2])
                    assert Stage.COMMITTED.name in stages.get(group, ()) or self.running[lease.lease_id]
                    assert group in stages, "its bundles were freed under it"

    @invariant()
    def what_runs_in_a_group_is_in_one_of_its_bundles(self) -> None:
        used: dict[str, int] = {}
        for lease in self.scheduler.leases():
            for name, amount in lease.resources.items():
                if "_group_" in name and not self.running.get(lease.lease_id, True) and not lease.blocked:
                    used[name] = used.get(name, 0) + round(amount * 10_000)
        for name, amount in used.items():
            if not name.startswith("CPU_"):  # CPU that was lent is taken back when its lender wakes up
                assert amount <= round(self.scheduler.total.get(name, 0) * 10_000), name

    def teardown(self) -> None:
        for group in GROUPS:
            for attempt in range(max(self.attempts) + 1):
                self.carry_out(self.bundles.give_back(group, attempt, "the end"))
        for owner in OWNERS:
            for lease_id in self.scheduler.drop_client(owner):
                self.running.setdefault(lease_id, True)
        for number in range(self.actors):
            self.scheduler.cancel_dedicated(("actor", number + 1))
        self.settle()
        while self.running:
            self.scheduler.end_lease(next(iter(self.running)))
            del self.running[next(iter(self.running))]
            self.settle()
        self.settle()
        assert self.bundles.rows() == [] and self.scheduler.leases() == []
        assert self.scheduler.total == OWN and self.scheduler.available == OWN


def test_a_lease_in_any_bundle_of_a_group_ends_when_no_bundle_has_what_it_asked_for() -> None:
    scheduler = LeaseScheduler(OWN)
    bundles = NodeBundles(scheduler)
    (group, *_) = GROUPS
    for attempt, resources in ((1, {"GPU": 0.3}), (2, {"CPU": 0.1}), (3, {"CPU": 0.2})):
        bundles.prepare(group, attempt, {attempt: resources}, 0.0)
        for grant in scheduler.dispatch(0.0, 8):
            assert isinstance(grant, DedicatedGrant) and isinstance(grant.token, BundleToken)
            bundles.granted(grant.token, grant.lease_id)
        bundles.commit(group, attempt)
    scheduler.set_demand(b"one", 1, 2, {group_resource("CPU", group): 0.1})
    older, newer = (grant.lease_id for grant in scheduler.dispatch(0.0, 8))
    why = "the placement group in which it ran is gone: so"
    assert bundles.give_back(group, 3, "so") == [EndLeases((newer,), why)]  # the other bundle has room for one
    assert bundles.leases_ended() == []
    scheduler.end_lease(newer)
    assert bundles.leases_ended() == [Returned(group, 3, "so")]
    assert bundles.give_back(group, 2, "so") == [EndLeases((older,), why)]
    scheduler.end_lease(older)
    assert bundles.leases_ended() == [Returned(group, 2, "so")]


TestLedger = Ledger.TestCase
