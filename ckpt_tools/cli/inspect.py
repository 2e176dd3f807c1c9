"""`ckpt inspect`: read headers, show one checkpoint, or a table of several."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..jobs.options import Drawing, Skipping
from . import arguments, common, console, progress
from .tables import BAR, Table, bar

if TYPE_CHECKING:
    from ..jobs.inspect import InspectReport, Optimizer, WeightSet
    from ..jobs.listing import Listed, Listing

_METADATA_ROWS, _METADATA_WIDTH = 8, 60
"""Entries, and characters of a key or a value, of metadata that are shown without -v."""


@arguments.with_options(Skipping, Drawing)
def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="CKPT", help="A file, or a folder with a sharded checkpoint; of several, a table."),
    ],
    *,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor."), common.ONE_RUN] = False,
    metric: Annotated[str, typer.Option("--metric", help="The number in a table.", metavar="KEY")] = "metric",
    all_: common.All = False,
    json: Annotated[bool, typer.Option("--json", help="The description on stdout."), common.ONE_RUN] = False,
    **options: Any,
) -> None:
    """Show what a checkpoint holds, from its header alone, or list several.

    Example: ckpt inspect runs/
    """
    from ..jobs.inspect import inspect as describe
    from ..series.paths import expand

    given = [arguments.path(path) for path in paths]
    plot = options["plot"]
    if len(given) == 1 and len(expand(given)) == 1 and not options["exclude"]:
        _show_one(describe(*expand(given), plot=plot, force=options["force"]), tensors=tensors, json=json)
        if plot is not None:
            console.wrote(f"Wrote {plot}.")
        return
    if tensors:
        raise UsageError("`tensors` goes with one checkpoint.")
    from ..jobs.listing import listing

    with progress.shown(progress.PLANNING) as line:
        found = listing(given, metric, **options, on_progress=line.tell)
    if json:
        console.print_json(arguments.plain(found))
    else:
        _show_table(found, metric)
    if plot is not None:
        console.wrote(f"Wrote {plot}.")
    if found.faults:
        raise typer.Exit(1)


def _show_table(found: Listing, metric: str) -> None:
    rows = found.checkpoints
    columns = {
        "step" if found.counter == "name" else found.counter: [_cell(row.step) for row in rows],
        metric: [_cell(row.metric) for row in rows],
        "weights": [_weights(row) for row in rows],
        "optimizer": [console.size(row.optimizer) if row.optimizer else "" for row in rows],
        "size": ["" if row.nbytes is None else console.size(row.nbytes) for row in rows],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    table = Table("checkpoint", tuple(columns))
    for row, *cells in zip(rows, *columns.values(), strict=True):
        table.add(row.name, *cells, drawn=row.fault or row.differs, colour="red" if row.fault else "yellow")
    nbytes = sum(row.nbytes or 0 for row in rows)
    console.show(table, "", f"{console.plural(len(rows), 'checkpoint')}, {console.size(nbytes)}.")
    if found.faults:
        console.show(arguments.spelled(f"{found.faults} of them cannot be averaged; `skip_broken` leaves them out."))
    if differ := sum(bool(row.differs) for row in rows):
        them, s = ("it", "s") if differ == 1 else ("them", "")
        said = f"{differ} of them differ{s} from most in names or shapes of tensors, and cannot be averaged with those"
        console.show(arguments.spelled(f"{said}; `exclude` leaves {them} out."))
    arguments.say_notes(found.notes, console.show)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _weights(row: Listed) -> str:
    made = f" (by ckpt {row.made})" if row.made else ""
    return f"{', '.join(row.sets)}{made}"


def _show_one(description: InspectReport, *, tensors: bool, json: bool) -> None:
    if json:
        data = description.to_dict()
        if not tensors:
            for weights in data["sets"]:
                del weights["tensors"]
        console.print_json(data)
        return
    _show(description)
    if tensors:
        for weights in description.sets:
            _list(weights)


def _show(d: InspectReport) -> None:
    files = f" in {d.files} files" if d.files > 1 else ""
    console.show(f"{d.path}: {d.format}, {console.size(d.nbytes)}{files}")
    if not d.sets:
        console.show("  no weights in a known layout; other commands can be told the place with --state")
    alone = [weights.which for weights in d.sets] == ["raw"]  # which tells nothing, and neither does its layout
    for weights in d.sets:
        label = weights.label.replace("raw", "weights", 1) if alone else weights.label
        layout = "" if alone else f" (layout {weights.layout})"
        console.show(
            f"  {label}: {console.plural(len(weights.tensors), 'tensor')}, "
            f"{console.count(weights.elements)} value{'s' * (weights.elements != 1)}, "
            f"{console.size(weights.nbytes)}{layout}"
        )
        largest = max((nbytes for _, nbytes in weights.dtypes.values()), default=0)
        for name, (number, nbytes) in weights.dtypes.items():
            drawn = bar(nbytes, largest, stream=sys.stdout)
            console.show(f"    {name:<15} {number:>6} {console.size(nbytes):>9}  {drawn}")
        for prefix, number in weights.prefixes.items():
            console.show(f"    {number} of {len(weights.tensors)} names carry '{prefix}'")
    facts = [f"{key} {value}" for key, value in d.counters.items()]
    if d.metric is not None:
        facts.append(f"metric {d.metric:g}")
    if facts:
        console.show("  " + ", ".join(facts))
    for optimizer in d.optimizers:
        _show_optimizer(optimizer)
    for place, number in d.other.items():
        if place not in {o.place.split(".")[0] for o in d.optimizers}:
            console.show(f"  {place}: {console.plural(number, 'other tensor')}")
    if d.foreign:
        names = ", ".join(f"{name} ({number})" if number > 1 else name for name, number in d.foreign.items())
        console.show(f"  unknown classes, kept as plain data and never run: {names}")
    if d.metadata:
        _show_metadata(d.metadata)
    if d.provenance is not None:
        _show_provenance(d.provenance)
    arguments.say_notes(d.notes, console.show)


def _show_optimizer(optimizer: Optimizer) -> None:
    multiple, times = optimizer.multiple, optimizer.times
    if not optimizer.nbytes and not optimizer.kept:
        console.show(f"  {optimizer.place}: empty")
        return
    said = ""
    if multiple is not None:
        values = times is not None and abs(times - multiple) > 0.05 * times
        said = f" ({multiple:.2g}x the weights{f', {times:.2g}x their values' if values else ''})"
    console.show(f"  {optimizer.place}: {optimizer.name}, {console.size(optimizer.nbytes)}{said}")
    rows = [row for row in optimizer.kept if row.multiple is None or row.multiple >= 0.001]  # no counts of steps
    shown = [row.name if row.multiple is None else f"{row.name} {row.multiple:.2g}" for row in rows]
    if shown:
        console.show(f"    keeps {console.some(shown, 8)}")


def _show_metadata(metadata: Mapping[str, str]) -> None:
    """Show what a file says of itself; with -v all of it, which may be a whole configuration."""
    rows, longest = (len(metadata), None) if console.manner.verbose else (_METADATA_ROWS, _METADATA_WIDTH)
    console.show(f"  metadata: {console.plural(len(metadata), 'entry', 'entries')}")
    for key, text in [*metadata.items()][:rows]:
        cut = [each if longest is None or len(each) <= longest else f"{each[:longest]}…" for each in (key, text)]
        console.show(f"    {': '.join(cut)}")
    if len(metadata) > rows:
        console.show(f"    and {len(metadata) - rows} more, which -v shows")


def _show_provenance(provenance: dict[str, object]) -> None:
    arguments = provenance.get("arguments")
    options = "".join(f", {k} {_short(v)}" for k, v in arguments.items()) if isinstance(arguments, dict) else ""
    command = provenance.get("command")
    what = f"{provenance.get('mode')} average" if command == "avg" else str(command)
    console.show(f"  made by ckpt-tools {provenance.get('version')}: {what} of {provenance.get('state')}{options}")
    if isinstance(measured := provenance.get("recalibrated"), dict):
        settings = ", ".join(f"{k} {_short(v)}" for k, v in measured.items())
        console.show(f"  with BatchNorm statistics measured on it: {settings}")
    source = provenance.get("input")  # recal-bn has one, which may be an output itself
    if isinstance(source, dict) and isinstance(source.get("made"), dict):
        console.show(f"  from {source.get('name')}:")
        _show_provenance(source["made"])
    rows = [i for i in _records(provenance.get("inputs")) if _is_figure(i.get("coefficient"))]
    largest = max((abs(i["coefficient"]) for i in rows), default=0)
    for i in rows:
        drawn = bar(i["coefficient"], largest, stream=sys.stdout)
        console.show(f"    {i['coefficient']:>10.6f} {drawn:<{BAR}} {i.get('name')}")
    left_out = [f"{i.get('name')} ({i.get('reason')})" for i in _records(provenance.get("skipped"))]
    if left_out:
        console.show(f"    left out: {console.some(left_out)}")


def _short(value: object) -> str:
    """Write nested arguments without the marks of a program."""
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "x".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _records(value: object) -> list[dict[str, Any]]:
    """Return what is a list of objects, written by us, or by whoever wrote the file."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _is_figure(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300  # which NaN is not


def _list(weights: WeightSet) -> None:
    table = Table("", ("", ""), indent=2)
    for row in weights.tensors:
        table.add(row.name, row.dtype, "" if row.shape is None else str(list(row.shape)))
    console.show("", weights.label, table)
