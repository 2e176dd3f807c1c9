"""Options: those of the public functions and the commands, in the groups that several of them share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..compute.progress import Progress
from ..series.rules.amounts import Span, Steps
from ..series.rules.option import ANY, FACTORY, Numbers
from ..series.schedules import Schedule
from ..tensors import FLOAT_DTYPES
from .option_groups import USUAL, Options, option

G = TypeVar("G", bound="Options")
Size = str | int
SETS = ("auto", "raw", "ema", "eval")
"""Sets of weights by name; a dotted path is one, too."""
DEVICES = ("auto", "cpu", "cuda", "cuda:0")
"""What a shell offers for a device; there may be a cuda:1."""
Words = Sequence[str]
Pairs = Mapping[str, Any]


class Skipping(Options):
    """What of a series is left out."""

    title = "Which checkpoints"

    exclude: Words = option(
        "Leave out what this glob matches, by its name or the end of its path.", (), metavar="GLOB", once_only=True
    )
    skip_broken: bool = option("Leave out what is damaged or holds no weights; else it is an error.", False)


class Selection(Options, more=(Skipping,)):
    """Which checkpoints, in which order; see `ckpt_tools.series.find.find_series`."""

    title = "Which checkpoints"

    last: Steps | None = option("The last N.", None, metavar="N")
    best: Steps | None = option("The best N by `metric`; the earlier one at a tie.", None, metavar="N")
    metric: str = option(
        "Its name: a key in the files, dotted if nested, or in their names.", "metric", metavar="KEY", needs="best"
    )
    metrics: str | Path | None = option("A table of metrics, CSV or JSON lines.", None, metavar="FILE", needs="best")
    lower_is_better: bool | None = option("For a loss.", None, implied="by the name of the metric", needs="best")
    window: Span | None = option("Those of the last 20k steps, or 5% of the run.", None, metavar="SPAN")
    min_gap: Steps | None = option("At least so many steps between two.", None, metavar="STEPS")
    every: Steps | None = option(
        "Every K-th, counted from the last; or one for every 5000steps.", None, metavar="K|STEPS"
    )
    from_step: Steps | None = option("From this step (or epoch) on.", None, metavar="N", once_only=True)
    to_step: Steps | None = option("Up to this step (or epoch).", None, metavar="N", once_only=True)
    order: Literal["auto", "given", "natural", "mtime"] = option(
        "auto (stored step or epoch, else numbers in names), given, natural, mtime.", "auto"
    )
    include_outputs: bool = option("Include files that ckpt wrote, and averages by other tools.", False)


class Alignment(Options):
    """Which weights of each checkpoint, and how their tensors line up."""

    title = "Which weights"

    state: str | Words = option(
        "auto (the EMA where all have one), raw, ema, eval (schedule-free), or a dotted path.", "auto", offered=SETS
    )
    match: Literal["name", "order"] = option("name or order.", "name")
    keys: Literal["strict", "intersection", "union"] = option(
        "strict, intersection, or union (averaged over those that have it).", "strict"
    )


class Matching(Alignment):
    """Which weights of each checkpoint are averaged, and how."""

    title = "Which weights"

    buffers: Literal["average", "last"] = option(
        "average, or last: BatchNorm statistics of the last checkpoint.", "average"
    )
    lora: Literal["factors", "product"] = option(
        "factors, or product: average LoRA updates themselves, exactly; the ranks add up.", "factors"
    )
    dequantize: bool = option(
        "Average what 8-bit floats with scales stand for; bfloat16 unless `dtype` is given.", False
    )


class State(Options):
    """Which weights of one checkpoint."""

    title = "Which weights"

    state: str = option(
        "auto (the EMA where there is one), raw, ema, eval (schedule-free), or a dotted path.", "auto", offered=SETS
    )


class Output(Options):
    """Where the output goes."""

    title = "Output"

    out: str | Path | None = option("The target.", None, metavar="PATH", once_only=True)
    force: bool = option("Replace an existing target.", False, once_only=True)


class Recorded(Output):
    """Where an output with a record of its origin goes, and what else says where it is from."""

    write_checksums: bool = option("Record the SHA-256 of each tensor in the output.", False)
    sign_off: str | Path | None = option(
        "Also write an in-toto statement about inputs and output, to be signed.", None, metavar="FILE", once_only=True
    )


class Encoding(Recorded):
    """Where the output goes, and in which encoding."""

    dtype: Any = option("Of the output: float32, bfloat16, ...", None, implied="same", offered=FLOAT_DTYPES)
    max_shard_size: Size | None = option("Such as 5GB, for a folder.", None, metavar="SIZE")
    untie: bool = option("safetensors: write tied tensors under each name.", False)


class AveragedOutput(Encoding):
    """Where an average goes, in which encoding, and what is recorded in it."""

    out: str | Path | None = option(
        "A known suffix chooses the format; other names mean a folder of shards; DIR/ puts a file into it.",
        USUAL,
        implied="averaged.pth, or as the inputs are",
        metavar="PATH",
        once_only=True,
    )
    hash: bool = option("Record the SHA-256 of the inputs.", False)
    plot: str | Path | None = option(
        "Draw the coefficients, .svg or .png; needs matplotlib.", None, metavar="FILE", once_only=True
    )

    @property
    def named(self) -> str | Path | None:
        """The target, if `out` names one."""
        return None if self.out == USUAL else self.out


class Earlier(Options):
    """An average that ckpt wrote, to go on from; its record decides what these groups would."""

    title = "From an average that is there"

    update: str | Path | None = option(
        "Add the checkpoints to this average, without reading its inputs again.",
        None,
        metavar="AVERAGE",
        once_only=True,
        overrules=(Schedule, Matching, AveragedOutput),
    )
    replay: str | Path | None = option(
        "Make this average again, from the inputs that it names; PATH says where else they are.",
        None,
        metavar="AVERAGE",
        once_only=True,
        overrules=(Schedule, Selection, Matching, AveragedOutput),
    )


def _layouts() -> Sequence[str]:
    from ..checkpoints.layouts import LAYOUTS

    return [layout.name for layout in LAYOUTS if layout.written]


class ConvertedOutput(Encoding):
    """Where a converted checkpoint goes, in which layout and encoding."""

    to: str = option("plain, timm-ema, averaged-model, ...", "plain", metavar="LAYOUT", offered=_layouts)
    out: str | Path = option(
        "A known suffix chooses the format; other names, and a slash at the end, mean a folder of shards.",
        metavar="PATH",
        once_only=True,
    )


class StrippedOutput(Recorded):
    """Where a stripped checkpoint goes."""

    out: str | Path | None = option("The target.", None, implied="CKPT with -stripped", metavar="PATH", once_only=True)


class RenamedOutput(Output):
    """Where a checkpoint with other names goes."""

    out: str | Path | None = option(
        "The target.", None, implied="CKPT itself, in one rename", metavar="PATH", once_only=True
    )


class RecalibratedOutput(Recorded):
    """Where a recalibrated checkpoint goes."""

    out: str | Path | None = option("The target.", None, implied="CKPT with -bn", metavar="PATH", once_only=True)
    plot: str | Path | None = option(
        "Draw how far each layer moved, .svg or .png; needs matplotlib.", None, metavar="FILE", once_only=True
    )


class Wording(Options):
    """What a model card says beyond the record."""

    title = "What only you know"

    name: str | None = option("The title.", None, implied="the name of the file", metavar="TEXT")
    license: str | None = option("Such as apache-2.0.", None, metavar="NAME")
    base_model: Words = option("The model on the Hub that all were fine-tuned from.", (), metavar="ORG/NAME")
    library_name: str | None = option("The library that loads it, such as timm.", None, metavar="NAME")
    tag: Words = option("A tag of the Hub.", (), metavar="TAG")


class CardOutput(Output):
    """Where a model card goes."""

    out: str | Path | None = option(
        "The target.", None, implied="README.md in the folder of the checkpoint", metavar="PATH", once_only=True
    )
    hash: bool = option("Also give the SHA-256 of the files.", False)


class Running(Options):
    """How a job runs."""

    title = "Running"

    dry_run: bool = option("Show the plan, write nothing.", False, once_only=True)
    on_plan: Callable[[Any], None] | None = option("Called with the report of the plan before the work.", None)
    on_progress: Progress | None = option(
        "Called in this thread with (what is done, how much of it so far, all of it).", None
    )


class Moving(Running):
    """How a job runs that reads and writes whole checkpoints."""

    max_read_rate: Size | None = option(
        "Bytes a second to read, at most, in all threads together, such as 2GB.",
        None,
        metavar="SIZE",
        from_environment=True,
    )
    drop_cache: bool = option(
        "Let the system forget what was read and written, for others' sake.", False, from_environment=True
    )


class Computing(Moving):
    """How a job runs that computes with the tensors."""

    threads: int | None = option(
        "Number of threads; the result is the same.", None, implied="the cores, 16 at most", from_environment=True
    )
    allow_nonfinite: bool = option("Allow NaN and infinity.", False)


class Summing(Computing):
    """How a job runs that sums tensors."""

    device: str = option(
        "auto, cpu, cuda (all GPUs), or one such as cuda:1; the result is the same.",
        "auto",
        offered=DEVICES,
        from_environment=True,
    )
    gpu_memory: Size | None = option(
        "Memory to use on each GPU, such as 2GB.", None, implied="1GB", metavar="SIZE", from_environment=True
    )


class Fetched(Options):
    """How inputs are read that are not on this machine."""

    title = "Running"

    cache: str | Path | None = option(
        "Keep what is read of remote inputs in this folder, and take from it what is there.",
        None,
        metavar="DIR",
        from_environment=True,
        names_place=True,
    )


class Sharing(Options):
    """How several processes share a job, or one goes on with it."""

    title = "A job in parts"

    part: str | None = option("Do part i of n, such as 2/8, and publish nothing.", None, metavar="I/N", once_only=True)
    finish: bool = option("Publish the output when all parts are done.", False, once_only=True)
    resume: bool = option("Go on with what is done, and keep what is done if it is killed.", False, once_only=True)


class Clearing(Options):
    """What `clean` removes."""

    title = "Running"

    parts: bool = option("Also remove what is done of jobs in parts, which could go on.", False, once_only=True)
    dry_run: bool = option("Show what is there, remove nothing.", False, once_only=True)


class KeptState(Options):
    """Which weights of one checkpoint stay."""

    title = "Which weights"

    state: str | None = option(
        "Keep only these weights: auto, raw, ema, eval (schedule-free), or a dotted path.",
        None,
        implied="all of them",
        offered=SETS,
    )


class ConvertedState(State):
    """Which weights of one checkpoint are converted."""

    state: str = option(
        "auto (both where LAYOUT keeps both, else the EMA), raw, ema, eval (schedule-free), or a dotted path.",
        "auto",
        offered=SETS,
    )
    dequantize: bool = option(
        "Convert what 8-bit floats with scales stand for; bfloat16 unless `dtype` is given.", False
    )


class Missing(Options):
    """What a checkpoint may not record about its averages."""

    title = "If the checkpoint does not record it"

    names_from: str | Path | None = option(
        "A checkpoint of the same model, for names.", None, metavar="CKPT", once_only=True
    )
    model: str | None = option("Instead: timm name, module:factory or file.py:factory.", None, names_code=FACTORY)
    model_kwargs: Pairs | None = option("Arguments of the factory.", None, metavar="K=V")
    updates: int | None = option("How often the average was updated.", None, metavar="N")
    decay: float | None = option("Of the EMA.", None)


class Comparison(State):
    """Which weights are compared."""

    state_b: str | None = option("The same, of B.", None, implied="as `state`", once_only=True, offered=SETS)


class SharedComparison(Options):
    """How several processes share a comparison."""

    title = "A job in parts"

    part: str | None = option(
        "Compare part i of n, such as 2/8, and show no result.", None, metavar="I/N", once_only=True
    )
    finish: bool = option("Show the result when all parts are done.", False, once_only=True)


class Tolerance(Options):
    """Which differences are tolerated."""

    title = "Tolerance"

    rtol: float = option("Values may differ by atol + rtol * |b|.", 0.0)
    atol: float = option("As in torch.allclose.", 0.0)


class Verification(Options):
    """What of a checkpoint is verified."""

    title = "What is checked"

    inputs: str | Path | None = option(
        "A folder that has the inputs of its record.", None, metavar="DIR", once_only=True
    )
    sample: str | None = option(
        "Make so much of the output again, such as 1%, and read no more of the inputs.", None, implied="all of it"
    )
    seed: int | None = option("Of the sample.", None, implied="drawn, and reported", metavar="N")
    expect_sha256: str | None = option(
        "SHA-256 of the file; for a folder, a file with lines as sha256sum writes them.",
        None,
        metavar="HEX|FILE",
        once_only=True,
    )
    allow_nonfinite: bool = option("Allow NaN and infinity.", False)


class Drawing(Options):
    """Where a picture goes."""

    title = "Output"

    plot: str | Path | None = option(
        "Draw it, too: .svg or .png; needs matplotlib.", None, metavar="FILE", once_only=True
    )
    force: bool = option("Replace an existing picture.", False, once_only=True)


class Telling(Options):
    """How a job tells how far it is."""

    title = "Running"

    on_progress: Progress | None = option(
        "Called in this thread with (what is done, how much of it so far, all of it).", None
    )


class Reading(Telling):
    """How a job runs that only reads."""

    threads: int | None = option(
        "Number of threads; the result is the same.", None, implied="the cores, 16 at most", from_environment=True
    )


class Prefixes(Options):
    """Which prefixes go, and which come."""

    title = "Prefixes"

    strip: Words = option("Remove this prefix instead.", (), implied="those of wrappers", metavar="P", once_only=True)
    add: Words = option("Put this before all names.", (), metavar="P", once_only=True)


class Network(Options):
    """The network that weights belong to, and how it is called."""

    title = "The network"

    model: str | None = option(
        "timm name, module:factory or file.py:factory.", None, implied="arch in the checkpoint", names_code=FACTORY
    )
    model_kwargs: Pairs | None = option("Arguments of the factory, such as num_classes=10.", None, metavar="K=V")
    forward: str | None = option("file.py:fn, called with (model, batch).", None, metavar="FN", names_code=ANY)
    inputs: int = option("How many leading entries of a batch go to the model.", 1)
    mask: str | None = option("Entry of a batch that says which positions are not padding.", None, metavar="KEY")


class Images(Options):
    """The images that a network sees, as timm's validate.py prepares them."""

    title = "The data"

    data: str = option(
        "Folder of images, tar, timm dataset (hfds/...), or file.py:factory.", metavar="DATA", names_code=FACTORY
    )
    images: int | None = option(
        "Number of images, chosen at random, or all (in Python: -1).",
        None,
        implied="8192, or all if fewer",
        metavar="N",
    )
    batch_size: int = option("Images per batch.", 64)
    workers: int | None = option(
        "Processes that decode images.", None, implied="the cores, 8 at most", from_environment=True
    )
    img_size: int | None = option("Side of the images.", None, implied="the run's, or the model's")
    crop_pct: float | None = option("Part of the image that the crop keeps.", None, implied="the run's, or the model's")
    interpolation: str | None = option("bilinear, bicubic, ...", None, implied="the run's, or the model's")
    mean: Numbers | None = option("0.5 or 0.485,0.456,0.406.", None, implied="the run's, or the model's")
    std: Numbers | None = option("As `mean`.", None, implied="the run's, or the model's")
    class_map: str | Path | None = option(
        "Classes of labelled folders: a name a line, with a number or in order; or JSON.",
        None,
        implied="the checkpoint's, or by name",
        metavar="FILE",
    )
    split: str = option("Split of a timm dataset.", "validation")
    data_root: str | None = option("Folder with the timm dataset.", None, metavar="DIR")


