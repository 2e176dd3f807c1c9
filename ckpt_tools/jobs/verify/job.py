"""The job: the checks of a checkpoint, in order, and the report of them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...compute.progress import uncounted
from ...compute.threads import check_threads
from ...errors import CkptError, UsageError
from ...formats import read_header
from ...formats.header import Header
from ...series.paths import as_path, folder_of_index, one_checkpoint, shown
from ...storage.source import store_of
from ..option_groups import takes
from ..options import Reading, Verification
from ..reports import Report
from . import file
from .check import FAILED, Check
from .origin import origin


@dataclass(frozen=True, slots=True, repr=False)
class VerifyReport(Report):
    """What came of verifying one checkpoint.

    Attributes:
        path: the file or folder.
        format: of the checkpoint; empty if it cannot be read.
        checks: in the order in which they were made.
        sample: share of the output that was made again, more than 0 and at most 1.
        seed: of the sample; None if all of it was made again.
    """

    path: str
    format: str
    checks: tuple[Check, ...]
    sample: float = 1.0
    seed: int | None = None

    @property
    def passed(self) -> bool:
        """True if no check has failed."""
        return not self.count(FAILED)

    def count(self, result: str) -> int:
        """Return the number of checks with this result: ``ok``, ``failed`` or ``not checked``."""
        return sum(check.result == result for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {"passed": self.passed} | asdict(self)


@takes(Verification, Reading)
def verify(path: str | Path, asked: Verification, running: Reading) -> VerifyReport:
    """Check that a checkpoint is whole, and that an output is what its record says; in bounded memory.

    What a file holds never raises an error here: it is the result of a check. Nothing in it is run, and `torch.load`
    sees only a file whose pickle was read before.

    Args:
        path: a file or folder.
        {options}

    Returns:
        The result of each check.

    Raises:
        UsageError: an option is invalid.
    """
    check_threads(running.threads)
    share = _share(asked.sample)
    seed = random.SystemRandom().randrange(1 << 32) if asked.seed is None else asked.seed
    if asked.inputs is not None:
        folder = as_path(asked.inputs)
        if not store_of(folder).is_folder(folder):
            raise UsageError(f"`inputs`: {shown(asked.inputs)} is no folder.")
    place = as_path(path)
    try:
        place = folder_of_index(one_checkpoint(path))
        header = read_header(place)
    except UsageError:
        raise
    except CkptError as error:
        said = str(error).removeprefix(f"{place}: ")
        return VerifyReport(str(place), "", (Check("structure", FAILED, said),), share)
    checks = tuple(_checks(header, asked, running, share, seed))
    return VerifyReport(str(header.path), header.format.name, checks, share, None if share == 1 else seed)


def _checks(header: Header, asked: Verification, running: Reading, share: float, seed: int) -> Iterator[Check]:
    yield file.structure(header)
    if asked.expect_sha256 is not None:
        yield file.digest(header, asked.expect_sha256, running.on_progress)
    yield file.zip_checksums(header, running.on_progress)
    yield from file.tensors(header, asked, running)
    with uncounted(running.on_progress, "loading the checkpoint"):
        loaded = file.loads(header)
    yield loaded
    yield from origin(header, asked, running, share, seed)


def _share(sample: object) -> float:
    """Read a share such as 1%.

    Raises:
        UsageError: it is none, or not more than 0 and at most 100 %.
    """
    if sample is None:
        return 1.0
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*%", str(sample))
    if match is None or not 0 < float(match[1]) <= 100:
        raise UsageError(f"`sample={sample!r}`: a part of the output, more than 0% and at most 100%, such as 1%.")
    return float(match[1]) / 100
