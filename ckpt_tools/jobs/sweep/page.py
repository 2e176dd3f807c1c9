"""The page of a sweep: one HTML file with all that it found, which loads nothing and runs no scripts."""

from __future__ import annotations

import html
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from ... import __version__
from ...batchnorm.report import BatchNormReport
from ..look import LookReport, Position
from ..pictures import no_matplotlib, rendered
from .page_style import STYLE

if TYPE_CHECKING:
    from .report import Ranked, SweepReport

Said = Callable[[str], str]
"""From a message to what is shown, escaped."""

_OPEN = 30
"""Rows of a table that are shown before those that a click opens."""
_TENSORS = 10
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_SVG_LEFT_OUT = re.compile(r'<metadata>.*?</metadata>|<!--.*?-->\n?| xmlns(:xlink)?="[^"]*"', re.DOTALL)
_SVG_IDS = re.compile(r'(\bid="|xlink:href="#|url\(#)')


@dataclass(frozen=True, slots=True)
class Background:
    """What a page shows beyond the report.

    Attributes:
        evaluation: what the scores depend on.
        test: the same for the data of the report; None if there are none.
        holdout: part of the samples that had no part in the choice, and the seed; None for all.
        geometry: of the series, or why it is not known.
        drift: of the BatchNorm statistics of the best one, from averaged to measured, or why it is not known; None if
            none were measured.
    """

    evaluation: Mapping[str, Any]
    test: Mapping[str, Any] | None
    holdout: tuple[float, int] | None
    geometry: LookReport | str
    drift: BatchNormReport | str | None


def python_calls(report: SweepReport) -> str:
    """Return the call that makes the best candidate."""
    options = {**report.options, "out": report.out or "best.pth"}
    return f"average({', '.join([repr([*report.paths]), *(f'{name}={value!r}' for name, value in options.items())])})"


@dataclass(frozen=True, slots=True)
class Wording:
    """How a page speaks: as Python does, unless another front end gives its own words.

    Attributes:
        again: from a report to what makes its best candidate again.
        said: from a message of the library, which names parameters in backticks, to what is shown.
    """

    again: Callable[[SweepReport], str] = python_calls
    said: Callable[[str], str] = str


def page(report: SweepReport, background: Background, words: Wording) -> bytes:
    """Return the page in UTF-8."""

    def said(text: str) -> str:
        return _text(words.said(text))

    sections = [
        ("Result", _result(report, words.again(report), said)),
        ("Ranking", _ranking(report, said)),
        ("Coefficients", _coefficients(report)),
        ("Geometry of the series", _geometry(background.geometry, said)),
        *([] if background.drift is None else [("BatchNorm statistics", _drift(report, background.drift, said))]),
        ("Notes", _notes(report, said)),
        ("What was done", _done(report, background)),
    ]
    title = f"Sweep of {len(report.checkpoints)} checkpoints"
    links = "".join(f'<a href="#s{i}">{_text(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{_text(name)}</h2>{"".join(parts)}</section>'
        for i, (name, parts) in enumerate(sections)
    )
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(title)}: {_text(report.best or '')}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{_text(title)}</h1><p>{_text(report.checkpoints[0])} to {_text(report.checkpoints[-1])}, in the "
        f"order of {_text(report.ordered_by)}</p></header><nav>{links}</nav><main>{body}</main></body></html>\n"
    )
    return text.encode("utf-8", "backslashreplace")


def _text(value: object) -> str:
    """Escape text of unknown origin; what cannot be printed is written as Python would."""
    shown = "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in str(value)
    )
    return html.escape(shown)


