"""The journal under damage: never a changed record, and only the end may be missing.

The twin is the list of batches that were synced. Whatever happens to the bytes, `replay` gives a prefix of it (whole
batches), or refuses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftray.gcs import compaction
from ftray.gcs.compaction import Whole
from ftray.gcs.journal import Journal
from ftray.gcs.journal_format import ENTRY, META, SNAPSHOT, Record
from ftray.gcs.state.errors import JournalError

CLUSTER = b"C" * 16

records = st.builds(
    Record,
    st.sampled_from([ENTRY, META]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.one_of(st.binary(max_size=40), st.just(b"\xf7FTR" * 4), st.just(bytes(60))),
)
batches = st.lists(st.lists(records, min_size=1, max_size=3), max_size=4)


@contextmanager
def journal_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "journal"


def write(path: Path, written: list[list[Record]], closed: bool, snapshot: bytes | None) -> list[list[Record]]:
    """Writes the batches, after a compaction if there is a snapshot; returns them as they must come back."""
    journal = Journal.open(path, CLUSTER, fsync=False)
    assert list(journal.replay()) == []
    expected = []
    if snapshot is not None:
        journal.compact(snapshot, 1, 1)
        expected.append([Record(SNAPSHOT, 1, 1, snapshot)])
    for batch in written:
        journal.append(batch)
        journal.sync()
        expected.append(batch)
    if closed:
        journal.close()
    else:
        journal._release()
    return expected


def replay(path: Path) -> list[Record] | None:
    """The records, or None if the journal was refused."""
    try:
        journal = Journal.open(path, CLUSTER, fsync=False)
    except JournalError:
        return None
    try:
        return list(journal.replay())
    except JournalError:
        return None
    finally:
        journal._release()


def flat(parts: list[list[Record]]) -> list[Record]:
    return [record for part in parts for record in part]


def prefixes(expected: list[list[Record]]) -> list[list[Record]]:
    return [flat(expected[:n]) for n in range(len(expected) + 1)]


@given(batches, st.booleans(), st.none() | st.binary(max_size=50))
def test_what_was_written_comes_back(written: list[list[Record]], closed: bool, snapshot: bytes | None) -> None:
    with journal_path() as path:
        expected = write(path, written, closed, snapshot)
        assert replay(path) == flat(expected)
        assert replay(path) == flat(expected)


@given(batches, st.binary(max_size=60), batches, st.lists(st.integers(0, 3)), st.integers(1, 40), st.booleans())
def test_a_compaction_in_pieces_takes_over_what_comes_meanwhile(
    written: list[list[Record]], state: bytes, meanwhile: list[list[Record]], steps: list[int], piece: int, stop: bool
) -> None:
    """Batches and steps in any order. A crash leaves the old journal or the new one, and all batches."""
    with journal_path() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "SLICE_BYTES", piece)
        patch.setattr(compaction, "FINISH_BYTES", piece)
        before = write(path, written, False, None)
        journal = Journal.open(path, CLUSTER, fsync=False)
        assert list(journal.replay()) == flat(before)
        running = journal.begin_compaction(Whole(state), 1, 1, flat(before))
        ended = False
        for number, batch in enumerate(meanwhile):
            journal.append(batch)
            journal.sync()
            for _ in range(steps[number] if number < len(steps) else 0):
                ended = ended or running.step()
        while not ended and not stop:
            ended = running.step()
        if not ended:
            running.abort()
        last = Record(ENTRY, 1, 2, b"last")
        journal.append([last])
        journal.sync()
        journal._release()
        expected = [*flat(before), *flat(meanwhile), last]
        assert replay(path) == ([Record(SNAPSHOT, 1, 1, state), *expected] if ended else expected)


@given(batches, st.none() | st.binary(max_size=50), st.data())
def test_truncated_anywhere_it_ends_at_a_batch_or_is_refused(
    written: list[list[Record]], snapshot: bytes | None, data: st.DataObject
) -> None:
    with journal_path() as path:
        expected = write(path, written, False, snapshot)
        content = path.read_bytes()
        size = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:size])
        found = replay(path)
        assert found is None or found in prefixes(expected)
        if found is not None:
            # A snapshot was durable before it got its name, so it can't be missing.
            assert snapshot is None or found[0].payload == snapshot
            # What was cut off is gone for good, and the journal goes on from there.
            journal = Journal.open(path, CLUSTER, fsync=False)
            assert list(journal.replay()) == found and journal.note == ""
            new = Record(ENTRY, 9, 9, b"new")
            journal.append([new])
            journal.sync()
            journal._release()
            assert replay(path) == [*found, new]


@given(batches, st.booleans(), st.none() | st.binary(max_size=50), st.data())
def test_a_changed_byte_is_never_accepted(
    written: list[list[Record]], closed: bool, snapshot: bytes | None, data: st.DataObject
) -> None:
    with journal_path() as path:
        expected = write(path, written, closed, snapshot)
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        found = replay(path)
        if found is None:
            assert path.read_bytes() == content  # A journal that is refused is left as it is.
        elif closed or not written:
            # Only damage to the empty frame of a clean stop costs nothing.
            assert found == flat(expected)
        else:
            assert found == flat(expected[:-1])


@given(batches, st.data())
def test_any_rubbish_is_a_prefix_or_refused(written: list[list[Record]], data: st.DataObject) -> None:
    with journal_path() as path:
        expected = write(path, written, data.draw(st.booleans()), None)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(content)))
            length = data.draw(st.integers(0, 50))
            content[start : start + length] = data.draw(st.one_of(st.binary(max_size=50), st.just(bytes(length))))
        path.write_bytes(content)
        found = replay(path)
        assert found is None or found in prefixes(expected)
