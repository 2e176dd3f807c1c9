"""`ckpt fix-prefix`: parse, fix, show."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..jobs.options import Prefixes, RenamedOutput, Running
from . import arguments, console

if TYPE_CHECKING:
    from ..jobs.fix_prefix import PrefixReport


@arguments.with_options(Prefixes, RenamedOutput, Running)
def fix_prefix(checkpoint: arguments.Averaged = None, *, json: arguments.Json = False, **options: Any) -> None:
    """Take wrapper prefixes off the names; nothing else changes.

    Example: ckpt fix-prefix averaged.pth
    """
    from ..jobs.fix_prefix import fix_prefix as without_prefixes

    source = arguments.averaged(checkpoint)
    tell = console.shown_by(asked=options["dry_run"], json=json)
    report, seconds = arguments.carried_out(without_prefixes, source, **options, on_plan=partial(_show, tell))
    if report.written:
        console.wrote(f"Wrote {report.out}: {console.size(report.nbytes)} in {seconds:.2f} s.")
    if json:
        console.print_json(arguments.plain(report))


def _show(tell: console.Tell, report: PrefixReport) -> None:
    tell(f"{report.path}: {report.format}, {console.plural(len(report.states), 'state dict')}.")
    for state in report.states:
        place = state.place or "the whole file"
        parts = [f"{number} of {state.names} names lose '{prefix}'" for prefix, number in state.removed.items()]
        parts += [f"{number} of {state.names} names get '{prefix}'" for prefix, number in state.added.items()]
        example = "" if state.example is None else " ({} becomes {})".format(*state.example)
        done = f"{', '.join(parts)}{example}" if parts else f"{console.plural(state.names, 'name')}, none to change"
        tell(f"  {place}: {done}.")
    if not report.changed:
        tell(f"Nothing to fix; it {'stays' if report.in_place else 'is copied'} as it is.")
    arguments.say_notes(report.notes, tell)
