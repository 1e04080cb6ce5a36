"""The command line without a cluster: help that helps, usage errors, and one JSON object whatever happens."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from wire_hosts import CLUSTER, TOKEN, make_reactor

from ftray.cli import COMMANDS, main
from ftray.cli.launch import explained
from ftray.cli.options import Amount, ByteSize, JsonObject, addresses
from ftray.cli.output import Failure, finish
from ftray.cli.start import _spec
from ftray.cli.status import amount, size
from ftray.cli.stop import started_by_command
from ftray.cli.tool import ToolClient, ToolError
from ftray.exceptions import AuthenticationError, ProtocolError
from ftray.raylet import session as session_module
from ftray.wire.loop import drive
from ftray.wire.messages import Message, ToolQuery, ToolReply
from ftray.wire.reactor import Link


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("FTRAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FTRAY_SESSION_ROOT", str(tmp_path / "root"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="ftray")


# --- help -------------------------------------------------------------------------------------------------------------


def test_the_list_of_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", result.stdout, re.MULTILINE)
    assert "Exit codes" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    for part in ("Examples:", "Exit codes:", f"ftray {name}"):
        assert part in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_has_a_help_text_and_each_command_has_json(name: str) -> None:
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None
    for each in command.commands.values() if isinstance(command, click.Group) else [command]:
        options = [option for option in each.params if isinstance(option, click.Option)]
        assert any(option.name == "as_json" for option in options)
        for option in options:
            assert option.help, option.name
    assert COMMANDS[name][1].endswith(".")


def test_help_is_quick_because_it_imports_little() -> None:
    code = "import sys; from ftray.cli import main; print(sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for module in ("trio", "rich", "msgspec", "psutil", "ftray.wire", "ftray.raylet"):
        assert f"'{module}'" not in output


def test_version() -> None:
    assert re.fullmatch(r"ftray \d+\.\d+\.\d+\n", run("--version").stdout)


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command"),
        (["start"], "--head"),
        (["start", "--head", "--address", "h:1"], "not both"),
        (["start", "--address", "host"], "HOST:PORT"),
        (["start", "--address", "host:99999"], "HOST:PORT"),
        (["start", "--address", "h:1", "--port", "5"], "--port"),
        (["start", "--head", "--port", "70000"], "70000"),
        (["start", "--heads", "h:1"], "--head"),
        (["start", "--address", "h:1", "--gcs-dir", "x"], "--gcs-dir"),
        (["start", "--head", "--heads", "h:1", "--address", "h:1"], "either --heads"),
        (["start", "--head", "--heads", "h:1,h:2"], "several heads are listed (h:1, h:2)"),
        (["start", "--head", "--heads", "h:1,h:2", "--port", "3"], "none of the heads"),
        (["start", "--head", "--heads", "h:1,h:1"], "twice"),
        (["heads", "add", "nowhere"], "HOST:PORT"),
        (["heads", "nonsense"], "No such command"),
        (["start", "--head", "--num-cpus", "-1"], "at least 0"),
        (["start", "--head", "--num-cpus", "nan"], "at least 0"),
        (["start", "--head", "--num-cpus", "many"], "not a number"),
        (["start", "--head", "--resources", "{"], "not valid JSON"),
        (["start", "--head", "--resources", "[1]"], "not a JSON object"),
        (["start", "--head", "--resources", '{"a": "b"}'], "not a number"),
        (["start", "--head", "--resources", '{"a": true}'], "not a number"),
        (["start", "--head", "--labels", '{"a": 1}'], "not a string"),
        (["start", "--head", "--object-store-memory", "5XB"], "not a size"),
        (["start", "--head", "--object-store-memory", "0"], "positive"),
        (["logs", "-f"], "--follow"),
        (["logs", "x", "-f", "--json"], "--json"),
        (["logs", "x", "--worker", "5"], "not both"),
        (["logs", "-n", "-1"], "-1"),
    ],
)
def test_usage_errors_say_what_is_wrong(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1", 1), ("512MB", 512 * 10**6), ("2GiB", 2 << 30), ("1.5g", 1_500_000_000), (".5ki", 512), ("10 kb", 10_000)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert ByteSize().convert(text, None, None) == size_bytes


def test_amounts_objects_and_addresses() -> None:
    assert [Amount().convert(text, None, None) for text in ("2", "0.5", "0")] == [2, 0.5, 0]
    assert JsonObject(numbers=True).convert('{"disk": 2.5}', None, None) == {"disk": 2.5}
    assert addresses("a:1, tcp:[::1]:22") == ["tcp:a:1", "tcp:[::1]:22"]


def options(**given: Any) -> dict[str, Any]:
    names = (
        "head", "address", "heads", "gcs_dir", "port", "num_cpus", "num_gpus", "memory", "resources", "labels",
        "object_store_memory",
    )  # fmt: skip
    return {**dict.fromkeys(names), "host": "127.0.0.1", "session_root": None, "block": False, **given}


def test_the_spec_of_a_head_and_of_a_node_that_joins() -> None:
    head = _spec(options(head=True, num_cpus=2, resources={"disk": 1.0}))
    assert (head["head"], head["port"], head["num_cpus"], head["resources"]) == (True, 6380, 2, {"disk": 1.0})
    assert head["lifeline"] is False and os.path.isabs(head["session_root"])
    node = _spec(options(head=False, address="h1:1,h2:2", block=True))
    assert (node["head"], node["address"], node["lifeline"]) == (False, "tcp:h1:1,tcp:h2:2", True)
    assert _spec(options(head=True, port=0))["port"] == 0


def test_the_spec_of_one_of_several_heads(tmp_path: Path) -> None:
    def head(**given: Any) -> dict[str, Any]:
        return _spec(options(**{"head": True, "host": None, "session_root": str(tmp_path), **given}))

    same = head(heads="127.0.0.1:1,127.0.0.1:2", port=2)
    assert same["heads"] == ["tcp:127.0.0.1:1", "tcp:127.0.0.1:2"] and not same["join"]
    assert (same["head_endpoint"], same["host"], same["port"]) == ("tcp:127.0.0.1:2", "127.0.0.1", 2)
    assert same["gcs_dir"] == str(tmp_path / "gcs-127.0.0.1-2")
    others = head(heads="a:6380,b:6380", host="b", gcs_dir=str(tmp_path))
    assert (others["head_endpoint"], others["gcs_dir"]) == ("tcp:b:6380", str(tmp_path))
    everywhere = head(heads="a:1,b:2", host="0.0.0.0", port=1)
    assert (everywhere["head_endpoint"], everywhere["host"], everywhere["port"]) == ("tcp:a:1", "0.0.0.0", 1)
    new = head(address="a:1,b:2", host="c", port=3)
    assert new["join"] and new["heads"] == ["tcp:a:1", "tcp:b:2"] and new["head_endpoint"] == "tcp:c:3"
    assert "head_endpoint" not in head() and "head_endpoint" not in head(gcs_dir=str(tmp_path))
    (tmp_path / "heads.journal").touch()
    again = head(gcs_dir=str(tmp_path), host="b", port=2)
    assert (again["head_endpoint"], again["heads"], again["join"]) == ("tcp:b:2", [], False)


def test_one_of_several_heads_needs_the_token() -> None:
    result = run("start", "--head", "--heads", "127.0.0.1:1,127.0.0.1:2", "--port", "2")
    assert result.exit_code == 1 and "FTRAY_TOKEN" in result.stderr and "token_hex" in result.stderr


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["status"], ["stop"], ["logs"], ["heads", "list"]])
def test_no_cluster_is_exit_code_3_with_and_without_json(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 3
    assert result.stdout == "" and result.stderr.startswith("Error: no ")
    result = run(*arguments, "--json")
    assert result.exit_code == 3 and result.stderr == ""
    said = json.loads(result.stdout)
    assert said["ok"] is False and said["error"]


def test_a_head_that_is_not_there_and_a_missing_token(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("start", "--address", "127.0.0.1:1")
    assert result.exit_code == 1 and "FTRAY_TOKEN" in result.stderr
    monkeypatch.setenv("FTRAY_TOKEN", "not hexadecimal")
    result = run("start", "--address", "127.0.0.1:1")
    assert result.exit_code == 1 and "hexadecimal" in result.stderr
    monkeypatch.setenv("FTRAY_TOKEN", "ab" * 32)
    result = run("start", "--address", "127.0.0.1:1", "--json")
    assert result.exit_code == 3
    said = json.loads(result.stdout)
    assert "127.0.0.1:1" in said["error"] and said["remedy"]


def test_a_port_in_use_names_who_has_it() -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        result = run("start", "--head", "--port", str(port), "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["holder_pid"] == os.getpid() and f"port {port}" in said["error"] and "--port" in said["remedy"]


def test_a_host_that_is_not_this_machines() -> None:
    result = run("start", "--head", "--host", "192.0.2.1")
    assert result.exit_code == 1 and "0.0.0.0" in result.stderr


def test_what_a_node_says_is_explained() -> None:
    assert "FTRAY_TOKEN" in explained("the cluster token does not match", {}).remedy
    assert "--port" in explained("[Errno 98] Address already in use", {"host": "127.0.0.1", "port": 1}).remedy
    assert explained("something else", {}).message == "something else"


def test_a_failures_details_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> dict[str, Any]:
        raise Failure("it broke", "mend it", 3, pid=7)

    with pytest.raises(SystemExit) as exit_info:
        finish(True, body, lambda answer: None)
    assert exit_info.value.code == 3
    said = json.loads(capsys.readouterr().out)
    assert said == {"ok": False, "error": "it broke", "remedy": "mend it", "pid": 7}


# --- logs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    directory = tmp_path / "root" / "session_20260101-000000_1" / "logs"
    directory.mkdir(parents=True)
    (directory / "raylet.log").write_text("".join(f"line {number}\n" for number in range(10)))
    (directory / "worker-77.out").write_text("printed\n")
    (directory / "worker-77.err").write_text("complained\n")
    return directory


def test_logs_of_a_dead_session_are_listed(logs: Path) -> None:
    result = run("logs")
    assert result.exit_code == 0 and "raylet.log" in result.stdout and str(logs) in result.stdout
    listed = json.loads(run("logs", "--json").stdout)
    assert [row["file"] for row in listed["files"]] == ["raylet.log", "worker-77.err", "worker-77.out"]


def test_the_last_lines_of_a_file_and_of_a_worker(logs: Path) -> None:
    assert run("logs", "raylet.log", "-n", "2").stdout == "line 8\nline 9\n"
    both = run("logs", "--worker", "77").stdout
    assert both == "==> worker-77.err <==\ncomplained\n==> worker-77.out <==\nprinted\n"
    said = json.loads(run("logs", "raylet.log", "-n", "1", "--json").stdout)
    assert said["logs"] == [{"file": "raylet.log", "lines": ["line 9"]}]


@pytest.mark.parametrize("name", ["nothing.log", "../token", "/etc/passwd"])
def test_a_file_that_is_no_log_is_refused(logs: Path, name: str) -> None:
    result = run("logs", name)
    assert result.exit_code == 1 and "no log file" in result.stderr
    assert run("logs", "--worker", "5").exit_code == 1


# --- showing ----------------------------------------------------------------------------------------------------------


def test_figures_for_people() -> None:
    assert [size(value) for value in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5 GiB"]
    assert [amount("CPU", 0.5), amount("memory", 1 << 30)] == ["0.5", "1 GiB"]


def test_which_sessions_stop_is_about() -> None:
    assert started_by_command({"gcs_endpoints": ["unix:/x", "tcp:127.0.0.1:6380"]})
    assert not started_by_command({"gcs_endpoints": ["unix:/x"]})
    assert not started_by_command({"gcs_endpoints": ["tcp:h:1"], "embedded": True})


STATUS = {
    "node": {
        "node_id": "ab" * 16, "pid": 77, "head": True, "labels": {}, "session_dir": "/s", "raylet_endpoint": "unix:/r",
        "gcs_endpoints": ["unix:/g", "tcp:127.0.0.1:6380"], "gcs_connected": False,
    },
    "resources": {"total": {"CPU": 2.0, "memory": float(1 << 30)}, "available": {"CPU": 0.5, "memory": 0.0}},
    "workers": [
        {"worker_id": "cd" * 16, "pid": 78, "state": "LEASED", "job_id": "01", "blocked": True, "lease_id": 1,
         "running": "my_task", "actor_id": ""},
    ],
    "drivers": [], "leases": [], "actors": [],
    "demands": [{"name": "my_task", "want": 5, "held": 1, "missing": "", "client": "", "class_id": 1}],
    "infeasible": [{"client": "", "class_id": 2, "name": "huge", "missing": "64 CPU"}],
    "store": {"used_bytes": 1024, "capacity_bytes": 2048},
    "gcs": {
        "counts": {"nodes": {"ALIVE": 2}, "jobs": {}, "actors": {"DEAD": 1}},
        "nodes": [
            {"node_id": "ab" * 16, "state": "ALIVE", "hostname": "h1", "pid": 77, "resources": {"CPU": 2}},
            {"node_id": "ef" * 16, "state": "DEAD", "hostname": "h2", "pid": 9, "resources": {"CPU": 4}},
        ],
    },
}  # fmt: skip


def test_status_in_tables_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftray.cli.find.local_session", lambda root, address: {})
    monkeypatch.setattr("ftray.cli.find.ask", lambda session, what: STATUS)
    monkeypatch.setenv("COLUMNS", "140")
    shown = run("status")
    assert shown.exit_code == 0
    for part in ("abababababab", "127.0.0.1:6380", "not connected", "my_task", "waits in get", "h2", "1 KiB", "64 CPU"):
        assert part in shown.stdout
    assert json.loads(run("status", "--json").stdout) == {"ok": True, **STATUS}
    monkeypatch.setattr("ftray.cli.find.ask", lambda session, what: {**STATUS, "gcs": None, "store": {}, "workers": []})
    assert run("status").exit_code == 0


# --- the tool client --------------------------------------------------------------------------------------------------


class Tools:
    """A node's side: echoes the question, or fails."""

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        assert isinstance(message, ToolQuery)
        if message.what == "fail":
            link.send(ToolReply(message.request, "no such thing"))
        elif message.what == "vanish":
            link.close("gone")
        else:
            answer = {"what": message.what, "arguments": message.arguments}
            link.send(ToolReply(message.request), json.dumps(answer).encode())

    def on_closed(self, link: Link, reason: str) -> None:
        pass


