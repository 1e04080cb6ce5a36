"""`ftray status`: what the cluster is doing, as one of its nodes sees it.

Role: shell. Asks the node and shows its answer in tables; `--json` passes it on as it is.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from ftray.cli.options import json_option, session_root_option
from ftray.cli.output import finish

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WORKERS_SHOWN = 40
GROUPS_SHOWN = 10
FILE_COLUMNS = 160
"""The width of tables when the output is no terminal."""


@click.command("status")
@click.option("--address", metavar="HOST:PORT", envvar="FTRAY_ADDRESS", help="Cluster to show.  [default: the newest]")
@session_root_option
@json_option
def command(address: str | None, session_root: str | None, as_json: bool) -> None:
    """Show the nodes, resources, workers, jobs and actors of the cluster.

    It asks a node of the cluster on this machine, the one that was started last unless --address names a head.

    \b
    Examples:
      ftray status
      ftray status --address 10.0.0.5:6380
      ftray status --json | jq .resources

    \b
    Exit codes:
      0  shown
      1  the node does not answer
      3  no cluster was found on this machine
    """

    def body() -> dict[str, Any]:
        from ftray.cli.find import ask, local_session

        answer = ask(local_session(session_root, address), "status")
        assert isinstance(answer, dict)
        return answer

    finish(as_json, body, _show)


def _show(status: dict[str, Any]) -> None:
    out = console()
    node = status["node"]
    kind = "head" if node["head"] else "node"
    heads = ", ".join(each.removeprefix("tcp:") for each in node["gcs_endpoints"] if each.startswith("tcp:"))
    where = f", heads {heads}" if heads else ""
    out.print(f"[bold]{kind} {node['node_id'][:12]}[/], process {node['pid']}{where}")
    if not node.get("gcs_connected", True):
        out.print("[red]the GCS is not connected: tasks go on, new actors and jobs wait[/]")
    gcs = status.get("gcs")
    if gcs and gcs.get("note"):
        out.print(f"cluster {gcs['note']}", style="yellow", markup=False, highlight=False)
    nodes = gcs["nodes"] if gcs else []
    several = len(nodes) > 1
    if several:
        out.print(_nodes(nodes))
    out.print(_resources(status["resources"], status.get("store") or {}, "on this node" if several else "resource"))
    if gcs:
        counts = [
            f"{table}: " + (", ".join(f"{count} {state.lower()}" for state, count in states.items()) or "none")
            for table, states in gcs["counts"].items()
        ]
        out.print("  ".join(counts))
    if status["workers"]:
        out.print(_workers(status))
    for demand in status.get("demands", ()):
        lack = demand.get("missing")
        waiting = demand["want"] - demand["held"]
        if waiting > 0:
            out.print(f"waiting: {waiting} more of {demand['name'] or 'an actor'}" + (f" ({lack})" if lack else ""))
    groups = gcs.get("placement_groups", ()) if gcs else ()
    unfinished = [group for group in groups if group["state"] not in ("CREATED", "REMOVED")]
    for group in unfinished[:GROUPS_SHOWN]:
        name = group["name"] or group["group_id"][:12]
        why = f" ({group['reason']})" if group["reason"] else ""
        out.print(f"placement group {name} is {group['state'].lower()}{why}", markup=False, highlight=False)
    if len(unfinished) > GROUPS_SHOWN:
        out.print(f"and {len(unfinished) - GROUPS_SHOWN} more placement groups (ftray list placement-groups)")
    for row in status.get("infeasible", ()):
        out.print(f"[red]can never run:[/] {row['name'] or 'a task'}: {row['missing']}")


def console() -> Console:
    """Where commands print tables: as wide as the terminal (or COLUMNS says), and wide for a file or pipe."""
    from rich.console import Console as RichConsole

    return RichConsole(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_COLUMNS)


def table(*columns: str) -> Table:
    """An empty table as all commands show them."""
    from rich.table import Table as RichTable

    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _nodes(nodes: list[dict[str, Any]]) -> Table:
    rows = table("node", "state", "host", "process", "resources")
    for node in sorted(nodes, key=lambda node: (node["state"], node["node_id"])):
        offers = ", ".join(f"{amount(name, each)} {name}" for name, each in sorted(node["resources"].items()))
        row = (node["node_id"][:12], node["state"].lower(), node["hostname"], str(node["pid"]), offers)
        rows.add_row(*row, style="" if node["state"] == "ALIVE" else "dim")
    return rows


def _resources(resources: dict[str, dict[str, float]], store: dict[str, Any], title: str) -> Table:
    rows = table(title, "in use", "total")
    total, available = resources["total"], resources["available"]
    for name in sorted(total):
        used = total[name] - available.get(name, 0)
        rows.add_row(name, amount(name, used), amount(name, total[name]))
    stored, capacity = store.get("used_bytes"), store.get("capacity_bytes")
    if isinstance(stored, int) and isinstance(capacity, int):
        rows.add_row("object store", size(stored), size(capacity))
    return rows


def _workers(status: dict[str, Any]) -> Table:
    rows = table("worker", "process", "state", "job", "runs")
    actors = {actor["actor_id"]: actor["class_name"] for actor in status.get("actors", ())}
    for worker in status["workers"][:WORKERS_SHOWN]:
        runs = actors.get(worker["actor_id"], "") or worker["running"]
        state = worker["state"].lower() + (", waits in get" if worker["blocked"] else "")
        rows.add_row(worker["worker_id"][:12], str(worker["pid"]), state, worker["job_id"], runs)
    if len(status["workers"]) > WORKERS_SHOWN:
        rows.add_row(f"and {len(status['workers']) - WORKERS_SHOWN} more", "", "", "", "")
    return rows


def amount(name: str, value: float) -> str:
    """A resource amount for people: bytes for memory, a plain number otherwise."""
    return size(int(value)) if "memory" in name else f"{value:g}"


def size(size_bytes: int) -> str:
    """A number of bytes for people: `1.5 GiB`."""
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:.0f} {units[0]}" if value == int(value) or value >= 100 else f"{value:.1f} {units[0]}"
