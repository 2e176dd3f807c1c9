"""Results of a sweep: a file with a line for each evaluation, so that a sweep that was stopped goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ReadError, WriteError
from ...series.member import Member

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
    terms = [
        [[[stamp.path.name, stamp.nbytes, repr(stamp.identity)] for stamp in member.header.files], coefficient.hex()]
        for member, coefficient in zip(members, coefficients, strict=True)
    ]
    return hashlib.sha256(json.dumps([terms, evaluation], sort_keys=True).encode()).hexdigest()


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
        try:
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        except OSError as error:
            raise ReadError(f"{self.path}: cannot be read ({error.strerror}).") from error
        for line in lines:
            try:
                result = _read(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                self.torn += 1
                continue
            self._known[result.key] = result

    def get(self, key: str) -> Result | None:
        """Return a result with its samples, if there is one that did not fail."""
        result = self._known.get(key)
        return None if result is None or result.error is not None else self._with_samples(result)

    def every(self) -> list[Result]:
        """Return all results that did not fail, with their samples, in the order in which they came."""
        return [self._with_samples(each) for each in self._known.values() if each.error is None]

    def add(self, result: Result) -> None:
        """Append a result, and wait until it is on the disk.

        Raises:
            WriteError: the system refuses.
        """
        record = {name: getattr(result, name) for name in result.__dataclass_fields__ if name != "samples"}
        try:
            if result.samples:
                self._samples.mkdir(exist_ok=True)
                data = {name: values.tolist() for name, values in result.samples.items()}
                _write_whole(self._samples / f"{result.key[:24]}.json", json.dumps(data).encode())
            # A line that a kill has cut off ends here, so that this one is whole.
            before = b"\n" if self.torn and not self._ends_whole() else b""
            with self.path.open("ab") as file:
                file.write(before + json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror}).") from error
        self._known[result.key] = result

    def _ends_whole(self) -> bool:
        return self.path.read_bytes().endswith(b"\n")

    def _with_samples(self, result: Result) -> Result:
        path = self._samples / f"{result.key[:24]}.json"
        try:
            data = json.loads(path.read_bytes())
            samples = {name: torch.tensor(values, dtype=torch.float64) for name, values in data.items()}
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError):
            return result
        return Result(**{name: getattr(result, name) for name in result.__dataclass_fields__} | {"samples": samples})


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


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder.

    Raises:
        WriteError: one is at work in it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise WriteError(
            f"{folder}: cannot be used ({error.strerror}). Choose another place with `scratch`."
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WriteError(f"{folder}: another sweep is at work here. Choose another place with `scratch`.") from None
        yield
    finally:
        os.close(lock)
