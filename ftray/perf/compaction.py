"""What a compaction costs the turns of a head: `python -m ftray.perf.compaction [megabytes] [--actors]`.

Role: shell. One replica on real files, which is asked for small writes while its journal is compacted, a write in each
turn; then the same at once (`compact`), as it was done before, and a restart.

Prints: how long it took, the longest time between two turns, the latency of the writes before and meanwhile, the memory
that it took, and how long all of it at once stops the head.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from ftray.gcs.replica import SingleReplica
from ftray.gcs.state.commands import KvPut, encode_command
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import ActorRecord, KvRecord, Record

CLUSTER = b"C" * 16
VALUE_BYTES = 1_000
ACTOR_BYTES = 330
PAUSE_S = 0.001
"""Between turns, as the server's."""
WRITES_BEFORE = 500


def record(number: int, actors: bool) -> Record:
    if actors:
        return ActorRecord(
            number.to_bytes(16, "big"), b"j" * 16, b"w" * 16, b"n" * 16, "Class", "", "ns", 0, False, {"CPU": 1.0},
            bytes(200),
        )  # fmt: skip
    return KvRecord("n", b"%d" % number, os.urandom(VALUE_BYTES))


def filled(megabytes: int, actors: bool) -> GcsState:
    state = GcsState(CLUSTER)
    for number in range(megabytes * 1_000_000 // (ACTOR_BYTES if actors else VALUE_BYTES)):
        state.store.load(record(number, actors))
    return state


class Writer:
    """A client that writes small values, and notes how long that took."""

    def __init__(self, replica: SingleReplica) -> None:
        self._replica = replica
        self._sequence = 0

    def write(self) -> float:
        self._sequence += 1
        command = encode_command(KvPut("w", b"%d" % (self._sequence % 100), os.urandom(200)))
        began_s = time.perf_counter()
        assert self._replica.submit(b"writer", self._sequence, command).ok
        return 1000.0 * (time.perf_counter() - began_s)


def memory_mb(what: str) -> float:
    """VmRSS, or VmHWM: the most since it was reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1000.0


def shown(latencies_ms: list[float]) -> str:
    ordered = sorted(latencies_ms)
    return f"median {ordered[len(ordered) // 2]:.2f} ms, p99 {ordered[len(ordered) * 99 // 100]:.2f} ms"


def measure(state: GcsState, directory: str) -> None:
    replica = SingleReplica(directory, CLUSTER, compact_bytes=1 << 50)
    replica.state = state
    writer = Writer(replica)
    before = [writer.write() for _ in range(WRITES_BEFORE)]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    memory = memory_mb("VmRSS")
    began_s = last_s = time.perf_counter()
    replica._compactor.begin()
    meanwhile: list[float] = []
    gaps_ms: list[float] = []
    while replica._compactor.running:
        meanwhile.append(writer.write())
        time.sleep(PAUSE_S)
        now_s = time.perf_counter()
        gaps_ms.append(1000.0 * (now_s - last_s))
        last_s = now_s
    print(f"took {last_s - began_s:.2f} s in {len(gaps_ms)} turns; at most {max(gaps_ms):.1f} ms between two")
    print(f"memory: {memory_mb('VmHWM') - memory:.0f} MB more at most")
    print(f"writes before: {shown(before)}; meanwhile: {shown(meanwhile)}")
    began_s = time.perf_counter()
    replica.compact()
    print(f"all of it at once: {1000.0 * (time.perf_counter() - began_s):.0f} ms")
    replica.close()
    began_s = time.perf_counter()
    SingleReplica(directory, CLUSTER).close()
    print(f"restart: {time.perf_counter() - began_s:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("megabytes", nargs="?", type=int, default=200)
    parser.add_argument("--actors", action="store_true", help="actors in place of values of 1 KB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        measure(filled(options.megabytes, options.actors), directory)


if __name__ == "__main__":
    main()
