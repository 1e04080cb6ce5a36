"""The reactor: messages arrive whole and in order, and whatever one link sends hurts no other."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from wire_hosts import CLUSTER, Clock, RawPeer, Recorder, install_clock, make_reactor, settle

from ftray.exceptions import AuthenticationError, ProtocolVersionError
from ftray.wire.frames import HEADER_BYTES_MAX, PREFIX, encode_frame
from ftray.wire.handshake import CHALLENGE, HELLO, MAGIC, ROLE_CLIENT, ROLE_GCS, ROLE_PEER
from ftray.wire.messages import JobEnded, Message, WorkerBlocked, encode
from ftray.wire.reactor import ACCEPT_PAUSE_MS, Link, Reactor, parse_endpoint


class World:
    """A server, and a client with a good link to it whose health is checked after each mischief."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.clock = clock
        self.path = path
        self.reactors: list[Reactor] = []
        self.peers: list[RawPeer] = []
        self.server = self.reactor()
        self.service = Recorder(answer=True)
        self.endpoint = self.server.listen(f"unix:{path}/s", self.service.accept)
        self.client = self.reactor()
        self.user = Recorder()
        self.link = self.client.connect(self.endpoint, ROLE_CLIENT, self.user)
        self.settle()
        self.pings = 0

    def reactor(self, **settings: object) -> Reactor:
        one = make_reactor(**settings)  # type: ignore[arg-type]
        self.reactors.append(one)
        return one

    def settle(self) -> None:
        settle(*self.reactors)

    def expect_good_link_alive(self) -> None:
        """The other link still exchanges messages, and nobody was hurt inside."""
        self.pings += 1
        ping = JobEnded(b"ping %d" % self.pings)
        self.link.send(ping, b"payload")
        self.client.flush_dirty()
        self.settle()
        assert self.user.messages[-1] == ping
        assert self.user.closed == []
        assert self.server.handler_errors == []

    def raw(self, endpoint: str = "") -> RawPeer:
        """A peer that has not shaken hands."""
        self.peers.append(RawPeer(endpoint or self.endpoint))
        return self.peers[-1]

    def authenticated(self) -> RawPeer:
        peer = self.raw()
        peer.authenticate(self.server)
        return peer

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        for one in self.reactors:
            one.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, install_clock(monkeypatch))
    yield world
    world.close()


# --- the common case --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_messages_and_payloads_arrive_in_order_both_ways(world: World, kind: str) -> None:
    service = Recorder(answer=True)
    where = f"unix:{world.path}/other" if kind == "unix" else "tcp:127.0.0.1:0"
    endpoint = world.server.listen(where, service.accept)
    user = Recorder()
    link = world.client.connect(endpoint, ROLE_PEER, user)
    sent = [(JobEnded(bytes([i])), bytes([i]) * size) for i, size in enumerate([0, 1, 70_000, 3, 200_000])]
    for message, payload in sent:
        link.send(message, payload)  # before the handshake: it waits
    for _ in range(1000):
        world.settle()
        if len(user.messages) == len(sent):
            break
        select.select([world.client.fileno(), world.server.fileno()], [], [], 10)
    assert list(zip(user.messages, user.payloads)) == sent
    assert list(zip(service.messages, service.payloads)) == sent
    assert service.links[0].role == ROLE_PEER and service.links[0].incoming


def test_on_open_is_called_before_anything_arrives(world: World) -> None:
    seen: list[str] = []

    class Greeter(Recorder):
        def accept(self, link: Link) -> Recorder:
            link.send(WorkerBlocked())
            return self

    class User(Recorder):
        def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
            seen.append("message")

    endpoint = world.server.listen(f"unix:{world.path}/greeter", Greeter().accept)
    world.client.connect(endpoint, ROLE_CLIENT, User(), on_open=lambda link: seen.append("open"))
    world.settle()
    assert seen == ["open", "message"]


