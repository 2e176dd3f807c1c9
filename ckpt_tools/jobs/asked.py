"""What a process is asked to do of a job that several share, or that goes on after a kill.

`share.py` does it; this module is imported by every job, and is small.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .options import SharedComparison, Sharing

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
        step: names the run of torchrun or the step of srun that started all parts; the one that ends last publishes.
            Empty if there is none.
    """

    index: int = 1
    count: int = 1
    finish: bool = False
    resume: bool = False
    step: str = ""

    @property
    def silent(self) -> bool:
        """True if another process shows the plan."""
        return bool(self.step) and self.index > 1

    def refuse(self, why: str, **options: object) -> None:
        """Refuse options that do not go with parts.

        Raises:
            UsageError: one of them is given.
        """
        if not self.resume:
            for name, value in options.items():
                if value:
                    asked = "several processes" if self.step else "`finish`" if self.finish else "`part`"
                    raise UsageError(f"`{name}` does not go with {asked}: {why}")


def asked_of(sharing: Sharing | SharedComparison, **hashed: object) -> Asked | None:
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


def _parsed(sharing: Sharing | SharedComparison) -> Asked | None:
    given = [name for name, value in vars(sharing).items() if value not in (None, False)]
    if len(given) > 1:
        raise UsageError(
            f"`{given[0]}` and `{given[1]}` do not go together: run all parts with `part`, then `finish`"
            + ("; or one process with `resume`." if "resume" in vars(sharing) else ".")
        )
    if sharing.part is None:
        return Asked(finish=sharing.finish, resume=getattr(sharing, "resume", False)) if given else started_together()
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", str(sharing.part))
    index, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= index <= count <= MOST_PARTS:
        raise UsageError(
            f"`part={sharing.part!r}`: write i/n, part i of n with i from 1 to n, such as `part='1/4'` to `part='4/4'`."
        )
    return Asked(index, count)


def started_together() -> Asked | None:
    """Return the part of a process that torchrun or srun started with others; None for any other.

    A call of the library may be that of one of them alone, and is never taken for a part.
    """
    return (_of_srun() or _of_torchrun()) if COMMAND else None


def _of_torchrun() -> Asked | None:
    """Return the part of a process that torchrun started, or a script that sets its variables."""
    index, count = _numbers("RANK", "WORLD_SIZE")
    return Asked(index, count, step=_torchrun_step()) if 1 <= index <= count > 1 else None


def _torchrun_step() -> str:
    """Name a run of torchrun: the same in all its processes, and on one machine another one each time.

    Unless the user names them, all runs are called ``none``; but each has a folder of logs on each machine, where a
    process has FOLDER/attempt_RESTARTS/RANK/error.json. Of several machines each counts restarts of its own.
    """
    run, log = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "ERROR_FILE"))
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    own = str(Path(log).parent.parent) if alone else os.environ.get("MASTER_PORT", "")
    return "torchrun:" + ":".join("".join(each.split()) for each in (run, own))


def _of_srun() -> Asked | None:
    """Return the part of a process that srun itself started; see `srun(1)`, output environment variables.

    A shell that Slurm started, of a batch script or an interactive one, hands its variables on to all that is run in
    it, once or often, on this job or on others: so what counts is if this very process is the task.
    """
    if os.environ.get("SLURM_TASK_PID") != str(os.getpid()):
        return None
    index, count = _task()
    return Asked(index, count, step=_step()) if 1 <= index <= count > 1 else None


def alone_among_tasks() -> int:
    """Return the number of tasks if this process does a job alone that other tasks of srun may do, too; else 0."""
    index, count = _task()
    special = os.environ.get("SLURM_STEP_ID", "").rjust(10, "0") >= _SPECIAL  # a shell
    return count if 1 <= index <= count > 1 and not special and "SLURM_PTY_PORT" not in os.environ else 0


_SPECIAL = "4294967280"
"""Steps from this number on are batch scripts, interactive shells and the like."""


def _task() -> tuple[int, int]:
    return _numbers("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


def _numbers(index: str, count: str) -> tuple[int, int]:
    """Return (number of a process from 1 on, number of processes), by two variables; 0 or -1 for what is not there."""
    first, number = (int(text) if (text := os.environ.get(name, "")).isdecimal() else -1 for name in (index, count))
    return first + 1, number


def _step() -> str:
    """Name the step: the same in all its tasks, and another one in each run of a job."""
    return ".".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
