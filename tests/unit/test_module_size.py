"""Modules stay small and say what they are for.

The limit is a ratchet: it may be lowered when the longest module has become shorter, and is not raised. A module that
reaches it has two purposes, and becomes two.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREES = ("ftray", "chaos", "tests", "property_tests", ".ci")
LINES_MAX = 600


def too_long(source: str, lines_max: int = LINES_MAX) -> bool:
    return len(source.splitlines()) > lines_max


def lacks_docstring(source: str) -> bool:
    """Whether a module has code and yet does not begin with a docstring."""
    tree = ast.parse(source)
    return bool(tree.body) and not (ast.get_docstring(tree) or "").strip()


def modules() -> dict[str, str]:
    """Source of each module of the project, by its path."""
    paths = (path for tree in TREES for path in (ROOT / tree).rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}


def test_no_module_is_longer_than_the_limit() -> None:
    found = {name: len(source.splitlines()) for name, source in modules().items() if too_long(source)}
    assert not found, f"longer than {LINES_MAX} lines, split by purpose: {found}"


def test_each_module_opens_with_a_docstring() -> None:
    found = [name for name, source in modules().items() if lacks_docstring(source)]
    assert not found, f"no docstring that says what the module is for and by what rules: {found}"


def test_the_checks_see_what_they_look_for() -> None:
    assert "tests/unit/test_module_size.py" in modules()
    assert too_long("x = 1\n" * (LINES_MAX + 1))
    assert not too_long("x = 1\n" * LINES_MAX)
    assert lacks_docstring("import ast\n")
    assert lacks_docstring('"""   """\nimport ast\n')
    assert not lacks_docstring("# only a comment\n")
    assert not lacks_docstring('"""Role."""\nimport ast\n')
