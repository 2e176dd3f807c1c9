"""`ckpt diff`: parse, compare, show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..jobs.options import Comparison, Drawing, Reading, SharedComparison, Tolerance
from . import arguments, console
from .tables import Table

if TYPE_CHECKING:
    from ..compute.norms import Norms
    from ..jobs.diff import DiffReport, Side, TensorDiff


@arguments.with_options(Comparison, Tolerance, SharedComparison, Drawing, Reading)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="The first checkpoint; a file or a folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The second checkpoint (reference for --rtol).")],
    *,
    top: Annotated[int, typer.Option(help="Show the N tensors that differ most.", metavar="N")] = 10,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Show what differs between two checkpoints.

    Example: ckpt diff averaged.pth averaged-bn.pth
    """
    if top < 0:
        raise UsageError(f"`top={top}`: must be 0 or more.")
    from ..jobs.diff import diff as compare

    report, _ = arguments.carried_out(compare, arguments.path(a), arguments.path(b), **options)
    arguments.say_part(report.part)
    started = arguments.started(**options)
    told = report.complete and (started is None or bool(started.step) or started.index == 1)
    if told:
        _show(report, top, console.shown_by(asked=True, json=json))
    if report.complete and options["plot"] is not None:
        console.wrote(f"Wrote {options['plot']}.")
    if json and (told or started is None):
        console.print_json(arguments.plain(report))
    if report.verdict == "different":
        raise typer.Exit(1)


def _show(report: DiffReport, top: int, tell: console.Tell) -> None:
    for side in (report.a, report.b):
        lost = f", compared without {' and '.join(repr(p) for p in side.prefixes)}" if side.prefixes else ""
        tell(f"{side.name}: {side.state}, {console.plural(side.tensors, 'tensor')}{lost}")
    arguments.say_notes(report.notes, tell)
    _show_names(report.a, report.only_a, top, tell)
    _show_names(report.b, report.only_b, top, tell)
    for what, changes in (("shape", report.shapes), ("dtype", report.dtypes)):
        for change in changes[:top]:
            tell(f"{what} of {change.name}: {change.a}, and {change.b} in {report.b.name}")
        _show_rest(what + "s that differ", len(changes) - top, tell)
    for name, kind in list(report.not_compared.items())[:top]:
        tell(f"not compared: {name} ({kind})")
    _show_rest("tensors that are not compared", len(report.not_compared) - top, tell)
    shown = [tensor for tensor in report.tensors if tensor.differing][:top]
    if shown:
        tell(_table(shown))
        _show_rest("tensors that differ", sum(t.differing > 0 for t in report.tensors) - top, tell)
    tell(_verdict(report))


def _show_names(side: Side, names: tuple[str, ...], top: int, tell: console.Tell) -> None:
    for name in names[:top]:
        tell(f"only in {side.name}: {name}")
    _show_rest(f"names only in {side.name}", len(names) - top, tell)


def _show_rest(what: str, number: int, tell: console.Tell) -> None:
    if number > 0:
        tell(f"... and {number} more {what}")


def _table(tensors: list[TensorDiff]) -> Table:
    table = Table("tensor", ("largest absolute", "relative distance", "values that differ"), sampled=False)
    for tensor in tensors:
        name = tensor.name + (f" (and {len(tensor.tied)} tied)" if tensor.tied else "")
        odd = f", {tensor.nonfinite} not finite" if tensor.nonfinite else ""
        table.add(
            name,
            "codes" if tensor.max_abs is None else f"{tensor.max_abs:.3g}",
            "" if tensor.norms is None else _percent(tensor.norms.relative),
            f"{tensor.differing} of {tensor.values}{odd}",
            bar=0.0 if tensor.norms is None else tensor.norms.relative,
            colour="red" if tensor.beyond else "green",
        )
    return table


def _in_all(norms: Norms) -> str:
    cosine = "" if norms.cosine is None else f" (cosine {norms.cosine:.6g})"
    return f"{norms.distance:.4g}, {_percent(norms.relative)} of the norm{cosine}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _verdict(report: DiffReport) -> str:
    """Summarize in one line, claiming no more than was compared."""
    weights = console.plural(report.compared, "tensor")
    if report.verdict == "identical":
        return f"Identical: {weights}, the same bit for bit."
    inexact = report.compared - report.identical
    if report.verdict == "equal":
        signs = "the sign of a zero or the bits of a NaN"
        return f"Equal: {weights}, the same in every value, though {inexact} not bit for bit ({signs})."
    differing = sum(1 + len(tensor.tied) for tensor in report.tensors if tensor.differing)
    figures = f"{differing} of {weights} {'differs' if differing == 1 else 'differ'}"
    if differing:
        if report.norms is not None and report.norms.distance:
            figures += f"; the distance in all is {_in_all(report.norms)}"
        largest, where = report.largest
        figures += f"; the largest difference is {largest:.3g} ({where})" if largest else ""
    tolerance = f"(rtol {report.rtol:g}, atol {report.atol:g})"
    dtypes = f"{console.plural(len(report.dtypes), 'dtype')} differ" + ("s" if len(report.dtypes) == 1 else "")
    if report.verdict == "within tolerance":
        return f"Equal within tolerance {tolerance}: {figures}" + (f"; {dtypes}." if report.dtypes else ".")
    reasons = [figures] if differing else []
    if report.nonfinite:
        reasons.append(f"{console.plural(report.nonfinite, 'value')} with NaN or infinity on one side")
    if report.tolerant and differing:
        beyond = sum(tensor.beyond for tensor in report.tensors)
        reasons.append(f"{console.plural(beyond, 'value')} beyond the tolerance {tolerance}")
    reasons += [
        f"{number} {what}"
        for number, what in (
            (len(report.only_a), f"only in {report.a.name}"),
            (len(report.only_b), f"only in {report.b.name}"),
            (len(report.shapes), "of another shape"),
            (len(report.dtypes), "of another dtype"),
            (len(report.not_compared), "not compared"),
        )
        if number
    ]
    return f"Different: {'; '.join(reasons)}."
