"""`ckpt strip`: parse, strip one checkpoint or several, show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CkptError, SeriesError, UsageError, WriteError
from ..jobs.options import KeptState, Moving, Sharing, StrippedOutput
from . import arguments, console
from .tables import Table

if TYPE_CHECKING:
    from ..jobs.strip import StripReport


@arguments.with_options(KeptState, StrippedOutput, Sharing, Moving)
def strip(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CKPT", help="Files, quoted globs, folders of DCP, folders of these; not changed."),
    ],
    *,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Drop the optimizer and the rest of the training state.

    Example: ckpt strip checkpoint-300.pth.tar
    """
    sources = _sources([arguments.path(each) for each in checkpoints])
    if len(sources) == 1:
        reports = [_strip(sources[0], json=json, **options)]
    else:
        reports = _strip_all(sources, json=json, **options)
    shown = [arguments.plain(report) for report in reports if arguments.reports(report, **options)]
    if json and shown:
        console.print_json(shown if len(sources) > 1 else shown[0])


def _sources(given: Sequence[str]) -> Sequence[Path]:
    """Find the checkpoints that paths lead to.

    Raises:
        SeriesError: a path leads to none.
    """
    from ..series.paths import expand, find, one_checkpoint

    alone = expand(given)
    if len(given) == len(alone) == 1:
        return [one_checkpoint(given[0]) if Path(given[0]).exists() else alone[0]]
    notes: list[str] = []
    found = find(given, notes)
    if found.empty:
        raise SeriesError(f"{found.empty[0]}: a folder without weights, beside others. Leave it out.")
    arguments.say_notes(notes)
    return found.paths


def _strip_all(sources: Sequence[Path], *, json: bool, **options: Any) -> list[StripReport]:
    """Strip several checkpoints, each into a file of its own; all are planned before the first is written.

    Raises:
        CkptError: one cannot be stripped; names all such.
    """
    from ..jobs.outputs import Target
    from ..jobs.strip import strip as without_training_state

    for name in ("part", "finish", "resume", "sign_off"):
        if options[name]:
            raise UsageError(f"`{name}` goes with one checkpoint.")
    out = options["out"]
    if out is not None:
        if not Target.of(out).folder:
            raise UsageError(f"`out={out!r}`: {len(sources)} checkpoints go into a folder, such as `out='stripped/'`.")
        options["out"] = f"{out.rstrip('/')}/"
    plans: list[StripReport] = []
    faults: list[CkptError] = []
    for source in sources:
        try:
            without_training_state(source, **options, on_plan=_stop_after_planning)
        except _Planned as planned:
            plans.append(planned.plan)
        except CkptError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        said = [str(fault).split(". ")[0].rstrip(".") for fault in faults]
        shown = console.some(said, 10)
        raise SeriesError(f"{len(faults)} of {len(sources)} checkpoints cannot be stripped, and none was: {shown}.")
    twice = next((path for path, times in Counter(plan.out for plan in plans).items() if times > 1), None)
    if twice is not None:
        raise WriteError(f"{twice}: would be written twice. Strip checkpoints with the same name one at a time.")
    # What an earlier run has stripped is an input again, with nothing to lose.
    whole = {Path(plan.path).resolve() for plan in plans if plan.anything}
    lost = next((plan.out for plan in plans if plan.anything and Path(plan.out).resolve() in whole), None)
    if lost is not None:
        raise WriteError(f"{lost}: is one of the inputs, which stay as they are. Choose another folder with -o.")
    tell = console.shown_by(asked=options["dry_run"], json=json)
    reports = []
    for source in sources:
        report, _ = arguments.carried_out(without_training_state, source, **options, on_plan=_quietly)
        reports.append(report)
        # Signals still end the run: there is more to do.
        say = console.say if report.written else tell
        arguments.say_part(report.part)
        if report.written or not report.part:
            say(_result(report) if report.anything else f"{report.path}: nothing to strip.")
        arguments.say_notes(report.notes, tell)
    return reports


class _Planned(Exception):
    """A checkpoint can be stripped, and nothing of it is written yet."""

    def __init__(self, plan: StripReport) -> None:
        self.plan = plan


def _quietly(_: StripReport) -> None:
    """Show nothing of a plan."""


def _stop_after_planning(plan: StripReport) -> None:
    raise _Planned(plan)


def _result(report: StripReport) -> str:
    return f"{'Wrote' if report.written else 'Would write'} {report.out}: {_sizes(report)}."


def _strip(source: str | Path, *, json: bool, **options: Any) -> StripReport:
    from ..jobs.strip import strip as without_training_state

    tell = console.shown_by(asked=options["dry_run"], json=json)
    report, _ = arguments.carried_out(without_training_state, source, **options, on_plan=partial(_show, tell))
    arguments.say_part(report.part)
    if report.anything and (report.written or not report.part):
        (console.wrote if report.written else tell)(_result(report))
    return report


def _show(tell: console.Tell, report: StripReport) -> None:
    if not report.anything:
        tell(f"{report.path}: nothing to strip. Nothing was written.")
        arguments.say_notes(report.notes, tell)
        return
    rows = [(entry.place, entry.nbytes) for entry in report.entries]
    if report.compacted > 0:
        rows.append(("unused parts of storages", report.compacted))
    table = Table("", ("",), indent=2)
    for place, nbytes in rows:
        table.add(place, console.size(nbytes), bar=nbytes)
    tell(table)
    tell(f"Kept: {', '.join((*report.kept, *report.beside)) or 'the rest'}.")
    if report.dropped:
        tell(f"Not carried over, because it is not plain data: {', '.join(report.dropped)}.")
    arguments.say_notes(report.notes, tell)


def _sizes(report: StripReport) -> str:
    gained = report.nbytes - report.bytes_written
    return (
        f"{console.size(report.bytes_written)} of {console.size(report.nbytes)}, "
        f"{console.size(abs(gained))} ({abs(gained) / report.nbytes:.0%}) {'less' if gained >= 0 else 'more'}"
    )
