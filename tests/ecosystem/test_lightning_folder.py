"""Lightning's sharded checkpoints: folders that two processes save are read as consolidate_checkpoint writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.consolidate_checkpoint import _format_checkpoint
from processes import in_processes
from small import Net, differences, mean
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import ckpt_tools
from ckpt_tools.formats import read_header

PROCESSES = 2


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net(7)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class SavesAsFSDP(ModelCheckpoint):
    """Saves the same state by the strategy of FSDP, too, which runs on GPUs alone."""

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        strategy = FSDPStrategy(state_dict_type="sharded")
        strategy.cluster_environment = trainer.strategy.cluster_environment
        other = Path(filepath).parent.with_name("fsdp") / Path(filepath).name
        strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(weights_only=False), other)


def fit(rank: int, folder: Path) -> None:
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT="0", RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0",
        WORLD_SIZE=str(PROCESSES), LOCAL_WORLD_SIZE=str(PROCESSES), TORCHELASTIC_RUN_ID="tests",
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=PROCESSES,
        strategy=ModelParallelStrategy(PROCESSES, 1, process_group_backend="gloo"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[SavesAsFSDP(folder / "parallel", filename="{epoch}-{step}", save_top_k=-1)],
    )
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(8, 3, 8, 8)), batch_size=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lightning")
    in_processes(PROCESSES, fit, folder)
    return folder


def consolidated(folder: Path) -> dict[str, Any]:
    loaded = _load_distributed_checkpoint(folder)
    return _format_checkpoint(loaded) if "model" in loaded else loaded


EPOCHS = ("epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt")


@pytest.mark.shows("lightning-folder", "read raw")
@pytest.mark.parametrize("kind", ["parallel", "fsdp"])
def test_folders_are_read_as_lightning_consolidates_them(run: Path, kind: str) -> None:
    for epoch, name in enumerate(EPOCHS):
        expected = consolidated(run / kind / name)
        found = ckpt_tools.open_checkpoint(run / kind / name)
        assert found.header.format.name == "lightning-folder"
        assert not differences(found, expected["state_dict"])
        assert found.counters == {"epoch": epoch, "global_step": 2 * epoch + 2}
        tree = read_header(run / kind / name).tree
        renamed = {"optimizer_0"} if kind == "parallel" else set()  # which its consolidate_checkpoint cannot read
        assert tree.keys() - {"optimizer_states"} == expected.keys() - {"optimizer_states"} - renamed
        assert len(tree["optimizer_states"]) == 1


@pytest.mark.shows("lightning-folder", "library loads")
@pytest.mark.parametrize("kind", ["parallel", "fsdp"])
def test_folders_are_averaged_into_a_file_that_lightning_loads(run: Path, kind: str, tmp_path: Path) -> None:
    report = ckpt_tools.average([run / kind], out=tmp_path / "averaged.ckpt")
    assert [each.step for each in report.inputs] == [2, 4]
    expected = mean(*(consolidated(run / kind / name)["state_dict"] for name in EPOCHS))
    module = Module.load_from_checkpoint(tmp_path / "averaged.ckpt", weights_only=False)
    assert not differences(module.state_dict(), expected)


def test_one_folder_becomes_one_file_that_lightning_loads(run: Path, tmp_path: Path) -> None:
    ckpt_tools.strip(run / "fsdp" / EPOCHS[1], out=tmp_path / "whole.ckpt")
    expected = consolidated(run / "fsdp" / EPOCHS[1])["state_dict"]
    module = Module.load_from_checkpoint(tmp_path / "whole.ckpt", weights_only=False)
    assert not differences(module.state_dict(), expected)
