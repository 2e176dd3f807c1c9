"""Averaging: ties series, layouts, keys, schedules, formats and engine together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.keys import prefixes, unwrap
from ..checkpoints.layouts import StateDict, is_ema_by_name, select
from ..compute import engine
from ..compute.gpu import devices
from ..compute.threads import check_threads
from ..errors import LayoutError, UsageError
from ..formats import format_of
from ..formats.file_plan import Files
from ..formats.sharded import parse_size
from ..series.align import align
from ..series.find import Member, Series, find_series
from ..series.rows import recipes
from ..series.schedules import DEFAULT_DECAY, Schedule, dominant
from ..storage.source import sha256
from ..tensors import parse_dtype
from .assembly import assemble
from .outputs import check_replaceable, check_suffix, check_target, default_target
from .provenance import Input, averaged_inputs, provenance, short_names
from .run import only_noted, write

if TYPE_CHECKING:
    import torch

BUFFERS = ("average", "last")
_EMA_NAME = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AverageReport:
    """What an average is made of; the same before the work (the plan) and after it.

    Attributes:
        inputs: oldest first.
        mode: the schedule.
        ordered_by: what put the inputs in order.
        averaged, copied: names of output tensors that are summed, or taken from the last checkpoint as they are.
        left_out: names that only some checkpoints have, with ``keys="intersection"``.
        tied: names that share their tensor with an earlier one.
        notes: decisions worth knowing; warnings among them.
        dropped: what of the last checkpoint's container is not carried over.
        out: the target.
        bytes_read, bytes_written: of the whole job.
        memory: private bytes of buffers it needs, without those on GPUs.
        device: what does the sums: `cpu`, or GPUs such as `cuda:0`, with commas between them.
        written: False for a plan.
    """

    inputs: tuple[Input, ...]
    mode: str
    ordered_by: str
    averaged: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    tied: tuple[str, ...]
    notes: tuple[str, ...]
    dropped: tuple[str, ...]
    out: str
    bytes_read: int
    bytes_written: int
    memory: int
    device: str
    written: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)


def average(
    paths: str | Path | Iterable[str | Path],
    *,
    mode: str = "uniform",
    decay: float | None = None,
    per_step: bool = False,
    warmup: str | None = None,
    bias_correction: bool = False,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    order: str = "auto",
    last: int | None = None,
    best: int | None = None,
    metric: str = "metric",
    lower_is_better: bool = False,
    every: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    include_outputs: bool = False,
    state: str = "auto",
    match: str = "name",
    keys: str = "strict",
    buffers: str = "average",
    dtype: str | torch.dtype | None = None,
    out: str | Path | None = None,
    max_shard_size: str | int | None = None,
    untie: bool = False,
    hash: bool = False,  # noqa: A002 - the option's name
    threads: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    allow_nonfinite: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[AverageReport], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> AverageReport:
    """Average a series of checkpoints into one file, in float64, in bounded memory.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones).
        mode: ``uniform``, ``ema`` or ``weights``; see `ckpt_tools.series.schedules` for formulas.
        decay: ema: for a checkpoint, or with `per_step` for a training step. 0.99 if not given.
        warmup: ema: ``litema`` or ``timm``.
        bias_correction: ema: start from zero and divide by 1 - decay^N.
        weights: one number a checkpoint, in the order of the series; divided by their sum if `normalize`.
        order, last, best, metric, lower_is_better, every, from_step, to_step, include_outputs:
            which checkpoints, in which order; see `ckpt_tools.series.find.find_series`.
        state: ``auto`` (the EMA where all have one), ``raw``, ``ema``, or a dotted path.
        match: ``name`` or ``order``.
        keys: ``strict``, ``intersection``, or ``union`` (a tensor that some lack is averaged over the others,
            their weights scaled to the same sum).
        buffers: ``average``, or ``last`` to take BatchNorm's running statistics from the last checkpoint.
            Integer and bool tensors always come from the last.
        dtype: of the averaged floating-point tensors, such as ``bfloat16``; as the inputs if not given.
        out: target; the suffix picks the format, none means a folder of shards. ``averaged.pth``,
            or ``averaged.safetensors``, or the folder ``averaged``, as the inputs are, if not given.
        max_shard_size: bytes, or text such as ``5GB``.
        untie: in safetensors, write tied tensors under each of their names.
        hash: put the SHA-256 of the inputs into the output's provenance.
        threads: workers; one a core if not given. Changes no byte of the output.
        device: ``auto``, ``cpu``, ``cuda`` (all GPUs), or one such as ``cuda:1``. Changes no byte of the output.
        gpu_memory: bytes to take on each GPU, or text such as ``2GB``; 1 GB if not given.
        allow_nonfinite: let NaN and infinity pass.
        force: replace the target if it exists.
        dry_run: plan and check, read no payload, write nothing.
        on_plan: called with the plan before the work.
        on_progress: called in this thread with (bytes done, bytes in all), read and written.

    Returns:
        What was averaged, and how.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    schedule = Schedule(
        mode, decay, per_step, warmup, bias_correction, None if weights is None else tuple(weights), normalize
    )
    schedule.check()
    if buffers not in BUFFERS:
        raise UsageError(f"--buffers is one of {', '.join(BUFFERS)}, not {buffers!r}.")
    out_dtype = parse_dtype(dtype)
    check_threads(threads)
    devices.check_name(device)
    gpu_bytes = devices.GPU_MEMORY if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory")
    if out is not None:
        check_suffix(Path(out))
    shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    arguments = {
        "decay": (DEFAULT_DECAY if decay is None else decay) if mode == "ema" else None,
        "per_step": per_step or None,
        "warmup": warmup,
        "bias_correction": bias_correction or None,
        "normalize": None if normalize else False,
        "match": None if match == "name" else match,
        "keys": None if keys == "strict" else keys,
        "buffers": None if buffers == "average" else buffers,
        "dtype": out_dtype and out_dtype.name,
        "allow_nonfinite": allow_nonfinite or None,
    }

    series = find_series(
        [paths] if isinstance(paths, (str, Path)) else paths,
        order=order, last=last, best=best, metric=metric, lower_is_better=lower_is_better,
        every=every, from_step=from_step, to_step=to_step, include_outputs=include_outputs,
    )  # fmt: skip
    members = series.members
    stamps = [stamp for member in members for stamp in member.header.files]
    names = short_names([member.path for member in members])
    coefficients = _coefficients(schedule, series)
    notes = [*series.notes, *_remarks(schedule, members, coefficients)]
    shared = _shared(members)
    # What is in one of several files with identical headers is in all of them.
    states = _select_all(members[-1:] if shared else members, names, state)
    renamed = [unwrap(s.tensors) for s in states]
    plan = align(
        [dict(zip(bare.values(), s.tensors.values(), strict=True)) for s, bare in zip(states, renamed, strict=True)],
        names[-len(states) :],
        keys=keys,
        match=match,
        mixed_dtypes=out_dtype is not None,
    )
    partial = [name for name, row in plan.rows.items() if not all(row)]
    if partial:
        more = f" and {len(partial) - 1} more" if len(partial) > 1 else ""
        notes.append(f"Not in every checkpoint, so taken from those that have them: '{partial[0]}'{more}.")
    tensors = recipes(plan.rows, coefficients, dtype=out_dtype, keep_running=buffers == "last", shared=shared)
    unique = dict.fromkeys(tensors.values())
    target = Path(out) if out is not None else default_target([member.header for member in members])
    with only_noted(notes, dry_run):
        check_target(
            target,
            [*series.given, *(stamp.path for stamp in stamps)],
            nbytes=sum(tensor.nbytes for tensor in unique),
            force=force,
            folder=format_of(target).folder,
        )
    inputs = _inputs(members, names, coefficients, states, renamed, hashed=hash and not dry_run)
    assembly = assemble(
        tensors,
        target=target,
        base=members[-1].header,
        state=states[-1],
        renamed=renamed[-1],
        provenance=provenance("avg", arguments, mode=mode, state=inputs[-1].state, inputs=averaged_inputs(inputs)),
        max_shard_size=shard_bytes,
        untie=untie,
    )
    if assembly.folder:
        with only_noted(notes, dry_run):
            check_replaceable(target, assembly.names)
    if assembly.kept:
        sets = ", ".join(f"{place} ({n} tensor{'s' * (n > 1)})" for place, n in assembly.kept.items())
        notes.append(f"Kept beside the weights as the last checkpoint has it, not averaged: {sets}.")
    bytes_read = assembly.bytes_read
    gpus = devices.choose(device, bytes_read)
    report = AverageReport(
        inputs=inputs,
        mode=mode,
        ordered_by=series.ordered_by,
        averaged=tuple(tensor.name for tensor in unique if not tensor.copied),
        copied=tuple(tensor.name for tensor in unique if tensor.copied),
        left_out=plan.left_out,
        tied=tuple(name for name, tensor in tensors.items() if name != tensor.name),
        notes=tuple(notes),
        dropped=assembly.dropped,
        out=str(assembly.target),
        bytes_read=bytes_read,
        bytes_written=assembly.nbytes,
        memory=engine.memory_needed(unique, threads, gpus, gpu_bytes),
        device=", ".join(gpus) or "cpu",
    )
    if on_plan is not None:
        on_plan(report)
    if not dry_run:
        total = report.bytes_read + report.bytes_written
        write(
            assembly,
            stamps,
            force=force,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
            devices=gpus,
            gpu_memory=gpu_bytes,
            on_progress=None if on_progress is None else lambda moved: on_progress(moved, total),
        )
        report = replace(report, written=True)
    return report


