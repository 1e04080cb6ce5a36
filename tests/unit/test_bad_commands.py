"""What is wrong with a command is said to who has sent it, by one head and by the leader of three; the log keeps clean.

A command that one head let into the log would reach all of them, and stop them all. So whatever is wrong must be
refused before, and the client that sent it goes on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from gcs_world import ACTOR, JOB, NODE, WORKER, RawClient, gcs_world, put
from heads_world import HeadsWorld
from wire_hosts import install_clock

from ftray.gcs.state import commands as c
from ftray.gcs.state import state as state_module
from ftray.gcs.state.commands import COMMAND_VERSION, encode_command
from ftray.gcs.state.errors import CommandError
from ftray.gcs.state.tables import Code
from ftray.wire import messages as m
from ftray.wire.frames import PREFIX, encode_frame

VERSION = bytes([COMMAND_VERSION])
PUT = encode_command(put(b"k"))


def packed(*fields: Any) -> bytes:
    return VERSION + msgspec.msgpack.encode(fields)


def node(**changes: Any) -> bytes:
    right = c.RegisterNode(NODE, "unix:/n", {"CPU": 1.0}, {}, 1, "host", 1)
    return encode_command(msgspec.structs.replace(right, **changes))


BAD: dict[str, tuple[bytes, Code, str]] = {
    "nothing": (b"", Code.INVALID, "empty command"),
    "a version and nothing": (VERSION, Code.INVALID, "not valid MessagePack"),
    "a newer version": (bytes([COMMAND_VERSION + 1]) + PUT[1:], Code.INVALID, "same version of ftray on all nodes"),
    "an unknown type": (packed(999, b"x"), Code.INVALID, "unknown type 999.*upgrade the head"),
    "no type": (packed(), Code.INVALID, "malformed|not valid"),
    "a type that is a list": (packed([20], "ns", b"k"), Code.INVALID, "malformed"),
    "no array": (VERSION + msgspec.msgpack.encode({"a": 1}), Code.INVALID, "malformed"),
    "too few fields": (packed(20, "ns"), Code.INVALID, "KvPut"),
    "fields that only a newer version knows": (packed(20, "ns", b"k", b"v", True, 1), Code.INVALID, "KvPut"),
    "a field of another type": (packed(20, "ns", 5, b"v"), Code.INVALID, "KvPut"),
    "text that is not UTF-8": (PUT.replace(b"ns", b"\xff\xfe"), Code.INVALID, "not UTF-8"),
    "an array that claims 4 billion fields": (VERSION + b"\xdd\xff\xff\xff\xff\x14", Code.INVALID, "truncated"),
    "a value that claims 1 GB": (packed(20, "ns")[:-3] + b"\xa2ns\xc4\x01k\xc6\x40\x00\x00\x00", Code.INVALID, ""),
    "nesting without end": (VERSION + b"\x91" * 100_000, Code.INVALID, "malformed|not valid"),
    "nesting inside a field": (VERSION + b"\x94\x14" + b"\x91" * 100_000, Code.INVALID, "malformed|not valid"),
    "cut short": (PUT[:-1], Code.INVALID, "not valid MessagePack"),
    "more after its end": (PUT + b"\x00", Code.INVALID, "not valid MessagePack"),
    "rubbish": (VERSION + bytes(range(256)), Code.INVALID, "malformed|not valid"),
    "an id that is too short": (node(node_id=b"short"), Code.INVALID, "node_id has 5 bytes"),
    "an amount that is no number": (node(resources={"CPU": math.nan}), Code.INVALID, "finite number"),
    "a negative amount": (node(resources={"CPU": -1.0}), Code.INVALID, "finite number"),
    "an infinite amount": (node(resources={"CPU": math.inf}), Code.INVALID, "finite number"),
    "a huge incarnation": (node(incarnation=(1 << 64) - 1), Code.INVALID, "incarnation"),
    "NUL in a namespace": (encode_command(c.KvPut("a\0b", b"k", b"v")), Code.INVALID, "namespace.*NUL"),
    "a long namespace": (encode_command(c.KvPut("n" * 1001, b"k", b"v")), Code.INVALID, "namespace"),
    "labels without end": (node(labels={f"l{n}": "x" * 1000 for n in range(1100)}), Code.TOO_LARGE, "RegisterNode"),
    "a report without end": (
        encode_command(c.WorkerDied(WORKER, NODE, c.DeathCauseRecord(stderr_tail=["x" * 2_000_000]))),
        Code.TOO_LARGE, "beside its value, more than the limit of 1048576",
    ),
    "a value over the limit": (encode_command(put(b"k", bytes(1001))), Code.TOO_LARGE, "limit of 1000"),
    "a class over the limit": (
        encode_command(c.RegisterActor(ACTOR, JOB, WORKER, NODE, "Big", creation=bytes(1001))),
        Code.TOO_LARGE, "actor Big takes 1001 bytes",
    ),
}  # fmt: skip


@pytest.fixture(params=["one head", "three heads"])
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Who serves: `endpoint`, `reactor`, `settle`, `replica`, and `still_right`, which checks that all is well."""
    if request.param == "one head":
        with gcs_world(tmp_path, monkeypatch) as world:
            world.replica.value_bytes_max = 1000
            world.still_right = lambda: world.replica.state.check() == []  # type: ignore[attr-defined]
            yield world
        return
    heads = HeadsWorld(tmp_path, install_clock(monkeypatch))
    heads.start()
    host = heads.leader().host
    assert host is not None and host.replica._leading is not None
    host.replica._leading._value_bytes_max = 1000

    def still_right() -> bool:
        heads.settle(100)
        states = [head.host.replica.state.snapshot() for head in heads.heads if head.host is not None]
        return not any(head.failed for head in heads.heads) and len(states) == 3 and len(set(states)) == 1

    yield SimpleNamespace(
        endpoint=host.endpoint, reactor=host.reactor, settle=heads.settle, replica=host.replica, still_right=still_right
    )
    heads.close()


