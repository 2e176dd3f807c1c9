"""Targets: what an output may be called, which format its name asks for, and what it may replace.

All of it is found out before any work is done; see `formats.staged` for the writing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ReadError, UsageError, WriteError
from ..formats import format_of, suffixes
from ..formats.dcp import METADATA
from ..formats.dcp import SUFFIX as DISTCP
from ..formats.header import Header
from ..formats.sharded import INDEX_SUFFIXES, SINGLE, read_weight_map
from ..storage.staged import same_file


def default_target(headers: list[Header]) -> Path:
    """Name the output as its inputs suggest."""
    if all(header.shards for header in headers):
        return Path("averaged")
    usual = {header.file_format.usual_suffix for header in headers}
    return Path("averaged" + (usual.pop() if len(usual) == 1 else ".pth"))


def named_after(source: Path, tail: str) -> Path:
    """Name an output after its input, with something before the suffix: ``last-bn.pth``."""
    suffix = next((s for s in (".pth.tar", *suffixes()) if source.name.endswith(s)), "")
    return source.with_name(f"{source.name.removesuffix(suffix)}{tail}{suffix}")


def check_suffix(target: Path) -> None:
    """Refuse a suffix that says nothing about the format.

    Raises:
        UsageError: neither a known suffix nor none at all.
    """
    if target.suffix and not os.path.isdir(target) and not target.name.endswith(suffixes()):  # noqa: PTH112 - never raises
        raise UsageError(
            f"{target}: the suffix should be one of {' '.join(suffixes())}, or none for a folder of shards."
        )


def check_same_format(base: Header, target: Path) -> None:
    """Refuse a suffix that asks for another format than the checkpoint has.

    Raises:
        UsageError: it does.
    """
    check_suffix(target)
    wanted_suffixes = base.format.written_as.suffixes
    folder = base.path.is_dir()
    if folder != format_of(target).folder or not (folder or target.name.endswith(wanted_suffixes)):
        wanted = "a folder" if folder else f"a file named *{' or *'.join(wanted_suffixes)}"
        raise UsageError(f"{target}: the checkpoint is {wanted}, and stays one. Choose another name with -o.")


def check_shard_size(target: Path, max_shard_size: int | None) -> None:
    """Refuse a size of shards where there are none.

    Raises:
        UsageError: the target is one file.
    """
    if max_shard_size is not None and not format_of(target).folder:
        raise UsageError("--max-shard-size needs a folder: give -o a name without suffix.")


def check_target(target: Path, inputs: Iterable[Path], *, nbytes: int, force: bool, folder: bool) -> None:
    """Refuse a target before any work is done.

    Args:
        inputs: files and folders that must stay as they are.
        nbytes: size of the output.
        force: replace what is there.
        folder: the target is a folder of shards.

    Raises:
        WriteError: the target exists, is an input or inside one, cannot be written, or does not fit on the disk.
    """
    with _looking_at(target):
        parent = target.absolute().parent
        if parent.exists() and not parent.is_dir():
            raise WriteError(f"{target}: {parent} is a file, not a folder. Choose another place with -o.")
        if not parent.is_dir():
            raise WriteError(f"{target}: there is no folder {parent}. Make it first: mkdir -p {parent}")
        resolved = target.resolve()
        around, there = set(resolved.parents), resolved.exists()
        for path in dict.fromkeys(inputs):
            source = path.resolve()
            if resolved == source or (there and same_file(resolved, source)):
                raise WriteError(
                    f"{target}: is one of the inputs, which are never changed. Choose another name with -o."
                )
            if source in around and source.is_dir():
                raise WriteError(
                    f"{target}: lies inside the input {path}, which is never changed. Choose another place with -o."
                )
            if folder and resolved in source.parents:
                raise WriteError(
                    f"{target}: holds the input {path}, which is never changed. Choose another folder with -o."
                )
        if folder and resolved in (Path.cwd(), *Path.cwd().parents):
            raise WriteError(f"{target}: is the folder you are in, or around it. Choose another folder with -o.")
        if target.exists() and target.is_dir() != folder:
            kind = "a folder" if target.is_dir() else "a file"
            raise WriteError(f"{target}: is {kind} already. Choose another name with -o.")
        if target.exists() and not (folder or target.is_file()):
            raise WriteError(f"{target}: is no regular file. Choose another name with -o.")
        # A link is replaced itself, as any file is; what it leads to stays as it was.
        if not force and os.path.lexists(target) and (not folder or target.is_symlink() or any(target.iterdir())):
            raise WriteError(f"{target}: exists already. Pass --force to replace it, or choose another name with -o.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise WriteError(f"{target}: the folder {parent} is not writable for you. Choose another place with -o.")
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            raise WriteError(
                f"{target}: needs {nbytes:,} bytes, and {parent} has {free:,} left. "
                "Free some space or choose another place with -o."
            )


@contextmanager
def _looking_at(target: Path) -> Iterator[None]:
    """Refuse a target that cannot even be looked at: a name too long, a loop of links, a zero byte, no rights."""
    try:
        yield
    except (ReadError, OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WriteError(f"{target}: cannot be a target ({reason}). Choose another name with -o.") from error


def check_replaceable(folder: Path, names: Iterable[str]) -> None:
    """Refuse to replace a folder that holds anything but what takes its place, or an older output of that kind.

    Args:
        names: files that the new folder will hold.

    Raises:
        WriteError: names a file that would be lost.
    """
    with _looking_at(folder):
        if not folder.is_dir():
            return
        index = next((child for child in folder.iterdir() if child.name.endswith(INDEX_SUFFIXES)), None)
        known = {*names}
        if METADATA in known:
            known |= {child.name for child in folder.iterdir() if child.name.endswith(DISTCP)}
        known |= {*SINGLE} | ({index.name, *read_weight_map(index).values()} if index is not None else set())
        for child in sorted(folder.iterdir()):
            if child.name not in known or not child.is_file():
                raise WriteError(
                    f"{folder}: holds {child.name}, which the new folder would not. Choose a new folder with -o."
                )
