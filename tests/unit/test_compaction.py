"""Compaction piece by piece: what it costs a turn, and what is in the journal whatever happens in the middle of it."""

from __future__ import annotations

import errno
import os
import random
import threading
import zlib
from itertools import count
from pathlib import Path

import msgspec
import pytest
from journal_twin import Pieces, entry, folded, opened, small, text_of

from ftray.gcs.compaction import Compactor
from ftray.gcs.files import OsFiles
from ftray.gcs.journal import Journal
from ftray.gcs.journal_format import ENTRY, META, SNAPSHOT, Record
from ftray.gcs.raft.log import MEMBERSHIP, RaftLog, Snapshot, decode_snapshot_body
from ftray.gcs.raft.membership import Member, Table, encode_table
from ftray.gcs.replica import JOURNAL_NAME, SingleReplica
from ftray.gcs.state import snapshot
from ftray.gcs.state.checksums import joined_crc
from ftray.gcs.state.commands import KvPut, encode_command
from ftray.gcs.state.errors import JournalClosedError, JournalError, JournalFailedError, JournalWriteError
from ftray.gcs.state.state import GcsState
from ftray.sim.disk import Disk, SimFiles

CLUSTER = b"C" * 16


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_checksums_of_parts_are_joined() -> None:
    rng = random.Random(1)
    for size in (*range(40), 255, 256, 65_537, 300_001):
        first, second = rng.randbytes(rng.randrange(40)), rng.randbytes(size)
        assert joined_crc(zlib.crc32(first), zlib.crc32(second), size) == zlib.crc32(first + second)


def filled(rows: int = 300) -> GcsState:
    state = GcsState(CLUSTER)
    for number in range(rows):
        state.apply(b"c%d" % number, 1, KvPut("n", b"k%d" % number, b"v" * (number % 50)))
    if rows > 100:
        state.apply(b"c0", 2, KvPut("n", b"big", bytes(1_000_000)))
    return state


def test_a_state_read_in_pieces_is_what_one_call_gives() -> None:
    state = filled()
    whole = state.snapshot()
    body = whole[snapshot.Picture.head_bytes :]
    decoded = msgspec.msgpack.decode(body, type=snapshot._Body)
    assert msgspec.msgpack.encode(decoded) == body  # no other layout than that of the struct
    for limit in (7_000, 1 << 20, 1 << 30):
        picture = state.picture()
        parts = list(iter(lambda: picture.read(limit), b""))  # noqa: B023
        assert b"".join(parts) == body and all(len(part) <= limit for part in parts)
        assert picture.head(len(body), zlib.crc32(body)) == whole[: snapshot.Picture.head_bytes]


def test_a_picture_does_not_change_with_the_state() -> None:
    state = filled()
    before, picture = state.snapshot(), state.picture()
    parts = [picture.read(500)]
    for number in range(0, 300, 3):
        state.apply(b"d%d" % number, 1, KvPut("n", b"k%d" % number, b"another"))
        parts.append(picture.read(500))
    parts += iter(lambda: picture.read(1 << 20), b"")
    assert before == before[: picture.head_bytes] + b"".join(parts) != state.snapshot()


def test_one_read_encodes_a_bounded_number_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    state = GcsState(CLUSTER)
    for number in range(5_000):
        state.apply(b"", 0, KvPut("n", b"k%d" % number, b""))
    encoded: list[object] = []
    real = snapshot._encode
    monkeypatch.setattr(snapshot, "_encode", lambda item: encoded.append(item) or real(item))  # type: ignore[func-returns-value]
    picture = state.picture()
    counts = []
    while picture.read(1 << 20):
        counts.append(len(encoded))
        encoded.clear()
    assert sum(counts) > 5_000 and max(counts) <= snapshot.READ_PIECES


MEMBERS: Table = (Member(b"A" * 16, "a:1", True), Member(b"B" * 16, "b:1", True))


def test_a_journal_in_the_layout_of_former_versions_is_read(tmp_path: Path) -> None:
    """Snapshot, entries and vote were one frame, and the state's length was as short as it can be."""
    state = filled(20)
    body = msgspec.msgpack.encode(Snapshot(MEMBERS, 3, state.snapshot()))
    journal = Journal.open(tmp_path / "journal", CLUSTER)
    list(journal.replay())
    log = RaftLog(journal)
    log.term, log.vote = 7, "aa"
    old_frame = [Record(SNAPSHOT, 2, 20, body), Record(ENTRY, 3, 21, b"\x00x"), log._meta()]
    journal.append(old_frame)
    journal.sync()
    journal.close()
    for _ in range(2):  # as it was, and after it was compacted in the present layout
        journal = Journal.open(tmp_path / "journal", CLUSTER)
        log = RaftLog(journal)
        restored = log.replay()
        assert restored is not None and GcsState.restore(restored, CLUSTER).snapshot() == state.snapshot()
        assert (log.term, log.vote, log.members, log.snapshot_index) == (7, "aa", MEMBERS, 20)
        assert log[-1] == (b"\x00x", 21, 3)
        log.begin_compaction(20, state.picture(), wait=True).finish()
        journal.close()


