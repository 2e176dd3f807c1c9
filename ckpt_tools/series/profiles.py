"""Profiles: how much each training step counts in an average, and the mixture of averages that is nearest to another.

A profile is a density over training time t in (0, T], in steps; it integrates to 1. Step n is the stretch (n - 1, n].

- power: (g + 1) t^g / T^(g + 1) (EDM2, arXiv 2312.02696)
- exponential: decay d a step, k e^(-k (T - t)) with k = -ln d; what is left of the start, d^T, is on the first step
- snapshot: all at T, which is no density, but its integral is a step
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import UsageError
from .rules.amounts import parse_span
from .rules.power import LARGEST_GAMMA, gamma_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Profile:
    """How much each training step counts.

    Attributes:
        end: T, the last step, above 0.
        kind: ``power``, ``exponential`` or ``snapshot``.
        value: g; d, below 1; 0 for a snapshot.
    """

    end: float
    kind: str
    value: float = 0.0

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """Return the density at times (float64, any shape); not of a snapshot."""
        inside = (t <= self.end).double()
        if self.kind == "power":
            return inside * (self.value + 1) / self.end * (t / self.end).clamp(max=1).pow(self.value)
        rate = -math.log(self.value)
        return inside * (rate * self._fading(t) + (t < 1).double() * math.pow(self.value, self.end))

    def cumulative(self, t: torch.Tensor) -> torch.Tensor:
        """Return the integral of the density up to times (float64, any shape)."""
        if self.kind == "power":
            return (t / self.end).clamp(max=1).pow(self.value + 1)
        if self.kind == "snapshot":
            return (t >= self.end).double()
        return self._fading(t) - math.pow(self.value, self.end) * (1 - t.clamp(max=1))

    def _fading(self, t: torch.Tensor) -> torch.Tensor:
        return (math.log(self.value) * (self.end - t).clamp(min=0)).exp()

    @property
    def edges(self) -> list[float]:
        """Times between which the density is smooth: ever closer to the end, where most of it may be, and to 0."""
        if self.kind == "snapshot":
            return [0.0, self.end]
        halves = [2.0**-k for k in range(1, 50)]
        return [
            0.0,
            min(1.0, self.end),
            *(self.end * (1 - h) for h in halves),
            *(self.end * h for h in halves),
            self.end,
        ]


@lru_cache(maxsize=8)
def mixture(sources: tuple[Profile, ...], wanted: Profile) -> tuple[tuple[float, ...], float]:
    """Return the coefficients of the mixture of averages that is nearest to a profile, by least squares.

    It minimises the integral of the squared difference of the densities (EDM2, algorithm 3), and is then divided by
    its sum. With snapshots among the sources, it minimises that of the cumulative profiles, for coefficients whose sum
    is 1: an average is the sum of all updates so far, each times one minus the cumulative profile, so this is the
    expected squared error where updates are independent, in units of the distance between the last weights and the
    wanted average.

    Args:
        sources: of the averages that there are.
        wanted: the profile.

    Returns:
        A coefficient for each source, and the relative residual ||sum x_i p_i - p|| / ||p|| after the division; of
        equal sources, each has the same part.
    """
    import torch

    nodes, weights = _quadrature(sorted({edge for each in (*sources, wanted) for edge in each.edges}))
    scale = weights.sqrt()
    if any(each.kind == "snapshot" for each in sources):
        steps = torch.stack([each.cumulative(nodes) * scale for each in sources], dim=1)
        return _of_sum_1(steps, wanted.cumulative(nodes) * scale)
    columns = torch.stack([each.density(nodes) * scale for each in sources], dim=1)
    target = wanted.density(nodes) * scale
    # Columns of length 1, so that the rank is found whatever the widths of the profiles are.
    lengths = columns.norm(dim=0)
    solution = torch.linalg.lstsq(columns / lengths, target[:, None], rcond=1e-12, driver="gelsd").solution[:, 0]
    found = solution / lengths
    total = found.sum().item()
    if abs(total) < 1e-9:
        return tuple(found.tolist()), 1.0
    found = found / total
    residual = (columns @ found - target).norm() / target.norm()
    return tuple(found.tolist()), residual.item()


def _of_sum_1(columns: torch.Tensor, target: torch.Tensor) -> tuple[tuple[float, ...], float]:
    """Return the coefficients of least squares among those whose sum is 1, and the relative residual."""
    import torch

    n = columns.shape[1]
    ones = torch.ones(n, 1, dtype=torch.float64)
    directions = torch.linalg.qr(ones, mode="complete").Q[:, 1:]  # in which the sum does not change
    start = columns.mean(dim=1)
    solution = torch.linalg.lstsq(columns @ directions, (target - start)[:, None], rcond=1e-12, driver="gelsd").solution
    found = 1 / n + (directions @ solution)[:, 0]
    return tuple(found.tolist()), ((columns @ found - target).norm() / target.norm()).item()


def _quadrature(edges: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nodes and weights of Gauss and Legendre's rule on each stretch between edges."""
    import torch

    # Golub and Welsch: nodes are the eigenvalues of the Jacobi matrix of the Legendre polynomials.
    n = 12
    beta = torch.tensor([k / math.sqrt(4 * k * k - 1) for k in range(1, n)], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    ends = torch.tensor(edges, dtype=torch.float64)
    half, middle = (ends[1:] - ends[:-1]) / 2, (ends[1:] + ends[:-1]) / 2
    return (middle[:, None] + half[:, None] * values).flatten(), (half[:, None] * 2 * vectors[0] ** 2).flatten()


_SHORTEST = 0.01  # steps; nothing but the last one is left long before
_RANGES = {"gamma": f"gamma is 0 or more, and {LARGEST_GAMMA:.0e} at most", "decay": "a decay is between 0 and 1"}
_FORM = re.compile(r"(sigma-rel|gamma|decay|half-life)\s*[=:]\s*(\S+)|(snapshot)")


def parse_profile(name: str, text: str, end: float) -> Profile:
    """Read a profile that ends at a step.

    Args:
        name: of the parameter, for the message.
        text: ``sigma-rel=0.05``, ``gamma=6.94``, ``decay=0.9999`` (a step), ``half-life=20k`` (steps, or ``5%`` of the
            training so far) or, for what files hold, ``snapshot``; a colon may stand for the equal sign.
        end: the last step.

    Raises:
        UsageError: something else, or a number out of range.
    """
    match = _FORM.fullmatch(text.strip().lower().replace("_", "-"))
    if match is None or (match[3] and name == "target"):
        raise UsageError(
            f"`{name}={text!r}` is not a profile; write sigma-rel=0.12, gamma=6.94, decay=0.9999 or half-life=5%."
        )
    kind, value, snapshot = match.groups()
    if snapshot:
        return Profile(end, "snapshot")
    if kind == "half-life":
        length = parse_span(name, value).of(end)
        if length < _SHORTEST:
            raise UsageError(f"`{name}={text!r}`: a half-life is {_SHORTEST:g} steps or more.")
        return Profile(end, "exponential", 2 ** (-1 / length))
    try:
        number = float(value)
    except ValueError:
        raise UsageError(f"`{name}={text!r}`: {value!r} is not a number.") from None
    if kind == "sigma-rel":
        return Profile(end, "power", gamma_of(number, f"{name}={text!r}"))
    if kind == "gamma" and 0 <= number <= LARGEST_GAMMA:
        return Profile(end, "power", number)
    if kind == "decay" and 0 < number < 1:
        return Profile(end, "exponential", number)
    raise UsageError(f"`{name}={text!r}`: {_RANGES[kind]}.")