def test_peer_and_tag_are_the_handlers_from_the_start(world: World) -> None:
    """Setting them right after `connect` must not disturb a TCP connection that is still being made."""
    endpoint = world.server.listen("tcp:127.0.0.1:0", world.service.accept)
    user = Recorder()
    link = world.client.connect(endpoint, ROLE_CLIENT, user)
    link.tag, link.peer = b"mine", "also mine"
    link.send(WorkerBlocked())
    for _ in range(100):
        world.settle()
        if user.messages:
            break
        select.select([world.client.fileno(), world.server.fileno()], [], [], 10)
    assert user.messages == [WorkerBlocked()]
    assert (link.tag, link.peer) == (b"mine", "also mine")


def test_close_delivers_what_was_sent_and_tells_only_the_other_side(world: World) -> None:
    world.link.send(JobEnded(b"last"))
    world.link.close("done")
    world.settle()
    assert world.service.messages == [JobEnded(b"last")]
    assert len(world.service.closed) == 1
    assert world.user.closed == []
    world.link.send(JobEnded(b"too late"))  # dropped without an error
    world.settle()


def test_the_gate_is_readable_when_there_is_something_to_read_and_open(world: World) -> None:
    def readable() -> bool:
        return bool(select.select([world.server.fileno()], [], [], 0)[0])

    assert not readable()
    world.link.send(WorkerBlocked())
    world.client.flush_dirty()
    assert readable()
    world.server.close_gate()
    assert not readable()
    world.server.open_gate()
    assert readable()
    world.settle()
    assert not readable()


# --- who is not let in ------------------------------------------------------------------------------------------------


def test_wrong_token_is_a_typed_error_at_the_client(world: World) -> None:
    stranger = world.reactor(token=b"another token")
    user = Recorder()
    stranger.connect(world.endpoint, ROLE_CLIENT, user)
    world.settle()
    assert len(user.closed) == 1 and "FTRAY_TOKEN" in user.closed[0]
    assert isinstance(user.errors[0], AuthenticationError)
    assert len(world.service.links) == 1  # the handler never saw the stranger
    world.expect_good_link_alive()


def test_wrong_cluster_is_a_typed_error_at_the_client(world: World) -> None:
    stranger = world.reactor(cluster=b"d" * 16)
    user = Recorder()
    stranger.connect(world.endpoint, ROLE_CLIENT, user)
    world.settle()
    assert "another cluster" in user.closed[0]
    assert isinstance(user.errors[0], AuthenticationError)
    assert world.server.refused == 1
    world.expect_good_link_alive()


def test_wrong_version_gets_the_servers_version_and_is_cut_off(world: World) -> None:
    peer = world.raw()
    peer.send(HELLO.pack(MAGIC, 99, ROLE_CLIENT, 0, CLUSTER, bytes(32)))
    settle(world.server)
    refusal = peer.receive()
    assert len(refusal) == CHALLENGE.size and CHALLENGE.unpack(refusal)[0] != 0
    assert peer.is_cut_off()
    world.expect_good_link_alive()


def test_a_client_of_another_version_learns_it(world: World) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{world.path}/newer")
    listener.listen()
    user = Recorder()
    world.client.connect(f"unix:{world.path}/newer", ROLE_CLIENT, user)
    newer, _ = listener.accept()
    newer.sendall(CHALLENGE.pack(2, 99, 0, bytes(32), bytes(32)))
    world.settle()
    assert "99" in user.closed[0] and isinstance(user.errors[0], ProtocolVersionError)
    newer.close()
    listener.close()
    world.expect_good_link_alive()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 56, os.urandom(4096).replace(b"F", b"G")])
def test_garbage_before_the_handshake(world: World, data: bytes) -> None:
    peer = world.raw()
    peer.send(data)
    settle(world.server)
    assert peer.receive() == b"" and peer.is_cut_off()
    assert world.server.refused == 1
    world.expect_good_link_alive()


