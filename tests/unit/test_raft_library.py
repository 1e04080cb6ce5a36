"""What is changed of pysyncobj, and that a version in which it can't be is refused.

Each of these tests was seen to fail without what it is about; see docs/raft.md.
"""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pysyncobj.syncobj
import pytest
from raft_steps import followers, made, tell
from raft_world import World

from ftray.gcs.raft import library
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.errors import LibraryMovedError


def test_the_range_that_is_installed_is_the_range_that_is_accepted() -> None:
    root = Path(library.__file__).parents[3]
    asked = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = ".".join(map(str, library.VERSION_MIN))
    assert f"pysyncobj>={lowest},<0.4" in asked
    for version in (lowest, "0.3.17", "0.3.99"):
        library.check_module(library._lib, version)
    for version in ("0.3.15", "0.4.0", "1.0"):
        with pytest.raises(LibraryMovedError, match="out of the range"):
            library.check_module(library._lib, version)


def test_an_installed_version_that_was_not_tested_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "version", lambda name: "0.4.0")
    with pytest.raises(LibraryMovedError, match=r"pysyncobj 0\.4\.0 is out of the range.*install version 0\.3\.17"):
        library._load()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("createJournal", "createJournal"), ("__doApplyCommand", "SyncObj.__doApplyCommand")],
)
def test_an_installed_library_whose_names_moved_is_refused(
    name: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module as it is installed, but for one name."""
    source = Path(pysyncobj.syncobj.__file__).read_text()
    assert name in source
    moved = tmp_path / "syncobj.py"
    source = source.replace(name, name + "Moved").replace(f"import {name}Moved", f"import {name} as {name}Moved")
    moved.write_text(source)
    spec = importlib.util.spec_from_file_location("pysyncobj.syncobj", moved)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(LibraryMovedError, match=f"lacks {shown}"):
        library._load()


def test_an_instance_without_a_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FIELDS", (*library.FIELDS, "gone"))
    world = World(1, 1)
    host = world.hosts["head0:1"]
    host.start()
    assert isinstance(host.error, LibraryMovedError) and "no __gone" in str(host.error)


def test_the_names_are_those_that_the_code_uses() -> None:
    """Nothing private is used that is not looked for at the start; and the library is used here only."""
    package = Path(library.__file__).parents[2]
    users = [
        path for path in package.rglob("*.py")
        if "_SyncObj__" in (text := path.read_text()) or "import pysyncobj" in text or "from pysyncobj" in text
    ]  # fmt: skip
    assert users == [Path(library.__file__)]
    source = users[0].read_text()
    assert set(re.findall(r"_SyncObj__(\w+)", source)) <= {*library.METHODS, *library.FIELDS}
    assert set(re.findall(r"\b_lib\.(\w+)", source)) <= set(library.MODULE_NAMES)


def test_importing_the_library_leaves_the_process_as_it_was() -> None:
    program = (
        "import socket; before = socket.inet_ntop; import ftray.gcs.raft.library as library; "
        "assert socket.inet_ntop is before; assert library._lib.PIPE_NOTIFIER_ENABLED is False"
    )
    root = Path(library.__file__).parents[3]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, timeout=30)


def test_the_library_neither_polls_nor_pickles() -> None:
    raft = made(heads=1).leader().engine._raft
    assert isinstance(raft._poller, library._NoPoller)
    with pytest.raises(LibraryMovedError, match=r"pickle\.loads"):
        library._lib.pickle.loads(b"")


def test_each_replica_has_its_own_clock() -> None:
    world = World(1, 3)
    for number, host in enumerate(world.hosts.values()):
        host.skew_ms = 1e6 * number
    world.start()
    leader = world.leader()
    term = leader.engine.term
    world.run(5000)
    assert world.leader() is leader and leader.engine.term == term
    # What comes from a peer is handled at this head's time, too: it puts the election off, from now on.
    for host in followers(world):
        tell(host, leader, m.Ping(term, 0))
        now_ms = world.now_ms + host.skew_ms
        assert now_ms < host.engine._raft._SyncObj__raftElectionDeadline * 1000.0 < now_ms + 500.0


def test_a_message_is_handled_at_the_time_of_its_receiver() -> None:
    """Two in one process, far apart in time; without ticks between."""
    world = World(1, 3)
    for number, host in enumerate(world.hosts.values()):
        host.skew_ms = 1e6 * number
    world.start()
    leader = world.leader()
    world.run(100)
    host = followers(world)[0]
    for other in followers(world)[1:]:
        other.engine.tick()
    host.engine.on_leader(leader.disk.replica_id, leader.engine.term)
    now_ms = world.now_ms + host.skew_ms
    assert now_ms < host.engine._raft._SyncObj__raftElectionDeadline * 1000.0 < now_ms + 500.0


def test_the_order_of_peers_is_the_same_in_each_process() -> None:
    assert hash(library.PeerNode(b"\1" * 16)) == int.from_bytes(b"\1" * 7, "big")


def test_no_randomness_but_the_replicas_own() -> None:
    traces = []
    for seed in range(2):
        random.seed(seed)
        world = made(3)
        world.leader().crash()
        world.write(b"k")
        traces.append(world.trace)
    assert traces[0] == traces[1]


def test_the_library_never_cuts_or_compacts_the_log() -> None:
    world = made()
    leader, follower = world.leader(), followers(world)[0]
    for number in range(5):
        world.write(b"k%d" % number)
    world.run(100)
    last = follower.engine.last_index
    assert follower.replica is not None
    entry = follower.replica._log[-4]
    repeated = m.Append(leader.engine.term, 0, 0, entry[1] - 1, follower.replica._log[-5][2], (entry,))
    said = tell(follower, leader, repeated)
    assert follower.replica is not None and follower.engine.last_index == last
    assert next(message for message in said if isinstance(message, m.Ack)).next_index == entry[1] + 1
    with pytest.raises(LibraryMovedError, match="cuts the log"):
        follower.engine._raft._SyncObj__deleteEntriesFrom(2)
    assert follower.engine._raft._SyncObj__getEntries(0) == []
