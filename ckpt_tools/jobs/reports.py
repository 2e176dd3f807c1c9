"""Reports: what the reports of all jobs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any


class Report:
    """The base of the reports, which are frozen dataclasses, without a `__repr__` of their own."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    def __repr__(self) -> str:
        """Return one line; lists are there by their lengths."""
        from ..compute.shown import one_line

        return one_line(self)

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it."""
        from ..compute.shown import as_html

        return as_html(self)


def some(names: Sequence[str]) -> str:
    """Write the first name, and how many more there are."""
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
