"""State dicts: what of an average works where its inputs, or its output, are no files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..series.paths import listed
from .option_groups import Group, Options

if TYPE_CHECKING:
    import torch

_OF_FILES = (
    "force", "write_checksums", "sign_off", "max_shard_size", "untie", "hash", "recal_bn", "part", "finish", "resume",
    "dry_run", "plot",
)  # fmt: skip
"""Options of an average that is written."""
_FROM_FILES = ("update", "replay", "sign_off", "hash", "part", "finish", "resume", "cache", "metrics")
"""Options of an average whose inputs are files."""


@contextmanager
def as_inputs(
    paths: str | Path | Mapping[str, torch.Tensor] | Iterable[str | Path | Mapping[str, torch.Tensor]],
    groups: Iterable[Group],
    *,
    written: bool,
) -> Iterator[Sequence[str | Path]]:
    """Hold the inputs of an average as files until the block ends.

    Args:
        paths: files, globs, folders; or state dicts.
        groups: the options of the average.
        written: False if it stays in memory.

    Yields:
        Paths.

    Raises:
        UsageError: paths and state dicts are mixed, or an option needs files where there are none.
    """
    given: Any = [paths] if isinstance(paths, (str, Path, Mapping)) else listed(paths)
    if not written:
        _refuse(groups, _OF_FILES, "goes with a file, and `out=None` writes none")
    if not any(isinstance(each, Mapping) for each in given):
        yield given
        return
    if not all(isinstance(each, Mapping) for each in given):
        raise UsageError("paths and state dicts together have no order. Give state dicts alone, or paths alone.")
    _refuse(groups, _FROM_FILES, "needs checkpoints that are files, and state dicts are none")
    from ..formats.in_memory import as_files

    with as_files(given) as held:
        yield held


def _refuse(groups: Iterable[Group], names: Collection[str], reason: str) -> None:
    """Refuse options of these names."""
    given = (o.name for each in groups if isinstance(each, Options) for o in each.options() if vars(each)[o.name])
    for name in given:
        if name in names:
            raise UsageError(f"`{name}` {reason}.")
