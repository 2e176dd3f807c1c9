"""The aim: the metric that decides which candidate is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import UsageError
from ...series.metrics import lower_by_name


@dataclass(frozen=True, slots=True)
class Aim:
    """The metric that decides.

    Attributes:
        metric: its name.
        lower: True if lower is better.
    """

    metric: str
    lower: bool

    def score(self, metrics: Mapping[str, float]) -> float:
        """Return a number of which higher is better; NaN without this metric, as after a failed evaluation."""
        value = metrics.get(self.metric, math.nan)
        return -value if self.lower else value


def aim_of(metrics: Sequence[str], metric: str | None, usual: str | None, *, lower: bool | None) -> Aim:
    """Choose the metric that decides.

    Args:
        metrics: that an evaluation gave.
        metric, lower: as the user says; None if not.
        usual: of this kind of evaluation; None if it has none.

    Raises:
        UsageError: there is no such metric, or there are several and none is asked for.
    """
    name = metric or (usual if usual in metrics else metrics[0] if len(metrics) == 1 else None)
    if name is None:
        raise UsageError(f"the evaluation gives {', '.join(metrics)}: choose the one that decides with `metric`.")
    if name not in metrics:
        raise UsageError(f"`metric={name!r}`: the evaluation gives {', '.join(metrics)}.")
    return Aim(name, lower_by_name(name) if lower is None else lower)
