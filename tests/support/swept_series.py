"""A series whose best average is known, and a function that scores it; the function writes down each call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ckpt_tools import average, open_checkpoint, sweep
from ckpt_tools.jobs.sweep.report import SweepReport

N = 6
OPTIMUM = 3.2  # of the one weight of these models
FUNCTION = "scores.py:score"
SCORES = """
from pathlib import Path
def score(state):
    with open("calls", "a") as calls:
        print("called", file=calls)
    return {"error": abs(state["w"].double().mean().item() - %s)}
"""


def series(save: Callable[..., Path], optimum: float = OPTIMUM) -> None:
    """Write the series into ``run/``, and the function into ``scores.py``."""
    for i in range(N):
        save(
            f"run/c-{i}.pth",
            {"model": {"w": torch.full((4, 3), float(i)), "n": torch.tensor(i)}, "step": 100 * i + 100},
        )
    Path("scores.py").write_text(SCORES % optimum)
    sys.modules.pop("scores", None)


def scored(**options: Any) -> SweepReport:
    """Sweep over the series."""
    return sweep("run", eval_function=FUNCTION, in_memory=True, **options)


def error_of(**options: Any) -> float:
    """Return what the function should say of an average, which `average` makes in a file of its own."""
    average("run", **options, out="alone.pth", force=True)
    return abs(open_checkpoint("alone.pth")["w"].double().mean().item() - OPTIMUM)
