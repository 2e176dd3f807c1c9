"""The runner: what it borrows of the process it gives back."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_runner import PATIENCE

# Resident memory in MB around a run that frees a block of 256 MB, in a process of its own.
PROBE = """
import sys
from contextlib import suppress
import torch
from torch import nn
from ckpt_tools.errors import ModelError
from ckpt_tools.evaluation.data import Batches, Loading
from ckpt_tools.evaluation.runner import Runner

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def freed():
    before = resident()
    block = torch.ones(64 * 2**20)
    del block
    return resident() - before

class Network(nn.Module):
    def forward(self, images):
        print(freed())
        if sys.argv[1] == "fails":
            raise KeyError
        return images

batches = Batches([(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))], Loading(images=-1))
runner = Runner(Network(), torch.device("cpu"), amp=False, channels_last=False)
freed()
with suppress(ModelError):
    runner.evaluate("evaluating", batches, lambda what, done, total: None)
print(freed())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
@pytest.mark.parametrize("end", ["returns", "fails"])
def test_runner_restores_the_settings_of_the_allocator(end: str) -> None:
    command = [sys.executable, "-c", PROBE, end]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    within, after = map(float, done.stdout.split())
    assert after < 50
    assert within > 200  # or nothing was borrowed