@pytest.fixture
def node(tmp_path: Path) -> Any:
    """A served endpoint: the tool client blocks, so the other side needs a thread of its own."""
    import threading

    import trio

    reactor = make_reactor()
    endpoint = reactor.listen(f"unix:{tmp_path}/node", lambda link: Tools())
    stop = trio.Event()
    ready = threading.Event()
    tokens: list[trio.lowlevel.TrioToken] = []

    async def serve() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drive, reactor)
            ready.set()
            await stop.wait()
            nursery.cancel_scope.cancel()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    ready.wait(10)
    yield endpoint
    tokens[0].run_sync_soon(stop.set)
    thread.join(10)
    assert reactor.handler_errors == []
    reactor.close()


def test_a_tool_asks_and_gets_answers(node: str) -> None:
    with ToolClient(node, TOKEN, CLUSTER) as client:
        assert client.query("one") == {"what": "one", "arguments": {}}
        assert client.query("two", lines=5) == {"what": "two", "arguments": {"lines": 5}}
        with pytest.raises(ToolError, match="no such thing"):
            client.query("fail")
        assert client.query("after")["what"] == "after"
        with pytest.raises(ProtocolError, match="closed the connection"):
            client.query("vanish")


def test_a_tool_with_the_wrong_token_or_nobody_to_ask(node: str, tmp_path: Path) -> None:
    with pytest.raises(AuthenticationError):
        ToolClient(node, b"wrong")
    with pytest.raises(FileNotFoundError):
        ToolClient(f"unix:{tmp_path}/nobody", TOKEN)


