"""Kill processes of jobs in parts at random moments, and let others go on: at last there is the output of one process.

    python tests/support/part_kills.py --count 20

In each trial a random number of processes shares a job, in one of the ways in which they can: `part`, `resume`, srun's
variables, or torchrun's. One process, drawn at random, is ended by SIGKILL after a random time; as torchrun does, the
others of its way are then sent SIGTERM. The target must be as it was, and the same command goes on, in up to three
rounds with a kill each. At last nothing else may be left. The processes are forks of this one, which has imported all;
Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402 - after the path is set; for the forks
from safetensors.torch import save_file  # noqa: E402

from ckpt_tools.cli import main as ckpt  # noqa: E402
from ckpt_tools.compute import native  # noqa: E402
from ckpt_tools.jobs import (  # noqa: E402
    average,  # noqa: F401
    share,
)
from ckpt_tools.storage.hidden import hidden_in  # noqa: E402

WAYS = ("part", "resume", "srun", "torchrun")
KILLS_IN_A_ROW = 3
PATIENCE = 60
"""Seconds after which a process hangs."""


class Trial:
    """One job, shared in one way.

    Attributes:
        way: of `WAYS`.
        count: of processes.
        out: the target.
    """

    def __init__(self, way: str, count: int, out: str, choose: random.Random) -> None:
        self.way, self.count, self.out, self.choose = way, 1 if way == "resume" else count, out, choose
        self.rounds = 0

    def start(self) -> list[int]:
        """Start all processes of a round."""
        self.rounds += 1
        return [self._fork(index) for index in range(self.count)]

    def _fork(self, index: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        words = ["ckpt", "avg", "a.safetensors", "b.safetensors", "-o", self.out, "--threads", "1"]
        if self.way == "torchrun":
            os.environ.update(RANK=str(index), WORLD_SIZE=str(self.count), TORCHELASTIC_RUN_ID=str(self.rounds))
        elif self.way == "srun":
            named = {"PROCID": index, "STEP_NUM_TASKS": self.count, "TASK_PID": os.getpid(), "STEP_ID": self.rounds}
            os.environ.update({f"SLURM_{name}": str(value) for name, value in named.items()})
        else:
            words += ["--resume"] if self.way == "resume" else ["--part", f"{index + 1}/{self.count}"]
        self._become(words, index)
        raise AssertionError

    def _become(self, words: list[str], index: int) -> None:
        fd = os.open(f"said-{index}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.argv = words
        code = 70
        try:
            ckpt()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            os._exit(code)

    def finish(self) -> None:
        """Publish, where no process of the round does."""
        if self.way == "part":
            pid = os.fork()
            if not pid:
                self._become(["ckpt", "avg", "a.safetensors", "b.safetensors", "-o", self.out, "--finish"], self.count)
            ended(pid)

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(Path().glob("said-*")))


def ended(*pids: int, together: bool = False) -> list[int]:
    """Wait for processes; return their exit codes.

    Args:
        together: as torchrun does, send the others SIGTERM when one has failed.
    """
    codes: dict[int, int] = {}
    began, told = time.monotonic(), False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        if together and not told and any(codes.values()):
            told = True
            for pid in {*pids} - codes.keys():
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() - began > PATIENCE:
            for pid in {*pids} - codes.keys():
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"processes {sorted({*pids} - codes.keys())} do not end")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def content(path: str) -> dict[str, bytes]:
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    return {each.name: each.read_bytes() for each in files}


def faults(trial: Trial, good: dict[str, bytes], seconds: float, counts: Counter[str]) -> Iterator[str]:
    """Run a trial; yield what is wrong."""
    for _ in range(trial.choose.randint(1, KILLS_IN_A_ROW)):
        pids = trial.start()
        time.sleep(trial.choose.uniform(0, seconds))
        os.kill(trial.choose.choice(pids), signal.SIGKILL)  # none has been waited for
        began = time.monotonic()
        codes = ended(*pids, together=trial.way == "torchrun")
        counts[f"{trial.way}: kills"] += -signal.SIGKILL in codes
        counts[f"{trial.way}: ended before"] += -signal.SIGKILL not in codes
        if trial.way == "torchrun" and time.monotonic() - began > 10:
            yield f"the others lived on for {time.monotonic() - began:.0f} s"
        if Path(trial.out).exists():
            if content(trial.out) != good:
                yield "the target is not that of one process"
            if -signal.SIGKILL not in codes or hidden_in(Path()):
                break
            return  # killed after all was done
    if not Path(trial.out).exists():
        codes = ended(*trial.start())
        trial.finish()
        if any(codes):
            yield f"the last round ends with {codes}: {trial.said()[-2000:]}"
        elif content(trial.out) != good:
            yield "the output is not that of one process"
    if left := [each.path.name for each in hidden_in(Path())]:
        counts[f"{trial.way}: left after a kill while publishing"] += 1
        code = ended(_cleaned())
        if code != [0] or hidden_in(Path()):
            yield f"{left} cannot be cleaned"


def _cleaned() -> int:
    pid = os.fork()
    if not pid:
        Trial("part", 1, "", random.Random())._become(["ckpt", "clean", ".", "--parts"], 0)
    return pid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    choose, counts, bad = random.Random(options.seed), Counter[str](), 0
    native.SLICE, share.NBYTES = 1 << 14, 1 << 18  # many units, and many lines in the journals
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        for each in "ab":
            save_file({f"w{i}": torch.randn(1 << 20) for i in range(8)}, f"{each}.safetensors")
        for out in ("out.pth", "out"):
            trial = Trial("resume", 1, out, choose)
            began = time.monotonic()
            ended(*trial.start())
            seconds, good = time.monotonic() - began, content(out)
            shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()
            for number in range(options.count // 2):
                way = options.way or WAYS[number % len(WAYS)]
                trial = Trial(way, choose.randint(2, 4), out, choose)
                for fault in faults(trial, good, seconds, counts):
                    bad += 1
                    print(f"{way}, {trial.count} processes, {out}: {fault}", flush=True)  # noqa: T201 - a script
                if Path(out).exists():
                    shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()
                for each in hidden_in(Path()):
                    shutil.rmtree(each.path)
        os.chdir("/")
    print(f"{options.count} trials: {dict(sorted(counts.items()))}, {bad} faults")  # noqa: T201
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
