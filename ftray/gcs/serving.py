"""What any head does for its clients, whether it leads or not: watches and reads of the state that it has.

Role: shell, a part of `GcsServer`, on links of its own. It holds what it is not far enough for, answers from the state,
and keeps who waits for a key.

Rules
- Nobody is shown the past. Who has seen a revision is told nothing before the state, and what watchers were told of
  it, has got there; until then the question is held (`held.py`).
- That something is not there is said only by a head that is sure that it leads (`when_sure`): what another one lacks
  may have been written long ago. Elsewhere such a read waits until the thing appears; so does the first word about a
  watched key.
- A read with `seen` -1 is of something that never changes: who has it may say what it is.

Rejected: answering a client with "not there yet, as far as I know" (nobody could do anything with that but ask again).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ftray.exceptions import ProtocolError
from ftray.gcs.codec import encode_changes
from ftray.gcs.held import HELD_MAX, Held
from ftray.gcs.replica import Replica
from ftray.gcs.state.tables import Change, Code, Table
from ftray.gcs.watchers import Item, Watcher, WatchHub
from ftray.wire.messages import GcsRead, GcsResult, GcsUnwatch, GcsWatch
from ftray.wire.reactor import Link, Reactor

WhenSure = Callable[[Link, "GcsRead | None"], None]


class Client:
    """What is known of one link; kept in `link.peer`."""

    __slots__ = ("client_id", "leaves", "node_id", "waits", "watcher")

    def __init__(self, link: Link, client_id: bytes, node_id: bytes) -> None:
        self.client_id = client_id
        self.node_id = node_id
        self.leaves = False
        """The node has declared itself dead: it stops, and need not be told."""
        self.watcher = Watcher(link)
        self.waits: dict[Item, None] = {}
        """Keys that reads of this link wait for."""


class Serving:
    """See the module. `bytes_max` says how large an answer may be; `when_sure(link, read)` has the read answered when
    this head has confirmed that it leads (None: has the link's watcher told which keys are not there)."""

    def __init__(
        self, reactor: Reactor, replica: Replica, bytes_max: Callable[[], int], one_of_several: bool,
        when_sure: WhenSure,
    ) -> None:  # fmt: skip
        self.watchers = WatchHub(reactor, bytes_max() // 4, one_of_several)
        self.reads_following = 0
        """Reads that were answered while this head did not lead."""
        self._replica = replica
        self._bytes_max = bytes_max
        self._one_of_several = one_of_several
        self._when_sure = when_sure
        self._held: Held[Link, GcsRead | GcsWatch | GcsUnwatch] = Held()
        self._published = replica.state.revision
        """Watchers were told all up to there. The state may be ahead of it, while the disk is full."""
        self._waits: dict[Item, list[tuple[Link, int]]] = {}

    def status(self) -> dict[str, Any]:
        """For tools: how many questions wait for this head to get as far as who asks, and how often it has told or
        answered somebody without leading."""
        return {
            "held": len(self._held),
            "tellings_following": self.watchers.tellings_following,
            "reads_following": self.reads_following,
        }

    # --- how far this head is -----------------------------------------------------------------------------------------

    def is_as_far(self, seen: int) -> bool:
        """Whether this head may tell somebody who has seen that revision how things are."""
        if not self._one_of_several:
            return True  # a single head whose disk has forgotten something is as far as there is
        revision = self._replica.state.revision
        if not revision and not self._replica.is_leader:
            return False  # nobody has told it anything
        return seen <= revision == self._published

    def _hold(self, link: Link, seen: int, message: GcsRead | GcsWatch | GcsUnwatch) -> None:
        if not self._held.add(seen, link, message):
            raise ProtocolError(f"more than {HELD_MAX} questions wait for this head to get as far as their client")

    def take_held(self) -> None:
        """The state has changed, perhaps: answers those for whom it is far enough now."""
        if self._held and self.is_as_far(0):
            for link, message in self._held.take(self._replica.state.revision):
                if isinstance(message, GcsWatch):
                    self.watch(link, link.peer, message)
                elif isinstance(message, GcsUnwatch):
                    self.unwatch(link, link.peer, message)
                else:
                    self.read_cached(link, link.peer, message)

    # --- questions ----------------------------------------------------------------------------------------------------

    def watch(self, link: Link, client: Client, message: GcsWatch) -> None:
        """Tells what is watched, from now on. Raises ProtocolError."""
        tables = [table_of(name) for name in message.tables]
        keys = [(table_of(name), key) for name, key in message.keys]
        seen = max(message.seen, message.since_revision)
        if not self.is_as_far(seen):
            self._hold(link, seen, message)
            return
        self.watchers.add(self._replica.state, client.watcher, tables, keys, message.since_revision)
        if client.watcher.unsure and self._replica.is_leader:
            self._when_sure(link, None)

    def unwatch(self, link: Link, client: Client, message: GcsUnwatch) -> None:
        """Ends watches of keys; the watch may still be held. Raises ProtocolError."""
        keys = [(table_of(name), key) for name, key in message.keys]
        if self.is_as_far(message.seen):
            self.watchers.drop(client.watcher, keys)
        else:
            self._hold(link, message.seen, message)

    def read_cached(self, link: Link, client: Client, read: GcsRead) -> None:
        """Answers a read by key, or of a whole table, without asking the other heads. Raises ProtocolError."""
        leads, table = self._replica.is_leader, table_of(read.table)
        if read.seen >= 0 and not self.is_as_far(read.seen):
            self._hold(link, read.seen, read)
        elif read.all or read.key in self._replica.state.store.rows(table):
            self.reads_following += not leads
            self.answer(link, read)
        elif leads:
            self._when_sure(link, read)
        else:
            self._wait_for(link, client, (table, read.key), read.request)

    def answer(self, link: Link, read: GcsRead) -> None:
        """Answers from the state as it is; a read that waits, when there is something."""
        state = self._replica.state
        try:
            table = table_of(read.table)
        except ProtocolError as error:
            link.send(GcsResult(read.request, state.revision, Code.INVALID.value, str(error)))
            return
        if read.all:
            self._send_rows(link, read.request, state.rows_as_changes([table]), (table,))
            return
        if read.named is not None:
            found: list[Change] = []
            if table is Table.PLACEMENT_GROUPS:
                group = state.store.named_group(*read.named)
                if group is not None:
                    found.append(Change(state.revision, table, group.group_id, group))
            else:
                actor = state.store.named_actor(*read.named)
                if actor is not None:
                    found.append(Change(state.revision, Table.ACTORS, actor.actor_id, actor))
            self._send_rows(link, read.request, found)
            return
        record = state.store.rows(table).get(read.key)
        if record is None and read.wait:
            self._wait_for(link, link.peer, (table, read.key), read.request)
            return
        self._send_rows(link, read.request, [Change(state.revision, table, read.key, record)])

    def _wait_for(self, link: Link, client: Client, item: Item, request: int) -> None:
        if not link.closed:
            self._waits.setdefault(item, []).append((link, request))
            client.waits[item] = None

    def _answer_waits(self, item: Item) -> None:
        """There may be a record of that key now."""
        table, key = item
        state = self._replica.state
        record = state.store.rows(table).get(key)
        if record is None:
            return
        for link, request in self._waits.pop(item, ()):
            link.peer.waits.pop(item, None)
            self.reads_following += self.watchers.follows
            self._send_rows(link, request, [Change(state.revision, table, key, record)])

    def _send_rows(self, link: Link, request: int, rows: Sequence[Change], whole: Sequence[Table] = ()) -> None:
        payload = encode_changes(rows, whole)
        revision, limit = self._replica.state.revision, self._bytes_max()
        if len(payload) > limit + 65536:  # a value of the largest size, and what is around it, fits
            text = f"the answer takes {len(payload)} bytes, more than the limit of {limit}: read single keys"
            link.send(GcsResult(request, revision, Code.TOO_LARGE.value, text))
            return
        link.send(GcsResult(request, revision), payload)

    # --- the state ----------------------------------------------------------------------------------------------------

    def publish(self, changes: Sequence[Change]) -> None:
        """The state has changed."""
        state, published = self._replica.state, self._published
        if changes[0].revision <= published:  # a state that came as a whole had some of them
            changes = [change for change in changes if change.revision > published]
        self._published = state.revision
        self.watchers.publish(changes, state.revision)
        if self._waits:
            for change in changes:
                if change.record is not None:
                    self._answer_waits((change.table, change.key))

    def reset(self) -> None:
        """The state is another, later one, to which no changes lead."""
        state = self._replica.state
        self._published = state.revision
        self.watchers.reset(state)
        for item in list(self._waits):
            self._answer_waits(item)

    # --- links --------------------------------------------------------------------------------------------------------

    def forget_waits(self) -> None:
        """All clients ask anew."""
        for waiting in self._waits.values():
            for link, _ in waiting:
                link.peer.waits.clear()
        self._waits.clear()

    def forget(self, link: Link, client: Client | None) -> None:
        """The link has closed."""
        self._held.forget(link)
        if client is None:
            return
        self.watchers.remove(client.watcher)
        for item in client.waits:
            waiting = [each for each in self._waits.get(item, ()) if each[0] is not link]
            if waiting:
                self._waits[item] = waiting
            else:
                self._waits.pop(item, None)
        client.waits.clear()


def table_of(name: str) -> Table:
    """The table of that name. Raises ProtocolError."""
    try:
        return Table(name)
    except ValueError:
        raise ProtocolError(f"there is no table {name!r}: there are {', '.join(Table)}") from None
