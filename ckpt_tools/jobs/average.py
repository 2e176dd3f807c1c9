"""Averaging: from paths to one file or folder with the weighted sum of the checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoints.ema_updates import is_exponential, weights_in_mean
from ..checkpoints.layouts import StateDict
from ..checkpoints.layouts.layout import Unchanged
from ..checkpoints.prefixes import prefixes, renamed
from ..checkpoints.quantized import configuration, without_quantization
from ..compute import engine
from ..compute.gpu import devices
from ..compute.threads import check_threads
from ..errors import SeriesError, UnsupportedError, UsageError
from ..formats.format import Writing
from ..formats.header import Header
from ..formats.sharded import parse_size
from ..series import lora
from ..series.find import Series, find_series
from ..series.lora import CONFIG, LORA, Products, average_products, check_config, config_text
from ..series.member import Member
from ..series.schedules import Schedule, dominant
from ..series.stored_profiles import stored_profiles
from ..series.weighted_sums import weighted_sums
from ..storage.source import sha256
from ..tensors import DType, parse_dtype
from .assembly import Assembly, assemble
from .companions import companions
from .lined_up import LinedUp, every_set, line_up, selected
from .options import AveragedOutput, Matching, Selection, Summing, takes
from .outputs import Target, default_target
from .provenance import Input, averaged_inputs, provenance, short_names
from .reports import Report
from .run import produce

Numbers = Sequence[Any]
BUFFERS = ("average", "last")


@dataclass(frozen=True, slots=True)
class AverageReport(Report):
    """What an average consists of; the plan before the work, and the result after it.

    Attributes:
        inputs: oldest first.
        mode: the schedule.
        ordered_by: what the order of the inputs is taken from, in words.
        averaged, copied: names of output tensors that are summed, or copied from the last checkpoint.
        left_out: names that only some checkpoints have, with ``keys="intersection"``.
        tied: names that share their tensor with an earlier one.
        notes: decisions and warnings, in words.
        dropped: entries of the last checkpoint that are not in the output.
        out: the target.
        bytes_read, bytes_written: of the whole job.
        memory: bytes of private buffers in host memory.
        device: where the sums are computed: ``cpu``, or GPUs such as ``cuda:0, cuda:1``.
        companions: names of files beside the weights that go along: configuration and tokenizer.
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
    companions: tuple[str, ...] = ()
    written: bool = False


