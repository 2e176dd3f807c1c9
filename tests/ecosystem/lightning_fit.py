"""A fit of three epochs with Lightning, for processes of their own, too, which import nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Net
from torch.utils.data import DataLoader, TensorDataset


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(8, 3, 8, 8)), batch_size=4)


def fit(callback: Any, folder: Path, **options: Any) -> None:
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saving, callback], **options,
    ).fit(Module(), images())  # fmt: skip