class Statistics(Options):
    """How BatchNorm statistics are measured."""

    title = "The statistics"

    passes: int = option("Number of passes over the images; after P of them, the first P layers are exact.", 1)
    estimator: Literal["population", "batch-mean"] = option(
        "population (all values as one set), or batch-mean (each batch counts once).", "population"
    )
    include_frozen: bool = option("Also measure layers that training does not update.", False)
    allow_unmeasured: bool = option("Accept layers that cannot be measured in front of others.", False)


class Measuring(Statistics):
    """How BatchNorm statistics are measured, and whether they are an improvement."""

    seed: int = option("Seed of the random subset.", 0)
    eval_data: str | None = option(
        "Labelled images, to measure the accuracy before and after.", None, metavar="DATA", names_code=FACTORY
    )
    require_gain: bool = option("Write nothing if the loss on `eval_data` gets worse.", False)


class Numerics(Options):
    """How a network computes."""

    amp: bool = option("Mixed precision, bfloat16.", False)
    channels_last: bool = option("Memory order of images and convolutions.", True)


class Inference(Running, more=(Numerics,)):
    """How a job runs that shows images to a network."""

    device: str = option("auto, cpu, cuda, cuda:1.", "auto", offered=DEVICES, from_environment=True)


class Recalibration(Options, more=(Network, Images, Measuring, Numerics), without=("data",), needs="recal_bn"):
    """The images on which the BatchNorm statistics of an average are measured before it is written."""

    title = "BatchNorm statistics (recal-bn)"

    recal_bn: str | None = option(
        "Measure them on these images: folder, tar, timm dataset (hfds/...), or file.py:factory.",
        None,
        metavar="DATA",
        names_code=FACTORY,
    )

    def of(self, group: type[G]) -> G:
        """Return one of the groups that it is made of, with the values given here."""
        return group(**{"data": self.recal_bn, **vars(self)})