def _coefficients(schedule: Schedule, series: Series) -> tuple[float, ...]:
    try:
        return schedule.coefficients([member.step for member in series.members])
    except UsageError as error:  # the notes may tell why
        raise UsageError(" ".join([str(error), *series.notes])) from error


def _remarks(schedule: Schedule, members: Sequence[Member], coefficients: Sequence[float]) -> Iterator[str]:
    """Say what a user of this schedule is likely not to expect."""
    if schedule.mode != "ema":
        return
    if schedule.per_step and members[0].counter in ("epoch", "name"):
        what = "epochs" if members[0].counter == "epoch" else "the numbers in the names"
        yield f"--per-step counts gaps in {what}, for the files store no step."
    end = dominant(coefficients)
    if end is not None:
        index, share = end
        which, advice = (
            ("oldest", "A smaller --decay, --per-step or --bias-correction spreads it.")
            if index == 0
            else ("newest", "A larger --decay spreads it.")
        )
        yield f"The {which} checkpoint, {members[index].path.name}, holds {share:.1%} of this average. {advice}"


def _select_all(members: Sequence[Member], names: Sequence[str], state: str) -> list[StateDict]:
    states = [select(member.header, state) for member in members]
    kinds = {s.which for s in states}
    if len(kinds) > 1:
        having = [name for name, s in zip(names, states, strict=True) if s.which == "ema"]
        lacking = [name for name, s in zip(names, states, strict=True) if s.which != "ema"]
        raise LayoutError(
            f"{having[0]} holds EMA weights, {lacking[0]} does not ({len(having)} of {len(names)} do). "
            "Raw and averaged weights do not mix: say --state raw, or leave the others out."
        )
    marked = [name for name in names if _EMA_NAME.search(name)]
    if state == "auto" and kinds == {"raw"} and 0 < len(marked) < len(names):
        raise LayoutError(
            f"{marked[0]} is an EMA by its name, {next(n for n in names if n not in marked)} is none "
            f"({len(marked)} of {len(names)} are). Raw and averaged weights do not mix: leave the others out, "
            "or say --state raw if the names mislead."
        )
    return states


