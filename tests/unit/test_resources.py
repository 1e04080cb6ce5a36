"""Resources: parsing what users write, and a node's accounts."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from ftray.scheduling.resources import NodeResources, ResourceAccountingError, ResourceSet, parse_resources


def test_parse_keeps_what_is_given_and_drops_zeros() -> None:
    assert parse_resources() == {}
    assert parse_resources(2, 1, 1 << 30, {"disk": 0.5, "none": 0}) == {
        "CPU": 2.0,
        "GPU": 1.0,
        "memory": float(1 << 30),
        "disk": 0.5,
    }
    assert parse_resources(num_cpus=0) == {}


@pytest.mark.parametrize("value", [0.0001, 0.0007, 0.1 + 0.2, 0.9999, np.float64(0.5), np.int64(2), Fraction(1, 4)])
def test_parse_accepts_numbers_of_any_make(value: Any) -> None:
    assert parse_resources(num_cpus=value)["CPU"] == pytest.approx(float(value))


def test_parse_rounds_memory_up_to_bytes() -> None:
    assert parse_resources(memory=0.1 * 1024**3) == {"memory": float(math.ceil(0.1 * 1024**3))}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_cpus": -1}, ValueError, "num_cpus=-1 is negative"),
        ({"num_cpus": -math.inf}, ValueError, "negative"),
        ({"num_cpus": math.nan}, ValueError, "not a finite"),
        ({"num_gpus": math.inf}, ValueError, "not a finite"),
        ({"memory": 1 << 70}, ValueError, "too large"),
        ({"num_cpus": 10**400}, ValueError, "too large"),
        ({"num_cpus": "2"}, TypeError, "num_cpus must be a number, not '2'"),
        ({"num_cpus": 1j}, TypeError, "must be a number"),
        ({"num_cpus": True}, TypeError, "must be a number, not True"),
        ({"num_cpus": 0.00015}, ValueError, "finer than 1/10,000"),
        ({"num_cpus": 1 / 3}, ValueError, "finer than 1/10,000"),
        ({"num_gpus": 1.5}, ValueError, "given out whole; ask for 2"),
        ({"resources": {"CPU": 1}}, ValueError, "use the option num_cpus"),
        ({"resources": {"GPU": 1}}, ValueError, "use the option num_gpus"),
        ({"resources": {"memory": 1}}, ValueError, "use the option memory"),
        ({"resources": {"": 1}}, ValueError, "name is empty"),
        ({"resources": {" ": 1}}, ValueError, "name is empty"),
        ({"resources": {3: 1}}, TypeError, "must be a string"),
        ({"resources": {"disk": None}}, TypeError, r"resources\['disk'\] must be a number"),
        ({"resources": [("disk", 1)]}, TypeError, "must be a dict"),
    ],
)
def test_parse_refuses(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        parse_resources(**arguments)


def test_sets_are_equal_by_value_and_hashable() -> None:
    one = ResourceSet.of({"CPU": 1, "disk": 0.25})
    assert one == ResourceSet.of({"disk": 0.25, "CPU": 1.0, "GPU": 0})
    assert len({one, ResourceSet.of({"disk": 0.25, "CPU": 1})}) == 1
    assert one.amounts() == {"CPU": 1.0, "disk": 0.25}
    assert not ResourceSet.of({})
    with pytest.raises(ValueError, match="CPU=-1 is negative"):
        ResourceSet.of({"CPU": -1})


def test_ten_tenths_are_one() -> None:
    node = NodeResources(ResourceSet.of({"CPU": 1}))
    tenth = ResourceSet.of({"CPU": 0.1})
    for _ in range(10):
        node.allocate(tenth)
    assert not node.fits(tenth)
    assert node.available == {"CPU": 0.0}
    for _ in range(10):
        node.release(tenth)
    assert node.available == node.total == {"CPU": 1.0}


def test_allocate_refuses_what_does_not_fit_and_release_what_is_not_held() -> None:
    node = NodeResources(ResourceSet.of({"CPU": 1, "GPU": 1}))
    with pytest.raises(ResourceAccountingError, match="2 CPU asked"):
        node.allocate(ResourceSet.of({"CPU": 2}))
    node.allocate(ResourceSet.of({"CPU": 1}))
    with pytest.raises(ResourceAccountingError, match="released 1 GPU that is not held"):
        node.release(ResourceSet.of({"CPU": 1, "GPU": 1}))
    assert node.available == {"CPU": 0.0, "GPU": 1.0}
    with pytest.raises(ResourceAccountingError):
        node.release(ResourceSet.of({"disk": 1}))


def test_force_allocate_goes_below_zero_and_comes_back() -> None:
    node = NodeResources(ResourceSet.of({"CPU": 1}))
    one = ResourceSet.of({"CPU": 1})
    node.allocate(one)
    node.force_allocate(one)
    assert node.available == {"CPU": -1.0}
    assert node.short(one) == {"CPU": 20_000}
    node.release(one)
    assert not node.fits(one)
    node.release(one)
    assert node.fits(one)


def test_missing_says_what_and_how_much() -> None:
    node = NodeResources(ResourceSet.of({"CPU": 1, "memory": 4 << 30}))
    assert node.missing(ResourceSet.of({"CPU": 1})) == ""
    assert node.missing(ResourceSet.of({"CPU": 2})) == "2 CPU asked, the node has 1 in all"
    assert node.missing(ResourceSet.of({"CPU": 2, "GPU": 0.5})) == (
        "2 CPU asked, the node has 1 in all; 0.5 GPU asked, the node has none"
    )
    assert node.missing(ResourceSet.of({"memory": 8 << 30})) == "8 GiB memory asked, the node has 4 GiB in all"
    node.allocate(ResourceSet.of({"CPU": 0.75}))
    assert node.missing(ResourceSet.of({"CPU": 1})) == "1 CPU asked, 0.25 of 1 free"
    assert not node.feasible(ResourceSet.of({"GPU": 1}))
    assert node.feasible(ResourceSet.of({"CPU": 1}))
    assert not node.feasible(ResourceSet.of({"CPU": 1}), besides={"CPU": 1})


def test_total_changes_keep_what_is_held() -> None:
    node = NodeResources(ResourceSet.of({"CPU": 4, "disk": 2}))
    held = ResourceSet.of({"CPU": 3, "disk": 1})
    node.allocate(held)
    node.set_total(ResourceSet.of({"CPU": 2, "GPU": 1}))
    assert node.available == {"CPU": -1.0, "disk": -1.0, "GPU": 1.0}
    node.release(held)
    assert node.available == node.total == {"CPU": 2.0, "GPU": 1.0}
