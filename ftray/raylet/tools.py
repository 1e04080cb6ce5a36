"""Answers to command-line tools: what this node is doing, its logs, its objects; and the request to stop.

Role: shell. Each `ToolQuery` gets one `ToolReply` with JSON, or with an error that says what to ask instead. What the
GCS knows is asked there, for at most `GCS_WAIT_MS`; a node whose GCS is away still answers for itself. Any head may say
how things are: a cluster without a leader can be looked at, and the answer says who gave it.

Rejected: a table of fields to choose from (the command line can leave out what it does not show).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftray.exceptions import ProtocolError
from ftray.gcs.state.tables import ActorRecord, GroupRecord, GroupState, JobRecord, NodeRecord, Record, Table
from ftray.raylet.asking import Said
from ftray.raylet.logs import list_logs, tail_log
from ftray.raylet.tool_questions import QUESTIONS, ask_processes
from ftray.scheduling.bundles import BundleToken
from ftray.wire.messages import Message, ToolQuery, ToolReply
from ftray.wire.reactor import Link, Timer

if TYPE_CHECKING:
    from ftray.gcs.client import GcsClient
    from ftray.raylet.raylet import Raylet

GCS_WAIT_MS = 1_000
ASK_WAIT_MS = 200.0
"""How long workers may take to say what they run."""
TAIL_LINES = 100
_TABLES = (Table.NODES, Table.JOBS, Table.ACTORS, Table.PLACEMENT_GROUPS)


class ToolHandler:
    """Handler of links with ROLE_TOOL."""

    def __init__(self, raylet: Raylet, stop: Callable[[str], None]) -> None:
        self._raylet = raylet
        self._stop = stop

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        if type(message) is not ToolQuery:
            raise ProtocolError(f"a raylet takes no {type(message).__name__} from a tool")
        arguments = message.arguments
        try:
            if message.what == "status":
                self._status(link, message.request)
                return
            if message.what in QUESTIONS:
                ask_processes(
                    self._raylet, message.what, arguments, lambda answer: _reply(link, message.request, answer)
                )
                return
            answer = self._simple(message.what, arguments)
        except ValueError as error:
            link.send(ToolReply(message.request, str(error)))
            return
        _reply(link, message.request, answer)
        if message.what == "stop":
            link.flush()
            self._stop("a tool asked this node to stop")

    def on_closed(self, link: Link, reason: str) -> None:
        """Nothing is kept for a tool."""

    def _simple(self, what: str, arguments: dict[str, Any]) -> Any:
        raylet = self._raylet
        if what == "logs":
            return {"directory": raylet.logs.directory, "files": list_logs(raylet.logs.directory)}
        if what == "log_tail":
            name, lines = arguments.get("file"), arguments.get("lines", TAIL_LINES)
            if not isinstance(name, str) or not isinstance(lines, int):
                raise ValueError("log_tail needs the name of a file, and the number of lines as a whole number")
            return {"file": name, "lines": tail_log(raylet.logs.directory, name, lines)}
        if what == "stop":
            return {"stopping": True, "pid": os.getpid()}
        known = ", ".join(("status", "logs", "log_tail", *QUESTIONS))
        raise ValueError(f"{what!r} is no query: ask for {known} or stop")

    # --- status -------------------------------------------------------------------------------------------------------

    def _status(self, link: Link, request: int) -> None:
        gcs = self._raylet.gcs
        tables: dict[Table, dict[bytes, Record]] = {}
        running: list[dict[bytes, str]] = []
        handles: list[int] = []
        timer: list[Timer] = []
        read: list[bool] = []
        source: dict[str, Any] = {}

        def answer_if_all() -> None:
            if running and read:
                status = self.local_status(running[0])
                _reply(link, request, {**status, "gcs": {**_gcs_status(tables), **source} if tables else None})

        def finish() -> None:
            for handle in handles:
                gcs.cancel_read(handle)
            for each in timer:
                each.cancel()
            read.append(True)
            answer_if_all()

        def got(table: Table, rows: dict[bytes, Record]) -> None:
            tables[table] = rows
            source.update(head=gcs.served_by, leads=gcs.connected)
            if not gcs.connected:
                source["note"] = _note(gcs)
            if len(tables) == len(_TABLES):
                finish()

        def heard(said: list[Said]) -> None:
            running.append({each.worker_id: each.answer.get("running", "") for each in said if each.answer is not None})
            answer_if_all()

        def reader(table: Table) -> Callable[[dict[bytes, Record]], None]:
            return lambda rows: got(table, rows)

        # What runs in a worker only the worker knows: the node knows what it was leased for.
        raylet = self._raylet
        clients = raylet.clients.by_id.values()
        leased = [each for each in clients if each.lease_id and raylet.actors.in_worker(each.worker_id) is None]
        raylet.asking.ask(leased, "running", {}, ASK_WAIT_MS, heard)
        if not gcs.served_by:
            finish()
            return
        timer.append(self._raylet.reactor.call_later(GCS_WAIT_MS, finish))
        for table in _TABLES:
            handles.append(gcs.read_all(table, reader(table), cached=True))

    def local_status(self, running: dict[bytes, str]) -> dict[str, Any]:
        """What this node knows itself, and what its workers have said they run."""
        raylet = self._raylet
        info, scheduler = raylet.info, raylet.leases.scheduler
        return {
            "node": {
                "node_id": info.node_id.hex(),
                "pid": os.getpid(),
                "head": info.head,
                "labels": info.labels,
                "session_dir": info.session_dir,
                "raylet_endpoint": info.raylet_endpoint,
                "gcs_endpoints": list(info.gcs_endpoints),
                "gcs_connected": raylet.gcs.connected,
            },
            "resources": {"total": _of_node(scheduler.total), "available": _of_node(scheduler.available)},
            "bundles": [
                {
                    "group_id": row.group_id.hex(),
                    "attempt": row.attempt,
                    "stage": row.stage,
                    "bundles": {str(index): resources for index, resources in row.bundles.items()},
                    "reason": row.reason,
                }
                for row in raylet.groups.bundles.rows()
            ],
            "workers": self._workers(running),
            "drivers": [
                {
                    "worker_id": client.worker_id.hex(),
                    "pid": client.pid,
                    "job_id": client.job_id.hex(),
                    "entrypoint": client.entrypoint,
                }
                for client in raylet.clients.by_id.values()
                if client.driver
            ],
            "leases": [self._lease(row) for row in scheduler.leases()],
            "demands": [self._demand(row) for row in scheduler.demands()],
            "infeasible": [
                {
                    "client": client_id.hex(),
                    "class_id": class_id,
                    "name": self._class(client_id, class_id),
                    "missing": text,
                }
                for (client_id, class_id), text in raylet.leases.infeasible.items()
            ],
            "actors": [
                {
                    "actor_id": actor.actor_id.hex(),
                    "incarnation": actor.incarnation,
                    "class_name": actor.class_name,
                    "stage": actor.stage.name,
                    "job_id": actor.job_id.hex(),
                    "worker_id": actor.worker_id.hex(),
                    "stopping": actor.stopping,
                }
                for actor in raylet.actors.hosted.values()
            ],
            "store": raylet.store.usage(),
        }

    def _workers(self, running: dict[bytes, str]) -> list[dict[str, Any]]:
        raylet = self._raylet
        rows = []
        for worker in raylet.leases.pool.workers.values():
            process = raylet.processes.by_id.get(worker.worker_id)
            client = raylet.clients.by_id.get(worker.worker_id)
            actor = raylet.actors.in_worker(worker.worker_id)
            runs = running.get(worker.worker_id)
            if runs is None:
                runs = raylet.what_it_runs(client) if client is not None else ""
            rows.append(
                {
                    "worker_id": worker.worker_id.hex(),
                    "pid": process.pid if process is not None else 0,
                    "state": worker.state.name,
                    "job_id": worker.job_id.hex(),
                    "blocked": worker.blocked,
                    "lease_id": client.lease_id if client is not None else 0,
                    "running": runs,
                    "actor_id": actor.actor_id.hex() if actor is not None else "",
                }
            )
        return rows

    def _lease(self, row: Any) -> dict[str, Any]:
        lease = self._raylet.leases.given.get(row.lease_id)
        return {
            "lease_id": row.lease_id,
            "owner": row.client.hex(),
            "name": "a placement group" if type(row.token) is BundleToken else self._class(row.client, row.class_id),
            "actor": _token(row.token),
            "job_id": row.job_id.hex(),
            "worker_id": lease.worker_id.hex() if lease is not None else "",
            "resources": dict(row.resources),
            "blocked": row.blocked,
            "recalled": row.recalled,
        }

    def _demand(self, row: Any) -> dict[str, Any]:
        return {
            "client": row.client.hex(),
            "class_id": row.class_id,
            "name": "a placement group" if type(row.token) is BundleToken else self._class(row.client, row.class_id),
            "actor": _token(row.token),
            "job_id": row.job_id.hex(),
            "want": row.want,
            "held": row.held,
            "resources": dict(row.resources),
            "missing": row.missing,
        }

    def _class(self, client_id: bytes, class_id: int) -> str:
        client = self._raylet.clients.by_id.get(client_id)
        return client.class_names.get(class_id, "") if client is not None else ""


def _of_node(amounts: dict[str, float]) -> dict[str, float]:
    """Without what bundles of placement groups offer of it under names of their own."""
    return {name: amount for name, amount in amounts.items() if "_group_" not in name}


def _group(group: GroupRecord) -> dict[str, Any]:
    waits = group.missing or (group.cause.reason if group.cause is not None else "")
    if not waits and group.state is GroupState.PENDING:
        waits = "waits until there is room: actors or other placement groups hold the resources"
    return {
        "group_id": group.group_id.hex(),
        "name": group.name,
        "namespace": group.namespace,
        "state": group.state.name,
        "strategy": group.strategy.value,
        "job_id": group.job_id.hex(),
        "detached": group.detached,
        "attempt": group.attempt,
        "bundles": [
            {"resources": each.resources, "state": each.state.name, "node_id": each.node_id.hex()}
            for each in group.bundles
        ],
        "nodes": len({each.node_id for each in group.bundles if each.node_id}),
        "reason": "" if group.state is GroupState.CREATED else waits,
    }


def _token(token: Any) -> str:
    return token[0].hex() if isinstance(token, tuple) and type(token) is not BundleToken else ""


def _note(gcs: GcsClient) -> str:
    """What to know of an answer that did not come from a leader."""
    head = gcs.served_by
    why = gcs.failures.get(head, "it does not lead")
    return (
        f"as the head {head.removeprefix('tcp:')} knows it: no leader has answered, so this may be some seconds old, "
        f"or older if that head is cut off ({why})"
    )


def _gcs_status(tables: dict[Table, dict[bytes, Record]]) -> dict[str, Any]:
    counts: dict[str, dict[str, int]] = {}
    nodes = []
    groups: list[dict[str, Any]] = []
    for table, rows in tables.items():
        states: dict[str, int] = {}
        for record in rows.values():
            if isinstance(record, GroupRecord):
                groups.append(_group(record))
            if isinstance(record, NodeRecord | JobRecord | ActorRecord | GroupRecord):
                states[record.state.name] = states.get(record.state.name, 0) + 1
            if isinstance(record, NodeRecord):
                nodes.append(
                    {
                        "node_id": record.node_id.hex(),
                        "state": record.state.name,
                        "hostname": record.hostname,
                        "pid": record.pid,
                        "endpoint": record.endpoint,
                        "resources": record.resources,
                    }
                )
        if states or table is not Table.PLACEMENT_GROUPS:  # few programs make any
            counts[table.value] = states
    return {"counts": counts, "nodes": nodes, "placement_groups": groups}


def _reply(link: Link, request: int, answer: Any) -> None:
    link.send(ToolReply(request), json.dumps(answer).encode())
