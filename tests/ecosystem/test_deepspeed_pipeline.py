"""DeepSpeed's pipelines without ZeRO: a file for each layer is averaged, and DeepSpeed loads what we write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from small import differences, load, mean, save
from torch import nn

import ckpt_tools

STEPS = ("global_step1", "global_step2", "global_step3")


def _engine(folder: Path) -> Any:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    # Nothing is compiled.
    torch.compile = lambda function=None, **_: function
    deepspeed.ops.__compatible_ops__.clear()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(0)
    layers = [LayerSpec(nn.Linear, 4, 8), LayerSpec(nn.ReLU), LayerSpec(nn.Linear, 8, 2)]
    network = PipelineModule(layers, num_stages=1, loss_fn=nn.MSELoss())
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}},
    }
    return deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)[0]


def _work(_: int, folder: Path) -> None:
    """Train, save after each step, average, and load the average as DeepSpeed does."""
    torch.set_num_threads(1)
    engine = _engine(folder)
    batches = iter([(torch.randn(2, 4), torch.randn(2, 2)) for _ in STEPS])
    for tag in STEPS:
        engine.train_batch(batches)
        engine.save_checkpoint(folder / "run", tag=tag)
        save(folder / f"{tag}.pth", engine.module.state_dict())
    ckpt_tools.average(folder / "run", out=folder / "run" / "averaged")
    engine.load_checkpoint(folder / "run", tag="averaged", load_module_only=True)
    save(folder / "loaded.pth", engine.module.state_dict())
    torch.distributed.destroy_process_group()


@pytest.mark.shows("ranks", "read raw")
@pytest.mark.shows("ranks", "write")
@pytest.mark.shows("ranks", "library loads")
def test_an_average_of_layers_loads(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_work, (tmp_path,), nprocs=1)
    expected = mean(*(load(tmp_path / f"{tag}.pth") for tag in STEPS))
    assert differences(load(tmp_path / f"{STEPS[-1]}.pth"), expected)
    assert not differences(load(tmp_path / "loaded.pth"), expected)
    names = {path.name for path in (tmp_path / "run" / STEPS[0]).iterdir()}
    assert {path.name for path in (tmp_path / "run" / "averaged").iterdir()} == names
