"""Runtime environments at a node, seen in messages: what is fetched when, what waits for what, what is kept on disk.
Real processes, fake workers. The first test finds a node that has never had an environment."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from raylet_node import Driver, GcsPeer, NodeProcess, Tool, wait_gone

from ftray.gcs.state.commands import KvPut, RegisterActor
from ftray.gcs.state.packages import PACKAGES
from ftray.gcs.state.tables import ActorState
from ftray.ids import content_hash
from ftray.raylet.packages import Manifest, chunk_key, package_uri
from ftray.wire import messages as m


@pytest.fixture(scope="module")
def node() -> Iterator[NodeProcess]:
    """One for all tests: each has a driver, so a job, of its own."""
    made = NodeProcess(config={"environment_bytes_max": 1, "idle_worker_kill_ms": 1})
    assert made.ready["ok"], made.ready
    yield made
    made.close()


@pytest.fixture
def driver(node: NodeProcess) -> Iterator[Driver]:
    made = Driver(node)
    yield made
    made.close()


@pytest.fixture
def gcs(node: NodeProcess) -> Iterator[GcsPeer]:
    made = GcsPeer(node)
    yield made
    made.close()


def package(text: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("text", text)
    return sink.getvalue()


def upload(gcs: GcsPeer, data: bytes, chunk_bytes: int = 40) -> str:
    digest, manifest = content_hash(data), Manifest(len(data), chunk_bytes)
    for number in range(manifest.chunks):
        part = data[number * chunk_bytes : (number + 1) * chunk_bytes]
        assert gcs.command(KvPut(PACKAGES, chunk_key(digest, number), part)).ok
    assert gcs.command(KvPut(PACKAGES, digest, msgspec.msgpack.encode(manifest))).ok
    return package_uri(data, "zip")


def demand(class_id: int, want: int, environment: str = "", first: bool = True) -> m.LeaseDemand:
    return m.LeaseDemand(class_id, want, {"CPU": 1.0} if first else None, f"class{class_id}", environment)


def folders(node: NodeProcess) -> set[str]:
    root = Path(node.ready["session_dir"], "environments")
    return {name for name in os.listdir(root) if ".old-" not in name} if root.exists() else set()


def said(env: Any) -> str:
    return json.dumps(env, sort_keys=True, separators=(",", ":"))


def told(driver: Driver, grant: m.LeaseGranted) -> dict[str, Any]:
    """What the worker was told of its environment."""
    meaning = driver.run(grant, b"environment")
    return json.loads(meaning) if meaning else {}


def test_without_an_environment_nothing_is_said_or_kept(node: NodeProcess, driver: Driver) -> None:
    (grant,) = driver.lease(1, CPU=2.0)
    assert told(driver, grant) == {}
    assert driver.run(grant, b"cpus") == b"2.0"
    assert not Path(node.ready["session_dir"], "environments").exists()


def test_packages_are_unpacked_once_and_leave_when_nobody_needs_them(
    node: NodeProcess, driver: Driver, gcs: GcsPeer
) -> None:
    one, two = upload(gcs, package("one")), upload(gcs, package("two"))
    driver.say(demand(1, 1, said({"working_dir": one, "env_vars": {"A": "1"}})))
    grant, _ = driver.take(m.LeaseGranted)
    meaning = told(driver, grant)
    folder = Path(meaning["working_dir"])
    assert (folder / "text").read_text() == "one"
    assert json.loads(meaning["environment"]) == {"working_dir": one, "env_vars": {"A": "1"}}
    inode = os.stat(folder / "text").st_ino
    # Another environment with the same package shares it.
    driver.say(demand(2, 1, said({"working_dir": one, "py_modules": [two]})))
    second, _ = driver.take(m.LeaseGranted)
    shared = told(driver, second)
    assert shared["working_dir"] == str(folder) and os.stat(folder / "text").st_ino == inode
    assert shared["paths"] == [str(folder.parent / two[16:48])]
    assert folders(node) == {one[16:48], two[16:48]}
    # The limit is a byte, but nothing goes while the job lives.
    driver.say(demand(1, 0, first=False))  # before they are returned, or they are granted anew
    driver.say(demand(2, 0, first=False))
    driver.say(m.ReturnLeases((grant.lease_id, second.lease_id)))
    other = Driver(node)
    other.lease(1)
    assert folders(node) == {one[16:48], two[16:48]}
    driver.say(m.Unregister("done"))
    with driver.reactor.lock:
        driver.link.close("done")
    # Its workers end with it, and then its packages may.
    wait_folders(other, node, set())
    # They are fetched again when they are wanted again.
    other.say(demand(5, 1, said({"working_dir": one})))
    grant, _ = other.take(m.LeaseGranted)
    assert (Path(told(other, grant)["working_dir"]) / "text").read_text() == "one"
    other.close()


def wait_folders(driver: Driver, node: NodeProcess, expected: set[str]) -> None:
    def look() -> bool:
        with driver.reactor.lock:  # so that the wait ends without a message
            driver.reactor.call_later(5, lambda: None)
        return folders(node) == expected

    driver.until(look)


def test_demand_waits_for_its_packages_and_fails_without(node: NodeProcess, driver: Driver, gcs: GcsPeer) -> None:
    data = package("late")
    environment = said({"working_dir": package_uri(data, "zip")})
    driver.say(demand(1, 2, environment))
    failed, _ = driver.take(m.LeaseEnvironmentFailed)
    assert failed.class_id == 1 and "is not in this cluster" in failed.error
    upload(gcs, data)
    driver.say(demand(1, 1, first=False))  # resources and environment are said once
    grant, _ = driver.take(m.LeaseGranted)
    assert grant.class_id == 1 and told(driver, grant)["working_dir"]
    assert not [each for _, each, _ in driver.received if isinstance(each, m.LeaseGranted)]


@pytest.mark.parametrize(
    "environment", ["{", "[]", '{"pip":["x"]}', '{"working_dir":"/etc"}', '{"py_modules":["/etc"]}', '{"env_vars":1}']
)
def test_what_no_driver_says_is_refused_and_harms_nothing(driver: Driver, environment: str) -> None:
    driver.say(demand(1, 1, environment))
    failed, _ = driver.take(m.LeaseEnvironmentFailed)
    assert failed.class_id == 1 and "runtime environment" in failed.error
    assert driver.lease(1, class_id=2)


def test_a_failure_at_the_worker_withdraws_the_demand(node: NodeProcess, driver: Driver) -> None:
    environment = said({"env_vars": {"FAKE": "fail"}})
    driver.say(m.LeaseDemand(1, 2, {"CPU": 2.0}, "class1", environment))  # one at a time
    failed, _ = driver.take(m.LeaseEnvironmentFailed)
    assert (failed.class_id, failed.error) == (1, "as the test wants it")
    # Until it is asked for anew, no worker is spent on it.
    grants = driver.lease(2, class_id=2)
    assert not [each for _, each, _ in driver.received if isinstance(each, m.LeaseEnvironmentFailed)]
    driver.say(demand(2, 0, first=False))
    driver.say(m.ReturnLeases(tuple(grant.lease_id for grant in grants)))
    driver.say(demand(1, 1, first=False))
    driver.take(m.LeaseEnvironmentFailed)


def test_a_set_up_that_nobody_waits_for_any_more_holds_nothing(node: NodeProcess, driver: Driver) -> None:
    other = Driver(node)
    tool = Tool(node)
    environment = said({"env_vars": {"FAKE": "NEVER READY"}})
    driver.say(m.LeaseDemand(1, 1, {"CPU": 2.0}, "class1", environment))

    def worker(status: dict[str, Any]) -> str:
        mine = [each for each in status["leases"] if each["owner"] == driver.worker_id.hex()]
        return str(mine[0]["worker_id"]) if mine else ""

    worker_id = worker(tool.ask_until(worker))
    other.say(demand(1, 1))
    driver.say(demand(1, 0, first=False))
    other.take(m.LeaseGranted)
    # The worker ends with its job, however long it would take.
    (pid,) = [each["pid"] for each in tool.ask("status")["workers"] if each["worker_id"] == worker_id]
    driver.close()
    wait_gone(pid)
    other.close()
    tool.close()


def test_a_worker_that_speaks_out_of_turn_loses_its_link(node: NodeProcess, driver: Driver) -> None:
    (grant,) = driver.lease(1)
    link = driver.push(grant, b"ready again")
    driver.until_closed(link)
    assert driver.cause(grant.worker_id) is not None
    assert driver.lease(1, class_id=2)


def test_an_actor_waits_for_its_environment(node: NodeProcess, driver: Driver, gcs: GcsPeer) -> None:
    data = package("actor")
    spec = {"task_id": b"t" * 16, "class_id": b"c" * 16, "class_name": "Counter", "args": b"", "deps": (), "inline": ()}
    spec |= {"max_concurrency": 1, "max_task_retries": 0, "asynchronous": "", "owner": b"o" * 16, "owner_endpoint": ""}
    states = []
    for number, uploaded in ((1, False), (2, True)):
        if uploaded:
            upload(gcs, data)
        actor_id = bytes([number]) * 16
        seen = gcs.watch_actor(actor_id)
        creation = m.ActorCreation(**spec, environment=said({"working_dir": package_uri(data, "zip")}))  # type: ignore[arg-type]
        register = RegisterActor(
            actor_id, driver.registered.job_id, driver.worker_id, driver.registered.node_id, "Counter",
            resources={"CPU": 2.0}, creation=msgspec.msgpack.encode(creation),
        )  # fmt: skip
        assert gcs.command(register).ok
        ends = (ActorState.ALIVE, ActorState.DEAD)
        record = gcs.until(lambda seen=seen, ends=ends: seen and seen[-1].state in ends and seen[-1])
        states.append((record.state, record.cause.reason if record.cause is not None else ""))
    assert states[0][0] is ActorState.DEAD and "is not in this cluster" in states[0][1]
    assert states[1] == (ActorState.ALIVE, "")
