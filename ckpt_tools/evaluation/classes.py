"""Classes: which output of the network each folder of images stands for.

Training scripts number folders in two ways. torchvision's ImageFolder takes the folders directly below the root, in the
order of their text (1, 10, 2); timm takes the innermost folders, in natural order (1, 2, 10).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.script_arguments import script_arguments
from ..errors import DataError
from ..formats.header import Header

_NAMES = ("class_to_idx", "idx_to_class", "classes", "class_names")
"""Keys under which training scripts store the names of their classes."""


@dataclass(frozen=True, slots=True)
class Folders:
    """The folders that may name a class.

    Attributes:
        outer: those directly below the root.
        inner: the innermost ones.
    """

    outer: tuple[str, ...]
    inner: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClassOrder:
    """How folders are numbered.

    Attributes:
        readings: a list of classes read in each way that it can be; empty if the folders themselves decide.
        source: where that list is from.
        firm: it is an error if no folder is in the list.
        natural: as timm numbers folders, not as torchvision does.
        fault: why they cannot be numbered, in words.
    """

    readings: tuple[Mapping[str, int], ...] = ()
    source: str = ""
    firm: bool = False
    natural: bool = False
    fault: str = ""

    def number(self, folders: Folders) -> Numbered:
        """Number the folders of some data.

        Raises:
            DataError: the list of classes has only some of the folders; or none, and it was given.
        """
        if self.fault:
            raise DataError(self.fault)
        if not self.readings:
            return self._by_name(folders)
        nearest: list[str] | None = None
        for reading in self.readings:
            for names, inner in ((folders.outer, False), (folders.inner, True)):
                unknown = [name for name in names if name not in reading]
                if names and not unknown:
                    note = f"{len(set(names))} class folders, numbered by {self.source}"
                    return Numbered(names, reading, inner, note, listed=True)
                if len(unknown) < len(names) and (nearest is None or len(unknown) < len(nearest)):
                    nearest = unknown
        if nearest is not None or self.firm:
            unknown = nearest or list(folders.outer)
            what = f"{_some(unknown)} of the folders is not in it" if unknown else "the data have no class folders"
            raise DataError(f"{self.source}: {what}. Name each class by its folder in `class_map`.")
        found = self._by_name(folders)
        return replace(found, note=f"{found.note}; {self.source} has other names than these folders, and is not used")

    def _by_name(self, folders: Folders) -> Numbered:
        by_text = {name: i for i, name in enumerate(sorted(folders.outer))}
        inner = sorted(set(folders.inner))
        by_number = {name: i for i, name in enumerate(sorted(inner, key=natural_key))}
        if self.natural and (same := _same_to_timm(inner)):
            raise DataError(
                f"the class folders '{same[0]}' and '{same[1]}' are the same name to timm, which numbers them by "
                "chance, another way in each run. Say which is which with `class_map`."
            )
        index = by_number if self.natural else by_text
        how = "in natural order, as timm does" if self.natural else "in the order of their text, as torchvision does"
        note = f"{len(index)} class folders, numbered {how}"
        if by_text != by_number:
            first = next((name for name in by_text if by_text[name] != by_number.get(name)), min(by_text, default=""))
            other = "torchvision" if self.natural else "timm"
            note += f" ({other} numbers '{first}' in another way; choose with `class_map`)"
        return Numbered(tuple(index), index, self.natural, note)


@dataclass(frozen=True, slots=True)
class Numbered:
    """Numbered class folders.

    Attributes:
        folders: the names of the classes in the data.
        index: name to number; may have more.
        inner: the innermost folder of an image is its class, not that directly below the root.
        note: how they are numbered, in words.
        listed: by a list of classes, not by the names of the folders.
    """

    folders: tuple[str, ...]
    index: Mapping[str, int]
    inner: bool
    note: str
    listed: bool = False


def class_order(header: Header, class_map: str | Path | None = None) -> ClassOrder:
    """Find out how the folders are numbered: by a file, by the checkpoint, or by their names.

    Args:
        header: of the checkpoint; plain data in it may list the classes.
        class_map: a file, see `read_class_map`.

    Raises:
        DataError: the file cannot be read.
    """
    if class_map is not None:
        return ClassOrder(read_class_map(class_map), f"`class_map={str(class_map)!r}`", firm=True)
    content: dict[str, Any] = header.content if isinstance(header.content, dict) else {}
    args = script_arguments(header)
    levels: dict[str, Any] = {"": content, "args.": args} | {
        f"{key}.": content.get(key) for key in ("hyper_parameters", "meta")
    }
    for where, level in levels.items():
        for key in _NAMES if isinstance(level, Mapping) else ():
            if (index := _index(level.get(key))) is not None:
                return ClassOrder((index,), f"'{where}{key}' of the checkpoint")
    of_timm = is_timm_run(header)
    if of_timm and (used := args.get("class_map")):
        return ClassOrder(
            fault=f"{header.path}: its run numbered the classes by {used!r}. Give that file as `class_map`."
        )
    by_torchvision = str(args.get("dataset") or "").startswith("torch/")
    return ClassOrder(natural=of_timm and not by_torchvision)


def is_timm_run(header: Header) -> bool:
    """Return True if timm's train.py saved the checkpoint: it stores the name of the model twice."""
    content = header.content if isinstance(header.content, dict) else {}
    arch = content.get("arch")
    return isinstance(arch, str) and script_arguments(header).get("model") == arch


