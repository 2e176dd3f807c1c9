"""Check: what came of one look at a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"


@dataclass(frozen=True, slots=True)
class Check:
    """What came of one check.

    Attributes:
        name: of the check.
        result: ``ok``, ``failed`` or ``not checked``.
        detail: what was checked, what is wrong, or why it was not checked, in words.
    """

    name: str
    result: str
    detail: str
