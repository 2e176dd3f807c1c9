"""BatchNorm: exact statistics for averaged weights."""

from .recalibrate import recalibrate_bn
from .report import BatchNormReport, LayerReport

__all__ = ["BatchNormReport", "LayerReport", "recalibrate_bn"]
