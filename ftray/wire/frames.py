"""Frames: how messages are cut out of a byte stream.

Role: pure. `u32 header_len, u32 payload_len` (little endian), header, payload. The decoder is fed whatever arrived and
yields whole frames; a length over the limit raises at once, before a byte of it is waited for.

Payloads are handed out as `bytes` copies when small and as views of a buffer of their own when large, so a
kept payload never pins a whole receive buffer.

Rejected: one length and a header that says where the payload starts (the decoder would have to understand headers); a
checksum per frame (loopback and unix sockets do not flip bits; stored and transferred objects have theirs).
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from ftray.exceptions import ProtocolError

PREFIX = Struct("<II")
PREFIX_BYTES = PREFIX.size
HEADER_BYTES_MAX = 16 << 20


def encode_frame(header: bytes, payload_bytes: int) -> bytes:
    """The frame up to its payload, which the sender appends as it is."""
    return PREFIX.pack(len(header), payload_bytes) + header


class FrameDecoder:
    """Cuts a stream into `(header, payload)` frames.

    `feed` takes what arrived; `frames` yields what is complete. Raises ProtocolError for a length over the limit.
    """

    __slots__ = ("_buffer", "_large", "_large_filled", "_large_header", "frame_bytes_max")

    def __init__(self, frame_bytes_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._buffer = b""
        self._large: bytearray | None = None
        self._large_filled = 0
        self._large_header = b""

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes | bytearray]]:
        """Takes the bytes that arrived, yields each complete frame. Exhaust the iterator before the next call."""
        if self._large is not None:
            take = min(len(data), len(self._large) - self._large_filled)
            self._large[self._large_filled : self._large_filled + take] = data[:take]
            self._large_filled += take
            if self._large_filled < len(self._large):
                return
            large, header = self._large, self._large_header
            self._large, self._large_header, self._large_filled = None, b"", 0
            yield header, large
            data = data[take:]
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        position, end = 0, len(data)
        unpack = PREFIX.unpack_from
        while end - position >= PREFIX_BYTES:
            header_len, payload_len = unpack(data, position)
            if header_len > HEADER_BYTES_MAX or payload_len > self.frame_bytes_max:
                self._buffer = b""
                raise ProtocolError(
                    f"a frame announces {header_len} header and {payload_len} payload bytes; "
                    f"the limits are {HEADER_BYTES_MAX} and {self.frame_bytes_max}"
                )
            start = position + PREFIX_BYTES
            body = start + header_len
            stop = body + payload_len
            if stop > end:
                if payload_len > 1 << 16 and body <= end:
                    # A large payload is collected in place: joining chunks again and again would be quadratic.
                    self._large = bytearray(payload_len)
                    self._large_header = data[start:body]
                    self._large_filled = end - body
                    self._large[: self._large_filled] = data[body:]
                    return
                break
            position = stop
            yield data[start:body], data[body:stop]
        if position < end:
            self._buffer = data[position:] if position else data

    @property
    def pending_bytes(self) -> int:
        """Bytes of an unfinished frame; not zero at end-of-file means that the stream was cut short."""
        return len(self._buffer) + len(self._large_header) + self._large_filled
