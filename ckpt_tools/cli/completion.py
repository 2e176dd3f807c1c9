"""Completion: what a shell offers for the value of an option. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

ASKED = "_CKPT_COMPLETE" in os.environ
"""Whether a shell has started this process to complete a line."""

_WORDS = {
    "state": ("auto", "raw", "ema", "eval"),
    "state_b": ("auto", "raw", "ema", "eval"),
    "order": ("auto", "given", "natural", "mtime"),
    "match": ("name", "order"),
    "keys": ("strict", "intersection", "union"),
    "buffers": ("average", "last"),
    "lora": ("factors", "product"),
    "by": ("auto", "steps", "files"),
    "warmup": ("litema", "timm"),
    "shape": ("linear", "1-sqrt", "cosine", "inverse-sqrt"),
    "device": ("auto", "cpu", "cuda", "cuda:0"),
    "estimator": ("population", "batch-mean"),
}


def values(name: str) -> Callable[[str], list[str]] | None:
    """Return what completes the value of an option; None if a shell completes it with files, or nothing does."""
    if name in ("mode", "dtype", "to", *_WORDS):

        def complete(incomplete: str) -> list[str]:
            *before, last = incomplete.split(",")  # sweep takes lists
            return [",".join([*before, word]) for word in words(name) if word.startswith(last)]

        return complete
    return None


def words(name: str) -> Sequence[str]:
    """Return the values that an option takes, by name."""
    if name == "mode":
        from ..series.schedules import SCHEDULES

        return [*SCHEDULES]
    if name == "dtype":
        from ..tensors import FLOAT_DTYPES

        return FLOAT_DTYPES
    if name == "to":
        from ..checkpoints.layouts import LAYOUTS

        return [layout.name for layout in LAYOUTS if layout.written]
    return _WORDS[name]


def prepare() -> None:
    """Let Typer know the shells; it does so by itself only for an app whose every run has the options for them."""
    from typer import completion

    completion.completion_init()  # type: ignore[attr-defined]
