"""`ftray memory`: every byte that is held, by whom, and why.

Role: shell around `memory_report.py`.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from ftray.cli.options import json_option, session_root_option
from ftray.cli.output import FAILED, finish

LOOK_AGAIN_S = 0.3
LOOKS_AGAIN = 3
"""A problem is one that is there each time."""


@click.command("memory")
@click.option("--address", metavar="HOST:PORT", envvar="FTRAY_ADDRESS", help="Cluster to show.  [default: the newest]")
@click.option("-n", "--objects", "shown", type=click.IntRange(min=0), default=20, show_default=True,
              help="How many objects to show, largest first.")  # fmt: skip
@click.option("--check", is_flag=True, help="Exit with 1 if something is held that nobody needs, or missing.")
@session_root_option
@json_option
def command(address: str | None, shown: int, check: bool, session_root: str | None, as_json: bool) -> None:
    """Show what the objects of this node's programs hold in memory and on disk, and why.

    Every object has its holders: local references, unfinished tasks that have it as an argument, objects that contain
    it, processes that borrow or look into it. FTRAY_RECORD_CALL_SITES=1, set where the program starts, adds the
    line of code that made each. Bytes that nobody can reach are named as problems.

    \b
    Examples:
      ftray memory
      ftray memory -n 100 --json | jq '.objects[] | select(.size_bytes > 1e6)'
      ftray memory --check || echo "something leaks"

    \b
    Exit codes:
      0  shown (with --check: and nothing is wrong)
      1  the node does not answer, or --check found a problem
      3  no cluster was found on this machine
    """
    problems: list[Any] = []

    def body() -> dict[str, Any]:
        import time

        from ftray.cli.find import ask, local_session
        from ftray.cli.memory_report import build, confirmed

        session = local_session(session_root, address)
        report = build(ask(session, "memory", limit=max(shown, 1_000)))
        for _ in range(LOOKS_AGAIN):
            if report["problems"]:
                time.sleep(LOOK_AGAIN_S)  # what was on its way between two processes has arrived by then
                report = confirmed(report, build(ask(session, "memory", limit=max(shown, 1_000))))
        report["objects"] = report["objects"][:shown]
        problems.extend(report["problems"])
        return report

    try:
        finish(as_json, body, _show)
    except SystemExit as end:
        if check and problems and not end.code:
            sys.exit(FAILED)
        raise


def _show(report: dict[str, Any]) -> None:
    from ftray.cli.status import console as make_console
    from ftray.cli.status import size, table
    from ftray.ids import short_object

    console = make_console()
    store = report["store"]
    console.print(
        f"[bold]object store[/] of node {report['node_id'][:12]}: {size(store['used_bytes'])} of "
        f"{size(store['capacity_bytes'])} in use, {size(store['pinned_bytes'])} pinned, "
        f"{size(store['evictable_bytes'])} cached; on disk {size(store.get('spilled_bytes', 0))} in "
        f"{store.get('spilled_objects', 0)} objects"
    )
    if store.get("waiting_creations"):
        console.print(f"[yellow]{store['waiting_creations']} creations wait for room[/]")
    monitor = report["monitor"]
    if monitor.get("limit_bytes"):
        console.print(
            f"memory: {size(monitor['used_bytes'])} of {size(monitor['limit_bytes'])} of {monitor['where']} in use; "
            f"over {monitor['threshold_percent']:g} % a worker is ended ({monitor['kills']} so far)"
        )
    processes = table("process", "runs", "objects", "owns", "pending", "inline", "stored")
    silent = [row for row in report["processes"] if "objects" not in row]
    for row in report["processes"]:
        if row in silent:
            processes.add_row(row["process"], row["running"], *["?"] * 5)
            continue
        processes.add_row(
            row["process"], row["running"], str(row["objects"]), str(row["owned"]), str(row["pending"]),
            size(row["inline_bytes"]), size(row["store_bytes_owned"]),
        )  # fmt: skip
    console.print(processes)
    for row in silent:
        console.print(f"[yellow]{row['process']}: {row['error']}[/]")
    if report["objects"]:
        objects = table("object", "size", "where", "owner", "held by")
        for row in report["objects"]:
            why = "\n".join(map(_holder, row["holders"]))
            objects.add_row(short_object(row["object_id"]), size(row["size_bytes"]), row["where"], row["owner"], why)
        console.print(objects)
    more = report["objects_total"] - len(report["objects"])
    if more > 0:
        count = f"and {more:,} more" if report["objects"] else f"{more:,} objects"
        console.print(f"{count} (-n shows them)")
    elif not report["objects"]:
        console.print("no object is held")
    kept, reachable = size(report["pinned_bytes"]), size(report["reachable_bytes"])
    console.print(f"primary copies: {kept} kept, {reachable} reachable by their owners")
    for problem in report["problems"]:
        what = f"{short_object(problem['object_id'])}, {size(problem['size_bytes'])}"
        console.print(f"[red]{problem['kind']}[/]: {what}: {problem['text']}")


def _holder(holder: dict[str, Any]) -> str:
    made = f", made at {holder['site']}" if holder["site"] else ""
    return f"{holder['process']}: {', '.join(holder['reasons'])}{made}"
