"""The options of a tuning."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ...series.rules.option import FACTORY, Numbers
from ..option_groups import Options, option
from ..options import Images, Network, Output


class Classifier(Options, more=(Network,), without=("forward", "inputs", "mask")):
    """The network that weights belong to. It is called with one tensor, the images."""

    title = "The network"


class LabelledImages(Images):
    """The images that a network is trained and evaluated on."""

    data: str = option(
        "Labelled images to train on: folder, tar, timm dataset or file.py:factory.",
        metavar="DATA",
        names_code=FACTORY,
    )
    images: int | None = option(
        "Number of images, chosen at random, or all (in Python: -1).", None, implied="all", metavar="N"
    )
    eval_data: str | None = option(
        "Labelled images that have no part in the training, to compare before and after.",
        None,
        metavar="DATA",
        names_code=FACTORY,
    )
    sizes: Numbers | None = option("Show first what these image sizes give on `eval_data` without training.", None)
    on_sizes: Callable[..., None] | None = option("Called with these scores before the training.", None)


class Training(Options):
    """What is trained, and how."""

    title = "The training"

    train: Literal["head", "last-block", "all"] = option(
        "head (the classifier), last-block (with the block in front of it), or all.", "head"
    )
    head: str | None = option("Name of the classifier in the network.", None, implied="found", metavar="NAME")
    recalibrate: Literal["last", "all", "none"] | None = option(
        "BatchNorm layers to measure at this size: last, all or none.", None, implied="all with `train=all`, else last"
    )
    epochs: int = option("Passes over the images.", 20)
    lr: float | None = option("Learning rate of the first step.", None, implied="0.001 times the batch size / 512")
    augment: bool = option("Random crops and flips, as timm trains; no features are stored.", False)
    ema_decay: float | None = option(
        "Write an exponential moving average of what is trained, of this decay a step.", None, metavar="D"
    )
    scratch: str | Path | None = option(
        "Folder for the inputs of the classifier (features).",
        None,
        implied="that of the system for temporary files",
        metavar="DIR",
        names_place=True,
    )
    seed: int = option("Seed of the subset, the order of the images, dropout, and the intervals.", 0)


class Teaching(Options):
    """A network whose outputs are learned."""

    title = "The teacher"

    teacher: str | None = option("Checkpoint, timm name or file.py:factory.", None, metavar="NAME", names_code=FACTORY)
    alpha: float | None = option(
        "Weight of the teacher in the loss, 0 to 1; labels have the rest.", None, implied="0.5"
    )
    temperature: float | None = option("Divides the logits of both networks in that part.", None, implied="5")


class TunedOutput(Output):
    """Where a tuned checkpoint goes."""

    out: str | Path | None = option("The target.", None, implied="CKPT with -tuned", metavar="PATH", once_only=True)
    require_gain: bool = option("Write nothing if the loss on `eval_data` gets worse.", False)
