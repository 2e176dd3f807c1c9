"""K averages for one read of the inputs, against K runs of `ckpt avg`; and a run of one row against another version.

    python benchmarks/rows.py                                # 8 rows of 8 inputs of 300 MB; 5.5 GB of disk
    python benchmarks/rows.py --megabytes 1200 --rows 8
    python benchmarks/rows.py --dtype bfloat16 --against ../another/checkout

Each way runs in a process of its own, interleaved, with the inputs in the page cache. On an idle machine the time
counts (the median of the rounds' ratios), on a busy one the CPU seconds. The kernel counts the bytes read
(`/proc/self/io`). The files of the rows are compared with those of the single runs: the exit code is 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parent.parent

RUN = """
import json, os, resource, sys, time
begin = time.perf_counter()
from ckpt_tools.checkpoints.open import open_checkpoint
from ckpt_tools.compute import engine
from ckpt_tools.compute.work_units import OutFile
from ckpt_tools.formats.format import Writing
from ckpt_tools.formats.safetensors import SAFETENSORS
from ckpt_tools.series.weighted_sums import weighted_sums

def fields():
    return {name: int(value) for name, value in (line.split(":") for line in open("/proc/self/io"))}

paths, rows, outs, threads = json.loads(sys.argv[1])
before = fields()
opened = [open_checkpoint(path) for path in paths]
aligned = {name: tuple(each.specs[name] for each in opened) for name in opened[-1].specs}
tensors = weighted_sums(aligned, *rows, dtype=None, keep_running=False)
outputs = []
for row, out in enumerate(outs):
    plan = SAFETENSORS.plan(tensors, Writing(name=out))[0]
    fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.truncate(fd, plan.size)
    outputs.append(OutFile(plan, fd, row) if row else OutFile(plan, fd))
engine.run(outputs, threads=threads)
after = fields()
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "seconds": time.perf_counter() - begin, "user": used.ru_utime, "system": used.ru_stime,
    "rss": used.ru_maxrss * 1024, "read": after["rchar"] - before["rchar"], "reads": after["syscr"] - before["syscr"],
}))
"""


MAKE = """
import json, sys, torch
from safetensors.torch import save_file

path, nbytes, dtype, seed = json.loads(sys.argv[1])
kind, generator, size = getattr(torch, dtype), torch.Generator().manual_seed(seed), (2000, 2000)
count = max(nbytes // (4_000_000 * kind.itemsize), 1)
tensors = {f"layers.{i}.weight": torch.randn(size, generator=generator).to(kind) for i in range(count)}
tensors |= {f"layers.{i}.bias": torch.randn(2000, generator=generator).to(kind) for i in range(count)}
save_file(tensors, path)
"""


def child(script: str, job: list[Any], root: Path = ROOT) -> dict[str, float]:
    """Run a script in a new process, with the package of a checkout; return what it prints."""
    command = [sys.executable, "-c", script, json.dumps(job, default=str)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout or "{}")
    return found


def avg(paths: list[Path], row: list[float], out: Path, threads: int | None) -> dict[str, float]:
    """Run `ckpt avg`; return what it took."""
    command = [
        sys.executable,
        "-m",
        "ckpt_tools",
        "avg",
        *map(str, paths),
        "-o",
        str(out),
        "--force",
        "--order",
        "given",
    ]
    command += ["--mode", "weights", "--weights", ",".join(map(repr, row)), "--no-normalize"]
    command += [] if threads is None else ["--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    after = os.times()
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return {
        "seconds": after.elapsed - before.elapsed,
        "user": after.children_user - before.children_user,
        "system": after.children_system - before.children_system,
    }


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def show(name: str, samples: list[dict[str, float]], one: float = 0.0) -> float:
    """Print the median of the CPU seconds and the best time; return the median."""
    cpu = sorted(each["user"] + each["system"] for each in samples)[len(samples) // 2]
    best = min(each["seconds"] for each in samples)
    ratio = f"  {cpu / one:5.2f} of the CPU seconds above" if one else ""
    say(f"{name:40} {best:7.2f} s  {cpu:7.2f} CPU s{ratio}")
    return cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--inputs", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--against", type=Path, help="another checkout, whose run of one row is compared")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, threads = Path(name), options.threads
        paths = [folder / f"step-{i}.safetensors" for i in range(options.inputs)]
        for i, path in enumerate(paths):
            child(MAKE, [path, options.megabytes * 10**6, options.dtype, i])
        # As an EMA has them, with a decay for each row: every input counts in every row.
        rows = []
        for r in range(options.rows):
            weights = [(0.5 + 0.4 * r / options.rows) ** (options.inputs - i) for i in range(options.inputs)]
            rows.append([weight / sum(weights) for weight in weights])
        outs = [folder / f"row-{r}.safetensors" for r in range(options.rows)]
        single = folder / "single.safetensors"
        several, runs, one, other = [], [], [], []
        for _ in range(options.rounds):
            each = [avg(paths, row, single, threads) for row in rows]
            runs.append({key: sum(run[key] for run in each) for key in each[0]})
            several.append(child(RUN, [paths, rows, outs, threads]))
            one.append(child(RUN, [paths, rows[:1], [single], threads]))
            if options.against:
                other.append(child(RUN, [paths, rows[:1], [single], threads], options.against))
        above = show(f"{options.rows} runs of `ckpt avg`", runs)
        show(f"{options.rows} rows in one run", several, above)
        ratios = sorted(k["seconds"] / alone["seconds"] for k, alone in zip(several, runs, strict=True))
        middle = ratios[len(ratios) // 2]
        spread = f"{middle:.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        say(f"    seconds of {options.rows} rows over those of {options.rows} runs: {spread}")
        last, size = several[-1], sum(path.stat().st_size for path in paths)
        read = f"{last['read'] / size:.3f} times the inputs in {last['reads']} calls"
        say(f"    read {read}, peak RSS {max(run['rss'] for run in several) / 1e6:.0f} MB")
        above = show("one row in one run", one)
        if options.against:
            show("one row by the other checkout", other, above)
        different = 0
        for row, out in zip(rows, outs, strict=True):
            child(RUN, [paths, [row], [single], threads])
            different += out.read_bytes() != single.read_bytes()
        say(f"rows that differ from a run of their own: {different}")
        return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
