"""Names with numbers: what the paths of one series have in common, and in which order they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path


def natural_key(path: Path) -> tuple[object, ...]:
    """Sort key under which checkpoint-2 comes before checkpoint-10."""
    texts = re.split(r"(\d+)", str(path))
    return tuple((1, int(text), text) if i % 2 else (0, 0, text) for i, text in enumerate(texts))


def lined_up_first(paths: Iterable[Path]) -> Callable[[Path], tuple[object, ...]]:
    """Return a sort key: names with a number before last and model_best, then those like most of the series."""
    times = Counter(map(without_numbers, paths))
    return lambda path: (not re.search(r"\d", path.name), -times[without_numbers(path)], natural_key(path))


def without_numbers(path: Path) -> str:
    """Return what the paths of one series have in common."""
    return re.sub(r"\d+", "#", str(path.absolute()))


def glob_of(folder: Path) -> Path:
    """Return a glob for folders whose names differ in numbers."""
    return folder.with_name(re.sub(r"\d+", "*", folder.name))
