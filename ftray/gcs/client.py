"""The client of the GCS: commands that take effect once, reads, and watches that survive the server they run on.

Role: shell, in callback style under the reactor's lock, in raylets, workers and drivers alike. It connects when it is
first needed, to whichever endpoint answers, and moves on when that one is gone.

Rules
- Everything here is called, and calls back, under `reactor.lock`. Whoever calls from outside a reactor batch flushes.
- One command is in flight; the others wait in order. A command is retried with its sequence number until it has a
  result, so it takes effect once (`gcs/state/sessions.py`). Reads overtake commands that wait.
- Of several heads one serves; the others name it, or say that they know none. A head that is silent for
  `SILENCE_MS` is left: a frozen process keeps its connections. All that waits is asked again at the next.
- A watcher is told the present state first, then each change. After a reconnection it may be told again what it knows
  already: what it is told is always the newest state of a record, never a difference.
- A callback that raises is logged; it costs nobody else anything.

Rejected: futures (each caller has its own way of waiting); a window of commands in flight (the state keeps one result
for each client: with more, a lost connection would leave some without an answer).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ftray.exceptions import GcsUnavailableError
from ftray.gcs.codec import code_of, decode_changes, decode_result
from ftray.gcs.state.commands import AnyCommand, encode_command
from ftray.gcs.state.tables import Change, Code, Record, Result, Table
from ftray.wire.handshake import ROLE_GCS
from ftray.wire.head_messages import GcsHeads, GcsNoLeader, GcsPing
from ftray.wire.messages import GcsChanges, GcsCommand, GcsHello, GcsRead, GcsResult, GcsWatch, Message
from ftray.wire.reactor import Link, Reactor, Timer

log = logging.getLogger("ftray.gcs")

RECONNECT_FIRST_MS = 5.0
RECONNECT_MAX_MS = 500.0
RECONNECT_OF_SEVERAL_MAX_MS = 50.0
NO_LEADER_MS = 200.0
"""So long a client waits at a head that knows no leader, before it looks whether another does."""
SILENCE_MS = 150.0
"""Of several heads: who has not answered a ping, or a handshake, after this time is given up."""
SILENCE_MAX_MS = 2_400.0
IDLE_PINGS = 4
"""A client that waits for nothing pings so many times less often."""
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
    __slots__ = ("done", "message", "on_error")

    def __init__(
        self, message: GcsRead, done: Callable[[dict[bytes, Record]], None], on_error: OnError | None
    ) -> None:
        self.message = message
        self.done = done
        self.on_error = on_error


class GcsClient:
    """See the module. `client_id` is drawn anew by each process (the worker id); `node_id` only by a raylet.

    `on_other(message, payload)` gets what is neither an answer nor a change: `StartActor`, `StopActor`, `JobEnded`,
    `NodeFenced`. `on_connected(connected)` is told when the client has found a server, and when it has lost it.
    """

    __slots__ = (
        "_alive", "_attempts", "_closed", "_commands", "_failed_ms", "_idle", "_keyed", "_known", "_link", "_next",
        "_open", "_patience", "_reads", "_repeats", "_request", "_sent_request", "_sequence", "_silences", "_timer",
        "_whole", "client_id", "endpoints", "failures", "node_id", "on_connected", "on_heads", "on_other", "reactor",
        "revision", "several",
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
        self.endpoints = list(endpoints)
        self.client_id = client_id
        self.node_id = node_id
        self.on_other = on_other
        self.on_connected = on_connected
        self.on_heads: Callable[[Sequence[str]], None] | None = None
        """Told the endpoints of all heads, if there are several, the serving one first."""
        self.failures: dict[str, str] = {}
        """Why each endpoint that was tried in vain did not answer, since the last answer of any."""
        self.revision = -1
        """The watches are told all up to this revision."""
        self.several = False
        """There are several heads, as one of them has said."""
        self._link: Link | None = None
        self._open = False
        self._alive = False
        """Something has come over the link since the last ping."""
        self._patience: Timer | None = None
        """When to ask whether this head is still there, or to try another one."""
        self._idle = False
        """Nothing waits for an answer, so pings are rare."""
        self._silences = 0
        """Heads that were given up since one has said something: a silence is borne longer when all were tried, in case
        that it is this process that is slow."""
        self._failed_ms: dict[str, float] = {}
        """When each endpoint was found silent last."""
        self._closed = False
        self._next = 0
        """Index of the endpoint to try next."""
        self._attempts = 0
        self._timer: Timer | None = None
        self._request = 0
        self._sequence = 1
        """That of the first command that waits."""
        self._repeats = 0
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
    ) -> int:
        """Reads one record; with `wait`, answers when there is one. Returns a handle for `cancel_read`.

        What can't be answered goes to `on_error(code, text)`; without it, it is logged and the callback gets None.
        """
        return self._ask(GcsRead(0, table.value, key, wait=wait), lambda rows: callback(rows.get(key)), on_error)

    def read_named(self, namespace: str, name: str, callback: Callable[[Record | None], None]) -> int:
        """Reads the record of the live actor of that name; None when there is none. Errors as for `read`."""
        message = GcsRead(0, Table.ACTORS.value, named=(namespace, name))
        return self._ask(message, lambda rows: callback(next(iter(rows.values()), None)), None)

    def read_all(
        self, table: Table, callback: Callable[[dict[bytes, Record]], None], on_error: OnError | None = None
    ) -> int:
        """Reads a whole table, records by key. Errors as for `read`, with an empty table."""
        return self._ask(GcsRead(0, table.value, all=True), callback, on_error)

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
            self._link_send(GcsWatch(tuple(table.value for table in watch.tables)))
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
            self._link_send(GcsWatch(tuple(table.value for table in watch.tables), keys=(key,)))

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
            else:
                self._keyed.pop((table, key), None)

    def send(self, message: Message, payload: bytes = b"") -> bool:
        """Sends what may get lost (a heartbeat), if there is a connection. Returns whether there is."""
        if self._link is None or not self._open:
            return False
        self._link.send(message, payload)
        return True

    @property
    def connected(self) -> bool:
        return self._open

    def unavailable(self) -> GcsUnavailableError:
        """The error to raise when waiting for the GCS has taken too long; it names each endpoint and its fault."""
        tried = "; ".join(f"{endpoint}: {self.failures.get(endpoint, 'no answer yet')}" for endpoint in self.endpoints)
        return GcsUnavailableError(f"the GCS does not answer ({tried}): tasks that run already go on")

    def close(self) -> None:
        """Ends it. What still waits is answered `session_expired`: what became of it is not known."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._be_patient(0.0, None)
        link, self._link, self._open = self._link, None, False
        if link is not None:
            link.close("the client is closed")
        commands, self._commands = self._commands, deque()
        reads, self._reads = self._reads, {}
        text = "the client was closed before the answer came"
        for _, callback in commands:
            self._call(callback, Result(Code.SESSION_EXPIRED, text, self.revision))
        for read in reads.values():
            self._fail_read(read, Code.SESSION_EXPIRED, text)

    # --- sending -----------------------------------------------------------------------------------------------------

    def _ask(self, message: GcsRead, done: Callable[[dict[bytes, Record]], None], on_error: OnError | None) -> int:
        self._request += 1
        message.request = self._request
        read = _Read(message, done, on_error)
        if not self._refuse_closed(lambda code, text: self._fail_read(read, code, text)):
            self._reads[message.request] = read
            if self._ready():
                self._link_send(message)
                self._wait_for_answer()
        return message.request

    def _refuse_closed(self, answer: OnError) -> bool:
        if self._closed:
            answer(Code.SESSION_EXPIRED, "the client is closed")
        return self._closed

    def _ready(self) -> bool:
        """Whether to send now. If not, it goes out when the connection is there, which this starts to make."""
        if not self._open and self._link is None and self._timer is None:
            self._connect()
        return self._open

    def _link_send(self, message: Message, payload: bytes = b"") -> None:
        if self._link is not None:
            self._link.send(message, payload)

    def _repeat(self) -> None:
        if not self._sent_request:  # unless the connection was made anew meanwhile
            self._send_command()

    def _send_command(self) -> None:
        if self._commands and self._ready():
            self._request += 1
            self._sent_request = self._request
            self._link_send(GcsCommand(self._request, self._sequence), self._commands[0][0])
            self._wait_for_answer()

    # --- the connection ----------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._timer = None
        endpoint = self.endpoints[self._next % len(self.endpoints)]
        try:
            self._link = self.reactor.connect(endpoint, ROLE_GCS, self, on_open=self._opened)
        except (OSError, ValueError) as error:
            self._lost(endpoint, str(error))
            return
        self._link.peer = endpoint
        self.several = self.several or sum(each.startswith("tcp:") for each in self.endpoints) > 1
        if self.several:
            self._be_patient(self._silence_ms, self._give_up)

    def _be_patient(self, delay_ms: float, then: Callable[[], None] | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self.reactor.call_later(delay_ms, then) if then is not None else None

    def _give_up(self) -> None:
        """The head at the other end of the link says nothing."""
        link, silence_ms = self._link, self._silence_ms
        if link is not None:
            self._failed_ms[link.peer] = self.reactor.now_ms()
            self._silences += 1
            self.reactor.drop(link, f"it has said nothing for {silence_ms:.0f} ms")

    @property
    def _silence_ms(self) -> float:
        return min(SILENCE_MS * 2.0 ** min(self._silences // len(self.endpoints), 9), SILENCE_MAX_MS)

    def _ping(self) -> None:
        if not self._alive:
            self._give_up()
            return
        self._alive = False
        self._link_send(GcsPing())
        self._idle = not (self.node_id or self._commands or self._reads)
        self._be_patient(self._silence_ms * (IDLE_PINGS if self._idle else 1), self._ping)

    def _wait_for_answer(self) -> None:
        """Something was asked: a silence is noticed sooner from now on."""
        if self._idle:
            self._idle = False
            self._be_patient(self._silence_ms, self._ping)

    def _opened(self, link: Link) -> None:
        self._open = self._alive = True
        link.send(GcsHello(self.client_id, self.node_id))
        if self.several:
            self._ping()
        self._watch_again(link)
        for read in self._reads.values():
            link.send(read.message)
        self._send_command()
        if self.on_connected is not None:
            self._call(self.on_connected, True)

    def _watch_again(self, link: Link) -> None:
        for told in (True, False):
            since = self.revision if told else -1
            tables = tuple(table.value for table, (_, each) in self._whole.items() if each is told)
            if tables:
                link.send(GcsWatch(tables, since))
            keys: dict[Table, list[bytes]] = {}
            for (table, key), (_, each) in self._keyed.items():
                if each is told:
                    keys.setdefault(table, []).append(key)
            for table, some in keys.items():
                link.send(GcsWatch((table.value,), since, tuple(some)))

    def _lost(self, endpoint: str, reason: str, hint: str = "") -> None:
        self.failures[endpoint] = reason
        self._idle = False
        self._be_patient(0.0, None)
        was_open, self._open, self._link = self._open, False, None
        self._sent_request = 0
        if was_open and self.on_connected is not None:
            self._call(self.on_connected, False)
        if self._closed or self._link is not None or self._timer is not None:
            return  # the callback may have asked for something already
        self._next += 1
        rounds, position = divmod(self._attempts, len(self.endpoints))
        self._attempts += 1
        longest_ms = RECONNECT_OF_SEVERAL_MAX_MS if self.several else RECONNECT_MAX_MS
        delay_ms = 0.0 if position else min(RECONNECT_FIRST_MS * 2 ** min(rounds, 20), longest_ms)
        if hint and self.reactor.now_ms() - self._failed_ms.get(hint, -1e9) < 4 * SILENCE_MS:
            delay_ms = RECONNECT_FIRST_MS  # a frozen leader is named until the others have noticed
        elif hint:
            self._next = self.endpoints.index(hint)
        if self.node_id or self._commands or self._reads or self._whole or self._keyed:
            self._timer = self.reactor.call_later(delay_ms, self._connect)

    def _redirect(self, link: Link, hint: str) -> None:
        """This one does not lead: ask the one it names, or the next."""
        link.close("it does not lead")
        if hint and hint not in self.endpoints:
            self.endpoints.append(hint)
        self._lost(link.peer, f"it does not lead (it names {hint or 'nobody'})", hint)

    def _no_leader(self, link: Link, reason: str) -> None:
        """This one knows no leader, and will say when it does; perhaps another one knows."""
        self.several, self._idle = True, False
        self.failures[link.peer] = reason

        def next_one() -> None:
            if link is self._link and not link.closed:
                link.close("it knows no leader")
                self._lost(link.peer, reason)

        self._be_patient(NO_LEADER_MS, next_one)

    def _on_heads(self, link: Link, endpoints: Sequence[str]) -> None:
        """This one leads, and these are all heads."""
        if endpoints:
            at = link.peer
            self.endpoints[:] = [at, *(each for each in endpoints if each != at)] if at in endpoints else [*endpoints]
            self._next = 0
            if self.on_heads is not None:
                self._call(self.on_heads, self.endpoints)
        self._answered()
        if not self.several:
            self.several = True
            self._ping()

    def on_closed(self, link: Link, reason: str) -> None:
        if link is self._link:
            self._lost(link.peer, reason)

    # --- answers -----------------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
        self._alive = True
        self._silences = 0
        if type(message) is GcsResult:
            self._on_result(link, message, payload)
        elif type(message) is GcsChanges:
            self._answered()
            self._on_changes(message, payload)
        elif type(message) is GcsPing:
            pass
        elif type(message) is GcsHeads:
            self._on_heads(link, message.endpoints)
        elif type(message) is GcsNoLeader:
            self._no_leader(link, message.reason)
        elif self.on_other is not None:
            try:
                self.on_other(message, payload)
            except Exception as error:
                self._note(error)

    def _answered(self) -> None:
        self._attempts = 0
        if self.failures:
            self.failures.clear()

    def _on_result(self, link: Link, message: GcsResult, payload: bytes | bytearray) -> None:
        if message.code == Code.NOT_LEADER:
            self._redirect(link, message.leader_hint)
            return
        if message.request == self._sent_request and self._commands:
            result = decode_result(message, payload)
            self._answered()
            self._sent_request = 0
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
        self._answered()
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
        log.error("a read of the GCS table %s failed (%s): %s", read.message.table, code.value, text)
        self._call(read.done, {})

    def _call(self, callback: Callable[[Any], None], value: Any) -> None:
        try:
            callback(value)
        except Exception as error:
            self._note(error)

    def _note(self, error: Exception) -> None:
        log.exception("a callback of the GCS client failed")
        self.reactor.handler_errors.append(repr(error))
