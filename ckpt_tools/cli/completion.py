"""Completion: what a shell offers for the value of an option. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..series.rules.option import Option

ASKED = "_CKPT_COMPLETE" in os.environ
"""Whether a shell has started this process to complete a line."""


def values(option: Option) -> Callable[[str], list[str]] | None:
    """Return what completes the value of an option; None if a shell completes it with files, or nothing does."""
    if not option.words:
        return None

    def complete(incomplete: str) -> list[str]:
        *before, last = incomplete.split(",")  # sweep takes lists
        return [",".join([*before, word]) for word in option.words if word.startswith(last)]

    return complete


def prepare() -> None:
    """Let Typer know the shells; it does so by itself only for an app whose every run has the options for them."""
    from typer import completion

    completion.completion_init()  # type: ignore[attr-defined]
