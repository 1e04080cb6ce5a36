"""`ftray heads`: the heads of a cluster with several: what each of them is doing, and changes to them.

Role: shell. Every head is asked itself, by the endpoint at which the others reach it; what changes the cluster is asked
of the leader, and again of the next one if that hands over meanwhile. A command returns when what it asked for is done.

Rejected: asking the leader about all heads (a cluster without one could not be looked at).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from ftray.cli.find import local_session
from ftray.cli.launch import TOKEN_REMEDY
from ftray.cli.options import addresses, json_option, session_root_option
from ftray.cli.output import NOT_FOUND, Failure, finish
from ftray.cli.tool import ToolClient, ToolError
from ftray.exceptions import AuthenticationError, FtrayError, ProtocolError

ASK_TIMEOUT_S = 3.0
DONE_TIMEOUT_S = 60.0
GUEST_TIMEOUT_S = 5.0
"""So long a new head may take, once it is ready, to find the leader."""
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
      ftray heads transfer                # another head leads, before work on the machine of the one that does
      ftray heads transfer b:6380         # the head at b leads

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
    endpoint, former = _endpoint(new), _name(old)
    finish(as_json, lambda: _add(_Heads(address, session_root), endpoint, former), _show)


@command.command("remove")
@click.argument("head")
@_common
def remove_command(head: str, address: str | None, session_root: str | None, as_json: bool) -> None:
    """Remove HEAD (HOST:PORT, or the beginning of its replica's id). If it runs, its node goes on as a plain node."""
    name = _name(head)
    finish(as_json, lambda: _remove(_Heads(address, session_root), name), _show)


@command.command("transfer")
@click.argument("head", required=False, default="")
@_common
def transfer_command(head: str, address: str | None, session_root: str | None, as_json: bool) -> None:
    """Let HEAD lead (HOST:PORT, or the beginning of its replica's id), or any other one if none is named.

    It must be connected, vote, and be up to date. The command returns when it leads. Requests wait meanwhile.
    """
    name = _name(head) if head else ""
    finish(as_json, lambda: _transfer(_Heads(address, session_root), name), _show_transfer)


def _endpoint(text: str) -> str:
    try:
        (endpoint,) = addresses(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return endpoint


def _name(text: str) -> str:
    """An endpoint, or the beginning of a replica's id as it is."""
    if not text.strip():
        raise click.BadParameter("the name of a head is empty")
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
        self.silent: set[str] = set()
        """Those of them at which nobody answers at all."""

    def ask(self, at: str, what: str, **arguments: Any) -> Any:
        with ToolClient(at, self.token, timeout_s=ASK_TIMEOUT_S) as client:
            return client.query(what, **arguments)

    def statuses(self) -> dict[str, dict[str, Any]]:
        """What each head says of itself, by endpoint; those that are named by the others are asked, too."""
        found: dict[str, dict[str, Any]] = {}
        self.failures, self.silent = {}, set()
        todo = list(dict.fromkeys(self.endpoints))
        known = set(todo)
        while todo:
            with ThreadPoolExecutor(len(todo)) as pool:  # all at once: one that is frozen takes its time
                answers = list(pool.map(self._status, todo))
            found |= {endpoint: status for endpoint, status in zip(todo, answers, strict=True) if status is not None}
            named = [
                endpoint
                for status in answers
                if status is not None
                for endpoint in (*status["heads"], *(guest["endpoint"] for guest in status["guests"]))
            ]
            todo = [endpoint for endpoint in dict.fromkeys(named) if endpoint not in known]
            known.update(todo)
        if not found:
            tried = "; ".join(f"{_short(endpoint)}: {why}" for endpoint, why in self.failures.items())
            if self.silent == set(self.failures):
                remedy = "start the heads, each with its directory: what was acknowledged is on their disks"
            else:
                remedy = "a cluster whose head was started without --heads has only that one"
            raise Failure(f"no head answers as one of several ({tried})", remedy, NOT_FOUND)
        return found

    def _status(self, endpoint: str) -> dict[str, Any] | None:
        try:
            status: dict[str, Any] = self.ask(endpoint, "heads")
        except AuthenticationError:
            raise Failure(f"the head at {_short(endpoint)} does not accept the token", TOKEN_REMEDY) from None
        except (OSError, FtrayError) as error:
            self.failures[endpoint] = getattr(error, "strerror", None) or str(error)
            if not isinstance(error, FtrayError):
                self.silent.add(endpoint)
            return None
        return status

    def leader(self) -> str:
        found = self.statuses()
        leaders = [endpoint for endpoint, status in found.items() if status["role"] == "leader"]
        if leaders:  # one that was cut off may believe in itself for a moment
            return max(leaders, key=lambda endpoint: int(found[endpoint]["term"]))
        why = next((status["why_no_leader"] for status in found.values() if status["why_no_leader"]), "")
        raise Failure(
            f"no head leads the cluster{': ' + why if why else ''}",
            "start the heads that do not answer; what was acknowledged is on their disks",
        )

    def ask_leader(self, what: str, **arguments: Any) -> Any:
        """Asks the leader, and the next one if it hands over. Raises Failure."""
        began = time.monotonic()
        deadline = began + DONE_TIMEOUT_S
        while True:
            try:
                return self.ask(self.leader(), what, **arguments)
            except ToolError as error:
                text = str(error)
                wait = "(not_leader)" in text or "does not lead" in text or "under way" in text
                if "waits to be added" in text and self._status(arguments["endpoint"]) is not None:
                    wait = time.monotonic() < began + GUEST_TIMEOUT_S  # it runs, and looks for the leader
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


def _rows(statuses: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The members. While the cluster is formed there are none: the heads of the list that they were started with."""
    members = _members(statuses)
    if members:
        return members
    endpoints = dict.fromkeys(endpoint for status in statuses.values() for endpoint in status["heads"])
    return [
        {"endpoint": endpoint, "replica": statuses.get(endpoint, {}).get("replica", ""), "voter": True}
        for endpoint in endpoints
    ]


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


def _transfer(heads: _Heads, name: str) -> dict[str, Any]:
    former = heads.leader()
    try:
        answer = heads.ask(former, "transfer", to=name)
    except ToolError as error:
        raise Failure(str(error), "see `ftray heads list`") from None
    except (OSError, ProtocolError) as error:
        raise Failure(
            f"{_short(former)}, which led, did not say what became of it: {getattr(error, 'strerror', None) or error}",
            "see `ftray heads list` for who leads now",
        ) from None
    return {**_report(heads), "leader": answer["leader"], "former": former, "took_ms": answer["took_ms"]}


def _report(heads: _Heads) -> dict[str, Any]:
    statuses = heads.statuses()
    newest = max(status["commit_index"] for status in statuses.values())
    rows = []
    for member in _rows(statuses):
        endpoint = member["endpoint"]
        status = statuses.get(endpoint)
        if status is not None and status["replica"] != member["replica"]:
            status = None
        row = {"endpoint": endpoint, "replica": member["replica"], "voter": member["voter"]}
        if status is None:
            why = heads.failures.get(endpoint, "another replica runs there: its disk was lost or changed")
            row |= {"role": "away", "why": why, **dict.fromkeys((*_SHOWN[1:], "lag", "disk_full"))}
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
    members = {row["endpoint"] for row in answer["heads"]}
    for guest in answer["waiting"]:
        at = _short(guest["endpoint"])
        if guest["endpoint"] in members:  # the head there has lost its disk: it can't be added beside itself
            click.echo(f"{at} waits to replace the former head there: ftray heads replace {at} {at}")
        else:
            click.echo(f"{at} waits to be added: ftray heads add {at}, or ftray heads replace OLD {at}")
    if answer["problem"]:
        click.secho(answer["problem"], fg="red")


def _show_transfer(answer: dict[str, Any]) -> None:
    _show(answer)
    leader, former = _short(answer["leader"]), _short(answer["former"])
    click.echo(f"{leader} leads now, and {former} does not any more; it took {answer['took_ms']:g} ms")


def _short(endpoint: str) -> str:
    return endpoint.removeprefix("tcp:")
