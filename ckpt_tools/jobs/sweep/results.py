"""Results of a sweep: a file with a line for each evaluation, so that a sweep that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ReadError
from ...series.member import Member
from ...storage.journal import append, make_folder
from ...storage.staged import write_file

RESULTS = "results.jsonl"
"""Name of the file."""
_SAMPLES = "samples"


@dataclass(frozen=True, slots=True)
class Result:
    """What a candidate scored.

    Attributes:
        key: a digest of its checkpoints, its coefficients and the evaluation.
        label: of the candidate.
        checkpoints, coefficients: which, and how much each counts.
        metrics: name to value; empty if the evaluation failed.
        seconds: that the evaluation took.
        error: why it failed; None if it did not.
        samples: metric to its value for each sample, float64 [N].
    """

    key: str
    label: str
    checkpoints: tuple[str, ...]
    coefficients: tuple[float, ...]
    metrics: Mapping[str, float]
    seconds: float
    error: str | None = None
    samples: Mapping[str, Tensor] = field(default_factory=dict)


def key_of(members: Sequence[Member], coefficients: Sequence[float], evaluation: Mapping[str, Any]) -> str:
    """Return the key of a candidate and its evaluation: other files, numbers or data have another one.

    Files are known by name, size and what tells their state, such as the time of change.
    """
    terms = [[files_of(m), coefficient.hex()] for m, coefficient in zip(members, coefficients, strict=True)]
    return digest([terms, evaluation])


def files_of(member: Member) -> list[Any]:
    """Return what tells the files of a checkpoint, and their state, as plain data."""
    return [[stamp.path.name, stamp.nbytes, repr(stamp.identity)] for stamp in member.header.files]


def digest(data: Any) -> str:
    """Return a digest of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class Results:
    """The results in a folder; a failed evaluation counts for nothing, and is tried again.

    Attributes:
        path: of the file.
        torn: lines that could not be read, as one is that was being written when a sweep was killed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS
        self._samples = folder / _SAMPLES
        self.torn = 0
        self._known: dict[str, Result] = {}
        self._sampled: set[str] = set()  # keys of those that have values of samples
        try:
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        except OSError as error:
            raise ReadError(f"{self.path}: cannot be read ({error.strerror}).") from error
        for line in lines:
            try:
                record = json.loads(line)
                self._know(_read(record), sampled=bool(record["sampled"]))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                self.torn += 1

    def get(self, key: str) -> Result | None:
        """Return a result with its samples, if there is one that did not fail."""
        result = self._known.get(key)
        return None if result is None or result.error is not None else self._with_samples(result)

    def every(self) -> list[Result]:
        """Return all results that did not fail, with their samples, in the order in which they came."""
        found = [self.get(key) for key in self._known]
        return [each for each in found if each is not None]

    def add(self, result: Result) -> None:
        """Append a result, and wait until it is on the disk.

        Raises:
            WriteError: the system refuses.
        """
        record = {name: getattr(result, name) for name in result.__dataclass_fields__ if name != "samples"}
        if result.samples:
            data = {name: values.tolist() for name, values in result.samples.items()}
            make_folder(self._samples)
            write_file(self._path_of_samples(result), json.dumps(data).encode(), force=True, internal=True)
        append(self.path, json.dumps({**record, "sampled": bool(result.samples)}).encode())
        self._know(result, sampled=bool(result.samples))

    def _know(self, result: Result, *, sampled: bool) -> None:
        self._known[result.key] = result
        (self._sampled.add if sampled else self._sampled.discard)(result.key)

    def _path_of_samples(self, result: Result) -> Path:
        return self._samples / f"{result.key[:24]}.json"

    def _with_samples(self, result: Result) -> Result | None:
        """Return a result with its samples; None if they are lost."""
        if result.key not in self._sampled:
            return result
        try:
            data = json.loads(self._path_of_samples(result).read_bytes())
            samples = {str(name): torch.tensor(values, dtype=torch.float64) for name, values in data.items()}
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError):
            return None
        return replace(result, samples=samples)


def _read(record: Any) -> Result:
    metrics = {str(name): float(value) for name, value in record["metrics"].items()}
    if not all(map(math.isfinite, metrics.values())) or (record["error"] is None and not metrics):
        raise ValueError("a result without numbers")
    return Result(
        key=str(record["key"]),
        label=str(record["label"]),
        checkpoints=tuple(record["checkpoints"]),
        coefficients=tuple(map(float, record["coefficients"])),
        metrics=metrics,
        seconds=float(record["seconds"]),
        error=None if record["error"] is None else str(record["error"]),
    )
