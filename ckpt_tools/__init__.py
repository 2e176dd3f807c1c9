"""ckpt-tools: average, convert and recalibrate saved PyTorch checkpoints.

The names below are the public API. They are imported on first use, so that ``import ckpt_tools``
is fast and does not import torch.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # Ctrl-C in an import here would end in a traceback of Python's, so as few as possible
if TYPE_CHECKING:
    from typing import Any

    from .batchnorm import BatchNormReport, recalibrate_bn
    from .checkpoints.open import Checkpoint, open_checkpoint
    from .errors import CkptError
    from .jobs.average import AverageReport, average
    from .jobs.card import CardReport, card
    from .jobs.clean import CleanReport, clean
    from .jobs.convert import ConvertReport, convert
    from .jobs.diff import DiffReport, diff
    from .jobs.evaluate.job import evaluate
    from .jobs.evaluate.report import EvaluationReport
    from .jobs.fix_prefix import PrefixReport, fix_prefix
    from .jobs.look import LookReport, look
    from .jobs.recalibrate import RecalibrationReport, recalibrate_checkpoint
    from .jobs.strip import StripReport, strip
    from .jobs.sweep.job import sweep
    from .jobs.sweep.report import SweepReport
    from .jobs.tune.job import tune_checkpoint
    from .jobs.tune.report import TuneReport
    from .jobs.verify.job import VerifyReport, verify

__version__ = "0.2.0"
__all__ = [
    "AverageReport",
    "BatchNormReport",
    "CardReport",
    "Checkpoint",
    "CkptError",
    "CleanReport",
    "ConvertReport",
    "DiffReport",
    "EvaluationReport",
    "LookReport",
    "PrefixReport",
    "RecalibrationReport",
    "StripReport",
    "SweepReport",
    "TuneReport",
    "VerifyReport",
    "__version__",
    "average",
    "card",
    "clean",
    "convert",
    "diff",
    "evaluate",
    "fix_prefix",
    "look",
    "open_checkpoint",
    "recalibrate_bn",
    "recalibrate_checkpoint",
    "strip",
    "sweep",
    "tune_checkpoint",
    "verify",
]

_HOMES = {
    "AverageReport": "jobs.average",
    "average": "jobs.average",
    "BatchNormReport": "batchnorm",
    "recalibrate_bn": "batchnorm",
    "RecalibrationReport": "jobs.recalibrate",
    "recalibrate_checkpoint": "jobs.recalibrate",
    "Checkpoint": "checkpoints.open",
    "open_checkpoint": "checkpoints.open",
    "DiffReport": "jobs.diff",
    "diff": "jobs.diff",
    "EvaluationReport": "jobs.evaluate.report",
    "evaluate": "jobs.evaluate.job",
    "LookReport": "jobs.look",
    "look": "jobs.look",
    "SweepReport": "jobs.sweep.report",
    "sweep": "jobs.sweep.job",
    "TuneReport": "jobs.tune.report",
    "tune_checkpoint": "jobs.tune.job",
    "VerifyReport": "jobs.verify.job",
    "verify": "jobs.verify.job",
    "CkptError": "errors",
    "CardReport": "jobs.card",
    "card": "jobs.card",
    "CleanReport": "jobs.clean",
    "clean": "jobs.clean",
    "ConvertReport": "jobs.convert",
    "convert": "jobs.convert",
    "StripReport": "jobs.strip",
    "strip": "jobs.strip",
    "PrefixReport": "jobs.fix_prefix",
    "fix_prefix": "jobs.fix_prefix",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ckpt_tools' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
