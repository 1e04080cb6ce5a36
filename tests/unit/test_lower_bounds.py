"""The script that pins the lowest allowed versions, and that pyproject.toml gives it something to pin."""

from __future__ import annotations

import importlib.util
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lower_bounds", ROOT / ".ci" / "lower_bounds.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("requirement", "constraint"),
    [
        ("trio>=0.27.0", "trio==0.27.0"),
        ("a.b-c >= 1.2 , <3", "a.b-c==1.2"),
        ("d!=1.4,>=1.3", "d==1.3"),
        ("pkg[extra]>=2", "pkg==2"),
        ("pkg>=2; python_version < '3.12'", "pkg==2; python_version < '3.12'"),
    ],
)
def test_a_requirement_becomes_its_lowest_version(script: ModuleType, requirement: str, constraint: str) -> None:
    assert script.lower_bound(requirement) == constraint


@pytest.mark.parametrize("requirement", ["trio", "trio<1", "trio; python_version >= '3.12'", "", ">=1"])
def test_a_requirement_without_lower_bound_is_refused(script: ModuleType, requirement: str) -> None:
    with pytest.raises(ValueError, match="has no lower bound"):
        script.lower_bound(requirement)


def test_every_dependency_of_the_project_is_pinned_and_installed(script: ModuleType) -> None:
    lines = script.constraints(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    names = [line.partition("==")[0] for line in lines]
    assert {"trio", "pysyncobj", "pytest"} <= set(names)
    for name in names:
        assert version(name)
