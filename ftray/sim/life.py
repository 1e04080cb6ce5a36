"""What happens in a cluster that is used: nodes, drivers, workers and watchers that come, ask for things, and go.

Role: shell in the simulation. Each is a machine with the production `GcsClient`, and each of its lives is a process of
its own, with an id that nobody had before. What a raylet reports of its drivers and workers, these nodes report.

Who is there
- *nodes*: they register, start and stop actors as the leader asks, and die; the one that comes in its place has a new
  id. One lives as long as the cluster.
- *drivers*: a job each. They upload packages, export functions, make named, nameless and detached actors and watch
  them, kill some and let others go, make placement groups, put and delete keys; some end, others are killed.
- *a service*: a driver that runs for ever, makes and ends actors all the time, and tidies up after killed programs.
- *workers*: export a function for a running job, use a key or two, and end.
- *watchers* of whole tables, for an hour or so.
- *a quiet client* that says something once in a while, and must not have been forgotten.

Something happens whenever fewer writes were committed than the rate asks for.

Rejected: machines that are made anew (the network keeps them); processes that act by themselves (the rate would depend
on what they do).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ftray.config import Config
from ftray.gcs.client import GcsClient, Watch
from ftray.gcs.state import commands as c
from ftray.gcs.state import packages
from ftray.gcs.state.job_keys import HANDLES
from ftray.gcs.state.tables import ActorRecord, ActorState, Change, Code, Result, Table
from ftray.sim.engine import Simulation
from ftray.sim.network import Network
from ftray.sim.process import Process, SimReactor
from ftray.wire.group_messages import BundlesHeld, CommitBundles, PrepareBundles, ReturnBundles
from ftray.wire.messages import GcsHeartbeat, JobEnded, Message, NodeFenced, StartActor, StopActor

NODES, DRIVERS, WORKERS, WATCHERS = 6, 4, 6, 2
CPUS = {"CPU": 64.0}
BEAT_MS = 100_000.0
DETACHED_MAX = 6
"""When there are more detached actors than this, the oldest is killed."""
LEFT_BEHIND_MAX = 40
"""When killed programs have left more keys than this, the oldest is deleted."""
LATE_MS = 900_000.0
"""Nobody waits longer for an answer."""
ROUNDS = 15
"""Something other than a worker's or driver's doings happens once in so many."""
NAMESPACE = "life"

Then = Callable[[Result], object]


class Machine(Process):
    """A machine with one client at a time."""

    def __init__(self, life: Life, name: str) -> None:
        super().__init__(life.sim, life.network, name)
        self.of = life
        self.rng: random.Random = life.sim.stream(f"life {name}")
        self.client_id = b""
        self.gcs: GcsClient
        self.waits_since_ms = 0.0
        """Since when it waits for the answer to a command; 0: it doesn't."""

    def boot(self, reactor: SimReactor) -> None:
        self.client_id = self.rng.randbytes(16)
        self.waits_since_ms = 0.0
        self.gcs = GcsClient(reactor, self.rng.sample(self.of.heads, len(self.of.heads)), self.client_id, *self.more())  # type: ignore[arg-type]
        self.began()

    def more(self) -> tuple[Any, ...]:
        """Further arguments of the client."""
        return ()

    def began(self) -> None:
        """It runs."""

    def do(self, command: c.AnyCommand, then: Then | None = None, may_fail: bool = False) -> None:
        """Sends a command. Unless it `may_fail`, any answer but success is a problem."""
        if not self.gcs._commands:
            self.waits_since_ms = self.sim.now_ms
        life = self.life

        def told(result: Result) -> None:
            if self.life != life:
                return
            self.waits_since_ms = self.sim.now_ms if self.gcs._commands else 0.0
            if not result.ok and not may_fail and not self.excused(result.code):
                what = f"{type(command).__name__} was answered {result.code.value}: {result.message}"
                self.of.problems.append(f"{self.name}: {what}")
            elif then is not None:
                then(result)

        self.gcs.command(command, told)


    def excused(self, code: Code) -> bool:
        """Whether that may be the answer to anything."""
        return False


