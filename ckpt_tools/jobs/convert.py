"""Conversion: one checkpoint to another layout, file format and dtype."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.ema_updates import stored_decay, stored_updates
from ..checkpoints.layouts import LAYOUTS, Layout, StateDict, select, states
from ..checkpoints.layouts.entries import left_behind, other_entries
from ..checkpoints.layouts.layout import AnyOrder, Content, Unchanged, dotted
from ..checkpoints.layouts.parameter_lists import parameters
from ..checkpoints.layouts.schedule_free import evaluation_note, training_mode_note
from ..checkpoints.quantized import (
    dequantizable,
    dequantized,
    quantized,
    refuse_without_scales,
    without_quantization,
)
from ..compute.threads import check_threads
from ..errors import UnsupportedError, UsageError, unknown_word
from ..formats import read_header, suffixes
from ..formats.file_plan import OutTensor, Terms
from ..formats.format import Writing
from ..formats.header import Header
from ..formats.sharded import parse_size
from ..series.paths import one_checkpoint
from ..series.shards import rank_note
from ..storage.source import Stamp
from ..tensors import Category, DType, TensorSpec, parse_dtype
from .asked import asked_of
from .assembly import Assembly, dense, flat, module_versions, nested, unkept_metadata
from .checksums import with_place
from .companions import companions
from .option_groups import takes
from .options import Computing, ConvertedOutput, ConvertedState, Missing, Sharing
from .outputs import Target, check_shard_size
from .parameter_names import Naming, find_names, in_files
from .provenance import input_record, provenance
from .reports import Report, some
from .run import manners, produce


@dataclass(frozen=True, slots=True, repr=False)
class ConvertReport(Report):
    """What a conversion does; the plan before the work, and the result after it.

    Attributes:
        path: the checkpoint.
        layout, format: of the checkpoint.
        to: layout of the output.
        state: the sets of weights that are converted, such as ``raw (state_dict)``; one or two.
        placed: where each is in the output: ``raw (state_dict) → model``.
        tensors: in one set of weights of the output.
        dropped: entries that are not in the output.
        notes: what is lost, and what is filled in.
        out: the target.
        bytes_read, bytes_written: of the whole job.
        companions: names of files beside the weights that go along: configuration and tokenizer.
        files: number of files with weights in the output; 0 if it is one file and no folder.
        part: what became of a part of the job, in words.
        written: False for a plan, and for a part.
    """

    path: str
    layout: str
    format: str
    to: str
    state: tuple[str, ...]
    placed: tuple[str, ...]
    tensors: int
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    out: str
    bytes_read: int
    bytes_written: int
    companions: tuple[str, ...] = ()
    files: int = 0
    part: str = ""
    written: bool = False


@takes(ConvertedOutput, ConvertedState, Missing, Sharing, Computing)
def convert(
    path: str | Path,
    output: ConvertedOutput,
    which: ConvertedState,
    missing: Missing,
    sharing: Sharing,
    running: Computing,
) -> ConvertReport:
    """Write a checkpoint in another layout, file format or dtype, in bounded memory.

    `ckpt_tools.checkpoints.layouts.LAYOUTS` has the layouts. Both sets of weights go in if the layout keeps both and
    `state` is ``auto``; NaN and infinity matter only where the dtype changes.

    Args:
        path: a file or folder.
        {options}

    Returns:
        What was converted, and what it lost.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    check_threads(running.threads)
    polite = manners(running)
    asked = asked_of(sharing, sign_off=output.sign_off)
    header = read_header(one_checkpoint(path))
    report, assembly, further = planned(header, Target.of(output.out), output, which, missing)
    return produce(
        report,
        assembly,
        (*header.files, *further),
        output,
        running,
        doing="converting",
        inputs=[header.path],
        asked=asked,
        threads=running.threads,
        allow_nonfinite=running.allow_nonfinite,
        **polite,
    )


