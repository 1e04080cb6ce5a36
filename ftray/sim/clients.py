"""Simulated clients of the GCS: what they ask, and the histories of what they were told.

Role: shell. Everything goes through the production `GcsClient`, which repeats a command under its sequence number until
it has a result.

Workloads, each client one of them
- *table*: `put`, `put_new`, `delete` and `get` of a few keys that all share, with values of which none comes twice.
- *counter*: a new key for each increment; a second effect would find the key there. Reads count the keys.
- *names*: named actors are created, looked up and killed by their maker.
- *watch*: two whole tables are watched; what is told of a record must never be older than what was told before.
- *reader*: see `readers.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from chaos.checkers.history import Recorder, Value
from ftray.config import Config
from ftray.gcs.client import GcsClient
from ftray.gcs.state import commands as c
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import ActorRecord, Change, Code, KvRecord, Record, Result, Table, kv_key
from ftray.sim.engine import Simulation
from ftray.sim.network import Network
from ftray.sim.process import Process, SimReactor
from ftray.sim.raylet import ROOM

KEYS = (b"a", b"b", b"c", b"d")
NAMES = ("one", "two")
JOB, NODE, DRIVER = b"job1", b"n" * 16, b"d" * 16
NEVER_ROOM = {"nowhere": 1.0}
"""No node has it, so that these actors stay as they are made."""



class Histories:
    """What all clients saw."""

    def __init__(self) -> None:
        self.table = Recorder()
        self.names = Recorder()
        self.increments: list[list[float]] = []
        """When each was invoked and acknowledged (infinity: not yet, or never)."""
        self.counts: list[tuple[float, float, int]] = []
        """Reads: invoked, completed, what was counted."""
        self.acknowledged: list[bytes] = []
        """Keys of increments."""
        self.read_keys: list[bytes] = []
        """Keys that were written for `readers.py`."""
        self.tellings_following = 0
        """Changes that clients were told by heads that did not lead; the same for reads."""
        self.reads_following = 0
        self.operations = 0
        self.problems: list[str] = []


class Client(Process):
    """A machine with one client. A subclass says what it does next."""

    def __init__(
        self, sim: Simulation, network: Network, name: str, heads: Sequence[str], histories: Histories, config: Config,
        pause_ms: float,
    ) -> None:  # fmt: skip
        super().__init__(sim, network, name)
        self.heads = tuple(heads)
        self.histories = histories
        self.config = config
        self.pause_ms = pause_ms
        self.rng: random.Random = sim.stream(f"client {name}")
        self.stopped = False
        self.busy = False
        self.gcs: GcsClient
        self._number = 0

    @property
    def who(self) -> str:
        return f"{self.name}.{self.life}"

    def run(self) -> None:
        self.start(self.config)

    def boot(self, reactor: SimReactor) -> None:
        self.busy = False
        heads = self.rng.sample(self.heads, len(self.heads))
        self.gcs = GcsClient(reactor, heads, self.rng.randbytes(16))  # type: ignore[arg-type]
        self.began()

    def began(self) -> None:
        self._pause()

    def crash(self, power: bool = False, why: str = "killed") -> None:
        if self.running:
            self.lose()
        super().crash(power, why)

    def lose(self) -> None:
        """The open operation will get no answer."""

    def _pause(self) -> None:
        self.busy = False
        if self.reactor is not None:
            self.reactor.call_later(self.rng.expovariate(1 / self.pause_ms), self._go_on)

    def _go_on(self) -> None:
        if not self.stopped:
            self.busy = True
            self._number += 1
            self.histories.operations += 1
            self.step()

    def step(self) -> None:
        raise NotImplementedError

    def missed(self, state: GcsState) -> Sequence[object]:
        """What its watches should have told it by now, and have not."""
        return []

    def _refused(self, code: Code, text: str) -> None:
        """A read was not answered, which never is right here."""
        self.histories.problems.append(f"{self.who}: a read was answered {code.value}: {text}")

    def unexpected(self, what: str, result: Result) -> None:
        self.histories.problems.append(f"{self.who}: {what} was answered {result.code.value}: {result.message}")


class _Recording(Client):
    """With a recorder of its kind."""

    recorder: Recorder
    _ticket = 0

    def lose(self) -> None:
        if self._ticket:
            self.recorder.lose(self._ticket)
            self._ticket = 0

    def _invoke(self, action: str, *arguments: object) -> None:
        self._ticket = self.recorder.invoke(self.who, self.sim.now_ms, action, *arguments)

    def _end(self, result: Value) -> None:
        self.recorder.complete(self._ticket, self.sim.now_ms, result)
        self._ticket = 0
        self._pause()

    def _give_up(self) -> None:
        """It may have taken effect, or not."""
        self.lose()
        self._pause()


class TableClient(_Recording):
    """See the module."""

    def boot(self, reactor: SimReactor) -> None:
        self.recorder = self.histories.table
        super().boot(reactor)

    def step(self) -> None:
        key = self.rng.choice(KEYS)
        name = key.decode()
        what = self.rng.choice(("put", "put", "put_new", "delete", "get", "get"))
        if what == "get":
            self._invoke("get", name)
            self._read(key, self._end)
            return
        command: c.AnyCommand
        if what == "delete":
            self._invoke("delete", name)
            command = c.KvDelete("table", key)
        else:
            value = f"{self.who}-{self._number}"
            self._invoke(what, name, value)
            command = c.KvPut("table", key, value.encode(), what == "put")
        self.gcs.command(command, lambda result: self._told(what, result))

    def _read(self, key: bytes, done: Callable[[Value], None]) -> None:
        def told(record: Record | None) -> None:
            done(record.value.decode() if isinstance(record, KvRecord) else None)

        self.gcs.read(Table.KV, kv_key("table", key), told, on_error=self._refused)

    def _told(self, what: str, result: Result) -> None:
        if result.ok:
            self._end({"put": result.value == 0, "put_new": True, "delete": result.value == 1}[what])
        elif result.code is Code.EXISTS and what == "put_new":
            self._end(False)
        elif result.code is Code.UNAVAILABLE:
            self._give_up()
        else:
            self.unexpected(what, result)
            self._give_up()

    def read_all(self, done: Callable[[], None]) -> None:
        """At the end: reads every key."""
        left = list(KEYS)

        def following() -> None:
            if not left:
                done()
                return
            key = left.pop()
            self._invoke("get", key.decode())
            self._read(key, told)

        def told(value: Value) -> None:
            self.recorder.complete(self._ticket, self.sim.now_ms, value)
            self._ticket = 0
            following()

        following()


class CounterClient(Client):
    """See the module."""

    def step(self) -> None:
        histories, sim = self.histories, self.sim
        if self.rng.random() < 0.2:
            invoked_ms = sim.now_ms

            def counted(rows: dict[bytes, Record]) -> None:
                total = sum(isinstance(row, KvRecord) and row.namespace == "count" for row in rows.values())
                histories.counts.append((invoked_ms, sim.now_ms, total))
                self._pause()

            self.gcs.read_all(Table.KV, counted, on_error=self._refused)
            return
        increment = [sim.now_ms, float("inf")]
        histories.increments.append(increment)
        key = f"{self.who}-{self._number}".encode()

        def told(result: Result) -> None:
            if result.ok:
                increment[1] = sim.now_ms
                histories.acknowledged.append(key)
            elif result.code is Code.EXISTS:
                histories.problems.append(f"{self.who}: increment {key.decode()} took effect twice")
            elif result.code is not Code.UNAVAILABLE:
                self.unexpected(f"increment {key.decode()}", result)
            self._pause()

        self.gcs.command(c.KvPut("count", key, b"1", False), told)


class NamesClient(_Recording):
    """See the module."""

    def boot(self, reactor: SimReactor) -> None:
        self.recorder = self.histories.names
        self._mine: list[tuple[str, bytes]] = []
        super().boot(reactor)

    def step(self) -> None:
        if self._mine and self.rng.random() < 0.5:
            name, actor = self._mine.pop()
            self._invoke("kill", name, actor.hex())
            self.gcs.command(c.KillActor(actor, True, ""), lambda result: self._killed(result))
            return
        name = self.rng.choice(NAMES)
        if self.rng.random() < 0.4:
            self._invoke("get", name)
            self.gcs.read_named("sim", name, self._looked_up)
            return
        actor = self.rng.randbytes(16)
        self._invoke("create", name, actor.hex())
        command = c.RegisterActor(
            actor, JOB, None, NODE, "Thing", name=name, namespace="sim", detached=True,
            resources=NEVER_ROOM if self.rng.random() < 0.3 else ROOM,
        )
        self.gcs.command(command, lambda result: self._created(name, actor, result))

    def _looked_up(self, record: Record | None) -> None:
        self._end(record.actor_id.hex() if isinstance(record, ActorRecord) else None)

    def _created(self, name: str, actor: bytes, result: Result) -> None:
        if result.ok:
            self._mine.append((name, actor))
            self._end(True)
        elif result.code is Code.EXISTS:
            self._end(False)
        else:
            if result.code is not Code.UNAVAILABLE:
                self.unexpected("create", result)
            self._give_up()

    def _killed(self, result: Result) -> None:
        if result.ok:
            self._end(True)  # nobody else kills it, so it lived
        else:
            if result.code is not Code.UNAVAILABLE:
                self.unexpected("kill", result)
            self._give_up()


class WatchClient(Client):
    """See the module."""

    def began(self) -> None:
        self.view: dict[tuple[Table, bytes], Record] = {}
        self.told: dict[tuple[Table, bytes], int] = {}
        self.gcs.watch([Table.KV, Table.ACTORS], None, self._on_change)

    def _on_change(self, change: Change) -> None:
        item = (change.table, change.key)
        self.sim.count(b"watch %d" % change.revision)
        if not self.gcs.connected:
            self.histories.tellings_following += 1
        before = self.told.get(item, -1)
        if change.revision < before and self.view.get(item) != change.record:
            self.histories.problems.append(
                f"{self.who}: the watch told of {change.table.value} {change.key!r} as it was at revision "
                f"{change.revision}, when it had told of it at {before} before"
            )
        self.told[item] = max(before, change.revision)
        if change.record is None:
            self.view.pop(item, None)
        else:
            self.view[item] = change.record

    def step(self) -> None:
        """It only watches."""

    def missed(self, state: GcsState) -> Sequence[object]:
        rows = {
            (table, key): record
            for table in (Table.KV, Table.ACTORS)
            for key, record in state.store.rows(table).items()
        }
        return sorted(item for item in rows.keys() | self.view.keys() if rows.get(item) != self.view.get(item))
