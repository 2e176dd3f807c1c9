"""`ckpt card`: parse, write, show."""

from __future__ import annotations

from typing import Any

from ..jobs.options import CardOutput, Running, Wording
from . import arguments, console


@arguments.with_options(Wording, CardOutput, Running)
def card(checkpoint: arguments.Averaged = None, *, json: arguments.Json = False, **options: Any) -> None:
    """Write a model card for the Hugging Face Hub, from the record in an output of ckpt.

    Example: ckpt card averaged/ --base-model org/name --license apache-2.0
    """
    from ..jobs.card import card as write

    report, _ = arguments.carried_out(write, arguments.averaged(checkpoint), **options)
    if json:
        console.print_json(arguments.plain(report))
    elif options["dry_run"]:
        console.show(*report.text.splitlines())
    arguments.say_notes(report.notes)
    if report.written:
        console.wrote(f"Wrote {report.out}.")