# --- entries, terms and votes that come meanwhile ---------------------------------------------------------------------


def test_what_is_synced_meanwhile_is_carried_over(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    files = SimFiles(Disk(random.Random(1), (5.0, 20.0)), lambda ms: None)
    journal, _ = opened(files)
    text = ""
    for index in range(1, 40):
        journal.append([entry(index), Record(META, 1, index, b"")])
        journal.sync()
        text += f"{index};"
    running = journal.begin_compaction(Pieces("".join(f"{index};" for index in range(1, 31))), 1, 30, [
        *(entry(index) for index in range(31, 40)), Record(META, 1, 30, b"")
    ])  # fmt: skip
    steps, index = 0, 39
    while not running.step():
        steps += 1
        if index < 80:
            index += 1
            journal.append([entry(index), Record(META, index, index, b"")])
            journal.sync()
            text += f"{index};"
    assert steps > 5
    index += 1
    journal.append([entry(index), Record(META, index, index, b"")])
    journal.sync()
    journal._release()
    _, records = opened(files)
    assert folded(records)[:2] == (f"{text}{index};", index)
    assert (records[0].kind, records[0].index) == (SNAPSHOT, 30)


def test_what_is_cut_off_meanwhile_and_the_vote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that another leader's take the place of, a new table of members, a term and a vote."""
    small(monkeypatch)
    path = tmp_path / "journal"
    state = filled(20)
    log = RaftLog(Journal.open(path, CLUSTER))
    log.replay()
    for index in range(1, 31):
        log.add(b"\x00%d" % index, index, 1)
    log.commit = 20
    log.sync()
    running = log.begin_compaction(20, state.picture())
    running.step()
    log.setCurrentTerm(5, "me")
    log.sync()
    for index in range(25, 28):
        log.add(b"\x00other%d" % index, index, 5)
        running.step()
    log.add(bytes([MEMBERSHIP]) + encode_table(MEMBERS), 28, 5)
    log.setCurrentTerm(6, "you")
    log.commit = 26
    log.sync()
    while not running.step():
        pass
    log.compacted(20)
    expected = (log.term, log.vote, log.commit, log.members, log.members_index, log[20 - log[0][1] :][1:])
    assert len(log._entries) > 8 and log[-1][1] == 28
    log.journal.close()
    again = RaftLog(Journal.open(path, CLUSTER))
    assert again.replay() == state.snapshot()
    assert (again.term, again.vote, again.commit, again.members, again.members_index, again[1:]) == expected
    again.journal.close()


def test_no_step_writes_much_though_much_has_come_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, piece=1_000, sync=3_000, finish=12_000)
    files = SimFiles(Disk(random.Random(1), (5.0, 20.0)), lambda ms: None)
    written = 0
    real = files.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        return real(fd, data, offset)

    journal, _ = opened(files)
    running = journal.begin_compaction(Pieces("x" * 30_000), 1, 1)
    monkeypatch.setattr(files, "pwrite", pwrite)
    index, grown, ended = 1, 0, False
    while not ended:
        index += 1
        before = journal.size_bytes
        journal.append([Record(ENTRY, 1, index, bytes(300))])
        journal.sync()
        grown += journal.size_bytes - before
        written = 0
        ended = running.step()
        # A piece, twice what was added since something was copied, and a frame; at the end what is left.
        assert written <= 1_000 + 2 * grown + 400 + ended * 12_000
        grown = 0 if written > 1_000 else grown
    assert journal.size_bytes > 30_000 and index > 100
    journal.close()


def test_it_ends_however_much_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    journal, _ = opened(SimFiles(Disk(random.Random(1), (5.0, 20.0)), lambda ms: None))
    running = journal.begin_compaction(Pieces("x" * 300), 1, 1)
    for step in range(2, 2_000):
        journal.append([Record(ENTRY, 1, step, bytes(400))])  # much more than a piece, in each turn
        journal.sync()
        if running.step():
            break
    else:
        pytest.fail("it does not catch up")
    journal.close()


