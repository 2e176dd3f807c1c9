"""torch.distributed.checkpoint: what two processes with FSDP save we read, and what we write they load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import in_processes
from small import Net, differences, load, mean, save, train, weights_of
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt_tools

PROCESSES = 2


def sharded(seed: int) -> tuple[Net, torch.optim.SGD]:
    """Make the same network in every process, then keep a part of each parameter in each."""
    torch.manual_seed(seed)
    model = Net(width=6)
    optimizer = train(model, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    return model, optimizer


def whole(model: Net) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_sharded(rank: int, folder: Path) -> None:
    for seed in (1, 2):
        model, _ = sharded(seed)
        (folder / f"ranks-{seed}").mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / f"ranks-{seed}" / f"model_world_size_2_rank_{rank}.pt")
        nested = {"model": get_model_state_dict(model), "epoch": seed}
        dcp.save(nested, checkpoint_id=folder / f"step-{seed}")
        if seed == 1:
            dcp.save(get_model_state_dict(model), checkpoint_id=folder / "flat")
        full = whole(model)
        if rank == 0:
            save(folder / f"expected-{seed}.pth", full)


def load_sharded(rank: int, folder: Path) -> None:
    model, _ = sharded(3)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder / "ours")
    model.load_state_dict(state)
    full = whole(model)
    if rank == 0:
        save(folder / "loaded.pth", full)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a model sharded over two processes, and its whole weights."""
    folder = tmp_path_factory.mktemp("dcp")
    in_processes(PROCESSES, save_sharded, folder)
    return folder


@pytest.mark.shows("dcp", "read raw")
def test_shards_of_two_processes_are_read_as_whole_tensors(run: Path) -> None:
    assert len(list((run / "step-1").glob("*.distcp"))) == PROCESSES
    expected = load(run / "expected-1.pth")
    assert not differences(ckpt_tools.open_checkpoint(run / "step-1", state="raw"), expected)
    assert not differences(ckpt_tools.open_checkpoint(run / "flat"), expected)


def test_a_file_of_each_of_two_processes_is_read_as_whole_tensors(run: Path) -> None:
    for seed in (1, 2):
        found = ckpt_tools.open_checkpoint(run / f"ranks-{seed}")
        assert not differences(found, load(run / f"expected-{seed}.pth"))


@pytest.mark.shows("dcp", "read raw")
@pytest.mark.parametrize("name", ["averaged.pth", "averaged.safetensors"])
def test_sharded_checkpoints_are_averaged(run: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    ckpt_tools.average([run / "step-1", run / "step-2"], out=out)
    expected = mean(load(run / "expected-1.pth"), load(run / "expected-2.pth"))
    assert not differences(ckpt_tools.open_checkpoint(out), expected)


@pytest.mark.shows("plain", "write")
@pytest.mark.shows("plain", "library loads")
def test_a_sharded_checkpoint_becomes_one_file_that_loads(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "whole.pth"
    ckpt_tools.convert(run / "step-2", to="plain", out=out)
    model = Net(width=6)
    model.load_state_dict(load(out))
    assert not differences(model.state_dict(), load(run / "expected-2.pth"))


@pytest.mark.shows("dcp", "write")
@pytest.mark.shows("dcp", "library loads")
def test_sharded_models_load_what_convert_writes(tmp_path: Path) -> None:
    model = Net(width=6)
    train(model, 1)
    ckpt_tools.convert(save(tmp_path / "plain.pth", weights_of(model)), to="dcp", out=tmp_path / "ours")
    in_processes(PROCESSES, load_sharded, tmp_path)
    assert not differences(load(tmp_path / "loaded.pth"), model.state_dict())


@pytest.mark.shows("dcp", "write")
@pytest.mark.shows("dcp", "library loads")
def test_one_process_loads_what_convert_writes(tmp_path: Path) -> None:
    model = Net(width=6)
    train(model, 1)
    ckpt_tools.convert(save(tmp_path / "plain.pth", weights_of(model)), to="dcp", out=tmp_path / "ours")
    state = Net(width=6).state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert not differences(state, model.state_dict())
