"""Model cards: what the record in an output says of how it was made, as a README.md for the Hugging Face Hub.

Names and texts in a record are from a file of unknown origin. They stand in code spans, in which neither Markdown nor
HTML has a meaning, and what no terminal should be sent is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compute.hashes import file_hashes
from ..errors import LayoutError
from ..formats import read_header
from ..formats.header import Header
from ..series.paths import folder_of_index, one_checkpoint
from ..storage.source import LOCAL, store_of
from ..storage.staged import write_file
from .option_groups import takes
from .options import CardOutput, Running, Wording
from .outputs import check_target, on_this_machine
from .provenance import Record, average_record
from .reports import Report
from .run import run

_FOLDED = 20
"""Checkpoints from which on their list is folded away."""
_FACTS = ("data", "images", "train", "head", "epochs", "lr", "passes", "estimator", "preprocessing")
"""What is told of a measurement or a training; the rest stands in the record."""


@dataclass(frozen=True, slots=True, repr=False)
class CardReport(Report):
    """A model card.

    Attributes:
        path: of the checkpoint.
        out: where the card goes.
        text: the card.
        notes: decisions, in words.
        written: True once it is there.
    """

    path: str
    out: str
    text: str
    notes: tuple[str, ...] = ()
    written: bool = False


@takes(Wording, CardOutput, Running)
def card(path: str | Path, wording: Wording, output: CardOutput, running: Running) -> CardReport:
    """Write a model card that says from what a checkpoint was made, as far as its record does.

    Args:
        path: an output of ckpt-tools.
        {options}

    Returns:
        The card, and where it is.

    Raises:
        LayoutError: the checkpoint has no record, or a damaged one.
        WriteError: the target exists, or cannot be written.
    """
    header = read_header(folder_of_index(one_checkpoint(path)))
    steps = _steps(header)
    out = _target(header, output)
    hashes = file_hashes((file.path for file in header.files), running.on_progress) if output.hash else {}
    digests = {path.name: digest for path, digest in hashes.items()}
    text = "\n".join([*_front_matter(wording, steps), "", *_body(header, steps, wording, digests)]) + "\n"

    def work(plan: CardReport) -> CardReport:
        write_file(out, text.encode(), force=output.force)
        return plan

    def check() -> None:
        check_target(out, [stamp.path for stamp in header.files], nbytes=0, force=output.force, names=None)

    return run(CardReport(str(header.path), str(out), text), running, check=check, work=work)


def _target(header: Header, output: CardOutput) -> Path:
    """Return where a card goes: into the folder of a checkpoint that is one, else beside it."""
    if output.out is not None:
        return on_this_machine(output.out, "out")
    if store_of(header.path) is not LOCAL:
        return Path("README.md")
    return (header.path if header.path.is_dir() else header.path.parent) / "README.md"


def _steps(header: Header) -> list[Mapping[str, Any]]:
    """Return the records of what was done, in the order in which it was.

    Raises:
        LayoutError: there are none.
    """
    steps: list[Mapping[str, Any]] = []
    made: Any = header.provenance
    while isinstance(made, dict):
        steps.append(made)
        source = made.get("input")
        made = source.get("made") if isinstance(source, dict) else None
    if not steps:
        raise LayoutError(
            f"{header.path}: has no record of ckpt-tools, so nothing is known of how it was made. `average(...)` and "
            "other commands write one into their outputs."
        )
    return steps[::-1]


def _front_matter(wording: Wording, steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the metadata of the Hub, YAML of which the values are JSON."""
    tags = ["ckpt-tools", *(["checkpoint-averaging"] if any(_is(step, "avg") for step in steps) else []), *wording.tag]
    given = {
        "license": wording.license,
        "base_model": [*wording.base_model] or None,
        "library_name": wording.library_name,
        "tags": [*dict.fromkeys(tags)],
    }
    yield "---"
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            quoted = [json.dumps(visible(str(each)), ensure_ascii=False) for each in values]
            yield f"{name}: {quoted[0]}" if not isinstance(value, list) else f"{name}:"
            yield from (f"- {each}" for each in quoted if isinstance(value, list))
    yield "---"


def _body(
    header: Header, steps: Sequence[Mapping[str, Any]], wording: Wording, digests: Mapping[str, str]
) -> Iterator[str]:
    yield f"# {escaped(wording.name)}" if wording.name else f"# {code(header.path.name)}"
    yield ""
    yield "These weights were made by ckpt-tools from saved checkpoints. This is what the record in them says."
    for number, step in enumerate(steps, 1):
        command = str(step.get("command"))
        title = _TITLES.get(command, f"Made by {code(f'ckpt {command}')}")
        yield from ("", f"## {number}. {title}" if len(steps) > 1 else f"## {title}", "")
        yield from _told(header, step, last=step is steps[-1])
    if digests:
        yield from ("", "## SHA-256", "")
        yield from _rows(("file", "SHA-256"), [(code(name), code(digest)) for name, digest in digests.items()])


