"""A simulated head: the production replica, journal and GCS server on a simulated machine.

Role: shell. The host's reactor, clock and randomness come from the simulation, its journal lies on a simulated disk;
what `RaftHost`, `RaftReplica` and `GcsServer` do with them is the production code, from its constructor on.

A head that must not come back as it is (its disk was emptied or is damaged, it was replaced) is brought back as an
operator would: with an empty disk, as a new member that takes the former one's place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ftray.config import Config
from ftray.gcs.journal import Journal
from ftray.gcs.raft.errors import ReplicaRefusedError, ReplicaRemovedError
from ftray.gcs.raft.membership import find
from ftray.gcs.raft.replica import RaftReplica
from ftray.gcs.raft.shell import Timing
from ftray.gcs.raft_host import RaftHost
from ftray.gcs.state.errors import GcsError, JournalCorruptError, JournalFailedError, JournalWriteError
from ftray.gcs.state.tables import Result
from ftray.sim.checks import Checks
from ftray.sim.disk import Disk, SimFiles
from ftray.sim.engine import Simulation
from ftray.sim.network import Network
from ftray.sim.process import Process, SimReactor

CLUSTER = b"C" * 16
OPERATOR_MS = 300.0
DIRECTORY = Path("/gcs")


class CheckedReplica(RaftReplica):
    """Tells the checks what it applies, and which reads it confirms."""

    applied: Callable[[int, int, bytes], None]
    checks: Checks

    def confirm(self, confirmed: Callable[[bool], None]) -> None:
        known = self.checks.last_applied

        def checked(fresh: bool) -> None:
            engine = self._engine
            if fresh and engine is not None and engine.last_applied < known:
                self.checks.problem(
                    f"{self.endpoint} confirms a fresh read, has applied {engine.last_applied} entries, and {known} "
                    "were applied elsewhere when it was asked"
                )
            confirmed(fresh)

        super().confirm(checked)

    def on_apply(self, index: int, term: int, command: bytes) -> None:
        self.applied(index, term, command)
        super().on_apply(index, term, command)


class Hooks:
    """What the world gives its heads, and what tests replace to plant defects."""

    replica: type[CheckedReplica] = CheckedReplica

    def __init__(self, timing: Timing, compact_bytes: int, checks: Checks) -> None:
        self.timing = timing
        self.compact_bytes = compact_bytes
        self.checks = checks

    def identity(self, head: Head) -> bytes | None:
        """The replica id that the head's journal must have; None: as it was drawn."""
        return None


class SimHost(RaftHost):
    """The production host, with the journal on a simulated disk and a replica that is checked."""

    address_of = staticmethod(lambda endpoint: endpoint)

    def __init__(self, head: Head, reactor: SimReactor) -> None:
        hooks = head.hooks
        # The checks are told of entries that are applied in the constructor, too.
        members = {"applied": staticmethod(partial(hooks.checks.applied, head)), "checks": hooks.checks}
        kind = type("Replica", (hooks.replica,), members)

        def replica(journal: Journal, **arguments: Any) -> CheckedReplica:
            head.replica_id = journal.replica_id
            made: CheckedReplica = kind(journal, timing=hooks.timing, compact_bytes=hooks.compact_bytes, **arguments)
            return made

        super().__init__(
            reactor, DIRECTORY, head.name, head.heads, join=head.joining, on_failed=head.failed,  # type: ignore[arg-type]
            files=head.files, rng=random.Random(head.rng.getrandbits(64)), cluster_id=CLUSTER,
            replica_id=hooks.identity(head), replica_kind=replica,
        )  # fmt: skip


