"""`ftray.timeline()`: what ran when, in the trace event format that Chrome and Perfetto read.

Role: shell around the raylet's answer; `trace_of` is pure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftray.api.context import ask_raylet

LIMIT = 100_000


def timeline(filename: str | Path | None = None) -> list[dict[str, Any]] | None:
    """The trace of this node as a list of events; with a `filename` it is written there as JSON, and None returned.

    Raises NotInitializedError, FtrayError when the node does not answer, OSError when the file can't be written.
    """
    events = trace_of(ask_raylet("timeline", limit=LIMIT))
    if filename is None:
        return events
    Path(filename).write_text(json.dumps(events))
    return None


def trace_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The raylet's answer as trace events: the node is the trace's process, each worker a thread of it."""
    node_pid = answer["node_pid"]
    node = f"node {answer['node_id'][:12]}"
    found: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": node_pid, "tid": 0, "args": {"name": node}}
    ]
    rows = list(answer["left"])
    names: dict[int, str] = {row["pid"]: f"worker {row['pid']} (ended)" for row in rows}
    for process in answer["processes"]:
        runs = f" {process['running']}" if process["kind"] == "actor" else ""
        names[process["pid"]] = f"{process['kind']} {process['pid']}{runs}"
        for row in (process["answer"] or {}).get("events", ()):
            rows.append({**row, "pid": process["pid"]})
    for pid, name in names.items():
        found.append({"name": "thread_name", "ph": "M", "pid": node_pid, "tid": pid, "args": {"name": name}})
    for row in sorted(rows, key=lambda row: row["start_us"]):
        found.append(
            {
                "name": row["name"], "cat": row["kind"] + (",failed" if row["failed"] else ""), "ph": "X",
                "ts": row["start_us"], "dur": max(1, row["duration_us"]), "pid": node_pid, "tid": row["pid"],
                "args": {"task_id": row["task_id"], "attempt": row["attempt"], "failed": row["failed"]},
            }
        )  # fmt: skip
    for ended in answer["ended"]:
        found.append(
            {
                "name": f"process {ended['pid']} ended" + (f" ({ended['what']})" if ended["what"] else ""),
                "cat": "fault", "ph": "i", "s": "p", "ts": ended["time_us"], "pid": node_pid, "tid": ended["pid"],
            }
        )  # fmt: skip
    return found
