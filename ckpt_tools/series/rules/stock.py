"""Model Stock: fine-tuned models, and the point between their mean and their start (arXiv 2403.19522, section 4).

N models that were fine-tuned from one start w_0 lie on a thin shell around a centre. With cos, the mean cosine between
two of the differences w_i - w_0, the point nearest to that centre on the line from w_0 to the mean of the models is
w = t mean + (1 - t) w_0 with t = N cos / (1 + (N - 1) cos). Each tensor has its own.
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

from ...errors import UsageError
from .option import Option, Origins
from .rule import Products, Rule

_GRAIN = 2.0**-20
"""Ratios are multiples of it, so that they do not depend on the order in which products are summed."""


def stock(products: Products, *, base: str | Path | None = None) -> tuple[float, ...]:
    """Weigh the start and N models for one tensor; a single model counts alone.

    Args:
        products: (N + 1, N + 1): row i < N and column j < N have the inner product of w_i - w_0 and w_j - w_0.
        base: the start; only its presence is checked, before.

    Returns:
        The coefficient of the start, then those of the models.
    """
    n = len(products) - 1
    t = float(n) if n < 2 else _ratio(products)
    return (1.0 - t, *[t / n for _ in range(n)])


def _ratio(products: Products) -> float:
    """Return t, a multiple of 2^-20: 0 where the mean cosine is negative.

    A model that is the start itself is orthogonal to all others.
    """
    n = len(products) - 1
    lengths = [math.sqrt(max(products[i][i], 0.0)) for i in range(n)]
    cosines = [
        products[i][j] / lengths[i] / lengths[j] if lengths[i] and lengths[j] else 0.0
        for i, j in combinations(range(n), 2)
    ]
    cosine = min(max(math.fsum(cosines) / len(cosines), 0.0), 1.0)
    return round(n * cosine / (1 + (n - 1) * cosine) / _GRAIN) * _GRAIN


def _check(*, base: str | Path | None) -> None:
    if base is None:
        raise UsageError("`mode='stock'` needs `base`, the checkpoint that all were fine-tuned from.")


RULE = Rule(
    stock,
    (
        Option(
            "base",
            str | Path,
            None,
            "stock: the checkpoint that all were fine-tuned from.",
            metavar="CKPT",
            origins=Origins(once_only=True),
        ),
    ),
    check=_check,
    needs="products",
)
