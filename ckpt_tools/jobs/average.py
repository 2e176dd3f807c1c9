"""Averaging: from paths to one file or folder with the weighted sum of the checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.prefixes import renamed
from ..checkpoints.quantized import without_quantization
from ..compute import engine
from ..compute.fetching import memory_ahead
from ..compute.gpu import devices
from ..compute.threads import check_threads
from ..errors import UsageError
from ..formats.file_plan import OutTensor
from ..formats.format import Writing
from ..formats.header import Header
from ..formats.in_memory import IN_MEMORY
from ..formats.sharded import parse_size
from ..series.lora import CONFIG, LORA, Adapter, AveragedAdapter, average_adapters, config_text
from ..series.schedules import Schedule
from ..series.usable import Skipped
from ..series.weighted_sums import weighted_sums
from ..storage.local import peak_memory
from ..storage.source import Stamp, sha256
from ..storage.staged import ScratchFile, scratch_file
from ..tensors import parse_dtype
from .addends import Addends, ByTensor, inputs_of, record_of
from .asked import Asked, asked_of
from .assembly import Assembly, assemble, module_versions
from .average_notes import of_output, of_statistics
from .checksums import with_place
from .companions import companions
from .lined_up import LinedUp, line_up
from .options import (
    AveragedOutput,
    Earlier,
    Fetched,
    Matching,
    Recalibration,
    Selection,
    Sharing,
    Summing,
    takes,
)
from .outputs import Target, default_target, grows_at
from .pictures import Picture
from .provenance import Input, provided
from .reports import Report
from .run import Hashed, manners, produce
from .state_dicts import as_inputs
from .weigh import weighed

if TYPE_CHECKING:
    import torch

    from .recalibrate import Opened, RecalibrationReport

BUFFERS = ("average", "last")


@dataclass(frozen=True, slots=True, repr=False)
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
        out: the target; empty if the average stays in memory.
        bytes_read, bytes_written: of the whole job.
        memory: bytes of private buffers in host memory.
        peak_memory: bytes that the process takes at its peak, about: what it took until the plan was made, and what is
            added by the work; without torch, images and networks.
        device: where the sums are computed: ``cpu``, or GPUs such as ``cuda:0, cuda:1``.
        companions: names of files beside the weights that go along: configuration and tokenizer.
        files: number of files with weights in the output; 0 if it is one file and no folder.
        compared: after a replay, how the output compares with the average that it was made again from, in words.
        same: after a replay, True if the weights are the same in every byte; None if that is not known.
        recalibration: with `recal_bn`, how the BatchNorm statistics are measured, and what came of it.
        scratch: bytes of the sums beside the target while that is done.
        part: what became of a part of the job, in words.
        written: False for a plan, and for a part.
        skipped: checkpoints that were left out, and why.
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
    files: int = 0
    compared: str = ""
    same: bool | None = None
    recalibration: RecalibrationReport | None = None
    scratch: int = 0
    peak_memory: int = field(default=0, compare=False)
    part: str = ""
    written: bool = False
    skipped: tuple[Skipped, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        plain = Report.to_dict(replace(self, recalibration=None))
        return plain | {"recalibration": None if self.recalibration is None else self.recalibration.to_dict()}


@takes(Schedule, Selection, Matching, Earlier, AveragedOutput, Recalibration, Sharing, Fetched, Summing)
def average(
    paths: str | Path | Mapping[str, torch.Tensor] | Iterable[str | Path | Mapping[str, torch.Tensor]],
    schedule: Schedule,
    selection: Selection,
    matching: Matching,
    earlier: Earlier,
    output: AveragedOutput,
    recalibration: Recalibration,
    sharing: Sharing,
    fetched: Fetched,
    running: Summing,
) -> Any:
    """Average a series of checkpoints into one file or folder, in float64, in bounded memory.

    `ckpt_tools.series.schedules` has the formulas of the modes, and `SCHEDULES` in it the options of each. Integer and
    bool tensors always come from the last checkpoint. The output is the same byte for byte whatever `threads` and
    `device` are.

    With ``out=None`` nothing is written: the average comes back as a state dict, each tensor with the bytes that it has
    in a file. State dicts, oldest first, are averaged like the files that they would be saved as, and are not changed.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones), or instead state dicts: names to tensors, on any
            device. With `update` the checkpoints to add, and with `replay` where to look for the inputs.
        {options}

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
    groups = (schedule, selection, matching, earlier, output, recalibration, sharing, fetched, running)
    with as_inputs(paths, groups, written=output.out is not None) as given:
        if earlier.update is None and earlier.replay is None:  # else the record has the rest of the options
            schedule.check()
        _check(matching)
        _check_recalibration(recalibration)
        if earlier.update is not None and earlier.replay is not None:
            raise UsageError(
                "`update` and `replay` do not go together: one extends an average, the other makes it again."
            )
        parse_dtype(output.dtype)
        check_threads(running.threads)
        polite = manners(running)
        picture = Picture.of(output.plot, force=output.force)
        devices.check_name(running.device)
        gpu_bytes = devices.GPU_MEMORY if running.gpu_memory is None else parse_size(running.gpu_memory, "gpu_memory")
        chosen = None if output.named is None else Target.of(output.named)
        shard_bytes = None if output.max_shard_size is None else parse_size(output.max_shard_size)

        measured = recalibration.recal_bn is not None
        asked = asked_of(sharing, sign_off=output.sign_off, hash=output.hash)
        if asked is not None:
            _check_shared(asked, measured, running.device)
        if earlier.update is not None:
            from .update import updated

            addends = updated(earlier.update, given, schedule, selection, matching, output, running, measured=measured)
        elif earlier.replay is not None:
            from .replay import replayed

            addends = replayed(earlier.replay, given, schedule, selection, matching, output, running, measured=measured)
        else:
            addends = weighed(given, schedule, selection, matching, output, running)
        _check(addends.matching)  # a record may say anything
        sums = _sums(addends)
        if sums.by_tensor.bytes_read and asked is not None:
            asked.refuse(
                "each part would read all inputs for the inner products first. Use `resume`.", mode=addends.mode
            )
        target = chosen or addends.target or sums.usual_target
        if output.named is not None and shard_bytes is None and not any(m.header.in_folder for m in addends.members):
            target = Target.of(output.named, sums.usual_target)
        stamps = [stamp for member in addends.members for stamp in member.header.files]
        if picture is not None:
            picture.check([*addends.given, *(stamp.path for stamp in stamps)], target.path)
        options: dict[str, Any] = {
            "threads": running.threads,
            "allow_nonfinite": bool(addends.arguments.get("allow_nonfinite")),
            "gpu_memory": gpu_bytes,
            "cache": None if fetched.cache is None else Path(fetched.cache),
            "pace": polite["pace"],
        }
        if output.out is None:
            return _in_memory(sums, stamps, running, options)
        with ExitStack() as stack:
            if recalibration.recal_bn is not None:
                from .averaged_network import opened_network

                state = sums.lined_up.states[-1]
                network = stack.enter_context(opened_network(sums.base, state, recalibration, running.device))
                sums = _with_network(sums, network, target)
            inline = output.hash and sums.recalibration is None  # else the inputs are hashed before they are read
            planned = _hashed(sums, None) if inline else sums
            assembly = _laid_out(planned, target, output, shard_bytes)
            gpus = devices.choose("cpu" if asked is not None else running.device, assembly.bytes_read)
            memory = engine.memory_needed(sums.unique, running.threads, gpus, gpu_bytes) + _ahead(sums, stamps)
            options["devices"] = gpus

            def finish(report: AverageReport) -> tuple[AverageReport, Assembly, Sequence[Stamp]]:
                final = _hashed(sums, {path: sha256(path) for path in _own(sums)}) if output.hash else sums
                show, moved = (
                    running.on_progress,
                    sum(each.numel * each.terms.width + each.nbytes for each in sums.unique),
                )
                on_bytes = None if show is None else lambda nbytes: show("averaging", nbytes, moved)
                scratch = stack.enter_context(scratch_file(grows_at(target.path)))
                more = {"on_progress": on_bytes, "drop_cache": running.drop_cache, **options}
                final, further = _measured(final, scratch, stamps, recalibration, **more)
                laid_out = _laid_out(final, target, output, shard_bytes)
                done = replace(
                    report,
                    inputs=final.inputs,
                    notes=(*report.notes, *final.notes[len(sums.notes) :]),
                    recalibration=final.recalibration,
                    bytes_written=laid_out.nbytes,
                )
                return done, laid_out, [*stamps, *further]

            hashes: dict[Path, str] = {}

            def recorded(found: Mapping[Path, str]) -> Assembly:
                hashes.update(found)
                return _laid_out(_hashed(sums, found), target, output, shard_bytes)

            done = produce(
                _planned(sums, assembly, memory=memory, device=", ".join(gpus) or "cpu"),
                assembly,
                stamps,
                output,
                running,
                doing="averaging" if sums.recalibration is None else "writing",
                inputs=addends.given,
                replaces=addends.replaces,
                finish=finish if sums.recalibration is not None else None,
                scratch=sums.scratch,
                asked=asked,
                hashed=Hashed(_own(sums), recorded) if inline else None,
                drop_cache=running.drop_cache,
                **options,
            )
            if hashes:
                done = replace(done, inputs=_hashed(sums, hashes).inputs)
        if picture is not None and done.written:
            from .report_pictures import AVERAGE_SIZE, draw_average

            picture.write(lambda figure: draw_average(done, figure), AVERAGE_SIZE)
        if addends.compared is None or not done.written:
            return done
        compared, same = addends.compared(target.path)
        return replace(done, compared=compared, same=same)


