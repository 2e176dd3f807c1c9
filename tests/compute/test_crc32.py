"""CRC-32 of a whole from its parts, against zlib's CRC of the whole."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.compute.crc32 import combine


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_combine_joins_any_split_to_the_whole(parts: list[bytes]) -> None:
    total = 0
    for part in parts:
        total = combine(total, zlib.crc32(part), len(part))

    assert total == zlib.crc32(b"".join(parts))


@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=200))
def test_combine_groups_parts_in_any_way(a: bytes, b: bytes, c: bytes) -> None:
    left = combine(combine(zlib.crc32(a), zlib.crc32(b), len(b)), zlib.crc32(c), len(c))
    right = combine(zlib.crc32(a), combine(zlib.crc32(b), zlib.crc32(c), len(c)), len(b) + len(c))

    assert left == right == zlib.crc32(a + b + c)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 255, 256, 65536, 1_000_003])
def test_combine_ignores_empty_parts(length: int) -> None:
    whole = zlib.crc32(random.Random(length).randbytes(length))

    assert combine(whole, zlib.crc32(b""), 0) == whole
    assert combine(zlib.crc32(b""), whole, length) == whole


def test_combine_takes_lengths_beyond_32_bits() -> None:
    head, block = zlib.crc32(b"head"), bytes(1 << 26)
    whole, zeros = zlib.crc32(block, head), zlib.crc32(block)
    assert combine(head, zeros, 1 << 26) == whole

    # From there on the law is the oracle: to append twice as many zeros is to append the zeros twice.
    for power in range(26, 40):
        whole = combine(whole, zeros, 1 << power)
        zeros = combine(zeros, zeros, 1 << power)
        assert combine(head, zeros, 2 << power) == whole
        whole = combine(head, zeros, 2 << power)