def answers(client: RawClient) -> list[tuple[Any, bytes]]:
    return [each for each in client.received() if isinstance(each[0], m.GcsResult)]


def ask(client: RawClient, sequence: int, command: bytes) -> m.GcsResult:
    header = m.encode(m.GcsCommand(1, sequence))
    data = encode_frame(header, len(command)) + command
    for start in range(0, len(data), 1 << 16):
        client.peer.send(data[start : start + (1 << 16)])
        client.world.settle()
    [(result, _)] = answers(client)
    assert isinstance(result, m.GcsResult)
    return result


def test_what_is_wrong_is_answered_and_the_client_goes_on(served: Any) -> None:
    client = RawClient(served)
    answers(client)
    for number, (name, (command, code, said)) in enumerate(BAD.items()):
        result = ask(client, 2 * number, command)
        assert result.code == code.value, (name, result)
        assert re.search(said, result.message) and len(result.message) < 500, (name, result.message)
        assert ask(client, 2 * number + 1, encode_command(put(b"after %d" % number))).code == "", name
    assert served.replica.state.revision == len(BAD)
    assert served.still_right()
    client.close()


def test_what_cannot_be_read_is_not_written(served: Any) -> None:
    """What an older head could not read must not reach it by way of the log."""
    client = RawClient(served)
    answers(client)
    log_end = (lambda: served.replica._index) if hasattr(served.replica, "_index") else (
        lambda: served.replica.status()["last_index"]
    )  # fmt: skip
    before = log_end()
    for name, (command, code, _) in BAD.items():
        try:
            c.decode_command(command)
            readable = code is Code.INVALID  # a matter of the state: it may be written, and is refused by all alike
        except CommandError:
            readable = False
        if not readable:
            ask(client, 1, command)
            assert log_end() == before, name
    client.close()


