"""Provenance: the record in an output of its inputs and options."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .. import __version__
from ..errors import LayoutError
from ..formats.header import Header
from ..series.shards import refuse_part
from ..series.usable import Skipped

_MOST = 1 << 63
_LONGEST = 4096
"""Characters of a path that systems take."""


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint of the average.

    Attributes:
        path: the file or folder.
        name: a short name, distinct within the series.
        step: training step, or epoch; None if unknown.
        coefficient: its weight in the sum.
        state: the set of weights, such as ``ema (state_dict_ema)``.
        nbytes: size on disk.
        prefixes: wrapper prefixes that were removed from its names.
        sha256: of each of its files; empty unless `hash` was given.
    """

    path: str
    name: str
    step: int | None
    coefficient: float
    state: str
    nbytes: int
    prefixes: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """What an average records of itself, checked.

    Attributes:
        path: of the average.
        version: of ckpt-tools.
        mode: the schedule.
        arguments: the options that were not at their defaults.
        state: label of the set of weights in the last input.
        inputs: oldest first; `path` and `state` are not recorded for each, and are `name` and that of the last.
        counter: what the steps are, see `Member`; None if it is not recorded.
        places: dotted paths of the average in a file that nests; empty if they are not recorded.
        updates: how many times inputs were added to it after it was written.
        ratios: of Model Stock: tensor to the coefficients of all inputs but the first together; else empty.
        measured_on: the data of its BatchNorm statistics; None if they are averaged like all else.
        skipped: checkpoints that were left out; `reason` is not recorded, and is their `kind`.
    """

    path: Path
    version: str
    mode: str
    arguments: Mapping[str, Any]
    state: str
    inputs: tuple[Input, ...]
    counter: str | None
    places: tuple[str, ...]
    updates: int
    ratios: Mapping[str, float]
    measured_on: str | None = None
    skipped: tuple[Skipped, ...] = ()

    @property
    def which(self) -> str:
        """``raw``, ``ema``, ``eval``, or the dotted path of the set of weights."""
        return self.state.split(" (")[0]


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """What an output that was made of one checkpoint records of itself, checked.

    Attributes:
        path: of the output.
        version: of ckpt-tools.
        command: that made it.
        arguments: the options that were not at their defaults.
        state: label of the weights.
        input: the checkpoint; its step and coefficient mean nothing.
    """

    path: Path
    version: str
    command: str
    arguments: Mapping[str, Any]
    state: str
    input: Input

    @property
    def which(self) -> str:
        """As `Record.which`; ``auto`` for several sets of weights."""
        return "auto" if " and " in self.state else self.state.split(" (")[0]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct names; outputs do not record the folders above them."""
    # A record has no name that begins at the root, or leads out of a folder.
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]  # noqa: PTH100 - follows no link
    depth = 1
    while True:
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names) or depth > max(map(len, parts)):
            return names
        depth += 1


def provenance(command: str, arguments: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Return a record of the command, its arguments (without those that are None), and further facts."""
    return {
        "tool": "ckpt-tools",
        "version": __version__,
        "command": command,
        "arguments": provided(arguments),
        **facts,
    }


def input_record(header: Header) -> dict[str, Any]:
    """Return a record of the one checkpoint that an output is made of, with what that records of itself."""
    made = header.provenance
    if made is not None:
        made = {
            key: value for key, value in made.items() if key != "checksums"
        }  # of tensors that are not in the output
    return {"name": header.path.name, "size": header.nbytes, "made": made}


