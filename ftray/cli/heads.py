"""`ftray heads`: the heads of a cluster with several: what each of them is doing, and changes to them.

Role: shell. Every head is asked itself, by the endpoint at which the others reach it; what changes the cluster is asked
of the leader, and again of the next one if that hands over meanwhile. A command returns when what it asked for is done.

Rejected: asking the leader about all heads (a cluster without one could not be looked at).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import click

from ftray.cli.find import local_session
from ftray.cli.launch import TOKEN_REMEDY
from ftray.cli.options import addresses, json_option, session_root_option
from ftray.cli.output import NOT_FOUND, Failure, finish
from ftray.cli.tool import ToolClient, ToolError
from ftray.exceptions import AuthenticationError, FtrayError

ASK_TIMEOUT_S = 3.0
DONE_TIMEOUT_S = 60.0
POLL_S = 0.05
_SHOWN = ("role", "term", "last_index", "commit_index", "applied_index", "pid")

address_option = click.option("--address", metavar="HOST:PORT[,..]", help="Heads of the cluster.  [default: local]")


@click.group("heads")
def command() -> None:
    """Show the heads of a cluster that has several, and add, remove or replace some.

    A cluster goes on for as long as a majority of its heads runs. A head is its disk: one that has lost it is replaced,
    and must not come back as if it had not.

    \b
    Examples:
      ftray heads list
      ftray start --head --address a:6380,b:6380 --host d --gcs-dir /var/lib/ftray  # on machine d, then
      ftray heads add d:6380
      ftray heads replace c:6380 d:6380   # d takes the place of c, whose disk is lost
      ftray heads remove c:6380
      ftray heads transfer                # another head leads, before work on this machine

    \b
    Exit codes:
      0  done
      1  it failed; the message says why and what to do
      2  the command line is wrong
      3  no head answers
    """


def _common(function: Callable[..., None]) -> Callable[..., None]:
    return address_option(session_root_option(json_option(function)))


@command.command("list")
@_common
def list_command(address: str | None, session_root: str | None, as_json: bool) -> None:
    """Show each head with its role, term, position in the log, and how far it is behind."""
    finish(as_json, lambda: _report(_Heads(address, session_root)), _show)


@command.command("add")
@click.argument("head")
@_common
def add_command(head: str, address: str | None, session_root: str | None, as_json: bool) -> None:
    """Add the head at HEAD (HOST:PORT), which runs and waits for it: `ftray start --head --address ...`."""
    endpoint = _endpoint(head)
    finish(as_json, lambda: _add(_Heads(address, session_root), endpoint, ""), _show)


@command.command("replace")
@click.argument("old")
@click.argument("new")
@_common
def replace_command(old: str, new: str, address: str | None, session_root: str | None, as_json: bool) -> None:
    """Let the head at NEW take the place of OLD (HOST:PORT, or the beginning of the replica's id).

    NEW runs and waits for it (`ftray start --head --address ...`). It may have the address of OLD. It is given the
    state first, then votes, then OLD goes: the cluster is never weaker than before.
    """
    endpoint = _endpoint(new)
    finish(as_json, lambda: _add(_Heads(address, session_root), endpoint, _name(old)), _show)


@command.command("remove")
@click.argument("head")
@_common
def remove_command(head: str, address: str | None, session_root: str | None, as_json: bool) -> None:
    """Remove HEAD (HOST:PORT, or the beginning of its replica's id). If it runs, its node goes on as a plain node."""
    finish(as_json, lambda: _remove(_Heads(address, session_root), _name(head)), _show)


@command.command("transfer")
@_common
def transfer_command(address: str | None, session_root: str | None, as_json: bool) -> None:
    """Let another head lead."""
    finish(as_json, lambda: _transfer(_Heads(address, session_root)), _show)


def _endpoint(text: str) -> str:
    try:
        (endpoint,) = addresses(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return endpoint


def _name(text: str) -> str:
    """An endpoint, or the beginning of a replica's id as it is."""
    return _endpoint(text) if ":" in text else text


class _Heads:
    """The heads of one cluster, to be asked. Raises Failure."""

    def __init__(self, address: str | None, root: str | None) -> None:
        token = os.environ.get("FTRAY_TOKEN", "").strip()
        if address and token:
            try:
                self.endpoints = addresses(address)
            except ValueError as error:
                raise Failure(str(error), exit_code=2) from None
        else:
            session = local_session(root, address)
            token = session["token"]
            self.endpoints = [each for each in session.get("gcs_endpoints", ()) if each.startswith("tcp:")]
        if not self.endpoints:
            raise Failure(
                "this node's program has started it for itself: its cluster has one head, which is not replicated",
                "start a cluster with several by `ftray start --head --heads`",
                NOT_FOUND,
            )
        try:
            self.token = bytes.fromhex(token)
        except ValueError:
            raise Failure("FTRAY_TOKEN is not a token: it must be the hexadecimal text of a token file") from None
        self.failures: dict[str, str] = {}

    def ask(self, at: str, what: str, **arguments: Any) -> Any:
        with ToolClient(at, self.token, timeout_s=ASK_TIMEOUT_S) as client:
            return client.query(what, **arguments)

    def statuses(self) -> dict[str, dict[str, Any]]:
        """What each head says of itself, by endpoint; those that are named by the others are asked, too."""
        found: dict[str, dict[str, Any]] = {}
        self.failures = {}
        todo = list(self.endpoints)
        for endpoint in todo:
            try:
                found[endpoint] = self.ask(endpoint, "heads")
            except AuthenticationError:
                raise Failure(f"the head at {_short(endpoint)} does not accept the token", TOKEN_REMEDY) from None
            except (OSError, FtrayError) as error:
                self.failures[endpoint] = getattr(error, "strerror", None) or str(error)
                continue
            named = [each["endpoint"] for each in (*found[endpoint]["members"], *found[endpoint]["guests"])]
            todo += [each for each in dict.fromkeys(named) if each not in todo]
        if not found:
            tried = "; ".join(f"{_short(endpoint)}: {why}" for endpoint, why in self.failures.items())
            raise Failure(
                f"no head answers as one of several ({tried})",
                "a cluster whose head was started without --heads has only that one",
                NOT_FOUND,
            )
        return found

    def leader(self) -> str:
        found = self.statuses()
        for endpoint, status in found.items():
            if status["role"] == "leader":
                return endpoint
        why = next((status["why_no_leader"] for status in found.values() if status["why_no_leader"]), "")
        raise Failure(
            f"no head leads the cluster{': ' + why if why else ''}",
            "start the heads that do not answer; what was acknowledged is on their disks",
        )

    def ask_leader(self, what: str, **arguments: Any) -> Any:
        """Asks the leader, and the next one if it hands over. Raises Failure."""
        deadline = time.monotonic() + DONE_TIMEOUT_S
        while True:
            try:
                return self.ask(self.leader(), what, **arguments)
            except ToolError as error:
                text = str(error)
                wait = "(not_leader)" in text or "does not lead" in text or "under way" in text
            except (OSError, FtrayError) as error:
                text, wait = str(error), True
            except Failure as failure:
                if time.monotonic() > deadline or failure.exit_code == NOT_FOUND:
                    raise
                text, wait = failure.message, True
            if not wait or time.monotonic() > deadline:
                raise Failure(text)
            time.sleep(POLL_S)

    def until(self, done: Callable[[dict[str, dict[str, Any]]], bool], what: str) -> None:
        """Waits until that holds of what the heads say. Raises Failure."""
        deadline = time.monotonic() + DONE_TIMEOUT_S
        while not done(self.statuses()):
            if time.monotonic() > deadline:
                raise Failure(
                    f"{what} within {DONE_TIMEOUT_S:g} s; it is still under way", "see `ftray heads list`"
                )
            time.sleep(POLL_S)


def _members(statuses: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The members, as the head knows them that has committed most."""
    best = max(statuses.values(), key=lambda status: (status["role"] == "leader", status["commit_index"]))
    members: list[dict[str, Any]] = best["members"]
    return members


def _add(heads: _Heads, endpoint: str, replaces: str) -> dict[str, Any]:
    before = {each["replica"]: each["endpoint"] for each in _members(heads.statuses())}
    heads.ask_leader("add", endpoint=endpoint, replaces=replaces)

    def done(statuses: dict[str, dict[str, Any]]) -> bool:
        members = _members(statuses)
        votes = any(
            each["endpoint"] == endpoint and each["voter"] and each["replica"] not in before for each in members
        )
        return votes and (not replaces or len(members) <= len(before))

    heads.until(done, f"{_short(endpoint)} has not caught up")
    return _report(heads)


def _remove(heads: _Heads, name: str) -> dict[str, Any]:
    members = _members(heads.statuses())
    found = [each for each in members if each["endpoint"] == name or each["replica"].startswith(name)]
    if len(found) != 1:
        known = ", ".join(_short(each["endpoint"]) for each in members)
        raise Failure(f"{_short(name)} names {len(found) or 'none'} of the heads, which are {known}")
    replica = found[0]["replica"]
    heads.ask_leader("remove", endpoint=replica)

    def done(statuses: dict[str, dict[str, Any]]) -> bool:
        return all(each["replica"] != replica for each in _members(statuses))

    heads.until(done, f"{_short(name)} was not removed")
    return _report(heads)


def _transfer(heads: _Heads) -> dict[str, Any]:
    former = heads.leader()
    heads.ask(former, "transfer")

    def done(statuses: dict[str, dict[str, Any]]) -> bool:
        leaders = [endpoint for endpoint, status in statuses.items() if status["role"] == "leader"]
        return bool(leaders) and former not in leaders

    heads.until(done, f"no other head leads instead of {_short(former)}")
    return _report(heads)


def _report(heads: _Heads) -> dict[str, Any]:
    statuses = heads.statuses()
    newest = max(status["commit_index"] for status in statuses.values())
    rows = []
    for member in _members(statuses):
        endpoint = member["endpoint"]
        status = statuses.get(endpoint)
        if status is not None and status["replica"] != member["replica"]:
            status = None
        row = {"endpoint": endpoint, "replica": member["replica"], "voter": member["voter"]}
        if status is None:
            why = heads.failures.get(endpoint, "another replica runs there: its disk was lost or changed")
            row |= {"role": "away", "why": why}
        else:
            row |= {name: status[name] for name in _SHOWN}
            row |= {"lag": max(0, newest - status["applied_index"]), "disk_full": status["disk_full"]}
        rows.append(row)
    guests = {
        guest["replica"]: guest["endpoint"] for status in statuses.values() for guest in status["guests"]
    }
    why = next((status["why_no_leader"] for status in statuses.values() if status["why_no_leader"]), "")
    leads = any(row["role"] == "leader" for row in rows)
    return {
        "heads": rows,
        "waiting": [{"replica": replica, "endpoint": endpoint} for replica, endpoint in sorted(guests.items())],
        "problem": "" if leads else why or "no head leads the cluster at this moment",
    }


def _show(answer: dict[str, Any]) -> None:
    line = "{:<26} {:<9} {:<10} {:>6} {:>10} {:>8}  {}"
    click.secho(line.format("HEAD", "REPLICA", "ROLE", "TERM", "LOG", "LAG", "").rstrip(), bold=True)
    for row in answer["heads"]:
        role = row["role"] if row["voter"] else f"{row['role']} (new)"
        if row["role"] == "away":
            click.echo(line.format(_short(row["endpoint"]), row["replica"][:8], role, "", "", "", row["why"]))
        else:
            more = "its disk is full" if row["disk_full"] else ""
            text = line.format(
                _short(row["endpoint"]), row["replica"][:8], role, row["term"], row["last_index"], row["lag"], more
            )
            click.echo(text.rstrip())
    for guest in answer["waiting"]:
        click.echo(f"{_short(guest['endpoint'])} waits to be added: ftray heads add {_short(guest['endpoint'])}")
    if answer["problem"]:
        click.secho(answer["problem"], fg="red")


def _short(endpoint: str) -> str:
    return endpoint.removeprefix("tcp:")
