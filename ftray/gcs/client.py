"""The client of the GCS: commands that take effect once, reads, and watches that survive the server they run on.

Role: shell, in callback style under the reactor's lock, in raylets, workers and drivers alike. Which head it talks to
is the business of `links.py`.

Rules
- Everything here is called, and calls back, under `reactor.lock`. Whoever calls from outside a reactor batch flushes.
- One command is in flight; the others wait in order. A command is retried with its sequence number until it has a
  result, so it takes effect once (`gcs/state/sessions.py`). Reads overtake commands that wait. A client that was
  forgotten, because it was silent for very long, takes a new id.
- Of several heads the leader serves everything. While there is none, whichever head answers serves watches and cached
  reads; commands and fresh reads wait. All that waits is asked again at the next head.
- A client never sees the past: what it asks of a head that may be behind says how far it has *seen* the state, in
  results, reads and watches alike. So it sees its own writes, too.
- A watcher is told the present state first, then each change. After a reconnection it may be told again what it knows
  already: what it is told is always the newest state of a record, never a difference.
- All watches resume in one message, which is answered at once: else a link that is lost between two answers would leave
  behind a watch that was told less than the others.
- A callback that raises is logged; it costs nobody else anything.

Rejected: futures (each caller has its own way of waiting); a window of commands in flight (the state keeps one result
for each client: with more, a lost connection would leave some without an answer).
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ftray.exceptions import GcsUnavailableError
from ftray.gcs.codec import code_of, decode_changes, decode_result
from ftray.gcs.links import BEHIND_MS as BEHIND_MS
from ftray.gcs.links import NO_LEADER_MS as NO_LEADER_MS
from ftray.gcs.links import RECONNECT_MAX_MS as RECONNECT_MAX_MS
from ftray.gcs.links import SILENCE_MS as SILENCE_MS
from ftray.gcs.links import HeadLinks
from ftray.gcs.state.commands import AnyCommand, encode_command
from ftray.gcs.state.tables import Change, Code, Record, Result, Table
from ftray.wire.messages import GcsChanges, GcsCommand, GcsRead, GcsResult, GcsUnwatch, GcsWatch, Message
from ftray.wire.reactor import Link, Reactor

log = logging.getLogger("ftray.gcs")

REPEAT_MS = 200.0
"""A command that could not be made durable (a full disk, say) is repeated after this time,"""
REPEATS_MAX = 25
"""so often, before its caller gets to know."""

OnOther = Callable[[Message, "bytes | bytearray"], None]
OnError = Callable[[Code, str], None]


class Watch:
    """What one caller of `watch` wants to hear of. `keys` is None for whole tables."""

    __slots__ = ("keys", "on_change", "tables")

    def __init__(
        self, tables: tuple[Table, ...], keys: set[bytes] | None, on_change: Callable[[Change], None]
    ) -> None:
        self.tables = tables
        self.keys = keys
        self.on_change = on_change


class _Read:
    __slots__ = ("done", "immutable", "message", "on_error")

    def __init__(
        self,
        message: GcsRead,
        done: Callable[[dict[bytes, Record]], None],
        on_error: OnError | None,
        immutable: bool = False,
    ) -> None:
        self.message = message
        self.immutable = immutable
        self.done = done
        self.on_error = on_error


class GcsClient:
    """See the module. `client_id` is drawn anew by each process (the worker id); `node_id` only by a raylet.

    `on_other(message, payload)` gets what is neither an answer nor a change: `StartActor`, `StopActor`, `JobEnded`,
    `NodeFenced`. `on_connected(connected)` is told when the client has found a head that serves everything, and when it
    has lost it.
    """

    __slots__ = (
        "_closed", "_commands", "_keyed", "_known", "_links", "_reads", "_repeats", "_request", "_sent_request",
        "_sends", "_sequence", "_whole", "client_id", "node_id", "on_connected", "on_heads", "on_other", "reactor",
        "revision", "seen",
    )  # fmt: skip

    def __init__(
        self,
        reactor: Reactor,
        endpoints: Sequence[str],
        client_id: bytes,
        node_id: bytes = b"",
        on_other: OnOther | None = None,
        on_connected: Callable[[bool], None] | None = None,
    ) -> None:
        if not endpoints:
            raise ValueError("a GCS client needs at least one endpoint")
        self.reactor = reactor
        self.client_id = client_id
        self.node_id = node_id
        self.on_other = on_other
        self.on_connected = on_connected
        self.on_heads: Callable[[Sequence[str]], None] | None = None
        """Told the endpoints of all heads, if there are several, the serving one first."""
        self.revision = -1
        """The watches are told all up to this revision."""
        self.seen = -1
        """The newest revision of which anything was told: a result, a read or a change."""
        self._links = HeadLinks(reactor, endpoints, client_id, node_id, self)
        self._closed = False
        self._request = 0
        self._sequence = 1
        """That of the first command that waits."""
        self._repeats = 0
        self._sends = 0
        """How often that command was sent."""
        self._sent_request = 0
        """The request under which that command was sent on the present link; 0: not sent."""
        self._commands: deque[tuple[bytes, Callable[[Result], None]]] = deque()
        self._reads: dict[int, _Read] = {}
        self._whole: dict[Table, tuple[list[Watch], bool]] = {}
        """Watches of whole tables, and whether their first answer has come."""
        self._keyed: dict[tuple[Table, bytes], tuple[list[Watch], bool]] = {}
        self._known: dict[Table, set[bytes]] = {}
        """Keys of the tables that are watched whole: what is missing from a snapshot of them has been deleted."""

    # --- asking ------------------------------------------------------------------------------------------------------

    def command(self, command: AnyCommand, callback: Callable[[Result], None]) -> None:
        """Has the command carried out once; `callback` gets the result, however long that takes."""
        if self._refuse_closed(lambda code, text: callback(Result(code, text, self.revision))):
            return
        self._commands.append((encode_command(command), callback))
        if len(self._commands) == 1:
            self._send_command()

    def read(
        self,
        table: Table,
        key: bytes,
        callback: Callable[[Record | None], None],
        wait: bool = False,
        on_error: OnError | None = None,
        cached: bool = False,
        immutable: bool = False,
    ) -> int:
        """Reads one record; with `wait`, answers when there is one. Returns a handle for `cancel_read`.

        With `cached`, any head answers, with the record as it was at some time since what this client has seen. With
        `immutable` (the record never changes once it is there), whichever head has it answers. That there is none is
        said by the leader alone, so it is always true.

        What can't be answered goes to `on_error(code, text)`; without it, it is logged and the callback gets None.
        """
        message = GcsRead(0, table.value, key, wait=wait, cached=cached or immutable)
        read = _Read(message, lambda rows: callback(rows.get(key)), on_error, immutable)
        return self._ask(read)

    def read_named(
        self, namespace: str, name: str, callback: Callable[[Record | None], None], table: Table = Table.ACTORS
    ) -> int:
        """Reads the record of the live actor (or placement group, of that table) of that name; None when there is
        none. Errors as for `read`."""
        message = GcsRead(0, table.value, named=(namespace, name))
        return self._ask(_Read(message, lambda rows: callback(next(iter(rows.values()), None)), None))

    def read_all(
        self,
        table: Table,
        callback: Callable[[dict[bytes, Record]], None],
        on_error: OnError | None = None,
        cached: bool = False,
    ) -> int:
        """Reads a whole table, records by key. `cached` and errors as for `read`, with an empty table."""
        return self._ask(_Read(GcsRead(0, table.value, all=True, cached=cached), callback, on_error))

    def cancel_read(self, handle: int) -> None:
        """Forgets a read; its callback is not called any more."""
        self._reads.pop(handle, None)

    def watch(
        self, tables: Iterable[Table], keys: Iterable[bytes] | None, on_change: Callable[[Change], None]
    ) -> Watch:
        """From now on, tells `on_change` each change of these tables, or of these keys in them; first how they are now.

        A key that does not exist is told as a change without a record. `keys=()` with `add_watch_key` adds them later.
        """
        watch = Watch(tuple(tables), None if keys is None else set(), on_change)
        if keys is not None:
            for key in keys:
                self.add_watch_key(watch, key)
            return watch
        for table in watch.tables:
            watches, _ = self._whole.get(table, ([], False))
            self._whole[table] = ([*watches, watch], False)
            self._known.setdefault(table, set())
        if not self._closed and self._ready():
            self._link_send(GcsWatch(tuple(table.value for table in watch.tables), seen=self.seen))
        return watch

    def add_watch_key(self, watch: Watch, key: bytes) -> None:
        """Adds a key to a watch that was made with keys."""
        if watch.keys is None:
            raise ValueError("this watch is of whole tables: it hears of all keys already")
        if key in watch.keys:
            return
        watch.keys.add(key)
        for table in watch.tables:
            watches, _ = self._keyed.get((table, key), ([], False))
            self._keyed[table, key] = ([*watches, watch], False)
        if not self._closed and self._ready():
            keys = tuple((table.value, key) for table in watch.tables)
            self._link_send(GcsWatch((), keys=keys, seen=self.seen))

    def remove_watch_key(self, watch: Watch, key: bytes) -> None:
        """Takes a key out of a watch: `on_change` is not told of it any more."""
        if watch.keys is None or key not in watch.keys:
            return
        watch.keys.discard(key)
        for table in watch.tables:
            watches, told = self._keyed.get((table, key), ([], False))
            watches = [each for each in watches if each is not watch]
            if watches:
                self._keyed[table, key] = (watches, told)
            elif self._keyed.pop((table, key), None) is not None and self._links.open:
                self._link_send(GcsUnwatch(((table.value, key),), self.seen))

    def send(self, message: Message, payload: bytes = b"") -> bool:
        """Sends what may get lost (a heartbeat), if there is a connection. Returns whether there is."""
        link = self._links.link
        if link is None or not self.connected:
            return False
        link.send(message, payload)
        return True

    @property
    def connected(self) -> bool:
        """Whether there is a link to a head that serves everything."""
        return self._links.open and self._links.leads

    @property
    def own_endpoint(self) -> str:
        """The head that is in this very process, if one is; empty otherwise."""
        return self._links.own_endpoint

    @own_endpoint.setter
    def own_endpoint(self, endpoint: str) -> None:
        self._links.own_endpoint = endpoint

    @property
    def at_home(self) -> bool:
        """Whether the head that serves everything is in this very process."""
        return self.connected and self._links.at_home

    @property
    def served_by(self) -> str:
        """The head at the other end of the link, whether it leads or not; empty if there is none."""
        link = self._links.link
        return str(link.peer) if link is not None and self._links.open else ""

    @property
    def endpoints(self) -> list[str]:
        """Where the heads are, the serving one first if it is known."""
        return self._links.endpoints

    @endpoints.setter
    def endpoints(self, endpoints: Sequence[str]) -> None:
        self._links.endpoints = list(endpoints)

    def heads_are(self, endpoints: Sequence[str]) -> None:
        """Where all heads are, as somebody has learnt it who is told by a leader. Who is told himself knows already."""
        if endpoints and not self.connected:
            self._links.endpoints[:] = endpoints

    @property
    def failures(self) -> dict[str, str]:
        """Why each endpoint that was tried in vain did not answer, or does not lead, since a leader has answered."""
        return self._links.failures

    @property
    def several(self) -> bool:
        """There are several heads, as one of them has said."""
        return self._links.several

    @several.setter
    def several(self, several: bool) -> None:
        self._links.several = several

    def unavailable(self) -> GcsUnavailableError:
        """The error to raise when waiting for the GCS has taken too long; it names each endpoint and its fault."""
        tried = "; ".join(f"{endpoint}: {self.failures.get(endpoint, 'no answer yet')}" for endpoint in self.endpoints)
        return GcsUnavailableError(f"the GCS does not answer ({tried}): tasks that run already go on")

    def close(self) -> None:
        """Ends it. What still waits is answered `session_expired`: what became of it is not known."""
        if self._closed:
            return
        self._closed = True
        self._links.close()
        commands, self._commands = self._commands, deque()
        reads, self._reads = self._reads, {}
        text = "the client was closed before the answer came"
        for _, callback in commands:
            self._call(callback, Result(Code.SESSION_EXPIRED, text, self.revision))
        for read in reads.values():
            self._fail_read(read, Code.SESSION_EXPIRED, text)

    # --- sending -----------------------------------------------------------------------------------------------------

    def _ask(self, read: _Read) -> int:
        self._request += 1
        read.message.request = self._request
        if not self._refuse_closed(lambda code, text: self._fail_read(read, code, text)):
            self._reads[self._request] = read
            if self._ready() and (read.message.cached or self._links.leads):
                self._send_read(read)
                self._links.wait_for_answer()
        return read.message.request

    def _refuse_closed(self, answer: OnError) -> bool:
        if self._closed:
            answer(Code.SESSION_EXPIRED, "the client is closed")
        return self._closed

    def _ready(self) -> bool:
        """Whether to send now. If not, it goes out when the connection is there, which this starts to make."""
        return self._links.ready()

    def _link_send(self, message: Message, payload: bytes = b"") -> None:
        if self._links.link is not None:
            self._links.link.send(message, payload)

    def _send_read(self, read: _Read) -> None:
        message = read.message
        if message.cached and not read.immutable:
            message.seen = self.seen
        self._link_send(message)

    def _repeat(self) -> None:
        if not self._sent_request:  # unless the connection was made anew meanwhile
            self._send_command()

    def _send_command(self) -> None:
        if self._commands and self._ready() and self._links.leads:
            self._request += 1
            self._sent_request = self._request
            self._sends += 1
            self._link_send(GcsCommand(self._request, self._sequence), self._commands[0][0])
            self._links.wait_for_answer()

    # --- the heads ---------------------------------------------------------------------------------------------------

    def on_opened(self, link: Link) -> None:
        """For the links: there is a new one. What any head serves is asked at once."""
        self._sent_request = 0
        self._watch_again(link)
        for read in self._reads.values():
            if read.message.cached:
                self._send_read(read)

    def on_served(self, link: Link, anew: bool) -> None:
        """For the links: this head serves everything."""
        for read in list(self._reads.values()):
            if anew or not read.message.cached:  # what it did not know it can say now
                self._send_read(read)
        self._sent_request = 0
        self._send_command()
        if self.on_connected is not None:
            self._call(self.on_connected, True)

    def on_unserved(self) -> None:
        """For the links: no head serves everything."""
        self._sent_request = 0
        if self.on_connected is not None:
            self._call(self.on_connected, False)

    def on_all_heads(self, endpoints: Sequence[str]) -> None:
        """For the links: where the heads are."""
        if self.on_heads is not None:
            self._call(self.on_heads, endpoints)

    def needs_link(self) -> bool:
        """For the links: whether something waits for an answer or a change."""
        return bool(self._commands or self._reads or self._whole or self._keyed)

    def waits(self) -> bool:
        """For the links: whether an answer is waited for."""
        return bool(self._commands or self._reads)

    def _watch_again(self, link: Link) -> None:
        for told in (True, False):
            tables = tuple(table.value for table, (_, each) in self._whole.items() if each is told)
            keys = tuple((table.value, key) for (table, key), (_, each) in self._keyed.items() if each is told)
            if tables or keys:
                link.send(GcsWatch(tables, self.revision if told else -1, keys, self.seen))

    # --- answers -----------------------------------------------------------------------------------------------------

    def on_answer(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        """For the links: a message that is not about the heads."""
        if type(message) is GcsResult:
            self._on_result(link, message, payload)
        elif type(message) is GcsChanges:
            self._links.answered(message.revision)
            self._on_changes(message, payload)
        elif self.on_other is not None:
            try:
                self.on_other(message, payload)
            except Exception as error:
                self._note(error)

    def _on_result(self, link: Link, message: GcsResult, payload: bytes | bytearray) -> None:
        if message.code == Code.NOT_LEADER:
            self._links.redirect(link, message.leader_hint)
            return
        if message.revision > self.seen:
            self.seen = message.revision
        if message.request == self._sent_request and self._commands:
            result = decode_result(message, payload)
            self._links.answered(message.revision)
            self._sent_request = 0
            sends, self._sends = self._sends, 0
            if result.code is Code.SESSION_EXPIRED:
                # It was silent for very long, while very many others came and went, and what it says now is barred.
                self.client_id = hashlib.blake2b(self.client_id, digest_size=16).digest()
                self._links.rename(self.client_id)
                if sends == 1:
                    return  # no copy of it can have taken effect: it is sent again, under the new id
            if result.code is Code.UNAVAILABLE and self._repeats < REPEATS_MAX:
                self._repeats += 1
                self.reactor.call_later(REPEAT_MS, self._repeat)
                return
            self._repeats = 0
            self._sequence += 1
            _, callback = self._commands.popleft()
            self._send_command()
            self._call(callback, result)
            return
        read = self._reads.get(message.request)
        if read is None:
            return  # cancelled
        rows: dict[bytes, Record] = {}
        if not message.code:
            for change in decode_changes(payload)[1]:
                if change.record is not None:
                    rows[change.key] = change.record
        self._links.answered(message.revision)
        del self._reads[message.request]
        if message.code:
            self._fail_read(read, code_of(message.code), message.message)
        else:
            self._call(read.done, rows)

    def _on_changes(self, message: GcsChanges, payload: bytes | bytearray) -> None:
        whole, changes = decode_changes(payload)
        for table in whole:
            if table in self._known:
                shown = {change.key for change in changes if change.table is table}
                gone = sorted(self._known[table] - shown)
                changes += [Change(message.revision, table, key, None) for key in gone]
                self._whole[table] = (self._whole[table][0], True)
        if message.revision > self.revision:
            self.revision = message.revision
            self.seen = max(self.seen, message.revision)
        for change in changes:
            table, key = change.table, change.key
            entry = self._keyed.get((table, key))
            if entry is not None:
                watches, told = entry
                if not told and message.snapshot:
                    self._keyed[table, key] = (watches, True)
                for watch in watches:
                    self._call(watch.on_change, change)
            of_table = self._whole.get(table)
            if of_table is not None:
                known = self._known[table]
                if change.record is not None:
                    known.add(key)
                elif key in known:
                    known.discard(key)
                else:
                    continue  # told for the sake of a watch of this key: it never existed
                for watch in of_table[0]:
                    self._call(watch.on_change, change)

    def _fail_read(self, read: _Read, code: Code, text: str) -> None:
        if read.on_error is not None:
            try:
                read.on_error(code, text)
            except Exception as error:
                self._note(error)
            return
        level = logging.INFO if self._closed else logging.ERROR  # a program that ends while it waits is no fault
        log.log(level, "a read of the GCS table %s failed (%s): %s", read.message.table, code.value, text)
        self._call(read.done, {})

    def _call(self, callback: Callable[[Any], None], value: Any) -> None:
        try:
            callback(value)
        except Exception as error:
            self._note(error)

    def _note(self, error: Exception) -> None:
        log.exception("a callback of the GCS client failed")
        self.reactor.handler_errors.append(repr(error))
