"""ckpt-tools: average, convert and recalibrate saved PyTorch checkpoints.

The names below are the public API. They are imported when first used, so that
``import ckpt_tools`` costs nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .averaging import AverageReport, average
    from .batchnorm import BatchNormReport, recalibrate_bn
    from .batchnorm.job import RecalibrationReport, recalibrate_checkpoint
    from .checkpoint import Checkpoint, open_checkpoint
    from .conversion import ConvertReport, convert
    from .diffing import DiffReport, diff
    from .errors import CkptError
    from .prefixes import PrefixReport, fix_prefix
    from .stripping import StripReport, strip

__version__ = "0.1.0"
__all__ = [
    "AverageReport",
    "BatchNormReport",
    "Checkpoint",
    "CkptError",
    "ConvertReport",
    "DiffReport",
    "PrefixReport",
    "RecalibrationReport",
    "StripReport",
    "__version__",
    "average",
    "convert",
    "diff",
    "fix_prefix",
    "open_checkpoint",
    "recalibrate_bn",
    "recalibrate_checkpoint",
    "strip",
]

_HOMES = {
    "AverageReport": "averaging",
    "average": "averaging",
    "BatchNormReport": "batchnorm",
    "recalibrate_bn": "batchnorm",
    "RecalibrationReport": "batchnorm.job",
    "recalibrate_checkpoint": "batchnorm.job",
    "Checkpoint": "checkpoint",
    "open_checkpoint": "checkpoint",
    "DiffReport": "diffing",
    "diff": "diffing",
    "CkptError": "errors",
    "ConvertReport": "conversion",
    "convert": "conversion",
    "StripReport": "stripping",
    "strip": "stripping",
    "PrefixReport": "prefixes",
    "fix_prefix": "prefixes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ckpt_tools' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
