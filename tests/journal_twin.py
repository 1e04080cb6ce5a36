"""A journal under compaction, its state as text, and a disk that can end a machine's life at any call."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from ftray.gcs import compaction
from ftray.gcs.compaction import Compaction
from ftray.gcs.journal import Journal
from ftray.gcs.journal_format import ENTRY, META, SNAPSHOT, Record
from ftray.gcs.state.errors import JournalWriteError
from ftray.sim.disk import CrashError, Disk, SimFiles

CLUSTER = b"C" * 16
PATH = Path("/gcs/journal")


class Pieces:
    """A snapshot as a source: what the twin of the state is, as text."""

    head_bytes = 4

    def __init__(self, text: str) -> None:
        self._rest = text.encode()

    def read(self, limit_bytes: int) -> bytes:
        part, self._rest = self._rest[:limit_bytes], self._rest[limit_bytes:]
        return part

    def head(self, body_bytes: int, body_crc: int) -> bytes:
        return body_crc.to_bytes(4, "little")


def text_of(payload: bytes) -> str:
    assert zlib.crc32(payload[4:]) == int.from_bytes(payload[:4], "little")
    return payload[4:].decode()


def entry(index: int, term: int = 1) -> Record:
    return Record(ENTRY, term, index, b"%d;" % index)


def folded(records: list[Record]) -> tuple[str, int, list[int]]:
    """What a replica makes of them: the state after all entries, its term, the terms of the entries."""
    state, base, term = "", 0, 0
    later: list[tuple[str, int]] = []
    for record in records:
        if record.kind == SNAPSHOT:
            state, base, later = text_of(record.payload), record.index, []
        elif record.kind == ENTRY:
            assert record.index <= base + len(later) + 1, "an entry is missing"
            later = [*later[: record.index - base - 1], (record.payload.decode(), record.term)]
        else:
            term = record.term
    return state + "".join(text for text, _ in later), term, [each for _, each in later]


def opened(files: Any, path: Path = PATH) -> tuple[Journal, list[Record]]:
    journal = Journal.open(path, CLUSTER, files=files)
    return journal, list(journal.replay())


def small(monkeypatch: pytest.MonkeyPatch, piece: int = 30, sync: int = 100, finish: int = 120) -> None:
    """Pieces so small that each part of a compaction takes several steps."""
    monkeypatch.setattr(compaction, "SLICE_BYTES", piece)
    monkeypatch.setattr(compaction, "SYNC_BYTES", sync)
    monkeypatch.setattr(compaction, "FINISH_BYTES", finish)


class Stopping(SimFiles):
    """Counts what is asked of the disk, and ends the machine's life, or fails, at one of these."""

    def __init__(self, disk: Disk, at: int = -1, error: OSError | None = None) -> None:
        super().__init__(disk, lambda ms: None)
        self.at = at
        self.error = error
        self.calls = 0

    def _alive(self) -> None:
        super()._alive()
        self.calls += 1
        if self.calls == self.at:
            if self.error is not None:
                raise self.error
            self.dead = True
            raise CrashError


class Scene:
    """A journal with entries, terms and a compaction, one step after each batch; and what was acknowledged."""

    def __init__(self, files: Stopping) -> None:
        self.files = files
        self.acknowledged = ""
        self.asked = ""
        """With what was under way at the end."""
        self.term = self.asked_term = 0
        self.compacted = False
        self.refused = 0

    def run(self) -> None:
        journal, _ = opened(self.files)
        running: Compaction | None = None
        for index in range(1, 60):
            self.asked = self.acknowledged + f"{index};"
            self.asked_term = index
            journal.append([entry(index), Record(META, index, 0, b"")])
            try:
                journal.sync()
            except JournalWriteError:
                self.refused += 1
                journal.append([entry(index), Record(META, index, 0, b"")])
                journal.sync()
            self.acknowledged, self.term = self.asked, index
            if index == 20:
                before = "".join(f"{each};" for each in range(1, 17))
                keep = [*(entry(each) for each in range(17, 21)), Record(META, 20, 0, b"")]
                try:
                    running = journal.begin_compaction(Pieces(before), 1, 16, keep)
                except JournalWriteError:
                    self.refused += 1
            try:
                if running is not None and running.step():
                    running, self.compacted = None, True
            except JournalWriteError:
                running = None
                self.refused += 1
        journal.close()

    def check(self, disk: Disk) -> None:
        journal, records = opened(SimFiles(disk, lambda ms: None))
        state, term, _ = folded(records)
        assert state in (self.acknowledged, self.asked), (state, self.acknowledged)
        assert term in (self.term, self.asked_term)
        assert str(PATH) + ".new" not in disk.names
        journal.append([Record(META, 99, 0, b"")])  # and it goes on
        journal.sync()
        journal.close()