def provided(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not None."""
    return {key: value for key, value in arguments.items() if value is not None}


def averaged_inputs(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Return a record of the checkpoints of an average and their coefficients."""
    return [
        {"name": i.name, "size": i.nbytes, "step": i.step, "coefficient": i.coefficient}
        | ({"sha256": dict(i.sha256)} if i.sha256 else {})
        for i in inputs
    ]


def skipped_inputs(skipped: Sequence[Skipped]) -> list[dict[str, str]]:
    """Return a record of the checkpoints that were left out, and why."""
    names = short_names([Path(each.path) for each in skipped])
    return [{"name": name, "reason": each.kind} for name, each in zip(names, skipped, strict=True)]


@dataclass(frozen=True, slots=True)
class Origin:
    """What an output was made of, as far as its record says; a file of unknown origin may say anything.

    Attributes:
        averaged: number of checkpoints that it is the average of; None if it is no average.
        measured: its BatchNorm statistics were measured, after it was averaged.
        tuned: it was trained afterwards.
    """

    averaged: int | None = None
    measured: bool = False
    tuned: bool = False

    @property
    def words(self) -> str:
        """``average of 5, recalibrated``; ``checkpoint`` if nothing else is known."""
        what = "checkpoint" if self.averaged is None else f"average of {self.averaged}"
        return what + ", recalibrated" * self.measured + ", tuned" * self.tuned


def origin_of(made: Any) -> Origin:
    """Return what an output was made of: the record of the output, or that of what it was made of, and so on."""
    measured = tuned = False
    while isinstance(made, dict):
        command, inputs, source = made.get("command"), made.get("inputs"), made.get("input")
        measured |= command == "recal-bn" or isinstance(made.get("recalibrated"), dict)
        tuned |= command == "tune"
        if command == "avg" and isinstance(inputs, list) and len(inputs) > 1:
            return Origin(len(inputs), measured, tuned)
        made = source.get("made") if isinstance(source, dict) else None
    return Origin(None, measured, tuned)


def read_record(header: Header) -> Record:
    """Read what an average records of itself; a file of unknown origin may say anything.

    Raises:
        LayoutError: `ckpt avg` did not write it, or the record is damaged.
        SeriesError: it is a part of an average.
    """
    path, made = header.path, header.provenance
    refuse_part(path)
    if made is None:
        raise LayoutError(
            f"{path}: has no record of ckpt-tools, so it is not known what it was made of. Only averages by ckpt-tools "
            "have one."
        )
    command = made.get("command")
    if command != "avg":
        source = made.get("input")
        name = source.get("name") if isinstance(source, dict) else None
        of = f" from {name}" if isinstance(name, str) else ""
        raise LayoutError(
            f"{path}: was written by 'ckpt {command}'{of}, and is not the average as it was made. Give the average "
            "itself, then do that again with the result."
        )
    return average_record(path, made)


def average_record(path: Path, made: Mapping[str, Any]) -> Record:
    """Read the record of an average, which is that of the file or of what it was made of.

    Raises:
        LayoutError: it is damaged.
    """
    try:
        return _record(path, made)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(path, made, error, "Average the checkpoints themselves instead.") from error


def read_source_record(header: Header) -> SourceRecord:
    """Read what an output of one checkpoint records of itself; a file of unknown origin may say anything.

    Raises:
        LayoutError: the record is damaged.
    """
    path, made = header.path, header.provenance or {}
    try:
        command, arguments, state, source = made["command"], made["arguments"], made["state"], made["input"]
        if not isinstance(command, str) or not isinstance(arguments, dict) or not isinstance(state, str):
            raise ValueError("its 'command', 'arguments' or 'state' is of the wrong type")
        if not isinstance(source, dict):
            raise ValueError("its 'input' is no object")
        wanted = _input({"step": None, "coefficient": 1.0, "name": source["name"], "size": source["size"]}, state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(path, made, error, "Make it again from the checkpoint itself.") from error
    return SourceRecord(path, str(made.get("version")), command, arguments, state, wanted)


def _damaged(path: Path, made: Mapping[str, Any], error: Exception, advice: str) -> LayoutError:
    return LayoutError(
        f"{path}: its record is damaged, or of another version of ckpt-tools ({made.get('version')}): "
        f"{_fault(error)}. {advice}"
    )


def _fault(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _record(path: Path, made: Mapping[str, Any]) -> Record:
    arguments, state = made["arguments"], made["state"]
    if not isinstance(arguments, dict) or not all(_is_argument(*each) for each in arguments.items()):
        raise ValueError("its 'arguments' are no options")
    if not isinstance(made["mode"], str) or not isinstance(state, str):
        raise ValueError("its 'mode' or 'state' is no text")
    if not isinstance(made["inputs"], list) or not made["inputs"]:
        raise ValueError("its 'inputs' are no list")
    counter, places, updates = made.get("counter"), made.get("places", []), made.get("updates", 0)
    if not (counter is None or isinstance(counter, str)) or not _is_whole(updates):
        raise ValueError("its 'counter' or 'updates' is of the wrong type")
    if not isinstance(places, list) or not all(isinstance(each, str) for each in places):
        raise ValueError("its 'places' are no list of names")
    recalibrated = made.get("recalibrated")
    if not (recalibrated is None or (isinstance(recalibrated, dict) and isinstance(recalibrated.get("data"), str))):
        raise ValueError("its 'recalibrated' is no measurement")
    return Record(
        path=path,
        version=str(made.get("version")),
        mode=made["mode"],
        arguments=arguments,
        state=state,
        inputs=tuple(_input(each, state) for each in made["inputs"]),
        counter=counter,
        places=tuple(places),
        updates=updates,
        ratios=_ratios(made.get("ratios", {})),
        measured_on=None if recalibrated is None else recalibrated["data"],
        skipped=_skipped(made.get("skipped", [])),
    )


def _skipped(said: Any) -> tuple[Skipped, ...]:
    found = []
    for each in said if isinstance(said, list) else [None]:
        name, kind = (each.get("name"), each.get("reason")) if isinstance(each, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(kind, str):
            raise ValueError("its 'skipped' are no names with reasons")
        found.append(Skipped(name, kind, kind))
    return tuple(found)


def _ratios(said: Any) -> dict[str, float]:
    if not isinstance(said, dict) or not all(isinstance(t, (int, float)) and 0 <= t <= 1 for t in said.values()):
        raise ValueError("its 'ratios' are no numbers from 0 to 1")
    return {str(name): float(t) for name, t in said.items()}


def _input(said: Any, state: str) -> Input:
    if not isinstance(said, dict):
        raise ValueError("an input is no object")
    name, size, step, coefficient = said["name"], said["size"], said["step"], said["coefficient"]
    sha256 = said.get("sha256", {})
    if not isinstance(name, str) or "\0" in name or PurePosixPath(name).is_absolute() or not _is_below(name):
        raise ValueError(f"{name!r} is no name of an input")
    if not _is_whole(size) or not (step is None or _is_whole(step)):
        raise ValueError(f"the size or the step of {name} is no whole number")
    if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)) or not math.isfinite(coefficient):
        raise ValueError(f"the coefficient of {name} is no number")
    if not isinstance(sha256, dict) or not all(_is_digest(value) for value in sha256.values()):
        raise ValueError(f"the SHA-256 of {name} is none")
    return Input(
        path=name, name=name, step=step, coefficient=float(coefficient), state=state, nbytes=size, sha256=sha256
    )


def _is_argument(name: str, value: Any) -> bool:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        return True
    return name != "state" and isinstance(value, (int, float)) and -_MOST < value < _MOST


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_below(name: str) -> bool:
    """True for a path that stays in the folder that it is looked for in."""
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and len(name) < _LONGEST


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
