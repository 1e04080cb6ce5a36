"""The store under pressure, case by case: who is served when, what is written, who is asked, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ftray.store.spilling import (
    ASK_PATIENCE_MS,
    ASK_PAUSE_MS,
    READS_MAX,
    RETRY_MS,
    WRITES_MAX,
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
from ftray.store.table import Created, Exists, FilePlace, Job, Lost, Place

P = 4096
A, B, C, OWNER = b"a", b"b", b"c", b"owner"
WAIT_MS = 1_000.0


class World:
    """A store, and what came of it."""

    def __init__(self, pages: int, threshold: int | None = None, most: int = 0) -> None:
        threshold = pages if threshold is None else threshold
        self.store = SpillingStore(pages * P, Limits(threshold * P, most * P, WAIT_MS))
        self.now_ms = 0.0
        self.seen: list[Any] = []
        self.requests = 0

    def settle(self, passes_ms: float = 0.0) -> list[Any]:
        self.now_ms += passes_ms
        self.store.settle(self.now_ms)
        new = self.store.take_effects()
        self.seen += new
        self.store.table.check()
        return new

    def create(self, name: str, pages: int, client: bytes = A) -> list[Any]:
        self.requests += 1
        self.store.create((name, self.requests), name.encode(), pages * P, client, OWNER, self.now_ms)
        return self.settle()

    def put(self, name: str, pages: int, client: bytes = A, keep: bool = False) -> None:
        """A sealed primary, which its creator has pinned only if it keeps it."""
        answer = self.create(name, pages, client)[0]
        assert isinstance(answer, RoomAnswer), answer
        assert isinstance(answer.outcome, Created), answer
        self.store.seal(name.encode(), client)
        if not keep:
            self.store.release(name.encode(), client)
        self.settle()

    def pin(self, names: str, client: bytes = B) -> list[Any]:
        self.requests += 1
        self.store.pin(self.requests, tuple(name.encode() for name in names), client)
        return self.settle()

    def release(self, name: str, client: bytes = B) -> list[Any]:
        self.store.release(name.encode(), client)
        return self.settle()

    def jobs(self, effects: Sequence[Any]) -> list[Job]:
        return [effect.job for effect in effects if isinstance(effect, Move)]

    def spill(self, effects: Sequence[Any]) -> list[Any]:
        """The writes among these effects end well."""
        for job in self.jobs(effects):
            assert not job.file
            self.store.written(job.number, 1)
        return self.settle()

    def on_disk(self) -> list[str]:
        return sorted(row.object_id.decode() for row in self.store.table.rows() if row.state == "spilled")


def outcomes(effects: Sequence[Any]) -> list[Any]:
    return [effect.outcome for effect in effects if isinstance(effect, RoomAnswer)]


def served(effects: Sequence[Any]) -> list[Any]:
    return [effect.token[0] for effect in effects if isinstance(effect, RoomAnswer)]


# --- writing ----------------------------------------------------------------------------------------------------------


def test_room_is_made_by_writing_the_least_recently_used() -> None:
    world = World(4)
    for name in "wxyz":
        world.put(name, 1)
    world.pin("w")
    world.release("w")
    effects = world.create("n", 2)
    assert outcomes(effects) == []
    assert [job.offset // P for job in world.jobs(effects)] == [1, 2]  # x and y
    assert outcomes(world.spill(effects)) == [Created(P, (b"x", b"y"))]
    assert world.on_disk() == ["x", "y"]


def test_what_is_pinned_or_unsealed_is_not_written() -> None:
    world = World(4)
    world.put("p", 1, keep=True)
    world.put("q", 1)
    world.pin("q")
    world.create("u", 1)
    world.put("s", 1)
    effects = world.create("n", 2)
    assert [job.offset // P for job in world.jobs(effects)] == [3]


def test_beyond_the_threshold_objects_are_written_ahead_and_stay_in_memory() -> None:
    world = World(4, threshold=2)
    world.put("w", 1)
    world.put("x", 1)
    assert not world.jobs(world.seen)
    world.put("y", 1)
    world.spill(world.seen)
    assert len(world.jobs(world.seen)) == 1
    assert world.on_disk() == []
    assert world.store.table.stats().evictable_bytes == P
    # Its room is there at once when it is needed.
    assert outcomes(world.create("n", 1)) == [Created(3 * P)]
    assert outcomes(world.create("o", 1)) == [Created(0, (b"w",))]
    assert world.on_disk() == ["w"]


def test_a_restored_object_is_dropped_without_being_written_again() -> None:
    world = World(2)
    world.put("x", 2)
    world.spill(world.create("y", 2))
    world.store.seal(b"y", A)
    world.store.release(b"y", A)
    effects = world.pin("x")
    (write,) = world.jobs(effects)
    effects = world.spill(effects)
    (read,) = world.jobs(effects)
    assert (read.file, read.checksum, read.size) == (1, 1, 2 * P)
    world.store.read(read.number)
    assert world.settle() == [PinAnswer(3, (Place(0, 2 * P),))]
    world.release("x")
    assert write.file == 0
    effects = world.create("z", 2)
    assert outcomes(effects) == [Created(0, (b"x",))]
    assert not world.jobs(effects)


def test_no_more_is_written_than_is_asked_for_and_never_too_much_at_once() -> None:
    world = World(12)
    for name in "abcdefghijkl":
        world.put(name, 1)
    assert len(world.jobs(world.create("m", 2))) == 2
    effects = world.create("n", 8, B)
    assert len(world.jobs(effects)) == WRITES_MAX - 2


def test_files_go_when_the_owner_frees_also_in_the_middle() -> None:
    world = World(2)
    world.put("x", 2)
    effects = world.create("y", 2)
    world.store.free(b"x")
    world.settle()
    assert Unlink((1,)) in world.spill(effects)
    assert world.store.table.stats().spill_files == 0
    world.store.seal(b"y", A)
    world.store.release(b"y", A)
    world.spill(world.create("z", 2))
    assert world.on_disk() == ["y"]
    world.store.free(b"y")
    assert world.settle() == [Unlink((2,))]


# --- queues -----------------------------------------------------------------------------------------------------------


def test_creations_are_served_in_turns() -> None:
    world = World(4)
    world.put("x", 4, keep=True)
    for name in "123":
        world.create(name, 1, A)
    world.create("4", 1, B)
    world.create("5", 1, C)
    world.create("6", 1, B)
    world.store.free(b"x")
    effects = world.release("x", A)
    assert served(effects) == ["1", "4", "5", "2"]


def test_what_fits_goes_before_what_is_stuck_and_the_stuck_one_is_refused_in_its_time() -> None:
    world = World(4)
    world.put("x", 2, keep=True)
    world.create("large", 3, A)
    assert served(world.create("small", 1, B)) == []  # holders are asked first
    world.settle(ASK_PATIENCE_MS)
    assert served(world.seen) == ["x", "small"]
    world.store.seal(b"small", B)
    world.store.release(b"small", B)
    world.settle(WAIT_MS - ASK_PATIENCE_MS - 1)
    assert world.store.waiting_creations == 1
    (refused,) = outcomes(world.settle(1))
    assert refused.why is Refusal.FULL
    assert (refused.full.needed, refused.full.capacity) == (3 * P, 4 * P)
    assert not world.store.waiting


def test_nobody_is_refused_while_writes_make_progress() -> None:
    world = World(2)
    world.put("x", 2)
    effects = world.create("y", 2)
    for _ in range(10):
        assert world.settle(10 * WAIT_MS) == []
    assert outcomes(world.spill(effects)) == [Created(0, (b"x",))]


def test_a_queue_is_refused_together_not_one_wait_after_another() -> None:
    world = World(2)
    world.put("x", 2, keep=True)
    for number in range(5):
        world.create(str(number), 1)
    world.settle(WAIT_MS)
    assert len(outcomes(world.seen)) == 1 + 5


def test_what_can_never_fit_or_is_there_is_answered_at_once() -> None:
    world = World(2)
    world.put("x", 2, keep=True)
    world.create("y", 1)
    (refused,) = outcomes(world.create("z", 3))
    assert refused.why is Refusal.TOO_LARGE
    assert outcomes(world.create("x", 2, B)) == [Exists(0, 2 * P)]
    text = "an object can't have a size of -4096 bytes"
    assert outcomes(world.create("w", -1, B)) == [Refused(Refusal.INVALID, None, text)]
    assert world.store.waiting_creations == 1


def test_a_dead_client_waits_for_nothing() -> None:
    world = World(2)
    world.put("x", 2, keep=True)
    world.create("y", 1, B)
    world.pin("y", C)
    world.store.drop_client(B)
    world.settle()
    assert not world.store.waiting
    world.store.free(b"x")
    world.settle()
    assert served(world.release("x", A)) == []


# --- restoring --------------------------------------------------------------------------------------------------------


def spilled_world(pages: int, names: str) -> World:
    """Objects of one page each, all of them on disk alone, and memory empty."""
    world = World(pages)
    for name in names:
        effects = world.create(name, 1)
        while not outcomes(effects):
            effects = world.spill(effects)
        world.store.seal(name.encode(), A)
        world.store.release(name.encode(), A)
        world.settle()
    effects = world.create("all", pages)
    while not outcomes(effects):
        effects = world.spill(effects)
    world.store.abort(b"all", A)
    world.settle()
    assert world.on_disk() == sorted(names)
    return world


def test_readers_of_one_object_share_one_restore() -> None:
    world = spilled_world(2, "x")
    effects = world.pin("x", B) + world.pin("x", C)
    (job,) = world.jobs(effects)
    world.store.read(job.number)
    assert [answer.results for answer in world.settle()] == [(Place(0, P),), (Place(0, P),)]


def test_a_request_for_more_than_fits_is_answered_without_waiting_for_itself() -> None:
    world = spilled_world(2, "vwxyz")
    effects = world.pin("vwxyz")
    while not (answers := [effect for effect in effects if isinstance(effect, PinAnswer)]):
        jobs = world.jobs(effects)
        for job in jobs:
            world.store.read(job.number)
        effects = world.settle(0 if jobs else ASK_PATIENCE_MS)
    (answer,) = answers
    assert [type(found) for found in answer.results] == [Place, Place, FilePlace, FilePlace, FilePlace]
    # A file that is being read stays, even when it is freed.
    world.store.free(b"z")
    assert world.settle() == []
    assert [type(effect) for effect in world.release("z")] == [Unlink]


def test_restores_and_creations_take_turns() -> None:
    world = spilled_world(4, "wxyz")
    world.put("p", 4, keep=True)
    world.create("1", 1, A)
    world.create("2", 1, A)
    world.pin("wx", B)
    assert world.store.waiting
    world.store.free(b"p")
    effects = world.release("p", A)
    assert len(world.jobs(effects)) == 2
    assert served(effects) == ["1", "2"]
    kinds = [type(effect) for effect in effects if isinstance(effect, RoomAnswer | Move)]
    assert kinds == [Move, RoomAnswer, Move, RoomAnswer]


def test_no_more_is_read_at_once_than_the_lane_takes() -> None:
    world = spilled_world(8, "abcdefgh")
    effects = world.pin("abcdefgh")
    assert len(world.jobs(effects)) == READS_MAX
    world.store.read(world.jobs(effects)[0].number)
    assert len(world.jobs(world.settle())) == 1


def test_a_damaged_file_is_a_lost_object_until_it_is_made_again() -> None:
    world = spilled_world(2, "x")
    (job,) = world.jobs(world.pin("x"))
    world.store.read_failed(job.number, "torn")
    effects = world.settle()
    assert effects[0].results == (Lost("torn"),)
    assert [type(effect) for effect in effects] == [PinAnswer, Unlink]
    assert world.pin("x")[0].results == (Lost("torn"),)
    assert [row.state for row in world.store.table.rows()] == ["lost"]
    world.put("x", 1)
    assert isinstance(world.pin("x")[0].results[0], Place)
    assert world.store.table.stats().objects == 1


def test_a_read_that_fails_for_the_moment_sends_readers_to_the_file() -> None:
    world = spilled_world(2, "x")
    (job,) = world.jobs(world.pin("x"))
    world.store.read_failed(job.number, "")
    (answer,) = world.settle()
    assert isinstance(answer.results[0], FilePlace)
    assert world.store.read_direct_bytes_total == P
    assert world.on_disk() == ["x"]


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_creators_after_a_while_and_is_tried_again() -> None:
    world = World(2)
    world.put("x", 2)
    effects = world.create("y", 1)
    tries = 0
    while not outcomes(effects):
        for job in world.jobs(effects):
            tries += 1
            world.store.write_failed(job.number, True, "no space", world.now_ms)
        effects = world.settle(20)
    (refused,) = outcomes(effects)
    assert (refused.why, refused.text) == (Refusal.DISK_FULL, "no space")
    assert 3 <= tries <= 6, "retries are bounded"
    assert WAIT_MS <= world.now_ms < WAIT_MS + 100
    # Nothing is lost, nothing is tried without need, and the disk is used again when there is room on it.
    assert isinstance(world.pin("x")[0].results[0], Place)
    world.release("x")
    assert not world.jobs(world.settle(1e6))
    (job,) = world.jobs(world.create("y", 1))
    world.store.written(job.number, 1)
    assert outcomes(world.settle()) == [Created(0, (b"x",))]


def test_a_write_that_fails_for_another_reason_is_no_full_disk() -> None:
    world = World(2)
    world.put("x", 2)
    (job,) = world.jobs(world.create("y", 1))
    world.store.write_failed(job.number, False, "permission denied", world.now_ms)
    world.settle()
    (refused,) = outcomes(world.settle(WAIT_MS))
    assert (refused.why, refused.text) == (Refusal.FULL, "permission denied")


def test_after_a_failure_other_objects_are_tried() -> None:
    world = World(4)
    world.put("large", 3)
    world.put("small", 1)
    effects = world.create("n", 1)
    (job,) = world.jobs(effects)
    assert job.size == 3 * P
    world.store.write_failed(job.number, True, "no space", world.now_ms)
    world.settle()
    (job,) = world.jobs(world.settle(RETRY_MS))
    assert job.size == P
    world.store.written(job.number, 1)
    assert served(world.settle()) == ["n"]


def test_the_limit_of_all_files_is_kept() -> None:
    world = World(4, most=2)
    for name in "wxyz":
        world.put(name, 1)
    world.create("n", 3)
    world.spill(world.seen)
    for _ in range(100):
        world.spill(world.settle(20))
    assert world.store.table.stats().spill_file_bytes == 2 * P
    refused = outcomes(world.seen)[-1]
    assert refused.why is Refusal.DISK_FULL
    assert "spill_bytes_max" in refused.text


# --- holders ----------------------------------------------------------------------------------------------------------


def asks(effects: Sequence[Any]) -> list[AskHolders]:
    return [effect for effect in effects if isinstance(effect, AskHolders)]


def test_holders_are_asked_before_anybody_is_sent_to_a_file() -> None:
    world = spilled_world(2, "x")
    world.put("y", 2, keep=True)
    effects = world.pin("x", B)
    (ask,) = asks(effects)
    assert ask.clients == (A,)
    assert len(effects) == 1
    world.store.release(b"y", A)
    world.store.holder_answered(A, ask.request)
    effects = world.settle()
    assert len(world.jobs(effects)) == 1  # y is written, and x then restored
    effects = world.spill(effects)
    assert world.jobs(effects)[0].file


def test_holders_that_keep_or_do_not_answer_are_waited_for_once() -> None:
    world = spilled_world(2, "x")
    world.put("y", 2, keep=True)
    (ask,) = asks(world.pin("x", B))
    world.store.holder_answered(A, ask.request - 1)  # of an earlier question
    assert world.settle() == []
    world.store.holder_answered(A, ask.request)
    (answer,) = world.settle()
    assert isinstance(answer.results[0], FilePlace)
    world.release("x")
    # Soon after that in vain they are not asked at all, and later again.
    (answer,) = world.pin("x", B)
    assert isinstance(answer.results[0], FilePlace)
    world.release("x")
    world.settle(ASK_PAUSE_MS)
    (ask,) = asks(world.pin("x", B))
    assert world.settle(ASK_PATIENCE_MS - 1) == []
    (answer,) = world.settle(1)
    assert isinstance(answer.results[0], FilePlace)


def test_a_holder_that_dies_has_answered() -> None:
    world = spilled_world(2, "x")
    world.put("y", 2, keep=True)
    assert asks(world.pin("x", B))
    world.store.drop_client(A)
    assert world.jobs(world.settle())


def test_beyond_the_threshold_holders_are_asked_though_nobody_waits() -> None:
    world = World(4, threshold=2)
    world.put("x", 3, keep=True)
    (ask,) = asks(world.seen)
    world.store.release(b"x", A)
    world.store.holder_answered(A, ask.request)
    assert len(world.jobs(world.settle())) == 1


@pytest.mark.parametrize("event", ["spilled", "not_spilled", "restored", "not_restored"])
def test_jobs_that_there_are_not_are_refused(event: str) -> None:
    table = World(1).store.table
    arguments = (1, 0) if event == "spilled" else (1,)
    with pytest.raises(Exception, match="no such job"):
        getattr(table, event)(*arguments)
