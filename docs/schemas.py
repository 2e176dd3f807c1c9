"""Writes docs/schemas/COMMAND.json: what a command prints with --json, as JSON Schema (draft 2020-12).

They are made of the reports, whose docstrings describe each field; `make generated` writes them, and a test compares.
No object has other keys than those listed, so that none is added without its line here.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import ckpt_tools
from ckpt_tools import (
    BatchNormReport,
    DiffReport,
    InspectReport,
    PrefixReport,
    RecalibrationReport,
    StripReport,
    VerifyReport,
)
from ckpt_tools.jobs.inspect import WeightSet
from ckpt_tools.jobs.listing import Listing

FOLDER = Path(__file__).parent / "schemas"
REPORTS = {
    "avg": ckpt_tools.AverageReport,
    "card": ckpt_tools.CardReport,
    "clean": ckpt_tools.CleanReport,
    "convert": ckpt_tools.ConvertReport,
    "diff": ckpt_tools.DiffReport,
    "eval": ckpt_tools.EvaluationReport,
    "fix-prefix": ckpt_tools.PrefixReport,
    "look": ckpt_tools.LookReport,
    "recal-bn": ckpt_tools.RecalibrationReport,
    "sweep": ckpt_tools.SweepReport,
    "tune": ckpt_tools.TuneReport,
}
"""Command to the report that it prints."""
VERDICTS = ("identical", "equal", "within tolerance", "different", "incomplete")
COMPUTED: dict[Any, dict[str, Any]] = {
    DiffReport: {"verdict": Literal[VERDICTS], "max_abs": float, "max_rel": float, "nonfinite": int},
    PrefixReport: {"changed": bool},
    VerifyReport: {"passed": bool},
}
"""What `to_dict` adds to the fields."""
OPTIONAL = {(WeightSet, "tensors")}
"""What only some option shows: ``inspect --tensors``."""


def schemas() -> dict[str, str]:
    """Return the text of each file by its name."""
    made = {f"{command}.json": _schema(f"ckpt {command} --json", report) for command, report in REPORTS.items()}
    each: dict[str, Any] = {}
    checked = _of(VerifyReport, each)
    whole = _closed({"passed": _of(bool, each), "checkpoints": {"type": "array", "items": checked}})
    made["verify.json"] = _file("ckpt verify --json", whole, each)
    each = {}
    whole = _closed({"checkpoints": {"type": "array", "items": _of(StripReport, each)}})
    made["strip.json"] = _file("ckpt strip --json", whole, each)
    each = {}
    made["inspect.json"] = _file("ckpt inspect --json", {"anyOf": [_of(InspectReport, each), _of(Listing, each)]}, each)
    error = _closed({"type": _of(str, each), "message": _of(str, each), "exit_code": _of(int, each)})
    made["error.json"] = _file("any command with --json that fails", _closed({"error": error}), {})
    layout = _closed({"name": _of(str, each), "about": _of(str, each), "written": _of(bool, each)})
    made["convert-list.json"] = _file("ckpt convert --list --json", {"type": "array", "items": layout}, {})
    return made


def _schema(title: str, report: Any) -> str:
    known: dict[str, Any] = {}
    _of(report, known)
    return _file(title, known.pop(report.__name__), known)


def _file(title: str, schema: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return json.dumps(head | schema | ({"$defs": known} if known else {}), indent=2, ensure_ascii=False) + "\n"


def _closed(properties: Mapping[str, Any], optional: Sequence[str] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _of(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type.

    Args:
        known: receives the dataclasses in it, by name.
    """
    origin, own = get_origin(kind), get_args(kind)
    plain = {str: "string", int: "integer", bool: "boolean", NoneType: "null"}
    if kind in plain:
        return {"type": plain[kind]}
    if kind is float:
        return {"type": ["number", "null"]}  # JSON has neither NaN nor infinity
    if kind in (Any, object):
        return {}
    if origin is Literal:
        return {"enum": [*own]}
    if origin in (Union, UnionType):
        return _either([_of(each, known) for each in own])
    if origin is tuple and own[-1] is not Ellipsis:
        items = [_of(each, known) for each in own]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(own), "maxItems": len(own)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _of(own[1], known)}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": _of(own[0], known)}
    if is_dataclass(kind):
        if kind.__name__ not in known:
            known[kind.__name__] = {}  # its place
            known[kind.__name__] = _object(kind, known)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    raise TypeError(f"no schema for {kind}")


def _either(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if all(each.keys() == {"type"} for each in schemas):
        types = [
            name for each in schemas for name in ([each["type"]] if isinstance(each["type"], str) else each["type"])
        ]
        return {"type": [*dict.fromkeys(types)]}
    return {"anyOf": schemas}


def _object(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a dataclass, with the words of its docstring."""
    hints = get_type_hints(kind, localns=vars(inspect.getmodule(kind)) | _REPORTS)
    words = _described(kind)
    named = {each.name: hints[each.name] for each in fields(kind) if each.repr} | COMPUTED.get(kind, {})
    properties = {
        name: _of(hint, known) | ({"description": words[name]} if name in words else {}) for name, hint in named.items()
    }
    return _closed(properties, [name for name in named if (kind, name) in OPTIONAL])


_REPORTS = {each.__name__: each for each in (BatchNormReport, RecalibrationReport)}


def _described(kind: Any) -> dict[str, str]:
    """Return what a docstring says of each attribute."""
    block = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    entries = re.split(r"\n(?=[\w, ]+: )", textwrap.dedent(block))
    pairs = (" ".join(entry.split()).partition(": ") for entry in entries if entry)
    return {name: text for names, _, text in pairs for name in names.split(", ")}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / name).write_text(text)
