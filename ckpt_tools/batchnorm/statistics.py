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
from torch import Tensor, nn

from ..compute import native

_BLOCK = 256 * 1024
"""Elements widened to float64 at a time: 2 MB, which stay in a cache."""
_TOGETHER = 16
"""Batches of a layer that are merged at once: few enough to take no memory to speak of."""


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

    On the CPU they are exact but for float64 rounding: by the C extension or, without it, by torch. Elsewhere they come
    from `measure_by_image`, which states its error.

    Args:
        values: [N, C] or [N, C, ...], floating point, on any device.

    Returns:
        float64 moments of the C channels, on that device.
    """
    if values.numel() == 0:
        return Moments.none(values.shape[1], values.device)
    if values.device.type != "cpu":
        return measure_by_image(values)
    return _by_native(values) or _by_torch(values)


def _by_native(values: Tensor) -> Moments | None:
    """Measure in C, in as many threads as torch uses; None if C cannot."""
    if type(values) not in (Tensor, nn.Parameter) or values.layout != torch.strided:
        return None  # a subclass may have its values elsewhere
    channels = values.shape[1]
    count = values.numel() // channels
    values = values.resolve_neg()
    by_channel = values.movedim(1, -1).is_contiguous()
    values = values if by_channel else values.contiguous()
    shape = (count, channels, 1) if by_channel else (values.shape[0], channels, count // values.shape[0])
    dtype = str(values.dtype).removeprefix("torch.")
    found = native.moments(values.data_ptr(), dtype, shape, torch.get_num_threads())
    return None if found is None else Moments(count, *torch.frombuffer(found, dtype=torch.float64).view(2, channels))


def _by_torch(values: Tensor) -> Moments:
    """Measure by torch, on the CPU."""
    channels = values.shape[1]
    per_image = math.prod(values.shape[2:])
    count = values.shape[0] * per_image
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


def measure_by_image(values: Tensor) -> Moments:
    """Measure by one reduction of the values as they are, as suits a GPU; nothing waits for the device.

    `torch.var_mean` reduces the values of each image and channel in float32 (float64 values: in float64), and these
    means and variances are merged in float64. torch updates a running mean and M2 (Welford). With u = 2^-24 (2^-53),
    M the largest magnitude in a channel and sigma its standard deviation, the mean is off by a small multiple of u M,
    and the variance by one of u sigma^2 + u M sigma + u^2 M^2 (Chan, Golub and LeVeque 1983). To store the mean in a
    float32 buffer rounds it by u M, too.

    Args:
        values: [N, C] or [N, C, ...], floating point, not empty, on any device.
    """
    wide = values if values.dtype == torch.float64 else values.float()
    images, channels = values.shape[:2]
    count = values.numel() // channels
    if count == images:
        within, means = None, wide.reshape(images, channels).double()
    else:
        within, means = (part.double() for part in torch.var_mean(wide, tuple(range(2, wide.dim())), correction=0))
    found = _of_rows(means)
    return Moments(count, found.mean, found.m2 * (count // images) + (0 if within is None else within.mean(0) * count))


def _of_rows(table: Tensor) -> Moments:
    """Return the moments of the columns of a table, float64 [K, C]."""
    origin = table[0]  # large, close means would round away what differs
    variance, mean = torch.var_mean(table - origin, 0, correction=0)
    return Moments(len(table), origin + mean, variance * len(table))


class LayerMoments:
    """The measurements of one layer. Batches are merged some at a time: a merge takes many small operations."""

    def __init__(self, channels: int, device: torch.device) -> None:
        none = Moments.none(channels, device)
        self._sets = (none, none, none)
        self._batches: list[Moments] = []  # not in the sets yet

    def add(self, batch: Moments) -> None:
        """Add what the layer saw in one call."""
        self._batches.append(batch)
        if len(self._batches) == _TOGETHER:
            self._merge()

    def _merge(self) -> None:
        batches, self._batches = self._batches, []
        population, means, variances = self._sets
        self._sets = (
            merge([population, *batches]),
            merge([means, _of_rows(torch.stack([batch.mean for batch in batches]))]),
            merge([variances, _of_rows(torch.stack([batch.variance(correction=1) for batch in batches]))]),
        )

    @property
    def sets(self) -> tuple[Moments, Moments, Moments]:
        """`population`, `means` and `variances`."""
        if self._batches:
            self._merge()
        return self._sets

    @sets.setter
    def sets(self, new: tuple[Moments, Moments, Moments]) -> None:
        self._sets, self._batches = new, []

    @property
    def population(self) -> Moments:
        """The moments of all values."""
        return self.sets[0]

    @property
    def means(self) -> Moments:
        """The moments, over batches, of their means."""
        return self.sets[1]

    @property
    def variances(self) -> Moments:
        """The moments, over batches, of their unbiased variances."""
        return self.sets[2]

    def estimate(self, estimator: str) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance to store, float64 [C].

        Args:
            estimator: ``population`` or ``batch-mean``; see `recalibrate_bn`.
        """
        if estimator == "batch-mean":
            return self.means.mean, self.variances.mean
        return self.population.mean, self.population.variance(correction=1)
