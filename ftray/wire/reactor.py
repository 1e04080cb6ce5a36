"""Links and timers of a process under one epoll object, driven by whichever thread waits.

Role: shell. `Reactor` owns the non-blocking sockets, cuts frames, runs handlers under `lock`, flushes what they queued,
and runs timers. It is driven by `poll`, from a trio task (`ftray/wire/loop.py`) or from a user thread that waits in
`get`: the waiter reads (ARCHITECTURE.md, threads). `gate` is an epoll object around the first one, on which the trio
task sleeps; a user thread that takes over closes it (0.4 us) so that the loop is not woken for what the user thread
reads.

Rules: handlers run under `lock`, never block, and may raise without hurting any link but their own. `reader` is held by
the one thread that polls. Whoever queued output flushes it: `flush_dirty` at the end of each batch.

Rejected: a trio task for each connection (a task switch and a cancel scope for each message, and a result would cross
threads twice); selectors (an object for each event).
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from ftray.config import Config
from ftray.exceptions import AuthenticationError, ProtocolError, ProtocolVersionError
from ftray.wire.frames import PREFIX, FrameDecoder
from ftray.wire.handshake import NONCE_BYTES, ClientHandshake, ServerHandshake
from ftray.wire.messages import Message, decode, encode
from ftray.wire.strangers import Strangers

log = logging.getLogger("ftray.wire")

EPOLLIN, EPOLLOUT = select.EPOLLIN, select.EPOLLOUT
ACCEPT_PAUSE_MS = 100
"""How long nobody is accepted after the process ran out of descriptors."""
RECEIVE_BYTES = 65536
"""Below malloc's mmap threshold: a larger buffer costs page faults on each receive."""
REST_READS_MAX = 64


class Handler(Protocol):
    """What a link calls, always under the reactor's lock."""

    def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None: ...

    def on_closed(self, link: Link, reason: str) -> None: ...


class Timer:
    """A pending `call_later`; `cancel` is idempotent."""

    __slots__ = ("cancelled", "fn")

    def __init__(self, fn: Callable[[], None]) -> None:
        self.fn: Callable[[], None] | None = fn
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self.fn = None


class Link:
    """One connection. `send` queues; the reactor flushes. `peer` and `tag` are the handler's to use."""

    __slots__ = (
        "accept_handler", "closed", "decoder", "dirty", "error", "fd", "handler", "handshake", "hello", "incoming",
        "on_drained", "on_open", "out", "peer", "reactor", "role", "sock", "tag", "watchdog", "writing",
    )  # fmt: skip

    def __init__(self, reactor: Reactor, sock: socket.socket, handler: Handler | None, role: int) -> None:
        self.reactor = reactor
        self.sock = sock
        self.fd = sock.fileno()
        self.handler = handler
        self.role = role
        self.peer: Any = None
        self.tag: Any = None
        self.incoming = False
        self.error: Exception | None = None
        """Why the handshake or a message was refused, for `on_closed`."""
        self.handshake: ClientHandshake | ServerHandshake | None = None
        self.on_open: Callable[[Link], None] | None = None
        self.on_drained: Callable[[Link], None] | None = None
        """Told when output that the socket did not take at once has gone out."""
        self.accept_handler: Callable[[Link], Handler | None] | None = None
        self.hello = b""
        """What goes out as soon as a TCP connection is there."""
        self.watchdog: Timer | None = None
        """Ends a handshake that takes too long."""
        self.decoder = FrameDecoder(reactor.config.frame_bytes_max)
        self.out = bytearray()
        self.dirty = False
        self.writing = False
        self.closed = False

    def send(self, message: Message, payload: bytes | bytearray | memoryview = b"") -> None:
        """Queues a message. On a closed link it is dropped: `on_closed` has told or will tell."""
        if self.closed:
            return
        header = encode(message)
        out = self.out
        out += PREFIX.pack(len(header), len(payload))
        out += header
        if payload:
            out += payload
        if not self.dirty:
            self.dirty = True
            self.reactor.dirty.append(self)

    def flush(self) -> None:
        """Writes what the socket takes; the rest waits for it to be writable."""
        self.dirty = False
        out = self.out
        if not out or self.closed:
            return
        if self.writing or self.handshake is not None:
            # A peer that reads nothing at all never makes the socket writable, so this is where it is noticed.
            if len(out) > self.reactor.config.output_backlog_bytes_max:
                self.reactor.drop(self, f"the peer reads too slowly: {len(out)} bytes wait for it")
            return
        try:
            sent = self.sock.send(out)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.reactor.drop(self, f"write failed: {error}")
            return
        if sent == len(out):
            out.clear()
            return
        del out[:sent]
        if len(out) > self.reactor.config.output_backlog_bytes_max:
            self.reactor.drop(self, f"the peer reads too slowly: {len(out)} bytes wait for it")
            return
        self.writing = True
        self.reactor.rearm(self)

    def close(self, reason: str) -> None:
        """Flushes what can be written at once, then closes. The handler's `on_closed` is not called."""
        if not self.closed:
            self.handler = None
            self.flush()
            self.reactor.drop(self, reason)

    def frames(self, data: bytes) -> None:
        """Hands the complete frames in `data` to the handler."""
        for header, payload in self.decoder.feed(data):
            handler = self.handler
            if handler is None:
                return
            try:
                message = decode(header)
            except Exception as error:  # besides msgspec's own: text that is not UTF-8, nesting without end, ...
                raise ProtocolError(f"a message that cannot be understood: {error}") from None
            handler.on_message(self, message, payload)


