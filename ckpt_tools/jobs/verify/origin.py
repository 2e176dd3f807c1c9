"""Verifying an output against its record: its inputs are there and the same, and it can be made again from them.

A record may say anything. Of an input it gives a name, which is looked for where `replay` looks; nothing that it names
is run, and no path leads out of the folders that are searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ... import __version__
from ...checkpoints.layouts import select
from ...compute.progress import Activity
from ...errors import CkptError, LayoutError, UnsupportedError
from ...formats.file_plan import OutTensor
from ...formats.header import Header
from ...tensors import TensorSpec, UnsupportedTensor
from ..assembly import Assembly, rewrite
from ..options import (
    ConvertedOutput,
    ConvertedState,
    KeptState,
    Matching,
    Missing,
    Reading,
    StrippedOutput,
    Verification,
)
from ..outputs import Target
from ..provenance import Input, Record, SourceRecord, read_record, read_source_record
from ..recorded_inputs import Found, look_for
from ..replay import is_statistic, needs_sets, summed_again
from .check import FAILED, NOT_CHECKED, OK, Check
from .file import part_of
from .names import Pairing, paired, stored_tensors

_MADE = "made again"


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a record says, whichever command wrote it.

    Attributes:
        record: of an average, or of an output of one checkpoint.
        inputs: oldest first.
        by_set: an input may be one of several sets of weights in a file.
        command: that made the output.
        version: of ckpt-tools.
        unknown: why the output cannot be made again, in words; empty if it can.
    """

    record: Record | SourceRecord
    inputs: tuple[Input, ...]
    by_set: bool
    command: str
    version: str
    unknown: str


def origin(header: Header, asked: Verification, running: Reading, share: float, seed: int) -> Iterator[Check]:
    """Check an output against its record.

    Args:
        share, seed: of the sample that is made again; 1 for all.
    """
    if header.record_fault:
        yield Check("record", FAILED, header.record_fault)
        return
    if header.provenance is None:
        yield Check("record", NOT_CHECKED, "ckpt-tools has left none in it, so that its origin is not known")
        return
    if (part := part_of(header)) != "":
        yield Check("record", NOT_CHECKED, part)
        return
    try:
        said = _read(header)
    except CkptError as error:
        yield Check("record", FAILED, str(error))
        return
    other = "" if said.version == __version__ else f" of version {said.version} (this is {__version__})"
    yield Check("record", OK, f"ckpt {said.command}{other}, {len(said.inputs)} input{'s' * (len(said.inputs) != 1)}")
    try:
        hashes = share == 1
        given = [] if asked.inputs is None else [asked.inputs]
        found = look_for(said.inputs, header, given, by_set=said.by_set, hashes=hashes, on_progress=running.on_progress)
    except CkptError as error:
        yield Check("inputs", FAILED, str(error))
        return
    if found.faults:
        absent = all(fault.unknown for fault in found.faults) and asked.inputs is None
        where = ". `inputs` names a folder that has them" if absent else ""
        yield Check("inputs", NOT_CHECKED if absent else FAILED, found.said + where)
        yield Check(_MADE, NOT_CHECKED, "its inputs are not all there")
        return
    unhashed = not hashes and any(each.sha256 for each in said.inputs)
    yield Check("inputs", OK, found.how + "; a sample reads too little for SHA-256" * unhashed)
    if said.unknown:
        yield Check(_MADE, NOT_CHECKED, said.unknown)
        return
    try:
        yield _made_again(header, said, found, running, share, seed)
    except CkptError as error:
        yield _unlike(f"it cannot be made of these inputs: {str(error).rstrip('.')}", found)


def _read(header: Header) -> _Origin:
    """Read the record of an output.

    Raises:
        LayoutError: it is damaged.
    """
    command = (header.provenance or {}).get("command")
    if command == "avg":
        average = read_record(header)
        unknown = ""
        if average.updates:
            times = f"{average.updates} time{'s' * (average.updates > 1)}"
            unknown = f"it was updated {times}, and each update rounds; `replay` compares but for that"
        return _Origin(average, average.inputs, needs_sets(average), "avg", average.version, unknown)
    made = read_source_record(header)
    unknown = "" if made.command in _AGAIN else f"'ckpt {made.command}' needs more than the input"
    asked = next((name for name in ("names_from", "model") if made.command == "convert" and name in made.arguments), "")
    if asked:
        unknown = f"its names are from `{asked}`, which is not read here"
    return _Origin(made, (made.input,), False, made.command, made.version, unknown)


