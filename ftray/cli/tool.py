"""A small blocking client for tools: connect, shake hands, ask, read the answer.

Role: shell, on one blocking socket. The same handshake, frames and messages as everybody else; no reactor, no threads.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from ftray.config import Config
from ftray.exceptions import FtrayError, ProtocolError
from ftray.wire.frames import FrameDecoder, encode_frame
from ftray.wire.handshake import ANY_CLUSTER, NONCE_BYTES, ROLE_TOOL, ClientHandshake
from ftray.wire.messages import Message, ToolQuery, ToolReply, decode, encode
from ftray.wire.reactor import parse_endpoint


class ToolError(FtrayError):
    """The node answered that it could not do what it was asked."""


class ToolClient:
    """A connection to a node, authenticated.

    The constructor raises OSError when nobody can be reached, AuthenticationError for the wrong token or cluster,
    ProtocolVersionError, ProtocolError when what answers is not ftray, TimeoutError, ValueError for a bad endpoint.
    """

    def __init__(
        self,
        endpoint: str,
        token: bytes,
        cluster: bytes = ANY_CLUSTER,
        role: int = ROLE_TOOL,
        timeout_s: float = 10.0,
    ) -> None:
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._decoder = FrameDecoder(Config().frame_bytes_max)
        self._request = 0
        family, address = parse_endpoint(endpoint)
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(address)
            handshake = ClientHandshake(token, role, cluster, os.urandom(NONCE_BYTES))
            self._socket.sendall(handshake.hello)
            while not handshake.done:
                self._socket.sendall(handshake.receive(self._receive()))
        except BaseException:
            self._socket.close()
            raise
        self._frames: Iterator[tuple[bytes, bytes | bytearray]] = self._decoder.feed(handshake.rest)

    def query(self, what: str, **arguments: Any) -> Any:
        """Asks, and returns what the answer's JSON means. Raises ToolError, and what the constructor raises."""
        self._request += 1
        self._deadline = time.monotonic() + self._timeout_s
        self.send(ToolQuery(self._request, what, arguments))
        while True:
            message, payload = self._next()
            if isinstance(message, ToolReply) and message.request == self._request:
                if message.error:
                    raise ToolError(message.error)
                return json.loads(bytes(payload)) if payload else None

    def send(self, message: Message) -> None:
        header = encode(message)
        self._socket.settimeout(self._timeout_s)
        self._socket.sendall(encode_frame(header, 0))

    def _next(self) -> tuple[Message, bytes | bytearray]:
        while True:
            for header, payload in self._frames:
                try:
                    return decode(header), payload
                except Exception as error:
                    raise ProtocolError(f"{self.endpoint} sent what cannot be understood: {error}") from None
            self._frames = self._decoder.feed(self._receive())

    def _receive(self) -> bytes:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"no answer from {self.endpoint} within {self._timeout_s:g} s")
        self._socket.settimeout(left_s)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            raise TimeoutError(f"no answer from {self.endpoint} within {self._timeout_s:g} s") from None
        if not data:
            raise ProtocolError(f"{self.endpoint} closed the connection: it is no ftray node, or is stopping")
        return data

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> ToolClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
