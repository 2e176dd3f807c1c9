"""Conversion: one checkpoint to another layout, file format and dtype."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.ema_updates import stored_decay, stored_updates
from ..checkpoints.layouts import (
    LAYOUTS,
    Content,
    Layout,
    StateDict,
    dotted,
    left_behind,
    other_entries,
    parameters,
    select,
    states,
)
from ..compute.threads import check_threads
from ..errors import UnsupportedError, UsageError
from ..formats import SUFFIXES, dcp, read_header
from ..formats.file_plan import OutTensor
from ..formats.header import Header
from ..formats.sharded import parse_size
from ..tensors import DType, Kind, TensorSpec, UnsupportedTensor, parse_dtype
from .assembly import Assembly, companions, flat, module_versions, nested, unkept_metadata
from .outputs import TORCH_SUFFIXES, check_replaceable, check_shard_size, check_suffix, check_target
from .parameter_names import Naming, find_names, in_files
from .provenance import provenance
from .run import only_noted, write


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion does; the same before the work (the plan) and after it.

    Attributes:
        path: the checkpoint.
        layout, format: of it.
        to: layout of the output.
        state: which weights went in, such as ``raw (state_dict)``; one or two.
        placed: where each stands in the output: ``raw (state_dict) → model``.
        tensors: in the output's sets of weights.
        dropped: what is not carried over.
        notes: what is lost or made up.
        out: the target.
        bytes_read, bytes_written: of the whole job.
        written: False for a plan.
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
    written: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)


def convert(
    path: str | Path,
    *,
    to: str,
    out: str | Path,
    state: str = "auto",
    dtype: Any = None,
    max_shard_size: str | int | None = None,
    names_from: str | Path | None = None,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    updates: int | None = None,
    decay: float | None = None,
    untie: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[ConvertReport], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Write a checkpoint in another layout, file format or dtype, in bounded memory.

    Args:
        path: a file or folder.
        to: name of a layout, see `ckpt_tools.checkpoints.layouts.LAYOUTS`.
        out: target; the suffix picks the format, none means a folder of shards.
        state: ``auto`` (both sets where the layout keeps both, else the EMA where there is one), ``raw``, ``ema``,
            or a dotted path: that set alone.
        dtype: of the floating-point tensors among the weights; as they are if not given.
        max_shard_size: bytes, or text such as ``5GB``.
        names_from: a checkpoint of the same model, where this one's averages have no names.
        model, model_kwargs: a timm name or a factory (see `recalibrate_checkpoint`) that gives the names instead.
        updates, decay: of the average, where the checkpoint does not say.
        untie: in safetensors, write tied tensors under each of their names.
        threads, allow_nonfinite: as for `average`; NaN and infinity matter only where the dtype changes.
        force: replace the target if it exists.
        dry_run: plan and check, write nothing.
        on_plan: called with the plan before the work.
        on_progress: called in this thread with (bytes done, bytes in all).

    Returns:
        What was converted, and what it lost.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    layout = find_layout(to)
    target = Path(out)
    check_suffix(target)
    shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    check_shard_size(target, shard_bytes)
    _check_format(layout, target)
    _check_counters(updates, decay)
    out_dtype = parse_dtype(dtype)
    check_threads(threads)
    header = read_header(Path(path))
    naming = find_names(header, names_from, model, model_kwargs or {})
    found, sets = _chosen(header, layout, state, naming)
    notes = list(_remarks(found, sets, naming))
    if len(sets) == 1 and layout.pair and not layout.alone:
        notes.append("One set of weights stands for both, the raw and the averaged ones.")
    content = _content(header, sets, out_dtype, naming, notes, updates=updates, decay=decay)
    said = provenance(
        "convert",
        {"to": to, "dtype": out_dtype and out_dtype.name},
        state=" and ".join(each.label for each in sets.values()),
        input={"name": header.path.name, "size": header.nbytes, "made": header.provenance},
    )
    with only_noted(notes, dry_run):
        check_target(
            target, [header.path, *(stamp.path for stamp in (*header.files, *naming.files))],
            nbytes=sum(tensor.nbytes for tensor in {*content.raw.values(), *content.ema.values()}),
            force=force, folder=not target.name.endswith(SUFFIXES),
        )  # fmt: skip
    nested_too = bool(layout.home) and target.name.endswith(TORCH_SUFFIXES)
    dropped = [*unkept_metadata(header), *left_behind(header.tree, sets, layout, nested=nested_too)]
    if target.name.endswith(SUFFIXES):
        dropped += [path.name for path in companions(header)]
    assembly = _assembled(layout, content, header, target, said, dropped, shard_bytes, untie)
    if assembly.folder:
        with only_noted(notes, dry_run):
            check_replaceable(target, assembly.names)
    report = ConvertReport(
        path=str(header.path),
        layout=next(iter(sets.values())).layout,
        format=header.format,
        to=to,
        state=tuple(each.label for each in sets.values()),
        placed=tuple(_placed(layout, sets, target)),
        tensors=len(content.ema),
        dropped=assembly.dropped,
        notes=tuple(notes),
        out=str(target),
        bytes_read=assembly.bytes_read,
        bytes_written=assembly.nbytes,
    )
    if on_plan is not None:
        on_plan(report)
    if not dry_run:
        total = report.bytes_read + report.bytes_written
        write(
            assembly, (*header.files, *naming.files), force=force, threads=threads, allow_nonfinite=allow_nonfinite,
            on_progress=None if on_progress is None else lambda moved: on_progress(moved, total),
        )  # fmt: skip
        report = replace(report, written=True)
    return report


def find_layout(name: str) -> Layout:
    """Return the layout of this name.

    Raises:
        UsageError: there is none, or none that is written; offers the nearest.
    """
    layout = next((layout for layout in LAYOUTS if layout.name == name), None)
    written = [layout.name for layout in LAYOUTS if layout.written]
    if layout is None:
        near = difflib.get_close_matches(name, written, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"--to {name}: no such layout.{hint} ckpt convert --list shows what there is.")
    if not layout.written:
        raise UsageError(f"--to {name}: is read, but not written. ckpt convert --list shows what is.")
    return layout


def _check_format(layout: Layout, target: Path) -> None:
    torch = target.name.endswith(TORCH_SUFFIXES)
    output = "torch" if torch else "safetensors" if target.name.endswith(SUFFIXES) else "folder"
    if output in layout.files:
        return
    if layout.files == ("folder",):
        raise UsageError(f"{target}: --to {layout.name} makes a folder. Give -o a name without suffix.")
    what = "a folder of safetensors" if not target.suffix else "safetensors"
    folder = ", and a folder" if "folder" in layout.files else ""
    raise UsageError(
        f"{target}: --to {layout.name} nests its weights, which {what} cannot hold. "
        f"Give -o a name that ends in .pth{folder}, or choose --to plain."
    )


def _check_counters(updates: int | None, decay: float | None) -> None:
    if updates is not None and (type(updates) is not int or not 0 <= updates < 1 << 63):
        raise UsageError(f"--updates {updates!r}: must be a whole number from 0 on.")
    if decay is not None and not 0 <= decay <= 1:
        raise UsageError(f"--decay {decay!r}: must be from 0 to 1.")


def _chosen(
    header: Header, layout: Layout, state: str, naming: Naming
) -> tuple[dict[str, StateDict], dict[str, StateDict]]:
    """Choose the sets that go in: both, where both places are there for them and nobody asked for one.

    Returns:
        (all sets of the checkpoint, those that go in).
    """
    first = select(header, state, naming.names)
    found = states(header, naming.names)
    sets = {first.which: first}
    if state == "auto" and layout.pair and len(found) == 2 and found["raw"].fault is None:
        sets["raw"] = select(header, "raw", naming.names)
    return found, {which: replace(each, tensors=in_files(each.tensors)) for which, each in sets.items()}


def _remarks(found: Mapping[str, StateDict], sets: Mapping[str, StateDict], naming: Naming) -> Iterator[str]:
    """Say where names of averages and of raw weights differ, and which values among the averages are none."""
    ema, raw = sets.get("ema"), found["raw"].tensors if "raw" in found else {}
    if ema is None:
        return
    if raw and {*raw.values()} == {*ema.tensors.values()}:
        yield "The averaged weights are the raw ones: both stand for the same bytes. Was the EMA ever updated?"
        return
    if raw:
        for one, other, who in ((raw, ema.tensors, "lack"), (ema.tensors, raw, "hold")):
            strange = [name for name in one if name not in other]
            if strange:
                also = ", which the raw ones do not" if who == "hold" else ", which the raw ones hold"
                yield f"The averaged weights {who} {_some(strange)}{also}."
    for names, whose in ((raw, "the raw weights"), (naming.names or {}, naming.label)):
        borrowed = [
            name
            for name, tensor in ema.tensors.items()
            if names.get(name) is tensor and isinstance(tensor, TensorSpec) and tensor.dtype.averaged
        ]
        if borrowed:
            yield f"No averages, but from {whose}: {_some(borrowed)}."


def _some(names: Sequence[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _content(
    header: Header,
    sets: Mapping[str, StateDict],
    dtype: DType | None,
    naming: Naming,
    notes: list[str],
    *,
    updates: int | None,
    decay: float | None,
) -> Content:
    copies: dict[TensorSpec, OutTensor] = {}
    written = {which: _copied(header, each, dtype, copies) for which, each in sets.items()}
    ema = written.get("ema") or next(iter(written.values()))
    raw = written.get("raw", ema)
    averaged = sets.get("ema") or next(iter(sets.values()))
    known = parameters(averaged.tensors)
    return Content(
        raw=raw,
        ema=ema,
        pair=len(sets) == 2,
        parameters=tuple(known) if naming.order is None else tuple(n for n in naming.order if n in ema),
        updates=updates if updates is not None else stored_updates(header, averaged),
        decay=decay if decay is not None else stored_decay(header, averaged),
        settings=averaged.settings,
        other_entries=other_entries(header.tree, sets),
        notes=notes,
    )


def _copied(
    header: Header, state: StateDict, dtype: DType | None, copies: dict[TensorSpec, OutTensor]
) -> Mapping[str, OutTensor]:
    weights: Any = OrderedDict()
    for name, spec in state.tensors.items():
        if isinstance(spec, UnsupportedTensor):
            raise UnsupportedError(f"{header.path}: '{name}' is {spec.kind}, which cannot be written here.")
        tensor = copies.get(spec)
        if tensor is None:
            changed = dtype is not None and spec.dtype.kind is Kind.FLOAT and dtype is not spec.dtype
            out = dtype if changed and dtype is not None else spec.dtype
            tensor = OutTensor(out, spec.shape, ((spec, 1.0),), name, finite=changed)
            if spec.numel:  # empty ones are all alike, and tied to nothing
                copies[spec] = tensor
        weights[name] = tensor
    as_stored = state.keys is not None and all(name == key for name, key in state.keys.items())
    if as_stored and (versions := module_versions(header, state)) is not None:
        weights._metadata = versions
    return weights  # type: ignore[no-any-return]


def _assembled(
    layout: Layout,
    content: Content,
    header: Header,
    target: Path,
    said: Mapping[str, Any],
    dropped: Sequence[str],
    shard_bytes: int | None,
    untie: bool,
) -> Assembly:
    if target.name.endswith(TORCH_SUFFIXES):
        return nested(layout.write(content), target=target, provenance=said, dropped=dropped)
    whole = layout.flatten(content)
    if whole.dcp:
        files = dcp.plan(whole.tensors, max_bytes=shard_bytes, provenance=said)
        return Assembly(target, tuple(files), folder=True, dropped=tuple(dropped))
    return flat(
        whole.tensors, target=target, base=header, provenance=said, max_shard_size=shard_bytes, untie=untie,
        dropped=dropped, config=whole.config, stem=whole.stem,
    )  # fmt: skip


def _placed(layout: Layout, sets: Mapping[str, StateDict], target: Path) -> list[str]:
    """Say where the weights stand now."""
    whole = "the whole file" if target.suffix else "the whole folder"
    # A flat file has no places, but a nested one would.
    where = {"raw": layout.raw, "ema": layout.ema}
    places = {which: dotted(path) or whole for which, path in where.items() if path is not None}
    if not target.name.endswith(TORCH_SUFFIXES):
        places = dict.fromkeys(places, whole)
    if len(sets) == 2:
        return [f"{sets[which].label} → {place}" for which, place in places.items()]
    (only,) = sets.values()
    if layout.alone:
        places.pop("ema", None)
    return [f"{only.label} → {' and '.join(dict.fromkeys(places.values()))}"]
