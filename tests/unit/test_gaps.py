"""The tables of docs/raft.md are true in so far as that can be checked: the modules and the tests that they name exist.

That each of the tests fails without what it is for was seen by breaking it; this keeps the tables from rotting.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted import PLANTED

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"`([^`]+)`")


def rows() -> Iterator[list[str]]:
    """The cells of each row, without heads and lines."""
    for line in (ROOT / "docs" / "raft.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and not cells[0].startswith("---") and cells[-1] != "tests that fail without it":
            yield cells


ROWS = list(rows())


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """All test functions, and the planted defects, which are parameters of one."""
    found = {planted.name for planted in PLANTED}
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    return found


@pytest.mark.parametrize("cells", ROWS, ids=[cells[0][:60] for cells in ROWS])
def test_a_row_names_modules_and_tests_that_exist(cells: list[str], tests: set[str]) -> None:
    modules, named = NAME.findall(cells[-2]), NAME.findall(cells[-1])
    assert modules and named
    assert [name for name in modules if not (ROOT / "ftray" / name).is_file()] == []
    assert [name for name in named if name not in tests] == []


def test_no_table_is_empty() -> None:
    assert len(ROWS) >= 30
