"""Random checkpoints: small files and folders of every format, layout and dtype, from a seed.

`same_bytes.py` runs its jobs on them. torch, safetensors and torch.distributed.checkpoint write the files, as training
scripts do; nothing here uses ckpt-tools.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
MEMORY = ("contiguous", "transposed", "channels-last", "rows", "columns", "expanded", "tied", "view")
SHAPES = ((), (0,), (1,), (3,), (17, 5), (64,), (8, 3, 3, 3), (4, 0, 2), (130, 70), (2, 3, 4, 5), (33, 1, 7))
LARGE = ((700, 1030), (3, 411, 513), (1 << 20,))
WRAPPERS = ("module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.")
FORMATS = ("zip", "legacy", "safetensors", "sharded-safetensors", "sharded-bin", "dcp")
FIRST = 1_700_000_000
"""Modification time of the first file of a series, seconds."""


class Settings:
    """An object of a class of the training script; no reader knows the class."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    memory: str = "contiguous"


@dataclass
class Series:
    """Checkpoints of one run in a folder.

    Attributes:
        paths: relative to the folder, oldest first.
        steps: of the checkpoints.
        layout: a key of `LAYOUTS`.
        format: one of `FORMATS`.
        metrics: of the checkpoints, where they store one.
        names: of the tensors in the first checkpoint, without wrapper prefixes.
    """

    paths: list[str]
    steps: list[int]
    layout: str
    format: str
    names: list[str]
    metrics: list[float] = field(default_factory=list)


def random_specs(rng: random.Random) -> list[Spec]:
    """Draw the names, shapes, dtypes and memory formats of a model."""
    if rng.random() < 0.06:  # many tiny tensors
        dtype = rng.choice(DTYPES[:3])
        return [Spec(f"blocks.{i}.norm.weight", (rng.randint(1, 9),), dtype) for i in range(rng.randint(150, 400))]
    main = rng.choices(DTYPES, weights=(12, 5, 4, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0))[0]
    mixed, odd = rng.random() < 0.4, rng.random() < 0.5
    specs = []
    for i in range(rng.randint(1, 9)):
        dtype = rng.choice(DTYPES) if mixed and rng.random() < 0.5 else main
        memory = rng.choice(MEMORY) if odd and rng.random() < 0.5 else "contiguous"
        name = rng.choice(("layers.{}.attn.weight", "layers.{}.attn.bias", "blocks.{}.mlp.fc1.weight", "p{}"))
        specs.append(Spec(name.format(i), rng.choice(SHAPES), dtype, memory))
    if rng.random() < 0.5:
        n = rng.choice((1, 4, 24))
        specs += [Spec(f"bn.{key}", (n,), torch.float32) for key in ("weight", "bias", "running_mean", "running_var")]
        specs.append(Spec("bn.num_batches_tracked", (), torch.int64))
    if rng.random() < 0.12:
        memory = rng.choice(("contiguous", "contiguous", "transposed", "channels-last"))
        specs.insert(rng.randint(0, len(specs)), Spec("embed.weight", rng.choice(LARGE), main, memory))
    return specs


def _values(spec: Spec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if spec.dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if spec.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=spec.dtype)
    if not spec.dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=generator).to(spec.dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype)


