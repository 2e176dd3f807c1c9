"""The heavy jobs of the benchmarks, each run in a fresh process: ``python child.py JOB ARGS...``.

The last line written is a JSON object. Ways of averaging report ``seconds`` from after the imports
to the saved file, so that start-up stands apart.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SEED = 20240229
VIT_L_DEPTH = 24
VIT_L_DIM = 1024
BIG_TENSOR_NUMEL = 500_000_000  # 2 GB of fp32
SAMPLE_TENSORS = 24


def vit_shapes(dim: int, depth: int = VIT_L_DEPTH) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ViT with 16-pixel patches, 224-pixel images, 1000 classes."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, (224 // 16) ** 2 + 1, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        for name, rows, cols in (
            ("norm1", dim, 0),
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("norm2", dim, 0),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows, cols) if cols else (rows,)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (1000, dim), "head.bias": (1000,)}
    return shapes


def save_whole(obj: object, path: str) -> None:
    """A file with the final name is a complete one, also after an interrupted run."""
    torch.save(obj, path + ".part")
    Path(path + ".part").replace(path)


def series(pattern: str, scale: str, *indices: str) -> dict[str, float]:
    """Write the asked-for files of the series: one seeded base, a small seeded change for each file.

    The scale is of bytes; the number of tensors stays, so per-tensor costs stay in proportion.
    """
    dim = max(16, round(VIT_L_DIM * float(scale) ** 0.5 / 16) * 16)
    shapes = vit_shapes(dim)
    gen = torch.Generator().manual_seed(SEED)
    base = {name: torch.randn(shape, generator=gen).mul_(0.02) for name, shape in shapes.items()}
    longest = max(v.numel() for v in base.values())
    for index in indices:
        gen.manual_seed(SEED + 1 + int(index))
        # One pool of noise for all tensors of a file: 300 million fresh normals a file would take longer
        # than the benchmark, and an averager cannot tell.
        noise = torch.randn(longest, generator=gen).mul_(0.001)
        moved = {k: v + noise[: v.numel()].view(v.shape) for k, v in base.items()}
        save_whole(moved, pattern.format(int(index)))
    return {"numel": sum(v.numel() for v in base.values())}


def big(pattern: str, scale: str, count: str) -> dict[str, float]:
    """Write files that hold one single tensor, 2 GB at scale 1."""
    numel = int(BIG_TENSOR_NUMEL * float(scale))
    gen = torch.Generator()
    for index in range(int(count)):
        gen.manual_seed(SEED + index)
        save_whole({"weight": torch.rand(numel, generator=gen)}, pattern.format(index))
    return {"numel": numel}


def timed(work: Callable[[], object]) -> dict[str, float]:
    start = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start}


def peak_gb() -> float:
    """The highest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def load(path: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def loop(out: str, *paths: str) -> dict[str, float]:
    """What people write by hand: add each file to the first in place, divide, save."""

    def work() -> None:
        total = load(paths[0])
        for path in paths[1:]:
            for name, value in load(path).items():
                total[name] += value
        for value in total.values():
            value /= len(paths)
        torch.save(total, out)

    return timed(work)


def float64(out: str, *paths: str) -> dict[str, float]:
    """A whole float64 dictionary as accumulator with a count for each key, as timm's script does it."""

    def work() -> None:
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for path in paths:
            for name, value in load(path).items():
                wide = value.to(torch.float64)
                if name in sums:
                    sums[name] += wide
                else:
                    sums[name] = wide
                counts[name] = counts.get(name, 0) + 1
        limits = torch.finfo(torch.float32)
        mean = {}
        for name, value in sums.items():
            value.div_(counts[name])
            mean[name] = value.clamp(limits.min, limits.max).to(torch.float32)
        torch.save(mean, out)

    return timed(work)


def ours(out: str, *paths: str) -> dict[str, float]:
    """ckpt_tools through its Python function, imports done before the clock starts.

    Memory is told from inside as well: the libraries of a CUDA build touch a further 0.1 GB while the
    process ends, and in the peak of the whole process that would hide as much of the work's own memory.
    """
    import ckpt_tools

    average = ckpt_tools.average  # imported at first use: now, not inside the clock
    before = peak_gb()
    told = timed(lambda: average(list(paths), mode="uniform", out=out, force=True))
    return told | {"before_gb": before, "peak_gb": peak_gb()}


def verify(out: str, *paths: str) -> dict[str, float]:
    """Worst distance, in float32 steps, of OUT from a numpy float64 mean, over a sample of tensors."""
    import numpy as np

    def ordered(x: np.ndarray) -> np.ndarray:
        # Floats as integers that count representable steps, negative ones mirrored.
        bits = x.view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    got = torch.load(out, map_location="cpu", weights_only=True, mmap=True)
    inputs = [torch.load(p, map_location="cpu", weights_only=True, mmap=True) for p in paths]
    names = list(inputs[0])
    if list(got) != names:
        raise SystemExit("the output does not hold the names of the inputs in their order")
    step = max(1, len(names) // SAMPLE_TENSORS)
    sample = {*names[::step], max(names, key=lambda n: inputs[0][n].numel())}
    worst = 0
    for name in sorted(sample):
        have = got[name]
        if have.dtype != torch.float32 or have.shape != inputs[0][name].shape:
            raise SystemExit(f"{name} has another dtype or shape than in the inputs")
        acc = np.zeros(tuple(have.shape), dtype=np.float64)
        for tensors in inputs:
            acc += tensors[name].numpy()
        want = (acc / len(paths)).astype(np.float32)
        worst = max(worst, int(np.abs(ordered(have.numpy()) - ordered(want)).max()))
    return {"ulp": worst, "tensors": len(sample)}


JOBS: dict[str, Callable[..., dict[str, float]]] = {
    "series": series,
    "big": big,
    "loop": loop,
    "float64": float64,
    "ours": ours,
    "verify": verify,
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(JOBS[sys.argv[1]](*sys.argv[2:])) + "\n")
