"""`ftray stack`: where each driver and worker of this node is.

Role: shell.
"""

from __future__ import annotations

import re
from typing import Any

import click

from ftray.cli.options import json_option, session_root_option
from ftray.cli.output import finish

_RUNTIME = re.compile(r'( *File ")?(<string>|.*/ftray/(worker|raylet|wire|api)/[a-z_]+\.py)[:"]')
"""A frame of the runtime, as processes tell of it and as a dump has it."""


@click.command("stack")
@click.argument("pid", type=int, required=False)
@click.option("--address", metavar="HOST:PORT", envvar="FTRAY_ADDRESS", help="Cluster to ask.  [default: the newest]")
@click.option("-a", "--all", "everything", is_flag=True,
              help="Idle workers, and the runtime's own threads and frames, too.")  # fmt: skip
@session_root_option
@json_option
def command(pid: int | None, address: str | None, everything: bool, session_root: str | None, as_json: bool) -> None:
    """Show the stack of every driver and worker of this node, or of the process PID.

    The innermost call comes first. A worker whose interpreter is busy in C code does not answer; its stack is taken
    through a signal instead, which does not disturb it.

    \b
    Examples:
      ftray stack
      ftray stack 4711 --all

    \b
    Exit codes:
      0  shown
      1  the node does not answer, or has no such process
      3  no cluster was found on this machine
    """

    def body() -> dict[str, Any]:
        from ftray.cli.find import ask, local_session

        arguments = {} if pid is None else {"pid": pid}
        answer = ask(local_session(session_root, address), "stack", **arguments)
        assert isinstance(answer, dict)
        return answer

    finish(as_json, body, lambda answer: _show(answer, everything, idle_too=everything or pid is not None))


def _of_user(frames: list[str]) -> list[str]:
    """Without the runtime's frames that called the user's code; of a thread that runs none of it, the innermost one."""
    end = len(frames)
    while end > 1 and _RUNTIME.match(frames[end - 1]):
        end -= 1
    return frames[:end]


def _dump_of_user(dump: str) -> list[str]:
    """The same for a dump by signal: blocks of a heading and frames."""
    lines: list[str] = []
    for block in dump.strip().split("\n\n"):
        shown = block.splitlines()
        lines += [*shown[:1], *_of_user(shown[1:])]
    return lines


def _show(answer: dict[str, Any], everything: bool, idle_too: bool) -> None:
    idle = 0
    for row in answer["processes"]:
        said = row["answer"]
        running = (said or {}).get("running") or row["running"]
        if said is not None and row["kind"] == "worker" and not said.get("running") and not idle_too:
            idle += 1
            continue
        runs = "leased for" if said is None and row["kind"] == "worker" else "runs"
        click.secho(f"{row['kind']} {row['pid']}" + (f", {runs} {running}" if running else ""), bold=True)
        if said is None:
            click.echo(f"  {row['error']}")
            if row.get("dump"):
                click.echo("  its stack, by signal:")
                lines = row["dump"].rstrip().splitlines() if everything else _dump_of_user(row["dump"])
                click.echo("\n".join(f"    {line}" for line in lines))
            continue
        for thread in said["threads"]:
            if thread["thread"] == "ftray-loop" and not everything:
                continue
            click.echo(f"  {thread['thread']}")
            for frame in thread["frames"] if everything else _of_user(thread["frames"]):
                click.echo(f"    {frame}")
    if idle:
        click.echo(f"{idle} idle worker{' is' if idle == 1 else 's are'} left out (--all shows them)")
