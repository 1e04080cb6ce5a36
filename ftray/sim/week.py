"""A week in the life of a cluster, in virtual time: does anything grow for ever?

Role: shell around the simulation. The heads are the production code, as in `world.py`: journal with compaction, Raft,
tables, sessions, watches, managers, with the limits that they have outside. What happens is no schedule of faults but
the life of a week (`life.py`): jobs that come and go, workers with new ids, nodes that die and are replaced, actors,
exports, keys, watchers; and a head that is restarted, or another one that leads, now and then.

What is measured at each head, several times a day, and shown by its largest value of the day: rows of each table,
sessions, the change ring, entries in memory, journal, snapshot, what leader and server remember, and the memory of this
process, in which all heads, their disks and all clients are.

What must hold: no more than the caps allow, ever; and after the second day nothing that has no cap is more than
`GROWTH_MAX` of what it was on that day.

What differs from production: times. An idle head is heard every 9 s instead of every 30 ms, clients and nodes ping as
rarely: twenty million idle ticks would show nothing. Deaths are seen by closed connections, as always.

Rejected: a state machine fed with commands (shells leak, too); production's times (an hour for each day).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ftray.config import Config
from ftray.gcs import links, raft_host
from ftray.gcs.raft import log as raft_log
from ftray.gcs.raft.shell import Timing
from ftray.gcs.replica import COMPACT_BYTES
from ftray.gcs.state import sessions, store
from ftray.gcs.state import state as gcs_state
from ftray.gcs.state.tables import Change, Table
from ftray.sim import heads as sim_heads
from ftray.sim.checks import Checks
from ftray.sim.engine import Simulation
from ftray.sim.heads import Head, Hooks
from ftray.sim.life import Life
from ftray.sim.network import Network
from ftray.sim.world import _log_to

DAY_S = 86_400.0
SAMPLES = 24
"""How often a day it is measured."""
GROWTH_MAX = 1.2
CHECKED_ENTRIES = 2_000
"""That heads apply the same is checked for so many entries back."""
FORM_MS = 300_000.0
END_MS = 1_200_000.0

TIMING = Timing(election_min_ms=30_000.0, election_max_ms=60_000.0, append_ms=9_000.0, fallback_ms=60_000.0)
CONFIG = {"heartbeat_timeout_ms": 600_000, "infeasible_timeout_ms": 10**9}
CALM: tuple[tuple[Any, str, float], ...] = (
    (links, "SILENCE_MS", 100_000.0),
    (links, "SILENCE_MAX_MS", 200_000.0),
    (raft_host, "LOOK_MS", 5_000.0),
    (sim_heads, "OPERATOR_MS", 1e9),
)
"""Times that are longer than in production."""

MIB = 1 << 20
_FAILURES = Table.WORKER_FAILURES


@dataclass(frozen=True)
class Limits:
    """The limits of the production code, or smaller ones, with which a shorter time shows the same."""

    ended: Mapping[Table, int] = field(default_factory=lambda: dict(store.ENDED_MAX))
    clients: int = sessions.CLIENTS_MAX
    forgotten: int = sessions.FORGOTTEN_MAX
    ring: int = gcs_state.RING_CHANGES_MAX
    keep_entries: int = raft_log.KEEP_ENTRIES
    compact_bytes: int = COMPACT_BYTES

    @classmethod
    def small(cls) -> Limits:
        return cls(dict.fromkeys(store.ENDED_MAX, 20), 60, 40, 200, 50, 120_000)


@dataclass(frozen=True)
class Options:
    days: int = 7
    writes_per_second: float = 1.0
    heads: int = 3
    seed: int = 0
    day_s: float = DAY_S
    """How long a day is."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Column:
    """What is measured. `cap`: the most that it may be, None if that is not known; `slack`: what is no growth yet."""

    name: str
    cap: float | None = None
    slack: float = 0.0
    bytes: bool = False


def columns(limits: Limits) -> list[Column]:
    """All columns, in the order of the table."""
    live = [Column(f"live {_words(table)}", None, 30.0) for table in Table if table not in (Table.KV, _FAILURES)]
    ended = [Column(f"ended {_words(each)}", float(cap)) for each, cap in limits.ended.items() if each is not _FAILURES]
    return [
        *live,
        *ended,
        Column(_words(_FAILURES), float(limits.ended[_FAILURES])),
        Column("keys", None, 40.0),
        Column("indices", None, 100.0),
        Column("sessions", float(limits.clients)),
        Column("forgotten clients", float(limits.forgotten)),
        Column("changes kept", float(limits.ring)),
        Column("log entries in memory", None, 500.0),
        Column("journal", None, 64e3, True),
        Column("snapshot", None, 64e3, True),
        Column("watched keys", None, 30.0),
        Column("waiting reads", None, 30.0),
        Column("links", None, 30.0),
        Column("managers' memory", None, 60.0),
        Column("clients' memory", None, 60.0),
        Column("process", None, 32.0 * MIB, True),
    ]


