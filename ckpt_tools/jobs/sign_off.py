"""Sign-off: a statement of which files an output was made of, and how, for other tools to sign.

It is an in-toto Statement v1 (https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md) with the predicate
of SLSA provenance v1 (https://slsa.dev/spec/v1.0/provenance). Nothing is signed here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__
from ..compute.hashes import file_hashes
from ..compute.progress import HASHING_OUTPUT, Progress, counted
from ..compute.work_units import OutFile
from ..errors import CorruptError, UsageError, WriteError
from ..storage.source import Stamp, stamp_at
from ..storage.staged import same_file, write_file
from .assembly import Assembly
from .checksums import BLOCK, CHECKSUMS, read_back
from .outputs import check_target, named
from .provenance import short_names

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILDER = "pkg:pypi/ckpt-tools"
"""The builder, as a package URL: who runs it is for the signature to say."""


def check_sign_off(path: Path, assembly: Assembly, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse a place for a statement before any work is done.

    Raises:
        UsageError: it is the output, or inside it.
        WriteError: see `check_target`.
    """
    target, place = assembly.target.absolute(), path.absolute()
    if place == target or target in place.parents or same_file(place, target):
        raise UsageError(f"`sign_off`: {path} would be in the place of the output {assembly.target}, or inside it.")
    with named("sign_off"):
        check_target(path, inputs, nbytes=0, force=force, names=None)


@dataclass(frozen=True, slots=True)
class SignOff:
    """A statement that is asked for.

    Attributes:
        path: where it goes.
        inputs: stamps of the input files, taken when their headers were read.
    """

    path: Path
    inputs: Sequence[Stamp]

    def begun(self, assembly: Assembly, on_progress: Progress | None) -> Statement:
        """Hash the inputs, before they are read for the output: that checks again that they have not changed.

        Args:
            assembly: the output, whose companions are inputs, too.
            on_progress: called with (what is done, bytes hashed, bytes in all).

        Raises:
            ReadError: one cannot be read, or has changed since its stamp was taken.
        """
        known = {stamp.path: stamp for stamp in (*self.inputs, *map(stamp_at, assembly.companions))}
        started = datetime.now(timezone.utc)
        hashes = file_hashes(known, on_progress)
        for path, stamp in known.items():
            if stamp_at(path) != stamp:
                raise _changed(path)
        return Statement(self.path, hashes, started)


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement in the making.

    Attributes:
        path: where it goes.
        inputs: SHA-256 of all files by path.
        outputs: SHA-256 of all files by name.
        started: when the work began.
        record: the provenance in the output.
    """

    path: Path
    inputs: Mapping[Path, str]
    started: datetime
    outputs: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def about(self, assembly: Assembly, outputs: Sequence[OutFile], on_progress: Progress | None) -> Statement:
        """Return it with the digests of files that are complete, and not yet in their place.

        Args:
            on_progress: called with (what is done, bytes hashed, bytes in all).

        Raises:
            WriteError: one cannot be read.
            CorruptError: a companion has changed before it was copied.
        """
        record = {} if assembly.writing is None else assembly.writing.provenance or {}
        names = [
            f"{assembly.target.name}/{out.plan.name}" if assembly.folder else assembly.target.name for out in outputs
        ]
        found = dict(zip(names, _digests(outputs, on_progress), strict=True))
        for path in assembly.companions:
            if found[f"{assembly.target.name}/{path.name}"] != self.inputs[path]:
                raise _changed(path)
        return replace(self, outputs=found, record=record)

    def to_dict(self) -> dict[str, Any]:
        """Return it as the specifications have it; what else is recorded are internal parameters."""
        apart = ("tool", "version", "command", "arguments", CHECKSUMS)
        command = self.record["command"]
        inputs = dict(zip(short_names([*self.inputs]), self.inputs.values(), strict=True))
        invocation = {"command": command, "arguments": self.record["arguments"], "inputs": [*inputs]}
        finished = datetime.now(timezone.utc)
        return {
            "_type": STATEMENT,
            "subject": _resources(self.outputs),
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": f"{BUILDER}#{command}/v1",
                    "externalParameters": invocation,
                    "internalParameters": {key: each for key, each in self.record.items() if key not in apart},
                    "resolvedDependencies": _resources(inputs),
                },
                "runDetails": {
                    "builder": {"id": BUILDER, "version": {"ckpt-tools": __version__}},
                    "metadata": {"startedOn": _time(self.started), "finishedOn": _time(finished)},
                },
            },
        }

    def write(self, target: Path, *, force: bool) -> None:
        """Write it, whole or not at all; the output is in its place.

        Raises:
            WriteError: it cannot be written.
        """
        try:
            with named("sign_off"):
                text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
                write_file(self.path, f"{text}\n".encode(), force=force)
        except WriteError as error:
            raise WriteError(f"{target} is complete, but its sign-off is not written: {error}") from error


def _changed(path: Path) -> CorruptError:
    return CorruptError(f"{path}: changed while it was read. Try again when it is whole.")


def _digests(outputs: Sequence[OutFile], on_progress: Progress | None) -> list[str]:
    tell = counted(on_progress, HASHING_OUTPUT, sum(out.plan.size for out in outputs))
    found, done, block = [], 0, memoryview(bytearray(BLOCK))
    for out in outputs:
        hasher = hashlib.sha256()
        for part in read_back(out, 0, out.plan.size, block):
            hasher.update(part)
            done += len(part)
            if tell is not None:
                tell(done)
        found.append(hasher.hexdigest())
    return found


def _resources(digests: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "digest": {"sha256": digest}} for name, digest in digests.items()]


def _time(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
