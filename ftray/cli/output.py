"""How commands answer: text for people, or one JSON object, and the exit code that goes with it.

Role: shell. A command's body returns its answer as a dictionary, or raises `Failure`; `finish` prints either.

Rules: with `--json` exactly one object is printed to stdout, `{"ok": true, ...}` or `{"ok": false, "error": ...,
"remedy": ...}`. Without, errors go to stderr, with what to do about them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from ftray.exceptions import FtrayError

OK, FAILED, USAGE, NOT_FOUND = 0, 1, 2, 3


class Failure(Exception):
    """The command could not do what it was asked to. `remedy` says what the user can do."""

    def __init__(self, message: str, remedy: str = "", exit_code: int = FAILED, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.exit_code = exit_code
        self.details = details
        """More fields for `--json`."""


def no_cluster(root: str) -> Failure:
    return Failure(
        f"no ftray node runs on this machine (looked in {root})",
        "start one with `ftray start --head`, or name one with --session-root or --address",
        NOT_FOUND,
    )


def finish(as_json: bool, body: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None]) -> NoReturn:
    """Runs a command's body, prints its answer or its failure, and exits."""
    try:
        answer = body()
    except Failure as failure:
        report(as_json, failure)
        sys.exit(failure.exit_code)
    except FtrayError as error:  # its message says what to do
        report(as_json, Failure(str(error)))
        sys.exit(FAILED)
    if as_json:
        click.echo(json.dumps({"ok": True, **answer}))
    else:
        show(answer)
    sys.exit(OK)


def report(as_json: bool, failure: Failure) -> None:
    """Prints a failure."""
    if as_json:
        said = {"ok": False, "error": failure.message, "remedy": failure.remedy, **failure.details}
        click.echo(json.dumps(said))
        return
    click.secho(f"Error: {failure.message}", err=True, fg="red")
    if failure.remedy:
        click.echo(f"  {failure.remedy}", err=True)
