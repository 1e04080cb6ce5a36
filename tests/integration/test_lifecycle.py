"""Sessions begin and end: by the book, by accident and by force; and nothing is left of them."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.harness import (
    MARK,
    ROOT,
    Driver,
    is_running,
    marked,
    run_driver,
    session_leftovers,
    shm_files,
    wait_for_none,
    wait_until,
)

import ftray
from ftray import exceptions


@pytest.fixture(autouse=True)
def _no_session_left() -> Iterator[None]:
    yield
    ftray.shutdown()


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    name = uuid.uuid4().hex
    monkeypatch.setenv(MARK, name)
    return name


def add_remote() -> Any:
    @ftray.remote
    def add(a: int, b: int) -> int:
        return a + b

    return add


# --- by the book ----------------------------------------------------------------------------------------------------


def test_a_session_works_and_leaves_nothing_at_shutdown(mark: str) -> None:
    shm = shm_files()
    assert not ftray.is_initialized()
    session = ftray.init(num_cpus=2)
    assert ftray.is_initialized()
    assert ftray.get(add_remote().remote(1, 2)) == 3
    assert marked(mark)
    folder = Path(session.session_dir)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    ftray.shutdown()
    assert not ftray.is_initialized()
    assert marked(mark) == {}
    assert session_leftovers(folder) == []
    assert (folder / "logs").is_dir()
    assert not {name for name in shm_files() - shm if "ftray" in name}
    ftray.shutdown()  # once more does nothing


def test_shutdown_does_not_wait_for_what_runs(mark: str, tmp_path: Path) -> None:
    ftray.init(num_cpus=2)
    started = tmp_path / "started"

    @ftray.remote
    def forever() -> None:
        started.touch()
        while True:
            time.sleep(0.01)

    @ftray.remote
    class Sleeper:
        def forever(self) -> None:
            time.sleep(1000)

    sleeper = Sleeper.remote()
    refs = [forever.remote() for _ in range(5)] + [sleeper.forever.remote()]
    wait_until(started.exists)
    begun = time.monotonic()
    ftray.shutdown()
    assert time.monotonic() - begun < 3.0
    assert marked(mark) == {}
    with pytest.raises(exceptions.NotInitializedError):
        ftray.get(refs[0])


def test_init_again_after_shutdown() -> None:
    add = add_remote()
    ftray.init(num_cpus=1)
    old = add.remote(1, 1)
    assert ftray.get(old) == 2
    ftray.shutdown()
    ftray.init(num_cpus=1)
    assert ftray.get(add.remote(2, 2)) == 4  # the same remote function, exported anew
    with pytest.raises(exceptions.ForeignRefError, match="session that is over"):
        ftray.get(old)
    with pytest.raises(exceptions.ForeignRefError):
        ftray.wait([old])
    with pytest.raises(exceptions.ForeignRefError):
        add.remote(old, 1)


def test_a_session_is_a_context_manager(mark: str) -> None:
    with ftray.init(num_cpus=1) as session:
        assert ftray.get(add_remote().remote(1, 2)) == 3
        assert session.session_dir in repr(session)
        assert session["node_id"] == session.node_id
    assert not ftray.is_initialized()
    with pytest.raises(KeyError, match="mine"), ftray.init(num_cpus=1):
        raise KeyError("mine")
    assert not ftray.is_initialized()
    assert marked(mark) == {}


def test_init_twice_is_an_error_unless_told_otherwise() -> None:
    session = ftray.init(num_cpus=1)
    with pytest.raises(exceptions.AlreadyInitializedError, match=r"ftray\.shutdown\(\).*ignore_reinit_error"):
        ftray.init(num_cpus=1)
    assert ftray.init(num_cpus=4, ignore_reinit_error=True) is session
    assert ftray.get(add_remote().remote(1, 2)) == 3
    assert ftray.cluster_resources()["CPU"] == 1


def api_calls() -> list[Callable[[], Any]]:
    add = add_remote()

    @ftray.remote
    class Actor:
        pass

    return [
        lambda: add.remote(1, 2),
        lambda: Actor.remote(),
        lambda: ftray.get([]),
        lambda: ftray.put(1),
        lambda: ftray.wait([]),
        lambda: ftray.get_actor("name"),
        ftray.list_named_actors,
        ftray.nodes,
        ftray.cluster_resources,
        ftray.available_resources,
        ftray.get_runtime_context,
    ]


def test_calls_before_init_say_so() -> None:
    for call in api_calls():
        with pytest.raises(exceptions.NotInitializedError, match=r"call ftray\.init\(\) first"):
            call()


def test_calls_after_shutdown_say_so() -> None:
    ftray.init(num_cpus=1)

    @ftray.remote
    class Counter:
        def add(self) -> int:
            return 1

    counter = Counter.remote()
    ref = ftray.put(1)
    assert ftray.get(counter.add.remote()) == 1
    ftray.shutdown()
    for call in [*api_calls(), lambda: ftray.get(ref), lambda: counter.add.remote(), lambda: ftray.kill(counter)]:
        with pytest.raises(exceptions.NotInitializedError, match=r"ftray\.init\(\)"):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_cpus": -1}, ValueError, "num_cpus"),
        ({"num_cpus": "two"}, TypeError, "num_cpus"),
        ({"num_gpus": -0.5}, ValueError, "num_gpus"),
        ({"resources": {"CPU": 1}}, ValueError, "num_cpus"),
        ({"resources": {"widget": -1}}, ValueError, "widget"),
        ({"object_store_memory": 10}, ValueError, "object_store_memory must be at least 1 MiB"),
        ({"object_store_memory": "1GB"}, TypeError, "object_store_memory is a number of bytes"),
        ({"labels": {"zone": 1}}, TypeError, "labels"),
        ({"address": 1}, TypeError, "address must be a string"),
        ({"address": "auto", "num_cpus": 2}, ValueError, "num_cpus describe a new node"),
        ({"address": "no address"}, ValueError, "host:port"),
        ({"_system_config": {"no_such_setting": 1}}, ValueError, "no_such_setting"),
        ({"num_cpu": 1}, TypeError, "num_cpu"),
    ],
)
def test_wrong_arguments_of_init_are_refused_before_anything_starts(
    arguments: dict[str, Any], error: type[Exception], text: str, mark: str
) -> None:
    with pytest.raises(error, match=text):
        ftray.init(**arguments)
    assert marked(mark) == {}
    assert not ftray.is_initialized()


# --- by accident and by force ---------------------------------------------------------------------------------------

BUSY = """
session = ftray.init(num_cpus=2)

