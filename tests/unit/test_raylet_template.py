"""The template process: forks, kills, reaps, leaves nothing. Real processes, forked from an executed template."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from raylet_worker import Order

from ftray.raylet.forking import TemplateSpec, spawn_template
from ftray.raylet.template import (
    Fork,
    Forked,
    ForkFailed,
    Kill,
    Reaped,
    Report,
    Template,
    decode_report,
    encode,
)

ROOT = Path(__file__).resolve().parents[2]


class Harness:
    """A template, seen from the node's end of its socket."""

    def __init__(self, log: Path) -> None:
        self.arena_fd = os.memfd_create("arena", os.MFD_CLOEXEC)
        spec = TemplateSpec(self.arena_fd, str(log), "raylet_worker:obey", "raylet_worker:Order")
        self.process = spawn_template(spec)
        self.process.sock.settimeout(20)
        self.log = log

    def fork(self, name: bytes, what: str, argument: int = 0) -> tuple[int, int]:
        """Asks for a worker; returns the read ends of its stdout and stderr."""
        out_r, out_w = os.pipe()
        err_r, err_w = os.pipe()
        request = Fork(name, msgspec.msgpack.encode(Order(what, argument)))
        socket.send_fds(self.process.sock, [encode(request)], [out_w, err_w])
        os.close(out_w)
        os.close(err_w)
        return out_r, err_r

    def kill(self, name: bytes) -> None:
        self.process.sock.send(encode(Kill(name)))

    def report(self) -> Report:
        data = self.process.sock.recv(65536)
        assert data, f"the template is gone: {self.log.read_text()}"
        return decode_report(data)

    def close(self) -> None:
        self.process.sock.close()
        os.waitpid(self.process.pid, 0)
        os.close(self.arena_fd)


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    made = Harness(tmp_path / "log")
    yield made
    made.close()


def read_all(*fds: int) -> list[bytes]:
    """Reads until end-of-file, and closes."""
    found = []
    for fd in fds:
        with os.fdopen(fd, "rb") as file:
            found.append(file.read())
    return found


def read_line(fd: int) -> bytes:
    with os.fdopen(os.dup(fd), "rb", buffering=0) as file:
        return file.readline()


def wait_gone(pid: int) -> None:
    """Waits until a process that is not our child has ended. Raises if that takes long."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(10_000), f"process {pid} lives"
    os.close(pidfd)


def test_a_worker_is_forked_and_reaped(harness: Harness) -> None:
    out, err = harness.fork(b"w1", "exit", 7)
    forked = harness.report()
    assert isinstance(forked, Forked)
    assert forked.worker_id == b"w1"
    assert harness.report() == Reaped(b"w1", forked.pid, 7)
    assert read_all(out, err) == [b"to stdout\n", b"to stderr\n"]


def test_a_worker_inherits_nothing_but_what_it_should(harness: Harness) -> None:
    fds = [fd for _ in range(3) for fd in harness.fork(b"sleeper", "sleep")]  # their pipes pass through the template
    out, err = harness.fork(b"w1", "report")
    text, errors = read_all(out, err)
    assert errors == b""
    expected = [0, 1, 2, harness.arena_fd]
    assert text.decode().strip() == f"{expected} True [True, True] True True None"
    for fd in fds:
        os.close(fd)


def test_how_workers_end_is_told(harness: Harness) -> None:
    for name, what, argument, status in (
        (b"a", "exit", 0, 0),
        (b"b", "signal", signal.SIGSEGV, -signal.SIGSEGV),
        (b"c", "signal", signal.SIGKILL, -signal.SIGKILL),
        (b"d", "raise", 0, 70),
    ):
        pipes = harness.fork(name, what, int(argument))
        forked, reaped = harness.report(), harness.report()
        assert isinstance(forked, Forked)
        assert reaped == Reaped(name, forked.pid, status)
        _, errors = read_all(*pipes)
        assert (b"RuntimeError: the entry raised" in errors) == (what == "raise")


def test_a_kill_takes_the_whole_group(harness: Harness) -> None:
    out, err = harness.fork(b"w1", "family", -1)
    assert isinstance(harness.report(), Forked)
    child = int(read_line(out))
    harness.kill(b"w1")
    reaped = harness.report()
    assert isinstance(reaped, Reaped)
    assert reaped.status == -signal.SIGKILL
    wait_gone(child)
    assert read_all(out, err) == [b"", b""]


def test_what_a_worker_leaves_behind_is_killed_and_reaped(harness: Harness) -> None:
    out, err = harness.fork(b"w1", "family", 5)
    forked, reaped = harness.report(), harness.report()
    assert isinstance(forked, Forked)
    assert reaped == Reaped(b"w1", forked.pid, 5)
    text, _ = read_all(out, err)
    wait_gone(int(text))


def test_a_kill_of_nobody_does_nothing(harness: Harness) -> None:
    harness.kill(b"nobody")
    fds = harness.fork(b"w1", "exit")
    assert isinstance(harness.report(), Forked)
    assert isinstance(harness.report(), Reaped)
    read_all(*fds)


def test_workers_end_with_the_template(harness: Harness) -> None:
    fds = [*harness.fork(b"w1", "sleep"), *harness.fork(b"w2", "family", -1)]
    pids = []
    for _ in range(2):
        forked = harness.report()
        assert isinstance(forked, Forked)
        pids.append(forked.pid)
    pids.append(int(read_line(fds[2])))
    harness.process.sock.shutdown(socket.SHUT_RDWR)
    for pid in pids:
        wait_gone(pid)
    read_all(*fds)


def test_workers_end_when_the_template_is_killed(harness: Harness) -> None:
    fds = harness.fork(b"w1", "sleep")
    forked = harness.report()
    assert isinstance(forked, Forked)
    os.kill(harness.process.pid, signal.SIGKILL)
    wait_gone(forked.pid)
    read_all(*fds)


def test_a_fork_that_fails_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    template = Template(theirs, "raylet_worker:obey", "raylet_worker:Order", ())

    def no_fork() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", no_fork)
    read_end, write_end = os.pipe()
    template._fork(Fork(b"w1", b""), (write_end,), None, None)
    assert decode_report(ours.recv(65536)) == ForkFailed(b"w1", "cannot fork: Resource temporarily unavailable")
    assert read_all(read_end) == [b""]  # its end has been closed
    ours.close()
    theirs.close()


def test_a_worker_that_is_killed_before_it_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    template = Template(theirs, "raylet_worker:obey", "raylet_worker:Order", ())
    read_end, write_end = os.pipe()
    socket.send_fds(ours, [encode(Fork(b"w1", b""))], [write_end])
    os.close(write_end)
    ours.send(encode(Kill(b"w1")))
    template._read_requests()
    assert decode_report(ours.recv(65536)) == ForkFailed(b"w1", "not wanted any more")
    assert read_all(read_end) == [b""]
    ours.close()
    theirs.close()
