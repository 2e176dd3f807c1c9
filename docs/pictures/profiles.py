"""The picture of averaging.md: how much each checkpoint counts, by the rules themselves.

    python docs/pictures/profiles.py

Writes profiles.svg beside itself, with the same bytes each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckpt_tools.jobs.pictures import LINES, Picture, count_steps
from ckpt_tools.series.schedules import Schedule

SIZE = (10, 3)
"""Inches."""
TARGET = Path(__file__).with_suffix(".svg")
STEPS = tuple(range(1000, 20_001, 1000))
UNIFORM: dict[str, Any] = {"mode": "uniform"}
RULES: dict[str, dict[str, dict[str, Any]]] = {
    "--half-life": {
        "2k": {"mode": "ema", "half_life": "2k"},
        "5k": {"mode": "ema", "half_life": "5k"},
        "uniform": UNIFORM,
    },
    "--sigma-rel": {
        "0.05": {"mode": "power", "sigma_rel": 0.05},
        "0.15": {"mode": "power", "sigma_rel": 0.15},
        "uniform": UNIFORM,
    },
    "--shape": {name: {"mode": "decay", "shape": name} for name in ("1-sqrt", "cosine", "linear")},
}
"""The title of each panel, and its lines: label to the options of a rule."""


def curves() -> dict[str, dict[str, tuple[float, ...]]]:
    """Return the coefficients of each line."""
    return {
        title: {label: Schedule(**options).coefficients(STEPS) for label, options in lines.items()}
        for title, lines in RULES.items()
    }


def draw(figure: Any) -> None:
    """Draw all panels into an empty figure."""
    panels = figure.subplots(1, len(RULES), sharex=True)
    for axes, (title, lines) in zip(panels, curves().items(), strict=True):
        for (label, coefficients), (color, dashes) in zip(lines.items(), LINES, strict=False):
            axes.plot(STEPS, coefficients, color=color, linestyle=dashes, label=label)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=4)
        count_steps(axes)
        axes.legend(loc="best", fontsize=8)
    panels[0].set_ylabel("coefficient")
    panels[1].set_xlabel("training step of the checkpoint")


if __name__ == "__main__":
    Picture(TARGET, force=True).write(draw, SIZE)