def planned(
    header: Header, target: Target, output: ConvertedOutput, which: ConvertedState, missing: Missing
) -> tuple[ConvertReport, Assembly, Sequence[Stamp]]:
    """Plan a conversion; see `convert`.

    Returns:
        (the report; what is written; stamps of further files that are read)
    """
    layout = find_layout(output.to)
    shard_bytes = None if output.max_shard_size is None else parse_size(output.max_shard_size)
    check_shard_size(target, shard_bytes)
    _check_format(layout, target)
    _check_counters(missing.updates, missing.decay)
    dtype = parse_dtype(output.dtype)
    naming = find_names(header, missing.names_from, missing.model, missing.model_kwargs or {})
    found, sets = _chosen(header, layout, which.state, naming)
    if which.dequantize:
        sets = {name: dequantized(header, each) for name, each in sets.items()}
        refuse_without_scales(header, sets.values())
    elif dtype is not None:
        _refuse_codes(header, sets.values())
    notes = [note] if (note := rank_note(header.path)) is not None else []
    notes += _remarks(found, sets, naming)
    if "raw" in sets and (note := training_mode_note(header.tree, [each.path for each in sets.values()])) is not None:
        notes.append(note)
    notes += [note for each in sets.values() if (note := evaluation_note(each)) is not None]
    if len(sets) == 1 and layout.pair and not layout.alone:
        notes.append("Raw and averaged weights get the same values: the checkpoint has one set.")
    content = _content(header, found, sets, dtype, naming, notes, missing)
    said = provenance(
        "convert",
        {
            "to": output.to,
            "dtype": dtype and dtype.name,
            "dequantize": which.dequantize or None,
            "names_from": missing.names_from and Path(missing.names_from).name,
            "model": missing.model,
            "updates": missing.updates,
            "decay": missing.decay,
        },
        state=" and ".join(each.label for each in sets.values()),
        input=input_record(header),
    )
    dropped = left_behind(header.tree, sets, layout, nested=bool(layout.home) and target.format.nests)
    if not target.folder and header.in_folder:
        dropped += [path.name for path in companions(header, dropped) if path.parent == header.path]
    writing = Writing(name=target.name, provenance=said, untie=output.untie, max_bytes=shard_bytes, like=header)
    configured = companions(header, []) if which.dequantize and target.folder else []
    edited = dict(without_quantization(configured))
    assembly = _assembled(layout, content, header, target, writing, dropped, edited)
    assembly = with_place(assembly, output.write_checksums)
    report = ConvertReport(
        path=str(header.path),
        layout=next(iter(sets.values())).layout,
        format=header.format.name,
        to=output.to,
        state=tuple(each.label for each in sets.values()),
        placed=tuple(_placed(layout, sets, target)),
        tensors=len(content.ema),
        dropped=assembly.dropped,
        notes=tuple(notes),
        out=str(target.path),
        companions=tuple(path.name for path in assembly.companions),
        files=assembly.shards,
        bytes_read=assembly.bytes_read,
        bytes_written=assembly.nbytes,
    )
    return report, assembly, naming.files


def find_layout(name: str) -> Layout:
    """Return the layout of this name.

    Raises:
        UsageError: there is no such layout, or it can only be read; the message suggests similar names.
    """
    layout = next((layout for layout in LAYOUTS if layout.name == name), None)
    written = [layout.name for layout in LAYOUTS if layout.written]
    formats = [suffix.lstrip(".") for suffix in suffixes()]
    if layout is None and (near := difflib.get_close_matches(name.lower().lstrip("."), formats, n=1, cutoff=0.8)):
        file = f"weights.{near[0]}"
        raise UsageError(
            f"`to={name!r}`: a file format, not a layout. The name of the output chooses it: `out={file!r}`."
        )
    if layout is None:
        raise unknown_word("to", name, written)
    if not layout.written:
        raise UsageError(f"`to={name!r}`: can be read, but not written. These can be written: {', '.join(written)}.")
    return layout


def _check_format(layout: Layout, target: Target) -> None:
    output = "folder" if target.folder else "nested" if target.format.nests else "flat"
    if output in layout.outputs:
        return
    if layout.outputs == ("folder",):
        raise UsageError(f"{target.path}: `to={layout.name!r}` makes a folder. Give `out` a name without suffix.")
    what = "a folder of safetensors" if target.folder else "safetensors"
    folder = ", and a folder" if "folder" in layout.outputs else ""
    raise UsageError(
        f"{target.path}: `to={layout.name!r}` nests its weights, which {what} cannot hold. "
        f"Give `out` a name that ends in .pth{folder}, or choose `to='plain'`."
    )


def _check_counters(updates: int | None, decay: float | None) -> None:
    if updates is not None and (type(updates) is not int or not 0 <= updates < 1 << 63):
        raise UsageError(f"`updates={updates!r}`: must be a whole number from 0 on.")
    if decay is not None and not 0 <= decay <= 1:
        raise UsageError(f"`decay={decay!r}`: must be from 0 to 1.")


def _chosen(
    header: Header, layout: Layout, state: str, naming: Naming
) -> tuple[dict[str, StateDict], dict[str, StateDict]]:
    """Choose the sets to convert: both, if the layout keeps both and `state` is ``auto``.

    Returns:
        (all sets of the checkpoint, those to convert).
    """
    first = select(header, state, naming.names)
    found = states(header, naming.names)
    sets = {first.which: first}
    if state == "auto" and layout.pair and len(found) == 2 and found["raw"].fault is None:
        sets["raw"] = select(header, "raw", naming.names)
    return found, {which: replace(each, tensors=in_files(each.tensors)) for which, each in sets.items()}


def _remarks(found: Mapping[str, StateDict], sets: Mapping[str, StateDict], naming: Naming) -> Iterator[str]:
    """Report names that only one set has, and tensors of the averaged set that are not averages."""
    ema, raw = sets.get("ema"), found["raw"].tensors if "raw" in found else {}
    if ema is None:
        return
    if raw and {*raw.values()} == {*ema.tensors.values()}:
        yield "The averaged weights and the raw ones are the same bytes. Was the EMA ever updated?"
        return
    if raw:
        for one, other, who in ((raw, ema.tensors, "lack"), (ema.tensors, raw, "hold")):
            strange = [name for name in one if name not in other]
            if strange:
                also = ", which the raw ones do not" if who == "hold" else ", which the raw ones hold"
                yield f"The averaged weights {who} {some(strange)}{also}."
    for names, whose in ((raw, "the raw weights"), (naming.names or {}, naming.label)):
        borrowed = [
            name
            for name, tensor in ema.tensors.items()
            if names.get(name) is tensor and isinstance(tensor, TensorSpec) and tensor.dtype.averaged
        ]
        if borrowed:
            yield f"Not averaged, but taken from {whose}: {some(borrowed)}."


