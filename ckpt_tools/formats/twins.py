"""Twins: files of a series whose headers are the same bytes, so that one is parsed for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tensors import Storage, TensorSpec


def moved(tensors: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """Copy a dict whose tensors stand at the same places of another file."""
    copy = {}
    for name, spec in tensors.items():
        if type(spec) is TensorSpec:
            at = spec.storage
            storage = Storage(path, at.offset, at.nbytes, at.big_endian)
            copy[name] = TensorSpec(spec.dtype, spec.shape, spec.stride, spec.start, storage)
        else:
            copy[name] = spec
    return copy
