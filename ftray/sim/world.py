"""One simulated cluster: heads, clients, a schedule of faults, and the phases of a run.

Role: shell around the simulation. What is production code in it: the Raft replica with its journal, log, elections,
snapshots and members; the host with its links to other heads; the GCS server, its watches and managers; the GCS client;
the state machine. What is simulated: sockets and their handshake, files, clocks, randomness, processes, the operator
who replaces heads, and a node that starts actors.

Phases: the heads form a cluster; clients work while faults happen (safety); the faults end, and everything must be as
it should within `CONVERGE_MS` (liveness); the final state is read and everything is checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType

from ftray.config import Config
from ftray.gcs import compaction
from ftray.gcs.client import GcsClient
from ftray.gcs.raft import library, snapshots, window
from ftray.gcs.raft import log as raft_log
from ftray.gcs.raft.errors import ReplicaRefusedError, ReplicaRemovedError
from ftray.gcs.raft.membership import find
from ftray.gcs.raft.shell import Timing
from ftray.gcs.state import commands as c
from ftray.gcs.state.errors import JournalCorruptError, JournalFailedError, JournalOpenError, JournalWriteError
from ftray.sim.checks import Checks
from ftray.sim.clients import (
    DRIVER,
    JOB,
    NODE,
    Client,
    CounterClient,
    Histories,
    NamesClient,
    TableClient,
    WatchClient,
)
from ftray.sim.engine import Simulation
from ftray.sim.faults import KINDS, LEADER, Fault, apply, schedule
from ftray.sim.groups import SLOTS, Groups
from ftray.sim.heads import Head, Hooks
from ftray.sim.network import Network
from ftray.sim.process import Process
from ftray.sim.raylet import Raylet, raylet_names
from ftray.sim.readers import ReaderClient

FORM_MS = 10_000.0
CONVERGE_MS = 40_000.0
STEP_MS = 20.0
MATCH_EVERY = 25
"""Log matching is checked at each such step."""
SMALL = (5, 1, 700, 150, 600, 200)
"""The limits of `World.tuning` with `Options.small`."""
SMALL_WINDOW_BYTES = 600
RESTART_MS = (50.0, 400.0)
REPLACE_MS = (100.0, 400.0)


@dataclass(frozen=True)
class Options:
    """What a run is made of, beside its seed."""

    heads: int = 3
    clients: int = 12
    faults: tuple[str, ...] = tuple(KINDS)
    nodes: int = 3
    """How many nodes there are. On more than one, two clients more make placement groups, and all but the first fail.
    Without any clients there is one."""
    seconds: float = 6.0
    """How long faults happen."""
    pause_ms: float = 180.0
    """How long a client thinks between two operations, on average."""
    small: bool = False
    """All limits are small, so that there are many snapshots and messages."""
    schedule: tuple[Fault, ...] | None = None
    """The faults, in place of those that are drawn from the seed."""
    only: tuple[int, ...] | None = None
    """Numbers of the faults that happen; None: all."""


class World:
    """See the module. `hooks_kind` is for tests that plant defects."""

    def __init__(self, seed: int, options: Options, hooks_kind: type[Hooks] = Hooks) -> None:
        self.options = options
        self.sim = sim = Simulation(seed)
        rng = sim.stream("world")
        latency_ms = rng.choice(((0.1, 0.5), (0.2, 2.0), (0.5, 5.0), (1.0, 30.0)))
        self.network = Network(sim, latency_ms)
        self.checks = Checks()
        self.histories = Histories()
        self.damaged: Head | None = None
        """The head whose disk is not what it was, until it is replaced."""
        compact_bytes = rng.choice((4_000, 12_000, 1 << 30))
        self.tuning = {
            (raft_log, "KEEP_ENTRIES"): rng.choice((5, 100, raft_log.KEEP_ENTRIES)),
            (library, "BATCH_BYTES"): rng.choice((1, 300, library.BATCH_BYTES)),
            (snapshots, "PART_BYTES"): rng.choice((700, snapshots.PART_BYTES)),
            (compaction, "SLICE_BYTES"): rng.choice((150, 1_000, compaction.SLICE_BYTES)),
            (compaction, "SYNC_BYTES"): rng.choice((600, compaction.SYNC_BYTES)),
            (compaction, "FINISH_BYTES"): rng.choice((200, compaction.FINISH_BYTES)),
        }
        if options.small:
            compact_bytes = 4_000
            self.tuning = {key: min(value, small) for (key, value), small in zip(self.tuning.items(), SMALL)}
            self.tuning[window, "WINDOW_BYTES"] = SMALL_WINDOW_BYTES
        hooks = hooks_kind(Timing(), compact_bytes, self.checks)
        config = Config(heartbeat_timeout_ms=600_000, infeasible_timeout_ms=10**9)
        names = [f"tcp:head{number}:1" for number in range(options.heads)]
        self.heads = [Head(sim, self.network, name, names, config, hooks) for name in names]
        kinds: list[type[Client]] = [
            TableClient, CounterClient, TableClient, NamesClient, WatchClient, ReaderClient,
        ]  # fmt: skip
        self.checks.heads = self.heads
        self.clients: list[Client] = [
            kinds[number % len(kinds)](
                sim, self.network, f"client{number}", names, self.histories, config, options.pause_ms
            )
            for number in range(options.clients)
        ]
        nodes = options.nodes if options.clients else 1
        self.raylets = [
            Raylet(
                sim, self.network, name, names, config, self.histories.problems, node_id,
                SLOTS[number % len(SLOTS)] if nodes > 1 else 0.0,
            )
            for number, (name, node_id) in enumerate(raylet_names(nodes))
        ]  # fmt: skip
        self.raylet = self.raylets[0]
        """Where actors run; it does not fail."""
        self.groups = Groups(self, names, config)
        self.clients += self.groups.makers
        drawn = options.schedule is None
        self.schedule: list[Fault] = schedule(
            sim.stream("faults"), options.faults, options.heads, options.clients, options.seconds * 1000.0
        ) if drawn else list(options.schedule or ())  # fmt: skip
        self.rng = sim.stream("supervisor")
        self.calm = False
        """Faults have ended."""
        self._restarts: dict[str, float] = {}
        self._enders: dict[int, Callable[[], object]] = {}
        self._ender = 0

    # --- what faults use ----------------------------------------------------------------------------------------------

    def leader_or(self, target: int) -> Head:
        if target == LEADER:
            leaders = [head for head in self.heads if head.leads]
            target = max(range(len(leaders)), key=lambda at: leaders[at].engine.term) if leaders else 0
            return leaders[target] if leaders else self.heads[0]
        return self.heads[target]

    def restart_at(self, process: Process, delay_ms: float) -> None:
        self._restarts[process.name] = self.sim.now_ms + delay_ms

    def until(self, delay_ms: float, end: Callable[[], object]) -> None:
        """The end of a fault: after a time, or when all faults end."""
        self._ender += 1
        number = self._ender
        self._enders[number] = end

        def over() -> None:
            ending = self._enders.pop(number, None)
            if ending is not None:
                ending()

        self.sim.later(delay_ms, over)

    def may_damage(self, head: Head) -> bool:
        """Whether the cluster can do without that head's disk."""
        if self.damaged is not None or self.calm or len(self.heads) < 3:
            return False
        return any(each.leads for each in self.heads) and self.whole

    @property
    def whole(self) -> bool:
        """All members vote, as all that run know."""
        known = [head for head in self.heads if head.replica is not None]
        return all(
            head.member and head.replica is not None
            and head.replica._log.members_index <= head.replica._log.commit
            and {each.replica_id for each in head.replica.members} == {each.replica_id for each in self.heads}
            for head in known
        )  # fmt: skip

    # --- a run --------------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """All phases. Returns what the cluster did not come to do ("" if nothing): see `problems` for what is wrong."""
        only = self.options.only
        with _tuned(self.tuning), _log_to(self.sim):
            for head in self.heads:
                head.run()
            self._supervise()
            if not self._run(FORM_MS, lambda: any(head.leads for head in self.heads)):
                return "" if self.problems else f"no leader within {FORM_MS:.0f} ms of the start: {self.show()}"
            stuck = self._prepare()
            if stuck or self.problems:
                return stuck
            self.raylet.run()
            self.groups.run()
            for client in self.clients:
                client.run()
            begin_ms = self.sim.now_ms
            for fault in self.schedule:
                if only is None or fault.number in only:
                    self.sim.at(begin_ms + fault.at_ms, partial(self._fault, fault))
            self._run(self.options.seconds * 1000.0, None)
            if self.problems or self.errors:
                return ""
            stuck = self._converge()
            if not stuck and not self.problems and not self.errors:
                self.checks.histories(self.histories)
                self.checks.ends(self.heads, self.histories.acknowledged)
            return stuck

    @property
    def problems(self) -> list[str]:
        return self.checks.problems

    @property
    def errors(self) -> list[str]:
        """Exceptions that nobody expected."""
        found = []
        for process in (*self.heads, *self.clients, *self.raylets):
            found += process.errors
            if process.reactor is not None:
                found += [f"{process.name}: {error}" for error in process.reactor.handler_errors]
        return found

    def show(self) -> str:
        heads = "; ".join(head.show() for head in self.heads)
        waiting = [client.name for client in self.clients if client.busy or not client.running]
        return f"{heads}; clients that wait: {', '.join(waiting) or 'none'}"

    def _run(self, duration_ms: float, done: Callable[[], bool] | None) -> bool:
        """Lets time pass, in steps; stops at a problem. Returns whether `done` came true."""
        end_ms = self.sim.now_ms + duration_ms
        problems = self.checks.problems
        step = 0

        def wrong() -> bool:
            return bool(problems)

        while self.sim.now_ms < end_ms:
            step += 1
            self.sim.run(min(end_ms, self.sim.now_ms + STEP_MS), wrong)
            if problems or self.histories.problems or self.errors:
                problems += self.histories.problems
                self.histories.problems.clear()
                return False
            if done is not None and done():
                return True
            if step % MATCH_EVERY == 0:
                self.checks.logs(self.heads)
        return False

    def _fault(self, fault: Fault) -> None:
        if not self.calm:
            apply(self, fault)

    def _prepare(self) -> str:
        """A node that nobody watches over, and a job, so that actors can be made."""
        done: list[str] = []
        setter = _Setter(self, done)
        setter.start(self.heads[0].config)
        if self._run(FORM_MS, lambda: len(done) == 2):
            setter.crash(why="done")
            return ""
        return "" if self.problems else f"the first commands were not answered: {done} {self.show()}"

    def _converge(self) -> str:
        """Ends all faults. Returns what does not come about."""
        self.sim.note("all faults end")
        self.calm = True
        enders, self._enders = self._enders, {}
        for end in enders.values():
            end()
        for head in self.heads:
            head.disk.full = head.disk.fail_sync = False
            head.disk.crash_in_sync = None
            if head.resigning:
                head.crash(why="it was stopping")
        for client in self.clients:
            client.stopped = True
        self.groups.calm()
        self._restarts.clear()
        if not self._run(CONVERGE_MS, self._settled):
            return "" if self.problems or self.errors else f"not within {CONVERGE_MS:.0f} ms: {self._unsettled()}"
        readers = [client for client in self.clients if isinstance(client, TableClient)]
        finished: list[int] = []
        for reader in readers[:1]:
            reader.handle(lambda reader=reader: reader.read_all(lambda: finished.append(1)))  # type: ignore[misc]
        if readers and not self._run(CONVERGE_MS, lambda: bool(finished)):
            return "" if self.problems or self.errors else f"the state can't be read: {self.show()}"
        if not self._run(CONVERGE_MS, self._settled):
            return "" if self.problems or self.errors else f"not settled after reads: {self._unsettled()}"
        removed: list[int] = []
        state = self.heads[0].replica.state if self.heads[0].replica is not None else None
        count = self.groups.remove_all(state, removed) if state is not None else 0
        if count and not self._run(CONVERGE_MS, lambda: len(removed) == count and self._settled()):
            return "" if self.problems or self.errors else f"not settled without groups: {self._unsettled()}"
        return ""

    def _settled(self) -> bool:
        return not self._unsettled()

    def _unsettled(self) -> str:
        """What is not yet as it should be."""
        engines = [head.engine for head in self.heads]
        if any(engine is None for engine in engines) or not all(head.member for head in self.heads):
            return f"a head has no part: {self.show()}"
        if sum(engine.leads and engine.own_term_applied for engine in engines) != 1:
            return f"not one leader: {self.show()}"
        if len({(engine.term, engine.last_applied, engine.last_index) for engine in engines}) != 1:
            return f"not the same everywhere: {self.show()}"
        if any(client.busy or not client.running for client in self.clients):
            return f"clients wait for answers: {self.show()}"
        state = self.heads[0].replica.state if self.heads[0].replica is not None else None
        assert state is not None
        stuck = self.raylet.unsettled(state) or self.groups.unsettled(state)
        if stuck:
            return f"{stuck}: {self.show()}"
        for client in self.clients:
            missed = client.missed(state)
            if missed:
                return f"the watch of {client.who} has not been told of {missed[:4]}: {self.show()}"
        return ""

    # --- supervision --------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        """What init systems and operators do: restart what has ended, replace what must not come back."""
        now_ms = self.sim.now_ms
        for head in self.heads:
            self._look_at_stop(head)
            if head.running:
                continue
            due_ms = self._restarts.setdefault(head.name, now_ms + self.rng.uniform(*RESTART_MS))
            if now_ms >= due_ms:
                del self._restarts[head.name]
                if head.lost:
                    head.empty()
                    head.joining = True
                head.run()
        for client in self.clients:
            if not client.running and client.life and now_ms >= self._restarts.get(client.name, now_ms):
                self._restarts.pop(client.name, None)
                client.run()
        if self.damaged is not None and self.damaged.running and self.damaged.member and self.whole:
            self.sim.note(f"{self.damaged.name} is replaced")
            self.damaged.joining = False
            self.damaged = None
        self.sim.later(STEP_MS, self._supervise)

    def _look_at_stop(self, head: Head) -> None:
        """A head has stopped by itself: had it a reason?"""
        while head.stops:
            error = head.stops.pop()
            right = (
                (isinstance(error, (ReplicaRefusedError, JournalCorruptError, ReplicaRemovedError))
                 and self.damaged is head)
                or (isinstance(error, JournalFailedError) and head.may_fail)
                or isinstance(error, (JournalWriteError, JournalOpenError, OSError))
            )  # fmt: skip
            if isinstance(error, ReplicaRemovedError) and self._is_member(head):
                right = False  # a head that joins takes old tables for the valid one
            if not right:
                self.checks.problem(f"{head.name} has stopped: {type(error).__name__}: {error}")

    def _is_member(self, head: Head) -> bool:
        """Whether the newest table that any head has names this one, with the disk that it had."""
        logs = [each.replica._log for each in self.heads if each is not head and each.replica is not None]
        newest = max(logs, key=lambda each: each.members_index, default=None)
        return newest is not None and find(newest.members, head.replica_id) is not None


