"""Session folders: made, found while their node lives, swept when it is dead."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftray.raylet import session

DEAD_PID = 2**22 + 1
"""Beyond the largest process id there is."""


@pytest.fixture
def root() -> Iterator[Path]:
    """Short, because paths of sockets must be."""
    path = tempfile.mkdtemp(prefix="ft-", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path)


def dead_session(root: Path, name: str, *, announced: bool = True) -> Path:
    path = root / name
    for sub in ("sockets", "logs", "gcs"):
        (path / sub).mkdir(parents=True)
    (path / "token").write_text("00")
    (path / "logs" / "raylet.log").write_text("last words")
    (path / "sockets" / "raylet.sock").write_text("")
    (path / "gcs" / "gcs.journal").write_text("")
    if announced:
        (path / "node.json").write_text(json.dumps({"pid": DEAD_PID, "started": 1.0}))
    return path


def announced(root: Path, started: float, **more: object) -> str:
    path = session.create_session(str(root))
    session.write_token(path, b"\x01\x02")
    session.write_node_json(path, {"pid": os.getpid(), "started": started, **more})
    return path


def test_a_session_belongs_to_its_user_alone(root: Path) -> None:
    path = session.create_session(str(root / "root"))
    session.write_token(path, b"secret")
    for name, mode in (("", 0o700), ("sockets", 0o700), ("logs", 0o700), ("gcs", 0o700), ("token", 0o600)):
        assert stat.S_IMODE(os.stat(os.path.join(path, name)).st_mode) == mode
    assert os.path.basename(path).startswith("session_2")
    assert os.path.basename(path).endswith(f"_{os.getpid()}")
    assert stat.S_IMODE(os.stat(root / "root").st_mode) == 0o700


def test_two_sessions_of_one_process_in_one_second(root: Path) -> None:
    assert len({session.create_session(str(root)) for _ in range(3)}) == 3


def test_a_root_that_cannot_be_trusted_is_refused(root: Path) -> None:
    root.chmod(0o777)
    with pytest.raises(session.SessionError, match="others may write"):
        session.create_session(str(root))
    file = root / "file"
    file.write_text("")
    with pytest.raises(session.SessionError, match="cannot use"):
        session.create_session(str(file))


def test_a_root_that_is_too_long_for_sockets_is_refused(root: Path) -> None:
    with pytest.raises(session.SessionError, match="too long"):
        session.create_session(str(root / ("x" * 100)))


def test_the_newest_live_session_is_found(root: Path) -> None:
    older = announced(root, 100.0)
    newer = announced(root, 200.0, node_id="ab")
    dead_session(root, "session_29990101-000000_1")
    found = session.find_session(str(root))
    assert found is not None
    assert found["session_dir"] == newer
    assert found["token"] == "0102"
    assert found["node_id"] == "ab"
    assert [each["session_dir"] for each in session.find_sessions(str(root))] == [newer, older]


def test_nothing_is_found_where_nothing_is(root: Path) -> None:
    assert session.find_session(str(root / "missing")) is None
    (root / "session_x").mkdir()
    (root / "session_x" / "node.json").write_text("[not json")
    assert session.find_session(str(root)) is None


def test_a_recycled_process_id_is_not_the_node(root: Path) -> None:
    path = announced(root, time.time())
    node = json.loads(Path(path, "node.json").read_text())
    assert session.is_alive(node)
    Path(path, "node.json").write_text(json.dumps({**node, "start_ticks": node["start_ticks"] + 1}))
    assert session.find_session(str(root)) is None


def test_cleaning_leaves_the_logs(root: Path) -> None:
    path = dead_session(root, "session_20200101-000000_1")
    session.clean_session(str(path))
    session.clean_session(str(path))
    assert [entry.name for entry in path.iterdir()] == ["logs"]
    assert (path / "logs" / "raylet.log").read_text() == "last words"


def test_folders_nested_more_deeply_than_calls_can_be_are_removed(root: Path) -> None:
    """A program can make them in its working directory. No later node of the user would start."""
    path = root / "session_2026_1"
    (path / "environments" / "/".join("d" * 200)).mkdir(parents=True)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 150)
    try:
        session.clean_session(str(path))
    finally:
        sys.setrecursionlimit(limit)
    assert not (path / "environments").exists()


def test_dead_sessions_are_swept_and_the_newest_kept(root: Path) -> None:
    alive = announced(root, time.time())
    starting = session.create_session(str(root))  # no node.json yet, but its process lives
    for minute in range(14):
        dead_session(root, f"session_20200101-00{minute:02}00_{DEAD_PID}", announced=minute % 2 == 0)
    session.clean_dead_sessions(str(root))
    dead = sorted(path for path in root.iterdir() if path.name.startswith("session_2020"))
    assert len(dead) == session.SESSIONS_KEPT
    assert dead[0].name.startswith("session_20200101-0004")
    assert all([entry.name for entry in path.iterdir()] == ["logs"] for path in dead)
    assert os.path.exists(os.path.join(alive, "node.json"))
    assert os.path.exists(os.path.join(starting, "sockets"))
