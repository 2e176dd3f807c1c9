"""Uploads: an output in a store is written on this machine, checked, and sent; what makes it readable comes last."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from ..errors import CkptError, ReadError, WriteError, WriteWarning
from ..formats import read_header
from ..series.paths import one_checkpoint
from ..storage.hidden import hidden_folder
from ..storage.remote import Address, sending
from ..storage.staged import PLACED
from .assembly import Assembly
from .outputs import grows_at

_INDEXES = (".index.json", ".metadata")


@contextmanager
def uploading(assembly: Assembly, on_bytes: Callable[[int], None], *, force: bool) -> Iterator[Assembly]:
    """Give a place on this machine for an output in a store, and send what is there when the block ends.

    A file is an object that appears when its last byte has come. Of a folder, the last file is the index, without
    which nothing finds the others; an old index goes first.

    Args:
        on_bytes: called with the number of bytes that were sent since the last call.
        force: replace what is there.

    Yields:
        The output, with the place as its target.

    Raises:
        WriteError: this machine or the store refuses, or what was written here cannot be read; the output is not
            there then. If only the sending failed, the message says where it is on this machine.
    """
    target: Any = assembly.target
    here = grows_at(target)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(hidden_folder(here))
        except OSError as error:
            raise WriteError(
                f"{target}: nothing can be written in {here.parent} ({error.strerror}). Set TMPDIR to a folder with "
                "room for it."
            ) from error
        made = folder / here.name
        yield replace(assembly, target=made)
        _check(made, target)
        try:
            if assembly.folder:
                names = [path.name for path in assembly.companions] + [plan.name for plan in assembly.files]
                _send_folder(made, target, names, on_bytes, force=force)
            else:
                _send_file(made, target, on_bytes, force=force)
            PLACED.append(target)
        except (WriteError, ReadError, OSError) as error:
            raise WriteError(
                f"{_words(error, target)} The output is in {_kept(made, here)}: send it from there."
            ) from None


def _words(error: Exception, target: Path) -> str:
    return f"{target}: {error.strerror or error}." if isinstance(error, OSError) else str(error)


def _kept(made: Path, here: Path) -> Path:
    """Move an output that could not be sent to where it stays; return the path."""
    place = here.with_name(f"ckpt-{token_hex(4)}")
    place.mkdir()
    return made.rename(place / made.name)


def _check(made: Path, target: Address) -> None:
    """Read what is to be sent, as `verify` does.

    Raises:
        WriteError: it is not what was written.
    """
    from .verify.file import structure, zip_checksums

    try:
        header = read_header(one_checkpoint(made))  # Megatron-LM's is a folder in the folder
        faults = [each.detail for each in (structure(header), zip_checksums(header)) if each.result == "failed"]
    except CkptError as error:
        faults = [str(error)]
    if faults:
        raise WriteError(f"{target}: what was written on this machine is damaged: {faults[0]} Nothing was sent.")


def _send_file(made: Path, target: Address, on_bytes: Callable[[int], None], *, force: bool) -> None:
    sending.bucket_of(target).forget(target)
    if not force and target.is_file():
        raise WriteError(f"{target}: has been written by another job meanwhile. Nothing was replaced.")
    sending.send(made, target, on_bytes)


def _send_folder(
    made: Path, target: Address, names: Sequence[str], on_bytes: Callable[[int], None], *, force: bool
) -> None:
    """Send the files of a folder in order; the last one makes it readable.

    Raises:
        WriteError: the store refuses, or has another output meanwhile; what was sent is removed again.
    """
    *others, last = names
    sending.claim(target, names, force=force)
    sent: list[Address] = []
    try:
        sending.bucket_of(target).forget(target)
        old = [name for name in _files_in(target) if name != sending.CLAIM]
        if old and not force:
            raise WriteError(f"{target}: has been written by another job meanwhile. Nothing was replaced.")
        sending.remove(target / name for name in old if name == last or name.endswith(_INDEXES))
        for name in (*others, last):
            sent.append(target / name)
            sending.send(made / name, target / name, on_bytes)
    except BaseException:
        with suppress(WriteError):
            sending.remove([*sent, target / sending.CLAIM])
        raise
    try:
        sending.remove([*(target / name for name in old if name not in names), target / sending.CLAIM])
    except WriteError as error:
        warnings.warn(f"{target} is complete. What is of no use any more cannot be removed: {error}", WriteWarning, 2)


def _files_in(folder: Address) -> list[str]:
    """Return the names of all files below a folder."""
    found: list[str] = []
    waiting = [folder]
    while waiting:
        for child in waiting.pop().iterdir():
            if child.is_file():
                found.append(child.relative_to(folder).as_posix())
            else:
                waiting.append(child)
    return found
