"""Averaging: from paths to one file or folder with the weighted sum of the checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoints.ema_updates import is_exponential, weights_in_mean
from ..checkpoints.layouts import StateDict
from ..checkpoints.layouts.layout import Unchanged, dotted
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
from ..series.paths import folder_of_index, one_checkpoint
from ..series.schedules import Schedule, dominant
from ..series.stored_profiles import stored_profiles
from ..series.weighted_sums import weighted_sums
from ..storage.source import sha256
from ..tensors import DType, parse_dtype
from .addends import Addends, ByTensor, state_asked
from .assembly import Assembly, assemble
from .companions import companions
from .lined_up import LinedUp, every_set, line_up, selected
from .options import AveragedOutput, Earlier, Matching, Selection, Summing, takes
from .outputs import Target, default_target
from .provenance import Input, averaged_inputs, provenance, short_names
from .reports import Report
from .run import produce
from .stock import measured, with_start

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
        compared: after a replay, how the output compares with the average that it was made again from, in words.
        same: after a replay, True if the weights are the same in every byte; None if that is not known.
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
    compared: str = ""
    same: bool | None = None
    written: bool = False


@takes(Schedule, Selection, Matching, Earlier, AveragedOutput, Summing)
def average(
    paths: str | Path | Iterable[str | Path],
    schedule: Schedule,
    selection: Selection,
    matching: Matching,
    earlier: Earlier,
    output: AveragedOutput,
    running: Summing,
) -> AverageReport:
    """Average a series of checkpoints into one file or folder, in float64, in bounded memory.

    `ckpt_tools.series.schedules` has the formulas of the modes, and `SCHEDULES` in it the options of each. Integer and
    bool tensors always come from the last checkpoint. The output is the same byte for byte whatever `threads` and
    `device` are.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones); with `update` the checkpoints to add, and with
            `replay` where to look for the inputs.
        {options}

    Returns:
        What was averaged, and how.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    if earlier.update is None and earlier.replay is None:  # else the record has the rest of the options
        schedule.check()
    _check(matching)
    if earlier.update is not None and earlier.replay is not None:
        raise UsageError("`update` and `replay` do not go together: one extends an average, the other makes it again.")
    parse_dtype(output.dtype)
    check_threads(running.threads)
    devices.check_name(running.device)
    gpu_bytes = devices.GPU_MEMORY if running.gpu_memory is None else parse_size(running.gpu_memory, "gpu_memory")
    chosen = None if output.out is None else Target.of(output.out)
    shard_bytes = None if output.max_shard_size is None else parse_size(output.max_shard_size)

    given = [paths] if isinstance(paths, (str, Path)) else paths
    if earlier.update is not None:
        from .update import updated

        addends = updated(earlier.update, given, schedule, selection, matching, output, running)
    elif earlier.replay is not None:
        from .replay import replayed

        addends = replayed(earlier.replay, given, schedule, selection, matching, output, running)
    else:
        addends = _by_rule(given, schedule, selection, matching, output, running)
    members, names = addends.members, addends.names
    matching, dtype = addends.matching, addends.dtype
    _check(matching)  # a record may say anything
    lined_up = line_up(members, names, matching, mixed_dtypes=addends.mixed_dtypes, chosen=addends.chosen)
    by_tensor = ByTensor() if addends.by_tensor is None else addends.by_tensor(lined_up)
    if by_tensor.mean:
        addends = replace(addends, coefficients=by_tensor.mean, notes=(*addends.notes, *by_tensor.notes))
    coefficients = addends.coefficients
    tensors = weighted_sums(
        lined_up.aligned,
        coefficients,
        dtype=dtype or lined_up.states[-1].dtype,
        keep_running=matching.buffers == "last",
        shared=lined_up.shared,
        by_name=by_tensor.coefficients,
    )
    products = Products()
    if matching.lora == "product":
        products = _products(members, names, coefficients, lined_up, dtype, matching.keys)
        both = tensors | products.tensors
        tensors = {name: both[name] for name in lined_up.renamed[-1].values() if name in both}
    unique = dict.fromkeys(tensors.values())
    # A row of Model Stock may be the start alone.
    copied = dict.fromkeys(each for each in unique if each.copied and each.name not in by_tensor.coefficients)
    read = len(members) - bool(addends.before)  # those that are inputs themselves
    inputs = (*addends.before, *_inputs(addends, lined_up)[-read:])
    base = members[-1].header
    usual = default_target([member.header for member in members]) if products.config is None else Target.of("averaged/")
    target = chosen or addends.target or usual
    edited = _edited(base, products, target, dequantize=matching.dequantize)

    def lay_out(inputs: Sequence[Input]) -> Assembly:
        record = provenance(
            "avg",
            addends.arguments,
            mode=addends.mode,
            state=inputs[-1].state,
            **_places(members[-1], lined_up.states[-1]),
            **({"updates": addends.updates} if addends.updates else {}),
            inputs=averaged_inputs(inputs),
            **({"ratios": by_tensor.ratios} if by_tensor.ratios else {}),
        )
        writing = Writing(
            name=addends.name or target.name, provenance=record, untie=output.untie, max_bytes=shard_bytes, like=base
        )
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
        hashed = inputs[:-read] + tuple(
            replace(entry, sha256={name: sha256(path) for name, path in member.header.names.items()})
            for entry, member in zip(inputs[-read:], members[-read:], strict=True)
        )
        assembly = lay_out(hashed)
        return replace(report, inputs=hashed, bytes_written=assembly.nbytes), assembly

    assembly = lay_out(inputs)
    gpus = devices.choose(running.device, assembly.bytes_read)
    report = AverageReport(
        inputs=inputs,
        mode=addends.mode,
        ordered_by=addends.ordered_by,
        averaged=tuple(tensor.name for tensor in unique if tensor not in copied),
        copied=tuple(tensor.name for tensor in copied),
        left_out=(*lined_up.left_out, *products.left_out),
        tied=tuple(name for name, tensor in tensors.items() if name != tensor.name),
        notes=(*addends.notes, *lined_up.notes, *products.notes, *_kept(assembly)),
        dropped=assembly.dropped,
        out=str(assembly.target),
        companions=tuple(path.name for path in assembly.companions),
        bytes_read=assembly.bytes_read + by_tensor.bytes_read,
        bytes_written=assembly.nbytes,
        memory=engine.memory_needed(unique, running.threads, gpus, gpu_bytes),
        device=", ".join(gpus) or "cpu",
    )
    done = produce(
        report,
        assembly,
        [stamp for member in members for stamp in member.header.files],
        output,
        running,
        inputs=addends.given,
        replaces=addends.replaces,
        finish=with_hashes if output.hash else None,
        threads=running.threads,
        allow_nonfinite=bool(addends.arguments.get("allow_nonfinite")),
        devices=gpus,
        gpu_memory=gpu_bytes,
    )
    if addends.compared is None or not done.written:
        return done
    compared, same = addends.compared(target.path)
    return replace(done, compared=compared, same=same)