@ftray.remote
def forever():
    while True:
        time.sleep(0.01)

@ftray.remote
class Actor:
    def ping(self):
        return "pong"

actor = Actor.remote()
assert ftray.get(actor.ping.remote()) == "pong"
big = ftray.put(bytes(1_000_000))
running = forever.remote()
print("session", session.session_dir)
print("node", session["pid"])
"""


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("os._exit(4)", 4),
        ("raise ValueError('mine')", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_nothing_is_left_of_a_program_that_ends_without_shutdown(ending: str, expected: int) -> None:
    with Driver(BUSY + ending) as driver:
        session_dir = driver.wait_for("session ")
        assert driver.finish() == expected, driver.dump()
        driver.check_clean(session_dir)
        if expected == 0:
            assert driver.err == ""


@pytest.mark.parametrize(
    "doing",
    [
        "ftray.get(running)",
        "ftray.wait([running])",
        "while True: pass",
        "time.sleep(1000)",
        "refs = [Actor.remote() for _ in range(1)]\nwhile True: refs = [forever.remote() for _ in range(100)]",
        "while True: ftray.get(actor.ping.remote())",
        "while True: ftray.put(bytes(200_000))",
    ],
)
def test_ctrl_c_ends_a_program_whatever_it_does(doing: str) -> None:
    with Driver(BUSY + "print('go')\n" + doing) as driver:
        session_dir = driver.wait_for("session ")
        driver.wait_for("go")
        # The line is printed before what comes after it: some microseconds in any of them.
        driver.signal(signal.SIGINT)
        assert driver.finish(10) == -signal.SIGINT, driver.dump()
        assert "KeyboardInterrupt" in driver.err
        driver.check_clean(session_dir)


def test_a_program_goes_on_after_ctrl_c() -> None:
    code = """
    session = ftray.init(num_cpus=2)

    @ftray.remote
    def add(a, b):
        return a + b

    @ftray.remote
    def forever():
        while True:
            time.sleep(0.01)

    running = forever.remote()
    caught = 0
    for _ in range(20):
        try:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
            if caught % 2:
                ftray.get(running)
            else:
                while True:
                    refs = [add.remote(i, i) for i in range(20)]
                    assert ftray.get(refs) == [2 * i for i in range(20)]
        except KeyboardInterrupt:
            caught += 1
    assert ftray.get([add.remote(i, 1) for i in range(100)]) == list(range(1, 101))
    print("caught", caught)
    ftray.shutdown()
    """
    with run_driver(code) as driver:
        assert driver.wait_for("caught ") == "20"


def test_the_node_and_its_workers_ignore_the_terminals_ctrl_c() -> None:
    """A terminal sends it to the foreground group, of which the node's processes are no members."""
    with Driver(BUSY + "print('go')\ntime.sleep(1000)") as driver:
        driver.wait_for("go")
        groups = {os.getpgid(pid) for pid in driver.left()}
        assert os.getpgid(driver.process.pid) not in groups


