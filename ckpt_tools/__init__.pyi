"""Signatures of the public functions, for type checkers and editors: written by docs/stub.py (make generated)."""
# ruff: noqa: E501, I001
# fmt: off

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch

from .batchnorm import BatchNormReport as BatchNormReport, recalibrate_bn as recalibrate_bn
from .checkpoints.open import Checkpoint as Checkpoint, open_checkpoint as open_checkpoint
from .compute.progress import Activity
from .errors import AlignmentError as AlignmentError, CkptError as CkptError, CorruptError as CorruptError, DataError as DataError, LayoutError as LayoutError, ModelError as ModelError, NotACheckpointError as NotACheckpointError, NumericsError as NumericsError, ReadError as ReadError, SeriesError as SeriesError, UnsupportedError as UnsupportedError, UsageError as UsageError, WriteError as WriteError, WriteWarning as WriteWarning
from .jobs.average import AverageReport as AverageReport
from .jobs.card import CardReport as CardReport
from .jobs.clean import CleanReport as CleanReport
from .jobs.convert import ConvertReport as ConvertReport
from .jobs.diff import DiffReport as DiffReport
from .jobs.evaluate.report import EvaluationReport as EvaluationReport
from .jobs.fix_prefix import PrefixReport as PrefixReport
from .jobs.inspect import InspectReport as InspectReport
from .jobs.look import LookReport as LookReport
from .jobs.recalibrate import RecalibrationReport as RecalibrationReport
from .jobs.strip import StripReport as StripReport
from .jobs.sweep.report import SweepReport as SweepReport
from .jobs.tune.report import TuneReport as TuneReport
from .jobs.verify.job import VerifyReport as VerifyReport

__version__: str
__all__ = [
    "AlignmentError",
    "AverageReport",
    "BatchNormReport",
    "CardReport",
    "Checkpoint",
    "CkptError",
    "CleanReport",
    "ConvertReport",
    "CorruptError",
    "DataError",
    "DiffReport",
    "EvaluationReport",
    "InspectReport",
    "LayoutError",
    "LookReport",
    "ModelError",
    "NotACheckpointError",
    "NumericsError",
    "PrefixReport",
    "ReadError",
    "RecalibrationReport",
    "SeriesError",
    "StripReport",
    "SweepReport",
    "TuneReport",
    "UnsupportedError",
    "UsageError",
    "VerifyReport",
    "WriteError",
    "WriteWarning",
    "average",
    "card",
    "clean",
    "convert",
    "diff",
    "evaluate",
    "fix_prefix",
    "inspect",
    "look",
    "open_checkpoint",
    "recalibrate_bn",
    "recalibrate_checkpoint",
    "strip",
    "sweep",
    "tune_checkpoint",
    "verify",
    "__version__",
]

