"""The demo's job: map, shuffle, reduce, and an actor that gathers.

Role: an ordinary program on ftray. Nothing here knows of kills; that tasks are repeated and the gatherer is restarted
is said in their options. The files are counted in rounds, so that mapping, reducing and gathering go on side by side.

    count (map)  ──►  split (shuffle)  ──►  merge (reduce)  ──►  Gatherer.add, by round and partition
    one per chunk     one per chunk         one per partition

Rules: the gatherer has its parts in memory and loses them when it is restarted. So adding a part twice is the same as
adding it once, whoever asks for the sum says what must be in it, and what is missing is sent again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import ftray
from ftray.demo.counting import Counts, merged
from ftray.demo.trace import traced

PARTITIONS = 4
CHUNKS_PER_ROUND = 10
ROUNDS_AT_ONCE = 2
GATHERER = "constructor"
"""The gatherer's constructor in the trace."""
GATHER_PREFIX = "gather/"
"""The beginning of the names of its calls."""

PartKey = tuple[int, int]
"""Round and partition."""


def count_files(paths: Sequence[str]) -> Counts:
    """Reads and counts."""
    counts = Counts()
    for path in paths:
        with open(path, "rb") as file:
            counts.add_source(file.read())
    return counts


@ftray.remote(max_retries=-1)
def count(trace: str, task: str, paths: Sequence[str]) -> Counts:
    """Map: counts a chunk of files."""
    with traced(trace, task):
        return count_files(paths)


@ftray.remote(max_retries=-1, num_returns=PARTITIONS)
def split(trace: str, task: str, counts: Counts) -> list[Counts]:
    """Shuffle: the counts of a chunk by partition."""
    with traced(trace, task):
        return counts.split(PARTITIONS)


@ftray.remote(max_retries=-1)
def merge(trace: str, task: str, *parts: Counts) -> Counts:
    """Reduce: one partition of all chunks of a round."""
    with traced(trace, task):
        return merged(parts)


@ftray.remote(max_restarts=-1, max_task_retries=-1)
class Gatherer:
    """Has the parts that are done."""

    def __init__(self, trace: str) -> None:
        with traced(trace, GATHERER):
            self.trace = trace
            self.parts: dict[PartKey, Counts] = {}

    def add(self, key: PartKey, part: Counts) -> None:
        """Takes a part; once or several times makes no difference."""
        with traced(self.trace, f"{GATHER_PREFIX}{key[0]}/{key[1]}"):
            self.parts[key] = part

    def collect(self, keys: Sequence[PartKey]) -> tuple[list[PartKey], Counts | None]:
        """The keys that are missing here, and the sum of all parts if none is."""
        missing = [key for key in keys if key not in self.parts]
        return missing, None if missing else merged(self.parts[key] for key in keys)


def run(chunks: Sequence[Sequence[str]], trace: str) -> Counts:
    """Counts all files of all chunks, on the cluster."""
    gatherer = Gatherer.remote(trace)  # type: ignore[attr-defined]  # checkers do not apply class decorators
    parts: dict[PartKey, ftray.ObjectRef[Counts]] = {}
    adding: deque[list[ftray.ObjectRef[None]]] = deque()
    for number, start in enumerate(range(0, len(chunks), CHUNKS_PER_ROUND)):
        if len(adding) >= ROUNDS_AT_ONCE:
            ftray.get(adding.popleft())
        added = []
        for partition, part in enumerate(_submit_round(number, chunks[start : start + CHUNKS_PER_ROUND], trace)):
            parts[number, partition] = part
            added.append(gatherer.add.remote((number, partition), part))
        adding.append(added)
    for added in adding:
        ftray.get(added)
    keys = list(parts)
    while True:
        missing, total = ftray.get(gatherer.collect.remote(keys))
        if total is not None:
            result: Counts = total
            return result
        ftray.get([gatherer.add.remote(key, parts[key]) for key in missing])


def _submit_round(number: int, chunks: Sequence[Sequence[str]], trace: str) -> list[ftray.ObjectRef[Counts]]:
    """The reduced partitions of some chunks."""
    rows = []
    for index, paths in enumerate(chunks):
        counts = count.remote(trace, f"count/{number}/{index}", paths)
        rows.append(split.remote(trace, f"split/{number}/{index}", counts))
    return [
        merge.remote(trace, f"merge/{number}/{partition}", *(row[partition] for row in rows))
        for partition in range(PARTITIONS)
    ]


def tasks_in(chunk_count: int) -> int:
    """How many tasks and calls a run has in the trace, the gatherer's constructor not among them."""
    rounds = -(-chunk_count // CHUNKS_PER_ROUND)
    return 2 * chunk_count + 2 * PARTITIONS * rounds
