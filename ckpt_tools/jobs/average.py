"""Averaging: from paths to one file or folder with the weighted sum of the checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compute import engine
from ..compute.fetching import memory_ahead
from ..compute.gpu import devices
from ..compute.hashes import file_hashes
from ..compute.progress import LOADING_TORCH, uncounted
from ..compute.threads import check_threads
from ..errors import UsageError, unknown_word
from ..formats.in_memory import IN_MEMORY
from ..formats.sharded import parse_size
from ..series.lora import LORA
from ..series.schedules import Schedule
from ..series.usable import Skipped
from ..storage.local import peak_memory
from ..storage.source import Stamp
from ..storage.staged import scratch_file
from ..tensors import parse_dtype
from .addends import Addends
from .asked import Asked, asked_of
from .assembly import Assembly, module_versions
from .average_notes import of_output, of_statistics
from .option_groups import takes
from .options import AveragedOutput, Earlier, Fetched, Matching, Recalibration, Selection, Sharing, Summing
from .outputs import Target, grows_at
from .pictures import Picture
from .provenance import Input
from .reports import Report
from .run import Hashed, manners, produce
from .state_dicts import as_inputs
from .sums import Sums
from .weigh import weighed

if TYPE_CHECKING:
    import torch

    from .recalibrate import RecalibrationReport

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
        asked = _checked(schedule, matching, earlier, output, recalibration, sharing, running)
        picture = Picture.of(output.plot, force=output.force)
        gpu_memory = running.gpu_memory
        options: dict[str, Any] = {
            "threads": running.threads,
            "gpu_memory": devices.GPU_MEMORY if gpu_memory is None else parse_size(gpu_memory, "gpu_memory"),
            "cache": None if fetched.cache is None else Path(fetched.cache),
            **manners(running),
        }
        measured = recalibration.recal_bn is not None
        addends = _addends(given, schedule, selection, matching, earlier, output, running, measured=measured)
        _check(addends.matching)  # a record may say anything
        options["allow_nonfinite"] = bool(addends.arguments.get("allow_nonfinite"))
        sums = Sums.of(addends)
        if output.out is None:
            return _in_memory(sums, running, options)
        if sums.by_tensor.bytes_read and asked is not None:
            asked.refuse(
                "each part would read all inputs for the inner products first. Use `resume`.", mode=addends.mode
            )
        target = sums.target(output)
        if picture is not None:
            picture.check([*addends.given, *(stamp.path for stamp in sums.stamps)], target.path)
        writer = _Writer(target, output, running, asked, options)
        done = writer.recalibrated(sums, recalibration) if measured else writer.written(sums)
        if picture is not None and done.written:
            from .report_pictures import AVERAGE_SIZE, draw_average

            picture.write(lambda figure: draw_average(done, figure), AVERAGE_SIZE)
        if addends.compared is None or not done.written:
            return done
        compared, same = addends.compared(target.path)
        return replace(done, compared=compared, same=same)


def _checked(
    schedule: Schedule,
    matching: Matching,
    earlier: Earlier,
    output: AveragedOutput,
    recalibration: Recalibration,
    sharing: Sharing,
    running: Summing,
) -> Asked | None:
    """Refuse options that are wrong or do not go together, before anything is read.

    Returns:
        What this process is asked to do of the job; None if it does all of it.

    Raises:
        UsageError: they are.
    """
    if earlier.update is not None and earlier.replay is not None:
        raise UsageError("`update` and `replay` do not go together: one extends an average, the other makes it again.")
    if earlier.update is None and earlier.replay is None:  # else the record has the rest of the options
        schedule.check()
    _check(matching)
    measured = recalibration.recal_bn is not None
    if not measured:
        for each in recalibration.options():
            if vars(recalibration)[each.name] != each.default:
                raise UsageError(f"`{each.name}` goes with `recal_bn`, the images to measure BatchNorm statistics on.")
    parse_dtype(output.dtype)
    check_threads(running.threads)
    devices.check_name(running.device)
    if output.named is not None:
        Target.of(output.named)
    if output.max_shard_size is not None:
        parse_size(output.max_shard_size)
    asked = asked_of(sharing, sign_off=output.sign_off, hash=output.hash)
    if asked is not None and measured:
        refused = "works in one process" if asked.step else "does not go with `part`, `finish` and `resume`"
        raise UsageError(f"`recal_bn` {refused}: average first, then use `recalibrate_checkpoint(...)`.")
    if asked is not None and running.device not in ("auto", "cpu"):
        raise UsageError(
            f"`device={running.device!r}`: with `part`, `finish` and `resume` the sums are made on the CPU."
        )
    return asked


def _addends(
    given: Sequence[str | Path],
    schedule: Schedule,
    selection: Selection,
    matching: Matching,
    earlier: Earlier,
    output: AveragedOutput,
    running: Summing,
    *,
    measured: bool,
) -> Addends:
    """Choose what is summed, with which coefficients: new ones, or by the record of an earlier average.

    Raises:
        CkptError: the checkpoints cannot be used, or the record cannot.
    """
    if earlier.update is not None:
        from .update import updated

        return updated(earlier.update, given, schedule, selection, matching, output, running, measured=measured)
    if earlier.replay is not None:
        from .replay import replayed

        return replayed(earlier.replay, given, schedule, selection, matching, output, running, measured=measured)
    return weighed(given, schedule, selection, matching, output, running)


def _in_memory(sums: Sums, running: Summing, options: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Compute the sums into memory, and return them as a state dict.

    Args:
        options: of `engine.run`, without `devices`.

    Raises:
        CkptError: see `engine.run`.
    """
    from .in_memory import in_memory

    gpus = devices.choose(running.device, sums.bytes_read)
    if running.on_plan is not None:
        memory = _memory_needed(sums, gpus, options)
        running.on_plan(_planned(sums, None, memory=memory, device=", ".join(gpus) or "cpu"))
    last = sums.lined_up.states[-1], sums.lined_up.renamed[-1]
    own = {name: value for name, value in options.items() if name != "drop_cache"}
    return in_memory(sums.tensors, module_versions(sums.base, *last), sums.stamps, running, devices=gpus, **own)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Where an average is written, and how.

    Attributes:
        asked: what this process does of the job; None if it does all of it.
        options: of `run.write`, without `devices`.
    """

    target: Target
    output: AveragedOutput
    running: Summing
    asked: Asked | None
    options: Mapping[str, Any]

    def written(self, sums: Sums) -> AverageReport:
        """Write the sums; the record gets the hashes of the inputs, if asked for, while these are read.

        Raises:
            CkptError: see `run.produce`.
        """
        if not self.output.hash:
            return self._produce(sums, doing="averaging")
        found: dict[Path, str] = {}

        def recorded(hashes: Mapping[Path, str]) -> Assembly:
            found.update(hashes)
            return sums.hashed(hashes).laid_out(self.target, self.output)

        hashed = Hashed(sums.source_files, recorded)
        done = self._produce(sums.hashed(None), doing="averaging", hashed=hashed)
        return replace(done, inputs=sums.hashed(found).inputs) if found else done

    def recalibrated(self, sums: Sums, recalibration: Recalibration) -> AverageReport:
        """Write the sums with BatchNorm statistics that are measured on them, from a scratch file beside the target.

        Raises:
            CkptError: see `averaged_network` and `run.produce`.
        """
        with uncounted(self.running.on_progress, LOADING_TORCH):
            from .averaged_network import measured, opened_network

        with ExitStack() as stack:
            state, device, tell = sums.lined_up.states[-1], self.running.device, self.running.on_progress
            network = stack.enter_context(opened_network(sums.base, state, recalibration, device, tell))
            plan = network.planned(self.target)
            if network.batches is None:
                nothing = "The model has no BatchNorm statistics, so `recal_bn` has no effect."
                if network.held_out is not None:
                    nothing += " `eval_data` has none, either: `evaluate(...)` scores the average."
                return self.written(replace(sums, notes=(*plan.notes, nothing)))
            planned = replace(sums, network=network, recalibration=replace(plan, notes=()), notes=plan.notes)

            def finish(report: AverageReport, gpus: Sequence[str]) -> tuple[AverageReport, Assembly, list[Stamp]]:
                hashes = file_hashes(sums.source_files, tell) if self.output.hash else None
                found = measured(
                    network,
                    sums.tensors,
                    stack.enter_context(scratch_file(grows_at(self.target.path))),
                    sums.stamps,
                    replace(plan, notes=()),
                    on_progress=tell,
                    devices=gpus,
                    **self.options,
                )
                final = replace(planned, tensors=found.tensors, recalibration=replace(found.report, notes=()))
                final = final if hashes is None else final.hashed(hashes)
                assembly = final.laid_out(self.target, self.output)
                done = replace(
                    report,
                    inputs=final.inputs,
                    notes=(*report.notes, *found.report.notes),
                    recalibration=final.recalibration,
                    bytes_written=assembly.nbytes,
                )
                return done, assembly, [*sums.stamps, *found.stamps]

            return self._produce(planned, doing="writing", finish=finish)

    def _produce(
        self,
        sums: Sums,
        *,
        doing: str,
        finish: Callable[[AverageReport, Sequence[str]], tuple[AverageReport, Assembly, list[Stamp]]] | None = None,
        hashed: Hashed | None = None,
    ) -> AverageReport:
        """Plan the output, and run the job; see `run.produce`.

        Args:
            finish: is given the devices of the sums, too.
        """
        assembly = sums.laid_out(self.target, self.output)
        gpus = devices.choose("cpu" if self.asked is not None else self.running.device, assembly.bytes_read)
        memory = _memory_needed(sums, gpus, self.options)
        return produce(
            _planned(sums, assembly, memory=memory, device=", ".join(gpus) or "cpu"),
            assembly,
            sums.stamps,
            self.output,
            self.running,
            doing=doing,
            inputs=sums.addends.given,
            replaces=sums.addends.replaces,
            finish=None if finish is None else lambda report: finish(report, gpus),
            scratch=0 if finish is None else sums.nbytes,
            asked=self.asked,
            hashed=hashed,
            devices=gpus,
            **self.options,
        )


def _memory_needed(sums: Sums, gpus: Sequence[str], options: Mapping[str, Any]) -> int:
    """Return the bytes of buffers, with those of payload that waits; state dicts are in memory anyway."""
    ahead = 0 if sums.base.format is IN_MEMORY else memory_ahead(sums.stamps)
    return engine.memory_needed(sums.unique, options["threads"], gpus, options["gpu_memory"]) + ahead


def laid_out_again(addends: Addends, target: Target) -> Assembly:
    """Lay out an average that is there as it was made, to compare it with that.

    Args:
        target: of the same format.

    Raises:
        CkptError: the weights do not line up, or cannot be averaged.
    """
    _check(addends.matching)
    return Sums.of(addends).laid_out(target, AveragedOutput())


def _check(matching: Matching) -> None:
    if matching.buffers not in BUFFERS:
        raise unknown_word("buffers", matching.buffers, BUFFERS)
    if matching.lora not in LORA:
        raise unknown_word("lora", matching.lora, LORA)
    if matching.lora == "product" and matching.match == "order":
        raise UsageError("`lora='product'` matches tensors by name, and does not go with `match='order'`.")


def _planned(sums: Sums, assembly: Assembly | None, *, memory: int, device: str) -> AverageReport:
    """Report what will be summed, and written if there is an output."""
    read, written = sums.bytes_read, sums.nbytes
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
        scratch=0 if sums.recalibration is None else sums.nbytes,
        skipped=addends.skipped,
        peak_memory=peak_memory() + memory + (written if assembly is None else engine.notes_needed(assembly.files)),
    )
