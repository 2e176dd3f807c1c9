"""Paths: from files, globs and folders to complete checkpoints without duplicates."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from ..errors import SeriesError, UsageError, did_you_mean
from ..formats import is_checkpoint, suffixes
from ..formats.deepspeed_files import folder_of
from ..formats.sharded import INDEX_SUFFIXES, checkpoint_inside
from ..storage.source import LOCAL, store_of
from .numbered import glob_of, lined_up_first, natural_key, without_numbers
from .shards import is_part, refuse_parts

T = TypeVar("T")
_MAGIC = re.compile("[*?[]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SECRET = re.compile(r"(https?://)(?:[^/?#\s]*@)?([^?#]*)(?:[?#].*)?", re.DOTALL)
DEFAULT_INPUTS = ("averaged.pth", "averaged.safetensors")
_NOT_WEIGHTS = re.compile(r"optimizer|optim_states|scheduler|scaler|rng_state|training_args")
_LEVELS, _MOST_FOLDERS = 3, 100
"""How deep, and in how many folders, checkpoints are looked for that a message points to."""
_OPTIMIZER_FOLDER = re.compile(r"optimizer_\d+")  # Accelerate's, beside pytorch_model_fsdp_0


def listed(paths: Iterable[T]) -> list[T]:
    """Return paths as a list.

    Raises:
        UsageError: they are not several, but one path or none.
    """
    if isinstance(paths, (str, bytes)) or not isinstance(paths, Iterable):
        raise UsageError(f"paths is a list of paths, not {shown(repr(paths))}.")
    return [*paths]


def as_path(given: str | Path) -> Path:
    """Return what a user gives as a path, or as the address of an object.

    Raises:
        UsageError: an address, and a library for it is not installed.
    """
    if isinstance(given, Path) and store_of(given) is not LOCAL:
        return given
    if "://" in os.fspath(given):
        from ..storage.remote import as_address

        address = as_address(given)
        if address is not None:
            return address
    return Path(os.path.expanduser(given))  # noqa: PTH111 - keeps an unknown ~user


def shown(given: object) -> str:
    """Return what a user gives as messages and records show it: a URL without its query and password."""
    return _SECRET.sub(r"\1\2", str(given))


def is_address(given: str | Path) -> bool:
    """True for a path that is none of this machine, whether its store is known or not."""
    return _SCHEME.match(os.fspath(given)) is not None or store_of(Path(given)) is not LOCAL


@dataclass(frozen=True, slots=True)
class Found:
    """What paths lead to.

    Attributes:
        paths: of the checkpoints, without duplicates.
        empty: folders that should be checkpoints, as the others are, and hold no weights.
        excluded: path to the glob that leaves it out.
    """

    paths: list[Path]
    empty: list[Path]
    excluded: dict[Path, str]


def find(paths: Sequence[str | Path], notes: list[str], exclude: str | Sequence[str] = ()) -> Found:
    """Expand files, globs and folders to checkpoints, without duplicates.

    Args:
        notes: receives decisions to report.
        exclude: globs; what one of them matches is left out, by its name or by the end of its path.

    Raises:
        UsageError: an argument is not a path.
        SeriesError: a path that does not exist, a glob without matches, a folder without checkpoints, shards of one
            checkpoint, one rank of several, or one checkpoint next to a series; or nothing is left.
    """
    try:
        expanded, empty = _expanded(paths)
        globs = [exclude] if isinstance(exclude, str) else exclude
        excluded = _excluded([*expanded, *empty], globs)
        found = _without_duplicates([path for path in expanded if path not in excluded], notes)
        _note_nested(found, {as_path(each) for each in paths}, notes)
        _note_masters(found, notes)
    except OSError as error:
        raise SeriesError(f"{error.filename}: {error.strerror}.") from error
    refuse_parts(found)
    return Found(found, [path for path in empty if path not in excluded], excluded)


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Expand files, globs and folders to checkpoints, each a file or a folder."""
    return _expanded([*paths])[0]


