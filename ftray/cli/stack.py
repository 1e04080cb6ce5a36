"""`ftray stack`: where each driver and worker of this node is.

Role: shell.
"""

from __future__ import annotations

from typing import Any

import click

from ftray.cli.options import json_option, session_root_option
from ftray.cli.output import finish


@click.command("stack")
@click.argument("pid", type=int, required=False)
@click.option("--address", metavar="HOST:PORT", envvar="FTRAY_ADDRESS", help="Cluster to ask.  [default: the newest]")
@click.option("-a", "--all", "everything", is_flag=True, help="Idle workers and the runtime's own threads, too.")
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

    finish(as_json, body, lambda answer: _show(answer, everything or pid is not None))


def _show(answer: dict[str, Any], everything: bool) -> None:
    idle = 0
    for row in answer["processes"]:
        said = row["answer"]
        running = (said or {}).get("running") or row["running"]
        if said is not None and row["kind"] == "worker" and not said.get("running") and not everything:
            idle += 1
            continue
        click.secho(f"{row['kind']} {row['pid']}" + (f", runs {running}" if running else ""), bold=True)
        if said is None:
            click.echo(f"  {row['error']}")
            if row.get("dump"):
                click.echo("  its stack, by signal:")
                click.echo("\n".join(f"    {line}" for line in row["dump"].rstrip().splitlines()))
            continue
        for thread in said["threads"]:
            if thread["thread"] == "ftray-loop" and not everything:
                continue
            click.echo(f"  {thread['thread']}")
            for frame in thread["frames"]:
                click.echo(f"    {frame}")
    if idle:
        click.echo(f"{idle} idle workers are left out (--all shows them)")
