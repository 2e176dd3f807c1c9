"""Recorded inputs: the files that an output was made from, found again by name, size and SHA-256."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..compute.hashes import file_hashes
from ..compute.progress import Progress
from ..errors import CkptError
from ..formats import read_header
from ..formats.header import Header
from ..series.paths import as_path, expand
from ..storage.source import LOCAL, store_of
from ..storage.staged import same_file
from .provenance import Input

_MOST_ENTRIES = 100_000  # looked at below a folder


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an input cannot be taken, in words; `unknown` if there is no one file of its name."""

    text: str
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What came of looking for inputs.

    Attributes:
        headers: of those that were found, in order.
        guessed: paths of those of which only name and size are known to be right, and that nobody has named: found
            somewhere below the current folder, where another model may have the same.
        hashed: how many of them have the SHA-256 that is recorded.
        faults: of the others.
        unused: files that were given, and are none of them.
    """

    headers: tuple[Header, ...]
    guessed: tuple[Path, ...]
    hashed: int
    faults: tuple[Fault, ...]
    unused: frozenset[Path]

    @property
    def how(self) -> str:
        """How the inputs were found, in words."""
        by = "by name and size"
        if self.hashed:
            n = len(self.headers)
            by = "by name, size and SHA-256" if self.hashed == n else f"{by} ({self.hashed} of {n} by SHA-256, too)"
        folders = dict.fromkeys(_shown(header.path.parent) for header in self.headers)
        more = f" and {len(folders) - 3} more folders" if len(folders) > 3 else ""
        return f"{by} in {', '.join([*folders][:3])}{more}"

    @property
    def said(self) -> str:
        """The faults in words."""
        more = f"; and {len(self.faults) - 20} more" if len(self.faults) > 20 else ""
        return "; ".join(fault.text for fault in self.faults[:20]) + more


def look_for(
    inputs: Sequence[Input],
    header: Header,
    paths: Iterable[str | Path],
    *,
    by_set: bool = False,
    hashes: bool,
    on_progress: Progress | None = None,
) -> Found:
    """Look for the inputs of an output by name, size and SHA-256.

    Args:
        header: of the output.
        paths: files and folders that have inputs, apart from the places where they are looked for anyway.
        by_set: an input may be one of several sets of weights in a file.
        hashes: compare SHA-256, where it is recorded.
        on_progress: called with (what is done, bytes hashed, bytes in all).
    """
    given = [place for path in paths for place in _expanded(path)]
    search = _Search(header, given)
    faults: list[Fault] = []
    found: list[_Hit] = []
    for i in inputs:
        hit = _one(search, i, faults, by_set=by_set, hashes=hashes, on_progress=on_progress)
        if hit is None:
            continue
        if not by_set and any(hit.header.path == each.header.path for each in found):
            faults.append(Fault(f"{i.name} is not there: {hit.header.path} is another input already"))
        found.append(hit)
    return Found(
        headers=tuple(hit.header for hit in found),
        guessed=tuple(dict.fromkeys(hit.header.path for hit in found if hit.anywhere and not hit.hashed)),
        hashed=sum(hit.hashed for hit in found),
        faults=tuple(faults),
        unused=frozenset(given) - search.used,
    )


def _shown(folder: Path) -> str:
    return "the current folder" if folder == Path() else str(folder)


@dataclass(frozen=True, slots=True)
class _Hit:
    """An input that was found.

    Attributes:
        header: of the file.
        anywhere: it was found somewhere below the current folder.
        hashed: its SHA-256 is the one that is recorded.
    """

    header: Header
    anywhere: bool
    hashed: bool


def _expanded(path: str | Path) -> list[Path]:
    place = as_path(path)
    return [place] if store_of(place).is_folder(place) else expand([path])


def _one(
    search: _Search,
    wanted: Input,
    faults: list[Fault],
    *,
    by_set: bool,
    hashes: bool,
    on_progress: Progress | None,
) -> _Hit | None:
    """Find one input; the first place that has a right one decides."""
    names = [wanted.name]
    if by_set and wanted.name.endswith(")"):
        names.append(wanted.name.partition(" (")[0])  # of several sets of weights in a file
    wrong = []
    alone = False  # a wrong file that is the only one of its name where an input has to be
    for places, anywhere in search.places(names):
        right: list[Header] = []
        alone = alone or (len(places) == 1 and not anywhere)
        hashed = bool(wanted.sha256) and (hashes or len(places) > 1)
        for place in places:
            fault = None
            try:
                header = read_header(place)
            except CkptError as error:
                wrong.append(str(error).rstrip("."))
                continue
            if header.nbytes != wanted.nbytes:
                fault = f"{place} has {header.nbytes:,} bytes, and the input had {wanted.nbytes:,}"
            elif hashed and digests(header, on_progress) != wanted.sha256:
                fault = f"{place} has another SHA-256 than the input had"
            if fault is None:
                right.append(header)
            else:
                wrong.append(fault)
        if len(right) > 1:
            several = ", ".join(str(each.path) for each in right[:3])
            faults.append(Fault(f"{wanted.name} is there several times: {several}", unknown=True))
            return None
        if right:
            search.used.add(right[0].path)
            return _Hit(right[0], anywhere, hashed)
    faults.append(
        Fault("; ".join(wrong), unknown=not alone) if wrong else Fault(f"{wanted.name} is missing", unknown=True)
    )
    return None


@dataclass(eq=False)
class _Search:
    """Where inputs may be: at the paths that were given, beside the average, and below the current folder.

    Attributes:
        average: which is no input of itself.
        given: files and folders.
        used: the inputs that were found.
    """

    average: Header
    given: Sequence[Path]
    used: set[Path] = field(default_factory=set)
    _below: dict[Path, Mapping[str, Sequence[Path]]] = field(default_factory=dict)

    def places(self, names: Sequence[str]) -> Iterator[tuple[list[Path], bool]]:
        """Yield the places of one name, the surest first: those in each item are equally sure.

        Yields:
            (places, anywhere); `anywhere` is True for those that are somewhere below the current folder.
        """
        around, seen = self.average.path.parent, set()
        for found, anywhere in (
            (self._in_given(names), False),
            (self._in(around, names), False),
            (self._in(Path(), names), False),
            (self._in_tree(Path(), names), True),
        ):
            places = []
            for place in found:
                identity = store_of(place).identity(place)
                if identity not in seen and not same_file(place, self.average.path):
                    seen.add(identity)
                    places.append(place)
            if places:
                yield places, anywhere

    def _in_given(self, names: Sequence[str]) -> Iterator[Path]:
        exact = [place for place in self.given if any(_ends(place, name) for name in names)]
        yield from exact
        for place in () if exact else self.given:
            if store_of(place).is_folder(place):
                yield from [*self._in(place, names)] or self._in_tree(place, names)
            elif any(place.name == Path(name).name for name in names):
                yield place

    def _in(self, folder: Path, names: Sequence[str]) -> Iterator[Path]:
        for name in names:
            parts = Path(name).parts
            for n in range(len(parts)):  # a/step_1.pth is step_1.pth in the folder a
                if n == 0 or folder.absolute().parts[-n:] == parts[:n]:
                    place = folder.joinpath(*parts[n:])
                    # From the current folder, s3:/bucket/step_1.pth leads to a store that nobody has given.
                    if store_of(place) is store_of(folder) and _is_there(place):
                        yield place

    def _in_tree(self, folder: Path, names: Sequence[str]) -> Iterator[Path]:
        if folder not in self._below:
            self._below[folder] = _tree(folder)
        for name in names:
            found = (place for place in self._below[folder].get(Path(name).name, ()) if _ends(place, name))
            yield from filter(_is_there, found)


def _is_there(place: Path) -> bool:
    """True for a file or folder; False for a name that the system refuses, or does not let us look at."""
    store = store_of(place)
    try:
        return store.is_file(place) or store.is_folder(place)
    except OSError:
        return False


def _ends(place: Path, name: str) -> bool:
    parts = Path(name).parts
    return place.absolute().parts[-len(parts) :] == parts


def _tree(folder: Path) -> Mapping[str, Sequence[Path]]:
    """Return what is below a folder by name, without hidden names; it follows no links."""
    found: dict[str, list[Path]] = {}
    store = store_of(folder)
    waiting, left = [folder] if store is LOCAL else [], _MOST_ENTRIES
    while waiting and left > 0:
        above = waiting.pop()
        with suppress(OSError):  # one that may not be looked into
            for name in store.names(above):
                place, left = above / name, left - 1
                if not name.startswith("."):
                    found.setdefault(name, []).append(place)
                    if store.is_folder(place) and not place.is_symlink():
                        waiting.append(place)
    return found


def digests(header: Header, on_progress: Progress | None) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint, in hexadecimal digits, by its name."""
    hashes = file_hashes(header.names.values(), on_progress)
    return {name: hashes[path] for name, path in header.names.items()}