def _expanded(paths: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints, and the folders among them that hold no weights."""
    refuse_other_queries(paths)
    for store in {store_of(as_path(given)) for given in paths if isinstance(given, (str, os.PathLike))}:
        store.refresh()
    empty: list[Path] = []
    found = [path for given in paths for path in _find(given, empty)]
    if not found and empty:
        raise SeriesError(_no_checkpoints(empty[0]))
    if not found:
        raise SeriesError("no checkpoint given.")
    return found, empty


def _excluded(paths: Sequence[Path], globs: Sequence[str]) -> dict[Path, str]:
    """Return the paths that a glob matches, and the glob.

    Raises:
        SeriesError: no path is left; or a glob matches none, and what it was to leave out would be averaged.
    """
    none = f"none of the {len(paths)} checkpoints" if len(paths) > 1 else "no checkpoint"
    excluded: dict[Path, str] = {}
    for glob in globs:
        if not glob.strip("/"):
            raise UsageError(f"`exclude={glob!r}`: no glob.")
        matches = [path for path in paths if path.match(glob)]
        if not matches:
            raise SeriesError(f"`exclude={glob!r}` matches {none}.{_meant(glob, paths)}")
        excluded |= dict.fromkeys(matches, glob)
    if len({*paths} - excluded.keys()) == 0:
        raise SeriesError(f"`exclude={[*globs]!r}` leaves {none}.")
    return excluded


def _meant(glob: str, paths: Sequence[Path]) -> str:
    """Say which glob may be meant by one that matches nothing."""
    if near := did_you_mean(glob, [path.name for path in paths]):
        return near
    inside = f"*{glob.strip('*')}*"
    if any(path.match(inside) for path in paths):
        return f" It must match a whole name, as `exclude={inside!r}` does."
    return f" The first is {paths[0].name}."


def refuse_other_queries(paths: Iterable[object]) -> None:
    """Refuse URLs that differ in their queries alone: the query, which may be a signature, is no part of an address.

    Raises:
        SeriesError: there are such.
    """
    queries: dict[str, str] = {}
    for given in paths:
        if isinstance(given, str) and given.startswith(("http://", "https://")):
            query = urlsplit(given).query
            if queries.setdefault(shown(given), query) != query:
                raise SeriesError(
                    f"{shown(given)}: given with several queries, and a query is no part of an address: these would be "
                    "one file. Download the files first, and give their paths."
                )


def one_checkpoint(given: str | Path) -> Path:
    """Find the checkpoint that a path names: the path itself, or the only checkpoint in a folder that is none.

    Raises:
        SeriesError: the path is empty; or the folder holds several, or a shard or rank of one.
    """
    refuse_empty(given)
    path = as_path(given)
    try:
        store = store_of(path)
        store.refresh()
        if not store.is_folder(path):
            if store is LOCAL:
                _refuse_url(given, path)
                if path.is_symlink() and not path.exists():
                    raise SeriesError(_dangling(path))
            return path
        found = _checkpoints(path)
    except OSError:  # which the reader of the path reports
        return path
    if found != [path]:
        refuse_parts(found)
    if len(found) > 1:
        names = ", ".join(str(each.relative_to(path)) for each in found[:6])
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise SeriesError(f"{path}: a folder with {len(found)} checkpoints: {names}{more}. Give the path of one.")
    return found[0] if found else path


def folder_of_index(path: Path) -> Path:
    """Return the folder of an index of shards, which is the checkpoint; any other path as it is."""
    return path.parent if path.name.endswith(INDEX_SUFFIXES) else path


def refuse_empty(given: str | Path) -> None:
    """Refuse a path without a name, which would be the current folder."""
    if given == "":
        raise SeriesError("an empty path. Is a variable of the shell unset?")


def _refuse_url(given: str | Path, path: Path) -> None:
    """Refuse an object of a store that is not known, which as a path would be a file in a folder named ``s3:``."""
    scheme = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):", path.parts[0] if path.parts else "")
    if scheme is not None and not Path(path.parts[0]).exists():
        if scheme[1] in ("s3", "gs", "az", "http", "https", "hf"):
            raise SeriesError(
                f"{shown(given)}: an address has two slashes, such as {scheme[1]}://{'/'.join(path.parts[1:])}, and is "
                "given as text: a Path drops one of them."
            )
        raise SeriesError(
            f"{shown(given)}: {scheme[1]}:// is not read; s3://, gs://, az://, https:// and hf:// are. Download the "
            "checkpoint first, and give its path."
        )


def _find(given: str | Path, empty: list[Path]) -> list[Path]:
    """Expand one argument.

    Args:
        empty: receives folders without weights.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise UsageError(f"a path is text, not {given!r}.")
    refuse_empty(given)
    if given == "-":
        raise SeriesError("-: standard input is not read. Give a path; a file of this name is ./-")
    path = as_path(given)
    store = store_of(path)
    if store.is_folder(path):
        return _in_folder(path, empty)
    if store.is_file(path) or path.exists():
        return [path]
    if path.is_symlink():
        raise SeriesError(_dangling(path))
    if store is LOCAL:
        _refuse_url(given, path)
    missing = _missing_folder(path)
    if not _MAGIC.search(str(path)):
        raise SeriesError(f"{shown(given)}: no such file or folder.{_near(path) if missing is None else missing}")
    matches = sorted(store.find(path), key=natural_key)
    if not matches:
        if missing is not None:
            raise SeriesError(f"no file matches '{shown(given)}'.{missing}")
        if store is not LOCAL:
            raise SeriesError(f"no file matches '{shown(given)}'.")
        folder = next((parent for parent in path.parents if parent.is_dir()), Path())
        raise SeriesError(f"no file matches '{shown(given)}'. Look at the folder: ls {folder}")
    return [found for match in matches for found in (_in_folder(match, empty) if store.is_folder(match) else [match])]


def _in_folder(folder: Path, empty: list[Path]) -> list[Path]:
    """Find the checkpoints in a folder.

    Args:
        empty: receives the folder if it holds none, and folders in it that are named like those that do.
    """
    found = _checkpoints(folder)
    store = store_of(folder)
    if not found:
        empty.append(folder)
    elif found != [folder]:
        names = {without_numbers(path) for path in found if re.search(r"\d", path.name) and store.is_folder(path)}
        alike = names and [each for each in _children(folder) if without_numbers(each) in names and each not in found]
        empty += [each for each in alike or () if store.is_folder(each)]
    return found


def _no_checkpoints(folder: Path) -> str:
    looked_for = " ".join(f"*{suffix}" for suffix in suffixes(exports=False))
    return f"{folder}: no checkpoints in this folder (looked for {looked_for}).{_hint_below(folder)}"


def _checkpoints(folder: Path) -> list[Path]:
    if is_checkpoint(folder):
        return [folder]
    store = store_of(folder)
    return [
        child
        for child in _children(folder)
        if _is_weights(child)
        or (store.is_folder(child) and is_checkpoint(child) and not _OPTIMIZER_FOLDER.fullmatch(child.name))
    ]


def _is_weights(path: Path) -> bool:
    own = suffixes(exports=False)
    return path.name.endswith(own) and not _NOT_WEIGHTS.search(path.name) and store_of(path).is_file(path)


def _children(folder: Path) -> list[Path]:
    """Return the content of a folder without hidden names, and what Linux keeps in each disk, in natural order."""
    names = (name for name in store_of(folder).names(folder) if not name.startswith(".") and name != "lost+found")
    return sorted((folder / name for name in names), key=natural_key)


def _hint_below(folder: Path) -> str:
    """Point to a folder inside: Accelerate and Hugging Face's Trainer save weights in a folder of each checkpoint's."""
    for child in islice(_below(folder), _MOST_FOLDERS):
        inside = _checkpoints(child)
        if not inside:
            continue
        glob = glob_of(child)
        if sum(each.match(glob.name) for each in _children(child.parent)) == 1:
            glob = child
        if len({without_numbers(path) for path in inside}) > 1:  # SpeechBrain's model.ckpt, brain.ckpt and more
            named = min(inside, key=lambda path: "model" not in path.name)
            return f" There are several in {child}; if {named.name} has the weights, use '{glob / named.name}'."
        return f" There are some in {child}; use '{glob}'."
    return ""


def _below(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder, those of one level before those of the next; links are not followed."""
    level = [folder]
    for _ in range(_LEVELS):
        level = [each for parent in level for each in _children(parent) if _is_real_folder(each)]
        yield from level


def _is_real_folder(path: Path) -> bool:
    return store_of(path).is_folder(path) and not path.is_symlink()


def _dangling(path: Path) -> str:
    return f"{path}: a broken link to {path.readlink()}."


def _missing_folder(path: Path) -> str | None:
    """Return a message for the first parent folder that does not exist, up to a glob; None if all exist.

    In a store there are no folders apart from their files.
    """
    if store_of(path) is not LOCAL:
        return None
    for folder in reversed(path.parents):
        if _MAGIC.search(folder.name):
            return None
        if not folder.exists():
            return f" The folder {folder} does not exist.{_near(folder, only=Path.is_dir)}"
    return None


def _near(path: Path, only: Callable[[Path], bool] = Path.exists) -> str:
    if store_of(path) is not LOCAL:
        return ""
    try:
        names = [child.name for child in path.parent.iterdir() if only(child)]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _without_duplicates(paths: Sequence[Path], notes: list[str]) -> list[Path]:
    """Drop hard links, symlinks and repeated arguments."""
    groups: dict[object, dict[Path, Path]] = {}
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise SeriesError(_dangling(path))
        groups.setdefault(store_of(path).identity(path), {})[path.absolute()] = path
    key = lined_up_first(path for names in groups.values() for path in names.values())
    return [keep_one(sorted(names.values(), key=key), "under another name", notes) for names in groups.values()]


def keep_one(paths: Iterable[Path], what: str, notes: list[str]) -> Path:
    """Return the first."""
    kept, *others = paths
    notes.extend(f"{other} is {kept} {what}: counted once." for other in others)
    return kept


def _note_nested(paths: Sequence[Path], given: Collection[Path], notes: list[str]) -> None:
    """Note a series in the folder of a checkpoint: Hugging Face's Trainer saves the last weights next to its others.

    Raises:
        SeriesError: that checkpoint is the only one, and is not given by the path of its file.
    """
    alone = len(paths) == 1
    for path in paths:
        folder = store_of(path).is_folder(path)
        if not folder and (not alone or path in given):
            continue
        inside = _series_in(path if folder else path.parent)
        if inside and alone:
            file = checkpoint_inside(path) if folder else path
            way = "" if file is None else f" To take the one alone, give {file}."
            raise SeriesError(
                f"{path} is one checkpoint, and a series is next to it. To average the series, use '{inside[0]}'.{way}"
            )
        notes.extend(f"{path} is one checkpoint itself. For those in its folder, use '{each}'." for each in inside)


def _note_masters(paths: Sequence[Path], notes: list[str]) -> None:
    """Note float32 weights beside others: Hugging Face's Trainer has DeepSpeed's folder in that of its checkpoint."""
    path = paths[0]
    if store_of(path).is_folder(path) and checkpoint_inside(path) is not None:
        masters = folder_of(path)
        if masters is not None:
            glob = glob_of(path) / glob_of(masters).name
            notes.append(f"{path} has DeepSpeed's float32 weights, too. To take these, use '{glob}'.")


def _series_in(folder: Path) -> list[Path]:
    """Return globs for the series in a folder that is a checkpoint or has one: in folders below, or loose files."""
    store, loose = store_of(folder), is_checkpoint(folder)
    times: Counter[Path] = Counter()
    for child in _children(folder):
        if not store.is_folder(child):
            own = [child] if loose and re.search(r"\d", child.name) and _is_weights(child) else []
        else:
            # One is enough, if it is a folder, but not DeepSpeed's, which is of the same checkpoint. verl exports a
            # model into each checkpoint's `huggingface`.
            numbered = is_checkpoint(child) and re.search(r"\d", child.name) is not None
            own = _checkpoints(child) * (1 + (numbered and folder_of(child) != child))
        times[glob_of(child)] += sum(not is_part(each) for each in own)
    return [glob for glob, n in times.items() if n > 1]


def runs_below(folder: Path) -> list[Path]:
    """Find series by their names: folders, or globs, with checkpoints whose names differ in numbers; links aside."""
    found: list[Path] = []
    for each in (folder, *islice(_below(folder), _MOST_FOLDERS)):
        if is_checkpoint(each):
            found += _series_in(each)
            continue
        names = Counter(without_numbers(path) for path in _checkpoints(each) if re.search(r"\d", path.name))
        if max(names.values(), default=0) > 1:
            found.append(each)
    return found


def training_state_beside(folder: Path) -> list[Path]:
    """Return the files of training state in the folder of a checkpoint."""
    own, store = suffixes(exports=False), store_of(folder)
    named = (path for path in _children(folder) if path.name.endswith(own) and _NOT_WEIGHTS.search(path.name))
    return [path for path in named if store.is_file(path)]


def default_input() -> Path:
    """Return the default output of `ckpt avg`, the default input of other commands.

    Raises:
        UsageError: it does not exist.
    """
    for name in DEFAULT_INPUTS:
        if Path(name).exists():
            return Path(name)
    raise UsageError(f"no checkpoint given, and there is no {' or '.join(DEFAULT_INPUTS)} here.")
