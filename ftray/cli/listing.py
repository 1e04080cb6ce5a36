"""`ftray list`: the things of one kind, a line for each.

Role: shell. What is asked of the node's processes (pending) or of the node itself, shown as a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ftray.cli.options import json_option, session_root_option
from ftray.cli.output import finish

KINDS = ("pending", "workers", "actors", "placement-groups", "nodes", "drivers", "leases", "objects")
_OF_CLUSTER = {"nodes": "nodes", "placement-groups": "placement_groups"}
"""What the GCS knows, and under which name it is in the answer; the rest is of this node."""


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS))
@click.option("-n", "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="How many to show.")
@click.option("--address", metavar="HOST:PORT", envvar="FTRAY_ADDRESS", help="Cluster to ask.  [default: the newest]")
@session_root_option
@json_option
def command(kind: str, limit: int, address: str | None, session_root: str | None, as_json: bool) -> None:
    """List what there is of one KIND.

    \b
    pending   tasks and actor calls that have not ended, and what each
              waits for; calls of get and wait, and what they wait for
    workers   the worker processes of this node, and what they run
    actors    the actors on this node
    placement-groups
              the placement groups of the cluster, and what they wait for
    nodes     the nodes of the cluster
    drivers   the programs connected to this node
    leases    which worker is leased to whom
    objects   the objects in this node's store (`ftray memory` says why)

    \b
    Examples:
      ftray list pending
      ftray list workers --json | jq '.rows[].pid'

    \b
    Exit codes:
      0  shown
      1  the node does not answer
      2  the command line is wrong
      3  no cluster was found on this machine
    """

    def body() -> dict[str, Any]:
        from ftray.cli.find import ask, local_session

        session = local_session(session_root, address)
        note: dict[str, str] = {}
        if kind == "pending":
            return _pending(ask(session, "pending", limit=limit))
        if kind == "objects":
            rows = ask(session, "memory", limit=1)["objects"]
        else:
            status = ask(session, "status")
            gcs = status["gcs"] or {}
            rows = gcs.get(_OF_CLUSTER[kind], []) if kind in _OF_CLUSTER else status[kind]
            if kind in _OF_CLUSTER and gcs.get("note"):
                note["note"] = gcs["note"]
        return {"rows": rows[:limit], "total": len(rows), **note}

    finish(as_json, body, _show_pending if kind == "pending" else _table_of(kind))


def _pending(answer: dict[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    blocked: list[dict[str, Any]] = []
    silent: list[str] = []
    total = 0
    for process in answer["processes"]:
        name = f"{process['kind']} {process['pid']}"
        said = process["answer"]
        if said is None:
            silent.append(f"{name}: {process['error']}")
            continue
        total += said["total"]
        rows += [{"owner": name, **row} for row in said["rows"]]
        blocked += [{"process": name, **row} for row in said["blocked"]]
    return {"rows": rows, "total": total, "blocked": blocked, "silent": silent}


def _show_pending(answer: dict[str, Any]) -> None:
    from ftray.cli.status import console as make_console
    from ftray.cli.status import table
    from ftray.ids import short_object

    console = make_console()
    for row in answer["blocked"]:
        console.print(f"[bold]{row['process']}[/] waits in {row['call']} for {row['objects']} objects:")
        for line in row["waits"]:
            console.print(f"  {line}", highlight=False)
        if row["objects"] > len(row["waits"]):
            console.print(f"  and {row['objects'] - len(row['waits'])} more")
    if answer["rows"]:
        rows = table("task", "owner", "name", "attempt", "waits")
        for row in answer["rows"]:
            rows.add_row(short_object(row["task_id"]), row["owner"], row["name"], str(row["attempt"]), row["waits"])
        console.print(rows)
    else:
        console.print("nothing is pending" + (", as far as the processes answer" if answer["silent"] else ""))
    if answer["total"] > len(answer["rows"]):
        console.print(f"and {answer['total'] - len(answer['rows'])} more (-n shows them)")
    for line in answer["silent"]:
        console.print(f"[yellow]{line}[/]")


_COLUMNS: dict[str, tuple[str, ...]] = {
    "workers": ("worker_id", "pid", "state", "job_id", "blocked", "running"),
    "actors": ("actor_id", "class_name", "stage", "incarnation", "job_id", "worker_id", "stopping"),
    "placement-groups": ("group_id", "name", "state", "strategy", "bundles", "nodes", "job_id", "reason"),
    "nodes": ("node_id", "state", "hostname", "pid", "endpoint"),
    "drivers": ("worker_id", "pid", "job_id", "entrypoint"),
    "leases": ("lease_id", "name", "owner", "worker_id", "resources", "blocked"),
    "objects": ("object_id", "size", "state", "owner", "primary"),
}


def _cell(column: str, value: Any) -> str:
    """A value as people read it; ids are shortened (`--json` has them whole)."""
    from ftray.cli.status import amount, size
    from ftray.ids import short_object

    if isinstance(value, bool):
        return "yes" if value else ""
    if column in ("object_id", "actor_id"):
        return short_object(value)
    if column == "bundles":
        return str(len(value)) if value else ""  # a removed group may not have them any more
    if column in ("worker_id", "node_id", "owner", "group_id"):
        return str(value)[:12]
    if column == "size":
        return size(value)
    if column in ("state", "stage"):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{amount(name, each)} {name}" for name, each in sorted(value.items()))
    return str(value)


def _table_of(kind: str) -> Callable[[dict[str, Any]], None]:
    def show(answer: dict[str, Any]) -> None:
        from ftray.cli.status import console as make_console
        from ftray.cli.status import table

        console = make_console()
        if answer.get("note"):
            console.print(f"{kind} {answer['note']}", style="yellow", markup=False, highlight=False)
        if not answer["rows"]:
            console.print(f"no {kind}")
            return
        columns = _COLUMNS.get(kind, ())
        rows = table(*columns)
        for row in answer["rows"]:
            rows.add_row(*[_cell(column, row.get(column, "")) for column in columns])
        console.print(rows)
        if answer["total"] > len(answer["rows"]):
            console.print(f"and {answer['total'] - len(answer['rows'])} more (-n shows them)")

    return show
