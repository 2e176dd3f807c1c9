"""Shown: a dataclass as one line, and as HTML for a notebook; both stay short whatever it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from ..errors import shortened

_ROWS = 50
"""Rows of a table that are shown."""
_TEXT = 200
"""Characters of a text that are shown."""
_OPEN = ' open="open"'
"""Attribute of a list that a reader should see at once."""


def one_line(report: Any) -> str:
    """Return a dataclass as one line: lists and tables by their lengths, and nothing that is empty.

    Example:
        >>> one_line(report)
        "AverageReport(inputs=<12>, mode='ema', averaged=<160>, out='averaged.pth', bytes_read=885400, written=True)"
    """
    parts = [f"{name}={_brief(value)}" for name, value in _facts(report)]
    return f"{type(report).__name__}({', '.join(parts)})"


def as_html(report: Any) -> str:
    """Return a dataclass as HTML: a table of its facts, and a table that opens for each list in it.

    All text is escaped, for names come from files of unknown origin.
    """
    facts, lists = [], []
    for name, value in _facts(report):
        if _length(value) is None:
            facts.append((name, as_html(value) if is_dataclass(value) else _text(value)))
        else:
            summary = f"<summary>{_escaped(name)} ({_length(value)})</summary>"
            lists.append(f"<details{_OPEN if name == 'notes' else ''}>{summary}{_table(_rows(value))}</details>")
    return f"<div><b>{_escaped(type(report).__name__)}</b>{_table([dict(facts)], across=False)}{''.join(lists)}</div>"


def _facts(report: Any) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass that say something, with their values."""
    own = [(each.name, getattr(report, each.name)) for each in fields(report) if each.repr]
    return [(name, value) for name, value in own if value is not None and _length(value) != 0 and value != ""]


def _length(value: Any) -> int | None:
    """Return the length of a list or mapping; None for anything else."""
    return len(value) if isinstance(value, (Mapping, Sequence)) and not isinstance(value, (str, bytes)) else None


def _brief(value: Any) -> str:
    if (length := _length(value)) is not None:
        return f"<{length}>"
    if is_dataclass(value):
        return f"{type(value).__name__}(...)"
    return shortened(repr(value), _TEXT)


def _escaped(text: str) -> str:
    from html import escape  # a table of names, which `ckpt` does without

    return escape(text)


def _rows(value: Any) -> list[dict[str, str]]:
    """Return the entries of a list or mapping as rows: column to HTML; one more says how many are left out."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    rows: list[dict[str, str]] = []
    for key, entry in pairs:
        if len(rows) == _ROWS:
            return [*rows, {"": f"... and {len(value) - _ROWS} more"}]
        named = {"": _text(key)} if isinstance(value, Mapping) else {}
        own = {each.name: getattr(entry, each.name) for each in fields(entry)} if is_dataclass(entry) else {" ": entry}
        rows.append(named | {name: _text(each) for name, each in own.items()})
    return rows


def _text(value: Any) -> str:
    """Return a value as HTML."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if (length := _length(value)) is not None and any(
        _length(each) is not None or is_dataclass(each) for each in value
    ):
        return f"&lt;{length}&gt;"
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}: {each}" for key, each in value.items())
    elif length is not None:
        value = ", ".join(map(str, value))
    return _escaped(shortened(f"{value:,}" if type(value) is int else str(value), _TEXT))


def _table(rows: Sequence[Mapping[str, str]], *, across: bool = True) -> str:
    """Return rows as a table, with their names above, or on the left."""
    names = [*dict.fromkeys(name for row in rows for name in row)]
    if across:
        head = "".join(f"<th>{_escaped(name)}</th>" for name in names)
        lines = ["".join(f"<td>{row.get(name, '')}</td>" for name in names) for row in rows]
        lines = [head, *lines] if any(name.strip() for name in names) else lines
    else:
        lines = [
            f"<th>{_escaped(name)}</th>" + "".join(f"<td>{row.get(name, '')}</td>" for row in rows) for name in names
        ]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