def _check(matching: Matching) -> None:
    if matching.buffers not in BUFFERS:
        raise UsageError(f"`buffers` is one of {', '.join(BUFFERS)}, not {matching.buffers!r}.")
    if matching.lora not in LORA:
        raise UsageError(f"`lora` is one of {', '.join(LORA)}, not {matching.lora!r}.")
    if matching.lora == "product" and matching.match == "order":
        raise UsageError("`lora='product'` matches tensors by name, and does not go with `match='order'`.")


def _by_rule(
    paths: Iterable[str | Path],
    schedule: Schedule,
    selection: Selection,
    matching: Matching,
    output: AveragedOutput,
    running: Summing,
) -> Addends:
    """Find the checkpoints, and weigh them as the rule does."""
    start = None
    if schedule.rule.needs == "products":
        start = folder_of_index(one_checkpoint(schedule.values["base"]))
    series = find_series(paths, start=start, **vars(selection))
    members, chosen, by_tensor = series.members, None, None
    if schedule.rule.needs == "profile":
        members, chosen = every_set(members, matching)
    elif start is not None:
        members, chosen = with_start(series, start, matching)
        by_tensor = partial(measured, schedule, members, matching, running)
    names = _names(members, chosen)
    numbers = _numbers(schedule, series, members, names, matching, chosen)
    coefficients = _coefficients(schedule, numbers, series) if by_tensor is None else ()
    dtype = parse_dtype(output.dtype)
    return Addends(
        members=members,
        names=names,
        coefficients=coefficients,
        chosen=chosen,
        matching=matching,
        dtype=dtype,
        mode=schedule.mode,
        arguments=_arguments(schedule, numbers, matching, dtype, running),
        ordered_by=series.ordered_by,
        notes=(*series.notes, *_remarks(schedule, numbers, members, coefficients)),
        given=(*series.given, *(member.path for member in members)),
        by_tensor=by_tensor,
    )


def _places(member: Member, state: StateDict) -> dict[str, Any]:
    """Return what a further update has to know: what the steps are, and where the average is in a file that nests."""
    homes = [dotted(part.home) for part in state.parts or (state,)]
    facts = {"counter": member.counter, "places": homes if all(homes) and not member.header.ranks else None}
    return {name: fact for name, fact in facts.items() if fact is not None}


def _arguments(
    schedule: Schedule, numbers: Numbers, matching: Matching, dtype: DType | None, running: Summing
) -> dict[str, Any]:
    """Return the options to record in the output; None for those at their defaults."""
    return {
        **schedule.arguments(numbers),
        "state": None if (state := state_asked(matching)) == "auto" else state,
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
    if needs == "products":
        return ()
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


def _inputs(addends: Addends, lined_up: LinedUp) -> tuple[Input, ...]:
    """Describe the checkpoints; a single set of weights stands for all of them."""
    found = [
        (chosen.label, tuple(prefixes(chosen.tensors)) if not isinstance(bare, Unchanged) else ())
        for chosen, bare in zip(lined_up.states, lined_up.renamed, strict=True)
    ]
    n = len(addends.members)
    return tuple(
        Input(
            path=str(member.path),
            name=name,
            step=member.step,
            coefficient=coefficient,
            state=label,
            nbytes=member.header.nbytes,
            prefixes=wrappers,
            sha256=hashes,
        )
        for member, name, coefficient, (label, wrappers), hashes in zip(
            addends.members, addends.names, addends.coefficients, found * (n // len(found)), addends.sha256 or [{}] * n,
            strict=True,
        )
    )  # fmt: skip
