"""A journal under compaction, with a crash, an error or a failed sync at each call: what was acknowledged is there."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from journal_twin import Pieces, Scene, Stopping, entry, folded, opened, small

from ftray.gcs.files import OsFiles
from ftray.gcs.journal import Journal
from ftray.gcs.state.errors import JournalFailedError
from ftray.sim.disk import CrashError, Disk, SimFiles

CLUSTER = b"C" * 16


def calls_of_a_scene() -> tuple[int, int]:
    """How many calls there are, and with which the compaction begins."""
    files = Stopping(Disk(random.Random(1)))
    journal, _ = opened(files)
    journal.close()
    scene = Scene(Stopping(Disk(random.Random(1))))
    scene.run()
    assert scene.compacted
    return scene.files.calls, 40


@pytest.mark.parametrize("power", [True, False])
def test_a_crash_at_any_step_loses_nothing(monkeypatch: pytest.MonkeyPatch, power: bool) -> None:
    small(monkeypatch)
    total, first = calls_of_a_scene()
    outcomes = set()
    for at in range(first, total + 1):
        for seed in range(6 if power else 1):
            disk = Disk(random.Random(seed))
            scene = Scene(Stopping(disk, at))
            with pytest.raises(CrashError):
                scene.run()
            if power:
                disk.lose_power()
            outcomes.add(scene.compacted)
            scene.check(disk)
    assert outcomes == {True, False}


@pytest.mark.parametrize("after", [True, False])
def test_a_crash_within_any_sync_loses_nothing(monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """Also those in the background, before or after the data was durable."""
    small(monkeypatch)
    whole = Disk(random.Random(1))
    Scene(Stopping(whole)).run()
    for at in range(20, whole.syncs):
        disk = Disk(random.Random(at))
        real = SimFiles._synced

        def synced(files: SimFiles, file: Any, writes: int, at: int = at, disk: Disk = disk, real: Any = real) -> None:
            if disk.syncs + 1 == at:
                disk.crash_in_sync = after
            real(files, file, writes)

        with monkeypatch.context() as patch:
            patch.setattr(SimFiles, "_synced", synced)
            scene = Scene(Stopping(disk))
            with pytest.raises(CrashError):
                scene.run()
        disk.lose_power()
        scene.check(disk)


def test_an_error_at_any_step_leaves_one_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, a failed sync, a rename that fails: the old journal goes on, or it says that nobody knows."""
    small(monkeypatch)
    total, first = calls_of_a_scene()
    outcomes = {"refused": 0, "failed": 0}
    for at in range(first, total + 1):
        disk = Disk(random.Random(at))
        scene = Scene(Stopping(disk, at, OSError(errno.ENOSPC, "no room")))
        try:
            scene.run()
            outcomes["refused"] += scene.refused
        except JournalFailedError:
            outcomes["failed"] += 1
        disk.lose_power()
        scene.check(disk)
    assert min(outcomes.values()) > 10, outcomes


def test_a_crash_of_the_real_files_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process leaves in a real directory."""
    small(monkeypatch)
    names = ("pwrite", "fdatasync", "begin_sync", "rename", "sync_directory")
    at = 23
    while True:
        calls = 0

        class Killed(OsFiles):
            pass

        def counted(name: str, at: int = at) -> Callable[..., Any]:
            def call(files: OsFiles, *arguments: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls >= at:
                    raise CrashError
                return getattr(OsFiles, name)(files, *arguments)

            return call

        for name in names:
            setattr(Killed, name, counted(name))
        path = tmp_path / f"{at}" / "journal"
        journal = Journal.open(path, CLUSTER, files=Killed(), fsync=False)
        list(journal.replay())
        acknowledged = ""
        try:
            for index in range(1, 21):
                journal.append([entry(index)])
                journal.sync()
                acknowledged += f"{index};"
            running = journal.begin_compaction(Pieces(acknowledged), 1, 20)
            for index in range(21, 60):
                journal.append([entry(index)])
                journal.sync()
                acknowledged += f"{index};"
                if running.step():
                    break
        except CrashError:
            journal._release()
            journal, records = opened(OsFiles(), path)
            assert folded(records)[0].startswith(acknowledged)
            journal.close()
            at += 1
            continue
        journal.close()
        break
    assert at > 28
