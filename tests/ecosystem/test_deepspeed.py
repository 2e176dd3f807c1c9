"""DeepSpeed: what two processes with ZeRO save is read as its own zero_to_fp32 and ds_to_universal make it whole."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu")

import deepspeed
import pytest
import torch
import torch.multiprocessing
from deepspeed.checkpoint.ds_to_universal import main as to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from small import differences, load, mean
from torch import nn

import ckpt_tools

PROCESSES = 2
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 1": (1, {"bf16": {"enabled": True}}),
    "bf16 optimizer": (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    "stage 2": (2, {"fp16": {"enabled": True, "initial_scale_power": 4}}),
    "round robin": (2, {"zero_optimization": {"round_robin_gradients": True}}),
    "stage 3": (3, {"bf16": {"enabled": True}, "zero_optimization": {"sub_group_size": 40}}),
}
STEPS = (1, 2)


class Tied(nn.Module):
    """Odd sizes, tied and frozen weights, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.embed = nn.Embedding(13, 7)
        self.norm = nn.BatchNorm1d(7)
        self.middle = nn.Linear(7, 5)
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.arange(6))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(words).mean(1) * self.norm.weight + self.norm.bias
        return (self.head(self.frozen(self.middle(hidden))) * self.scale).float().square().mean()


def train(rank: int, folder: Path, port: int) -> None:
    """Save a checkpoint after each step of each run."""
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": PROCESSES, "LOCAL_SIZE": PROCESSES}
    os.environ.update({key: str(value) for key, value in {**where, "RANK": rank, "LOCAL_RANK": rank}.items()})
    # Nothing is compiled, and float16 is as good on this accelerator as another dtype.
    torch.compile = lambda function=None, **_: function
    deepspeed.ops.__compatible_ops__.clear()
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo", verbose=False)
    for name, (stage, options) in RUNS.items():
        torch.manual_seed(0)
        model = Tied()
        zero = {"stage": stage, **options.get("zero_optimization", {})}
        config = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
        config |= {"zero_force_ds_cpu_optimizer": False, **options, "zero_optimization": zero}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for name, p in trained.items() if name.endswith("bias") is biases]}
            for biases in (False, True)
        ]
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config)
        for _ in STEPS:
            engine.backward(engine(torch.randint(13, (2, 4))))
            engine.step()
            engine.save_checkpoint(str(folder / name))
    deepspeed.comm.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, args=(folder, port), nprocs=PROCESSES)
    return folder


def merged(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The result of zero_to_fp32 as its script writes it: floating-point tensors in float32."""
    found = get_fp32_state_dict_from_zero_checkpoint(str(run), tag=f"global_step{step}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


@pytest.mark.shows("deepspeed", "read raw")
@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16 optimizer"])  # which zero_to_fp32 refuses
def test_the_weights_are_those_of_zero_to_fp32(runs: Path, tmp_path: Path, name: str) -> None:
    run, expected = runs / name, [merged(runs / name, step) for step in STEPS]
    for step, weights in zip(STEPS, expected, strict=True):
        out = tmp_path / f"{step}.bin"
        ckpt_tools.convert(run / f"global_step{step}", to="plain", out=out)
        # Of stage 1, zero_to_fp32 leaves frozen parameters out.
        found = load(out)
        frozen = {key: found.pop(key) for key in ("frozen.weight", "frozen.bias")} if name == "stage 1" else {}
        assert not differences(found, weights)
        assert list(found) == list(weights)
        module = load_module(run / f"global_step{step}") if frozen else {}
        assert not differences(frozen, {key: module[key].float() for key in frozen})
    ckpt_tools.average(run, out=tmp_path / "mean.bin")
    average = load(tmp_path / "mean.bin")
    assert not differences({key: average[key] for key in expected[0]}, mean(*expected))


def load_module(folder: Path) -> dict[str, torch.Tensor]:
    states = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    return dict(states["module"])


@pytest.mark.parametrize("name", [name for name in RUNS if name != "round robin"])
def test_a_universal_checkpoint_has_the_weights_of_the_ranks(runs: Path, tmp_path: Path, name: str) -> None:
    source, folder = runs / name / "global_step2", tmp_path / "global_step2_universal"
    workers = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    places = {"input_folder": str(source), "output_folder": str(folder)}
    to_universal(SimpleNamespace(**places, **workers, strict=True, inject_missing_state=True))
    found, ranks = dict(ckpt_tools.open_checkpoint(folder)), dict(ckpt_tools.open_checkpoint(source))
    assert not differences(found, ranks)
    for path in folder.glob("zero/*/fp32.pt"):
        stored = load(path) if name == "stage 3" else torch.load(path, weights_only=False)["param"]
        key = path.parent.name
        if key in ("embed.weight", "scale", "middle.weight", "middle.bias", "norm.weight", "norm.bias"):
            assert torch.equal(found[key].reshape(-1), stored.reshape(-1))


@pytest.mark.parametrize("name", ["stage 1", "stage 2"])
def test_the_weights_of_16_bits_are_those_of_the_module(runs: Path, name: str) -> None:
    folder = runs / name / "global_step2"
    assert not differences(ckpt_tools.open_checkpoint(folder, state="module"), load_module(folder))
