"""The store under pressure against a naive twin: what is in memory and in files is simulated byte for byte.

Each generation of an object has contents of its own (a number). The twin has a memory (page -> contents), a disk (file
-> contents), and plays the clients: what each of them has pinned, and whether it looks into it.

Safety, after each event: no sealed object that nobody has freed is ever without its contents, in memory or in a file,
unless its file was damaged; what a client has pinned in memory lies where it was and is what it was; bytes are counted
exactly; a file is on the disk if and only if the table needs it; a refusal is true (nothing could be evicted or spilled
any more). Liveness: whatever has happened, when the disk ends its jobs and holders answer, everybody who waits for room
or for an object is answered; with everything freed and released, memory and disk are empty.
"""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.store.spilling import (
    AskHolders,
    Limits,
    Move,
    PinAnswer,
    Refusal,
    Refused,
    RoomAnswer,
    SpillingStore,
    Unlink,
)
from ftray.store.table import Created, Exists, FilePlace, Full, Job, Lost, Place, StoreError

P = 4096
PAGES = 6
WAIT_MS = 1_000.0
DAMAGED = -1
CLIENTS = [b"a", b"b", b"c"]
IDS = [bytes([number]) for number in range(5)]

ids = st.sampled_from(IDS)
clients = st.sampled_from(CLIENTS)
pages = st.integers(0, PAGES + 1)
events = st.one_of(
    st.tuples(st.just("make"), ids, pages, clients),
    st.tuples(st.just("make"), ids, pages, clients),
    st.tuples(st.just("create"), ids, pages, clients, st.booleans()),
    st.tuples(st.sampled_from(["seal", "abort"]), clients),
    st.tuples(st.just("pin"), st.lists(ids, min_size=1, max_size=4, unique=True), clients),
    st.tuples(st.just("get"), ids, clients),
    st.tuples(st.just("release"), clients, st.integers(0, 9)),
    st.tuples(st.just("free"), ids),
    st.tuples(st.just("drop"), clients),
    st.tuples(st.just("disk"), st.sampled_from(["done", "done", "done", "full", "error", "damaged"])),
    st.tuples(st.just("answer"), st.booleans()),
    st.tuples(st.just("time"), st.sampled_from([1, 30, 300])),
)