def _content(
    header: Header,
    found: Mapping[str, StateDict],
    sets: dict[str, StateDict],
    dtype: DType | None,
    naming: Naming,
    notes: list[str],
    missing: Missing,
) -> Content:
    copies: dict[TensorSpec, OutTensor] = {}
    written = {
        which: _copied(header, each, found.get("raw"), dtype or each.dtype, copies) for which, each in sets.items()
    }
    ema = written.get("ema") or next(iter(written.values()))
    raw = written.get("raw", ema)
    averaged = sets.get("ema") or next(iter(sets.values()))
    order, in_order = _order(header, averaged, naming)
    return Content(
        raw=raw,
        ema=ema,
        pair=len(sets) == 2,
        parameters=tuple(name for name in order if name in ema),
        in_order=in_order,
        updates=missing.updates if missing.updates is not None else stored_updates(header, averaged),
        decay=missing.decay if missing.decay is not None else stored_decay(header, averaged),
        settings=averaged.settings,
        other_entries=other_entries(header.tree, sets),
        notes=notes,
    )


def _order(header: Header, averaged: StateDict, naming: Naming) -> tuple[Iterable[str], bool]:
    """Return the names of the parameters, and whether they are in the order of the model."""
    if naming.order is not None:
        return naming.order, True
    own = parameters(averaged.tensors)
    if header.in_model_order:
        return own, True
    if naming.names is None or isinstance(naming.names, AnyOrder) or not own.keys() <= naming.names.keys():
        return own, False
    return [name for name in naming.names if name in own], True


def _copied(
    header: Header, state: StateDict, raw: StateDict | None, dtype: DType | None, copies: dict[TensorSpec, OutTensor]
) -> Mapping[str, OutTensor]:
    weights: Any = OrderedDict()
    for name, stored in state.tensors.items():
        spec = dense(header, name, stored)
        tensor = copies.get(spec)
        if tensor is None:
            out = dtype if dtype is not None and spec.dtype.category is Category.FLOAT else spec.written
            changed = out is not spec.dtype or spec.computed
            tensor = OutTensor(out, spec.shape, Terms.copy(spec), name, finite=changed)
            if spec.numel:  # empty ones are all alike, and tied to nothing
                copies[spec] = tensor
        weights[name] = tensor
    # An average that is no state dict of torch's own is of the same modules as the raw weights.
    for source in (state, raw):
        if source is not None and (versions := module_versions(header, source, Unchanged(source.tensors))):
            weights._metadata = versions
            break
    return weights  # type: ignore[no-any-return]


def _assembled(
    layout: Layout,
    content: Content,
    header: Header,
    target: Target,
    writing: Writing,
    dropped: Sequence[str],
    edited: Mapping[str, bytes | None] | None,
) -> Assembly:
    form = layout.folder_format if target.folder else target.format
    if form.nests:
        dropped = [*unkept_metadata(header), *dropped]
        return nested(layout.write(content), writing, target=target.path, format=form, dropped=dropped)
    whole = layout.flatten(content)
    writing = replace(writing, stem=whole.stem)
    return flat(whole.tensors, writing, target=target, base=header, dropped=dropped, config=whole.config, edited=edited)


def _refuse_codes(header: Header, sets: Iterable[StateDict]) -> None:
    """Refuse to change the dtype of codes and scales.

    Raises:
        UnsupportedError: there are some.
    """
    for each in sets:
        if (found := quantized(each.tensors)) is not None:
            known = found[0] in dequantizable(each.tensors)
            raise UnsupportedError(
                f"{header.path}: '{found[0]}' holds quantized weights, with their scales in '{found[1]}', and `dtype` "
                "would change both. "
                + ("Add `dequantize=True`." if known else "Leave `dtype` out, or dequantize the checkpoint first.")
            )


def _placed(layout: Layout, sets: Mapping[str, StateDict], target: Target) -> list[str]:
    """Describe where each set of weights is in the output."""
    whole = "the whole folder" if target.folder else "the whole file"
    # A flat file has no places, but a nested one would.
    where = {"raw": layout.raw, "ema": layout.ema}
    places = {which: dotted(path) or whole for which, path in where.items() if path is not None}
    if not target.format.nests:
        places = dict.fromkeys(places, whole)
    if len(sets) == 2:
        return [f"{sets[which].label} → {place}" for which, place in places.items()]
    (only,) = sets.values()
    if layout.alone:
        places.pop("ema", None)
    return [f"{only.label} → {' and '.join(dict.fromkeys(places.values()))}"]
