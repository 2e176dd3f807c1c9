"""Uniform: every checkpoint counts the same (SWA)."""

from __future__ import annotations

from collections.abc import Sequence

from .rule import Rule


def uniform(n: int) -> tuple[float, ...]:
    """Give each of n checkpoints the same weight (SWA; torch's AveragedModel by default)."""
    return (1.0 / n,) * n


def _uniform(steps: Sequence[int | None]) -> tuple[float, ...]:
    return uniform(len(steps))


RULE = Rule(_uniform)
