"""The script that puts figures into the README."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_numbers", ROOT / ".ci" / "readme_numbers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmark(name: str, **systems: float) -> dict[str, Any]:
    return {
        "name": name,
        "title": f"title of {name}",
        "unit": "/s",
        "more_is_better": True,
        "limit": 4_000,
        "systems": {
            system: {"median": value, "min": 1.0, "max": 2.0, "ratio": systems.get("ftray", 1.0) / value}
            for system, value in systems.items()
        },
    }


def test_figures_stand_between_the_marks_and_nothing_else_changes(script: ModuleType) -> None:
    readme = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    made = script.with_table(readme, {"benchmarks": [benchmark("a", ftray=5_000.0, pool=1_000.0, ray=500.0)]})
    assert made.startswith(f"before\n{script.BEGIN}\n| |") and made.endswith(f"|\n{script.END}\nafter\n")
    assert "| title of a | 5,000 /s | 1.00 – 2.00 | ≥ 4,000 | pool 1,000 (5.00×), Ray 500 (10×) |\n" in made
    assert script.with_table(made, {"benchmarks": [benchmark("a", ftray=5_000.0, pool=1_000.0, ray=500.0)]}) == made


def test_failed_benchmarks_and_missing_marks_are_errors(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="these failed: a"):
        script.with_table(f"{script.BEGIN}{script.END}", {"benchmarks": [benchmark("a", pool=1.0)]})
    with pytest.raises(ValueError, match="has no"):
        script.with_table("nothing", {"benchmarks": [benchmark("a", ftray=1.0)]})


def test_the_readme_has_the_marks(script: ModuleType) -> None:
    assert script.with_table((ROOT / "README.md").read_text(encoding="utf-8"), {"benchmarks": []})
