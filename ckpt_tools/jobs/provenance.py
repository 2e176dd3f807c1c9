"""Provenance: what an output says about where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint of the average.

    Attributes:
        path: the file or folder.
        name: a short name, distinct within the series.
        step: where in training it stands, None if unknown.
        coefficient: its weight in the sum.
        state: which weights are taken, such as ``ema (state_dict_ema)``.
        nbytes: size on disk.
        prefixes: wrapper prefixes that were removed from its names.
        sha256: of each of its files, if asked for.
    """

    path: str
    name: str
    step: int | None
    coefficient: float
    state: str
    nbytes: int
    prefixes: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Name files as shortly as keeps them apart; folders above them are nobody's business."""
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names) or depth > max(len(path.parts) for path in paths):
            return names
        depth += 1


def provenance(command: str, arguments: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Say which command made an output, with which arguments (None is left out), and what else is worth keeping."""
    return {
        "tool": "ckpt-tools",
        "version": __version__,
        "command": command,
        "arguments": {key: value for key, value in arguments.items() if value is not None},
        **facts,
    }


def averaged_inputs(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Say which checkpoints an average is made of, and in which proportions."""
    return [
        {"name": i.name, "size": i.nbytes, "step": i.step, "coefficient": i.coefficient}
        | ({"sha256": i.sha256} if i.sha256 else {})
        for i in inputs
    ]
