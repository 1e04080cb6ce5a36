"""Where bundles go: the four strategies, beside what is held, and why they find no room."""

from __future__ import annotations

import itertools
import random

import pytest

from ftray.gcs.state.group_placement import choose_nodes, missing
from ftray.gcs.state.placement import Placement, to_units
from ftray.gcs.state.tables import Bundle, BundleState, GroupRecord, Strategy


def node(number: int) -> bytes:
    return b"n%03d" % number


def cluster(*nodes: dict[str, float]) -> Placement:
    placement = Placement()
    for number, resources in enumerate(nodes):
        placement.set_node(node(number), resources)
    return placement


def group(strategy: Strategy, *bundles: dict[str, float], kept: tuple[int, ...] = ()) -> GroupRecord:
    """The first ones are on the nodes `kept` already."""
    made = [
        Bundle(each, BundleState.COMMITTED, node(kept[at]), 0) if at < len(kept) else Bundle(each)
        for at, each in enumerate(bundles)
    ]
    return GroupRecord(b"g", b"j", None, b"", "", "", strategy, True, made)


def cpus(*amounts: float) -> list[dict[str, float]]:
    return [{"CPU": amount} for amount in amounts]


def chosen(placement: Placement, wanted: GroupRecord) -> list[int] | None:
    """Numbers of the nodes, in the order of the bundles that had none."""
    found = choose_nodes(placement, wanted)
    return None if found is None else [int(found[index][1:]) for index in sorted(found)]


def test_pack_takes_the_tightest_node_that_holds_all() -> None:
    placement = cluster(*cpus(8, 4, 6))
    assert chosen(placement, group(Strategy.PACK, *cpus(1, 2))) == [1, 1]
    assert chosen(placement, group(Strategy.PACK, *cpus(3, 2))) == [2, 2]


def test_pack_takes_few_nodes_if_no_single_one_does() -> None:
    placement = cluster(*cpus(2, 8, 4, 2))
    assert chosen(placement, group(Strategy.PACK, *cpus(1, 1, 1, 1, 1, 1, 1, 1, 1, 1))) == [1] * 8 + [0, 0]
    assert chosen(placement, group(Strategy.PACK, *cpus(3, 5, 4, 4))) in (None, [1, 1, 2, 2], [1, 1, 1, 2])


def test_pack_stays_where_the_group_is() -> None:
    placement = cluster(*cpus(8, 2, 8))
    placement.hold("kept", node(2), to_units({"CPU": 4}))
    wanted = group(Strategy.PACK, *cpus(4, 1, 3), kept=(2,))
    assert chosen(placement, wanted) == [2, 2]


def test_strict_pack_takes_one_node_or_none() -> None:
    placement = cluster(*cpus(4, 6, 4))
    assert chosen(placement, group(Strategy.STRICT_PACK, *cpus(2, 2))) == [0, 0]
    assert chosen(placement, group(Strategy.STRICT_PACK, *cpus(3, 3))) == [1, 1]
    wanted = group(Strategy.STRICT_PACK, *cpus(4, 4))
    assert chosen(placement, wanted) is None
    assert missing(placement, wanted) == (
        "8 CPU is needed on one node (STRICT_PACK); the most that any of 3 live nodes has is 6 CPU"
    )
    assert chosen(placement, group(Strategy.STRICT_PACK, *cpus(2, 2), kept=(2,))) == [2]


def test_spread_takes_as_many_nodes_as_there_are() -> None:
    placement = cluster(*cpus(4, 4, 4))
    assert sorted(chosen(placement, group(Strategy.SPREAD, *cpus(1, 1, 1))) or ()) == [0, 1, 2]
    assert sorted(chosen(placement, group(Strategy.SPREAD, *cpus(1, 1, 1, 1, 1))) or ()) == [0, 0, 1, 1, 2]
    assert chosen(placement, group(Strategy.SPREAD, *cpus(1, 1, 1), kept=(0, 2))) == [1]


