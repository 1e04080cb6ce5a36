"""What a driver or worker asks of the GCS, in the words of its callers.

Role: a thin layer over `gcs/client.py`: exports, actor records, nodes. All methods and callbacks run under the core's
lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ftray.gcs.client import GcsClient, Watch
from ftray.gcs.state.commands import AnyCommand
from ftray.gcs.state.job_keys import HANDLES as HANDLES
from ftray.gcs.state.tables import ActorRecord, Change, Table, kv_key
from ftray.worker.waiting import block

if TYPE_CHECKING:
    from ftray.worker.core import Core
    from ftray.worker.objects import Answer

log = logging.getLogger("ftray.worker")

WARNING_S = 5.0
"""Heads that are there answer in milliseconds, also when one of them dies. Who waits longer learns what for."""


def wait_for_gcs(core: Core, answer: Answer, what: str) -> None:
    """Blocks until the GCS has answered, however long that takes; after `WARNING_S` it is logged that `what` still
    waits, and which heads answer. Not under the lock."""
    if not block(core.reactor, answer.waiter, WARNING_S):
        with core.lock:
            trouble = core.gcs.trouble()
        log.warning("%s still waits for the GCS%s", what, f": {trouble}" if trouble else ", which has not answered yet")
        block(core.reactor, answer.waiter, None)


class GcsAccess:
    """See the module."""

    def __init__(self, client: GcsClient) -> None:
        self.client = client
        self._watchers: dict[bytes, Callable[[ActorRecord | None, bytes], None]] = {}
        self._watch: Watch | None = None

    def set_endpoints(self, endpoints: Sequence[str]) -> None:
        """The heads, as the raylet knows them."""
        self.client.heads_are(endpoints)

    def trouble(self) -> str:
        """Why nothing is answered for which a leader is needed, and who answers, if something waits for that."""
        client = self.client
        return str(client.unavailable()) if client.waits() and not client.connected else ""

    def command(self, command: AnyCommand, callback: Callable[[Any], None]) -> None:
        """Sends a command; `callback(result)`."""
        self.client.command(command, callback)

    def read_kv(
        self,
        namespace: str,
        key: bytes,
        callback: Callable[[Any], None],
        wait: bool = False,
        immutable: bool = False,
    ) -> None:
        """`callback(value bytes or None)`; with `wait`, once the key exists. `immutable`: its value never changes, so
        whichever head has it may answer."""
        self.client.read(
            Table.KV, kv_key(namespace, key), lambda record: callback(getattr(record, "value", None)), wait,
            immutable=immutable,
        )  # fmt: skip

    def actor(self, actor_id: bytes, callback: Callable[[Any], None]) -> None:
        """The record of an actor, or None."""
        self.client.read(Table.ACTORS, actor_id, callback)

    def named_actor(self, namespace: str, name: str, callback: Callable[[Any], None]) -> None:
        """The record of the live actor of that name, or None."""
        self.client.read_named(namespace, name, callback)

    def actors(self, callback: Callable[[list[Any]], None]) -> None:
        """All actor records."""
        self.client.read_all(Table.ACTORS, lambda rows: callback(list(rows.values())))

    def nodes(self, callback: Callable[[list[Any]], None]) -> None:
        """All node records."""
        self.client.read_all(Table.NODES, lambda rows: callback(list(rows.values())))

    def watch_actor(self, actor_id: bytes, changed: Callable[[ActorRecord | None, bytes], None]) -> None:
        """`changed(record, actor_id)` now (when it is known) and on each change."""
        self._watchers[actor_id] = changed
        if self._watch is None:
            self._watch = self.client.watch((Table.ACTORS,), (), self._changed)
        self.client.add_watch_key(self._watch, actor_id)

    def unwatch_actor(self, actor_id: bytes) -> None:
        """Ends that."""
        self._watchers.pop(actor_id, None)
        if self._watch is not None:
            self.client.remove_watch_key(self._watch, actor_id)

    def _changed(self, change: Change) -> None:
        changed = self._watchers.get(change.key)
        if changed is not None and (change.record is None or isinstance(change.record, ActorRecord)):
            changed(change.record, change.key)

    def close(self) -> None:
        self.client.close()
