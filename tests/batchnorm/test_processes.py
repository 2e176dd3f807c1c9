"""Several processes, as torchrun starts them: the same statistics, one writer, one error that ends all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import PATIENCE
from torch import nn

Save = Callable[..., Path]

NETS = """
import os
import torch
from torch import nn
from torch.utils.data import Dataset

def one(): return nn.Sequential(nn.BatchNorm2d(3))

class Images(Dataset):
    def __len__(self): return 37
    def __getitem__(self, i):
        return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(i)) * 2 + 5, i

def images(): return Images()

def short():  # too little for three processes
    return [torch.ones(2, 3, 4, 4) * i for i in range(2)]

class Failing(Images):
    def __getitem__(self, i):
        if os.environ.get("RANK") == "1":
            raise RuntimeError("rank 1 fails")
        return super().__getitem__(i)

def failing(): return Failing()
"""


def launch(folder: Path, processes: int, *args: str) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(start if processes > 1 else []), "-m", "ckpt_tools", "recal-bn", *args],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture
def folder(save: Save, tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    save("averaged.pth", nn.Sequential(nn.BatchNorm2d(3)).double().state_dict())
    return tmp_path


@pytest.mark.parametrize(("data", "counts"), [("images", (1, 3)), ("short", (3,))])
def test_recalibrate_bn_merges_processes_exactly(folder: Path, data: str, counts: tuple[int, ...]) -> None:
    found = []
    for processes in counts:
        result = launch(
            folder, processes, "--model", "nets.py:one", "--data", f"nets.py:{data}",
            "-b", "6", "-j", "0", "--passes", "2", "-o", f"{processes}.pth",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("Wrote ") == 1
        found.append(torch.load(folder / f"{processes}.pth", weights_only=True))
    items = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(i)) * 2 + 5 for i in range(37)])
    whole = items if data == "images" else torch.cat([torch.ones(2, 3, 4, 4) * i for i in range(2)])
    for state in found:
        torch.testing.assert_close(state["0.running_mean"], whole.double().mean((0, 2, 3)), rtol=1e-10, atol=0)
        torch.testing.assert_close(state["0.running_var"], whole.double().var((0, 2, 3)), rtol=1e-10, atol=0)
        assert state["0.num_batches_tracked"].equal(found[0]["0.num_batches_tracked"])


def test_recalibrate_bn_ends_all_processes_with_the_error_of_one(folder: Path) -> None:
    before = sorted(folder.iterdir())
    result = launch(folder, 2, "--model", "nets.py:one", "--data", "nets.py:failing", "-b", "6", "-j", "0")
    assert result.returncode != 0
    assert "rank 1 fails" in result.stderr
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before