def test_spread_prefers_nodes_that_are_used_less() -> None:
    placement = cluster(*cpus(4, 4, 4))
    placement.hold("actor", node(0), to_units({"CPU": 2}))
    assert sorted(chosen(placement, group(Strategy.SPREAD, *cpus(1, 1))) or ()) == [1, 2]


def test_strict_spread_takes_another_node_for_each() -> None:
    placement = cluster(*cpus(4, 4, 1))
    assert sorted(chosen(placement, group(Strategy.STRICT_SPREAD, *cpus(1, 1, 1))) or ()) == [0, 1, 2]
    wanted = group(Strategy.STRICT_SPREAD, *cpus(1, 1, 1, 1))
    assert chosen(placement, wanted) is None
    assert "4 different nodes are needed" in missing(placement, wanted)
    assert chosen(placement, group(Strategy.STRICT_SPREAD, *cpus(1, 1, 1), kept=(1, 0))) == [2]
    assert chosen(placement, group(Strategy.STRICT_SPREAD, *cpus(1, 1, 2), kept=(1, 0))) is None


def test_strict_spread_finds_a_way_if_there_is_one() -> None:
    """Against all ways, for many small cases of different bundles and nodes."""
    rng = random.Random(7)
    found = 0
    for _ in range(400):
        nodes = [{"CPU": float(rng.randint(0, 3)), "GPU": float(rng.randint(0, 2))} for _ in range(4)]
        bundles = [{"CPU": float(rng.randint(0, 3)), "GPU": float(rng.randint(0, 2))} for _ in range(rng.randint(1, 4))]
        way = any(
            all(nodes[at][name] >= each[name] for at, each in zip(order, bundles) for name in each)
            for order in itertools.permutations(range(4), len(bundles))
        )
        answer = chosen(cluster(*nodes), group(Strategy.STRICT_SPREAD, *bundles))
        assert (answer is not None) == way
        if answer is not None:
            found += 1
            assert len(set(answer)) == len(bundles)
            assert all(nodes[at][name] >= each[name] for at, each in zip(answer, bundles) for name in each)
    assert 50 < found < 350


def any_way(nodes: list[dict[str, float]], bundles: list[dict[str, float]]) -> bool:
    """Whether the bundles could lie on the nodes somehow."""
    if not bundles:
        return True
    for room in nodes:
        if all(room[name] >= amount for name, amount in bundles[0].items()):
            left = [{name: each[name] - bundles[0].get(name, 0.0) for name in each} if each is room else each
                    for each in nodes]  # fmt: skip
            if any_way(left, bundles[1:]):
                return True
    return False


@pytest.mark.parametrize("strategy", [Strategy.PACK, Strategy.SPREAD])
def test_a_few_bundles_are_placed_if_there_is_any_way(strategy: Strategy) -> None:
    """So a group that fits never waits for ever on an idle cluster, and none that can't be is said to fit."""
    rng = random.Random(3)
    tight = 0
    for _ in range(600):
        nodes = [{"CPU": float(rng.randint(1, 8)), "GPU": float(rng.randint(0, 3))} for _ in range(rng.randint(2, 3))]
        bundles = [
            {"CPU": float(rng.randint(1, 4)), "GPU": float(rng.randint(0, 1))} for _ in range(rng.randint(2, 6))
        ]
        way = any_way(nodes, bundles)
        wanted = group(strategy, *bundles)
        assert (chosen(cluster(*nodes), wanted) is not None) == way, (nodes, bundles)
        assert (missing(cluster(*nodes), wanted) == "") == way
        tight += way and sum(each["CPU"] for each in bundles) >= sum(each["CPU"] for each in nodes) - 1
    assert tight > 30