@overload
def average(
    paths: str | Path | Mapping[str, torch.Tensor] | Iterable[str | Path | Mapping[str, torch.Tensor]],
    *,
    mode: Literal['uniform', 'ema', 'weights', 'decay', 'power', 'difference', 'posthoc', 'stock', 'swa', 'mean', 'average', 'avg', 'exponential'] | None = None,
    decay: float | None = None,
    half_life: int | float | str | None = None,
    per_step: bool = False,
    by: Literal['auto', 'steps', 'files'] = 'auto',
    warmup: Literal['litema', 'timm'] | None = None,
    warmup_gamma: float = 1.0,
    warmup_power: float = 0.6666666666666666,
    min_decay: float = 0.0,
    update_after: int = 0,
    bias_correction: bool = False,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    shape: Literal['linear', '1-sqrt', 'cosine', 'inverse-sqrt'] | None = None,
    sigma_rel: float | None = None,
    gamma: float | None = None,
    target: str | None = None,
    profile: Sequence[str] = (),
    allow_misfit: bool = False,
    base: str | Path | None = None,
    last: int | str | None = None,
    best: int | str | None = None,
    metric: str = 'metric',
    metrics: str | Path | None = None,
    lower_is_better: bool | None = None,
    window: int | float | str | None = None,
    min_gap: int | str | None = None,
    every: int | str | None = None,
    from_step: int | str | None = None,
    to_step: int | str | None = None,
    order: Literal['auto', 'given', 'natural', 'mtime'] = 'auto',
    include_outputs: bool = False,
    exclude: Sequence[str] = (),
    skip_broken: bool = False,
    state: str | Sequence[str] = 'auto',
    match: Literal['name', 'order'] = 'name',
    keys: Literal['strict', 'intersection', 'union'] = 'strict',
    buffers: Literal['average', 'last'] = 'average',
    lora: Literal['factors', 'product'] = 'factors',
    dequantize: bool = False,
    update: str | Path | None = None,
    replay: str | Path | None = None,
    out: str | Path = 'auto',
    force: bool = False,
    write_checksums: bool = False,
    sign_off: str | Path | None = None,
    dtype: Literal['float64', 'float32', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz', 'fp64', 'fp32', 'fp16', 'half', 'bf16', 'same'] | torch.dtype | None = None,
    max_shard_size: str | int | None = None,
    untie: bool = False,
    hash: bool = False,
    plot: str | Path | None = None,
    recal_bn: str | None = None,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    forward: str | None = None,
    inputs: int = 1,
    mask: str | None = None,
    images: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_map: str | Path | None = None,
    split: str = 'validation',
    data_root: str | None = None,
    passes: int = 1,
    estimator: Literal['population', 'batch-mean'] = 'population',
    include_frozen: bool = False,
    allow_unmeasured: bool = False,
    seed: int = 0,
    eval_data: str | None = None,
    require_gain: bool = False,
    amp: bool = False,
    channels_last: bool = True,
    part: str | None = None,
    finish: bool = False,
    resume: bool = False,
    cache: str | Path | None = None,
    dry_run: bool = False,
    on_plan: Callable[[AverageReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    max_read_rate: str | int | None = None,
    drop_cache: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    device: str = 'auto',
    gpu_memory: str | int | None = None,
) -> AverageReport:
    r"""Average a series of checkpoints into one file or folder, in float64, in bounded memory.

    `ckpt_tools.series.schedules` has the formulas of the modes, and `SCHEDULES` in it the options of each. Integer and
    bool tensors always come from the last checkpoint. The output is the same byte for byte whatever `threads` and
    `device` are.

    With ``out=None`` nothing is written: the average comes back as a state dict, each tensor with the bytes that it has
    in a file. State dicts, oldest first, are averaged like the files that they would be saved as, and are not changed.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones), or instead state dicts: names to tensors, on any
            device. With `update` the checkpoints to add, and with `replay` where to look for the inputs.
        mode: uniform, ema, weights, decay, power, difference, posthoc or stock. If None: the one that takes the other options, else uniform.
        decay: EMA decay per checkpoint (per training step with `per_step`). If None: such that the average is as old as a third of the series.
        half_life: ema: in steps (or files, `by='files'`), or 5% of the run.
        per_step: ema: the decay between two checkpoints is decay^(step gap).
        by: Count along steps, or files; auto takes the steps where all are known.
        warmup: ema: litema or timm; the decay grows.
        warmup_gamma: timm: gamma in 1 - (1 + s / gamma)^-power.
        warmup_power: timm: power in it; 2/3 as in ModelEmaV3.
        min_decay: timm: the smallest decay.
        update_after: timm: updates that copy the weights before the average begins.
        bias_correction: ema: start from zero, divide by 1 - decay^N.
        weights: weights: one number a checkpoint, in the order of the paths.
        normalize: Divide `weights` by their sum.
        shape: decay: linear, 1-sqrt, cosine, inverse-sqrt; of the learning rate that it stands for. If None: 1-sqrt.
        sigma_rel: power: width of the average, as a part of the training so far.
        gamma: power: instead, its exponent.
        target: posthoc: the average wanted: sigma-rel=S, gamma=G, half-life=SPAN or decay=F.
        profile: posthoc: what files hold, where they do not say it: 'GLOB=decay:0.999'.
        allow_misfit: posthoc: take the nearest sum, even if it is far from the target.
        base: stock: the checkpoint that all were fine-tuned from.
        last: The last N.
        best: The best N by `metric`; the earlier one at a tie.
        metric: Its name: a key in the files, dotted if nested, or in their names.
        metrics: A table of metrics, CSV or JSON lines.
        lower_is_better: For a loss. If None: by the name of the metric.
        window: Those of the last 20k steps, or 5% of the run.
        min_gap: At least so many steps between two.
        every: Every K-th, counted from the last; or one for every 5000steps.
        from_step: From this step (or epoch) on.
        to_step: Up to this step (or epoch).
        order: auto (stored step or epoch, else numbers in names), given, natural, mtime.
        include_outputs: Include files that ckpt wrote, and averages by other tools.
        exclude: Leave out what this glob matches, by its name or the end of its path.
        skip_broken: Leave out what is damaged or holds no weights; else it is an error.
        state: auto (the EMA where all have one), raw, ema, eval (schedule-free), or a dotted path.
        match: name or order.
        keys: strict, intersection, or union (averaged over those that have it).
        buffers: average, or last: BatchNorm statistics of the last checkpoint.
        lora: factors, or product: average LoRA updates themselves, exactly; the ranks add up.
        dequantize: Average what 8-bit floats with scales stand for; bfloat16 unless `dtype` is given.
        update: Add the checkpoints to this average, without reading its inputs again.
        replay: Make this average again, from the inputs that it names; PATH says where else they are.
        out: A known suffix chooses the format; other names mean a folder of shards; DIR/ puts a file into it. If 'auto': averaged.pth, or as the inputs are.
        force: Replace an existing target.
        write_checksums: Record the SHA-256 of each tensor in the output.
        sign_off: Also write an in-toto statement about inputs and output, to be signed.
        dtype: Of the output: float32, bfloat16, ... If None: same.
        max_shard_size: Such as 5GB, for a folder.
        untie: safetensors: write tied tensors under each name.
        hash: Record the SHA-256 of the inputs.
        plot: Draw the coefficients, .svg or .png; needs matplotlib.
        recal_bn: Measure them on these images: folder, tar, timm dataset (hfds/...), or file.py:factory.
        model: timm name, module:factory or file.py:factory. If None: arch in the checkpoint.
        model_kwargs: Arguments of the factory, such as num_classes=10.
        forward: file.py:fn, called with (model, batch).
        inputs: How many leading entries of a batch go to the model.
        mask: Entry of a batch that says which positions are not padding.
        images: Number of images, chosen at random, or all (in Python: -1). If None: 8192, or all if fewer.
        batch_size: Images per batch.
        workers: Processes that decode images. If None: the cores, 8 at most.
        img_size: Side of the images. If None: the run's, or the model's.
        crop_pct: Part of the image that the crop keeps. If None: the run's, or the model's.
        interpolation: bilinear, bicubic, ... If None: the run's, or the model's.
        mean: 0.5 or 0.485,0.456,0.406. If None: the run's, or the model's.
        std: As `mean`. If None: the run's, or the model's.
        class_map: Classes of labelled folders: a name a line, with a number or in order; or JSON. If None: the checkpoint's, or by name.
        split: Split of a timm dataset.
        data_root: Folder with the timm dataset.
        passes: Number of passes over the images; after P of them, the first P layers are exact.
        estimator: population (all values as one set), or batch-mean (each batch counts once).
        include_frozen: Also measure layers that training does not update.
        allow_unmeasured: Accept layers that cannot be measured in front of others.
        seed: Seed of the random subset.
        eval_data: Labelled images, to measure the accuracy before and after.
        require_gain: Write nothing if the loss on `eval_data` gets worse.
        amp: Mixed precision, bfloat16.
        channels_last: Memory order of images and convolutions.
        part: Do part i of n, such as 2/8, and publish nothing.
        finish: Publish the output when all parts are done.
        resume: Go on with what is done, and keep what is done if it is killed.
        cache: Keep what is read of remote inputs in this folder, and take from it what is there.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        max_read_rate: Bytes a second to read, at most, in all threads together, such as 2GB.
        drop_cache: Let the system forget what was read and written, for others' sake.
        threads: Number of threads; the result is the same. If None: the cores, 16 at most.
        allow_nonfinite: Allow NaN and infinity.
        device: auto, cpu, cuda (all GPUs), or one such as cuda:1; the result is the same.
        gpu_memory: Memory to use on each GPU, such as 2GB. If None: 1GB.

    Returns:
        What was averaged, and how: an `AverageReport`. With ``out=None`` the average itself, names to tensors on the
        CPU, which `load_state_dict` takes as it is.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.

    Example:
        >>> ckpt_tools.average("runs/", mode="ema", decay=0.99, out="averaged.pth")
        AverageReport(inputs=<12>, mode='ema', ...)
        >>> model.load_state_dict(ckpt_tools.average("runs/", last=5, out=None))
        >>> model.load_state_dict(ckpt_tools.average([one.state_dict(), other.state_dict()], out=None))
    """
    ...

@overload
def average(
    paths: str | Path | Mapping[str, torch.Tensor] | Iterable[str | Path | Mapping[str, torch.Tensor]],
    *,
    mode: Literal['uniform', 'ema', 'weights', 'decay', 'power', 'difference', 'posthoc', 'stock', 'swa', 'mean', 'average', 'avg', 'exponential'] | None = None,
    decay: float | None = None,
    half_life: int | float | str | None = None,
    per_step: bool = False,
    by: Literal['auto', 'steps', 'files'] = 'auto',
    warmup: Literal['litema', 'timm'] | None = None,
    warmup_gamma: float = 1.0,
    warmup_power: float = 0.6666666666666666,
    min_decay: float = 0.0,
    update_after: int = 0,
    bias_correction: bool = False,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    shape: Literal['linear', '1-sqrt', 'cosine', 'inverse-sqrt'] | None = None,
    sigma_rel: float | None = None,
    gamma: float | None = None,
    target: str | None = None,
    profile: Sequence[str] = (),
    allow_misfit: bool = False,
    base: str | Path | None = None,
    last: int | str | None = None,
    best: int | str | None = None,
    metric: str = 'metric',
    metrics: str | Path | None = None,
    lower_is_better: bool | None = None,
    window: int | float | str | None = None,
    min_gap: int | str | None = None,
    every: int | str | None = None,
    from_step: int | str | None = None,
    to_step: int | str | None = None,
    order: Literal['auto', 'given', 'natural', 'mtime'] = 'auto',
    include_outputs: bool = False,
    exclude: Sequence[str] = (),
    skip_broken: bool = False,
    state: str | Sequence[str] = 'auto',
    match: Literal['name', 'order'] = 'name',
    keys: Literal['strict', 'intersection', 'union'] = 'strict',
    buffers: Literal['average', 'last'] = 'average',
    lora: Literal['factors', 'product'] = 'factors',
    dequantize: bool = False,
    update: str | Path | None = None,
    replay: str | Path | None = None,
    out: None,
    force: bool = False,
    write_checksums: bool = False,
    sign_off: str | Path | None = None,
    dtype: Literal['float64', 'float32', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz', 'fp64', 'fp32', 'fp16', 'half', 'bf16', 'same'] | torch.dtype | None = None,
    max_shard_size: str | int | None = None,
    untie: bool = False,
    hash: bool = False,
    plot: str | Path | None = None,
    recal_bn: str | None = None,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    forward: str | None = None,
    inputs: int = 1,
    mask: str | None = None,
    images: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_map: str | Path | None = None,
    split: str = 'validation',
    data_root: str | None = None,
    passes: int = 1,
    estimator: Literal['population', 'batch-mean'] = 'population',
    include_frozen: bool = False,
    allow_unmeasured: bool = False,
    seed: int = 0,
    eval_data: str | None = None,
    require_gain: bool = False,
    amp: bool = False,
    channels_last: bool = True,
    part: str | None = None,
    finish: bool = False,
    resume: bool = False,
    cache: str | Path | None = None,
    dry_run: bool = False,
    on_plan: Callable[[AverageReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    max_read_rate: str | int | None = None,
    drop_cache: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    device: str = 'auto',
    gpu_memory: str | int | None = None,
) -> dict[str, torch.Tensor]:
    r"""Average a series of checkpoints into one file or folder, in float64, in bounded memory.

    `ckpt_tools.series.schedules` has the formulas of the modes, and `SCHEDULES` in it the options of each. Integer and
    bool tensors always come from the last checkpoint. The output is the same byte for byte whatever `threads` and
    `device` are.

    With ``out=None`` nothing is written: the average comes back as a state dict, each tensor with the bytes that it has
    in a file. State dicts, oldest first, are averaged like the files that they would be saved as, and are not changed.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones), or instead state dicts: names to tensors, on any
            device. With `update` the checkpoints to add, and with `replay` where to look for the inputs.
        mode: uniform, ema, weights, decay, power, difference, posthoc or stock. If None: the one that takes the other options, else uniform.
        decay: EMA decay per checkpoint (per training step with `per_step`). If None: such that the average is as old as a third of the series.
        half_life: ema: in steps (or files, `by='files'`), or 5% of the run.
        per_step: ema: the decay between two checkpoints is decay^(step gap).
        by: Count along steps, or files; auto takes the steps where all are known.
        warmup: ema: litema or timm; the decay grows.
        warmup_gamma: timm: gamma in 1 - (1 + s / gamma)^-power.
        warmup_power: timm: power in it; 2/3 as in ModelEmaV3.
        min_decay: timm: the smallest decay.
        update_after: timm: updates that copy the weights before the average begins.
        bias_correction: ema: start from zero, divide by 1 - decay^N.
        weights: weights: one number a checkpoint, in the order of the paths.
        normalize: Divide `weights` by their sum.
        shape: decay: linear, 1-sqrt, cosine, inverse-sqrt; of the learning rate that it stands for. If None: 1-sqrt.
        sigma_rel: power: width of the average, as a part of the training so far.
        gamma: power: instead, its exponent.
        target: posthoc: the average wanted: sigma-rel=S, gamma=G, half-life=SPAN or decay=F.
        profile: posthoc: what files hold, where they do not say it: 'GLOB=decay:0.999'.
        allow_misfit: posthoc: take the nearest sum, even if it is far from the target.
        base: stock: the checkpoint that all were fine-tuned from.
        last: The last N.
        best: The best N by `metric`; the earlier one at a tie.
        metric: Its name: a key in the files, dotted if nested, or in their names.
        metrics: A table of metrics, CSV or JSON lines.
        lower_is_better: For a loss. If None: by the name of the metric.
        window: Those of the last 20k steps, or 5% of the run.
        min_gap: At least so many steps between two.
        every: Every K-th, counted from the last; or one for every 5000steps.
        from_step: From this step (or epoch) on.
        to_step: Up to this step (or epoch).
        order: auto (stored step or epoch, else numbers in names), given, natural, mtime.
        include_outputs: Include files that ckpt wrote, and averages by other tools.
        exclude: Leave out what this glob matches, by its name or the end of its path.
        skip_broken: Leave out what is damaged or holds no weights; else it is an error.
        state: auto (the EMA where all have one), raw, ema, eval (schedule-free), or a dotted path.
        match: name or order.
        keys: strict, intersection, or union (averaged over those that have it).
        buffers: average, or last: BatchNorm statistics of the last checkpoint.
        lora: factors, or product: average LoRA updates themselves, exactly; the ranks add up.
        dequantize: Average what 8-bit floats with scales stand for; bfloat16 unless `dtype` is given.
        update: Add the checkpoints to this average, without reading its inputs again.
        replay: Make this average again, from the inputs that it names; PATH says where else they are.
        out: A known suffix chooses the format; other names mean a folder of shards; DIR/ puts a file into it. If 'auto': averaged.pth, or as the inputs are.
        force: Replace an existing target.
        write_checksums: Record the SHA-256 of each tensor in the output.
        sign_off: Also write an in-toto statement about inputs and output, to be signed.
        dtype: Of the output: float32, bfloat16, ... If None: same.
        max_shard_size: Such as 5GB, for a folder.
        untie: safetensors: write tied tensors under each name.
        hash: Record the SHA-256 of the inputs.
        plot: Draw the coefficients, .svg or .png; needs matplotlib.
        recal_bn: Measure them on these images: folder, tar, timm dataset (hfds/...), or file.py:factory.
        model: timm name, module:factory or file.py:factory. If None: arch in the checkpoint.
        model_kwargs: Arguments of the factory, such as num_classes=10.
        forward: file.py:fn, called with (model, batch).
        inputs: How many leading entries of a batch go to the model.
        mask: Entry of a batch that says which positions are not padding.
        images: Number of images, chosen at random, or all (in Python: -1). If None: 8192, or all if fewer.
        batch_size: Images per batch.
        workers: Processes that decode images. If None: the cores, 8 at most.
        img_size: Side of the images. If None: the run's, or the model's.
        crop_pct: Part of the image that the crop keeps. If None: the run's, or the model's.
        interpolation: bilinear, bicubic, ... If None: the run's, or the model's.
        mean: 0.5 or 0.485,0.456,0.406. If None: the run's, or the model's.
        std: As `mean`. If None: the run's, or the model's.
        class_map: Classes of labelled folders: a name a line, with a number or in order; or JSON. If None: the checkpoint's, or by name.
        split: Split of a timm dataset.
        data_root: Folder with the timm dataset.
        passes: Number of passes over the images; after P of them, the first P layers are exact.
        estimator: population (all values as one set), or batch-mean (each batch counts once).
        include_frozen: Also measure layers that training does not update.
        allow_unmeasured: Accept layers that cannot be measured in front of others.
        seed: Seed of the random subset.
        eval_data: Labelled images, to measure the accuracy before and after.
        require_gain: Write nothing if the loss on `eval_data` gets worse.
        amp: Mixed precision, bfloat16.
        channels_last: Memory order of images and convolutions.
        part: Do part i of n, such as 2/8, and publish nothing.
        finish: Publish the output when all parts are done.
        resume: Go on with what is done, and keep what is done if it is killed.
        cache: Keep what is read of remote inputs in this folder, and take from it what is there.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        max_read_rate: Bytes a second to read, at most, in all threads together, such as 2GB.
        drop_cache: Let the system forget what was read and written, for others' sake.
        threads: Number of threads; the result is the same. If None: the cores, 16 at most.
        allow_nonfinite: Allow NaN and infinity.
        device: auto, cpu, cuda (all GPUs), or one such as cuda:1; the result is the same.
        gpu_memory: Memory to use on each GPU, such as 2GB. If None: 1GB.

    Returns:
        What was averaged, and how: an `AverageReport`. With ``out=None`` the average itself, names to tensors on the
        CPU, which `load_state_dict` takes as it is.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.

    Example:
        >>> ckpt_tools.average("runs/", mode="ema", decay=0.99, out="averaged.pth")
        AverageReport(inputs=<12>, mode='ema', ...)
        >>> model.load_state_dict(ckpt_tools.average("runs/", last=5, out=None))
        >>> model.load_state_dict(ckpt_tools.average([one.state_dict(), other.state_dict()], out=None))
    """
    ...

def card(
    path: str | Path,
    *,
    name: str | None = None,
    license: str | None = None,
    base_model: Sequence[str] = (),
    library_name: str | None = None,
    tag: Sequence[str] = (),
    out: str | Path | None = None,
    force: bool = False,
    hash: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[CardReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
) -> CardReport:
    r"""Write a model card that says from what a checkpoint was made, as far as its record does.

    Args:
        path: an output of ckpt-tools.
        name: The title. If None: the name of the file.
        license: Such as apache-2.0.
        base_model: The model on the Hub that all were fine-tuned from.
        library_name: The library that loads it, such as timm.
        tag: A tag of the Hub.
        out: The target. If None: README.md in the folder of the checkpoint.
        force: Replace an existing target.
        hash: Also give the SHA-256 of the files.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).

    Returns:
        The card, and where it is.

    Raises:
        LayoutError: the checkpoint has no record, or a damaged one.
        WriteError: the target exists, or cannot be written.
    """
    ...

def clean(
    folder: str | Path,
    *,
    parts: bool = False,
    dry_run: bool = False,
) -> CleanReport:
    r"""Remove what dead jobs have left in a folder: hidden files and folders beside their targets.

    Nothing is touched that a process has locked, where the system does not tell, or that has another name or kind.
    What is done of a job in parts stays unless it is asked for. Folders in the folder are not searched.

    Args:
        folder: with the targets of jobs.
        parts: Also remove what is done of jobs in parts, which could go on.
        dry_run: Show what is there, remove nothing.

    Returns:
        What was found, and what became of it.

    Raises:
        CkptError: the path is empty, there is no such folder, or it cannot be read.
    """
    ...

def convert(
    path: str | Path,
    *,
    out: str | Path,
    force: bool = False,
    write_checksums: bool = False,
    sign_off: str | Path | None = None,
    dtype: Literal['float64', 'float32', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz', 'fp64', 'fp32', 'fp16', 'half', 'bf16', 'same'] | torch.dtype | None = None,
    max_shard_size: str | int | None = None,
    untie: bool = False,
    to: Literal['plain', 'timm', 'timm-ema', 'deit', 'torchvision', 'model-state-dict', 'averaged-model', 'litema', 'lightning', 'lightning-swa', 'nemo', 'mmengine', 'ultralytics', 'torchtitan', 'd2go', 'ema-pytorch', 'dit', 'icefall', 'dino', 'fairseq', 'diffusers', 'pytorch-ema', 'dcp', 'deepspeed'] = 'plain',
    state: str = 'auto',
    dequantize: bool = False,
    names_from: str | Path | None = None,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    updates: int | None = None,
    decay: float | None = None,
    part: str | None = None,
    finish: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[ConvertReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    max_read_rate: str | int | None = None,
    drop_cache: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
) -> ConvertReport:
    r"""Write a checkpoint in another layout, file format or dtype, in bounded memory.

    `ckpt_tools.checkpoints.layouts.LAYOUTS` has the layouts. Both sets of weights go in if the layout keeps both and
    `state` is ``auto``; NaN and infinity matter only where the dtype changes.

    Args:
        path: a file or folder.
        out: A known suffix chooses the format; other names, and a slash at the end, mean a folder of shards.
        force: Replace an existing target.
        write_checksums: Record the SHA-256 of each tensor in the output.
        sign_off: Also write an in-toto statement about inputs and output, to be signed.
        dtype: Of the output: float32, bfloat16, ... If None: same.
        max_shard_size: Such as 5GB, for a folder.
        untie: safetensors: write tied tensors under each name.
        to: plain, timm-ema, averaged-model, ...
        state: auto (both where LAYOUT keeps both, else the EMA), raw, ema, eval (schedule-free), or a dotted path.
        dequantize: Convert what 8-bit floats with scales stand for; bfloat16 unless `dtype` is given.
        names_from: A checkpoint of the same model, for names.
        model: Instead: timm name, module:factory or file.py:factory.
        model_kwargs: Arguments of the factory.
        updates: How often the average was updated.
        decay: Of the EMA.
        part: Do part i of n, such as 2/8, and publish nothing.
        finish: Publish the output when all parts are done.
        resume: Go on with what is done, and keep what is done if it is killed.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        max_read_rate: Bytes a second to read, at most, in all threads together, such as 2GB.
        drop_cache: Let the system forget what was read and written, for others' sake.
        threads: Number of threads; the result is the same. If None: the cores, 16 at most.
        allow_nonfinite: Allow NaN and infinity.

    Returns:
        What was converted, and what it lost.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    ...

def diff(
    a: str | Path,
    b: str | Path,
    *,
    state: str = 'auto',
    state_b: str | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
    part: str | None = None,
    finish: bool = False,
    plot: str | Path | None = None,
    force: bool = False,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    threads: int | None = None,
) -> DiffReport:
    r"""Compare the weights of two checkpoints, of any formats and layouts, in bounded memory.

    Names are compared without wrapper prefixes, and floating-point values in float64; integers must be equal
    whatever the tolerance. NaN is equal to NaN. Packed codes are compared as bytes.

    Args:
        a, b: files, or folders with a sharded checkpoint.
        state: auto (the EMA where there is one), raw, ema, eval (schedule-free), or a dotted path.
        state_b: The same, of B. If None: as `state`.
        rtol: Values may differ by atol + rtol * |b|.
        atol: As in torch.allclose.
        part: Compare part i of n, such as 2/8, and show no result.
        finish: Show the result when all parts are done.
        plot: Draw it, too: .svg or .png; needs matplotlib.
        force: Replace an existing picture.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        threads: Number of threads; the result is the same. If None: the cores, 16 at most.

    Returns:
        The differences; ``verdict`` summarizes them.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`.
    """
    ...

def evaluate(
    paths: str | Path | Iterable[str | Path],
    *,
    metric: str | None = None,
    eval_command: str | None = None,
    eval_function: str | None = None,
    in_memory: bool = False,
    time_limit: float | None = None,
    jobs: int = 1,
    lower_is_better: bool | None = None,
    state: str = 'auto',
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    forward: str | None = None,
    inputs: int = 1,
    mask: str | None = None,
    data: str | None = None,
    images: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_map: str | Path | None = None,
    split: str = 'validation',
    data_root: str | None = None,
    recal_bn: str | None = None,
    seed: int = 0,
    passes: int = 1,
    estimator: Literal['population', 'batch-mean'] = 'population',
    include_frozen: bool = False,
    allow_unmeasured: bool = False,
    csv: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[EvaluationReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    device: str = 'auto',
    amp: bool = False,
    channels_last: bool = True,
    on_result: Callable[..., None] | None = None,
) -> EvaluationReport:
    r"""Score checkpoints on the same data, and compare averages with the best single checkpoint.

    Averages are known by the record that ckpt-tools writes into them. One network, that of the first checkpoint, takes
    the weights of each. Copies of one checkpoint are scored once.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones).
        metric: The one that decides. If None: top1, or the only one.
        eval_command: 'python eval.py {ckpt}': its last line is a number, or a JSON object of metrics.
        eval_function: file.py:fn, which returns a number or a dict of metrics.
        in_memory: Call the function with the state dict, not the path.
        time_limit: Seconds of one command.
        jobs: Commands at a time.
        lower_is_better: For a loss. If None: by the name of the metric.
        state: auto (the EMA where there is one), raw, ema, eval (schedule-free), or a dotted path.
        model: timm name, module:factory or file.py:factory. If None: arch in the checkpoint.
        model_kwargs: Arguments of the factory, such as num_classes=10.
        forward: file.py:fn, called with (model, batch).
        inputs: How many leading entries of a batch go to the model.
        mask: Entry of a batch that says which positions are not padding.
        data: Labelled images: folder, tar, timm dataset (hfds/...), or file.py:factory.
        images: Of `recal_bn`: number of images, chosen at random, or all (in Python: -1). If None: 8192, or all if fewer.
        batch_size: Images per batch.
        workers: Processes that decode images. If None: the cores, 8 at most.
        img_size: Side of the images. If None: the run's, or the model's.
        crop_pct: Part of the image that the crop keeps. If None: the run's, or the model's.
        interpolation: bilinear, bicubic, ... If None: the run's, or the model's.
        mean: 0.5 or 0.485,0.456,0.406. If None: the run's, or the model's.
        std: As `mean`. If None: the run's, or the model's.
        class_map: Classes of labelled folders: a name a line, with a number or in order; or JSON. If None: the checkpoint's, or by name.
        split: Split of a timm dataset.
        data_root: Folder with the timm dataset.
        recal_bn: Measure BatchNorm statistics on these images before every score.
        seed: Of those images, and of the intervals.
        passes: Number of passes over the images; after P of them, the first P layers are exact.
        estimator: population (all values as one set), or batch-mean (each batch counts once).
        include_frozen: Also measure layers that training does not update.
        allow_unmeasured: Accept layers that cannot be measured in front of others.
        csv: Write the table, too.
        force: Replace an existing file.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        device: auto, cpu, cuda, cuda:1.
        amp: Mixed precision, bfloat16.
        channels_last: Memory order of images and convolutions.
        on_result: Called after each checkpoint with (what it scored, number done, number in all).

    Returns:
        The scores, best first, with intervals, and whether the best is better than the next of the other kind.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`. A checkpoint that cannot be scored does not stop the
            others; its `error` gives the reason.
    """
    ...

def fix_prefix(
    path: str | Path,
    *,
    strip: Sequence[str] = (),
    add: Sequence[str] = (),
    out: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[PrefixReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
) -> PrefixReport:
    r"""Remove wrapper prefixes from the names in a checkpoint; everything else is kept byte for byte.

    Each state dict is handled separately: raw weights, averaged weights, any dict of names to tensors, but no
    optimizer. Without `strip` and `add`, the prefixes of `prefixes.WRAPPERS` are removed, as in `average`. Several
    prefixes are applied one after the other.

    Args:
        path: the checkpoint, which is replaced if `out` is not given.
        strip: Remove this prefix instead.
        add: Put this before all names.
        out: The target. If None: CKPT itself, in one rename.
        force: Replace an existing target.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).

    Returns:
        What was done. If no name changes, nothing is written, or, with `out`, a copy.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; the checkpoint is as it was then.
    """
    ...

def inspect(
    path: str | Path,
    *,
    plot: str | Path | None = None,
    force: bool = False,
) -> InspectReport:
    r"""Describe what a checkpoint holds, from its header alone; no payload is read, and nothing in it is run.

    Args:
        path: a file, a folder with a sharded checkpoint, or a folder with a single checkpoint in it.
        plot: Draw it, too: .svg or .png; needs matplotlib.
        force: Replace an existing picture.

    Returns:
        Format, layout, the sets of weights with their tensors, counters, optimizers, and the record of ckpt-tools.

    Raises:
        CkptError: it cannot be read, the folder holds several checkpoints, or the picture cannot be written.

    Example:
        >>> report = ckpt_tools.inspect("averaged.pth")
        >>> report.sets[0].dtypes
        {'float32': (10, 21640)}
    """
    ...

def look(
    paths: str | Path | Iterable[str | Path],
    *,
    last: int | str | None = None,
    best: int | str | None = None,
    metric: str = 'metric',
    metrics: str | Path | None = None,
    lower_is_better: bool | None = None,
    window: int | float | str | None = None,
    min_gap: int | str | None = None,
    every: int | str | None = None,
    from_step: int | str | None = None,
    to_step: int | str | None = None,
    order: Literal['auto', 'given', 'natural', 'mtime'] = 'auto',
    include_outputs: bool = False,
    exclude: Sequence[str] = (),
    skip_broken: bool = False,
    state: str | Sequence[str] = 'auto',
    match: Literal['name', 'order'] = 'name',
    keys: Literal['strict', 'intersection', 'union'] = 'strict',
    plot: str | Path | None = None,
    force: bool = False,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    threads: int | None = None,
) -> LookReport:
    r"""Measure where the checkpoints of a series lie to each other, in one pass over them, in float64.

    Buffers, integers and what is copied by an average are left out.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones).
        last: The last N.
        best: The best N by `metric`; the earlier one at a tie.
        metric: Its name: a key in the files, dotted if nested, or in their names.
        metrics: A table of metrics, CSV or JSON lines.
        lower_is_better: For a loss. If None: by the name of the metric.
        window: Those of the last 20k steps, or 5% of the run.
        min_gap: At least so many steps between two.
        every: Every K-th, counted from the last; or one for every 5000steps.
        from_step: From this step (or epoch) on.
        to_step: Up to this step (or epoch).
        order: auto (stored step or epoch, else numbers in names), given, natural, mtime.
        include_outputs: Include files that ckpt wrote, and averages by other tools.
        exclude: Leave out what this glob matches, by its name or the end of its path.
        skip_broken: Leave out what is damaged or holds no weights; else it is an error.
        state: auto (the EMA where all have one), raw, ema, eval (schedule-free), or a dotted path.
        match: name or order.
        keys: strict, intersection, or union (averaged over those that have it).
        plot: Draw it, too: .svg or .png; needs matplotlib.
        force: Replace an existing picture.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        threads: Number of threads; the result is the same. If None: the cores, 16 at most.

    Returns:
        Distances, cosines, and warnings.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`.
    """
    ...

def recalibrate_checkpoint(
    path: str | Path,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    forward: str | None = None,
    inputs: int = 1,
    mask: str | None = None,
    state: str = 'auto',
    data: str,
    images: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_map: str | Path | None = None,
    split: str = 'validation',
    data_root: str | None = None,
    passes: int = 1,
    estimator: Literal['population', 'batch-mean'] = 'population',
    include_frozen: bool = False,
    allow_unmeasured: bool = False,
    seed: int = 0,
    eval_data: str | None = None,
    require_gain: bool = False,
    out: str | Path | None = None,
    force: bool = False,
    write_checksums: bool = False,
    sign_off: str | Path | None = None,
    plot: str | Path | None = None,
    dry_run: bool = False,
    on_plan: Callable[[RecalibrationReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    device: str = 'auto',
    amp: bool = False,
    channels_last: bool = True,
) -> RecalibrationReport:
    r"""Give the weights in a checkpoint the BatchNorm statistics of some data, and write it anew.

    Everything but the buffers of the BatchNorm layers is kept byte for byte. See `build_model` in
    `ckpt_tools.evaluation.models` for models, `open_data` in `ckpt_tools.evaluation.data` for data, and
    `recalibrate_bn` for the statistics. The folders of factories are on `sys.path` meanwhile.

    Args:
        path: the checkpoint.
        model: timm name, module:factory or file.py:factory. If None: arch in the checkpoint.
        model_kwargs: Arguments of the factory, such as num_classes=10.
        forward: file.py:fn, called with (model, batch).
        inputs: How many leading entries of a batch go to the model.
        mask: Entry of a batch that says which positions are not padding.
        state: auto (the EMA where there is one), raw, ema, eval (schedule-free), or a dotted path.
        data: Folder of images, tar, timm dataset (hfds/...), or file.py:factory.
        images: Number of images, chosen at random, or all (in Python: -1). If None: 8192, or all if fewer.
        batch_size: Images per batch.
        workers: Processes that decode images. If None: the cores, 8 at most.
        img_size: Side of the images. If None: the run's, or the model's.
        crop_pct: Part of the image that the crop keeps. If None: the run's, or the model's.
        interpolation: bilinear, bicubic, ... If None: the run's, or the model's.
        mean: 0.5 or 0.485,0.456,0.406. If None: the run's, or the model's.
        std: As `mean`. If None: the run's, or the model's.
        class_map: Classes of labelled folders: a name a line, with a number or in order; or JSON. If None: the checkpoint's, or by name.
        split: Split of a timm dataset.
        data_root: Folder with the timm dataset.
        passes: Number of passes over the images; after P of them, the first P layers are exact.
        estimator: population (all values as one set), or batch-mean (each batch counts once).
        include_frozen: Also measure layers that training does not update.
        allow_unmeasured: Accept layers that cannot be measured in front of others.
        seed: Seed of the random subset.
        eval_data: Labelled images, to measure the accuracy before and after.
        require_gain: Write nothing if the loss on `eval_data` gets worse.
        out: The target. If None: CKPT with -bn.
        force: Replace an existing target.
        write_checksums: Record the SHA-256 of each tensor in the output.
        sign_off: Also write an in-toto statement about inputs and output, to be signed.
        plot: Draw how far each layer moved, .svg or .png; needs matplotlib.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        device: auto, cpu, cuda, cuda:1.
        amp: Mixed precision, bfloat16.
        channels_last: Memory order of images and convolutions.

    Returns:
        What was done. For a model without BatchNorm, the report has no layers, and nothing is written; the accuracy on
        `eval_data` is there all the same.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    ...

def strip(
    path: str | Path,
    *,
    state: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    write_checksums: bool = False,
    sign_off: str | Path | None = None,
    part: str | None = None,
    finish: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[StripReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    max_read_rate: str | int | None = None,
    drop_cache: bool = False,
) -> StripReport:
    r"""Write a checkpoint without optimizers, schedulers, scalers, random states and the like.

    All sets of weights are kept byte for byte, with ``arch``, ``epoch``, ``args`` and all other entries.

    Args:
        path: a torch file or a DCP folder. Safetensors and folders of shards have nothing to strip.
        state: Keep only these weights: auto, raw, ema, eval (schedule-free), or a dotted path. If None: all of them.
        out: The target. If None: CKPT with -stripped.
        force: Replace an existing target.
        write_checksums: Record the SHA-256 of each tensor in the output.
        sign_off: Also write an in-toto statement about inputs and output, to be signed.
        part: Do part i of n, such as 2/8, and publish nothing.
        finish: Publish the output when all parts are done.
        resume: Go on with what is done, and keep what is done if it is killed.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        max_read_rate: Bytes a second to read, at most, in all threads together, such as 2GB.
        drop_cache: Let the system forget what was read and written, for others' sake.

    Returns:
        What was stripped. If there is nothing to strip, nothing is written.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    ...

def sweep(
    paths: str | Path | Iterable[str | Path],
    *,
    mode: Any | None = None,
    decay: Any | None = None,
    half_life: Any | None = None,
    per_step: bool = False,
    by: Any | None = None,
    warmup: Any | None = None,
    warmup_gamma: Any | None = None,
    warmup_power: Any | None = None,
    min_decay: Any | None = None,
    update_after: Any | None = None,
    bias_correction: bool = False,
    shape: Any | None = None,
    sigma_rel: Any | None = None,
    gamma: Any | None = None,
    last: Any | None = None,
    best: Any | None = None,
    window: Any | None = None,
    min_gap: Any | None = None,
    every: Any | None = None,
    from_step: Any | None = None,
    to_step: Any | None = None,
    greedy: bool = False,
    search: str | None = None,
    evaluations: int = 8,
    exclude: Sequence[str] = (),
    skip_broken: bool = False,
    order: Literal['auto', 'given', 'natural', 'mtime'] = 'auto',
    include_outputs: bool = False,
    metrics: str | Path | None = None,
    state: str | Sequence[str] = 'auto',
    match: Literal['name', 'order'] = 'name',
    keys: Literal['strict', 'intersection', 'union'] = 'strict',
    buffers: Literal['average', 'last'] = 'average',
    lora: Literal['factors', 'product'] = 'factors',
    dequantize: bool = False,
    eval_data: str | None = None,
    eval_command: str | None = None,
    eval_function: str | None = None,
    in_memory: bool = False,
    time_limit: float | None = None,
    jobs: int = 1,
    metric: str | None = None,
    lower_is_better: bool | None = None,
    test: str | None = None,
    test_split: str | None = None,
    holdout: float | None = None,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    forward: str | None = None,
    inputs: int = 1,
    mask: str | None = None,
    data: str | None = None,
    images: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_map: str | Path | None = None,
    split: str = 'validation',
    data_root: str | None = None,
    seed: int = 0,
    passes: int = 1,
    estimator: Literal['population', 'batch-mean'] = 'population',
    include_frozen: bool = False,
    allow_unmeasured: bool = False,
    out: str | Path | None = None,
    force: bool = False,
    dtype: Literal['float64', 'float32', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz', 'fp64', 'fp32', 'fp16', 'half', 'bf16', 'same'] | torch.dtype | None = None,
    scratch: str | Path = 'ckpt-sweep',
    keep: int = 1,
    plot: str | Path | None = None,
    report: str | Path | None = None,
    csv: str | Path | None = None,
    dry_run: bool = False,
    on_plan: Callable[[SweepReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    max_read_rate: str | int | None = None,
    drop_cache: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    device: str = 'auto',
    gpu_memory: str | int | None = None,
    on_result: Callable[..., None] | None = None,
    on_words: Any | None = None,
    amp: bool = False,
    channels_last: bool = True,
) -> SweepReport:
    r"""Average a series in many ways, score each average, and choose the best.

    The candidates are all combinations of the values that are given, and each checkpoint alone. The inputs are read
    once for several of them. Each result is kept in `scratch`, so that a sweep that was stopped goes on.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones).
        mode: uniform, ema, decay, power, difference. If None: the one that takes the other options, else uniform.
        decay: EMA decay per checkpoint (per training step with `per_step`). If None: such that the average is as old as a third of the series.
        half_life: ema: in steps (or files, `by='files'`), or 5% of the run.
        per_step: ema: the decay between two checkpoints is decay^(step gap).
        by: Count along steps, or files; auto takes the steps where all are known. If None: auto.
        warmup: ema: litema or timm; the decay grows.
        warmup_gamma: timm: gamma in 1 - (1 + s / gamma)^-power. If None: 1.0.
        warmup_power: timm: power in it; 2/3 as in ModelEmaV3. If None: 0.6666666666666666.
        min_decay: timm: the smallest decay.
        update_after: timm: updates that copy the weights before the average begins.
        bias_correction: ema: start from zero, divide by 1 - decay^N.
        shape: decay: linear, 1-sqrt, cosine, inverse-sqrt; of the learning rate that it stands for. If None: 1-sqrt.
        sigma_rel: power: width of the average, as a part of the training so far.
        gamma: power: instead, its exponent.
        last: The last N.
        best: The best N by `metric`; the earlier one at a tie.
        window: Those of the last 20k steps, or 5% of the run.
        min_gap: At least so many steps between two.
        every: Every K-th, counted from the last; or one for every 5000steps.
        from_step: From this step (or epoch) on.
        to_step: Up to this step (or epoch).
        greedy: Greedy soup: add checkpoints, best first, as long as the score is not worse.
        search: Golden section between the two values of this option, such as decay or sigma_rel.
        evaluations: Of a search.
        exclude: Leave out what this glob matches, by its name or the end of its path.
        skip_broken: Leave out what is damaged or holds no weights; else it is an error.
        order: auto (stored step or epoch, else numbers in names), given, natural, mtime.
        include_outputs: Include files that ckpt wrote, and averages by other tools.
        metrics: With `best`: a table of metrics, CSV or JSON lines.
        state: auto (the EMA where all have one), raw, ema, eval (schedule-free), or a dotted path.
        match: name or order.
        keys: strict, intersection, or union (averaged over those that have it).
        buffers: average, or last: BatchNorm statistics of the last checkpoint.
        lora: factors, or product: average LoRA updates themselves, exactly; the ranks add up.
        dequantize: Average what 8-bit floats with scales stand for; bfloat16 unless `dtype` is given.
        eval_data: Labelled images: top-1, top-5 and loss of `model`.
        eval_command: 'python eval.py {ckpt}': its last line is a number, or a JSON object of metrics.
        eval_function: file.py:fn, which returns a number or a dict of metrics.
        in_memory: Call the function with the state dict, not the path.
        time_limit: Seconds of one command.
        jobs: Commands at a time.
        metric: The one that decides; also of `best`. If None: top1, or the only one.
        lower_is_better: For a loss. If None: by the name of the metric.
        test: Data, command or function like that of the evaluation; scored once, for the best and the last.
        test_split: Split of a named dataset to report on. If None: that of split.
        holdout: Instead: fraction of the samples that is kept for the report, drawn by `seed`.
        model: timm name, module:factory or file.py:factory. If None: arch in the checkpoint.
        model_kwargs: Arguments of the factory, such as num_classes=10.
        forward: file.py:fn, called with (model, batch).
        inputs: How many leading entries of a batch go to the model.
        mask: Entry of a batch that says which positions are not padding.
        data: Images for BatchNorm statistics, measured before every score.
        images: Number of images, chosen at random, or all (in Python: -1). If None: 8192, or all if fewer.
        batch_size: Images per batch.
        workers: Processes that decode images. If None: the cores, 8 at most.
        img_size: Side of the images. If None: the run's, or the model's.
        crop_pct: Part of the image that the crop keeps. If None: the run's, or the model's.
        interpolation: bilinear, bicubic, ... If None: the run's, or the model's.
        mean: 0.5 or 0.485,0.456,0.406. If None: the run's, or the model's.
        std: As `mean`. If None: the run's, or the model's.
        class_map: Classes of labelled folders: a name a line, with a number or in order; or JSON. If None: the checkpoint's, or by name.
        split: Split of a timm dataset.
        data_root: Folder with the timm dataset.
        seed: Of the random subset of images, of `holdout` and of the intervals.
        passes: Number of passes over the images; after P of them, the first P layers are exact.
        estimator: population (all values as one set), or batch-mean (each batch counts once).
        include_frozen: Also measure layers that training does not update.
        allow_unmeasured: Accept layers that cannot be measured in front of others.
        out: Write the best average, with the evidence in it.
        force: Replace an existing target.
        dtype: Of the averages: float32, bfloat16, ... If None: same.
        scratch: Folder for results, logs and candidates.
        keep: Candidates that stay there: the best N.
        plot: Draw the metric over the candidates, .svg or .png.
        report: Write a page with all of it, one .html file.
        csv: Write the ranking as a table.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        max_read_rate: Bytes a second to read, at most, in all threads together, such as 2GB.
        drop_cache: Let the system forget what was read and written, for others' sake.
        threads: Number of threads; the result is the same. If None: the cores, 16 at most.
        allow_nonfinite: Allow NaN and infinity.
        device: Of the sums and the network: auto, cpu, cuda, or one such as cuda:1.
        gpu_memory: Memory to use on each GPU, such as 2GB. If None: 1GB.
        on_result: Called after each evaluation with (result, number done, number in all).
        on_words: How the page speaks, a ckpt_tools.jobs.sweep.page.Wording.
        amp: Run the network in mixed precision, bfloat16.
        channels_last: Memory order of the images.

    Returns:
        The ranking, and whether the best is better than the last checkpoint.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`. A candidate that fails does not stop the sweep; the report
            gives the reason. So it does if the best cannot be compared with the last checkpoint.
    """
    ...

def tune_checkpoint(
    path: str | Path,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    state: str = 'auto',
    data: str,
    images: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_map: str | Path | None = None,
    split: str = 'validation',
    data_root: str | None = None,
    eval_data: str | None = None,
    sizes: Sequence[float] | None = None,
    on_sizes: Callable[..., None] | None = None,
    train: Literal['head', 'last-block', 'all'] = 'head',
    head: str | None = None,
    recalibrate: Literal['last', 'all', 'none'] | None = None,
    epochs: int = 20,
    lr: float | None = None,
    augment: bool = False,
    ema_decay: float | None = None,
    scratch: str | Path | None = None,
    seed: int = 0,
    teacher: str | None = None,
    alpha: float | None = None,
    temperature: float | None = None,
    out: str | Path | None = None,
    force: bool = False,
    require_gain: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[TuneReport], None] | None = None,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    device: str = 'auto',
    amp: bool = False,
    channels_last: bool = True,
) -> TuneReport:
    r"""Train the classifier of the weights in a checkpoint, or more of them, and write it anew.

    FixRes (Touvron et al. 2019, arXiv 1906.06423): at the size of the test, with the transform of the test, the last
    BatchNorm layer is measured and the classifier trained, by SGD with momentum 0.9 and weight decay 1e-4. What goes
    into the classifier is computed once. With a teacher, its outputs are learned, too; see `tuning_loss` in
    `ckpt_tools.tuning.losses`. Everything that is neither trained nor measured is kept byte for byte. See
    `build_model` in `ckpt_tools.evaluation.models` for models, and `open_data` in `ckpt_tools.evaluation.data` for
    data. The folders of factories are on `sys.path` meanwhile.

    Args:
        path: the checkpoint.
        model: timm name, module:factory or file.py:factory. If None: arch in the checkpoint.
        model_kwargs: Arguments of the factory, such as num_classes=10.
        state: auto (the EMA where there is one), raw, ema, eval (schedule-free), or a dotted path.
        data: Labelled images to train on: folder, tar, timm dataset or file.py:factory.
        images: Number of images, chosen at random, or all (in Python: -1). If None: all.
        batch_size: Images per batch.
        workers: Processes that decode images. If None: the cores, 8 at most.
        img_size: Side of the images. If None: the run's, or the model's.
        crop_pct: Part of the image that the crop keeps. If None: the run's, or the model's.
        interpolation: bilinear, bicubic, ... If None: the run's, or the model's.
        mean: 0.5 or 0.485,0.456,0.406. If None: the run's, or the model's.
        std: As `mean`. If None: the run's, or the model's.
        class_map: Classes of labelled folders: a name a line, with a number or in order; or JSON. If None: the checkpoint's, or by name.
        split: Split of a timm dataset.
        data_root: Folder with the timm dataset.
        eval_data: Labelled images that have no part in the training, to compare before and after.
        sizes: Show first what these image sizes give on `eval_data` without training.
        on_sizes: Called with these scores before the training.
        train: head (the classifier), last-block (with the block in front of it), or all.
        head: Name of the classifier in the network. If None: found.
        recalibrate: BatchNorm layers to measure at this size: last, all or none. If None: all with `train=all`, else last.
        epochs: Passes over the images.
        lr: Learning rate of the first step. If None: 0.001 times the batch size / 512.
        augment: Random crops and flips, as timm trains; no features are stored.
        ema_decay: Write an exponential moving average of what is trained, of this decay a step.
        scratch: Folder for the inputs of the classifier (features). If None: that of the system for temporary files.
        seed: Seed of the subset, the order of the images, dropout, and the intervals.
        teacher: Checkpoint, timm name or file.py:factory.
        alpha: Weight of the teacher in the loss, 0 to 1; labels have the rest. If None: 0.5.
        temperature: Divides the logits of both networks in that part. If None: 5.
        out: The target. If None: CKPT with -tuned.
        force: Replace an existing target.
        require_gain: Write nothing if the loss on `eval_data` gets worse.
        dry_run: Show the plan, write nothing.
        on_plan: Called with the report of the plan before the work.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        device: auto, cpu, cuda, cuda:1.
        amp: Mixed precision, bfloat16.
        channels_last: Memory order of images and convolutions.

    Returns:
        What was done, with top-1, top-5 and loss on `eval_data` before, after the recalibration, and after all.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    ...

def verify(
    path: str | Path,
    *,
    inputs: str | Path | None = None,
    sample: str | None = None,
    seed: int | None = None,
    expect_sha256: str | None = None,
    allow_nonfinite: bool = False,
    on_progress: Callable[[Activity, int, int | None], None] | None = None,
    threads: int | None = None,
) -> VerifyReport:
    r"""Check that a checkpoint is whole, and that an output is what its record says; in bounded memory.

    What a file holds never raises an error here: it is the result of a check. Nothing in it is run, and `torch.load`
    sees only a file whose pickle was read before.

    Args:
        path: a file or folder.
        inputs: A folder that has the inputs of its record.
        sample: Make so much of the output again, such as 1%, and read no more of the inputs. If None: all of it.
        seed: Of the sample. If None: drawn, and reported.
        expect_sha256: SHA-256 of the file; for a folder, a file with lines as sha256sum writes them.
        allow_nonfinite: Allow NaN and infinity.
        on_progress: Called in this thread with (what is done, how much of it so far, all of it).
        threads: Number of threads; the result is the same. If None: the cores, 16 at most.

    Returns:
        The result of each check.

    Raises:
        UsageError: an option is invalid.
    """
    ...