def test_a_role_that_nobody_serves(world: World) -> None:
    endpoint = world.server.listen(f"unix:{world.path}/picky", lambda link: None)
    user = Recorder()
    world.client.connect(endpoint, ROLE_GCS, user)
    world.settle()
    assert len(user.closed) == 1
    world.expect_good_link_alive()


@pytest.mark.parametrize("said", [b"", MAGIC, HELLO.pack(MAGIC, 1, ROLE_CLIENT, 0, CLUSTER, bytes(32))])
def test_a_half_open_peer_is_cut_off_in_time(world: World, said: bytes) -> None:
    peer = world.raw()
    peer.send(said)
    world.settle()
    world.clock.advance_ms(world.server.config.handshake_timeout_ms - 1)
    world.settle()
    assert not peer.is_cut_off()
    world.clock.advance_ms(2)
    world.settle()
    assert peer.is_cut_off()
    world.expect_good_link_alive()


def test_a_server_that_says_nothing_is_given_up_by_the_client(world: World) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{world.path}/mute")
    listener.listen()
    user = Recorder()
    world.client.connect(f"unix:{world.path}/mute", ROLE_CLIENT, user)
    world.settle()
    assert user.closed == []
    world.clock.advance_ms(world.client.config.handshake_timeout_ms + 1)
    world.settle()
    assert len(user.closed) == 1 and "handshake" in user.closed[0]
    listener.close()
    world.expect_good_link_alive()


def test_the_handshake_timer_does_not_outlive_the_handshake(world: World) -> None:
    world.clock.advance_ms(world.server.config.handshake_timeout_ms * 10)
    world.expect_good_link_alive()


# --- what authenticated peers may not send ----------------------------------------------------------------------------


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return encode_frame(header, len(payload)) + payload


