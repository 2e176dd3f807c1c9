"""Geometry: where the checkpoints of a series lie to each other, from their inner products alone.

With G_ij = <x_i, x_j>, the squared distance of two checkpoints is G_ii + G_jj - 2 G_ij, and that of x_i to the mean of
all is the mean of its squared distances less half the mean of all squared distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .rules.rule import Products

FAR = 3.0
"""A checkpoint is far from all others if the nearest is so many times as far from it as they are from one another.

In the median: so a run that moves in one direction, in ever shorter steps, has none that is far.
"""
ONE_BASIN = 0.9
"""In one basin, the mean is at least so long as the checkpoints are, on the average.

The mean of n checkpoints of one direction has their length. That of n runs from other starts, whose weights are
orthogonal but for chance, has 1 / sqrt(n) of it; of two such runs it is 0.71.
"""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The geometry of N checkpoints; lengths are Euclidean, over all values together.

    Attributes:
        norms: of each checkpoint.
        to_mean: distance of each to the mean of all.
        steps: distance of each to the next (N - 1).
        cosines: between each step and the next (N - 2); None if one of them is 0.
        mean_norm: norm of the mean over the mean of the norms; 1 if all are the same point.
        farthest: number of the checkpoint whose nearest other is the farthest, and how many times as far that is as the
            others are from one another, in the median; None for less than three.
    """

    norms: tuple[float, ...]
    to_mean: tuple[float, ...]
    steps: tuple[float, ...]
    cosines: tuple[float | None, ...]
    mean_norm: float
    farthest: tuple[int, float] | None

    @property
    def outlier(self) -> int | None:
        """Number of the one checkpoint that is far from all others, or None."""
        return self.farthest[0] if self.farthest is not None and self.farthest[1] > FAR else None

    @property
    def one_basin(self) -> bool:
        """False if the checkpoints point in other directions, so that their mean is much shorter than they are."""
        return self.mean_norm >= ONE_BASIN


def geometry(products: Products) -> Geometry:
    """Measure a series."""
    n, last = len(products), len(products) - 1
    inner = _differences(products)
    squares = [[max(inner[i][i] + inner[j][j] - 2 * inner[i][j], 0.0) for j in range(n)] for i in range(n)]
    norms = _norms(products)
    across = sum(products[i][last] for i in range(last)) / n
    length = math.sqrt(max(sum(map(sum, inner)) / n**2 + 2 * across + products[last][last], 0.0))
    whole = math.fsum(norms) / n
    return Geometry(
        norms=tuple(norms),
        to_mean=tuple(_to_mean(squares, range(n))),
        steps=tuple(math.sqrt(squares[i][i + 1]) for i in range(last)),
        cosines=tuple(_cosine(squares, i) for i in range(n - 2)),
        mean_norm=length / whole if whole else 1.0,
        farthest=_farthest(squares),
    )


def _differences(products: Products) -> list[list[float]]:
    """Return <x_i - x_N, x_j - x_N>."""
    return [[*row[:-1], 0.0] for row in products[:-1]] + [[0.0] * len(products)]


def _norms(products: Products) -> list[float]:
    own = products[-1][-1]
    squares = [row[i] + 2 * row[-1] + own for i, row in enumerate(products[:-1])]
    return [math.sqrt(max(square, 0.0)) for square in (*squares, own)]


def _to_mean(squares: Sequence[Sequence[float]], of: Sequence[int]) -> list[float]:
    """Return the distances of some checkpoints to their mean."""
    means = [math.fsum(squares[i][j] for j in of) / len(of) for i in of]
    between = math.fsum(means) / (2 * len(of))
    return [math.sqrt(max(mean - between, 0.0)) for mean in means]


def _cosine(squares: Sequence[Sequence[float]], i: int) -> float | None:
    a, b, across = squares[i][i + 1], squares[i + 1][i + 2], squares[i][i + 2]
    return (across - a - b) / (2 * math.sqrt(a) * math.sqrt(b)) if a and b else None


def _farthest(squares: Sequence[Sequence[float]]) -> tuple[int, float] | None:
    n = len(squares)
    if n < 3:
        return None
    nearest = [min(square for j, square in enumerate(row) if j != i) for i, row in enumerate(squares)]
    i = max(range(n), key=nearest.__getitem__)
    others = [j for j in range(n) if j != i]
    distance = math.sqrt(nearest[i])
    usual = median(math.sqrt(squares[j][k]) for j in others for k in others if j < k)
    return i, distance / usual if usual else math.inf if distance else 1.0


def movement(products: Products) -> float:
    """Return how far a tensor moves: the root of the mean squared distance to its mean, over the mean norm."""
    n, inner = len(products), _differences(products)
    spread = sum(inner[i][i] for i in range(n)) / n - sum(map(sum, inner)) / n**2
    whole = math.fsum(_norms(products)) / n
    return math.sqrt(max(spread, 0.0)) / whole if whole else 0.0