def _number(value: float | None, form: str = ".6g") -> str:
    return "" if value is None else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Iterable[int] = (), name: str = "") -> str:
    """Return a table; rows beyond the first ones open by a click.

    Args:
        head: names of columns, escaped.
        rows: cells, as HTML.
        numbers: columns that are aligned to the right.
        name: of what a row is, in the plural.
    """
    right = {*numbers}

    def part(some: Iterable[Sequence[str]]) -> str:
        lines = "".join(
            "<tr>"
            + "".join(f'<td class="n">{cell}</td>' if i in right else f"<td>{cell}</td>" for i, cell in enumerate(row))
            + "</tr>"
            for row in some
        )
        heads = "".join(
            f'<th class="n">{cell}</th>' if i in right else f"<th>{cell}</th>" for i, cell in enumerate(head)
        )
        return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'

    if len(rows) <= _OPEN + 5:
        return part(rows)
    more = f"<details><summary>{len(rows) - _OPEN} more {name}</summary>{part(rows[_OPEN:])}</details>"
    return part(rows[:_OPEN]) + more


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _result(report: SweepReport, again: str, said: Said) -> Iterator[str]:
    better = any(each.metric == report.metric and each.shown for each in report.against_last)
    yield f'<p class="verdict{" shown" if better else ""}">{said(report.verdict)}</p>'
    best = next((each for each in report.candidates if each.label == report.best), None)
    direction = "lower" if report.lower_is_better else "higher"
    if best is not None:
        yield f"<p>The best is <b>{_text(best.label)}</b>, of {_count(best)}. The metric that decides is "
        yield f"{_text(report.metric)}; {direction} is better.</p>"
    if report.against_last:
        data = (
            "on data that had no part in the choice"
            if report.other_data
            else "on the data by which the best was chosen, which flatters it"
        )
        yield f"<h3>The best against the last checkpoint, {data}</h3>"
        yield _table(
            ["metric", "best", "last", "difference", "95 % interval", "McNemar p", "samples"],
            [
                [
                    _text(each.metric),
                    _number(each.best),
                    _number(each.other),
                    _number(each.difference, "+.4g"),
                    "" if each.low is None or each.high is None else f"{each.low:+.4g} to {each.high:+.4g}",
                    _number(each.p, ".2g"),
                    _number(each.samples, "d"),
                ]
                for each in report.against_last
            ],
            range(1, 7),
        )
    yield "<h3>Reproduce the best</h3>"
    yield f'<pre class="command"><code>{html.escape(again)}</code></pre>'
    yield "<p>A click selects it, to be copied.</p>"
    yield from _curves(report)


def _curves(report: SweepReport) -> Iterator[str]:
    if no_matplotlib() is not None:
        yield "<p>There is no picture, for matplotlib was not installed.</p>"
        return
    from .picture import draw, size

    yield _picture(
        lambda figure: draw(report, figure), size(report), "The metric over the candidates; the ranking has the values"
    )


