"""Averaging: from paths to one file or folder with the weighted sum of the checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoints.prefixes import renamed
from ..checkpoints.quantized import without_quantization
from ..compute import engine
from ..compute.gpu import devices
from ..compute.threads import check_threads
from ..errors import UsageError
from ..formats.file_plan import OutTensor
from ..formats.format import Writing
from ..formats.header import Header
from ..formats.sharded import parse_size
from ..series.lora import CONFIG, LORA, Adapter, AveragedAdapter, average_adapters, config_text
from ..series.schedules import Schedule
from ..series.weighted_sums import weighted_sums
from ..storage.source import sha256
from ..tensors import parse_dtype
from .addends import Addends, ByTensor, inputs_of, record_of
from .assembly import Assembly, assemble
from .companions import companions
from .lined_up import LinedUp, line_up
from .options import AveragedOutput, Earlier, Matching, Selection, Summing, takes
from .outputs import Target, default_target
from .provenance import Input
from .reports import Report
from .run import produce
from .weigh import weighed

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
        addends = weighed(given, schedule, selection, matching, output, running)
    _check(addends.matching)  # a record may say anything
    sums = _sums(addends)
    target = chosen or addends.target or sums.usual_target
    assembly = _laid_out(sums, sums.inputs, target, output, shard_bytes)
    gpus = devices.choose(running.device, assembly.bytes_read)
    memory = engine.memory_needed(sums.unique, running.threads, gpus, gpu_bytes)
    report = _planned(sums, assembly, memory=memory, device=", ".join(gpus) or "cpu")

    def with_hashes(report: AverageReport) -> tuple[AverageReport, Assembly]:
        hashed = _hashed(sums)
        assembly = _laid_out(sums, hashed, target, output, shard_bytes)
        return replace(report, inputs=hashed, bytes_written=assembly.nbytes), assembly

    done = produce(
        report,
        assembly,
        [stamp for member in addends.members for stamp in member.header.files],
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


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """The sums of an average, still without a place.

    Attributes:
        addends: with the coefficients over all values, where tensors have their own.
        lined_up: the weights that are summed.
        by_tensor: coefficients of tensors that have their own.
        adapter: of ``lora="product"``; else empty.
        tensors: name to sum, in the order of the output.
        inputs: to record, oldest first; with the hashes that are known.
    """

    addends: Addends
    lined_up: LinedUp
    by_tensor: ByTensor
    adapter: AveragedAdapter
    tensors: Mapping[str, OutTensor]
    inputs: tuple[Input, ...]

    @property
    def base(self) -> Header:
        """The last checkpoint, whose other entries the output has."""
        return self.addends.members[-1].header

    @property
    def unique(self) -> dict[OutTensor, None]:
        """The tensors, tied ones once."""
        return dict.fromkeys(self.tensors.values())

    @property
    def usual_target(self) -> Target:
        """Where the output goes if nothing says otherwise."""
        usual = default_target([member.header for member in self.addends.members])
        return usual if self.adapter.config is None else Target.of("averaged/")


def _sums(addends: Addends) -> _Sums:
    """Line up the weights, and say how each tensor is summed.

    Raises:
        CkptError: the weights do not line up, or cannot be averaged.
    """
    members, names, matching, dtype = addends.members, addends.names, addends.matching, addends.dtype
    lined_up = line_up(members, names, matching, mixed_dtypes=addends.mixed_dtypes, chosen=addends.chosen)
    by_tensor = ByTensor() if addends.by_tensor is None else addends.by_tensor(lined_up)
    if by_tensor.mean:
        addends = replace(addends, coefficients=by_tensor.mean, notes=(*addends.notes, *by_tensor.notes))
    tensors = weighted_sums(
        lined_up.aligned,
        addends.coefficients,
        dtype=dtype or lined_up.states[-1].dtype,
        keep_running=matching.buffers == "last",
        shared=lined_up.shared,
        by_name={name: (own,) for name, own in by_tensor.coefficients.items()},
    )
    adapter = AveragedAdapter()
    if matching.lora == "product":
        weights = [renamed(state.tensors, bare) for state, bare in zip(lined_up.states, lined_up.renamed, strict=True)]
        adapters = [
            Adapter.of(member.header, own, name, coefficient)
            for member, own, name, coefficient in zip(members, weights, names, addends.coefficients, strict=True)
        ]
        adapter = average_adapters(adapters, dtype=dtype, keys=matching.keys)
        both = tensors | adapter.tensors
        tensors = {name: both[name] for name in lined_up.renamed[-1].values() if name in both}
    inputs = (*addends.before, *inputs_of(addends, lined_up)[-len(addends.sources) :])
    return _Sums(addends, lined_up, by_tensor, adapter, tensors, inputs)


def _laid_out(
    sums: _Sums, inputs: Sequence[Input], target: Target, output: AveragedOutput, shard_bytes: int | None
) -> Assembly:
    """Lay the sums out in the files of the target, with a record of the inputs.

    Raises:
        CkptError: the target cannot hold them.
    """
    addends, lined_up = sums.addends, sums.lined_up
    more = {"ratios": sums.by_tensor.ratios} if sums.by_tensor.ratios else {}
    record = record_of(addends, inputs, lined_up.states[-1], **more)
    return assemble(
        sums.tensors,
        Writing(
            name=addends.name or target.name,
            provenance=record,
            untie=output.untie,
            max_bytes=shard_bytes,
            like=sums.base,
        ),
        target=target,
        base=sums.base,
        state=lined_up.states[-1],
        renamed=lined_up.renamed[-1],
        edited=_edited(sums.base, sums.adapter, target, dequantize=addends.matching.dequantize),
    )


def _planned(sums: _Sums, assembly: Assembly, *, memory: int, device: str) -> AverageReport:
    """Report what will be summed and written."""
    addends, lined_up, unique, by_name = sums.addends, sums.lined_up, sums.unique, sums.by_tensor.coefficients
    # A row of Model Stock may be the start alone.
    copied = dict.fromkeys(each for each in unique if each.copied and each.name not in by_name)
    return AverageReport(
        inputs=sums.inputs,
        mode=addends.mode,
        ordered_by=addends.ordered_by,
        averaged=tuple(tensor.name for tensor in unique if tensor not in copied),
        copied=tuple(tensor.name for tensor in copied),
        left_out=(*lined_up.left_out, *sums.adapter.left_out),
        tied=tuple(name for name, tensor in sums.tensors.items() if name != tensor.name),
        notes=(*addends.notes, *lined_up.notes, *sums.adapter.notes, *_kept(assembly)),
        dropped=assembly.dropped,
        out=str(assembly.target),
        companions=tuple(path.name for path in assembly.companions),
        bytes_read=assembly.bytes_read + sums.by_tensor.bytes_read,
        bytes_written=assembly.nbytes,
        memory=memory,
        device=device,
    )


def _hashed(sums: _Sums) -> tuple[Input, ...]:
    """Return the inputs with the SHA-256 of their files; those of an average that is extended are not read again."""
    before, own = sums.inputs[: -len(sums.addends.sources)], sums.inputs[-len(sums.addends.sources) :]
    digests = ({name: sha256(path) for name, path in member.header.names.items()} for member in sums.addends.sources)
    return (*before, *(replace(entry, sha256=each) for entry, each in zip(own, digests, strict=True)))


def _edited(base: Header, adapter: AveragedAdapter, target: Target, *, dequantize: bool) -> dict[str, bytes | None]:
    """Return the files beside the weights that change with these: name to new content, or None for no file.

    Raises:
        UsageError: one of them says how to read the weights, and the target is no folder.
    """
    edited = dict(without_quantization(companions(base, []))) if dequantize and target.folder else {}
    if adapter.config is not None:
        if not target.folder:
            raise UsageError(
                f"{target.path}: the rank and the scale of a PEFT adapter are in its {CONFIG}. Give `out` a name "
                "without suffix, for a folder with both."
            )
        edited[CONFIG] = config_text(adapter.config)
    return edited


def _kept(assembly: Assembly) -> Iterator[str]:
    """Report other sets of weights that are copied from the last checkpoint."""
    if assembly.kept:
        sets = ", ".join(f"{place} ({n} tensor{'s' * (n > 1)})" for place, n in assembly.kept.items())
        yield f"Copied from the last checkpoint, not averaged: {sets}."
