"""K averages for one read of the inputs, against K runs of `ckpt avg`; and a run of one row against another version.

    python benchmarks/rows.py                                # 8 rows of 8 inputs of 300 MB in float32; 5.5 GB of disk
    python benchmarks/rows.py --megabytes 1200 --rows 8
    python benchmarks/rows.py --dtype bfloat16 --against /path/to/another/checkout

Each way runs in a process of its own, interleaved, with the inputs in the page cache. What counts is the time on an idle
machine, and the CPU seconds on a busy one. Bytes read are counted by the kernel (`/proc/self/io`). The files of the rows
are compared with those of the single runs: the exit code is 1 if a byte of a tensor differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent

CHILD = """
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


def child(
    root: Path, paths: list[Path], rows: list[list[float]], outs: list[Path], threads: int | None
) -> dict[str, float]:
    """Write the rows by the engine in a new process; return what it took."""
    job = json.dumps([[*map(str, paths)], rows, [*map(str, outs)], threads])
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, job], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def avg(paths: list[Path], row: list[float], out: Path, threads: int | None) -> dict[str, float]:
    """Run `ckpt avg`; return what it took."""
    weights = ["--mode", "weights", "--weights", ",".join(map(repr, row)), "--no-normalize"]
    command = [sys.executable, "-m", "ckpt_tools", "avg", *map(str, paths), *weights, "-o", str(out), "--force"]
    command += ["--order", "given"]
    command += [] if threads is None else ["--threads", str(threads)]
    before = os.times()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    after = os.times()
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return {
        "seconds": after.elapsed - before.elapsed,
        "user": after.children_user - before.children_user,
        "system": after.children_system - before.children_system,
    }


def make(path: Path, nbytes: int, dtype: str, seed: int) -> None:
    """Write a checkpoint of tensors of 16 million bytes and of some small ones."""
    import torch
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    size = 4_000_000
    count = max(nbytes // (size * kind.itemsize), 1)
    tensors = {
        f"layers.{i}.weight": torch.randn(2000, size // 2000, generator=generator).to(kind) for i in range(count)
    }
    tensors |= {f"layers.{i}.bias": torch.randn(2000, generator=generator).to(kind) for i in range(count)}
    save_file(tensors, path)


def show(name: str, samples: list[dict[str, float]], one: float = 0.0) -> float:
    """Print the median of the CPU seconds and the best time; return the median."""
    cpu = sorted(each["user"] + each["system"] for each in samples)[len(samples) // 2]
    best = min(each["seconds"] for each in samples)
    ratio = f"  {cpu / one:5.2f} of the CPU seconds above" if one else ""
    print(f"{name:40} {best:7.2f} s  {cpu:7.2f} CPU s{ratio}")
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
        folder = Path(name)
        paths = [folder / f"step-{i}.safetensors" for i in range(options.inputs)]
        for i, path in enumerate(paths):
            make(path, options.megabytes * 10**6, options.dtype, i)
        # As an EMA has them, with a decay for each row: every input counts in every row.
        rows = []
        for r in range(options.rows):
            weights = [(0.5 + 0.4 * r / options.rows) ** (options.inputs - i) for i in range(options.inputs)]
            rows.append([weight / sum(weights) for weight in weights])
        outs = [folder / f"row-{r}.safetensors" for r in range(options.rows)]
        single = folder / "single.safetensors"
        samples: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            for r, row in enumerate(rows):
                samples.setdefault("avg", []).append(avg(paths, row, single, options.threads))
                del r
            samples.setdefault("rows", []).append(child(ROOT, paths, rows, outs, options.threads))
            samples.setdefault("one", []).append(child(ROOT, paths, rows[:1], [single], options.threads))
            if options.against:
                samples.setdefault("other", []).append(
                    child(options.against, paths, rows[:1], [single], options.threads)
                )
        runs = [samples["avg"][i : i + options.rows] for i in range(0, len(samples["avg"]), options.rows)]
        whole = [{key: sum(each[key] for each in run) for key in run[0]} for run in runs]
        above = show(f"{options.rows} runs of `ckpt avg`", whole)
        show(f"{options.rows} rows in one run", samples["rows"], above)
        last, size = samples["rows"][-1], sum(path.stat().st_size for path in paths)
        print(
            f"    read {last['read'] / size:.3f} times the inputs in {last['reads']} calls, peak RSS {last['rss'] / 1e6:.0f} MB"
        )
        one = show("one row in one run", samples["one"])
        if options.against:
            show("one row by the other checkout", samples["other"], one)
        different = 0
        for row, out in zip(rows, outs, strict=True):
            child(ROOT, paths, [row], [single], options.threads)
            different += out.read_bytes() != single.read_bytes()
        print(f"rows that differ from a run of their own: {different}")
        return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
