"""File formats: from a path to a header, found by content and never by the suffix alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import NotACheckpointError, ReadError
from ..storage.source import store_of
from .dcp import DCP_FOLDER
from .format import FORMATS, Format, read_single
from .header import Header
from .safetensors import SAFETENSORS
from .sharded import SHARDED
from .torch_legacy import TORCH_LEGACY
from .torch_zip import TORCH_ZIP

FORMATS[:] = [SHARDED, DCP_FOLDER, TORCH_ZIP, TORCH_LEGACY, SAFETENSORS]


def suffixes() -> tuple[str, ...]:
    """Return the suffixes of files with weights; for looking through folders, never to choose a reader."""
    return tuple(suffix for each in FORMATS for suffix in each.suffixes)


def format_of(target: Path) -> Format:
    """Return the format that the name of an output asks for: by its suffix, or shards if it has none."""
    return next((each for each in FORMATS if each.writes and target.name.endswith(each.suffixes or ("\0",))), SHARDED)


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector from looking at a hundred thousand new specs again and again; none is garbage."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def read_header(path: Path) -> Header:
    """Read what a checkpoint says about itself, without its payload.

    Args:
        path: a file, a folder with a sharded checkpoint, a single ``model.safetensors`` or what
            torch.distributed.checkpoint saved, or an ``index.json``.

    Raises:
        ReadError: missing, of no known format, or damaged.
    """
    with without_collector():
        return _read_header(path)


def _read_header(path: Path) -> Header:
    try:
        store = store_of(path)
        if not store.is_folder(path):
            if not store.is_file(path) and path.exists():
                raise ReadError(f"{path}: neither a file nor a folder.")
            return read_single(path)
        for each in FORMATS:
            if each.folder and each.sniff(path, b""):
                return each.read(path)
        files = any(store.is_file(path / name) for name in store.names(path))
        raise NotACheckpointError(
            f"{path}: a folder without model.safetensors, an index.json or *.distcp: no checkpoint."
            + (" Give one of its files." if files else "")
        )
    except OSError as error:
        raise ReadError(f"{error.filename or path}: cannot be read ({error.strerror or error}).") from error


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is one checkpoint, rather than a place where checkpoints may be."""
    return any(each.folder and each.sniff(folder, b"") for each in FORMATS)


__all__ = ["FORMATS", "Format", "Header", "format_of", "is_checkpoint", "read_header", "suffixes"]
