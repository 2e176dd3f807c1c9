"""Statistics: count, mean and M2 of each channel, merged exactly, in float64.

M2 is the sum of squared differences from the mean. Sets are merged by the pairwise formula of
Chan, Golub and LeVeque (1979), so nothing is lost at large means, and the result does not depend on
the split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 256 * 1024
"""Elements widened to float64 at a time: 2 MB, which stay in a cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean and M2 of a set of values for each channel.

    Attributes:
        count: values per channel.
        mean: float64 [C]; 0 where there is no value.
        m2: float64 [C], sum of squared differences from the mean.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def none(cls, channels: int, device: torch.device | None = None) -> Moments:
        """Return the moments of no values at all."""
        zero = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(0, zero, zero)

    def with_one(self, values: Tensor) -> Moments:
        """Return the moments with one more value a channel, float64 [C]."""
        return merge([self, Moments(1, values, torch.zeros_like(values))])

    def variance(self, *, correction: int) -> Tensor:
        """Return M2 / (count - correction), float64 [C]; 0 where there are too few values for it."""
        return self.m2 / (self.count - correction) if self.count > correction else torch.zeros_like(self.m2)


def merge(parts: Sequence[Moments]) -> Moments:
    """Return the moments of the union of sets with the same channels; exact but for float64 rounding."""
    parts = [part for part in parts if part.count] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64, device=parts[0].mean.device)
    mean, m2 = _union(counts[:, None], torch.stack([p.mean for p in parts]), torch.stack([p.m2 for p in parts]))
    return Moments(sum(part.count for part in parts), mean, m2)


def _union(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor]:
    """Merge K sets at once: counts [K, 1], means and M2s [K, C]."""
    # Differences from one of the means first: a weighted sum of large, close means would round away what differs.
    origin = means[0]
    apart = means - origin
    shift = (counts * apart).sum(0) / counts.sum()
    return origin + shift, m2s.sum(0) + (counts * (apart - shift).square()).sum(0)


def measure(values: Tensor) -> Moments:
    """Return the moments of a layer's input over batch and space.

    Args:
        values: [N, C] or [N, C, ...], floating point, on any device.

    Returns:
        float64 moments of the C channels, on that device.
    """
    channels = values.shape[1]
    per_image = math.prod(values.shape[2:])
    count = values.shape[0] * per_image
    if count == 0:
        return Moments.none(channels, values.device)
    last = values.movedim(1, -1)
    by_channel = per_image == 1 or last.is_contiguous()
    # Channels last: mean and M2 of each column, block by block. Else: of each row, which is one image and channel.
    table = last.reshape(count, channels) if by_channel else values.reshape(-1, per_image)
    blocks = torch.split(table, max(1, _BLOCK // table.shape[1]))
    wide = torch.empty(blocks[0].shape, dtype=torch.float64, device=values.device)
    moments = [_centred(wide[: len(block)].copy_(block), 0 if by_channel else 1) for block in blocks]
    means, m2s = (torch.cat(each).view(-1, channels) for each in zip(*moments, strict=True))
    if by_channel:
        counts = torch.tensor([len(block) for block in blocks], dtype=torch.float64, device=values.device)
    else:
        counts = torch.full((len(means),), float(per_image), dtype=torch.float64, device=values.device)
    return Moments(count, *_union(counts[:, None], means, m2s))


def _centred(wide: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return mean and M2 along a dimension, in two passes; the values are overwritten."""
    mean = wide.mean(dim, keepdim=True)
    wide.sub_(mean)
    return mean.squeeze(dim), wide.square_().sum(dim)


class LayerMoments:
    """The measurements of one layer."""

    def __init__(self, channels: int, device: torch.device) -> None:
        none = Moments.none(channels, device)
        self.population = none
        self.means = none  # over batches, of their means
        self.variances = none  # over batches, of their unbiased variances

    def add(self, batch: Moments) -> None:
        self.population = merge([self.population, batch])
        self.means = self.means.with_one(batch.mean)
        self.variances = self.variances.with_one(batch.variance(correction=1))

    def estimate(self, estimator: str) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance to store, float64 [C]."""
        if estimator == "batch-mean":
            return self.means.mean, self.variances.mean
        return self.population.mean, self.population.variance(correction=1)
