"""A simulated node: as much of a raylet as the GCS's managers have to do with.

Role: shell. It registers, sends heartbeats, starts and stops actors as the leader asks, and reports. What it starts is
only noted: an actor is a number that is alive. Two lives of one actor must never be there at once. Bundles of placement
groups are the business of `groups.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ftray.config import Config
from ftray.gcs.client import GcsClient
from ftray.gcs.state import commands as c
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import ActorState, Result
from ftray.sim.bundles import SLOT, BundleHost
from ftray.sim.engine import Simulation
from ftray.sim.network import Network
from ftray.sim.process import Process, SimReactor
from ftray.wire.group_messages import GroupMessage
from ftray.wire.messages import GcsHeartbeat, Message, NodeFenced, StartActor, StopActor

RAYLET = b"r" * 16
ROOM = {"CPU": 1.0}
"""What an actor needs that is to be started; there is enough."""
_ALL = {"CPU": 1_000_000.0}
HEARTBEAT_MS = 100.0
START_MS = (5.0, 60.0)


def raylet_names(count: int) -> list[tuple[str, bytes]]:
    """Name and id of each node."""
    names = [("tcp:raylet:1", RAYLET)]
    names += [(f"tcp:raylet{number}:1", b"raylet%d" % number + b"r" * 9) for number in range(2, count + 1)]
    return names


class Raylet(Process):
    """See the module."""

    def __init__(
        self, sim: Simulation, network: Network, name: str, heads: Sequence[str], config: Config, problems: list[str],
        node_id: bytes = RAYLET, slots: float = 0.0,
    ) -> None:  # fmt: skip
        """Actors run on the node `RAYLET` alone. With `slots` it has so much for bundles."""
        super().__init__(sim, network, name)
        self.node_id = node_id
        self.slots = slots
        self.resources = {**(_ALL if node_id == RAYLET else {}), **({SLOT: slots} if slots else {})}
        self.host: BundleHost | None = None
        self.registered = False
        self._prepared: set[tuple[bytes, int]] = set()
        self.heads = tuple(heads)
        self.config = config
        self.problems = problems
        self.rng: random.Random = sim.stream(f"raylet {name}")
        self.lives: dict[bytes, int] = {}
        """The incarnation of each actor that is here."""
        self.ended: set[tuple[bytes, int]] = set()
        self.started = 0
        self.gcs: GcsClient

    def run(self) -> None:
        self.start(self.config)

    def boot(self, reactor: SimReactor) -> None:
        reactor.listen(self.name, lambda link: None)
        heads = self.rng.sample(self.heads, len(self.heads))
        client_id, self.registered = self.rng.randbytes(16), False
        self.host = BundleHost(self, self.slots, self._prepared) if self.slots else None
        on_connected = self.host.connected if self.host is not None else None
        self.gcs = GcsClient(reactor, heads, client_id, self.node_id, self._asked, on_connected)  # type: ignore[arg-type]
        self.gcs.command(c.RegisterNode(self.node_id, self.name, self.resources, {}, self.life, "host", 1), self._told)
        self._beat()

    def _beat(self) -> None:
        if self.reactor is not None:
            available = self.host.scheduler.available if self.host is not None else {}
            if self.registered or self.host is None:
                self.gcs.send(GcsHeartbeat(self.node_id, {**self.resources, **available}))
            self.reactor.call_later(HEARTBEAT_MS, self._beat)

    def _told(self, result: Result) -> None:
        self.registered = result.ok
        if self.host is not None:
            self.host.connected(result.ok)
        if not result.ok:
            self.problems.append(f"{self.name}: it could not register: {result.code.value}: {result.message}")

    def _asked(self, message: Message, payload: bytes | bytearray) -> None:
        if isinstance(message, StartActor):
            self._start_actor(message.actor_id, message.incarnation)
        elif isinstance(message, StopActor):
            if self.lives.get(message.actor_id) == message.incarnation:
                del self.lives[message.actor_id]
            self._ended(message.actor_id, message.incarnation, "stopped")
        elif isinstance(message, GroupMessage) and self.host is not None:
            if self.registered:  # else it is meant for the life before
                self.host.asked(message)
        elif isinstance(message, NodeFenced) and not self.registered:
            pass  # so is this: its death was committed after this life had connected
        else:
            self.problems.append(f"{self.name}: it was told {message}")

    def _start_actor(self, actor: bytes, incarnation: int) -> None:
        here = self.lives.get(actor)
        if here == incarnation:
            return  # told anew, by the next leader
        if (actor, incarnation) in self.ended:
            self._ended(actor, incarnation, "it has ended already")
            return
        if here is not None:
            self.problems.append(
                f"{self.name}: actor {actor.hex()} is to start as incarnation {incarnation} while {here} is there"
            )
        self.lives[actor] = incarnation
        self.started += 1
        assert self.reactor is not None
        self.reactor.call_later(self.rng.uniform(*START_MS), lambda: self._alive(actor, incarnation))

    def _alive(self, actor: bytes, incarnation: int) -> None:
        if self.lives.get(actor) != incarnation:
            return

        def told(result: Result) -> None:
            if not result.ok and self.lives.get(actor) == incarnation:
                del self.lives[actor]
                self._ended(actor, incarnation, "it was not wanted")

        worker = self.rng.randbytes(16)
        self.gcs.command(c.ActorAlive(actor, incarnation, worker, "tcp:worker:1", self.node_id, 1), told)

    def _ended(self, actor: bytes, incarnation: int, why: str) -> None:
        self.ended.add((actor, incarnation))
        cause = c.DeathCauseRecord(what="Thing", reason=why)
        self.gcs.command(c.ActorDied(actor, incarnation, cause), lambda result: None)

    def unsettled(self, state: GcsState) -> str:
        """What is not yet as the tables say."""
        for actor in state.store.actors.values():
            if actor.state is not ActorState.DEAD and actor.resources == ROOM:
                if actor.state is not ActorState.ALIVE or self.lives.get(actor.actor_id) != actor.incarnation:
                    return f"actor {actor.actor_id.hex()} is {actor.state.name} and not here"
        for actor_id, incarnation in self.lives.items():
            record = state.actor(actor_id)
            if record is None or record.state is not ActorState.ALIVE or record.incarnation != incarnation:
                return f"actor {actor_id.hex()} is here, and not in the table"
        return ""
