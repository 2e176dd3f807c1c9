"""Verifying a file by itself: CRC-32, values, other readers, and digests that its user or its record knows."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compute.hashes import file_hashes
from ...compute.progress import LOADING_TORCH, Activity, Progress, counted, uncounted
from ...errors import CkptError, SeriesError, UsageError
from ...formats.header import Header
from ...formats.json_file import read_small
from ...formats.safetensors import SAFETENSORS
from ...formats.sharded import INDEX_SUFFIXES, SINGLE, checkpoint_inside, read_weight_map
from ...formats.torch_legacy import TORCH_LEGACY
from ...formats.torch_zip import TORCH_ZIP
from ...formats.tree import tensors_in
from ...formats.zip_check import archives, check
from ...series.paths import as_path
from ...series.shards import rank_note, refuse_part
from ...storage.source import LOCAL, store_of
from ...tensors import TensorSpec, UnsupportedTensor
from ..checksums import Checksum, read_checksums
from ..options import Reading, Verification
from .check import FAILED, NOT_CHECKED, OK, Check
from .names import Stored, paired, stored_tensors

if TYPE_CHECKING:
    from ...compute.digest import Digest

_MOST_LIST = 10 << 20
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")  # as sha256sum writes it
_ESCAPE = re.compile(r"\\([\\nr])")
_ESCAPED = {"\\": "\\", "n": "\n", "r": "\r"}


def structure(header: Header) -> Check:
    """Report what the reader has checked: offsets, shapes, names, an index against its shards, chunks that fit.

    Beside an index, there must be no file that libraries load in place of the shards.
    """
    if header.shards and header.in_folder:
        there = {*store_of(header.path).names(header.path)}
        both = [name for name in SINGLE if {name, f"{name}.index.json"} <= there]
        if both:
            return Check("structure", FAILED, f"{both[0]} is beside the index of shards, and is loaded in their place")
    n, files = sum(1 for _ in tensors_in(header.tree)), len(header.files)
    more = f" in {files} files" if files > 1 else ""
    return Check("structure", OK, f"{header.format.name}, {_plural(n, 'tensor')}{more}")


def zip_checksums(header: Header, on_progress: Progress | None = None) -> Check:
    """Check the zip archives of a checkpoint."""
    name, checked, without, found = "crc32", 0, 0, 0
    try:
        places = [*archives(header)]
        total = sum(place.nbytes for place in places)
        tell = counted(on_progress if places else None, Activity("checking crc32"), total) or (lambda _: None)
        before = 0
        for place in places:
            records = check(place, partial(_told_after, tell, before))
            before += place.nbytes
            if records.fault is not None:
                return Check(name, FAILED, records.fault)
            found, checked, without = found + 1, checked + records.checked, without + records.without
    except CkptError as error:
        return Check(name, FAILED, str(error))
    if not found:
        return Check(name, NOT_CHECKED, f"{header.file_format.name} has none")
    if without:
        return Check(name, NOT_CHECKED, f"{without} of {_plural(checked + without, 'record')} have no CRC-32")
    return Check(name, OK, f"{_plural(checked, 'record')}, and every byte around them")


def _told_after(tell: Callable[[int], None], before: int, nbytes: int) -> None:
    tell(before + nbytes)


def tensors(header: Header, asked: Verification, running: Reading) -> Iterator[Check]:
    """Check for one read that values are finite, and tensors those whose SHA-256 is recorded."""
    stored = stored_tensors(header)
    recorded, damaged = None, ""
    try:
        recorded = read_checksums(header.provenance or {})
    except ValueError as error:
        damaged = f"{header.path}: {error}"
    specs = [*dict.fromkeys(each.tensor for each in stored if isinstance(each.tensor, TensorSpec))]
    try:
        found = dict(zip(specs, _digests(specs, header, running, hashed=recorded is not None), strict=True))
    except CkptError as error:
        yield Check("finite", FAILED, str(error))
        recorded = None
    else:
        yield _finite(stored, found, allowed=asked.allow_nonfinite)
    if damaged:
        yield Check("checksums", FAILED, damaged)
    if recorded is not None:
        yield _recorded(recorded, stored, found, part=_has_others(header.path))


def _finite(stored: Sequence[Stored], found: Mapping[TensorSpec, Digest], *, allowed: bool) -> Check:
    nonfinite = [(each.name, found[each.tensor]) for each in stored if isinstance(each.tensor, TensorSpec)]
    nonfinite = [(name, each) for name, each in nonfinite if each.first is not None]
    unread = [(each.name, each.tensor.reason) for each in stored if isinstance(each.tensor, UnsupportedTensor)]
    seen = []
    if nonfinite:
        name, first = nonfinite[0]
        counts = [f"{first.nans} NaN"] * bool(first.nans)
        counts += [f"{first.infinities} infinit{'y' if first.infinities == 1 else 'ies'}"] * bool(first.infinities)
        more = f"; so has or have {len(nonfinite) - 1} more" if nonfinite[1:] else ""
        said = f"'{name}' has {' and '.join(counts)}, the first at {[*(first.first or ())]}{more}"
        if not allowed:
            return Check("finite", FAILED, said)
        seen.append(f"{said} (allowed)")
    if unread:
        name, reason = unread[0]
        seen.append(f"{len(unread)} of {_plural(len(stored), 'tensor')}: '{name}' is {reason}")
    said = "; ".join(seen) or f"every value of {_plural(len(stored), 'tensor')}"
    return Check("finite", NOT_CHECKED if unread else OK, said)


def _recorded(
    recorded: Mapping[str, Checksum], stored: Sequence[Stored], found: Mapping[TensorSpec, Digest], *, part: bool
) -> Check:
    whole = f" of the {len(recorded)} that are recorded of the whole checkpoint" if part else ""
    if part:
        recorded = {each.name: recorded[each.name] for each in stored if each.name in recorded}
    pairing = paired(recorded, stored)
    fault = pairing.fault
    for name, old in pairing.names.items():
        tensor, wanted = pairing.tensors[name], recorded[old]
        if isinstance(tensor, UnsupportedTensor):
            fault = fault or f"'{name}' is {tensor.reason}"
        elif (tensor.dtype.name, tensor.shape) != (wanted.dtype, wanted.shape):
            was = f"{wanted.dtype} {[*wanted.shape]}"
            fault = fault or f"'{name}' is {tensor.dtype.name} {[*tensor.shape]}, and was {was}"
        elif found[tensor].sha256 != wanted.sha256:
            fault = fault or f"the SHA-256 of '{name}' is not that in the record"
    also = f"; {pairing.renamed}" if pairing.renamed else ""
    said = f"SHA-256 of {_plural(len(recorded), 'tensor')}{whole}{also}"
    return Check("checksums", FAILED if fault else OK, fault or said)


def _has_others(path: Path) -> bool:
    """True for a part of a checkpoint whose other parts are beside it: the name alone may be that of a whole file."""
    try:
        index = checkpoint_inside(path.parent)
        if index is not None and index.name.endswith(INDEX_SUFFIXES) and path.name in read_weight_map(index).values():
            return True
    except (CkptError, OSError):
        pass  # no index that lists it
    return rank_note(path) is not None


def part_of(header: Header) -> str:
    """Return of what a checkpoint is a part, in words; empty if it is whole."""
    try:
        refuse_part(header.path)
    except SeriesError as error:
        return str(error)
    return ""


def _digests(specs: list[TensorSpec], header: Header, running: Reading, *, hashed: bool) -> list[Digest]:
    with uncounted(running.on_progress, LOADING_TORCH):
        from ...compute.digest import digests

    tell = counted(running.on_progress, Activity("verifying"), sum(spec.nbytes for spec in specs))
    return digests(specs, hashed=hashed, stamps=header.files, threads=running.threads, on_progress=tell)


def loads(header: Header) -> Check:
    """Load the files with the library of their format, which runs no code in them and leaves values on the disk."""
    name, form = "loads", header.file_format
    if store_of(header.path) is not LOCAL:
        return Check(name, NOT_CHECKED, "the libraries read local files alone")
    paths = [stamp.path for stamp in header.files if not stamp.path.name.endswith(".json")]
    if not all(map(_is_utf8, paths)):
        return Check(name, NOT_CHECKED, "the libraries open no file whose path is not UTF-8")
    if form is SAFETENSORS:
        return _each(paths, "safetensors.safe_open", lambda path: _open_safetensors(path, header))
    if form in (TORCH_ZIP, TORCH_LEGACY):
        how = "torch.load(weights_only=True" + (", mmap=True)" if form is TORCH_ZIP else ")")
        whole = header.tree if len(paths) == 1 else None
        return _each(paths, how, lambda path: _load_torch(path, whole, mapped=form is TORCH_ZIP))
    return Check(name, NOT_CHECKED, f"no library loads the format {form.name} without a risk to run code in it")


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _each(paths: list[Path], how: str, load: Callable[[Path], str | None]) -> Check:
    for path in paths:
        fault = load(path)
        if fault is not None:
            return Check("loads", FAILED, f"{how} of {path.name}: {fault}")
    return Check("loads", OK, how + (f" of {len(paths)} files" if len(paths) > 1 else ""))


def _load_torch(path: Path, tree: Any, *, mapped: bool) -> str | None:
    """Load a file, whose pickle has been read and found harmless; return what is wrong with it."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True if mapped else None)
    except Exception as error:  # noqa: BLE001 - whatever the library raises
        return _refusal(error)
    ours = [tensor for _, tensor in tensors_in(tree)]
    if tree is None or any(isinstance(each, UnsupportedTensor) for each in ours):
        return None
    mine = Counter((each.dtype.name, each.shape) for each in ours if isinstance(each, TensorSpec))
    theirs = Counter((str(each.dtype).removeprefix("torch."), tuple(each.shape)) for each in _tensors(loaded))
    return None if mine == theirs else "it finds other tensors than ckpt-tools does"


