"""Workers' output: lines, names, rotation, forwarding, and last words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftray.config import Config
from ftray.raylet.logs import (
    DRIVER_BACKLOG_BYTES_MAX,
    LINE_BYTES_MAX,
    MARKER,
    READ_BYTES,
    STDERR,
    LineSplitter,
    LogHub,
    RotatedFile,
    WorkerLogs,
    list_logs,
    tail_log,
)
from ftray.wire.reactor import Reactor


def test_lines_are_whole_and_named() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"a\nb") == [("", b"a")]
    assert splitter.feed(b"c\n" + MARKER + b"f\nd\n\n") == [("", b"bc"), ("f", b"d"), ("f", b"")]
    assert splitter.feed(b"no newline" + MARKER + b"g\n") == [("f", b"no newline")]
    assert splitter.name == "g"
    assert splitter.feed(b"end") == []
    assert splitter.finish() == [("g", b"end")]
    assert splitter.finish() == []


def test_a_long_line_is_cut() -> None:
    splitter = LineSplitter()
    lines = splitter.feed(b"x" * (3 * LINE_BYTES_MAX + 10) + b"\nshort\n")
    assert [len(text) for _, text in lines] == [LINE_BYTES_MAX] * 3 + [10, 5]
    assert sum(len(text) for _, text in splitter.feed(b"y" * (LINE_BYTES_MAX + 1))) == LINE_BYTES_MAX + 1
    assert splitter.finish() == []


def test_a_marker_that_arrives_in_pieces_in_a_long_line() -> None:
    splitter = LineSplitter()
    half = len(MARKER) // 2
    lines = splitter.feed(b"x" * (LINE_BYTES_MAX + 1) + MARKER[:half])
    assert b"".join(text for _, text in lines) == b"x" * (LINE_BYTES_MAX + 1)
    rest = splitter.feed(MARKER[half:] + b"name\nnext\n")
    assert rest[-1] == ("name", b"next")
    assert b"\x01" not in b"".join(text for _, text in rest)


def test_files_rotate(tmp_path: Path) -> None:
    path = tmp_path / "w.out"
    file = RotatedFile(str(path), bytes_max=10, files_max=3)
    assert list(tmp_path.iterdir()) == []
    for number in range(6):
        file.write(b"line %d\n" % number)
    file.close()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {
        "w.out": b"line 5\n",
        "w.out.1": b"line 4\n",
        "w.out.2": b"line 3\n",
    }


def test_a_file_that_cannot_be_written_costs_lines_only(tmp_path: Path) -> None:
    file = RotatedFile(str(tmp_path / "missing" / "w.out"), 10, 2)
    file.write(b"a\n")
    assert file.failed == 1


# --- the hub ----------------------------------------------------------------------------------------------------------


class Pipes:
    def __init__(self, hub: LogHub, reactor: Reactor, pid: int = 4242) -> None:
        self.reactor = reactor
        out_r, self.out = os.pipe()
        err_r, self.err = os.pipe()
        self.logs: WorkerLogs = hub.add(pid, out_r, err_r)


class FakeLink:
    """What a hub needs of a driver's link."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.sent: list[Any] = []

    def send(self, message: Any, payload: bytes = b"") -> None:
        self.sent.append(message)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor(Config(log_tail_lines=3), b"t", bytes(16))
    yield made
    assert made.handler_errors == []
    made.close()


@pytest.fixture
def hub(reactor: Reactor, tmp_path: Path) -> LogHub:
    return LogHub(reactor, str(tmp_path), reactor.config)


def test_lines_are_written_kept_and_forwarded(hub: LogHub, reactor: Reactor, tmp_path: Path) -> None:
    link = FakeLink()
    hub.forward(b"jobA", link)  # type: ignore[arg-type]
    pipes = Pipes(hub, reactor)
    os.write(pipes.out, b"before any job\n")
    reactor.poll(0)
    pipes.logs.job_id = b"jobA"
    os.write(pipes.out, MARKER + b"f\nhello\nworld\n")
    os.write(pipes.err, b"one\ntwo\nthr\xff\nfour\n")
    reactor.poll(0)
    (message,) = link.sent  # all that one turn brought, in one message
    assert message.lines[:2] == ((1, "f", 4242, "hello"), (1, "f", 4242, "world"))
    assert [line[3] for line in message.lines[2:]] == ["one", "two", "thr\ufffd", "four"]
    assert {line[0] for line in message.lines[2:]} == {STDERR}
    assert list(pipes.logs.tail) == ["two", "thr\ufffd", "four"]
    assert (tmp_path / "worker-4242.out").read_bytes() == b"before any job\nhello\nworld\n"
    assert (tmp_path / "worker-4242.err").read_bytes() == b"one\ntwo\nthr\xff\nfour\n"
    os.write(pipes.err, b"last words")
    os.close(pipes.out)
    os.close(pipes.err)
    hub.finish(pipes.logs)
    assert pipes.logs.tail[-1] == "last words"
    assert [entry["file"] for entry in list_logs(str(tmp_path))] == ["worker-4242.err", "worker-4242.out"]


def test_end_of_file_closes_the_pipe(hub: LogHub, reactor: Reactor) -> None:
    pipes = Pipes(hub, reactor)
    os.close(pipes.out)
    os.close(pipes.err)
    reactor.poll(0)
    assert [stream.fd for stream in pipes.logs.streams] == [-1, -1]
    hub.finish(pipes.logs)


def test_finish_does_not_wait_for_a_child_that_holds_the_pipe(hub: LogHub, reactor: Reactor) -> None:
    pipes = Pipes(hub, reactor)
    os.write(pipes.err, b"said\n")
    hub.finish(pipes.logs)
    assert list(pipes.logs.tail) == ["said"]
    os.close(pipes.out)
    os.close(pipes.err)


def test_a_turn_reads_a_bounded_amount_of_each_stream(hub: LogHub, reactor: Reactor, tmp_path: Path) -> None:
    pipes = Pipes(hub, reactor)
    os.set_blocking(pipes.out, False)
    line = b"z" * 99 + b"\n"
    written = os.write(pipes.out, line * 2000)
    assert written >= READ_BYTES
    reactor.poll(0)
    assert (tmp_path / "worker-4242.out").stat().st_size <= READ_BYTES
    os.close(pipes.out)
    os.close(pipes.err)
    hub.finish(pipes.logs)


def test_a_driver_that_does_not_read_loses_lines_and_is_told(hub: LogHub, reactor: Reactor) -> None:
    link = FakeLink()
    hub.forward(b"jobA", link)  # type: ignore[arg-type]
    link.out = bytearray(DRIVER_BACKLOG_BYTES_MAX + 1)
    hub.tell(b"jobA", ["lost"])
    hub.tell(b"jobA", ["lost too"])
    reactor.run_timers()
    assert link.sent == []
    link.out = bytearray()
    hub.tell(b"jobA", ["heard"])
    reactor.run_timers()
    (message,) = link.sent
    assert message.dropped == 2
    assert [line[3] for line in message.lines] == ["heard"]
    hub.stop_forwarding(b"jobA")
    hub.tell(b"jobA", ["to nobody"])


def test_the_tail_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("1\n2\n3\n")
    assert tail_log(str(tmp_path), "a.log", 2) == ["2", "3"]
    assert tail_log(str(tmp_path), "a.log", 0) == []
    assert tail_log(str(tmp_path), "a.log", 9) == ["1", "2", "3"]
    for name in ("../a.log", "", "..", "missing"):
        with pytest.raises(ValueError, match="log file"):
            tail_log(str(tmp_path), name, 1)
