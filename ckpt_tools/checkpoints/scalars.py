"""Scalars: numbers that a checkpoint stores as tensors of one element, read without torch."""

from __future__ import annotations

import struct
from typing import Any

from ..formats.header import Header
from ..formats.template import in_own_files
from ..storage.source import OpenFiles, read_at
from ..tensors import TensorSpec

_CODES = {
    "int64": "q", "int32": "i", "int16": "h", "int8": "b", "uint8": "B",
    "float64": "d", "float32": "f", "float16": "e", "bfloat16": "f",
}  # fmt: skip


def as_number(header: Header, value: Any) -> Any:
    """Return the number in a tensor of one element; any other value, a chunked tensor too, as it is.

    Args:
        value: of the tree or the content of the header.

    Raises:
        ReadError: the file cannot be read, or has changed since its header was read.
    """
    if type(value) is not TensorSpec or value.numel != 1 or value.dtype.name not in _CODES:
        return value
    spec: TensorSpec = in_own_files(value, header.places)
    raw = bytearray(spec.dtype.itemsize)
    with OpenFiles(header.files) as files:
        files.open(spec.storage.path)
        read_at(files[spec.storage.path], memoryview(raw), spec.begin, spec.storage.path)
    big = spec.storage.big_endian
    if spec.dtype.name == "bfloat16":  # the upper half of a float32
        raw[2 * big : 2 * big] = bytes(2)
    return struct.unpack((">" if big else "<") + _CODES[spec.dtype.name], raw)[0]
