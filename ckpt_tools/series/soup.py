"""Greedy soup: members are added one by one, best first, and stay if the average is not worse (arXiv 2203.05482)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

Soup = tuple[int, ...]


def greedy(scores: Sequence[float]) -> Generator[Soup, float, Soup]:
    """Choose members of a uniform average.

    A generator: it yields the soups to evaluate, each as the numbers of its members in the order in which they were
    added, and is sent the score of each.

    Args:
        scores: of each member alone; higher is better. Those of NaN are left out; the earlier one is first at a tie.

    Returns:
        The soup that is left, by ``return``.

    Example:
        >>> search = greedy([0.7, 0.9, 0.8])
        >>> next(search)
        (1, 2)
        >>> search.send(0.85)  # worse than 0.9 of the first alone
        (1, 0)
        >>> try:
        ...     search.send(0.91)
        ... except StopIteration as stop:
        ...     print(stop.value)
        (1, 0)
    """
    order = sorted((i for i, score in enumerate(scores) if not math.isnan(score)), key=lambda i: -scores[i])
    soup: Soup = tuple(order[:1])
    best = scores[order[0]] if order else math.nan
    for i in order[1:]:
        score = yield (*soup, i)
        if score >= best:
            soup, best = (*soup, i), score
    return soup