class Node(Machine):
    """See the module."""

    def __init__(self, life: Life, name: str) -> None:
        super().__init__(life, name)
        self.node_id = b""
        self.ready = False
        self.actors: dict[bytes, tuple[int, bytes]] = {}
        """Incarnation and worker of the actors here."""
        self.held: dict[tuple[bytes, int], None] = {}
        """Placement groups, with the attempt, for which resources are held."""

    def more(self) -> tuple[Any, ...]:
        self.node_id = self.rng.randbytes(16)
        return self.node_id, self._asked, self._connected

    def began(self) -> None:
        self.ready, self.actors, self.held = False, {}, {}
        assert self.reactor is not None
        self.reactor.listen(self.name, lambda link: None)
        self.do(c.RegisterNode(self.node_id, self.name, CPUS, {"zone": "a"}, 1, self.name, 1), self._joined)
        self._beat()

    def _joined(self, result: Result) -> None:
        self.ready = True

    def _beat(self) -> None:
        if self.reactor is not None:
            self.gcs.send(GcsHeartbeat(self.node_id, CPUS))
            self.reactor.call_later(BEAT_MS, self._beat)

    def _asked(self, message: Message, payload: bytes | bytearray) -> None:
        match message:
            case StartActor():
                if message.actor_id not in self.actors:
                    self.actors[message.actor_id] = message.incarnation, self.rng.randbytes(16)
                    assert self.reactor is not None
                    self.reactor.call_later(self.rng.uniform(5.0, 60.0), partial(self._started, message))
            case StopActor():
                here = self.actors.get(message.actor_id)
                if here is not None and here[0] == message.incarnation:
                    del self.actors[message.actor_id]
                    self.worker_ended(here[1], "stopped")
                self._died(message.actor_id, message.incarnation, "stopped")
            case NodeFenced():
                self.of.problems.append(f"{self.name}: {message.reason}")
            case PrepareBundles(group_id, attempt):
                self.held[group_id, attempt] = None
                self._about_group(c.BundlesPrepared(group_id, attempt, self.node_id))
            case CommitBundles(group_id, attempt) if (group_id, attempt) in self.held:
                self._about_group(c.BundlesCommitted(group_id, attempt, self.node_id))
            case CommitBundles(group_id, attempt) | ReturnBundles(group_id, attempt):
                self.held.pop((group_id, attempt), None)
                self._about_group(c.BundlesReturned(group_id, attempt, self.node_id, "given back"))
            case JobEnded():
                pass

    def _connected(self, connected: bool) -> None:
        if connected:
            self.gcs.send(BundlesHeld(tuple(self.held)))

    def _about_group(self, command: c.BundlesPrepared | c.BundlesCommitted | c.BundlesReturned) -> None:
        def told(result: Result) -> None:
            if not result.ok:  # not wanted any more
                self.held.pop((command.group_id, command.attempt), None)

        self.do(command, told, may_fail=True)

    def _started(self, message: StartActor) -> None:
        here = self.actors.get(message.actor_id)
        if here is None or here[0] != message.incarnation:
            return
        if self.rng.random() < 0.05:  # its constructor has crashed
            self._lose(message.actor_id)
            return

        def told(result: Result) -> None:
            if not result.ok and self.actors.get(message.actor_id) == here:
                del self.actors[message.actor_id]
                self._died(message.actor_id, message.incarnation, "not wanted")

        alive = c.ActorAlive(message.actor_id, message.incarnation, here[1], "tcp:worker:1", self.node_id, 7)
        self.do(alive, told, may_fail=True)

    def lose_one(self) -> None:
        """The process of an actor dies."""
        if self.actors:
            self._lose(self.rng.choice(list(self.actors)))

    def _lose(self, actor_id: bytes) -> None:
        incarnation, worker_id = self.actors.pop(actor_id)
        self._died(actor_id, incarnation, "killed by signal 9 (SIGKILL)")
        self.worker_ended(worker_id, "killed by signal 9 (SIGKILL)")

    def _died(self, actor_id: bytes, incarnation: int, reason: str) -> None:
        cause = c.DeathCauseRecord(self.node_id.hex(), 7, "", None, 9, "Thing", ["Traceback: it ended", "  !"], reason)
        self.do(c.ActorDied(actor_id, incarnation, cause), may_fail=True)

    def worker_ended(self, worker_id: bytes, reason: str) -> None:
        cause = c.DeathCauseRecord(self.node_id.hex(), 8, worker_id.hex(), 0, None, "worker", [], reason)
        self.do(c.WorkerDied(worker_id, self.node_id, cause))


