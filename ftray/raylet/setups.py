"""Where leases and actors meet runtime environments: demand that waits for packages, workers that are being set up.

Role: shell, under the reactor's lock. Nothing here is touched by jobs without an environment.

    LeaseDemand ──► held back ──packages are here──► the scheduler ──► a worker ──WorkerAssigned──► setting up
                        │                                                                              │
                        └── LeaseEnvironmentFailed ◄── it can't be ────────────────── EnvironmentReady ┴──► LeaseGranted

Rules:
- Demand reaches the scheduler when its environment is on the node, so a download holds nobody's resources.
- A lease is granted when its worker has applied the environment: an owner never pushes tasks to one that might not.
- An environment that can't be set up fails the tasks that wait for it, and ends the demand. Later demand tries again.
- When nobody wants its lease any more, a worker is set up to the end, but holds no resources meanwhile.
- A worker that dies while it is set up is replaced (somebody may have killed it); after `DEATHS_MAX` in a row the
  environment is taken to be what kills.

Rejected: a grant before the set-up (tasks in flight would be lost with the worker, and take it for their own death).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ftray.exceptions import ProtocolError
from ftray.ids import short
from ftray.raylet.clients import Client
from ftray.raylet.deaths import how
from ftray.raylet.environments import Environment
from ftray.wire.messages import EnvironmentReady, LeaseDemand, LeaseEnvironmentFailed

if TYPE_CHECKING:
    from ftray.gcs.state.commands import DeathCauseRecord
    from ftray.raylet.leases import GivenLease
    from ftray.raylet.pool import Worker
    from ftray.raylet.raylet import Raylet
    from ftray.wire.reactor import Timer

log = logging.getLogger("ftray.raylet")

DEATHS_MAX = 3
CAUSE_WAIT_MS = 500


class ClassEnvironment:
    """The environment of one scheduling class of one client."""

    __slots__ = ("environment", "held", "preparing")

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.held: LeaseDemand | None = None
        """What the client has asked for while the packages were not here."""
        self.preparing = False


class Setup:
    """A worker that is applying its environment."""

    __slots__ = ("done", "environment", "lease", "timer", "worker_id")

    def __init__(
        self, worker_id: bytes, environment: Environment, done: Callable[[str], None], lease: GivenLease | None
    ) -> None:
        self.worker_id = worker_id
        self.environment = environment
        self.done = done
        self.lease = lease
        """None for an actor, whose death has other ways, and when nobody waits for it any more."""
        self.timer: Timer | None = None


class Setups:
    """See the module."""

    def __init__(self, raylet: Raylet) -> None:
        self.raylet = raylet
        self._setups: dict[bytes, Setup] = {}

    # --- demand -------------------------------------------------------------------------------------------------------

    def admit(self, client: Client, demand: LeaseDemand) -> bool:
        """Whether this demand may go to the scheduler now. If not, it goes there when the packages are here."""
        known = client.environments.get(demand.class_id)
        if known is None:
            if not demand.environment:
                return True
            try:
                environment = self.raylet.environments.hold(demand.environment)
            except ValueError as error:
                self._tell(client, demand.class_id, str(error))
                return False
            known = client.environments[demand.class_id] = ClassEnvironment(environment)
        before = known.held
        if before is not None and demand.resources is None:
            demand.resources = before.resources
        if known.environment.meaning:
            known.held = None
            return True
        known.held = demand
        if not known.preparing and (demand.want or before is None):
            known.preparing = True
            self.raylet.environments.prepare(
                known.environment, lambda error: self._prepared(client, demand.class_id, known, error)
            )
        return False

    def _prepared(self, client: Client, class_id: int, known: ClassEnvironment, error: str) -> None:
        known.preparing = False
        held = known.held
        if client.gone or held is None:
            return
        if error:
            held.want = 0  # its resources are said only once, so it is kept
            self._tell(client, class_id, error)
            return
        known.held = None
        self.raylet.leases.demand(client, held)

    def _tell(self, client: Client, class_id: int, error: str) -> None:
        log.warning("client %s: the environment of class %d: %s", short(client.worker_id), class_id, error)
        client.link.send(LeaseEnvironmentFailed(class_id, error))

    def of_class(self, client_id: bytes, class_id: int) -> Environment | None:
        """The environment of a client's scheduling class."""
        client = self.raylet.clients.by_id.get(client_id)
        if client is None or not client.environments:
            return None
        known = client.environments.get(class_id)
        return known.environment if known is not None else None

    # --- workers ------------------------------------------------------------------------------------------------------

    def begin(
        self, worker: Client, environment: Environment, done: Callable[[str], None], lease: GivenLease | None = None
    ) -> None:
        """The worker has been told to apply the environment; `done` is told "" when it has, or why it could not.

        When it dies meanwhile, `done` is told after `DEATHS_MAX` such deaths, and never for an actor (`lease` is None).
        """
        self.raylet.environments.hold_again(environment)
        worker.environment = environment
        setup = self._setups[worker.worker_id] = Setup(worker.worker_id, environment, done, lease)
        if environment.timeout_ms != float("inf"):
            setup.timer = self.raylet.reactor.call_later(environment.timeout_ms, lambda: self._late(setup))

    def ready(self, worker: Client, message: EnvironmentReady) -> None:
        """The worker says how it went."""
        setup = self._setups.get(worker.worker_id)
        if setup is None:
            raise ProtocolError(f"worker {short(worker.worker_id)} has set up an environment that nobody asked for")
        self._finish(setup, message.error)

    def _late(self, setup: Setup) -> None:
        if self._setups.get(setup.worker_id) is setup:
            seconds = setup.environment.timeout_ms / 1000.0
            self._finish(setup, f"it was not applied within {seconds:g} s (setup_timeout_seconds)")

    def _finish(self, setup: Setup, error: str) -> None:
        del self._setups[setup.worker_id]
        if setup.timer is not None:
            setup.timer.cancel()
        setup.environment.deaths = 0
        if error:
            self.raylet.leases.pool.retire(setup.worker_id)
            self.raylet.processes.kill(setup.worker_id, "its runtime environment could not be set up")
        setup.done(error)

    def nobody_waits(self, client: Client, class_id: int) -> None:
        """The client wants no lease of this class."""
        leases = self.raylet.leases
        for setup in self._setups.values():
            lease = setup.lease
            if lease is not None and (lease.client_id, lease.class_id) == (client.worker_id, class_id):
                worker = self.raylet.clients.by_id[setup.worker_id]  # it leaves there and here at the same time
                setup.lease = None
                setup.done = functools.partial(leases.set_up_for_nobody, setup.worker_id)
                leases.let_go(lease, worker)

    def is_for_nobody(self, worker: Worker) -> bool:
        """Whether it is being set up, and nobody waits for it any more."""
        setup = self._setups.get(worker.worker_id)
        return setup is not None and setup.lease is None and not worker.dedicated

    def worker_gone(self, worker: Client) -> None:
        """The worker is dead."""
        environment = worker.environment
        if environment is None:
            return
        worker.environment = None
        setup = self._setups.pop(worker.worker_id, None)
        if setup is not None:
            if setup.timer is not None:
                setup.timer.cancel()
            if setup.lease is not None and setup.lease.client_id in self.raylet.clients.by_id:
                environment.deaths += 1
                if environment.deaths >= DEATHS_MAX:
                    environment.deaths = 0
                    self._killed_again(worker, setup)
        self.raylet.environments.drop(environment)

    def _killed_again(self, worker: Client, setup: Setup) -> None:
        assert setup.lease is not None
        self.raylet.leases.withdraw(setup.lease)  # before another worker dies of it

        def known(record: DeathCauseRecord | None) -> None:
            died = how(record) if record is not None else "died"
            tail = "".join(f"\n    {line}" for line in record.stderr_tail) if record is not None else ""
            setup.done(f"{DEATHS_MAX} workers in a row ended while they applied it; the last one {died}{tail}")

        self.raylet.deaths.ask(worker.worker_id, CAUSE_WAIT_MS, known)

    def client_gone(self, client: Client) -> None:
        """A client is gone, with its scheduling classes."""
        for known in client.environments.values():
            self.raylet.environments.drop(known.environment)
        client.environments.clear()
