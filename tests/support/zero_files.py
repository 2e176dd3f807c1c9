"""DeepSpeed's checkpoints, laid out by hand as the published code of DeepSpeed 0.19 does it, with NumPy."""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch

Arrays = Mapping[str, np.ndarray]
LR = 1e-3


class ZeroStageEnum(enum.IntEnum):
    """As in ``deepspeed.runtime.zero.config``."""

    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class fragment_address:  # noqa: N801 - its name in DeepSpeed
    """As in ``deepspeed.utils.tensor_fragment``."""

    numel: int
    start: int


_CLASSES = {ZeroStageEnum: "deepspeed.runtime.zero.config", fragment_address: "deepspeed.utils.tensor_fragment"}


@contextmanager
def _installed() -> Iterator[None]:
    """Have the classes where DeepSpeed has them."""
    modules = {}
    for cls, name in _CLASSES.items():
        parts = name.split(".")
        modules |= {".".join(parts[: i + 1]): ModuleType(".".join(parts[: i + 1])) for i in range(len(parts))}
        setattr(modules[name], cls.__name__, cls)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        for cls, name in _CLASSES.items():
            stack.enter_context(mock.patch.object(cls, "__module__", name))
        yield


def save(path: Path, obj: Any) -> None:
    """Save with torch, with the classes of DeepSpeed."""
    with _installed():
        torch.save(obj, path)


def load(path: Path) -> Any:
    """Load with torch what `save` saved."""
    with _installed():
        return torch.load(path, weights_only=False)