class Driver(Machine):
    """See the module; it takes one step at a time."""

    service = False

    def __init__(self, life: Life, name: str) -> None:
        super().__init__(life, name)
        self.node: Node | None = None
        self.node_life = 0
        self.job_id = b""
        self.ready = False
        self.steps = 0
        self.mine: list[bytes] = []
        self.keys: list[bytes] = []
        self.groups: list[bytes] = []
        self.watch: Watch | None = None

    def began(self) -> None:
        node = self.node
        assert node is not None
        self.node_life = node.life
        self.job_id = self.rng.randbytes(4)
        self.ready, self.mine, self.keys, self.groups = False, [], [], []
        self.steps = self.rng.randrange(8, 30)
        self.watch = self.gcs.watch((Table.ACTORS,), (), self._changed)
        job = c.AddJob(self.job_id, self.client_id, 9, node.node_id, "python program.py --and arguments", NAMESPACE)
        life = self.life
        node.do(job, lambda result: self.handle(self._registered) if self.life == life else None)

    def _registered(self) -> None:
        self.ready = True
        if self.rng.random() < 0.3:
            self._upload(self.rng.randrange(8).to_bytes(packages.DIGEST_BYTES, "big"))
        for _ in range(self.rng.randrange(1, 4)):
            self.export()

    def _upload(self, digest: bytes) -> None:
        """A package of a runtime environment; others use the same ones."""
        for key in (self.job_id, self.job_id + digest):
            self.do(c.KvPut(packages.USERS, key, b""))
        for key in (digest + b"\0\0\0\0", digest):
            self.do(c.KvPut(packages.PACKAGES, key, digest * 40))

    def export(self) -> None:
        data = self.rng.randbytes(self.rng.randrange(500, 3_000))
        self.do(c.JobKvPut(self.job_id, "functions", data[:16], data))

    @property
    def housed(self) -> bool:
        """The node that it was started on is there."""
        return self.node is not None and self.node.running and self.node.life == self.node_life

    def step(self) -> None:
        """What it does next."""
        self.steps -= 1
        if self.steps <= 0 and not self.service:
            self._finish()
            return
        what = self.rng.random()
        if what < 0.45 or not self.mine:
            if len(self.mine) < 6:
                self._make_actor()
            else:
                self._end_actor()
        elif what < 0.7:
            self._end_actor()
        elif what < 0.75:
            self.gcs.read_named(NAMESPACE, f"actor {self.rng.randrange(8)}", lambda record: None)
        elif what < 0.8 and not self.service:
            self.export()
        elif what < 0.85:
            self._group()
        elif self.keys and what < 0.9:
            self.do(c.KvDelete("user", self.keys.pop(self.rng.randrange(len(self.keys)))))
        elif len(self.keys) < 10:
            self.keys.append(self.rng.randbytes(12))
            self.do(c.KvPut("user", self.keys[-1], self.rng.randbytes(self.rng.randrange(10, 400))))
        else:
            self.do(c.KvPut("user", self.rng.choice(self.keys), self.rng.randbytes(100)))

    def _group(self) -> None:
        """A placement group is made, or removed; those that are left end with the driver."""
        if len(self.groups) > 1:
            self.do(c.RemoveGroup(self.groups.pop(0)), may_fail=True)
            return
        assert self.node is not None
        self.groups.append(self.rng.randbytes(16))
        self.of.counts["placement groups"] += 1
        bundles = [{"CPU": 1.0}] * self.rng.randrange(1, 4)
        strategy = self.rng.choice(("PACK", "SPREAD", "STRICT_PACK"))
        command = c.CreateGroup(
            self.groups[-1], self.job_id, self.client_id, self.node.node_id, bundles, strategy, namespace=NAMESPACE
        )
        self.do(command, may_fail=True)  # its node may have died

    def excused(self, code: Code) -> bool:
        """When its node has died, so has its job."""
        return not self.housed and code in (Code.ENDED, Code.OWNER_DIED, Code.SESSION_EXPIRED)

    def _make_actor(self) -> None:
        actor_id = self.rng.randbytes(16)
        detached = self.rng.random() < 0.1
        name = f"actor {self.rng.randrange(1_000_000)}" if detached or self.rng.random() < 0.4 else ""
        if name:
            self.do(c.JobKvPut(self.job_id, HANDLES, actor_id, b"facts" * 20))
        owner = None if detached else self.client_id
        assert self.node is not None and self.watch is not None
        command = c.RegisterActor(
            actor_id, self.job_id, owner, self.node.node_id, "Thing", name, NAMESPACE, self.rng.choice((0, 1, 3, -1)),
            detached, {"CPU": 1.0}, self.rng.randbytes(300),
        )  # fmt: skip
        self.do(command, partial(self._made, actor_id, detached), may_fail=True)

    def _made(self, actor_id: bytes, detached: bool, result: Result) -> None:
        if not result.ok:
            if result.code is not Code.EXISTS and not self.excused(result.code):
                self.of.problems.append(f"{self.name}: an actor was refused: {result.code.value}: {result.message}")
            return
        assert self.watch is not None
        self.gcs.add_watch_key(self.watch, actor_id)
        self.of.counts["actors"] += 1
        if detached:
            self.of.detached.append(actor_id)
        else:
            self.mine.append(actor_id)

    def _end_actor(self) -> None:
        if not self.mine:
            return
        actor_id = self.rng.choice(self.mine)
        if self.rng.random() < 0.2:
            self.do(c.KillActor(actor_id, False, "killed to see it come back"), may_fail=True)
            return
        self.mine.remove(actor_id)
        command: c.AnyCommand = c.ActorOutOfScope(actor_id, self.client_id)
        if self.rng.random() < 0.5:
            command = c.KillActor(actor_id, True, "not needed any more")
        self.do(command, may_fail=True)

    def _changed(self, change: Change) -> None:
        record = change.record
        assert self.watch is not None
        if record is None or (isinstance(record, ActorRecord) and record.state is ActorState.DEAD):
            self.gcs.remove_watch_key(self.watch, change.key)
            if change.key in self.mine:
                self.mine.remove(change.key)

    def _finish(self) -> None:
        """Goodbye, or a crash; its keys are left."""
        for key in self.keys:
            self.do(c.KvDelete("user", key))
        self.keys = []
        self.ready = False
        self._end()

    def _end(self) -> None:
        if self.gcs._commands and self.reactor is not None:
            self.reactor.call_later(500.0, self._end)
            return
        cause = None
        if self.rng.random() < 0.3:
            cause = c.DeathCauseRecord(what="driver", pid=9, signal=9, reason="killed by signal 9 (SIGKILL)")
        node = self.node
        if node is not None and self.housed:
            node.do(c.FinishJob(self.job_id, cause))
            if cause is not None:
                node.do(c.WorkerDied(self.client_id, node.node_id, cause))
        self.sim.later(0.0, partial(self._gone, self.life))

    def _gone(self, life: int) -> None:
        if self.life == life:
            self.crash(why="done")

    def crash(self, power: bool = False, why: str = "killed") -> None:
        self.of.left_behind += self.keys
        self.keys = []
        super().crash(power, why)


