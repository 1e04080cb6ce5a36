"""A GCS state for tests, with short ways to say things and a check of the invariants after each command."""

from __future__ import annotations

from typing import Any

from ftray.gcs.state import commands as c
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import ActorRecord, Result

CLUSTER = b"C" * 16
JOB = b"job1"
DRIVER = b"D" * 16
CAUSE = c.DeathCauseRecord(reason="killed by signal 9", signal=9, stderr_tail=["boom"])


def ident(name: str) -> bytes:
    return name.encode().ljust(16, b".")


N1, N2, N3 = ident("n1"), ident("n2"), ident("n3")
A, B, C3 = ident("a"), ident("b"), ident("c")


class Gcs:
    """A state with short ways to say things; checks the invariants after each command."""

    def __init__(self, nodes: int = 2) -> None:
        self.state = GcsState(CLUSTER)
        for node_id in (N1, N2, N3)[:nodes]:
            assert self.do(register_node(node_id)).ok
        if nodes:
            assert self.do(c.AddJob(JOB, DRIVER, 7, N1, "main.py", "ns")).ok

    def do(self, command: Any, client: bytes = b"", sequence: int = 0) -> Result:
        result = self.state.apply(client, sequence, command)
        assert self.state.check() == []
        return result

    def actor(self, actor_id: bytes = A) -> ActorRecord:
        record = self.state.actor(actor_id)
        assert record is not None
        return record

    def register(self, actor_id: bytes = A, owner: bytes | None = DRIVER, node: bytes = N1, **more: Any) -> Result:
        detached = owner is None
        return self.do(c.RegisterActor(actor_id, JOB, owner, node, "Counter", detached=detached, creation=b"x", **more))

    def alive(self, actor_id: bytes = A, node: bytes = N2, worker: bytes | None = None) -> bytes:
        """Places the actor and reports it alive; returns its worker."""
        incarnation = self.actor(actor_id).incarnation
        worker = worker or ident(f"w{actor_id[:1].decode()}{incarnation}")
        assert self.do(c.ActorPlacing(actor_id, incarnation, node)).ok
        assert self.do(c.ActorAlive(actor_id, incarnation, worker, "unix:/w", node, 11)).ok
        return worker


def register_node(node_id: bytes, incarnation: int = 1) -> c.RegisterNode:
    return c.RegisterNode(node_id, "unix:/n", {"CPU": 4.0}, {"zone": "a"}, incarnation, "host", 3)
