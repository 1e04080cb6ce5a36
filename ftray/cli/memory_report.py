"""From what a node and its processes say of memory to who holds each byte, and why; and to what nobody should hold.

Role: pure. The store says which objects it has and who pins them; each process says which objects it refers to. Put
together, every object in memory or on disk has its holders, and what has none is named:

- *unreachable*: the store keeps a primary copy that its owner does not know, or whose owner is gone;
- *lost*: an owner counts on an object of this node's store that is not there;
- *stray pin*: a process pins an object that it does not know of.

The parts do not speak at the same moment: what looks wrong is wrong only if a second look finds it again (`confirmed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN_STATES = ("creating",)
"""States of an object in the store that are on the way, and so may be known to one side only."""


def build(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The report: `store`, `processes`, `objects` (largest first), `problems`, and the two sums that must agree.

    `objects_total` counts those too that no process has listed, for each lists its largest ones only.
    """
    processes = {row["worker_id"]: row for row in answer["processes"]}
    known = {worker_id: row["answer"] for worker_id, row in processes.items() if row["answer"] is not None}
    stored = {worker_id: set(said["stored"]) for worker_id, said in known.items()}
    expected = {worker_id: set(said.get("expected", ())) for worker_id, said in known.items()}
    pinned = {worker_id: set(said["pinned"]) for worker_id, said in known.items()}
    holders: dict[str, dict[str, dict[str, Any]]] = {}
    sizes: dict[str, dict[str, Any]] = {}
    for worker_id, said in known.items():
        name = name_of(processes[worker_id])
        for row in said["rows"]:
            object_id = row["object_id"]
            _hold(holders, object_id, name, row["reasons"], row["owned"], row["site"])
            if row["owned"] or object_id not in sizes:
                sizes[object_id] = {
                    "object_id": object_id,
                    "size_bytes": row["size_bytes"],
                    "where": row["state"],
                    "owner": row["owner"],
                }
    problems: list[dict[str, Any]] = []
    pinned_bytes = reachable_bytes = 0
    in_store: set[str] = set()
    for row in answer["objects"]:
        object_id, owner, state = row["object_id"], row["owner"], row["state"]
        in_store.add(object_id)
        where = "disk" if state in ("spilled", "lost") else "store"
        sizes[object_id] = {"object_id": object_id, "size_bytes": row["size"], "where": where, "owner": owner}
        for client, count in row["pins"].items():
            name = name_of(processes[client]) if client in processes else f"process {client[:12]}, which is gone"
            _hold(holders, object_id, name, [f"mapped {count} times" if count > 1 else "mapped"])
            knows = client not in pinned or object_id in pinned[client] or state in SHOWN_STATES
            if client not in processes or not knows:
                problems.append(_problem("stray pin", row, f"{name} pins it without knowing of it"))
        if not row["primary"]:
            _hold(holders, object_id, "the store", ["cached, or let go and still looked into"])
            continue
        if state in SHOWN_STATES:
            continue
        pinned_bytes += row["size"]
        if owner not in processes:
            problems.append(_problem("unreachable", row, f"its owner {owner[:12]} is gone"))
        elif owner not in stored:
            reachable_bytes += row["size"]  # the owner has not answered: it may well know it
        elif object_id in stored[owner] or object_id in expected[owner]:
            reachable_bytes += row["size"]
        else:
            problems.append(_problem("unreachable", row, f"its owner {name_of(processes[owner])} does not know it"))
    for worker_id, counted_on in stored.items():
        for object_id in counted_on - in_store:
            row = {"object_id": object_id, "size": 0}
            text = f"{name_of(processes[worker_id])} counts on it, and the store has it not"
            problems.append(_problem("lost", row, text))
    objects = [
        {**each, "owner": name_of(processes[each["owner"]]) if each["owner"] in processes else each["owner"][:12],
         "holders": list(holders.get(object_id, {}).values())}
        for object_id, each in sizes.items()
    ]  # fmt: skip
    objects.sort(key=lambda each: -each["size_bytes"])
    return {
        "node_id": answer["node_id"],
        "store": answer["store"],
        "monitor": answer.get("monitor", {}),
        "pinned_bytes": pinned_bytes,
        "reachable_bytes": reachable_bytes,
        "processes": [
            {
                "process": name_of(row), "pid": row["pid"], "kind": row["kind"], "running": row["running"],
                "error": row["error"], **(row["answer"] or {}).get("totals", {}),
            }
            for row in answer["processes"]
        ],
        "objects": objects,
        "objects_total": max(len(objects), sum(said["totals"]["owned"] for said in known.values())),
        "problems": problems,
    }  # fmt: skip


def confirmed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The second report, with only those problems that the first had too."""
    before = {(each["kind"], each["object_id"]) for each in first["problems"]}
    left = [each for each in second["problems"] if (each["kind"], each["object_id"]) in before]
    return {**second, "problems": left}


def name_of(row: Mapping[str, Any]) -> str:
    """A process as people know it."""
    runs = f" ({row['running']})" if row["kind"] == "actor" and row["running"] else ""
    return f"{row['kind']} {row['pid']}{runs}"


def _hold(
    holders: dict[str, dict[str, dict[str, Any]]],
    object_id: str,
    process: str,
    reasons: list[str],
    owner: bool = False,
    site: str = "",
) -> None:
    found = holders.setdefault(object_id, {}).setdefault(
        process, {"process": process, "owner": False, "reasons": [], "site": ""}
    )
    found["owner"] |= owner
    found["reasons"] = [*found["reasons"], *reasons]
    found["site"] = found["site"] or site


def _problem(kind: str, row: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"kind": kind, "object_id": row["object_id"], "size_bytes": row["size"], "text": text}
