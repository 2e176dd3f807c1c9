"""BatchNorm: exact statistics for weights that have none of their own, such as averages."""

from .recalibrate import BatchNormReport, LayerReport, recalibrate_bn

__all__ = ["BatchNormReport", "LayerReport", "recalibrate_bn"]
