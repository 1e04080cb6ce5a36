"""The lease scheduler under any sequence of events: resources are conserved, demand is respected, nobody starves."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.scheduling.leases import DedicatedGrant, Grant, LeaseScheduler

TOTAL = {"CPU": 4.0, "GPU": 2.0, "disk": 1.0}
REQUESTS: list[dict[str, float]] = [
    {},
    {"CPU": 1},
    {"CPU": 0.5},
    {"CPU": 4},
    {"CPU": 1, "GPU": 1},
    {"GPU": 0.3},
    {"CPU": 0.1, "disk": 1},
    {"CPU": 9},
    {"TPU": 1},
]

clients = st.sampled_from([b"a", b"b", b"c"])
numbers = st.integers(0, 100)
events = st.one_of(
    st.tuples(st.just("demand"), clients, st.integers(0, len(REQUESTS) - 1), st.integers(0, 6)),
    st.tuples(st.just("dispatch"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["end", "block", "unblock"]), numbers),
    st.tuples(st.just("drop"), clients),
    st.tuples(st.just("dedicate"), numbers, st.integers(0, len(REQUESTS) - 1)),
    st.tuples(st.just("cancel"), numbers),
    st.tuples(st.just("reclaims"), st.integers(0, 300)),
    st.tuples(st.just("total"), st.sampled_from([TOTAL, {"CPU": 1.0}, {"CPU": 9.0, "TPU": 1.0}])),
)


class Model:
    """What must be true, kept in the plainest way."""

    def __init__(self) -> None:
        self.scheduler = LeaseScheduler(TOTAL)
        self.total = TOTAL
        self.now_ms = 0
        self.wants: dict[tuple[bytes, int], int] = {}
        self.leases: dict[int, tuple[Any, int]] = {}
        self.blocked: set[int] = set()
        self.tokens: dict[int, int] = {}
        self.recalled: set[int] = set()
        self.dropped: set[int] = set()

    def check(self) -> None:
        held = Counter[str]()
        for lease_id, (_, request) in self.leases.items():
            for name, amount in REQUESTS[request].items():
                if name != "CPU" or lease_id not in self.blocked:
                    held[name] += round(amount * 10_000)
        for name in self.total.keys() | held.keys():
            available = round(self.scheduler.available.get(name, 0) * 10_000)
            assert available == round(self.total.get(name, 0) * 10_000) - held[name], name
        assert {row.lease_id for row in self.scheduler.leases()} == set(self.leases)

    def held(self, key: tuple[bytes, int]) -> int:
        return sum(owner == key and lease not in self.dropped for lease, (owner, _) in self.leases.items())

    def fits(self, request: int) -> bool:
        available = self.scheduler.available
        return all(available.get(name, 0) >= amount for name, amount in REQUESTS[request].items())

    def grant(self, max_grants: int) -> None:
        before = self.scheduler.available
        found = self.scheduler.dispatch(self.now_ms, max_grants)
        assert len(found) <= max_grants
        for grant in found:
            assert grant.lease_id not in self.leases
            if isinstance(grant, Grant):
                key = (grant.client, grant.class_id)
                self.leases[grant.lease_id] = (key, grant.class_id)
                assert self.held(key) <= self.wants[key], "granted more than wanted"
                assert grant.resources == {name: amount for name, amount in REQUESTS[grant.class_id].items() if amount}
            else:
                assert isinstance(grant, DedicatedGrant)
                assert isinstance(grant.token, int)
                self.leases[grant.lease_id] = (grant.token, self.tokens[grant.token])
            for name in grant.resources:
                assert before[name] > 0
                assert self.scheduler.available[name] >= 0, "granted more than was free"
        if len(found) < max_grants and self.scheduler._fairness.reserved is None:
            for (client, request), want in self.wants.items():
                assert self.held((client, request)) >= want or not self.fits(request), "idle though wanted"
            granted = {owner for owner, _ in self.leases.values()}
            assert not any(self.fits(request) for token, request in self.tokens.items() if token not in granted)

    def end(self, lease_id: int) -> None:
        owner, _ = self.leases.pop(lease_id)
        self.blocked.discard(lease_id)
        ended = self.scheduler.end_lease(lease_id)
        assert ended is not None
        if isinstance(owner, int):
            assert ended.token == owner
            del self.tokens[owner]
        else:
            assert (ended.client, ended.class_id) == owner

    def some(self, number: int) -> int:
        return sorted(self.leases)[number % len(self.leases)]

    def apply(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("demand", client, request, want):
                self.scheduler.set_demand(client, request, want, REQUESTS[request])
                self.wants[client, request] = want
            case ("dispatch", max_grants):
                self.grant(max_grants)
            case ("end", number) if self.leases:
                self.end(self.some(number))
            case ("block", number) if self.leases:
                self.blocked.add(self.some(number))
                assert self.scheduler.block(self.some(number))
            case ("unblock", number) if self.leases:
                self.blocked.discard(self.some(number))
                assert self.scheduler.unblock(self.some(number))
            case ("drop", client):
                mine = {
                    lease
                    for lease, (owner, _) in self.leases.items()
                    if not isinstance(owner, int) and owner[0] == client and lease not in self.dropped
                }
                assert set(self.scheduler.drop_client(client)) == mine
                self.dropped |= mine
                self.wants = {key: want for key, want in self.wants.items() if key[0] != client}
            case ("dedicate", token, request):
                assert self.scheduler.allocate_dedicated(token, REQUESTS[request], self.now_ms) == (
                    token not in self.tokens
                )
                self.tokens.setdefault(token, request)
            case ("cancel", token):
                lease = self.scheduler.cancel_dedicated(token)
                if lease is None:
                    self.tokens.pop(token, None)
                else:
                    assert self.leases[lease][0] == token
            case ("reclaims", elapsed_ms):
                self.now_ms += elapsed_ms
                found = self.scheduler.reclaims(self.now_ms)
                asked = [reclaim.client for reclaim in found if reclaim.lease_id is None]
                assert len(asked) == len(set(asked))
                for reclaim in found:
                    assert self.held((reclaim.client, reclaim.class_id)) > 0
                    if reclaim.lease_id is not None:
                        assert self.leases[reclaim.lease_id][0] == (reclaim.client, reclaim.class_id)
                        assert reclaim.lease_id not in self.recalled
                        self.recalled.add(reclaim.lease_id)
            case ("total", total):
                self.scheduler.set_total(total)
                self.total = total


@settings(max_examples=4 * settings().max_examples)
@given(st.lists(events, min_size=20, max_size=80))
def test_resources_are_conserved_and_demand_is_respected(sequence: list[tuple[Any, ...]]) -> None:
    model = Model()
    for event in sequence:
        model.apply(event)
        model.check()
    for client in (b"a", b"b", b"c"):
        model.apply(("drop", client))
    for lease_id in list(model.leases):
        model.end(lease_id)
    for token in list(model.tokens):
        assert model.scheduler.cancel_dedicated(token) is None
    assert model.scheduler.available == model.scheduler.total
    assert not model.scheduler.waiting
    assert not model.scheduler.demands()
    assert not model.scheduler.leases()
    assert not model.scheduler.infeasible()
    assert model.scheduler.reclaims(1e9) == []


@given(
    st.lists(st.tuples(clients, st.integers(0, 6)), min_size=3, max_size=12, unique=True),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_nobody_starves_while_holders_give_back_what_is_recalled(
    demands: list[tuple[bytes, int]], hold_rounds: int, random: Any
) -> None:
    """Leases end by themselves after up to `hold_rounds` rounds of 10 ms if recalled; others last for ever."""
    scheduler = LeaseScheduler(TOTAL)
    served: set[tuple[bytes, int]] = set()
    ending: list[tuple[int, int]] = []
    for round_number in range(1_500):
        now_ms = round_number * 10
        if round_number < 20:
            client, request = demands[round_number % len(demands)]
            scheduler.set_demand(client, request, 50, REQUESTS[request])
        for reclaim in scheduler.reclaims(now_ms):
            if reclaim.lease_id is not None:
                ending.append((round_number + random.randint(1, hold_rounds), reclaim.lease_id))
        for due, lease_id in ending:
            if due <= round_number:
                scheduler.end_lease(lease_id)
        ending = [item for item in ending if item[0] > round_number]
        for grant in scheduler.dispatch(now_ms, 100):
            assert isinstance(grant, Grant)
            served.add((grant.client, grant.class_id))
        if len(served) == len(demands):
            return
    raise AssertionError(f"never served: {set(demands) - served}")