def test_a_node_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(f"{tmp_path}/mute")
        mute.listen()
        with pytest.raises(TimeoutError, match="mute"):
            ToolClient(f"unix:{tmp_path}/mute", TOKEN, timeout_s=0.01)


@pytest.fixture
def short_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A session root whose path leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="ft-") as root:
        monkeypatch.setenv("FTRAY_SESSION_ROOT", root)
        yield root


def test_a_session_that_does_not_answer_is_a_failure_with_a_remedy(short_root: str) -> None:
    from ftray.cli.find import ask, local_session

    root = short_root
    folder = session_module.create_session(root)
    session_module.write_token(folder, TOKEN)
    node_json = {
        "pid": os.getpid(), "node_id": "ab", "cluster_id": CLUSTER.hex(), "raylet_endpoint": f"unix:{folder}/none",
        "gcs_endpoints": ["tcp:h:1"], "head": True, "started": 1.0,
    }  # fmt: skip
    session_module.write_node_json(folder, node_json)
    found = local_session(root, "h:1")
    assert found["session_dir"] == folder
    with pytest.raises(Failure, match="can't be reached") as failure:
        ask(found, "status")
    assert "raylet.log" in failure.value.remedy
    with pytest.raises(Failure, match="no node of the cluster at h:2"):
        local_session(root, "h:2")
    assert run("status").exit_code == 1


@pytest.mark.parametrize("arguments", [["list", "nonsense"], ["nonsense"], ["memory", "--objects", "many"]])
def test_a_wrong_command_line_is_one_object_too(arguments: list[str]) -> None:
    shown = CliRunner().invoke(main, [*arguments, "--json"])
    assert shown.exit_code == 2
    said = json.loads(shown.output)
    assert said["ok"] is False and said["error"] and "--help" in said["remedy"]
