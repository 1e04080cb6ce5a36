"""Schedules of faults as files: what `ftray sim run --schedule` reads, and what is written of a schedule that fails.

Role: shell (it reads and writes files). A file is JSON: `{"version": 1, "replay": ..., "faults": [{"number": 0,
"at_ms": 1200.0, "kind": "kill", ...}, ...]}`. Numbers are written so that they are read back exactly, so a replay has
the same trace.

Rules: what is wrong with a file is named, with the place; nothing of a wrong file is used. A file is written under a
name that follows from its faults, so that none takes the place of another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ftray.sim.faults import KINDS, LEADER, Fault

VERSION = 1
FAULTS_MAX = 10_000
DURATION_MAX_MS = 600_000.0
NAMES = tuple(name for kind in KINDS.values() for name, _ in kind)


class ScheduleError(ValueError):
    """A file is no schedule, or none for this cluster. The message says what is wrong, and where."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    faults: list[Fault]
    replay: str = ""
    """How it was run, for people."""


def problem(fault: Fault, heads: int, clients: int, length_ms: float) -> str:
    """What is wrong with a fault, for a cluster of that size and faults that happen for that long; "" if nothing is."""
    if fault.kind not in NAMES:
        return f"there is no fault {fault.kind!r}: there are {', '.join(NAMES)}"
    if not 0.0 <= fault.at_ms < length_ms:
        return f"at_ms is {fault.at_ms:g}: faults happen from 0 to {length_ms:g} ms (--seconds)"
    if not 0.0 < fault.duration_ms <= DURATION_MAX_MS:
        return f"duration_ms is {fault.duration_ms:g}: it must be above 0, and at most {DURATION_MAX_MS:g}"
    if not 0.0 <= fault.amount <= 1.0:
        return f"amount is {fault.amount:g}: it must be from 0 to 1"
    if fault.kind.endswith("_client"):
        if not 0 <= fault.target < max(1, clients):
            return f"target is {fault.target}: there are {clients} clients, from 0 (--clients)"
    elif fault.target != LEADER and not 0 <= fault.target < heads:
        return f"target is {fault.target}: there are {heads} heads, from 0, and {LEADER} is the leader (--heads)"
    if not 0 <= fault.other < heads:
        return f"other is {fault.other}: there are {heads} heads, from 0 (--heads)"
    return ""


def check(faults: Sequence[Fault], heads: int, clients: int, length_ms: float) -> None:
    """Raises ScheduleError unless the faults can happen in such a cluster."""
    seen: set[int] = set()
    for place, fault in enumerate(faults):
        wrong = problem(fault, heads, clients, length_ms)
        if not wrong and fault.number in seen:
            wrong = f"two faults have the number {fault.number}"
        if wrong:
            raise ScheduleError(f"faults[{place}]: {wrong}")
        seen.add(fault.number)


def read(path: Path) -> tuple[Fault, ...]:
    """The faults of a file, in its order. Raises ScheduleError, also when it can't be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ScheduleError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ScheduleError(f"{path} is no schedule: {error}") from None
    if file.version != VERSION:
        raise ScheduleError(f"{path} has version {file.version}; this ftray knows version {VERSION}")
    if len(file.faults) > FAULTS_MAX:
        raise ScheduleError(f"{path} has {len(file.faults)} faults; there may be {FAULTS_MAX}")
    return tuple(file.faults)


def encode(faults: Sequence[Fault], replay: str = "") -> bytes:
    """The bytes of a file. Raises ValueError for numbers that are not finite."""
    if not all(math.isfinite(each) for fault in faults for each in (fault.at_ms, fault.duration_ms, fault.amount)):
        raise ValueError("a time, a duration or an amount is not finite")
    return msgspec.json.format(msgspec.json.encode(_File(VERSION, list(faults), replay)), indent=1) + b"\n"


def file_name(seed: int, faults: Sequence[Fault]) -> str:
    """A name that only these faults of this seed have."""
    digest = hashlib.blake2b(encode(faults), digest_size=4).hexdigest()
    return f"ftray-sim-{seed}-{digest}.json"