def _refusal(error: Exception) -> str:
    """Say why a library does not load a file; torch says at length how to load anyway."""
    if isinstance(error, OSError) and error.strerror:
        return f"reading failed ({error.strerror})"
    text = str(error)
    refused = re.search(r"Unsupported (?:global|class|operand)[^\n]*?(?: was not|$)", text)
    name = re.search(r"GLOBAL ([\w.]+)", text)
    if name is not None:
        return f"refuses {name[1]}. `convert(to='plain')` writes a file without it."
    return (refused[0] if refused else text.strip().split("\n")[0]) or type(error).__name__


def _tensors(node: Any) -> Iterator[Any]:
    """Yield the tensors of a loaded object, each place once as `tensors_in` does."""
    import torch

    waiting, seen = [node], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, (dict, list, tuple)) and id(each) not in seen:
            seen.add(id(each))
            waiting += each.values() if isinstance(each, dict) else each


def _open_safetensors(path: Path, header: Header) -> str | None:
    """Open a file; return what is wrong with it."""
    from safetensors import safe_open

    tree: Mapping[str, Any] = header.tree
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                part, spec = file.get_slice(key), tree.get(key)
                theirs = part.get_dtype(), tuple(part.get_shape())
                if spec is None or (isinstance(spec, TensorSpec) and (spec.dtype.safetensors, spec.shape) != theirs):
                    return f"it finds another '{key}' than ckpt-tools does"
    except Exception as error:  # noqa: BLE001 - whatever the library raises
        return _refusal(error)
    return None