def _words(table: Table) -> str:
    return table.value.replace("_", " ")


def judge(days: Sequence[Mapping[str, float]], all_columns: Sequence[Column]) -> list[str]:
    """What grows, or is over its cap. `days`: largest values; the later days are compared with the second."""
    found = []
    for column in all_columns:
        values = [day.get(column.name, 0.0) for day in days]
        if column.cap is not None:
            if max(values) > column.cap:
                found.append(f"{column.name}: {max(values):,.0f}, and {column.cap:,.0f} are allowed")
            continue
        most = GROWTH_MAX * values[1] + column.slack
        for number, value in enumerate(values[2:], 3):
            if value > most:
                found.append(
                    f"{column.name} grows: {value:,.0f} on day {number}, and it was {values[1]:,.0f} on day 2 "
                    f"(at most {most:,.0f} are allowed)"
                )
                break
    return found


@dataclass
class Report:
    options: Options
    columns: list[Column]
    days: list[dict[str, float]]
    """The largest values of each day, `writes` among them: all since the beginning."""
    problems: list[str]
    restarts: int = 0
    transfers: int = 0
    lives: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


class BoundedChecks(Checks):
    """The checks of the simulator that need no memory of the whole past."""

    def applied(self, head: Head, index: int, term: int, command: bytes) -> None:
        super().applied(head, index, term, command)
        self.committed.pop(index - CHECKED_ENTRIES, None)
        self.committed_in.pop(index - CHECKED_ENTRIES, None)

    def published(self, head: Head, changes: Sequence[Change]) -> None:
        super().published(head, changes)
        while len(self.changes) > CHECKED_ENTRIES:
            del self.changes[next(iter(self.changes))]


class Week:
    """One run. `progress` is told of each day's line."""

    def __init__(self, options: Options, progress: Callable[[int, Mapping[str, float]], object] | None = None) -> None:
        self.options = options
        self.progress = progress
        self.sim = sim = Simulation(options.seed)
        self.network = Network(sim, (0.2, 2.0))
        self.checks = BoundedChecks()
        hooks = Hooks(TIMING, options.limits.compact_bytes, self.checks)
        self.config = Config(**CONFIG)
        names = [f"tcp:head{number}:1" for number in range(options.heads)]
        self.heads = [Head(sim, self.network, name, names, self.config, hooks) for name in names]
        self.checks.heads = self.heads
        self.life = Life(sim, self.network, names, self.config, options.writes_per_second, self.writes)
        self.columns = columns(options.limits)
        self.rng = sim.stream("week")
        self.restarts = 0
        self.transfers = 0
        self._day: dict[str, float] = {}

    # --- a run --------------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        days: list[dict[str, float]] = []
        with _set(self.options.limits), _log_to(self.sim):
            problems = self._begin()
            day_ms = self.options.day_s * 1000.0
            begin_ms = self.sim.now_ms
            for number in range(self.options.days if not problems else 0):
                self._day = {}
                for sample in range(SAMPLES):
                    self.sim.run(begin_ms + day_ms * (number + (sample + 1) / SAMPLES), self._wrong)
                    if self._wrong():
                        break
                    self._sample()
                days.append(self._day)
                if self.progress is not None:
                    self.progress(number + 1, self._day)
                problems = self._problems()
                if problems:
                    break
            if not problems:
                problems = self._end()
        if len(days) > 2:
            problems += judge(days, self.columns)
        return Report(self.options, self.columns, days, problems, self.restarts, self.transfers, dict(self.life.counts))

    def _begin(self) -> list[str]:
        for head in self.heads:
            head.run()
        if not self.sim.run(self.sim.now_ms + FORM_MS, self._led):
            return [*self._problems(), f"no leader: {self._show()}"]
        self.life.begin()
        hour_ms = self.options.day_s * 1000.0 / 24.0
        self.sim.later(3.0 * hour_ms, self._restart)
        self.sim.later(1.5 * hour_ms, self._transfer)
        return []

    def _end(self) -> list[str]:
        """Everything comes to rest: then all heads hold the same, and it is sound."""
        self.life.stop()
        if not self.sim.run(self.sim.now_ms + END_MS, self._settled):
            return [*self._problems(), f"the heads did not come to the same: {self._show()}"]
        states = [head.replica.state for head in self.heads if head.replica is not None]
        problems = [f"{self.heads[0].name}: {each}" for each in states[0].check()]
        if any(state.snapshot() != states[0].snapshot() for state in states):
            problems.append("the heads have applied the same, and hold different states")
        return [*self._problems(), *problems]

    def _wrong(self) -> bool:
        return bool(self.checks.problems) or bool(self.life.problems)

    def _problems(self) -> list[str]:
        found = [*self.checks.problems, *self.life.problems]
        for process in (*self.heads, *self.life.machines):
            found += process.errors
            if process.reactor is not None:
                found += [f"{process.name}: {error}" for error in process.reactor.handler_errors]
        return found

    def _led(self) -> bool:
        return any(head.leads for head in self.heads)

    def _settled(self) -> bool:
        engines = [head.engine for head in self.heads]
        if not self._led() or any(engine is None for engine in engines) or self.life.busy:
            return False
        return len({(engine.last_applied, engine.last_index) for engine in engines}) == 1

    def _show(self) -> str:
        return "; ".join(head.show() for head in self.heads)

    def writes(self) -> int:
        """Entries that were committed."""
        return self.checks.last_applied

    # --- heads come and go --------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        """One head ends, as it may happen to be, and is started again."""
        hour_ms = self.options.day_s * 1000.0 / 24.0
        self.sim.later(hour_ms * self.rng.uniform(3.0, 6.0), self._restart)
        if not all(head.running and head.engine is not None for head in self.heads) or len(self.heads) < 2:
            return
        head = self.rng.choice(self.heads)
        self.restarts += 1
        how = self.rng.choice(("kill", "kill", "power", "stop"))
        if how == "stop":
            head.resign()
        else:
            head.crash(power=how == "power")
        self.sim.later(self.rng.uniform(5_000.0, 40_000.0), lambda: self._again(head))

    def _again(self, head: Head) -> None:
        if head.running and head.resigning:
            head.crash(why="it did not stop in time")
        if head.stops:
            self.checks.problem(f"{head.name} has stopped by itself: {head.stops[-1]}")
        elif not head.running:
            head.run()
            gc.collect()  # what it was before is a large cycle; elsewhere its process would have ended

    def _transfer(self) -> None:
        """Another head leads."""
        hour_ms = self.options.day_s * 1000.0 / 24.0
        self.sim.later(hour_ms * self.rng.uniform(1.5, 4.0), self._transfer)
        if not all(head.running for head in self.heads) or len(self.heads) < 2:
            return
        for head in self.heads:
            host = head.host
            if head.leads and host is not None:
                self.transfers += 1
                head.handle(host.replica.hand_over)
                head.handle(host.server.wake)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        self._most("writes", self.writes())
        for head in self.heads:
            if head.host is not None:
                for name, value in measure(head).items():
                    self._most(name, value)
        self._most("clients' memory", self.life.questions())
        self._most("process", _resident_bytes())

    def _most(self, name: str, value: float) -> None:
        self._day[name] = max(self._day.get(name, 0.0), float(value))


