"""`ftray timeline`: what ran when, as a trace for chrome://tracing or https://ui.perfetto.dev.

Role: shell around `api/timeline.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ftray.cli.options import json_option, session_root_option
from ftray.cli.output import Failure, finish


@click.command("timeline")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("ftray-timeline.json"),
              show_default=True, help="File to write.")  # fmt: skip
@click.option("--address", metavar="HOST:PORT", envvar="FTRAY_ADDRESS", help="Cluster to ask.  [default: the newest]")
@session_root_option
@json_option
def command(output: Path, address: str | None, session_root: str | None, as_json: bool) -> None:
    """Write what the workers of this node have run lately as a trace.

    Open the file at https://ui.perfetto.dev or chrome://tracing: a row for each worker, a bar for each task, actor
    call and wait. Each worker remembers its last 10,000 (FTRAY_TASK_EVENTS_MAX); one that is killed takes them along.

    \b
    Examples:
      ftray timeline
      ftray timeline -o /tmp/trace.json

    \b
    Exit codes:
      0  written
      1  the node does not answer, or the file can't be written
      3  no cluster was found on this machine
    """

    def body() -> dict[str, Any]:
        from ftray.api.timeline import LIMIT, trace_of
        from ftray.cli.find import ask, local_session

        events = trace_of(ask(local_session(session_root, address), "timeline", limit=LIMIT))
        try:
            output.write_text(json.dumps(events))
        except OSError as error:
            raise Failure(f"{output} can't be written: {error.strerror}") from None
        return {"file": str(output), "events": len(events)}

    finish(as_json, body, lambda answer: click.echo(f"{answer['events']} events written to {answer['file']}"))