def _ahead(sums: _Sums, stamps: Sequence[Stamp]) -> int:
    """Return the bytes of payload that wait in memory; state dicts are there anyway."""
    return 0 if sums.base.format is IN_MEMORY else memory_ahead(stamps)


def _in_memory(
    sums: _Sums, stamps: Sequence[Stamp], running: Summing, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Compute the sums into memory, and return them as a state dict.

    Args:
        options: of `engine.run`, without `devices`.

    Raises:
        CkptError: see `engine.run`.
    """
    from .in_memory import in_memory

    read = sum(tensor.numel * tensor.terms.width for tensor in sums.unique)
    gpus = devices.choose(running.device, read)
    memory = engine.memory_needed(sums.unique, running.threads, gpus, options["gpu_memory"]) + _ahead(sums, stamps)
    if running.on_plan is not None:
        running.on_plan(_planned(sums, None, memory=memory, device=", ".join(gpus) or "cpu"))
    last = sums.lined_up.states[-1], sums.lined_up.renamed[-1]
    return in_memory(sums.tensors, module_versions(sums.base, *last), stamps, running, devices=gpus, **options)


def laid_out_again(addends: Addends, target: Target) -> Assembly:
    """Lay out an average that is there as it was made, to compare it with that.

    Args:
        target: of the same format.

    Raises:
        CkptError: the weights do not line up, or cannot be averaged.
    """
    _check(addends.matching)
    return _laid_out(_sums(addends), target, AveragedOutput(), None)


def _check(matching: Matching) -> None:
    if matching.buffers not in BUFFERS:
        raise UsageError(f"`buffers` is one of {', '.join(BUFFERS)}, not {matching.buffers!r}.")
    if matching.lora not in LORA:
        raise UsageError(f"`lora` is one of {', '.join(LORA)}, not {matching.lora!r}.")
    if matching.lora == "product" and matching.match == "order":
        raise UsageError("`lora='product'` matches tensors by name, and does not go with `match='order'`.")


def _check_recalibration(asked: Recalibration) -> None:
    """Refuse how to measure statistics where none are measured."""
    if asked.recal_bn is None:
        for each in asked.options():
            if vars(asked)[each.name] != each.default and not each.name.startswith("on_"):
                raise UsageError(f"`{each.name}` goes with `recal_bn`, the images to measure BatchNorm statistics on.")


def _check_shared(asked: Asked, measured: bool, device: str) -> None:
    """Refuse what cannot be done in parts, or gone on with."""
    if measured:
        refused = "works in one process" if asked.step else "does not go with `part`, `finish` and `resume`"
        raise UsageError(f"`recal_bn` {refused}: average first, then use `recalibrate_checkpoint(...)`.")
    if device not in ("auto", "cpu"):
        raise UsageError(f"`device={device!r}`: with `part`, `finish` and `resume` the sums are made on the CPU.")


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
        network: on which statistics are measured; None if that is not asked for, or it has none.
        recalibration: how they are measured, and what came of it.
        notes: about that.
    """

    addends: Addends
    lined_up: LinedUp
    by_tensor: ByTensor
    adapter: AveragedAdapter
    tensors: Mapping[str, OutTensor]
    inputs: tuple[Input, ...]
    network: Opened | None = None
    recalibration: RecalibrationReport | None = None
    notes: tuple[str, ...] = ()

    @property
    def base(self) -> Header:
        """The last checkpoint, whose other entries the output has."""
        return self.addends.members[-1].header

    @property
    def unique(self) -> dict[OutTensor, None]:
        """The tensors, tied ones once."""
        return dict.fromkeys(self.tensors.values())

    @property
    def scratch(self) -> int:
        """Bytes of the sums in a scratch file, which only a network needs."""
        return 0 if self.recalibration is None else sum(tensor.nbytes for tensor in self.unique)

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


def _with_network(sums: _Sums, network: Opened, target: Target) -> _Sums:
    """Return the sums with a plan to measure the statistics of a network, if it has some."""
    plan = network.planned(target)
    if network.batches is None:
        nothing = "The model has no BatchNorm statistics, so `recal_bn` has no effect."
        if network.held_out is not None:
            nothing += " `eval_data` has none, either: `evaluate(...)` scores the average."
        return replace(sums, notes=(*plan.notes, nothing))
    return replace(sums, network=network, recalibration=replace(plan, notes=()), notes=plan.notes)


def _measured(
    sums: _Sums, scratch: ScratchFile, stamps: Sequence[Stamp], recalibration: Recalibration, **options: Any
) -> tuple[_Sums, tuple[Stamp, ...]]:
    """Write the sums to a scratch file and measure the statistics of the network with them.

    Args:
        scratch: for the sums; stays until the output is written.
        options: of `averaged_network.measured`.

    Returns:
        (what is written instead; stamps of the scratch file)

    Raises:
        CkptError: see `averaged_network.measured`.
    """
    from .averaged_network import measured

    network, plan = sums.network, sums.recalibration
    if network is None or plan is None:
        return sums, ()
    found = measured(network, sums.tensors, scratch, stamps, plan, recalibration.on_images, **options)
    report = replace(found.report, notes=())
    final = replace(sums, tensors=found.tensors, recalibration=report, notes=(*sums.notes, *found.report.notes))
    return final, found.stamps


def _laid_out(sums: _Sums, target: Target, output: AveragedOutput, shard_bytes: int | None) -> Assembly:
    """Lay the sums out in the files of the target, with a record of the inputs.

    Raises:
        CkptError: the target cannot hold them.
    """
    addends, lined_up = sums.addends, sums.lined_up
    more: dict[str, Any] = {"ratios": sums.by_tensor.ratios} if sums.by_tensor.ratios else {}
    if sums.network is not None and sums.recalibration is not None:
        more["recalibrated"] = provided(sums.network.record(sums.recalibration))
    record = record_of(addends, sums.inputs, lined_up.states[-1], **more)
    assembly = assemble(
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
    return with_place(assembly, output.write_checksums)


def _planned(sums: _Sums, assembly: Assembly | None, *, memory: int, device: str) -> AverageReport:
    """Report what will be summed, and written if there is an output."""
    read, written = (sum(each.numel * each.terms.width for each in sums.unique), sum(e.nbytes for e in sums.unique))
    if assembly is not None:
        read, written = assembly.bytes_read, assembly.nbytes
    addends, lined_up, unique, by_name = sums.addends, sums.lined_up, sums.unique, sums.by_tensor.coefficients
    fits = sums.recalibration is not None or sums.notes or sum(c != 0 for c in addends.coefficients) < 2
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
        notes=(
            *addends.notes,
            *lined_up.notes,
            *sums.adapter.notes,
            *(() if assembly is None else of_output(sums.base, assembly)),
            *(() if fits else of_statistics(sums.tensors, averaged=addends.matching.buffers == "average")),
            *sums.notes,
        ),
        dropped=() if assembly is None else assembly.dropped,
        out="" if assembly is None else str(assembly.target),
        companions=() if assembly is None else tuple(path.name for path in assembly.companions),
        files=0 if assembly is None else assembly.shards,
        bytes_read=read + sums.by_tensor.bytes_read,
        bytes_written=written,
        memory=memory,
        device=device,
        recalibration=sums.recalibration,
        scratch=sums.scratch,
        skipped=addends.skipped,
        peak_memory=peak_memory() + memory + (written if assembly is None else engine.notes_needed(assembly.files)),
    )


def _own(sums: _Sums) -> list[Path]:
    """Return the files of the checkpoints; not those of an average that is extended, which are not read again."""
    return [path for member in sums.addends.sources for path in member.header.names.values()]


def _hashed(sums: _Sums, found: Mapping[Path, str] | None) -> _Sums:
    """Return the sums with the SHA-256 of their files in the record, or with a place for it if it is not known."""
    before, own = sums.inputs[: -len(sums.addends.sources)], sums.inputs[-len(sums.addends.sources) :]
    digests = (
        {name: "0" * 64 if found is None else found[path] for name, path in member.header.names.items()}
        for member in sums.addends.sources
    )
    hashed = (replace(entry, sha256=each) for entry, each in zip(own, digests, strict=True))
    return replace(sums, inputs=(*before, *hashed))


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
