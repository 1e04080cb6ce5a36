"""Which node a command is about, and talking to it.

Role: shell. Without an address it is the newest node of this user on this machine; with the address of a head it is the
newest one of that cluster. Only nodes of this machine are asked, because their token is at hand.
"""

from __future__ import annotations

import os
from typing import Any

from ftray.cli.options import addresses
from ftray.cli.output import NOT_FOUND, Failure, no_cluster
from ftray.cli.tool import ToolClient
from ftray.exceptions import AuthenticationError, FtrayError
from ftray.raylet.session import default_root, find_sessions


def local_session(root: str | None, address: str | None = None) -> dict[str, Any]:
    """The newest live session, of the cluster at `address` if that is given. Raises Failure."""
    where = os.path.abspath(root or default_root())
    sessions = find_sessions(where)
    if address in (None, "", "auto"):
        if not sessions:
            raise no_cluster(where)
        return sessions[0]
    assert address is not None
    try:
        wanted = set(addresses(address))
    except ValueError as error:
        raise Failure(str(error), exit_code=2) from None
    for session in sessions:
        if wanted & set(session.get("gcs_endpoints", ())):
            return session
    raise Failure(
        f"no node of the cluster at {address} runs on this machine (looked in {where})",
        "run this command on one of its machines, or join the cluster with `ftray start --address`",
        NOT_FOUND,
    )


def ask(session: dict[str, Any], what: str, timeout_s: float = 10.0, **arguments: Any) -> Any:
    """Asks the session's node, and returns its answer. Raises Failure."""
    pid = session.get("pid")
    try:
        token, cluster = bytes.fromhex(session["token"]), bytes.fromhex(session["cluster_id"])
        with ToolClient(session["raylet_endpoint"], token, cluster, timeout_s=timeout_s) as client:
            return client.query(what, **arguments)
    except AuthenticationError as error:
        raise Failure(f"the node (process {pid}) does not accept the token in its session folder: {error}") from None
    except TimeoutError:
        raise Failure(
            f"the node (process {pid}) does not answer within {timeout_s:g} s",
            f"it may be stopped or overloaded; see {session['session_dir']}/logs/raylet.log, "
            "or end it with `ftray stop --force`",
        ) from None
    except FtrayError as error:
        raise Failure(f"the node (process {pid}) could not answer: {error}") from None
    except (KeyError, ValueError) as error:
        raise Failure(f"{session['session_dir']}/node.json is not what a node writes ({error!r})") from None
    except OSError as error:
        raise Failure(
            f"the node (process {pid}) can't be reached: {error.strerror or error}",
            f"see {session['session_dir']}/logs/raylet.log",
        ) from None