class Twin:
    """The shell, the disk and the clients."""

    def __init__(self, limits: Limits) -> None:
        self.store = SpillingStore(PAGES * P, limits)
        self.now_ms = 0.0
        self.memory: dict[int, int] = {}
        self.disk: dict[int, int] = {}
        self.contents = count(1)
        self.requests = count(1)
        self.jobs: list[Job] = []
        self.asked: list[tuple[int, bytes]] = []
        self.creating: dict[int, tuple[bytes, int, bytes, bool]] = {}
        """By request, what waits for room: object, size, client, whether as primary."""
        self.pinning: dict[int, tuple[tuple[bytes, ...], bytes]] = {}
        self.writing: list[tuple[bytes, int, int, int, bytes]] = []
        """Object, contents, offset, size, client."""
        self.sealed: dict[bytes, int] = {}
        """Contents of each object that is sealed and not freed."""
        self.sizes: dict[int, int] = {}
        self.primary: set[int] = set()
        """Contents that must not be lost."""
        self.lost: set[int] = set()
        """Contents whose file was damaged, and those files."""
        self.read_in_vain: set[int] = set()
        self.pins: list[tuple[bytes, bytes, int, int]] = []
        """Client, object, offset (or -1: its file), contents."""
        self.refused: list[Refused] = []
        self.failing = False
        """Whether a write has failed since one succeeded."""
        self.moving: list[int] = []
        """What could be spilled at each refusal: others may be served before we hear of it."""
        refuse, table = self.store._refuse, self.store.table

        def note(full: Full) -> Refused:
            self.moving.append(table.spillable_bytes + table.spilling_bytes)
            return refuse(full)

        self.store._refuse = note  # type: ignore[method-assign]

    # --- what clients do ---------------------------------------------------------------------------------------------

    def create(self, object_id: bytes, size: int, client: bytes, primary: bool = True) -> None:
        request = next(self.requests)
        self.creating[request] = (object_id, size, client, primary)
        self.store.create(request, object_id, size, client, b"owner", self.now_ms, primary)
        self.settle()

    def created(self, request: int, outcome: Created | Exists | Refused) -> None:
        object_id, size, client, primary = self.creating.pop(request)
        if isinstance(outcome, Refused):
            self.refused.append(outcome)
            self.check_refusal(outcome, size)
        elif isinstance(outcome, Created):
            # What this client was writing under this id before is undone.
            self.writing = [each for each in self.writing if (each[0], each[4]) != (object_id, client)]
            content = next(self.contents)
            self.sizes[content] = size
            if primary:
                self.primary.add(content)
            self.fill(outcome.offset, size, content)
            self.writing.append((object_id, content, outcome.offset, size, client))
            if self.sealed.get(object_id) in self.lost:
                del self.sealed[object_id]  # made again
        elif primary:
            self.primary.add(self.sealed[object_id])

    def check_refusal(self, refused: Refused, size: int) -> None:
        """A refusal is true: there is no way to make the room."""
        if refused.why is Refusal.TOO_LARGE:
            assert size > PAGES * P
            return
        full = refused.full
        assert full is not None
        assert full.biggest < size <= PAGES * P
        most = full.free + full.evictable + self.moving.pop(0)
        if refused.why is Refusal.DISK_FULL:
            assert self.failing
            assert most >= size, "the disk is not to blame"
        elif not self.failing:
            assert most < size or most == full.free + full.evictable, "refused, though room could be made"

    def seal(self, client: bytes) -> None:
        mine = next((each for each in self.writing if each[4] == client), None)
        if mine is None:
            return
        object_id, content, offset, _, _ = mine
        self.writing.remove(mine)
        self.store.seal(object_id, client)
        if self.is_current(object_id, client, offset, content):
            self.sealed[object_id] = content
        self.pins.append((client, object_id, offset, content))
        self.settle()

    def is_current(self, object_id: bytes, client: bytes, offset: int, content: int) -> bool:
        """Whether what was just sealed is what is found now."""
        return any(
            row.object_id == object_id and row.state != "freed" and row.creator == client and row.offset == offset
            and row.size == self.sizes[content]
            for row in self.store.table.rows()
        )  # fmt: skip

    def abort(self, client: bytes) -> None:
        for index, (object_id, _, _, _, writer) in enumerate(self.writing):
            if writer == client:
                del self.writing[index]
                self.store.abort(object_id, client)
                self.settle()
                return

    def pin(self, object_ids: list[bytes], client: bytes) -> None:
        request = next(self.requests)
        self.pinning[request] = tuple(object_ids), client
        self.store.pin(request, tuple(object_ids), client)
        self.settle()

    def pinned(self, request: int, results: tuple[Any, ...]) -> None:
        object_ids, client = self.pinning.pop(request)
        for object_id, found in zip(object_ids, results, strict=True):
            if found is None:
                continue
            content = self.sealed.get(object_id)
            if isinstance(found, Lost):
                assert self.lost  # perhaps an earlier generation: it was made again before the rest was there
            elif isinstance(found, Place):
                if content is None or self.memory_at(found.offset, found.size) != content:
                    # It was pinned first, and freed (perhaps made again) before the others of the request were there.
                    content = self.memory_at(found.offset, found.size)
                assert found.size == self.sizes[content] if found.size else True
                self.pins.append((client, object_id, found.offset, content))
            else:
                assert isinstance(found, FilePlace)
                assert found.number in self.disk or found.number in self.read_in_vain, "a file that is not there"
                self.pins.append((client, object_id, -1, found.number))

    def release(self, client: bytes, which: int) -> None:
        pinned = [pin for pin in self.pins if pin[0] == client]
        if pinned:
            self.let_go(pinned[which % len(pinned)])
            self.settle()

    def let_go(self, pin: tuple[bytes, bytes, int, int]) -> None:
        client, object_id = pin[:2]
        same = [each for each in self.pins if each[:2] == (client, object_id)]
        if len({each[2:] for each in same}) > 1:
            # Which generation goes first is the table's business: all of them.
            self.pins = [each for each in self.pins if each not in same]
            for _ in same:
                self.store.release(object_id, client)
        else:
            self.pins.remove(pin)
            self.store.release(object_id, client)

    def free(self, object_id: bytes) -> None:
        self.store.free(object_id)
        self.sealed.pop(object_id, None)
        self.settle()

    def drop(self, client: bytes) -> None:
        self.creating = {r: c for r, c in self.creating.items() if c[2] != client}
        self.pinning = {r: p for r, p in self.pinning.items() if p[1] != client}
        self.writing = [each for each in self.writing if each[4] != client]
        self.pins = [pin for pin in self.pins if pin[0] != client]
        self.asked = [ask for ask in self.asked if ask[1] != client]
        self.store.drop_client(client)
        self.settle()

    def answer(self, gives: bool) -> None:
        """The holder that was asked first answers; perhaps it looks into nothing any more."""
        if self.asked:
            request, client = self.asked.pop(0)
            if gives:
                for pin in [pin for pin in self.pins if pin[0] == client]:
                    if pin in self.pins:
                        self.let_go(pin)
            self.store.holder_answered(client, request)
            self.settle()

    # --- memory and disk ---------------------------------------------------------------------------------------------

    def fill(self, offset: int, size: int, content: int) -> None:
        for page in range(offset // P, (offset + size + P - 1) // P):
            self.memory[page] = content

    def memory_at(self, offset: int, size: int) -> int:
        found = {self.memory[page] for page in range(offset // P, (offset + size + P - 1) // P)}
        assert len(found) <= 1, "two objects in one place"
        return found.pop() if found else 0

    def disk_ends(self, how: str) -> None:
        """The disk's oldest job ends."""
        if not self.jobs:
            return
        job = self.jobs.pop(0)
        if not job.file:
            if how in ("full", "error"):
                self.failing = True
                self.store.write_failed(job.number, how == "full", "no luck", self.now_ms)
            else:
                self.failing = False
                self.disk[job.number] = self.memory_at(job.offset, job.size)
                self.store.written(job.number, 7)
        elif how == "damaged":
            self.lost.add(self.disk[job.file])
            self.read_in_vain.add(job.file)
            self.store.read_failed(job.number, "damaged")
        elif how == "error":
            self.store.read_failed(job.number, "")
        else:
            assert job.checksum == 7
            self.fill(job.offset, job.size, self.disk[job.file])
            self.store.read(job.number)
        self.settle()

    # --- the shell ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        before = self.store._failures
        again = {(each[0], each[2]) for each in self.creating.values()}
        self.store.settle(self.now_ms)
        self.failing |= self.store._failures > before  # the limit of all files is met without a job
        for effect in self.store.take_effects():
            if isinstance(effect, RoomAnswer):
                assert isinstance(effect.token, int)
                self.created(effect.token, effect.outcome)
            elif isinstance(effect, PinAnswer):
                assert isinstance(effect.token, int)
                self.pinned(effect.token, effect.results)
            elif isinstance(effect, Move):
                self.jobs.append(effect.job)
            elif isinstance(effect, Unlink):
                for number in effect.numbers:
                    del self.disk[number]
            else:
                assert isinstance(effect, AskHolders)
                self.asked += [(effect.request, client) for client in effect.clients]
        # Whoever creates an object anew undoes what it was writing under that id, also while it waits for room.
        self.writing = [
            each for each in self.writing
            if (each[0], each[4]) not in again or self.store.table._writing(each[0], each[4]) is not None
        ]  # fmt: skip

    def apply(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("create", object_id, size, client, primary):
                self.create(object_id, size * P, client, primary)
            case ("make", object_id, size, client):
                if not any(each[0] == object_id and each[4] == client for each in self.writing):
                    self.create(object_id, size * P, client)
                    if self.writing and self.writing[-1][0] == object_id and self.writing[-1][4] == client:
                        self.writing.insert(0, self.writing.pop())
                        self.seal(client)
                        self.let_go(self.pins[-1])
                        self.settle()
            case ("seal", client):
                self.seal(client)
            case ("abort", client):
                self.abort(client)
            case ("pin", object_ids, client):
                self.pin(object_ids, client)
            case ("get", object_id, client):
                pins = len(self.pins)
                self.pin([object_id], client)
                if len(self.pins) > pins:
                    self.let_go(self.pins[-1])
                    self.settle()
            case ("release", client, which):
                self.release(client, which)
            case ("free", object_id):
                self.free(object_id)
            case ("drop", client):
                self.drop(client)
            case ("disk", how):
                self.disk_ends(how)
            case ("answer", gives):
                self.answer(gives)
            case ("time", passes_ms):
                self.now_ms += passes_ms
                self.settle()

    def check(self) -> None:
        table = self.store.table
        table.check()
        rows = list(table.rows())
        entries = {entry.object_id: entry for entry in table._objects.values() if entry.sealed}
        for object_id, content in list(self.sealed.items()):
            entry = entries.get(object_id)
            if entry is None:
                assert content not in self.primary, "a primary is lost"
                del self.sealed[object_id]  # a cached copy may be evicted
            elif content in self.lost and entry.lost:
                continue
            elif entry.offset >= 0 and entry.busy != 2:
                if entry.room:
                    assert self.memory_at(entry.offset, entry.size) == content, "its bytes were overwritten"
            else:
                assert self.disk[entry.file] == content, "its file has something else"
        damaged = {number for number in self.read_in_vain if number not in self.disk}
        for _, _, offset, content in self.pins:
            if offset < 0:
                assert content in self.disk or content in damaged, "a file that is read was removed"
            elif content and self.sizes[content]:
                assert self.memory_at(offset, self.sizes[content]) == content, "what is looked into was moved"
        stats = table.stats()
        assert stats.used_bytes == sum(row.size for row in rows if row.offset >= 0)
        assert stats.spilled_bytes == sum(row.size for row in rows if row.offset < 0 and row.on_disk)
        assert stats.spill_file_bytes == sum(row.size for row in rows if row.on_disk)
        most = self.store.limits.file_bytes_max
        assert not most or table.file_bytes <= most
        needed = {entry.file for entry in table._all() if entry.file}
        assert self.disk.keys() == needed, "files and what needs them differ"
        assert sum(not job.file for job in self.jobs) == self.store._writes

    def finish(self) -> None:
        """All that is under way ends well, nobody starts anything: nobody is left waiting."""
        for _ in range(400):
            if not self.creating and not self.pinning and not self.jobs:
                break
            self.disk_ends("done")
            self.answer(False)
            for client in CLIENTS:
                self.seal(client)
            self.now_ms += 20
            self.settle()
            self.check()
        assert not self.creating, "creators wait for ever"
        assert not self.pinning, "readers wait for ever"
        assert not self.store.waiting
        assert self.now_ms < 1e6


limits = st.builds(
    Limits,
    st.sampled_from([0, 3 * P, PAGES * P]),
    st.sampled_from([0, 0, 4 * P]),
    st.just(WAIT_MS),
)


@settings(max_examples=2 * settings().max_examples)
@given(limits, st.lists(events, min_size=20, max_size=80))
def test_like_memory_and_files(limit: Limits, sequence: list[tuple[Any, ...]]) -> None:
    twin = Twin(limit)
    for event in sequence:
        twin.apply(event)
        twin.check()
    twin.finish()
    for client in CLIENTS:
        twin.apply(("drop", client))
    for object_id in IDS:
        twin.apply(("free", object_id))
    twin.finish()
    twin.check()
    stats = twin.store.table.stats()
    assert stats.used_bytes == stats.objects == stats.spill_files == 0
    assert not twin.disk


@given(st.lists(st.tuples(clients, st.integers(1, 3)), max_size=30))
def test_the_queue_is_fair(arrivals: list[tuple[bytes, int]]) -> None:
    """Between two turns of one client, each other one that waits has one turn."""
    from ftray.store.fair_queue import FairQueue

    queue: FairQueue[int] = FairQueue()
    waits: dict[bytes, list[int]] = {}
    for number, (client, size) in enumerate(arrivals):
        queue.push(client, number, size)
        waits.setdefault(client, []).append(number)
    assert queue.waiting_bytes == sum(size for _, size in arrivals)
    order: list[bytes] = []
    while queue:
        client, head = next(queue.heads())
        assert queue.pop(client) == head == waits[client].pop(0), "not first come first served"
        order.append(client)
        for other, left in waits.items():
            if other != client and left:
                since = order[::-1]
                turns = since.index(other) if other in since else len(since)
                assert Counter(since[:turns])[client] <= 1, "one client was served twice while another waited"
    assert queue.waiting_bytes == 0 and len(queue) == 0


def test_a_job_that_there_is_not_is_refused() -> None:
    store = SpillingStore(PAGES * P, Limits(0, 0, WAIT_MS))
    for end in (lambda: store.table.spilled(1, 0), lambda: store.table.not_spilled(1), lambda: store.table.restored(1)):
        with pytest.raises(StoreError, match="no such job"):
            end()
