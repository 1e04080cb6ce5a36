"""The handshake: who gets in, who does not, and that nothing said once can be used again."""

from __future__ import annotations

import pytest

from ftray.config import PROTOCOL_VERSION
from ftray.exceptions import AuthenticationError, ProtocolError, ProtocolVersionError
from ftray.wire.handshake import (
    ANY_CLUSTER,
    CHALLENGE,
    HELLO,
    MAGIC,
    PROOF_BYTES,
    ROLE_CLIENT,
    ROLE_GCS,
    ROLE_TASK,
    ClientHandshake,
    ServerHandshake,
)

TOKEN, OTHER_TOKEN = b"t" * 32, b"u" * 32
CLUSTER, OTHER_CLUSTER = b"c" * 16, b"d" * 16
CLIENT_NONCE, SERVER_NONCE = b"1" * 32, b"2" * 32


def client(token: bytes = TOKEN, cluster: bytes = CLUSTER, nonce: bytes = CLIENT_NONCE) -> ClientHandshake:
    return ClientHandshake(token, ROLE_CLIENT, cluster, nonce)


def server(token: bytes = TOKEN, cluster: bytes = CLUSTER, nonce: bytes = SERVER_NONCE) -> ServerHandshake:
    return ServerHandshake(token, cluster, nonce)


def shake(one: ClientHandshake, other: ServerHandshake) -> None:
    proof = one.receive(other.receive(one.hello))
    one.receive(other.receive(proof))


@pytest.mark.parametrize("cluster", [CLUSTER, ANY_CLUSTER])
def test_both_sides_agree(cluster: bytes) -> None:
    one, other = client(cluster=cluster), server()
    shake(one, other)
    assert one.done and other.done
    assert other.role == ROLE_CLIENT
    assert one.rest == other.rest == b""


def test_what_follows_at_once_is_kept() -> None:
    one, other = client(), server()
    proof = one.receive(other.receive(one.hello))
    verdict = other.receive(proof + b"first frame")
    one.receive(verdict + b"greeting")
    assert (other.rest, one.rest) == (b"first frame", b"greeting")


def test_byte_by_byte_in_both_directions() -> None:
    one, other = client(), server()
    to_server, to_client = one.hello, b""
    for _ in range(500):
        if to_server:
            to_client += other.receive(to_server[:1])
            to_server = to_server[1:]
        if to_client:
            to_server += one.receive(to_client[:1])
            to_client = to_client[1:]
    assert one.done and other.done


def test_wrong_token_is_noticed_by_the_client_and_its_proof_is_not_sent() -> None:
    one, other = client(token=OTHER_TOKEN), server()
    with pytest.raises(AuthenticationError, match="FTRAY_TOKEN"):
        one.receive(other.receive(one.hello))
    assert not one.done and not other.done


def test_wrong_proof_is_refused_by_the_server() -> None:
    one, other = client(), server()
    other.receive(one.hello)
    with pytest.raises(AuthenticationError):
        other.receive(bytes(PROOF_BYTES))
    assert not other.done
    assert len(other.refusal) == 1


def test_the_servers_refusal_reaches_the_client_as_a_typed_error() -> None:
    one, other = client(), server()
    one.receive(other.receive(one.hello))
    with pytest.raises(AuthenticationError):
        other.receive(bytes(PROOF_BYTES))
    with pytest.raises(AuthenticationError, match="refused"):
        one.receive(other.refusal)
    assert not one.done


def test_wrong_cluster() -> None:
    one, other = client(cluster=OTHER_CLUSTER), server()
    with pytest.raises(AuthenticationError):
        other.receive(one.hello)
    with pytest.raises(AuthenticationError, match="another cluster"):
        one.receive(other.refusal)


def test_wrong_version_says_both_versions_on_both_sides() -> None:
    one, other = client(), server()
    newer = HELLO.pack(MAGIC, PROTOCOL_VERSION + 1, ROLE_CLIENT, 0, CLUSTER, CLIENT_NONCE)
    with pytest.raises(ProtocolVersionError, match=str(PROTOCOL_VERSION + 1)):
        other.receive(newer)
    # The client reads the version of the server out of the refusal; give it one that is not its own.
    refusal = CHALLENGE.pack(other.refusal[0], PROTOCOL_VERSION + 7, 0, bytes(32), bytes(32))
    with pytest.raises(ProtocolVersionError, match=f"{PROTOCOL_VERSION + 7}, this is {PROTOCOL_VERSION}"):
        one.receive(refusal)


@pytest.mark.parametrize("data", [b"G", b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"FTRX", b"\x16\x03\x01" + bytes(80)])
def test_another_protocol_is_refused_at_its_first_wrong_byte(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        server().receive(data)


def test_a_server_of_another_protocol_is_recognised() -> None:
    with pytest.raises(ProtocolError):
        client().receive(b"HTTP/1.1 400 Bad Request\r\n".ljust(CHALLENGE.size, b"."))


def test_a_recorded_handshake_does_not_work_again() -> None:
    one, other = client(), server()
    proof = one.receive(other.receive(one.hello))
    other.receive(proof)
    assert other.done
    replayed = server(nonce=b"3" * 32)
    replayed.receive(one.hello)
    with pytest.raises(AuthenticationError):
        replayed.receive(proof)


def test_a_recorded_challenge_does_not_work_again() -> None:
    one, other = client(), server()
    challenge = other.receive(one.hello)
    with pytest.raises(AuthenticationError):
        client(nonce=b"4" * 32).receive(challenge)


def test_a_servers_proof_reflected_to_it_is_refused() -> None:
    """An attacker without the token repeats the server's own proof of the same two nonces."""
    other = server()
    challenge = other.receive(client().hello)
    with pytest.raises(AuthenticationError):
        other.receive(challenge[-PROOF_BYTES:])


def test_a_client_is_not_fooled_by_its_own_words() -> None:
    """A fake server without the token mirrors what it gets, or asks the real one for a proof on a second connection."""
    victim = client()
    with pytest.raises((AuthenticationError, ProtocolError)):
        victim.receive(victim.hello.ljust(CHALLENGE.size, b"\0"))
    # With the victim's own nonce sent to a real server under another role, the proof it gets is of that role.
    other = server()
    stolen = other.receive(HELLO.pack(MAGIC, PROTOCOL_VERSION, ROLE_TASK, 0, CLUSTER, CLIENT_NONCE))
    with pytest.raises(AuthenticationError):
        client().receive(stolen)


def test_the_role_is_part_of_the_proof() -> None:
    one, other = client(), server()
    challenge = other.receive(HELLO.pack(MAGIC, PROTOCOL_VERSION, ROLE_GCS, 0, CLUSTER, CLIENT_NONCE))
    with pytest.raises(AuthenticationError):
        one.receive(challenge)
