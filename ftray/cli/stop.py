"""`ftray stop`: ends the nodes that `ftray start` has left running on this machine.

Role: shell. A node is asked by SIGTERM and given time to stop its workers; `--force` kills it. Nodes that
`ftray.init()` started for a program are that program's, and are left alone.

Rules: only processes of live sessions under the root are touched, recognised by process id and start time together.
Nodes that joined go before heads, so that they can say goodbye.
"""

from __future__ import annotations

import os
import time
from typing import Any

import click

from ftray.cli.options import json_option, session_root_option
from ftray.cli.output import NOT_FOUND, Failure, finish
from ftray.raylet.session import clean_session, default_root, find_sessions, is_alive

STOP_TIMEOUT_S = 15.0
KILL_TIMEOUT_S = 5.0
POLL_S = 0.02


@click.command("stop")
@click.option("--force", is_flag=True, help="Kill the nodes (SIGKILL) instead of asking them to stop.")
@session_root_option
@json_option
def command(force: bool, session_root: str | None, as_json: bool) -> None:
    """Stop the nodes that `ftray start` left running on this machine, with all their workers.

    A node is asked to stop, and ends its workers first. Nodes that ftray.init() started for a program are not touched:
    they end with their program.

    \b
    Examples:
      ftray stop
      ftray stop --force          # when one does not react
      ftray stop --json           # {"ok": true, "stopped": [{"pid": 4711, ...}]}

    \b
    Exit codes:
      0  all of them have stopped
      1  some did not stop; the message names them
      3  none was running
    """
    finish(as_json, lambda: _stop(session_root, force), _show)


def started_by_command(session: dict[str, Any]) -> bool:
    """Whether the session is one of `ftray start`: it can be reached by TCP, or has joined one that can."""
    if session.get("embedded"):
        return False
    return any(str(endpoint).startswith("tcp:") for endpoint in session.get("gcs_endpoints", ()))


def _stop(root: str | None, force: bool) -> dict[str, Any]:
    import signal

    where = os.path.abspath(root or default_root())
    sessions = [session for session in find_sessions(where) if started_by_command(session)]
    if not sessions:
        raise Failure(f"no node started by `ftray start` runs on this machine (looked in {where})", "", NOT_FOUND)
    stopped: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    for heads in (False, True):
        group = [session for session in sessions if bool(session.get("head")) is heads]
        for session in group:
            try:
                os.kill(session["pid"], signal.SIGKILL if force else signal.SIGTERM)
            except ProcessLookupError:
                pass
            except PermissionError as error:
                raise Failure(f"cannot stop process {session['pid']}: {error.strerror}") from None
        deadline = time.monotonic() + (KILL_TIMEOUT_S if force else STOP_TIMEOUT_S)
        for session in group:
            while is_alive(session) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            row = {"pid": session["pid"], "node_id": session.get("node_id", ""), "head": heads}
            (left if is_alive(session) else stopped).append({**row, "session_dir": session["session_dir"]})
            if force and not is_alive(session):
                clean_session(session["session_dir"])
    if left:
        pids = ", ".join(str(row["pid"]) for row in left)
        remedy = "" if force else "run `ftray stop --force` to kill them"
        raise Failure(f"these nodes have not stopped: {pids}", remedy, stopped=stopped, left=left)
    return {"stopped": stopped}


def _show(answer: dict[str, Any]) -> None:
    for row in answer["stopped"]:
        kind = "head node" if row["head"] else "node"
        click.echo(f"Stopped {kind} {row['node_id'][:12]}, process {row['pid']}.")
