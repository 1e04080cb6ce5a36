"""The node process: `python -m ftray.raylet.main`, started by `init`, the command line and test clusters.

Role: shell. Reads one line of JSON from standard input (`spec.py`), makes the node, writes one line of JSON to
standard output when it is a member of its cluster (or can't be), then serves until it is told to stop, by a signal, a
tool, or the end of standard input.

Rules: no trio and no thread before the template is forked; everything is imported by then that both will need. The
ready line is the last thing on the starter's pipes: from then on, output goes to `raylet.log`.

Rejected: argument parsing (the starter is a program); a daemon that detaches itself (the starter puts it into a
session).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ftray.exceptions import FtrayError

if TYPE_CHECKING:
    from ftray.raylet.node import Node

log = logging.getLogger("ftray.raylet")

SPEC_BYTES_MAX = 1 << 20
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def read_line(fd: int) -> bytes:
    """The first line of `fd`, and not a byte more. Raises FtrayError."""
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(fd, 1)
        if not data:
            break
        line += data
        if len(line) > SPEC_BYTES_MAX:
            raise FtrayError("the specification of the node is too long")
    if not line.strip():
        raise FtrayError("the specification of the node is missing: one line of JSON on standard input")
    return bytes(line)


def say(answer: dict[str, Any]) -> None:
    """The one line for the starter."""
    try:
        os.write(1, json.dumps(answer).encode() + b"\n")
    except OSError:
        pass  # the starter is gone; the lifeline will tell


def raise_descriptor_limit() -> None:
    """Each worker costs three descriptors, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass


def to_log(path: str) -> None:
    """From now on, what this process prints and logs goes to the session's log."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True)


def note_stop_signals() -> list[int]:
    """Lets SIGTERM and SIGINT do nothing but be noted in what is returned."""
    noted: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda signum, frame: noted.append(signum))
    return noted


async def serve(node: Node, noted: Sequence[int] = ()) -> None:
    """Waits until the node stops, which `host` drives meanwhile. `noted` are signals that came before this began."""
    import trio

    stopped = trio.Event()
    node.on_stop = stopped.set
    if node.stopping:
        return
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        for signum in noted:
            node.stop(f"{signal.Signals(signum).name} arrived")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_on_signal, node, signals)
            await stopped.wait()
            nursery.cancel_scope.cancel()


async def _on_signal(node: Node, signals: Any) -> None:
    async for signum in signals:
        node.stop(f"{signal.Signals(signum).name} arrived")


def watch_lifeline(node: Node) -> None:
    """Stops the node when its starter is gone."""

    def readable() -> None:
        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        if not data:
            node.reactor.unwatch(0)
            node.stop("the program that started this node is gone")

    with node.reactor.lock:
        node.reactor.watch(0, readable)


def run() -> int:
    """Runs a node; returns the process's exit code."""
    gc.disable()  # nothing dies while modules are imported, and looking for it costs a tenth of the start
    from ftray.raylet.node import Node
    from ftray.raylet.spec import parse_spec
    from ftray.raylet.template import name_process
    from ftray.wire.loop import host

    raise_descriptor_limit()
    name_process("ftray:node")
    try:
        node = Node(parse_spec(read_line(0)), os.environ)
    except (FtrayError, OSError) as error:
        say({"ok": False, "error": str(error)})
        return 1
    try:
        node.join()
    except (FtrayError, OSError) as error:
        say({"ok": False, "error": str(error)})
        node.exit_code = 1
        node.close()
        return 1
    noted = note_stop_signals()  # a member stops in order, also one that has just begun
    say({"ok": True, **node.ready(), "token": node.info.token.hex()})
    to_log(node.log_path)
    gc.freeze()
    gc.enable()
    try:
        if node.spec.lifeline:
            watch_lifeline(node)
        host(node.reactor, serve, node, noted)
    except BaseException:
        log.exception("the node failed")
        node.exit_code = 1
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    node.close()
    return node.exit_code


def main() -> NoReturn:
    """The node process. It ends here: when all is done, the interpreter's own clean-up would only take time."""
    code = 1
    try:
        code = run()
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
