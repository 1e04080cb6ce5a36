"""An environment that has Ray, and what the figures were measured on.

Role: shell. Ray is installed once, into a virtual environment of its own in the user's cache: it does not meet our
dependencies, and is not asked for by those who do not compare.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from ftray import __version__
from ftray.perf.runner import SOURCE, BenchmarkError

RAY_VERSION = "2.60.0"
PYTHON_VARIABLE = "FTRAY_RAY_PYTHON"
"""Names an interpreter that has Ray; then nothing is installed."""


def interpreter_of(system: str, say: Callable[[str], None]) -> str:
    """An interpreter that has another system; `say` gets a line about what takes long.

    Raises ValueError for a system that we do not know, BenchmarkError if it cannot be had.
    """
    if system != "ray":
        raise ValueError(f"cannot compare with {system!r}, only with ray")
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        version_of(named, system)
        return named
    return _installed(cache_folder(), say)


def cache_folder() -> Path:
    """Where Ray's environment is, or will be."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    major, minor = sys.version_info[:2]
    return Path(cache) / "ftray" / f"bench-ray-{RAY_VERSION}-py{major}.{minor}"


def _installed(folder: Path, say: Callable[[str], None]) -> str:
    python, complete = folder / "bin" / "python", folder / "complete"
    if complete.exists() and python.exists():
        return str(python)
    say(f"installing ray {RAY_VERSION} into {folder} (once; about 80 MB are downloaded)")
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", f"ray=={RAY_VERSION}"]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], install):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BenchmarkError(f"cannot run {command[0]}: {error.strerror}") from None
        if done.returncode != 0:
            raise BenchmarkError(
                f"ray {RAY_VERSION} cannot be installed for Python {platform.python_version()}: "
                f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr.strip()[-1_500:]}\n"
                f"Install Ray yourself, and name the interpreter that has it in {PYTHON_VARIABLE}."
            )
    version_of(str(python), "ray")
    complete.touch()
    return str(python)


def version_of(python: str, system: str) -> str:
    """The version of a system that an interpreter has. Raises BenchmarkError if it has none."""
    try:
        done = subprocess.run(
            [python, "-c", f"import {system}; print({system}.__version__)"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise BenchmarkError(f"cannot run {python}: {error.strerror}") from None
    if done.returncode != 0:
        raise BenchmarkError(
            f"{python} cannot import {system}: {done.stderr.strip()[-500:]}\nName an interpreter that has it in "
            f"{PYTHON_VARIABLE}, or unset that: then {system} is installed into an environment of its own"
        )
    return done.stdout.strip()


# --- the machine ----------------------------------------------------------------------------------------------------


def facts(other: dict[str, str]) -> dict[str, str]:
    """Date, machine and versions, for the page and for JSON. `other`: system -> interpreter."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores usable",
        "memory": f"{_memory_gib():.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "ftray": f"{__version__} {_commit()}".strip(),
        **{system: version_of(python, system) for system, python in other.items()},
        **{name: metadata.version(name) for name in ("msgspec", "trio", "cloudpickle")},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _commit() -> str:
    """Of the tree that is measured: `(commit 1a2b3c4)`, with "and changes" if some are not committed; else empty."""
    try:
        head = subprocess.run(
            ["git", "-C", str(SOURCE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        changed = subprocess.run(
            ["git", "-C", str(SOURCE), "status", "--porcelain", "--", "ftray"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return ""
    if head.returncode != 0 or not (SOURCE / ".git").exists():
        return ""
    return f"(commit {head.stdout.strip()}{' and changes' if changed.stdout.strip() else ''})"