@takes(Schedule, Selection, Matching, AveragedOutput, Summing)
def average(
    paths: str | Path | Iterable[str | Path],
    schedule: Schedule,
    selection: Selection,
    matching: Matching,
    output: AveragedOutput,
    running: Summing,
) -> AverageReport:
    """Average a series of checkpoints into one file or folder, in float64, in bounded memory.

    `ckpt_tools.series.schedules` has the formulas of the modes, and `SCHEDULES` in it the options of each. Integer and
    bool tensors always come from the last checkpoint. The output is the same byte for byte whatever `threads` and
    `device` are.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones).
        {options}

    Returns:
        What was averaged, and how.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    schedule.check()
    if matching.buffers not in BUFFERS:
        raise UsageError(f"`buffers` is one of {', '.join(BUFFERS)}, not {matching.buffers!r}.")
    if matching.lora not in LORA:
        raise UsageError(f"`lora` is one of {', '.join(LORA)}, not {matching.lora!r}.")
    if matching.lora == "product" and matching.match == "order":
        raise UsageError("`lora='product'` matches tensors by name, and does not go with `match='order'`.")
    dtype = parse_dtype(output.dtype)
    check_threads(running.threads)
    devices.check_name(running.device)
    gpu_bytes = devices.GPU_MEMORY if running.gpu_memory is None else parse_size(running.gpu_memory, "gpu_memory")
    chosen = None if output.out is None else Target.of(output.out)
    shard_bytes = None if output.max_shard_size is None else parse_size(output.max_shard_size)

    series = find_series([paths] if isinstance(paths, (str, Path)) else paths, **vars(selection))
    members, chosen_sets = series.members, None
    if schedule.rule.needs == "profile":
        members, chosen_sets = every_set(members, matching)
    names = _names(members, chosen_sets)
    numbers = _numbers(schedule, series, members, names, matching, chosen_sets)
    coefficients = _coefficients(schedule, numbers, series)
    lined_up = line_up(members, names, matching, mixed_dtypes=dtype is not None, chosen=chosen_sets)
    tensors = weighted_sums(
        lined_up.aligned,
        coefficients,
        dtype=dtype or lined_up.states[-1].dtype,
        keep_running=matching.buffers == "last",
        shared=lined_up.shared,
    )
    products = Products()
    if matching.lora == "product":
        products = _products(members, names, coefficients, lined_up, dtype, matching.keys)
        both = tensors | products.tensors
        tensors = {name: both[name] for name in lined_up.renamed[-1].values() if name in both}
    unique = dict.fromkeys(tensors.values())
    arguments = _arguments(schedule, numbers, matching, dtype, running)
    inputs = _inputs(members, names, coefficients, lined_up)
    base = members[-1].header
    usual = default_target([member.header for member in members]) if products.config is None else Target.of("averaged/")
    target = chosen or usual
    edited = _edited(base, products, target, dequantize=matching.dequantize)

    def lay_out(inputs: Sequence[Input]) -> Assembly:
        record = provenance(
            "avg", arguments, mode=schedule.mode, state=inputs[-1].state, inputs=averaged_inputs(inputs)
        )
        writing = Writing(name=target.name, provenance=record, untie=output.untie, max_bytes=shard_bytes, like=base)
        return assemble(
            tensors,
            writing,
            target=target,
            base=base,
            state=lined_up.states[-1],
            renamed=lined_up.renamed[-1],
            edited=edited,
        )

    def with_hashes(report: AverageReport) -> tuple[AverageReport, Assembly]:
        hashed = tuple(
            replace(entry, sha256={name: sha256(path) for name, path in member.header.names.items()})
            for entry, member in zip(inputs, members, strict=True)
        )
        assembly = lay_out(hashed)
        return replace(report, inputs=hashed, bytes_written=assembly.nbytes), assembly

    assembly = lay_out(inputs)
    gpus = devices.choose(running.device, assembly.bytes_read)
    report = AverageReport(
        inputs=inputs,
        mode=schedule.mode,
        ordered_by=series.ordered_by,
        averaged=tuple(tensor.name for tensor in unique if not tensor.copied),
        copied=tuple(tensor.name for tensor in unique if tensor.copied),
        left_out=(*lined_up.left_out, *products.left_out),
        tied=tuple(name for name, tensor in tensors.items() if name != tensor.name),
        notes=(
            *series.notes,
            *_remarks(schedule, numbers, members, coefficients),
            *lined_up.notes,
            *products.notes,
            *_kept(assembly),
        ),
        dropped=assembly.dropped,
        out=str(assembly.target),
        companions=tuple(path.name for path in assembly.companions),
        bytes_read=assembly.bytes_read,
        bytes_written=assembly.nbytes,
        memory=engine.memory_needed(unique, running.threads, gpus, gpu_bytes),
        device=", ".join(gpus) or "cpu",
    )
    return produce(
        report,
        assembly,
        [stamp for member in members for stamp in member.header.files],
        output,
        running,
        inputs=series.given,
        finish=with_hashes if output.hash else None,
        threads=running.threads,
        allow_nonfinite=running.allow_nonfinite,
        devices=gpus,
        gpu_memory=gpu_bytes,
    )


def _arguments(
    schedule: Schedule, numbers: Numbers, matching: Matching, dtype: DType | None, running: Summing
) -> dict[str, Any]:
    """Return the options to record in the output; None for those at their defaults."""
    return {
        **schedule.arguments(numbers),
        "match": None if matching.match == "name" else matching.match,
        "keys": None if matching.keys == "strict" else matching.keys,
        "buffers": None if matching.buffers == "average" else matching.buffers,
        "lora": None if matching.lora == "factors" else matching.lora,
        "dequantize": matching.dequantize or None,
        "dtype": dtype and dtype.name,
        "allow_nonfinite": running.allow_nonfinite or None,
    }


def _products(
    members: Sequence[Member],
    names: Sequence[str],
    coefficients: Sequence[float],
    lined_up: LinedUp,
    dtype: DType | None,
    keys: str,
) -> Products:
    """Average the LoRA updates.

    Raises:
        CkptError: see `average_products`; or the scale of an adapter is where it cannot be changed.
    """
    found = []
    for member, name, coefficient, state, bare in zip(
        members, names, coefficients, lined_up.states, lined_up.renamed, strict=True
    ):
        of_peft = any("lora_A" in each or "lora_embedding_A" in each for each in state.tensors)
        config = configuration(member.header, CONFIG) if of_peft else {}
        if config:
            check_config(member.header, config)
        elif "lora_adapter_metadata" in member.header.metadata:
            raise UnsupportedError(
                f"{member.header.path}: the scale of its updates is in its __metadata__, as text that `lora='product'` "
                "does not rewrite. Save the adapter with PEFT first."
            )
        found.append(lora.Member(member.header, renamed(state.tensors, bare), name, coefficient, config))
    return average_products(found, dtype=dtype, keys=keys)


def _edited(base: Header, products: Products, target: Target, *, dequantize: bool) -> dict[str, bytes | None]:
    """Return the files beside the weights that change with these: name to new content, or None for no file.

    Raises:
        UsageError: one of them says how to read the weights, and the target is no folder.
    """
    edited = dict(without_quantization(companions(base, []))) if dequantize and target.folder else {}
    if products.config is not None:
        if not target.folder:
            raise UsageError(
                f"{target.path}: the rank and the scale of a PEFT adapter are in its {CONFIG}. Give `out` a name "
                "without suffix, for a folder with both."
            )
        edited[CONFIG] = config_text(products.config)
    return edited


def _kept(assembly: Assembly) -> Iterator[str]:
    """Report other sets of weights that are copied from the last checkpoint."""
    if assembly.kept:
        sets = ", ".join(f"{place} ({n} tensor{'s' * (n > 1)})" for place, n in assembly.kept.items())
        yield f"Copied from the last checkpoint, not averaged: {sets}."


def _names(members: Sequence[Member], states: Sequence[StateDict] | None) -> list[str]:
    """Return short names; of a checkpoint with several sets of weights, with the set."""
    paths = list(dict.fromkeys(member.path for member in members))
    short = dict(zip(paths, short_names(paths), strict=True))
    if states is None or len(paths) == len(members):
        return [short[member.path] for member in members]
    return [f"{short[member.path]} ({state.label})" for member, state in zip(members, states, strict=True)]


def _numbers(
    schedule: Schedule,
    series: Series,
    members: Sequence[Member],
    names: Sequence[str],
    matching: Matching,
    states: Sequence[StateDict] | None,
) -> Numbers:
    """Return what the rule needs of each checkpoint."""
    needs = schedule.rule.needs
    if needs == "place":
        return [series.given.index(member.path) for member in members]
    if needs == "step":
        return [member.step for member in members]
    sources = [*zip(members, states or selected(members, names, matching), strict=True)]
    if needs == "profile":
        return stored_profiles(sources, schedule.values["profile"])
    return [_in_mean(member, state) for member, state in sources]


def _in_mean(member: Member, state: StateDict) -> int:
    """Return how many weights are in a mean.

    Raises:
        SeriesError: the checkpoint does not say it, or it is no mean.
    """
    if is_exponential(member.header, state):
        raise SeriesError(
            f"{member.path}: its {state.label} is an EMA, and `mode='difference'` takes means of weights that count "
            "the same. To make another EMA of several, use `mode='posthoc'`."
        )
    number = weights_in_mean(member.header, state)
    if number is None:
        raise SeriesError(
            f"{member.path}: does not say how many weights are in its {state.label}, and `mode='difference'` needs "
            "it: batch_idx_train of icefall, n_averaged, or the inputs of a uniform average by ckpt."
        )
    return number


def _coefficients(schedule: Schedule, numbers: Numbers, series: Series) -> tuple[float, ...]:
    try:
        return schedule.coefficients(numbers)
    except UsageError as error:  # the notes may tell why
        raise UsageError(" ".join([str(error), *series.notes])) from error


def _remarks(
    schedule: Schedule, numbers: Numbers, members: Sequence[Member], coefficients: Sequence[float]
) -> Iterator[str]:
    """Report results that a user of this schedule may not expect."""
    yield from schedule.remarks(numbers)
    if schedule.rule.needs == "place" and len(members) > 1:
        pairs = sorted(zip(numbers, members, coefficients, strict=True), key=lambda pair: pair[0])
        shown = ", ".join(f"{member.path.name} {c:.6g}" for _, member, c in pairs[:10])
        yield f"The weights of the files: {shown}{f' and {len(pairs) - 10} more' if len(pairs) > 10 else ''}."
    along = schedule.along(numbers)
    if along is not None and members[0].counter in ("epoch", "name"):
        what = "epochs" if members[0].counter == "epoch" else "the numbers in the names"
        yield f"The steps are {what}, for the files store no step."
    elif along == "by" and len({b - a for a, b in pairwise(numbers)}) > 1:
        yield "The files are not evenly spaced, so it counts along training steps; `by='files'` counts files."
    end = dominant(coefficients)
    if schedule.rule.advice is not None and end is not None:
        index, share = end
        which, advice = [*zip(("oldest", "newest"), schedule.rule.advice(**schedule.values), strict=True)][index > 0]
        yield f"The {which} checkpoint, {members[index].path.name}, holds {share:.1%} of this average. {advice}"


def _inputs(
    members: Sequence[Member], names: Sequence[str], coefficients: Sequence[float], lined_up: LinedUp
) -> tuple[Input, ...]:
    """Describe the checkpoints; a single set of weights stands for all of them."""
    found = [
        (chosen.label, tuple(prefixes(chosen.tensors)) if not isinstance(bare, Unchanged) else ())
        for chosen, bare in zip(lined_up.states, lined_up.renamed, strict=True)
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
        )
        for member, name, coefficient, (label, wrappers) in zip(
            members, names, coefficients, found * (len(members) // len(found)), strict=True
        )
    )