def arrays(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Make float32 parameters of random bits, but for NaN and infinity."""
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def flat(parameters: Arrays) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(each.reshape(-1) for each in parameters.values())])


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def partitions(group: Arrays, ranks: int) -> list[np.ndarray]:
    """Cut a group as stages 1 and 2 do: padded to twice the number of ranks; the padding is not stored."""
    whole = flat(group)
    size = -(-len(whole) // (2 * ranks)) * 2
    return [whole[rank * size : (rank + 1) * size] for rank in range(ranks)]


def slices(group: Arrays, ranks: int, rank: int) -> dict[str, fragment_address]:
    """Where the parameters of a group are in the partition of a rank."""
    size = -(-len(flat(group)) // (2 * ranks)) * 2
    found, at = OrderedDict(), 0
    for name, each in group.items():
        begin, end = max(at, rank * size), min(at + each.size, (rank + 1) * size)
        if begin < end:
            found[name] = fragment_address(end - begin, begin - rank * size)
        at += each.size
    return found


def parts(each: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Cut a parameter as stage 3 does: equal parts, the last ones padded with zeros."""
    size = -(-each.size // ranks)
    padded = np.concatenate([each.reshape(-1), np.zeros(size * ranks - each.size, each.dtype)])
    return np.split(padded, ranks) if size else [padded] * ranks


def save_zero(
    folder: Path,
    groups: Sequence[Arrays],
    *,
    stage: int,
    ranks: int,
    frozen: Arrays | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
    shared: Mapping[str, str] | None = None,
    step: int = 1,
    client: Mapping[str, Any] | None = None,
    padded: bool = False,
    prefix: str = "bf16_",
) -> Path:
    """Lay the folder of a checkpoint out.

    Args:
        groups: the parameters of each group of the optimizer.
        frozen: parameters that are not trained; of stage 1 they are in the module alone.
        buffers: of the module.
        shared: names of tied parameters to those that are stored.
        client: what the script saves with it.
        padded: the partitions keep their padding, as those of the optimizer for bf16 without ZeRO's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frozen, buffers, shared = frozen or {}, buffers or {}, shared or {}
    parameters = {name: each for group in (*groups, frozen) for name, each in group.items()}
    half = {name: _tensor(each).bfloat16() for name, each in parameters.items()}
    module = OrderedDict(half if stage < 3 else {name: torch.empty(0, dtype=torch.bfloat16) for name in half})
    module.update({name: module[other] for name, other in shared.items()})
    module.update(buffers)
    for rank in range(ranks):
        states: dict[str, Any] = {
            "module": module,
            "buffer_names": list(buffers),
            "optimizer": None,
            "param_shapes": [OrderedDict((n, torch.Size(each.shape)) for n, each in group.items()) for group in groups],
            "frozen_param_shapes": {n: torch.Size(each.shape) for n, each in frozen.items()} if stage > 1 else None,
            "shared_params": dict(shared) if rank == 0 else {},
            "frozen_param_fragments": {
                name: half[name] if stage == 2 else _tensor(parts(each, ranks)[rank]).bfloat16()
                for name, each in frozen.items()
            }
            if stage > 1
            else None,
            "lr_scheduler": None,
            "skipped_steps": 0,
            "global_steps": step,
            "dp_world_size": ranks,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": stage}},
            "ds_version": "0.19.8",
            **(client or {}),
        }
        if stage == 3:
            save(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", states)
            flats = [flat({name: parts(each, ranks)[rank] for name, each in group.items()}) for group in groups]
        elif rank == 0:
            save(folder / "mp_rank_00_model_states.pt", states)
        if stage < 3:
            flats = [partitions(group, ranks)[rank] for group in groups]
            sizes = [len(partitions(group, ranks)[0]) for group in groups]
            if padded:
                flats = [np.pad(each, (0, size - len(each))) for each, size in zip(flats, sizes, strict=True)]
        moments = {
            "state": {i: {"exp_avg": torch.ones(len(each))} for i, each in enumerate(flats)},
            "param_groups": [{"lr": LR, "params": [i]} for i in range(len(groups))],
        }
        stored = [_tensor(each) for each in flats]
        optimizer: dict[str, Any] = {"zero_stage": ZeroStageEnum(stage), "ds_version": "0.19.8"}
        if stage == 3:
            optimizer |= {"partition_count": ranks, "optimizer_state_dict": moments, "fp32_flat_groups": stored}
        else:
            optimizer |= {
                "partition_count": [ranks] * len(groups),
                "base_optimizer_state": moments,
                "single_partition_of_fp32_groups": stored,
                "param_alignment_paddings": [[0] * len(group) for group in groups],
                "param_slice_mappings": [slices(group, ranks, rank) for group in groups],
            }
        config = {"zero_optimization": {"stage": stage}}
        save(
            folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            {"optimizer_state_dict": optimizer, "ds_config": config, "ds_version": "0.19.8"},
        )
    return folder


def save_universal(source: Path, folder: Path, groups: Sequence[Arrays], *, stage: int) -> Path:
    """Make a universal checkpoint as ds_to_universal does: flat tensors from stage 3, else whole ones in a dict."""
    folder.mkdir(parents=True)
    for path in source.glob("*_model_states.pt"):
        (folder / path.name).write_bytes(path.read_bytes())
    for name, each in ((name, each) for group in groups for name, each in group.items()):
        (folder / "zero" / name).mkdir(parents=True)
        tensor = _tensor(each)
        save(folder / "zero" / name / "fp32.pt", tensor.reshape(-1) if stage == 3 else {"cat_dim": 0, "param": tensor})
        save(folder / "zero" / name / "exp_avg.pt", torch.ones(each.size))
    return folder


# A small model over two groups of parameters, with all that a checkpoint may hold beside them.
GROUPS = [
    arrays({"embed.weight": (13, 7), "norm.weight": (7,), "one": (1,), "conv.weight": (3, 2, 5)}, 1),
    arrays({"conv.bias": (3,), "head.bias": (13,)}, 2),
]
FROZEN = arrays({"frozen.weight": (5, 3), "frozen.bias": (5,)}, 3)
BUFFERS = {"norm.running_mean": torch.rand(7).bfloat16(), "norm.num_batches_tracked": torch.tensor(4)}
SHARED = {"head.weight": "embed.weight"}
STEP = {"stage": 3, "ranks": 3}


def whole(groups: Sequence[Arrays] = GROUPS) -> dict[str, np.ndarray]:
    return {name: each for group in groups for name, each in group.items()}


def masters(frozen: Arrays = FROZEN) -> dict[str, torch.Tensor]:
    """What zero_to_fp32.py writes, in its order: all in float32."""
    expected = {name: t.float() if t.is_floating_point() else t for name, t in BUFFERS.items()}
    expected |= {name: torch.from_numpy(each).bfloat16().float() for name, each in frozen.items()}
    expected |= {name: torch.from_numpy(each) for name, each in whole().items()}
    return expected | {"head.weight": expected["embed.weight"]}


def full(folder: Path, **options: Any) -> Path:
    return save_zero(folder, GROUPS, **{"frozen": FROZEN, "buffers": BUFFERS, "shared": SHARED} | STEP | options)


def equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and torch.equal(found[n], t)
        for n, t in expected.items()
    )


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the state of an optimizer, or the model states, in place."""
    states = load(path)
    change(states.get("optimizer_state_dict", states))
    save(path, states)
