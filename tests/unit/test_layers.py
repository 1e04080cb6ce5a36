"""The rules of ARCHITECTURE.md as a test: logic does no I/O, and rooms import only what the map allows.

Two checks, both on the syntax tree, so that nothing is imported and half-written rooms can be checked too:

- *Purity*: a logic module imports nothing that can do I/O, read a clock or draw randomness, not even for type hints or
  inside a function, and none of our own shells.
- *Layers*: each room imports only rooms that the table below allows. Imports under `if TYPE_CHECKING:` are
  exempt, since they are not executed.

Rejected: checking `sys.modules` after an import. It blames a room for what its libraries import, and can't see an
import inside a function.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

IMPURE = frozenset(
    ("trio", "socket", "time", "random", "os", "threading", "select", "subprocess", "signal", "asyncio", "logging")
)

# Rooms and single modules whose code is logic, and shells inside them.
LOGIC = (
    "ftray.ownership",
    "ftray.scheduling",
    "ftray.store",
    "ftray.gcs.state",
    "ftray.runtime_env",
    "ftray.wire.frames",
    "ftray.wire.group_messages",
    "ftray.wire.handshake",
    "ftray.wire.head_messages",
    "ftray.wire.messages",
    "ftray.wire.values",
    "chaos.checkers",
)
SHELLS_IN_LOGIC_ROOMS = ("ftray.store.arena", "ftray.store.spill_io")

LEAVES = ("ftray.ids", "ftray.config", "ftray.exceptions")
CORE = (*LEAVES, "ftray.runtime_env", "ftray.wire", "ftray.ownership", "ftray.scheduling", "ftray.store", "ftray.gcs")
BELOW_API = (*CORE, "ftray.raylet", "ftray.worker")
EVERYTHING = ("ftray", "ftray.*", "chaos")

# Who may import whom. A name stands for itself and all below it, but "ftray" is only the package's own module of public
# names, and "ftray.*" is all of ours. A room may always import itself.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "ftray": ("ftray.api", "ftray.exceptions"),
    "ftray.ids": (),
    "ftray.config": (),
    "ftray.exceptions": (),
    "ftray.runtime_env": ("ftray.ids", "ftray.exceptions"),
    "ftray.wire": LEAVES,
    "ftray.ownership": (*LEAVES, "ftray.wire.messages"),
    "ftray.scheduling": LEAVES,
    "ftray.store": LEAVES,
    "ftray.gcs.state": LEAVES,
    "ftray.gcs": (*LEAVES, "ftray.gcs.state", "ftray.wire"),
    "ftray.raylet": CORE,
    "ftray.worker": CORE,
    "ftray.api": BELOW_API,
    "ftray.util": ("ftray", "ftray.api", *BELOW_API),
    "ftray.cli": EVERYTHING,
    "ftray.demo": EVERYTHING,
    "ftray.perf": EVERYTHING,
    "ftray.sim": (*CORE, "chaos.checkers"),
    "chaos": EVERYTHING,
    "chaos.checkers": (),
}


@dataclass(frozen=True, slots=True)
class Import:
    """One module named by an import statement."""

    target: str
    line: int
    for_types_only: bool


def is_within(module: str, room: str) -> bool:
    if room == "ftray.*":
        return module.startswith("ftray.")
    return module == room or (room != "ftray" and module.startswith(room + "."))


def room_of(module: str) -> str | None:
    """The longest entry of the table that contains the module, or None."""
    return max((room for room in MAY_IMPORT if is_within(module, room)), key=len, default=None)


def is_logic(module: str) -> bool:
    return any(is_within(module, room) for room in LOGIC) and not any(
        is_within(module, shell) for shell in SHELLS_IN_LOGIC_ROOMS
    )


def statements_for_types(tree: ast.Module) -> set[ast.stmt]:
    """All statements in the body of an `if TYPE_CHECKING:`. Its `else` is executed, and not among them."""
    guarded: set[ast.stmt] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            guarded.update(inner for stmt in node.body for inner in ast.walk(stmt) if isinstance(inner, ast.stmt))
    return guarded


def imports(module: str, source: str, *, is_package: bool, known: frozenset[str]) -> Iterator[Import]:
    """Each import of a module, with relative ones made absolute.

    `from a import b` names the module `a.b` if that is one of `known`, else `a`.
    """
    tree = ast.parse(source)
    guarded = statements_for_types(tree)
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, node in guarded)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            for name in dict.fromkeys(f"{base}.{alias.name}" for alias in node.names):
                yield Import(name if name in known else base, node.lineno, node in guarded)


def violations(module: str, source: str, known: frozenset[str], *, is_package: bool = False) -> list[str]:
    """What a module imports against the rules, one line each; empty if all is well."""
    room = room_of(module)
    # A module at the top that is no room (a demo, a facade) is above all rooms.
    allowed = EVERYTHING if room is None else (room, *MAY_IMPORT[room])
    logic = is_logic(module)
    found = []
    for item in imports(module, source, is_package=is_package, known=known):
        top = item.target.partition(".")[0]
        where = f"{module}:{item.line} imports {item.target}"
        if logic and top in IMPURE:
            found.append(f"{where}: logic takes time, randomness and results of I/O as arguments")
        elif top in ("ftray", "chaos") and not item.for_types_only:
            if logic and not is_logic(item.target) and not any(is_within(item.target, leaf) for leaf in LEAVES):
                found.append(f"{where}: logic imports logic and leaves only")
            elif not any(is_within(item.target, name) for name in allowed):
                found.append(f"{where}: {room} may import {', '.join(allowed[1:]) or 'nothing of ours'}")
    return found


def project_modules() -> dict[str, Path]:
    """Path of each module of the packages, by its dotted name."""
    paths = sorted(path for tree in ("ftray", "chaos") for path in (ROOT / tree).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = project_modules()
# What the map names is known before it is written.
MAPPED = frozenset(MAY_IMPORT) | frozenset(LOGIC) | frozenset(SHELLS_IN_LOGIC_ROOMS)


def test_the_project_keeps_to_the_map() -> None:
    known = MAPPED | frozenset(MODULES)
    found = [
        line
        for module, path in MODULES.items()
        for line in violations(module, path.read_text(encoding="utf-8"), known, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(["imports against ARCHITECTURE.md:", *found])


def test_every_package_is_on_the_map() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    unknown = sorted(name for name in packages if room_of(name) is None)
    assert not unknown, f"enter these in ARCHITECTURE.md and in MAY_IMPORT: {unknown}"


def test_every_room_of_the_architecture_page_is_in_the_table() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"`([\w/.]+)`", row)}
    assert names, "ARCHITECTURE.md has no table of rooms"
    dotted = {
        ".".join(
            [
                *(() if name.startswith("chaos/") else ("ftray",)),
                *name.removeprefix("ftray/").removesuffix("/").removesuffix(".py").split("/"),
            ]
        ).removesuffix(".__init__")
        for name in names
    }
    assert dotted <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("module", "source", "blamed"),
    [
        # purity
        ("ftray.ownership.tasks", "import time", "time"),
        ("ftray.ownership.tasks", "import os.path", "os.path"),
        ("ftray.ownership.tasks", "from random import Random", "random"),
        ("ftray.scheduling.leases", "def f():\n    import socket", "socket"),
        ("ftray.scheduling.leases", "try:\n    import trio\nexcept ImportError:\n    pass", "trio"),
        ("ftray.gcs.state.tables", "import typing\nif typing.TYPE_CHECKING:\n    import asyncio", "asyncio"),
        ("ftray.wire.handshake", "import logging", "logging"),
        ("ftray.store.objects", "from . import arena", "ftray.store.arena"),
        ("ftray.store.objects", "from .arena import Arena", "ftray.store.arena"),
        ("ftray.wire.frames", "from ftray.wire import reactor", "ftray.wire"),
        # layers
        ("ftray.ownership.tasks", "from ftray.wire import frames", "ftray.wire.frames"),
        ("ftray.ownership.tasks", "from ftray.scheduling import leases", "ftray.scheduling"),
        ("ftray.scheduling.leases", "import ftray.wire.messages", "ftray.wire.messages"),
        ("ftray.gcs.state.tables", "from ..client import Client", "ftray.gcs.client"),
        ("ftray.gcs.server", "from ftray.store import arena", "ftray.store.arena"),
        ("ftray.raylet.node", "from ..worker import core", "ftray.worker"),
        ("ftray.worker.core", "def f():\n    from ftray.raylet import node", "ftray.raylet"),
        ("ftray.worker.core", "import ftray", "ftray"),
        ("ftray.worker.core", "from ftray import get", "ftray"),
        ("ftray.api.actors", "from ftray import cli", "ftray.cli"),
        ("ftray.ids", "from . import config", "ftray.config"),
        ("ftray.exceptions", "from .wire.messages import Hello", "ftray.wire.messages"),
        ("ftray.worker.core", "import chaos.suites", "chaos.suites"),
        ("chaos.checkers.history", "import time", "time"),
        ("chaos.checkers.history", "from ftray import exceptions", "ftray.exceptions"),
        ("chaos.checkers.history", "from chaos import suites", "chaos"),
        (
            "ftray.worker.core",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ftray\nelse:\n    import ftray.raylet",
            "ftray.raylet",
        ),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, blamed: str) -> None:
    (line,) = violations(module, source, MAPPED)
    assert f" imports {blamed}:" in line
    assert line.startswith(f"{module}:")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ftray.ownership.tasks", "import heapq\nfrom collections import deque\nimport timeit_not_time"),
        (
            "ftray.ownership.tasks",
            "from ..wire import messages\nfrom ftray.wire.messages import Push\nimport ftray.ids",
        ),
        ("ftray.ownership.tasks", "from .references import ReferenceTable"),
        ("ftray.wire.handshake", "import hashlib\nimport hmac\nfrom . import frames"),
        ("ftray.wire.reactor", "import select\nimport socket\nfrom .frames import Decoder"),
        ("ftray.store.arena", "import mmap\nimport os\nfrom .objects import ObjectTable"),
        ("ftray.gcs.server", "import trio\nfrom .state import tables\nfrom ftray.wire import reactor"),
        ("ftray.raylet.node", "from ftray.store import arena\nfrom ftray.gcs import server"),
        ("ftray.worker.core", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ftray.api import refs"),
        ("ftray.worker.core", "import typing\nif typing.TYPE_CHECKING:\n    import ftray"),
        ("ftray.api.actors", "from ftray.worker import core\nfrom ftray.raylet import node\nfrom .. import ids"),
        ("ftray.util.actor_pool", "import ftray\nfrom ftray.api import refs"),
        ("ftray.cli.main", "import ftray\nfrom ftray.perf import micro\nimport chaos"),
        ("ftray.demo", "import ftray\nimport time"),
    ],
)
def test_what_the_map_allows_is_not_blamed(module: str, source: str) -> None:
    assert violations(module, source, MAPPED) == []


def test_relative_imports_of_a_package_start_at_the_package() -> None:
    assert violations("ftray", "from .api import init\nfrom . import exceptions", MAPPED, is_package=True) == []
    (line,) = violations("ftray", "from .worker import core", MAPPED, is_package=True)
    assert " imports ftray.worker:" in line
    (line,) = violations("ftray.store", "from .arena import Arena", MAPPED, is_package=True)
    assert " imports ftray.store.arena:" in line