def digest(header: Header, expected: str, on_progress: Progress | None) -> Check:
    """Check the SHA-256 of whole files.

    Args:
        expected: 64 hexadecimal digits, or a file with lines as `sha256sum` writes them.
        on_progress: called with (what is done, bytes hashed, bytes in all).

    Raises:
        UsageError: digits for several files, or no list.
    """
    names = header.names
    wanted: dict[str, set[str]]
    compared: Mapping[str, Path] = names
    if is_digest(expected):
        if len(names) > 1:
            raise UsageError(
                f"`expect_sha256`: {header.path} has {len(names)} files. Give a list of theirs, as sha256sum writes it."
            )
        wanted = {name: {expected.lower()} for name in names}
    else:
        wanted, inside = _listed(as_path(expected), header)
        if header.in_folder:  # what else of the folder is listed: a tokenizer, a configuration
            made_there = any(name in wanted and name not in inside for name in names)
            others = sorted({*wanted} - names.keys()) if made_there else sorted(inside - names.keys())
            compared = names | {name: header.path / name for name in others if _is_below(name)}
    lacking = [name for name in names if name not in wanted]
    if lacking:
        return Check("sha256", FAILED, f"{expected} does not list '{lacking[0]}'")
    gone = next((name for name, path in compared.items() if not store_of(path).is_file(path)), None)
    if gone is not None:
        return Check("sha256", FAILED, f"{expected} lists '{gone}', which is not there")
    try:
        found = file_hashes(compared.values(), on_progress)
        wrong = [name for name, path in compared.items() if {found[path]} != wanted[name]]
    except CkptError as error:
        return Check("sha256", FAILED, str(error))
    if wrong:
        return Check("sha256", FAILED, f"'{wrong[0]}' has another SHA-256 than expected")
    return Check("sha256", OK, "that of the file" if len(compared) == 1 else f"those of {len(compared)} files")


def is_digest(text: str) -> bool:
    """True for a SHA-256 in hexadecimal digits."""
    return re.fullmatch("[0-9a-fA-F]{64}", text) is not None


def _is_below(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _listed(path: Path, header: Header) -> tuple[dict[str, set[str]], set[str]]:
    """Return the digests in a list by the names of the files in their folder.

    sha256sum writes names as it was given them: the path of a file from here, too, or the name in its folder.

    Returns:
        The digests; and those of the names whose paths lead into the folder. What the others name is known only if the
        list was made in the folder.
    """
    try:
        text = read_small(path, _MOST_LIST)[0].decode("utf-8", "surrogateescape")
    except CkptError as error:
        raise UsageError(f"`expect_sha256`: 64 hexadecimal digits, or a list of them: {error}") from error
    home = os.path.abspath(header.path if header.in_folder else header.path.parent)  # noqa: PTH100 - follows no link
    lead = f"{header.path.name}/" if header.in_folder and header.path.name else ""
    found: dict[str, set[str]] = {}
    inside: set[str] = set()
    for line in filter(None, (line.removesuffix("\r") for line in text.split("\n"))):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UsageError(f"`expect_sha256`: {path} has a line that is not of the form DIGEST  NAME.")
        name = _ESCAPE.sub(lambda each: _ESCAPED[each[1]], match[3]) if match[1] else match[3]
        place = os.path.abspath(name)  # noqa: PTH100
        short = name.removeprefix("./")
        if place.startswith(f"{home}/"):
            short = place.removeprefix(f"{home}/")
            inside.add(short)
        elif lead and short.startswith(lead):
            short = short.removeprefix(lead)
            inside.add(short)
        found.setdefault(short, set()).add(match[2].lower())
    return found, inside


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
