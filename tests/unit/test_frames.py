"""Frames: what a stream is cut into, and what a stream may not contain."""

from __future__ import annotations

import pytest

from ftray.exceptions import ProtocolError
from ftray.wire.frames import HEADER_BYTES_MAX, PREFIX, FrameDecoder, encode_frame

LIMIT = 1 << 20
LARGE = bytes(range(256)) * 400  # more than is collected by joining chunks


def decoded(decoder: FrameDecoder, data: bytes) -> list[tuple[bytes, bytes]]:
    return [(header, bytes(payload)) for header, payload in decoder.feed(data)]


def test_several_frames_in_one_piece() -> None:
    stream = encode_frame(b"a", 0) + encode_frame(b"bc", 3) + b"xyz" + encode_frame(b"", 1) + b"!"
    decoder = FrameDecoder(LIMIT)
    assert decoded(decoder, stream) == [(b"a", b""), (b"bc", b"xyz"), (b"", b"!")]
    assert decoder.pending_bytes == 0


@pytest.mark.parametrize("payload", [b"", b"p", b"payload" * 10, LARGE])
def test_byte_by_byte(payload: bytes) -> None:
    stream = encode_frame(b"header", len(payload)) + payload
    decoder = FrameDecoder(LIMIT)
    for at in range(len(stream) - 1):
        assert decoded(decoder, stream[at : at + 1]) == []
        assert decoder.pending_bytes > 0
    assert decoded(decoder, stream[-1:]) == [(b"header", payload)]
    assert decoder.pending_bytes == 0


def test_a_large_payload_and_what_follows_it_in_the_same_chunk() -> None:
    stream = encode_frame(b"one", len(LARGE)) + LARGE + encode_frame(b"two", 2) + b"ok"
    cut = len(stream) // 2
    decoder = FrameDecoder(LIMIT)
    assert decoded(decoder, stream[:cut]) == []
    assert decoded(decoder, stream[cut:]) == [(b"one", LARGE), (b"two", b"ok")]
    assert decoder.pending_bytes == 0


def test_a_kept_large_payload_is_a_buffer_of_its_own() -> None:
    stream = encode_frame(b"h", len(LARGE)) + LARGE
    decoder = FrameDecoder(LIMIT)
    list(decoder.feed(stream[:100]))
    [(_, first)] = list(decoder.feed(stream[100:]))
    list(decoder.feed(stream[:100]))
    [(_, second)] = list(decoder.feed(stream[100:]))
    assert first is not second and bytes(first) == bytes(second) == LARGE


def test_a_stream_cut_right_after_the_header_of_a_large_frame_is_unfinished() -> None:
    decoder = FrameDecoder(LIMIT)
    assert decoded(decoder, encode_frame(b"header", len(LARGE))) == []
    assert decoder.pending_bytes > 0


@pytest.mark.parametrize(
    ("header_len", "payload_len"), [(HEADER_BYTES_MAX + 1, 0), (1, LIMIT + 1), (2**32 - 1, 2**32 - 1)]
)
def test_a_length_over_the_limit_is_refused_before_its_bytes_come(header_len: int, payload_len: int) -> None:
    decoder = FrameDecoder(LIMIT)
    with pytest.raises(ProtocolError, match=str(max(header_len, payload_len))):
        list(decoder.feed(PREFIX.pack(header_len, payload_len)))


def test_frames_before_the_bad_one_are_handed_out() -> None:
    decoder = FrameDecoder(LIMIT)
    frames = decoder.feed(encode_frame(b"good", 1) + b"1" + PREFIX.pack(1, LIMIT + 1))
    assert next(frames) == (b"good", b"1")
    with pytest.raises(ProtocolError):
        next(frames)


def test_the_limit_itself_is_allowed() -> None:
    decoder = FrameDecoder(10)
    assert decoded(decoder, encode_frame(b"h", 10) + b"0123456789") == [(b"h", b"0123456789")]