class Service(Driver):
    """Lives for ever."""

    service = True

    def step(self) -> None:
        if len(self.of.detached) > DETACHED_MAX:
            self.do(c.KillActor(self.of.detached.pop(0), True, "it is old"), may_fail=True)
        elif len(self.of.left_behind) > LEFT_BEHIND_MAX:
            self.do(c.KvDelete("user", self.of.left_behind.pop(0)))
        else:
            super().step()


class Worker(Machine):
    """See the module."""

    def __init__(self, life: Life, name: str) -> None:
        super().__init__(life, name)
        self.node: Node | None = None
        self.job_id = b""

    def began(self) -> None:
        data = (self.job_id + bytes([self.rng.randrange(4)])) * 200  # most workers export what others have, too
        key = self.rng.randbytes(8)
        self.do(c.JobKvPut(self.job_id, "functions", data[:16], data), may_fail=True)  # the job may have ended
        if self.rng.random() < 0.3:
            self.do(c.KvPut("user", key, b"a result"))
            self.do(c.KvDelete("user", key), lambda result: self._over())
        else:
            self.do(c.KvDelete("user", key), lambda result: self._over())

    def _over(self) -> None:
        node = self.node
        assert node is not None
        self.sim.later(0.0, partial(self._gone, self.life))
        if node.running:
            worker_id = self.client_id
            self.sim.later(1.0, lambda: node.handle(lambda: node.worker_ended(worker_id, "idle for long")))

    def _gone(self, life: int) -> None:
        if self.life == life:
            self.crash(why="done")


class Watcher(Machine):
    """See the module."""

    def began(self) -> None:
        tables = self.rng.choice(((Table.NODES, Table.JOBS), (Table.ACTORS,), (Table.KV, Table.WORKER_FAILURES)))
        self.gcs.watch(tables, None, lambda change: None)


