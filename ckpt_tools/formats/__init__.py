"""File formats: read the header of a checkpoint. The content decides the format, never the suffix alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import NotACheckpointError, ReadError, UnsupportedError
from ..storage.source import store_of
from .dcp import DCP_FOLDER
from .deepspeed import DEEPSPEED
from .format import FORMATS, Format, read_single
from .fsdp import FSDP_FOLDER
from .header import Header
from .hf_shards import HF_SHARDS
from .in_memory import IN_MEMORY
from .lightning_folder import LIGHTNING_FOLDER
from .megatron import MEGATRON
from .nemo import NEMO
from .pt2 import PT2
from .ranks import RANKS
from .safetensors import SAFETENSORS
from .sharded import SHARDED
from .torch_legacy import TORCH_LEGACY
from .torch_script import TORCH_SCRIPT
from .torch_zip import TORCH_ZIP

FORMATS[:] = [
    SHARDED, LIGHTNING_FOLDER, MEGATRON, DCP_FOLDER, HF_SHARDS, FSDP_FOLDER, RANKS, DEEPSPEED,
    IN_MEMORY, TORCH_ZIP, TORCH_SCRIPT, PT2, TORCH_LEGACY, SAFETENSORS, NEMO,
]  # fmt: skip


def suffixes(*, exports: bool = True) -> tuple[str, ...]:
    """Return the suffixes of weight files, to search folders; never to choose a reader.

    Args:
        exports: also those of models made ready for use, which lie in the folder of a training, but are no series.
    """
    return tuple(suffix for each in FORMATS if exports or not each.export for suffix in each.suffixes)


def holds_weights(name: str) -> bool:
    """Return True if a file of this name has weights, or lists those of its folder."""
    return name.endswith(tuple(suffix for each in FORMATS for suffix in (*each.suffixes, *each.indexes)))


def format_of(target: Path) -> Format:
    """Return the format for an output of this name: by its suffix, or sharded if no suffix is known.

    Raises:
        UnsupportedError: the suffix is of a format that is read only.
    """
    read_only = next(
        (each for each in FORMATS if not each.writes and target.name.endswith(each.suffixes or ("\0",))), None
    )
    if read_only is not None:
        raise UnsupportedError(
            f"{target.name}: {read_only.name} is read, not written. Choose another name for the output."
        )
    return next((each for each in FORMATS if each.writes and target.name.endswith(each.suffixes or ("\0",))), SHARDED)


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause the garbage collector, which would scan a hundred thousand new specs repeatedly and free none."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def read_header(path: Path) -> Header:
    """Read the header of a checkpoint, without its payload.

    Args:
        path: a file; a folder with a sharded checkpoint, a single ``model.safetensors`` or a
            torch.distributed.checkpoint; or an ``index.json``.

    Raises:
        ReadError: missing, of an unknown format, or damaged.
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
        names = store.names(path)
        folder = next((path / n for n in names if store.is_folder(path / n) and is_checkpoint(path / n)), None)
        file = next((path / n for n in names if holds_weights(n) and store.is_file(path / n)), None)
        inside = folder or file
        raise NotACheckpointError(
            f"{path}: a folder of checkpoints, not one checkpoint. Name one in it, such as {inside}"
            if inside
            else f"{path}: not a checkpoint: the folder has no model.safetensors, index.json or *.distcp."
        )
    except OSError as error:
        raise ReadError(f"{error.filename or path}: cannot be read ({error.strerror or error}).") from error


def is_checkpoint(folder: Path) -> bool:
    """Return True if a folder is itself a checkpoint."""
    return any(each.folder and each.sniff(folder, b"") for each in FORMATS)


__all__ = ["FORMATS", "Format", "Header", "format_of", "holds_weights", "is_checkpoint", "read_header", "suffixes"]
