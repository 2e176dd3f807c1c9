"""torch.distributed.checkpoint: what any number of processes saved is read as torch itself puts it together."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from crafting import same
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ckpt_tools import open_checkpoint
from ckpt_tools.formats import read_header
from ckpt_tools.formats.unpickle import Inert
from ckpt_tools.payload import read_tensor
from ckpt_tools.tensors import TensorSpec


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        dcp.save(state, checkpoint_id=folder)
    return folder


def oracle(folder: Path) -> Any:
    """Everything that a folder holds, as torch reads it."""
    gathered = folder.with_name(f"{folder.name}-gathered.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, gathered)
    return torch.load(gathered, weights_only=False)


def agree(ours: Any, theirs: Any, stamps: Any) -> None:
    """Hold a tree of ours against what torch read: the same keys, values and bits."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, TensorSpec)
        assert same(read_tensor(ours, stamps), theirs.detach())
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            agree(ours[key], value, stamps)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for mine, value in zip(ours, theirs, strict=True):
            agree(mine, value, stamps)
    else:
        assert ours == theirs or (isinstance(ours, Inert) and type(ours).global_name.endswith(type(theirs).__name__))


def trained(steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One process: a model, its optimizer, counters, and tensors of unusual kinds."""
    model, optimizer = trained()
    state = {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "step": 7,
        "lists": [torch.ones(2), {"deep": [torch.zeros(()), "text"]}, 5],
        "odd": {
            "bfloat16": torch.arange(6.0).bfloat16().view(3, 2),
            "empty": torch.empty(0, 3),
            "transposed": torch.arange(12.0).view(3, 4).t(),
            "view": torch.arange(12.0)[3:9:2],
            "uint16": torch.arange(5).to(torch.uint16),
            "bool": torch.tensor([True, False]),
            "complex": torch.tensor([1 + 2j]),
            "float8": torch.arange(4.0).to(torch.float8_e4m3fn),
        },
        "name": "a text",
        "nothing": None,
        "pair": (1, torch.ones(3)),
        "path": Path("somewhere"),
    }
    return save(state, tmp_path / "single")


def test_a_folder_is_read_as_torch_reads_it(single: Path) -> None:
    header = read_header(single)

    theirs = oracle(single)
    pair, ours = theirs.pop("pair"), header.tree.pop("pair")
    assert ours[0] == pair[0]
    assert same(read_tensor(ours[1]), pair[1])
    agree(header.tree, theirs, header.files)
    assert header.format == "dcp"
    assert {stamp.path.name for stamp in header.files} == {".metadata", "__0_0.distcp"}
    assert header.nbytes == sum(path.stat().st_size for path in single.iterdir())
    assert {name.rpartition(".")[2] for name in header.foreign} == {"PosixPath"}


def test_a_folder_opens_as_a_mapping(single: Path) -> None:
    checkpoint = open_checkpoint(single, state="model")

    assert checkpoint.counters == {"step": 7}
    model = oracle(single)["model"]
    assert list(checkpoint) == list(model)
    assert all(same(checkpoint[name], tensor) for name, tensor in model.items())


def test_a_flat_state_dict_is_read(tmp_path: Path) -> None:
    model, _ = trained()
    folder = save(model.state_dict(), tmp_path / "flat")

    checkpoint = open_checkpoint(folder)
    assert list(checkpoint) == list(model.state_dict())
    assert all(same(checkpoint[name], tensor) for name, tensor in model.state_dict().items())
