"""JSON files beside weights, such as configurations."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from ..errors import ReadError
from ..storage.source import InputFile, Stamp, store_of

LARGEST = 100 << 20
"""Bytes of a file beside weights; the largest vocabularies take 40 MB."""


def read_small(path: Path, most: int = LARGEST) -> tuple[bytes, Stamp]:
    """Return the content and the stamp of a file beside weights.

    Raises:
        ReadError: it cannot be read, or has more than `most` bytes.
    """
    with InputFile(path) as file:
        size = file.stamp.nbytes
        if size > most:
            raise ReadError(f"{path}: {size} bytes are too many for such a file; at most {most} are read.")
        return file.read(0, size), file.stamp


def parse_json(raw: str | bytes) -> Any:
    """Parse JSON, in UTF-8. `json.loads` guesses the encoding of bytes, and imports a module of it.

    Raises:
        ValueError: it is not valid.
        RecursionError: it is nested deeply.
    """
    if isinstance(raw, bytes):
        raw = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass")
    return json.loads(raw)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a small file; empty if there is no such file.

    Raises:
        ReadError: it is not valid, or too large.
    """
    if not store_of(path).is_file(path):  # which a pipe is not, either
        return {}
    try:
        found = parse_json(read_small(path)[0])
        if not isinstance(found, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ReadError(f"{path}: no valid configuration ({error}).") from error
    return found
