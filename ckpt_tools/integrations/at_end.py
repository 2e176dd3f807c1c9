"""The average at the end of a training: made by one process, and no reason for the training to fail."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..batchnorm.processes import alone
from ..errors import CkptError
from ..jobs.average import AverageReport, average


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that `average` does not have, when a training begins and not when it ends.

    Raises:
        TypeError: it does not have one of them.
    """
    inspect.signature(average).bind([], **options)


def averaged(
    found: Callable[[], tuple[Sequence[Path], Path]], options: Mapping[str, Any], *, strict: bool
) -> AverageReport | None:
    """Average checkpoints in this process alone, whatever others were started with it.

    Args:
        found: returns files or folders, and the output.
        options: of `average`.
        strict: let errors through; else they become warnings.

    Returns:
        What was averaged; None after an error.

    Raises:
        CkptError: see `average`; if `strict`.
    """
    try:
        paths, out = found()
        with alone():
            report: AverageReport = average(paths, out=out, **options)
            return report
    except Exception as error:
        # Whatever fails here: the training is done, and what its script does next matters more.
        if strict:
            raise
        why = str(error) if isinstance(error, CkptError) else f"{type(error).__name__}: {error}"
        warnings.warn(f"The checkpoints of this training were not averaged: {why}", stacklevel=2)
        return None
