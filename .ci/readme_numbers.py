"""Put figures into the README: the table between its two `numbers` marks.

Usage: ftray microbenchmark [--against ray --write docs/benchmarks.md] --json | python .ci/readme_numbers.py [README.md]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftray.perf.figures import shown  # noqa: E402
from ftray.perf.page import NAMES  # noqa: E402

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
HEAD = "| | median | min – max | limit | others, and how many times ours is better |\n" + (
    "| --- | ---: | ---: | ---: | --- |\n"
)


def row(benchmark: dict[str, Any]) -> str:
    """One line of the table."""
    systems = dict(benchmark["systems"])
    ours, unit = systems.pop("ftray"), benchmark["unit"]
    sign = "≥" if benchmark["more_is_better"] else "≤"
    limit = "" if benchmark["limit"] is None else f"{sign} {shown(benchmark['limit'])}"
    others = [
        f"{NAMES.get(name, name)} {shown(each['median'])} ({shown(each['ratio'])}×)" for name, each in systems.items()
    ]
    cells = [
        benchmark["title"],
        f"{shown(ours['median'])} {unit}",
        f"{shown(ours['min'])} – {shown(ours['max'])}",
        limit,
        ", ".join(others),
    ]
    return "| " + " | ".join(cells) + " |\n"


def with_table(readme: str, measured: dict[str, Any]) -> str:
    """The README with the figures. Raises ValueError if the marks are missing or a benchmark failed."""
    failed = [each["name"] for each in measured["benchmarks"] if "ftray" not in each["systems"]]
    if failed:
        raise ValueError(f"these failed: {', '.join(failed)}")
    table = HEAD + "".join(row(each) for each in measured["benchmarks"])
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"the file has no {BEGIN} ... {END}")
    return pattern.sub(lambda match: f"{BEGIN}\n{table}{END}", readme)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "README.md")
    path.write_text(with_table(path.read_text(encoding="utf-8"), json.load(sys.stdin)), encoding="utf-8")