def _inputs(
    members: Sequence[Member],
    names: Sequence[str],
    coefficients: Sequence[float],
    states: Sequence[StateDict],
    renamed: Sequence[Mapping[str, str]],
    *,
    hashed: bool,
) -> tuple[Input, ...]:
    """Describe the checkpoints; one state and one map of names are those of all."""
    found = [
        (chosen.label, tuple(prefixes(chosen.tensors)) if list(bare) != list(bare.values()) else ())
        for chosen, bare in zip(states, renamed, strict=True)
    ]
    return tuple(
        Input(
            path=str(member.path),
            name=name,
            step=member.step,
            coefficient=coefficient,
            state=label,
            nbytes=member.header.nbytes,
            prefixes=wrappers,
            sha256={stamp.path.name: sha256(stamp.path) for stamp in member.header.files} if hashed else {},
        )
        for member, name, coefficient, (label, wrappers) in zip(
            members, names, coefficients, found * (len(members) // len(found)), strict=True
        )
    )


def _shared(members: Sequence[Member]) -> dict[Path, Files]:
    """Return, for each file of the last checkpoint, the files in its place in all checkpoints of identical headers.

    Empty if one is not, or if the names of the files do not say the same about an EMA.
    """
    headers = [member.header for member in members]
    template = headers[-1].template
    if template is None or any(each.template is not template for each in headers):
        return {}
    if len({is_ema_by_name(each) for each in headers}) > 1:
        return {}
    shared = {}
    for file in template.files:
        places = [each.places.get(file, (file, 0)) for each in headers]
        last, before = places[-1]
        shared[last] = tuple((path, shift - before) for path, shift in places)
    return shared
