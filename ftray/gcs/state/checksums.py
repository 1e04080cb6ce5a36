"""CRC-32 of bytes whose beginning is known last.

Role: pure. What is written piece by piece has its length and checksum in front, and those cover each other: the
checksum of a whole is joined here from those of its parts, without a second pass over the bytes.

How: a CRC is a remainder of polynomials over GF(2). `n` bytes more shift what came before by `8 n` powers of x, so the
checksum of the first part is multiplied by that power, and that of the second part is added.

Rejected: reading the file again (500 MB take half a second of the loop, and are read from the disk if memory is short).
"""

from __future__ import annotations

_POLYNOMIAL = 0xEDB88320
"""CRC-32 as in `zlib`, the lowest power in the highest bit."""
_ONE = 1 << 31


def joined_crc(first: int, second: int, second_bytes: int) -> int:
    """The checksum of two parts together, from that of each and the length of the second.

    Also `zlib.crc32(part, first)` from `second = zlib.crc32(part)`.
    """
    power, factor = _ONE, 1 << 23  # x**0, x**8
    while second_bytes:
        if second_bytes & 1:
            power = _product(power, factor)
        factor = _product(factor, factor)
        second_bytes >>= 1
    return _product(power, first) ^ second


def _product(a: int, b: int) -> int:
    """Of two remainders, as a remainder."""
    total = 0
    while a:
        if a & _ONE:
            total ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return total
