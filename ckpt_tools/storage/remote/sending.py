"""Sending: files of this machine as objects of a store, each of which is there whole or not at all."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import obstore
from obstore import exceptions

from ...errors import WriteError
from ..source import store_of
from .addresses import Address
from .objects import Buckets, Objects, Place, asked, refused

CLAIM = ".ckpt-upload.json"
"""Name of an object that is in a folder as long as its files are sent."""
_PART = 16 << 20
"""Bytes of a part of an object; more where there would be more parts than S3 takes."""
_MOST_PARTS = 9000
_PARTS_AT_ONCE = 8


def bucket_of(target: Address) -> Buckets:
    """Return the store of an address, if it takes objects.

    Raises:
        WriteError: it does not, or the address names a bucket alone.
    """
    store: Any = store_of(target)
    if not isinstance(store, Buckets):
        scheme = target.parts[0][:-1]
        way = "upload it with `hf upload`" if scheme == "hf" else "upload it"
        raise WriteError(f"{target}: nothing is written to {scheme}://. Write to a local file, and {way} afterwards.")
    if len(target.parts) <= Objects.root:
        raise WriteError(f"{target}: there is no name behind the bucket. Choose one with `out`.")
    return store


def send(path: Path, target: Address, on_bytes: Callable[[int], None]) -> None:
    """Send a file; the object is there, in the place of an old one, when the last part has come.

    Args:
        on_bytes: called with the size of each part that was taken from the file.

    Raises:
        WriteError: the store refuses.
    """
    place, nbytes = _place(target), path.stat().st_size
    part = max(_PART, -(-nbytes // _MOST_PARTS))
    try:
        if nbytes <= part:
            asked(obstore.put, place.client, place.key, path, use_multipart=False)
            on_bytes(nbytes)
        else:
            parts = _parts(path, part, on_bytes)
            asked(obstore.put, place.client, place.key, parts, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)
        found = asked(obstore.head, place.client, place.key)["size"]
    except _FAILURES as error:
        raise _failed(error, target) from None
    finally:
        bucket_of(target).forget(target)
    if found != nbytes:
        raise WriteError(f"{target}: has {found:,} bytes, and {nbytes:,} were sent. Did another job write it, too?")


def claim(folder: Address, names: Sequence[str], *, force: bool) -> None:
    """Tell other jobs that this one sends files to a folder; `remove` the claim at the end.

    Args:
        names: of the files.
        force: where a job was killed, its claim is still there; take it over.

    Raises:
        WriteError: there is a claim, or the store refuses.
    """
    place = _place(folder / CLAIM)
    said = json.dumps({"names": [*names], "host": platform.node(), "process": os.getpid()}).encode()
    try:
        asked(obstore.put, place.client, place.key, said, mode="overwrite" if force else "create")
    except exceptions.AlreadyExistsError:
        raise WriteError(
            f"{folder}: another job sends files to it, or was killed meanwhile. If none does, pass `force=True`."
        ) from None
    except _FAILURES as error:
        raise _failed(error, folder) from None


def remove(targets: Iterable[Address]) -> None:
    """Remove objects that are there.

    Raises:
        WriteError: the store refuses.
    """
    for target in targets:
        place = _place(target)
        try:
            asked(obstore.delete, place.client, place.key)
        except FileNotFoundError:
            continue
        except _FAILURES as error:
            raise _failed(error, target) from None


_FAILURES = (exceptions.BaseError, OSError, ValueError)


def _parts(path: Path, nbytes: int, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(nbytes):
            yield data
            on_bytes(len(data))


def _place(target: Address) -> Place:
    return bucket_of(target).place(target)


def _failed(error: BaseException, target: Address) -> WriteError:
    told = refused(error, target)
    reason = told.strerror if isinstance(told, OSError) else str(told)
    return WriteError(f"{target}: writing failed: {reason}.")
