"""A minimal store with files in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class MemoryFile:
    """A toy source: bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def stat(self) -> tuple[int, tuple[object, ...]]:
        return len(self.data), (id(self.data),)

    def read_into(self, offset: int, view: memoryview) -> int:
        part = self.data[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.data[offset : offset + nbytes] for offset, nbytes in ranges]

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        pass


class MemoryStore:
    """A toy store: files by path."""

    def __init__(self, files: dict[Path, bytes]) -> None:
        self.files = files

    def refresh(self) -> None:
        pass

    def open(self, path: Path) -> MemoryFile:
        if path not in self.files:
            raise FileNotFoundError(2, "no such object", str(path))
        return MemoryFile(self.files[path])

    def is_file(self, path: Path) -> bool:
        return path in self.files

    def is_folder(self, path: Path) -> bool:
        return any(path in file.parents for file in self.files)

    def names(self, folder: Path) -> list[str]:
        below = [file.relative_to(folder).parts[0] for file in self.files if folder in file.parents]
        return sorted(set(below))

    def real_path(self, path: Path) -> Path:
        return path

    def identity(self, path: Path) -> object:
        return path

    def find(self, pattern: Path) -> list[Path]:
        return sorted(file for file in self.files if file.match(str(pattern)))
