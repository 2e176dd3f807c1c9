"""The heavy jobs, each run in a fresh process: ``python child.py JOB ARGS...``; the last line written is JSON.

Ways of averaging report ``seconds`` without start-up: from the end of the imports to the saved file.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SEED = 20240229
SAMPLE_TENSORS = 24
SHARDS = 4
INDEX = "model.safetensors.index.json"


def make(name: str, scale: str, *missing: str) -> None:
    """Write the files MISSING of a series: one seeded base, a small seeded change for each file."""
    from series import BY_NAME

    series = BY_NAME[name]
    shapes = series.shapes(float(scale))
    everything = series.paths(Path("/"), float(scale))
    numbers = [Path(path).name for path in everything]
    for path in missing:
        tensors = drawn(shapes, series.dtype, numbers.index(Path(path).name))
        part = path + ".part" + series.suffix  # a file with the final name is a complete one
        save(dict(tensors) if series.suffix else tensors, part, len(shapes))
        Path(part).rename(path)


def drawn(shapes: dict[str, tuple[int, ...]], dtype: str, number: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file: slices of one pool of numbers, because it takes long to draw numbers."""
    import torch

    longest = max(torch.Size(shape).numel() for shape in shapes.values()) + 97
    generator = torch.Generator().manual_seed(SEED)
    base = torch.randn(longest, generator=generator).mul_(0.02)
    generator.manual_seed(SEED + 1 + number)
    noise = torch.randn(longest, generator=generator).mul_(0.001)
    for i, (name, shape) in enumerate(shapes.items()):
        if name.endswith("num_batches_tracked"):
            yield name, torch.tensor(100 * number)
            continue
        count, start = torch.Size(shape).numel(), i % 97
        values = base[start : start + count] + noise[start : start + count]
        yield name, values.view(shape).to(getattr(torch, dtype))


def save(state: Any, path: str, count: int = 0) -> None:
    """Write a dict to a file, or an iterator of COUNT tensors to a folder of shards, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    if path.endswith(".pth"):
        torch.save(state, path)
    elif path.endswith(".safetensors"):
        save_file(state, path, metadata={"format": "pt"})
    else:
        if isinstance(state, dict):
            state, count = iter(state.items()), len(state)
        shutil.rmtree(path, ignore_errors=True)
        Path(path).mkdir()
        where: dict[str, str] = {}
        for shard in range(SHARDS):
            taken = count * (shard + 1) // SHARDS - count * shard // SHARDS
            tensors = dict(next(state) for _ in range(taken))
            file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
            save_file(tensors, f"{path}/{file}", metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
        (Path(path) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def load(path: str) -> dict[str, Tensor]:
    import torch
    from safetensors.torch import load_file

    if Path(path).is_dir():
        return {k: v for file in sorted(Path(path).glob("*.safetensors")) for k, v in load_file(file).items()}
    if path.endswith(".safetensors"):
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def peak_gb() -> float:
    """Return the peak resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def timed(work: Callable[[], object]) -> dict[str, float]:
    before = peak_gb()
    start = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start, "imports_gb": before, "peak_gb": peak_gb()}


def loop(out: str, *paths: str) -> dict[str, float]:
    """Average as hand-written scripts do: add each file to the first in place, divide, save."""
    import safetensors.torch  # noqa: F401  # part of the start-up
    import torch  # noqa: F401

    def work() -> None:
        total = load(paths[0])
        for path in paths[1:]:
            for name, value in load(path).items():
                total[name] += value
        for value in total.values():
            if value.is_floating_point():
                value /= len(paths)
        save(total, out)

    return timed(work)


def timm(out: str, *paths: str) -> dict[str, float]:
    """Average by the method of timm's script: a float64 dictionary with counts, clamped to float32 at the end."""
    import safetensors.torch  # noqa: F401
    import torch

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
        save(mean, out)

    return timed(work)


def mergekit(out: str, *paths: str) -> dict[str, float]:
    """Average by `mergekit-pytorch`, mergekit's command for state dicts of any model, with the method `linear`."""
    from mergekit.scripts.merge_raw_pytorch import main

    models = [{"model": path, "parameters": {"weight": 1.0}} for path in paths]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as config:
        json.dump({"merge_method": "linear", "models": models}, config)  # JSON is YAML
        config.flush()
        return timed(lambda: main([config.name, out, "--quiet"], standalone_mode=False))


def ours(device: str, out: str, *paths: str) -> dict[str, float]:
    """Average by `ckpt_tools.average`; a small average before the clock starts does the imports.

    Memory is measured inside as well: the libraries of a CUDA build of torch touch a further 0.1 GB when a process
    ends, and in the peak of the whole process this would hide as much of the memory of the work.
    """
    from ckpt_tools import average

    options: dict[str, Any] = {"device": device} if device else {}
    with tempfile.TemporaryDirectory() as folder:
        small = [Path(folder) / f"{i}.safetensors" for i in range(2)]
        header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        for i, path in enumerate(small):
            path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([i, 0, 0, 0]))
        average(small, out=f"{folder}/out.safetensors", **options)
    return timed(lambda: average(list(paths), out=out, force=True, **options))


def opened(path: str) -> dict[str, Callable[[], Tensor]]:
    """Return the names in a checkpoint, each with a function that reads its tensor."""
    import torch
    from safetensors import safe_open

    if path.endswith(".pth"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: lambda value=value: value for name, value in state.items()}
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        reader = safe_open(file, framework="pt")
        found |= {name: lambda reader=reader, name=name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return found


def verify(out: str, *paths: str) -> dict[str, float | None]:
    """Return the largest distance of OUT from a NumPy float64 mean, in ulp of the inputs' dtype.

    It is measured on a sample of the tensors. None if OUT has another dtype, or other integers than the last file.
    """
    import numpy as np
    import torch

    bits = {torch.float32: (23, -126), torch.bfloat16: (7, -126), torch.float16: (10, -14)}
    got, inputs = opened(out), [opened(path) for path in paths]
    names = list(inputs[0])
    if sorted(got) != sorted(names):
        raise SystemExit("the output does not hold the names of the inputs")
    sample = names[:: max(1, len(names) // SAMPLE_TENSORS)]
    worst = 0.0
    for name in sample:
        have, last = got[name](), inputs[-1][name]()
        if have.shape != last.shape:
            raise SystemExit(f"{name} has another shape than in the inputs")
        if have.dtype != last.dtype:
            return {"ulp": None}
        if not have.is_floating_point():
            if not torch.equal(have, last):
                return {"ulp": None}
            continue
        # In parts, so that a tensor of 2 GB does not need 12 GB here.
        flat, terms = have.reshape(-1), [each[name]().reshape(-1) for each in inputs]
        mantissa, lowest = bits[have.dtype]
        for start in range(0, len(flat), 1 << 24):
            part = slice(start, start + (1 << 24))
            mean = sum(term[part].double().numpy() for term in terms) / len(terms)
            step = np.ldexp(1.0, np.maximum(np.frexp(mean)[1] - 1, lowest) - mantissa)
            worst = max(worst, float((np.abs(flat[part].double().numpy() - mean) / step).max()))
    return {"ulp": worst}


JOBS: dict[str, Callable[..., Any]] = {job.__name__: job for job in (make, loop, timm, mergekit, ours, verify)}

if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(JOBS[sys.argv[1]](*sys.argv[2:])) + "\n")
