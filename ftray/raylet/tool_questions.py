"""Queries of tools that ask the processes of this node: memory, pending, stack, timeline.

Role: shell, under the reactor's lock. Each gathers what drivers and workers say (`asking.py`) and adds what the raylet
knows itself. Joining and judging is the tool's: here nothing is decided.

Rejected: answering from the raylet's tables alone (references and calls are known to their owners only).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftray.raylet.asking import BUSY, Said
from ftray.raylet.stacks import dump_stack

if TYPE_CHECKING:
    from ftray.raylet.clients import Client
    from ftray.raylet.raylet import Raylet

ASK_WAIT_MS = 2_000.0
STACK_WAIT_MS = 1_000.0
QUESTIONS = ("memory", "pending", "stack", "timeline")

Done = Callable[[dict[str, Any]], None]


def ask_processes(raylet: Raylet, what: str, arguments: dict[str, Any], done: Done) -> None:
    """Gathers the answer to one of `QUESTIONS`. Raises ValueError for wrong arguments."""
    clients = list(raylet.clients.by_id.values())
    pid = arguments.get("pid")
    if pid is not None:
        clients = [client for client in clients if client.pid == pid]
        if not clients:
            raise ValueError(f"no driver or worker of this node has the process id {pid}")
    limit = {"limit": arguments.get("limit", 1_000)}
    if what == "memory":
        raylet.asking.ask(clients, "references", limit, ASK_WAIT_MS, lambda said: done(_memory(raylet, said)))
    elif what == "pending":
        raylet.asking.ask(clients, "pending", limit, ASK_WAIT_MS, lambda said: done(_processes(raylet, said)))
    elif what == "timeline":
        workers = [client for client in clients if not client.driver]
        raylet.asking.ask(workers, "events", limit, ASK_WAIT_MS, lambda said: done(_timeline(raylet, said)))
    else:
        raylet.asking.ask(clients, "stack", {}, STACK_WAIT_MS, lambda said: _stacks(raylet, said, done))


def _runs(raylet: Raylet, client: Client, said: Said) -> str:
    """A worker knows it better than the node, which knows what it was leased for."""
    if said.answer is not None and raylet.actors.in_worker(said.worker_id) is None:
        return str(said.answer.get("running", ""))
    return raylet.what_it_runs(client)


def _process(raylet: Raylet, said: Said) -> dict[str, Any]:
    client: Client | None = raylet.clients.by_id.get(said.worker_id)
    actor = raylet.actors.in_worker(said.worker_id)
    return {
        "worker_id": said.worker_id.hex(),
        "pid": said.pid,
        "kind": "driver" if said.driver else "actor" if actor is not None else "worker",
        "running": _runs(raylet, client, said) if client is not None and not said.driver else "",
        "job_id": client.job_id.hex() if client is not None else "",
        "error": said.error,
        "answer": said.answer,
    }


def _processes(raylet: Raylet, said: list[Said]) -> dict[str, Any]:
    rows = [_process(raylet, each) for each in said]
    rows.sort(key=lambda row: (row["kind"] != "driver", row["pid"]))
    return {"node_id": raylet.node_id.hex(), "processes": rows}


def _memory(raylet: Raylet, said: list[Said]) -> dict[str, Any]:
    memory = raylet.memory
    return {
        **_processes(raylet, said),
        "store": raylet.store.usage(),
        "objects": raylet.store.rows(),
        "monitor": {
            "kills": memory.kills,
            "used_bytes": memory.last.used_bytes if memory.last is not None else 0,
            "limit_bytes": memory.last.limit_bytes if memory.last is not None else 0,
            "where": memory.last.where if memory.last is not None else "",
            "threshold_percent": raylet.config.memory_threshold_percent,
        },
    }


def _timeline(raylet: Raylet, said: list[Said]) -> dict[str, Any]:
    return {
        **_processes(raylet, said),
        "left": list(raylet.asking.left_events),
        "ended": [
            {"time_us": int(when * 1e6), "pid": pid, "what": what} for when, pid, _, what in raylet.asking.lives
        ],
        "now_us": int(time.time() * 1e6),
        "node_pid": os.getpid(),
    }


def _stacks(raylet: Raylet, said: list[Said], done: Done) -> None:
    """Workers that did not answer are asked once more, by a signal."""
    stuck = [each for each in said if each.error == BUSY and not each.driver]
    dumps: dict[bytes, str] = {}

    def finish() -> None:
        answer = _processes(raylet, said)
        for row in answer["processes"]:
            row["dump"] = dumps.get(bytes.fromhex(row["worker_id"]), "")
        done(answer)

    def dumped(worker_id: bytes) -> Callable[[str], None]:
        def keep(text: str) -> None:
            dumps[worker_id] = text
            if len(dumps) == len(stuck):
                finish()

        return keep

    if not stuck:
        finish()
    for each in stuck:
        dump_stack(raylet.reactor, each.pid, dumped(each.worker_id))
