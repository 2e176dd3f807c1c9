"""FSDP: what four real processes save (two: test_dcp.py), a file a rank or by DCP, is read as torch gathers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import in_processes
from small import Net, differences, load, mean, save, train
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import ckpt_tools
from ckpt_tools.errors import UnsupportedError

# Sizes that no number of processes divides; of some parameters, the last processes have nothing.
WIDTH = 7


def network(seed: int) -> Net:
    torch.manual_seed(seed)
    model = Net(WIDTH)
    train(model, 2).zero_grad()
    return model


def fsdp1(seed: int, **options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(network(seed), device_id=torch.device("cpu"), use_orig_params=True, **options)


def save_all(rank: int, folder: Path) -> None:
    """Save each model in two ways: a file a rank, as verl names them, and by DCP; and what it is as a whole."""

    def keep(name: str, model: Any, state: dict[str, Any]) -> None:
        home = folder / name
        (home / "ranks").mkdir(parents=True, exist_ok=True)
        torch.save(state, home / "ranks" / f"model_world_size_4_rank_{rank}.pt")
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            save(home / "whole.pth", whole)
        if not name.startswith("fsdp1-local"):
            dcp.save(state, checkpoint_id=home / "dcp")

    mesh = init_device_mesh("cpu", (4,))
    for seed in (1, 2):
        model = network(seed)
        fully_shard(model, mesh=mesh)
        keep(f"fsdp2-{seed}", model, model.state_dict())
    writer = dcp.HuggingFaceStorageWriter(str(folder / "fsdp2-2" / "hf"), save_distributed=True)
    dcp.save(model.state_dict(), storage_writer=writer)
    for name, kind, options in (
        ("fsdp1-sharded", StateDictType.SHARDED_STATE_DICT, {}),
        ("fsdp1-mesh", StateDictType.SHARDED_STATE_DICT, {"device_mesh": mesh}),
        ("fsdp1-local", StateDictType.LOCAL_STATE_DICT, {}),
    ):
        wrapped = fsdp1(1, **options)
        with FullyShardedDataParallel.state_dict_type(wrapped, kind):
            state = wrapped.state_dict()
        keep(name, wrapped, state)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = network(1)
    fully_shard(model, mesh=square)
    keep("hybrid", model, model.state_dict())
    model = network(1)
    parallelize_module(model, square["tp"], {"head": ColwiseParallel()})
    fully_shard(model, mesh=square["dp"])
    keep("parallel", model, model.state_dict())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    in_processes(4, save_all, folder)
    return folder


@pytest.mark.shows("fsdp-ranks", "read raw")
@pytest.mark.shows("hf-shards", "read raw")
def test_every_way_of_saving_is_read_as_torch_gathers_it(saved: Path) -> None:
    ways = [path for path in sorted(saved.glob("*/*/")) if path.parent.name != "fsdp1-local"]
    assert len(ways) == 13
    for path in ways:
        found = ckpt_tools.open_checkpoint(path)
        assert not differences(found, load(path.parent / "whole.pth")), path
        assert not found.foreign or path.name == "dcp"


def test_flat_parameters_are_refused(saved: Path) -> None:
    with pytest.raises(UnsupportedError, match="is a flat parameter of FSDP"):
        ckpt_tools.open_checkpoint(saved / "fsdp1-local" / "ranks")


@pytest.mark.shows("fsdp-ranks", "read raw")
def test_rank_files_are_averaged_and_load(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "averaged.pth"
    ckpt_tools.average([saved / "fsdp2-1" / "ranks", saved / "fsdp2-2" / "ranks"], out=out)
    expected = mean(*(load(saved / f"fsdp2-{seed}" / "whole.pth") for seed in (1, 2)))
    assert not differences(load(out), expected)
    Net(WIDTH).load_state_dict(load(out))
