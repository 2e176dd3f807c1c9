"""Names: how tensors in a file are paired with those that should be in it, where a prefix was added or removed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from ...checkpoints.layouts.layout import dotted
from ...formats.header import Header
from ...formats.tree import tensors_in
from ...tensors import Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its key path, the same with dots, and where it is."""

    path: tuple[Any, ...]
    name: str
    tensor: Tensor


def stored_tensors(header: Header) -> list[Stored]:
    """Return all tensors of a checkpoint, among which several may have one dotted path."""
    return [Stored(path, dotted(path), tensor) for path, tensor in tensors_in(header.tree)]


@dataclass(frozen=True, slots=True)
class Pairing:
    """Names in a file and the names that they should be.

    Attributes:
        tensors: those in the file by name.
        twice: names that several tensors have, of which a comparison by name would see one.
        names: from each name in the file that has a counterpart to that.
        lacking: names that the file should have.
        strange: names that it should not have.
        renamed: which prefix was added or removed, in words; empty if none was.
    """

    tensors: Mapping[str, Tensor]
    twice: tuple[str, ...]
    names: Mapping[str, str]
    lacking: tuple[str, ...]
    strange: tuple[str, ...]
    renamed: str

    @property
    def fault(self) -> str | None:
        """A name that is no name of one tensor, or has no counterpart, in words; None if all are right."""
        if self.twice:
            return f"two tensors have the path '{self.twice[0]}'"
        if self.lacking:
            more = f" and {len(self.lacking) - 1} more" if self.lacking[1:] else ""
            return f"it lacks '{self.lacking[0]}'{more}"
        if self.strange:
            more = f" and {len(self.strange) - 1} more" if self.strange[1:] else ""
            return f"'{self.strange[0]}'{more} should not be in it"
        return None


def paired(wanted: Collection[str], stored: Sequence[Stored]) -> Pairing:
    """Pair names, where `fix-prefix` may have replaced one prefix of those of a dict, added or removed one."""
    tensors: dict[str, Tensor] = {}
    twice = tuple(each.name for each in stored if tensors.setdefault(each.name, each.tensor) != each.tensor)
    names: dict[str, str] = {}
    changes: list[str] = []
    for parent, keys in _by_parent(stored).items():
        lead = f"{dotted(parent)}." if parent else ""
        old = {key: lead + key for key in keys}
        if any(name not in wanted for name in old.values()):
            found = _renamed(lead, keys, wanted)
            if found is not None:
                old, change = found
                changes.append(change)
        names |= {lead + key: name for key, name in old.items() if name in wanted}
    used = {*names.values()}
    return Pairing(
        tensors,
        twice,
        names,
        tuple(name for name in wanted if name not in used),
        tuple(name for name in tensors if name not in names),
        "; ".join(dict.fromkeys(changes)),
    )


def _by_parent(stored: Sequence[Stored]) -> dict[tuple[Any, ...], list[str]]:
    found: dict[tuple[Any, ...], list[str]] = {}
    for each in stored:
        found.setdefault(each.path[:-1], []).append(dotted(each.path[-1:]))
    return found


def _renamed(lead: str, keys: list[str], wanted: Collection[str]) -> tuple[dict[str, str], str] | None:
    """Return the old names by key, and the change in words; None if it is not that of one prefix."""
    first, tried = keys[0], set()
    for name in wanted:
        tail = name.removeprefix(lead)
        same = commonprefix([first[::-1], tail[::-1]])[::-1]
        new, old = first.removesuffix(same), tail.removesuffix(same)
        if not name.startswith(lead) or not same or (new, old) in tried:
            continue
        tried.add((new, old))
        if all(key.startswith(new) and lead + old + key[len(new) :] in wanted for key in keys):
            change = f"'{new}' was put before its names" if new else f"'{old}' was removed from its names"
            change = f"'{new}' was put in place of '{old}' in its names" if new and old else change
            return {key: lead + old + key[len(new) :] for key in keys}, change
    return None
