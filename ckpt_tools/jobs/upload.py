"""Upload: an output for a store of objects is made on this machine, checked, and then sent.

A store shows an object when all of it is there. Of a folder, the index goes last, so that whoever finds it finds the
shards, too.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CorruptError, UsageError, WriteError
from ..formats import FORMATS, read_header
from ..storage.remote import Address
from ..storage.remote.objects import Buckets
from ..storage.source import store_of
from .options import Output, Running, Sharing
from .verify.check import FAILED
from .verify.file import structure, zip_checksums

R = TypeVar("R")
O = TypeVar("O", bound=Output)  # noqa: E741 - an output
W = TypeVar("W", bound=Running)


def uploaded(address: Address, output: O, running: W, sharing: Sharing, job: Callable[[O, W], R]) -> R:
    """Run a job whose output goes to an address.

    Args:
        job: does it, with a local output instead. Its report has `out` and `written`.

    Returns:
        Its report, with the address.

    Raises:
        UsageError: the store is only read, or the job is done in parts.
        WriteError: something is there already; or the upload failed, and the output waits on this machine.
        CkptError: of the job; nothing is in the store then.
    """
    if sharing.part or sharing.finish or sharing.resume:
        raise UsageError("`out` is an address, and `part`, `finish` and `resume` need a local one, or a shared disk.")
    store = store_of(address)
    if not isinstance(store, Buckets):
        raise UsageError(f"{address}: is read, not written. An output goes to s3://, gs://, az://, or a local path.")
    store.refresh()
    there = _names_at(store, address)
    if there and not (output.force or running.dry_run):
        raise WriteError(
            f"{address}: exists already. Pass `force=True` to replace it, or choose another name with `out`."
        )
    show = running.on_plan
    on_plan = None if show is None else lambda plan: show(replace(plan, out=str(address)))
    home = Path(tempfile.mkdtemp(prefix="ckpt-upload-"))
    keep = False
    try:
        slash = "/" if str(output.out).endswith("/") else ""
        local = home / address.name
        report: Any = job(
            type(output)(**{**vars(output), "out": f"{local}{slash}"}),
            type(running)(**{**vars(running), "on_plan": on_plan}),
        )
        if report.written:
            keep = True
            _send(store, address, local, there)
            keep = False
    finally:
        if not keep:
            shutil.rmtree(home, ignore_errors=True)
    return replace(report, out=str(address))  # type: ignore[no-any-return]


def _send(store: Buckets, address: Address, local: Path, there: set[str]) -> None:
    header = read_header(local)
    for check in (structure(header), zip_checksums(header)):
        if check.result == FAILED:
            raise CorruptError(f"{local}: is not what was written ({check.detail}). Nothing was uploaded.")
    files = [path for path in local.rglob("*") if path.is_file()] if local.is_dir() else [local]
    names = {str(path.relative_to(local)): path for path in files} if local.is_dir() else {"": local}
    left = sorted(there - names.keys())
    if left:
        raise WriteError(
            f"{address}: holds {left[0] or 'an object of this name'}, which the new output would not. Choose a new "
            f"name. The output is in {local} meanwhile."
        )
    indexes = tuple(suffix for each in FORMATS for suffix in each.indexes)
    try:
        for name, path in sorted(names.items(), key=lambda item: (item[0].endswith(indexes), item[0])):
            store.put(address / name if name else address, path)
    except OSError as error:
        raise WriteError(
            f"{address}: uploading failed ({error.strerror}). The output is in {local}: upload it from there, the "
            "index last."
        ) from None


def _names_at(store: Buckets, address: Path) -> set[str]:
    """Return the names of the files of an older output, relative to the address; an empty one for a single file."""
    try:
        found = {""} if store.is_file(address) else set()
        waiting = [address]
        while waiting:
            folder = waiting.pop()
            for name in store.names(folder):
                child = folder / name
                if store.is_file(child):
                    found.add(str(child.relative_to(address)))
                else:
                    waiting.append(child)
    except OSError as error:
        raise WriteError(f"{address}: cannot be a target ({error.strerror}).") from None
    return found