def test_a_frame_that_claims_too_much_costs_its_link_at_once(served: Any) -> None:
    client, other = RawClient(served), RawClient(served, b"other")
    client.peer.send(PREFIX.pack(20, (1 << 31)))
    served.settle()
    assert client.peer.is_cut_off()
    client.close()
    answers(other)
    assert ask(other, 1, PUT).code == ""
    assert served.still_right()
    other.close()


def test_a_client_id_that_is_too_long_costs_its_link(served: Any) -> None:
    client = RawClient(served, b"x" * 65)
    served.settle()
    assert client.peer.is_cut_off()
    client.close()


# --- sequence numbers ------------------------------------------------------------------------------------------------


def test_a_stolen_number_changes_nothing_and_its_owner_gets_no_foreign_answer(served: Any) -> None:
    owner, thief = RawClient(served), RawClient(served)
    answers(owner), answers(thief)
    mine, theirs = encode_command(put(b"mine", overwrite=False)), encode_command(put(b"theirs"))
    assert ask(owner, 5, mine).code == ""
    same = ask(thief, 5, theirs)
    assert same.code == Code.STALE.value and "two processes use the same client id" in same.message
    lower = ask(thief, 4, theirs)
    assert lower.code == Code.STALE.value and "command 5 already" in lower.message
    assert served.replica.state.kv_get("ns", b"theirs") is None
    assert ask(owner, 5, mine).code == ""  # its repeat is answered as before
    # Who goes ahead takes the owner's place; the owner is told, and not that its own command was carried out.
    assert ask(thief, 6, theirs).code == ""
    next_one = ask(owner, 6, encode_command(put(b"lost?")))
    assert next_one.code == Code.STALE.value and "This command was not carried out" in next_one.message
    assert served.replica.state.kv_get("ns", b"lost?") is None
    assert served.still_right()
    owner.close(), thief.close()


def test_what_a_number_was_used_for_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gcs_world(tmp_path, monkeypatch) as world:
        first = RawClient(world)
        assert ask(first, 1, PUT).code == ""
        first.close()
        for compacted in (False, True):
            if compacted:
                world.replica.compact()
            world.restart()
            thief = RawClient(world)
            assert ask(thief, 1, encode_command(put(b"theirs"))).code == Code.STALE.value
            assert ask(thief, 1, PUT).code == ""
            thief.close()


@pytest.mark.parametrize(
    ("sequence", "code"), [(0, ""), (1 << 62, ""), ((1 << 63) - 1, ""), (-1, "invalid"), (1 << 63, "invalid")]
)
def test_numbers_at_the_ends_of_their_range(served: Any, sequence: int, code: str) -> None:
    client = RawClient(served)
    answers(client)
    assert ask(client, sequence, PUT).code == code
    if not code:
        assert ask(client, sequence, PUT).code == ""
        earlier = ask(client, max(sequence - 1, 0), encode_command(put(b"other")))
        assert earlier.code == Code.STALE.value
    assert served.still_right()
    client.close()


def test_two_links_of_one_client_take_turns(served: Any) -> None:
    """As when a link has died and its client does not know yet."""
    one, two = RawClient(served), RawClient(served)
    answers(one), answers(two)
    for sequence in range(1, 9):
        used, other = (one, two) if sequence % 2 else (two, one)
        command = encode_command(put(b"%d" % sequence, overwrite=False))
        assert ask(used, sequence, command).code == ""
        assert ask(other, sequence, command).code == ""  # the same answer, and not `exists`
    assert served.replica.state.revision == 8
    one.close(), two.close()


def test_the_limit_of_a_command_is_beside_its_value() -> None:
    limit = state_module.REST_BYTES_MAX
    large = put(b"k", bytes(4 * limit))
    assert state_module.admit(large, 8 * limit, len(encode_command(large))) is None
    long_key = put(b"k" * (limit + 1))
    assert "KvPut" in str(state_module.admit(long_key, 8 * limit, len(encode_command(long_key))))
