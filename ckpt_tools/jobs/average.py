"""Averaging: from paths to one file or folder with the weighted sum of the checkpoints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.layouts import StateDict
from ..checkpoints.layouts.layout import Unchanged, dotted
from ..checkpoints.layouts.schedule_free import evaluation_note, training_mode_note
from ..checkpoints.layouts.select import is_ema_by_name
from ..checkpoints.parts import in_place, not_averaged, of_ranks, select_parts, unwrapped
from ..checkpoints.prefixes import prefixes, renamed
from ..checkpoints.quantized import configuration, dequantized, refuse_without_scales, without_quantization
from ..compute import engine
from ..compute.gpu import devices
from ..compute.threads import check_threads
from ..errors import AlignmentError, LayoutError, UnsupportedError, UsageError
from ..formats import without_collector
from ..formats.file_plan import Files
from ..formats.format import Writing
from ..formats.ranks import masters_beside
from ..formats.sharded import parse_size
from ..series import lora
from ..series.align import align
from ..series.find import Member, Series, find_series
from ..series.lora import CONFIG, LORA, Products, average_products, check_config, config_text, factor_names
from ..series.schedules import Schedule, dominant
from ..series.weighted_sums import weighted_sums
from ..storage.source import sha256
from ..tensors import DType, TensorSpec, parse_dtype
from .assembly import Assembly, assemble
from .companions import companions
from .options import AveragedOutput, Matching, Selection, Summing, takes
from .outputs import Target, default_target
from .provenance import Input, averaged_inputs, provenance, short_names
from .reports import Report, some
from .run import produce

BUFFERS = ("average", "last")
# Factors of a low-rank update, as PEFT, loralib, torchtune, diffusers and kohya name them.
_LORA = re.compile(r"(?<![A-Za-z])lora(?:\d*|_linear_layer)[._](?:embedding_)?(?:[AaBb]|down|up)(?:[._]|$)")
_EMA_NAME = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)


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
    members = series.members
    names = short_names([member.path for member in members])
    coefficients = _coefficients(schedule, series)
    weights = _line_up(members, names, matching, mixed_dtypes=dtype is not None)
    written = dtype or weights.states[-1].dtype
    tensors = weighted_sums(
        weights.aligned, coefficients, dtype=written, keep_running=matching.buffers == "last", shared=weights.shared
    )
    products = Products()
    if matching.lora == "product":
        products = _products(members, names, coefficients, weights, dtype, matching.keys)
        order = [*weights.renamed[-1].values()]
        tensors = {name: found for name in order if (found := (tensors | products.tensors).get(name)) is not None}
    unique = dict.fromkeys(tensors.values())
    arguments = _arguments(schedule, matching, dtype, running)
    inputs = _inputs(members, names, coefficients, weights)
    target = chosen or default_target([member.header for member in members])
    edited: dict[str, bytes | None] = {}
    if products.config is not None:
        target = chosen or Target.of("averaged/")
        edited[CONFIG] = config_text(products.config)
        if not target.folder:
            raise UsageError(
                f"{target.path}: the rank and the scale of a PEFT adapter are in its {CONFIG}. Give `out` a name "
                "without suffix, for a folder with both."
            )
    if matching.dequantize and target.folder:
        edited |= without_quantization(companions(members[-1].header, []))
    base = members[-1].header

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
            state=weights.states[-1],
            renamed=weights.renamed[-1],
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
        left_out=(*weights.left_out, *products.left_out),
        tied=tuple(name for name, tensor in tensors.items() if name != tensor.name),
        notes=(
            *series.notes,
            *_remarks(schedule, members, coefficients),
            *weights.notes,
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


def _arguments(schedule: Schedule, matching: Matching, dtype: DType | None, running: Summing) -> dict[str, Any]:
    """Return the options to record in the output; None for those at their defaults."""
    return {
        **schedule.arguments,
        "match": None if matching.match == "name" else matching.match,
        "keys": None if matching.keys == "strict" else matching.keys,
        "buffers": None if matching.buffers == "average" else matching.buffers,
        "lora": None if matching.lora == "factors" else matching.lora,
        "dequantize": matching.dequantize or None,
        "dtype": dtype and dtype.name,
        "allow_nonfinite": running.allow_nonfinite or None,
    }


@dataclass(frozen=True, slots=True, eq=False)
class _LinedUp:
    """The weights of a series; with `shared`, `states`, `renamed` and `aligned` have those of the last checkpoint.

    Attributes:
        states: the set of weights in each checkpoint.
        renamed: their names to names without wrapper prefixes.
        aligned: name to one tensor a checkpoint, None where it has none.
        left_out: names that only some checkpoints have.
        shared: each file of the last checkpoint to the files in its place, if all headers are identical.
        notes: decisions worth knowing.
    """

    states: Sequence[StateDict]
    renamed: Sequence[Mapping[str, str]]
    aligned: Mapping[str, tuple[TensorSpec | None, ...]]
    left_out: tuple[str, ...]
    shared: Mapping[Path, Files]
    notes: tuple[str, ...]


@without_collector()
def _line_up(members: Sequence[Member], names: Sequence[str], matching: Matching, *, mixed_dtypes: bool) -> _LinedUp:
    shared = {} if matching.lora == "product" else _shared(members)
    # Files with identical headers have the same tensors.
    asked = [matching.state] if isinstance(matching.state, str) else [*matching.state]
    chosen = members[-1:] if shared else members
    states = _select_all(chosen, names, asked)
    if matching.dequantize:
        states = [dequantized(member.header, state) for member, state in zip(chosen, states, strict=True)]
        refuse_without_scales(members[-1].header, states)
    new_names = [unwrapped(s) for s in states]
    bare_tensors = [renamed(s.tensors, bare) for s, bare in zip(states, new_names, strict=True)]
    if matching.lora == "product":
        factors = [factor_names(tensors) for tensors in bare_tensors]
        bare_tensors = [
            {name: tensor for name, tensor in tensors.items() if name not in own}
            for tensors, own in zip(bare_tensors, factors, strict=True)
        ]
    plan = align(
        bare_tensors,
        names[-len(states) :],
        keys=matching.keys,
        match=matching.match,
        mixed_dtypes=mixed_dtypes,
    )
    notes = []
    partial = [name for name, inputs in plan.aligned.items() if not all(inputs)]
    if partial:
        notes.append(f"Not in every checkpoint, so averaged over those that have them: {some(partial)}.")
    if plan.differing:
        notes.append(
            f"Of another shape or dtype in other checkpoints, so taken from the last one: {some(plan.differing)}."
        )
    borrowed = not_averaged(members[-1].header, states[-1])
    if borrowed:
        notes.append(f"The averages lack these, so they are averages of the raw weights: {some(borrowed)}.")
    factor = next((name for name in plan.aligned if _LORA.search(name)), None) if len(members) > 1 else None
    if factor is not None:
        notes.append(
            f"'{factor}' is a factor of a LoRA update. The factors are averaged apart, and their product is not the "
            "average of the products: far from it for adapters of different runs. To average the updates themselves, "
            "use `lora='product'`, or merge each adapter into its model first."
        )
    masters = masters_beside(members[-1].path) if members[-1].header.ranks else None
    if masters is not None:
        notes.append(
            f"The weights in the files of layers are averaged. The float32 masters of ZeRO ({masters}) are not read "
            "where a model is a pipeline or has experts."
        )
    for member, state in zip(members[-len(states) :], states, strict=True):
        note = (
            training_mode_note(member.header.tree, [part.path for part in state.parts or (state,)])
            if state.which not in ("ema", "eval")
            else None
        )
        if note is not None:
            notes.append(f"{member.path.name}: {note}")
            break
    notes += dict.fromkeys(note for state in states if (note := evaluation_note(state)) is not None)
    return _LinedUp(states, new_names, plan.aligned, plan.left_out, shared, tuple(notes))


def _products(
    members: Sequence[Member],
    names: Sequence[str],
    coefficients: Sequence[float],
    weights: _LinedUp,
    dtype: DType | None,
    keys: str,
) -> Products:
    found = []
    for member, name, coefficient, state, bare in zip(
        members, names, coefficients, weights.states, weights.renamed, strict=True
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


def _kept(assembly: Assembly) -> Iterator[str]:
    """Report other sets of weights that are copied from the last checkpoint."""
    if assembly.kept:
        sets = ", ".join(f"{place} ({n} tensor{'s' * (n > 1)})" for place, n in assembly.kept.items())
        yield f"Copied from the last checkpoint, not averaged: {sets}."


def _coefficients(schedule: Schedule, series: Series) -> tuple[float, ...]:
    try:
        return schedule.coefficients([member.step for member in series.members])
    except UsageError as error:  # the notes may tell why
        raise UsageError(" ".join([str(error), *series.notes])) from error


def _remarks(schedule: Schedule, members: Sequence[Member], coefficients: Sequence[float]) -> Iterator[str]:
    """Report results that a user of this schedule may not expect."""
    if schedule.values.get("per_step") and members[0].counter in ("epoch", "name"):
        what = "epochs" if members[0].counter == "epoch" else "the numbers in the names"
        yield f"`per_step` counts gaps in {what}, for the files store no step."
    end = dominant(coefficients)
    if schedule.rule.advice is not None and end is not None:
        index, share = end
        which, advice = ("oldest", schedule.rule.advice[0]) if index == 0 else ("newest", schedule.rule.advice[1])
        yield f"The {which} checkpoint, {members[index].path.name}, holds {share:.1%} of this average. {advice}"


def _select_all(members: Sequence[Member], names: Sequence[str], asked: Sequence[str]) -> list[StateDict]:
    _check_ranks(members, names)
    found = [
        of_ranks(member.header, lambda header: in_place(header, select_parts(header, asked))) for member in members
    ]
    _check_parts(found, names)
    which = {s.which for s in found}
    if "ema" in which and len(which) > 1:
        having = [name for name, s in zip(names, found, strict=True) if s.which == "ema"]
        lacking = [name for name, s in zip(names, found, strict=True) if s.which != "ema"]
        raise LayoutError(
            f"{having[0]} holds EMA weights, {lacking[0]} does not ({len(having)} of {len(names)} do). "
            "Raw and averaged weights cannot be mixed: use `state='raw'`, or leave the others out."
        )
    marked = [name for name in names if _EMA_NAME.search(name)]
    if "auto" in asked and "ema" not in which and 0 < len(marked) < len(names):
        raise LayoutError(
            f"{marked[0]} is an EMA by its name, {next(n for n in names if n not in marked)} is not "
            f"({len(marked)} of {len(names)} are). Raw and averaged weights cannot be mixed: leave the others out, "
            "or use `state='raw'` if the names are wrong."
        )
    return found


def _check_parts(states: Sequence[StateDict], names: Sequence[str]) -> None:
    """Refuse a series in which one checkpoint has several parts of the model, and another one only one of them.

    Raises:
        AlignmentError: it has.
    """
    homes = [{part.home: dotted(part.home) for part in state.parts or (state,)} for state in states]
    if {len(own) > 1 for own in homes} != {True, False} or any(() in own for own in homes):
        return  # where all have several parts, the names tell
    counts = Counter(home for own in homes for home in own)
    for home, count in counts.items():
        if count < len(states):
            lacking = next(name for name, own in zip(names, homes, strict=True) if home not in own)
            shared = next((dotted(each) for each, times in counts.items() if times == len(states)), None)
            alone = f", or use `state={shared!r}`, which all have" if shared is not None else ""
            raise AlignmentError(
                f"{lacking} has no weights at '{dotted(home)}', a part of the model ({count} of {len(states)} "
                f"checkpoints have it). Leave it out{alone}."
            )


def _check_ranks(members: Sequence[Member], names: Sequence[str]) -> None:
    """Refuse a series in which one checkpoint lacks the file of a rank that another one has.

    Raises:
        AlignmentError: it does.
    """
    for rank in {rank: None for member in members for rank in member.header.ranks}:
        lacking = [name for name, member in zip(names, members, strict=True) if rank not in member.header.ranks]
        if lacking:
            raise AlignmentError(
                f"{lacking[0]} has no file {rank} ({len(members) - len(lacking)} of {len(members)} checkpoints have "
                "it), and ranks are averaged each with its own kind. Leave out what is incomplete, or was trained with "
                "another number of ranks."
            )


def _inputs(
    members: Sequence[Member], names: Sequence[str], coefficients: Sequence[float], weights: _LinedUp
) -> tuple[Input, ...]:
    """Describe the checkpoints; a single set of weights stands for all of them."""
    found = [
        (chosen.label, tuple(prefixes(chosen.tensors)) if not isinstance(bare, Unchanged) else ())
        for chosen, bare in zip(weights.states, weights.renamed, strict=True)
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