class Life:
    """All of them, and what happens next. `writes` says how many were committed."""

    def __init__(
        self, sim: Simulation, network: Network, heads: Sequence[str], config: Config, writes_per_second: float,
        writes: Callable[[], int],
    ) -> None:  # fmt: skip
        self.sim = sim
        self.network = network
        self.heads = tuple(heads)
        self.config = config
        self.rng: random.Random = sim.stream("life")
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        """How many of each kind have lived."""
        self.detached: list[bytes] = []
        self.left_behind: list[bytes] = []
        """Keys that killed programs have put; only the service deletes them."""
        self.nodes = [Node(self, f"tcp:node{number}:1") for number in range(NODES)]
        self.drivers = [Driver(self, f"driver{number}") for number in range(DRIVERS)]
        self.workers = [Worker(self, f"worker{number}") for number in range(WORKERS)]
        self.watchers = [Watcher(self, f"watcher{number}") for number in range(WATCHERS)]
        self.service = Service(self, "service")
        self.quiet = Machine(self, "quiet")
        self._pause_ms = 1000.0 / writes_per_second
        self._writes = writes
        self._stopped = False
        self._begin_ms = 0.0
        self._begin_writes = 0
        self._turn = 0

    @property
    def machines(self) -> list[Machine]:
        return [*self.nodes, *self.drivers, *self.workers, *self.watchers, self.service, self.quiet]

    @property
    def busy(self) -> bool:
        """Somebody waits for an answer."""
        return any(each.running and each.gcs._commands for each in self.machines)

    def questions(self) -> int:
        """What all clients remember."""
        running = [each.gcs for each in self.machines if each.running]
        return sum(
            len(gcs._commands) + len(gcs._reads) + len(gcs._keyed) + len(gcs.failures) + len(gcs.endpoints)
            for gcs in running
        )

    def begin(self) -> None:
        self._begin_ms, self._begin_writes = self.sim.now_ms, self._writes()
        for node in self.nodes:
            self._start(node, "nodes")
        self._start(self.quiet, "quiet clients")
        self.sim.later(self._pause_ms, self._next)

    def stop(self) -> None:
        """Nothing new happens."""
        self._stopped = True

    def _start(self, machine: Machine, kind: str) -> None:
        self.counts[kind] += 1
        machine.start(self.config)

    # --- what happens next --------------------------------------------------------------------------------------------

    def _next(self) -> None:
        if self._stopped:
            return
        self.sim.later(self._pause_ms, self._next)
        if self._writes() - self._begin_writes > (self.sim.now_ms - self._begin_ms) / self._pause_ms:
            return
        self._turn += 1
        if self._turn % ROUNDS == 0:
            self._something_else()
            self._look_for_late()
            return
        what = self.rng.random()
        if what < 0.45:
            self._worker()
        elif what < 0.55:
            self._of_driver(self.service)
        else:
            self._of_driver(self.rng.choice(self.drivers))

    def _housing(self) -> Node | None:
        """Some node; the first, which never dies, as likely as any other."""
        ready = [node for node in self.nodes if node.running and node.ready]
        return self.rng.choice(ready) if ready else None

    def _worker(self) -> None:
        idle = [worker for worker in self.workers if not worker.running]
        jobs = [driver.job_id for driver in self.drivers if driver.running and driver.ready and driver.housed]
        node = self._housing()
        if idle and jobs and node is not None:
            worker = idle[0]
            worker.node, worker.job_id = node, self.rng.choice(jobs)
            self._start(worker, "workers")

    def _of_driver(self, driver: Driver) -> None:
        if driver.running and not driver.housed:
            driver.crash(why="its node is gone")
        if driver.running:
            if driver.ready and not driver.gcs._commands:
                driver.handle(driver.step)
            return
        node = self.nodes[0] if driver.service else self._housing()
        if node is not None and node.ready:
            driver.node = node
            self._start(driver, "drivers")

    def _something_else(self) -> None:
        what = self._turn // ROUNDS % 7
        if what in (0, 2, 4):
            node = self.rng.choice(self.nodes[1:])
            if node.running and node.ready:
                node.crash(why="its machine was taken away")
                self.sim.later(self.rng.uniform(2_000.0, 30_000.0), partial(self._start, node, "nodes"))
        elif what in (1, 5):
            node = self.rng.choice(self.nodes)
            if node.running and node.ready:
                node.handle(node.lose_one)
        elif what == 3:
            watcher = self.rng.choice(self.watchers)
            if watcher.running:
                watcher.crash(why="has seen enough")
            else:
                self._start(watcher, "watchers")
        elif self._turn // ROUNDS % 64 == 7:
            self.quiet.handle(lambda: self.quiet.do(c.KvPut("user", b"quiet", b"%d" % self._turn)))

    def _look_for_late(self) -> None:
        for machine in self.machines:
            since_ms = machine.waits_since_ms
            if machine.running and since_ms and self.sim.now_ms - since_ms > LATE_MS:
                waits = f"since {(self.sim.now_ms - since_ms) / 1000.0:.0f} s"
                self.problems.append(f"{machine.name} waits for an answer {waits}")