def parse_endpoint(endpoint: str) -> tuple[int, Any]:
    """`unix:/path` or `tcp:host:port` -> (address family, address). Raises ValueError."""
    kind, _, rest = endpoint.partition(":")
    if kind == "unix" and rest:
        return socket.AF_UNIX, rest
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        if host and port.isdigit() and int(port) < 65536:
            return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host.strip("[]"), int(port))
    raise ValueError(f"not an endpoint: {endpoint!r} (unix:/path or tcp:host:port)")


class Reactor:
    """See the module. `accept_handler(link)` names the handler of an authenticated incoming link, by its role."""

    def __init__(self, config: Config, token: bytes, cluster_id: bytes, lock: Any = None, name: str = "") -> None:
        self.config = config
        self.token = token
        self.cluster_id = cluster_id
        self.name = name
        self.lock = lock if lock is not None else threading.RLock()
        self.reader = threading.Lock()
        self.links: dict[int, Link] = {}
        self.strangers = Strangers()
        self.dirty: list[Link] = []
        self.handler_errors: list[str] = []
        self.refused = 0
        """Links closed for what came over them (garbage, wrong token, ...)."""
        self.on_earlier_timer: Callable[[], None] | None = None
        self.closed = False
        """A thread that waited while another one closed finds out here."""
        self._epoll = select.epoll()
        self._gate = select.epoll()
        self._gate.register(self._epoll.fileno(), EPOLLIN)
        self._listeners: dict[int, tuple[socket.socket, Callable[[Link], Handler | None]]] = {}
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_count = 0
        self.poll_events = self._epoll.poll

    # --- waiting -----------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """What the loop waits on: readable when there is something to read and no thread reads already."""
        return self._gate.fileno()

    def close_gate(self) -> None:
        self._gate.modify(self._epoll.fileno(), 0)

    def open_gate(self) -> None:
        if not self.closed:
            self._gate.modify(self._epoll.fileno(), EPOLLIN)

    def poll(self, timeout_s: float) -> bool:
        """Waits for events, handles them, runs due timers. The caller holds `reader` and not `lock`.

        Returns whether anything happened.
        """
        events = self.poll_events(timeout_s, 64)
        if events or self._timers:
            with self.lock:
                self.handle(events)
        return bool(events)

    def handle(self, events: list[tuple[int, int]]) -> None:
        """Handles events of the epoll object, under the lock."""
        links = self.links
        for fd, event in events:
            link = links.get(fd)
            if link is None:
                self._other_event(fd)
                continue
            if event & EPOLLOUT:
                link.writing = False
                if link.handshake is None:
                    link.flush()
                elif link.hello:
                    try:
                        link.sock.send(link.hello)
                        link.hello = b""
                    except BlockingIOError:  # an event of the descriptor's former owner: not connected yet
                        link.writing = True
                    except OSError as error:
                        self.drop(link, f"cannot connect: {error.strerror or error}")
                if link.closed:
                    continue
                if not link.writing:
                    self.rearm(link)
                    if link.on_drained is not None and not link.out:
                        self._tell_drained(link)
            if event & ~EPOLLOUT:
                self._receive(link)
        if self._timers:
            self.run_timers()
        if self.dirty:
            self.flush_dirty()

    def _tell_drained(self, link: Link) -> None:
        assert link.on_drained is not None
        try:
            link.on_drained(link)
        except Exception as error:  # it costs this link, as an error in `on_message` does
            log.exception("%s: on_drained failed", self.name)
            self.handler_errors.append(repr(error))
            self.drop(link, f"internal error: {error!r}")

    def flush_dirty(self) -> None:
        """Flushes all links that have output, under the lock."""
        dirty = self.dirty
        while dirty:
            dirty.pop().flush()

    # --- links -------------------------------------------------------------------------------------------------------

    def listen(self, endpoint: str, accept_handler: Callable[[Link], Handler | None], backlog: int = 1024) -> str:
        """Listens; returns the endpoint with the real port. Raises OSError."""
        family, address = parse_endpoint(endpoint)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(backlog)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        self._listeners[sock.fileno()] = (sock, accept_handler)
        self._epoll.register(sock.fileno(), EPOLLIN)
        if family == socket.AF_UNIX:
            return endpoint
        host, port = sock.getsockname()[:2]
        return f"tcp:{host}:{port}"

    def connect(
        self, endpoint: str, role: int, handler: Handler, on_open: Callable[[Link], None] | None = None
    ) -> Link:
        """Starts to connect. What is sent before the handshake is done waits for it.

        Raises OSError when the endpoint refuses at once (nobody listens there), ValueError when it is none.
        """
        family, address = parse_endpoint(endpoint)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            if family == socket.AF_UNIX:
                sock.connect(address)  # immediate, or refused (also when the queue of the listener is full)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    sock.connect(address)
                except BlockingIOError:
                    pass
        except OSError:
            sock.close()
            raise
        link = Link(self, sock, handler, role)
        handshake = ClientHandshake(self.token, role, self.cluster_id, os.urandom(NONCE_BYTES))
        link.handshake = handshake
        link.on_open = on_open
        self.links[link.fd] = link
        self._epoll.register(link.fd, EPOLLIN)
        link.hello = handshake.hello
        if family == socket.AF_UNIX:
            try:
                sock.send(link.hello)
            except OSError:
                pass  # closed already: the next poll sees it and tells the handler
            link.hello = b""
        else:
            link.writing = True  # writable means connected: then the hello goes out
            self.rearm(link)
        self._watch_handshake(link)
        return link

    def _watch_handshake(self, link: Link) -> None:
        def late() -> None:
            if link.handshake is not None and not link.closed:
                self.refused += 1
                self.drop(link, f"no complete handshake within {self.config.handshake_timeout_ms} ms")

        link.watchdog = self.call_later(self.config.handshake_timeout_ms, late)

    def _accept(self, sock: socket.socket, accept_handler: Callable[[Link], Handler | None]) -> None:
        for _ in range(64):
            try:
                conn, _address = sock.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors, or the peer is gone: the listener stays
                log.warning("%s: accept failed: %s", self.name, error)
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # The connection stays in the queue and the listener readable: without a pause this would spin.
                    self._pause(sock)
                return
            conn.setblocking(False)
            if conn.family != socket.AF_UNIX:
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(self, conn, None, 0)
            link.incoming = True
            link.handshake = ServerHandshake(self.token, self.cluster_id, os.urandom(NONCE_BYTES))
            link.accept_handler = accept_handler
            self.links[link.fd] = link
            self._epoll.register(link.fd, EPOLLIN)
            self._watch_handshake(link)
            if (oldest := self.strangers.came(link)) is not None:
                self.drop(oldest, "too many connections wait that have not shown who they are")

    def _pause(self, listener: socket.socket) -> None:
        def resume() -> None:
            if listener.fileno() in self._listeners:
                self._epoll.modify(listener.fileno(), EPOLLIN)

        self._epoll.modify(listener.fileno(), 0)
        self.call_later(ACCEPT_PAUSE_MS, resume)

    def rearm(self, link: Link) -> None:
        self._epoll.modify(link.fd, EPOLLIN | EPOLLOUT if link.writing else EPOLLIN)

    def _receive(self, link: Link) -> None:
        try:
            data = link.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.drop(link, f"read failed: {error}")
            return
        if not data:
            cut = " in the middle of a frame" if link.decoder.pending_bytes or link.handshake is not None else ""
            self.drop(link, "closed by the peer" + cut)
            return
        self.received(link, data)

    def read_rest(self, link: Link) -> None:
        """Handles what the peer of a link has sent before it died, under the lock. Bounded: it may be somebody else."""
        for _ in range(REST_READS_MAX):
            if link.closed:
                return
            self._receive(link)

    def received(self, link: Link, data: bytes) -> None:
        """Handles bytes that arrived on a link, under the lock."""
        try:
            if link.handshake is not None:
                data = self._shake(link, data)
                if not data:
                    return
            link.frames(data)
        except (ProtocolError, ProtocolVersionError, AuthenticationError) as error:
            self.refused += 1
            refusal = getattr(link.handshake, "refusal", b"")
            if refusal:
                try:
                    link.sock.send(refusal)
                except OSError:
                    pass
            self.drop(link, str(error), error)
        except msgspec.MsgspecError as error:
            self.refused += 1
            self.drop(link, f"a payload that cannot be understood: {error}")
        except Exception as error:  # our own fault: it costs this link, is logged, and no other link notices
            log.exception("%s: handler failed on link %s", self.name, link.peer)
            self.handler_errors.append(repr(error))
            self.drop(link, f"internal error: {error!r}")

    def _shake(self, link: Link, data: bytes) -> bytes:
        handshake = link.handshake
        assert handshake is not None
        answer = handshake.receive(data)
        if answer:
            try:
                link.sock.send(answer)  # at most 100 bytes into an empty buffer
            except OSError as error:
                self.drop(link, f"write failed: {error}")
                return b""
        if not handshake.done:
            return b""
        link.handshake = None
        if link.watchdog is not None:
            link.watchdog.cancel()
            link.watchdog = None
        if isinstance(handshake, ServerHandshake):
            self.strangers.known(link)
            accept_handler, link.accept_handler = link.accept_handler, None
            link.role = handshake.role
            link.handler = accept_handler(link) if accept_handler is not None else None
            if link.handler is None:
                self.refused += 1
                self.drop(link, f"nothing here serves role {link.role}")
                return b""
        elif link.on_open is not None:
            on_open, link.on_open = link.on_open, None
            on_open(link)
        link.flush()
        return handshake.rest

    def drop(self, link: Link, reason: str, error: Exception | None = None) -> None:
        """Closes a link and tells its handler."""
        if link.closed:
            return
        link.closed = True
        if link.watchdog is not None:
            link.watchdog.cancel()
            link.watchdog = None
        if self.links.pop(link.fd, None) is not None:
            try:
                self._epoll.unregister(link.fd)
            except OSError:
                pass
        try:
            link.sock.close()
        except OSError:
            pass  # user code has closed the descriptor behind our back
        link.out.clear()
        handler, link.handler = link.handler, None
        if handler is not None:
            link.error = error
            try:
                handler.on_closed(link, reason)
            except Exception as failure:
                log.exception("%s: on_closed failed", self.name)
                self.handler_errors.append(repr(failure))
        elif link.incoming and (line := self.strangers.closed(link, reason, self.now_ms())):
            log.info("%s: incoming link closed: %s", self.name, line)

    def detach(self, link: Link) -> None:
        """Takes a link out, for another reactor to `attach`."""
        self.links.pop(link.fd, None)
        self._epoll.unregister(link.fd)

    def attach(self, link: Link, handler: Handler) -> None:
        """Takes over a link from another reactor."""
        link.reactor = self
        link.handler = handler
        self.links[link.fd] = link
        self._epoll.register(link.fd, EPOLLIN | EPOLLOUT if link.writing else EPOLLIN)

    # --- other descriptors -------------------------------------------------------------------------------------------

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Calls `callback` under the lock whenever `fd` is readable (level-triggered)."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, EPOLLIN)

    def unwatch(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _other_event(self, fd: int) -> None:
        callback = self._callbacks.get(fd)
        listener = self._listeners.get(fd)
        try:
            if callback is not None:
                callback()
            elif listener is not None:
                self._accept(*listener)
        except Exception as error:
            log.exception("%s: a callback failed", self.name)
            self.handler_errors.append(repr(error))

    # --- timers ------------------------------------------------------------------------------------------------------

    def now_ms(self) -> float:
        return time.monotonic() * 1000.0

    def call_later(self, delay_ms: float, fn: Callable[[], None]) -> Timer:
        """Calls `fn` under the lock, not before `delay_ms` from now."""
        timer = Timer(fn)
        due = time.monotonic() + delay_ms / 1000.0
        earlier = not self._timers or due < self._timers[0][0]
        self._timer_count += 1
        heapq.heappush(self._timers, (due, self._timer_count, timer))
        if earlier and self.on_earlier_timer is not None:
            self.on_earlier_timer()
        return timer

    def next_timer_s(self) -> float:
        """Seconds until the next timer is due (a cancelled one counts), infinity when there is none. Needs no lock."""
        try:
            due = self._timers[0][0]
        except IndexError:
            return float("inf")
        return max(0.0, due - time.monotonic())

    def run_timers(self) -> None:
        """Runs what is due, under the lock."""
        now = time.monotonic()
        timers = self._timers
        while timers and (timers[0][0] <= now or timers[0][2].fn is None):  # nobody is woken for a cancelled one
            _, _, timer = heapq.heappop(timers)
            fn = timer.fn
            if fn is not None:
                timer.cancel()
                try:
                    fn()
                except Exception as error:
                    log.exception("%s: a timer failed", self.name)
                    self.handler_errors.append(repr(error))
        if self.dirty:
            self.flush_dirty()

    def abandon(self) -> None:
        """In a forked child: closes the child's copies of all descriptors, without a word to anybody."""
        for link in self.links.values():
            link.closed = True
            link.sock.close()
        for sock, _ in self._listeners.values():
            sock.close()
        self.links.clear()
        self.closed = True
        self._gate.close()
        self._epoll.close()

    # --- end ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes all sockets without telling handlers."""
        for link in list(self.links.values()):
            link.handler = None
            if link.handshake is None:
                link.writing = False
                link.flush()
            self.drop(link, "shutting down")
        for sock, _ in self._listeners.values():
            sock.close()
        self._listeners.clear()
        self._callbacks.clear()
        self._timers.clear()
        self.closed = True
        self._gate.close()
        self._epoll.close()
