"""File formats: from a path to a header, found by content and never by the suffix alone."""

from __future__ import annotations

from pathlib import Path

from ..errors import CorruptError, NotACheckpointError, ReadError, UnsupportedError
from . import dcp, safetensors, sharded, torch_legacy, torch_zip
from .header import Header

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
"""What files with weights are called; used to look through folders, never to choose a reader."""


def read_header(path: Path) -> Header:
    """Read what a checkpoint says about itself, without its payload.

    Args:
        path: a file, a folder with a sharded checkpoint, a single ``model.safetensors`` or what
            torch.distributed.checkpoint saved, or an ``index.json``.

    Raises:
        ReadError: missing, of no known format, or damaged.
    """
    try:
        if path.is_dir():
            as_dcp = sharded.checkpoint_inside(path) is None and dcp.is_folder(path)
            return dcp.read(path) if as_dcp else sharded.read_folder(path, _read_file)
        if path.name.endswith(sharded.INDEX_SUFFIXES):
            return sharded.read_index(path, path, _read_file)
        return _read_file(path)
    except FileNotFoundError as error:
        raise ReadError(f"{error.filename or path}: no such file.") from error
    except ValueError as error:  # a NUL byte
        raise ReadError(f"{str(path)!r}: no path ({error}).") from error
    except OSError as error:
        raise ReadError(f"{error.filename or path}: cannot be read ({error.strerror or error}).") from error


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is one checkpoint, rather than a place where checkpoints may stand."""
    return sharded.checkpoint_inside(folder) is not None or dcp.is_folder(folder)


def _read_file(path: Path) -> Header:
    if not path.is_file() and path.exists():
        raise ReadError(f"{path}: neither a file nor a folder.")
    if path.name == dcp.METADATA or path.name.endswith(dcp.SUFFIX):
        raise UnsupportedError(
            f"{path}: one file of the checkpoint that the folder holds. Give the folder: {path.parent}"
        )
    with path.open("rb") as file:
        start = file.read(len(torch_legacy.MAGIC))
        file.seek(257)
        tar = file.read(5) == b"ustar"
    if not start:
        raise CorruptError(f"{path}: empty file. Get a fresh copy.")
    if start.startswith(b"PK\3\4"):
        return torch_zip.read(path)
    if start == torch_legacy.MAGIC:
        return torch_legacy.read(path)
    if start[8:9] == b"{":
        return safetensors.read(path)
    if torch_legacy.MAGIC.startswith(start) or start.startswith(torch_legacy.MAGIC[:15]):
        raise CorruptError(f"{path}: truncated after {len(start)} bytes. Get a fresh copy.")
    if tar:
        raise UnsupportedError(
            f"{path}: a tar file; torch has not written any since 0.1.10. Load and save it with torch once."
        )
    raise NotACheckpointError(
        f"{path}: not a checkpoint: neither a torch file (zip or legacy) nor safetensors.{_hint(start)}"
    )


def _hint(start: bytes) -> str:
    if start.startswith(b"version https"):
        return " It is a Git LFS pointer; run git lfs pull."
    if start.startswith(b"\x80"):
        return " It is a pickle that torch.save did not write."
    if start.startswith(b"\x89HDF"):
        return " It is an HDF5 file."
    return ""


__all__ = ["SUFFIXES", "Header", "is_checkpoint", "read_header"]
