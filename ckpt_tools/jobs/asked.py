"""What a process is asked to do of a job that several share, or that goes on after a kill.

`share.py` does it; this module is imported by every job, and is small.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from ..errors import UsageError
from .options import Sharing

MOST_PARTS = 100_000
COMMAND: list[str] = []
"""The command line, without what says which part to do, if this process is one of `ckpt`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a process is asked to do of a job.

    Attributes:
        index, count: part `index` of `count`, from 1 on.
        finish: publish what all parts have done, and do none.
        resume: do all that is not done, and publish.
        together: torchrun started all parts; the first one publishes when all are done.
    """

    index: int = 1
    count: int = 1
    finish: bool = False
    resume: bool = False
    together: bool = False

    @property
    def publishes(self) -> bool:
        """True if the target is there at the end, and this process reports that."""
        return self.finish or self.resume or (self.together and self.index == 1)

    @property
    def silent(self) -> bool:
        """True if another process reports."""
        return self.together and self.index > 1

    def refuse(self, why: str, **options: object) -> None:
        """Refuse options that do not go with parts.

        Raises:
            UsageError: one of them is given.
        """
        if not self.resume:
            for name, value in options.items():
                if value:
                    asked = "several processes" if self.together else "`finish`" if self.finish else "`part`"
                    raise UsageError(f"`{name}` does not go with {asked}: {why}")


def asked_of(sharing: Sharing, **hashed: object) -> Asked | None:
    """Read the options; None if the job is not shared.

    Args:
        hashed: options for which all inputs are read once more.

    Raises:
        UsageError: they are wrong, or do not go together.
    """
    asked = _parsed(sharing)
    if asked is not None:
        asked.refuse("every part would read all inputs once more. Leave it out, or use `resume`.", **hashed)
    return asked


def _parsed(sharing: Sharing) -> Asked | None:
    given = [name for name in ("part", "finish", "resume") if vars(sharing)[name] not in (None, False)]
    if len(given) > 1:
        raise UsageError(
            f"`{given[0]}` and `{given[1]}` do not go together: run all parts with `part`, each of which goes on where "
            "it stopped, then `finish`; or one process with `resume`."
        )
    if sharing.part is None:
        return Asked(finish=sharing.finish, resume=sharing.resume) if given else _of_torchrun()
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", str(sharing.part))
    index, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= index <= count <= MOST_PARTS:
        raise UsageError(
            f"`part={sharing.part!r}`: write i/n, part i of n with i from 1 to n, such as `part='1/4'` to `part='4/4'`."
        )
    return Asked(index, count)


def _of_torchrun() -> Asked | None:
    """Return the part of a process that torchrun started with others; None for any other."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    from ..batchnorm.processes import started_by_torchrun  # takes torch

    if not started_by_torchrun():
        return None
    return Asked(int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"]), together=True)
