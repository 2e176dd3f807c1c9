"""Checkpoints of a series, small and quick to write."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ckpt_tools.series.find import Series


def weights(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), value)}


def names(series: Series) -> list[str]:
    return [member.path.name for member in series.members]


def sharded(folder: Path, value: float) -> Path:
    folder.mkdir(parents=True)
    save_file({"a": torch.full((2,), value)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.full((2,), value)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def trainer_folder(folder: Path, step: int) -> Path:
    """What Hugging Face's Trainer leaves for one checkpoint."""
    folder.mkdir(parents=True)
    save_file(weights(step), folder / "model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save({"state": {}}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 500}))
    return folder