class _Setter(Process):
    """Says what clients need to be there."""

    def __init__(self, world: World, done: list[str]) -> None:
        super().__init__(world.sim, world.network, "setter")
        self._heads = [head.name for head in world.heads]
        self._done = done

    def boot(self, reactor: object) -> None:
        gcs = GcsClient(reactor, self._heads, b"setter")  # type: ignore[arg-type]
        gcs.command(c.RegisterNode(NODE, "tcp:node:1", {}, {}, 1, "node", 1), self._told)
        gcs.command(c.AddJob(JOB, DRIVER, 1, NODE, "sim", ""), self._told)

    def _told(self, result: object) -> None:
        self._done.append(str(result))


@contextmanager
def _tuned(tuning: dict[tuple[ModuleType, str], int]) -> Iterator[None]:
    """Small limits, so that snapshots and several messages are needed for little data."""
    usual = {(module, name): getattr(module, name) for module, name in tuning}
    try:
        for (module, name), value in tuning.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in usual.items():
            setattr(module, name, value)


class _Lines(logging.Handler):
    def __init__(self, sim: Simulation) -> None:
        super().__init__(logging.WARNING)
        self._sim = sim

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" ({record.exc_info[1]!r})"
        self._sim.note(f"    log: {record.levelname.lower()}: {text[:300]}")


@contextmanager
def _log_to(sim: Simulation) -> Iterator[None]:
    """What the production code logs goes into the event log."""
    logger = logging.getLogger("ftray")
    lines = _Lines(sim)
    before = logger.level, logger.propagate
    logger.addHandler(lines)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.level, logger.propagate = before
