"""Lightning's sharded checkpoints, laid out by hand: the files of DCP, and all other entries in meta.pt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_tools import open_checkpoint, verify
from ckpt_tools.errors import CorruptError

WEIGHTS = {"w": torch.arange(6.0), "b": torch.ones(2)}
TRAINER = {"pytorch-lightning_version": "2.5.0", "global_step": 3}

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, which is not distributed here


def folder(path: Path, meta: dict[str, Any]) -> Path:
    dcp.save({"model": WEIGHTS, "optimizer_0": {"state": {"w": {"exp_avg": torch.ones(6)}}}}, checkpoint_id=path)
    torch.save(meta, path / "meta.pt")
    return path


def test_the_model_of_the_trainer_is_its_state_dict(tmp_path: Path) -> None:
    found = open_checkpoint(folder(tmp_path / "step=3.ckpt", TRAINER), state="state_dict")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in WEIGHTS.items()}


def test_a_folder_that_torch_wrote_passes(tmp_path: Path) -> None:
    checks = verify(folder(tmp_path / "step=3.ckpt", TRAINER)).checks
    assert {check.name: check.result for check in checks}["crc32"] == "ok"


@pytest.mark.parametrize(
    ("meta", "key"),
    [
        (TRAINER | {"state_dict": {"w": torch.zeros(6)}}, "state_dict"),
        ({"model": {"w": torch.zeros(6)}}, "model"),
        (TRAINER | {"optimizer_states": []}, "optimizer_states"),
    ],
)
def test_no_entry_of_meta_takes_the_place_of_one_in_the_other_files(
    meta: dict[str, Any], key: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptError, match=f"'{key}' is in meta.pt, and in the files beside it"):
        open_checkpoint(folder(tmp_path / "step=3.ckpt", meta))
