"""A node process as its clients see it: leases, deaths, logs, store, tools, its end. Real processes, fake workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from raylet_node import Driver, NodeProcess, Peer, Tool, wait_gone

from ftray.config import Config
from ftray.raylet import session
from ftray.wire import messages as m
from ftray.wire.handshake import ROLE_CLIENT, ROLE_TOOL

Connect = Callable[..., Driver]


ROOM_WAIT_MS = 300


@pytest.fixture
def node() -> Iterator[NodeProcess]:
    made = NodeProcess(config={"store_room_wait_ms": ROOM_WAIT_MS})
    assert made.ready["ok"], made.ready
    yield made
    made.close()


@pytest.fixture
def connect(node: NodeProcess) -> Iterator[Connect]:
    made: list[Driver] = []

    def connect_one(**hello: Any) -> Driver:
        made.append(Driver(node, **hello))
        return made[-1]

    yield connect_one
    for driver in made:
        driver.close()


@pytest.fixture
def tool(node: NodeProcess) -> Iterator[Tool]:
    made = Tool(node)
    yield made
    made.close()


# --- joining ----------------------------------------------------------------------------------------------------------


def test_a_driver_registers_and_learns_the_settings(node: NodeProcess, connect: Connect) -> None:
    driver = connect(namespace="mine")
    answer = driver.registered
    assert answer.error == ""
    assert (answer.node_id.hex(), answer.node_pid) == (node.ready["node_id"], node.pid)
    assert answer.namespace == "mine"
    assert answer.resources == {"CPU": 2.0, "memory": float(1 << 30)}
    assert os.stat(f"/proc/{node.pid}/fd/{answer.arena_fd}").st_size == answer.arena_bytes == 16 << 20
    assert msgspec.msgpack.decode(driver.config, type=Config) == Config(store_room_wait_ms=ROOM_WAIT_MS)
    other = connect()
    assert other.registered.job_id != answer.job_id
    assert other.registered.namespace  # one of its own


def test_the_session_is_found(node: NodeProcess) -> None:
    found = session.find_session(node.root)
    assert found is not None
    assert found["node_id"] == node.ready["node_id"]
    assert found["token"] == node.ready["token"]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"num_cpus": -1}, "negative"),
        ({"nonsense": 1}, "nonsense"),
        ({"config": {"no_such_setting": 1}}, "no_such_setting"),
        ({"head": False}, "address"),
        ({"head": False, "address": "127.0.0.1"}, "host:port"),
        ({"token": "xyz"}, "hexadecimal"),
        ({"object_store_bytes": 5}, "least"),
        ({"session_root": "/proc/nowhere"}, "session root"),
    ],
)
def test_a_wrong_specification_is_explained(spec: dict[str, Any], complaint: str) -> None:
    made = NodeProcess(**spec)
    assert not made.ready["ok"]
    assert complaint in made.ready["error"]
    assert made.process.wait(20) == 1
    made.close()


# --- leases -----------------------------------------------------------------------------------------------------------


def test_tasks_run_in_leased_workers(connect: Connect) -> None:
    driver = connect(cwd="/somewhere")
    grants = driver.lease(2)
    assert len({grant.worker_id for grant in grants}) == 2
    for grant in grants:
        assert driver.run(grant, b"echo", b"hello") == b"hello"
        assert driver.run(grant, b"job") == driver.registered.job_id + b"/somewhere"
    driver.say(m.LeaseDemand(1, 0))
    driver.say(m.ReturnLeases(tuple(grant.lease_id for grant in grants)))
    (again,) = driver.lease(1)
    assert again.worker_id in {grant.worker_id for grant in grants}  # warm
    assert again.lease_id not in {grant.lease_id for grant in grants}


def test_a_dead_worker_is_replaced_without_a_word(connect: Connect) -> None:
    driver = connect()
    (grant,) = driver.lease(1)
    driver.push(grant, b"die")
    again = driver.take(m.LeaseGranted)[0]
    assert again.worker_id != grant.worker_id
    assert driver.run(again, b"echo", b"x") == b"x"
    cause = driver.cause(grant.worker_id)
    assert cause is not None
    assert cause["signal"] == signal.SIGKILL
    assert cause["pid"] == grant.pid
    assert cause["what"] == "class1"
    assert cause["stderr_tail"] == ["these are my", "last words"]
    assert cause["worker_id"] == grant.worker_id.hex()
    assert cause["node_id"] == driver.node.ready["node_id"]


def test_the_cause_names_what_the_worker_said_it_ran(connect: Connect) -> None:
    driver = connect()
    (grant,) = driver.lease(1)
    driver.run(grant, b"name", b"pkg.work")
    driver.push(grant, b"exit", b"9")
    driver.take(m.LeaseGranted)
    cause = driver.cause(grant.worker_id)
    assert cause is not None
    assert (cause["exit_code"], cause["signal"], cause["what"]) == (9, None, "pkg.work")


def test_nobody_knows_the_cause_of_a_death_that_was_none(connect: Connect) -> None:
    assert connect().cause(os.urandom(16)) is None


def test_a_blocked_worker_lends_its_cpu(connect: Connect) -> None:
    driver = connect()
    grants = driver.lease(2)
    for grant in grants:
        driver.run(grant, b"block")
    more = driver.lease(2, class_id=2)
    assert not {grant.worker_id for grant in more} & {grant.worker_id for grant in grants}
    for grant in grants:
        driver.run(grant, b"unblock")
        driver.run(grant, b"unblock")


def test_what_can_never_be_is_said(connect: Connect, tool: Tool) -> None:
    driver = connect()
    driver.say(m.LeaseDemand(7, 1, {"CPU": 64.0}, "huge"))
    message = driver.take(m.LeaseInfeasible)[0]
    assert message.class_id == 7
    assert "64 CPU" in message.missing
    (row,) = tool.ask("status")["infeasible"]
    assert row["name"] == "huge"
    driver.say(m.LeaseDemand(8, 1, {"CPU": -1.0}, "wrong"))
    assert driver.take(m.LeaseInfeasible)[0].class_id == 8


def test_idle_leases_are_asked_back_when_others_wait(connect: Connect) -> None:
    first, second = connect(), connect()
    grants = first.lease(2)
    second.say(m.LeaseDemand(1, 1, {"CPU": 1.0}, "late"))
    assert first.take(m.LeaseReclaim)[0].lease_id == 0
    first.say(m.LeaseDemand(1, 0))
    first.say(m.ReturnLeases(tuple(grant.lease_id for grant in grants)))
    grant = second.take(m.LeaseGranted)[0]
    assert second.run(grant, b"job")[:4] == second.registered.job_id  # in a worker of its own


def test_an_owner_may_have_its_worker_killed_and_nobody_else(connect: Connect) -> None:
    driver, other = connect(), connect()
    (grant,) = driver.lease(1)
    other.say(m.KillWorker(grant.worker_id, "out of spite"))
    assert other.cause(os.urandom(16)) is None  # by now that has been handled
    assert driver.run(grant, b"echo", b"alive") == b"alive"
    child = int(driver.run(grant, b"child"))
    driver.say(m.KillWorker(grant.worker_id, "cancelled"))
    wait_gone(grant.pid)
    wait_gone(child)
    cause = driver.cause(grant.worker_id)
    assert cause is not None
    assert cause["reason"] == "cancelled"


def test_a_child_that_keeps_the_sockets_does_not_hide_a_death(connect: Connect) -> None:
    driver = connect()
    (grant,) = driver.lease(1)
    child = int(driver.run(grant, b"child"))  # a plain fork: it has the worker's descriptors
    driver.push(grant, b"exit", b"1")
    assert driver.take(m.LeaseGranted)[0].worker_id != grant.worker_id
    wait_gone(child)


# --- the ends of owners -----------------------------------------------------------------------------------------------


def test_a_driver_that_goes_takes_its_workers_with_it(node: NodeProcess, connect: Connect, tool: Tool) -> None:
    driver = connect()
    grants = driver.lease(2)
    (nested,) = (grants[0],)
    driver.run(nested, b"block")
    driver.run(nested, b"demand", b"1")  # that worker becomes an owner itself
    status = tool.ask_until(lambda status: len([each for each in status["workers"] if each["job_id"]]) == 3)
    assert len(status["leases"]) == 3
    pids = [worker["pid"] for worker in status["workers"] if worker["job_id"]]
    driver.close()
    for pid in pids:
        wait_gone(pid)
    status = tool.ask_until(
        lambda status: status["gcs"]["counts"]["jobs"] == {"FINISHED": 1}
        and len([worker for worker in status["workers"] if worker["state"] == "IDLE"]) == 3
    )
    assert (status["leases"], status["demands"], status["drivers"]) == ([], [], [])
    assert status["resources"]["available"] == status["resources"]["total"]
    assert not any(worker["job_id"] for worker in status["workers"])


def test_a_driver_that_says_goodbye(connect: Connect, tool: Tool) -> None:
    driver = connect()
    driver.say(m.Unregister("done"))
    driver.close()
    tool.ask_until(lambda status: status["gcs"]["counts"]["jobs"] == {"FINISHED": 1})


# --- bad clients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "message"),
    [
        (ROLE_CLIENT, m.LeaseDemand(1, 1, {"CPU": 1.0})),
        (ROLE_CLIENT, m.RegisterClient(b"short", 1, "", True)),
        (ROLE_CLIENT, m.RegisterClient(bytes(16), 1, "", False)),
        (ROLE_TOOL, m.WorkerBlocked()),
        (9, m.WorkerBlocked()),
    ],
)
def test_who_says_what_its_role_may_not_say_is_cut_off(
    node: NodeProcess, connect: Connect, role: int, message: m.Message
) -> None:
    peer = Peer(node)
    link = peer.connect(node.ready["raylet_endpoint"], role)
    peer.send(link, message)
    peer.until_closed(link)
    peer.close()
    assert connect().lease(1)


def test_a_bad_message_costs_the_driver_what_it_held(connect: Connect, tool: Tool) -> None:
    driver = connect()
    (grant,) = driver.lease(1)
    driver.say(m.StopActor(bytes(16), 0, False, "not mine to say"))
    driver.until_closed(driver.link)
    wait_gone(grant.pid)
    tool.ask_until(lambda status: not status["leases"])


def test_leases_and_objects_of_others_are_left_alone(connect: Connect) -> None:
    driver, other = connect(), connect()
    (grant,) = driver.lease(1)
    object_id = os.urandom(20)
    driver.say(m.CreateObject(1, object_id, 10, driver.worker_id))
    driver.take(m.ObjectCreated)
    driver.say(m.SealObject(object_id))
    other.say(m.ReturnLeases((grant.lease_id, 999)))
    other.say(m.FreeObjects((object_id, os.urandom(20))))
    other.say(m.ReleaseObjects((object_id,)))
    other.say(m.SealObject(object_id))
    other.say(m.PinObjects(2, (object_id,)))
    assert other.take(m.ObjectsPinned)[0].places[0][1] == 10
    assert driver.run(grant, b"echo", b"mine") == b"mine"


# --- the store --------------------------------------------------------------------------------------------------------


def test_objects_are_created_sealed_pinned_and_freed(connect: Connect, tool: Tool) -> None:
    driver, reader = connect(), connect()
    one, two = os.urandom(20), os.urandom(20)
    driver.say(m.CreateObject(1, one, 1000, driver.worker_id))
    created = driver.take(m.ObjectCreated)[0]
    assert (created.request, created.offset >= 0, created.error) == (1, True, "")
    reader.say(m.PinObjects(5, (two, one)))  # waits until `one` is sealed
    driver.say(m.SealObject(one))
    pinned = reader.take(m.ObjectsPinned)[0]
    assert (pinned.request, pinned.places) == (5, ((-1, 0), (created.offset, 1000)))
    driver.say(m.CreateObject(2, one, 1000, driver.worker_id))
    assert driver.take(m.ObjectCreated)[0].offset == -2
    (row,) = tool.ask("memory")["objects"]
    assert row["pins"] == {driver.worker_id.hex(): 1, reader.worker_id.hex(): 1}
    driver.say(m.ReleaseObjects((one,)))
    reader.say(m.ReleaseObjects((one,)))
    driver.say(m.FreeObjects((one,)))
    driver.say(m.PinObjects(6, (one,)))
    assert driver.take(m.ObjectsPinned)[0].places == ((-1, 0),)


def test_who_waits_for_an_object_of_a_dead_writer_hears_that_it_is_missing(connect: Connect, tool: Tool) -> None:
    writer, reader = connect(), connect()
    one, two = os.urandom(20), os.urandom(20)
    for request, object_id in enumerate((one, two)):
        writer.say(m.CreateObject(request, object_id, 10, reader.worker_id))
        writer.take(m.ObjectCreated)
    reader.say(m.PinObjects(1, (one,)))
    reader.say(m.PinObjects(2, (two,)))
    tool.ask("status")
    writer.say(m.AbortObject(two))
    assert reader.take(m.ObjectsPinned)[0] == m.ObjectsPinned(2, ((-1, 0),))
    writer.close()
    assert reader.take(m.ObjectsPinned)[0] == m.ObjectsPinned(1, ((-1, 0),))


def test_a_full_store_makes_creators_wait_then_refuses(connect: Connect, tool: Tool) -> None:
    driver = connect()
    whole = 16 << 20
    one, two = os.urandom(20), os.urandom(20)
    driver.say(m.CreateObject(1, one, whole + 1, driver.worker_id))
    assert "the whole store has" in driver.take(m.ObjectCreated)[0].error
    driver.say(m.CreateObject(2, one, whole, driver.worker_id))
    assert driver.take(m.ObjectCreated)[0].offset == 0
    driver.say(m.SealObject(one))
    driver.say(m.CreateObject(3, two, 5000, driver.worker_id))
    assert tool.ask("status")["store"]["waiting_creations"] == 1
    driver.say(m.ReleaseObjects((one,)))
    driver.say(m.FreeObjects((one,)))
    answer = driver.take(m.ObjectCreated)[0]
    assert (answer.request, answer.offset) == (3, 0)
    driver.say(m.CreateObject(4, one, whole, driver.worker_id))
    answer = driver.take(m.ObjectCreated)[0]
    assert (answer.request, answer.offset) == (4, -1)
    assert "is full" in answer.error


def test_what_a_dead_driver_owned_is_freed(connect: Connect, tool: Tool) -> None:
    driver = connect()
    driver.say(m.CreateObject(1, os.urandom(20), 1000, driver.worker_id))
    driver.take(m.ObjectCreated)
    assert tool.ask("memory")["store"]["objects"] == 1
    driver.close()
    status = tool.ask_until(lambda status: not status["drivers"])
    assert (status["store"]["objects"], status["store"]["used_bytes"]) == (0, 0)


# --- output -----------------------------------------------------------------------------------------------------------


def test_what_workers_print_reaches_the_driver_and_the_files(node: NodeProcess, connect: Connect, tool: Tool) -> None:
    driver, quiet = connect(), connect(log_to_driver=False)
    (grant,) = driver.lease(1)
    (other,) = quiet.lease(1)
    quiet.run(other, b"print", b"unheard\n")
    driver.run(grant, b"print", b"one\ntwo\n", name="f")
    lines = list(driver.take(m.LogLines)[0].lines)
    while len(lines) < 2:
        lines += driver.take(m.LogLines)[0].lines
    assert lines == [(1, "f", grant.pid, "one"), (1, "f", grant.pid, "two")]
    names = [entry["file"] for entry in tool.ask("logs")["files"]]
    assert f"worker-{grant.pid}.out" in names
    assert "raylet.log" in names
    assert tool.ask("log_tail", file=f"worker-{grant.pid}.out", lines=1)["lines"] == ["two"]
    assert tool.ask("log_tail", file=f"worker-{other.pid}.out", lines=1)["lines"] == ["unheard"]
    tool.send(tool.link, m.ToolQuery(2, "log_tail", {"file": "../node.json", "lines": 1}))
    assert "log file" in tool.take(m.ToolReply)[0].error


def test_a_worker_that_floods_its_output_does_not_stop_the_node(connect: Connect, tool: Tool) -> None:
    driver = connect()
    (grant,) = driver.lease(1)
    driver.push(grant, b"flood", b"20000")  # two megabytes
    assert tool.ask("status")["node"]["head"]
    lines = 0
    while lines < 20_000:
        message = driver.take(m.LogLines)[0]
        lines += len(message.lines) + message.dropped
    assert lines == 20_000


def test_workers_that_cannot_start_are_explained() -> None:
    node = NodeProcess(worker_entry="raylet_worker:fail_to_start")
    for _ in range(2):  # the second driver comes when all has been said
        driver = Driver(node)
        driver.say(m.LeaseDemand(1, 1, {"CPU": 1.0}, "f"))
        lines = [line[3] for line in driver.take(m.LogLines)[0].lines]
        assert "workers do not start: 5 in a row" in lines[0]
        assert "exited with code 3" in lines[0]
        assert lines[1] == "    this worker is broken"
        driver.close()
    node.close()


# --- tools ------------------------------------------------------------------------------------------------------------


def test_the_status_of_a_node_at_rest(node: NodeProcess, tool: Tool) -> None:
    status = tool.ask_until(lambda status: [row["state"] for row in status["workers"]] == ["IDLE"] * 3)
    assert status["node"]["pid"] == node.pid
    assert status["gcs"]["counts"] == {"nodes": {"ALIVE": 1}, "jobs": {}, "actors": {}}
    assert status["store"]["used_bytes"] == 0
    tool.send(tool.link, m.ToolQuery(2, "weather"))
    assert "ask for status" in tool.take(m.ToolReply)[0].error


# --- the end ----------------------------------------------------------------------------------------------------------


def assert_nothing_is_left(node: NodeProcess, pids: list[int]) -> None:
    for pid in pids:
        wait_gone(pid)
    session_dir = Path(node.ready["session_dir"])
    assert [entry.name for entry in session_dir.iterdir()] == ["logs"]
    assert session.find_session(node.root) is None
    assert "Traceback" not in node.log


@pytest.mark.parametrize("how", ["tool", "SIGTERM", "SIGINT", "lifeline"])
def test_a_clean_stop_leaves_nothing(how: str) -> None:
    node = NodeProcess(lifeline=how == "lifeline")
    driver, tool = Driver(node), Tool(node)
    (grant,) = driver.lease(1)
    child = int(driver.run(grant, b"child"))
    pids = [*node.children(), child]
    assert len(pids) >= 4
    if how == "tool":
        assert tool.ask("stop")["stopping"]
    elif how == "lifeline":
        assert node.process.stdin is not None
        node.process.stdin.close()
    else:
        os.kill(node.pid, getattr(signal, how))
    assert node.process.wait(20) == 0
    driver.until_closed(driver.link)
    assert_nothing_is_left(node, pids)
    driver.close()
    tool.close()
    node.close()


def test_a_killed_node_takes_its_processes_with_it(node: NodeProcess, connect: Connect) -> None:
    driver = connect()
    (grant,) = driver.lease(1)
    child = int(driver.run(grant, b"child"))
    pids = [*node.children(), child]
    os.kill(node.pid, signal.SIGKILL)
    for pid in (node.pid, *pids):
        wait_gone(pid)
    assert session.find_session(node.root) is None
    node.process.wait(20)
    session.clean_dead_sessions(node.root)
    assert [entry.name for entry in Path(node.ready["session_dir"]).iterdir()] == ["logs"]


def test_a_killed_template_is_replaced(node: NodeProcess, connect: Connect) -> None:
    driver = connect()
    (grant,) = driver.lease(1)
    template = int(Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text())
    os.kill(template, signal.SIGKILL)
    again = driver.take(m.LeaseGranted)[0]
    assert driver.run(again, b"echo", b"back") == b"back"
    wait_gone(grant.pid)
    cause = driver.cause(grant.worker_id)
    assert cause is not None
    assert "template" in cause["reason"]