packed = msgspec.msgpack.encode
GARBAGE = {
    "unknown tag": frame(packed([250, b"x"])),
    "tag of another type": frame(packed(["PushTask"])),
    "no tag": frame(packed([])),
    "a map": frame(packed({"type": 1})),
    "a number": frame(packed(7)),
    "missing fields": frame(packed([2, b"task"])),
    "wrong field type": frame(packed([72, 1.5])),
    "wrong nested type": frame(packed([12, [1, 2, 3]])),
    "empty header": frame(b"", b"payload"),
    "not MessagePack": frame(b"\xc1\xc1\xc1"),
    "cut short": frame(packed([72, b"0123456789"])[:-3]),
    "trailing bytes": frame(packed([23]) + b"\x01"),
    "invalid text": frame(packed([32, 0])[:-1] + b"\xa2\xff\xfe"),
    "nested too deeply": frame(b"\x94\x50\x01\xa1x\x81\xa1y" + b"\x91" * 50_000 + b"\x90"),
    "announces a huge payload": PREFIX.pack(1, 2**32 - 1),
    "announces a huge header": PREFIX.pack(HEADER_BYTES_MAX + 1, 0),
    "noise": bytes(range(255, 0, -1)) * 4,
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_after_the_handshake_costs_that_link_alone(world: World, data: bytes) -> None:
    peer = world.authenticated()
    peer.send(frame(encode(JobEnded(b"good"))))
    settle(world.server)
    peer.send(data)
    settle(world.server)
    assert peer.is_cut_off()
    assert world.server.refused == 1
    assert len(world.service.closed) == 1 and world.service.closed[0]
    assert world.service.messages == [JobEnded(b"good")]
    world.expect_good_link_alive()


def test_end_of_file_in_the_middle_of_a_frame_is_told(world: World) -> None:
    peer = world.authenticated()
    peer.send(frame(encode(JobEnded(b"x")), b"payload")[:-1])
    settle(world.server)
    peer.close()
    settle(world.server)
    assert world.service.closed == ["closed by the peer in the middle of a frame"]
    world.expect_good_link_alive()


def test_a_slow_sender_is_served_and_holds_up_nobody(world: World) -> None:
    peer = world.authenticated()
    message = JobEnded(b"slow")
    data = frame(encode(message), b"payload")
    for at in range(len(data)):
        peer.send(data[at : at + 1])
        settle(world.server)
        if at % 8 == 0:
            world.expect_good_link_alive()
    assert message in world.service.messages
    assert peer.receive() == data


def test_a_handler_that_raises_loses_its_link_alone(world: World) -> None:
    class Broken(Recorder):
        def on_message(self, link: Link, message: Message, payload: bytes | bytearray) -> None:
            raise RuntimeError("a bug")

    endpoint = world.server.listen(f"unix:{world.path}/broken", Broken().accept)
    user = Recorder()
    world.client.connect(endpoint, ROLE_CLIENT, user).send(WorkerBlocked())
    world.settle()
    assert len(user.closed) == 1
    assert world.server.handler_errors == ["RuntimeError('a bug')"]
    world.server.handler_errors.clear()
    world.expect_good_link_alive()


@pytest.mark.parametrize("chunks", [1, 40])
def test_a_peer_that_does_not_read_is_cut_off_at_the_limit(world: World, chunks: int) -> None:
    """Also when its socket never becomes writable again, so that no event tells of it."""
    small = world.reactor(output_backlog_bytes_max=1 << 20)
    service = Recorder()
    endpoint = small.listen(f"unix:{world.path}/small", service.accept)
    peer = world.raw(endpoint)
    peer.authenticate(small)
    for _ in range(chunks):
        service.links[0].send(WorkerBlocked(), bytes((4 << 20) // chunks))
        small.flush_dirty()
    assert len(service.closed) == 1 and "too slowly" in service.closed[0]
    world.expect_good_link_alive()


def test_on_drained_is_told_when_what_has_waited_is_written(world: World) -> None:
    told: list[int] = []
    world.link.on_drained = lambda link: told.append(len(link.out))
    world.link.send(WorkerBlocked(), bytes(1000))
    world.client.flush_dirty()
    assert told == [], "the socket took it at once"
    world.link.send(WorkerBlocked(), bytes(4 << 20))
    world.client.flush_dirty()
    assert world.link.out and told == []
    world.settle()
    assert told == [0]
    world.link.on_drained = lambda link: 1 / 0  # type: ignore[assignment, return-value]
    world.link.send(WorkerBlocked(), bytes(4 << 20))
    world.client.flush_dirty()
    world.settle()
    assert world.user.closed == ["internal error: ZeroDivisionError('division by zero')"], "it costs this link"
    assert len(world.client.handler_errors) == 1


def test_the_rest_of_a_link_is_read_at_once(world: World) -> None:
    """What a peer has sent before it died, whatever else there would be to read first."""
    link = world.service.links[0]
    for number in range(3):
        link.send(JobEnded(b"%d" % number), bytes(50_000))
    link.close("it dies")
    with world.client.lock:
        world.client.read_rest(world.link)
    assert [message.job_id for message in world.user.messages] == [b"0", b"1", b"2"]  # type: ignore[attr-defined]
    assert world.user.closed == ["closed by the peer"]
    with world.client.lock:
        world.client.read_rest(world.link)


# --- connecting -------------------------------------------------------------------------------------------------------


def test_nobody_there_is_an_error_at_once(world: World) -> None:
    with pytest.raises(FileNotFoundError):
        world.client.connect(f"unix:{world.path}/nobody", ROLE_CLIENT, Recorder())
    with pytest.raises(ValueError, match="not an endpoint"):
        world.client.connect("http://x", ROLE_CLIENT, Recorder())


def test_a_closed_port_is_an_error_at_once_or_a_closed_link(world: World) -> None:
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        port = placeholder.getsockname()[1]
    user = Recorder()
    try:
        world.client.connect(f"tcp:127.0.0.1:{port}", ROLE_CLIENT, user)
    except ConnectionRefusedError:
        return
    while not user.closed:
        select.select([world.client.fileno()], [], [], 10)
        world.settle()
    assert "cannot connect" in user.closed[0]


def test_a_full_listener_queue_refuses_instead_of_blocking(world: World) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{world.path}/full")
    listener.listen(0)
    with pytest.raises(BlockingIOError):
        for _ in range(10):
            world.client.connect(f"unix:{world.path}/full", ROLE_CLIENT, Recorder())
    listener.close()


@pytest.mark.parametrize("text", ["", "unix:", "tcp:", "tcp:host", "tcp:host:", "tcp:host:99999", "tcp::5", "udp:x:1"])
def test_what_is_not_an_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match="not an endpoint"):
        parse_endpoint(text)


def test_running_out_of_descriptors_pauses_the_listener_and_does_not_spin(world: World) -> None:
    [(fd, (listener, accept))] = world.server._listeners.items()
    calls = 0

    class Exhausted:
        def accept(self) -> object:
            nonlocal calls
            calls += 1
            raise OSError(errno.EMFILE, "Too many open files")

        def fileno(self) -> int:
            return fd

        def close(self) -> None:
            listener.close()

    world.server._listeners[fd] = (Exhausted(), accept)  # type: ignore[assignment]
    peer = world.raw()
    world.settle()
    assert calls == 1
    world.expect_good_link_alive()
    world.server._listeners[fd] = (listener, accept)
    world.clock.advance_ms(ACCEPT_PAUSE_MS + 1)
    world.settle()
    peer.authenticate(world.server)
    assert len(world.service.links) == 2


# --- descriptors and timers -------------------------------------------------------------------------------------------


def test_watched_descriptors_and_callbacks_that_raise(world: World) -> None:
    reading, writing = os.pipe()
    got: list[bytes] = []

    def on_readable() -> None:
        got.append(os.read(reading, 1))
        raise RuntimeError("a bug")

    world.server.watch(reading, on_readable)
    os.write(writing, b"xy")
    world.settle()
    assert got == [b"x", b"y"]
    assert world.server.handler_errors == ["RuntimeError('a bug')"] * 2
    world.server.handler_errors.clear()
    world.server.unwatch(reading)
    world.expect_good_link_alive()
    os.close(reading)
    os.close(writing)


def test_timers_run_in_order_once_and_not_when_cancelled(world: World) -> None:
    ran: list[str] = []
    reactor = world.server
    reactor.call_later(20, lambda: ran.append("late"))
    reactor.call_later(10, lambda: ran.append("early"))
    cancelled = reactor.call_later(5, lambda: ran.append("never"))
    cancelled.cancel()
    cancelled.cancel()
    assert reactor.next_timer_s() == pytest.approx(0.005)  # a cancelled timer costs an early look, no more
    world.settle()
    assert ran == []
    world.clock.advance_ms(10.5)
    world.settle()
    assert ran == ["early"]
    world.clock.advance_ms(10)
    world.settle()
    world.settle()
    assert ran == ["early", "late"]


def test_a_timer_that_raises_hurts_no_other(world: World) -> None:
    ran: list[str] = []
    world.server.call_later(1, lambda: 1 // 0)
    world.server.call_later(1, lambda: ran.append("after"))
    world.clock.advance_ms(2)
    world.settle()
    assert ran == ["after"]
    assert len(world.server.handler_errors) == 1
    world.server.handler_errors.clear()
    world.expect_good_link_alive()


def test_an_earlier_timer_wakes_the_loop_and_a_later_one_does_not(world: World) -> None:
    woken: list[float] = []
    reactor = make_reactor()
    reactor.on_earlier_timer = lambda: woken.append(reactor.next_timer_s())
    reactor.call_later(100, lambda: None)
    reactor.call_later(200, lambda: None)
    reactor.call_later(50, lambda: None)
    assert woken == [pytest.approx(0.1), pytest.approx(0.05)]
    reactor.close()


def test_what_a_timer_sends_goes_out_with_it(world: World) -> None:
    world.client.call_later(5, lambda: world.link.send(JobEnded(b"from a timer")))
    world.clock.advance_ms(6)
    world.settle()
    assert world.service.messages == [JobEnded(b"from a timer")]
