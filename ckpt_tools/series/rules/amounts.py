"""Amounts: numbers of steps as people write them, such as 20k, 1.5M or 5%."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from ...errors import UsageError

Steps = int | str
"""A number of steps as it is given: a whole number, or text such as ``20k``, ``1.5M`` or ``2B``."""
Span = int | float | str
"""A length of training as it is given: a number, text such as ``20k``, or a part of the run such as ``5%``."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_AMOUNT = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*(%|[kKmMbB]?(?:[ _-]?steps?)?)\s*")


@dataclass(frozen=True, slots=True)
class Amount:
    """A length of training.

    Attributes:
        value: a number of steps (or files), or with `share` a part of the run between 0 and 1.
        share: True for a part of the run.
    """

    value: float
    share: bool = False

    def of(self, run: float) -> float:
        """Return the number of steps in a run of so many."""
        return self.value * run if self.share else self.value


def parse_span(name: str, given: Span) -> Amount:
    """Read a length of training, which is more than 0.

    Args:
        name: of the parameter, for the message.

    Raises:
        UsageError: not a length, 0, or more than the run.
    """
    if isinstance(given, str):
        match = _AMOUNT.fullmatch(given)
        value = float(match[1]) * (0.01 if match[2] == "%" else _unit(match)) if match else math.nan
        amount = Amount(value, share=match is not None and match[2] == "%")
    elif isinstance(given, bool) or not isinstance(given, (int, float)):
        amount = Amount(math.nan)
    else:
        amount = Amount(float(given))
    if not (0 < amount.value < math.inf and not (amount.share and amount.value > 1)):
        raise UsageError(
            f"`{name}={given!r}` is not a length of training; write a number of steps such as 20000, 20k or 1.5M, "
            "or a part of the run such as 5%."
        )
    return amount


def _unit(match: re.Match[str]) -> int:
    return _UNITS[re.sub("[ _-]?steps?", "", match[2].lower())]


def parse_steps(name: str, given: Steps, like: str = " of steps; write one such as 20000, 20k or 1.5M") -> int:
    """Read a whole number, which may have k, M or B behind it.

    Args:
        name: of the parameter, for the message.
        like: the end of the message: what the number counts, and an example.

    Raises:
        UsageError: something else; names the parameter.
    """
    if isinstance(given, str):
        match = _AMOUNT.fullmatch(given)
        if match and match[2] != "%":
            exact = Fraction(match[1]) * _unit(match)
            if exact.denominator == 1:
                return int(exact)
    elif isinstance(given, int) and not isinstance(given, bool):
        return given
    raise UsageError(f"`{name}={given!r}` is not a whole number{like}.")