def test_a_child_that_outlives_its_program_does_not_keep_the_node() -> None:
    code = """
    import warnings
    warnings.simplefilter("ignore")
    session = ftray.init(num_cpus=1)
    print("session", session.session_dir)
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    print("child", child)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with Driver(code) as driver:
        session_dir = driver.wait_for("session ")
        child = int(driver.wait_for("child "))
        driver.finish()
        wait_for_none(lambda: {pid for pid in driver.left() if pid != child}, 5.0, "processes")
        wait_for_none(lambda: session_leftovers(session_dir), 5.0)
        assert is_running(child)


def test_a_forked_child_that_exits_normally_leaves_its_parents_session_alone() -> None:
    code = """
    import warnings
    warnings.simplefilter("ignore")
    session = ftray.init(num_cpus=1)

    @ftray.remote
    def add(a, b):
        return a + b

    ref = add.remote(1, 2)
    child = os.fork()
    if child == 0:
        assert not ftray.is_initialized()
        try:
            ftray.get(ref)
        except ftray.exceptions.NotInitializedError as error:
            assert "os.fork" in str(error)
            sys.exit(7)
        sys.exit(1)
    _, status = os.waitpid(child, 0)
    print("child", os.waitstatus_to_exitcode(status))
    assert ftray.get(ref) == 3
    assert ftray.get([add.remote(i, 1) for i in range(50)]) == list(range(1, 51))
    ftray.shutdown()
    """
    with run_driver(code) as driver:
        assert driver.wait_for("child ") == "7", driver.dump()


def test_a_node_that_is_killed_is_reported_and_takes_its_workers_along() -> None:
    code = (
        BUSY
        + """
later = forever.remote()
print("go")
try:
    ftray.get(running)
except ftray.exceptions.LocalRayletDiedError as error:
    print("told", str(error).replace(chr(10), " "))
for call in (lambda: ftray.get(later), lambda: ftray.put(bytes(1_000_000)), lambda: ftray.get(forever.remote())):
    try:
        call()
    except ftray.exceptions.FtrayError as error:
        print("call", type(error).__name__, str(error).replace(chr(10), " "))
ftray.shutdown()
ftray.init(num_cpus=1)

@ftray.remote
def fine():
    return "again"

