"""The simulator: its clock, disks, network and processes, and its runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ftray.config import Config
from ftray.gcs.journal import Journal
from ftray.gcs.journal_format import ENTRY, Record
from ftray.gcs.state.commands import KvDelete
from ftray.gcs.state.errors import JournalCorruptError, JournalFailedError, JournalWriteError
from ftray.gcs.state.handlers import HANDLERS
from ftray.sim.disk import CrashError, Disk, SimFiles
from ftray.sim.engine import Simulation
from ftray.sim.faults import KINDS, schedule
from ftray.sim.network import Network, SimLink
from ftray.sim.process import Process, SimReactor
from ftray.sim.runner import CRASH, LIVENESS, SAFETY, run_seed
from ftray.sim.world import Options, World
from ftray.wire.messages import NodeFenced

PATH = Path("/gcs/journal")
CLUSTER = b"C" * 16


# --- time -------------------------------------------------------------------------------------------------------------


def test_events_run_in_the_order_of_their_times_and_then_of_asking() -> None:
    sim = Simulation(1)
    ran: list[str] = []
    sim.later(5, lambda: ran.append("late"))
    sim.later(1, lambda: ran.append("first"))
    sim.later(1, lambda: ran.append("second"))
    sim.later(2, lambda: ran.append("never")).cancel()
    sim.run(sim.now_ms + 3)
    assert (ran, sim.now_ms) == (["first", "second"], 1003.0)
    assert sim.run(2000, lambda: bool(ran[2:])) and ran[2:] == ["late"]


def test_streams_of_a_seed_are_apart_and_always_the_same() -> None:
    one, other = Simulation(3), Simulation(3)
    one.stream("a").random()
    assert one.stream("b").random() == other.stream("b").random() != one.stream("a").random()
    assert Simulation(4).stream("b").random() != other.stream("b").random()


# --- disks ------------------------------------------------------------------------------------------------------------


def opened(disk: Disk) -> tuple[Journal, list[int]]:
    """A journal on the disk, and the indices of its records."""
    journal = Journal.open(PATH, CLUSTER, files=SimFiles(disk, lambda ms: None))
    return journal, [record.index for record in journal.replay()]


def add(journal: Journal, index: int, size: int = 50) -> None:
    journal.append([Record(ENTRY, 1, index, bytes([index]) * size)])
    journal.sync()


@pytest.mark.parametrize("seed", range(30))
def test_a_loss_of_power_loses_only_what_was_not_synced(seed: int) -> None:
    disk = Disk(random.Random(seed))
    journal, _ = opened(disk)
    for index in (1, 2, 3):
        add(journal, index, 2000)
    disk.crash_in_sync = False
    with pytest.raises(CrashError):
        add(journal, 4, 2000)
    disk.lose_power()
    again, found = opened(disk)
    assert found in ([1, 2, 3], [1, 2, 3, 4])
    add(again, len(found) + 1)
    disk.lose_power()
    assert opened(disk)[1] == [*found, len(found) + 1]


def test_all_fates_of_an_unsynced_write_are_met() -> None:
    fates = set()
    for seed in range(60):
        disk = Disk(random.Random(seed))
        journal, _ = opened(disk)
        add(journal, 1, 3000)
        disk.crash_in_sync = False
        with pytest.raises(CrashError):
            add(journal, 2, 3000)
        disk.lose_power()
        again, found = opened(disk)
        fates.add((len(found), bool(again.note)))
    assert fates == {(1, False), (1, True), (2, False)}


def test_a_sync_that_was_made_is_kept_though_the_machine_died_in_it() -> None:
    disk = Disk(random.Random(1))
    journal, _ = opened(disk)
    disk.crash_in_sync = True
    with pytest.raises(CrashError):
        add(journal, 1)
    disk.lose_power()
    assert opened(disk)[1] == [1]


def test_a_dead_process_writes_nothing() -> None:
    disk = Disk(random.Random(1))
    journal, _ = opened(disk)
    add(journal, 1)
    before = bytes(disk.names[str(PATH)].data)
    journal._files.dead = True  # type: ignore[attr-defined]
    journal.close()
    assert bytes(disk.names[str(PATH)].data) == before


def test_a_full_disk_and_a_failing_one() -> None:
    disk = Disk(random.Random(1))
    journal, _ = opened(disk)
    disk.full = True
    with pytest.raises(JournalWriteError):
        add(journal, 1)
    disk.full = False
    add(journal, 1)
    disk.fail_sync = True
    with pytest.raises(JournalFailedError):
        add(journal, 2)


@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_bit_in_an_old_record_is_always_noticed(seed: int) -> None:
    disk = Disk(random.Random(seed))
    journal, _ = opened(disk)
    assert not disk.flip_bit()
    for index in range(1, 6):
        add(journal, index, 400)
    assert disk.flip_bit()
    with pytest.raises(JournalCorruptError):
        opened(disk)


def test_a_new_name_is_kept_only_when_the_directory_was_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = set()
    for synced in (True, False):
        for seed in range(20):
            disk = Disk(random.Random(seed))
            journal, _ = opened(disk)
            add(journal, 1)
            with monkeypatch.context() as patch:
                if not synced:
                    patch.setattr(SimFiles, "sync_directory", lambda files, path: None)
                journal.compact(b"state", 1, 1)
            disk.lose_power()
            kept.add((synced, bytes(disk.names[str(PATH)].data).find(b"state") > 0))
    assert kept == {(True, True), (False, True), (False, False)}


# --- network and processes --------------------------------------------------------------------------------------------


class Peer(Process):
    """Echoes what it is sent, and notes what happens."""

    def __init__(self, sim: Simulation, network: Network, name: str) -> None:
        super().__init__(sim, network, name)
        self.seen: list[Any] = []
        self.start(Config())

    def boot(self, reactor: SimReactor) -> None:
        reactor.listen(self.name, self.accept)

    def accept(self, link: SimLink) -> Peer:
        self.link = link
        return self

    def dial(self, name: str) -> SimLink:
        assert self.reactor is not None
        return self.reactor.connect(name, 1, self, on_open=lambda link: self.seen.append("open"))

    def say(self, link: SimLink, data: bytes) -> None:
        self.handle(lambda: link.send(None, data))

    def on_message(self, link: SimLink, message: Any, payload: bytes) -> None:
        self.seen.append(payload)

    def on_closed(self, link: SimLink, reason: str) -> None:
        self.seen.append(reason)


def pair(latency_ms: tuple[float, float] = (1.0, 9.0)) -> tuple[Simulation, Peer, Peer, SimLink]:
    sim = Simulation(5)
    network = Network(sim, latency_ms)
    a, b = Peer(sim, network, "a"), Peer(sim, network, "b")
    link = a.dial("b")
    sim.run(sim.now_ms + 200)
    assert a.seen == ["open"]
    a.seen.clear()
    return sim, a, b, link


def wait(sim: Simulation, ms: float = 300.0) -> None:
    sim.run(sim.now_ms + ms)


def test_messages_of_one_connection_keep_their_order_and_those_of_several_do_not() -> None:
    sim, a, b, link = pair()
    second = a.dial("b")
    wait(sim)
    sent = [b"%d" % number for number in range(50)]
    for number, data in enumerate(sent):
        a.say(link if number % 2 else second, data)
    wait(sim)
    assert sorted(b.seen, key=int) == sent != b.seen
    odd = [data for data in b.seen if int(data) % 2]
    assert odd == sorted(odd, key=int)


def test_what_a_cut_holds_arrives_late_and_in_order_or_the_connection_breaks() -> None:
    for broken in (False, True):
        sim, a, b, link = pair()
        a.network.cut([("a", "b")])
        for data in (b"1", b"2"):
            a.say(link, data)
        b.say(b.link, b"back")
        wait(sim)
        assert (a.seen, b.seen) == ([b"back"], [])
        a.network.heal([("a", "b")], broken)
        a.say(link, b"3")
        wait(sim)
        assert b.seen == ([b"1", b"2", b"3"] if not broken else ["connection reset"])
        assert a.seen[1:] == (["connection reset"] if broken else [])


def test_a_killed_process_is_noticed_at_once_and_a_lost_machine_when_it_is_back() -> None:
    sim, a, b, _ = pair()
    b.crash()
    wait(sim, 50)
    assert a.seen == ["the peer closed the connection"]
    a.dial("b")
    wait(sim, 50)
    assert a.seen[1:] == ["cannot connect: Connection refused"]
    sim, a, b, _ = pair()
    b.crash(power=True)
    wait(sim)
    assert a.seen == []
    b.start(Config())
    wait(sim)
    assert a.seen == ["connection reset"]


def test_a_frozen_process_hears_everything_later() -> None:
    sim, a, b, link = pair()
    b.freeze()
    a.say(link, b"1")
    a.say(link, b"2")
    wait(sim)
    assert b.seen == []
    b.thaw()
    assert b.seen == [b"1", b"2"]


def test_a_process_that_dies_in_a_batch_has_sent_nothing_of_it() -> None:
    sim, a, b, link = pair()

    def die() -> None:
        link.send(None, b"never")
        raise CrashError

    a.handle(die)
    wait(sim)
    assert b.seen == [] and a.power_lost


def test_the_disk_holds_up_its_process_and_what_it_says() -> None:
    sim, a, b, link = pair((1.0, 1.0))

    def slow() -> None:
        a.spend(40.0)
        link.send(None, b"after")

    a.handle(slow)
    b.say(b.link, b"meanwhile")
    wait(sim, 30)
    assert (a.seen, b.seen) == ([], [])
    wait(sim, 30)
    assert (a.seen, b.seen) == ([b"meanwhile"], [b"after"])


def test_clocks_jump_and_drift() -> None:
    sim, a, _, _ = pair()
    start_ms = a.clock_ms()
    a.set_clock(jump_ms=500.0)
    a.set_clock(rate=2.0)
    wait(sim, 100)
    assert a.clock_ms() == pytest.approx(start_ms + 700.0)


# --- runs -------------------------------------------------------------------------------------------------------------

def test_schedules_have_all_kinds_and_leave_out_what_was_not_asked_for() -> None:
    drawn = {
        fault.kind for seed in range(60) for fault in schedule(random.Random(seed), tuple(KINDS), 3, 10, 6000.0)
    }
    assert drawn == {name for kind in KINDS.values() for name, _ in kind}
    assert schedule(random.Random(1), (), 3, 10, 6000.0) == []
    clock = schedule(random.Random(1), ("clock",), 3, 10, 6000.0)
    assert {fault.kind for fault in clock} == {"jump", "rate"}


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_seeds_pass(heads: int) -> None:
    operations = 0
    for seed in range(8 if heads == 3 else 2):
        outcome = run_seed(seed, Options(heads=heads, seconds=3.0))
        assert outcome.ok, outcome
        assert not outcome.undecided
        operations += outcome.operations
    assert operations > 100


def test_a_node_that_comes_back_takes_no_word_for_its_life_before_as_one_for_itself() -> None:
    world = World(0, Options(faults=(), seconds=0.5))
    assert world.run() == "" and not world.problems
    raylet = world.raylets[1]
    raylet.crash()
    raylet.run()
    fenced = NodeFenced("it was declared dead")
    raylet._asked(fenced, b"")
    assert not world.histories.problems
    world._run(1000.0, lambda: raylet.registered)
    assert raylet.registered
    raylet._asked(fenced, b"")
    assert world.histories.problems


def test_failures_are_classed(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = Options(seconds=1.0, faults=())
    with monkeypatch.context() as patch:
        patch.setattr(World, "_unsettled", lambda world: "never")
        patch.setattr("ftray.sim.world.CONVERGE_MS", 200.0)
        assert run_seed(1, calm).kind == LIVENESS
    with monkeypatch.context() as patch:
        patch.setattr("ftray.sim.clients.TableClient._told", lambda client, what, result: 1 / 0)
        assert run_seed(1, calm).kind == CRASH
    with monkeypatch.context() as patch:
        patch.setitem(HANDLERS, KvDelete, lambda store, command: 1)
        assert run_seed(1, calm).kind == SAFETY
