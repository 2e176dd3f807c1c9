"""Scratch: the folder of a sweep, in which no candidate stays that nobody wants."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ...storage.hidden import remove
from ...storage.journal import append, make_folder

_ANNOUNCED = "candidates.txt"


class Scratch:
    """Files of candidates in a folder, each announced in a list there before it is written.

    So what a killed sweep has left is known, and nothing else is ever deleted.

    Attributes:
        folder: for candidates.
        logs: folder of what evaluations print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs = folder, folder / "logs"
        self._list = folder / _ANNOUNCED
        lines = self._list.read_text(errors="surrogateescape").splitlines() if self._list.exists() else []
        self._there = {folder / line for line in lines if line == Path(line).name}

    def announce(self, paths: Sequence[Path]) -> None:
        """Say that files will be written, in place of those that are there.

        Raises:
            WriteError: the system refuses.
        """
        make_folder(self.logs)
        self.remove(*paths)
        append(self._list, "\n".join(path.name for path in paths).encode(errors="surrogateescape"))
        self._there.update(paths)

    def remove(self, *paths: Path) -> None:
        """Delete files that were announced; others are left."""
        for path in self._there.intersection(paths):
            remove(path)
            self._there.discard(path)

    def clear(self, wanted: Collection[Path]) -> None:
        """Delete all files that were announced but these, with what a kill has left of one that was being written."""
        for path in self._there:
            for part in self.folder.glob(f".{_literal(path.name[:40])}.*.partial"):
                remove(part)
        self.remove(*self._there.difference(wanted))
        remove(self._list)
        if self._there:
            append(self._list, "\n".join(path.name for path in self._there).encode(errors="surrogateescape"))


def _literal(name: str) -> str:
    """Escape the signs of a glob."""
    return "".join(f"[{each}]" if each in "*?[" else each for each in name)