def read_class_map(path: str | Path) -> tuple[Mapping[str, int], ...]:
    """Read a list of classes.

    Args:
        path: JSON (an object of name to number, or a list of names), or lines of text: a name each, numbered from 0 as
            timm does, or a name and its number each.

    Returns:
        The list in each way that it can be read, the likeliest first: names may end in numbers, too.

    Raises:
        DataError: it cannot be read as one.
    """
    where = f"`class_map={str(path)!r}`"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot be read ({error}).") from error
    if text.lstrip()[:1] in ("{", "["):
        try:
            index = _index(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is no JSON ({error}).") from error
        if index is None:
            raise DataError(f"{where}: should be an object of folder names to numbers, or a list of folder names.")
        return (index,)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = {m[1]: int(m[2]) for line in lines if (m := re.fullmatch(r"(.*\S)\s+(\d+)", line))}
    readings = []
    if lines and len(numbered) == len(lines):
        readings.append(numbered)
    if len({*lines}) == len(lines) > 0:
        readings.append({name: number for number, name in enumerate(lines)})
    if not readings:
        raise DataError(f"{where}: should have a folder name on each line, none twice, with or without its number.")
    return tuple(readings)


def _index(stored: Any) -> Mapping[str, int] | None:
    """Read names and numbers of classes from plain data; None if these are something else."""
    if isinstance(stored, Sequence) and not isinstance(stored, str):
        stored = dict(enumerate(stored))
    if not isinstance(stored, Mapping) or not stored:
        return None
    pairs = [(value, key) if isinstance(value, str) else (key, value) for key, value in stored.items()]
    index = {name: number for name, number in pairs if isinstance(name, str) and type(number) is int and number >= 0}
    return index if len(index) == len(pairs) else None


def _same_to_timm(names: Sequence[str]) -> tuple[str, str] | None:
    """Return two names that timm sorts as one, such as those that differ in case alone."""
    known: dict[tuple[Any, ...], str] = {}
    for name in names:
        if (other := known.setdefault(tuple(natural_key(name)), name)) != name:
            return other, name
    return None


def natural_key(name: str) -> list[Any]:
    """Return the key by which timm sorts names, as ``natural_key`` in timm.utils does."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def _some(names: Sequence[str]) -> str:
    return f"'{min(names)}'" + (f" (and {len(names) - 1} others)" if len(names) > 1 else "")