# --- what ends it early -----------------------------------------------------------------------------------------------


def test_closing_takes_its_file_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    journal, _ = opened(OsFiles(), tmp_path / "journal")
    journal.append([entry(1)])
    journal.sync()
    before = set(os.listdir("/proc/self/fd"))
    running = journal.begin_compaction(Pieces("1;" + "x" * 5_000), 1, 1)
    while running._syncing is None:
        running.step()
    assert (tmp_path / "journal.new").exists()
    another = journal.begin_compaction(Pieces("1;"), 1, 1)  # the one that was under way is given up
    running.abort()
    assert journal._compaction is another and (tmp_path / "journal.new").exists()
    journal.close()
    assert not (tmp_path / "journal.new").exists()
    another.abort()
    for thread in threading.enumerate():
        if thread.name == "ftray-journal":
            thread.join()
    assert len(set(os.listdir("/proc/self/fd"))) == len(before) - 2
    with pytest.raises(JournalClosedError):
        journal.begin_compaction(Pieces(""), 1, 1)


def test_a_snapshot_that_takes_the_place_of_everything_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    log = RaftLog(Journal.open(tmp_path / "journal", CLUSTER))
    log.replay()
    for index in range(1, 10):
        log.add(b"\x00%d" % index, index, 1)
    log.commit = 9
    log.sync()
    log.begin_compaction(9, filled(20).picture()).step()
    other = filled(40).snapshot()
    data = msgspec.msgpack.encode(Snapshot(MEMBERS, 3, other))
    log.install(decode_snapshot_body(data), data, 50, 2)
    assert not (tmp_path / "journal.new").exists() and log.snapshot_index == 50
    log.journal.close()
    again = RaftLog(Journal.open(tmp_path / "journal", CLUSTER))
    assert again.replay() == other
    again.journal.close()


