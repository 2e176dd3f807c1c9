"""Options of an evaluation."""

from collections.abc import Callable
from pathlib import Path

from ...series.rules.option import FACTORY
from ..option_groups import Options, option
from ..options import Images, Inference, Network, State, Statistics
from ..sweep.options import Evaluation


class Scoring(Options, more=(Evaluation,), without=("eval_data", "metric")):
    """How a checkpoint is scored, if not on labelled images."""

    title = "Evaluation"

    metric: str | None = option("The one that decides.", None, implied="top1, or the only one", metavar="KEY")


class EvaluatedImages(Images, more=(Statistics,)):
    """The images of the evaluation, and those for BatchNorm statistics."""

    data: str | None = option(  # type: ignore[assignment]
        "Labelled images: folder, tar, timm dataset (hfds/...), or file.py:factory.",
        None,
        metavar="DATA",
        names_code=FACTORY,
    )
    recal_bn: str | None = option(
        "Measure BatchNorm statistics on these images before every score.", None, metavar="DATA", names_code=FACTORY
    )
    images: int | None = option(
        "Of `recal_bn`: number of images, chosen at random, or all (in Python: -1).",
        None,
        implied="8192, or all if fewer",
        metavar="N",
    )
    seed: int = option("Of those images, and of the intervals.", 0)


class ScoreTable(Options):
    """Where the table goes."""

    title = "Output"

    csv: str | Path | None = option("Write the table, too.", None, metavar="FILE", once_only=True)
    force: bool = option("Replace an existing file.", False, once_only=True)


class Evaluating(Inference):
    """How an evaluation runs."""

    on_result: Callable[..., None] | None = option(
        "Called after each checkpoint with (what it scored, number done, number in all).", None
    )


GROUPS = (Scoring, State, Network, EvaluatedImages, ScoreTable, Evaluating)
"""All options of an evaluation, in the order of its parameters and of its help."""
