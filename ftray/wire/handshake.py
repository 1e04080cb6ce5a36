"""The handshake: who may speak at all.

Role: pure state machines of both sides; bytes in, bytes out. Everything has a fixed size, so nothing is parsed before
the peer has shown that it knows the cluster token:

    client -> server   magic(4) version(u16) role(u8) reserved(u8) cluster(16) nonce(32)                 56 bytes
    server -> client   status(u8) version(u16) pad(u8) nonce(32) proof(32)                               68 bytes
    client -> server   proof(32)
    server -> client   status(u8)

Each proof is HMAC-SHA256(token, direction + both nonces + role + cluster), so neither side's answer can be reflected
or replayed. Comparison takes constant time. A cluster id of zeros means "whichever this is" (the CLI's first call).

Rejected: sending the token (a fake listener on a stale socket path would learn it); TLS as the only way (a
certificate for `init()` on a laptop); MessagePack here (a parser in front of the lock).
"""

from __future__ import annotations

import hashlib
import hmac
from struct import Struct

from ftray.config import PROTOCOL_VERSION
from ftray.exceptions import AuthenticationError, ProtocolError, ProtocolVersionError

MAGIC = b"FTRY"
ANY_CLUSTER = bytes(16)
HELLO = Struct("<4sHBB16s32s")
CHALLENGE = Struct("<BHB32s32s")
PROOF_BYTES = 32
NONCE_BYTES = 32

ACCEPTED, WRONG_TOKEN, WRONG_VERSION, WRONG_CLUSTER = 0, 1, 2, 3

ROLE_CLIENT = 1
"""A driver or worker speaking to its raylet."""
ROLE_GCS = 2
"""A client of the GCS."""
ROLE_PEER = 3
"""Worker to worker: ownership."""
ROLE_TASK = 4
"""Worker to worker: a task channel."""
ROLE_RAYLET = 5
"""Raylet to raylet."""
ROLE_TOOL = 6
"""A command-line tool asking a raylet, or a head."""
ROLE_HEAD = 7
"""Head to head: replication."""


def cluster_id_of(token: bytes) -> bytes:
    """The id of the cluster with this token, where several heads must agree on one before they have met."""
    return hmac.digest(token, b"ftray cluster id", hashlib.sha256)[: len(ANY_CLUSTER)]


def _proof(
    token: bytes, direction: bytes, client_nonce: bytes, server_nonce: bytes, role: int, cluster: bytes
) -> bytes:
    return hmac.digest(token, direction + client_nonce + server_nonce + bytes([role]) + cluster, hashlib.sha256)


class ClientHandshake:
    """The connecting side. Send `hello`, then feed what arrives until `done`; `receive` returns what to send.

    Raises AuthenticationError, ProtocolVersionError or ProtocolError from `receive`.
    """

    __slots__ = ("_buffer", "_cluster", "_nonce", "_role", "_token", "_waits_verdict", "done", "hello", "rest")

    def __init__(self, token: bytes, role: int, cluster: bytes, nonce: bytes) -> None:
        self._token, self._role, self._cluster, self._nonce = token, role, cluster, nonce
        self.hello = HELLO.pack(MAGIC, PROTOCOL_VERSION, role, 0, cluster, nonce)
        self._buffer = b""
        self._waits_verdict = False
        self.done = False
        self.rest = b""

    def receive(self, data: bytes) -> bytes:
        self._buffer += data
        out = b""
        if not self._waits_verdict:
            if len(self._buffer) < CHALLENGE.size:
                # A refusal is one status byte followed by the version and zeros: the same size, so just wait.
                return b""
            status, version, _, server_nonce, proof = CHALLENGE.unpack_from(self._buffer)
            self._buffer = self._buffer[CHALLENGE.size :]
            if status == WRONG_VERSION:
                raise ProtocolVersionError(
                    f"the other side speaks protocol version {version}, this is {PROTOCOL_VERSION}: "
                    "install the same ftray version on both"
                )
            if status == WRONG_CLUSTER:
                raise AuthenticationError("the address belongs to another cluster than the one expected")
            if status != ACCEPTED:
                raise ProtocolError("the other side does not speak ftray's protocol")
            expected = _proof(self._token, b"server", self._nonce, server_nonce, self._role, self._cluster)
            if not hmac.compare_digest(expected, proof):
                raise AuthenticationError(
                    "the cluster token does not match: set FTRAY_TOKEN to the token of the cluster you mean, "
                    "or copy the token file of its head node"
                )
            out = _proof(self._token, b"client", self._nonce, server_nonce, self._role, self._cluster)
            self._waits_verdict = True
        if self._buffer:
            if self._buffer[0] != ACCEPTED:
                raise AuthenticationError("the cluster token was refused")
            self.done = True
            self.rest = self._buffer[1:]
        return out


class ServerHandshake:
    """The accepting side. Feed what arrives; `receive` returns what to send.

    Raises AuthenticationError or ProtocolError (after which `refusal` is what to send before closing). At most
    `bytes_max` bytes are ever read before the peer has authenticated.
    """

    __slots__ = ("_buffer", "_cluster", "_hello", "_nonce", "_token", "done", "refusal", "rest", "role")

    def __init__(self, token: bytes, cluster: bytes, nonce: bytes) -> None:
        self._token, self._cluster, self._nonce = token, cluster, nonce
        self._buffer = b""
        self._hello: tuple[bytes, bytes] | None = None
        self.role = 0
        self.done = False
        self.rest = b""
        self.refusal = b""

    def _refuse(self, status: int) -> None:
        self.refusal = CHALLENGE.pack(status, PROTOCOL_VERSION, 0, bytes(32), bytes(32))

    def receive(self, data: bytes) -> bytes:
        self._buffer += data
        out = b""
        if self._hello is None:
            if self._buffer[:4] != MAGIC[: len(self._buffer)]:
                raise ProtocolError("what arrived is not ftray's protocol (wrong magic)")
            if len(self._buffer) < HELLO.size:
                return b""
            _, version, role, _, cluster, client_nonce = HELLO.unpack_from(self._buffer)
            self._buffer = self._buffer[HELLO.size :]
            if version != PROTOCOL_VERSION:
                self._refuse(WRONG_VERSION)
                raise ProtocolVersionError(f"a peer speaks protocol version {version}, this is {PROTOCOL_VERSION}")
            if cluster not in (ANY_CLUSTER, self._cluster):
                self._refuse(WRONG_CLUSTER)
                raise AuthenticationError("a peer means another cluster")
            self.role = role
            self._hello = (client_nonce, cluster)
            proof = _proof(self._token, b"server", client_nonce, self._nonce, role, cluster)
            out = CHALLENGE.pack(ACCEPTED, PROTOCOL_VERSION, 0, self._nonce, proof)
        if len(self._buffer) >= PROOF_BYTES:
            client_nonce, cluster = self._hello
            expected = _proof(self._token, b"client", client_nonce, self._nonce, self.role, cluster)
            if not hmac.compare_digest(expected, self._buffer[:PROOF_BYTES]):
                self.refusal = bytes([WRONG_TOKEN])
                raise AuthenticationError("a peer does not know the cluster token")
            self.rest = self._buffer[PROOF_BYTES:]
            self._buffer = b""
            self.done = True
            out += bytes([ACCEPTED])
        return out
