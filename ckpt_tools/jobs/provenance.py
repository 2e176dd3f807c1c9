"""Provenance: the record in an output of its inputs and options."""

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
        step: training step, or epoch; None if unknown.
        coefficient: its weight in the sum.
        state: the set of weights, such as ``ema (state_dict_ema)``.
        nbytes: size on disk.
        prefixes: wrapper prefixes that were removed from its names.
        sha256: of each of its files; empty unless `hash` was given.
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
    """Return the shortest distinct names; outputs do not record the folders above them."""
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names) or depth > max(len(path.parts) for path in paths):
            return names
        depth += 1


def provenance(command: str, arguments: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Return a record of the command, its arguments (without those that are None), and further facts."""
    return {
        "tool": "ckpt-tools",
        "version": __version__,
        "command": command,
        "arguments": {key: value for key, value in arguments.items() if value is not None},
        **facts,
    }


def averaged_inputs(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Return a record of the checkpoints of an average and their coefficients."""
    return [
        {"name": i.name, "size": i.nbytes, "step": i.step, "coefficient": i.coefficient}
        | ({"sha256": i.sha256} if i.sha256 else {})
        for i in inputs
    ]