def measure(head: Head) -> dict[str, float]:
    """What a running head has."""
    host = head.host
    assert host is not None
    replica, server = host.replica, host.server
    state = replica.state
    found: dict[str, float] = {"keys": len(state.store.kv), _words(_FAILURES): len(state.store.worker_failures)}
    for table, ended in state.store.ended.items():
        found[f"ended {_words(table)}"] = len(ended)
        found[f"live {_words(table)}"] = len(state.store.rows(table)) - len(ended)
    found["indices"] = len(state.store._index)
    found["sessions"] = len(state.sessions.last)
    found["forgotten clients"] = len(state.sessions.forgotten)
    found["changes kept"] = len(state._ring)
    found["log entries in memory"] = len(replica._log)
    found["journal"] = replica._log.journal.size_bytes
    found["snapshot"] = len(state.snapshot())
    found["watched keys"] = len(server.watchers._by_key)
    found["waiting reads"] = len(server.serving._waits) + len(server.serving._held) + len(replica._desk._waiting)
    found["links"] = len(server._links) + len(host._links)
    leader = server._leader
    if leader is not None:
        actors = leader.actors
        found["managers' memory"] = (
            len(actors._watched) + len(actors._placement._holds) + len(leader.health._nodes)
            + len(leader.groups._watched)
            + sum(len(each.told) for each in actors._watched.values()) + len(leader._ended_jobs) + len(server.loads)
        )  # fmt: skip
    return found


def _resident_bytes() -> float:
    with open("/proc/self/statm") as file:
        return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _set(limits: Limits) -> Iterator[None]:
    """Sets limits and times, and puts them back."""
    values: list[tuple[Any, str, Any]] = [
        *CALM,
        (sessions, "CLIENTS_MAX", limits.clients),
        (sessions, "FORGOTTEN_MAX", limits.forgotten),
        (gcs_state, "RING_CHANGES_MAX", limits.ring),
        (raft_log, "KEEP_ENTRIES", limits.keep_entries),
    ]
    usual = [(module, name, getattr(module, name)) for module, name, _ in values]
    ended = dict(store.ENDED_MAX)
    try:
        for module, name, value in values:
            setattr(module, name, value)
        store.ENDED_MAX.update(limits.ended)
        yield
    finally:
        for module, name, value in usual:
            setattr(module, name, value)
        store.ENDED_MAX.update(ended)