print("then", ftray.get(fine.remote()))
ftray.shutdown()
"""
    )
    with Driver(code) as driver:
        session_dir = driver.wait_for("session ")
        node = int(driver.wait_for("node "))
        driver.wait_for("go")
        old = set(driver.left())
        begun = time.monotonic()
        os.kill(node, signal.SIGKILL)
        told = driver.wait_for("told ")
        assert time.monotonic() - begun < 2.0
        assert "ftray.init()" in told
        wait_for_none(lambda: old & set(driver.left()), 5.0, "workers of the dead node")
        assert driver.wait_for("then ") == "again"
        assert driver.finish() == 0, driver.dump()
        calls = [line for line in driver.out.splitlines() if line.startswith("call ")]
        assert len(calls) == 3, driver.dump()
        assert all("LocalRayletDiedError" in line or "session is over" in line for line in calls), calls
        driver.check_clean()
        assert session_leftovers(session_dir) == [], "the next start sweeps what a dead node has left"


def test_a_worker_that_is_killed_while_idle_is_replaced() -> None:
    ftray.init(num_cpus=1)

    @ftray.remote
    def pid() -> int:
        return os.getpid()

    for _ in range(3):
        worker = ftray.get(pid.remote())
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda worker=worker: not is_running(worker))
        assert ftray.get(pid.remote(), timeout=10) != worker


# --- joining --------------------------------------------------------------------------------------------------------


def test_auto_without_a_cluster_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FTRAY_SESSION_ROOT", str(tmp_path))
    with pytest.raises(exceptions.ClusterNotFoundError, match="ftray start --head"):
        ftray.init(address="auto")
    with pytest.raises(exceptions.ClusterNotFoundError, match=r"10\.1\.2\.3:6379"):
        ftray.init(address="10.1.2.3:6379")
    monkeypatch.setenv("FTRAY_ADDRESS", "auto")
    with pytest.raises(exceptions.ClusterNotFoundError):
        ftray.init()
    assert not ftray.is_initialized()
    with tempfile.TemporaryDirectory(prefix="ftray-", dir="/tmp") as root:  # paths of sockets are short
        monkeypatch.setenv("FTRAY_SESSION_ROOT", root)
        with ftray.init(address="local", num_cpus=1) as session:
            assert os.path.dirname(session.session_dir) == root, "its folder is where the commands look for it"
    monkeypatch.delenv("FTRAY_SESSION_ROOT")
    ftray.init(address="local", num_cpus=1)
    assert ftray.get(add_remote().remote(1, 2)) == 3


def test_a_program_does_not_join_another_programs_private_session(monkeypatch: pytest.MonkeyPatch) -> None:
    with Driver(BUSY + "print('go')\ntime.sleep(1000)") as driver:
        root = str(Path(driver.wait_for("session ")).parent)
        driver.wait_for("go")
        monkeypatch.setenv("FTRAY_SESSION_ROOT", root)
        with pytest.raises(exceptions.ClusterNotFoundError):
            ftray.init(address="auto")


@pytest.fixture
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A node that programs can join."""
    root = tmp_path_factory.mktemp("s")
    spec = {"head": True, "lifeline": True, "num_cpus": 2, "session_root": str(root), "port": 0}
    process = subprocess.Popen(
        [sys.executable, "-m", "ftray.raylet.main"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        process.stdin.flush()
        yield {**json.loads(process.stdout.readline()), "root": str(root)}
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def test_joining_a_node_by_address(node: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAY_SESSION_ROOT", node["root"])
    add = add_remote()
    with ftray.init(address="auto"):
        assert ftray.get(add.remote(1, 2)) == 3
        assert is_running(node["pid"])
    assert is_running(node["pid"]), "leaving does not end a node that somebody else has started"
    monkeypatch.setenv("FTRAY_ADDRESS", "auto")
    with ftray.init() as session:
        assert session.node_id == node["node_id"]
        assert ftray.get(add.remote(1, 2)) == 3
    monkeypatch.delenv("FTRAY_ADDRESS")
    tcp = next(each for each in node["gcs_endpoints"] if each.startswith("tcp:"))
    with ftray.init(address=tcp.removeprefix("tcp:")):
        assert ftray.get(add.remote(1, 2)) == 3
    monkeypatch.setenv("FTRAY_TOKEN", "00" * 32)
    with pytest.raises(exceptions.AuthenticationError, match="FTRAY_TOKEN"):
        ftray.init(address="auto")
    assert not ftray.is_initialized()


def test_two_programs_share_a_node_and_end_apart(node: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAY_SESSION_ROOT", node["root"])
    code = """
    ftray.init(address="auto")

    @ftray.remote
    def forever():
        while True:
            time.sleep(0.01)

    refs = [forever.remote() for _ in range(10)]
    print("go")
    time.sleep(1000)
    """
    with Driver(code, {"FTRAY_SESSION_ROOT": node["root"]}) as other, ftray.init(address="auto"):
        other.wait_for("go")
        other.signal(signal.SIGKILL)
        other.finish()
        # Its tasks end with it: their CPUs are ours.
        assert ftray.get([add_remote().remote(i, 1) for i in range(20)], timeout=10) == list(range(1, 21))
        wait_until(lambda: ftray.available_resources().get("CPU") == 2, what="all CPUs free")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cpu": 2}, "did you mean 'num_cpus'"),
        ({"runtime_env": {"env_var": {}}}, "did you mean 'env_vars'"),
    ],
)
def test_options_that_init_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ftray.init(**options)
    assert not ftray.is_initialized()
