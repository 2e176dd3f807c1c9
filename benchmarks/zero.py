"""`ckpt` on checkpoints of DeepSpeed's ZeRO-3: time and peak memory of convert and avg; makes its own files.

    python benchmarks/zero.py                         # 8 ranks, 5 GB of float32 weights; 10 GB of disk
    python benchmarks/zero.py --gigabytes 0.5 --ranks 64

A checkpoint has the shapes of a language model in float32, cut as stage 3 cuts them, with real numbers; the moments of
the optimizer, twice as large, are holes. The optimizer states of the second checkpoint are links to those of the first.
The last table has what planning costs: `ckpt inspect` and `ckpt avg --dry-run` on
checkpoints with a growing number of parameters and of ranks, whose tensors are small. Peak memory is that of the whole
process. What is written is compared with the numbers that were cut up: else the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import mmap
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import GB, BenchError, run

CKPT = [sys.executable, "-m", "ckpt_tools"]


def shapes(elements: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the parameters of a language model of about this size, in 24 blocks; no size divides by 8."""
    dim = max(int((elements / (24 * 12)) ** 0.5), 9) | 1
    wide = 4 * dim + 1
    for i in range(24):
        for name in "qkvo":
            yield f"layers.{i}.attention.{name}.weight", (dim, dim)
        yield f"layers.{i}.up.weight", (wide, dim)
        yield f"layers.{i}.down.weight", (dim, wide)
        yield f"layers.{i}.norm.weight", (dim,)


def make(folder: Path, parameters: list[tuple[str, tuple[int, ...]]], ranks: int, steps: int) -> None:
    """Write checkpoints of stage 3: element i of the model is i / 1e6, in float32."""
    import torch

    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)  # what is changed goes into the file
    names = OrderedDict((name, torch.Size(shape)) for name, shape in parameters)
    total = sum(-(-math.prod(shape) // ranks) for shape in names.values())
    for step in range(1, steps + 1):
        checkpoint = folder / f"global_step{step}"
        checkpoint.mkdir(parents=True)
        for rank in range(ranks):
            states = {
                "module": OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in names),
                "buffer_names": [],
                "param_shapes": [names],
                "global_steps": step,
                "ds_version": "0.19.8",
            }
            torch.save(states, checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            target = checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            if step > 1:
                target.hardlink_to(folder / "global_step1" / target.name)
                continue
            moments = {0: {"exp_avg": torch.empty(total), "exp_avg_sq": torch.empty(total)}}
            optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]}
            state = {"zero_stage": 3, "partition_count": ranks, "optimizer_state_dict": optimizer}
            with torch.serialization.skip_data():
                torch.save({"optimizer_state_dict": {**state, "fp32_flat_groups": [torch.empty(total)]}}, target)
            loaded = torch.load(target, mmap=True, weights_only=True)
            fill(loaded["optimizer_state_dict"]["fp32_flat_groups"][0], names, rank, ranks)


def fill(flat: Any, names: Mapping[str, tuple[int, ...]], rank: int, ranks: int) -> None:
    """Put the numbers of a rank into its flat tensor."""
    at = first = 0
    for shape in names.values():
        numel = math.prod(shape)
        size = -(-numel // ranks)
        begin, end = min(rank * size, numel), min((rank + 1) * size, numel)
        flat[at : at + end - begin] = numbers(first + begin, first + end)
        at, first = at + size, first + numel


def numbers(begin: int, end: int) -> Any:
    import torch

    return (torch.arange(begin, end, dtype=torch.float64) / 1e6).float()


def check(path: Path) -> bool:
    """Compare a file with the numbers that were cut up."""
    import torch

    first = 0
    for tensor in torch.load(path, mmap=True, weights_only=True).values():
        if not torch.equal(tensor.reshape(-1), numbers(first, first + tensor.numel())):
            return False
        first += tensor.numel()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5, help="of the float32 weights of a checkpoint")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job, name, *rest = options.job
        if job == "check":
            return 0 if check(Path(name)) else 1
        elements, ranks, steps, small = map(int, rest)
        parameters = [(f"p{i}.weight", (9, 7)) for i in range(small)] or list(shapes(elements))
        make(Path(name), parameters, ranks, steps)
        return 0
    this = [sys.executable, str(Path(__file__).absolute()), "--job"]
    status = 0
    with tempfile.TemporaryDirectory() as name:
        elements = int(options.gigabytes * GB / 4)
        run([*this, "make", f"{name}/run", str(elements), str(options.ranks), "2", "0"])
        sys.stdout.write(f"{'':34}{'seconds':>10}{'peak GB':>10}\n")
        jobs = {
            "convert, one checkpoint": ["convert", f"{name}/run/global_step2", "--to", "plain"],
            "avg, two checkpoints": ["avg", f"{name}/run"],
        }
        for title, words in jobs.items():
            out = Path(f"{name}/out.pth")
            for _ in range(options.rounds):
                out.unlink(missing_ok=True)
                sample, _ = run([*CKPT, *words, "-o", str(out)])
                sys.stdout.write(f"{title:34}{sample.seconds:10.2f}{sample.rss_gb:10.3f}\n")
            try:
                run([*this, "check", str(out)])
            except BenchError:
                sys.stdout.write(f"{title}: other numbers\n")
                status = 1
            out.unlink()
        sys.stdout.write(f"\n{'planning':34}{'seconds':>10}{'peak GB':>10}\n")
        for count, ranks in ((250, 8), (500, 8), (1_000, 8), (2_000, 8), (1_000, 16), (1_000, 64)):
            folder = f"{name}/{count}-{ranks}"
            run([*this, "make", folder, "0", str(ranks), "2", str(count)])
            for words in (["inspect", f"{folder}/global_step1"], ["avg", folder, "--dry-run"]):
                samples = [run([*CKPT, *words], discard_stdout=True)[0] for _ in range(options.rounds)]
                best = min(samples, key=lambda sample: sample.seconds)
                title = f"{words[0]}, {count} parameters, {ranks} ranks"
                sys.stdout.write(f"{title:34}{best.seconds:10.2f}{best.rss_gb:10.3f}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
