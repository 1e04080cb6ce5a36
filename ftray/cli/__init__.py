"""Command line of ftray: `ftray start`, `stop`, `status`, `list`, `memory`, `stack`, `timeline`, `logs` and so on.

Role: shell. Each command is a module of its own, imported when it is run, so that `ftray --help` costs an interpreter
and click. What all commands share: `--json` prints one JSON object and nothing else, errors included; the exit codes.

Rejected: entry points of commands found at run time (slow, and `--help` would depend on what is installed).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from ftray import __version__

EXIT_CODES = """\b
Exit codes:
  0  done
  1  it failed; the message says why and what to do
  2  the command line is wrong
  3  no cluster was found
"""

COMMANDS: dict[str, tuple[str, str]] = {
    "start": ("ftray.cli.start", "Start a node on this machine: the head of a new cluster, or one that joins."),
    "stop": ("ftray.cli.stop", "Stop the nodes that were started on this machine."),
    "status": ("ftray.cli.status", "Show the nodes, resources, jobs and actors of the cluster."),
    "heads": ("ftray.cli.heads", "Show, add, remove or replace the heads of a cluster with several."),
    "list": ("ftray.cli.listing", "List pending tasks, workers, actors, nodes or objects."),
    "memory": ("ftray.cli.memory", "Show what objects hold in memory and on disk, and why."),
    "stack": ("ftray.cli.stack", "Show where each driver and worker is."),
    "timeline": ("ftray.cli.timeline", "Write what ran when as a trace for Perfetto."),
    "logs": ("ftray.cli.logs", "Show what workers and nodes of this machine have printed."),
    "sim": ("ftray.cli.sim", "Run heads and clients in virtual time under faults, and check them."),
    "microbenchmark": ("ftray.cli.microbenchmark", "Measure tasks, actors and objects on this machine."),
}
"""Name -> (module, one line for the list of commands). The module has the command in `command`."""


class _Commands(click.Group):
    """Loads a command's module when the command is used; the list of commands needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """As click's, but a wrong command line with `--json` in it is answered by one JSON object, too."""
        words = sys.argv[1:] if args is None else list(args)
        if "--json" not in words or not extra.get("standalone_mode", True):
            return super().main(words, *rest, **extra)
        extra["standalone_mode"] = False
        try:
            answer = super().main(words, *rest, **extra)
        except click.ClickException as error:
            wrong = error.format_message()
            click.echo(json.dumps({"ok": False, "error": wrong, "remedy": "see --help of the command"}))
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(130)
        sys.exit(answer if isinstance(answer, int) else 0)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, message="ftray %(version)s")
def main() -> None:
    """ftray runs Python functions and classes on many processes and machines, and keeps them running when some die.

    \b
    A program needs none of these commands: ftray.init() starts what it needs on this machine and stops it at
    the end. They are for clusters that live longer than a program, or span machines:

    \b
      ftray start --head                      # on the first machine
      ftray start --address HOST:6380         # on each other one, with FTRAY_TOKEN set
      python program.py                       # calls ftray.init(address="auto")
      ftray status
      ftray stop                              # on each machine
    """
