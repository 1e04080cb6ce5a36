"""Session folders: where a node keeps its sockets, logs and journal, and how others find it.

Role: shell, without any of the node's machinery, because the command line and `init` use it before anything else is
imported. One node process has one folder, `<root>/session_<YYYYmmdd-HHMMSS>_<pid>/`; ARCHITECTURE.md says what is in
it.

Rules: root and folder belong to the user alone (mode 0700), since whoever can read the token can join the cluster. A
session is alive if the process named in `node.json` is, and it is the same process: a process id alone is soon
another's. What a node that died by force left behind is swept by the starter of the next one.

Rejected: a lock file (the kernel knows already who is alive); `latest` as a symbolic link (two starters race for it).
"""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from ftray.exceptions import FtrayError

SESSIONS_KEPT = 10
"""Folders of dead sessions that stay, for their logs."""
SOCKET_PATH_BYTES_MAX = 107
"""The kernel's limit for the path of a unix socket."""
_PREFIX = "session_"
_SPILL_PREFIX = "ftray-spill-"
_LONGEST_SOCKET = "/sockets/w-000000000000.sock"


class SessionError(FtrayError):
    """The session folder can't be made, or must not be trusted."""


def default_root() -> str:
    """The root of this user's sessions."""
    return f"/tmp/ftray-{os.getuid()}"


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 if there is no such process (or it is a zombie)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()  # the name before it may contain anything
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_alive(node: dict[str, Any]) -> bool:
    """Whether the process described by a `node.json` still runs."""
    pid = node.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    ticks = start_ticks(pid)
    return ticks != 0 and node.get("start_ticks", ticks) == ticks


def create_session(root: str) -> str:
    """Makes the folder of this process's session, with what it contains; returns its path.

    Raises SessionError if the root is another user's, is not a directory, or is too long for sockets below it.
    """
    _checked_root(root)
    name = f"{_PREFIX}{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}"
    base = os.path.join(os.path.abspath(root), name)
    for attempt in range(100):
        path = base if not attempt else f"{base}.{attempt}"
        if len(os.fsencode(path)) + len(_LONGEST_SOCKET) > SOCKET_PATH_BYTES_MAX:
            raise SessionError(
                f"the session root {root!r} is too long: the path of a socket in it would exceed "
                f"{SOCKET_PATH_BYTES_MAX} bytes; choose a shorter one"
            )
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:  # the same process id within a second, in another container
            continue
        except OSError as error:
            raise SessionError(f"cannot make the session folder {path}: {error.strerror}") from error
        for sub in ("sockets", "logs", "gcs"):
            os.mkdir(os.path.join(path, sub), 0o700)
        return path
    raise SessionError(f"cannot make a session folder: {base} exists a hundred times over")


def _checked_root(root: str) -> None:
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        status = os.stat(root)
    except OSError as error:
        raise SessionError(f"cannot use the session root {root!r}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise SessionError(f"the session root {root!r} belongs to another user: choose another one")
    if status.st_mode & 0o022:
        raise SessionError(f"others may write to the session root {root!r}: chmod 700 it, or choose another one")


def write_token(session_dir: str, token: bytes) -> None:
    """Writes the cluster token (hex, mode 0600)."""
    fd = os.open(os.path.join(session_dir, "token"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, token.hex().encode())
    finally:
        os.close(fd)


def write_node_json(session_dir: str, node: dict[str, Any]) -> None:
    """Announces the node: from now on `find_session` finds it. Adds what tells this process from a later namesake."""
    node = {**node, "start_ticks": start_ticks(os.getpid())}
    path = os.path.join(session_dir, "node.json")
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(node, file)
    os.replace(path + ".new", path)


def read_session(session_dir: str) -> dict[str, Any] | None:
    """The session's `node.json` with `session_dir` and `token` (hex) added, or None if it is not a live session."""
    try:
        with open(os.path.join(session_dir, "node.json"), encoding="utf-8") as file:
            node = json.load(file)
        with open(os.path.join(session_dir, "token"), encoding="ascii") as file:
            token = file.read().strip()
    except (OSError, ValueError):
        return None
    if not isinstance(node, dict) or not is_alive(node):
        return None
    return {**node, "session_dir": session_dir, "token": token}


def find_sessions(root: str) -> list[dict[str, Any]]:
    """All live sessions under the root, newest first, as `read_session` gives them."""
    found = [session for path in _folders(root) if (session := read_session(path)) is not None]
    found.sort(key=lambda session: float(session.get("started", 0)), reverse=True)
    return found


def find_session(root: str | None = None) -> dict[str, Any] | None:
    """The newest live session under the root (default: this user's), or None."""
    sessions = find_sessions(root or default_root())
    return sessions[0] if sessions else None


def clean_session(session_dir: str) -> None:
    """Removes what must not outlive the node: everything but the logs. Never raises."""
    for name in ("node.json", "node.json.new", "token"):
        _unlink(os.path.join(session_dir, name))
    for name in ("sockets", "gcs", "environments"):
        remove_tree(os.path.join(session_dir, name))
    spill = os.path.join(session_dir, "spill")
    if os.path.islink(spill):
        target = os.readlink(spill)
        if os.path.basename(target).startswith(_SPILL_PREFIX):
            remove_tree(target)
        _unlink(spill)
    else:
        remove_tree(spill)


def spill_elsewhere(session_dir: str, parent: str) -> None:
    """Has this session's spilled objects written below another directory, on a larger disk say.

    They go with the session all the same, since its `spill` is a link to that. Raises SessionError.
    """
    target = os.path.join(os.path.abspath(parent), f"{_SPILL_PREFIX}{os.urandom(8).hex()}")
    try:
        os.mkdir(target, 0o700)
        os.symlink(target, os.path.join(session_dir, "spill"))
    except OSError as error:
        raise SessionError(f"cannot spill objects to {parent!r} (FTRAY_SPILL_DIRECTORY): {error.strerror}") from error


def clean_dead_sessions(root: str, kept: int = SESSIONS_KEPT) -> None:
    """Sweeps sessions whose node is gone, and removes the folders of all but the newest `kept` of them."""
    dead = [path for path in _folders(root) if _is_dead(path)]
    for path in dead:
        clean_session(path)
    for path in dead[kept:]:
        remove_tree(path)


def _is_dead(path: str) -> bool:
    try:
        with open(os.path.join(path, "node.json"), encoding="utf-8") as file:
            node = json.load(file)
        return not (isinstance(node, dict) and is_alive(node))
    except FileNotFoundError:
        # Stopped, or about to start: then the process in its name lives.
        digits = os.path.basename(path).rpartition("_")[2].partition(".")[0]
        return not digits.isdigit() or start_ticks(int(digits)) == 0
    except (OSError, ValueError):
        return True


def _folders(root: str) -> list[str]:
    """Session folders under the root, newest first by name."""
    try:
        names = [entry.name for entry in os.scandir(root) if entry.name.startswith(_PREFIX) and entry.is_dir()]
    except OSError:
        return []
    return [os.path.join(root, name) for name in sorted(names, reverse=True)]


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def remove_tree(path: str) -> None:
    """Removes a folder and what is in it, as far as that can be removed. Never raises.

    Without a call for each level: programs may have nested folders more deeply than calls can be.
    """
    folders = [path]
    for folder in folders:  # which grows: what is in a folder comes after it
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                _unlink(entry.path)
    for folder in reversed(folders):
        try:
            os.rmdir(folder)
        except OSError:
            pass
