"""ckpt-tools: average, convert and recalibrate saved PyTorch checkpoints.

The names below are the public API. They are imported on first use, so that ``import ckpt_tools`` is fast and does not
import torch. Their signatures for type checkers and editors are in ``__init__.pyi``.

Example:
    >>> import ckpt_tools
    >>> report = ckpt_tools.average("runs/", mode="ema", decay=0.99, out="averaged.pth")
    >>> weights = ckpt_tools.open_checkpoint("averaged.pth")
    >>> model.load_state_dict(weights)
"""

from __future__ import annotations

import importlib

__version__ = "0.2.0"

_HOMES = {
    "average": "jobs.average",
    "AverageReport": "jobs.average",
    "card": "jobs.card",
    "CardReport": "jobs.card",
    "clean": "jobs.clean",
    "CleanReport": "jobs.clean",
    "convert": "jobs.convert",
    "ConvertReport": "jobs.convert",
    "diff": "jobs.diff",
    "DiffReport": "jobs.diff",
    "evaluate": "jobs.evaluate.job",
    "EvaluationReport": "jobs.evaluate.report",
    "fix_prefix": "jobs.fix_prefix",
    "PrefixReport": "jobs.fix_prefix",
    "inspect": "jobs.inspect",
    "InspectReport": "jobs.inspect",
    "look": "jobs.look",
    "LookReport": "jobs.look",
    "open_checkpoint": "checkpoints.open",
    "Checkpoint": "checkpoints.open",
    "recalibrate_bn": "batchnorm",
    "BatchNormReport": "batchnorm",
    "recalibrate_checkpoint": "jobs.recalibrate",
    "RecalibrationReport": "jobs.recalibrate",
    "strip": "jobs.strip",
    "StripReport": "jobs.strip",
    "sweep": "jobs.sweep.job",
    "SweepReport": "jobs.sweep.report",
    "tune_checkpoint": "jobs.tune.job",
    "TuneReport": "jobs.tune.report",
    "verify": "jobs.verify.job",
    "VerifyReport": "jobs.verify.job",
    "CkptError": "errors",
    "UsageError": "errors",
    "SeriesError": "errors",
    "ReadError": "errors",
    "NotACheckpointError": "errors",
    "CorruptError": "errors",
    "UnsupportedError": "errors",
    "LayoutError": "errors",
    "AlignmentError": "errors",
    "NumericsError": "errors",
    "ModelError": "errors",
    "DataError": "errors",
    "WriteError": "errors",
    "WriteWarning": "errors",
}
"""Public name to the module that has it."""
__all__ = [*sorted(_HOMES), "__version__"]  # noqa: PLE0604


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ckpt_tools' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