@pytest.mark.parametrize("strategy", [Strategy.PACK, Strategy.SPREAD])
@pytest.mark.parametrize("size", [1.0, 2.0, 3.0, 5.0])
def test_equal_bundles_are_placed_if_there_is_room(strategy: Strategy, size: float) -> None:
    nodes = cpus(*(float(1 + number % 9) for number in range(40)))
    most = sum(int(each["CPU"] // size) for each in nodes)
    assert chosen(cluster(*nodes), group(strategy, *cpus(*[size] * most))) is not None
    assert chosen(cluster(*nodes), group(strategy, *cpus(*[size] * (most + 1)))) is None


def test_a_search_for_a_way_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftray.gcs.state import group_placement

    looks = 0
    real = group_placement._Room.holds

    def holds(room: group_placement._Room, asked: dict[str, int]) -> bool:
        nonlocal looks
        looks += 1
        return real(room, asked)

    monkeypatch.setattr(group_placement._Room, "holds", holds)
    rng = random.Random(1)
    nodes = cpus(*(10.0 + rng.random().__round__(3) for _ in range(30)))
    bundles = cpus(*(3.4 + rng.random().__round__(3) / 10 for _ in range(60)), *[1.0] * 4)
    assert chosen(cluster(*nodes), group(Strategy.PACK, *(to_fixed(each) for each in bundles))) is not None
    looks = 0
    tight = cpus(*(3.4 + number / 1000 for number in range(64)))
    assert sum(each["CPU"] for each in tight) < 300.0
    assert chosen(cluster(*cpus(*[7.4] * 31)), group(Strategy.PACK, *(to_fixed(each) for each in tight))) is None
    assert looks < 20_000


def to_fixed(resources: dict[str, float]) -> dict[str, float]:
    return {name: round(amount, 4) for name, amount in resources.items()}


@pytest.mark.parametrize("strategy", list(Strategy))
def test_no_node_is_given_away_twice(strategy: Strategy) -> None:
    rng = random.Random(strategy.value)
    placed = 0
    for _ in range(200):
        nodes = [{"CPU": float(rng.randint(1, 8)), "disk": float(rng.randint(0, 2))} for _ in range(5)]
        placement = cluster(*nodes)
        free = [dict(each) for each in nodes]
        for at in range(5):
            held = float(rng.randint(0, 2))
            if held <= nodes[at]["CPU"]:
                placement.hold(at, node(at), to_units({"CPU": held}))
                free[at]["CPU"] -= held
        bundles = [
            {"CPU": float(rng.randint(1, 4)), "disk": float(rng.random() < 0.2)} for _ in range(rng.randint(1, 6))
        ]
        answer = chosen(placement, group(strategy, *bundles))
        if answer is None:
            continue
        placed += 1
        for at, each in zip(answer, bundles):
            for name, amount in each.items():
                free[at][name] -= amount
        assert min(amount for each in free for amount in each.values()) >= 0
    assert placed > 20


def test_what_is_scarce_comes_first() -> None:
    placement = cluster({"CPU": 8}, {"CPU": 8, "GPU": 1})
    for strategy in (Strategy.PACK, Strategy.SPREAD):
        wanted = group(strategy, {"CPU": 8}, {"CPU": 4, "GPU": 1}, {"CPU": 4})
        assert chosen(placement, wanted) == [0, 1, 1]


def test_what_is_reported_free_is_preferred_and_what_is_busy_is_taken_if_it_must() -> None:
    placement = cluster(*cpus(2, 2))
    placement.report(node(0), {"CPU": 0})
    assert chosen(placement, group(Strategy.PACK, *cpus(1, 1))) == [1, 1]
    assert chosen(placement, group(Strategy.SPREAD, *cpus(1, 1))) == [1, 1]
    assert sorted(chosen(placement, group(Strategy.PACK, *cpus(1, 1, 1))) or ()) == [0, 1, 1]


def test_the_same_picture_gives_the_same_choice() -> None:
    nodes = [{"CPU": 4.0} for _ in range(20)]
    forward, backward = Placement(), Placement()
    for number in range(20):
        forward.set_node(node(number), nodes[number])
        backward.set_node(node(19 - number), nodes[19 - number])
    for strategy in Strategy:
        wanted = group(strategy, *cpus(1, 1, 1))
        assert choose_nodes(forward, wanted) == choose_nodes(backward, wanted)


def test_what_could_never_be_held_is_said() -> None:
    placement = cluster({"CPU": 4, "GPU": 1}, {"CPU": 4})
    assert missing(placement, group(Strategy.PACK, {"CPU": 1}, {"GPU": 2})) == (
        "bundle 1 needs 2 GPU on one node; the most that any of 2 live nodes has is 1 GPU"
    )
    assert "8 live" not in missing(placement, group(Strategy.PACK, *cpus(4, 4, 4)))
    assert missing(placement, group(Strategy.PACK, *cpus(4, 4, 4))) == (
        "3 bundles need 12 CPU in all; the 2 live nodes have 8 CPU, and no way was found to divide the bundles among "
        "them"
    )
    assert missing(cluster(), group(Strategy.PACK, *cpus(1))) == "there is no live node"
    # What others hold now is no reason, and what the group itself holds is.
    placement.hold("actor", node(0), to_units({"CPU": 4}))
    assert missing(placement, group(Strategy.PACK, *cpus(4, 4))) == ""
    assert missing(placement, group(Strategy.STRICT_PACK, *cpus(3, 3), kept=(0,))).startswith(
        "3 CPU is needed on node 6e303030, where its other bundles are"
    )


def test_a_large_cluster_is_not_looked_through_for_each_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at nodes are counted, not timed: 1,000 nodes and 100 equal bundles."""
    from ftray.gcs.state import group_placement

    looks = 0
    real = group_placement._Room.holds

    def holds(room: group_placement._Room, asked: dict[str, int]) -> bool:
        nonlocal looks
        looks += 1
        return real(room, asked)

    monkeypatch.setattr(group_placement._Room, "holds", holds)
    placement = cluster(*[{"CPU": 16.0} for _ in range(1000)])
    for strategy in Strategy:
        looks = 0
        wanted = group(strategy, *cpus(*[1.0] * (8 if strategy is Strategy.STRICT_PACK else 100)))
        assert chosen(placement, wanted) is not None
        assert looks < 4_000


# --- actors -----------------------------------------------------------------------------------------------------------


def test_an_actor_without_cpu_goes_to_a_node_that_has_some() -> None:
    placement = cluster({}, {"CPU": 2})
    for _ in range(3):
        assert placement.choose({}, node(0)) == node(1)
        placement.hold(object(), node(1), {})
    assert placement.choose(to_units({"CPU": 1}), b"") == node(1)
    placement.hold("full", node(1), to_units({"CPU": 2}))
    placement.report(node(1), {"CPU": 0.0})
    assert placement.choose({}, b"") == node(1)  # it needs none
    placement.drop_node(node(1))
    assert placement.choose({}, b"") == node(0)  # nothing else is there
    heads = cluster({"disk": 1}, {"CPU": 1})
    assert heads.choose(to_units({"disk": 1}), b"") == node(0)


def test_actors_go_where_a_bundle_offers_what_they_ask_for() -> None:
    placement = cluster(*cpus(4, 4))
    asked = to_units({"CPU_group_0_aa": 1.0})
    assert placement.choose(asked, b"") is None and placement.missing(asked)
    placement.offer("bundle", node(1), to_units({"CPU_group_0_aa": 2.0}))
    assert placement.choose(asked, b"") == node(1)
    placement.set_node(node(1), {"CPU": 5})
    assert placement.choose(asked, b"") == node(1)
    placement.hold("actor", node(1), to_units({"CPU_group_0_aa": 2.0}))
    assert placement.choose(asked, b"") is None and not placement.missing(asked)
    placement.withdraw("bundle")
    assert placement.missing(asked)
    assert placement.total(node(1)) == to_units({"CPU": 5})
