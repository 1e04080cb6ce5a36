"""`ftray start --head --heads` and `ftray heads`, typed wrongly: what is wrong, exit code 2, one object as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ftray.cli import launch, main
from ftray.cli.output import Failure

THREE = "127.0.0.1:1,127.0.0.1:2,127.0.0.1:3"
START = ["start", "--head", "--heads"]
WRONG: list[tuple[list[str], str]] = [
    ([*START], "--heads"),
    ([*START, ""], "--heads: it is empty"),
    ([*START, " "], "--heads: it is empty"),
    ([*START, ","], "HOST:PORT"),
    ([*START, f"{THREE},"], "HOST:PORT"),
    ([*START, "a"], "HOST:PORT"),
    ([*START, "a:0,b:1", "--host", "a"], "'a:0' is not HOST:PORT"),
    ([*START, "a:-1"], "HOST:PORT"),
    ([*START, "a:65536"], "HOST:PORT"),
    ([*START, "unix:/x,a:1", "--host", "a"], "HOST:PORT"),
    ([*START, THREE], "several heads are listed (127.0.0.1:1, 127.0.0.1:2, 127.0.0.1:3): say with --host"),
    ([*START, THREE, "--host", "127.0.0.1"], "more than one of the heads"),
    ([*START, THREE, "--port", "4"], "none of the heads"),
    ([*START, THREE, "--port", "0"], "none of the heads"),
    ([*START, THREE, "--host", "localhost", "--port", "1"], "none of the heads"),
    ([*START, "a:1,b:1,a:1", "--host", "a"], "named twice"),
    ([*START, THREE, "--port", "1", "--gcs-dir", ""], "--gcs-dir: it is empty"),
    ([*START, THREE, "--port", "1", "--gcs-dir", __file__], "is a file"),
    ([*START, THREE, "--port", "1", "--host", ""], "--host: it is empty"),
    ([*START, THREE, "--port", "1", "--address", "a:1"], "either --heads"),
    (["start", "--heads", THREE], "either --head"),
    (["start", "--heads", THREE, "--address", "a:1"], "add --head"),
    (["start", "--address", ""], "--address: it is empty"),
    (["start", "--address", "a:1", "--gcs-dir", "x"], "add --head"),
    (["start", "--head", "--address", "a:1"], "not both"),
    (["start", "--head", "--address", "a:1", "--port", "0"], "not both"),
    (["heads", "nonsense"], "No such command"),
    (["heads", "list", "more"], "unexpected extra argument"),
    (["heads", "list", "--nonsense"], "No such option"),
    (["heads", "list", "--address", "a"], "HOST:PORT"),
    (["heads", "add"], "HEAD"),
    (["heads", "add", "a"], "HOST:PORT"),
    (["heads", "add", "a:1", "b:1"], "unexpected extra argument"),
    (["heads", "remove"], "HEAD"),
    (["heads", "remove", ""], "is empty"),
    (["heads", "remove", "a:x"], "HOST:PORT"),
    (["heads", "replace", "a:1"], "NEW"),
    (["heads", "replace", "", "a:1"], "is empty"),
    (["heads", "replace", "a:1", "b"], "HOST:PORT"),
]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FTRAY_SESSION_ROOT", str(tmp_path))
    monkeypatch.setenv("FTRAY_TOKEN", "ab" * 32)
    monkeypatch.setattr(launch, "spawn", lambda spec: pytest.fail(f"it went on to start a node: {spec}"))


def run(arguments: list[str]) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[" ".join(arguments)[:60] for arguments, _ in WRONG])
def test_what_is_typed_wrongly_is_said(arguments: list[str], said: str) -> None:
    shown = run(arguments)
    assert (shown.exit_code, "Traceback" in shown.output) == (2, False), shown.output
    assert said in " ".join(shown.output.split())
    shown = run([*arguments, "--json"])
    answer = json.loads(shown.output)
    if arguments[-1] == "--heads":
        return  # which takes the option for its value; that is no list of heads either
    assert shown.exit_code == 2 and answer["ok"] is False and said in answer["error"]


@pytest.mark.parametrize("token", ["", "not hexadecimal"])
def test_a_head_without_a_right_token_is_told_how_to_get_one(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAY_TOKEN", token)
    monkeypatch.setattr(launch, "check_port_free", lambda host, port: None)
    shown = run([*START, THREE, "--port", "1", "--json"])
    answer = json.loads(shown.output)
    assert shown.exit_code == 1 and "token" in answer["error"].lower()


def test_a_new_head_asks_first_whether_anybody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise it would wait for a minute for a cluster that does not know its token, say."""
    asked: list[Any] = []

    def check(endpoints: list[str], token: bytes) -> None:
        asked.append((endpoints, token))
        raise Failure("the head at a:1 does not accept the token")

    monkeypatch.setattr(launch, "check_heads", check)
    monkeypatch.setattr(launch, "check_port_free", lambda host, port: None)
    join = ["start", "--head", "--address", "a:1", "--port", "7", "--gcs-dir", str(tmp_path), "--json"]
    assert "does not accept" in json.loads(run(join).output)["error"]
    assert asked == [(["tcp:a:1"], bytes.fromhex("ab" * 32))]
    (tmp_path / "heads.journal").touch()
    monkeypatch.setattr(launch, "spawn", lambda spec: (_ for _ in ()).throw(Failure("started")))
    assert json.loads(run(join).output)["error"] == "started"  # it knows its cluster, and waits for it
    assert len(asked) == 1