class Head(Process):
    """See the module."""

    def __init__(
        self, sim: Simulation, network: Network, name: str, heads: Sequence[str], config: Config, hooks: Hooks
    ) -> None:
        super().__init__(sim, network, name)
        self.heads = tuple(heads)
        self.config = config
        self.hooks = hooks
        self.rng: random.Random = sim.stream(f"head {name}")
        self.disk = Disk(sim.stream(f"disk {name}"))
        self.files = SimFiles(self.disk, self.spend)
        self.host: SimHost | None = None
        self.failure: Exception | None = None
        self.joining = False
        self.former_id = b""
        """The member that it is to replace."""
        self.replica_id = b""
        self.stop_error: BaseException | None = None
        """Why it has stopped by itself."""
        self.stops: list[BaseException] = []
        self.resigning = False
        self.damaged = False
        """A bit of its journal was flipped."""
        self.may_fail = False
        """A failing sync was planned for it."""

    # --- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.stop_error = None
        self.start(self.config)

    def boot(self, reactor: SimReactor) -> None:
        self.files = SimFiles(self.disk, self.spend)
        self.resigning = False
        self.host = host = SimHost(self, reactor)
        self.hooks.checks.restarted(self)
        if self.damaged:
            self.errors.append(f"{self.name}: a journal in which a bit was flipped was taken for a good one")
        host.replica.on_change(partial(self.hooks.checks.published, self))
        reactor.listen(self.name, host.accept)
        self._operate()

    def crash(self, power: bool = False, why: str = "killed") -> None:
        self.files.dead = True
        self.host = self.failure = None
        if power:
            self.disk.lose_power()
        super().crash(power, why)

    def on_failure(self, error: BaseException) -> None:
        if isinstance(error, GcsError) or (isinstance(error, OSError) and (self.disk.full or self.may_fail)):
            self.stop_error = error
            self.stops.append(error)
            self.sim.note(f"{self.name} stops by itself: {type(error).__name__}: {str(error)[:160]}")
        else:
            super().on_failure(error)

    @property
    def lost(self) -> bool:
        """It must not come back as it is."""
        return isinstance(self.stop_error, (ReplicaRefusedError, JournalCorruptError, ReplicaRemovedError))

    def empty(self) -> None:
        """Takes a new disk."""
        assert not self.running
        self.sim.note(f"{self.name} has an empty disk now")
        self.disk = Disk(self.disk.rng, self.disk.fsync_ms)
        self.damaged = False

    # --- turns --------------------------------------------------------------------------------------------------------

    def failed(self, error: Exception) -> None:
        """For the host: the replica has stopped by itself."""
        self.failure = error

    def after_batch(self) -> None:
        replica = self.replica
        if replica is None:
            return
        if self.failure is not None or replica.stopped is not None:
            raise self.failure or replica.stopped  # type: ignore[misc]
        if self.resigning and replica.resigned:
            replica.close()
            self.crash(why="stopped cleanly")
            return
        self.hooks.checks.checked(self)

    def resign(self) -> None:
        """Begins a clean stop."""
        replica = self.replica
        if replica is not None and not self.frozen:
            self.sim.note(f"{self.name} stops cleanly")
            self.resigning = True
            self.handle(replica.resign)
            self._wake()

    def compact(self) -> None:
        replica = self.replica
        if replica is not None and not self.frozen:
            self.handle(partial(self._compact, replica))

    def _wake(self) -> None:
        host = self.host
        if host is not None:
            self.handle(host.server.wake)

    def _compact(self, replica: RaftReplica) -> None:
        try:
            replica.begin_compaction()
        except JournalWriteError as error:
            self.sim.note(f"{self.name} could not compact: {error}")
        except JournalFailedError as error:
            # The replica learns it from its next write; a real head does too.
            self.sim.note(f"{self.name}: {error}")
            raise

    # --- what an operator does ----------------------------------------------------------------------------------------

    def _operate(self) -> None:
        """At the leader: a new head that asks for a former one's place gets it (`ftray heads replace`)."""
        host, reactor = self.host, self.reactor
        if host is None or reactor is None:
            return
        reactor.call_later(OPERATOR_MS, self._operate)
        replica = host.replica
        if not replica.is_leader:
            return
        for replica_id, endpoint in replica.guests:
            former = max((each for each in replica.members if each.endpoint == endpoint),
                         key=lambda each: not each.voter, default=None)  # fmt: skip
            if former is not None and not former.voter:
                replica.remove_head(former.replica_id, self._answered)  # it had begun to join, and lost its disk again
            elif former is not None and former.replica_id != replica_id:
                self.sim.note(f"{self.name}: {endpoint} is to be replaced by its new disk")
                replica.add_head(replica_id, endpoint, self._answered, former.replica_id)
        host.server.wake()

    def _answered(self, result: Result) -> None:
        if not result.ok:
            self.sim.note(f"{self.name}: heads replace: {result.code.value}: {result.message[:100]}")

    @property
    def replica(self) -> RaftReplica | None:
        return None if self.host is None else self.host.replica

    @property
    def member(self) -> bool:
        """As it knows itself: a voter, and nobody is on the way out."""
        replica = self.replica
        if replica is None:
            return False
        me = find(replica.members, self.replica_id)
        return me is not None and me.voter and len(replica.members) == len(self.heads)

    @property
    def engine(self) -> Any:
        return None if self.replica is None else self.replica._engine

    @property
    def leads(self) -> bool:
        return self.replica is not None and self.replica.is_leader

    def show(self) -> str:
        engine = self.engine
        if self.host is None:
            return f"{self.name}: down{'' if self.stop_error is None else f' ({type(self.stop_error).__name__})'}"
        if engine is None:
            return f"{self.name}: has no part yet"
        return (
            f"{self.name}: {'leads' if engine.leads else 'follows'} in term {engine.term}, last {engine.last_index}, "
            f"commit {engine.commit_index}, applied {engine.last_applied}{', frozen' if self.frozen else ''}"
        )