_TITLES = {
    "avg": "Averaged",
    "recal-bn": "BatchNorm statistics measured",
    "tune": "Tuned",
    "convert": "Converted",
    "strip": "Training state dropped",
}


def _told(header: Header, step: Mapping[str, Any], *, last: bool) -> Iterator[str]:
    """Yield what was done in a step."""
    if not _is(step, "avg"):
        yield from _facts(step)
        return
    record = average_record(header.path, step)
    yield from _average(record)
    measured = step.get("recalibrated")
    if isinstance(measured, dict):
        yield from ("", "The BatchNorm statistics were measured on the averaged weights:", "", *_listed(measured))
    if isinstance(step.get("sweep"), dict):
        yield from ("", *_sweep(step["sweep"]))
    if last:
        options = {"replay": header.path.name, "out": f"again{header.path.suffix}"}
        if record.measured_on is not None:
            options["recal_bn"] = record.measured_on
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        yield from (
            "",
            "With the checkpoints in a folder, here FOLDER, this makes the average again and compares it:",
            "",
        )
        yield from ("```python", "import ckpt_tools", "", f'ckpt_tools.average("FOLDER", {given})', "```")


def _average(record: Record) -> Iterator[str]:
    what = f"The average of {len(record.inputs)} checkpoints" if len(record.inputs) > 1 else "One checkpoint"
    more = f"; checkpoints were added {record.updates} times" if record.updates else ""
    yield f"- {what}, rule {code(record.mode)}{more}"
    yield f"- Weights: {code(record.state)}"
    if record.arguments:
        yield f"- Options: {', '.join(code(f'{name}={_short(value)}') for name, value in record.arguments.items())}"
    yield f"- Version: {code('ckpt-tools ' + record.version)}"
    hashed = any(each.sha256 for each in record.inputs)
    titles = ("checkpoint", "step", "coefficient", "bytes", *["SHA-256"] * hashed)
    rows = [
        (
            code(each.name),
            "" if each.step is None else str(each.step),
            f"{each.coefficient:.6g}",
            str(each.nbytes),
            *[" ".join(code(value) for value in each.sha256.values())] * hashed,
        )
        for each in record.inputs
    ]
    folded = len(rows) > _FOLDED
    yield from ("", *["<details><summary>Checkpoints</summary>", ""] * folded)
    yield from _rows(titles, rows)
    yield from ["", "</details>"] * folded
    if record.skipped:
        names = ", ".join(f"{code(each.path)} ({code(each.kind)})" for each in record.skipped)
        yield from ("", f"Left out: {names}")
    if record.ratios:
        yield from ("", "The coefficients differ from tensor to tensor (Model Stock); these are their means.")


def _sweep(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a sweep found."""
    yield f"It was chosen among {code(str(found.get('candidates')))} candidates by {code(str(found.get('metric')))}:"
    metrics = found.get("metrics")
    if isinstance(metrics, dict) and metrics:
        rows = [(code(str(name)), f"{value:.6g}" if _is_number(value) else "") for name, value in metrics.items()]
        yield from ("", *_rows(("metric", "on the data of the choice"), rows))
    if isinstance(found.get("evaluation"), dict):
        yield from ("", "Evaluated by:", "", *_listed(found["evaluation"], {*found["evaluation"]}))
    if found.get("verdict"):
        yield from ("", code(str(found["verdict"])))


def _facts(step: Mapping[str, Any]) -> Iterator[str]:
    yield f"- Weights: {code(str(step.get('state')))}"
    source = step.get("input")
    if isinstance(source, dict):
        yield f"- From: {code(str(source.get('name')))}"
    yield f"- Version: {code('ckpt-tools ' + str(step.get('version')))}"
    arguments = step.get("arguments")
    if isinstance(arguments, dict):
        yield from _listed(arguments, {*arguments} if not _is(step, "tune") else {*_FACTS})


def _listed(facts: Mapping[str, Any], names: set[str] | None = None) -> Iterator[str]:
    wanted = {*_FACTS} if names is None else names
    yield from (f"- {code(str(name))}: {code(_short(value))}" for name, value in facts.items() if name in wanted)


def _rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]  # in code, too
        yield f"| {' | '.join(cells)} |"


def visible(text: str) -> str:
    """Escape what is not printable, such as the end of a line and what a terminal obeys."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def code(text: str) -> str:
    """Return a text as a code span of Markdown, in which nothing has a meaning."""
    shown = visible(text)
    fence = "`" * (1 + max((len(each) for each in re.findall("`+", shown)), default=0))
    pad = " " if not shown or shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def escaped(text: str) -> str:
    """Return a text in which Markdown and HTML have no meaning."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!():@])", r"\\\1", visible(text))


def _short(value: Any) -> str:
    """Write a value of a record on one line."""
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "..."


def _is(step: Mapping[str, Any], command: str) -> bool:
    return step.get("command") == command


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
