"""Measure a job that several processes share, on a sharded series: time, equal bytes, a killed process, and going on.

    python benchmarks/shared.py                          # 10 GB to read; 17 GB of disk, 24 GB of RAM
    python benchmarks/shared.py --scale 0.02 --rounds 1  # a quick test of the script; its figures mean nothing

Each way is run as a user would, from the start of its first process to the output in its place. The ways are run in
turns, and the first round is not counted. Exit code 1: bytes differ, a target was there after a kill, or the others
lived on for more than ten seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import HERE, Sample, busy_seconds, interleave, run_job
from series import BY_NAME

CKPT = [sys.executable, "-m", "ckpt_tools"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SERIES = BY_NAME["sharded"]
LIVES_ON = 10.0
"""Seconds that a process may live on after another one was killed."""


class Shared:
    """The series, and the ways to average it.

    Attributes:
        folder: for the output.
        inputs: the series.
        nbytes: of an input.
        digests: of the output of each way.
    """

    def __init__(self, folder: Path, inputs: Sequence[str], nbytes: int) -> None:
        self.folder, self.inputs, self.nbytes = folder, inputs, nbytes
        self.steps = 0
        self.target = folder / "averaged"
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        self.environment = os.environ | {"PYTHONPATH": path}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.digests: dict[str, str] = {}

    def command(self, *options: str) -> list[str]:
        return ["avg", *self.inputs, "-o", f"{self.target}/", *options]

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=self.environment, cwd=self.folder
        )

    def ended(self, *processes: subprocess.Popen[str]) -> None:
        for each in processes:
            _, said = each.communicate()
            if each.returncode:
                raise SystemExit(f"{' '.join(map(str, each.args))}: {each.returncode}\n{said}")

    def clear(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        for each in self.stages():
            shutil.rmtree(each)
        os.sync()

    def stages(self) -> list[Path]:
        return [*self.folder.glob(".averaged.*.parts")]

    def one(self, threads: int) -> None:
        self.ended(self.start(*CKPT, *self.command("--threads", str(threads))))

    def parts(self, count: int, threads: int) -> None:
        options = ["--threads", str(threads)]
        self.ended(*[self.start(*CKPT, *self.command("--part", f"{i}/{count}", *options)) for i in range(1, count + 1)])
        self.ended(self.start(*CKPT, *self.command("--finish")))

    def srun(self, count: int, threads: int) -> None:
        self.ended(*self.tasks(count, threads))

    def tasks(self, count: int, threads: int) -> list[subprocess.Popen[str]]:
        """Start processes as srun does: each with its number, and the number of its process, which becomes ckpt."""
        self.steps += 1
        of_step = f"export SLURM_STEP_ID={self.steps} SLURM_STEP_NUM_TASKS={count} SLURM_TASK_PID=$$"
        command = [*CKPT, *self.command("--threads", str(threads))]
        return [
            self.start("sh", "-c", f'{of_step} SLURM_PROCID={index}; exec "$@"', "sh", *command)
            for index in range(count)
        ]

    def torchrun(self, count: int, threads: int) -> None:
        self.ended(self.start(*TORCHRUN, str(count), "-m", "ckpt_tools", *self.command("--threads", str(threads))))

    def sample(self, name: str, way: Callable[..., None], *numbers: int) -> Sample:
        """Run a way; its bytes must be those of all others."""
        self.clear()
        busy, started = busy_seconds(), time.perf_counter()
        before = _child_seconds()
        way(*numbers)
        seconds = time.perf_counter() - started
        cpu = _child_seconds() - before
        others = max(0.0, busy_seconds() - busy - cpu) / seconds
        if name not in self.digests:
            self.digests[name] = digest(self.target)
        if self.stages():
            raise SystemExit(f"{name} leaves {self.stages()}")
        return Sample(seconds, cpu=cpu, others=others)


def _child_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def digest(folder: Path) -> str:
    """Return a digest of all files in a folder."""
    hasher = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        hasher.update(path.name.encode())
        with path.open("rb") as file:
            while data := file.read(1 << 24):
                hasher.update(data)
    return hasher.hexdigest()


def done(stage: Path) -> tuple[int, int]:
    """Return (bytes done, bytes in all), by the journals of a stage."""
    lines = [line for path in stage.glob("*.jsonl") for line in path.read_text().splitlines()]
    said = [json.loads(line) for line in lines if line.endswith("}")]
    return sum(each.get("nbytes", 0) for each in said), max((each.get("total", 0) for each in said), default=0)


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found


def killed(shared: Shared, started: str) -> dict[str, Any]:
    """Kill one of two processes by SIGKILL when a third is done; then go on with what is there in one process.

    Args:
        started: ``torchrun`` or ``srun``.
    """
    shared.clear()
    if started == "torchrun":
        whole = [shared.start(*TORCHRUN, "2", "-m", "ckpt_tools", *shared.command("--threads", "1"))]
    else:
        whole = shared.tasks(2, 1)
    while not (found := shared.stages()) or done(found[0])[0] < done(found[0])[1] / 3 or not done(found[0])[1]:
        time.sleep(0.02)
        if any(each.poll() is not None for each in whole):
            raise SystemExit(f"{started} ended before a third was done: {whole[0].communicate()[1]}")
    victims = children(whole[0].pid) if started == "torchrun" else [whole[1].pid]
    os.kill(victims[-1], signal.SIGKILL)
    began = time.perf_counter()
    said = [each.communicate()[1] for each in whole]
    seconds = time.perf_counter() - began
    (stage,) = shared.stages()
    moved, total = done(stage)
    told = re.findall(r"^(?:Error: |Part |Terminated|Interrupted)[^(\n]*", "\n".join(said), flags=re.MULTILINE)
    result: dict[str, Any] = {
        "started": started,
        "seconds_until_all_ended": seconds,
        "exit_codes": [each.returncode for each in whole],
        "published": shared.target.exists(),
        "done": moved / total,
        "said": told,
    }
    code = (
        "import sys\nfrom ckpt_tools.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code or 0, open('/proc/self/io').read().split()[1])\n"
        "else:\n    print(0, open('/proc/self/io').read().split()[1])\n"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, *shared.command("--resume", "--threads", "2")],
        capture_output=True, text=True, env=shared.environment, cwd=shared.folder, check=True,
    )  # fmt: skip
    status, read = again.stdout.split()[-2:]
    if status != "0":
        raise SystemExit(again.stderr)
    payload = len(shared.inputs) * shared.nbytes
    missing = payload * (1 - moved / total)
    shared.digests[f"{started}, killed, --resume"] = digest(shared.target)
    return result | {"read_by_resume": int(read), "payload_missing": missing, "beyond": int(read) - missing}


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the files, which are kept there")
    parser.add_argument("--kills-only", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = (options.folder or Path(name)).absolute()
        folder.mkdir(exist_ok=True)
        paths = SERIES.paths(folder, options.scale)
        if missing := [path for path in paths if not Path(path).exists()]:
            run_job("make", SERIES.name, str(options.scale), *missing)
        shared = Shared(folder, paths, SERIES.file_bytes(options.scale))
        nbytes = (len(paths) + 1) * SERIES.file_bytes(options.scale)
        print(f"{len(paths)} x {SERIES.file_bytes(options.scale) / 1e9:.2f} GB, {nbytes / 1e9:.2f} GB with the output")  # noqa: T201
        ways = {
            "one process, 2 threads": lambda: shared.sample("one", shared.one, 2),
            "--part, 2 processes, 1 thread": lambda: shared.sample("part 2", shared.parts, 2, 1),
            "--part, 4 processes, 1 thread": lambda: shared.sample("part 4", shared.parts, 4, 1),
            "srun, 2 processes, 1 thread": lambda: shared.sample("srun 2", shared.srun, 2, 1),
            "torchrun, 2 processes, 1 thread": lambda: shared.sample("torchrun 2", shared.torchrun, 2, 1),
            "torchrun, 4 processes, 1 thread": lambda: shared.sample("torchrun 4", shared.torchrun, 4, 1),
        }
        first = next(iter(ways))
        if options.kills_only:
            ways = {first: ways[first]}
        few = ("torchrun, 4 processes, 1 thread",)
        found, _ = interleave(ways, rounds=options.rounds, few=few, few_rounds=1, say=_say)
        base = statistics.median(each.seconds for each in found[first])
        for way, samples in found.items():
            seconds = [each.seconds for each in samples]
            middle = statistics.median(seconds)
            cpu, others = (statistics.median(getattr(each, what) for each in samples) for what in ("cpu", "others"))
            print(  # noqa: T201
                f"| {way} | {middle:.1f} ({min(seconds):.1f}-{max(seconds):.1f}) | {middle / base:.2f} | {cpu:.1f} "
                f"| {nbytes / middle / 1e9:.2f} | {others:.2f} |"
            )
        wrong = False
        for started in ("torchrun", "srun"):
            fact = killed(shared, started)
            # Tasks of srun go on with their own parts.
            wrong |= fact["published"] is True or (started == "torchrun" and fact["seconds_until_all_ended"] > LIVES_ON)
            print(json.dumps(fact, indent=1))  # noqa: T201
        same = len({*shared.digests.values()}) == 1
        print(f"the same bytes: {same} ({', '.join(shared.digests)})")  # noqa: T201
        shared.clear()
    return int(wrong or not same)


if __name__ == "__main__":
    sys.exit(main())
