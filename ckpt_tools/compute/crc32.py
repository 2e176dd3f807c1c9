"""CRC-32 of joined bytes from the CRC-32 of each, so that threads can compute checksums in any order.

A CRC is the remainder of a polynomial over GF(2); appending n bytes multiplies the polynomial of the bytes before
by x^(8n). The method is that of zlib's crc32_combine, which Python does not expose.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # the zip one, bits reversed: the highest bit is x^0
_ONE = 1 << 31


def combine(first: int, second: int, second_length: int) -> int:
    """Return the CRC-32 of A + B from those of A and of B.

    Args:
        first, second: the two checksums.
        second_length: bytes in B.
    """
    return _multiply(_x_to(8 * second_length), first) ^ second


def _multiply(a: int, b: int) -> int:
    product = 0
    bit = _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=256)
def _x_to(power: int) -> int:
    result, square = _ONE, _ONE >> 1
    while power:
        if power & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        power >>= 1
    return result