def _made_again(header: Header, said: _Origin, found: Found, running: Reading, share: float, seed: int) -> Check:
    """Compare an output with what is made of its inputs once more.

    Raises:
        CkptError: it cannot be planned, or read.
    """
    folder, inputs = header.in_folder, found.headers
    target = Target(header.path if folder else Path("again" + header.file_format.usual_suffix), folder)
    measured = ""
    if isinstance(said.record, Record):
        assembly = _average(header, said.record, inputs, target)
        measured = said.record.measured_on or ""
    else:
        assembly = _AGAIN[said.command](said.record, inputs[0], target)
        measured = str(said.record.arguments.get("data")) if said.command == "recal-bn" else ""

    def left_out(name: str) -> bool:
        return bool(measured) and is_statistic(name)

    try:
        wanted = {name: tensor for name, tensor in assembly.tensors.items() if not left_out(name)}
    except UnsupportedError as error:
        return Check(_MADE, NOT_CHECKED, str(error))
    pairing = paired(wanted, [each for each in stored_tensors(header) if not left_out(each.name)])
    pairs: dict[tuple[OutTensor, TensorSpec], str] = {}
    fault = pairing.fault
    for name, own in pairing.names.items():
        tensor, again = pairing.tensors[name], wanted[own]
        if isinstance(tensor, UnsupportedTensor):
            fault = fault or f"'{name}' is {tensor.reason}"
        elif (tensor.dtype, tensor.shape) != (again.dtype, again.shape):
            made = f"{again.dtype.name} {[*again.shape]}"
            fault = fault or f"'{name}' is {tensor.dtype.name} {[*tensor.shape]}, and would be {made}"
        else:
            pairs.setdefault((again, tensor), name)
    fault = fault or _differing(pairs, header, inputs, running, share, seed)
    if fault is not None:
        return _unlike(fault, found)
    return _same(pairs, pairing, measured, share, seed)


def _unlike(fault: str, found: Found) -> Check:
    """Fail, and say what may be the cause: an input that was found by name and size alone may be another file."""
    cause = "An input has changed, or the output has."
    if found.guessed:
        others = f" and {len(found.guessed) - 1} more" if found.guessed[1:] else ""
        cause = (
            f"An input has changed, or the output has, or {found.guessed[0]}{others} may be another file of that name "
            "and size: `inputs` names a folder that has the right ones."
        )
    return Check(_MADE, FAILED, f"{fault}. {cause}")


def _differing(
    pairs: Mapping[tuple[OutTensor, TensorSpec], str],
    header: Header,
    inputs: Sequence[Header],
    running: Reading,
    share: float,
    seed: int,
) -> str | None:
    """Compare tensors bit for bit; return the first difference in words."""
    from ...compute.digest import index_of
    from ...compute.recompute import agreements  # imports torch

    stamps = [stamp for each in (*inputs, header) for stamp in each.files]
    show = None if running.on_progress is None else partial(running.on_progress, Activity("verifying its origin"))
    found = agreements([*pairs], share=share, seed=seed, stamps=stamps, threads=running.threads, on_progress=show)
    differing = [
        (spec, name, each) for ((_, spec), name), each in zip(pairs.items(), found, strict=True) if each.differing
    ]
    if not differing:
        return None
    spec, name, each = differing[0]
    at = [*index_of(spec.shape, each.first or 0)]
    more = f"; {len(differing) - 1} more differ" if differing[1:] else ""
    return f"'{name}' differs in {each.differing} of {each.compared} values, the first at {at}{more}"


def _same(
    pairs: Mapping[tuple[OutTensor, TensorSpec], str], pairing: Pairing, measured: str, share: float, seed: int
) -> Check:
    also = f"; {pairing.renamed}" if pairing.renamed else ""
    what = f"{len(pairs)} tensor{'s' * (len(pairs) != 1)}"
    what = what if share == 1 else f"{100 * share:.4g} % of the slices of {what} (seed {seed})"
    if measured:
        return Check(
            _MADE,
            NOT_CHECKED,
            f"BatchNorm statistics were measured on {measured}, which is not read here; all else is the same bit for "
            f"bit: {what}{also}",
        )
    return Check(_MADE, OK, f"the same bit for bit: {what}{also}")


def _average(header: Header, record: Record, inputs: Sequence[Header], target: Target) -> Assembly:
    from ..average import laid_out_again

    return laid_out_again(summed_again(header, record, inputs, Matching()), target)


def _converted(record: SourceRecord, source: Header, target: Target) -> Assembly:
    from ..convert import planned

    to, dtype = _argument(record, "to", str), _argument(record, "dtype", str)
    output = ConvertedOutput(to=to or "plain", dtype=dtype, out=target.path)
    which = ConvertedState(state=record.which, dequantize=bool(record.arguments.get("dequantize")))
    missing = Missing(updates=_argument(record, "updates", int), decay=_argument(record, "decay", float))
    report, assembly, _ = planned(source, target, output, which, missing)
    _check_state(record, source, " and ".join(report.state))
    return assembly


def _stripped(record: SourceRecord, source: Header, target: Target) -> Assembly:
    from ..strip import planned

    report, assembly = planned(source, target, KeptState(state=_argument(record, "state", str)), StrippedOutput())
    _check_state(record, source, " and ".join(report.kept) or "all weights")
    if assembly is None:
        raise LayoutError(f"{source.path}: has nothing to strip.")
    return assembly


def _recalibrated(record: SourceRecord, source: Header, target: Target) -> Assembly:
    state = select(source, record.which)
    _check_state(record, source, state.label)
    return rewrite(source, state, {}, target=target, provenance={})


_AGAIN: Mapping[str, Callable[[SourceRecord, Header, Target], Assembly]] = {
    "convert": _converted,
    "strip": _stripped,
    "recal-bn": _recalibrated,
}


def _argument(record: SourceRecord, name: str, kind: type) -> Any:
    value = record.arguments.get(name)
    if value is not None and not isinstance(value, (kind, int) if kind is float else kind):
        raise LayoutError(f"{record.path}: its record has the {name} {value!r}, which is none.")
    return value


def _check_state(record: SourceRecord, source: Header, label: str) -> None:
    if label != record.state:
        raise LayoutError(f"it was made of {record.state}, and in {source.path} the weights would be {label}.")