def _picture(draw: Any, size: tuple[float, float], what: str) -> str:
    """Return a picture as inline SVG, with ids of its own."""
    svg = rendered(draw, size=size, suffix=".svg").decode()
    svg = _SVG_LEFT_OUT.sub("", svg[svg.index("<svg") :])
    lead = re.sub(r"\W", "", what)[:12]
    svg = _SVG_IDS.sub(rf"\g<1>{lead}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{_text(what)}" ', 1)
    return f"<figure>{svg.strip()}</figure>"


def _count(each: Ranked) -> str:
    return "1 checkpoint" if len(each.checkpoints) == 1 else f"{len(each.checkpoints)} checkpoints"


def _name(report: SweepReport, each: Ranked) -> str:
    marks = [("best", report.best), ("best checkpoint alone", report.best_single), ("last", report.last)]
    tags = "".join(f' <span class="tag">{mark}</span>' for mark, label in marks if each.label == label)
    same = f"<br><small>also {_text(', '.join(each.same))}</small>" if each.same else ""
    name = f"<b>{_text(each.label)}</b>" if each.label == report.best else _text(each.label)
    return name + tags + same


def _ranking(report: SweepReport, said: Said) -> Iterator[str]:
    metric = report.metric or ""
    scored = [each for each in report.candidates if metric in each.metrics]
    others = [*dict.fromkeys(name for each in scored for name in each.metrics if name != metric)]
    values = [each.metrics[metric] for each in scored]
    worst, best = (max(values), min(values)) if report.lower_is_better else (min(values), max(values))
    intervals = any(each.low is not None for each in scored)
    yield (
        "<p>Bars go from the worst candidate to the best, for the differences are small beside the values."
        + (" The interval is that of each mean by itself; that of a difference is narrower." if intervals else "")
        + "</p>"
    )
    rows = []
    for rank, each in enumerate(scored, 1):
        share = 100 * (0.04 + 0.96 * abs(each.metrics[metric] - worst) / (abs(best - worst) or 1))
        color = "best" if each.label == report.best else "last" if each.label == report.last else ""
        interval = "" if each.low is None or each.high is None else f"{each.low:.4g} to {each.high:.4g}"
        rows.append(
            [
                str(rank),
                _name(report, each),
                f'<div class="bar {color}" style="width:{share:.1f}%"></div>',
                _number(each.metrics[metric]),
                *([interval] if intervals else []),
                *(_number(each.metrics.get(name)) for name in others),
                f"{each.seconds:.3g}",
            ]
        )
    head = ["", "candidate", "", _text(metric), *(["95 % interval"] if intervals else []), *map(_text, others), "s"]
    yield _table(head, rows, {0, *range(3, len(head))}, "candidates")
    failed = [each for each in report.candidates if metric not in each.metrics]
    if failed:
        yield "<h3>Not scored</h3>"
        yield _table(
            ["candidate", "why"],
            [[_text(each.label), f'<span class="why">{said(each.error or "")}</span>'] for each in failed],
            name="candidates",
        )
    if report.refused:
        yield "<h3>Cannot be made</h3>"
        yield _table(
            ["combination", "why"],
            [[_text(label), f'<span class="why">{said(why)}</span>'] for label, why in report.refused.items()],
            name="combinations",
        )


def _in_series(each: Ranked, report: SweepReport) -> list[float]:
    """Return a coefficient for each checkpoint of the series."""
    own = dict(zip(each.checkpoints, each.coefficients, strict=True))
    return [own.get(name, 0.0) for name in report.checkpoints]


def _coefficients(report: SweepReport) -> Iterator[str]:
    yield "<p>How much each checkpoint counts; oldest to the left, the darker the more, negative ones in red.</p>"
    n = len(report.checkpoints)
    rows = []
    for each in report.candidates:
        values = _in_series(each, report)
        largest = max(map(abs, values)) or 1.0
        cells, at = "", 0
        for value, run in groupby(values):
            wide = len([*run])
            if value:
                names = report.checkpoints[at] + ("" if wide == 1 else f" to {report.checkpoints[at + wide - 1]}")
                kind = ' class="minus"' if value < 0 else ""
                cells += (
                    f'<rect{kind} x="{at}" width="{wide}" height="1" fill-opacity="{abs(value) / largest:.2f}">'
                    f"<title>{_text(names)}: {value:.6g}</title></rect>"
                )
            at += wide
        drawn = f'<svg class="row" viewBox="0 0 {n} 1" preserveAspectRatio="none">{cells}</svg>'
        rows.append([_text(each.label), str(len(each.checkpoints)), drawn])
    yield _table(["candidate", "of", "coefficients"], rows, [1], "candidates")
    best = next((each for each in report.candidates if each.label == report.best), None)
    if best is not None:
        yield "<h3>Of the best one</h3>"
        largest = max(map(abs, best.coefficients)) or 1.0
        yield _table(
            ["checkpoint", "step", "coefficient", ""],
            [
                [
                    _text(name),
                    _number(step, "d"),
                    f"{value:.6g}",
                    f'<div class="bar" style="width:{100 * abs(value) / largest:.1f}%"></div>',
                ]
                for name, step, value in zip(report.checkpoints, report.steps, _in_series(best, report), strict=True)
                if value
            ],
            [1, 2],
            "checkpoints",
        )


def _geometry(found: LookReport | str, said: Said) -> Iterator[str]:
    if isinstance(found, str):
        yield f'<p>It could not be measured: <span class="why">{said(found)}</span></p>'
        return
    yield "<p>Where the checkpoints lie to each other: Euclidean lengths over all parameters together; "
    yield f"weights: {_text(found.state)}. Their mean has {found.mean_norm:.4f} of their norm.</p>"
    if no_matplotlib() is None:
        from ..look_picture import SIZE, draw

        yield _picture(lambda figure: draw(found, figure), SIZE, "Geometry of the series; the table has the values")
    columns: dict[str, Callable[[Position], str]] = {
        "step": lambda each: _number(each.step, "d"),
        "norm": lambda each: _number(each.norm, ".4g"),
        "to mean": lambda each: _number(each.to_mean, ".4g"),
        "to next": lambda each: _number(each.to_next, ".4g"),
        "cosine": lambda each: _number(each.cosine, "+.2f"),
        "learning rate": lambda each: _number(each.learning_rate, ".3g"),
        "start left": lambda each: _number(each.start_left, ".1%"),
    }
    shown = {name: get for name, get in columns.items() if any(get(each) for each in found.checkpoints)}
    yield _table(
        ["checkpoint", *shown],
        [[_text(each.name), *(get(each) for get in shown.values())] for each in found.checkpoints],
        range(1, len(shown) + 1),
        "checkpoints",
    )
    moving = [*found.movement.items()][:_TENSORS]
    if moving:
        yield "<h3>Tensors that move most, relative to their norm</h3>"
        yield _table(["tensor", "spread"], [[_text(name), f"{share:.3%}"] for name, share in moving], [1])
    if found.notes:
        yield _list(map(said, found.notes))


def _drift(report: SweepReport, found: BatchNormReport | str, said: Said) -> Iterator[str]:
    if isinstance(found, str):
        yield f'<p>The drift is not known: <span class="why">{said(found)}</span></p>'
        return
    yield (
        f"<p>How far the averaged statistics of {_text(report.best)} are from those that were measured on "
        f"{found.images} images before its score: the largest change over the channels of a layer. A mean counts in "
        "standard deviations; a variance by the factor, 1 for none.</p>"
    )
    yield _table(
        ["layer", "channels", "mean shift (σ)", "variance ratio", "standard error of the mean (σ)"],
        [
            [
                _text(each.name or "the model"),
                str(each.channels),
                f"{each.mean_moved:.3g}",
                f"{each.variance_moved:.4g}",
                _number(each.mean_error, ".2g"),
            ]
            for each in found.layers
        ],
        range(1, 5),
        "layers",
    )
    if found.skipped:
        yield _list(
            f"Left as it is: {_text(name or 'the model')} ({_text(of)}), {_text(why)}."
            for name, of, why in found.skipped
        )


def _notes(report: SweepReport, said: Said) -> Iterator[str]:
    yield _list(map(said, report.notes)) if report.notes else "<p>None.</p>"


def _done(report: SweepReport, background: Background) -> Iterator[str]:
    facts = {
        "Inputs": ", ".join(report.paths) if report.options else ", ".join(report.checkpoints),
        "Candidates": f"{len(report.candidates)}, and {len(report.refused)} that cannot be made",
        "Evaluations": f"{report.evaluations}, and {report.reused} known from before",
        "Scored by": _plain(background.evaluation),
        "Reported on": "the same data"
        if background.test is None and background.holdout is None
        else f"{background.holdout[0]:g} of the samples, drawn by seed {background.holdout[1]}"
        if background.holdout is not None
        else _plain(background.test or {}),
        "BatchNorm statistics": "measured before every score" if report.recalibrated else "those of the candidates",
        "For the candidates": f"{report.bytes_read:,} bytes read, {report.bytes_written:,} bytes written",
        "All results": report.results,
        "The best": f"written to {report.out}" if report.written else "not written",
        "Versions": ", ".join(_versions()),
    }
    yield "<dl>" + "".join(f"<dt>{name}</dt><dd>{_text(fact)}</dd>" for name, fact in facts.items()) + "</dl>"


def _plain(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items() if value not in (None, False, {}))


def _versions() -> Iterator[str]:
    yield f"ckpt-tools {__version__}"
    yield f"torch {torch.__version__}"
    if no_matplotlib() is None:
        yield f"matplotlib {version('matplotlib')}"
    yield f"Python {platform.python_version()}"
