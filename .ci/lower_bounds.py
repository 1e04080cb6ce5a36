"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

`make test-lower-bounds` installs exactly these and runs the tests, so that a lower bound is a tested claim. Reads the
runtime dependencies and the extra `test`, with the extras of the project itself that it names (`ftray[sim]`).
A requirement without `>=` is an error: nothing could be pinned, and whatever is newest would be tested instead.

Usage: python .ci/lower_bounds.py [pyproject.toml] > constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^]]*\])?\s*(?P<rest>[^;]*)(?:;(?P<marker>.*))?")
LOWER_BOUND = re.compile(r">=\s*(?P<version>[0-9][^,\s]*)")


def lower_bound(requirement: str) -> str:
    """Turn `name>=1.2,<3; marker` into the constraint `name==1.2; marker`. Raises ValueError if there is no `>=`."""
    parts = REQUIREMENT.fullmatch(requirement.strip())
    bound = parts and LOWER_BOUND.search(parts["rest"])
    if not parts or not bound:
        raise ValueError(f"{requirement!r} has no lower bound: write it as name>=version")
    marker = f"; {parts['marker'].strip()}" if parts["marker"] else ""
    return f"{parts['name']}=={bound['version']}{marker}"


def constraints(pyproject: dict[str, Any]) -> list[str]:
    """Constraints for the runtime dependencies and the extra `test` of a parsed pyproject.toml, sorted."""
    project = pyproject["project"]
    requirements = project["dependencies"] + _extra(project, "test")
    return sorted(lower_bound(requirement) for requirement in requirements)


def _extra(project: dict[str, Any], name: str) -> list[str]:
    own = re.compile(re.escape(project["name"]) + r"\[([a-z-]+)\]")
    requirements: list[str] = []
    for requirement in project.get("optional-dependencies", {}).get(name, []):
        extra = own.fullmatch(requirement.strip())
        requirements += _extra(project, extra[1]) if extra else [requirement]
    return requirements


def main() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "pyproject.toml")
    try:
        lines = constraints(tomllib.loads(path.read_text()))
    except (OSError, ValueError, KeyError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
