"""BatchNorm: exact statistics for weights that have none of their own, such as averages."""

from .recalibrate import recalibrate_bn
from .report import BatchNormReport, LayerReport

__all__ = ["BatchNormReport", "LayerReport", "recalibrate_bn"]