def _tensor(spec: Spec, before: Weights, generator: torch.Generator) -> Tensor:
    shape = spec.shape
    if spec.memory == "transposed" and len(shape) >= 2:
        return _values(spec, shape[::-1], generator).permute(*range(len(shape))[::-1])
    if spec.memory == "channels-last" and len(shape) == 4:
        return _values(spec, shape, generator).contiguous(memory_format=torch.channels_last)
    if spec.memory == "rows" and shape:
        return _values(spec, (shape[0] + 3, *shape[1:]), generator)[2 : shape[0] + 2]
    if spec.memory == "columns" and shape:
        return _values(spec, (*shape[:-1], 2 * shape[-1] + 1), generator)[..., 1::2]
    if spec.memory == "expanded" and shape and shape[0]:
        return _values(spec, (1, *shape[1:]), generator).expand(shape)
    same = [tensor for tensor in before.values() if tensor.dtype == spec.dtype]
    if spec.memory == "tied" and same:
        return same[-1]
    if spec.memory == "view" and same and same[-1].is_contiguous() and same[-1].numel():
        return same[-1].view(-1)[: (same[-1].numel() + 1) // 2]
    return _values(spec, shape, generator)


def random_weights(specs: list[Spec], generator: torch.Generator) -> Weights:
    """Fill the tensors with seeded values; tied tensors and views share storages."""
    weights: Weights = OrderedDict()
    for spec in specs:
        weights[spec.name] = _tensor(spec, weights, generator)
    return weights


def _adam(weights: Weights) -> dict[str, Any]:
    floats = [tensor for tensor in weights.values() if tensor.is_floating_point()]
    state = {
        i: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.zeros(tensor.shape, dtype=tensor.dtype),
            "exp_avg_sq": torch.ones(tensor.shape, dtype=tensor.dtype),
        }
        for i, tensor in enumerate(floats)
    }
    return {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": list(range(len(floats)))}]}


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return OrderedDict((prefix + name, tensor) for name, tensor in weights.items())


def _parameters(weights: Weights) -> list[Tensor]:
    return [
        tensor
        for name, tensor in weights.items()
        if tensor.is_floating_point() and not name.endswith(("running_mean", "running_var"))
    ]


def _module(weights: Weights) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    seed = sum(tensor.numel() for tensor in weights.values())
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(seed % 97)
    return module


def _run(step: int, metric: float) -> dict[str, Any]:
    return {"epoch": step, "arch": "net", "metric": metric, "args": argparse.Namespace(lr=0.1, name="run")}


def _timm(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    return {
        **_run(step, metric), "state_dict": raw, "optimizer": _adam(raw), "version": 2, "state_dict_ema": ema,
        "amp_scaler": {"scale": 65536.0, "_growth_tracker": 3},
    }  # fmt: skip


def _lightning(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    return {
        "epoch": 1, "global_step": step, "pytorch-lightning_version": "2.5.0", "state_dict": ema, "loops": {"fit": {}},
        "callbacks": {}, "optimizer_states": [_adam(raw)], "lr_schedulers": [{"last_epoch": step}],
        "hyper_parameters": {"lr": 0.1}, "current_model_state": raw,
        "averaging_state": {"n_averaged": torch.tensor(step)},
    }  # fmt: skip


def _lightning_swa(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    state = {"n_averaged": torch.tensor(step), "average_model_state": ema}
    return {
        "epoch": step, "global_step": step, "pytorch-lightning_version": "2.5.0", "state_dict": raw, "loops": {},
        "callbacks": {"StochasticWeightAveraging": state, "ModelCheckpoint": {"best_model_score": metric}},
        "optimizer_states": [_adam(raw)], "lr_schedulers": [],
    }  # fmt: skip


def _torchvision(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    return {
        "model": raw, "optimizer": _adam(raw), "lr_scheduler": {"last_epoch": step}, "epoch": step,
        "args": argparse.Namespace(model="resnet"), "scaler": {"scale": 2.0},
        "model_ema": OrderedDict({"n_averaged": torch.tensor(step), **_prefixed("module.", ema)}),
    }  # fmt: skip


def _litema(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    names = {name: name.replace(".", "") for name in ema}
    average = {f"model_ema.{names[name]}": tensor for name, tensor in ema.items() if tensor.is_floating_point()}
    counts = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(step, dtype=torch.int32)}
    return {"state_dict": {**_prefixed("model.", raw), **counts, **average}, "global_step": step, "epoch": 1}


def _mmengine(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    swapped = OrderedDict({"steps": torch.tensor(step), **_prefixed("module.", raw)})
    return {
        "meta": {"epoch": step, "experiment_name": "run"}, "state_dict": ema, "message_hub": {"log": [1.0]},
        "optimizer": _adam(raw), "ema_state_dict": swapped,
    }  # fmt: skip


def _ema_pytorch(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    counts = {"initted": torch.tensor(True), "step": torch.tensor(step)}
    return {**_prefixed("online_model.", raw), **_prefixed("ema_model.", ema), **counts}


def _dino(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    student = _prefixed("module.backbone.", raw)
    return {
        "student": student, "teacher": _prefixed("backbone.", ema), "optimizer": _adam(raw), "epoch": step,
        "args": argparse.Namespace(arch="vit"), "dino_loss": {"center": torch.zeros(1, 4)},
    }  # fmt: skip


def _fairseq(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    exact = {name: tensor.float() for name, tensor in ema.items() if tensor.is_floating_point()}
    return {
        "args": None, "cfg": {"model": {"_name": "net"}}, "model": raw, "last_optimizer_state": _adam(raw),
        "optimizer_history": [{"num_updates": step}], "task_state": {},
        "extra_state": {"epoch": step, "ema": ema, "ema_fp32_params": exact},
    }  # fmt: skip


def _shadow(ema: Weights, step: int) -> dict[str, Any]:
    return {"decay": 0.99, "num_updates": step, "shadow_params": _parameters(ema), "collected_params": None}


def _diffusers(raw: Weights, ema: Weights, step: int, metric: float) -> Any:
    settings = {"min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": False, "inv_gamma": 1.0, "power": 0.66}
    average = {"decay": 0.999, "optimization_step": step, **settings, "shadow_params": _parameters(ema)}
    return {"model": raw, "ema": average, "global_step": step}


Build = Callable[[Weights, Weights, int, float], Any]
LAYOUTS: dict[str, Build] = {
    "plain": lambda raw, ema, step, metric: raw,
    "timm": _timm,
    "timm-raw": lambda raw, ema, step, metric: {
        key: value for key, value in _timm(raw, ema, step, metric).items() if key != "state_dict_ema"
    },
    "deit": lambda raw, ema, step, metric: {"model": raw, "model_ema": ema, "epoch": step, "scaler": {"scale": 1.0}},
    "torchvision": _torchvision,
    "model-state-dict": lambda raw, ema, step, metric: {
        "model_state_dict": raw, "ema_state_dict": ema, "optimizer_state_dict": _adam(raw), "step": step,
        "loss": metric, "rng_state": torch.arange(16, dtype=torch.uint8),
    },
    "averaged-model": lambda raw, ema, step, metric: OrderedDict(
        {"n_averaged": torch.tensor(step), **_prefixed("module.", ema)}
    ),
    "litema": _litema,
    "lightning": _lightning,
    "lightning-swa": _lightning_swa,
    "mmengine": _mmengine,
    "ultralytics": lambda raw, ema, step, metric: {
        "epoch": step, "model": _module(raw), "ema": _module(ema), "updates": step, "train_args": {"lr": 0.1},
    },
    "d2go": lambda raw, ema, step, metric: {"model": raw, "ema_state": ema, "iteration": step},
    "ema-pytorch": _ema_pytorch,
    "dit": lambda raw, ema, step, metric: {
        "model": raw, "ema": ema, "opt": _adam(raw), "args": argparse.Namespace(a=1)
    },
    "icefall": lambda raw, ema, step, metric: {
        "model": raw, "optimizer": None, "scheduler": None, "model_avg": ema, "batch_idx_train": step,
        "average_period": 200,
    },
    "dino": _dino,
    "fairseq": _fairseq,
    "diffusers": _diffusers,
    "pytorch-ema": lambda raw, ema, step, metric: {"model": raw, "ema": _shadow(ema, step), "epoch": step},
    "score_sde": lambda raw, ema, step, metric: {
        "optimizer": _adam(raw), "model": _prefixed("module.", raw), "ema": _shadow(ema, step), "step": step,
    },
    "nested": lambda raw, ema, step, metric: {
        "model": {"teacher": ema, "student": raw}, "epoch": step, "settings": Settings(step), "note": "run",
    },
}  # fmt: skip
"""Trees that training scripts save, as functions of (raw weights, averaged weights, step, metric)."""


def _save_torch(tree: Any, path: Path, *, legacy: bool) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)


def _plain(weights: Weights) -> Weights:
    """Copy weights so that each has its own contiguous storage, as the safetensors library asks."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}


def _save_safetensors(weights: Weights, path: Path, rng: random.Random, step: int) -> None:
    metadata = rng.choice((None, {"format": "pt"}, {"format": "pt", "step": str(step), "note": "caf\u00e9"}))
    save_file(_plain(weights), path, metadata)


def _save_sharded(weights: Weights, folder: Path, rng: random.Random, suffix: str, shards: int) -> None:
    folder.mkdir()
    names = list(weights)
    shards = min(shards, len(names))
    stem, index_stem = ("model", "model") if suffix == "safetensors" else ("pytorch_model", "pytorch_model")
    index: dict[str, str] = {}
    for i in range(shards):
        part = names[i::shards]
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        content = {name: weights[name] for name in part}
        if suffix == "safetensors":
            save_file(_plain(content), folder / file, {"format": "pt"})
        else:
            torch.save(content, folder / file)
        index |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.itemsize for tensor in weights.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=2)
    (folder / f"{index_stem}.{suffix}.index.json").write_text(text + "\n")
    if rng.random() < 0.5:
        (folder / "config.json").write_text('{"model_type": "net"}\n')
        (folder / "tokenizer.json").write_text("{}\n")


def _save_dcp(tree: Any, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, checkpoint_id=str(folder))


def _altered(specs: list[Spec], rng: random.Random, how: str) -> list[Spec]:
    """Return the tensors of one more checkpoint whose header is not that of the first."""
    specs = list(specs)
    i = rng.randrange(len(specs))
    if how == "order":
        rng.shuffle(specs)
    elif how == "missing" and len(specs) > 1:
        del specs[i]
    elif how == "dtype":
        specs[i] = replace(specs[i], dtype=rng.choice(DTYPES[:4]))
    elif how == "shape":
        specs[i] = replace(specs[i], shape=(*specs[i].shape, 2))
    elif how == "memory":
        specs[i] = replace(specs[i], memory=rng.choice(MEMORY))
    return specs


def _poison(weights: Weights, generator: torch.Generator) -> None:
    for tensor in weights.values():
        if tensor.dtype in (torch.float32, torch.bfloat16, torch.float64) and tensor.numel() and tensor.is_contiguous():
            values = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=tensor.dtype)
            where = torch.randint(0, tensor.numel(), (3,), generator=generator)
            tensor.view(-1)[where] = values
            return


def make_series(
    folder: Path,
    seed: str,
    *,
    files: int,
    stem: str = "checkpoint",
    layout: str | None = None,
    format: str | None = None,  # noqa: A002 - the word of the reports
) -> Series:
    """Write a series of random checkpoints into a folder.

    Args:
        folder: an existing folder.
        seed: decides everything.
        files: how many checkpoints.
        stem: of the names.
        layout: a key of `LAYOUTS`; drawn if not given.
        format: one of `FORMATS`; drawn if not given.

    Returns:
        The paths and what is known of them.
    """
    rng, generator = random.Random(seed), torch.Generator()
    generator.manual_seed(rng.getrandbits(48))
    # Files of torch hold any layout; the other formats hold names and tensors alone.
    if format is None:
        only_torch = layout not in (None, "plain", "averaged-model", "ema-pytorch")
        format = rng.choices(FORMATS, weights=(10, 2, 0, 0, 0, 0) if only_torch else (12, 3, 6, 3, 2, 2))[0]  # noqa: A001
    if layout is None:
        flat = format not in ("zip", "legacy")
        layout = "plain" if flat or rng.random() < 0.3 else rng.choice(list(LAYOUTS))
    specs = random_specs(rng)
    prefix = rng.choice(WRAPPERS) if rng.random() < 0.3 else ""
    how = rng.choice(("order", "missing", "dtype", "shape", "memory", "prefix")) if rng.random() < 0.3 else ""
    odd_one, poisoned = rng.randrange(files), rng.random() < 0.06
    start, gap = rng.randint(1, 12), rng.choice((1, 1, 1, 5, 500))
    steps = [start + gap * i + (rng.randint(0, gap // 2) if gap > 1 else 0) for i in range(files)]
    suffix = {"safetensors": ".safetensors"}.get(format, rng.choice((".pth", ".pt", ".ckpt", ".pth.tar")))
    suffix = suffix if format in ("zip", "legacy", "safetensors") else ""
    pattern = rng.choice(
        (f"{stem}-{{}}", f"{stem}_{{}}", f"{stem}-epoch={{}}", f"{stem}.step{{}}" if suffix else f"{stem}{{}}")
    )
    shards = rng.randint(1, 4)
    series = Series([], steps, layout, format, [spec.name for spec in specs])
    for i, step in enumerate(steps):
        own = _altered(specs, rng, how) if how and i == odd_one else specs
        raw, ema = random_weights(own, generator), random_weights(own, generator)
        if poisoned and i == odd_one:
            _poison(raw, generator)
            _poison(ema, generator)
        here = "" if how == "prefix" and i == odd_one else prefix
        raw = _prefixed(here, raw)
        if rng.random() < 0.3:
            ema = _prefixed(here, ema)
        metric = round(rng.random(), 3)
        series.metrics.append(metric)
        tree = LAYOUTS[layout](raw, ema, step, metric)
        path = folder / (pattern.format(step) + suffix)
        if format in ("zip", "legacy"):
            _save_torch(tree, path, legacy=format == "legacy")
        elif format == "safetensors":
            _save_safetensors(tree, path, random.Random(f"{seed}/metadata"), step)
        elif format == "dcp":
            _save_dcp(tree if rng.random() < 0.5 else {"model": tree, "optim": {"lr": 0.1}}, path)
        else:
            _save_sharded(tree, path, random.Random(f"{seed}/shards"), format.removeprefix("sharded-"), shards)
        os.utime(path, (FIRST + 10 * i, FIRST + 10 * i))
        series.paths.append(path.name)
    return series
