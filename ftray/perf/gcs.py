"""How the replicated GCS is measured: three heads as processes, with fsync, and clients in this process.

Role: as `measures.py`, for ours alone. The clients hang on one reactor that is driven by hand, so that no thread of
this process has a part in what is measured.

Rules: a kill meets a cluster that is whole and at rest: the head killed before runs again, and has caught up.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftray.cluster_utils import Cluster
    from ftray.gcs.client import GcsClient

Samples = Generator[float, None, None]

HEADS = 3
WRITES = 200
"""Of which a measurement of the latency takes the median."""
WRITERS = 64
READS_IN_FLIGHT = 64
SLICE_S = 0.4
WARM_UP_S = 0.3
LIMIT_S = 20.0
ENTRIES = 100_000
LOAD_LIMIT_S = 120.0
IDLE_S = 4.0
IDLE_WARM_UP_S = 1.0
SETTLE_S = 0.1


class Clients:
    """Clients of the cluster in this process."""

    def __init__(self, cluster: Cluster) -> None:
        from ftray.config import Config
        from ftray.wire.handshake import cluster_id_of
        from ftray.wire.reactor import Reactor

        token = bytes.fromhex(cluster.token)
        self.cluster = cluster
        self.reactor = Reactor(Config(), token, cluster_id_of(token), name="benchmark")
        self.written = 0

    def client(self) -> GcsClient:
        from ftray.gcs.client import GcsClient

        return GcsClient(self.reactor, self.cluster.endpoints, os.urandom(16))

    def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        """Drives the reactor until that holds. Raises TimeoutError."""
        deadline = time.monotonic() + limit_s
        reactor = self.reactor
        with reactor.reader:
            with reactor.lock:
                reactor.flush_dirty()
            while not condition():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not within {limit_s:g} s")
                reactor.poll(min(1.0, reactor.next_timer_s()))

    def begin_write(self, client: GcsClient, done: Callable[[Any], None]) -> None:
        from ftray.gcs.state.commands import KvPut

        self.written += 1
        client.command(KvPut("benchmark", b"%d" % (self.written % 1000), b"v" * 100), done)

    def write(self, client: GcsClient) -> float:
        """One write; returns its milliseconds."""
        results: list[Any] = []
        started = time.perf_counter()
        self.begin_write(client, results.append)
        self.until(lambda: results)
        if not results[0].ok:
            raise RuntimeError(results[0].message)
        return (time.perf_counter() - started) * 1e3


@contextmanager
def _clients() -> Iterator[Clients]:
    from ftray.cluster_utils import Cluster

    with Cluster(heads=HEADS) as cluster:
        clients = Clients(cluster)
        try:
            yield clients
        finally:
            clients.reactor.close()


def write_latency(system: Any) -> Samples:
    """Milliseconds of a write, one by one."""
    with _clients() as clients:
        client = clients.client()
        for _ in range(WRITES):
            clients.write(client)
        while True:
            yield statistics.median(clients.write(client) for _ in range(WRITES))


def _rates(clients: Clients, start: Callable[[Callable[[Any], None]], None], in_flight: int) -> Samples:
    """Operations per second with so many under way. `start(done)` begins one."""
    count = [0]
    going = [True]

    def done(_: Any = None) -> None:
        count[0] += 1
        if going[0]:
            start(done)

    for _ in range(in_flight):
        start(done)
    for slice_s in _slices():
        begun, before = time.perf_counter(), count[0]
        clients.until(lambda begun=begun, slice_s=slice_s: time.perf_counter() - begun >= slice_s)  # type: ignore[misc]
        if slice_s == SLICE_S:
            yield (count[0] - before) / (time.perf_counter() - begun)
    going[0] = False


def _slices() -> Iterator[float]:
    yield WARM_UP_S
    while True:
        yield SLICE_S


def writes_in_flight(system: Any) -> Samples:
    """Writes per second of many clients, each with one under way."""
    with _clients() as clients:
        writers = [clients.client() for _ in range(WRITERS)]
        turn = [0]

        def start(done: Callable[[Any], None]) -> None:
            turn[0] += 1
            clients.begin_write(writers[turn[0] % WRITERS], done)

        yield from _rates(clients, start, WRITERS)


def reads_in_flight(system: Any) -> Samples:
    """Fresh reads per second."""
    from ftray.gcs.state.tables import Table, kv_key

    with _clients() as clients:
        client = clients.client()
        clients.write(client)
        key = kv_key("benchmark", b"1")
        yield from _rates(clients, lambda done: client.read(Table.KV, key, done), READS_IN_FLIGHT)  # type: ignore[arg-type]


def _after(kill: Callable[[Clients, int], None], mend: Callable[[Clients, int], None]) -> Samples:
    """Milliseconds from what befalls the leader to the next write that is acknowledged."""
    with _clients() as clients:
        client = clients.client()
        while True:
            clients.write(client)
            leader = clients.cluster.leader()
            started = time.perf_counter()
            kill(clients, leader)
            clients.write(client)
            yield (time.perf_counter() - started) * 1e3
            mend(clients, leader)
            _catch_up(clients, client)


def _catch_up(clients: Clients, client: GcsClient) -> None:
    """Until all heads run, and none is behind."""
    cluster = clients.cluster
    deadline = time.monotonic() + LIMIT_S
    while True:
        clients.write(client)
        statuses = [cluster.ask_head(index) for index in range(HEADS)]
        newest = max(status["commit_index"] for status in statuses)
        linked = all(len(status["connected"]) == HEADS - 1 for status in statuses)
        if linked and all(newest - status["applied_index"] <= 1 for status in statuses):
            time.sleep(SETTLE_S)
            return
        if time.monotonic() > deadline:
            raise TimeoutError("the heads did not catch up")


def _kill(clients: Clients, leader: int) -> None:
    head = clients.cluster.heads[leader]
    assert head is not None
    os.kill(head.pid, signal.SIGKILL)


def _restart(clients: Clients, leader: int) -> None:
    clients.cluster.kill_head(leader)
    clients.cluster.restart_head(leader)


def _freeze(clients: Clients, leader: int) -> None:
    head = clients.cluster.heads[leader]
    assert head is not None
    os.kill(head.pid, signal.SIGSTOP)


def _thaw(clients: Clients, leader: int) -> None:
    head = clients.cluster.heads[leader]
    assert head is not None
    os.kill(head.pid, signal.SIGCONT)


def leader_killed(system: Any) -> Samples:
    """After SIGKILL."""
    yield from _after(_kill, _restart)


def leader_frozen(system: Any) -> Samples:
    """After SIGSTOP."""
    yield from _after(_freeze, _thaw)


def head_restarted(system: Any) -> Samples:
    """Milliseconds from the start of a head that was killed, with `ENTRIES` entries in its journal, until it is a
    member that has them all."""
    with _clients() as clients:
        writers = [clients.client() for _ in range(WRITERS)]
        cluster, left, answered = clients.cluster, [ENTRIES], [0]

        def write(client: GcsClient, _: Any = None) -> None:
            answered[0] += _ is not None
            if left[0] > 0:
                left[0] -= 1
                clients.begin_write(client, partial(write, client))

        for writer in writers:
            write(writer)
        clients.until(lambda: answered[0] >= ENTRIES, limit_s=LOAD_LIMIT_S)
        while True:
            index = (cluster.leader() + 1) % HEADS
            cluster.kill_head(index)
            started = time.perf_counter()
            cluster.restart_head(index)
            while cluster.ask_head(index)["applied_index"] < ENTRIES:
                pass
            yield (time.perf_counter() - started) * 1e3
            _catch_up(clients, writers[0])


def _idle(leads: bool) -> Samples:
    """Percent of a core that a head takes while nobody asks it anything: the leader, or a follower on average."""
    from ftray.cluster_utils import Cluster
    from ftray.perf.processes import cpu_ns

    with Cluster(heads=HEADS) as cluster:
        time.sleep(IDLE_WARM_UP_S)
        while True:
            leader = cluster.leader()
            pids = [head.pid for index, head in enumerate(cluster.heads) if head and (index == leader) is leads]
            begun, before = time.monotonic(), sum(map(cpu_ns, pids))
            time.sleep(IDLE_S)
            used_ns, passed_s = sum(map(cpu_ns, pids)) - before, time.monotonic() - begun
            if cluster.leader() == leader:  # elections are no rest
                yield 100.0 * used_ns / 1e9 / passed_s / len(pids)


def idle_leader(system: Any) -> Samples:
    """Of the head that leads."""
    yield from _idle(True)


def idle_follower(system: Any) -> Samples:
    """Of one that does not."""
    yield from _idle(False)
