"""`ftray logs`: the files that nodes and workers of this machine have written.

Role: shell. Reads the session's folder, so it works when the node is dead, too: then the newest session that is left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ftray.cli.options import json_option, session_root_option
from ftray.cli.output import NOT_FOUND, Failure, finish
from ftray.raylet.session import default_root, find_session

FOLLOW_S = 0.2


@click.command("logs")
@click.argument("file", required=False)
@click.option("-n", "--lines", type=click.IntRange(min=0), default=100, show_default=True, help="Lines from the end.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written, until Ctrl-C.")
@click.option("--worker", type=int, metavar="PID", help="The files of the worker process PID.")
@session_root_option
@json_option
def command(
    file: str | None, lines: int, follow: bool, worker: int | None, session_root: str | None, as_json: bool
) -> None:
    """Show what workers and nodes of this machine have printed.

    Without FILE, lists the log files of the newest session, running or not. raylet.log is the node's own;
    worker-PID.out and worker-PID.err are what the worker PID printed; older parts end in .1, .2, ...

    \b
    Examples:
      ftray logs                       # the list
      ftray logs raylet.log -n 20
      ftray logs --worker 4711         # both files of a worker
      ftray logs worker-4711.err -f

    \b
    Exit codes:
      0  shown
      1  there is no such file
      2  the command line is wrong
      3  no session was found on this machine
    """
    if follow and as_json:
        raise click.UsageError("--follow and --json don't go together: the object would never end")
    if follow and not file and worker is None:
        raise click.UsageError("--follow needs a FILE, or --worker PID")
    if file and worker is not None:
        raise click.UsageError("give either FILE or --worker, not both")

    def body() -> dict[str, Any]:
        directory = _directory(session_root)
        rows = _files(directory)
        if not file and worker is None:
            return {"directory": str(directory), "files": rows}
        names = [row["file"] for row in rows]
        of_worker = (f"worker-{worker}.out", f"worker-{worker}.err")
        wanted = [name for name in names if (name == file if file else name in of_worker)]
        if not wanted:
            what = f"there is no log file {file}" if file else f"no worker with process id {worker} has printed"
            raise Failure(what, f"`ftray logs` lists the files in {directory}", available=names)
        shown = [{"file": name, "lines": _tail(directory / str(name), lines)} for name in wanted]
        return {"directory": str(directory), "logs": shown}

    finish(as_json, body, lambda answer: _show(answer, follow))


def _directory(root: str | None) -> Path:
    where = os.path.abspath(root or default_root())
    session = find_session(where)
    if session is not None:
        return Path(session["session_dir"]) / "logs"
    left = sorted(Path(where).glob("session_*/logs"), reverse=True)
    if not left:
        raise Failure(f"no session was found (looked in {where})", "name its root with --session-root", NOT_FOUND)
    return left[0]


def _files(directory: Path) -> list[dict[str, Any]]:
    rows = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_file(follow_symlinks=False):
            status = entry.stat()
            rows.append({"file": entry.name, "size_bytes": status.st_size, "changed": status.st_mtime})
    return rows


def _tail(path: Path, lines: int) -> list[str]:
    from ftray.raylet.logs import tail_log

    return tail_log(str(path.parent), path.name, lines)


def _show(answer: dict[str, Any], follow: bool) -> None:
    if "files" in answer:
        click.echo(f"{answer['directory']}:")
        for row in answer["files"]:
            changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["changed"]))
            click.echo(f"  {row['file']:<28} {row['size_bytes']:>12} bytes   {changed}")
        if not answer["files"]:
            click.echo("  no files yet")
        return
    paths = [Path(answer["directory"]) / log["file"] for log in answer["logs"]]
    ends = [path.stat().st_size for path in paths]
    for log in answer["logs"]:
        if len(paths) > 1:
            click.secho(f"==> {log['file']} <==", bold=True)
        for line in log["lines"]:
            click.echo(line)
    if follow:
        try:
            for path, text in _grown(paths, ends):
                click.echo(f"{path.name}: {text}" if len(paths) > 1 else text)
        except KeyboardInterrupt:
            pass


def _grown(paths: list[Path], ends: list[int]) -> Iterator[tuple[Path, str]]:
    """Lines that are added to the files from now on. A file that was rotated is read from its beginning."""
    rests = [b""] * len(paths)
    while True:
        for number, path in enumerate(paths):
            try:
                size = path.stat().st_size
                if size < ends[number]:
                    ends[number] = 0
                if size > ends[number]:
                    with path.open("rb") as file:
                        file.seek(ends[number])
                        data = rests[number] + file.read()
                    ends[number] = size
                    *whole, rests[number] = data.split(b"\n")
                    for line in whole:
                        yield path, line.decode("utf-8", "replace")
            except OSError:
                continue
        time.sleep(FOLLOW_S)
