"""What heads answer to `ftray heads`, over real sockets, and what the command makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from heads_world import Head, HeadsWorld
from wire_hosts import Recorder, install_clock, make_reactor

from ftray.cli import heads as heads_cli
from ftray.cli import start as start_cli
from ftray.cli.output import NOT_FOUND, Failure
from ftray.cli.tool import ToolError
from ftray.wire.handshake import ROLE_TOOL
from ftray.wire.messages import ToolQuery, ToolReply


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeadsWorld]:
    made = HeadsWorld(tmp_path, install_clock(monkeypatch))
    yield made
    made.close()


def ask(world: HeadsWorld, head: Head, what: str, **arguments: Any) -> Any:
    """What that head answers: what the JSON means, or the error."""
    reactor = make_reactor(name="tool")
    world.client_reactors.append(reactor)
    recorder = Recorder()
    link = reactor.connect(head.endpoint, ROLE_TOOL, recorder)
    link.send(ToolQuery(1, what, arguments))
    world.until(lambda: recorder.messages)
    message, payload = recorder.messages[0], recorder.payloads[0]
    assert isinstance(message, ToolReply)
    link.close("done")
    return message.error or json.loads(payload)


def test_a_head_tells_what_it_is_doing_before_there_is_a_cluster(world: HeadsWorld) -> None:
    world.heads[0].start(world.endpoints)
    status = ask(world, world.heads[0], "heads")
    assert (status["role"], status["members"], status["heads"]) == ("forming", [], world.endpoints)
    assert "that takes 2 heads of 3" in status["why_no_leader"]
    assert "is no query to a head" in ask(world, world.heads[0], "nonsense")


def test_the_lead_goes_to_the_head_that_is_named(world: HeadsWorld) -> None:
    world.start()
    for by_id in (False, True):
        former = world.leader()
        target = next(head for head in world.heads if not head.leads)
        assert target.host is not None
        name = target.host.replica.replica_id.hex()[:10] if by_id else target.endpoint
        answer = ask(world, former, "transfer", to=name)
        assert answer["leader"] == target.endpoint and 0 <= answer["took_ms"] < 100
        assert world.leader() is target
    leader = world.leader()
    answer = ask(world, leader, "transfer")
    assert answer["leader"] == world.leader().endpoint != leader.endpoint


def test_a_head_that_cannot_lead_is_refused(world: HeadsWorld) -> None:
    world.start()
    leader = world.leader()
    down, other = [head for head in world.heads if not head.leads]
    assert f"{leader.endpoint} leads already" in ask(world, leader, "transfer", to=leader.endpoint)
    assert "names none of the heads" in ask(world, leader, "transfer", to="tcp:nowhere:1")
    assert "does not lead the cluster" in ask(world, other, "transfer", to=down.endpoint)
    assert "'to', a text" in ask(world, leader, "transfer", to=7)
    down.kill()
    world.settle(50)
    assert f"{down.endpoint} is not connected" in ask(world, leader, "transfer", to=down.endpoint)
    other.frozen = True
    world.settle(150)
    answer = ask(world, leader, "transfer", to=other.endpoint)
    assert f"{other.endpoint} did not take over within 1 s" in answer or "no other one leads yet" in answer
    other.frozen = False
    world.leader()


# --- the command ------------------------------------------------------------------------------------------------------


def status(role: str, name: str, **more: Any) -> dict[str, Any]:
    members = [{"replica": each * 32, "endpoint": f"tcp:{each}:1", "voter": True} for each in "abc"]
    return {
        "role": role, "replica": name * 32, "endpoint": f"tcp:{name}:1", "voter": True, "term": 3, "last_index": 12,
        "commit_index": 12, "applied_index": 12, "pid": 7, "members": members, "guests": [], "disk_full": False,
        "heads": ["tcp:a:1", "tcp:b:1", "tcp:c:1"], "why_no_leader": "", **more,
    }  # fmt: skip


def asked(answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> heads_cli._Heads:
    """Heads of which the first is known, and that answer so."""
    monkeypatch.setenv("FTRAY_TOKEN", "ab" * 32)
    heads = heads_cli._Heads("a:1", None)

    def answer(at: str, what: str, **arguments: Any) -> Any:
        found = answers[at.split(":")[1]]
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(heads, "ask", answer)
    return heads


def shown(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    heads_cli._show(answer)
    return click.unstyle(capsys.readouterr().out).splitlines()


def test_heads_that_are_down_or_frozen_are_listed_as_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = TimeoutError("no answer from tcp:b:1 within 3 s")
    down = ConnectionRefusedError(111, "Connection refused")
    answer = heads_cli._report(asked({"a": status("leader", "a", last_index=14), "b": frozen, "c": down}, monkeypatch))
    lines = shown(answer, capsys)
    assert lines[0].split() == ["HEAD", "REPLICA", "ROLE", "TERM", "LOG", "LAG"]
    assert lines[1].split() == ["a:1", "a" * 8, "leader", "3", "14", "0"]
    assert lines[2].split(maxsplit=3) == ["b:1", "b" * 8, "away", "no answer from tcp:b:1 within 3 s"]
    assert lines[3].split(maxsplit=3) == ["c:1", "c" * 8, "away", "Connection refused"]
    assert len(lines) == 4
    # With --json each row has each field.
    assert len({tuple(sorted(set(row) - {"why"})) for row in answer["heads"]}) == 1
    assert answer["heads"][1]["lag"] is None


def test_lag_is_how_much_of_what_is_committed_a_head_has_not_applied(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = status("follower", "b", last_index=9, commit_index=8, applied_index=7)
    full = status("follower", "c", disk_full=True)
    lines = shown(heads_cli._report(asked({"a": status("leader", "a"), "b": late, "c": full}, monkeypatch)), capsys)
    assert lines[2].split() == ["b:1", "b" * 8, "follower", "3", "9", "5"]
    assert lines[3].split(maxsplit=6) == ["c:1", "c" * 8, "follower", "3", "12", "0", "its disk is full"]


def test_a_cluster_that_is_being_formed_shows_the_heads_of_its_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forming = {"members": [], "term": 0, "last_index": 0, "commit_index": 0, "applied_index": 0}
    a, b = (status("forming", name, why_no_leader="it answers, but", **forming) for name in "ab")
    answer = heads_cli._report(asked({"a": a, "b": b, "c": ConnectionRefusedError(111, "refused")}, monkeypatch))
    lines = shown(answer, capsys)
    assert [line.split()[:3] for line in lines[1:3]] == [["a:1", "a" * 8, "forming"], ["b:1", "b" * 8, "forming"]]
    assert lines[3].split() == ["c:1", "away", "refused"]
    assert lines[4] == "it answers, but" == answer["problem"]


def test_another_disk_at_an_address_is_not_the_member(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"a": status("leader", "a"), "b": status("forming", "x"), "c": status("follower", "c")}
    rows = heads_cli._report(asked(answers, monkeypatch))["heads"]
    assert rows[1]["role"] == "away" and "another replica" in rows[1]["why"]


def test_a_head_that_waits_is_told_to_whom_it_may_be_added(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guests = [{"replica": "d" * 32, "endpoint": "tcp:d:1"}, {"replica": "e" * 32, "endpoint": "tcp:c:1"}]
    down = ConnectionRefusedError(111, "Connection refused")
    answers = {"a": status("leader", "a", guests=guests), "b": status("follower", "b"), "c": down, "d": down}
    lines = shown(heads_cli._report(asked(answers, monkeypatch)), capsys)
    assert "d:1 waits to be added: ftray heads add d:1, or ftray heads replace OLD d:1" in lines
    assert "c:1 waits to replace the former head there: ftray heads replace c:1 c:1" in lines


def test_a_new_head_may_take_a_moment_to_find_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = asked({each: status("leader" if each == "a" else "follower", each) for each in "abcd"}, monkeypatch)
    said = [ToolError("no head at tcp:d:1 waits to be added: start it there first"), {}]
    ask = heads.ask

    def answer(at: str, what: str, **arguments: Any) -> Any:
        if what == "heads":
            return ask(at, what)
        found = said.pop(0)
        if isinstance(found, ToolError):
            raise found
        return found

    monkeypatch.setattr(heads, "ask", answer)
    assert heads.ask_leader("add", endpoint="tcp:d:1") == {} and said == []
    monkeypatch.setattr(heads_cli, "GUEST_TIMEOUT_S", 0.0)
    said += [ToolError("no head at tcp:d:1 waits to be added: start it there first")]
    with pytest.raises(Failure, match="waits to be added"):
        heads.ask_leader("add", endpoint="tcp:d:1")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"new_cluster": True}, "The head node of a new cluster is ready"),
        ({}, "The head node is ready"),
        ({"waits_as": "d:1"}, "It has no vote yet:  ftray heads add d:1, or ftray heads replace OLD d:1"),
    ],
    ids=["alone", "one of several", "not added yet"],
)
def test_a_head_that_was_started_says_what_it_is(
    more: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {
        "head": True, "new_cluster": False, "waits_as": "", "node_id": "ab" * 16, "pid": 7, "address": "a:1",
        "session_root": "/r", "token_file": "/r/t", "session_dir": "/r/s",
    }  # fmt: skip
    start_cli._show({**answer, **more}, blocking=False)
    assert said in click.unstyle(capsys.readouterr().out)


def test_the_leader_is_that_of_the_latest_term(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"a": status("leader", "a"), "b": status("leader", "b", term=4), "c": status("follower", "c", term=4)}
    assert asked(answers, monkeypatch).leader() == "tcp:b:1"


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Failure, match="a:1: refused") as raised:
        asked({"a": ConnectionRefusedError(111, "refused")}, monkeypatch).statuses()
    assert raised.value.exit_code == NOT_FOUND


def test_a_transfer_tells_who_leads_or_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = asked({"a": status("leader", "a"), "b": status("follower", "b"), "c": status("follower", "c")}, monkeypatch)
    real, done = heads.ask, list[Any]()

    def transfers(at: str, what: str, **arguments: Any) -> Any:
        if what != "transfer":
            return real(at, what)
        assert (at, arguments) == ("tcp:a:1", {"to": "tcp:b:1"})
        if isinstance(done[0], BaseException):
            raise done[0]
        return done[0]

    monkeypatch.setattr(heads, "ask", transfers)
    done[:] = [{"leader": "tcp:b:1", "took_ms": 6.5}]
    answer = heads_cli._transfer(heads, "tcp:b:1")
    heads_cli._show_transfer(answer)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "b:1 leads now, and a:1 does not any more; it took 6.5 ms"
    done[:] = [ToolError("tcp:b:1 leads already")]
    with pytest.raises(Failure, match="leads already"):
        heads_cli._transfer(heads, "tcp:b:1")
    done[:] = [TimeoutError("no answer from tcp:a:1 within 3 s")]
    with pytest.raises(Failure, match=r"a:1, which led, did not say what became of it: no answer"):
        heads_cli._transfer(heads, "tcp:b:1")