def test_what_can_not_be_read_back_is_not_given_a_new_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    path = tmp_path / "journal"
    journal, _ = opened(OsFiles(), path)
    running = journal.begin_compaction(Pieces("1;2;"), 1, 2)
    place = journal.size_bytes
    journal.append([entry(3)])
    journal.sync()
    content = bytearray(path.read_bytes())
    content[place + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(JournalWriteError, match=f"byte {place} can't be read back"):
        while not running.step():
            pass
    # The next one has a later picture, and does not need it.
    journal.begin_compaction(Pieces("1;2;3;"), 1, 3, wait=True).finish()
    journal.close()
    assert folded(opened(OsFiles(), path)[1])[0] == "1;2;3;"


def test_a_snapshot_that_is_being_sent_outlives_its_journal(tmp_path: Path) -> None:
    journal, _ = opened(OsFiles(), tmp_path / "journal")
    assert journal.open_snapshot() is None
    for text in ("first", "second" * 100_000):
        journal.begin_compaction(Pieces(text), 1, 1, wait=True).finish()
        if text == "first":
            kept = journal.open_snapshot()
    current = journal.open_snapshot()
    assert kept is not None and current is not None
    for made, text in ((kept, "first"), (current, "second" * 100_000)):
        data = b"".join(made.read(offset, 1_000) for offset in range(0, made.total_bytes, 1_000))
        assert text_of(data) == text and zlib.crc32(data) == made.crc and made.read(made.total_bytes, 10) == b""
        made.close()
        made.close()
    journal.forget_snapshot()
    assert journal.open_snapshot() is None
    journal.close()


# --- when -------------------------------------------------------------------------------------------------------------


class Fake:
    """A compaction of three steps."""

    snapshot_bytes = 700

    def __init__(self) -> None:
        self.steps = 0
        self.given_up = False
        self.error: JournalError | None = None

    def step(self) -> bool:
        if self.error is not None:
            raise self.error
        self.steps += 1
        return self.steps == 3

    def finish(self) -> None:
        self.steps = 3

    def abort(self) -> None:
        self.given_up = True


class Turns:
    def __init__(self) -> None:
        self.size = 0
        self.made: list[Fake] = []
        self.done = 0
        self.compactor = Compactor(lambda: self.size, 1_000, 0, self.begin, self.ended)

    def begin(self, wait: bool) -> Fake:
        self.made.append(Fake())
        return self.made[-1]

    def ended(self) -> None:
        self.done += 1


def test_one_step_in_each_turn_when_the_journal_is_long() -> None:
    turns = Turns()
    compactor = turns.compactor
    turns.size = 999
    compactor.turn()
    assert not turns.made
    turns.size = 1_500
    compactor.turn(patience=2)
    assert not turns.made and not compactor.running
    compactor.turn()
    compactor.begin()  # one is under way
    assert len(turns.made) == 1 and compactor.running and turns.made[0].steps == 1
    compactor.turn()
    compactor.turn()
    assert turns.done == 1 and not compactor.running
    turns.size = 1_399  # twice the snapshot is the limit now
    compactor.turn()
    assert len(turns.made) == 1
    turns.size = 1_400
    compactor.turn()
    assert len(turns.made) == 2
    compactor.at_once()
    assert turns.made[1].given_up and turns.done == 2 and len(turns.made) == 3


def test_one_that_fails_is_put_off(caplog: pytest.LogCaptureFixture) -> None:
    turns = Turns()
    turns.size = 1_000
    turns.compactor.turn()
    turns.made[0].error = JournalWriteError("no room")
    turns.compactor.turn()
    assert turns.made[0].given_up and caplog.text.count("the old journal is kept") == 1
    turns.size = 1_999
    turns.compactor.turn()
    assert len(turns.made) == 1
    turns.size = 2_000
    turns.compactor.turn()
    assert len(turns.made) == 2
    turns.made[1].error = JournalFailedError("nobody knows")
    with pytest.raises(JournalFailedError):
        turns.compactor.turn()
    assert not turns.compactor.running
    turns.compactor.hurry()
    turns.size = 0
    turns.compactor.turn()
    assert len(turns.made) == 3


# --- the replica of one head ------------------------------------------------------------------------------------------


def put(key: str, value: bytes = b"v") -> bytes:
    return encode_command(KvPut("n", key.encode(), value))


def test_a_head_alone_compacts_in_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, piece=1_000, sync=4_000, finish=2_000)
    replica = SingleReplica(tmp_path, CLUSTER, compact_bytes=60_000)
    sequence = 0
    while not replica._compactor.running:
        sequence += 1
        assert replica.submit(b"c", sequence, put(f"k{sequence}", bytes(300))).ok
    assert replica.next_wake_ms() == 0.0
    turns = 0
    while replica.next_wake_ms() == 0.0:
        turns += 1
        if turns % 3 == 0:  # in between it answers
            sequence += 1
            assert replica.submit(b"c", sequence, put(f"k{sequence}", bytes(300))).ok
        replica.flush()
    assert turns > 20 and sequence > 150
    before = replica.state.snapshot()
    replica._open_journal()._release()
    again = SingleReplica(tmp_path, CLUSTER)
    assert again.state.snapshot() == before
    again.close()


def test_a_full_disk_gives_the_compaction_up_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room that it takes may be what is missing."""
    small(monkeypatch, piece=1_000, sync=4_000, finish=2_000)
    replica = SingleReplica(tmp_path, CLUSTER, compact_bytes=60_000)
    sequence = 0
    while not replica._compactor.running:
        sequence += 1
        replica.submit(b"c", sequence, put(f"k{sequence}", bytes(300)))
    new = tmp_path / (JOURNAL_NAME + ".new")
    assert new.exists()
    real = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if new.exists():
            raise OSError(errno.ENOSPC, "no room")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JournalWriteError):
        replica.submit(b"c", sequence + 1, put("x"))
    assert not new.exists() and not replica._compactor.running
    assert replica.submit(b"c", sequence + 1, put("x")).ok
    replica.close()


# --- the real files ---------------------------------------------------------------------------------------------------


def test_a_sync_in_the_background_outlives_the_descriptor_and_tells_of_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, files, numbers = threading.Event(), OsFiles(), count()
    seen: list[int] = []
    real = os.fdatasync

    def slow(fd: int) -> None:
        assert go.wait(10.0)
        number = next(numbers)
        seen.append(os.fstat(fd).st_ino)
        real(fd)
        if number:
            raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fdatasync", slow)
    fd = files.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    inode = os.fstat(fd).st_ino
    syncing = files.begin_sync(fd)
    assert not syncing.done() and not syncing.done()
    failing = files.begin_sync(fd)
    files.close(fd)
    go.set()
    for each in (syncing, failing):
        each._thread.join(10.0)  # type: ignore[attr-defined]
    assert seen == [inode, inode]
    outcomes = []
    for each in (syncing, failing):
        try:
            outcomes.append(each.done())
        except OSError as error:
            outcomes.append(error.errno)
    assert sorted(outcomes, key=str) == [errno.EIO, True]
